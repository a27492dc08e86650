use retort_core::state::JobState;
use retort_proto::{self as proto, job_event::What};

use super::{
    Mode, bars, lines,
    state::{Phase, State},
};

fn event(sequence: u64, state: proto::JobState, progress: proto::Progress, what: Option<What>) -> proto::JobEvent {
    proto::JobEvent { sequence, time: None, state: state as i32, progress: Some(progress), what }
}

fn progress(shards: u32, step: u32) -> proto::Progress {
    proto::Progress {
        shards_published: shards,
        shards_total: 4,
        step,
        steps_total: 10,
        teacher_target_tokens: u64::from(shards) * 1000,
        teacher_tokens_per_second: 212.4,
        student_tokens_per_second: 640.0,
        train_loss: 2.5,
        ..Default::default()
    }
}

fn evaluated(step: u32, kl: f64) -> Option<What> {
    let quality = proto::Quality { kl, top1_agreement: 0.5, ..Default::default() };
    Some(What::Evaluated(proto::Evaluated { quality: Some(quality), step }))
}

#[test]
fn phases_follow_the_events() {
    use proto::JobState::{Queued, Running, Succeeded};
    let mut state = State::default();
    assert_eq!(state.phase(), Phase::Queued);
    for (sequence, (job, shards, step, expected)) in [
        (Queued, 0, 0, Phase::Queued),
        (Running, 0, 0, Phase::Teach),
        (Running, 2, 3, Phase::Teach),
        (Running, 4, 5, Phase::Train),
        (Running, 4, 10, Phase::Evaluate),
        (Succeeded, 4, 10, Phase::Done),
    ]
    .into_iter()
    .enumerate()
    {
        assert!(state.apply(&event(sequence as u64 + 1, job, progress(shards, step), None)));
        assert_eq!(state.phase(), expected, "{job:?} {shards} {step}");
    }
    assert_eq!(state.job, Some(JobState::Succeeded));
}

#[test]
fn a_repeated_event_changes_nothing() {
    let mut state = State::default();
    assert!(state.apply(&event(5, proto::JobState::Running, progress(3, 2), None)));
    let before = state.clone();
    assert!(!state.apply(&event(5, proto::JobState::Failed, progress(0, 0), None)));
    assert!(!state.apply(&event(4, proto::JobState::Queued, progress(0, 0), evaluated(0, 9.0))));
    assert_eq!(state, before);
}

#[test]
fn the_first_held_out_kl_is_that_before_training() {
    let mut state = State::default();
    let mut measured = progress(4, 5);
    measured.held_out_kl = Some(1.5);
    state.apply(&event(1, proto::JobState::Running, measured, None));
    assert_eq!((state.first_kl, state.latest_kl), (Some(1.5), Some(1.5)));
    state.apply(&event(2, proto::JobState::Running, progress(4, 10), evaluated(0, 3.25)));
    state.apply(&event(3, proto::JobState::Running, progress(4, 10), evaluated(10, 0.75)));
    assert_eq!((state.first_kl, state.latest_kl, state.evaluated), (Some(3.25), Some(0.75), true));
    assert_eq!(bars::kl(&state), "held-out KL 0.7500, was 3.2500");
}

#[test]
fn one_line_says_where_the_job_is() {
    let mut state = State::default();
    let mut at = progress(2, 3);
    at.attempts_redone = 1;
    at.eta = Some(prost_types::Duration { seconds: 200, nanos: 0 });
    state.apply(&event(1, proto::JobState::Running, at, None));
    assert_eq!(bars::summary(&state), "teaching and training · 3 min 20 s left · 1 attempt redone");
    let mut broken = progress(2, 3);
    broken.eta = Some(prost_types::Duration { seconds: -7, nanos: -1 });
    state.apply(&event(2, proto::JobState::Running, broken, None));
    assert_eq!(bars::summary(&state), "teaching and training");
}

