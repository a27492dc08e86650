//! Consumer groups behind tansu's `Coordinator` trait: groups in memory, offsets in storage.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use tansu_broker::{
    Result,
    coordinator::group::{Coordinator, OffsetCommit, administrator::Controller},
};
use tansu_sans_io::{
    Body, ErrorCode, HeartbeatResponse, JoinGroupResponse, LeaveGroupResponse, OffsetCommitResponse, SyncGroupResponse,
    join_group_request::JoinGroupRequestProtocol,
    join_group_response::JoinGroupResponseMember,
    leave_group_request::MemberIdentity,
    leave_group_response::MemberResponse,
    offset_commit_response::{OffsetCommitResponsePartition, OffsetCommitResponseTopic},
    offset_fetch_request::{OffsetFetchRequestGroup, OffsetFetchRequestTopic},
    sync_group_request::SyncGroupRequestAssignment,
};
use tansu_storage::{OffsetCommitRequest, Storage, Topition};
use uuid::Uuid;

use crate::group::{Group, Join, Joined, Synced};

/// Most groups at once, and longest names.
const MAX_GROUPS: usize = 4096;
const MAX_NAME: usize = 255;

/// The groups of this broker.
#[derive(Clone)]
pub(crate) struct Groups<S> {
    groups: Arc<Mutex<HashMap<String, Group>>>,
    storage: S,
    /// Answers what needs no group: which offsets are committed.
    committed: Controller<S>,
}

impl<S: Storage> Groups<S> {
    pub(crate) fn new(storage: S) -> Result<Self> {
        Ok(Self { groups: Arc::default(), committed: Controller::with_storage(storage.clone())?, storage })
    }

    /// Lets time pass for every group.
    pub(crate) fn tick(&self) {
        let now = Instant::now();
        let mut groups = self.lock();
        for group in groups.values_mut() {
            group.tick(now);
        }
        groups.retain(|_, group| !group.is_forgettable());
    }

    /// Answers everyone who waits: the coordinator is going away.
    pub(crate) fn close(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Group>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `act` on the group, or `None` when it is not there.
    fn with<T>(&self, name: &str, act: impl FnOnce(&mut Group) -> T) -> Option<T> {
        self.lock().get_mut(name).map(act)
    }

    async fn commit(&self, commit: &OffsetCommit<'_>) -> OffsetCommitResponse {
        let member = commit.member_id.unwrap_or_default();
        let generation = commit.generation_id_or_member_epoch.unwrap_or(-1);
        let allowed = self
            .with(commit.group_id, |group| group.may_commit(Instant::now(), member, generation))
            .unwrap_or(if generation < 0 { ErrorCode::None } else { ErrorCode::UnknownMemberId });
        let topics = commit.topics.unwrap_or_default();
        let outcome = if allowed == ErrorCode::None { self.store(commit).await } else { Err(allowed) };
        let code = |topic: &str, partition: i32| match &outcome {
            Err(error) => i16::from(*error),
            Ok(stored) => stored
                .get(&Topition::new(topic, partition))
                .map_or_else(|| ErrorCode::UnknownServerError.into(), |error| i16::from(*error)),
        };
        let topics = topics
            .iter()
            .map(|topic| {
                let partitions = topic.partitions.iter().flatten().map(|partition| {
                    OffsetCommitResponsePartition::default()
                        .partition_index(partition.partition_index)
                        .error_code(code(&topic.name, partition.partition_index))
                });
                OffsetCommitResponseTopic::default().name(topic.name.clone()).partitions(Some(partitions.collect()))
            })
            .collect();
        OffsetCommitResponse::default().throttle_time_ms(Some(0)).topics(Some(topics))
    }

    async fn store(&self, commit: &OffsetCommit<'_>) -> std::result::Result<HashMap<Topition, ErrorCode>, ErrorCode> {
        let mut offsets = Vec::new();
        for topic in commit.topics.unwrap_or_default() {
            for partition in topic.partitions.iter().flatten() {
                let offset = OffsetCommitRequest::try_from(partition).map_err(|_| ErrorCode::InvalidRequest)?;
                offsets.push((Topition::new(topic.name.clone(), partition.partition_index), offset));
            }
        }
        // Committed offsets never expire: retention is ignored.
        let stored = self.storage.offset_commit(commit.group_id, None, &offsets).await;
        stored.map(|stored| stored.into_iter().collect()).map_err(|error| {
            tracing::error!(group = commit.group_id, "committing offsets: {error}");
            ErrorCode::UnknownServerError
        })
    }
}

impl<S> fmt::Debug for Groups<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Groups")
    }
}

