//! Names and shapes of the topics.

use std::time::{Duration, Instant};

use rdkafka::{
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    error::RDKafkaErrorCode,
};
use retort_core::{Code, Error, Result};

use crate::client::{self, Quiet};

/// Events of every job. One partition: the orchestrator applies an event and stores its offset in
/// one transaction, one after the other, and a job's events keep the order they were sent in.
pub const EVENTS: &str = "retort.events";
pub const EVENT_PARTITIONS: i32 = 1;
/// Records that could not be read, with headers `reason`, `topic`, `partition` and `offset`.
pub const DEAD_LETTERS: &str = "retort.dead-letters";
pub const DEAD_LETTER_PARTITIONS: i32 = 1;
/// Partitions of a task topic: the most workers of one pool that can hold tasks at once.
pub const TASK_PARTITIONS: i32 = 8;

/// A week. What is older has been read, or is republished from the database.
const RETENTION_MS: &str = "604800000";
/// How long [`ensure_topics`] waits for a broker.
const DEADLINE: Duration = Duration::from_secs(60);

/// Task topic of a teacher pool.
pub fn teacher_tasks(pool: &str) -> String {
    format!("retort.tasks.teacher.{pool}")
}

/// Task topic of a student pool.
pub fn student_tasks(pool: &str) -> String {
    format!("retort.tasks.student.{pool}")
}

/// Consumer group of a pool's workers; `role` is `teacher` or `student`.
pub fn group(role: &str, pool: &str) -> String {
    format!("retort-{role}-{pool}")
}

/// Partitions a topic of ours is created with.
pub fn partitions(topic: &str) -> i32 {
    match topic {
        EVENTS => EVENT_PARTITIONS,
        DEAD_LETTERS => DEAD_LETTER_PARTITIONS,
        _ => TASK_PARTITIONS,
    }
}

/// Creates the topics that are missing, `(name, partitions)`; those that exist are left as they
/// are. Asks again for a minute while no broker answers, then [`Code::BusUnavailable`].
pub async fn ensure_topics(brokers: &str, topics: &[(String, i32)]) -> Result<()> {
    ensure_topics_within(brokers, topics, DEADLINE).await
}

pub(crate) async fn ensure_topics_within(brokers: &str, topics: &[(String, i32)], patience: Duration) -> Result<()> {
    let admin: AdminClient<Quiet> = client::config(brokers)
        .create_with_context(Quiet::new(brokers))
        .map_err(|error| client::misconfigured(brokers, &error))?;
    let new: Vec<NewTopic<'_>> = topics
        .iter()
        // -1: as many replicas as the cluster's default says.
        .map(|(name, partitions)| {
            NewTopic::new(name, *partitions, TopicReplication::Fixed(-1))
                .set("cleanup.policy", "delete")
                .set("retention.ms", RETENTION_MS)
        })
        .collect();
    let options = AdminOptions::new()
        .request_timeout(Some(Duration::from_secs(5)))
        .operation_timeout(Some(Duration::from_secs(5)));
    let started = Instant::now();
    let mut backoff = Duration::from_millis(100);
    loop {
        let failure = match admin.create_topics(&new, &options).await {
            Ok(results) => {
                let refused = results.into_iter().find_map(|result| match result {
                    Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => None,
                    Err((topic, code)) => Some((topic, code)),
                });
                match refused {
                    None => return Ok(()),
                    Some((topic, code)) if permanent(code) => {
                        return Err(Error::new(
                            Code::BusUnavailable,
                            format!(
                                "the broker at {brokers} refuses to create the topic {topic}: {code}; \
                                 create it by hand or let this user do it"
                            ),
                        ));
                    }
                    Some((topic, code)) => format!("creating {topic}: {code}"),
                }
            }
            Err(error) => error.to_string(),
        };
        if started.elapsed() + backoff > patience {
            return Err(client::unavailable(brokers, started.elapsed(), &failure));
        }
        tracing::debug!(brokers, "topics are not there yet: {failure}");
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(Duration::from_secs(2));
    }
}

fn permanent(code: RDKafkaErrorCode) -> bool {
    matches!(
        code,
        RDKafkaErrorCode::TopicAuthorizationFailed
            | RDKafkaErrorCode::ClusterAuthorizationFailed
            | RDKafkaErrorCode::InvalidTopic
            | RDKafkaErrorCode::InvalidPartitions
            | RDKafkaErrorCode::InvalidReplicationFactor
            | RDKafkaErrorCode::PolicyViolation
    )
}
