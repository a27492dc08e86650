//! Who speaks the protocol by hand: no replica, or one that lies.

use super::*;

/// A stranger's end of a stream.
struct Stranger {
    say: mpsc::Sender<proto::FollowRequest>,
    messages: Streaming<proto::FollowResponse>,
}

impl Stage {
    async fn hello(&self) -> (Rendezvous, proto::ReplicaHello) {
        let found = rendezvous::newest(&self.world.store, JOB).await.unwrap().unwrap();
        let attempt = wide(self.world.replica_attempt(1, 1));
        let hello = proto::ReplicaHello {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            job_id: JOB.to_owned(),
            lead_epoch: found.epoch,
            token: found.token.clone(),
            replica: 1,
            epoch: 1,
            spec_sha256: retort_artifact::sha256_hex(&serde_json::to_vec(&attempt.spec).unwrap()),
            dtype: "f32".to_owned(),
            threads: 1,
        };
        (found, hello)
    }

    async fn call(&self, first: Say) -> Result<Stranger> {
        let (found, _) = self.hello().await;
        let channel = Channel::from_shared(format!("http://{}", found.address)).unwrap().connect().await.unwrap();
        let (say, requests) = mpsc::channel(16);
        say.send(proto::FollowRequest { what: Some(first) }).await.unwrap();
        let answer = TrainServiceClient::new(channel).follow(ReceiverStream::new(requests)).await;
        let mut messages = answer.map_err(|status| from_status(&status))?.into_inner();
        let welcome = messages.message().await.unwrap().unwrap().what;
        assert!(matches!(welcome, Some(follow_response::What::Welcome(_))), "{welcome:?}");
        Ok(Stranger { say, messages })
    }

    async fn table(&self) -> (String, u64) {
        let table = |slot: &mut Option<Trainer>| {
            let optimizer = &slot.as_ref().ok_or_else(no_trainer)?.optimizer;
            Ok::<_, Error>((exchange::print(optimizer), exchange::bytes(optimizer)))
        };
        self.thread.call(table).await.unwrap().unwrap()
    }
}

impl Stranger {
    async fn say(&self, what: Say) {
        let _ = self.say.send(proto::FollowRequest { what: Some(what) }).await;
    }

    /// Why the lead wants no more of it.
    async fn over(&mut self) -> Error {
        loop {
            match self.messages.message().await.unwrap().and_then(|message| message.what) {
                Some(follow_response::What::Over(why)) => return retort_core::wire::error_from_proto(why),
                Some(_) => {}
                None => panic!("the stream ended without a word"),
            }
        }
    }

