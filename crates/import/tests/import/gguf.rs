use retort_core::Code;
use retort_import::{Format, Phase, import};
use serde_json::json;

use crate::models::{HEAD_DIM, HEADS, HIDDEN, KV_HEADS, llama, qwen2};
use crate::writer::{F16, Value};
use crate::{Bench, floats, tensor};

#[test]
fn a_llama_becomes_a_folder() {
    let bench = Bench::new();
    let imported = bench.import(&llama().bytes()).unwrap();
    assert_eq!(imported.architecture, "LlamaForCausalLM");
    assert_eq!(imported.source_format, Format::Gguf { version: 3 });
    assert_eq!(imported.tensors, 2 * 9 + 2);
    let layer = 32 + 32 * 32 + 2 * 16 * 32 + 32 * 32 + 32 + 3 * 64 * 32;
    assert_eq!(imported.parameters, 269 * 32 + 2 * layer + 32);
    assert_eq!(bench.names(), ["model.gguf", "out"]);
    let on_disk: u64 =
        std::fs::read_dir(bench.out()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    let receipt = std::fs::metadata(bench.out().join("retort-import.json")).unwrap().len();
    assert_eq!(imported.bytes_written, on_disk - receipt);

    let config = bench.json("config.json");
    for (key, value) in [
        ("architectures", json!(["LlamaForCausalLM"])),
        ("model_type", json!("llama")),
        ("hidden_size", json!(32)),
        ("num_key_value_heads", json!(2)),
        ("head_dim", json!(8)),
        ("vocab_size", json!(269)),
        ("rms_norm_eps", json!(1e-5)),
        ("rope_theta", json!(100000.0)),
        ("rope_scaling", json!(null)),
        ("tie_word_embeddings", json!(true)),
        ("torch_dtype", json!("float32")),
        ("bos_token_id", json!(1)),
        ("eos_token_id", json!(2)),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    assert_eq!(bench.json("generation_config.json"), json!({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}));
    let tokenizer_config = bench.json("tokenizer_config.json");
    assert_eq!(tokenizer_config["chat_template"], "{{ messages[0]['content'] }}");
    assert_eq!(tokenizer_config["pad_token"], "<|im_end|>");
    assert_eq!(tokenizer_config["added_tokens_decoder"]["1"]["content"], "<|im_start|>");
    assert_eq!(bench.json("retort-import.json")["source_sha256"], imported.source_sha256);
}

#[test]
fn values_come_out_as_stored() {
    let bench = Bench::new();
    let model = llama();
    bench.import(&model.bytes()).unwrap();
    let source = |name: &str| model.tensors.iter().find(|tensor| tensor.name == name).unwrap().bytes.clone();

    let (dtype, shape, bytes) = tensor(&bench.out(), "model.layers.1.self_attn.o_proj.weight");
    assert_eq!((dtype.as_str(), shape.as_slice()), ("F16", [32, 32].as_slice()));
    assert_eq!(bytes, source("blk.1.attn_output.weight"));
    let (dtype, shape, bytes) = tensor(&bench.out(), "model.layers.0.mlp.up_proj.weight");
    assert_eq!((dtype.as_str(), shape.as_slice()), ("BF16", [64, 32].as_slice()));
    assert_eq!(bytes, source("blk.0.ffn_up.weight"));

    let (dtype, shape, bytes) = tensor(&bench.out(), "model.layers.0.mlp.down_proj.weight");
    assert_eq!((dtype.as_str(), shape.as_slice()), ("F32", [32, 64].as_slice()));
    let blocks = source("blk.0.ffn_down.weight");
    let scale = half::f16::from_le_bytes([blocks[0], blocks[1]]).to_f32();
    assert_eq!(floats(&bytes)[5], f32::from(blocks[2 + 5] as i8) * scale);
}

/// llama.cpp interleaves each head's rotary halves: its row `2i + half` is row `half * 4 + i` here.
#[test]
fn a_llamas_rotary_halves_are_separated() {
    let bench = Bench::new();
    let mut model = llama();
    for (name, heads) in [("blk.1.attn_q.weight", HEADS), ("blk.1.attn_k.weight", KV_HEADS)] {
        let rows = (0..heads * HEAD_DIM).flat_map(|row| (0..HIDDEN).map(move |_| row as f32));
        model.tensor(name).bytes = rows.flat_map(f32::to_le_bytes).collect();
    }
    bench.import(&model.bytes()).unwrap();
    for (name, heads) in [("q_proj", HEADS), ("k_proj", KV_HEADS)] {
        let (_, _, bytes) = tensor(&bench.out(), &format!("model.layers.1.self_attn.{name}.weight"));
        let first: Vec<u64> = floats(&bytes).chunks(HIDDEN as usize).map(|row| row[0] as u64).collect();
        let wanted: Vec<u64> =
            (0..heads).flat_map(|head| [0, 2, 4, 6, 1, 3, 5, 7].map(|row| head * HEAD_DIM + row)).collect();
        assert_eq!(first, wanted);
    }
}

#[test]
fn a_qwen2_keeps_its_biases_and_its_order() {
    let bench = Bench::new();
    let model = qwen2();
    let imported = bench.import(&model.bytes()).unwrap();
    assert_eq!(imported.architecture, "Qwen2ForCausalLM");
    let (_, shape, bytes) = tensor(&bench.out(), "model.layers.0.self_attn.q_proj.bias");
    assert_eq!(shape, [32]);
    assert_eq!(floats(&bytes), (0..32u8).map(f32::from).collect::<Vec<f32>>());
    let (_, _, bytes) = tensor(&bench.out(), "model.layers.0.self_attn.q_proj.weight");
    assert_eq!(bytes, model.tensors.iter().find(|tensor| tensor.name == "blk.0.attn_q.weight").unwrap().bytes);
    let config = bench.json("config.json");
    assert_eq!((&config["model_type"], &config["attention_bias"]), (&json!("qwen2"), &json!(null)));
}

#[test]
fn an_untied_head_and_biases_of_a_llama() {
    let bench = Bench::new();
    let mut model = llama();
    let mut head = model.tensor("token_embd.weight").clone();
    head.name = "output.weight".into();
    model.tensors.push(head);
    for layer in 0..2 {
        for (part, size) in [("attn_q", 32), ("attn_k", 16), ("attn_v", 16), ("attn_output", 32)] {
            let counted: Vec<f32> = (0..size).map(|i| i as f32).collect();
            model.add_f32(&format!("blk.{layer}.{part}.bias"), &[size], &counted);
        }
    }
    bench.import(&model.bytes()).unwrap();
    let config = bench.json("config.json");
    assert_eq!((&config["tie_word_embeddings"], &config["attention_bias"]), (&json!(false), &json!(true)));
    assert_eq!(tensor(&bench.out(), "lm_head.weight").1, [269, 32]);
    let bias = floats(&tensor(&bench.out(), "model.layers.1.self_attn.k_proj.bias").2);
    assert_eq!(bias, [0u8, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15].map(f32::from));
}

#[test]
fn a_half_precision_model_says_so() {
    let bench = Bench::new();
    let mut model = llama();
    for tensor in &mut model.tensors {
        if tensor.dims.len() == 2 {
            let count: u64 = tensor.dims.iter().product();
            tensor.kind = F16;
            tensor.bytes = (0..count).flat_map(|i| half::f16::from_f32(i as f32 / 1e4).to_le_bytes()).collect();
        }
    }
    bench.import(&model.bytes()).unwrap();
    assert_eq!(bench.json("config.json")["torch_dtype"], "float16");
    let (dtype, _, bytes) = tensor(&bench.out(), "model.layers.0.self_attn.q_proj.weight");
    assert_eq!(dtype, "F16");
    // The second row here is the third there.
    assert_eq!(bytes[64..128], model.tensor("blk.0.attn_q.weight").bytes[128..192]);
}

#[test]
fn llama3_scaling_is_recognised_from_its_divisors() {
    let bench = Bench::new();
    let mut model = llama();
    // Frequencies of theta 100,000 over 4 pairs, as Llama 3.2 (factor 32, context 8192) divides them.
    let divisors: Vec<f32> = (0..4)
        .map(|i| {
            let wavelength = 2.0 * std::f64::consts::PI * 100_000f64.powf(f64::from(i) / 4.0);
            if wavelength < 2048.0 {
                return 1.0;
            }
            let smooth = (8192.0 / wavelength - 1.0) / 3.0;
            if wavelength > 8192.0 { 32.0 } else { (1.0 / ((1.0 - smooth) / 32.0 + smooth)) as f32 }
        })
        .collect();
    model.add_f32("rope_freqs.weight", &[4], &divisors);
    bench.import(&model.bytes()).unwrap();
    let scaling = bench.json("config.json")["rope_scaling"].clone();
    assert_eq!((&scaling["rope_type"], &scaling["factor"]), (&json!("llama3"), &json!(32.0)));
}

#[test]
fn every_end_of_an_answer_is_kept() {
    let bench = Bench::new();
    let mut model = llama();
    model.set("tokenizer.ggml.eot_token_id", Value::U32(0)).set("tokenizer.ggml.eom_token_id", Value::U32(2));
    bench.import(&model.bytes()).unwrap();
    assert_eq!(bench.json("generation_config.json")["eos_token_id"], json!([2, 0]));
}

#[test]
fn a_second_import_writes_nothing() {
    let bench = Bench::new();
    let first = bench.import(&llama().bytes()).unwrap();
    let written = std::fs::metadata(bench.out().join("model.safetensors")).unwrap().modified().unwrap();
    let second = bench.import(&llama().bytes()).unwrap();
    assert!(second.unchanged && !first.unchanged);
    assert_eq!((second.bytes_written, &second.sha256), (0, &first.sha256));
    assert_eq!(std::fs::metadata(bench.out().join("model.safetensors")).unwrap().modified().unwrap(), written);
}

#[test]
fn what_is_there_is_never_overwritten() {
    let bench = Bench::new();
    bench.import(&llama().bytes()).unwrap();
    let mut other = llama();
    other.set("general.name", Value::String("other".into()));
    let error = bench.import(&other.bytes()).unwrap_err();
    assert_eq!(error.code, Code::ObjectExists);
    assert!(error.message.contains("another source, model.gguf"), "{}", error.message);

    std::fs::write(bench.out().join("tokenizer.json"), "{}").unwrap();
    let error = bench.import(&llama().bytes()).unwrap_err();
    assert!(error.message.contains("tokenizer.json is not as written"), "{}", error.message);

    std::fs::remove_dir_all(bench.out()).unwrap();
    std::fs::create_dir(bench.out()).unwrap();
    bench.import(&llama().bytes()).unwrap();
    std::fs::remove_dir_all(bench.out()).unwrap();
    std::fs::write(bench.out(), "a file").unwrap();
    assert_eq!(bench.import(&llama().bytes()).unwrap_err().code, Code::ObjectExists);
}

#[test]
fn a_failed_import_leaves_nothing_and_a_killed_ones_rest_is_cleared() {
    let bench = Bench::new();
    let mut model = llama();
    // Found only while the weights are being written.
    model.tensor("output_norm.weight").bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let error = bench.import(&model.bytes()).unwrap_err();
    assert_eq!(error.code, Code::ModelMalformed);
    assert!(error.message.contains("model.norm.weight"), "{}", error.message);
    assert_eq!(bench.names(), ["model.gguf"]);

    let partial = bench.path(".out.partial");
    std::fs::create_dir(&partial).unwrap();
    std::fs::write(partial.join("model.safetensors"), "half a file").unwrap();
    bench.import(&llama().bytes()).unwrap();
    assert_eq!(bench.names(), ["model.gguf", "out"]);
}

#[test]
fn two_imports_into_one_folder_do_not_mix() {
    let bench = Bench::new();
    let partial = bench.path(".out.partial");
    std::fs::create_dir(&partial).unwrap();
    let other = std::fs::File::create(partial.join(".lock")).unwrap();
    other.lock().unwrap();
    assert_eq!(bench.import(&llama().bytes()).unwrap_err().code, Code::AlreadyRunning);
    drop(other);
    bench.import(&llama().bytes()).unwrap();
}

#[test]
fn progress_reaches_its_total_in_each_phase() {
    let bench = Bench::new();
    let source = bench.path("model.gguf");
    std::fs::write(&source, llama().bytes()).unwrap();
    let mut seen = Vec::new();
    import(&source, &bench.out(), &mut |progress| seen.push(progress)).unwrap();
    for phase in [Phase::Hashing, Phase::Writing] {
        let last = seen.iter().rfind(|progress| progress.phase == phase).unwrap();
        assert_eq!(last.done, last.total);
        assert!(last.total > 0);
    }
}
