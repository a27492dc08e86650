use super::*;
use crate::{Architecture, Llama3Scaling, folder_sha256, greedy};

pub(super) fn config() -> Config {
    Config {
        architecture: Architecture::Llama,
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        vocab_size: 50,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: Some(Llama3Scaling {
            factor: 4.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 16,
        }),
        max_position_embeddings: 64,
        tie_word_embeddings: false,
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        sliding_window: None,
        initializer_range: 0.2,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
        pad_token_id: None,
    }
}

pub(super) fn random(config: Config) -> Model {
    Model::init(config, Device::Cpu, Kind::Float, 11).unwrap()
}

pub(super) fn ids_bt(rows: i64, tokens: i64) -> Tensor {
    (Tensor::arange(rows * tokens, (Kind::Int64, Device::Cpu)) * 7 + 3).remainder(50).view([rows, tokens])
}

pub(super) fn logits(model: &Model, ids_bt: &Tensor) -> Tensor {
    model.head(&model.hidden(ids_bt).unwrap()).unwrap()
}

pub(super) fn difference(one: &Tensor, other: &Tensor) -> f64 {
    (one - other).abs().max().double_value(&[])
}

#[allow(clippy::assign_op_pattern)] // `+=` would write into a tensor that the gradient needs
/// The whole model once more, from the papers and with nothing fused: every position's scores as a
/// matrix, keys and values repeated for their query heads, pairs turned one by one.
fn obvious_logits(model: &Model, ids_bt: &Tensor) -> Tensor {
    let config = model.config();
    let tensors: HashMap<String, Tensor> = model.parameters().into_iter().collect();
    let (rows, tokens) = ids_bt.size2().unwrap();
    let (heads, groups, size) = (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
    let norm = |x: &Tensor, name: &str| {
        let scale = (x.square().mean_dim(-1, true, Kind::Float) + config.rms_norm_eps).rsqrt();
        x * scale * &tensors[name]
    };
    let turn = |x: &Tensor| {
        let halves: Vec<Tensor> = (0..tokens)
            .map(|position| {
                let x = x.select(2, position);
                let (mut first, mut second) = (Vec::new(), Vec::new());
                for pair in 0..size / 2 {
                    let angle = position as f64 * frequency(config, pair);
                    let (a, b) = (x.select(-1, pair), x.select(-1, pair + size / 2));
                    first.push(&a * angle.cos() - &b * angle.sin());
                    second.push(&a * angle.sin() + &b * angle.cos());
                }
                first.append(&mut second);
                Tensor::stack(&first, -1)
            })
            .collect();
        Tensor::stack(&halves, 2)
    };
    let mut hidden = tensors["model.embed_tokens.weight"].index_select(0, &ids_bt.view(-1)).view([rows, tokens, -1]);
    for layer in 0..config.num_hidden_layers {
        let weight = |name: &str| tensors[&format!("model.layers.{layer}.{name}.weight")].transpose(0, 1);
        let split = |x: Tensor, count: i64| x.view([rows, tokens, count, size]).transpose(1, 2);
        let normed = norm(&hidden, &format!("model.layers.{layer}.input_layernorm.weight"));
        let query = turn(&split(normed.matmul(&weight("self_attn.q_proj")), heads));
        let key = turn(&split(normed.matmul(&weight("self_attn.k_proj")), groups));
        let value = split(normed.matmul(&weight("self_attn.v_proj")), groups);
        let key = key.repeat_interleave_self_int(heads / groups, 1, None);
        let value = value.repeat_interleave_self_int(heads / groups, 1, None);
        let scores = query.matmul(&key.transpose(2, 3)) / (size as f64).sqrt();
        let future = Tensor::ones([tokens, tokens], (Kind::Bool, Device::Cpu)).triu(1);
        let mixed = scores.masked_fill(&future, f64::NEG_INFINITY).softmax(-1, Kind::Float).matmul(&value);
        let mixed = mixed.transpose(1, 2).reshape([rows, tokens, heads * size]);
        hidden = hidden + mixed.matmul(&weight("self_attn.o_proj"));
        let normed = norm(&hidden, &format!("model.layers.{layer}.post_attention_layernorm.weight"));
        let gate = normed.matmul(&weight("mlp.gate_proj"));
        let inner = &gate * gate.sigmoid() * normed.matmul(&weight("mlp.up_proj"));
        hidden = hidden + inner.matmul(&weight("mlp.down_proj"));
    }
    norm(&hidden, "model.norm.weight").matmul(&model.head_weight().transpose(0, 1))
}

fn frequency(config: &Config, pair: i64) -> f64 {
    let frequency = config.rope_theta.powf(-2.0 * pair as f64 / config.head_dim as f64);
    let Some(scaling) = &config.rope_scaling else { return frequency };
    let turns = scaling.original_max_position_embeddings as f64 * frequency / std::f64::consts::TAU;
    let share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
    let share = share.clamp(0.0, 1.0);
    (1.0 - share) * frequency / scaling.factor + share * frequency
}

#[test]
fn logits_and_gradients_are_those_of_the_obvious_model() {
    for tie_word_embeddings in [false, true] {
        let model = random(Config { tie_word_embeddings, ..config() });
        model.set_trainable(true);
        let ids_bt = ids_bt(2, 40);
        let weights_btv = (Tensor::arange(2 * 40 * 50, (Kind::Float, Device::Cpu)) * 0.37).sin().view([2, 40, 50]);
        let gradients = |logits_btv: Tensor| {
            (logits_btv * &weights_btv).sum(Kind::Float).backward();
            model
                .parameters()
                .into_iter()
                .map(|(name, mut tensor)| {
                    let gradient = tensor.grad().copy();
                    tensor.zero_grad();
                    (name, gradient)
                })
                .collect::<Vec<_>>()
        };
        let (fast, slow) = (logits(&model, &ids_bt), obvious_logits(&model, &ids_bt));
        assert!(difference(&fast, &slow) < 1e-4, "{}", difference(&fast, &slow));
        for ((name, fast), (_, slow)) in gradients(fast).into_iter().zip(gradients(slow)) {
            let scale = slow.abs().max().double_value(&[]);
            assert!(scale > 0.0, "{name} gets no gradient");
            assert!(difference(&fast, &slow) < 1e-4 * scale.max(1.0), "{name}: {}", difference(&fast, &slow));
        }
    }
}

#[test]
fn padding_on_the_right_disturbs_nobody() {
    let model = random(config());
    let ids = ids_bt(1, 12);
    let padded = Tensor::cat(&[&ids, &Tensor::full([1, 9], 5, (Kind::Int64, Device::Cpu))], 1);
    let (alone, beside) = tch::no_grad(|| (logits(&model, &ids), logits(&model, &padded).narrow(1, 0, 12)));
    assert!(difference(&alone, &beside) < 1e-5);
}

/// The rounding of bf16 and no more: its mantissa has eight bits.
#[test]
fn bf16_stays_near_f32() {
    let dir = tempfile::tempdir().unwrap();
    random(config()).save(dir.path(), Kind::BFloat16).unwrap();
    let load = |kind| Model::load(dir.path(), Device::Cpu, kind).unwrap();
    let (wide, narrow) = (load(Kind::Float), load(Kind::BFloat16));
    let ids_bt = ids_bt(2, 20);
    let (wide_btv, narrow_btv) = tch::no_grad(|| (logits(&wide, &ids_bt), logits(&narrow, &ids_bt)));
    assert_eq!(narrow_btv.kind(), Kind::BFloat16);
    let scale = wide_btv.abs().max().double_value(&[]);
    assert!(difference(&wide_btv, &narrow_btv) < 0.05 * scale, "{} of {scale}", difference(&wide_btv, &narrow_btv));

    let mut cache = KvCache::new(narrow.config(), 2, 20, Device::Cpu, Kind::BFloat16).unwrap();
    let _ = narrow.prefill(&ids_bt.narrow(1, 0, 19), &[19, 12], &mut cache).unwrap();
    let hidden_bh = narrow.decode(&ids_bt.select(1, 19), &mut cache).unwrap();
    let cached_v = tch::no_grad(|| narrow.head(&hidden_bh)).unwrap().get(0);
    assert!(difference(&cached_v, &wide_btv.get(0).get(19)) < 0.05 * scale);
}

#[test]
fn rows_leave_and_join_a_running_batch() {
    let model = random(config());
    let prompts: [&[i64]; 3] = [&[3, 9, 4], &[8, 1, 1, 6, 2], &[5]];
    let alone: Vec<Vec<u32>> = prompts
        .iter()
        .map(|prompt| {
            let prompt: Vec<u32> = prompt.iter().map(|&id| id as u32).collect();
            let options = crate::GenerateOptions { stop_ids: vec![], ..crate::GenerateOptions::greedy(&model, 6) };
            crate::generate(&model, &prompt, &options, &mut |_| std::ops::ControlFlow::Continue(())).unwrap()
        })
        .collect();
    let next = |hidden_bh: &Tensor| -> Vec<i64> {
        Vec::try_from(tch::no_grad(|| model.head(hidden_bh)).unwrap().argmax(-1, false)).unwrap()
    };
    let prefill = |rows: &[&[i64]]| {
        let widest = rows.iter().map(|row| row.len()).max().unwrap();
        let padded: Vec<i64> =
            rows.iter().flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(0, widest - row.len()))).collect();
        let lengths: Vec<i64> = rows.iter().map(|row| row.len() as i64).collect();
        let mut cache = KvCache::new(model.config(), rows.len() as i64, 16, Device::Cpu, Kind::Float).unwrap();
        let ids_bt = Tensor::from_slice(&padded).view([rows.len() as i64, widest as i64]);
        let hidden_bh = model.prefill(&ids_bt, &lengths, &mut cache).unwrap();
        (next(&hidden_bh), cache)
    };
    let mut told: [Vec<i64>; 3] = Default::default();

    // Rows 0 and 1 run two steps; row 0 leaves; row 2 joins; rows 2 and 1 go on.
    let (mut tokens, mut cache) = prefill(&prompts[..2]);
    for _ in 0..2 {
        told[0].push(tokens[0]);
        told[1].push(tokens[1]);
        tokens = next(&model.decode(&Tensor::from_slice(&tokens), &mut cache).unwrap());
    }
    cache.keep_rows(&[1]).unwrap();
    let (joining, more) = prefill(&prompts[2..]);
    cache.append(more).unwrap();
    cache.keep_rows(&[1, 0]).unwrap();
    assert_eq!(cache.lengths(), [1, 7]);
    let mut tokens = vec![joining[0], tokens[1]];
    for _ in 0..4 {
        told[2].push(tokens[0]);
        told[1].push(tokens[1]);
        tokens = next(&model.decode(&Tensor::from_slice(&tokens), &mut cache).unwrap());
    }
    for (alone, told) in alone.iter().zip(&told) {
        let told: Vec<u32> = told.iter().map(|&id| id as u32).collect();
        assert_eq!(alone[..told.len()], told);
    }
}

