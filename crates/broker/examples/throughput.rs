//! Records a second through the bus: `cargo run -p retort-broker --example throughput -- HOST:PORT [EVENTS]`.

use std::time::Instant;

use retort_bus::{EventReader, Producer, TaskConsumer, topics};
use retort_core::id::{JobId, TaskId};
use retort_proto::{ShardProgress, TaskKind, TaskMessage, WorkerEvent, worker_event::What};
use tokio::task::JoinSet;

/// Sends in flight at once.
const SENDERS: u64 = 64;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let brokers = args.next().ok_or("usage: throughput HOST:PORT [EVENTS]")?;
    let total: u64 = args.next().map_or(Ok(20_000), |text| text.parse())?;
    let producer = Producer::new(&brokers)?;
    let job = JobId::generate();
    let event = |n: u64| WorkerEvent {
        event_id: format!("{job}-{n}"),
        job_id: job.to_string(),
        task_id: TaskId::shard(&job, 0).to_string(),
        worker_id: "throughput".to_owned(),
        what: Some(What::ShardProgress(ShardProgress { target_tokens: n, seconds: 1.0 })),
        ..WorkerEvent::default()
    };

    producer.send_event(&event(0)).await?;
    let started = Instant::now();
    for n in 0..100 {
        producer.send_event(&event(n)).await?;
    }
    println!("one after the other: {:.2} ms an event", started.elapsed().as_secs_f64() * 10.0);

    let started = Instant::now();
    let mut senders: JoinSet<retort_core::Result<()>> = JoinSet::new();
    for sender in 0..SENDERS {
        let (producer, events) = (producer.clone(), (0..total / SENDERS).map(|n| event(sender + n * SENDERS)));
        let events: Vec<WorkerEvent> = events.collect();
        senders.spawn(async move {
            for event in events {
                producer.send_event(&event).await?;
            }
            Ok(())
        });
    }
    while let Some(sent) = senders.join_next().await {
        sent??;
    }
    let sent = total / SENDERS * SENDERS;
    println!("{SENDERS} at once: {:.0} events/s acknowledged", sent as f64 / started.elapsed().as_secs_f64());

    let reader = EventReader::new(&brokers, &[])?;
    let (started, mut read) = (Instant::now(), 0);
    while read < sent {
        reader.next().await?;
        read += 1;
    }
    println!("read: {:.0} events/s", read as f64 / started.elapsed().as_secs_f64());

    let topic = topics::teacher_tasks(job.as_str());
    for shard in 0..200 {
        let task = TaskMessage {
            task_id: TaskId::shard(&job, shard).to_string(),
            job_id: job.to_string(),
            kind: TaskKind::Shard.into(),
        };
        producer.send_task(&topic, &task).await?;
    }
    let started = Instant::now();
    let consumer = TaskConsumer::new(&brokers, &topic, &topics::group("teacher", job.as_str()))?;
    consumer.commit(&consumer.next().await?).await?;
    println!("first task after joining: {:.0} ms", started.elapsed().as_secs_f64() * 1e3);
    let started = Instant::now();
    for _ in 1..200 {
        consumer.commit(&consumer.next().await?).await?;
    }
    println!("tasks taken and committed one by one: {:.0}/s", 199.0 / started.elapsed().as_secs_f64());

    let started = Instant::now();
    let task = TaskMessage {
        task_id: TaskId::shard(&job, 999).to_string(),
        job_id: job.to_string(),
        kind: TaskKind::Shard.into(),
    };
    producer.send_task(&topic, &task).await?;
    consumer.next().await?;
    println!("from send to delivery: {:.1} ms", started.elapsed().as_secs_f64() * 1e3);
    consumer.close().await;
    Ok(())
}
