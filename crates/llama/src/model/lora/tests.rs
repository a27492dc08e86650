use std::collections::HashMap;

use super::{
    super::{
        Masks,
        tests::{config, difference, random},
    },
    *,
};
use crate::Config;

const LENGTHS: [i64; 3] = [9, 9, 4];
const MASKS: Masks = Masks { step: 3, micro_batch: 1 };

fn lora() -> Lora {
    Lora { rank: 3, alpha: 7.5, targets: vec![LoraTarget::VProj, LoraTarget::OProj, LoraTarget::DownProj], ..all() }
}

fn all() -> Lora {
    Lora { rank: 3, alpha: 7.5, ..Lora::default() }
}

fn ids_n() -> Tensor {
    (Tensor::arange(22, (Kind::Int64, Device::Cpu)) * 7 + 3).remainder(50)
}

/// A plain model and the same with adapters whose `B` is not zero.
fn pair(lora: &Lora) -> (Model, Model) {
    let plain = random(Config { qkv_bias: true, output_bias: true, ..config() });
    let own = plain.prune_layers(&[0, 1, 2, 3]).unwrap();
    let adapted = own.adapt(lora, 5).unwrap();
    for (at, (_, mut tensor)) in adapted.adapters().into_iter().enumerate() {
        let numbers = Tensor::arange(tensor.numel() as i64, (Kind::Float, Device::Cpu)) * 0.7 + at as f64;
        no_grad(|| tensor.copy_(&(numbers.sin() * 0.2).view_(tensor.size())));
    }
    (plain, adapted)
}

/// A projection's name, and its adapter's `A` and `B`.
fn by_projection(model: &Model) -> HashMap<String, (Tensor, Tensor)> {
    let adapters = model.adapters();
    let name = |name: &str| name.strip_prefix("base_model.model.").unwrap().replace(".lora_A", "");
    adapters.chunks(2).map(|pair| (name(&pair[0].0), (pair[0].1.shallow_clone(), pair[1].1.shallow_clone()))).collect()
}

/// Adds to the plain model's weights what the adapters' products come to.
fn merge(plain: &Model, adapted: &Model) {
    let adapters = by_projection(adapted);
    for (name, mut weight) in plain.parameters() {
        if let Some((a, b)) = adapters.get(&name) {
            let _ = no_grad(|| weight.f_add_(&(b.matmul(a) * 2.5)).unwrap());
        }
    }
}

#[test]
fn new_adapters_do_nothing_and_others_are_their_products_added_to_the_weights() {
    for lora in [lora(), all()] {
        let (plain, adapted) = pair(&lora);
        let hidden = |model: &Model| tch::no_grad(|| model.hidden_packed(&ids_n(), &LENGTHS).unwrap());
        let fresh = plain.prune_layers(&[0, 1, 2, 3]).unwrap().adapt(&lora, 5).unwrap();
        assert!(difference(&hidden(&fresh), &hidden(&plain)) == 0.0);
        assert!(difference(&hidden(&adapted), &hidden(&plain)) > 0.1);
        merge(&plain, &adapted);
        assert!(difference(&hidden(&adapted), &hidden(&plain)) < 1e-4);
        // And so does the folder that is written.
        let dir = tempfile::tempdir().unwrap();
        adapted.save(dir.path(), Kind::Float).unwrap();
        let read = Model::load(dir.path(), Device::Cpu, Kind::Float).unwrap();
        assert!(difference(&hidden(&adapted), &hidden(&read)) < 1e-4);
        for ((name, a), (_, b)) in plain.parameters().iter().zip(read.parameters()) {
            assert!(difference(a, &b) < 1e-6, "{name}");
        }
    }
}

