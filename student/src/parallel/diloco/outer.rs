//! What a trainer keeps for the exchange: where the round began, and the outer optimiser.

use std::path::Path;

use retort_core::{Code, Error, Result, spec::Parallel};
use serde::{Deserialize, Serialize};
use tch::{Kind, TchError, Tensor, no_grad};

use super::ledger::Ledger;
use crate::{
    failure::torch,
    optimizer::copy_of,
    parallel::{implausible, norm},
    trainer::{Progress, Trainer},
};

type Named = Vec<(String, Tensor)>;

/// Of what a checkpoint holds as JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rounds {
    /// Done.
    pub round: u32,
    pub ledger: Ledger,
}

/// The outer optimiser: stochastic gradient descent with Nesterov's momentum over how far the workers came
/// (Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013, as PyTorch
/// computes it; DiLoCo's choice).
#[derive(Debug)]
pub struct Outer {
    pub rounds: Rounds,
    learning_rate: f64,
    momentum: f64,
    /// f32, in the order of the optimiser's parameters; none before the first outer step, which replicas never take.
    velocity: Named,
    /// Weights that the round began with; none between rounds.
    start: Vec<Tensor>,
    /// How far the run had come then.
    begun: Progress,
}

impl Outer {
    pub fn new(parallel: &Parallel, batches: u32) -> Self {
        Self {
            rounds: Rounds { round: 0, ledger: Ledger::new(batches) },
            learning_rate: parallel.outer_learning_rate,
            momentum: parallel.outer_momentum,
            velocity: Vec::new(),
            start: Vec::new(),
            begun: Progress::default(),
        }
    }

    /// Tensors of a checkpoint, sharing memory.
    pub fn state(&self) -> &[(String, Tensor)] {
        &self.velocity
    }

    /// Takes over what [`Outer::state`] gave, where the optimiser's weights are `masters`; the text of an error says
    /// what does not fit.
    pub fn restore(
        &mut self,
        rounds: Rounds,
        state: &[(String, Tensor)],
        masters: &[(String, Tensor)],
    ) -> Result<(), String> {
        if !rounds.ledger.is_sound(self.rounds.ledger.total()) {
            return Err("its batches are not those of this run".to_owned());
        }
        if !state.is_empty() {
            self.set_velocity_up(masters).map_err(|error| error.to_string())?;
            copy_named(state, &mut self.velocity)?;
        }
        self.rounds = rounds;
        Ok(())
    }

    /// Zero, where there is none yet.
    fn set_velocity_up(&mut self, masters: &[(String, Tensor)]) -> Result<(), TchError> {
        if self.velocity.is_empty() {
            let zeros = |(name, master): &(String, Tensor)| Ok((name.clone(), master.f_zeros_like()?));
            self.velocity = no_grad(|| masters.iter().map(zeros).collect::<Result<_, TchError>>())?;
        }
        Ok(())
    }
}

impl Trainer {
    /// A round begins: with the weights of `from`, or else with those that are there, which `into` gets.
    /// [`Code::CheckpointCorrupt`] where `from` does not fit or is not finite.
    pub(super) fn begin_round(&mut self, from: Option<&Path>, into: Option<&Path>) -> Result<()> {
        let mut masters = self.optimizer.masters();
        if let Some(path) = from {
            let weights = read(path)?;
            copy_named(&weights, &mut masters).map_err(|why| unfit(path, &why))?;
            self.optimizer.refresh()?;
        }
        if let Some(path) = into {
            write(path, &masters)?;
        }
        let copies: Result<Vec<Tensor>, TchError> =
            no_grad(|| masters.iter().map(|(_, master)| copy_of(master)).collect());
        let begun = self.progress;
        let outer = self.outer_mut()?;
        outer.start = copies.map_err(torch("cannot keep the round's weights"))?;
        outer.begun = begun;
        Ok(())
    }

    /// Back to where the round began, if one has; the moments stay as they are.
    pub(super) fn give_round_up(&mut self) -> Result<Progress> {
        let mut masters = self.optimizer.masters();
        let outer = self.outer_mut()?;
        let (start, begun) = (std::mem::take(&mut outer.start), outer.begun);
        if start.is_empty() {
            return Ok(self.progress);
        }
        let back = || masters.iter_mut().zip(&start).try_for_each(|((_, master), start)| master.f_copy_(start));
        no_grad(back).map_err(torch("cannot take a round back"))?;
        self.optimizer.refresh()?;
        self.progress = begun;
        Ok(begun)
    }

