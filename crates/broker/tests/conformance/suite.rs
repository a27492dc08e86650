//! The bus against any Kafka.

use std::{
    collections::HashSet,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    time::Duration,
};

use prost::Message as _;
use rdkafka::{
    Message as _,
    message::{Header, OwnedHeaders},
    producer::FutureRecord,
};
use retort_bus::{EventReader, Producer, TaskConsumer, topics};
use retort_core::Code;
use retort_proto::{EvaluationReady, Sample, TaskMessage, WorkerEvent, worker_event::What};

use crate::support::{Bus, events, header, pool, raw_producer, read_raw, soon, tasks};

async fn send_all(producer: &Producer, topic: &str, tasks: &[TaskMessage]) {
    for task in tasks {
        soon("an acknowledgement", producer.send_task(topic, task)).await.unwrap();
    }
}

fn ids(tasks: &[TaskMessage]) -> HashSet<String> {
    tasks.iter().map(|task| task.task_id.clone()).collect()
}

#[tokio::test]
async fn tasks_arrive_as_sent_and_a_committed_task_stays_done() {
    let bus = Bus::get();
    let pool = pool();
    let (topic, group) = (topics::teacher_tasks(&pool), topics::group("teacher", &pool));
    let producer = Producer::new(&bus.brokers).unwrap();
    let sent = tasks(20);
    send_all(&producer, &topic, &sent).await;

    let consumer = TaskConsumer::new(&bus.brokers, &topic, &group).unwrap();
    let mut received = Vec::new();
    for _ in 0..sent.len() {
        let delivery = soon("a task", consumer.next()).await.unwrap();
        consumer.commit(&delivery).await.unwrap();
        received.push(delivery.message);
    }
    received.sort_by(|a, b| a.task_id.cmp(&b.task_id));
    assert_eq!(received, sent);
    consumer.close().await;

    let after = tasks(1);
    send_all(&producer, &topic, &after).await;
    let consumer = TaskConsumer::new(&bus.brokers, &topic, &group).unwrap();
    assert_eq!(soon("a task", consumer.next()).await.unwrap().message, after[0], "only what was not committed");
}

#[tokio::test]
async fn an_open_delivery_holds_back_the_commits_behind_it() {
    let bus = Bus::get();
    let pool = pool();
    let (topic, group) = (topics::student_tasks(&pool), topics::group("student", &pool));
    // One partition, so that all tasks stand behind each other.
    topics::ensure_topics(&bus.brokers, &[(topic.clone(), 1)]).await.unwrap();
    let producer = Producer::new(&bus.brokers).unwrap();
    let sent = tasks(3);
    send_all(&producer, &topic, &sent).await;
    let consumer = TaskConsumer::new(&bus.brokers, &topic, &group).unwrap();
    let mut deliveries = Vec::new();
    for _ in 0..3 {
        deliveries.push(soon("a task", consumer.next()).await.unwrap());
    }
    consumer.commit(&deliveries[2]).await.unwrap();
    consumer.commit(&deliveries[0]).await.unwrap();
    consumer.close().await;

    let consumer = TaskConsumer::new(&bus.brokers, &topic, &group).unwrap();
    assert_eq!(soon("a task", consumer.next()).await.unwrap().message, sent[1]);
    assert_eq!(soon("a task", consumer.next()).await.unwrap().message, sent[2]);
}

#[tokio::test]
async fn events_arrive_in_order_and_from_where_the_reader_was() {
    let bus = Bus::get();
    let producer = Producer::new(&bus.brokers).unwrap();
    let sent = events(50);
    for event in &sent {
        soon("an acknowledgement", producer.send_event(event)).await.unwrap();
    }
    let reader = EventReader::new(&bus.brokers, &[]).unwrap();
    let mut next = 0;
    let mut received: Vec<(i64, WorkerEvent)> = Vec::new();
    while received.len() < sent.len() {
        let record = soon("an event", reader.next()).await.unwrap();
        assert!(record.offset >= next, "offsets rise");
        next = record.offset + 1;
        received.extend(record.event.ok().filter(|event| event.job_id == sent[0].job_id).map(|e| (record.offset, e)));
    }
    assert!(received.iter().map(|(_, event)| event).eq(&sent), "in the order they were sent");

    let (offset, expected) = received.swap_remove(30);
    let reader = EventReader::new(&bus.brokers, &[(0, offset)]).unwrap();
    let record = soon("an event", reader.next()).await.unwrap();
    assert_eq!((record.offset, record.event.unwrap()), (offset, expected));
}

