//! What a way of pruning leaves of the teacher, before training and after one pass: docs/decisions/015.

use std::path::Path;

use retort_core::spec::{Prune, Train};
use retort_llama::Model;
use retort_student::prune::prune;
use retort_tests::teacher::smollm2;
use serde_json::{Value, json};
use tch::{Device, Kind};

use crate::{
    Failure,
    corpus::Corpus,
    training::{held_out_kl, train},
};

/// Of the order of the rows.
const SEED: u64 = 0;

/// `spec` is what a job's `student.init.prune` says, as JSON. Calibrated on the first training rows, trained on
/// whole distributions; without a learning rate not trained.
pub fn run(folder: &Path, spec: &str, learning_rate: Option<f64>) -> Result<Value, Failure> {
    let spec: Prune = serde_json::from_str(spec)?;
    let corpus = Corpus::open(folder)?;
    let texts: Vec<Vec<u32>> =
        corpus.of(false).take(spec.calibration_rows as usize).map(|(_, row)| row.token_ids.clone()).collect();
    let teacher = Model::load(&smollm2(), Device::Cpu, Kind::Float)?;
    let (student, pruning) = prune(&teacher, &spec, &texts, &|| Ok(()))?;
    drop(teacher);
    let parameters = student.config().parameters();
    let mut result = json!({"spec": spec, "parameters": parameters, "pruning": pruning});
    match learning_rate {
        None => result["kl_before"] = held_out_kl(&corpus, &student)?.into(),
        Some(learning_rate) => {
            let trained = train(&corpus, student, None, Train { learning_rate, ..Train::default() }, SEED)?;
            result["trained"] = trained;
        }
    }
    Ok(result)
}
