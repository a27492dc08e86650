//! AdamW with f32 master weights, whose whole state can be saved and read back bit for bit.
//!
//! "Decoupled Weight Decay Regularization", Loshchilov and Hutter, ICLR 2019, as PyTorch computes it.

use retort_core::{Error, Result, spec::Train};
use tch::{Kind, TchError, Tensor, no_grad};

use crate::{
    failure::torch,
    trainer::{EMBEDDINGS, HEAD},
};

/// Numbers updated at a time: what the update reads and writes of them fits a core's cache, so each
/// array crosses the memory bus once an update.
const STRIDE: i64 = 1 << 16;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    /// Of the embeddings and the head.
    pub embedding_epsilon: f64,
    /// Applied to matrices only: norms and biases keep their scale.
    pub weight_decay: f64,
    /// Of the running average of the weights; 0 for none.
    pub average_decay: f64,
}

impl Hyper {
    pub fn of(train: &Train) -> Self {
        Self {
            beta1: train.adam_beta1,
            beta2: train.adam_beta2,
            epsilon: train.adam_epsilon,
            embedding_epsilon: train.adam_embedding_epsilon,
            weight_decay: train.weight_decay,
            average_decay: train.ema_decay,
        }
    }
}

#[derive(Debug)]
pub struct AdamW {
    hyper: Hyper,
    slots: Vec<Slot>,
    /// Updates done.
    step: u32,
    /// Whether the model has the averages for its weights now.
    shows_averages: bool,
}

#[derive(Debug)]
struct Slot {
    name: String,
    /// The model's own tensor, trained.
    parameter: Tensor,
    /// f32. The parameter itself where that is f32.
    master: Tensor,
    /// f32, summed over micro-batches. The parameter's own gradient where that is f32 and autograd's.
    gradient: Tensor,
    /// Whether autograd computes the gradient: in the parameter's kind, into the parameter's own.
    is_autograds: bool,
    first: Tensor,
    second: Tensor,
    /// f32; the running average of the master.
    average: Option<Tensor>,
    decays: bool,
    epsilon: f64,
}

impl AdamW {
    /// For `parameters` (name and tensor sharing the model's memory). Of those that do not require gradients autograd
    /// has none: what trains them is added to [`AdamW::gradient`].
    pub fn new(parameters: Vec<(String, Tensor)>, hyper: Hyper) -> Result<Self> {
        let slots = parameters.into_iter().map(|(name, parameter)| Slot::new(name, parameter, &hyper));
        Ok(Self { hyper, slots: slots.collect::<Result<_>>()?, step: 0, shows_averages: false })
    }

    /// Gradient of the parameter of this name, f32, to be added to in place.
    pub fn gradient(&self, name: &str) -> Result<Tensor> {
        let slot = self.slots.iter().find(|slot| slot.name == name);
        slot.map(|slot| slot.gradient.shallow_clone())
            .ok_or_else(|| Error::internal(format!("the model has no parameter {name:?}")))
    }

    /// To be called after each backward pass: moves what a model in another kind than f32 computed.
    pub fn collect(&mut self) -> Result<()> {
        let collect = |slot: &mut Slot| -> Result<(), TchError> {
            if slot.is_autograds && !slot.is_f32() {
                let mut fresh = slot.parameter.f_grad()?;
                let _ = slot.gradient.f_add_(&fresh)?;
                let _ = fresh.f_zero_()?;
            }
            Ok(())
        };
        no_grad(|| self.slots.iter_mut().try_for_each(collect)).map_err(torch("cannot collect gradients"))
    }

    /// Euclidean norm over all gradients.
    pub fn gradient_norm(&self) -> Result<f64> {
        let square =
            |slot: &Slot| -> Result<f64, TchError> { Ok(slot.gradient.f_norm()?.f_double_value(&[])?.powi(2)) };
        let squares: Result<Vec<f64>, _> = no_grad(|| self.slots.iter().map(square).collect());
        Ok(squares.map_err(torch("cannot compute the gradient's norm"))?.iter().sum::<f64>().sqrt())
    }

