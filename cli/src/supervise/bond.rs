//! Processes that live and die together: when one ends, the others are ended too, and all are started
//! again.

use std::sync::Arc;

use tokio::sync::watch;

/// Shared by the programs of one teacher group. Each of their deaths ends a *life* of the group, and
/// what dies later of the same life is a consequence of it.
#[derive(Clone, Debug)]
pub struct Bond {
    life: Arc<watch::Sender<u64>>,
}

/// One process in one life of the group.
#[derive(Debug)]
pub struct Share {
    bond: Bond,
    life: u64,
}

impl Bond {
    pub fn new() -> Self {
        Self { life: Arc::new(watch::Sender::new(0)) }
    }

    /// A process that starts now is part of the present life.
    pub fn join(&self) -> Share {
        Share { bond: self.clone(), life: *self.life.borrow() }
    }
}

impl Share {
    /// Waits until the life is over because another process of it ended.
    pub async fn over(&self) {
        let mut life = self.bond.life.subscribe();
        // The sender lives in `self`, so there is nothing else to wait for.
        let _ = life.wait_for(|now| *now != self.life).await;
    }

    /// Ends the life, unless it is over.
    pub fn end(&self) {
        self.bond.life.send_if_modified(|now| {
            let ends = *now == self.life;
            *now += u64::from(ends);
            ends
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_death_ends_the_life_once() {
        let bond = Bond::new();
        let (one, other) = (bond.join(), bond.join());
        one.end();
        other.over().await;
        other.end();
        let next = bond.join();
        let waits = tokio::time::timeout(std::time::Duration::from_millis(20), next.over());
        assert!(waits.await.is_err(), "what followed from the first death ends no second life");
        next.end();
        next.over().await;
    }
}
