//! The loop against stand-ins, in turned time.

mod stand_ins;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use retort_core::{Code, Error};
use retort_proto::{self as proto, HeartbeatResponse as Beat, claim_task_response::Answer, worker_event::What};
use stand_ins::{Bench, claimed, not_claimable, progress, retry_after};

use crate::{Attempt, Handler, Rest, TaskContext};

/// What a handler of a test does.
enum Does {
    Succeed,
    Fail(Code),
    /// Works until it is told to stop, then says so.
    WorkOn,
    /// As `WorkOn`, and leaves what it says.
    WorkOnAndTell(Arc<Mutex<Option<Error>>>),
    /// Never looks at its context.
    Ignore,
    Take(Duration),
    /// Is free at once; the rest takes as long.
    Leave(Duration),
    /// Is free at once; the rest fails after as long.
    LeaveToFail(Duration, Code),
}

#[async_trait::async_trait]
impl Handler for Does {
    async fn run(&mut self, _: Attempt, cx: &TaskContext) -> retort_core::Result<Rest> {
        match self {
            Self::Succeed => {}
            Self::Fail(code) => return Err(Error::new(*code, "the test wants it so")),
            Self::WorkOn => {
                cx.cancelled.cancelled().await;
                return cx.check().map(|()| Rest::Nothing);
            }
            Self::WorkOnAndTell(why) => {
                cx.cancelled.cancelled().await;
                *why.lock().unwrap() = cx.check().err();
                return cx.check().map(|()| Rest::Nothing);
            }
            Self::Ignore => std::future::pending().await,
            Self::Take(time) => tokio::time::sleep(*time).await,
            Self::LeaveToFail(time, code) => {
                let (time, code) = (*time, *code);
                return Ok(Rest::After(Box::pin(async move {
                    tokio::time::sleep(time).await;
                    Err(Error::new(code, "the test wants it so"))
                })));
            }
            Self::Leave(time) => {
                let (cx, time) = (cx.clone(), *time);
                return Ok(Rest::After(Box::pin(async move {
                    tokio::time::sleep(time).await;
                    cx.emit(progress(1)).await
                })));
            }
        }
        cx.emit(progress(1)).await?;
        Ok(Rest::Nothing)
    }
}

fn failure(what: &What) -> Option<(&str, bool)> {
    match what {
        What::TaskFailed(failed) => Some((failed.error.as_ref()?.code.as_str(), failed.retryable)),
        _ => None,
    }
}

#[tokio::test(start_paused = true)]
async fn a_task_is_claimed_done_reported_and_only_then_committed() {
    let bench = Bench::new();
    bench.answer_claims([claimed(7, 15.0)]);
    bench.deliver_and_stop_when_done(1);
    bench.run(Does::Succeed).await.unwrap();
    assert_eq!(bench.log(), ["claim", "event shard_progress epoch 7", "commit 0"]);
}

#[tokio::test(start_paused = true)]
async fn what_is_left_of_a_task_goes_on_beside_the_next_and_no_third_begins() {
    let bench = Bench::new();
    bench.answer_claims([claimed(7, 15.0), claimed(8, 15.0), claimed(9, 15.0)]);
    bench.deliver_and_stop_when_done(3);
    bench.run(Does::Leave(Duration::from_secs(20))).await.unwrap();
    assert_eq!(
        bench.log(),
        [
            "claim",
            "claim",
            "event shard_progress epoch 7",
            "commit 0",
            "claim",
            "event shard_progress epoch 8",
            "commit 1",
            "event shard_progress epoch 9",
            "commit 2"
        ]
    );
    assert!(bench.heartbeats() > 6, "a lease is kept while the rest goes on: {}", bench.heartbeats());
}

