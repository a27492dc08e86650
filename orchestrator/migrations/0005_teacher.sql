-- SHA-256 of the teacher's weights: all shards of a job have one; absent in older rows.
ALTER TABLE shards ADD COLUMN teacher_sha256 TEXT;
