//! What lies in the store while workers train together: under each lead's epoch, who is there, and for each
//! round the weights and the differences. Each is whole once its manifest is there.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use retort_artifact::{Store, checkpoint, checkpoint::Manifest, paths};
use retort_core::{Code, Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio_util::bytes::Bytes;

/// Most batches that a round may name: at 22 bytes each they fit in a manifest.
pub const MAX_BATCHES: usize = 500_000;
/// The one file of weights or of a difference.
const FILE: &str = "weights.safetensors";
/// Name in a manifest's extra fields.
const ROUND: &str = "exchange";

/// Number and epoch of a replica's attempt; the lead is number 0.
pub type Replica = (u32, u64);

/// What the lead says with the weights of a round.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    pub round: u32,
    /// Prefix of the weights before training, for what is not trained.
    pub initial_key: String,
    /// Steps done before this round, over all workers.
    pub step: u32,
    /// Batches of each replica. Those that are not named have a rest.
    pub parts: Vec<Part>,
    /// Workers of this round, the lead among them.
    pub workers: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    pub replica: Replica,
    pub batches: Vec<u32>,
}

/// What a replica says with its difference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Delivery {
    /// Sum over the target tokens, nats.
    pub loss: f64,
    pub target_tokens: u64,
    /// That went through the student.
    pub tokens: u64,
}

/// The exchange under one lead's attempt.
#[derive(Clone, Debug)]
pub struct Exchange {
    store: Store,
    job: String,
    /// Of the lead's attempt.
    pub epoch: u64,
    spec_sha256: String,
}

impl Exchange {
    pub fn new(store: Store, job: &str, epoch: u64, spec_sha256: &str) -> Self {
        Self { store, job: job.to_owned(), epoch, spec_sha256: spec_sha256.to_owned() }
    }

    /// Under the newest lead that takes replicas.
    pub async fn newest(store: &Store, job: &str, spec_sha256: &str) -> Result<Option<Self>> {
        let entries = store.list(&paths::exchanges_prefix(job)).await?;
        let epochs = entries.iter().filter_map(|entry| {
            let (epoch, rest) = paths::parse_exchange(job, &entry.key)?;
            (rest == "open.json").then_some(epoch)
        });
        Ok(epochs.max().map(|epoch| Self::new(store.clone(), job, epoch, spec_sha256)))
    }

    /// A lead begins: what others left is nobody's, and replicas may come.
    pub async fn open(&self) -> Result<()> {
        self.clear_before(self.epoch).await?;
        self.put_note(&paths::exchange_open(&self.job, self.epoch)).await
    }

    /// The training is done. What a later lead opened stays.
    pub async fn clear(&self) -> Result<()> {
        self.clear_before(self.epoch.saturating_add(1)).await
    }

    async fn clear_before(&self, epoch: u64) -> Result<()> {
        let entries = self.store.list(&paths::exchanges_prefix(&self.job)).await?;
        let mut epochs: Vec<u64> =
            entries.iter().filter_map(|entry| Some(paths::parse_exchange(&self.job, &entry.key)?.0)).collect();
        epochs.dedup();
        for epoch in epochs.into_iter().filter(|&of| of < epoch) {
            self.store.delete_prefix(&paths::exchange(&self.job, epoch)).await?;
        }
        Ok(())
    }

    pub async fn clear_round(&self, round: u32) -> Result<()> {
        self.store.delete_prefix(&paths::exchange_round(&self.job, self.epoch, round)).await.map(drop)
    }

    /// Says that this replica can take part in `round` and later ones, and takes back that it could in `before`.
    pub async fn say_ready(&self, replica: Replica, round: u32, before: Option<u32>) -> Result<()> {
        let key = |round| paths::exchange_replica(&self.job, self.epoch, replica, round);
        self.put_note(&key(round)).await?;
        match before {
            Some(before) if before != round => self.store.delete(&key(before)).await,
            _ => Ok(()),
        }
    }

    /// By number, the newest epoch of each replica and the first round that it can take part in.
    pub async fn replicas(&self) -> Result<BTreeMap<u32, (u64, u32)>> {
        let prefix = paths::exchange_replicas(&self.job, self.epoch);
        let note = |key: &str| {
            let (replica, round) = key.strip_prefix(&prefix)?.strip_suffix(".json")?.rsplit_once('-')?;
            Some((parse_replica(replica)?, round.parse::<u32>().ok()?))
        };
        let mut newest = BTreeMap::new();
        for entry in self.store.list(&prefix).await? {
            if let Some(((number, epoch), round)) = note(&entry.key) {
                let known: &mut (u64, u32) = newest.entry(number).or_default();
                *known = (epoch, round).max(*known);
            }
        }
        Ok(newest)
    }

    async fn put_note(&self, key: &str) -> Result<()> {
        match self.store.put_new(key, Bytes::from_static(b"{}\n")).await {
            Err(error) if error.code == Code::ObjectExists => Ok(()),
            outcome => outcome,
        }
    }