/// With `W + s B A` for a weight, its gradient `G` gives `s B^T G` for `A` and `s G A^T` for `B`.
fn check_gradients(dense: &Model, adapted: &Model, of: &str) {
    dense.set_trainable(true);
    dense.hidden_packed(&ids_n(), &LENGTHS).unwrap().pow_tensor_scalar(3).sum(Kind::Float).backward();
    let dense: HashMap<String, Tensor> = dense.parameters().into_iter().collect();
    let adapters = by_projection(adapted);
    assert!(!adapters.is_empty());
    for (name, (a, b)) in adapters {
        let grad = dense[&name].grad();
        for (what, got, expected) in
            [("A", a.grad(), b.detach().tr().matmul(&grad) * 2.5), ("B", b.grad(), grad.matmul(&a.detach().tr()) * 2.5)]
        {
            let (apart, largest) = (difference(&got, &expected), expected.abs().max().double_value(&[]));
            assert!(apart < 1e-4 * largest.max(0.1), "{of}, {name} {what}: {apart} of {largest}");
        }
    }
}

#[test]
fn gradients_are_those_of_the_merged_weights_by_the_chain_rule() {
    for lora in [lora(), all()] {
        let (plain, adapted) = pair(&lora);
        adapted.hidden_packed(&ids_n(), &LENGTHS).unwrap().pow_tensor_scalar(3).sum(Kind::Float).backward();
        merge(&plain, &adapted);
        check_gradients(&plain, &adapted, "autograd");
        assert!(adapted.parameters().iter().all(|(_, tensor)| !tensor.requires_grad()));
    }
}

#[test]
fn a_base_in_bytes_is_near_and_its_gradients_are_those_of_the_rounded_weights() {
    let (plain, adapted) = pair(&Lora { base: LoraBase::Int8, ..lora() });
    assert!(adapted.is_narrow());
    let (hidden_nh, tape) = adapted.hidden_taped(&adapted.embedded(&ids_n()).unwrap(), &LENGTHS, None, true).unwrap();
    let _ = adapted.backward(tape, &(hidden_nh.square() * 3.0)).unwrap();
    let held: i64 = adapted.parameters().iter().map(|(_, tensor)| tensor.numel() as i64).sum();
    assert!(held < 4000, "{held} numbers are held wide");
    // What a file says of the rounded base and the adapters together.
    let dir = tempfile::tempdir().unwrap();
    adapted.save(dir.path(), Kind::Float).unwrap();
    let rounded = Model::load(dir.path(), Device::Cpu, Kind::Float).unwrap();
    let adapters = by_projection(&adapted);
    for ((name, was), (_, is)) in plain.parameters().into_iter().zip(rounded.parameters()) {
        if !name.ends_with("_proj.weight") {
            assert!(difference(&was, &is) == 0.0, "{name}");
            continue;
        }
        let is = adapters.get(&name).map_or(is.shallow_clone(), |(a, b)| &is - b.detach().matmul(&a.detach()) * 2.5);
        let step = was.abs().amax(1, true) / 127.0;
        let most = ((&was - is).abs() / step).max().double_value(&[]);
        assert!((0.1..0.501).contains(&most), "{name}: {most} of a step");
    }
    check_gradients(&rounded, &adapted, "int8");
    assert!(difference(&hidden_nh, &rounded.hidden_packed(&ids_n(), &LENGTHS).unwrap()) < 1e-4);
}

/// Read narrow or made narrow, it is the same base.
#[test]
fn a_base_read_in_bytes_is_the_one_made_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let plain = random(config());
    for kind in [Kind::Float, Kind::BFloat16] {
        plain.save(dir.path(), kind).unwrap();
        for base in [LoraBase::Model, LoraBase::Int8] {
            let lora = Lora { base, ..all() };
            let made = Model::load(dir.path(), Device::Cpu, kind).unwrap().adapt(&lora, 5).unwrap();
            let read = Model::load_adapted(dir.path(), (Device::Cpu, kind), &lora, 5).unwrap();
            for (name, _) in plain.parameters() {
                assert!(made.merged(&name).unwrap().equal(&read.merged(&name).unwrap()), "{base:?} {name}");
            }
            let hidden = |model: &Model| model.hidden_packed(&ids_n(), &LENGTHS).unwrap().detach();
            assert!(hidden(&made).equal(&hidden(&read)));
        }
    }
}

