//! Groups of threads on loopback, with layers of plain arithmetic: what the ring carries, what it
//! refuses, and what breaks it.

use std::{sync::mpsc as std_mpsc, time::Duration};

use retort_artifact::soft_targets::Position;
use retort_core::spec::Codec;
use retort_llama::{Piece as Run, Room, TensorHash};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    capture::Capture,
    sampling::Sampler,
    stage::step::{Activations, Ask, Piece},
};

mod faults;
mod messages;
mod native;

const LAYERS: u32 = 7;
const WAIT: Duration = Duration::from_secs(20);

/// A model whose activation is one number a token: each layer multiplies it, and adds what it has seen
/// in the slot so far.
#[derive(Default)]
struct Sums {
    weights: u8,
    part: Option<Part>,
    /// By layer and slot: the sum of what came through.
    seen: BTreeMap<(usize, u32), u64>,
    /// How long a step takes.
    slow: Duration,
    /// Fails at this token.
    poison: Option<u32>,
}

impl Computer for Sums {
    fn open(&mut self, model: &Path) -> Result<Opened> {
        Ok(Opened {
            config_sha256: model.display().to_string(),
            weights_print: self.weights.to_string(),
            layers: LAYERS,
            row_bytes: 8,
            layer_cost: 1.0,
            embedding_cost: 0.1,
            head_cost: 1.0,
        })
    }

    fn load(&mut self, _: &Path, part: &Part) -> Result<Loaded> {
        self.part = Some(part.clone());
        let tensor = |layer: usize| TensorHash {
            name: format!("layer {layer}"),
            shape: "F32 [1]".into(),
            sha256: [layer as u8; 32],
        };
        Ok(Loaded { bytes_read: 4 * part.layers.len() as u64, tensors: part.layers.clone().map(tensor).collect() })
    }

    fn begin(&mut self, _: &Begin) -> Result<()> {
        self.seen.clear();
        Ok(())
    }

    fn run(&mut self, step: &Step, input: Option<Activations>) -> Result<Output> {
        std::thread::sleep(self.slow);
        let part = self.part.clone().unwrap();
        if part.heads && self.poison.is_some_and(|poison| step.token_ids.contains(&poison)) {
            return Err(Error::new(Code::ShardUnfaithful, "a poisoned token"));
        }
        assert_eq!(part.embeds, input.is_none());
        let mut states: Vec<u64> = match input {
            None => step.token_ids.iter().map(|&id| u64::from(id)).collect(),
            Some(input) => input.bytes.chunks_exact(8).map(|x| u64::from_le_bytes(x.try_into().unwrap())).collect(),
        };
        for layer in part.layers {
            let mut states = states.iter_mut();
            for piece in &step.pieces {
                let mut own = 0;
                let sum = piece.run.slot.map_or(&mut own, |slot| self.seen.entry((layer, slot)).or_default());
                for state in states.by_ref().take(piece.run.tokens as usize) {
                    *state = state.wrapping_mul(31).wrapping_add(layer as u64).wrapping_add(*sum);
                    *sum = sum.wrapping_add(*state);
                }
            }
        }
        if !part.heads {
            return Ok(Output::Activations(Activations {
                tokens: states.len() as u32,
                bytes: states.into_iter().flat_map(u64::to_le_bytes).collect(),
            }));
        }
        let mut taken = Vec::new();
        let mut at = 0;
        for piece in &step.pieces {
            let end = at + piece.run.tokens as usize;
            let places = match piece.ask {
                Ask::Nothing => 0..0,
                // A token is predicted where the one before it is.
                Ask::Score { first, next } => at + first.max(1) as usize - 1..end - usize::from(next.is_none()),
                Ask::Next => end - 1..end,
            };
            taken.extend(states[places].iter().map(|&state| target(state)));
            at = end;
        }
        Ok(Output::Taken(taken))
    }
}

fn target(state: u64) -> Taken {
    let token = (state % 1009) as u32;
    // Enough numbers that some steps' targets do not fit one message.
    let head = (0..(state % 3) as u32 * 20_000).map(|id| (id, -0.5 - id as f32)).collect();
    let position = Position { head, tail: vec![(token, 3, -1.25)], label_logprob: -2.5, log_sum_exps: vec![0.75] };
    Taken { token, position }
}