#[test]
fn what_is_saved_loads_alike() {
    let dir = tempfile::tempdir().unwrap();
    for tie_word_embeddings in [false, true] {
        let model = random(Config { tie_word_embeddings, ..config() });
        model.set_trainable(true);
        model.save(dir.path(), Kind::Float).unwrap();
        let loaded = Model::load(dir.path(), Device::Cpu, Kind::Float).unwrap();
        assert_eq!(loaded.config(), model.config());
        let (before, after) = (model.parameters(), loaded.parameters());
        assert_eq!(before.len(), after.len());
        for ((name, before), (same, after)) in before.iter().zip(&after) {
            assert_eq!((name, before), (same, after));
        }
        let ids = ids_bt(2, 9);
        tch::no_grad(|| assert_eq!(logits(&model, &ids), logits(&loaded, &ids)));
        let total: u64 = after.iter().map(|(_, tensor)| tensor.numel() as u64).sum();
        assert_eq!(total, model.config().parameters());
    }
    let first = folder_sha256(dir.path(), |_, _| {}).unwrap();
    Model::load(dir.path(), Device::Cpu, Kind::Float).unwrap().save(dir.path(), Kind::Float).unwrap();
    assert_eq!(folder_sha256(dir.path(), |_, _| {}).unwrap(), first);
    random(config()).save(dir.path(), Kind::BFloat16).unwrap();
    assert_ne!(folder_sha256(dir.path(), |_, _| {}).unwrap(), first);
}

