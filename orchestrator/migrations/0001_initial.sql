-- The orchestrator's truth. Times are milliseconds since the Unix epoch; states are the words of
-- retort_core::state; columns ending in _json hold this crate's own serde types.

CREATE TABLE jobs (
    id                 TEXT PRIMARY KEY NOT NULL,
    -- Names the promoted model.
    name               TEXT NOT NULL,
    request_id         TEXT UNIQUE,
    spec_json          TEXT NOT NULL,
    spec_sha256        TEXT NOT NULL,
    plan_json          TEXT NOT NULL,
    prompt_set_sha256  TEXT NOT NULL,
    state              TEXT NOT NULL,
    create_ms          INTEGER NOT NULL,
    start_ms           INTEGER,
    end_ms             INTEGER,
    error_code         TEXT,
    error_message      TEXT,
    -- Sequence of the newest row of job_events.
    last_sequence      INTEGER NOT NULL DEFAULT 0,
    -- Sums over `shards`, kept here so that progress costs no scan.
    shards_published   INTEGER NOT NULL DEFAULT 0,
    target_tokens      INTEGER NOT NULL DEFAULT 0,
    store_bytes        INTEGER NOT NULL DEFAULT 0,
    -- Training, as the newest step reported it.
    step               INTEGER NOT NULL DEFAULT 0,
    train_loss         REAL,
    student_rate       REAL,
    trained_tokens     INTEGER NOT NULL DEFAULT 0,
    first_step         INTEGER,
    first_step_ms      INTEGER,
    last_step_ms       INTEGER,
    held_out_kl        REAL,
    held_out_kl_step   INTEGER,
    checkpoint_step    INTEGER,
    checkpoint_key     TEXT,
    train_finish_json  TEXT,
    evaluation_json    TEXT,
    report_json        TEXT,
    -- When the janitor removed what was staged and never published.
    cleaned_ms         INTEGER
) STRICT;

CREATE INDEX jobs_by_state ON jobs (state, id);
CREATE INDEX jobs_by_prompt_set ON jobs (prompt_set_sha256);

CREATE TABLE tasks (
    id               TEXT PRIMARY KEY NOT NULL,
    job_id           TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    kind             TEXT NOT NULL,
    topic            TEXT NOT NULL,
    -- Shard tasks only.
    shard            INTEGER,
    split            TEXT,
    first_row        INTEGER,
    row_count        INTEGER,
    state            TEXT NOT NULL,
    -- Lower goes first.
    priority         INTEGER NOT NULL,
    -- Fencing number of the newest attempt; 0 before the first.
    epoch            INTEGER NOT NULL DEFAULT 0,
    -- Attempts up to this one are void, whatever they still say.
    void_epoch       INTEGER NOT NULL DEFAULT 0,
    attempts         INTEGER NOT NULL DEFAULT 0,
    worker_id        TEXT,
    lease_until_ms   INTEGER,
    -- Ready tasks wait until then.
    not_before_ms    INTEGER NOT NULL DEFAULT 0,
    queued_ms        INTEGER,
    -- Records sent since the last claim.
    publishes        INTEGER NOT NULL DEFAULT 0,
    -- Of the running attempt.
    progress_tokens  INTEGER NOT NULL DEFAULT 0,
    progress_seconds REAL NOT NULL DEFAULT 0
) STRICT;

CREATE INDEX tasks_by_job ON tasks (job_id, kind, shard);
CREATE INDEX tasks_by_state ON tasks (state, topic, priority, job_id, shard);

CREATE TABLE shards (
    job_id           TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    shard            INTEGER NOT NULL,
    split            TEXT NOT NULL,
    epoch            INTEGER NOT NULL,
    object_key       TEXT NOT NULL,
    sha256           TEXT NOT NULL,
    bytes            INTEGER NOT NULL,
    row_count        INTEGER NOT NULL,
    target_tokens    INTEGER NOT NULL,
    seconds          REAL NOT NULL,
    head_mass        REAL,
    mean_abs_error   REAL,
    argmax_agreement REAL,
    publish_ms       INTEGER NOT NULL,
    PRIMARY KEY (job_id, shard)
) STRICT;

CREATE INDEX shards_by_time ON shards (job_id, publish_ms);

-- Attempts that did not end in their result.
CREATE TABLE redone (
    task_id  TEXT NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    epoch    INTEGER NOT NULL,
    job_id   TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    worker   TEXT NOT NULL,
    reason   TEXT NOT NULL,
    time_ms  INTEGER NOT NULL,
    PRIMARY KEY (task_id, epoch)
) STRICT;

CREATE INDEX redone_by_job ON redone (job_id, time_ms);

-- Records that must reach the bus; a row goes when the broker has acknowledged its record.
CREATE TABLE outbox (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    topic    TEXT NOT NULL,
    task_id  TEXT NOT NULL REFERENCES tasks (id) ON DELETE CASCADE
) STRICT;

CREATE INDEX outbox_by_task ON outbox (task_id);

CREATE TABLE event_offsets (
    partition    INTEGER PRIMARY KEY NOT NULL,
    next_offset  INTEGER NOT NULL
) STRICT;

-- So that a repeated event changes nothing.
CREATE TABLE applied_events (
    event_id  TEXT PRIMARY KEY NOT NULL,
    job_id    TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE
) STRICT;

CREATE INDEX applied_events_by_job ON applied_events (job_id);

-- Records of the event topic that could not be read or did not fit; kept for whoever asks why.
CREATE TABLE skipped_records (
    partition      INTEGER NOT NULL,
    record_offset  INTEGER NOT NULL,
    time_ms        INTEGER NOT NULL,
    reason         TEXT NOT NULL,
    PRIMARY KEY (partition, record_offset)
) STRICT;

-- What WatchJob streams: encoded retort.v1.JobEvent records.
CREATE TABLE job_events (
    job_id    TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    sequence  INTEGER NOT NULL,
    payload   BLOB NOT NULL,
    PRIMARY KEY (job_id, sequence)
) STRICT;

-- Versions reserved for a job's candidate (promote_ms absent) and promoted ones. They outlive
-- their job.
CREATE TABLE models (
    name          TEXT NOT NULL,
    version       INTEGER NOT NULL,
    job_id        TEXT NOT NULL UNIQUE,
    object_key    TEXT NOT NULL,
    quality_json  TEXT NOT NULL,
    promote_ms    INTEGER,
    PRIMARY KEY (name, version)
) STRICT;

-- Store prefixes of deleted jobs. Each is swept twice: at once, and again when the last attempt
-- that could still write there has lost its lease.
CREATE TABLE deletions (
    prefix  TEXT NOT NULL,
    due_ms  INTEGER NOT NULL,
    PRIMARY KEY (prefix, due_ms)
) STRICT;
