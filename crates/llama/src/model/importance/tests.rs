use super::super::tests::{config, random};
use super::*;
use crate::Config;

const TEXTS: [&[i64]; 3] = [&[3, 17, 4, 4, 49, 0, 8], &[12], &[9, 1, 30, 22]];

fn observed(model: &Model, texts: &[&[i64]]) -> Importance {
    let mut observer = Observer::new(model);
    for text in texts {
        observer.add(text).unwrap();
    }
    observer.finish()
}

/// The input of each layer of a text, and the last one's output, as its norm: `[n, h]`. All norms of a random
/// model have weight one, so that a model of fewer layers ends in what the next one would read.
fn norms(model: &Model, text: &[i64]) -> Vec<Tensor> {
    let layers = model.config().num_hidden_layers as usize;
    let embedding_vh = model.parameters()[0].1.shallow_clone();
    let embedded = embedding_vh.index_select(0, &Tensor::from_slice(text));
    let size_n1 = embedded.square().mean_dim([-1i64].as_slice(), true, Kind::Float) + model.config().rms_norm_eps;
    let mut norms = vec![embedded / size_n1.sqrt()];
    for layers in 1..=layers {
        let keep: Vec<usize> = (0..layers).collect();
        let ids = Tensor::from_slice(text).unsqueeze(0);
        norms.push(model.prune_layers(&keep).unwrap().hidden(&ids).unwrap().squeeze_dim(0));
    }
    norms
}

fn close(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-4 * expected.abs().max(0.01), "{found} for {expected}");
    }
}

#[test]
fn block_influence_is_that_of_models_cut_off_before_and_after_the_layer() {
    let model = random(config());
    let found = observed(&model, &TEXTS);
    assert_eq!((found.texts, found.tokens), (3, 12));
    let mut turned = [0.0; 4];
    for text in TEXTS {
        let norms = norms(&model, text);
        for (layer, pair) in norms.windows(2).enumerate() {
            for token in 0..text.len() as i64 {
                let (a, b) = (pair[0].get(token), pair[1].get(token));
                let cosine = a.dot(&b) / (a.norm() * b.norm());
                turned[layer] += (1.0 - cosine.double_value(&[])) / 12.0;
            }
        }
    }
    let influence: Vec<f64> = found.layers.iter().map(|layer| layer.influence).collect();
    close(&influence, &turned);
    assert!(influence.iter().all(|&influence| influence > 1e-3), "{influence:?}");
}

/// The L2 norm over texts of the mean over tokens, of `[n, c]` a text.
fn aggregate(texts: &[Tensor]) -> Vec<f64> {
    let square = |values_nc: &Tensor| values_nc.abs().mean_dim([0i64].as_slice(), false, Kind::Double).square();
    let sum = texts.iter().map(square).reduce(|a, b| a + b).unwrap();
    Vec::try_from(sum.sqrt()).unwrap()
}

#[test]
fn channels_and_norms_are_those_of_the_formulas() {
    let model = random(config());
    let find = |name: &str| model.parameters().into_iter().find(|(known, _)| known == name).unwrap().1;
    // A layer whose attention adds nothing: both its norms read the same.
    let _ = tch::no_grad(|| find("model.layers.2.self_attn.o_proj.weight").zero_());
    let found = observed(&model, &TEXTS);
    let norms: Vec<Vec<Tensor>> = TEXTS.iter().map(|text| norms(&model, text)).collect();
    let of = |layer: usize| -> Vec<Tensor> { norms.iter().map(|norms| norms[layer].shallow_clone()).collect() };
    for layer in 0..4 {
        close(&found.layers[layer].input_norm, &aggregate(&of(layer)));
    }
    close(&found.layers[2].post_norm, &aggregate(&of(2)));
    close(&found.final_norm, &aggregate(&of(4)));
    let inner = |normed_nh: &Tensor| {
        let through =
            |name: &str| normed_nh.linear::<&Tensor>(&find(&format!("model.layers.2.mlp.{name}.weight")), None);
        through("gate_proj").silu() * through("up_proj")
    };
    close(&found.layers[2].channels, &aggregate(&of(2).iter().map(inner).collect::<Vec<_>>()));
}

/// A text's only token attends to itself alone: a head gives its key-value head's value.
#[test]
fn heads_count_by_the_norm_of_what_they_give() {
    let model = random(config());
    let found = observed(&model, &[&[12], &[31]]);
    let value =
        model.parameters().into_iter().find(|(name, _)| name == "model.layers.1.self_attn.v_proj.weight").unwrap().1;
    let norm_of = |text: &[i64]| {
        let heads_1kd = norms(&model, text)[1].linear::<&Tensor>(&value, None).view([1, 2, 8]);
        heads_1kd.square().sum_dim_intlist([-1i64].as_slice(), false, Kind::Float).sqrt()
    };
    let of_groups = aggregate(&[norm_of(&[12]), norm_of(&[31])]);
    close(&found.layers[1].heads, &[of_groups[0], of_groups[0], of_groups[1], of_groups[1]]);
    // Heads of more than one token differ.
    let longer = observed(&model, &TEXTS);
    assert!((longer.layers[1].heads[0] - longer.layers[1].heads[1]).abs() > 1e-6);
}

#[test]
fn the_order_of_texts_does_not_matter_and_nothing_seen_is_nothing() {
    let model = random(Config { tie_word_embeddings: true, ..config() });
    let (one, other) = (observed(&model, &TEXTS), observed(&model, &[TEXTS[2], TEXTS[0], TEXTS[1]]));
    close(&one.layers[3].channels, &other.layers[3].channels);
    close(&[one.layers[3].influence], &[other.layers[3].influence]);
    assert_eq!(observed(&model, &[]).layers[0].influence, 0.0);
    let mut observer = Observer::new(&model);
    for text in [&[][..], &[50], &[3; 65]] {
        assert!(observer.add(text).is_err(), "{text:?}");
    }
}
