use std::sync::Arc;

use retort_artifact::Store;
use retort_bus::{Producer, TaskConsumer, ensure_topics, topics};
use retort_core::{Code, Error, Result, id::WorkerId};
use retort_process::{Ready, die_with_parent, on_signals};
use tokio_util::sync::CancellationToken;

use crate::{Handler, Stop, WorkerArgs, orchestrator::Grpc, work_loop::WorkLoop};

/// Runs a worker of `role` ("teacher" or "student") until it is told to stop; returns within five
/// seconds of the first SIGINT or SIGTERM.
///
/// Must be called inside a multi-threaded tokio runtime. The caller has set logging up.
pub async fn run(role: &'static str, args: WorkerArgs, handler: impl Handler) -> Result<()> {
    let shutdown = start(&args)?;
    run_until(role, args, handler, &shutdown).await
}

/// What comes before [`run_until`]: the token that the signals cancel.
pub fn start(args: &WorkerArgs) -> Result<CancellationToken> {
    if args.die_with_parent {
        die_with_parent();
    }
    on_signals()
}

/// As [`run`], for a process that has work to do before it is a worker.
pub async fn run_until(
    role: &'static str,
    args: WorkerArgs,
    handler: impl Handler,
    shutdown: &CancellationToken,
) -> Result<()> {
    match work(role, &args, handler, shutdown).await {
        Err(error) if error.code == Code::WorkerStopped => Ok(()),
        other => other,
    }
}

async fn work(
    role: &'static str,
    args: &WorkerArgs,
    handler: impl Handler,
    shutdown: &CancellationToken,
) -> Result<()> {
    let topic = match role {
        "teacher" => topics::teacher_tasks(&args.pool),
        "student" => topics::student_tasks(&args.pool),
        other => return Err(Error::internal(format!("{other:?} is no worker role"))),
    };
    let worker_id = WorkerId::generate(role);
    // Said before the orchestrator is waited for.
    Store::check_address(&args.store)?;
    let orchestrator = Grpc::connect(&args.orchestrator, shutdown).await?;
    // The orchestrator has one before it listens; a worker that made its own would have none of the objects.
    let store = Store::open_existing(&args.store)?;
    let wanted = [(topic.clone(), topics::TASK_PARTITIONS), (topics::EVENTS.to_owned(), topics::EVENT_PARTITIONS)];
    tokio::select! {
        () = shutdown.cancelled() => return Err(Stop::WorkerStopping.error()),
        ready = ensure_topics(&args.brokers, &wanted) => ready?,
    }
    let events = Producer::new(&args.brokers)?;
    let tasks = TaskConsumer::new(&args.brokers, &topic, &topics::group(role, &args.pool))?;
    Ready { ready: role.to_owned(), listen: None }.announce();
    tracing::info!(worker = %worker_id, topic, "waiting for tasks");
    WorkLoop::new(worker_id, tasks, Arc::new(orchestrator), Arc::new(events), store, handler).run(shutdown).await?;
    tracing::info!("stopped");
    Ok(())
}
