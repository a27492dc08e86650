-- Attempt at training that the progress figures are of: a later one may have gone back to an older checkpoint.
ALTER TABLE jobs ADD COLUMN step_epoch INTEGER NOT NULL DEFAULT 0;
