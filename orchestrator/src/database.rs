//! The state store: SQLite in WAL mode, one writer, several readers.
//!
//! `synchronous = FULL`: a claim that was answered must survive a power cut, or its epoch would be
//! handed out twice and fence nothing. One fsync a transaction is little beside a shard's minutes.

pub mod deletions;
pub mod jobs;
pub mod journal;
pub mod models;
pub mod offsets;
pub mod outbox;
pub mod shards;
pub mod tasks;

use std::{
    fs::{File, TryLockError},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use retort_core::{Code, Error, Result};
use sqlx::{
    ConnectOptions as _, Sqlite, SqlitePool, Transaction,
    migrate::MigrateError,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

pub use sqlx::SqliteConnection as Connection;

/// A transaction; dropped without [`commit`], it never happened.
pub type Tx = Transaction<'static, Sqlite>;

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!();

/// Cheap to clone; the file stays locked until the last clone is gone.
#[derive(Clone, Debug)]
pub struct Database {
    writer: SqlitePool,
    readers: SqlitePool,
    _lock: Arc<File>,
}

impl Database {
    /// Opens or creates the file, brings its schema up to date and keeps other orchestrators out.
    ///
    /// Errors: `already-running`, `database-too-new`, `disk-full`, `database-unavailable`.
    pub async fn open(path: &Path) -> Result<Self> {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
        }
        let lock = lock(path)?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(5))
            .disable_statement_logging();
        let named = |error: Error| Error { message: format!("{}: {}", path.display(), error.message), ..error };
        let pool = |connections| {
            SqlitePoolOptions::new().max_connections(connections).acquire_timeout(Duration::from_secs(10))
        };
        let writer = pool(1).connect_with(options.clone()).await.map_err(wrap).map_err(named)?;
        MIGRATIONS.run(&writer).await.map_err(|error| named(migration(error)))?;
        let readers = pool(4).connect_with(options).await.map_err(wrap).map_err(named)?;
        Ok(Self { writer, readers, _lock: Arc::new(lock) })
    }

    /// A transaction that holds the write lock from its start, so that what it reads stays true.
    pub async fn begin(&self) -> Result<Tx> {
        match self.writer.begin_with("BEGIN IMMEDIATE").await {
            // On a full disk SQLite rolls back by itself, of which the connection is not told: it
            // believes to be in a transaction for ever after. It is replaced.
            Err(sqlx::Error::InvalidSavePointStatement) => {
                self.writer.acquire().await.db()?.close().await.db()?;
                self.writer.begin_with("BEGIN IMMEDIATE").await.db()
            }
            begun => begun.db(),
        }
    }

    /// A consistent snapshot to read from.
    pub async fn read(&self) -> Result<Tx> {
        self.readers.begin().await.db()
    }

    /// Makes the disk look full: no page more than there are now. `None` lifts it.
    #[cfg(test)]
    pub(crate) async fn limit_pages(&self, spare: Option<u32>) {
        let mut writer = self.writer.acquire().await.unwrap();
        let pages: i64 = sqlx::query_scalar("PRAGMA page_count").fetch_one(&mut *writer).await.unwrap();
        let limit = spare.map_or(i64::from(u32::MAX) - 1, |spare| pages + i64::from(spare));
        let statement = format!("PRAGMA max_page_count = {limit}");
        sqlx::query(sqlx::AssertSqlSafe(statement)).execute(&mut *writer).await.unwrap();
    }

    /// Waits for running statements, then folds the log into the file.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }
}

pub async fn commit(tx: Tx) -> Result<()> {
    tx.commit().await.db()
}

/// Says what became of a statement in retort's own errors.
pub trait DatabaseResult<T> {
    fn db(self) -> Result<T>;
}

impl<T> DatabaseResult<T> for Result<T, sqlx::Error> {
    fn db(self) -> Result<T> {
        self.map_err(wrap)
    }
}

/// A count or a number from its column: negative ones cannot be stored by this program.
pub(crate) fn unsigned(column: &str, value: i64) -> Result<u64> {
    u64::try_from(value).map_err(|_| damaged(format!("{column} is {value}")))
}

pub(crate) fn unsigned32(column: &str, value: i64) -> Result<u32> {
    u32::try_from(value).map_err(|_| damaged(format!("{column} is {value}")))
}

/// SQLite's integers are signed; what is larger is clamped.
pub(crate) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(crate) fn damaged(what: String) -> Error {
    Error::internal(format!("the database holds what this program does not write: {what}"))
}

pub(crate) fn to_json<T: serde::Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|error| Error::internal(format!("cannot be written as JSON: {error}")))
}

pub(crate) fn from_json<T: serde::de::DeserializeOwned>(column: &str, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| damaged(format!("{column}: {error}")))
}

/// Held by the one orchestrator that may write to `path`; released by the kernel when it dies.
fn lock(path: &Path) -> Result<File> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let name = PathBuf::from(name);
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&name)
        .map_err(|error| Error::io(&name, error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::new(
            Code::AlreadyRunning,
            format!("another orchestrator uses {}; stop it, or name another file with --database", path.display()),
        )),
        Err(TryLockError::Error(error)) => Err(Error::io(&name, error)),
    }
}

fn migration(error: MigrateError) -> Error {
    match error {
        MigrateError::VersionMissing(version) => Error::new(
            Code::DatabaseTooNew,
            format!(
                "schema version {version} is newer than this program's ({}); start the retort that wrote it, or a newer one",
                MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or(0)
            ),
        ),
        MigrateError::VersionMismatch(version) => Error::new(
            Code::DatabaseTooNew,
            format!("schema version {version} is not the one this program knows; start the retort that wrote it"),
        ),
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => wrap(error),
        other => Error::with_source(Code::DatabaseUnavailable, "the schema cannot be brought up to date", other),
    }
}

fn wrap(error: sqlx::Error) -> Error {
    // The low byte of an extended result code is the primary one.
    let code = error
        .as_database_error()
        .and_then(|error| error.code())
        .and_then(|code| code.parse::<u32>().ok())
        .map(|code| code & 0xff);
    match code {
        Some(SQLITE_FULL) => Error::with_source(
            Code::DiskFull,
            "the database's disk is full; free some space: finished work is kept and goes on by itself",
            error,
        ),
        Some(SQLITE_CORRUPT | SQLITE_NOTADB) => {
            Error::with_source(Code::DatabaseUnavailable, "the database file is damaged or is no SQLite file", error)
        }
        Some(SQLITE_CONSTRAINT) => Error::with_source(Code::Internal, "the database refused a row", error),
        _ if matches!(
            error,
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::ColumnNotFound(_) | sqlx::Error::Decode(_)
        ) =>
        {
            damaged(error.to_string())
        }
        _ => Error::with_source(Code::DatabaseUnavailable, "the database does not answer", error),
    }
}

const SQLITE_CORRUPT: u32 = 11;
const SQLITE_FULL: u32 = 13;
const SQLITE_CONSTRAINT: u32 = 19;
const SQLITE_NOTADB: u32 = 26;

#[cfg(test)]
mod tests;
