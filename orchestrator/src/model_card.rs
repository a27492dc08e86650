//! `README.md` of a version, or of a candidate that was not promoted: Hugging Face's model card (Mitchell et al., "Model Cards for Model Reporting",
//! 2019), written by the figures of the job alone. The same job makes the same card: it has no date of its own.
//!
//! Names, tags and paths come from outside. In the front matter they are quoted and escaped, in the text they are
//! escaped for Markdown; of a path only the last part is told.

mod escape;
mod license;

use bytes::Bytes;
use retort_artifact::sha256_hex;
use retort_core::{
    Code, Error, Result,
    spec::{Codec, JobSpec, TeacherMode},
    state::Split,
};
use serde_json::Value;

use self::escape::{code, last_part, markdown, yaml};
use crate::{
    context::Context,
    database::{
        jobs::Job,
        shards::{self, Fidelity},
    },
    gates,
    report::{Evaluation, GateResult, Quality, TrainFinish},
};

/// Tags told one by one, those with the most tokens.
const MAX_TAGS: usize = 50;

/// What a card is made of.
pub struct Facts<'a> {
    /// None of a candidate that was not promoted.
    pub version: Option<u32>,
    pub job: &'a Job,
    pub evaluation: &'a Evaluation,
    pub finish: &'a TrainFinish,
    pub gates: Vec<GateResult>,
    /// Of the training split.
    pub shards: Shards,
    /// As the teacher's own card says it.
    pub license: Option<String>,
    /// In its folder, beside the weights.
    pub gguf: Vec<String>,
}

/// The soft targets that the student learned from.
pub struct Shards {
    pub count: u32,
    pub tokens: u64,
    pub bytes: u64,
    /// Of a list with a line `SHA-256  index` for each shard.
    pub sha256: String,
    pub fidelity: Fidelity,
}

/// Writes the card into `folder`, whose other files are there already; one of an interrupted try gives way.
pub async fn write(
    context: &Context,
    job: &Job,
    finish: &TrainFinish,
    folder: &str,
    version: Option<u32>,
) -> Result<()> {
    let Some(evaluation) = &job.evaluation else {
        return Err(Error::internal(format!("{} has no evaluation to tell of", job.id.resource_name())));
    };
    let files = context.store.list(folder).await?;
    let gguf = files.iter().filter_map(|entry| entry.key.strip_prefix(folder));
    let mut gguf: Vec<String> = gguf.filter(|name| name.ends_with(".gguf")).map(str::to_owned).collect();
    gguf.sort_unstable();
    let facts = Facts {
        version,
        job,
        evaluation,
        finish,
        gates: gates::judge(&job.spec.gates, &evaluation.before, &evaluation.after),
        shards: read_shards(context, job).await?,
        license: license::of_folder(&job.spec.teacher.model).await,
        gguf,
    };
    let key = format!("{folder}README.md");
    match context.store.delete(&key).await {
        Err(error) if error.code == Code::ObjectNotFound => {}
        other => other?,
    }
    context.store.put_new(&key, Bytes::from(render(&facts))).await
}

async fn read_shards(context: &Context, job: &Job) -> Result<Shards> {
    let mut snapshot = context.database.read().await?;
    let range = job.plan.shards_of(Split::Train);
    let published = shards::list_contiguous(&mut snapshot, &job.id, range.start, range.end - range.start).await?;
    let list: String = published.iter().map(|shard| format!("{}  {}\n", shard.sha256, shard.shard)).collect();
    let (tokens, bytes) = shards::totals(&mut snapshot, &job.id, Split::Train).await?;
    Ok(Shards {
        count: job.plan.train_shards,
        tokens,
        bytes,
        sha256: sha256_hex(list.as_bytes()),
        fidelity: shards::mean_fidelity(&mut snapshot, &job.id, Split::Train).await?,
    })
}

/// The whole card.
pub fn render(facts: &Facts<'_>) -> String {
    let mut card = Card(String::new());
    card.front_matter(facts);
    card.opening(facts);
    card.making(facts);
    card.data(facts);
    card.quality(facts);
    card.limits(facts);
    card.0
}

/// The text so far.
struct Card(String);

impl Card {
    fn line(&mut self, text: &str) {
        self.0.push_str(text);
        self.0.push('\n');
    }

    fn section(&mut self, title: &str) {
        self.line(&format!("\n## {title}\n"));
    }

    /// Cells are escaped already.
    fn row(&mut self, cells: &[&str]) {
        self.line(&format!("| {} |", cells.join(" | ")));
    }

