use super::*;

fn args(stage: Option<&str>, peers: &[&str]) -> GroupArgs {
    GroupArgs {
        group: Some("g".into()),
        stage: stage.map(str::to_owned),
        peers: peers.iter().map(|&peer| peer.to_owned()).collect(),
        group_patience: 10,
        ..GroupArgs::default()
    }
}

fn refused(args: &GroupArgs) -> String {
    Place::new(args, &LeaderWorkerSet::default()).err().expect("refused").message
}

#[test]
fn flags_name_a_place() {
    let place = Place::new(&args(Some("1/2"), &["127.0.0.1:1", "[::1]:2"]), &LeaderWorkerSet::default());
    let place = place.unwrap().unwrap();
    assert_eq!((place.stage, place.stages(), place.next()), (1, 2, 0));
    assert_eq!(place.listen, "[::1]:2");
    assert_eq!(place.name(0), "stage 0 of group \"g\" at 127.0.0.1:1");
    let alone = Place::new(&args(Some("0/1"), &[]), &LeaderWorkerSet::default()).unwrap();
    assert!(alone.is_none());
    assert!(Place::new(&GroupArgs::default(), &LeaderWorkerSet::default()).unwrap().is_none());
}

#[test]
fn what_does_not_fit_is_refused_with_the_way_out() {
    assert!(refused(&args(None, &[])).contains("--stage I/N"));
    for stage in ["2/2", "x/2", "1", "1/0", "0/300", "-1/2"] {
        assert!(refused(&args(Some(stage), &["localhost:1", "localhost:2"])).contains("must be I/N"), "{stage}");
    }
    assert!(refused(&args(Some("0/2"), &["localhost:1"])).contains("names 1 addresses for 2 stages"));
    assert!(refused(&args(Some("0/2"), &["localhost:1", "localhost:1"])).contains("twice"));
    assert!(refused(&args(Some("0/2"), &["localhost:1", "nowhere"])).contains("write HOST:PORT"));
    assert!(refused(&args(Some("0/2"), &["localhost:1", "10.0.0.2:2"])).contains("--plaintext"));
    let layers = GroupArgs { layers: Some("4-3".into()), ..args(Some("0/2"), &["localhost:1", "localhost:2"]) };
    assert!(refused(&layers).contains("0-14 is fifteen layers"));
    assert!(refused(&args(Some("0/2"), &["localhost:1", "localhost:0"])).contains("localhost:0; the others must know"));
    let empty = GroupArgs { group: Some(String::new()), ..args(Some("0/2"), &["localhost:1", "localhost:2"]) };
    assert!(refused(&empty).contains("--group is empty"));
    let nameless = GroupArgs { stage: Some("0/2".into()), ..GroupArgs::default() };
    assert!(refused(&nameless).contains("--group NAME is missing"));
}

#[test]
fn leader_worker_set_says_where_the_pods_are() {
    let set = LeaderWorkerSet {
        leader_address: Some("teacher-3.teacher.models".into()),
        group_size: Some("3".into()),
        worker_index: Some("2".into()),
    };
    let place = Place::new(&GroupArgs { plaintext: true, ..args(None, &[]) }, &set).unwrap().unwrap();
    assert_eq!(place.stage, 2);
    assert_eq!(place.listen, "0.0.0.0:7475");
    let pods = ["teacher-3.teacher.models:7475", "teacher-3-1.teacher.models:7475", "teacher-3-2.teacher.models:7475"];
    assert_eq!(place.peers, pods);
    let listening = GroupArgs { listen: Some("0.0.0.0:7600".into()), plaintext: true, ..args(None, &[]) };
    assert_eq!(Place::new(&listening, &set).unwrap().unwrap().peers[1], "teacher-3-1.teacher.models:7600");
    let far = Place::new(&args(None, &[]), &set).err().unwrap();
    assert!(far.message.contains("--tls-ca"), "{}", far.message);
}