#[test]
fn an_evaluation_says_no_time_that_is_left() {
    let mut state = State::default();
    for (sequence, step, phase, left) in [(1, 9, "training · 1 s left", ", 1 s left"), (2, 10, "evaluating", "")] {
        let mut at = progress(4, step);
        at.eta = Some(prost_types::Duration { seconds: 1, nanos: 0 });
        let what = What::TrainStepped(proto::TrainStepped { step, loss: 2.5 });
        let stepped = event(sequence, proto::JobState::Running, at, Some(what));
        state.apply(&stepped);
        assert_eq!(bars::summary(&state), phase);
        let line = lines::line(&stepped, &state).unwrap();
        assert_eq!(line, format!("train     step {step} of 10, loss 2.5000, 640 tokens/s{left}"));
    }
}

#[test]
fn text_lines_are_clean_and_complete() {
    let mut state = State::default();
    let published = What::ShardPublished(proto::ShardPublished {
        shard: 1,
        epoch: 1,
        target_tokens: 1000,
        bytes: 9,
        reused: false,
    });
    let published = event(1, proto::JobState::Running, progress(2, 0), Some(published));
    state.apply(&published);
    assert_eq!(lines::line(&published, &state).unwrap(), "teach     shard 2 of 4, 2,000 tokens, 212 tokens/s");
    let redone = proto::Redone {
        task: "0123/shard-00001".to_owned(),
        epoch: 2,
        worker: "teacher-1".to_owned(),
        reason: "lease expired\u{1b}[31m".to_owned(),
    };
    let lost = What::AttemptLost(proto::AttemptLost { redone: Some(redone) });
    let lost = event(2, proto::JobState::Running, progress(2, 0), Some(lost));
    assert_eq!(lines::line(&lost, &state).unwrap(), r"redone    shard-00001, attempt 2: lease expired\u{1b}[31m");
    assert_eq!(lines::line(&event(3, proto::JobState::Running, progress(2, 0), None), &state), None);
    for (sequence, step, expected) in
        [(4, 0, "train     started"), (5, 3, "train     step 3 of 10, loss 2.5000, held-out KL 1.2500, 640 tokens/s")]
    {
        let what = What::TrainStepped(proto::TrainStepped { step, loss: if step == 0 { 0.0 } else { 2.5 } });
        let mut at = progress(2, step);
        at.held_out_kl = (step > 0).then_some(1.25);
        let stepped = event(sequence, proto::JobState::Running, at, Some(what));
        state.apply(&stepped);
        assert_eq!(lines::line(&stepped, &state).unwrap(), expected);
        assert_eq!(state.loss.is_some(), step > 0);
    }
}

#[test]
fn the_flags_and_the_terminal_choose_the_mode() {
    assert_eq!(Mode::choose(false, false, true), Mode::Bars);
    assert_eq!(Mode::choose(false, false, false), Mode::Json);
    assert_eq!(Mode::choose(false, true, false), Mode::Plain);
    assert_eq!(Mode::choose(true, true, true), Mode::Json);
}

#[test]
fn a_checkpoint_says_how_good_it_is_when_that_is_known() {
    let line = |held_out| {
        let saved = proto::CheckpointSaved { step: 3, key: "jobs/j/checkpoints/000003-1/".to_owned(), held_out };
        let event = event(1, proto::JobState::Running, progress(4, 3), Some(What::CheckpointSaved(saved)));
        lines::line(&event, &State::default()).unwrap()
    };
    assert_eq!(line(None), "train     checkpoint at step 3: jobs/j/checkpoints/000003-1/");
    let point = proto::CurvePoint { kl: 1.25, top1_agreement: 0.5, calibration_error: 0.125, ..Default::default() };
    let expected = "train     checkpoint at step 3: jobs/j/checkpoints/000003-1/, held-out KL 1.2500, top-1 agreement 50.0 %, \
                    calibration error 12.5 %";
    assert_eq!(line(Some(point)), expected);
}

#[test]
fn an_evaluation_of_an_earlier_checkpoint_ends_it_too() {
    let mut state = State::default();
    state.apply(&event(1, proto::JobState::Running, progress(4, 10), evaluated(0, 3.25)));
    assert!(!state.evaluated);
    state.apply(&event(2, proto::JobState::Running, progress(4, 10), evaluated(7, 0.75)));
    assert!(state.evaluated);
}