#[test]
fn a_checkpoint_that_does_not_fit_its_config_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    random(config()).save(dir.path(), Kind::Float).unwrap();
    let refuse = |config: Config, expect: &str| {
        std::fs::write(dir.path().join("config.json"), config.to_json().to_string()).unwrap();
        let error = Model::load(dir.path(), Device::Cpu, Kind::Float).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("model.safetensors: ") && error.contains(expect), "{error}");
    };
    refuse(Config { num_hidden_layers: 5, ..config() }, "lacks tensor \"model.layers.4.input_layernorm.weight\"");
    refuse(
        Config { vocab_size: 51, ..config() },
        "tensor \"model.embed_tokens.weight\" has shape [50, 24]; config.json asks for [51, 24]",
    );
    refuse(
        Config { num_key_value_heads: 4, ..config() },
        "\"model.layers.0.self_attn.k_proj.weight\" has shape [16, 24]",
    );
    // Sizes that would take a terabyte are compared, not allocated.
    refuse(Config { vocab_size: 1 << 24, hidden_size: 1 << 17, ..config() }, "asks for [16777216, 131072]");
}

#[test]
fn pruning_copies_the_layers_kept() {
    let model = random(config());
    let pruned = model.prune_layers(&[0, 3]).unwrap();
    assert_eq!(pruned.config().num_hidden_layers, 2);
    let of = |model: &Model, name: &str| {
        model.parameters().into_iter().find(|(known, _)| known == name).map(|(_, tensor)| tensor).unwrap()
    };
    let (source, copy) =
        (of(&model, "model.layers.3.mlp.up_proj.weight"), of(&pruned, "model.layers.1.mlp.up_proj.weight"));
    assert_eq!(source, copy);
    let _ = tch::no_grad(|| copy.shallow_clone().zero_());
    assert_ne!(source, copy, "the copy is the pruned model's own");
    let ids = ids_bt(1, 5);
    assert_eq!(logits(&model, &ids), logits(&model.prune_layers(&[0, 1, 2, 3]).unwrap(), &ids));
    for keep in [&[][..], &[4], &[1, 1], &[2, 0]] {
        let error = model.prune_layers(keep).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("name some of 0 to 3, in ascending order"), "{error}");
    }
}

