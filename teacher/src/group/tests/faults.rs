//! Other weights, other programs, stages that leave, and peers that are none.

use std::time::Instant;

use retort_proto::{join_request, pass_request};
use tokio_stream::wrappers::ReceiverStream;

use super::*;

#[test]
fn a_stage_with_other_weights_is_named_with_both_sides() {
    let mut world = World::with(3, |stage| Sums { weights: u8::from(stage == 2), ..Sums::default() });
    let error = world.group.load(Path::new("/m")).unwrap_err();
    assert_eq!(error.code, Code::StageMismatch);
    assert!(error.message.contains("weights, print: stage 0 of group \"g\" at "), "{}", error.message);
    assert!(error.message.contains("has \"0\", stage 2 of group \"g\" at "), "{}", error.message);
    assert!(error.message.contains("has \"1\""), "{}", error.message);
    world.end();
}

#[test]
fn another_dtype_is_refused_when_the_group_forms() {
    let peers = addresses(2);
    let stop = CancellationToken::new();
    let end = member(place(&peers, 1), Sums::default(), stop.clone());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let formed = runtime.block_on(Formed::new(place(&peers, 0), "bf16", &CancellationToken::new()));
    let error = formed.err().unwrap();
    assert_eq!(error.code, Code::StageMismatch);
    assert!(error.message.contains("dtype") && error.message.contains("\"f32\"") && error.message.contains("\"bf16\""));
    stop.cancel();
    assert!(end.recv_timeout(WAIT).unwrap().is_ok(), "a member that was refused by nobody waits on");
}

#[test]
fn another_version_is_refused_from_either_side() {
    let peers = addresses(2);
    let stop = CancellationToken::new();
    let end = member(place(&peers, 1), Sums::default(), stop.clone());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let status = runtime.block_on(async {
        let mut client = dialled(&place(&peers, 0), 1).await;
        let (requests, outgoing) = mpsc::channel(1);
        let hello = proto::StageHello { version: "9.9.9".into(), ..identity::hello(&place(&peers, 0), 1, 5, "f32") };
        let hello = proto::JoinRequest { what: Some(join_request::What::Hello(hello)) };
        requests.send(hello).await.unwrap();
        client.join(ReceiverStream::new(outgoing)).await.unwrap_err()
    });
    let error = retort_core::wire::from_status(&status);
    assert_eq!(error.code, Code::StageMismatch);
    assert!(error.message.contains("version") && error.message.contains("\"9.9.9\""), "{}", error.message);
    assert!(error.message.contains(env!("CARGO_PKG_VERSION")), "{}", error.message);
    stop.cancel();
    end.recv_timeout(WAIT).unwrap().unwrap();
}

#[test]
fn every_stage_ends_when_one_leaves() {
    let mut world = World::with(4, |_| Sums { slow: Duration::from_millis(30), ..Sums::default() });
    world.group.load(Path::new("/m")).unwrap();
    let stop = world.stops[2].clone();
    let started = Instant::now();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        stop.cancel();
    });
    let many: Vec<Step> = (0..100).flat_map(|_| steps()).collect();
    let error = drive(&mut world.group, &many).unwrap_err();
    assert_eq!(error.code, Code::GroupBroken);
    assert!(error.is_retryable());
    assert!(
        error.message.contains("stage 2 of group \"g\" at ") && error.message.contains("asked to stop"),
        "{}",
        error.message
    );
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    let ends = world.end();
    assert!(ends[1].is_ok(), "the one that was asked to stop");
    for end in [&ends[0], &ends[2]] {
        assert_eq!(end.as_ref().unwrap_err().code, Code::GroupBroken);
    }
}

#[test]
fn frames_of_another_life_and_frames_that_lie_are_refused() {
    let world = World::new(2);
    let peers = world.group.place.peers.clone();
    let refused = world.runtime.block_on(async {
        let mut client = dialled(&place(&peers, 0), 1).await;
        let (messages, outgoing) = mpsc::channel(1);
        let link = proto::StageLink { group: "g".into(), incarnation: 1, from_stage: 0, to_stage: 1 };
        messages.send(proto::PassRequest { what: Some(pass_request::What::Link(link)) }).await.unwrap();
        client.pass(ReceiverStream::new(outgoing)).await.unwrap_err()
    });
    let error = retort_core::wire::from_status(&refused);
    assert_eq!(error.code, Code::StageMismatch);
    assert!(error.message.contains("life 1, from stage 0 to stage 1 came to stage 1"), "{}", error.message);
    // The group goes on, whoever knocks.
    let mut world = world;
    world.group.load(Path::new("/m")).unwrap();
    let steps = steps();
    assert!(drive(&mut world.group, &steps).unwrap() == alone(&steps));
    world.end();
}

#[test]
fn mutual_tls_carries_a_group_and_keeps_strangers_out() {
    let folder = tempfile::tempdir().unwrap();
    let (ours, theirs) = (authority(), authority());
    let peers = addresses(2);
    let with_tls = |stage: usize, signer: &rcgen::CertifiedIssuer<'static, rcgen::KeyPair>, name: &str| {
        let tls = certificate(&folder.path().join(name), &ours, signer);
        let args = GroupArgs {
            group: Some("g".into()),
            stage: Some(format!("{stage}/2")),
            peers: peers.clone(),
            group_patience: 3,
            tls,
            ..GroupArgs::default()
        };
        Place::new(&args, &LeaderWorkerSet::default()).unwrap().unwrap()
    };
    let stranger = World::of(vec![with_tls(0, &theirs, "stranger"), with_tls(1, &ours, "one")], |_| Sums::default());
    let error = stranger.err().expect("a stranger stays outside");
    assert_eq!(error.code, Code::GroupBroken, "{}", error.message);
    let peers = addresses(2);
    let again =
        |stage: usize| Place { peers: peers.clone(), listen: peers[stage].clone(), ..with_tls(stage, &ours, "own") };
    let mut world = World::of(vec![again(0), again(1)], |_| Sums::default()).unwrap();
    world.group.load(Path::new("/m")).unwrap();
    let steps = steps();
    assert!(drive(&mut world.group, &steps).unwrap() == alone(&steps));
    world.end();
}

async fn dialled(
    place: &Place,
    stage: usize,
) -> proto::stage_service_client::StageServiceClient<tonic::transport::Channel> {
    let deadline = Instant::now() + WAIT;
    loop {
        match dial::dial(place, stage).await {
            Ok(client) => return client,
            Err(error) => assert!(Instant::now() < deadline, "{}", error.chain()),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn authority() -> rcgen::CertifiedIssuer<'static, rcgen::KeyPair> {
    let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, "a group's authority");
    rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap()
}

/// Writes a certificate for this machine, signed by `signer`, beside the authority that is trusted.
fn certificate(
    folder: &Path,
    trusted: &rcgen::CertifiedIssuer<'static, rcgen::KeyPair>,
    signer: &rcgen::CertifiedIssuer<'static, rcgen::KeyPair>,
) -> TlsArgs {
    std::fs::create_dir_all(folder).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, signer).unwrap();
    let write = |name: &str, pem: String| {
        let path = folder.join(name);
        std::fs::write(&path, pem).unwrap();
        Some(path)
    };
    TlsArgs {
        tls_ca: write("ca.pem", trusted.pem()),
        tls_cert: write("cert.pem", certificate.pem()),
        tls_key: write("key.pem", key.serialize_pem()),
    }
}
