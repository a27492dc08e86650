use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use retort_artifact::Store;
use retort_core::{clock::Clock, id::JobId};
use tokio::sync::{Notify, RwLock, Semaphore, broadcast};

use crate::database::Database;

/// How attempts are leased, counted and published.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// A lease without a heartbeat for this long is lost.
    pub lease: Duration,
    /// Most tasks of one topic that are published and not finished.
    pub window: u32,
    /// After this many attempts at one task its job fails.
    pub max_attempts: u32,
    /// A published task that nobody claimed for this long is published again.
    pub republish_after: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { lease: Duration::from_secs(15), window: 8, max_attempts: 5, republish_after: Duration::from_secs(30) }
    }
}

impl Settings {
    pub fn lease_ms(&self) -> i64 {
        ms(self.lease)
    }
}

/// What every component is handed: state, store, time and who must be woken.
#[derive(Clone)]
pub struct Context {
    pub database: Database,
    pub store: Store,
    pub clock: Arc<dyn Clock>,
    pub settings: Settings,
    pub wakers: Arc<Wakers>,
    /// Held for reading from a prompt set's upload until its job is written, for writing while the
    /// janitor removes a prompt set that no job uses.
    pub prompt_sets: Arc<RwLock<()>>,
    /// Specs whose files are being checked.
    pub admissions: Arc<Semaphore>,
    pub activity: Arc<Activity>,
}

/// When a worker of each topic was last heard of. Forgotten with the process: it only keeps
/// remarks and second records from coming too early.
#[derive(Debug, Default)]
pub struct Activity(Mutex<HashMap<String, i64>>);

impl Activity {
    pub fn heard(&self, topic: &str, now_ms: i64) {
        self.lock().insert(topic.to_owned(), now_ms);
    }

    /// Whether one was heard of after this time.
    pub fn since(&self, topic: &str, time_ms: i64) -> bool {
        self.lock().get(topic).is_some_and(|&heard_ms| heard_ms > time_ms)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, i64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Context {
    pub fn new(database: Database, store: Store, clock: Arc<dyn Clock>, settings: Settings) -> Self {
        Self {
            database,
            store,
            clock,
            settings,
            wakers: Arc::new(Wakers::default()),
            prompt_sets: Arc::new(RwLock::new(())),
            admissions: Arc::new(Semaphore::new(1)),
            activity: Arc::default(),
        }
    }

    pub fn now_ms(&self) -> i64 {
        self.clock.now_ms()
    }
}

/// Rung after a commit. A ring that nobody hears costs a tick's delay, nothing else.
pub struct Wakers {
    /// A job has new events.
    jobs: broadcast::Sender<JobId>,
    /// There may be something to publish.
    pub outbox: Notify,
    /// A job may be ready to be judged.
    pub promotion: Notify,
    /// A job has ended or was deleted.
    pub janitor: Notify,
}

impl Default for Wakers {
    fn default() -> Self {
        Self {
            jobs: broadcast::channel(1024).0,
            outbox: Notify::new(),
            promotion: Notify::new(),
            janitor: Notify::new(),
        }
    }
}

impl Wakers {
    /// A job's tasks, state or events changed.
    pub fn job_changed(&self, job: &JobId) {
        // Nobody watching is no error.
        let _ = self.jobs.send(job.clone());
        self.outbox.notify_one();
        self.promotion.notify_one();
        self.janitor.notify_one();
    }

    pub fn watch_jobs(&self) -> broadcast::Receiver<JobId> {
        self.jobs.subscribe()
    }
}

/// Milliseconds, clamped.
pub fn ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
