use std::{cell::RefCell, convert::Infallible, io::IsTerminal as _, path::PathBuf};

use clap::Args;
use retort_core::{Result, spec::JobSpec};
use retort_proto as proto;
use serde_json::json;

use super::{Context, HomeArg};
use crate::{
    client::Client,
    cluster::{Cluster, ClusterArgs, Purpose},
    export::{self, Exported, Source},
    follow::follow,
    home::{Home, local_folder},
    json,
    outcome::{Outcome, conclude, echo_error},
    output::{self, Output},
    progress::{Mode, View},
    report,
    request::{Remembered, Submitted, is_open},
    signals::Signals,
    spec_file,
};

/// Runs one job from its spec to an exported model
///
/// Starts what is needed on free ports, submits the job, shows its progress, prints the report,
/// exports the model, stops what it started. Stopped by Ctrl-C, or killed, the same command goes on
/// with the same job: finished work is kept. When a retort is up in the home, it is used.
///
/// Off a terminal, or with --json, one JSON object a line is printed: "submitted", "event"
/// (sequence, time, state, progress, event), "notice", at the end "result" (job, export) or "error".
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort run examples/support/job.yaml
  retort run job.yaml --home /data/retort --out ./student
  retort run job.yaml --plain | tee run.log
  retort run job.yaml --address http://retort.internal:7474      use the orchestrator there

The exit code says how the job ended: 0 succeeded, 3 a gate failed, 4 failed, 130 stopped or cancelled.")]
pub struct Run {
    /// The spec, YAML; paths in it are relative to its folder
    spec: PathBuf,
    #[command(flatten)]
    home: HomeArg,
    /// Start nothing; use this orchestrator
    #[arg(long, value_name = "URL")]
    address: Option<String>,
    /// Where the model goes [default: HOME/exports/NAME]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Begin a new job even where an earlier one of this spec is unfinished
    #[arg(long)]
    new: bool,
    /// Leave everything up after the job, until Ctrl-C
    #[arg(long, conflicts_with = "address")]
    keep_up: bool,
    /// Text lines instead of bars or JSON
    #[arg(long, conflicts_with = "json")]
    plain: bool,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// Where the job runs.
struct Place {
    cluster: Option<Cluster>,
    address: String,
    /// Path or URL, when it is known.
    store: Option<String>,
}

impl Run {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        let spec = spec_file::read(&self.spec)?;
        let home = self.home.resolve()?;
        let out = self.out.clone().unwrap_or_else(|| home.exports().join(&spec.name));
        export::check_target(&out, false)?;
        let signals = Signals::listen()?;
        let mode = Mode::choose(context.output.is_json(), self.plain, std::io::stdout().is_terminal());
        let (view, output) = View::new(mode, &context.output);
        let result = self.run_with(context, &spec, &home, out, &signals, view, &output).await;
        echo_error(&context.output, &output, result)
    }

    #[allow(clippy::too_many_arguments)]
    async fn run_with(
        &self,
        context: &Context,
        spec: &JobSpec,
        home: &Home,
        out: PathBuf,
        signals: &Signals,
        mut view: View,
        output: &Output,
    ) -> Result<Outcome> {
        view.notice("starting");
        let Some(mut place) = self.place(context, spec, home, signals, &mut view).await? else {
            view.finish();
            return Ok(Outcome::Interrupted);
        };
        let view = RefCell::new(view);
        let mut result = tokio::select! {
            result = self.job(spec, home, &place.address, signals, &view, output) => result,
            never = relay(place.cluster.as_mut(), &view) => match never {},
        };
        view.borrow_mut().finish();
        if let Ok(Some(job)) = &result {
            let exported = self.finish(job, &place, out, output).await;
            result = exported.and(result);
        } else if matches!(result, Ok(None)) {
            output.remark(&self.farewell(&place, home));
        }
        if let Some(mut cluster) = place.cluster {
            if self.keep_up && matches!(result, Ok(Some(_))) {
                view.borrow_mut().notice(&format!("still up at {}; Ctrl-C stops it", place.address));
                tokio::select! {
                    () = signals.stop.cancelled() => {}
                    never = relay(Some(&mut cluster), &view) => match never {},
                }
            }
            cluster.stop().await;
        }
        Ok(result?.map_or(Outcome::Interrupted, |job| conclude(output, &job)))
    }