    /// One update with gradients times `gradient_scale`, which are then set to zero.
    pub fn update(&mut self, learning_rate: f64, gradient_scale: f64) -> Result<()> {
        self.step += 1;
        let step = f64::from(self.step);
        let rates = Rates {
            hyper: self.hyper,
            learning_rate,
            gradient_scale,
            step_size: learning_rate / (1.0 - self.hyper.beta1.powf(step)),
            second_scale: 1.0 / (1.0 - self.hyper.beta2.powf(step)).sqrt(),
            // An average of few steps must forget where they began.
            average_decay: self.hyper.average_decay.min((1.0 + step) / (10.0 + step)),
        };
        no_grad(|| self.slots.iter_mut().try_for_each(|slot| slot.update(&rates)))
            .map_err(torch("cannot update the weights"))
    }

    /// Sets the gradients to zero without an update.
    pub fn discard(&mut self) -> Result<()> {
        no_grad(|| self.slots.iter_mut().try_for_each(|slot| slot.gradient.f_zero_().map(drop)))
            .map_err(torch("cannot clear gradients"))
    }

    /// Over all parameters.
    pub fn numbers(&self) -> u64 {
        self.slots.iter().map(|slot| slot.parameter.numel() as u64).sum()
    }

    /// Updates done.
    pub fn step(&self) -> u32 {
        self.step
    }

    /// The trained weights in f32, by name, sharing memory with this optimiser: writing into one and then
    /// calling `refresh` changes the model.
    pub fn masters(&self) -> Vec<(String, Tensor)> {
        self.slots.iter().map(|slot| (slot.name.clone(), slot.master.shallow_clone())).collect()
    }

    /// Has the model compute with the weights' averages, or with the weights again. Without averages it
    /// does nothing.
    pub fn show_averages(&mut self, shown: bool) -> Result<()> {
        if self.shows_averages == shown {
            return Ok(());
        }
        let show = |slot: &mut Slot| -> Result<(), TchError> {
            let is_f32 = slot.is_f32();
            let Some(average) = &mut slot.average else { return Ok(()) };
            if is_f32 {
                // The parameter is the only place of the weights: they change places.
                let weights = copy_of(&slot.master)?;
                slot.master.f_copy_(average)?;
                average.f_copy_(&weights)?;
            } else {
                slot.parameter.f_copy_(if shown { average } else { &slot.master })?;
            }
            Ok(())
        };
        no_grad(|| self.slots.iter_mut().try_for_each(show)).map_err(torch("cannot take the weights' averages"))?;
        self.shows_averages = shown;
        Ok(())
    }

    /// All that an equal optimiser needs besides the weights in f32: moments, averages, and masters where
    /// the model's folder does not hold them in f32. Tensors share memory with this optimiser.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = Vec::with_capacity(3 * self.slots.len());
        for slot in &self.slots {
            state.push((format!("first.{}", slot.name), slot.first.shallow_clone()));
            state.push((format!("second.{}", slot.name), slot.second.shallow_clone()));
            if let Some(average) = &slot.average {
                state.push((format!("average.{}", slot.name), average.shallow_clone()));
            }
            if !slot.is_f32() || slot.average.is_some() {
                state.push((format!("master.{}", slot.name), slot.master.shallow_clone()));
            }
        }
        state
    }

    /// Takes over what [`AdamW::state`] gave, after `step` updates. Names and shapes must be those of
    /// this optimiser; the text of an error says which is not.
    pub fn restore(&mut self, step: u32, state: &[(String, Tensor)]) -> Result<(), String> {
        let saved: std::collections::HashMap<&str, &Tensor> =
            state.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let own = self.state();
        if saved.len() != own.len() {
            return Err(format!("it holds {} tensors, the optimiser has {}", saved.len(), own.len()));
        }
        for (name, mut tensor) in own {
            let from = saved.get(name.as_str()).ok_or_else(|| format!("it lacks {name:?}"))?;
            if from.size() != tensor.size() || from.kind() != Kind::Float {
                return Err(format!("{name:?} is {:?} {:?}, not f32 {:?}", from.kind(), from.size(), tensor.size()));
            }
            no_grad(|| tensor.f_copy_(from)).map_err(|error| format!("{name:?}: {error}"))?;
        }
        self.refresh().map_err(|error| error.chain())?;
        self.step = step;
        Ok(())
    }

    /// Name, f32 master and f32 gradient of each parameter; the tensors share memory with this optimiser.
    pub(crate) fn trained(&self) -> impl Iterator<Item = (&str, &Tensor, &Tensor)> {
        self.slots.iter().map(|slot| (slot.name.as_str(), &slot.master, &slot.gradient))
    }

    /// To be called once masters were written to: a model in another kind than f32 follows them.
    pub(crate) fn refresh(&mut self) -> Result<()> {
        let follow = |slot: &mut Slot| -> Result<(), TchError> {
            if !slot.is_f32() {
                slot.parameter.f_copy_(&slot.master)?;
            }
            Ok(())
        };
        no_grad(|| self.slots.iter_mut().try_for_each(follow)).map_err(torch("cannot set the weights"))
    }

    /// For one that collects gradients and never updates: gives back the memory of the moments.
    pub(crate) fn forget_moments(&mut self) -> Result<()> {
        let forget = |slot: &mut Slot| -> Result<(), TchError> {
            let nothing = || Tensor::f_zeros([0], (Kind::Float, slot.master.device()));
            (slot.first, slot.second) = (nothing()?, nothing()?);
            Ok(())
        };
        no_grad(|| self.slots.iter_mut().try_for_each(forget)).map_err(torch("cannot give moments back"))
    }
}

