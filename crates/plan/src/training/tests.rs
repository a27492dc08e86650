use retort_core::spec::{Parallel, Sharing};
use serde_json::json;

use super::*;

/// The student of `kd_step`: 8.6 million numbers in its blocks.
fn config(vocab_size: u64) -> Config {
    let value = json!({
        "model_type": "llama", "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 8,
        "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": vocab_size,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "max_position_embeddings": 2048,
    });
    Config::from_json(&"config.json", &value).unwrap()
}

/// Four rows of 512.
fn train() -> Train {
    Train { batch_rows: 4, ..Train::default() }
}

fn memory(config: &Config, lora: Option<&Lora>, train: &Train, dtype: Dtype) -> Memory {
    Student { config, lora, train, longest_row: 512 }.on(Device::Cpu, dtype).memory
}

fn int8() -> Lora {
    Lora { base: LoraBase::Int8, ..Lora::default() }
}

#[test]
fn weights_and_what_the_optimiser_keeps_of_them_are_exact() {
    let config = config(49_152);
    let all = config.parameters();
    let wide = memory(&config, None, &train(), Dtype::F32);
    assert_eq!((wide.weights, wide.gradients, wide.optimizer, wide.exchange), (4 * all, 4 * all, 8 * all, 0));
    assert_eq!(wide.checkpoint_copy, 12 * all);
    // Of the blocks a gradient in bf16 and its sum in f32, of the embedding the sum alone; masters beside the moments.
    let narrow = memory(&config, None, &train(), Dtype::Bf16);
    let body = all - 49_152 * 320;
    assert_eq!((narrow.weights, narrow.gradients, narrow.optimizer), (2 * all, 4 * all + 2 * body, 12 * all));
    assert_eq!(narrow.checkpoint_copy, 14 * all);
    let averaged = memory(&config, None, &Train { ema_decay: 0.9, ..train() }, Dtype::F32);
    assert_eq!((averaged.optimizer, averaged.checkpoint_copy), (12 * all, 20 * all));
    let frozen = memory(&config, None, &Train { freeze_embeddings: true, ..train() }, Dtype::F32);
    assert_eq!((frozen.weights, frozen.gradients, frozen.optimizer), (4 * all, 4 * body, 8 * body));
}

#[test]
fn adapters_alone_have_gradients_and_a_base_in_bytes_is_a_quarter() {
    let config = config(49_152);
    let all = config.parameters();
    // q 320 + 320, k and v 64 + 320, o 320 + 320, gate, up and down 864 + 320.
    let adapters = 8 * 16 * (2 * 640 + 2 * 384 + 3 * 1184);
    let lora = Lora::default();
    let of_model = memory(&config, Some(&lora), &train(), Dtype::F32);
    assert_eq!((of_model.weights, of_model.gradients), (4 * (all + adapters), 4 * adapters));
    assert_eq!(of_model.optimizer, 8 * adapters);
    let student = Student { config: &config, lora: Some(&lora), train: &train(), longest_row: 512 };
    assert_eq!(student.training().trained_parameters, adapters);
    let two = Lora { targets: vec![LoraTarget::QProj, LoraTarget::DownProj], rank: 4, ..Lora::default() };
    assert_eq!(memory(&config, Some(&two), &train(), Dtype::F32).gradients, 4 * 8 * 4 * (640 + 1184));

    let matrices = 8 * (2 * 320 * 320 + 2 * 64 * 320 + 3 * 864 * 320);
    let rows = 8 * (2 * 320 + 2 * 64 + 2 * 864 + 320);
    let in_bytes = memory(&config, Some(&int8()), &train(), Dtype::F32);
    assert_eq!(of_model.weights - in_bytes.weights, 3 * matrices - 4 * rows);
    assert_eq!(
        in_bytes.total,
        of_model.total - 3 * matrices + 4 * rows - of_model.activations + in_bytes.activations_checkpointed
    );
    assert!(in_bytes.activations_checkpointed < of_model.activations);
}