    async fn order(&mut self, incoming: &mut Incoming) -> Received {
        loop {
            let what = self.messages.message().await.unwrap().unwrap().what.unwrap();
            if let Some(order) = incoming.take(what).unwrap() {
                return order;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_word_to_a_replica_says_why() {
    for done in [true, false] {
        let mut stage = Stage::new(2).await;
        let (_, hello) = stage.hello().await;
        let mut stranger = stage.call(Say::Hello(hello)).await.unwrap();
        let (parameters_sha256, _) = stage.table().await;
        stranger.say(Say::Ready(proto::ReplicaReady { parameters_sha256 })).await;
        stage.lead.gather(1).await;
        let close = stage.lead.close(done);
        let last = async {
            let mut last = None;
            while let Ok(Some(message)) = stranger.messages.message().await {
                match message.what {
                    Some(follow_response::What::Over(why)) => last = Some(why.code),
                    _ => assert!(last.is_none(), "nothing comes after the last word"),
                }
            }
            last
        };
        let ((), last) =
            tokio::time::timeout(Duration::from_secs(4), async { tokio::join!(close, last) }).await.unwrap();
        assert_eq!(last.as_deref() == Some("training-ended"), done, "{last:?}");
    }
}

type Change = fn(&mut proto::ReplicaHello);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_belong_there_is_told_so() {
    let stage = Stage::new(3).await;
    let (_, hello) = stage.hello().await;
    let refused = async |change: Change| {
        let mut hello = hello.clone();
        change(&mut hello);
        stage.call(Say::Hello(hello)).await.err().unwrap()
    };
    let strangers: [Change; 6] = [
        |hello| hello.token = "0".repeat(64),
        |hello| hello.token.clear(),
        |hello| hello.lead_epoch -= 1,
        |hello| hello.job_id.push('0'),
        |hello| hello.replica = 0,
        |hello| hello.replica = 3,
    ];
    for change in strangers {
        assert_eq!(refused(change).await.code, Code::RequestInvalid);
    }
    let misfits: [(Change, &str); 4] = [
        (|hello| hello.spec_sha256 = "f00d".to_owned(), "spec"),
        (|hello| hello.dtype = "bf16".to_owned(), "dtype"),
        (|hello| hello.version = "0".to_owned(), "version"),
        (|hello| hello.protocol += 1, "protocol"),
    ];
    for (change, what) in misfits {
        let error = refused(change).await;
        assert_eq!(error.code, Code::ReplicaMismatch);
        assert!(error.message.starts_with(what), "{}", error.message);
    }
    assert!(stage.call(Say::Alive(proto::Alive {})).await.is_err());
    let mut stranger = stage.call(Say::Hello(hello)).await.unwrap();
    stranger.say(Say::Ready(proto::ReplicaReady { parameters_sha256: "f00d".to_owned() })).await;
    assert_eq!(stranger.over().await.code, Code::ReplicaMismatch);
}

/// What a stranger answers to an order of rows, given the bytes of a gradient.
type Answer = fn(&Received, u64) -> Vec<Say>;

fn share(order: &Received, bytes: u64) -> proto::ReplicaShare {
    proto::ReplicaShare {
        step: order.step,
        loss: 1.0,
        positions: order.rows.iter().map(|row| row.targets.len() as u64).sum(),
        tokens: order.rows.iter().map(|row| row.input_len() as u64).sum(),
        gradient_bytes: bytes,
    }
}

fn chunk(bytes: u64, value: f32) -> Say {
    Say::Chunk(value.to_le_bytes().repeat(bytes as usize / 4).into())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_share_is_computed_by_the_lead() {
    let answers: [Answer; 13] = [
        |order, bytes| vec![Say::Share(share(order, bytes)), chunk(bytes, f32::NAN)],
        // Finite, and their squares are not in f32.
        |order, bytes| vec![Say::Share(share(order, bytes)), chunk(bytes, 3e38)],
        |order, bytes| vec![Say::Share(share(order, bytes)), chunk(bytes, 1e5)],
        |order, bytes| vec![Say::Share(proto::ReplicaShare { loss: 1e300, ..share(order, bytes) }), chunk(bytes, 0.0)],
        |order, bytes| vec![Say::Share(share(order, bytes + 4)), chunk(bytes + 4, 1.0)],
        |order, bytes| vec![Say::Share(share(order, bytes)), chunk(bytes + 4, 1.0)],
        |order, bytes| vec![Say::Share(proto::ReplicaShare { loss: f64::INFINITY, ..share(order, bytes) })],
        |order, bytes| vec![Say::Share(proto::ReplicaShare { positions: 1 << 40, ..share(order, bytes) })],
        |order, bytes| vec![Say::Share(proto::ReplicaShare { step: order.step + 1, ..share(order, bytes) })],
        |_, bytes| vec![chunk(bytes, 1.0)],
        |order, bytes| vec![Say::Share(share(order, bytes)), Say::Share(share(order, bytes))],
        |_, _| vec![Say::Leave(proto::ErrorDetail::default())],
        // Says nothing at all.
        |_, _| vec![],
    ];
    let mut stage = Stage::new(2).await;
    let (parameters_sha256, bytes) = stage.table().await;
    let bounds = Bounds { weight_bytes: bytes, vocab_size: VOCAB, steps: STEPS, batch_rows: 8 };
    let (_, hello) = stage.hello().await;
    for (step, answer) in (0..).zip(answers) {
        // Another attempt each: of one and the same not so many would be heard.
        let hello = proto::ReplicaHello { epoch: 1 + u64::from(step), ..hello.clone() };
        let mut stranger = stage.call(Say::Hello(hello)).await.unwrap();
        stranger.say(Say::Ready(proto::ReplicaReady { parameters_sha256: parameters_sha256.clone() })).await;
        stage.lead.gather(1).await;
        let lie = async {
            let order = stranger.order(&mut Incoming::new(bounds)).await;
            for what in answer(&order, bytes) {
                stranger.say(what).await;
            }
            // Keeps the stream open.
            stranger
        };
        let (took_part, _stranger) = tokio::join!(stage.step(step), lie);
        assert_eq!(took_part, 1, "step {step}");
    }
    let difference = stage.difference(13).await;
    assert!(difference < 1e-5, "{difference}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_that_goes_on_computing_what_cannot_be_is_told_why_and_not_taken_in_again() {
    let mut stage = Stage::new(2).await;
    let (parameters_sha256, bytes) = stage.table().await;
    let bounds = Bounds { weight_bytes: bytes, vocab_size: VOCAB, steps: STEPS, batch_rows: 8 };
    let (_, hello) = stage.hello().await;
    let ready = || Say::Ready(proto::ReplicaReady { parameters_sha256: parameters_sha256.clone() });
    for step in 0..3 {
        let mut stranger = stage.call(Say::Hello(hello.clone())).await.unwrap();
        stranger.say(ready()).await;
        stage.lead.gather(1).await;
        let lie = async {
            let order = stranger.order(&mut Incoming::new(bounds)).await;
            stranger.say(Say::Share(share(&order, bytes))).await;
            stranger.say(chunk(bytes, f32::NAN)).await;
            stranger
        };
        let (took_part, mut stranger) = tokio::join!(stage.step(step), lie);
        assert_eq!(took_part, 1);
        let why = stranger.over().await;
        assert_eq!(why.code, Code::GroupBroken);
        assert!(
            why.message.contains(&format!("step {} does not count: its gradient's norm is NaN", step + 1)),
            "{why}"
        );
    }
    let mut stranger = stage.call(Say::Hello(hello.clone())).await.unwrap();
    stranger.say(ready()).await;
    let word = stranger.over();
    tokio::pin!(word);
    let why = loop {
        // Who is ready is looked at between two steps.
        tokio::select! {
            why = &mut word => break why,
            () = tokio::time::sleep(Duration::from_millis(20)) => stage.lead.gather(0).await,
        }
    };
    assert_eq!(why.code, Code::ReplicaMismatch);
    assert!(why.message.contains("3 times in a row"), "{why}");
    // Another attempt is heard.
    let stranger = stage.call(Say::Hello(proto::ReplicaHello { epoch: hello.epoch + 1, ..hello })).await.unwrap();
    stranger.say(ready()).await;
    stage.lead.gather(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_lead_does_not_wait_for_its_replicas() {
    let mut stage = Stage::new(2).await;
    let stop = StopSwitch::default();
    stage.lead = {
        let attempt = wide(stage.world.train_attempt(EPOCH + 1));
        let cx = stage.world.context(&attempt, stop.clone());
        let (_, hello) = stage.hello().await;
        let key = paths::initial(JOB, EPOCH);
        Lead::open(&attempt, &cx, &stage.settings, &stage.thread, &key, &hello.spec_sha256).await.unwrap().unwrap()
    };
    let (_, hello) = stage.hello().await;
    let stranger = stage.call(Say::Hello(hello)).await.unwrap();
    let (parameters_sha256, _) = stage.table().await;
    stranger.say(Say::Ready(proto::ReplicaReady { parameters_sha256 })).await;
    stage.lead.gather(1).await;
    let cancel = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        stop.stop(Stop::JobCancelled);
    };
    let step = stage.lead.step(&stage.thread, rows(0), false, || {});
    let (done, ()) = tokio::time::timeout(Duration::from_secs(4), async { tokio::join!(step, cancel) }).await.unwrap();
    assert_eq!(done.err().unwrap().code, Code::JobCancelled);
}
