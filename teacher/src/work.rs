//! The name of a shard's content: where two jobs ask for the same work, one computes it.
//!
//! A shard is a pure function of its rows, the teacher, the parameters and the seed. The name is a
//! SHA-256 over exactly those, so it says nothing of the job, the shard's index or the attempt.

use retort_artifact::{
    prompts::Row,
    sha256_hex,
    soft_targets::{Header, SCHEMA_VERSION, Shard, TailLogprobs},
};
use retort_core::{Code, Error, Result, spec::TeacherMode};
use serde_json::Value;

use crate::{engine::Capabilities, shard::Order};

/// SHA-256, in hexadecimal, over a listing of all that decides the content of `order`'s shard, each
/// part behind its length.
///
/// - of the format: its version;
/// - of the teacher: weights, config files, tokenizer and chat template by their hashes, the
///   vocabulary's size, and the arithmetic (engine, its version, dtype);
/// - of the parameters: seed, mode, how text is sampled (nothing of it in score mode, which samples
///   none), split, and what is kept of each distribution (a held-out shard keeps what it always does,
///   whatever the job asks for);
/// - of the rows: line (it names the random streams), id, tags and messages; the completion in score
///   mode, the only one that reads it.
pub fn work_sha256(order: &Order, teacher: &Capabilities) -> Result<String> {
    let spec = &order.spec.teacher;
    let mut list = Listing::default();
    list.text("retort shard");
    list.number(u64::from(SCHEMA_VERSION));

    for text in [
        &teacher.teacher_sha256,
        &teacher.config_sha256,
        &teacher.tokenizer_sha256,
        &teacher.chat_template_sha256,
        teacher.engine,
        teacher.engine_version,
        teacher.dtype,
    ] {
        list.text(text);
    }
    list.number(u64::from(teacher.vocab_size));

    list.number(order.spec.seed);
    match spec.mode {
        TeacherMode::Generate => {
            list.text("generate");
            list.number(u64::from(spec.sampling.max_new_tokens));
            list.number(spec.sampling.temperature.to_bits());
            list.number(spec.sampling.top_p.to_bits());
            list.number(u64::from(spec.sampling.top_k));
            list.number(spec.sampling.min_p.to_bits());
            list.number(spec.sampling.repetition_penalty.to_bits());
            list.number(spec.sampling.stop.len() as u64);
            spec.sampling.stop.iter().for_each(|stop| list.text(stop));
            list.number(u64::from(order.completions()));
        }
        TeacherMode::Score => list.text("score"),
    }
    list.text(order.split.as_str());
    let soft_targets = serde_json::to_string(&order.soft_targets());
    list.text(&soft_targets.map_err(|error| Error::internal(format!("soft-target parameters to JSON: {error}")))?);

    list.number(order.lines.len() as u64);
    for (line, row) in order.lines.clone().zip(&order.rows[order.lines.clone()]) {
        list.number(line as u64);
        list.row(row, spec.mode);
    }
    Ok(sha256_hex(&list.bytes))
}

/// Whether `shard`, found under the same name, is what `order` asks for. `shard-corrupt` names the
/// first difference and both sides of it.
pub fn check(order: &Order, teacher: &Capabilities, shard: &Shard) -> Result<()> {
    let found = &shard.header;
    let asked = order.header(teacher)?;
    let sampling_json = match order.spec.teacher.mode {
        TeacherMode::Generate => asked.sampling_json.clone(),
        TeacherMode::Score => found.sampling_json.clone(),
    };
    let asked = Header {
        job: found.job.clone(),
        shard: found.shard,
        epoch: found.epoch,
        prompt_set_sha256: found.prompt_set_sha256.clone(),
        sampling_json,
        tail_logprobs: match (asked.tail_logprobs, found.tail_logprobs) {
            // Its value came with the content.
            (TailLogprobs::Mean(_), mean @ TailLogprobs::Mean(_)) => mean,
            (asked, _) => asked,
        },
        ..asked
    };
    if *found != asked {
        let (found, asked) = (fields(found)?, fields(&asked)?);
        let differs = asked.iter().find(|(name, value)| found.get(*name) != Some(value));
        let (name, value) = differs.map_or(("header", &Value::Null), |(name, value)| (name.as_str(), value));
        return Err(other(format!(
            "its {name} is {}, and {value} is asked for",
            found.get(name).unwrap_or(&Value::Null)
        )));
    }
    let completions = order.completions();
    let asked = order.lines.len() * completions as usize;
    if shard.sequences.len() != asked {
        return Err(other(format!("it has {} rows, and {asked} are asked for", shard.sequences.len())));
    }
    let lines = order.lines.clone().flat_map(|line| (0..completions).map(move |completion| (line, completion)));
    for ((line, completion), sequence) in lines.zip(&shard.sequences) {
        let id = completion_id(&order.rows[line].id, completion);
        if sequence.row != line as u64 || sequence.row_id != id {
            return Err(other(format!(
                "it has row {:?} of line {}, where row {id:?} of line {line} is asked for",
                sequence.row_id, sequence.row
            )));
        }
    }
    Ok(())
}

/// The name of a row's completion, from 0: the first has the row's own.
pub(crate) fn completion_id(row_id: &str, completion: u32) -> String {
    match completion {
        0 => row_id.to_owned(),
        more => format!("{row_id}#{}", more + 1),
    }
}

#[derive(Default)]
struct Listing {
    bytes: Vec<u8>,
}

impl Listing {
    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.bytes.extend_from_slice(text.as_bytes());
    }

    fn number(&mut self, number: u64) {
        self.bytes.extend_from_slice(&number.to_le_bytes());
    }

    fn row(&mut self, row: &Row, mode: TeacherMode) {
        self.text(&row.id);
        self.number(row.tags.len() as u64);
        for tag in &row.tags {
            self.text(tag);
        }
        self.number(row.messages.len() as u64);
        for message in &row.messages {
            self.text(message.role.as_str());
            self.text(&message.content);
        }
        if mode == TeacherMode::Score {
            self.text(row.completion.as_deref().unwrap_or_default());
        }
    }
}

fn fields(header: &Header) -> Result<serde_json::Map<String, Value>> {
    match serde_json::to_value(header) {
        Ok(Value::Object(fields)) => Ok(fields),
        _ => Err(Error::internal("a shard's header has no JSON form")),
    }
}

fn other(why: String) -> Error {
    Error::new(Code::ShardCorrupt, format!("the shard is not the work it is published as: {why}"))
}

#[cfg(test)]
mod tests;
