//! Every key of the object store, built in this one file.
//!
//! Keys are `/`-separated and relative to the store's root; a key that ends in `/` is a prefix.

/// What every object's key begins with, uploads on their way left out.
pub(crate) const FOLDERS: [&str; 4] = ["jobs", "models", "prompts", "quarantine"];

/// A validated prompt set in canonical JSONL, named by its content.
pub fn prompt_set(sha256: &str) -> String {
    format!("prompts/{sha256}.jsonl")
}

/// Everything of a job.
pub fn job_prefix(job: &str) -> String {
    format!("jobs/{job}/")
}

/// One attempt's soft targets of one shard. `epoch` is the fencing number of the attempt.
pub fn shard(job: &str, shard: u32, epoch: u64) -> String {
    format!("jobs/{job}/shards/{shard:05}/{epoch}.parquet")
}

/// Job, shard and epoch of a shard's key, None for any other key.
pub fn parse_shard(key: &str) -> Option<(&str, u32, u64)> {
    let (job, rest) = key.strip_prefix("jobs/")?.split_once("/shards/")?;
    let (index, file) = rest.split_once('/')?;
    let (index, epoch) = (index.parse().ok()?, file.strip_suffix(".parquet")?.parse().ok()?);
    (shard(job, index, epoch) == key).then_some((job, index, epoch))
}

/// All shards of a job, every attempt at each.
pub fn shards_prefix(job: &str) -> String {
    format!("jobs/{job}/shards/")
}

/// All attempts at one shard.
pub fn shard_prefix(job: &str, shard: u32) -> String {
    format!("jobs/{job}/shards/{shard:05}/")
}

/// What an attempt wrote and the teacher would not answer for; never published. `epoch` is the fencing
/// number of the attempt.
pub fn quarantined(job: &str, shard: u32, epoch: u64) -> String {
    format!("quarantine/{job}/{shard:05}-{epoch}.parquet")
}

/// Why it lies there, as JSON.
pub fn quarantine_reason(job: &str, shard: u32, epoch: u64) -> String {
    format!("quarantine/{job}/{shard:05}-{epoch}.json")
}

/// All that was set aside of a job.
pub fn quarantine_prefix(job: &str) -> String {
    format!("quarantine/{job}/")
}

/// Every checkpoint of a job.
pub fn checkpoints_prefix(job: &str) -> String {
    format!("jobs/{job}/checkpoints/")
}

/// One checkpoint: `manifest.json`, the Hugging Face folder `model/` and the trainer's `state/`.
pub fn checkpoint(job: &str, step: u32, epoch: u64) -> String {
    format!("jobs/{job}/checkpoints/{step:06}-{epoch}/")
}

/// The weights before training, laid out like a checkpoint.
pub fn initial(job: &str, epoch: u64) -> String {
    format!("jobs/{job}/initial-{epoch}/")
}

/// Epoch of the key of weights before training, or of a key under it; None for any other key.
pub fn parse_initial(job: &str, key: &str) -> Option<u64> {
    let (epoch, _) = key.strip_prefix(&format!("jobs/{job}/initial-"))?.split_once('/')?;
    epoch.parse().ok()
}

/// Where the lead of a training says how its replicas reach it. `epoch` is its attempt's fencing number.
pub fn lead(job: &str, epoch: u64) -> String {
    format!("{}{epoch}.json", lead_stem(job))
}

/// Every object of a training but its checkpoints.
pub fn train_prefix(job: &str) -> String {
    format!("jobs/{job}/train/")
}

/// Epoch of a lead's key, None for any other key.
pub fn parse_lead(job: &str, key: &str) -> Option<u64> {
    let epoch = key.strip_prefix(&lead_stem(job))?.strip_suffix(".json")?.parse().ok()?;
    (lead(job, epoch) == key).then_some(epoch)
}

fn lead_stem(job: &str) -> String {
    format!("{}lead-", train_prefix(job))
}