    fn front_matter(&mut self, facts: &Facts<'_>) {
        let after = &facts.evaluation.after;
        self.line("---");
        self.line(&format!("base_model: {}", yaml(&teacher(&facts.job.spec))));
        self.line("library_name: transformers\npipeline_tag: text-generation");
        if let Some(license) = &facts.license {
            self.line(&format!("license: {}", yaml(license)));
        }
        self.line("tags:\n- distillation\n- retort");
        if facts.version.is_none() {
            self.line("- not-promoted");
        }
        self.line(&format!("model-index:\n- name: {}\n  results:", yaml(&facts.job.spec.name)));
        self.line("  - task:\n      type: text-generation\n    dataset:\n      type: custom");
        self.line("      name: held-out prompts of the same prompt set\n      split: held_out\n    metrics:");
        for (kind, name, value) in [
            ("kl_divergence", "KL to the teacher, nats a token", after.kl),
            ("top1_agreement", "top-1 agreement with the teacher", after.top1_agreement),
            ("perplexity", "perplexity", after.student_perplexity),
        ] {
            // YAML has no number for what is not finite, and a hub no use.
            if value.is_finite() {
                self.line(&format!("    - type: {kind}\n      name: {}\n      value: {value:?}", yaml(name)));
            }
        }
        self.line("---");
    }

    fn opening(&mut self, facts: &Facts<'_>) {
        let job = facts.job;
        let name = markdown(&job.spec.name);
        match facts.version {
            Some(version) => self.line(&format!("\n# {name}, version {version}\n")),
            None => {
                self.line(&format!("\n# {name}, a candidate that was not promoted\n"));
                self.line(&format!("**Not promoted: {}.** It is no version of {name}.\n", reason(&facts.gates)));
            }
        }
        self.line(&format!(
            "A student of {} parameters, distilled by retort from the teacher {} of {} parameters. The folder loads in \
             transformers{}",
            count(job.plan.student_parameters),
            code(&teacher(&job.spec)),
            count(job.plan.teacher_parameters),
            if facts.gguf.is_empty() { "." } else { "; for llama.cpp there are:" }
        ));
        if !facts.gguf.is_empty() {
            self.line("");
        }
        for name in &facts.gguf {
            self.line(&format!("- {}", code(name)));
        }
    }

    fn making(&mut self, facts: &Facts<'_>) {
        let (spec, finish) = (&facts.job.spec, facts.finish);
        let judged = finish.judged_step(&facts.job.id);
        self.section("How it was made");
        self.row(&["", ""]);
        self.row(&["---", "---"]);
        self.row(&["teacher", &code(&teacher(spec))]);
        self.row(&["student's start", &code(&json(&spec.student.init))]);
        self.row(&["loss", &code(&json(&spec.train.loss))]);
        self.row(&[
            "optimiser steps",
            &format!(
                "{} of up to {} sequences, {} passes",
                count(judged.into()),
                spec.train.batch_rows,
                spec.train.passes
            ),
        ]);
        self.row(&["highest learning rate", &format!("{:?}", spec.train.learning_rate)]);
        let point = finish.curve.iter().find(|point| point.step == judged && judged != finish.steps);
        match point {
            Some(point) => self.row(&["target tokens trained on", &count(point.target_tokens)]),
            None => {
                self.row(&["tokens processed", &count(finish.processed_tokens)]);
                if finish.target_tokens > 0 {
                    self.row(&["target tokens trained on", &count(finish.target_tokens)]);
                }
            }
        }
        if finish.trained_parameters > 0 && finish.trained_parameters != facts.job.plan.student_parameters {
            self.row(&["parameters trained", &count(finish.trained_parameters)]);
        }
        if judged != finish.steps {
            self.row(&[
                "chosen",
                &format!("the best checkpoint on held-out prompts, of {} steps", count(finish.steps.into())),
            ]);
        }
        if let Some(lora) = &spec.student.lora {
            self.row(&["adapters (LoRA)", &format!("{}, merged; as such in `adapter/`", code(&json(lora)))]);
        }
        if spec.train.ema_decay > 0.0 {
            self.row(&["weights", &format!("their running average, decay {:?}", spec.train.ema_decay)]);
        }
        if let Some(parallel) = &spec.train.parallel {
            let most = if finish.workers > 0 { format!("{} at once, of ", finish.workers) } else { String::new() };
            self.row(&["workers", &format!("{most}{}", code(&json(parallel)))]);
        }
        self.row(&["seed", &spec.seed.to_string()]);
        self.row(&["job", &code(&facts.job.id.resource_name())]);
    }

    fn data(&mut self, facts: &Facts<'_>) {
        let (job, shards) = (facts.job, &facts.shards);
        self.section("Data");
        let who = match job.spec.teacher.mode {
            TeacherMode::Generate => "The teacher wrote the completions.",
            TeacherMode::Score => "The completions came with the prompts; the teacher scored them.",
        };
        self.line(&format!(
            "{} prompts to train on and {} held out, with SHA-256 {} as a whole. {who} What the teacher thought of each token \
             lies in {} shards: {} target tokens, {} bytes. The list of a line `SHA-256  index` for each of them has \
             SHA-256 {}.",
            count(job.plan.train_rows),
            count(job.plan.held_out_rows),
            code(&job.prompt_set_sha256),
            count(shards.count.into()),
            count(shards.tokens),
            count(shards.bytes),
            code(&shards.sha256),
        ));
    }

