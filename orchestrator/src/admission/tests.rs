use std::path::Path;

use retort_core::spec::{GgufType, Init, Layers, Lora, Prune, TeacherMode, Weight};
use serde_json::json;

use super::*;
use crate::testing::{World, config, prompts, spec, write_inputs, write_model};

/// A world with good inputs, and its spec.
async fn inputs() -> (World, JobSpec) {
    let world = World::new().await;
    write_inputs(world.folder.path());
    let spec = spec(world.folder.path());
    (world, spec)
}

async fn check_refused(world: &World, spec: &JobSpec, code: Code, message: &str) {
    let error = admit(&world.context, spec).await.err().unwrap_or_else(|| panic!("admitted; expected {code}"));
    assert_eq!(error.code, code, "{}", error.message);
    assert!(error.message.contains(message), "{}", error.message);
}

/// Admission of the good inputs after `change`.
async fn check(code: Code, message: &str, change: impl FnOnce(&Path, &mut JobSpec)) {
    let (world, mut spec) = inputs().await;
    change(world.folder.path(), &mut spec);
    check_refused(&world, &spec, code, message).await;
}

#[tokio::test]
async fn good_inputs_are_planned() {
    let (world, spec) = inputs().await;
    let admitted = admit(&world.context, &spec).await.unwrap();
    assert_eq!((admitted.plan.train_rows, admitted.plan.held_out_rows), (9, 3));
    assert_eq!((admitted.plan.train_shards, admitted.plan.held_out_shards), (3, 1));
    assert_eq!(admitted.plan.optimizer_steps, 6);
    // embedding 16x8; a layer: q 64, k and v 64, o 64, mlp 384, norms 16; last norm 8.
    assert_eq!(
        (admitted.plan.teacher_parameters, admitted.plan.student_parameters),
        (128 + 2 * 592 + 8, 128 + 592 + 8)
    );
    let training = admitted.plan.training.clone().unwrap();
    assert_eq!((training.batch_rows, training.micro_batch_tokens, training.trained_parameters), (4, None, 728));
    let memory = training.places[0].memory;
    assert_eq!((memory.weights, memory.gradients, memory.optimizer), (4 * 728, 4 * 728, 8 * 728));
    let sent = crate::to_proto::plan_to_proto(&admitted.plan).training.unwrap();
    assert_eq!((sent.places[0].device.as_str(), sent.places[1].dtype.as_str()), ("cpu", "bf16"));
    assert_eq!(sent.places[0].memory.unwrap().total, memory.total);
    let rows = prompt_sets::parse("stored", &admitted.prompt_set).unwrap();
    assert_eq!(rows.len(), 12);
    assert!(rows[..9].iter().all(|row| row.split == Some(prompt_sets::Split::Train)));
    assert_eq!(admitted.prompt_set_sha256, sha256_hex(&admitted.prompt_set));

    // Twice the same, byte for byte.
    let again = admit(&world.context, &spec).await.unwrap();
    assert_eq!(again.prompt_set_sha256, admitted.prompt_set_sha256);
}

#[tokio::test]
async fn an_export_that_cannot_be_is_refused_before_any_work() {
    // The teacher's tokenizer knows whole words alone.
    check(Code::ModelUnsupported, "export.gguf: ", |_, spec| spec.export.gguf = vec![GgufType::Q8_0]).await;
    check(Code::ModelUnsupported, "GGUF is written for BPE alone", |_, spec| spec.export.gguf = vec![GgufType::F16])
        .await;
}

#[tokio::test]
async fn a_prompt_set_in_the_store_and_a_file_url_are_read() {
    let (world, mut spec) = inputs().await;
    let text = Bytes::from(prompts(8));
    world.context.store.put_new("uploads/prompts.jsonl", text).await.unwrap();
    spec.prompts.path = "store://uploads/prompts.jsonl".to_owned();
    spec.teacher.model = format!("file://{}", spec.teacher.model);
    assert_eq!(admit(&world.context, &spec).await.unwrap().plan.train_rows, 6);
    spec.prompts.path = "store://uploads/none.jsonl".to_owned();
    check_refused(&world, &spec, Code::ObjectNotFound, "uploads/none.jsonl").await;
}