/// The manifest of the checkpoint at `prefix`; written last, so its presence means all is there.
pub fn manifest(prefix: &str) -> String {
    format!("{prefix}manifest.json")
}

/// The Hugging Face folder of the checkpoint at `prefix`.
pub fn model_prefix(prefix: &str) -> String {
    format!("{prefix}model/")
}

/// The adapters of the checkpoint at `prefix`, as PEFT reads them.
pub fn adapter_prefix(prefix: &str) -> String {
    format!("{prefix}adapter/")
}

/// The trainer's state of the checkpoint at `prefix`.
pub fn state_prefix(prefix: &str) -> String {
    format!("{prefix}state/")
}

/// What workers that train a job's model together exchange. `epoch` is the fencing number of the lead's attempt.
pub fn exchange(job: &str, epoch: u64) -> String {
    format!("jobs/{job}/exchange/{epoch:06}/")
}

/// The exchange of every lead that a job had.
pub fn exchanges_prefix(job: &str) -> String {
    format!("jobs/{job}/exchange/")
}

/// That its lead takes replicas.
pub fn exchange_open(job: &str, epoch: u64) -> String {
    format!("{}open.json", exchange(job, epoch))
}

/// Every [`exchange_replica`].
pub fn exchange_replicas(job: &str, epoch: u64) -> String {
    format!("{}replicas/", exchange(job, epoch))
}

/// That a replica can take part in this round and later ones; `replica` is its number and the epoch of its
/// attempt.
pub fn exchange_replica(job: &str, epoch: u64, replica: (u32, u64), round: u32) -> String {
    format!("{}{:05}-{}-{round}.json", exchange_replicas(job, epoch), replica.0, replica.1)
}

/// Everything of a round.
pub fn exchange_round(job: &str, epoch: u64, round: u32) -> String {
    format!("{}rounds/{round:06}/", exchange(job, epoch))
}

/// The weights that a round begins with, laid out like a checkpoint.
pub fn exchange_weights(job: &str, epoch: u64, round: u32) -> String {
    format!("{}weights/", exchange_round(job, epoch, round))
}

/// How far a replica's weights came in a round, laid out like a checkpoint.
pub fn exchange_delta(job: &str, epoch: u64, round: u32, replica: (u32, u64)) -> String {
    format!("{}deltas/{:05}-{}/", exchange_round(job, epoch, round), replica.0, replica.1)
}

/// Epoch of the lead and what comes after it, of a key of an exchange.
pub fn parse_exchange<'a>(job: &str, key: &'a str) -> Option<(u64, &'a str)> {
    let (epoch, rest) = key.strip_prefix(&exchanges_prefix(job))?.split_once('/')?;
    Some((epoch.parse().ok()?, rest))
}

pub fn report(job: &str) -> String {
    format!("jobs/{job}/report.json")
}

/// The Hugging Face folder of a job's candidate that was not promoted, as [`model_folder`] of one that was.
pub fn candidate(job: &str) -> String {
    format!("jobs/{job}/candidate/")
}

/// Every promoted model.
pub fn models_prefix() -> String {
    "models/".to_owned()
}

/// All versions of a promoted model.
pub fn model_versions_prefix(name: &str) -> String {
    format!("models/{name}/versions/")
}

/// The pointer that makes version `n` of a model exist.
pub fn model_version(name: &str, n: u32) -> String {
    format!("models/{name}/versions/{n:06}.json")
}

/// The Hugging Face folder of version `n`, copied at promotion.
pub fn model_folder(name: &str, n: u32) -> String {
    format!("models/{name}/{n:06}/")
}

/// Where a large upload waits until it is complete; nothing reads here.
pub fn staging(id: &str) -> String {
    format!("staging/{id}")
}

