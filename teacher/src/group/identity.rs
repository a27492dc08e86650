//! What the stages of a group must have in common, and how a difference is told: both sides by name.

use std::{collections::BTreeMap, ops::Range};

use retort_core::{Code, Error, Result};
use retort_proto as proto;

use super::place::Place;

/// Of the messages in `stage.proto`.
pub(super) const PROTOCOL: u32 = 2;

/// What stage 0 says to another stage (`to`), or what a stage answers (its own number).
pub(super) fn hello(place: &Place, to: usize, incarnation: u64, dtype: &str) -> proto::StageHello {
    proto::StageHello {
        protocol: PROTOCOL,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        group: place.group.clone(),
        stage: to as u32,
        stages: place.stages() as u32,
        incarnation,
        dtype: dtype.to_owned(),
    }
}

/// Compares what `other` says with what this side (`own`) expects of it.
pub(super) fn compare(
    own_name: &str,
    own: &proto::StageHello,
    other_name: &str,
    other: &proto::StageHello,
) -> Result<()> {
    let pairs = [
        ("protocol", own.protocol.to_string(), other.protocol.to_string()),
        ("version", own.version.clone(), other.version.clone()),
        ("group", own.group.clone(), other.group.clone()),
        ("number of stages", own.stages.to_string(), other.stages.to_string()),
        ("stage number", own.stage.to_string(), other.stage.to_string()),
        ("dtype", own.dtype.clone(), other.dtype.clone()),
        ("incarnation", own.incarnation.to_string(), other.incarnation.to_string()),
    ];
    match pairs.into_iter().find(|(_, own, other)| own != other) {
        Some((what, own, other)) => Err(differs(what, own_name, &own, other_name, &other)),
        None => Ok(()),
    }
}

/// Compares what two stages see of the model before any weight is read.
pub(super) fn same_model(
    (first_name, first): (&str, &proto::ModelOpened),
    (other_name, other): (&str, &proto::ModelOpened),
) -> Result<()> {
    for (what, own, of_other) in [
        ("config.json and its like, SHA-256", &first.config_sha256, &other.config_sha256),
        ("weights, print", &first.weights_print, &other.weights_print),
    ] {
        if own != of_other {
            return Err(differs(what, first_name, own, other_name, of_other));
        }
    }
    Ok(())
}

/// The ranges that `--layers` gave, once they are known to cover `layers` without gap or overlap;
/// `None` where no stage gives any.
pub(super) fn given_layers(
    given: &[Option<Range<u32>>],
    layers: u32,
    name: impl Fn(usize) -> String,
) -> Result<Option<Vec<Range<u32>>>> {
    if given.iter().all(Option::is_none) {
        return Ok(None);
    }
    let mut next = 0;
    let mut ranges = Vec::new();
    for (stage, range) in given.iter().enumerate() {
        let Some(range) = range else {
            return Err(mismatch(format!(
                "{} has no --layers and another stage has; give them to every stage or to none",
                name(stage)
            )));
        };
        if range.start != next || range.end > layers {
            return Err(mismatch(format!(
                "{} has --layers {}-{}, and layer {next} of {layers} comes next; the stages' layers must follow each other from 0 to {}",
                name(stage),
                range.start,
                range.end - 1,
                layers - 1
            )));
        }
        next = range.end;
        ranges.push(range.clone());
    }
    if next != layers {
        return Err(mismatch(format!(
            "the stages' --layers end at {}, and the model has layers 0 to {}",
            i64::from(next) - 1,
            layers - 1
        )));
    }
    Ok(Some(ranges))
}

/// All stages' tensors by name; a tensor that two stages hold must be the same in both.
pub(super) fn all_tensors(
    loaded: &[proto::LayersLoaded],
    name: impl Fn(usize) -> String,
) -> Result<BTreeMap<String, (String, Vec<u8>)>> {
    let mut all: BTreeMap<String, (usize, String, Vec<u8>)> = BTreeMap::new();
    for (stage, loaded) in loaded.iter().enumerate() {
        for tensor in &loaded.tensors {
            let hash = (tensor.shape.clone(), tensor.sha256.clone());
            match all.get(&tensor.name) {
                Some((holder, shape, sha256)) if (shape, sha256) != (&hash.0, &hash.1) => {
                    let text = |shape: &str, sha256: &[u8]| format!("{shape} {}", hex(sha256));
                    return Err(differs(
                        &format!("tensor {:?}", tensor.name),
                        &name(*holder),
                        &text(shape, sha256),
                        &name(stage),
                        &text(&hash.0, &hash.1),
                    ));
                }
                Some(_) => {}
                None => {
                    all.insert(tensor.name.clone(), (stage, hash.0, hash.1));
                }
            }
        }
    }
    Ok(all.into_iter().map(|(name, (_, shape, sha256))| (name, (shape, sha256))).collect())
}

pub(super) fn mismatch(message: String) -> Error {
    Error::new(Code::StageMismatch, message)
}

fn differs(what: &str, own_name: &str, own: &str, other_name: &str, other: &str) -> Error {
    mismatch(format!(
        "{what}: {own_name} has {own:?}, {other_name} has {other:?}; every stage of a group runs the same program on the same model"
    ))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_given_must_follow_each_other_to_the_end() {
        let name = |stage: usize| format!("stage {stage}");
        let check = |given: &[Option<Range<u32>>]| given_layers(given, 6, name);
        assert_eq!(check(&[None, None]).unwrap(), None);
        assert_eq!(check(&[Some(0..2), Some(2..6)]).unwrap(), Some(vec![0..2, 2..6]));
        for (given, says) in [
            ([Some(0..2), None], "stage 1 has no --layers"),
            ([Some(0..2), Some(3..6)], "layer 2 of 6 comes next"),
            ([Some(0..4), Some(3..6)], "layer 4 of 6 comes next"),
            ([Some(0..2), Some(2..5)], "end at 4"),
            ([Some(0..2), Some(2..7)], "layer 2 of 6 comes next"),
        ] {
            let error = check(&given).unwrap_err();
            assert_eq!(error.code, Code::StageMismatch);
            assert!(error.message.contains(says), "{}", error.message);
        }
    }

    #[test]
    fn a_tensor_that_two_stages_hold_must_be_the_same() {
        let tensor = |sha256: u8| proto::TensorHash { name: "e".into(), shape: "F32 [2]".into(), sha256: vec![sha256] };
        let stage = |sha256: u8| proto::LayersLoaded { tensors: vec![tensor(sha256)], ..Default::default() };
        let name = |stage: usize| format!("stage {stage}");
        assert_eq!(all_tensors(&[stage(1), stage(1)], name).unwrap().len(), 1);
        let error = all_tensors(&[stage(1), stage(2)], name).unwrap_err();
        assert!(error.message.contains("stage 0 has \"F32 [2] 01\", stage 1 has \"F32 [2] 02\""), "{}", error.message);
    }
}