    /// Writes how far the weights came since the round began: the start less what they are now, f32.
    pub(super) fn write_delta(&mut self, path: &Path) -> Result<()> {
        let masters = self.optimizer.masters();
        let outer = self.outer_mut()?;
        if outer.start.len() != masters.len() {
            return Err(Error::internal("no round has begun"));
        }
        let delta = |((name, master), start): (&(String, Tensor), &Tensor)| Ok((name.clone(), start.f_sub(master)?));
        let deltas: Result<Named, TchError> = no_grad(|| masters.iter().zip(&outer.start).map(delta).collect());
        write(path, &deltas.map_err(torch("cannot compare weights"))?)
    }

    /// A round ends: the mean of this worker's way and of those in `others` is one outer step from where the
    /// round began. One that does not fit, or of a norm that cannot be, is left out; which of `others` counted.
    pub(super) fn end_round(&mut self, others: &[std::path::PathBuf]) -> Result<Vec<bool>> {
        let mut masters = self.optimizer.masters();
        let outer = self.outer_mut()?;
        if outer.start.len() != masters.len() {
            return Err(Error::internal("no round has begun"));
        }
        let failed = torch("cannot take the outer step");
        outer.set_velocity_up(&masters).map_err(&failed)?;
        // The sum of ways is formed where this worker's weights are: its own way first.
        let own = || -> Result<(), TchError> {
            for ((_, master), start) in masters.iter_mut().zip(&outer.start) {
                let _ = master.f_neg_()?;
                let _ = master.f_add_(start)?;
            }
            Ok(())
        };
        no_grad(own).map_err(&failed)?;
        let own = if others.is_empty() { 0.0 } else { norm(masters.iter().map(|(_, way)| way)).map_err(&failed)? };
        let mut counted = Vec::with_capacity(others.len());
        for path in others {
            let added = read(path).map_err(|error| error.message).and_then(|way| add(&way, &mut masters, own));
            if let Err(why) = &added {
                tracing::warn!(path = %path.display(), "what a replica sent does not count: {why}");
            }
            counted.push(added.is_ok());
        }
        let workers = 1.0 + counted.iter().filter(|&&counts| counts).count() as f64;
        let (rate, momentum) = (outer.learning_rate, outer.momentum);
        let step = || -> Result<(), TchError> {
            for (((_, sum), start), (_, velocity)) in masters.iter_mut().zip(&outer.start).zip(&mut outer.velocity) {
                let mut mean = sum.f_div_scalar_(workers)?;
                let mut velocity = velocity.f_mul_scalar_(momentum)?;
                let velocity = velocity.f_add_(&mean)?;
                let _ = mean.f_add_(&velocity.f_mul_scalar(momentum)?)?;
                let mut weight = mean.f_mul_scalar_(-rate)?;
                let _ = weight.f_add_(start)?;
            }
            Ok(())
        };
        no_grad(step).map_err(failed)?;
        outer.start.clear();
        outer.rounds.round += 1;
        self.optimizer.refresh()?;
        Ok(counted)
    }

    pub(super) fn outer_mut(&mut self) -> Result<&mut Outer> {
        self.outer.as_mut().ok_or_else(|| Error::internal("this trainer takes part in no exchange"))
    }
}

/// Bytes that the tensors of an exchanged file may take, at most: the weights and their names.
pub(super) fn max_bytes(masters: &[(String, Tensor)]) -> u64 {
    masters.iter().map(|(name, master)| 4 * master.numel() as u64 + name.len() as u64 + 256).sum::<u64>() + 4096
}

fn write(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
    }
    Tensor::write_safetensors(tensors, path).map_err(torch("cannot write weights"))
}

fn read(path: &Path) -> Result<Named> {
    Tensor::read_safetensors(path).map_err(|error| unfit(path, &error.to_string()))
}

fn unfit(path: &Path, why: &str) -> Error {
    Error::new(Code::CheckpointCorrupt, format!("{}: {why}", path.display()))
}

/// Copies into `to` what `from` has under the same names.
fn copy_named(from: &[(String, Tensor)], to: &mut [(String, Tensor)]) -> Result<(), String> {
    let from = matching(from, to)?;
    for ((name, to), from) in to.iter_mut().zip(from) {
        no_grad(|| to.f_copy_(from)).map_err(|error| format!("{name:?}: {error}"))?;
    }
    Ok(())
}

/// Adds `from` to `to`, once its norm is known to be plausible where the lead's own way has the norm `own`.
fn add(from: &[(String, Tensor)], to: &mut [(String, Tensor)], own: f64) -> Result<(), String> {
    let from = matching(from, to)?;
    let theirs = norm(from.iter().copied()).map_err(|error| error.to_string())?;
    if let Some(why) = implausible("way's norm", theirs, own) {
        return Err(why);
    }
    for ((name, to), from) in to.iter_mut().zip(from) {
        let _ = no_grad(|| to.f_add_(&from.f_to_device(to.device())?)).map_err(|error| format!("{name:?}: {error}"))?;
    }
    Ok(())
}