#[tokio::test]
async fn paths_that_lead_nowhere_are_named() {
    check(Code::FileNotFound, "missing.jsonl: no such file", |folder, spec| {
        spec.prompts.path = folder.join("missing.jsonl").display().to_string();
    })
    .await;
    check(Code::SpecInvalid, "prompts.path is \"prompts.jsonl\"; write an absolute path", |_, spec| {
        spec.prompts.path = "prompts.jsonl".to_owned();
    })
    .await;
    check(Code::FileUnreadable, "it is no regular file", |folder, spec| {
        spec.prompts.path = folder.display().to_string()
    })
    .await;
    check(Code::FileNotFound, "teacher.model", |folder, spec| {
        spec.teacher.model = folder.join("no-teacher").display().to_string();
    })
    .await;
    check(Code::FileNotFound, "is no model folder, it has no config.json", |folder, _| {
        std::fs::remove_file(folder.join("teacher/config.json")).unwrap()
    })
    .await;
    check(Code::FileNotFound, "student.init.checkpoint.model: ", |folder, spec| {
        spec.student.init = Init::Checkpoint { model: folder.display().to_string() };
    })
    .await;
    check(Code::FileNotFound, "tokenizer.json", |folder, _| {
        std::fs::remove_file(folder.join("teacher/tokenizer.json")).unwrap();
    })
    .await;
    check(Code::FileNotFound, "model.safetensors", |folder, _| {
        std::fs::remove_file(folder.join("teacher/model.safetensors")).unwrap();
    })
    .await;
}