/// Step and epoch of a checkpoint's prefix or of a key under it, None for any other key.
pub fn parse_checkpoint(job: &str, key: &str) -> Option<(u32, u64)> {
    let rest = key.strip_prefix(&checkpoints_prefix(job))?;
    let (folder, _) = rest.split_once('/')?;
    let (step, epoch) = folder.split_once('-')?;
    Some((step.parse().ok()?, epoch.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exchange_lies_below_its_job_and_lead() {
        let delta = exchange_delta("j", 2, 7, (1, 3));
        assert_eq!(delta, "jobs/j/exchange/000002/rounds/000007/deltas/00001-3/");
        assert!(
            delta.starts_with(&exchange_round("j", 2, 7)) && exchange_weights("j", 2, 7).ends_with("000007/weights/")
        );
        assert_eq!(parse_exchange("j", &exchange_open("j", 2)), Some((2, "open.json")));
        assert_eq!(parse_exchange("j", &shard("j", 1, 1)), None);
        assert_eq!(exchange_replica("j", 2, (1, 3), 8), "jobs/j/exchange/000002/replicas/00001-3-8.json");
    }

    #[test]
    fn keys_are_what_the_format_says() {
        assert_eq!(prompt_set("ab12"), "prompts/ab12.jsonl");
        assert_eq!(shard("j", 7, 3), "jobs/j/shards/00007/3.parquet");
        assert_eq!(quarantined("j", 7, 3), "quarantine/j/00007-3.parquet");
        assert!(quarantine_reason("j", 7, 3).starts_with(&quarantine_prefix("j")));
        assert_eq!(checkpoint("j", 40, 2), "jobs/j/checkpoints/000040-2/");
        assert_eq!(manifest(&initial("j", 2)), "jobs/j/initial-2/manifest.json");
        assert_eq!(model_version("m", 1), "models/m/versions/000001.json");
        assert_eq!(model_folder("m", 1), "models/m/000001/");
        assert!(candidate("j").starts_with(&job_prefix("j")));
    }

    #[test]
    fn a_shards_key_says_its_job_and_attempt() {
        assert_eq!(parse_shard(&shard("j", 7, 3)), Some(("j", 7, 3)));
        assert_eq!(parse_shard(&shard("j", 123_456, 3)), Some(("j", 123_456, 3)));
        for other in [
            "jobs/j/shards/00007/3",
            "jobs/j/shards/7/3.parquet",
            "jobs/j/shards/00007/+3.parquet",
            "jobs/j/shards/00007/../3.parquet",
            "jobs/j/checkpoints/000040-12/",
            "/jobs/j/shards/00007/3.parquet",
        ] {
            assert_eq!(parse_shard(other), None, "{other}");
        }
    }

    #[test]
    fn a_checkpoints_key_says_its_step_and_epoch() {
        assert_eq!(parse_checkpoint("j", "jobs/j/checkpoints/000040-12/manifest.json"), Some((40, 12)));
        assert_eq!(parse_checkpoint("j", &checkpoint("j", 1_234_567, 1)), Some((1_234_567, 1)));
        for other in ["jobs/k/checkpoints/000040-12/", "jobs/j/checkpoints/x-1/", "jobs/j/checkpoints/000040", "report"]
        {
            assert_eq!(parse_checkpoint("j", other), None, "{other}");
        }
        assert_eq!(parse_initial("j", &manifest(&initial("j", 12))), Some(12));
        assert_eq!(parse_initial("j", "jobs/j/initial-x/manifest.json"), None);
        assert_eq!(parse_initial("j", &checkpoint("j", 1, 2)), None);
    }

    #[test]
    fn a_leads_key_says_its_epoch() {
        assert_eq!(lead("j", 12), "jobs/j/train/lead-12.json");
        assert_eq!(parse_lead("j", &lead("j", 12)), Some(12));
        for other in ["jobs/k/train/lead-12.json", "jobs/j/train/lead-+2.json", "jobs/j/train/lead-12.json.part"] {
            assert_eq!(parse_lead("j", other), None, "{other}");
        }
    }
}