fn begin() -> Begin {
    let capture = Capture { codec: Codec::TopK { head: 8 }, temperatures: vec![2.0], seed: 7 };
    let sampler = Some(Sampler { top_k: 40, min_p: 0.05, repetition_penalty: 1.25, ..Sampler::new(0.7, 0.9, 7) });
    Begin { capture, sampler, room: Room { lanes: 2, slots: 4, capacity: 100_000 } }
}

fn steps() -> Vec<Step> {
    let step = |n: u32| {
        let kept = Run { slot: Some(n % 4), start: 3 * (n / 4), tokens: 3 };
        let kept = Piece { run: kept, stream: u64::from(n), ask: Ask::Next };
        // Some larger than a chunk, some than two.
        let tokens = 2 + (n % 3) * 140_000 / 10;
        let scored = Run { slot: None, start: 0, tokens };
        let scored = Piece {
            run: scored,
            stream: 1,
            ask: Ask::Score { first: tokens - 2, next: n.is_multiple_of(2).then_some(n) },
        };
        let token_ids = (0..3 + tokens).map(|id| id.wrapping_mul(7919 + n) % 5000).collect();
        Step { lane: n % 2, shares: Vec::new(), pieces: vec![kept, scored], token_ids }
    };
    (0..12).map(step).collect()
}

/// What one process computes.
fn alone(steps: &[Step]) -> Vec<Vec<Taken>> {
    let mut sums =
        Sums { part: Some(Part { layers: 0..LAYERS as usize, embeds: true, heads: true }), ..Sums::default() };
    let run = |step: &Step| match sums.run(step, None).unwrap() {
        Output::Taken(taken) => taken,
        Output::Activations(_) => panic!("no targets"),
    };
    steps.iter().map(run).collect()
}

/// As an engine does: as many under way as the pipeline wants.
fn drive(group: &mut Group, steps: &[Step]) -> Result<Vec<Vec<Taken>>> {
    group.begin(&begin())?;
    let mut taken = Vec::new();
    for (n, step) in steps.iter().enumerate() {
        if n >= group.depth() {
            taken.push(group.next()?);
        }
        group.submit(step.clone())?;
    }
    while taken.len() < steps.len() {
        taken.push(group.next()?);
    }
    Ok(taken)
}

/// Free addresses on this machine; another process could take one before it is used, which the test
/// would see as a stage that cannot listen.
fn addresses(stages: usize) -> Vec<String> {
    let listeners: Vec<_> = (0..stages).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    listeners.iter().map(|listener| listener.local_addr().unwrap().to_string()).collect()
}

fn place(peers: &[String], stage: usize) -> Place {
    let args = GroupArgs {
        group: Some("g".into()),
        stage: Some(format!("{stage}/{}", peers.len())),
        peers: peers.to_vec(),
        group_patience: 20,
        ..GroupArgs::default()
    };
    Place::new(&args, &LeaderWorkerSet::default()).unwrap().unwrap()
}

/// A member on a thread of its own; the channel brings how it ended.
fn member(place: Place, computer: Sums, shutdown: CancellationToken) -> std_mpsc::Receiver<Result<()>> {
    member_of(place, move || Box::new(computer), shutdown)
}

fn member_of(
    place: Place,
    make: impl FnOnce() -> Box<dyn Computer> + Send + 'static,
    shutdown: CancellationToken,
) -> std_mpsc::Receiver<Result<()>> {
    let (ended, end) = std_mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let result = runtime.block_on(serve(place, "f32", make, &shutdown));
        runtime.shutdown_background();
        let _ = ended.send(result);
    });
    end
}

/// A group of threads, seen from stage 0.
struct World {
    runtime: tokio::runtime::Runtime,
    group: Group,
    keeper: Keeper,
    members: Vec<std_mpsc::Receiver<Result<()>>>,
    stops: Vec<CancellationToken>,
}

impl World {
    fn new(stages: usize) -> Self {
        Self::with(stages, |_| Sums::default())
    }