#[test]
fn nothing_is_dropped_where_nobody_trains() {
    let (_, adapted) = pair(&Lora { dropout: 0.25, ..all() });
    let embedded_nh = adapted.embedded(&ids_n()).unwrap();
    let hidden = |masks| adapted.hidden_masked(&embedded_nh, &LENGTHS, masks).unwrap().detach();
    assert!(hidden(None).equal(&adapted.hidden_packed(&ids_n(), &LENGTHS).unwrap().detach()));
    assert!(hidden(Some(MASKS)).equal(&hidden(Some(MASKS))));
    assert!(difference(&hidden(Some(MASKS)), &hidden(None)) > 0.01);
    assert!(difference(&hidden(Some(MASKS)), &hidden(Some(Masks { step: 4, ..MASKS }))) > 0.01);
}

#[test]
fn a_block_computed_twice_has_the_same_masks() {
    let (_, adapted) = pair(&Lora { dropout: 0.25, ..all() });
    let take = || -> Vec<Tensor> {
        adapted.adapters().iter().map(|(_, tensor)| (tensor.grad().copy(), tensor.grad().zero_()).0).collect()
    };
    let embedded_nh = adapted.embedded(&ids_n()).unwrap();
    let taped = |recomputed| {
        let (hidden_nh, tape) = adapted.hidden_taped(&embedded_nh, &LENGTHS, Some(MASKS), recomputed).unwrap();
        let grad_nh = hidden_nh.square() * 3.0;
        let _ = adapted.backward(tape, &grad_nh).unwrap();
        (take(), grad_nh)
    };
    let ((twice, grad_nh), (once, _)) = (taped(true), taped(false));
    (adapted.hidden_masked(&embedded_nh, &LENGTHS, Some(MASKS)).unwrap() * grad_nh).sum(Kind::Float).backward();
    for ((twice, once), whole) in twice.iter().zip(&once).zip(take()) {
        assert!(twice.equal(once));
        assert!(difference(twice, &whole) < 1e-4 * whole.abs().max().double_value(&[]).max(0.1));
    }
}

#[test]
fn adapters_are_written_and_read_back_as_peft_names_them() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, adapted) = pair(&lora());
    adapted.save_adapters(dir.path()).unwrap();
    let fresh = plain.prune_layers(&[0, 1, 2, 3]).unwrap().adapt(&lora(), 6).unwrap();
    fresh.load_adapters(dir.path()).unwrap();
    for ((name, a), (_, b)) in adapted.adapters().iter().zip(fresh.adapters()) {
        assert!(a.detach().equal(&b.detach()), "{name}");
    }
    let names: Vec<String> = adapted.adapters().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), 4 * 3 * 2);
    assert_eq!(names[0], "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight");
    assert_eq!(names[23], "base_model.model.model.layers.3.mlp.down_proj.lora_B.weight");
    let config: serde_json::Value = serde_json::from_slice(&fs::read(dir.path().join(CONFIG)).unwrap()).unwrap();
    assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(3), &json!(7.5)));
    assert_eq!(config["target_modules"], json!(["v_proj", "o_proj", "down_proj"]));

    // Of other targets, of another rank, and none at all.
    for other in [all(), Lora { rank: 4, ..lora() }] {
        let other = plain.prune_layers(&[0, 1, 2, 3]).unwrap().adapt(&other, 6).unwrap();
        assert!(matches!(other.load_adapters(dir.path()), Err(Error::Malformed { .. })));
    }
    assert!(matches!(plain.save_adapters(dir.path()), Err(Error::Invalid(_))));
}

#[test]
fn what_cannot_be_adapted_is_refused() {
    let model = |lora: &Lora| random(config()).adapt(lora, 0);
    let wide = model(&Lora { rank: 25, ..all() }).unwrap_err().to_string();
    assert!(wide.contains("student.lora.rank is 25, more than the student's hidden_size of 24"), "{wide}");
    assert!(model(&Lora { rank: 0, ..all() }).is_err());
    let adapted = model(&all()).unwrap();
    assert!(matches!(adapted.prune_layers(&[0]), Err(Error::Invalid(_))));
    assert!(matches!(adapted.adapt(&all(), 0), Err(Error::Invalid(_))));
}