/// Of `from`, the tensors that `to` names, in its order, once all of them are known to be finite.
fn matching<'a>(from: &'a [(String, Tensor)], to: &[(String, Tensor)]) -> Result<Vec<&'a Tensor>, String> {
    if from.len() != to.len() {
        return Err(format!("it holds {} tensors, the student trains {}", from.len(), to.len()));
    }
    let found: std::collections::HashMap<&str, &Tensor> =
        from.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let find = |(name, to): &(String, Tensor)| {
        let tensor = *found.get(name.as_str()).ok_or_else(|| format!("it lacks {name:?}"))?;
        if tensor.size() != to.size() || tensor.kind() != Kind::Float {
            return Err(format!("{name:?} is {:?} {:?}, not f32 {:?}", tensor.kind(), tensor.size(), to.size()));
        }
        // In f64 finite f32 values sum up to a finite one.
        let sum = no_grad(|| tensor.f_sum(Kind::Double)?.f_double_value(&[]));
        match sum.map_err(|error| format!("{name:?}: {error}"))?.is_finite() {
            true => Ok(tensor),
            false => Err(format!("{name:?} is not finite")),
        }
    };
    to.iter().map(find).collect()
}

#[cfg(test)]
mod tests {
    use retort_core::spec::{Sharing, Train};
    use tch::Device;

    use super::*;
    use crate::{batch, example::tests::example, init::tests::tiny_config, trainer::Options};

    const VOCAB: u32 = 40;

    fn trainer(parallel: Parallel) -> Trainer {
        let config = tiny_config(2, VOCAB.into());
        let model = retort_llama::Model::init(config, Device::Cpu, Kind::Float, 5).unwrap();
        let train = Train { learning_rate: 5e-3, parallel: Some(parallel), ..Train::default() };
        Trainer::new(model, Options { train, steps: 40, limits: batch::Limits { max_tokens: 60 } }).unwrap()
    }

    fn parallel(outer_learning_rate: f64, outer_momentum: f64) -> Parallel {
        Parallel { mode: Sharing::Diloco, outer_learning_rate, outer_momentum, ..Parallel::of(2) }
    }

    fn step(trainer: &mut Trainer, seed: u64) {
        let rows: Vec<_> = (0..3).map(|i| example(seed + i, 4, 9, 5, VOCAB)).collect();
        trainer.step(&rows, &|| Ok(())).unwrap();
    }

    fn weights(trainer: &Trainer) -> Vec<Tensor> {
        trainer.optimizer.masters().iter().map(|(_, master)| master.detach().to_kind(Kind::Double)).collect()
    }

    fn furthest(a: &[Tensor], b: &[Tensor]) -> f64 {
        a.iter().zip(b).map(|(a, b)| (a - b).abs().max().double_value(&[])).fold(0.0, f64::max)
    }

    /// One worker, a whole outer step without momentum: the exchange changes nothing.
    #[test]
    fn alone_and_without_momentum_it_is_plain_training() {
        let (mut plain, mut outer) = (trainer(parallel(1.0, 0.0)), trainer(parallel(1.0, 0.0)));
        for round in 0..3 {
            outer.begin_round(None, None).unwrap();
            for i in 0..4 {
                step(&mut plain, 10 * round + i);
                step(&mut outer, 10 * round + i);
            }
            outer.end_round(&[]).unwrap();
        }
        assert!(furthest(&weights(&plain), &weights(&outer)) < 1e-5);
        assert_eq!(outer.outer.as_ref().unwrap().rounds.round, 3);
    }

    /// Two workers over two rounds against the formula in double precision.
    #[test]
    fn the_outer_step_is_the_papers() {
        let folder = tempfile::tempdir().unwrap();
        let (rate, momentum) = (0.7, 0.9);
        let (mut lead, mut replica) = (trainer(parallel(rate, momentum)), trainer(parallel(rate, momentum)));
        let mut expected = weights(&lead);
        let mut velocity: Vec<Tensor> = expected.iter().map(Tensor::zeros_like).collect();
        for round in 0..2 {
            let (start, delta) = (folder.path().join("start"), folder.path().join("delta"));
            lead.begin_round(None, Some(&start)).unwrap();
            replica.begin_round(Some(&start), None).unwrap();
            assert_eq!(furthest(&weights(&lead), &weights(&replica)), 0.0);
            for i in 0..3 {
                step(&mut lead, 100 * round + i);
                step(&mut replica, 100 * round + 50 + i);
            }
            replica.write_delta(&delta).unwrap();
            assert!(replica.outer.as_ref().unwrap().state().is_empty(), "it takes no outer steps");
            for (i, (a, b)) in weights(&lead).iter().zip(weights(&replica)).enumerate() {
                let mean = (&expected[i] * 2.0 - a - b) / 2.0;
                velocity[i] = &velocity[i] * momentum + &mean;
                expected[i] = &expected[i] - (mean + &velocity[i] * momentum) * rate;
            }
            assert_eq!(lead.end_round(&[delta]).unwrap(), [true]);
            assert!(furthest(&weights(&lead), &expected) < 1e-5);
        }
    }

