//! The lead: hands out rounds, trains its own part, and takes the outer steps.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use retort_core::{Code, Error, Kind, Result};

use super::{
    crew::Crew,
    exchange::{Delivery, Exchange, MAX_BATCHES, Part, Replica, Round},
    inner::{self, Pace},
    outer::{self, Rounds},
};
use crate::{
    data::{Order, TrainingData},
    parallel::implausible,
    train::{Run, no_trainer},
    trainer::Trainer,
};

/// A lead waits this long for the replicas that its spec names before it begins without them.
const GATHERING: Duration = Duration::from_secs(10);
/// It waits for others as long as its own part took, and at least this long.
const PATIENCE: Duration = Duration::from_secs(10);
/// More tokens than a row has.
const MAX_ROW_TOKENS: u64 = 1 << 24;
const POLL: Duration = Duration::from_millis(100);

/// Trains what is left, with whoever is there.
pub(crate) async fn lead(run: &mut Run<'_>, order: Order, inner_steps: u32) -> Result<()> {
    let exchange = Exchange::new(run.cx.store.clone(), run.attempt.job.as_str(), run.attempt.epoch, &run.spec_sha256);
    exchange.open().await?;
    // Replicas read the weights before training.
    run.uploader.finish().await?;
    let first_pass = order.steps_per_pass();
    let data = run.training_data(order).await?;
    let mut lead = Lead { run, exchange, crew: Crew::new(inner_steps), inner_steps, data, first_pass };
    lead.gather().await?;
    loop {
        match lead.round().await {
            Ok(true) => {}
            Ok(false) => return lead.exchange.clear().await,
            Err(error) if error.code == Code::AttemptYielded => {
                lead.give_round_up().await?;
                return Err(error);
            }
            Err(error) => return Err(error),
        }
    }
}

struct Lead<'a, 'r> {
    run: &'a mut Run<'r>,
    exchange: Exchange,
    crew: Crew,
    inner_steps: u32,
    data: TrainingData,
    first_pass: u64,
}

impl Lead<'_, '_> {
    async fn gather(&mut self) -> Result<()> {
        let wanted = self.run.attempt.spec.train.workers() as usize - 1;
        let until = Instant::now() + GATHERING;
        while Instant::now() < until {
            self.run.cx.check()?;
            self.crew.hear(&self.exchange.replicas().await?);
            if self.crew.present().len() >= wanted {
                return Ok(());
            }
            self.pause().await;
        }
        tracing::warn!(
            wanted,
            there = self.crew.present().len(),
            "training begins without all replicas; they may still come"
        );
        Ok(())
    }

    /// Goes back to where the round began, and keeps that: its batches go out again in the next attempt.
    async fn give_round_up(&mut self) -> Result<()> {
        let give_up = |slot: &mut Option<Trainer>| slot.as_mut().ok_or_else(no_trainer)?.give_round_up();
        self.run.progress = self.run.thread.call(give_up).await??;
        self.run.keep_progress().await
    }