    fn quality(&mut self, facts: &Facts<'_>) {
        let Evaluation { before, after, after_by_tag, .. } = facts.evaluation;
        self.section("Quality on the held-out prompts");
        self.row(&["", "before", "after", "teacher"]);
        self.row(&["---", "---:", "---:", "---:"]);
        self.row(&["KL to the teacher, nats a token", &number(before.kl), &number(after.kl), ""]);
        self.row(&["top-1 agreement", &share(before.top1_agreement), &share(after.top1_agreement), ""]);
        let perplexities = [before.student_perplexity, after.student_perplexity, after.teacher_perplexity].map(number);
        self.row(&["perplexity", &perplexities[0], &perplexities[1], &perplexities[2]]);
        self.line(&format!("\nJudged on {} tokens, before and after training.", count(after.tokens)));
        if !facts.gates.is_empty() {
            self.line("");
            self.row(&["gate", "limit", "value", ""]);
            self.row(&["---", "---:", "---:", "---"]);
            for gate in &facts.gates {
                let verdict = match gate.passed {
                    true => "passed",
                    false if gate.value.is_finite() => "failed",
                    false => "failed: its value is no finite number",
                };
                self.row(&[&code(&gate.gate), &number(gate.limit), &number(gate.value), verdict]);
            }
        }
        if after_by_tag.is_empty() {
            return;
        }
        let mut tags: Vec<(&String, &Quality)> = after_by_tag.iter().collect();
        tags.sort_by_key(|(tag, quality)| (std::cmp::Reverse(quality.tokens), *tag));
        self.line("");
        self.row(&["after, by tag", "KL", "top-1", "tokens"]);
        self.row(&["---", "---:", "---:", "---:"]);
        for (tag, quality) in tags.iter().take(MAX_TAGS) {
            let figures = [number(quality.kl), share(quality.top1_agreement), count(quality.tokens)];
            self.row(&[&markdown(tag), &figures[0], &figures[1], &figures[2]]);
        }
        if tags.len() > MAX_TAGS {
            self.line(&format!("\n{} more tags are in the job's report.", tags.len() - MAX_TAGS));
        }
    }

    fn limits(&mut self, facts: &Facts<'_>) {
        let stored = &facts.job.spec.teacher.soft_targets;
        self.section("Limits");
        self.line(
            "- The figures compare the student with its teacher, on prompts held out of the same prompt set. They say \
             nothing about other prompts, nor whether the teacher is right.",
        );
        let what = match stored.codec {
            Codec::Full => "every token's probability",
            Codec::TopK { .. } => "the likeliest tokens alone, from which a student learns too sharp a distribution",
            Codec::TopKTail { .. } => "the likeliest tokens, and all others as one",
            _ => "a part of the tokens, drawn so that the loss is right in the mean and noisy at each token",
        };
        self.line(&format!("- Of the teacher's distributions the soft targets keep {what}: {}.", code(&json(stored))));
        if let Some(kl) = facts.shards.fidelity.kl {
            self.line(&format!("- Storing them moved them by {} nats a token in the mean (KL).", number(kl)));
        }
        if !facts.gguf.is_empty() {
            self.line(
                "- The figures are those of the safetensors weights; GGUF files of a smaller type were not judged.",
            );
        }
        self.line("- What binds the use of the teacher and of the prompts binds the use of the student.");
    }
}

/// Why a candidate was not promoted.
fn reason(gates: &[GateResult]) -> String {
    let failed: Vec<String> = gates.iter().filter(|gate| !gate.passed).map(|gate| code(&gate.gate)).collect();
    match &failed[..] {
        [] => "nothing was judged".to_owned(),
        [one] => format!("it failed the gate {one}"),
        several => format!("it failed the gates {}", several.join(", ")),
    }
}

/// Its folder's name.
fn teacher(spec: &JobSpec) -> String {
    last_part(&spec.teacher.model)
}

/// A part of the spec on one line, paths cut to their last part.
fn json(value: &impl serde::Serialize) -> String {
    fn cut(value: &mut Value) {
        match value {
            Value::String(text) => *text = last_part(text),
            Value::Array(values) => values.iter_mut().for_each(cut),
            Value::Object(fields) => fields.values_mut().for_each(cut),
            _ => {}
        }
    }
    let mut value = serde_json::to_value(value).unwrap_or_default();
    cut(&mut value);
    value.to_string()
}

fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Four figures.
fn number(value: f64) -> String {
    match value.abs() {
        _ if !value.is_finite() => "-".to_owned(),
        0.0 => "0".to_owned(),
        size if !(1e-3..1e6).contains(&size) => format!("{value:.3e}"),
        size => format!("{value:.*}", (3 - size.log10().floor() as i32).clamp(0, 6) as usize),
    }
}

fn share(value: f64) -> String {
    if value.is_finite() { format!("{:.1} %", value * 100.0) } else { "-".to_owned() }
}

#[cfg(test)]
mod tests;