#[tokio::test]
async fn an_offset_beyond_the_end_starts_over() {
    let bus = Bus::get();
    let producer = Producer::new(&bus.brokers).unwrap();
    let sent = events(2);
    for event in &sent {
        soon("an acknowledgement", producer.send_event(event)).await.unwrap();
    }
    let reader = EventReader::new(&bus.brokers, &[(0, 1_000_000_000)]).unwrap();
    assert!(soon("an event", reader.next()).await.unwrap().offset < 1_000_000);
}

#[tokio::test]
async fn two_members_share_the_tasks() {
    let bus = Bus::get();
    let pool = pool();
    let (topic, group) = (topics::teacher_tasks(&pool), topics::group("teacher", &pool));
    let a = TaskConsumer::new(&bus.brokers, &topic, &group).unwrap();
    let b = TaskConsumer::new(&bus.brokers, &topic, &group).unwrap();
    let producer = Producer::new(&bus.brokers).unwrap();
    let (mut sent, mut of_a, mut of_b) = (HashSet::new(), HashSet::new(), HashSet::new());
    soon("both members to get tasks", async {
        while of_a.is_empty()
            || of_b.is_empty()
            || !of_a.union(&of_b).cloned().collect::<HashSet<_>>().is_superset(&sent)
        {
            if of_a.is_empty() || of_b.is_empty() {
                let more = tasks(8);
                send_all(&producer, &topic, &more).await;
                sent.extend(ids(&more));
            }
            while let Ok(delivery) = tokio::time::timeout(Duration::from_millis(300), async {
                tokio::select! {
                    delivery = a.next() => (true, delivery.unwrap()),
                    delivery = b.next() => (false, delivery.unwrap()),
                }
            })
            .await
            {
                let (is_a, delivery) = delivery;
                let (consumer, seen) = if is_a { (&a, &mut of_a) } else { (&b, &mut of_b) };
                consumer.commit(&delivery).await.unwrap();
                seen.insert(delivery.message.task_id);
            }
        }
    })
    .await;
    // One after the other, the first would wait for the second, which nobody polls.
    tokio::join!(a.close(), b.close());
}

#[tokio::test]
async fn a_long_task_is_not_given_to_another_while_its_worker_lives() {
    let bus = Bus::get();
    let pool = pool();
    let (topic, group) = (topics::teacher_tasks(&pool), topics::group("teacher", &pool));
    let producer = Producer::new(&bus.brokers).unwrap();
    let consumer = TaskConsumer::new(&bus.brokers, &topic, &group).unwrap();
    let sent = tasks(1);
    send_all(&producer, &topic, &sent).await;
    let delivery = soon("the long task", consumer.next()).await.unwrap();
    // The computation: half as long again as the group's session timeout of 8 s.
    let again = tokio::time::timeout(Duration::from_secs(12), consumer.next()).await;
    assert!(again.is_err(), "delivered again: {again:?}");
    consumer.commit(&delivery).await.unwrap();
    consumer.close().await;

    let after = tasks(1);
    send_all(&producer, &topic, &after).await;
    let consumer = TaskConsumer::new(&bus.brokers, &topic, &group).unwrap();
    assert_eq!(soon("a task", consumer.next()).await.unwrap().message, after[0], "the long task was committed");
}