#[tokio::test(start_paused = true)]
async fn a_rest_that_fails_is_reported_and_the_surroundings_get_time() {
    let bench = Bench::new();
    bench.answer_claims((0..5).map(|epoch| claimed(epoch, 15.0)));
    bench.deliver_and_stop_when_done(5);
    let started = tokio::time::Instant::now();
    bench.run(Does::LeaveToFail(Duration::from_secs(1), Code::DiskFull)).await.unwrap();
    let told: Vec<_> =
        bench.events().iter().filter_map(|event| failure(event.what.as_ref()?).map(|f| f.0.to_owned())).collect();
    assert_eq!(told, ["disk-full"; 5]);
    let commits = bench.log().iter().filter(|line| line.starts_with("commit")).count();
    assert_eq!(commits, 5);
    // Five seconds of rests one after another, were it not for the pauses of 1, 2 and 4 seconds beside them.
    assert!(started.elapsed() >= Duration::from_secs(7), "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_rest_whose_lease_was_taken_says_nothing_and_the_next_goes_on() {
    let bench = Bench::new();
    bench.answer_claims([claimed(7, 15.0), claimed(8, 15.0)]);
    // The first heartbeat is the first task's.
    bench.answer_heartbeats([Err(Code::AttemptFenced)]);
    bench.deliver_and_stop_when_done(2);
    bench.run(Does::Leave(Duration::from_secs(30))).await.unwrap();
    let epochs: Vec<u64> = bench.events().iter().map(|event| event.epoch).collect();
    assert_eq!(epochs, [8]);
}

#[tokio::test(start_paused = true)]
async fn stopping_hands_back_a_task_whose_rest_takes_too_long() {
    let bench = Bench::new();
    bench.answer_claims([claimed(7, 15.0)]);
    bench.deliver(1);
    bench.stop_after(Duration::from_secs(2));
    bench.run(Does::Leave(Duration::from_secs(600))).await.unwrap();
    let events = bench.events();
    let (code, retryable) = failure(events[0].what.as_ref().unwrap()).unwrap();
    assert_eq!((events.len(), code, retryable), (1, "worker-stopped", true));
}

#[tokio::test(start_paused = true)]
async fn nothing_left_to_do_is_committed_without_an_event() {
    let bench = Bench::new();
    bench.answer_claims([not_claimable(), not_claimable()]);
    bench.deliver_and_stop_when_done(2);
    bench.run(Does::Succeed).await.unwrap();
    assert_eq!(bench.log(), ["claim", "commit 0", "claim", "commit 1"]);
}

#[tokio::test(start_paused = true)]
async fn a_held_lease_is_asked_for_again() {
    let bench = Bench::new();
    bench.answer_claims([retry_after(9.0), retry_after(0.4), claimed(2, 15.0)]);
    bench.deliver_and_stop_when_done(1);
    let started = tokio::time::Instant::now();
    bench.run(Does::Succeed).await.unwrap();
    // Long before the lease can run out: another task may be there by now.
    assert!((1.4..1.5).contains(&started.elapsed().as_secs_f64()), "{:?}", started.elapsed());
    assert_eq!(bench.log(), ["claim", "claim", "claim", "event shard_progress epoch 2", "commit 0"]);
}

#[tokio::test(start_paused = true)]
async fn a_task_another_worker_keeps_alive_is_left_to_it() {
    let bench = Bench::new();
    bench.answer_claims((0..100).map(|_| retry_after(5.0)));
    bench.deliver_and_stop_when_done(1);
    bench.run(Does::Succeed).await.unwrap();
    let log = bench.log();
    assert_eq!(log.last().map(String::as_str), Some("commit 0"));
    assert!((60..65).contains(&log.len()), "{log:?}");
}

#[tokio::test(start_paused = true)]
async fn an_orchestrator_that_is_away_is_asked_until_it_answers() {
    let bench = Bench::new();
    bench.orchestrator_away_for(Duration::from_secs(40));
    bench.answer_claims([claimed(1, 15.0)]);
    bench.deliver_and_stop_when_done(1);
    bench.run(Does::Succeed).await.unwrap();
    assert_eq!(bench.log(), ["claim", "event shard_progress epoch 1", "commit 0"]);
}

#[tokio::test(start_paused = true)]
async fn failures_are_reported_as_retryable_or_not() {
    for (code, retryable) in
        [(Code::PromptTooLong, false), (Code::StoreUnavailable, true), (Code::DiskFull, true), (Code::Internal, true)]
    {
        let bench = Bench::new();
        bench.answer_claims([claimed(3, 15.0)]);
        bench.deliver_and_stop_when_done(1);
        bench.run(Does::Fail(code)).await.unwrap();
        let events = bench.events();
        assert_eq!(events.len(), 1);
        assert_eq!(events[0].epoch, 3);
        assert_eq!(failure(events[0].what.as_ref().unwrap()), Some((code.as_str(), retryable)));
        assert_eq!(bench.log().last().map(String::as_str), Some("commit 0"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_is_not_hammered() {
    let bench = Bench::new();
    bench.answer_claims((0..5).map(|epoch| claimed(epoch, 15.0)));
    bench.deliver_and_stop_when_done(5);
    let started = tokio::time::Instant::now();
    bench.run(Does::Fail(Code::DiskFull)).await.unwrap();
    // 1 + 2 + 4 + 8 seconds between the five.
    assert!(started.elapsed() >= Duration::from_secs(15), "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_cannot_be_read_fails_for_good() {
    let bench = Bench::new();
    let Answer::Claimed(mut broken) = claimed(4, 15.0) else { unreachable!() };
    broken.spec = None;
    bench.answer_claims([Answer::Claimed(broken)]);
    bench.deliver_and_stop_when_done(1);
    bench.run(Does::Succeed).await.unwrap();
    let events = bench.events();
    assert_eq!(failure(events[0].what.as_ref().unwrap()), Some(("request-invalid", false)));
}

#[tokio::test(start_paused = true)]
async fn the_lease_is_kept_while_the_handler_works() {
    let bench = Bench::new();
    bench.answer_claims([claimed(1, 15.0)]);
    bench.deliver_and_stop_when_done(1);
    bench.run(Does::Take(Duration::from_secs(600))).await.unwrap();
    assert!((115..=121).contains(&bench.heartbeats()), "{}", bench.heartbeats());
    assert_eq!(bench.log(), ["claim", "event shard_progress epoch 1", "commit 0"]);
}

#[tokio::test(start_paused = true)]
async fn an_orchestrator_back_within_the_lease_costs_nothing() {
    let bench = Bench::new();
    bench.answer_claims([claimed(1, 15.0)]);
    bench.deliver_and_stop_when_done(1);
    bench.orchestrator_away_between(Duration::from_secs(21), Duration::from_secs(33));
    bench.run(Does::Take(Duration::from_secs(60))).await.unwrap();
    assert_eq!(bench.log(), ["claim", "event shard_progress epoch 1", "commit 0"]);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_ran_out_is_claimed_anew_and_the_old_attempt_says_nothing() {
    let bench = Bench::new();
    bench.answer_claims([claimed(1, 15.0), not_claimable()]);
    bench.deliver_and_stop_when_done(1);
    bench.orchestrator_away_between(Duration::from_secs(4), Duration::from_secs(60));
    let started = tokio::time::Instant::now();
    bench.run(Does::WorkOn).await.unwrap();
    assert_eq!(bench.log(), ["claim", "claim", "commit 0"]);
    assert!(started.elapsed() >= Duration::from_secs(60));
}

#[tokio::test(start_paused = true)]
async fn a_fenced_attempt_stops_and_says_nothing() {
    let bench = Bench::new();
    bench.answer_claims([claimed(1, 15.0)]);
    bench.answer_heartbeats([Err(Code::AttemptFenced)]);
    bench.deliver_and_stop_when_done(1);
    let started = tokio::time::Instant::now();
    bench.run(Does::WorkOn).await.unwrap();
    assert_eq!(bench.log(), ["claim", "commit 0"]);
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_job_stops_at_the_next_heartbeat() {
    let bench = Bench::new();
    bench.answer_claims([claimed(1, 15.0)]);
    bench.answer_heartbeats([Ok(Beat::default()), Ok(Beat { cancelled: true, ..Beat::default() })]);
    bench.deliver_and_stop_when_done(1);
    bench.run(Does::WorkOn).await.unwrap();
    assert_eq!(bench.log(), ["claim", "commit 0"]);
    assert_eq!(bench.heartbeats(), 2);
}

/// A replica: nobody cancelled its job, and there is nothing to report.
#[tokio::test(start_paused = true)]
async fn an_attempt_whose_training_has_ended_ends_without_a_word() {
    let bench = Bench::new();
    bench.answer_claims([claimed(1, 15.0)]);
    bench.answer_heartbeats([Ok(Beat { cancelled: true, training_ended: true, ..Beat::default() })]);
    bench.deliver_and_stop_when_done(1);
    let why = Arc::new(Mutex::new(None));
    bench.run(Does::WorkOnAndTell(Arc::clone(&why))).await.unwrap();
    assert_eq!(bench.log(), ["claim", "commit 0"]);
    let why = why.lock().unwrap().take().unwrap();
    assert_eq!((why.code, why.message.as_str()), (Code::TrainingEnded, "the training has ended"));
}

#[tokio::test(start_paused = true)]
async fn stopping_hands_the_task_back_within_five_seconds() {
    for handler in [Does::WorkOn, Does::Ignore] {
        let bench = Bench::new();
        bench.answer_claims([claimed(5, 15.0)]);
        bench.deliver(1);
        bench.stop_after(Duration::from_secs(20));
        let started = tokio::time::Instant::now();
        bench.run(handler).await.unwrap();
        let took = started.elapsed() - Duration::from_secs(20);
        assert!(took < Duration::from_secs(5), "{took:?}");
        let events = bench.events();
        assert_eq!(failure(events[0].what.as_ref().unwrap()), Some(("worker-stopped", true)));
        assert_eq!(bench.log(), ["claim", "event task_failed epoch 5", "commit 0"]);
    }
}

#[tokio::test(start_paused = true)]
async fn stopping_without_a_broker_leaves_the_record_and_is_as_quick() {
    let bench = Bench::new();
    bench.answer_claims([claimed(5, 15.0)]);
    bench.deliver(1);
    bench.stop_after(Duration::from_secs(20));
    bench.broker_away_between(Duration::from_secs(10), Duration::from_secs(1000));
    let started = tokio::time::Instant::now();
    bench.run(Does::Ignore).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(25), "{:?}", started.elapsed());
    assert_eq!(bench.log(), ["claim"]);
}

#[tokio::test(start_paused = true)]
async fn a_broker_away_delays_the_event_and_it_is_the_same_one() {
    let bench = Bench::new();
    bench.answer_claims([claimed(1, 15.0)]);
    bench.deliver_and_stop_when_done(1);
    bench.broker_away_between(Duration::ZERO, Duration::from_secs(50));
    bench.run(Does::Succeed).await.unwrap();
    assert_eq!(bench.log(), ["claim", "event shard_progress epoch 1", "commit 0"]);
    assert!(bench.tries() > 10);
    assert_eq!(bench.event_ids_tried(), 1);
}

#[tokio::test]
async fn a_panic_on_the_model_thread_is_an_error_and_the_next_piece_starts_afresh() {
    let thread = crate::ModelThread::spawn("test-model", || 0u32).unwrap();
    assert_eq!(
        thread
            .call(|n| {
                *n += 5;
                *n
            })
            .await
            .unwrap(),
        5
    );
    let error = thread.call(|_: &mut u32| -> u32 { panic!("wanted by the test") }).await.unwrap_err();
    assert_eq!(error.code, Code::Internal);
    assert_eq!(thread.call(|n| *n).await.unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn asking_for_shards_outlives_an_orchestrator_that_is_away() {
    let bench = Bench::new();
    bench.orchestrator_away_for(Duration::from_secs(30));
    let Answer::Claimed(claim) = claimed(1, 15.0) else { unreachable!() };
    let cx = bench.context(&claim);
    let answer = cx.list_published_shards(retort_core::state::Split::Train, 3).await.unwrap();
    assert_eq!(answer, proto::ListPublishedShardsResponse { shards: vec![], complete: true });
    cx.report_corrupt_shard(1, 2, "wrong sha256").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn asking_for_published_work_outlives_an_orchestrator_that_is_away() {
    let bench = Bench::new();
    bench.orchestrator_away_for(Duration::from_secs(30));
    let Answer::Claimed(claim) = claimed(1, 15.0) else { unreachable!() };
    let answer = bench.context(&claim).find_shard(&"c".repeat(64)).await.unwrap();
    assert_eq!(answer, proto::FindShardResponse::default());
}