#[test]
fn a_micro_batch_is_what_the_spec_the_device_and_the_rows_make_it() {
    let config = config(512);
    let of = |train: &Train, longest_row| Student { config: &config, lora: None, train, longest_row }.training();
    let training = of(&train(), 512);
    let tokens = |training: &Training| training.places.iter().map(|place| place.micro_batch_tokens).collect::<Vec<_>>();
    assert_eq!(tokens(&training), [1024, 16_384]);
    assert_eq!((training.batch_rows, training.micro_batch_tokens, training.checkpoints_activations), (4, None, false));
    let activations = |tokens: Option<u32>, batch_rows, longest_row| {
        let train = Train { micro_batch_tokens: tokens, batch_rows, ..train() };
        let training = of(&train, longest_row);
        assert_eq!(training.micro_batch_tokens, tokens);
        training.places[0].memory.activations
    };
    let whole = activations(None, 4, 512);
    assert_eq!(activations(Some(256), 4, 64) * 4, whole);
    assert_eq!(activations(Some(1 << 20), 4, 256), whole, "no more tokens than a step has");
    assert_eq!(activations(Some(16), 4, 1024), whole, "a longer row goes alone");
    let checkpointed = of(&Train { activation_checkpointing: true, ..train() }, 512);
    let (kept, less) = (&training.places[0].memory, &checkpointed.places[0].memory);
    assert!(checkpointed.checkpoints_activations && 3 * less.activations_checkpointed < kept.activations);
    assert_eq!(kept.total - less.total, kept.activations - less.activations_checkpointed);
}

#[test]
fn the_head_and_other_workers_take_what_their_sizes_say() {
    let positions = |device, dtype| [512, 49_152, 128_256, 1 << 24].map(|vocab| head_positions(vocab, device, dtype));
    assert_eq!(positions(Device::Cpu, Dtype::F32), [2048, 682, 261, 16]);
    assert_eq!(positions(Device::Cpu, Dtype::Bf16), [2048, 1365, 523, 16]);
    assert_eq!(positions(Device::Gpu, Dtype::Bf16), [2048, 682, 261, 16]);
    let config = config(128_256);
    assert_eq!(memory(&config, None, &train(), Dtype::F32).head, 261 * 128_256 * 8);
    assert_eq!(memory(&config, None, &train(), Dtype::Bf16).head, (261 * 4 + 523 * 2) * 128_256);
    let all = config.parameters();
    let exchange = |mode, workers| {
        let parallel = Some(Parallel { mode, ..Parallel::of(workers) });
        memory(&config, None, &Train { parallel, ..train() }, Dtype::F32)
    };
    assert_eq!(exchange(Sharing::Synchronous, 1).exchange, 0);
    assert_eq!(exchange(Sharing::Synchronous, 3).exchange, 12 * all);
    let diloco = exchange(Sharing::Diloco, 3);
    assert_eq!((diloco.exchange, diloco.checkpoint_copy), (8 * all, 16 * all));
}

#[test]
fn the_largest_student_that_can_be_overflows_nothing() {
    let value = json!({
        "model_type": "llama", "hidden_size": 1 << 17, "intermediate_size": 1 << 20, "num_hidden_layers": 1 << 10,
        "num_attention_heads": 1 << 10, "num_key_value_heads": 1 << 10, "head_dim": 1 << 12, "vocab_size": 1 << 24,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 1 << 27,
    });
    let config = Config::from_json(&"config.json", &value).unwrap();
    let parallel = Some(Parallel::of(64));
    let train = Train { batch_rows: 65_536, micro_batch_tokens: Some(1 << 20), parallel, ..Train::default() };
    let training = Student { config: &config, lora: None, train: &train, longest_row: 1 << 27 }.training();
    assert!(training.places.iter().all(|place| place.memory.total > place.memory.activations));
}
