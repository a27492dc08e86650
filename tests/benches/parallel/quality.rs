//! What sharing costs in quality: the same job by one worker, by two that share every step, and by two that exchange
//! weights, each over the same tokens.

use std::{fs, path::Path};

use retort_proto::{self as proto, JobState};
use retort_tests::teacher;
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    Failure,
    cluster::{Cluster, PATIENCE, Place},
};

const PASSES: u32 = 6;
const BATCH_ROWS: u32 = 4;

#[derive(Serialize)]
pub struct Quality {
    pub steps: u32,
    pub target_tokens: u64,
    pub held_out_tokens: u64,
    /// Trained parameters.
    pub trained: f64,
    /// Held-out KL before training, nats a token.
    pub before: f64,
    pub runs: Vec<Run>,
}

#[derive(Serialize)]
pub struct Run {
    pub how: How,
    /// Of the exchange; 0 where every step is shared.
    pub rounds: usize,
    /// Steps or rounds that both took part in, of those that were logged.
    pub together: f64,
    /// Held-out KL at the end, nats a token.
    pub kl: f64,
    pub top1_agreement: f64,
    /// Of training, without what comes before the first step and after the last.
    pub seconds: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    Alone,
    Synchronous,
    Diloco { inner_steps: u32, learning_rate: f64, momentum: f64 },
}

impl How {
    fn parallel(self) -> Option<Value> {
        match self {
            Self::Alone => None,
            Self::Synchronous => Some(json!({"workers": 2})),
            Self::Diloco { inner_steps, learning_rate, momentum } => Some(json!({
                "workers": 2, "mode": "diloco", "inner_steps": inner_steps, "outer_learning_rate": learning_rate,
                "outer_momentum": momentum,
            })),
        }
    }
}

pub async fn measure(cluster: &mut Cluster<'_>, quick: bool) -> Result<Quality, Failure> {
    let prompts = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/support/prompts.jsonl"))?;
    let prompts = if quick { few(&prompts) } else { prompts };
    fs::write(cluster.folder.join("quality.jsonl"), prompts)?;
    let passes = if quick { 2 } else { PASSES };
    let mut ways = vec![How::Alone, How::Synchronous];
    for inner_steps in if quick { vec![5] } else { vec![5, 20] } {
        // The last is the plain mean of the two.
        for (learning_rate, momentum) in [(0.7, 0.9), (0.7, 0.5), (0.7, 0.3), (1.0, 0.0)] {
            ways.push(How::Diloco { inner_steps, learning_rate, momentum });
        }
    }
    ways.truncate(if quick { 3 } else { ways.len() });

    // The teacher works while this one trains, and while no other does.
    cluster.second_at(None)?;
    run(cluster, How::Alone, 1).await?;
    let mut done = Vec::new();
    for how in ways {
        cluster.second_at((how != How::Alone).then_some(Place::Here))?;
        let (job, run) = run(cluster, how, passes).await?;
        eprintln!("{how:?}: KL {:.4}, {:.0} s, {:.0} % together", run.kl, run.seconds, 100.0 * run.together);
        let report = job.report.as_ref().ok_or("no report")?;
        if report.reused != job.plan.as_ref().map_or(0, |plan| plan.train_shards + plan.held_out_shards) {
            return Err(format!("only {} shards were there already", report.reused).into());
        }
        done.push((job, run));
    }
    let (job, _) = done.first().ok_or("nothing was run")?;
    let (report, progress) = (job.report.as_ref().ok_or("no report")?, job.progress.as_ref().ok_or("no progress")?);
    let before = report.before.as_ref().ok_or("not judged")?;
    let (steps, target_tokens, name) = (progress.steps_total, report.target_tokens, job.name.clone());
    let (before, held_out_tokens) = (before.kl, before.tokens);
    let said = cluster.said(&name)?;
    let trained = said.iter().find_map(|said| said.number("trainable")).ok_or("no student was told")?;
    let runs = done.into_iter().map(|(_, run)| run).collect();
    Ok(Quality { steps, target_tokens, held_out_tokens, trained, before, runs })
}

async fn run(cluster: &mut Cluster<'_>, how: How, passes: u32) -> Result<(proto::Job, Run), Failure> {
    let mut train = json!({
        "passes": passes, "batch_rows": BATCH_ROWS, "learning_rate": 1e-3, "checkpoint_steps": 0,
    });
    if let Some(parallel) = how.parallel() {
        train["parallel"] = parallel;
    }
    let spec = json!({
        "name": "quality", "seed": 7,
        "prompts": { "path": cluster.folder.join("quality.jsonl"), "shard_rows": 16 },
        "teacher": {
            "model": teacher::smollm2(), "mode": "generate",
            "sampling": { "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 40 },
        },
        "student": { "init": { "prune": { "layers": 4, "hidden_size": 192, "intermediate_size": 512 } } },
        "train": train,
    });
    let name = cluster.up.create(&cluster.spec("quality", &spec)?);
    cluster.up.follow(&name, PATIENCE, |_, _| false).await;
    let job = cluster.up.jobs().await.get_job(proto::GetJobRequest { name: name.clone() }).await?.into_inner();
    let (JobState::Succeeded, Some(report)) = (job.state(), &job.report) else {
        return Err(format!("{how:?} ended as {:?}: {:?}", job.state(), job.error).into());
    };
    let after = report.after.as_ref().ok_or("not judged")?;
    let message = if matches!(how, How::Diloco { .. }) { "a round is done" } else { "trained" };
    let told: Vec<_> = cluster.said(&name)?.into_iter().filter(|said| said.message == message).collect();
    let together = told.iter().filter(|said| {
        said.number("workers") == Some(2.0) && said.number("delivered").is_none_or(|delivered| delivered == 2.0)
    });
    let run = Run {
        how,
        rounds: if matches!(how, How::Diloco { .. }) { told.len() } else { 0 },
        together: together.count() as f64 / told.len().max(1) as f64,
        kl: after.kl,
        top1_agreement: after.top1_agreement,
        seconds: report.processed_tokens as f64 / report.student_tokens_per_second.max(1e-9),
    };
    Ok((job, run))
}

/// The first 40 rows to train on and the first 8 that are held out.
fn few(prompts: &str) -> String {
    let held_out = |line: &&str| line.contains("\"held_out\"");
    let train = prompts.lines().filter(|line| !held_out(line)).take(40);
    train.chain(prompts.lines().filter(held_out).take(8)).flat_map(|line| [line, "\n"]).collect()
}
