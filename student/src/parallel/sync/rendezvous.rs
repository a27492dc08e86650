//! Where the lead of a training is found: one small object in the job's part of the store.

use retort_artifact::{Store, paths};
use retort_core::{Code, Error, Result};
use serde::{Deserialize, Serialize};

/// Version of the object.
const SCHEMA_VERSION: u32 = 1;
/// Largest object that is read, bytes.
const MAX_BYTES: u64 = 4096;

/// What a replica must know to join. Whoever can read the store can join, and could read the weights there.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Rendezvous {
    schema_version: u32,
    /// Of the lead's attempt.
    pub(super) epoch: u64,
    /// `host:port`
    pub(super) address: String,
    /// Known to the lead and to who has read this.
    pub(super) token: String,
}

impl Rendezvous {
    /// With a token of its own.
    pub(super) fn new(epoch: u64, address: String) -> Self {
        let random = || uuid::Uuid::new_v4().simple();
        Self { schema_version: SCHEMA_VERSION, epoch, address, token: format!("{}{}", random(), random()) }
    }

    /// Writes it, and removes those of earlier attempts.
    pub(super) async fn publish(&self, store: &Store, job: &str) -> Result<()> {
        for epoch in epochs(store, job).await? {
            if epoch < self.epoch {
                remove(store, job, epoch).await?;
            }
        }
        let json = serde_json::to_vec(self).map_err(|error| Error::internal(error.to_string()))?;
        store.put_new(&paths::lead(job, self.epoch), json.into()).await
    }
}

/// The newest of a job; `None` where nobody leads, or nobody that this build can follow.
pub(super) async fn newest(store: &Store, job: &str) -> Result<Option<Rendezvous>> {
    let Some(epoch) = epochs(store, job).await?.into_iter().max() else { return Ok(None) };
    let key = paths::lead(job, epoch);
    let bytes = match store.get(&key, MAX_BYTES).await {
        Ok(bytes) => bytes,
        // It went meanwhile.
        Err(error) if error.code == Code::ObjectNotFound => return Ok(None),
        Err(error) if error.code == Code::ObjectTooLarge => {
            tracing::warn!(key, "this does not say where a training's lead is: {}", error.message);
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    match serde_json::from_slice::<Rendezvous>(&bytes) {
        Ok(found) if found.schema_version == SCHEMA_VERSION && found.epoch == epoch => Ok(Some(found)),
        Ok(_) => {
            tracing::warn!(key, "this is of another attempt or of another version of retort");
            Ok(None)
        }
        Err(error) => {
            tracing::warn!(key, "this does not say where a training's lead is: {error}");
            Ok(None)
        }
    }
}

/// Removes an attempt's own; one that is not there is fine.
pub(super) async fn remove(store: &Store, job: &str, epoch: u64) -> Result<()> {
    store.delete(&paths::lead(job, epoch)).await
}

async fn epochs(store: &Store, job: &str) -> Result<Vec<u64>> {
    let entries = store.list(&paths::train_prefix(job)).await?;
    Ok(entries.iter().filter_map(|entry| paths::parse_lead(job, &entry.key)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_newest_is_found_and_takes_the_place_of_those_before() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().display().to_string()).unwrap();
        assert!(newest(&store, "j").await.unwrap().is_none());
        for epoch in [2, 11] {
            let lead = Rendezvous::new(epoch, format!("127.0.0.1:{epoch}"));
            lead.publish(&store, "j").await.unwrap();
            assert!(newest(&store, "j").await.unwrap() == Some(lead));
        }
        assert!(!store.exists(&paths::lead("j", 2)).await.unwrap());
        // An attempt that was superseded takes nothing away.
        Rendezvous::new(3, "127.0.0.1:3".to_owned()).publish(&store, "j").await.unwrap();
        assert_eq!(newest(&store, "j").await.unwrap().unwrap().epoch, 11);
        assert_eq!(newest(&store, "j").await.unwrap().unwrap().token.len(), 64);
        remove(&store, "j", 11).await.unwrap();
        assert_eq!(newest(&store, "j").await.unwrap().unwrap().epoch, 3);
        assert!(newest(&store, "other").await.unwrap().is_none());
    }

    #[tokio::test]
    async fn what_is_too_large_garbage_or_of_another_version_leads_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().display().to_string()).unwrap();
        let sound = serde_json::to_value(Rendezvous::new(9, "127.0.0.1:1".to_owned())).unwrap();
        let with = |key: &str, value: serde_json::Value| {
            let mut other = sound.clone();
            other[key] = value;
            other.to_string()
        };
        for text in [
            "x".to_owned(),
            with("address", "a".repeat(5000).into()),
            with("schema_version", 2.into()),
            with("epoch", 8.into()),
            with("token", 1.into()),
        ] {
            store.put_new(&paths::lead("j", 9), text.into()).await.unwrap();
            assert!(newest(&store, "j").await.unwrap().is_none());
            remove(&store, "j", 9).await.unwrap();
        }
    }
}