    /// Publishes the round's weights, which lie at [`Exchange::file`] in `folder`.
    pub async fn publish_round(&self, round: &Round, folder: &Path) -> Result<()> {
        let prefix = paths::exchange_weights(&self.job, self.epoch, round.round);
        checkpoint::publish(&self.store, &prefix, folder, self.manifest(round.step, json!(round))).await.map(drop)
    }

    /// The newest round of this lead; `None` while there is none after `after`.
    pub async fn next_round(&self, after: Option<u32>) -> Result<Option<Round>> {
        let prefix = format!("{}rounds/", paths::exchange(&self.job, self.epoch));
        let entries = self.store.list(&prefix).await?;
        let number = |key: &str| key.strip_prefix(&prefix)?.strip_suffix("/weights/manifest.json")?.parse::<u32>().ok();
        let newest = entries.iter().filter_map(|entry| number(&entry.key)).max();
        let Some(newest) = newest.filter(|newest| after.is_none_or(|after| *newest > after)) else { return Ok(None) };
        let prefix = paths::exchange_weights(&self.job, self.epoch, newest);
        let manifest = checkpoint::manifest(&self.store, &prefix).await?;
        let round: Round = self.said(&prefix, &manifest)?;
        let named: usize = round.parts.iter().map(|part| part.batches.len()).sum();
        if round.round != newest || named > MAX_BATCHES {
            return Err(malformed(&prefix, "it is not of this round"));
        }
        Ok(Some(round))
    }

    /// Fetches a round's weights, at most `max_bytes` of them, into `folder`; where they lie then.
    pub async fn fetch_weights(&self, round: u32, max_bytes: u64, folder: &Path) -> Result<PathBuf> {
        let prefix = paths::exchange_weights(&self.job, self.epoch, round);
        self.fetch(&prefix, max_bytes, folder).await
    }

    /// Publishes how far a replica came, which lies at [`Exchange::file`] in `folder`.
    pub async fn deliver(&self, round: &Round, replica: Replica, delivery: &Delivery, folder: &Path) -> Result<()> {
        let prefix = paths::exchange_delta(&self.job, self.epoch, round.round, replica);
        checkpoint::publish(&self.store, &prefix, folder, self.manifest(round.step, json!(delivery))).await.map(drop)
    }

    /// Who has delivered in a round.
    pub async fn delivered(&self, round: u32) -> Result<Vec<Replica>> {
        let prefix = format!("{}deltas/", paths::exchange_round(&self.job, self.epoch, round));
        let entries = self.store.list(&prefix).await?;
        let of = |key: &str| parse_replica(key.strip_prefix(&prefix)?.strip_suffix("/manifest.json")?);
        Ok(entries.iter().filter_map(|entry| of(&entry.key)).collect())
    }

    /// Fetches what a replica delivered, at most `max_bytes`, into `folder`.
    pub async fn fetch_delta(
        &self,
        round: u32,
        replica: Replica,
        max_bytes: u64,
        folder: &Path,
    ) -> Result<(Delivery, PathBuf)> {
        let prefix = paths::exchange_delta(&self.job, self.epoch, round, replica);
        let delivery: Delivery = self.said(&prefix, &checkpoint::manifest(&self.store, &prefix).await?)?;
        if !delivery.loss.is_finite() {
            return Err(malformed(&prefix, "its loss is no number"));
        }
        Ok((delivery, self.fetch(&prefix, max_bytes, folder).await?))
    }

    /// Where weights or a difference lie in a folder that is published.
    pub fn file(folder: &Path) -> PathBuf {
        folder.join(FILE)
    }

    async fn fetch(&self, prefix: &str, max_bytes: u64, folder: &Path) -> Result<PathBuf> {
        let manifest = checkpoint::manifest(&self.store, prefix).await?;
        match manifest.files.as_slice() {
            [file] if file.path == FILE && file.bytes <= max_bytes => {}
            _ => return Err(malformed(prefix, &format!("it is not one file {FILE} of at most {max_bytes} bytes"))),
        }
        checkpoint::fetch(&self.store, prefix, folder).await?;
        Ok(Self::file(folder))
    }

    fn manifest(&self, step: u32, said: serde_json::Value) -> Manifest {
        let mut manifest = Manifest {
            job: self.job.clone(),
            step,
            epoch: self.epoch,
            spec_sha256: self.spec_sha256.clone(),
            ..Manifest::default()
        };
        manifest.extra.insert(ROUND.to_owned(), said);
        manifest
    }

    fn said<T: for<'de> Deserialize<'de>>(&self, prefix: &str, manifest: &Manifest) -> Result<T> {
        if manifest.spec_sha256 != self.spec_sha256 {
            return Err(malformed(prefix, "it is of another spec"));
        }
        let said = manifest.extra.get(ROUND).cloned().unwrap_or_default();
        serde_json::from_value(said).map_err(|error| malformed(prefix, &error.to_string()))
    }
}