#[test]
fn a_seed_names_its_weights() {
    let ids = ids_bt(1, 6);
    let init = |seed| logits(&Model::init(config(), Device::Cpu, Kind::Float, seed).unwrap(), &ids);
    assert_eq!(init(3), init(3));
    assert_ne!(init(3), init(4));
    assert!(Model::init(Config { head_dim: 0, ..config() }, Device::Cpu, Kind::Float, 0).is_err());
}

#[test]
fn input_that_does_not_fit_is_an_error() {
    let model = random(config());
    let refuse = |result: Result<Tensor>, expect: &str| {
        let error = result.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    };
    let ids = |ids: &[i64]| Tensor::from_slice(ids).view([1, -1]);
    refuse(model.hidden(&ids(&[3, 50])), "token id 50 is outside the model's vocabulary of 50");
    refuse(model.hidden(&ids(&[-1, 3])), "token id -1 is outside");
    refuse(model.hidden(&ids(&[3]).to_kind(Kind::Float)), "give at least one int64 id");
    refuse(model.hidden(&Tensor::from_slice(&[3_i64])), "it must be [rows, positions]");
    refuse(model.hidden(&ids(&[])), "give at least one int64 id");
    refuse(model.hidden(&ids_bt(1, 65)), "65 positions are more than the model's context of 64");

    let mut cache = KvCache::new(model.config(), 1, 4, Device::Cpu, Kind::Float).unwrap();
    refuse(
        model.prefill(&ids(&[1, 2, 3, 4, 5]), &[5], &mut cache),
        "5 positions do not fit the cache: it holds 4 a row",
    );
    refuse(model.prefill(&ids(&[1, 2]), &[3], &mut cache), "lengths [3] do not fit");
    refuse(model.prefill(&ids(&[1, 2]), &[0], &mut cache), "lengths [0] do not fit");
    refuse(model.prefill(&ids_bt(2, 2), &[2, 2], &mut cache), "2 rows of token ids for a cache of 1 rows");
    let _ = model.prefill(&ids(&[1, 2, 3, 4]), &[4], &mut cache).unwrap();
    refuse(model.decode(&Tensor::from_slice(&[1_i64]), &mut cache), "5 positions do not fit the cache");
    assert!(cache.keep_rows(&[1]).is_err() && cache.keep_rows(&[-1]).is_err());
    assert!(KvCache::new(model.config(), 1, 65, Device::Cpu, Kind::Float).is_err());
    assert!(KvCache::new(model.config(), 0, 5, Device::Cpu, Kind::Float).is_err());
    assert!(greedy(&model, &[], 3).is_err());
    assert!(greedy(&model, &[1; 64], 3).is_err());
    assert!(greedy(&model, &[1; 62], 30).unwrap().len() <= 2, "the context ends the answer");
}

