use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use retort_artifact::{
    Store, paths,
    soft_targets::{self, Encoded, Limits},
};
use retort_core::{
    Code, Error, Kind as ErrorKind, Result,
    clock::{Clock as _, SystemClock},
};
use retort_proto::{self as proto, claimed::Task, worker_event::What};
use retort_worker::{Attempt, Handler, ModelThread, Rest, TaskContext};
use tokio::sync::watch;

use crate::{
    engine::{Capabilities, native::Loaded},
    group::{Group, Layers, Parts, Pulse},
    shard::{Captured, Order, capture, faithful},
    stage::Arithmetic,
    work,
};

/// How often a running shard says how far it is.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// Computes shards; the model lives on its own thread and stays loaded between them.
pub struct Teacher {
    models: ModelThread<Loaded>,
    /// Of the group, where this process is its first stage.
    pulse: Option<Pulse>,
}

/// How far a shard is.
#[derive(Clone, Copy, Default)]
struct Progress {
    target_tokens: u64,
    seconds: f64,
}

impl Teacher {
    /// `threads` is how many cores arithmetic uses; all of them when `None`.
    pub fn new(arithmetic: Arithmetic, threads: Option<usize>) -> Result<Self> {
        let make = move || {
            if let Some(threads) = threads {
                // OpenMP counts threads for each thread that calls it, so this is said here.
                tch::set_num_threads(threads.clamp(1, 4096) as i32);
            }
            Loaded::new(arithmetic.clone())
        };
        Ok(Self { models: ModelThread::spawn("teacher-model", make)?, pulse: None })
    }

    /// The first stage of a group, which works for all of it.
    pub fn in_group(formed: Parts, pulse: Pulse, arithmetic: Arithmetic, threads: Option<usize>) -> Result<Self> {
        let parts = Mutex::new(Some(formed));
        let make = move || {
            if let Some(threads) = threads {
                tch::set_num_threads(threads.clamp(1, 4096) as i32);
            }
            let parts = parts.lock().unwrap_or_else(PoisonError::into_inner).take();
            match parts {
                Some(parts) => {
                    let group = Group::new(parts, Box::new(Layers::new(arithmetic.clone())));
                    Loaded::in_group(group, arithmetic.clone())
                }
                // After a panic the group has come to its end, and so does this process.
                None => Loaded::new(arithmetic.clone()),
            }
        };
        Ok(Self { models: ModelThread::spawn("teacher-model", make)?, pulse: Some(pulse) })
    }

    /// What the teacher's engine is, and the name of the order's work, without loading the weights.
    async fn name(&self, order: Order) -> Result<(Order, Capabilities, String)> {
        let named = self.models.call(move |models| {
            let teacher = models.describe(&order.teacher_dir()?)?;
            let work_sha256 = work::work_sha256(&order, &teacher)?;
            Ok((order, teacher, work_sha256))
        });
        named.await?
    }

    /// What the teacher says of the shard's rows, and the seconds it took, without loading the teacher.
    async fn compute(&self, order: Order, cx: &TaskContext) -> Result<(Captured, f64)> {
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
            let captured = capture(engine, &order, &mut watch);
            models.report();
            Ok((captured?, started.elapsed().as_secs_f64()))
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
    async fn defunct(&mut self) -> Error {
        match &self.pulse {
            Some(pulse) => pulse.broken().await,
            None => std::future::pending().await,
        }
    }

    async fn run(&mut self, attempt: Attempt, cx: &TaskContext) -> Result<Rest> {
        let Task::Shard(shard) = &attempt.work else {
            return Err(Error::new(
                Code::RequestInvalid,
                format!("{} is no shard; a teacher computes nothing else", attempt.task.short()),
            ));
        };
        let rows = cx.prompt_set(&attempt).await?;
        let order = Order::new(&attempt, shard, rows)?;
        let (order, teacher, work_sha256) = self.name(order).await?;
        let (order, found) = reuse(cx, order, teacher, &work_sha256).await?;
        if let Some(ready) = found {
            cx.emit(What::ShardReady(ready)).await?;
            return Ok(Rest::Nothing);
        }
        let (captured, seconds) = self.compute(order.clone(), cx).await?;
        let (cx, epoch) = (cx.clone(), attempt.epoch);
        Ok(Rest::After(Box::pin(async move { finish(&cx, epoch, order, captured, seconds, work_sha256).await })))
    }
}

/// What comes after the model: encodes, checks, stores and reports.
async fn finish(
    cx: &TaskContext,
    epoch: u64,
    order: Order,
    captured: Captured,
    seconds: f64,
    work_sha256: String,
) -> Result<()> {
    let teacher_sha256 = captured.teacher_sha256().to_owned();
    let encoded = tokio::task::spawn_blocking(move || captured.encode());
    let encoded = encoded.await.map_err(|error| Error::internal(format!("encoding a shard failed: {error}")))??;
    if let Err(error) = faithful(&order, &encoded) {
        cx.check()?;
        return Err(set_aside(&cx.store, &order, &encoded, error).await);
    }
    let key = paths::shard(&order.job, order.shard, epoch);
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
            kl: encoded.fidelity.kl,
        }),
        work_sha256,
        reused: false,
        teacher_sha256,
    }))
    .await
}