/// What one update has in common for all parameters.
struct Rates {
    hyper: Hyper,
    learning_rate: f64,
    gradient_scale: f64,
    step_size: f64,
    second_scale: f64,
    average_decay: f64,
}

impl Slot {
    fn new(name: String, parameter: Tensor, hyper: &Hyper) -> Result<Self> {
        let failed = torch("cannot set the optimiser up");
        let is_autograds = parameter.requires_grad();
        let parts = || -> Result<_, TchError> {
            if is_autograds {
                // Autograd adds in place to a gradient that is there, so that it stays where it is and this
                // optimiser can share it.
                (parameter.f_sum(Kind::Float)? * 0.0).f_backward()?;
            }
            let flat = parameter.f_detach()?;
            no_grad(|| {
                let zeros = || Tensor::f_zeros(flat.size(), (Kind::Float, flat.device()));
                let is_f32 = parameter.kind() == Kind::Float;
                let master = if is_f32 { flat.shallow_clone() } else { flat.f_to_kind(Kind::Float)? };
                let gradient = if is_f32 && is_autograds { parameter.f_grad()?.f_detach()? } else { zeros()? };
                let average = if hyper.average_decay > 0.0 { Some(copy_of(&master)?) } else { None };
                Ok((master, gradient, zeros()?, zeros()?, average))
            })
        };
        let (master, gradient, first, second, average) = parts().map_err(failed)?;
        if ![&master, &gradient, &first, &second].iter().all(|tensor| tensor.is_contiguous()) {
            return Err(Error::internal(format!("the parameter {name:?} is not contiguous")));
        }
        let decays = parameter.dim() > 1;
        let is_vocabulary = [EMBEDDINGS, HEAD].contains(&name.as_str());
        let epsilon = if is_vocabulary { hyper.embedding_epsilon } else { hyper.epsilon };
        Ok(Self { name, parameter, master, gradient, is_autograds, first, second, average, decays, epsilon })
    }

    fn is_f32(&self) -> bool {
        self.parameter.kind() == Kind::Float
    }

