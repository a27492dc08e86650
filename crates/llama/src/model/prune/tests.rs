use super::super::tests::{config, difference, ids_bt, logits, random};
use super::*;

/// 2 of 4 layers, 1 of 2 key-value heads and 1 of its 2 query heads, some channels.
fn cut() -> Cut {
    let layer = |layer, key_value: usize, query, channels: &[usize]| LayerCut {
        layer,
        key_value_heads: vec![key_value],
        query_heads: vec![query],
        channels: channels.to_vec(),
    };
    Cut { layers: vec![layer(1, 0, 1, &[0, 7, 39]), layer(3, 1, 2, &[3, 4, 5])], hidden: vec![0, 2, 3, 10, 15, 23] }
}

fn biased(tie_word_embeddings: bool) -> Model {
    let config = Config { qkv_bias: true, output_bias: true, mlp_bias: true, tie_word_embeddings, ..config() };
    let model = random(config);
    for (at, (_, tensor)) in (0i64..).zip(model.parameters()) {
        // Biases and norms that all differ.
        if tensor.dim() == 1 {
            let numbers =
                Tensor::arange(tensor.numel() as i64, (Kind::Float, tensor.device())) * 0.01 + at as f64 * 0.01;
            tch::no_grad(|| tensor.shallow_clone().copy_(&numbers));
        }
    }
    model
}

fn numbers(model: &Model, name: &str) -> (Vec<i64>, Vec<f32>) {
    let (_, tensor) = model.parameters().into_iter().find(|(known, _)| known == name).unwrap();
    (tensor.size(), Vec::try_from(tensor.reshape([-1])).unwrap())
}

/// Every number of the smaller model, looked up one by one in the larger.
#[test]
fn a_cut_takes_the_numbers_that_a_slow_look_up_finds() {
    for tied in [false, true] {
        let model = biased(tied);
        let cut = cut();
        let pruned = model.prune(&cut).unwrap();
        let heads = |head: &[usize]| -> Vec<usize> { head.iter().flat_map(|head| head * 8..(head + 1) * 8).collect() };
        for (name, tensor) in pruned.parameters() {
            let parts: Vec<&str> = name.split('.').collect();
            let (source, layer) = match parts[..] {
                ["model", "layers", at, ..] => {
                    let layer = &cut.layers[at.parse::<usize>().unwrap()];
                    (name.replacen(&format!("layers.{at}"), &format!("layers.{}", layer.layer), 1), Some(layer))
                }
                _ => (name.clone(), None),
            };
            let (shape, whole) = numbers(&model, &source);
            let all: Vec<usize> = (0..50).collect();
            let (outputs, inputs, scale) = match (layer, parts[parts.len() - 2]) {
                (None, "norm") => (cut.hidden.clone(), vec![0], 2.0),
                (None, _) => (all, cut.hidden.clone(), 1.0),
                // 24 channels to 6.
                (Some(_), "input_layernorm" | "post_attention_layernorm") => (cut.hidden.clone(), vec![0], 2.0),
                (Some(layer), "q_proj") => (heads(&layer.query_heads), cut.hidden.clone(), 1.0),
                (Some(layer), "k_proj" | "v_proj") => (heads(&layer.key_value_heads), cut.hidden.clone(), 1.0),
                (Some(layer), "o_proj") => (cut.hidden.clone(), heads(&layer.query_heads), 1.0),
                (Some(layer), "down_proj") => (cut.hidden.clone(), layer.channels.clone(), 1.0),
                (Some(layer), _) => (layer.channels.clone(), cut.hidden.clone(), 1.0),
            };
            let expected: Vec<f32> = match shape[..] {
                [_] => outputs.iter().map(|&at| whole[at] * scale).collect(),
                [_, columns] => outputs
                    .iter()
                    .flat_map(|row| inputs.iter().map(move |column| row * columns as usize + column))
                    .map(|at| whole[at])
                    .collect(),
                _ => panic!("{name} {shape:?}"),
            };
            assert_eq!(Vec::<f32>::try_from(tensor.reshape([-1])).unwrap(), expected, "{name}");
        }
        let config = pruned.config();
        assert_eq!((config.num_hidden_layers, config.hidden_size, config.intermediate_size), (2, 6, 3));
        assert_eq!((config.num_attention_heads, config.num_key_value_heads, config.head_dim), (1, 1, 8));
        assert_eq!(pruned.parameters().iter().any(|(name, _)| name == "lm_head.weight"), !tied);
        let _ = pruned.hidden(&ids_bt(2, 5)).unwrap();
    }
}

