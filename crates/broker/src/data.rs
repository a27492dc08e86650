//! The data folder: one lock, one SQLite file.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read as _, Seek as _, Write as _},
    path::Path,
};

use retort_core::{Code, Error, Result};
use rustix::fs::{FlockOperation, flock};
use tansu_broker::NODE_ID;
use tansu_storage::{BrokerRegistrationRequest, Storage as _, StorageContainer};
use url::Url;
use uuid::Uuid;

/// Name of the cluster in the file; fixed, or an old file's topics would not be found again.
const CLUSTER: &str = "retort";
const DATABASE: &str = "broker.sqlite";
const LOCK: &str = "broker.lock";

/// The data folder, locked for this process as long as this lives. The kernel lets the lock go
/// when the process dies, however it dies.
#[derive(Debug)]
pub(crate) struct DataFolder {
    _lock: File,
}

impl DataFolder {
    /// Creates, locks and enters the folder: the working directory becomes `path`.
    pub(crate) fn enter(path: &Path) -> Result<Self> {
        fs::create_dir_all(path).map_err(|error| Error::io(path, error))?;
        let lock = path.join(LOCK);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock)
            .map_err(|error| Error::io(&lock, error))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let mut holder = String::new();
            let _ = (&mut file).take(20).read_to_string(&mut holder);
            return Err(Error::new(
                Code::AlreadyRunning,
                format!(
                    "the data folder {} belongs to a broker that is running (process {}); stop it, or choose another folder with --data",
                    path.display(),
                    holder.trim()
                ),
            ));
        }
        // Only for the message above.
        let _ = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", std::process::id()));
        std::env::set_current_dir(path).map_err(|error| Error::io(path, error))?;
        Ok(Self { _lock: file })
    }

    /// Opens the SQLite file. Clients are told to connect to `advertised`, `host:port`.
    pub(crate) async fn open(&self, advertised: &str) -> Result<StorageContainer> {
        let url = |text: &str| {
            Url::parse(text).map_err(|error| {
                Error::new(
                    Code::RequestInvalid,
                    format!("{advertised:?} is no host:port that clients can use: {error}"),
                )
            })
        };
        let broken = |error: tansu_storage::Error| {
            Error::new(Code::FileUnreadable, format!("cannot use {DATABASE} in the data folder: {error}"))
        };
        // Relative to the working directory: tansu reads an absolute path as if it were relative.
        let storage = StorageContainer::builder()
            .cluster_id(CLUSTER)
            .node_id(NODE_ID)
            .advertised_listener(url(&format!("tcp://{advertised}"))?)
            .storage(url(&format!("sqlite:///{DATABASE}"))?)
            .silent(true)
            .build()
            .await
            .map_err(broken)?;
        let registration = BrokerRegistrationRequest {
            broker_id: NODE_ID,
            cluster_id: CLUSTER.to_owned(),
            incarnation_id: Uuid::now_v7(),
            rack: None,
        };
        storage.register_broker(registration).await.map_err(broken)?;
        storage.metadata(None).await.map_err(broken)?;
        index_headers().await.map_err(|error| broken(error.into()))?;
        Ok(storage)
    }
}

/// tansu looks up the headers of each record it reads, in a table without an index: reading a
/// topic would take time with the square of its length.
async fn index_headers() -> std::result::Result<(), libsql::Error> {
    let connection = libsql::Builder::new_local(DATABASE).build().await?.connect()?;
    connection.execute("create index if not exists header_of_record on header (topition, offset_id)", ()).await?;
    Ok(())
}
