//! One consumer group, as Kafka's classic protocol defines it: a pure state machine, told the time.
//!
//! ```text
//!            join                 everyone has joined          the leader's sync
//! Empty ------------> Preparing ---------------------> Completing -----------> Stable
//!                        ^    (or the deadline passed)     |                      |
//!                        +---------------------------------+----------------------+
//!                           a member joins anew, leaves, or is silent for its session
//! ```
//!
//! tansu's own coordinator keeps the assignment when a member goes silent, so the partitions of a
//! killed worker stay with the dead; this one starts a rebalance. A join and a sync wait for the
//! others, so both answer through a channel. Nothing is stored: after a restart members are
//! unknown, join again, and find their committed offsets in the log's storage.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tansu_sans_io::ErrorCode;
use tokio::sync::oneshot;

/// Most members of one group.
const MAX_MEMBERS: usize = 1000;
/// How long a member that was given its id may take to come back with it.
const INVITATION: Duration = Duration::from_secs(5);
const SESSION: std::ops::RangeInclusive<Duration> = Duration::from_millis(500)..=Duration::from_secs(1800);
/// Longest that a rebalance waits for a member.
const MAX_REBALANCE: Duration = Duration::from_secs(600);

#[derive(Debug, Default)]
pub(crate) struct Group {
    state: State,
    generation: i32,
    protocol_type: String,
    protocol: String,
    leader: Option<String>,
    members: BTreeMap<String, Member>,
    /// Ids handed out to members that have not joined with them yet.
    invited: HashMap<String, Instant>,
    /// When waiting for joins, or for the leader's sync, ends.
    deadline: Option<Instant>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum State {
    #[default]
    Empty,
    Preparing,
    Completing,
    Stable,
}

#[derive(Debug)]
struct Member {
    instance: Option<String>,
    session: Duration,
    rebalance: Duration,
    /// Name and metadata, in order of preference.
    protocols: Vec<(String, Bytes)>,
    heard: Instant,
    assignment: Bytes,
    joining: Option<oneshot::Sender<Joined>>,
    syncing: Option<oneshot::Sender<Synced>>,
}

/// What a member says when it joins.
#[derive(Debug, Clone)]
pub(crate) struct Join {
    /// Empty when it has none yet.
    pub member: String,
    /// Used when `member` is empty.
    pub fresh_id: String,
    pub instance: Option<String>,
    pub session: Duration,
    pub rebalance: Duration,
    pub protocol_type: String,
    pub protocols: Vec<(String, Bytes)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Joined {
    pub error: ErrorCode,
    pub generation: i32,
    pub protocol_type: String,
    pub protocol: String,
    pub leader: String,
    pub member: String,
    /// For the leader: every member's id, instance and metadata.
    pub members: Vec<(String, Option<String>, Bytes)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Synced {
    pub error: ErrorCode,
    pub protocol_type: String,
    pub protocol: String,
    pub assignment: Bytes,
}

impl Group {
    /// Adds or renews a member. The answer comes when the rebalance this starts is complete, or at
    /// once when there is nothing to rebalance or to refuse.
    pub(crate) fn join(&mut self, now: Instant, join: Join) -> oneshot::Receiver<Joined> {
        let (answer, receiver) = oneshot::channel();
        if let Some(refusal) = self.refuse(now, &join) {
            let _ = answer.send(refusal);
            return receiver;
        }
        let id = self.settle_id(&join);
        self.protocol_type.clone_from(&join.protocol_type);
        let unchanged = self.members.get(&id).is_some_and(|member| member.protocols == join.protocols);
        let settled = match self.state {
            State::Completing => unchanged,
            State::Stable => unchanged && self.leader.as_deref() != Some(id.as_str()),
            State::Empty | State::Preparing => false,
        };
        if settled {
            if let Some(member) = self.members.get_mut(&id) {
                member.heard = now;
            }
            let _ = answer.send(self.joined(&id));
            return receiver;
        }
        let assignment = self.members.get(&id).map(|member| member.assignment.clone()).unwrap_or_default();
        let member = Member {
            instance: join.instance,
            session: join.session,
            rebalance: join.rebalance.min(MAX_REBALANCE),
            protocols: join.protocols,
            heard: now,
            assignment,
            joining: Some(answer),
            syncing: None,
        };
        self.members.insert(id, member);
        self.prepare(now);
        self.complete_if_all_joined(now);
        receiver
    }

    /// A member asks for its assignment; the leader brings everyone's.
    pub(crate) fn sync(
        &mut self,
        now: Instant,
        id: &str,
        generation: i32,
        assignments: Vec<(String, Bytes)>,
    ) -> oneshot::Receiver<Synced> {
        let (answer, receiver) = oneshot::channel();
        let error = self.check(id, generation);
        let Some(member) = self.members.get_mut(id).filter(|_| error == ErrorCode::None) else {
            let _ = answer.send(self.synced(error, Bytes::new()));
            return receiver;
        };
        member.heard = now;
        match self.state {
            State::Empty | State::Preparing => {
                let _ = answer.send(self.synced(ErrorCode::RebalanceInProgress, Bytes::new()));
            }
            State::Stable => {
                let assignment = member.assignment.clone();
                let _ = answer.send(self.synced(ErrorCode::None, assignment));
            }
            State::Completing => {
                member.syncing = Some(answer);
                if self.leader.as_deref() == Some(id) {
                    self.assign(now, assignments);
                }
            }
        }
        receiver
    }

    pub(crate) fn heartbeat(&mut self, now: Instant, id: &str, generation: i32) -> ErrorCode {
        let error = self.check(id, generation);
        let Some(member) = self.members.get_mut(id) else {
            return error;
        };
        if error != ErrorCode::None {
            return error;
        }
        member.heard = now;
        if self.state == State::Preparing { ErrorCode::RebalanceInProgress } else { ErrorCode::None }
    }

    pub(crate) fn leave(&mut self, now: Instant, id: &str) -> ErrorCode {
        if self.invited.remove(id).is_some() {
            self.complete_if_all_joined(now);
            return ErrorCode::None;
        }
        if self.remove(now, id) { ErrorCode::None } else { ErrorCode::UnknownMemberId }
    }

    /// Whether a commit by this member is to be stored. A consumer outside any group commits with
    /// a negative generation.
    pub(crate) fn may_commit(&mut self, now: Instant, id: &str, generation: i32) -> ErrorCode {
        if generation < 0 && self.members.is_empty() {
            return ErrorCode::None;
        }
        let error = self.check(id, generation);
        if error == ErrorCode::None
            && let Some(member) = self.members.get_mut(id)
        {
            member.heard = now;
        }
        error
    }

    /// Removes members that were silent for their session and ends waits whose time is up. To be
    /// called often.
    pub(crate) fn tick(&mut self, now: Instant) {
        self.invited.retain(|_, invited| now.duration_since(*invited) < INVITATION);
        let silent: Vec<String> = self
            .members
            .iter()
            .filter(|(_, member)| member.joining.is_none() && member.syncing.is_none())
            .filter(|(_, member)| now.duration_since(member.heard) > member.session)
            .map(|(id, _)| id.clone())
            .collect();
        for id in silent {
            tracing::info!(member = id, "a consumer has gone silent; its partitions move");
            self.remove(now, &id);
        }
        let overdue = self.deadline.is_some_and(|deadline| now >= deadline);
        match self.state {
            State::Preparing if overdue => self.complete(now),
            State::Completing if overdue => {
                self.members.retain(|_, member| member.syncing.is_some());
                self.prepare(now);
                self.complete_if_all_joined(now);
            }
            _ => self.complete_if_all_joined(now),
        }
    }

    /// Whether nobody is in it, or about to be: such a group needs no memory.
    pub(crate) fn is_forgettable(&self) -> bool {
        self.members.is_empty() && self.invited.is_empty()
    }

    #[cfg(test)]
    pub(crate) fn state(&self) -> State {
        self.state
    }

    fn refuse(&mut self, now: Instant, join: &Join) -> Option<Joined> {
        let error = if join.protocols.is_empty() {
            ErrorCode::InconsistentGroupProtocol
        } else if !SESSION.contains(&join.session) {
            ErrorCode::InvalidSessionTimeout
        } else if !join.member.is_empty()
            && !self.members.contains_key(&join.member)
            && !self.invited.contains_key(&join.member)
        {
            ErrorCode::UnknownMemberId
        } else if !self.agrees(join) {
            ErrorCode::InconsistentGroupProtocol
        } else if self.members.len() + self.invited.len() >= MAX_MEMBERS && join.member.is_empty() {
            ErrorCode::GroupMaxSizeReached
        } else if join.member.is_empty() && join.instance.is_none() {
            self.invited.insert(join.fresh_id.clone(), now);
            ErrorCode::MemberIdRequired
        } else {
            return None;
        };
        let member = if error == ErrorCode::MemberIdRequired { join.fresh_id.clone() } else { join.member.clone() };
        Some(Joined {
            error,
            generation: -1,
            protocol_type: join.protocol_type.clone(),
            protocol: String::new(),
            leader: String::new(),
            member,
            members: Vec::new(),
        })
    }

    /// Whether the others share a protocol with it.
    fn agrees(&self, join: &Join) -> bool {
        let others = || self.members.iter().filter(|(id, _)| **id != join.member);
        others().next().is_none()
            || (self.protocol_type == join.protocol_type
                && join.protocols.iter().any(|(name, _)| others().all(|(_, member)| member.metadata(name).is_some())))
    }

    /// The id it joins under. A static member that starts again takes the place of its former self.
    fn settle_id(&mut self, join: &Join) -> String {
        if !join.member.is_empty() {
            self.invited.remove(&join.member);
            return join.member.clone();
        }
        let former = self.members.iter().find(|(_, member)| member.instance == join.instance).map(|(id, _)| id.clone());
        if let Some(mut former) = former.and_then(|id| self.members.remove(&id)) {
            former.fail(ErrorCode::FencedInstanceId);
        }
        join.fresh_id.clone()
    }

    fn prepare(&mut self, now: Instant) {
        if self.state == State::Preparing {
            return;
        }
        for member in self.members.values_mut() {
            if let Some(answer) = member.syncing.take() {
                member.heard = now;
                let _ = answer.send(Synced {
                    error: ErrorCode::RebalanceInProgress,
                    protocol_type: self.protocol_type.clone(),
                    protocol: self.protocol.clone(),
                    assignment: Bytes::new(),
                });
            }
        }
        self.state = State::Preparing;
        self.deadline = Some(now + self.patience());
    }

    fn complete_if_all_joined(&mut self, now: Instant) {
        if self.state == State::Preparing
            && self.invited.is_empty()
            && self.members.values().all(|member| member.joining.is_some())
        {
            self.complete(now);
        }
    }

    /// Those who have joined are the next generation.
    fn complete(&mut self, now: Instant) {
        self.members.retain(|_, member| member.joining.is_some());
        self.generation = self.generation.wrapping_add(1).max(1);
        let Some(first) = self.members.keys().next().cloned() else {
            self.state = State::Empty;
            self.leader = None;
            self.deadline = None;
            return;
        };
        let leader = self.leader.take().filter(|leader| self.members.contains_key(leader)).unwrap_or(first);
        let preferred = self.members.get(&leader).map(|member| member.protocols.clone()).unwrap_or_default();
        self.protocol = preferred
            .into_iter()
            .map(|(name, _)| name)
            .find(|name| self.members.values().all(|member| member.metadata(name).is_some()))
            .unwrap_or_default();
        self.leader = Some(leader);
        self.state = State::Completing;
        self.deadline = Some(now + self.patience());
        let ids: Vec<String> = self.members.keys().cloned().collect();
        for id in ids {
            let joined = self.joined(&id);
            if let Some(member) = self.members.get_mut(&id) {
                member.heard = now;
                if let Some(answer) = member.joining.take() {
                    let _ = answer.send(joined);
                }
            }
        }
        tracing::debug!(generation = self.generation, members = self.members.len(), "the group has a new generation");
    }

    fn assign(&mut self, now: Instant, assignments: Vec<(String, Bytes)>) {
        let mut assignments: HashMap<String, Bytes> = assignments.into_iter().collect();
        self.state = State::Stable;
        self.deadline = None;
        for (id, member) in &mut self.members {
            member.assignment = assignments.remove(id).unwrap_or_default();
            if let Some(answer) = member.syncing.take() {
                member.heard = now;
                let _ = answer.send(Synced {
                    error: ErrorCode::None,
                    protocol_type: self.protocol_type.clone(),
                    protocol: self.protocol.clone(),
                    assignment: member.assignment.clone(),
                });
            }
        }
    }

    fn remove(&mut self, now: Instant, id: &str) -> bool {
        let Some(mut member) = self.members.remove(id) else {
            return false;
        };
        member.fail(ErrorCode::UnknownMemberId);
        if self.leader.as_deref() == Some(id) {
            self.leader = None;
        }
        self.prepare(now);
        self.complete_if_all_joined(now);
        true
    }

    fn check(&self, id: &str, generation: i32) -> ErrorCode {
        if !self.members.contains_key(id) {
            ErrorCode::UnknownMemberId
        } else if generation != self.generation {
            ErrorCode::IllegalGeneration
        } else {
            ErrorCode::None
        }
    }

    fn patience(&self) -> Duration {
        self.members.values().map(|member| member.rebalance).max().unwrap_or_default()
    }

    fn joined(&self, id: &str) -> Joined {
        let leader = self.leader.clone().unwrap_or_default();
        let members = if leader == id {
            self.members
                .iter()
                .map(|(id, member)| {
                    (id.clone(), member.instance.clone(), member.metadata(&self.protocol).cloned().unwrap_or_default())
                })
                .collect()
        } else {
            Vec::new()
        };
        Joined {
            error: ErrorCode::None,
            generation: self.generation,
            protocol_type: self.protocol_type.clone(),
            protocol: self.protocol.clone(),
            leader,
            member: id.to_owned(),
            members,
        }
    }

    fn synced(&self, error: ErrorCode, assignment: Bytes) -> Synced {
        Synced { error, protocol_type: self.protocol_type.clone(), protocol: self.protocol.clone(), assignment }
    }
}

impl Member {
    fn metadata(&self, protocol: &str) -> Option<&Bytes> {
        self.protocols.iter().find(|(name, _)| name == protocol).map(|(_, metadata)| metadata)
    }

    /// Answers whatever it waits for with an error.
    fn fail(&mut self, error: ErrorCode) {
        if let Some(answer) = self.joining.take() {
            let _ = answer.send(Joined {
                error,
                generation: -1,
                protocol_type: String::new(),
                protocol: String::new(),
                leader: String::new(),
                member: String::new(),
                members: Vec::new(),
            });
        }
        if let Some(answer) = self.syncing.take() {
            let _ = answer.send(Synced {
                error,
                protocol_type: String::new(),
                protocol: String::new(),
                assignment: Bytes::new(),
            });
        }
    }
}

#[cfg(test)]
mod tests;
