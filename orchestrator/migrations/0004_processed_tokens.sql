-- Tokens that went through the student; manifests call target tokens alone trained ones.
ALTER TABLE jobs RENAME COLUMN trained_tokens TO processed_tokens;
