//! The job: a teacher scores given completions, a student of ten of its layers trains on them, in real processes that
//! `retort up` started. Its home is kept, and with it the shards: a later bench trains on those.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use retort_core::random::{Counter, Purpose};
use retort_proto::{self as proto, JobState};
use retort_tests::retort::Up;
use serde_json::json;

use crate::{Failure, journal::Journal};

pub const LAYERS: u32 = 10;
pub const BATCH_ROWS: u32 = 8;
const ROWS: u32 = 96;
const HELD_OUT_ROWS: u32 = 16;
/// Steps of a pass over the training rows.
pub const PASS: u32 = ROWS / BATCH_ROWS;
/// Words, and tokens in the vocabularies of English: rows are about as long as each other.
const PROMPT_WORDS: usize = 12;
pub const COMPLETION_WORDS: usize = 100;
const WORDS: [&str; 64] = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "member",
    "law",
];
/// A job that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(900);

/// A training of so many passes over the same rows.
pub struct Job {
    pub every: u32,
    pub passes: u32,
    spec: PathBuf,
}

impl Job {
    /// With a checkpoint every so many steps.
    pub fn write(folder: &Path, teacher: &Path, every: u32, passes: u32) -> Result<Self, Failure> {
        fs::create_dir_all(folder)?;
        fs::write(folder.join("prompts.jsonl"), (0..ROWS + HELD_OUT_ROWS).map(line).collect::<String>())?;
        let spec = json!({
            "name": format!("bench-every-{every}"), "seed": 5,
            "prompts": { "path": "prompts.jsonl" },
            "teacher": { "model": teacher.canonicalize()?, "mode": "score" },
            "student": { "init": { "prune": { "layers": LAYERS } } },
            "train": { "passes": passes, "batch_rows": BATCH_ROWS, "checkpoint_steps": every },
            // Not promoted: models stay, and one of each bench would.
            "gates": { "min_top1_agreement": 1 },
        });
        let path = folder.join(format!("every-{every}.yaml"));
        fs::write(&path, spec.to_string())?;
        Ok(Self { every, passes, spec: path })
    }

    pub fn steps(&self) -> u32 {
        self.passes * PASS
    }

    /// From `job create` to its end; what the student's log says of it.
    pub async fn run(&self, up: &mut Up) -> Result<Journal, Failure> {
        let began = Instant::now();
        let log = up.home.join("logs/student-1.log");
        let before = fs::metadata(&log)?.len() as usize;
        let name = up.create(&self.spec);
        up.follow(&name, PATIENCE, |_, _| false).await;
        let end = up.jobs().await.get_job(proto::GetJobRequest { name: name.clone() }).await?.into_inner();
        if ![JobState::Succeeded, JobState::Rejected].contains(&end.state()) {
            return Err(format!("{name} ended as {:?}: {:?}", end.state(), end.error).into());
        }
        eprintln!("{} steps, a checkpoint every {}: {:.0} s", self.steps(), self.every, began.elapsed().as_secs_f64());
        let told = fs::read_to_string(&log)?;
        let journal = Journal::read(told.get(before..).unwrap_or_default())?;
        journal.check(self.steps(), self.every)?;
        Ok(journal)
    }
}

/// Deletes all jobs but the newest, which keeps the shards, and waits until their checkpoints are gone.
pub async fn tidy(up: &mut Up) -> Result<(), Failure> {
    let mut jobs = up.jobs().await;
    let listed = jobs.list_jobs(proto::ListJobsRequest { page_size: 1000, ..Default::default() }).await?.into_inner();
    // Their names rise with time.
    let mut names: Vec<String> = listed.jobs.into_iter().map(|job| job.name).collect();
    names.sort();
    names.pop();
    for name in names {
        jobs.delete_job(proto::DeleteJobRequest { name: name.clone() }).await?;
        let checkpoints = format!("{name}/checkpoints");
        up.wait("an old job's checkpoints to go", Duration::from_secs(60), |up| {
            up.objects(&checkpoints).is_empty().then_some(())
        });
    }
    Ok(())
}

/// A row of words drawn for it, no 13 in a row alike in two.
fn line(row: u32) -> String {
    let mut draws = Counter::new(5, Purpose::Shuffle, row.into(), 0);
    let mut text = |words| {
        let words: Vec<&str> = (0..words).map(|_| WORDS[draws.below(WORDS.len() as u64) as usize]).collect();
        words.join(" ")
    };
    let line = json!({
        "id": format!("row-{row}"), "split": if row < ROWS { "train" } else { "held_out" },
        "messages": [{ "role": "user", "content": text(PROMPT_WORDS) }], "completion": text(COMPLETION_WORDS),
    });
    line.to_string() + "\n"
}
