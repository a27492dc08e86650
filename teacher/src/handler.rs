use std::time::{Duration, Instant};

use retort_artifact::{paths, soft_targets::Encoded};
use retort_core::{Code, Error, Result};
use retort_proto::{self as proto, claimed::Task, worker_event::What};
use retort_worker::{Attempt, Handler, ModelThread, TaskContext};
use tch::{Device, Kind};
use tokio::sync::watch;

use crate::{
    engine::native::Loaded,
    shard::{Order, compute},
};

/// How often a running shard says how far it is.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// Computes shards; the model lives on its own thread and stays loaded between them.
pub struct Teacher {
    models: ModelThread<Loaded>,
}

/// How far a shard is.
#[derive(Clone, Copy, Default)]
struct Progress {
    target_tokens: u64,
    seconds: f64,
}

impl Teacher {
    /// `threads` is how many cores libtorch uses; all of them when `None`.
    pub fn new(device: Device, kind: Kind, threads: Option<usize>) -> Result<Self> {
        let make = move || {
            if let Some(threads) = threads {
                // OpenMP counts threads for each thread that calls it, so this is said here.
                tch::set_num_threads(threads.clamp(1, 4096) as i32);
            }
            Loaded::new(device, kind)
        };
        Ok(Self { models: ModelThread::spawn("teacher-model", make)? })
    }

    /// The shard and the seconds it took, without loading the teacher.
    async fn compute(&self, order: Order, cx: &TaskContext) -> Result<(Encoded, f64)> {
        let (progress, seen) = watch::channel(Progress::default());
        let inside = cx.clone();
        let work = self.models.call(move |models| {
            let engine = models.get(&order.teacher_dir()?)?;
            inside.check()?;
            let started = Instant::now();
            let mut watch = |target_tokens| {
                progress.send_replace(Progress { target_tokens, seconds: started.elapsed().as_secs_f64() });
                inside.check()
            };
            let encoded = compute(engine, &order, &mut watch)?;
            Ok((encoded, started.elapsed().as_secs_f64()))
        });
        tokio::pin!(work);
        let mut tick = tokio::time::interval(PROGRESS_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut said = 0;
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done?,
                _ = tick.tick() => {
                    let Progress { target_tokens, seconds } = *seen.borrow();
                    if target_tokens > said {
                        said = target_tokens;
                        cx.emit_lossy(What::ShardProgress(proto::ShardProgress { target_tokens, seconds })).await;
                    }
                }
            }
        }
    }
}

#[async_trait::async_trait]
impl Handler for Teacher {
    async fn run(&mut self, attempt: Attempt, cx: &TaskContext) -> Result<()> {
        let Task::Shard(shard) = &attempt.work else {
            return Err(Error::new(
                Code::RequestInvalid,
                format!("{} is no shard; a teacher computes nothing else", attempt.task.short()),
            ));
        };
        let rows = cx.prompt_set(&attempt).await?;
        let order = Order::new(&attempt, shard, rows)?;
        let (encoded, seconds) = self.compute(order, cx).await?;
        let key = paths::shard(attempt.job.as_str(), shard.shard, attempt.epoch);
        cx.check()?;
        publish(cx, &key, &encoded).await?;
        tracing::info!(
            target_tokens = encoded.target_tokens,
            bytes = encoded.bytes.len(),
            tokens_per_second = encoded.target_tokens as f64 / seconds.max(1e-9),
            head_mass = encoded.fidelity.head_mass,
            "shard written"
        );
        cx.emit(What::ShardReady(proto::ShardReady {
            key,
            sha256: encoded.sha256,
            bytes: encoded.bytes.len() as u64,
            rows: encoded.rows,
            target_tokens: encoded.target_tokens,
            seconds,
            fidelity: Some(proto::Fidelity {
                head_mass: encoded.fidelity.head_mass,
                mean_abs_error: encoded.fidelity.mean_abs_error,
                argmax_agreement: encoded.fidelity.argmax_agreement,
            }),
        }))
        .await
    }
}

/// Writes the shard under its key. The key holds the attempt's epoch, so an object that is there
/// already can only be this attempt's own, from an upload whose answer was lost; anything else is
/// object-exists.
async fn publish(cx: &TaskContext, key: &str, encoded: &Encoded) -> Result<()> {
    match cx.store.put_new(key, encoded.bytes.clone()).await {
        Err(error) if error.code == Code::ObjectExists => {
            match cx.store.get_verified(key, &encoded.sha256, encoded.bytes.len() as u64).await {
                Ok(_) => Ok(()),
                Err(_) => Err(error),
            }
        }
        other => other,
    }
}
