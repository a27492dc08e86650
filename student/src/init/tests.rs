use std::fs;

use retort_core::spec::Prune;
use retort_llama::Architecture;
use serde_json::json;

use super::*;

/// A teacher's folder in miniature: random weights and a tokenizer of one word a token.
pub(crate) fn tiny_teacher(folder: &Path, layers: i64, vocab_size: i64) -> Teacher {
    let config = tiny_config(layers, vocab_size);
    let model = Model::init(config, Device::Cpu, Kind::Float, 14).unwrap();
    model.save(folder, Kind::Float).unwrap();
    write_tokenizer(folder, vocab_size, "w");
    Teacher::open(&folder.display().to_string()).unwrap()
}

pub(crate) fn tiny_config(layers: i64, vocab_size: i64) -> Config {
    Config {
        architecture: Architecture::Llama,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: layers,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 4,
        vocab_size,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: None,
        max_position_embeddings: 128,
        tie_word_embeddings: true,
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        sliding_window: None,
        initializer_range: 0.1,
        bos_token_id: Some(0),
        eos_token_ids: vec![1],
        pad_token_id: None,
    }
}

fn write_tokenizer(folder: &Path, vocab_size: i64, word: &str) {
    let vocab: serde_json::Map<_, _> = (0..vocab_size).map(|id| (format!("{word}{id}"), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0",
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": format!("{word}0")},
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

fn spec(init: Init) -> JobSpec {
    let mut spec = retort_core::spec::parse_yaml(
        "spec.yaml",
        "{name: t, prompts: {path: p}, teacher: {model: m}, student: {init: {prune: {layers: 1}}}}",
    )
    .unwrap();
    spec.student.init = init;
    spec
}

fn init(teacher: &Teacher, init: Init) -> Result<Model> {
    let made = initial_model(&spec(init), teacher, &[], (Device::Cpu, Kind::Float), &|| Ok(()));
    made.map(|(model, _)| model)
}

#[test]
fn a_pruned_student_has_the_teachers_layers() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = tiny_teacher(folder.path(), 5, 30);
    let student = init(&teacher, Init::Prune(Prune::to_layers(3))).unwrap();
    assert_eq!(student.config().num_hidden_layers, 3);
    let whole = Model::load(folder.path(), Device::Cpu, Kind::Float).unwrap();
    let find = |model: &Model, name: &str| model.parameters().into_iter().find(|(n, _)| n == name).unwrap().1;
    for (layer, source) in [(0, 0), (1, 1), (2, 4)] {
        let name = |layer| format!("model.layers.{layer}.mlp.up_proj.weight");
        assert!(find(&student, &name(layer)).equal(&find(&whole, &name(source))));
    }
    let error = init(&teacher, Init::Prune(Prune::to_layers(6))).unwrap_err();
    assert_eq!(error.code, Code::SpecInvalid);
    assert!(error.message.contains("is 6") && error.message.contains("5 layers"), "{}", error.message);
}

#[test]
fn a_student_from_a_config_has_the_teachers_vocabulary_and_the_seeds_weights() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = tiny_teacher(folder.path(), 2, 30);
    let shape = || Init::Config {
        hidden_size: 8,
        intermediate_size: 12,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
    };
    let (one, two) = (init(&teacher, shape()).unwrap(), init(&teacher, shape()).unwrap());
    assert_eq!((one.config().vocab_size, one.config().head_dim), (30, 4));
    assert!(one.head_weight().equal(&two.head_weight()));
}

#[test]
fn another_vocabulary_or_tokenizer_is_refused_with_both_named() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = tiny_teacher(folder.path(), 1, 30);
    let other = tempfile::tempdir().unwrap();
    tiny_teacher(other.path(), 1, 31);
    let checkpoint = || Init::Checkpoint { model: Url::from_file_path(other.path()).unwrap().to_string() };
    let error = init(&teacher, checkpoint()).unwrap_err();
    assert_eq!(error.code, Code::VocabularyMismatch);
    assert!(error.message.contains("31") && error.message.contains("30"), "{}", error.message);

    tiny_teacher(other.path(), 1, 30);
    write_tokenizer(other.path(), 30, "v");
    let error = init(&teacher, checkpoint()).unwrap_err();
    assert_eq!(error.code, Code::TokenizerMismatch);
    assert!(error.message.contains(&teacher.tokenizer_sha256), "{}", error.message);

    write_tokenizer(other.path(), 30, "w");
    init(&teacher, checkpoint()).unwrap();
    assert_eq!(folder_of("file:///a%20b").unwrap(), PathBuf::from("/a b"));
    assert_eq!(folder_of("file://elsewhere/a").unwrap_err().code, Code::SpecInvalid);
}

#[test]
fn a_missing_folder_is_named() {
    let error = Teacher::open("/nowhere/at/all").unwrap_err();
    assert_eq!(error.code, Code::FileNotFound);
    assert!(error.message.contains("/nowhere/at/all"), "{}", error.message);
}

fn folder_of(model: &str) -> Result<PathBuf> {
    super::folder(model)
}