fn packed(model: &Model, lengths: &[i64]) -> (Tensor, Vec<Tensor>) {
    let ids: Vec<Tensor> = (0i64..)
        .zip(lengths)
        .map(|(document, &length)| {
            (Tensor::arange(length, (Kind::Int64, Device::Cpu)) * 7 + document * 5).remainder(50)
        })
        .collect();
    let all = Tensor::cat(&ids, 0);
    let alone = ids.iter().map(|ids| model.hidden(&ids.unsqueeze(0)).unwrap().squeeze_dim(0)).collect();
    (all, alone)
}

/// Whatever lies beside a document, with or without a window, it is as if it were alone.
#[test]
fn packed_documents_do_not_see_each_other() {
    for window in [None, Some(5)] {
        let model = random(Config { sliding_window: window, ..config() });
        for lengths in [&[9, 9, 4, 1, 12, 12][..], &[7], &[3, 64]] {
            let (all, alone) = packed(&model, lengths);
            let together = model.hidden_packed(&all, lengths).unwrap();
            assert!(difference(&together, &Tensor::cat(&alone, 0)) < 1e-5, "{lengths:?}");
        }
    }
}

#[test]
fn documents_that_do_not_fit_are_refused() {
    let model = random(config());
    let ids = Tensor::arange(10, (Kind::Int64, Device::Cpu));
    for lengths in [&[5, 4][..], &[10, 0], &[], &[12, -2]] {
        assert!(matches!(model.hidden_packed(&ids, lengths), Err(Error::Invalid(_))), "{lengths:?}");
    }
    let long = Tensor::zeros([65], (Kind::Int64, Device::Cpu));
    assert!(matches!(model.hidden_packed(&long, &[65]), Err(Error::TooLong(_))));
    assert!(model.hidden_packed(&(ids + 45), &[10]).unwrap_err().to_string().contains("token id 54"));
}

/// Of blocks that are kept and of blocks computed again, with a window and without: as near to the gradients in f64 as
/// autograd's over the whole, with libtorch's attention and norms, or to its rounding.
#[test]
fn a_tape_gives_the_gradients_of_autograd() {
    let lengths = [9, 9, 4, 12];
    for (kind, window) in [(Kind::Float, None), (Kind::Float, Some(5)), (Kind::BFloat16, None), (Kind::Double, Some(5))]
    {
        let dir = tempfile::tempdir().unwrap();
        random(Config { sliding_window: window, ..config() }).save(dir.path(), Kind::BFloat16).unwrap();
        let load = |kind| {
            let model = Model::load(dir.path(), Device::Cpu, kind).unwrap();
            model.set_trainable(true);
            model
        };
        // Of the sum of cubes.
        let take = |model: &Model| -> Vec<(String, Tensor)> {
            let parameters = model.parameters().into_iter().filter(|(name, _)| name != "lm_head.weight");
            let wide = |tensor: Tensor| (tensor.grad().to_kind(Kind::Double), tensor.grad().zero_()).0;
            parameters.map(|(name, tensor)| (name, wide(tensor))).collect()
        };
        let whole = |model: &Model| {
            let (all, _) = packed(model, &lengths);
            model.hidden_packed(&all, &lengths).unwrap().pow_tensor_scalar(3).sum(Kind::Float).backward();
            take(model)
        };
        let (exact, model) = (whole(&load(Kind::Double)), load(kind));
        let autograds = whole(&model);
        for recomputed in [false, true] {
            let (all, _) = packed(&model, &lengths);
            let embedded_nh = model.embedded(&all).unwrap();
            let (hidden_nh, tape) = model.hidden_taped(&embedded_nh, &lengths, None, recomputed).unwrap();
            assert!(!hidden_nh.requires_grad());
            let grad_nh = model.backward(tape, &(hidden_nh.square() * 3.0)).unwrap();
            (embedded_nh * grad_nh).sum(Kind::Float).backward();
            for (((name, taped), (_, autograds)), (_, exact)) in take(&model).iter().zip(&autograds).zip(&exact) {
                let largest = exact.abs().max().double_value(&[]).max(1.0);
                let [taped, autograds] = [taped, autograds].map(|found| difference(found, exact) / largest);
                assert!(taped < 1.5 * autograds + 1e-6, "{name} {kind:?} {window:?}: {taped}, autograd's {autograds}");
            }
        }
    }
}
