//! What a message may say: the edges of it pass, and what lies beyond is refused.

use super::*;
use crate::group::wire::{MAX_STEP_TOKENS, begin_from_proto, begin_to_proto, step_from_proto, step_to_proto};

/// One piece, of which nothing is kept.
fn whole(tokens: usize, token_ids: usize) -> Step {
    let run = Run { slot: None, start: 0, tokens: tokens as u32 };
    let pieces = vec![Piece { run, stream: 0, ask: Ask::Next }];
    Step { lane: 0, shares: Vec::new(), pieces, token_ids: (0..token_ids as u32).map(|id| id % 5000).collect() }
}

#[test]
fn samplers_that_no_job_may_ask_for_are_refused() {
    assert_eq!(begin_from_proto(begin_to_proto(3, &begin())).unwrap(), (3, begin()));
    type Case = (&'static str, fn(&mut proto::StepSampler, f64), &'static [f64], &'static [f64]);
    let cases: [Case; 4] = [
        ("temperature", |sampler, x| sampler.temperature = x, &[0.0, 2.5], &[-0.5, f64::INFINITY, f64::NAN]),
        ("top_p", |sampler, x| sampler.top_p = x, &[0.001, 1.0], &[0.0, -0.1, 1.5, f64::NAN]),
        ("min_p", |sampler, x| sampler.min_p = x, &[0.0, 1.0], &[-0.1, 1.5, f64::NAN]),
        ("penalty", |sampler, x| sampler.repetition_penalty = x, &[0.5, 2.0], &[0.0, -1.0, f64::INFINITY, f64::NAN]),
    ];
    for (field, set, good, bad) in cases {
        let received = |value: f64| {
            let mut message = begin_to_proto(3, &begin());
            set(message.sampler.as_mut().unwrap(), value);
            begin_from_proto(message)
        };
        for &value in good {
            assert!(received(value).is_ok(), "{field} {value}");
        }
        for &value in bad {
            let error = received(value).expect_err(field);
            assert_eq!(error.code, Code::GroupBroken, "{field} {value}");
            assert!(error.message.contains("samples in a way that no job may ask for"), "{}", error.message);
        }
    }
}

#[test]
fn a_run_takes_no_more_lanes_and_slots_than_agreed() {
    let received =
        |lanes: u32, slots: u32| begin_from_proto(proto::BeginRun { lanes, slots, ..begin_to_proto(3, &begin()) });
    for (lanes, slots) in [(0, 0), (1024, 64), (1, 65_536)] {
        assert!(received(lanes, slots).is_ok(), "{lanes} {slots}");
    }
    for (lanes, slots) in [(1025, 1), (1024, 65), (1, 65_537), (u32::MAX, u32::MAX)] {
        let error = received(lanes, slots).unwrap_err();
        assert!(error.message.contains("at most 1024 lanes and 65536 slots"), "{}", error.message);
    }
}

#[test]
fn a_step_has_at_most_so_many_tokens_and_an_id_for_each() {
    let nothing = Room { lanes: 0, slots: 0, capacity: 0 };
    let received = |step: &Step| step_from_proto(step_to_proto(1, 0, step, 0), &nothing);
    for tokens in [1, (1 << 16) + 1, MAX_CONTEXT as usize, MAX_STEP_TOKENS] {
        let step = whole(tokens, tokens);
        assert!(received(&step).unwrap() == step, "{tokens}");
    }
    for (tokens, token_ids) in [(MAX_STEP_TOKENS + 1, MAX_STEP_TOKENS + 1), (3, 2), (2, 3)] {
        let error = received(&whole(tokens, token_ids)).unwrap_err();
        assert_eq!(error.code, Code::GroupBroken);
        assert!(error.message.contains(&format!("1 to {MAX_STEP_TOKENS}")), "{}", error.message);
    }
}

#[test]
fn a_piece_has_tokens_and_is_scored_on_only_where_it_is_scored() {
    let nothing = Room { lanes: 0, slots: 0, capacity: 0 };
    let received = |change: &dyn Fn(&mut proto::StepPiece)| {
        let mut message = step_to_proto(1, 0, &whole(3, 3), 0);
        change(&mut message.pieces[0]);
        step_from_proto(message, &nothing)
    };
    let scored = received(&|piece| {
        (piece.ask, piece.score_next) = (Some(proto::step_piece::Ask::ScoreFrom(2)), Some(7));
    });
    assert_eq!(scored.unwrap().pieces[0].ask, Ask::Score { first: 2, next: Some(7) });
    for change in [
        &(|piece: &mut proto::StepPiece| piece.score_next = Some(7)) as &dyn Fn(&mut proto::StepPiece),
        &|piece: &mut proto::StepPiece| (piece.ask, piece.score_next) = (None, Some(7)),
        &|piece: &mut proto::StepPiece| piece.tokens = 0,
    ] {
        assert_eq!(received(change).unwrap_err().code, Code::GroupBroken);
    }
}

#[test]
fn a_text_as_long_as_a_group_takes_goes_round() {
    let mut world = World::new(2);
    world.group.load(Path::new("/m")).unwrap();
    let steps = [whole(MAX_CONTEXT as usize, MAX_CONTEXT as usize)];
    assert!(drive(&mut world.group, &steps).unwrap() == alone(&steps));
    world.end();
}
