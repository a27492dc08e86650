//! Tells waiting fetches that a topic has new records, so that they need not ask the database.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::watch;

#[derive(Clone, Debug, Default)]
pub(crate) struct Arrivals {
    topics: Arc<Mutex<HashMap<String, watch::Sender<()>>>>,
}

impl Arrivals {
    /// Sees every [`Arrivals::announce`] of the topic from now on. Only for topics that exist, so
    /// that their number is bounded.
    pub(crate) fn subscribe(&self, topic: &str) -> watch::Receiver<()> {
        let mut topics = self.topics.lock().unwrap_or_else(PoisonError::into_inner);
        topics.entry(topic.to_owned()).or_insert_with(|| watch::Sender::new(())).subscribe()
    }

    pub(crate) fn announce(&self, topic: &str) {
        if let Some(sender) = self.topics.lock().unwrap_or_else(PoisonError::into_inner).get(topic) {
            sender.send_replace(());
        }
    }
}
