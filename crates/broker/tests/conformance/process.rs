//! The `retort-broker` process.

use std::{
    collections::HashSet,
    io::{Read as _, Write as _},
    net::TcpStream,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{Consumer as _, StreamConsumer},
    producer::FutureRecord,
};
use retort_bus::{EventReader, Producer, TaskConsumer, topics};
use tokio::task::JoinSet;

use crate::support::{Broker, events, pool, raw_producer, read_raw, refused, soon, tasks};

#[tokio::test]
async fn what_was_acknowledged_survives_kills_and_clients_go_on() {
    let mut broker = Broker::start();
    let pool = pool();
    let (topic, group) = (topics::teacher_tasks(&pool), topics::group("teacher", &pool));
    let producer = Producer::new(&broker.address).unwrap();
    let consumer = TaskConsumer::new(&broker.address, &topic, &group).unwrap();
    let reader = EventReader::new(&broker.address, &[]).unwrap();

    let (acknowledged, stop) = (Arc::new(Mutex::new(HashSet::new())), Arc::new(AtomicBool::new(false)));
    let mut senders = JoinSet::new();
    for _ in 0..4 {
        let (producer, acknowledged, stop) = (producer.clone(), acknowledged.clone(), stop.clone());
        senders.spawn(async move {
            for event in events(1_000_000) {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                producer.send_event(&event).await.unwrap();
                acknowledged.lock().unwrap().insert(event.event_id);
            }
        });
    }
    let count = || acknowledged.lock().unwrap().len();
    for round in 0..2 {
        let before = count();
        soon("more acknowledgements", async {
            while count() < before + 100 {
                reader.next().await.unwrap();
            }
        })
        .await;
        let task = tasks(1);
        producer.send_task(&topic, &task[0]).await.unwrap();
        let delivery = soon("a task", consumer.next()).await.unwrap();
        assert_eq!(delivery.message, task[0], "round {round}");
        broker.kill_and_restart();
        soon("the commit after the restart", consumer.commit(&delivery)).await.unwrap();
    }
    stop.store(true, Ordering::SeqCst);
    soon("the senders", async { while senders.join_next().await.transpose().unwrap().is_some() {} }).await;

    let mut missing = std::mem::take(&mut *acknowledged.lock().unwrap());
    let fresh = EventReader::new(&broker.address, &[]).unwrap();
    soon("every acknowledged event", async {
        while !missing.is_empty() {
            missing.remove(&fresh.next().await.unwrap().event.unwrap().event_id);
        }
    })
    .await;
    let task = tasks(1);
    producer.send_task(&topic, &task[0]).await.unwrap();
    assert_eq!(soon("a task", consumer.next()).await.unwrap().message, task[0], "nothing committed came again");
}

#[tokio::test]
async fn a_broker_that_lost_its_data_gets_its_topics_and_clients_back() {
    let mut broker = Broker::start();
    let pool = pool();
    let (topic, group) = (topics::teacher_tasks(&pool), topics::group("teacher", &pool));
    let producer = Producer::new(&broker.address).unwrap();
    let consumer = TaskConsumer::new(&broker.address, &topic, &group).unwrap();
    let reader = EventReader::new(&broker.address, &[]).unwrap();
    for event in events(5) {
        producer.send_event(&event).await.unwrap();
        soon("an event", reader.next()).await.unwrap();
    }
    let task = tasks(1);
    producer.send_task(&topic, &task[0]).await.unwrap();
    let delivery = soon("a task", consumer.next()).await.unwrap();
    consumer.commit(&delivery).await.unwrap();

    broker.kill();
    std::fs::remove_dir_all(&broker.data).unwrap();
    broker.kill_and_restart();

    let (event, task) = (events(1).remove(0), tasks(1).remove(0));
    soon("the event's acknowledgement", producer.send_event(&event)).await.unwrap();
    soon("the task's acknowledgement", producer.send_task(&topic, &task)).await.unwrap();
    let record = soon("the event, from a log that starts over", reader.next()).await.unwrap();
    assert_eq!((record.offset, record.event.unwrap()), (0, event));
    assert_eq!(soon("the task", consumer.next()).await.unwrap().message, task);
}

#[tokio::test]
async fn records_past_their_retention_go_and_the_others_stay() {
    let mut broker = Broker::start();
    let topic = topics::teacher_tasks(&pool());
    topics::ensure_topics(&broker.address, &[(topic.clone(), 1)]).await.unwrap();
    let raw = raw_producer(&broker.address);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
    let now = i64::try_from(now).unwrap();
    for (payload, age_days) in [("old", 8), ("older", 30), ("young", 6)] {
        let record: FutureRecord<'_, [u8], str> =
            FutureRecord::to(&topic).payload(payload).timestamp(now - age_days * 86_400_000);
        raw.send(record, Duration::from_secs(10)).await.unwrap();
    }
    // Maintenance runs as a broker starts.
    broker.kill_and_restart();
    soon("the old records to go", async {
        while read_raw(&broker.address, &topic, 1, |_| true).await[0].payload() != Some(b"young") {}
    })
    .await;
    let young = read_raw(&broker.address, &topic, 1, |_| true).await;
    assert_eq!(young[0].offset(), 2, "offsets are kept");
}