#[async_trait]
impl<S: Storage> Coordinator for Groups<S> {
    async fn join(
        &mut self,
        client_id: Option<&str>,
        group_id: &str,
        session_timeout_ms: i32,
        rebalance_timeout_ms: Option<i32>,
        member_id: &str,
        group_instance_id: Option<&str>,
        protocol_type: &str,
        protocols: Option<&[JoinGroupRequestProtocol]>,
        _reason: Option<&str>,
    ) -> Result<Body> {
        let session = millis(session_timeout_ms);
        let client: String = client_id.unwrap_or("member").chars().take(64).collect();
        let join = Join {
            member: member_id.to_owned(),
            fresh_id: format!("{client}-{}", Uuid::new_v4()),
            instance: group_instance_id.map(str::to_owned),
            session,
            rebalance: rebalance_timeout_ms.map_or(session, millis),
            protocol_type: protocol_type.to_owned(),
            protocols: protocols.unwrap_or_default().iter().map(|p| (p.name.clone(), p.metadata.clone())).collect(),
        };
        let answer = {
            let mut groups = self.lock();
            let known = groups.contains_key(group_id);
            if group_id.is_empty() || group_id.len() > MAX_NAME {
                return Ok(joined(refusal(ErrorCode::InvalidGroupId)));
            } else if !known && groups.len() >= MAX_GROUPS {
                return Ok(joined(refusal(ErrorCode::CoordinatorNotAvailable)));
            }
            groups.entry(group_id.to_owned()).or_default().join(Instant::now(), join)
        };
        Ok(joined(answer.await.unwrap_or_else(|_| refusal(ErrorCode::CoordinatorNotAvailable))))
    }

    async fn sync(
        &mut self,
        group_id: &str,
        generation_id: i32,
        member_id: &str,
        _group_instance_id: Option<&str>,
        _protocol_type: Option<&str>,
        _protocol_name: Option<&str>,
        assignments: Option<&[SyncGroupRequestAssignment]>,
    ) -> Result<Body> {
        let assignments =
            assignments.unwrap_or_default().iter().map(|a| (a.member_id.clone(), a.assignment.clone())).collect();
        let waiting = self.with(group_id, |group| group.sync(Instant::now(), member_id, generation_id, assignments));
        let synced = match waiting {
            None => unsynced(ErrorCode::UnknownMemberId),
            Some(waiting) => waiting.await.unwrap_or_else(|_| unsynced(ErrorCode::CoordinatorNotAvailable)),
        };
        Ok(SyncGroupResponse::default()
            .throttle_time_ms(Some(0))
            .error_code(synced.error.into())
            .protocol_type(Some(synced.protocol_type))
            .protocol_name(Some(synced.protocol))
            .assignment(synced.assignment)
            .into())
    }

    async fn heartbeat(
        &mut self,
        group_id: &str,
        generation_id: i32,
        member_id: &str,
        _group_instance_id: Option<&str>,
    ) -> Result<Body> {
        let error = self
            .with(group_id, |group| group.heartbeat(Instant::now(), member_id, generation_id))
            .unwrap_or(ErrorCode::UnknownMemberId);
        Ok(HeartbeatResponse::default().throttle_time_ms(Some(0)).error_code(error.into()).into())
    }

    async fn leave(
        &mut self,
        group_id: &str,
        member_id: Option<&str>,
        members: Option<&[MemberIdentity]>,
    ) -> Result<Body> {
        let leaving = member_id.into_iter().chain(members.unwrap_or_default().iter().map(|m| m.member_id.as_str()));
        let left: Vec<MemberResponse> = leaving
            .map(|member| {
                let error = self
                    .with(group_id, |group| group.leave(Instant::now(), member))
                    .unwrap_or(ErrorCode::UnknownMemberId);
                MemberResponse::default().member_id(member.to_owned()).group_instance_id(None).error_code(error.into())
            })
            .collect();
        Ok(LeaveGroupResponse::default()
            .throttle_time_ms(Some(0))
            .error_code(ErrorCode::None.into())
            .members(Some(left))
            .into())
    }

    async fn offset_commit(&mut self, commit: OffsetCommit<'_>) -> Result<Body> {
        Ok(self.commit(&commit).await.into())
    }

    async fn offset_fetch(
        &mut self,
        group_id: Option<&str>,
        topics: Option<&[OffsetFetchRequestTopic]>,
        groups: Option<&[OffsetFetchRequestGroup]>,
        require_stable: Option<bool>,
    ) -> Result<Body> {
        self.committed.offset_fetch(group_id, topics, groups, require_stable).await
    }
}

fn millis(ms: i32) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}

fn joined(joined: Joined) -> Body {
    let members = joined
        .members
        .into_iter()
        .map(|(id, instance, metadata)| {
            JoinGroupResponseMember::default().member_id(id).group_instance_id(instance).metadata(metadata)
        })
        .collect();
    JoinGroupResponse::default()
        .throttle_time_ms(Some(0))
        .error_code(joined.error.into())
        .generation_id(joined.generation)
        .protocol_type(Some(joined.protocol_type))
        .protocol_name(Some(joined.protocol))
        .leader(joined.leader)
        .skip_assignment(Some(false))
        .member_id(joined.member)
        .members(Some(members))
        .into()
}

fn refusal(error: ErrorCode) -> Joined {
    Joined {
        error,
        generation: -1,
        protocol_type: String::new(),
        protocol: String::new(),
        leader: String::new(),
        member: String::new(),
        members: Vec::new(),
    }
}

fn unsynced(error: ErrorCode) -> Synced {
    Synced { error, protocol_type: String::new(), protocol: String::new(), assignment: Bytes::new() }
}