/// `NUMBER-EPOCH`.
fn parse_replica(name: &str) -> Option<Replica> {
    let (number, epoch) = name.split_once('-')?;
    Some((number.parse().ok()?, epoch.parse().ok()?))
}

fn malformed(prefix: &str, why: &str) -> Error {
    Error::new(Code::CheckpointCorrupt, format!("{prefix}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchange(folder: &Path, epoch: u64) -> Exchange {
        let store = Store::open(&folder.join("store").display().to_string()).unwrap();
        Exchange::new(store, "j", epoch, "spec")
    }

    fn written(folder: &Path, name: &str, bytes: usize) -> PathBuf {
        let folder = folder.join(name);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(Exchange::file(&folder), vec![7; bytes]).unwrap();
        folder
    }

    #[tokio::test]
    async fn a_round_and_its_deliveries_are_found_by_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let lead = exchange(folder.path(), 4);
        assert!(Exchange::newest(&lead.store, "j", "spec").await.unwrap().is_none());
        assert!(lead.next_round(None).await.unwrap().is_none());
        lead.open().await.unwrap();
        let parts = vec![Part { replica: (1, 2), batches: vec![5, 6] }];
        let round = Round { round: 3, initial_key: "i".to_owned(), step: 5, parts, workers: 2 };
        lead.publish_round(&round, &written(folder.path(), "w", 100)).await.unwrap();

        let found = Exchange::newest(&lead.store, "j", "spec").await.unwrap().unwrap();
        assert_eq!(found.epoch, 4);
        assert_eq!(found.next_round(None).await.unwrap().unwrap(), round);
        assert!(found.next_round(Some(3)).await.unwrap().is_none());
        let weights = found.fetch_weights(3, 100, &folder.path().join("got")).await.unwrap();
        assert_eq!(std::fs::read(weights).unwrap(), [7; 100]);

        for (replica, round, before) in
            [((1, 2), 9, None), ((1, 3), 0, None), ((1, 3), 4, Some(0)), ((2, 1), 0, Some(0))]
        {
            found.say_ready(replica, round, before).await.unwrap();
        }
        assert_eq!(lead.replicas().await.unwrap(), BTreeMap::from([(1, (3, 4)), (2, (1, 0))]));
        let notes = lead.store.list(&paths::exchange_replicas("j", 4)).await.unwrap();
        assert_eq!(notes.len(), 3, "what was taken back is gone");
        let delivery = Delivery { loss: 1.5, target_tokens: 3, tokens: 4 };
        found.deliver(&round, (1, 3), &delivery, &written(folder.path(), "d", 50)).await.unwrap();
        assert_eq!(lead.delivered(3).await.unwrap(), [(1, 3)]);
        assert_eq!(lead.fetch_delta(3, (1, 3), 50, &folder.path().join("of-1")).await.unwrap().0, delivery);

        let next = exchange(folder.path(), 5);
        next.open().await.unwrap();
        assert_eq!(Exchange::newest(&lead.store, "j", "spec").await.unwrap().unwrap().epoch, 5);
        assert!(lead.next_round(None).await.unwrap().is_none());
        next.clear().await.unwrap();
        assert!(Exchange::newest(&lead.store, "j", "spec").await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_round_that_names_all_it_may_can_be_read() {
        let folder = tempfile::tempdir().unwrap();
        let lead = exchange(folder.path(), 1);
        let batches = (0..MAX_BATCHES as u32).map(|i| u32::MAX - i).collect();
        let round = Round { parts: vec![Part { replica: (1, 1), batches }], ..Round::default() };
        lead.publish_round(&round, &written(folder.path(), "w", 10)).await.unwrap();
        assert_eq!(lead.next_round(None).await.unwrap().unwrap(), round);
    }

    #[tokio::test]
    async fn what_is_too_large_or_of_another_spec_or_damaged_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let lead = exchange(folder.path(), 1);
        lead.publish_round(&Round::default(), &written(folder.path(), "w", 100)).await.unwrap();
        let refused = lead.fetch_weights(0, 99, &folder.path().join("got")).await.unwrap_err();
        assert_eq!(refused.code, Code::CheckpointCorrupt);
        let other = Exchange::new(lead.store.clone(), "j", 1, "other");
        assert!(other.next_round(None).await.unwrap_err().message.contains("another spec"));
        let object = lead.store.root().join(paths::exchange_weights("j", 1, 0)).join(FILE);
        std::fs::write(object, [8; 100]).unwrap();
        assert_eq!(
            lead.fetch_weights(0, 100, &folder.path().join("got")).await.unwrap_err().code,
            Code::CheckpointCorrupt
        );
        let bad = Delivery { loss: f64::NAN, ..Delivery::default() };
        lead.deliver(&Round::default(), (1, 1), &bad, &written(folder.path(), "d", 5)).await.unwrap();
        assert!(lead.fetch_delta(0, (1, 1), 50, &folder.path().join("of-1")).await.is_err());
        assert!(
            parse_replica("1").is_none() && parse_replica("x-1").is_none() && parse_replica("00002-7") == Some((2, 7))
        );
    }
}
