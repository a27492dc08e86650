//! The two jobs of a rehearsal, and how they went: on a group that loses a stage, or on one process.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use retort_artifact::soft_targets::{Limits, Shard, decode};
use retort_core::random::{Counter, Purpose};
use retort_proto::{self as proto, JobState, job_event::What};
use retort_tests::{prompts::Shape, published::published_once, retort::Up};
use serde_json::json;

use crate::{Failure, fault::Fault, stages::Reading, vocabulary};

/// A job that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(600);

/// What is asked for.
pub struct Job {
    pub mode: &'static str,
    shape: Shape,
    spec: PathBuf,
}

/// How it went.
pub struct Done {
    pub seconds: f64,
    /// By their index.
    pub shards: BTreeMap<u32, Shard>,
    /// Through the layers, prompts counted, in the time between shards of which none was disturbed.
    pub tokens_a_second: f64,
    /// What the stages had done when each shard was published.
    pub readings: Vec<Reading>,
}

impl Job {
    /// Rows that bring completions of 40 words.
    pub fn score(folder: &Path, teacher: &Path) -> Result<Self, Failure> {
        let shape = Shape { name: "score", train: 48, held_out: 16, shard_rows: 16, tokens: 1, passes: 1 };
        Self::write(folder, teacher, shape)
    }

    /// Rows of which completions of 12 tokens are wanted.
    pub fn generate(folder: &Path, teacher: &Path) -> Result<Self, Failure> {
        let shape = Shape { name: "generate", train: 32, held_out: 8, shard_rows: 8, tokens: 12, passes: 1 };
        Self::write(folder, teacher, shape)
    }

    fn write(folder: &Path, teacher: &Path, shape: Shape) -> Result<Self, Failure> {
        let mode = shape.name;
        let folder = folder.join(mode);
        fs::create_dir_all(&folder)?;
        let rows: String = (0..shape.train + shape.held_out).map(|row| line(row, &shape)).collect();
        fs::write(folder.join("prompts.jsonl"), rows)?;
        // The smallest student there is: the teacher is what is rehearsed. Heads are stored unrounded, so
        // that equal shards mean equal bits.
        let spec = json!({
            "name": format!("rehearsal-{mode}"), "seed": 405,
            "prompts": { "path": "prompts.jsonl", "shard_rows": shape.shard_rows },
            "teacher": {
                "model": teacher, "mode": mode,
                "sampling": { "temperature": 1.0, "top_p": 0.95, "max_new_tokens": shape.tokens },
                "soft_targets": { "codec": "head_draws", "head": 32, "draws": 16, "quantiser": "f32" },
            },
            "student": { "init": { "config": {
                "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                "num_key_value_heads": 1,
            } } },
            "train": { "passes": 1, "batch_rows": 16, "checkpoint_steps": 0 },
        });
        let path = folder.join("job.yaml");
        fs::write(&path, spec.to_string())?;
        Ok(Self { mode, shape, spec: path })
    }

    /// From `job create` to the promoted student; with a fault, in the middle of a shard once two are
    /// published. Every shard is published once, or this panics.
    pub async fn run(&self, up: &mut Up, mut fault: Option<&mut Fault>) -> Result<Done, Failure> {
        let started = Instant::now();
        let job = up.create(&self.spec);
        let grouped = up.processes().contains_key("teacher-1-stage-1");
        let mut readings = Vec::new();
        let events = up
            .follow(&job, PATIENCE, |up, event| {
                match &event.what {
                    Some(What::ShardPublished(shard)) => {
                        let at = started.elapsed().as_secs_f64();
                        println!(
                            "{:<15}{at:>6.1} s  shard {} published, epoch {}",
                            self.mode, shard.shard, shard.epoch
                        );
                        if grouped {
                            readings.push(Reading::of(up));
                        }
                        let published = event.progress.map_or(0, |progress| progress.shards_published);
                        if let Some(fault) = fault.as_mut() {
                            match fault.at {
                                None if published >= 2 => fault.strike(up),
                                Some(_) => fault.recovered(),
                                None => {}
                            }
                        }
                    }
                    Some(What::AttemptLost(lost)) => {
                        let redone = lost.redone.clone().unwrap_or_default();
                        println!("{:<15}          {} is redone: {}", self.mode, redone.task, redone.reason);
                    }
                    _ => {}
                }
                false
            })
            .await;
        let seconds = started.elapsed().as_secs_f64();
        let end = up.jobs().await.get_job(proto::GetJobRequest { name: job.clone() }).await?.into_inner();
        if end.state != JobState::Succeeded as i32 {
            return Err(format!("the {} job ended as {:?}: {:?}", self.mode, end.state(), end.error).into());
        }
        let lost = events.iter().filter(|event| matches!(event.what, Some(What::AttemptLost(_)))).count();
        if lost != usize::from(fault.is_some()) {
            return Err(format!("{lost} attempts of the {} job were lost", self.mode).into());
        }
        published_once(up, &job, &self.shape, &events);
        let shards = shards(up, &events, &job)?;
        Ok(Done { seconds, tokens_a_second: rate(&events, &shards), shards, readings })
    }
}

/// A row of made-up words, others in each row and mode.
fn line(row: usize, shape: &Shape) -> String {
    let scored = shape.name == "score";
    let mut draws = Counter::new(405, Purpose::Shuffle, row as u64, u64::from(scored));
    let mut text = |words: usize| {
        let words: Vec<String> = (0..words).map(|_| vocabulary::word(4 + draws.below(127_996) as u32)).collect();
        words.join(" ")
    };
    let mut line = json!({
        "id": format!("row-{row}"), "split": if row < shape.train { "train" } else { "held_out" },
        "messages": [{ "role": "user", "content": text(12 + row % 9) }],
    });
    if scored {
        line["completion"] = text(40).into();
    }
    line.to_string() + "\n"
}

fn shards(up: &Up, events: &[proto::JobEvent], job: &str) -> Result<BTreeMap<u32, Shard>, Failure> {
    let mut shards = BTreeMap::new();
    for event in events {
        if let Some(What::ShardPublished(shard)) = &event.what {
            let key = format!("{job}/shards/{:05}/{}.parquet", shard.shard, shard.epoch);
            let bytes = fs::read(up.home.join("store").join(&key))?;
            shards.insert(shard.shard, decode(bytes, Limits::default())?);
        }
    }
    Ok(shards)
}

/// Tokens a second over the shards that began when another was published and met no fault. The first one
/// of a job has the loading in it.
fn rate(events: &[proto::JobEvent], shards: &BTreeMap<u32, Shard>) -> f64 {
    let time =
        |event: &proto::JobEvent| event.time.map_or(0.0, |time| time.seconds as f64 + f64::from(time.nanos) / 1e9);
    let (mut tokens, mut seconds, mut since) = (0, 0.0, None);
    for event in events {
        match &event.what {
            Some(What::AttemptLost(_)) => since = None,
            Some(What::ShardPublished(shard)) => {
                if let Some(since) = since {
                    tokens += shards[&shard.shard].sequences.iter().map(|row| row.token_ids.len()).sum::<usize>();
                    seconds += time(event) - since;
                }
                since = Some(time(event));
            }
            _ => {}
        }
    }
    tokens as f64 / seconds
}
