//! Low-rank adapters beside a block's projections (Hu et al., "LoRA: Low-Rank Adaptation of Large Language
//! Models", 2021), and the random masks of their inputs.
//!
//! Shapes: `r` an adapter's rank, `i` and `o` its projection's inputs and outputs, the letters of the crate.

use retort_core::{
    random::{Counter, Purpose},
    spec::{Lora, LoraTarget},
};
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// Names the masks of one forward pass: the same name draws the same ones, on any device and however often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Masks {
    /// Optimiser steps done.
    pub step: u32,
    /// Of the step.
    pub micro_batch: u32,
}

/// `alpha / rank * B A x`.
#[derive(Debug)]
pub(crate) struct Adapter {
    down_ri: Tensor,
    up_or: Tensor,
    scale: f64,
    dropout: Dropout,
}

/// What of an adapter's input is zero while it trains.
#[derive(Clone, Copy, Debug)]
struct Dropout {
    seed: u64,
    /// Layer and target, as one number.
    place: u64,
    /// Of 65,536 numbers, how many are dropped on average.
    threshold: u64,
}

impl Adapter {
    /// Does nothing yet: `B` is zero. `A` is uniform within `1 / sqrt(i)`, as PEFT's is. Both in the kind of
    /// the model, `weight_oi` its projection's weight in any.
    pub(super) fn new(
        lora: &Lora,
        (layer, target): (usize, LoraTarget),
        weight_oi: &Tensor,
        kind: Kind,
        seed: u64,
    ) -> Result<Self> {
        let (outputs, inputs) = weight_oi.size2()?;
        let (rank, device) = (i64::from(lora.rank), weight_oi.device());
        let place = (layer as u64) << 8 | target as u64;
        let mut random = Counter::new(seed, Purpose::Adapter, 0, place);
        let bound = 1.0 / (inputs as f64).sqrt();
        let count = (rank * inputs).unsigned_abs() as usize;
        let drawn: Vec<f32> = (0..count).map(|_| (bound * (2.0 * random.next_f64() - 1.0)) as f32).collect();
        let threshold = (lora.dropout * 65_536.0).round() as u64;
        Ok(Self {
            down_ri: Tensor::f_from_slice(&drawn)?.f_view([rank, inputs])?.f_to_device(device)?.f_to_kind(kind)?,
            up_or: Tensor::f_zeros([outputs, rank], (kind, device))?,
            scale: lora.alpha / f64::from(lora.rank),
            dropout: Dropout { seed, place, threshold },
        })
    }

    /// What is added to the projection's output; without `masks` nothing is dropped.
    pub(super) fn forward(&self, input: &Tensor, masks: Option<Masks>) -> Result<Tensor> {
        let inner = match masks.filter(|_| self.dropout.threshold > 0) {
            None => input.f_linear(&self.down_ri, None::<&Tensor>)?.f_mul_scalar(self.scale)?,
            Some(masks) => {
                let dropped = self.dropout.draw(masks, &input.size(), input.device())?;
                // The mask takes a byte a number, where a factor would take four.
                let kept = input.f_masked_fill(&dropped, 0.0)?;
                kept.f_linear(&self.down_ri, None::<&Tensor>)?.f_mul_scalar(self.scale / self.dropout.kept())?
            }
        };
        Ok(inner.f_linear(&self.up_or, None::<&Tensor>)?)
    }

    /// `alpha / rank * B A`, f32 `[o, i]`.
    pub(super) fn product(&self) -> Result<Tensor> {
        let wide = |tensor: &Tensor| tensor.f_detach()?.f_to_kind(Kind::Float);
        Ok(wide(&self.up_or)?.f_matmul(&wide(&self.down_ri)?)?.f_mul_scalar(self.scale)?)
    }

    /// `A` and `B` by PEFT's names for them.
    pub(super) fn tensors(&self) -> [(&'static str, &Tensor); 2] {
        [("lora_A", &self.down_ri), ("lora_B", &self.up_or)]
    }
}

impl Dropout {
    /// The share that is kept, as it is drawn.
    fn kept(self) -> f64 {
        1.0 - self.threshold as f64 / 65_536.0
    }

