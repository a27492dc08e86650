//! One run, from its start to what it leaves with the user.

use std::{cell::RefCell, convert::Infallible, path::PathBuf};

use retort_artifact::{Store, paths};
use retort_core::{Code, Result, spec::JobSpec};
use retort_proto as proto;
use serde_json::json;

use super::{Run, place::Place};
use crate::{
    client::Client,
    cluster::Cluster,
    export::{self, Exported, Source},
    follow::follow,
    home::{Home, local_folder},
    job_plan, json,
    outcome::{Outcome, conclude},
    output::{self, Output},
    progress::View,
    report,
    request::{Remembered, Submitted, is_open},
    signals::Signals,
};

/// What a run was given, and where it shows itself.
#[derive(Debug)]
pub struct Session<'a> {
    pub args: &'a Run,
    /// `--log`, handed down to child processes.
    pub log: Option<String>,
    pub spec: JobSpec,
    pub home: Home,
    /// Where the model goes.
    pub out: PathBuf,
    pub remembered: Remembered,
    pub signals: Signals,
    pub view: RefCell<View>,
    pub output: Output,
}

impl Session<'_> {
    pub async fn run(&self) -> Result<Outcome> {
        self.notice("starting");
        let place = Place::find(self).await;
        if !matches!(place, Ok(Some(_))) {
            self.view.borrow_mut().finish();
        }
        let Some(mut place) = place? else {
            return Ok(self.interrupted("stopped while starting; the same command starts again"));
        };
        let ended = self.work(&mut place).await;
        let farewell = self.farewell(&place);
        if let Some(cluster) = place.cluster.take() {
            cluster.stop().await;
            if matches!(ended, Ok(None)) {
                self.tell_late_end(&place).await;
            }
        }
        Ok(match ended? {
            Some(job) => conclude(&self.output, &job),
            None => self.interrupted(&farewell),
        })
    }

    /// Whoever reads JSON is told at the end that there is no result, and how to go on.
    fn interrupted(&self, how_to_go_on: &str) -> Outcome {
        self.output.json(&json::error(Code::Interrupted.as_str(), how_to_go_on));
        Outcome::Interrupted
    }

    /// A remark that stays above the bars.
    pub fn notice(&self, text: &str) {
        self.view.borrow_mut().notice(text);
    }

    /// The job from its submission to its delivery; `None` when a signal came first.
    async fn work(&self, place: &mut Place) -> Result<Option<proto::Job>> {
        let followed = tokio::select! {
            followed = self.follow(&place.address) => followed,
            never = self.relay(place.cluster.as_mut()) => match never {},
        };
        self.view.borrow_mut().finish();
        let Some(job) = followed? else {
            self.output.remark(&self.farewell(place));
            return Ok(None);
        };
        self.deliver(&job, place).await?;
        if self.args.keep_up
            && let Some(cluster) = &mut place.cluster
        {
            self.notice(&format!("still up at {}; Ctrl-C stops it", place.address));
            tokio::select! {
                () = self.signals.stop.cancelled() => {}
                never = self.relay(Some(cluster)) => match never {},
            }
        }
        Ok(Some(job))
    }

    /// Submits or resumes the job and follows it to its end; `None` when a signal came first.
    async fn follow(&self, address: &str) -> Result<Option<proto::Job>> {
        let submit = async {
            let mut client = Client::connect(address).await?;
            let submitted = self.remembered.submit(&mut client, &self.spec, self.args.new).await?;
            Ok((client, submitted))
        };
        let (mut client, Submitted { job, resumed }) = tokio::select! {
            submitted = submit => submitted?,
            () = self.signals.stop.cancelled() => return Ok(None),
        };
        let plan = job.plan.as_ref();
        self.output
            .json(&json!({ "type": "submitted", "job": job.name, "resumed": resumed, "plan": plan.map(json::plan) }));
        self.notice(&match (resumed, is_open(&job)) {
            (true, true) => format!("going on with {}, which was not finished (--new begins another)", job.name),
            (true, false) => format!("{} has ended, and this is its result (--new begins another)", job.name),
            (false, _) => format!("{} is submitted", job.name),
        });
        if let Some(plan) = plan.filter(|_| is_open(&job)) {
            self.view.borrow_mut().say(&job_plan::render(plan));
        }
        if self.args.address.is_none() {
            self.tell_others(&mut client, &job.name).await?;
        }
        let show = |update| self.view.borrow_mut().update(update);
        follow(client, &job.name, show, self.signals.stop.cancelled()).await
    }

    /// Names the unfinished jobs that the same workers work on, maybe first.
    async fn tell_others(&self, client: &mut Client, name: &str) -> Result<()> {
        for other in client.list_jobs(None, 20).await?.iter().filter(|other| is_open(other) && other.name != name) {
            self.notice(&format!(
                "{0} is not finished and goes on too, maybe first; `retort job cancel {0}` ends it",
                other.name
            ));
        }
        Ok(())
    }

    /// Tells what happens to the processes, for ever.
    async fn relay(&self, mut cluster: Option<&mut Cluster>) -> Infallible {
        loop {
            let notice = match cluster.as_mut() {
                Some(cluster) => cluster.notice().await,
                None => std::future::pending().await,
            };
            self.notice(&notice.text());
        }
    }

    /// Exports what the job left and prints the report, whatever becomes of the export. Only a job
    /// that got through both is remembered as delivered: the others are delivered by the next run.
    async fn deliver(&self, job: &proto::Job, place: &Place) -> Result<()> {
        let exported = self.export(job, place).await;
        let shown = exported.as_ref().ok().and_then(Option::as_ref);
        self.output.json(&json!({
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
        self.output.text(&report::render(job, &around));
        exported?;
        if self.output.is_whole() { self.remembered.delivered(&job.name) } else { Ok(()) }
    }

    /// What was exported, and whether it is only a candidate; `None` when the job left no model or
    /// its store is unknown.
    async fn export(&self, job: &proto::Job, place: &Place) -> Result<Option<(Exported, bool)>> {
        let (Some(source), Some(store)) = (Source::of_job(job), &place.store) else { return Ok(None) };
        let exported = export::export(&Store::open_existing(store)?, &source, &self.out, false).await?;
        Ok(Some((exported, source.version.is_none())))
    }

    fn farewell(&self, place: &Place) -> String {
        if place.cluster.is_some() {
            format!(
                "stopping; shards and checkpoints are kept. To go on: retort run {} --home {}{}",
                self.args.spec.display(),
                self.home.path().display(),
                self.args.cluster.given()
            )
        } else {
            "the job goes on where it runs; `retort job list` shows it, `retort job cancel` stops it".to_owned()
        }
    }

    /// A job may end while its processes are being stopped: its report is then in the store.
    async fn tell_late_end(&self, place: &Place) {
        let ended = async {
            let name = self.remembered.load().ok()??.job?;
            let store = Store::open_existing(place.store.as_deref()?).ok()?;
            let report = paths::report(name.strip_prefix("jobs/").unwrap_or(&name));
            store.exists(&report).await.ok()?.then_some(name)
        };
        if let Some(name) = ended.await {
            self.output
                .remark(&format!("{name} has just ended; the same command shows its report and exports its model"));
        }
    }
}