    fn with(stages: usize, computer: impl Fn(usize) -> Sums) -> Self {
        let peers = addresses(stages);
        Self::of((0..stages).map(|stage| place(&peers, stage)).collect(), computer).unwrap()
    }

    fn of(places: Vec<Place>, computer: impl Fn(usize) -> Sums) -> Result<Self> {
        let stops: Vec<CancellationToken> = places.iter().map(|_| CancellationToken::new()).collect();
        let members =
            places[1..].iter().map(|place| member(place.clone(), computer(place.stage), stops[place.stage].clone()));
        let members = members.collect();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let formed = runtime.block_on(Formed::new(places[0].clone(), "f32", &stops[0]))?;
        let group = Group::new(formed.parts, Box::new(computer(0)));
        Ok(Self { runtime, group, keeper: formed.keeper, members, stops })
    }

    fn end(self) -> Vec<Result<()>> {
        self.runtime.block_on(self.keeper.end(&Error::new(Code::WorkerStopped, "the test is over")));
        self.members.iter().map(|member| member.recv_timeout(WAIT).expect("every member ends")).collect()
    }
}

#[test]
fn any_number_of_stages_computes_the_same() {
    let steps = steps();
    let expected = alone(&steps);
    for stages in [2, 3, 5] {
        let mut world = World::new(stages);
        let model = world.group.load(Path::new("/m")).unwrap().clone();
        assert_eq!(model.tensors.len(), LAYERS as usize);
        assert_eq!(model.bytes_read.iter().sum::<u64>(), 4 * u64::from(LAYERS), "each layer is read once");
        for _ in 0..2 {
            assert!(drive(&mut world.group, &steps).unwrap() == expected, "{stages} stages");
        }
        let stats = all_stats(&world.group.meter, &world.group.peer_stats);
        assert_eq!(stats[0].steps, 2 * steps.len() as u64);
        world.group.report();
        for end in world.end() {
            let error = end.unwrap_err();
            assert!(error.message.contains("stage 0 ends the group: the test is over"), "{}", error.message);
        }
    }
}

#[test]
fn layers_that_were_given_are_loaded() {
    let peers = addresses(2);
    let mut places: Vec<Place> = (0..2).map(|stage| place(&peers, stage)).collect();
    places[0].layers = Some(0..5);
    places[1].layers = Some(5..7);
    let mut world = World::of(places, |_| Sums::default()).unwrap();
    let model = world.group.load(Path::new("/m")).unwrap().clone();
    assert_eq!(model.parts.iter().map(|part| part.layers.clone()).collect::<Vec<_>>(), [0..5, 5..7]);
    assert_eq!(model.bytes_read, [20, 8]);
    assert!(drive(&mut world.group, &steps()).unwrap() == alone(&steps()));
    world.end();
}

#[test]
fn a_step_that_cannot_be_computed_fails_its_run_and_no_other() {
    let mut world = World::with(3, |stage| Sums { poison: (stage == 2).then_some(4999), ..Sums::default() });
    world.group.load(Path::new("/m")).unwrap();
    let mut poisoned = steps();
    poisoned[3].token_ids[0] = 4999;
    let error = drive(&mut world.group, &poisoned).unwrap_err();
    assert_eq!(error.code, Code::ShardUnfaithful);
    assert!(error.message.starts_with("stage 2 of group \"g\" at 127.0.0.1:"), "{}", error.message);
    let steps: Vec<Step> = steps().into_iter().filter(|step| !step.token_ids.contains(&4999)).collect();
    assert!(drive(&mut world.group, &steps).unwrap() == alone(&steps), "the next run is whole");
    world.end();
}

#[test]
fn a_busy_stage_is_not_a_dead_one() {
    let slow = dial::SILENCE + Duration::from_secs(2);
    let mut world =
        World::with(2, |stage| Sums { slow: if stage == 1 { slow } else { Duration::ZERO }, ..Sums::default() });
    world.group.load(Path::new("/m")).unwrap();
    let steps = &steps()[..1];
    assert!(drive(&mut world.group, steps).unwrap() == alone(steps));
    world.end();
}