    fn update(&mut self, rates: &Rates) -> Result<(), TchError> {
        let flat = |tensor: &Tensor| tensor.f_view([-1]);
        let arrays = [flat(&self.master)?, flat(&self.gradient)?, flat(&self.first)?, flat(&self.second)?];
        let average = self.average.as_ref().map(flat).transpose()?;
        let count = self.master.numel() as i64;
        let stride = if self.master.device() == tch::Device::Cpu { STRIDE } else { count.max(1) };
        let decay = if self.decays { 1.0 - rates.learning_rate * rates.hyper.weight_decay } else { 1.0 };
        for start in (0..count).step_by(stride as usize) {
            let length = stride.min(count - start);
            let part = |array: &Tensor| array.f_narrow(0, start, length);
            let [mut weight, mut gradient, mut first, mut second] =
                [part(&arrays[0])?, part(&arrays[1])?, part(&arrays[2])?, part(&arrays[3])?];
            if rates.gradient_scale != 1.0 {
                let _ = gradient.f_mul_scalar_(rates.gradient_scale)?;
            }
            let _ = first.f_lerp_(&gradient, 1.0 - rates.hyper.beta1)?;
            let _ = second.f_lerp_(&gradient.f_square()?, 1.0 - rates.hyper.beta2)?;
            let mut divisor = second.f_sqrt()?;
            let mut divisor = divisor.f_mul_scalar_(rates.second_scale)?;
            let mut divisor = divisor.f_add_scalar_(self.epsilon)?;
            // -step_size * first / divisor, in the divisor's memory.
            let mut step = divisor.f_reciprocal_()?;
            let mut step = step.f_mul_(&first)?;
            let step = step.f_mul_scalar_(-rates.step_size)?;
            if decay != 1.0 {
                let _ = weight.f_mul_scalar_(decay)?;
            }
            let _ = weight.f_add_(&step)?;
            if let Some(average) = &average {
                let _ = part(average)?.f_lerp_(&weight, 1.0 - rates.average_decay)?;
            }
            let _ = gradient.f_zero_()?;
        }
        if !self.is_f32() {
            self.parameter.f_copy_(&self.master)?;
        }
        Ok(())
    }
}