    /// True where a number is dropped; each draw of the counter says it of four.
    fn draw(self, masks: Masks, shape: &[i64], device: Device) -> Result<Tensor> {
        let count: i64 = shape.iter().product();
        let count = usize::try_from(count).map_err(|_| Error::Invalid(format!("a mask of shape {shape:?}")))?;
        let pass = u64::from(masks.step) << 32 | u64::from(masks.micro_batch);
        let mut random = Counter::new(self.seed, Purpose::Dropout, pass, self.place);
        let mut dropped = vec![0u8; count];
        for four in dropped.chunks_mut(4) {
            let bits = random.next_u64();
            for (at, number) in four.iter_mut().enumerate() {
                *number = u8::from((bits >> (16 * at)) & 0xffff < self.threshold);
            }
        }
        Ok(Tensor::f_from_data_size(&dropped, shape, Kind::Bool)?.f_to_device(device)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MASKS: Masks = Masks { step: 3, micro_batch: 1 };
    const SHAPE: [i64; 2] = [401, 25];

    fn adapter(seed: u64, layer: usize, target: LoraTarget) -> Adapter {
        let lora = Lora { rank: 2, dropout: 0.25, ..Lora::default() };
        let weight_oi = Tensor::zeros([30, SHAPE[1]], (Kind::Float, Device::Cpu));
        Adapter::new(&lora, (layer, target), &weight_oi, Kind::Float, seed).unwrap()
    }

    fn mask(adapter: &Adapter, masks: Masks) -> Tensor {
        adapter.dropout.draw(masks, &SHAPE, Device::Cpu).unwrap()
    }

    #[test]
    fn masks_are_a_function_of_seed_pass_and_place() {
        let here = adapter(9, 1, LoraTarget::KProj);
        let first = mask(&here, MASKS);
        assert!(first.equal(&mask(&here, MASKS)));
        let others = [
            mask(&here, Masks { step: 4, ..MASKS }),
            mask(&here, Masks { micro_batch: 2, ..MASKS }),
            mask(&adapter(9, 2, LoraTarget::KProj), MASKS),
            mask(&adapter(9, 1, LoraTarget::VProj), MASKS),
            mask(&adapter(8, 1, LoraTarget::KProj), MASKS),
        ];
        for other in &others {
            // Two that have nothing to do with each other agree in 0.25^2 + 0.75^2 of the places.
            let alike = first.eq_tensor(other).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
            assert!((alike - 0.625).abs() < 0.02, "{alike}");
            let share = other.to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
            assert!((share - 0.25).abs() < 0.02, "{share}");
        }
    }

    #[test]
    fn what_is_kept_makes_up_for_what_is_dropped() {
        let mut adapter = adapter(9, 1, LoraTarget::KProj);
        adapter.up_or = Tensor::arange(60, (Kind::Float, Device::Cpu)).view([30, 2]) * 0.1;
        let input = Tensor::arange(401 * 25, (Kind::Float, Device::Cpu)).sin().view(SHAPE);
        let kept = &input * mask(&adapter, MASKS).logical_not().to_kind(Kind::Float) / 0.75;
        let expected = kept.matmul(&adapter.product().unwrap().tr());
        let apart = (adapter.forward(&input, Some(MASKS)).unwrap() - &expected).abs().max().double_value(&[]);
        assert!(apart < 1e-3 * expected.abs().max().double_value(&[]), "{apart}");
        let whole = input.matmul(&adapter.product().unwrap().tr());
        let apart = (adapter.forward(&input, None).unwrap() - &whole).abs().max().double_value(&[]);
        assert!(apart < 1e-3 * whole.abs().max().double_value(&[]), "{apart}");
    }

    #[test]
    fn a_new_adapter_is_within_its_bound_and_its_own() {
        let numbers = |adapter: &Adapter| Vec::<f32>::try_from(adapter.down_ri.view([-1])).unwrap();
        let here = numbers(&adapter(9, 1, LoraTarget::KProj));
        assert!(here.iter().all(|x| x.abs() <= 0.2) && here.iter().any(|x| x.abs() > 0.15));
        assert_eq!(here, numbers(&adapter(9, 1, LoraTarget::KProj)));
        assert_ne!(here, numbers(&adapter(9, 1, LoraTarget::VProj)));
        assert_ne!(here, numbers(&adapter(8, 1, LoraTarget::KProj)));
    }
}
