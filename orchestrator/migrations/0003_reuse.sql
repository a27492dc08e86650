-- SHA-256 of all that decides a shard's content, by which another job finds it; absent in older rows.
ALTER TABLE shards ADD COLUMN work_sha256 TEXT;
-- 1 when object_key was computed for another job.
ALTER TABLE shards ADD COLUMN reused INTEGER NOT NULL DEFAULT 0;
-- 1 when some job found the object corrupt: no further job gets it.
ALTER TABLE shards ADD COLUMN withdrawn INTEGER NOT NULL DEFAULT 0;
-- Mean KL of what is read back against what the teacher handed over, nats a position.
ALTER TABLE shards ADD COLUMN kl REAL;

CREATE INDEX shards_by_work ON shards (work_sha256, publish_ms) WHERE work_sha256 IS NOT NULL;
CREATE INDEX shards_by_object ON shards (object_key);
