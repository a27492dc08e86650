//! How a group comes to stand, seen from stage 0, and how it is kept alive and ended.

use std::sync::Arc;

use retort_core::{Code, Error, Result, task_group::TaskGroup};
use retort_proto as proto;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::{
    all_stats,
    door::Door,
    frames::Work,
    health::Health,
    lead::{Peer, PeerStats},
    link, member,
    place::Place,
    stats::Meter,
    wire,
};

/// Keeps a group alive from stage 0's side; beside the [`super::Group`], which works.
pub struct Keeper {
    tasks: TaskGroup,
    health: Health,
    ended: CancellationToken,
}

/// A group that stands: every stage is there, and every link.
pub struct Formed {
    /// What the model thread makes a [`super::Group`] of.
    pub parts: Parts,
    pub keeper: Keeper,
    /// Fires, with the reason, when the group is broken.
    pub pulse: Pulse,
}

/// Says when a group is broken.
#[derive(Clone)]
pub struct Pulse {
    health: Health,
}

/// All of a [`super::Group`] but what computes.
pub struct Parts {
    pub(super) place: Place,
    pub(super) health: Health,
    pub(super) peers: Vec<Peer>,
    pub(super) outgoing: mpsc::Sender<Work>,
    pub(super) incoming: mpsc::Receiver<Work>,
    pub(super) meter: Meter,
    pub(super) peer_stats: PeerStats,
}

impl Formed {
    /// Joins every other stage and waits until the ring stands. Errors: `stage-mismatch` with both
    /// sides named, `group-broken` when a stage does not appear in time or is lost again.
    pub async fn new(place: Place, dtype: &str, shutdown: &CancellationToken) -> Result<Self> {
        let listener = member::listen(&place).await?;
        let incarnation = incarnation();
        let (health, ended) = (Health::default(), CancellationToken::new());
        let mut tasks = TaskGroup::new(ended.clone());
        let meter = Meter::new(0, &place.peers[0]);
        let unknown = |stage: usize| proto::StageStats {
            stage: stage as u32,
            address: place.peers[stage].clone(),
            ..Default::default()
        };
        let peer_stats: PeerStats = Arc::new(std::sync::Mutex::new((1..place.stages()).map(unknown).collect()));

        let (inlets, mut inlet) = mpsc::channel(1);
        let (own, others) = (meter.clone(), Arc::clone(&peer_stats));
        let all_stats = Arc::new(move || all_stats(&own, &others));
        let door = Door::new(&place, dtype, Some(incarnation), None, inlets, all_stats);
        tasks.spawn("group-server", member::serve_door(place.clone(), door, listener, ended.clone())?);

        let mut peers = Vec::new();
        for stage in 1..place.stages() {
            let (peer, attendant) = Peer::new(&place, stage, incarnation, dtype, &health, &peer_stats);
            tasks.spawn("group-peer", member::watched(health.clone(), attendant));
            peers.push(peer);
        }
        let (work, outgoing) = mpsc::channel(1);
        let (linked, link_stands) = oneshot::channel();
        let sending = link::send(place.clone(), incarnation, health.clone(), outgoing, linked);
        tasks.spawn("group-link", member::watched(health.clone(), sending));
        let (todo, incoming) = mpsc::channel(2 * place.stages() + 16);
        let deliver: link::Deliver = Arc::new(move |work| match work {
            Work::Taken { .. } | Work::Failed { .. } => {
                todo.try_send(work).map_err(|_| wire::wrong("more targets than were asked for"))
            }
            Work::Begin { .. } | Work::Step { .. } => Err(wire::wrong("a step came back to stage 0")),
        });
        let (own_place, own_health) = (place.clone(), health.clone());
        let (arrived, ring_stands) = oneshot::channel();
        let receiving = async move {
            let inlet = tokio::select! {
                inlet = inlet.recv() => inlet,
                _ = own_health.broken() => None,
            };
            let Some(inlet) = inlet else { return Ok(()) };
            let _ = arrived.send(());
            link::receive(own_place, own_health, inlet, || 0, deliver).await
        };
        tasks.spawn("group-inlet", member::watched(health.clone(), receiving));

        let keeper = Keeper { tasks, health: health.clone(), ended };
        let standing = async {
            for peer in &mut peers {
                peer.linked().await?;
            }
            let stands = link_stands.await.is_ok() && ring_stands.await.is_ok();
            if stands { Ok(()) } else { Err(health.why()) }
        };
        let stood = tokio::select! {
            stood = standing => stood,
            why = health.broken() => Err(why),
            () = shutdown.cancelled() => Err(Error::new(Code::WorkerStopped, "stopped before the group stood")),
        };
        if let Err(error) = stood {
            keeper.end(&error).await;
            return Err(error);
        }
        tracing::info!(group = place.group, stages = place.stages(), incarnation, "the group stands");
        let pulse = Pulse { health: health.clone() };
        Ok(Self { parts: Parts { place, health, peers, outgoing: work, incoming, meter, peer_stats }, keeper, pulse })
    }
}

impl Keeper {
    /// Tells every stage that the group is over, and why; then they end.
    pub async fn end(self, why: &Error) {
        if why.code == Code::WorkerStopped {
            tracing::info!("the group ends: {}", why.message);
        }
        self.health.break_quietly(why);
        let peers_told = tokio::time::sleep(2 * link::FAREWELL);
        peers_told.await;
        self.ended.cancel();
        let _ = self.tasks.join().await;
    }
}

impl Pulse {
    /// Waits until the group is broken.
    pub async fn broken(&self) -> Error {
        self.health.broken().await
    }
}

/// No two lives of a group have the same: the time in milliseconds, and what sets two starts within one
/// apart.
fn incarnation() -> u64 {
    let id = uuid::Uuid::now_v7().as_u128();
    (id >> 64) as u64 ^ (id as u64).rotate_left(17)
}