    /// One round; false when nothing was left to do.
    async fn round(&mut self) -> Result<bool> {
        let rounds = |slot: &mut Option<Trainer>| -> Result<(Rounds, u64)> {
            let trainer = slot.as_mut().ok_or_else(no_trainer)?;
            let max_bytes = outer::max_bytes(&trainer.optimizer.masters());
            Ok((trainer.outer_mut()?.rounds.clone(), max_bytes))
        };
        let (Rounds { round, mut ledger }, max_bytes) = self.run.thread.call(rounds).await??;
        if ledger.left() == 0 {
            return Ok(false);
        }
        let began = Instant::now();
        let done_before = ledger.total() - ledger.left();
        self.crew.hear(&self.exchange.replicas().await?);
        let present = self.crew.present();
        let mut batches = ledger.take(&wanted(self.inner_steps, &present)).into_iter();
        let own = batches.next().unwrap_or_default();
        let parts = present.iter().zip(batches).filter(|(_, batches)| !batches.is_empty());
        let parts: Vec<Part> = parts.map(|((replica, _), batches)| Part { replica: *replica, batches }).collect();
        let workers = parts.len() as u32 + 1;
        let round = Round { round, initial_key: self.run.initial_key.clone(), step: done_before, parts, workers };

        let folder = self.run.workspace.path().join("round");
        let weights = folder.join("weights");
        let file = Exchange::file(&weights);
        let alone = round.parts.is_empty();
        let begin = move |slot: &mut Option<Trainer>| {
            slot.as_mut().ok_or_else(no_trainer)?.begin_round(None, (!alone).then_some(file.as_path()))
        };
        self.run.thread.call(begin).await??;
        if !alone {
            self.exchange.publish_round(&round, &weights).await?;
        }
        if let Some(old) = round.round.checked_sub(2) {
            self.exchange.clear_round(old).await?;
        }

        let (own, took) = self.train(&round, &own).await?;
        let deliveries = self.collect(&round, max_bytes, &folder, (&own, took)).await?;
        for part in &round.parts {
            if !deliveries.contains_key(&part.replica) {
                tracing::warn!(round = round.round, replica = part.replica.0, "a replica did not deliver in time");
                self.crew.missed(part.replica, round.round);
                ledger.give_back(&part.batches);
            }
        }
        let files: Vec<PathBuf> = deliveries.values().map(|(_, file)| file.clone()).collect();
        let end = move |slot: &mut Option<Trainer>| slot.as_mut().ok_or_else(no_trainer)?.end_round(&files);
        let counted = self.run.thread.call(end).await??;
        let mut whole = own;
        let mut together = 1;
        for ((replica, (delivery, _)), counted) in deliveries.iter().zip(counted) {
            if counted {
                self.crew.came(*replica);
                together += 1;
                whole.loss += delivery.loss;
                whole.target_tokens += delivery.target_tokens;
                whole.tokens += delivery.tokens;
            } else {
                self.crew.missed(*replica, round.round);
                let part = round.parts.iter().find(|part| part.replica == *replica);
                ledger.give_back(part.map_or(&[], |part| part.batches.as_slice()));
            }
        }
        match tokio::fs::remove_dir_all(&folder).await {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(&folder, error)),
            _ => {}
        }
        let seconds = began.elapsed().as_secs_f64();
        let steps = ledger.total() - ledger.left();
        let count = move |slot: &mut Option<Trainer>| -> Result<_> {
            let trainer = slot.as_mut().ok_or_else(no_trainer)?;
            trainer.outer_mut()?.rounds.ledger = ledger;
            let progress = &mut trainer.progress;
            progress.step = steps;
            progress.processed_tokens += whole.tokens - own.tokens;
            progress.target_tokens += whole.target_tokens - own.target_tokens;
            // While the others' parts are waited for, time goes by as well.
            progress.seconds += (seconds - took.as_secs_f64()).max(0.0);
            progress.loss = whole.loss / whole.target_tokens.max(1) as f64;
            progress.workers = progress.workers.max(together);
            Ok(*progress)
        };
        self.run.progress = self.run.thread.call(count).await??;
        let rate = whole.tokens as f64 / seconds.max(1e-9);
        tracing::info!(
            round = round.round,
            workers = round.workers,
            delivered = deliveries.len() + 1,
            step = steps,
            loss = self.run.progress.loss,
            tokens_per_second = rate as u64,
            "a round is done"
        );
        self.run.after_steps(done_before, rate, self.data.consumed()).await?;
        Ok(true)
    }

    async fn train(&mut self, round: &Round, batches: &[u32]) -> Result<(Delivery, Duration)> {
        let pace = Pace { step: round.step, stride: round.workers, steps: self.run.steps, first_pass: self.first_pass };
        let (run, workers) = (&*self.run, f64::from(round.workers));
        let told = |report: &crate::trainer::StepReport| Some(run.step_event(report, workers));
        inner::train(&run.thread, &mut self.data, run.cx, run.settings.threads, batches, pace, told).await
    }

    /// Waits for what the replicas of the round deliver, and fetches it; `own` is what the lead's own part came to, and
    /// how long it took.
    async fn collect(
        &self,
        round: &Round,
        max_bytes: u64,
        folder: &std::path::Path,
        own: (&Delivery, Duration),
    ) -> Result<BTreeMap<Replica, (Delivery, PathBuf)>> {
        let mut waiting: Vec<Replica> = round.parts.iter().map(|part| part.replica).collect();
        let mut deliveries = BTreeMap::new();
        let until = Instant::now() + own.1.max(PATIENCE);
        while !waiting.is_empty() {
            self.run.cx.check()?;
            for replica in self.exchange.delivered(round.round).await? {
                let Some(at) = waiting.iter().position(|waiting| *waiting == replica) else { continue };
                waiting.swap_remove(at);
                let batches =
                    round.parts.iter().find(|part| part.replica == replica).map_or(0, |part| part.batches.len());
                let into = folder.join(format!("{}-{}", replica.0, replica.1));
                match self
                    .exchange
                    .fetch_delta(round.round, replica, max_bytes, &into)
                    .await
                    .and_then(|found| self.plausible(found, batches, own.0))
                {
                    Ok(delivery) => drop(deliveries.insert(replica, delivery)),
                    // What this worker can do nothing about without the store or a disk ends the attempt.
                    Err(error) if !is_an_outage(&error) => {
                        tracing::warn!(
                            round = round.round,
                            replica = replica.0,
                            "what a replica sent does not count: {}",
                            error.chain()
                        );
                    }
                    Err(error) => return Err(error),
                }
            }
            if waiting.is_empty() || Instant::now() >= until {
                break;
            }
            self.pause().await;
        }
        Ok(deliveries)
    }

    /// What a replica says of its own work, as far as it can be.
    fn plausible(&self, found: (Delivery, PathBuf), batches: usize, own: &Delivery) -> Result<(Delivery, PathBuf)> {
        let rows = batches as u64 * u64::from(self.run.attempt.spec.train.batch_rows);
        let Delivery { tokens, target_tokens, .. } = found.0;
        let per_token = |delivery: &Delivery| delivery.loss / delivery.target_tokens.max(1) as f64;
        let why = if target_tokens > tokens || tokens > rows.saturating_mul(MAX_ROW_TOKENS) {
            Some(format!("{target_tokens} target tokens of {tokens} in {rows} rows"))
        } else {
            implausible("loss a target token", per_token(&found.0), per_token(own))
        };
        why.map_or(Ok(found), |why| Err(Error::new(Code::CheckpointCorrupt, why)))
    }

    async fn pause(&self) {
        tokio::select! {
            () = self.run.cx.cancelled.cancelled() => {}
            () = tokio::time::sleep(POLL) => {}
        }
    }
}