/// Of the same content in memory of its own.
pub(crate) fn copy_of(tensor: &Tensor) -> Result<Tensor, TchError> {
    let mut copy = tensor.f_empty_like()?;
    copy.f_copy_(tensor)?;
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use retort_llama::normal;
    use tch::Device;

    use super::*;

    const LR: f64 = 3e-3;

    fn parameters(kind: Kind) -> Vec<(String, Tensor)> {
        let leaf = |name: &str, shape: &[i64], stream| {
            let drawn = normal(shape, 1.0, (1, stream)).unwrap();
            (name.to_owned(), drawn.to_kind(kind).set_requires_grad(true))
        };
        vec![leaf("matrix", &[300, 250], 0), leaf("norm", &[17], 1), leaf(EMBEDDINGS, &[30, 20], 2)]
    }

    fn hyper() -> Hyper {
        Hyper { weight_decay: 0.1, ..Hyper::of(&Train::default()) }
    }

    /// A loss whose gradient changes with the step.
    fn backward(parameters: &[(String, Tensor)], step: i64) {
        for (_, parameter) in parameters {
            ((parameter - 0.1 * step as f64).pow_tensor_scalar(3).sum(Kind::Float)).backward();
        }
    }

    #[test]
    fn updates_are_those_of_the_papers_formula() {
        let parameters = parameters(Kind::Float);
        let hyper = Hyper { beta1: 0.8, beta2: 0.9, epsilon: 1e-3, embedding_epsilon: 0.7, ..hyper() };
        let own = |parameters: &[(String, Tensor)]| -> Vec<(String, Tensor)> {
            parameters.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
        };
        let mut optimizer = AdamW::new(own(&parameters), hyper).unwrap();
        let zeros =
            || parameters.iter().map(|(_, p)| p.detach().to_kind(Kind::Double).zeros_like()).collect::<Vec<_>>();
        let mut expected: Vec<Tensor> =
            parameters.iter().map(|(_, p)| p.detach().to_kind(Kind::Double).copy()).collect();
        let (mut first, mut second) = (zeros(), zeros());
        for step in 1..=5 {
            backward(&parameters, step);
            let norm = optimizer.gradient_norm().unwrap();
            let mut squares = 0.0;
            for (i, (_, parameter)) in parameters.iter().enumerate() {
                let g = parameter.grad().to_kind(Kind::Double) * 0.5;
                squares += 4.0 * g.square().sum(Kind::Double).double_value(&[]);
                first[i] = &first[i] * 0.8 + &g * 0.2;
                second[i] = &second[i] * 0.9 + g.square() * 0.1;
                let corrected = &first[i] / (1.0 - 0.8f64.powi(step as i32));
                let epsilon = [1e-3, 1e-3, 0.7][i];
                let divisor = (&second[i] / (1.0 - 0.9f64.powi(step as i32))).sqrt() + epsilon;
                let decay = if i == 1 { 1.0 } else { 1.0 - LR * 0.1 };
                expected[i] = &expected[i] * decay - corrected / divisor * LR;
            }
            assert!((norm / squares.sqrt() - 1.0).abs() < 1e-5);
            optimizer.update(LR, 0.5).unwrap();
            for ((_, parameter), expected) in parameters.iter().zip(&expected) {
                assert!((parameter.detach() - expected).abs().max().double_value(&[]) < 1e-6);
                assert_eq!(parameter.grad().abs().max().double_value(&[]), 0.0);
            }
        }
    }

    #[test]
    fn restored_in_mid_run_it_ends_with_the_same_bytes() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let run = |stop: Option<i64>| {
                let mut parameters = parameters(kind);
                let mut optimizer =
                    AdamW::new(parameters.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect(), hyper())
                        .unwrap();
                for step in 0..6 {
                    if Some(step) == stop {
                        let saved: Vec<_> = optimizer.state().iter().map(|(n, t)| (n.clone(), t.copy())).collect();
                        let fresh: Vec<(String, Tensor)> = parameters
                            .iter()
                            .map(|(n, t)| (n.clone(), t.detach().copy().set_requires_grad(true)))
                            .collect();
                        let at = optimizer.step();
                        optimizer =
                            AdamW::new(fresh.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect(), hyper())
                                .unwrap();
                        optimizer.restore(at, &saved).unwrap();
                        parameters = fresh;
                    }
                    backward(&parameters, step);
                    optimizer.collect().unwrap();
                    optimizer.update(LR, 1.0).unwrap();
                }
                parameters
            };
            for ((_, straight), (_, resumed)) in run(None).iter().zip(run(Some(3))) {
                assert!(straight.detach().equal(&resumed.detach()));
            }
        }
    }

    #[test]
    fn averages_follow_the_weights_and_take_their_place_for_a_while() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let parameters = parameters(kind);
            let own = parameters.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
            let mut optimizer = AdamW::new(own, Hyper { average_decay: 0.9, ..hyper() }).unwrap();
            let master = |optimizer: &AdamW| optimizer.masters()[0].1.to_kind(Kind::Double).copy();
            let mut expected = master(&optimizer);
            for step in 1..=100 {
                backward(&parameters, step);
                optimizer.collect().unwrap();
                optimizer.update(LR, 1.0).unwrap();
                let decay = (0.9f64).min((1.0 + step as f64) / (10.0 + step as f64));
                expected = expected * decay + master(&optimizer) * (1.0 - decay);
            }
            let furthest = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
            let (weights, shown_before) = (master(&optimizer), parameters[0].1.detach().copy());
            optimizer.show_averages(true).unwrap();
            let rounding = if kind == Kind::Float { 1e-5 } else { 2e-2 };
            assert!(furthest(&parameters[0].1.detach().to_kind(Kind::Double), &expected) < rounding);
            assert!(furthest(&weights, &expected) > 1e-2, "an average that is the weights shows nothing");
            optimizer.show_averages(false).unwrap();
            assert!(parameters[0].1.detach().equal(&shown_before));
            assert_eq!(furthest(&master(&optimizer), &weights), 0.0);
        }
    }

    #[test]
    fn a_state_of_another_model_is_refused() {
        let mut optimizer = AdamW::new(parameters(Kind::Float), hyper()).unwrap();
        let mut state: Vec<_> = optimizer.state().iter().map(|(n, t)| (n.clone(), t.copy())).collect();
        state[0].1 = Tensor::zeros([2, 2], (Kind::Float, Device::Cpu));
        assert!(optimizer.restore(1, &state).unwrap_err().contains("first.matrix"));
        state.pop();
        assert!(optimizer.restore(1, &state).unwrap_err().contains("5 tensors"));
    }
}