/// The same work as some job has published it, verified as a student would; `None` when there is none
/// or it is not sound, and then it must be computed.
async fn reuse(
    cx: &TaskContext,
    order: Order,
    teacher: Capabilities,
    work_sha256: &str,
) -> Result<(Order, Option<proto::ShardReady>)> {
    let started = Instant::now();
    let answer = match cx.find_shard(work_sha256).await {
        Ok(answer) => answer,
        Err(error) => {
            cx.check()?;
            if error.kind() == ErrorKind::Fenced {
                return Err(error);
            }
            tracing::warn!(code = %error.code, "whether the shard is there already cannot be told: {}", error.chain());
            return Ok((order, None));
        }
    };
    let Some(found) = answer.shard else { return Ok((order, None)) };
    let teacher_sha256 = teacher.teacher_sha256.clone();
    let (order, checked) = verify(cx, order, teacher, &found).await?;
    match checked {
        Ok(()) => {}
        // Computed, it would need the store too.
        Err(error) if error.kind() == ErrorKind::Unavailable => return Err(error),
        Err(error) => {
            tracing::warn!(
                key = found.key, code = %error.code,
                "another job's shard of the same work cannot be used and is computed again: {}", error.chain()
            );
            return Ok((order, None));
        }
    }
    tracing::info!(key = found.key, target_tokens = found.target_tokens, "another job has computed this shard");
    let ready = proto::ShardReady {
        key: found.key,
        sha256: found.sha256,
        bytes: found.bytes,
        rows: found.rows,
        target_tokens: found.target_tokens,
        seconds: started.elapsed().as_secs_f64(),
        fidelity: answer.fidelity,
        work_sha256: work_sha256.to_owned(),
        reused: true,
        teacher_sha256,
    };
    Ok((order, Some(ready)))
}

/// `Ok(Err(_))` says why the published shard is not what is asked for.
async fn verify(
    cx: &TaskContext,
    order: Order,
    teacher: Capabilities,
    found: &proto::PublishedShard,
) -> Result<(Order, Result<()>)> {
    let bytes = match cx.store.get_verified(&found.key, &found.sha256, found.bytes).await {
        Ok(bytes) => bytes,
        Err(error) => return Ok((order, Err(error))),
    };
    let told = (found.bytes, found.rows, found.target_tokens);
    let checked = tokio::task::spawn_blocking(move || {
        let size = bytes.len() as u64;
        let checked = soft_targets::decode(bytes, Limits::default()).and_then(|shard| {
            let counted = (size, shard.sequences.len() as u64, shard.target_tokens());
            if counted != told {
                return Err(Error::new(
                    Code::ShardCorrupt,
                    format!("bytes, rows and target tokens are {counted:?}, and {told:?} are published"),
                ));
            }
            work::check(&order, &teacher, &shard)
        });
        (order, checked)
    });
    checked.await.map_err(|error| Error::internal(format!("checking a shard failed: {error}")))
}

/// Keeps a shard that is not published, and why it is not, for whoever wants to know; the error names
/// its key, or why it could not be kept.
pub(crate) async fn set_aside(store: &Store, order: &Order, encoded: &Encoded, error: Error) -> Error {
    let key = paths::quarantined(&order.job, order.shard, order.epoch);
    let reason = serde_json::json!({
        "code": error.code.as_str(),
        "message": error.message,
        "fidelity": encoded.fidelity,
        "job": order.job,
        "shard": order.shard,
        "epoch": order.epoch,
        "time_ms": SystemClock.now_ms(),
    });
    let kept = async {
        store.put_new(&key, encoded.bytes.clone()).await?;
        store.put_new(&paths::quarantine_reason(&order.job, order.shard, order.epoch), reason.to_string().into()).await
    };
    let message = match kept.await {
        Ok(()) => format!("{}; it lies at {key}", error.message),
        Err(why) => format!("{}; it could not be kept at {key}: {}", error.message, why.chain()),
    };
    Error { message, ..error }
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