/// Batches that the lead and each of `present` want, the replicas' together no more than a round may name.
fn wanted(inner_steps: u32, present: &[(Replica, u32)]) -> Vec<u32> {
    let most = (MAX_BATCHES / present.len().max(1)) as u32;
    [inner_steps].into_iter().chain(present.iter().map(|(_, steps)| (*steps).min(most))).collect()
}

/// Whether an error is of the store as a whole, this machine's disk or this attempt, and not of one object.
fn is_an_outage(error: &Error) -> bool {
    error.code == Code::DiskFull || matches!(error.kind(), Kind::Unavailable | Kind::Cancelled | Kind::Fenced)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_long_rounds_together_are_no_more_than_one_may_name() {
        let present: Vec<(Replica, u32)> = (1..64).map(|number| ((number, 1), 100_000)).collect();
        let wanted = wanted(100_000, &present);
        assert_eq!((wanted.len(), wanted[0]), (64, 100_000));
        let named = wanted[1..].iter().map(|&steps| steps as usize).sum::<usize>();
        assert!(named <= MAX_BATCHES && named > MAX_BATCHES - 64, "{named}");
        assert_eq!(super::wanted(20, &[((1, 1), 20), ((2, 1), 10)]), [20, 20, 10]);
        assert_eq!(super::wanted(20, &[]), [20]);
    }
}