#[tokio::test]
async fn clients_close_at_once_when_the_broker_is_gone() {
    let mut broker = Broker::start();
    let pool = pool();
    let (topic, group) = (topics::teacher_tasks(&pool), topics::group("teacher", &pool));
    let producer = Producer::new(&broker.address).unwrap();
    let consumer = TaskConsumer::new(&broker.address, &topic, &group).unwrap();
    let reader = EventReader::new(&broker.address, &[]).unwrap();
    producer.send_task(&topic, &tasks(1)[0]).await.unwrap();
    soon("a task", consumer.next()).await.unwrap();
    broker.kill();
    let started = Instant::now();
    soon("the consumer's end", consumer.close()).await;
    drop(reader);
    drop(producer);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[test]
fn a_port_in_use_is_named_at_once() {
    let broker = Broker::start();
    let folder = tempfile::tempdir().unwrap();
    let started = Instant::now();
    let stderr = refused(&broker.address, &folder.path().join("other"));
    assert!(stderr.contains("error[port-in-use]") && stderr.contains(&broker.address), "{stderr}");
    assert!(stderr.contains("--listen"), "it says the way out: {stderr}");
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}

#[test]
fn a_data_folder_has_one_broker() {
    let broker = Broker::start();
    let stderr = refused("127.0.0.1:0", &broker.data);
    assert!(stderr.contains("error[already-running]") && stderr.contains(broker.data.to_str().unwrap()), "{stderr}");
}

#[tokio::test]
async fn it_stops_within_two_seconds_of_sigterm_while_clients_wait() {
    let mut broker = Broker::start();
    let pool = pool();
    let (topic, group) = (topics::teacher_tasks(&pool), topics::group("teacher", &pool));
    let producer = Producer::new(&broker.address).unwrap();
    let consumer = TaskConsumer::new(&broker.address, &topic, &group).unwrap();
    producer.send_task(&topic, &tasks(1)[0]).await.unwrap();
    soon("a task", consumer.next()).await.unwrap();
    let (took, status) = tokio::task::spawn_blocking(move || broker.terminate()).await.unwrap();
    assert!(status.success(), "{status}");
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[tokio::test]
async fn fetching_what_does_not_exist_harms_nobody() {
    let broker = Broker::start();
    let producer = Producer::new(&broker.address).unwrap();
    let task = tasks(1);
    let topic = topics::teacher_tasks(&pool());
    producer.send_task(&topic, &task[0]).await.unwrap();
    let wanderer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", &broker.address)
        .set("group.id", "wanderer")
        .set("auto.offset.reset", "error")
        .create()
        .unwrap();
    let mut nowhere = TopicPartitionList::new();
    nowhere.add_partition_offset("nowhere", 0, Offset::Offset(3)).unwrap();
    nowhere.add_partition_offset(&topic, 99, Offset::Offset(3)).unwrap();
    nowhere.add_partition_offset(&topic, 0, Offset::Offset(1000)).unwrap();
    wanderer.assign(&nowhere).unwrap();
    soon("an error", wanderer.recv()).await.map(|_| ()).unwrap_err();
    let consumer = TaskConsumer::new(&broker.address, &topic, "still-works").unwrap();
    assert_eq!(soon("a task", consumer.next()).await.unwrap().message, task[0]);
}

#[test]
fn frames_that_are_none_close_only_their_connection() {
    let broker = Broker::start();
    let send = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(&broker.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        // Either a clean end or a reset.
        let _ = stream.read_to_end(&mut answer);
        answer
    };
    assert!(send(&[0x7f, 0xff, 0xff, 0xff, 0, 18]).is_empty(), "a frame of 2 GiB");
    assert!(send(&[0, 0, 0, 8, 0x7f, 0xff, 0, 0, 0, 0, 0, 1]).is_empty(), "an unknown request");
    assert!(send(&[0, 0, 0, 0]).is_empty(), "an empty frame");
    // A fetch whose topic array claims two thousand million entries.
    let mut fetch = vec![0, 1, 0, 4, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 1];
    fetch.extend([0, 16, 0, 0, 0, 0x77, 0x77, 0x77, 0x77]);
    let mut framed = u32::try_from(fetch.len()).unwrap().to_be_bytes().to_vec();
    framed.extend(&fetch);
    assert!(send(&framed).is_empty(), "an array that is not there");
    let mut stream = TcpStream::connect(&broker.address).unwrap();
    stream.write_all(&[0, 0, 0, 10, 0, 18, 0, 0, 0, 0, 0, 7, 0xff, 0xff]).unwrap();
    let mut answer = [0; 8];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer[4..], [0, 0, 0, 7], "still answers");
}