    #[test]
    fn a_velocity_survives_its_file_also_before_there_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("outer.safetensors");
        let mut lead = trainer(parallel(0.7, 0.9));
        for round in 0..2 {
            let outer = lead.outer.as_ref().unwrap();
            assert_eq!(outer.state().is_empty(), round == 0);
            Tensor::write_safetensors(outer.state(), &path).unwrap();
            let mut other = trainer(parallel(0.7, 0.9));
            let masters = other.optimizer.masters();
            let restored = other.outer.as_mut().unwrap();
            restored.restore(outer.rounds.clone(), &read(&path).unwrap(), &masters).unwrap();
            assert_eq!((restored.rounds.round, restored.state().len()), (round, outer.state().len()));
            for ((name, tensor), (_, of_other)) in outer.state().iter().zip(restored.state()) {
                assert!(tensor.equal(of_other), "{name}");
            }
            lead.begin_round(None, None).unwrap();
            step(&mut lead, 1);
            lead.end_round(&[]).unwrap();
        }
    }

    #[test]
    fn a_round_that_is_given_up_leaves_no_trace_in_the_weights() {
        let mut lead = trainer(parallel(0.7, 0.9));
        step(&mut lead, 1);
        let (weights_before, progress) = (weights(&lead), lead.progress());
        lead.begin_round(None, None).unwrap();
        step(&mut lead, 2);
        assert!(furthest(&weights(&lead), &weights_before) > 0.0);
        assert_eq!(lead.give_round_up().unwrap(), progress);
        assert_eq!(furthest(&weights(&lead), &weights_before), 0.0);
        assert_eq!((lead.progress(), lead.outer.as_ref().unwrap().rounds.round), (progress, 0));
        step(&mut lead, 3);
        let steps = lead.progress().step;
        assert_eq!(lead.give_round_up().unwrap().step, steps, "no round had begun");
    }

    #[test]
    fn what_does_not_fit_or_cannot_be_does_not_count() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let mut replica = trainer(parallel(0.7, 0.9));
        replica.begin_round(None, None).unwrap();
        step(&mut replica, 1);
        replica.write_delta(&path("sound")).unwrap();
        let mut broken = Tensor::read_safetensors(path("sound")).unwrap();
        for (name, value) in [("huge", 3e38), ("large", 1e5), ("nan", f64::NAN)] {
            let _ = broken[1].1.get(0).fill_(value);
            Tensor::write_safetensors(&broken, path(name)).unwrap();
        }
        broken.truncate(3);
        Tensor::write_safetensors(&broken, path("few")).unwrap();
        std::fs::write(path("torn"), &std::fs::read(path("sound")).unwrap()[..1000]).unwrap();

        let with = |others: &[&str]| {
            let mut lead = trainer(parallel(0.7, 0.9));
            lead.begin_round(None, None).unwrap();
            step(&mut lead, 2);
            let paths: Vec<_> = others.iter().map(|name| path(name)).collect();
            let counted = lead.end_round(&paths).unwrap();
            (counted, weights(&lead))
        };
        let (_, sound) = with(&["sound"]);
        let (counted, all) = with(&["nan", "huge", "few", "sound", "torn", "large", "missing"]);
        assert_eq!(counted, [false, false, false, true, false, false, false]);
        assert_eq!(furthest(&sound, &all), 0.0);
        assert!(max_bytes(&replica.optimizer.masters()) >= std::fs::metadata(path("sound")).unwrap().len());
        let before = weights(&replica);
        for (name, why) in [("torn", ""), ("few", "it holds 3 tensors"), ("nan", "is not finite")] {
            let refused = replica.begin_round(Some(&path(name)), None).unwrap_err();
            assert_eq!(refused.code, Code::CheckpointCorrupt);
            assert!(refused.message.contains(why), "{}", refused.message);
        }
        assert_eq!(furthest(&weights(&replica), &before), 0.0, "what is refused changes nothing");
    }
}