#[tokio::test]
async fn a_busy_worker_lets_another_join_and_keeps_its_own_task() {
    let bus = Bus::get();
    let pool = pool();
    let (topic, group) = (topics::teacher_tasks(&pool), topics::group("teacher", &pool));
    let producer = Producer::new(&bus.brokers).unwrap();
    let busy = TaskConsumer::new(&bus.brokers, &topic, &group).unwrap();
    let first = tasks(1);
    send_all(&producer, &topic, &first).await;
    let delivery = soon("the first task", busy.next()).await.unwrap();
    // `busy` computes from here on and asks for nothing; another joins and is given its share.
    let other = TaskConsumer::new(&bus.brokers, &topic, &group).unwrap();
    send_all(&producer, &topic, &tasks(64)).await;
    let mut of_other = HashSet::new();
    soon("the other worker's share", async {
        while of_other.len() < 20 {
            let delivery = other.next().await.unwrap();
            other.commit(&delivery).await.unwrap();
            of_other.insert(delivery.message.task_id);
        }
    })
    .await;
    busy.commit(&delivery).await.unwrap();
    let next = soon("the busy worker's next task", busy.next()).await.unwrap();
    assert_ne!(next.message, first[0], "its own task is not given to it twice");
    tokio::join!(busy.close(), other.close());
}

#[tokio::test]
async fn a_killed_workers_task_is_given_to_another() {
    let bus = Bus::get();
    let pool = pool();
    let (topic, group) = (topics::teacher_tasks(&pool), topics::group("teacher", &pool));
    let producer = Producer::new(&bus.brokers).unwrap();
    let sent = tasks(1);
    send_all(&producer, &topic, &sent).await;

    let mut worker = Command::new(std::env::current_exe().unwrap())
        .args(["suite::the_worker_that_is_killed", "--exact", "--nocapture"])
        .env("RETORT_TEST_WORKER", format!("{} {topic} {group}", bus.brokers))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(worker.stdout.take().unwrap()).lines();
    let got = lines.map(Result::unwrap).find_map(|line| line.split_once("took ").map(|(_, id)| id.to_owned()));
    assert_eq!(got.unwrap(), sent[0].task_id);
    let other = TaskConsumer::new(&bus.brokers, &topic, &group).unwrap();
    worker.kill().unwrap();
    worker.wait().unwrap();
    let killed = std::time::Instant::now();
    let delivery = soon("the killed worker's task", other.next()).await.unwrap();
    assert_eq!(delivery.message, sent[0]);
    assert!(killed.elapsed() < Duration::from_secs(20), "it took {:?}", killed.elapsed());
}

