use super::*;

const SESSION: Duration = Duration::from_secs(8);

fn join(member: &str, fresh_id: &str, metadata: &'static str) -> Join {
    Join {
        member: member.to_owned(),
        fresh_id: fresh_id.to_owned(),
        instance: None,
        session: SESSION,
        rebalance: Duration::from_secs(60),
        protocol_type: "consumer".to_owned(),
        protocols: vec![("cooperative-sticky".to_owned(), Bytes::from_static(metadata.as_bytes()))],
    }
}

/// Gives out an id, as the first join of a consumer does.
fn invite(group: &mut Group, now: Instant, id: &str) {
    let answer = group.join(now, join("", id, "m")).try_recv().unwrap();
    assert_eq!((answer.error, answer.member.as_str()), (ErrorCode::MemberIdRequired, id));
}

fn assignments(of: &[(&str, &'static str)]) -> Vec<(String, Bytes)> {
    of.iter().map(|(id, what)| ((*id).to_owned(), Bytes::from_static(what.as_bytes()))).collect()
}

/// Two members, `a` leading, each with its half; generation 2.
fn pair(now: Instant) -> Group {
    let mut group = Group::default();
    invite(&mut group, now, "a");
    let mut a = group.join(now, join("a", "", "m"));
    assert_eq!(a.try_recv().unwrap().leader, "a");
    let mut synced = group.sync(now, "a", 1, assignments(&[("a", "all")]));
    assert_eq!(synced.try_recv().unwrap().assignment, "all");

    invite(&mut group, now, "b");
    let mut b = group.join(now, join("b", "", "m"));
    assert!(b.try_recv().is_err(), "the join waits for the other member");
    assert_eq!(group.heartbeat(now, "a", 1), ErrorCode::RebalanceInProgress);
    let mut a = group.join(now, join("a", "", "m"));
    let (a, b) = (a.try_recv().unwrap(), b.try_recv().unwrap());
    assert_eq!((a.generation, b.generation, a.members.len(), b.members.len()), (2, 2, 2, 0));

    let mut b = group.sync(now, "b", 2, Vec::new());
    assert!(b.try_recv().is_err(), "a follower waits for the leader's plan");
    let mut a = group.sync(now, "a", 2, assignments(&[("a", "left"), ("b", "right")]));
    assert_eq!(a.try_recv().unwrap().assignment, "left");
    assert_eq!(b.try_recv().unwrap().assignment, "right");
    assert_eq!(group.state(), State::Stable);
    group
}

#[test]
fn two_members_share() {
    pair(Instant::now());
}

#[test]
fn a_silent_leader_is_buried_and_its_partitions_move() {
    let start = Instant::now();
    let mut group = pair(start);
    let later = start + Duration::from_secs(5);
    assert_eq!(group.heartbeat(later, "b", 2), ErrorCode::None);
    group.tick(start + Duration::from_secs(9));
    assert_eq!(group.heartbeat(later, "a", 2), ErrorCode::UnknownMemberId);
    assert_eq!(group.heartbeat(later, "b", 2), ErrorCode::RebalanceInProgress);
    let joined = group.join(later, join("b", "", "m")).try_recv().unwrap();
    assert_eq!((joined.leader.as_str(), joined.generation, joined.members.len()), ("b", 3, 1));
}

#[test]
fn a_leader_that_dies_before_its_plan_holds_nobody_up() {
    let start = Instant::now();
    let mut group = pair(start);
    // Both join again, then the leader dies before it syncs.
    let mut changed = group.join(start, join("b", "", "changed"));
    let mut a = group.join(start, join("a", "", "m"));
    assert!(a.try_recv().is_ok() && changed.try_recv().is_ok());
    let mut waiting = group.sync(start, "b", 3, Vec::new());
    assert!(waiting.try_recv().is_err());
    group.tick(start + Duration::from_secs(9));
    assert_eq!(waiting.try_recv().unwrap().error, ErrorCode::RebalanceInProgress);
    let joined = group.join(start + Duration::from_secs(9), join("b", "", "changed")).try_recv().unwrap();
    assert_eq!((joined.error, joined.leader.as_str()), (ErrorCode::None, "b"));
}

#[test]
fn a_member_that_does_not_rejoin_is_dropped_at_the_deadline() {
    let start = Instant::now();
    let mut group = pair(start);
    let mut b = group.join(start, join("b", "", "changed"));
    // `a` beats on but never joins again.
    for second in 1..=61 {
        let now = start + Duration::from_secs(second);
        group.heartbeat(now, "a", 2);
        group.tick(now);
    }
    let joined = b.try_recv().unwrap();
    assert_eq!((joined.generation, joined.leader.as_str(), joined.members.len()), (3, "b", 1));
}

#[test]
fn an_unchanged_follower_that_joins_again_disturbs_nobody() {
    let now = Instant::now();
    let mut group = pair(now);
    let joined = group.join(now, join("b", "", "m")).try_recv().unwrap();
    assert_eq!((joined.error, joined.generation), (ErrorCode::None, 2));
    assert_eq!(group.state(), State::Stable);
}

#[test]
fn leaving_moves_partitions_at_once() {
    let now = Instant::now();
    let mut group = pair(now);
    assert_eq!(group.leave(now, "a"), ErrorCode::None);
    assert_eq!(group.leave(now, "a"), ErrorCode::UnknownMemberId);
    assert_eq!(group.heartbeat(now, "b", 2), ErrorCode::RebalanceInProgress);
    assert_eq!(group.join(now, join("b", "", "m")).try_recv().unwrap().leader, "b");
    assert_eq!(group.leave(now, "b"), ErrorCode::None);
    assert!(group.is_forgettable());
}

#[test]
fn commits_are_fenced_by_member_and_generation() {
    let now = Instant::now();
    let mut group = pair(now);
    assert_eq!(group.may_commit(now, "a", 2), ErrorCode::None);
    assert_eq!(group.may_commit(now, "a", 1), ErrorCode::IllegalGeneration);
    assert_eq!(group.may_commit(now, "zombie", 2), ErrorCode::UnknownMemberId);
    assert_eq!(Group::default().may_commit(now, "", -1), ErrorCode::None, "a consumer outside any group");
}

#[test]
fn what_cannot_join_is_told_why() {
    let now = Instant::now();
    let mut group = pair(now);
    let mut refused = |join: Join| group.join(now, join).try_recv().unwrap().error;
    assert_eq!(refused(join("stranger", "", "m")), ErrorCode::UnknownMemberId);
    assert_eq!(refused(Join { session: Duration::ZERO, ..join("", "c", "m") }), ErrorCode::InvalidSessionTimeout);
    assert_eq!(refused(Join { protocols: Vec::new(), ..join("", "c", "m") }), ErrorCode::InconsistentGroupProtocol);
    let other = vec![("range".to_owned(), Bytes::new())];
    assert_eq!(refused(Join { protocols: other, ..join("", "c", "m") }), ErrorCode::InconsistentGroupProtocol);
}

#[test]
fn a_member_invited_that_never_comes_is_forgotten() {
    let start = Instant::now();
    let mut group = pair(start);
    invite(&mut group, start, "c");
    let mut b = group.join(start, join("b", "", "changed"));
    let mut a = group.join(start, join("a", "", "m"));
    assert!(a.try_recv().is_err(), "the group waits for the one it invited");
    group.tick(start + Duration::from_secs(6));
    assert_eq!(a.try_recv().unwrap().members.len(), 2);
    assert!(b.try_recv().is_ok());
}

#[test]
fn a_static_member_that_starts_again_replaces_itself() {
    let now = Instant::now();
    let mut group = Group::default();
    let fixed = |id: &str| Join { instance: Some("one".into()), ..join("", id, "m") };
    assert_eq!(group.join(now, fixed("x")).try_recv().unwrap().member, "x");
    let joined = group.join(now, fixed("y")).try_recv().unwrap();
    assert_eq!((joined.member.as_str(), joined.members.len()), ("y", 1));
    assert_eq!(group.heartbeat(now, "x", joined.generation), ErrorCode::UnknownMemberId);
}
