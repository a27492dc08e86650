//! What a job's training pays besides its steps: waiting for rows, and checkpoints.
//!
//! Measured from the first checkpoint after the first pass, when every shard was published, and over whole
//! intervals between checkpoints. All steps have as many rows, about as long as each other, so what steps beside a
//! checkpoint lose is their time over the median of those that have the machine to themselves.

use std::path::Path;

use retort_core::spec::Train;
use retort_tests::{
    retort::Up,
    ticks::{Others, Ticks},
};
use serde::Serialize;

use crate::{
    Failure, Options,
    job::{self, BATCH_ROWS, COMPLETION_WORDS, Job, LAYERS, PASS},
    journal::{Checkpoint, Journal, Step},
    quiet,
};

/// Of the time of steps, at most.
const ROWS_BAR: f64 = 0.02;
const CHECKPOINTS_BAR: f64 = 0.01;
/// Steps between checkpoints in the harsh job, and passes of both.
const OFTEN: u32 = 5;
const PASSES: (u32, u32) = (4, 3);

#[derive(Serialize)]
pub struct Overheads {
    threads: usize,
    others: Others,
    runs: Vec<Run>,
}

/// One job, the part that is measured.
#[derive(Serialize)]
struct Run {
    /// Steps between checkpoints.
    every: u32,
    steps: u32,
    checkpoints: usize,
    /// Seconds of the steps together.
    computing_s: f64,
    waiting_for_rows_s: f64,
    judging_s: f64,
    copying_s: f64,
    waiting_for_checkpoints_s: f64,
    /// Mean of the checkpoints', beside the training.
    writing_s: f64,
    /// Median of steps that had the machine to themselves, in both jobs.
    step_alone_s: f64,
    /// Mean of those beside a checkpoint that was being written, and how many they were.
    step_beside_s: f64,
    beside: usize,
    journal: Journal,
}

pub fn measure(options: &Options, folder: &Path) -> Result<Overheads, Failure> {
    let cores = std::thread::available_parallelism()?.get();
    let threads = options.threads.map_or(cores, |threads| threads as usize);
    let runtime = tokio::runtime::Runtime::new()?;
    let before = Ticks::now()?;
    let journals = runtime.block_on(journals(options, folder, threads))?;
    let others = Ticks::now()?.since(&before, cores);
    let alone: Vec<Step> = journals.iter().flat_map(|(every, journal)| window(journal, *every).0).collect();
    let alone = median(alone.iter().filter(|step| !step.beside_checkpoint).map(|step| step.seconds).collect());
    let alone = alone.ok_or("no step was without a checkpoint beside it: the machine is too slow for this bench")?;
    let runs = journals.into_iter().map(|(every, journal)| Run::of(every, journal, alone)).collect();
    Ok(Overheads { threads, others, runs })
}

async fn journals(options: &Options, folder: &Path, threads: usize) -> Result<Vec<(u32, Journal)>, Failure> {
    let home = folder.join("home");
    std::fs::create_dir_all(&home)?;
    let default = Train::default().checkpoint_steps;
    // Every step is told at this level.
    let mut up = Up::start_on(&home, threads, &["--dtype", "f32", "--log", "info,retort_student=debug"]);
    let mut journals = Vec::new();
    for (every, passes) in [(default, PASSES.0), (OFTEN, PASSES.1)] {
        let job = Job::write(&folder.join("job"), &options.model, every, passes)?;
        journals.push((every, job.run(&mut up).await?));
    }
    job::tidy(&mut up).await?;
    // What a process used counts once it has ended.
    drop(up);
    Ok(journals)
}

/// Steps and checkpoints of whole intervals, from the first that begins after the first pass.
fn window(journal: &Journal, every: u32) -> (Vec<Step>, Vec<Checkpoint>) {
    let begin = PASS.next_multiple_of(every);
    let end = journal.steps.len() as u32 / every * every;
    let steps = journal.steps.iter().filter(|step| step.step > begin && step.step <= end);
    let checkpoints = journal.checkpoints.iter().filter(|checkpoint| (begin..end).contains(&checkpoint.step));
    (steps.copied().collect(), checkpoints.copied().collect())
}