/// Not a test by itself: the process that `a_killed_workers_task_is_given_to_another` kills.
#[tokio::test]
async fn the_worker_that_is_killed() {
    let Ok(told) = std::env::var("RETORT_TEST_WORKER") else { return };
    let words: Vec<&str> = told.split(' ').collect();
    let consumer = TaskConsumer::new(words[0], words[1], words[2]).unwrap();
    let delivery = consumer.next().await.unwrap();
    println!("took {}", delivery.message.task_id);
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn unreadable_tasks_are_set_aside_and_passed_over() {
    let bus = Bus::get();
    let pool = pool();
    let (topic, group) = (topics::teacher_tasks(&pool), topics::group("teacher", &pool));
    topics::ensure_topics(&bus.brokers, &[(topic.clone(), 1)]).await.unwrap();
    let raw = raw_producer(&bus.brokers);
    let sent = tasks(1);
    let good = sent[0].encode_to_vec();
    let version = |version| OwnedHeaders::new().insert(Header { key: "schema-version", value: Some(version) });
    for (payload, headers) in [
        (b"no protobuf at all".as_slice(), version("1.0")),
        (good.as_slice(), version("2.0")),
        (good.as_slice(), OwnedHeaders::new()),
    ] {
        let record: FutureRecord<'_, [u8], [u8]> = FutureRecord::to(&topic).payload(payload).headers(headers);
        raw.send(record, Duration::from_secs(10)).await.unwrap();
    }
    let producer = Producer::new(&bus.brokers).unwrap();
    send_all(&producer, &topic, &sent).await;

    let consumer = TaskConsumer::new(&bus.brokers, &topic, &group).unwrap();
    let delivery = soon("the good task", consumer.next()).await.unwrap();
    assert_eq!((delivery.offset, &delivery.message), (3, &sent[0]));
    consumer.close().await;

    let dead = read_raw(&bus.brokers, topics::DEAD_LETTERS, 3, |message| header(message, "topic") == topic).await;
    assert_eq!(dead[0].payload().unwrap(), b"no protobuf at all");
    assert!(header(&dead[0], "reason").starts_with("no TaskMessage"), "{}", header(&dead[0], "reason"));
    assert!(header(&dead[1], "reason").contains("schema version 2.0 is newer"), "{}", header(&dead[1], "reason"));
    assert!(header(&dead[2], "reason").contains("no schema-version"), "{}", header(&dead[2], "reason"));
    assert_eq!((header(&dead[1], "partition"), header(&dead[1], "offset")), ("0".into(), "1".into()));

    let consumer = TaskConsumer::new(&bus.brokers, &topic, &group).unwrap();
    assert_eq!(soon("a task", consumer.next()).await.unwrap().offset, 3, "the unreadable ones were committed");
}

#[tokio::test]
async fn an_unreadable_event_is_told_and_passed_over() {
    let bus = Bus::get();
    topics::ensure_topics(&bus.brokers, &[(topics::EVENTS.into(), topics::EVENT_PARTITIONS)]).await.unwrap();
    let garbage = pool();
    let record: FutureRecord<'_, [u8], [u8]> = FutureRecord::to(topics::EVENTS).payload(garbage.as_bytes());
    let at = raw_producer(&bus.brokers).send(record, Duration::from_secs(10)).await.unwrap();
    let sent = events(1);
    Producer::new(&bus.brokers).unwrap().send_event(&sent[0]).await.unwrap();

    let reader = EventReader::new(&bus.brokers, &[(0, at.offset)]).unwrap();
    let record = soon("the garbage", reader.next()).await.unwrap();
    assert_eq!((record.offset, record.event.unwrap_err().code), (at.offset, Code::BusMalformed));
    assert_eq!(soon("the event after it", reader.next()).await.unwrap().event.unwrap(), sent[0]);
    read_raw(&bus.brokers, topics::DEAD_LETTERS, 1, |message| message.payload() == Some(garbage.as_bytes())).await;
}

#[tokio::test]
async fn a_record_too_large_is_refused_before_it_is_sent() {
    let bus = Bus::get();
    let producer = Producer::new(&bus.brokers).unwrap();
    let large = |bytes: usize| WorkerEvent {
        what: Some(What::EvaluationReady(EvaluationReady {
            samples: vec![Sample { prompt: "x".repeat(bytes), ..Sample::default() }],
            ..EvaluationReady::default()
        })),
        ..events(1).remove(0)
    };
    let error = producer.send_event(&large(retort_bus::MAX_RECORD_BYTES)).await.unwrap_err();
    assert_eq!(error.code, Code::BusMalformed);

    let near = large(retort_bus::MAX_RECORD_BYTES - 1000);
    soon("an acknowledgement", producer.send_event(&near)).await.unwrap();
    let reader = EventReader::new(&bus.brokers, &[]).unwrap();
    soon("the large event", async { while reader.next().await.unwrap().event.ok().as_ref() != Some(&near) {} }).await;
}

#[tokio::test]
async fn a_broker_that_is_not_there_is_named() {
    let producer = Producer::with_deadline("127.0.0.1:1", Duration::from_secs(2)).unwrap();
    let error = producer.send_event(&events(1)[0]).await.unwrap_err();
    assert_eq!(error.code, Code::BusUnavailable);
    assert!(error.message.contains("127.0.0.1:1"), "{}", error.message);
}
