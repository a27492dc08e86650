//! Seconds a step: of one worker, of two that share every step over several links, and of two that exchange weights
//! every few steps.

use std::{fs, time::Duration};

use retort_proto::{self as proto, JobState};
use retort_tests::teacher;
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    Failure,
    carry::carry,
    cluster::{Cluster, PATIENCE, Place, Said},
    far::{FAR, NEAR},
};

const BATCH_ROWS: u32 = 4;
const TRAIN_ROWS: usize = 16;
const HELD_OUT_ROWS: usize = 2;
/// Of a row's completion; most are one token.
const WORDS: usize = 116;
const SHAPED: [u32; 2] = [1000, 100];

/// A student of random weights in the vocabulary of SmolLM2, 49,152 tokens.
const SMALL: Shape = Shape { hidden: 40, intermediate: 128, layers: 2, heads: 4, kv_heads: 2 };
const LARGE: Shape = Shape { hidden: 384, intermediate: 1024, layers: 4, heads: 6, kv_heads: 2 };

struct Shape {
    hidden: u32,
    intermediate: u32,
    layers: u32,
    heads: u32,
    kv_heads: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Link {
    Loopback,
    Mbit(u32),
}

#[derive(Serialize)]
pub struct Speed {
    /// Through the student, prompts among them.
    pub tokens_a_step: f64,
    pub sizes: Vec<Size>,
}

#[derive(Serialize)]
pub struct Size {
    /// Trained parameters.
    pub trained: f64,
    /// Seconds a step of one worker.
    pub alone: f64,
    pub synchronous: Vec<Synchronous>,
    pub diloco: Vec<Diloco>,
    /// Of the weights, or of a difference, in an exchange.
    pub exchange_bytes: u64,
    /// Seconds that a link takes for as many.
    pub carried: Vec<Carried>,
}

#[derive(Serialize)]
pub struct Synchronous {
    pub link: Link,
    /// A step.
    pub seconds: f64,
    /// What the documentation's formula says.
    pub computed: f64,
}

#[derive(Serialize)]
pub struct Diloco {
    pub inner_steps: u32,
    /// A step, all workers' counted, with the store in a folder of this machine.
    pub seconds: f64,
}

#[derive(Serialize)]
pub struct Carried {
    pub link: Link,
    pub there: f64,
    pub back: f64,
}

/// How long is measured.
struct Length {
    seconds: f64,
    /// Steps or rounds, at least.
    intervals: usize,
}

struct Paced {
    seconds: f64,
    trained: f64,
    exchange_bytes: u64,
}

pub async fn measure(cluster: &mut Cluster<'_>, quick: bool) -> Result<Speed, Failure> {
    fs::write(cluster.folder.join("speed.jsonl"), rows())?;
    let tokens_a_step = prepare(cluster).await?;
    let shapes: &[Shape] = if quick { &[SMALL] } else { &[SMALL, LARGE] };
    let mut sizes = Vec::new();
    for shape in shapes {
        sizes.push(size(cluster, shape, quick).await?);
    }
    Ok(Speed { tokens_a_step, sizes })
}

async fn size(cluster: &mut Cluster<'_>, shape: &Shape, quick: bool) -> Result<Size, Failure> {
    let least = if quick { 2.0 } else { 12.0 };
    let steps = Length { seconds: least, intervals: if quick { 2 } else { 4 } };
    cluster.second_at(None)?;
    let alone = pace(cluster, shape, Value::Null, &steps).await?;
    let mut size = Size {
        trained: alone.trained,
        alone: alone.seconds,
        synchronous: Vec::new(),
        diloco: Vec::new(),
        exchange_bytes: 0,
        carried: Vec::new(),
    };
    eprintln!("{:.1} M: one worker {:.3} s a step", size.trained / 1e6, size.alone);

    cluster.second_at(Some(Place::Here))?;
    for inner_steps in [5, 20] {
        let parallel = json!({"workers": 2, "mode": "diloco", "inner_steps": inner_steps});
        let rounds = Length { seconds: least, intervals: if inner_steps == 5 && !quick { 2 } else { 1 } };
        let paced = pace(cluster, shape, parallel, &rounds).await?;
        size.exchange_bytes = paced.exchange_bytes;
        size.diloco.push(Diloco { inner_steps, seconds: paced.seconds });
        eprintln!("  two, diloco of {inner_steps}: {:.3} s a step", paced.seconds);
    }
    let mut links = vec![Link::Loopback];
    links.extend(SHAPED.map(Link::Mbit));
    for link in links {
        let host = match link {
            Link::Loopback => NEAR,
            Link::Mbit(mbit) => {
                cluster.far.shape(mbit)?;
                cluster.second_at(Some(Place::There))?;
                FAR
            }
        };
        let paced = pace(cluster, shape, json!({"workers": 2}), &steps).await?;
        let over = match link {
            Link::Loopback => 0.0,
            Link::Mbit(mbit) => 8.0 * size.trained / (f64::from(mbit) * 1e6 / 8.0),
        };
        size.synchronous.push(Synchronous { link, seconds: paced.seconds, computed: size.alone / 2.0 + over });
        let (there, back) = carry(cluster.far, host, size.exchange_bytes)?;
        size.carried.push(Carried { link, there, back });
        eprintln!(
            "  two, synchronous, {link:?}: {:.3} s a step; {} bytes carried in {there:.2} and {back:.2} s",
            paced.seconds, size.exchange_bytes
        );
    }
    Ok(size)
}

/// Publishes the shards that every other job takes again; tokens of a step.
async fn prepare(cluster: &mut Cluster<'_>) -> Result<f64, Failure> {
    let spec = spec(cluster, &SMALL, 1, &Value::Null);
    let job = cluster.up.create(&cluster.spec("speed", &spec)?);
    cluster.up.follow(&job, PATIENCE, |_, _| false).await;
    let end = cluster.up.jobs().await.get_job(proto::GetJobRequest { name: job }).await?.into_inner();
    match (end.state(), end.report) {
        (JobState::Succeeded, Some(report)) => {
            Ok(report.processed_tokens as f64 / (TRAIN_ROWS as f64 / f64::from(BATCH_ROWS)))
        }
        (state, _) => Err(format!("the first job ended as {state:?}: {:?}", end.error).into()),
    }
}

/// Trains until a pace is seen, and cancels.
async fn pace(cluster: &mut Cluster<'_>, shape: &Shape, parallel: Value, length: &Length) -> Result<Paced, Failure> {
    let workers = parallel["workers"].as_f64().unwrap_or(1.0);
    let message = if parallel["mode"] == "diloco" { "a round is done" } else { "trained" };
    let spec = spec(cluster, shape, 10_000, &parallel);
    let job = cluster.up.create(&cluster.spec("pace", &spec)?);
    let seen = |said: &[Said]| {
        let trained = said.iter().find_map(|said| said.number("trainable"))?;
        let told: Vec<&Said> = said.iter().filter(|said| said.message == message).collect();
        // Since the last time that fewer took part.
        let full = |said: &&Said| {
            said.number("workers") == Some(workers) && said.number("delivered").is_none_or(|came| came == workers)
        };
        let since = told.iter().rposition(|said| !full(said)).map_or(0, |fewer| fewer + 1);
        let (first, last) = (told.get(since)?, told.last()?);
        let (seconds, steps) = (last.seconds - first.seconds, last.number("step")? - first.number("step")?);
        let enough = seconds >= length.seconds && told.len() - since > length.intervals;
        enough.then_some((seconds / steps, trained))
    };
    let (seconds, trained) = cluster.wait(&job, "a steady pace", seen).await?;
    let sizes = cluster.up.objects(&format!("{job}/exchange")).into_iter().filter_map(|key| {
        let weights = key.ends_with("weights.safetensors");
        let object = weights.then(|| fs::metadata(cluster.up.home.join("store").join(&key)).ok()).flatten()?;
        Some(object.len())
    });
    let exchange_bytes = sizes.max().unwrap_or(0);
    cluster.cancel(&job).await?;
    // What the last object of a job leaves to the disk is not the next one's.
    tokio::time::sleep(Duration::from_millis(500)).await;
    Ok(Paced { seconds, trained, exchange_bytes })
}

fn spec(cluster: &Cluster<'_>, shape: &Shape, passes: u32, parallel: &Value) -> Value {
    let Shape { hidden, intermediate, layers, heads, kv_heads } = shape;
    let mut train = json!({
        "passes": passes, "batch_rows": BATCH_ROWS, "learning_rate": 1e-4, "schedule": "constant", "checkpoint_steps": 0,
    });
    if !parallel.is_null() {
        train["parallel"] = parallel.clone();
    }
    json!({
        "name": "pace", "seed": 5,
        "prompts": { "path": cluster.folder.join("speed.jsonl"), "shard_rows": 8 },
        "teacher": {
            "model": teacher::smollm2(), "mode": "score",
            "soft_targets": { "codec": "head_draws", "head": 32, "draws": 32 },
        },
        "student": { "init": { "config": {
            "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        } } },
        "train": train,
    })
}

/// Rows of one length, no two alike.
fn rows() -> String {
    const VOCABULARY: [&str; 16] = [
        "time", "people", "water", "house", "world", "school", "money", "night", "music", "river", "paper", "table",
        "light", "story", "garden", "letter",
    ];
    let word = |row: usize, at: usize| VOCABULARY[(row * 7 + at * (3 + row % 5) + at * at / 11) % VOCABULARY.len()];
    let line = |row: usize| {
        let words: Vec<&str> = (0..WORDS).map(|at| word(row, at)).collect();
        let split = if row < TRAIN_ROWS { "train" } else { "held_out" };
        json!({
            "id": format!("row-{row}"), "split": split, "completion": words.join(" "),
            "messages": [{ "role": "user", "content": format!("Say {WORDS} words, as in case {row}.") }],
        })
        .to_string()
            + "\n"
    };
    (0..TRAIN_ROWS + HELD_OUT_ROWS).map(line).collect()
}
