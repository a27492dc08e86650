//! The one error of retort: what went wrong (a stable [`Code`]), what the caller can do about it
//! (a [`Kind`]) and a message that names the value, the place and the way out.

use std::fmt;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the caller does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Mend the input; the same call fails again.
    Invalid,
    /// The thing named is not there.
    NotFound,
    /// It exists already, with another content.
    Exists,
    /// The system is not in the state the call needs.
    Precondition,
    /// Another attempt has taken over: stop, write nothing more.
    Fenced,
    /// Try again later.
    Unavailable,
    /// A disk, a quota or a limit is full.
    Exhausted,
    /// Stored bytes are not what was written.
    Corrupt,
    /// The caller asked to stop.
    Cancelled,
    /// A defect of retort.
    Internal,
}

macro_rules! codes {
    ($($variant:ident = $text:literal, $kind:ident;)*) => {
        /// Stable names of errors, in kebab case; each is explained in `docs/errors.md`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Code { $($variant,)* }

        impl Code {
            /// Every code, in the order of `docs/errors.md`.
            pub const ALL: &[Code] = &[$(Code::$variant,)*];

            pub fn as_str(self) -> &'static str {
                match self { $(Code::$variant => $text,)* }
            }

            pub fn kind(self) -> Kind {
                match self { $(Code::$variant => Kind::$kind,)* }
            }

            /// The code of this name, for reading one back from the wire.
            pub fn parse(text: &str) -> Option<Code> {
                match text { $($text => Some(Code::$variant),)* _ => None }
            }
        }
    };
}

codes! {
    SpecMalformed = "spec-malformed", Invalid;
    SpecUnknownKey = "spec-unknown-key", Invalid;
    SpecInvalid = "spec-invalid", Invalid;
    FileNotFound = "file-not-found", NotFound;
    FileUnreadable = "file-unreadable", Invalid;
    PromptMalformed = "prompt-malformed", Invalid;
    PromptEmpty = "prompt-empty", Invalid;
    PromptTooLong = "prompt-too-long", Invalid;
    PromptSetTooSmall = "prompt-set-too-small", Invalid;
    PromptSetLeaks = "prompt-set-leaks", Invalid;
    ModelUnsupported = "model-unsupported", Invalid;
    ModelMalformed = "model-malformed", Invalid;
    WeightsTruncated = "weights-truncated", Invalid;
    GgufMalformed = "gguf-malformed", Invalid;
    GgufTruncated = "gguf-truncated", Invalid;
    VocabularyMismatch = "vocabulary-mismatch", Invalid;
    TokenizerMismatch = "tokenizer-mismatch", Invalid;
    TeacherMismatch = "teacher-mismatch", Precondition;
    ShardCorrupt = "shard-corrupt", Corrupt;
    ShardUnfaithful = "shard-unfaithful", Corrupt;
    ShardTooNew = "shard-too-new", Precondition;
    CheckpointCorrupt = "checkpoint-corrupt", Corrupt;
    CheckpointMismatch = "checkpoint-mismatch", Precondition;
    CheckpointUnreadable = "checkpoint-unreadable", Unavailable;
    ObjectExists = "object-exists", Exists;
    ObjectNotFound = "object-not-found", NotFound;
    ObjectTooLarge = "object-too-large", Invalid;
    StoreUnsupported = "store-unsupported", Invalid;
    StoreUnavailable = "store-unavailable", Unavailable;
    DiskFull = "disk-full", Exhausted;
    PortInUse = "port-in-use", Precondition;
    AlreadyRunning = "already-running", Precondition;
    ProgramMissing = "program-missing", Precondition;
    ComponentFailed = "component-failed", Precondition;
    BusUnavailable = "bus-unavailable", Unavailable;
    BusMalformed = "bus-malformed", Invalid;
    DatabaseUnavailable = "database-unavailable", Unavailable;
    DatabaseTooNew = "database-too-new", Precondition;
    OrchestratorUnavailable = "orchestrator-unavailable", Unavailable;
    RequestInvalid = "request-invalid", Invalid;
    RequestReused = "request-reused", Exists;
    JobNotFound = "job-not-found", NotFound;
    JobNotFinal = "job-not-final", Precondition;
    JobCancelled = "job-cancelled", Cancelled;
    Interrupted = "interrupted", Cancelled;
    TrainingEnded = "training-ended", Cancelled;
    ModelNotFound = "model-not-found", NotFound;
    AttemptFenced = "attempt-fenced", Fenced;
    AttemptYielded = "attempt-yielded", Unavailable;
    WorkerStopped = "worker-stopped", Unavailable;
    GroupBroken = "group-broken", Unavailable;
    StageMismatch = "stage-mismatch", Precondition;
    ReplicaMismatch = "replica-mismatch", Precondition;
    AttemptsExhausted = "attempts-exhausted", Precondition;
    LossNotFinite = "loss-not-finite", Precondition;
    DeviceUnavailable = "device-unavailable", Precondition;
    Internal = "internal", Internal;
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Displays as `message`; the code travels beside it.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    pub code: Code,
    /// Lower case, no full stop, naming the value, the place and the way out.
    pub message: String,
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), source: None }
    }

    pub fn with_source(
        code: Code,
        message: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { code, message: message.into(), source: Some(source.into()) }
    }

    /// A defect of retort, never the caller's fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, message)
    }

    /// What became of reading or writing `path`: not found, disk full, or unreadable.
    pub fn io(path: impl AsRef<std::path::Path>, error: std::io::Error) -> Self {
        let path = path.as_ref().display();
        match error.kind() {
            std::io::ErrorKind::NotFound => Self::new(Code::FileNotFound, format!("{path}: no such file or folder")),
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Self::new(Code::DiskFull, format!("{path}: the disk is full; free some space: finished work is kept"))
            }
            _ => Self::new(Code::FileUnreadable, format!("{path}: {error}")),
        }
    }

    pub fn kind(&self) -> Kind {
        self.code.kind()
    }

    /// Whether another attempt at the same task may succeed. What comes out of a task's own
    /// arithmetic comes out again.
    pub fn is_retryable(&self) -> bool {
        let repeats = matches!(self.code, Code::ShardUnfaithful | Code::LossNotFinite);
        !repeats && !matches!(self.kind(), Kind::Invalid | Kind::Fenced | Kind::Cancelled)
    }

    /// The message followed by every cause, `: ` between.
    pub fn chain(&self) -> String {
        let mut text = self.message.clone();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}
