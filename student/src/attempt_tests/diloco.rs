use retort_artifact::{checkpoint, paths};
use retort_core::Code;
use retort_proto::{TrainFinished, worker_event::What};
use retort_worker::{Stop, StopSwitch};

use super::world::{JOB, STEPS, World};

async fn diloco() -> World {
    let mut world = World::published().await;
    // Of few rounds a large momentum makes too much.
    world.train =
        "learning_rate: 0.02, parallel: {workers: 2, mode: diloco, inner_steps: 4, outer_momentum: 0.3}".to_owned();
    world
}

fn finished(world: &World) -> TrainFinished {
    let Some(What::TrainFinished(finished)) = world.events().pop() else { panic!("not finished") };
    finished
}

/// Held-out KL before the training and after it.
async fn kl(world: &World, finished: &TrainFinished) -> (f64, f64) {
    world.run(&world.evaluate_attempt(1, &finished.initial_key, &finished.checkpoint_key)).await.unwrap();
    let Some(What::EvaluationReady(ready)) = world.events().pop() else { panic!("not judged") };
    (ready.before.unwrap().kl, ready.after.unwrap().kl)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_workers_train_every_batch_once_and_learn() {
    let alone = World::published().await;
    alone.run(&alone.train_attempt(1)).await.unwrap();
    let one = finished(&alone);

    let world = diloco().await;
    let (lead, replica, stop) = (world.train_attempt(1), world.replica_attempt(1, 1), StopSwitch::default());
    let training = async {
        world.run(&lead).await.unwrap();
        stop.stop(Stop::JobCancelled);
    };
    let (_, ended) = tokio::join!(training, world.run_until(&replica, stop.clone()));
    assert_eq!(ended.unwrap_err().code, Code::JobCancelled);
    let two = finished(&world);
    assert_eq!((two.steps, two.processed_tokens), (STEPS, one.processed_tokens));
    let rest = world.store.list(&paths::exchanges_prefix(JOB)).await.unwrap();
    assert!(rest.is_empty(), "{rest:?}");
    // With half as many updates in a row it comes less far than one worker.
    let (before, after) = kl(&world, &two).await;
    assert!(after < 0.9 * before, "{before} -> {after}");
}

/// The replica dies in the middle, and so does the lead; both come back as other attempts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_replica_and_a_lost_lead_cost_rounds_and_no_batch() {
    let world = diloco().await;
    let one = World::published().await;
    one.run(&one.train_attempt(1)).await.unwrap();

    let (lead, replica) = (world.train_attempt(1), world.replica_attempt(1, 1));
    world.stop_after_checkpoints(2, Stop::Fenced);
    let stop = StopSwitch::default();
    let training = async {
        let ended = world.run(&lead).await.unwrap_err();
        stop.stop(Stop::LeaseExpired);
        ended
    };
    let (ended, _) = tokio::join!(training, world.run_until(&replica, stop.clone()));
    assert_eq!(ended.code, Code::AttemptFenced);
    let (_, manifest) = checkpoint::latest(&world.store, JOB).await.unwrap().unwrap();
    assert!(manifest.step < STEPS);

    // The next lead has a replica that is stopped as soon as it has said that it is there.
    world.never_stop();
    let (lead, replica, stop) = (world.train_attempt(2), world.replica_attempt(1, 2), StopSwitch::default());
    let deaf = async {
        let notes = paths::exchange_replicas(JOB, 2);
        while world.store.list(&notes).await.unwrap().is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        stop.stop(Stop::Fenced);
    };
    let (trained, ..) = tokio::join!(world.run(&lead), world.run_until(&replica, stop.clone()), deaf);
    trained.unwrap();
    let (two, one) = (finished(&world), finished(&one));
    assert_eq!(two.steps, STEPS);
    // What a replica had trained and not delivered is trained again, and counts once.
    assert_eq!(two.processed_tokens, one.processed_tokens);
    assert_eq!(two.initial_key, paths::initial(JOB, 1));
}