    /// The orchestrator named, the retort that is up in the home, or one of our own. `None` when a
    /// signal came first.
    async fn place(
        &self,
        context: &Context,
        spec: &JobSpec,
        home: &Home,
        signals: &Signals,
        view: &mut View,
    ) -> Result<Option<Place>> {
        if let Some(address) = &self.address {
            return Ok(Some(Place { cluster: None, address: address.clone(), store: self.cluster.store.clone() }));
        }
        spec_file::check_files(spec)?;
        if let Some(running) = home.running().filter(|running| running.command == "up") {
            view.notice(&format!("using the retort that is up in {} (process {})", home.path().display(), running.pid));
            return Ok(Some(Place { cluster: None, address: running.address, store: Some(running.store) }));
        }
        let purpose = Purpose {
            command: if self.keep_up { "up" } else { "run" },
            listen: "127.0.0.1:0".to_owned(),
            broker_listen: "127.0.0.1:0".to_owned(),
            teacher_pool: spec.teacher.pool.clone(),
            student_pool: spec.student.pool.clone(),
            one_job: !self.keep_up,
            log: context.log.clone(),
        };
        let cluster = Cluster::start(home, &self.cluster, &purpose, signals).await?;
        Ok(cluster.map(|cluster| {
            let running = cluster.running();
            let (address, store) = (running.address.clone(), Some(running.store.clone()));
            Place { cluster: Some(cluster), address, store }
        }))
    }

    /// Submits or resumes the job and follows it to its end; `None` when a signal came first.
    async fn job(
        &self,
        spec: &JobSpec,
        home: &Home,
        address: &str,
        signals: &Signals,
        view: &RefCell<View>,
        output: &Output,
    ) -> Result<Option<proto::Job>> {
        let submit = async {
            let mut client = Client::connect(address).await?;
            let submitted = Remembered::of(home, spec)?.submit(&mut client, spec, self.new).await?;
            Ok((client, submitted))
        };
        let (mut client, Submitted { job, resumed }) = tokio::select! {
            submitted = submit => submitted?,
            () = signals.stop.cancelled() => return Ok(None),
        };
        output.json(&json!({ "type": "submitted", "job": job.name, "resumed": resumed }));
        view.borrow_mut().notice(&match resumed {
            true => format!("going on with {}, which was not finished (--new begins another)", job.name),
            false => format!("{} is submitted", job.name),
        });
        if self.address.is_none() {
            for other in
                client.list_jobs(None, 20).await?.iter().filter(|other| is_open(other) && other.name != job.name)
            {
                let text =
                    format!("{0} is not finished and goes on beside it; `retort job cancel {0}` stops it", other.name);
                view.borrow_mut().notice(&text);
            }
        }
        follow(client, &job.name, |update| view.borrow_mut().update(update), signals.stop.cancelled()).await
    }

    /// Exports what the job left and prints the report, whatever becomes of the export.
    async fn finish(&self, job: &proto::Job, place: &Place, out: PathBuf, output: &Output) -> Result<()> {
        let exported: Result<Option<(Exported, bool)>> = match (Source::of_job(job), &place.store) {
            (Some(source), Some(store)) => {
                async {
                    let store = retort_artifact::Store::open(store)?;
                    let exported = export::export(&store, &source, &out, false).await?;
                    Ok(Some((exported, source.version.is_none())))
                }
                .await
            }
            _ => Ok(None),
        };
        let shown = exported.as_ref().ok().and_then(Option::as_ref);
        output.json(&json!({
            "type": "result",
            "job": json::job(job),
            "export": shown.map(|(exported, candidate)| json!({
                "path": exported.path, "files": exported.files, "bytes": exported.bytes, "candidate": candidate,
            })),
        }));
        let around = report::Surroundings {
            width: output::width(),
            store: place.store.as_deref().and_then(local_folder),
            export: shown.map(|(exported, candidate)| (exported.path.clone(), *candidate)),
        };
        output.text(&report::render(job, &around));
        exported.map(|_| ())
    }

    fn farewell(&self, place: &Place, home: &Home) -> String {
        if place.cluster.is_some() {
            format!(
                "stopping; finished work is kept. To go on: retort run {} --home {}",
                self.spec.display(),
                home.path().display()
            )
        } else {
            "the job goes on where it runs; `retort job list` shows it, `retort job cancel` stops it".to_owned()
        }
    }
}

/// Tells what happens to the processes, for ever.
async fn relay(mut cluster: Option<&mut Cluster>, view: &RefCell<View>) -> Infallible {
    loop {
        let notice = match cluster.as_mut() {
            Some(cluster) => cluster.notice().await,
            None => std::future::pending().await,
        };
        view.borrow_mut().notice(&notice.text());
    }
}