/// Sets to zero all that writes into what `cut` leaves out, in the layers that it keeps.
fn silence(model: &Model, cut: &Cut) {
    let kept = |kept: &[usize], size: i64, run: i64| -> Tensor {
        let mask: Vec<f32> =
            (0..size * run).map(|at| f32::from(u8::from(kept.contains(&((at / run) as usize))))).collect();
        Tensor::from_slice(&mask)
    };
    let config = model.config().clone();
    let hidden_h = kept(&cut.hidden, config.hidden_size, 1);
    for (name, tensor) in model.parameters() {
        let mut tensor = tensor.shallow_clone();
        let mut mask = |mask: &Tensor| {
            let _ = tch::no_grad(|| tensor.g_mul_(mask));
        };
        if name == "model.embed_tokens.weight" {
            mask(&hidden_h);
        }
        for layer in &cut.layers {
            let heads_i = kept(&layer.query_heads, config.num_attention_heads, config.head_dim);
            let inner_i = kept(&layer.channels, config.intermediate_size, 1);
            let of = |part: &str| name == format!("model.layers.{}.{part}", layer.layer);
            if of("self_attn.o_proj.weight") {
                mask(&(hidden_h.unsqueeze(1) * heads_i.unsqueeze(0)));
            } else if of("mlp.down_proj.weight") {
                mask(&(hidden_h.unsqueeze(1) * inner_i.unsqueeze(0)));
            } else if of("self_attn.o_proj.bias") || of("mlp.down_proj.bias") {
                mask(&hidden_h);
            }
        }
    }
}

/// What did nothing is missed by nobody: not even by a norm, whose mean is now over fewer channels.
#[test]
fn without_heads_and_channels_that_are_zero_the_logits_stay() {
    for tied in [false, true] {
        let model = biased(tied);
        let whole = model.config().clone();
        let hidden: Vec<usize> = (0..24).filter(|channel| channel % 3 != 1).collect();
        let layers = (0..4)
            .map(|layer| LayerCut {
                layer,
                key_value_heads: vec![layer % 2],
                query_heads: vec![2 * (layer % 2) + usize::from(layer > 1)],
                channels: (layer..40).step_by(2).take(18).collect(),
            })
            .collect();
        let cut = Cut { layers, hidden };
        silence(&model, &cut);
        let ids = ids_bt(3, 9);
        let before = logits(&model, &ids);
        let pruned = model.prune(&cut).unwrap();
        assert!(pruned.config().parameters() < whole.parameters() / 2);
        let (apart, size) = (difference(&before, &logits(&pruned, &ids)), before.abs().max().double_value(&[]));
        assert!(apart < 1e-5 * size, "{apart} of {size}");
    }
}

#[test]
fn a_cut_that_makes_no_model_is_refused() {
    let model = random(config());
    let refuse = |change: &dyn Fn(&mut Cut), expected: &str| {
        let mut cut = cut();
        change(&mut cut);
        let error = model.prune(&cut).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    refuse(&|cut| cut.hidden = vec![3, 24], "hidden channels [3, 24] cannot be kept: name some of 0 to 23");
    refuse(&|cut| cut.hidden.clear(), "hidden channels [] cannot be kept");
    refuse(&|cut| cut.layers[0].channels = vec![2, 1, 3], "channels [2, 1, 3] cannot be kept");
    refuse(&|cut| cut.layers[0].query_heads = vec![2], "query heads [2] cannot be kept with key-value heads [0]");
    refuse(
        &|cut| cut.layers[0].key_value_heads = vec![0, 1],
        "query heads [1] cannot be kept with key-value heads [0, 1]",
    );
    refuse(&|cut| cut.layers[1].query_heads = vec![2, 3], "layer 3 keeps [1, 2, 3] key-value heads");
    refuse(&|cut| cut.layers[1].layer = 0, "layers [1, 0] cannot be kept");
}
