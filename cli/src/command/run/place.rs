//! Where a run's job runs.

use retort_core::{Code, Error, Result};

use super::session::Session;
use crate::{
    cluster::{Cluster, ClusterArgs, Purpose},
    spec_file,
};

#[derive(Debug)]
pub struct Place {
    /// What this run started, and must stop.
    pub cluster: Option<Cluster>,
    pub address: String,
    /// Path or URL, when it is known.
    pub store: Option<String>,
}

impl Place {
    /// The orchestrator named, the retort that is up in the home, or one of our own. `None` when a
    /// signal came first.
    pub async fn find(session: &Session<'_>) -> Result<Option<Self>> {
        let Session { args, home, .. } = session;
        if let Some(address) = &args.address {
            return Ok(Some(Self { cluster: None, address: address.clone(), store: args.cluster.store.clone() }));
        }
        spec_file::check_files(&session.spec)?;
        if let Some(running) = home.running().filter(|running| running.command == "up") {
            let text = format!("using the retort that is up in {} (process {})", home.path().display(), running.pid);
            session.notice(&text);
            return Ok(Some(Self { cluster: None, address: running.address, store: Some(running.store) }));
        }
        check_workers(&args.cluster)?;
        let cluster = Cluster::start(home, &args.cluster, &purpose(session), &session.signals).await?;
        Ok(cluster.map(|cluster| {
            let running = cluster.running();
            let (address, store) = (running.address.clone(), Some(running.store.clone()));
            Self { cluster: Some(cluster), address, store }
        }))
    }
}

/// A cluster of its own on ports that nobody else knows: without workers its job would wait for ever.
fn check_workers(args: &ClusterArgs) -> Result<()> {
    for (flag, count) in [("--teachers", args.teachers), ("--students", args.students)] {
        if count == 0 {
            return Err(Error::new(
                Code::RequestInvalid,
                format!(
                    "{flag} 0: nobody would do that part of the job; give 1 or more, or --address URL of an orchestrator that has workers"
                ),
            ));
        }
    }
    Ok(())
}

fn purpose(session: &Session<'_>) -> Purpose {
    let keep_up = session.args.keep_up;
    Purpose {
        command: if keep_up { "up" } else { "run" },
        listen: "127.0.0.1:0".to_owned(),
        broker_listen: "127.0.0.1:0".to_owned(),
        teacher_pool: session.spec.teacher.pool.clone(),
        student_pool: session.spec.student.pool.clone(),
        one_job: !keep_up,
        log: session.log.clone(),
    }
}