#[tokio::test]
async fn prompt_files_are_refused_by_line() {
    let write = |folder: &Path, text: &str| std::fs::write(folder.join("prompts.jsonl"), text).unwrap();
    check(Code::PromptMalformed, "prompts.jsonl line 3", |folder, _| {
        write(folder, &format!("{}{{\"messages\": [\n", prompts(2)));
    })
    .await;
    check(Code::PromptEmpty, "prompts.jsonl line 3", |folder, _| {
        write(folder, &format!("{}{{\"messages\": [{{\"role\": \"user\", \"content\": \" \"}}]}}\n", prompts(2)));
    })
    .await;
    check(Code::PromptSetTooSmall, "prompts.jsonl", |folder, _| write(folder, &prompts(1))).await;
    check(Code::PromptSetTooSmall, "no training row has a weight above 0", |folder, _| {
        write(folder, &prompts(8).replace("\"messages\"", "\"weight\": 0, \"messages\""));
    })
    .await;
    // Nothing in f32, as students read weights; nor is 1e-30 times 1e-30.
    check(Code::PromptSetTooSmall, "no training row has a weight above 0", |folder, _| {
        write(folder, &prompts(8).replace("\"messages\"", "\"weight\": 1e-50, \"messages\""));
    })
    .await;
    let scored = |folder: &Path, spec: &mut JobSpec, completion: &str| {
        spec.teacher.mode = TeacherMode::Score;
        let completion = format!("\"completion\": {completion}, \"messages\"");
        write(folder, &prompts(8).replace("\"messages\"", &completion));
    };
    check(Code::PromptSetTooSmall, "no training row has a weight above 0", |folder, spec| {
        scored(folder, spec, r#"[{"text": "a", "weight": 0}, {"text": "b", "weight": 0}]"#);
    })
    .await;
    check(Code::PromptSetTooSmall, "no training row has a weight above 0", |folder, spec| {
        scored(folder, spec, r#"[{"text": "a", "weight": 1e-30}, {"text": "b", "weight": 0}], "weight": 1e-30"#);
    })
    .await;
    // Its tokenizer knows no such word.
    check(Code::PromptMalformed, "prompts.jsonl line 1: the teacher's tokenizer changes the text", |folder, spec| {
        scored(folder, spec, r#"[{"text": "na\u00efve", "weight": 0}, {"text": " so"}]"#);
    })
    .await;
    // How long it is, is told first.
    check(
        Code::PromptTooLong,
        "prompts.jsonl line 1: the prompt has 3 tokens; with its completion's 42",
        |folder, spec| {
            let words = " word1".repeat(40);
            scored(folder, spec, &format!(r#"[{{"text": "na\u00efve", "weight": 0}}, {{"text": "{words}"}}]"#));
        },
    )
    .await;
    check(Code::PromptMalformed, "prompts.jsonl line 1: there is no \"completion\"", |_, spec| {
        spec.teacher.mode = TeacherMode::Score;
    })
    .await;
    let (world, spec) = inputs().await;
    write(world.folder.path(), "{");
    let place = format!("{} line 1: ", spec.prompts.path);
    check_refused(&world, &spec, Code::PromptMalformed, &place).await;
}

#[tokio::test]
async fn a_line_that_workers_could_not_read_as_it_is_stored_is_refused() {
    let (start, end) = (r#"{"messages": [{"role": "user", "content": ""#, r#""}], "split": "held_out"}"#);
    check(Code::PromptMalformed, "prompts.jsonl line 9: it takes 10485", |folder, _| {
        // One word to the tokenizer.
        let long = "x".repeat(prompt_sets::MAX_LINE_BYTES - start.len() - end.len());
        std::fs::write(folder.join("prompts.jsonl"), format!("{}{start}{long}{end}\n", prompts(8))).unwrap();
    })
    .await;
}

#[tokio::test]
async fn keys_that_would_do_nothing_are_refused() {
    check(Code::SpecInvalid, "train.decay_ratio 0.5 does nothing without train.schedule wsd", |_, spec| {
        spec.train.decay_ratio = 0.5;
    })
    .await;
    check(Code::SpecInvalid, "train.loss.forward_kl is 1e-300, too small to train by", |_, spec| {
        spec.train.loss.forward_kl = Weight::constant(1e-300);
    })
    .await;
}

#[tokio::test]
async fn a_pruning_that_keeps_all_of_the_teacher_is_refused() {
    let all = Layers::These(vec![0, 1]);
    for prune in [
        Prune::to_layers(2),
        Prune { layers: Some(all.clone()), intermediate_size: Some(16), ..Prune::default() },
        Prune { hidden_size: Some(8), num_attention_heads: Some(2), ..Prune::default() },
    ] {
        check(
            Code::SpecInvalid,
            "student.init.prune keeps all 2 layers of the teacher at their full width, so it cuts nothing; cut more, or \
             start from the teacher as it is with checkpoint: {model: /",
            |_, spec| spec.student.init = Init::Prune(prune),
        )
        .await;
    }
    let (world, mut spec) = inputs().await;
    spec.student.init = Init::Prune(Prune { layers: Some(all), intermediate_size: Some(15), ..Prune::default() });
    admit(&world.context, &spec).await.unwrap();
    spec.student.init = Init::Checkpoint { model: spec.teacher.model.clone() };
    admit(&world.context, &spec).await.unwrap();
}

#[tokio::test]
async fn a_prompt_longer_than_the_context_is_named_by_its_line() {
    let long = |words: usize| {
        let text = "word1 ".repeat(words);
        format!("\n{}\n{{\"messages\": [{{\"role\": \"user\", \"content\": \"{text}\"}}]}}\n", prompts(6))
    };
    // 32 positions, 8 of them for the answer; line 1 is blank, rows are lines 2 to 7, line 8 is blank.
    check(Code::PromptTooLong, "prompts.jsonl line 9: the prompt has 25 tokens", |folder, _| {
        std::fs::write(folder.join("prompts.jsonl"), long(25)).unwrap();
    })
    .await;
    let (world, spec) = inputs().await;
    std::fs::write(world.folder.path().join("prompts.jsonl"), long(24)).unwrap();
    assert_eq!(admit(&world.context, &spec).await.unwrap().plan.max_target_tokens, 7 * 8);
}

#[tokio::test]
async fn held_out_prompts_must_not_leak_into_training() {
    let words = "one two three four five six seven eight nine ten eleven twelve thirteen";
    check(Code::PromptSetLeaks, "prompts.jsonl", |folder, spec| {
        let row = |split: &str, end: &str| {
            format!(
                "{{\"messages\": [{{\"role\": \"user\", \"content\": \"{words} {end}\"}}], \"split\": \"{split}\"}}\n"
            )
        };
        std::fs::write(folder.join("prompts.jsonl"), row("train", "a") + &row("held_out", "b")).unwrap();
        spec.teacher.sampling.max_new_tokens = 1;
    })
    .await;
}

#[tokio::test]
async fn teachers_that_cannot_be_run_are_refused() {
    let change = |name: &'static str, value: serde_json::Value| {
        move |folder: &Path, _: &mut JobSpec| {
            let mut config = config(16);
            config[name] = value;
            write_model(&folder.join("teacher"), &config, 2);
        }
    };
    check(
        Code::ModelUnsupported,
        "\"GPT2LMHeadModel\" is not supported; supported are LlamaForCausalLM",
        change("architectures", json!(["GPT2LMHeadModel"])),
    )
    .await;
    check(
        Code::ModelUnsupported,
        "quantised (\"gptq\")",
        change("quantization_config", json!({"quant_method": "gptq"})),
    )
    .await;
    check(Code::ModelMalformed, "lacks \"num_hidden_layers\"", change("num_hidden_layers", json!(null))).await;
    check(Code::ModelMalformed, "\"hidden_size\" is -8", change("hidden_size", json!(-8))).await;
    check(Code::ModelMalformed, "\"num_key_value_heads\" is 3", change("num_key_value_heads", json!(3))).await;
    check(Code::ModelMalformed, "config.json", |folder, _| {
        std::fs::write(folder.join("teacher/config.json"), "{").unwrap();
    })
    .await;
    check(Code::ModelMalformed, "tokenizer.json: is no tokenizer", |folder, _| {
        std::fs::write(folder.join("teacher/tokenizer.json"), "{}").unwrap();
    })
    .await;
    check(Code::VocabularyMismatch, "its highest token is 20", |folder, _| {
        write_model(&folder.join("teacher"), &config(16), 20);
    })
    .await;
}

/// What no worker could load is not admitted: both read the folder with the same code.
#[tokio::test]
async fn configs_that_no_worker_loads_are_refused() {
    for (name, value, says) in [
        ("rms_norm_eps", json!(0), "\"rms_norm_eps\" is 0"),
        ("rms_norm_eps", json!("x"), "\"rms_norm_eps\" is \"x\""),
        ("rope_theta", json!(-1), "\"rope_theta\" is -1"),
        ("rope_scaling", json!({"rope_type": "llama3"}), "llama3 rope scaling lacks \"factor\""),
        ("max_position_embeddings", json!(0), "\"max_position_embeddings\" is 0"),
        ("eos_token_id", json!(-3), "\"eos_token_id\" is -3"),
        ("eos_token_id", json!(16), "\"eos_token_id\" is 16, but the vocabulary has 16 tokens"),
    ] {
        check(Code::ModelMalformed, says, |folder, _| {
            let mut config = config(16);
            config[name] = value;
            write_model(&folder.join("teacher"), &config, 2);
        })
        .await;
    }
}

#[tokio::test]
async fn chat_templates_that_do_not_work_are_refused() {
    let template = |text: &'static str| {
        move |folder: &Path, _: &mut JobSpec| {
            std::fs::write(folder.join("teacher/chat_template.jinja"), text).unwrap();
        }
    };
    check(Code::ModelMalformed, "chat_template.jinja: the chat template does not work: syntax", template("{% if"))
        .await;
    let missing = |folder: &Path, _: &mut JobSpec| {
        std::fs::remove_file(folder.join("teacher/chat_template.jinja")).unwrap();
    };
    check(Code::ModelMalformed, "comes without a chat template", missing).await;
    // Compiled, never run here: a template is its author's program.
    let (world, spec) = inputs().await;
    let hostile =
        "{% set n = namespace(x='aaaaaaaaaa') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}";
    template(hostile)(world.folder.path(), &mut spec.clone());
    admit(&world.context, &spec).await.unwrap();
}

/// To open a pipe waits for who writes into it.
#[cfg(unix)]
#[tokio::test]
async fn pipes_are_refused_and_nobody_waits() {
    for name in ["prompts.jsonl", "teacher/config.json", "teacher/tokenizer.json", "teacher/model.safetensors"] {
        let pipe = move |folder: &Path, _: &mut JobSpec| {
            let path = folder.join(name);
            std::fs::remove_file(&path).unwrap();
            assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        };
        check(Code::FileUnreadable, &format!("{name}: it is no regular file"), pipe).await;
    }
}

#[tokio::test]
async fn weights_of_another_config_are_refused() {
    let layers = |of_weights: u64, of_config: u64| {
        move |folder: &Path, _: &mut JobSpec| {
            let with = |layers: u64| {
                let mut config = config(16);
                config["num_hidden_layers"] = json!(layers);
                config
            };
            write_model(&folder.join("teacher"), &with(of_weights), 2);
            std::fs::write(folder.join("teacher/config.json"), with(of_config).to_string()).unwrap();
        }
    };
    check(Code::ModelMalformed, "model.safetensors: lacks tensor \"model.layers.2.", layers(2, 3)).await;
    check(Code::ModelUnsupported, "has no place for tensor \"model.layers.2.", layers(3, 2)).await;
}

#[tokio::test]
async fn weights_that_end_early_are_refused() {
    let truncate = |bytes: u64| {
        move |folder: &Path, _: &mut JobSpec| {
            let file = std::fs::File::options().write(true).open(folder.join("teacher/model.safetensors")).unwrap();
            file.set_len(bytes).unwrap();
        }
    };
    let (world, _) = inputs().await;
    let whole = std::fs::metadata(world.folder.path().join("teacher/model.safetensors")).unwrap().len();
    for bytes in [0, 7, 20, whole - 1] {
        let message = format!("model.safetensors: the file ends at byte {bytes} of ");
        check(Code::WeightsTruncated, &message, truncate(bytes)).await;
    }
    check(Code::ModelMalformed, "is this a safetensors file?", |folder, _| {
        std::fs::write(folder.join("teacher/model.safetensors"), "these are no weights at all").unwrap();
    })
    .await;
    // The same behind an index.
    check(Code::WeightsTruncated, "model-00002-of-00002.safetensors: the file ends at byte 30", |folder, _| {
        let teacher = folder.join("teacher");
        std::fs::rename(teacher.join("model.safetensors"), teacher.join("model-00001-of-00002.safetensors")).unwrap();
        let whole = std::fs::read(teacher.join("model-00001-of-00002.safetensors")).unwrap();
        std::fs::write(teacher.join("model-00002-of-00002.safetensors"), &whole[..30]).unwrap();
        let index =
            json!({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}});
        std::fs::write(teacher.join("model.safetensors.index.json"), index.to_string()).unwrap();
    })
    .await;
    check(Code::ModelMalformed, "\"../secret\", outside the folder", |folder, _| {
        let teacher = folder.join("teacher");
        std::fs::remove_file(teacher.join("model.safetensors")).unwrap();
        let index = json!({"weight_map": {"a": "../secret"}});
        std::fs::write(teacher.join("model.safetensors.index.json"), index.to_string()).unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_student_must_fit_its_teacher() {
    check(Code::SpecInvalid, "student.init.prune.layers is 3; the teacher", |_, spec| {
        spec.student.init = Init::Prune(Prune::to_layers(3));
    })
    .await;
    check(Code::SpecInvalid, "student.init.prune.hidden_size is 9; the teacher has 8", |_, spec| {
        spec.student.init = Init::Prune(Prune { hidden_size: Some(9), ..Prune::default() });
    })
    .await;
    check(Code::SpecInvalid, "student.lora.rank is 9, more than the student's hidden_size of 8", |_, spec| {
        spec.student.lora = Some(Lora { rank: 9, ..Lora::default() });
    })
    .await;
    let student = |config: serde_json::Value, words: usize| {
        move |folder: &Path, spec: &mut JobSpec| {
            let model = write_model(&folder.join("student"), &config, words);
            spec.student.init = Init::Checkpoint { model: model.display().to_string() };
        }
    };
    check(Code::VocabularyMismatch, "has a vocabulary of 17 tokens, the teacher", student(config(17), 2)).await;
    check(Code::TokenizerMismatch, "calls token 3 \"word3\"", student(config(16), 3)).await;
    let mut short = config(16);
    short["max_position_embeddings"] = json!(10);
    check(Code::PromptTooLong, "line 1", student(short, 2)).await;

    let (world, mut spec) = inputs().await;
    student(config(16), 2)(world.folder.path(), &mut spec);
    assert_eq!(admit(&world.context, &spec).await.unwrap().plan.student_parameters, 128 + 2 * 592 + 8);
    spec.student.init = Init::Prune(Prune { intermediate_size: Some(5), hidden_size: Some(6), ..Prune::to_layers(1) });
    let plan = admit(&world.context, &spec).await.unwrap().plan;
    // embedding 16x6; q, k with v, and o 6x8 each, mlp 3x5x6, norms 12; last norm 6.
    assert_eq!(plan.student_parameters, 96 + 3 * 48 + 90 + 12 + 6);
    let of_width = |width| Init::Config {
        hidden_size: width,
        intermediate_size: width,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 2,
    };
    spec.student.init = of_width(8);
    let plan = admit(&world.context, &spec).await.unwrap().plan;
    assert_eq!(plan.student_parameters, 16 * 8 + (4 * 8 * 8 + 3 * 8 * 8 + 16) + 8);
    spec.student.init = of_width(16);
    check_refused(&world, &spec, Code::SpecInvalid, "a student of 2096 parameters, its teacher has 1320").await;
}