pub fn median(mut numbers: Vec<f64>) -> Option<f64> {
    numbers.sort_by(f64::total_cmp);
    let (below, above) = (numbers.get(numbers.len().checked_sub(1)? / 2)?, numbers.get(numbers.len() / 2)?);
    Some(f64::midpoint(*below, *above))
}

impl Run {
    fn of(every: u32, journal: Journal, alone: f64) -> Self {
        let (steps, checkpoints) = window(&journal, every);
        let beside: Vec<f64> = steps.iter().filter(|step| step.beside_checkpoint).map(|step| step.seconds).collect();
        let sum = |of: fn(&Checkpoint) -> f64| checkpoints.iter().map(of).sum::<f64>();
        Self {
            every,
            steps: steps.len() as u32,
            checkpoints: checkpoints.len(),
            computing_s: steps.iter().map(|step| step.seconds).sum(),
            waiting_for_rows_s: steps.iter().map(|step| step.waited_s).sum(),
            judging_s: sum(|checkpoint| checkpoint.judged_s),
            copying_s: sum(|checkpoint| checkpoint.copied_s),
            waiting_for_checkpoints_s: sum(|checkpoint| checkpoint.waited_s),
            writing_s: sum(|checkpoint| checkpoint.written_s) / checkpoints.len() as f64,
            step_alone_s: alone,
            step_beside_s: beside.iter().sum::<f64>() / beside.len() as f64,
            beside: beside.len(),
            journal,
        }
    }

    /// What steps lost by the checkpoints beside them, seconds.
    fn lost_s(&self) -> f64 {
        if self.beside == 0 { 0.0 } else { (self.step_beside_s - self.step_alone_s) * self.beside as f64 }
    }

    /// Shares of the time that the steps take, and what they may be.
    fn shares(&self) -> [(&'static str, f64, Option<f64>); 5] {
        let undisturbed = self.computing_s - self.lost_s();
        let thread = self.copying_s + self.waiting_for_checkpoints_s;
        [
            ("waiting for rows", self.waiting_for_rows_s, Some(ROWS_BAR)),
            ("checkpoints: of the thread that trains", thread, Some(CHECKPOINTS_BAR)),
            ("checkpoints: lost by steps beside", self.lost_s(), None),
            ("checkpoints: both", thread + self.lost_s(), Some(CHECKPOINTS_BAR)),
            ("judging at checkpoints", self.judging_s, None),
        ]
        .map(|(what, seconds, bar)| (what, seconds / undisturbed, bar))
    }
}

impl Overheads {
    pub fn table(&self) -> String {
        let head = format!(
            "A student of {LAYERS} layers, {BATCH_ROWS} rows of {COMPLETION_WORDS} target words a step, {} threads. {}\n\n\
             | a checkpoint every | of the time of steps | share | wanted | |\n|---|---|---|---|---|",
            self.threads,
            quiet(self.others)
        );
        let shares = self.runs.iter().flat_map(|run| {
            run.shares().map(|(what, share, bar)| {
                let (bar, met) = match bar {
                    Some(bar) => {
                        (format!("under {:.0} %", 100.0 * bar), if share < bar { "met" } else { "**missed**" })
                    }
                    None => (String::new(), ""),
                };
                format!("| {} steps | {what} | {:.2} % | {bar} | {met} |", run.every, 100.0 * share)
            })
        });
        let notes = self.runs.iter().map(|run| {
            let count = run.checkpoints as f64;
            format!(
                "- every {} steps: {} steps, {} checkpoints; {:.2} s of copying and {:.2} s of waiting each, written in \
                 {:.1} s; {} steps beside took {:.2} s each, others {:.2} s",
                run.every,
                run.steps,
                run.checkpoints,
                run.copying_s / count,
                run.waiting_for_checkpoints_s / count,
                run.writing_s,
                run.beside,
                run.step_beside_s,
                run.step_alone_s
            )
        });
        std::iter::once(head).chain(shares).chain([String::new()]).chain(notes).collect::<Vec<_>>().join("\n")
    }
}
