-- The time left is told from the rates that workers report, no longer from when steps arrived.
ALTER TABLE jobs DROP COLUMN first_step;
ALTER TABLE jobs DROP COLUMN first_step_ms;
ALTER TABLE jobs DROP COLUMN last_step_ms;
