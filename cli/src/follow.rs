//! Follows a job's events to its end, across restarts of the orchestrator.

use std::{future::Future, pin::pin, time::Duration};

use retort_core::{Error, Kind, Result, wire::job_state_from_proto};
use retort_proto as proto;
use tokio::{sync::mpsc, time::Instant};

use crate::client::Client;

const FIRST_WAIT: Duration = Duration::from_millis(250);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// After this long without an answer the orchestrator is given up.
const GIVE_UP: Duration = Duration::from_secs(300);
/// Events held for a view that is slower than the wire.
const UPDATES: usize = 64;

/// What a view is told.
#[derive(Debug)]
pub enum Update {
    Event(Box<proto::JobEvent>),
    /// The connection is lost; said once an outage.
    Lost,
    Back,
}

/// Follows `name` from its first event on, telling `view`, until the job is final or `stop` is
/// ready; then `None` is returned.
///
/// Errors: the job is unknown; the orchestrator cannot be reached at first, or for five minutes.
pub async fn follow(
    client: Client,
    name: &str,
    mut view: impl FnMut(Update),
    stop: impl Future<Output = ()>,
) -> Result<Option<proto::Job>> {
    let (sender, mut updates) = mpsc::channel(UPDATES);
    let mut follower = pin!(stream(client, name, sender));
    let mut stop = pin!(stop);
    loop {
        tokio::select! {
            biased;
            () = &mut stop => return Ok(None),
            Some(update) = updates.recv() => view(update),
            result = &mut follower => {
                while let Ok(update) = updates.try_recv() {
                    view(update);
                }
                return result.map(Some);
            }
        }
    }
}

async fn stream(mut client: Client, name: &str, updates: mpsc::Sender<Update>) -> Result<proto::Job> {
    let mut after = 0;
    loop {
        let lost = match read(&mut client, name, &mut after, &updates).await {
            Ok(Some(job)) => return Ok(job),
            Ok(None) => None,
            Err(error) if error.kind() == Kind::Unavailable => Some(error),
            Err(error) => return Err(error),
        };
        match lost {
            // The server ended the stream early: it is going down in good order.
            None => tokio::time::sleep(FIRST_WAIT).await,
            Some(error) => {
                let _ = updates.send(Update::Lost).await;
                client = reconnect(&client, name, error).await?;
                let _ = updates.send(Update::Back).await;
            }
        }
    }
}

/// One stream to its end; the job when it is final.
async fn read(
    client: &mut Client,
    name: &str,
    after: &mut u64,
    updates: &mpsc::Sender<Update>,
) -> Result<Option<proto::Job>> {
    let mut events = client.watch_job(name, *after).await?;
    while let Some(event) = events.message().await.map_err(|status| client.explain(&status))? {
        // A stream may repeat what came before it broke.
        if event.sequence > *after {
            *after = event.sequence;
            let _ = updates.send(Update::Event(Box::new(event))).await;
        }
    }
    let job = client.get_job(name).await?;
    let done = job_state_from_proto(job.state).is_some_and(retort_core::state::JobState::is_final);
    Ok(done.then_some(job))
}

async fn reconnect(client: &Client, name: &str, mut last: Error) -> Result<Client> {
    let since = Instant::now();
    let mut wait = FIRST_WAIT;
    while since.elapsed() < GIVE_UP {
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LONGEST_WAIT);
        let attempt = async {
            let mut client = Client::connect(client.address()).await?;
            client.get_job(name).await?;
            Ok::<_, Error>(client)
        };
        match attempt.await {
            Ok(client) => return Ok(client),
            Err(error) if error.kind() == Kind::Unavailable => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}
