//! Which stage of which group a process is: from its flags, or from what LeaderWorkerSet tells a pod.
//!
//! LeaderWorkerSet names the first pod of a group `SET-GROUP` and the others `SET-GROUP-INDEX`, in one
//! subdomain. It tells every pod the first one's address (`SET-GROUP.SUBDOMAIN.NAMESPACE`), the size of
//! the group and the pod's own index, so the other addresses follow.

use std::ops::Range;

use retort_core::{Code, Error, Result};
use retort_worker::peer::{Tls, TlsArgs, check_private, host_and_port};

/// Where a stage listens under LeaderWorkerSet, unless --listen says otherwise.
const PORT: u16 = 7475;
/// Most stages of a group.
const MAX_STAGES: usize = 256;

/// Flags of a process that is one stage of a teacher group.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct GroupArgs {
    /// Name of the teacher group that this process is a stage of; the same for all its stages
    #[arg(long, env = "RETORT_GROUP", value_name = "NAME")]
    pub group: Option<String>,
    /// Which stage this is and of how many, from 0: 0/4 to 3/4 [default: from LeaderWorkerSet]
    #[arg(long, value_name = "I/N")]
    pub stage: Option<String>,
    /// Where this stage listens for the others [default: its entry in --peers; 0.0.0.0:7475 under LeaderWorkerSet]
    #[arg(long, value_name = "HOST:PORT")]
    pub listen: Option<String>,
    /// Where all stages listen, in their order, this one included [default: from LeaderWorkerSet]
    #[arg(long, value_name = "HOST:PORT,...", value_delimiter = ',')]
    pub peers: Vec<String>,
    /// Layers of this stage, first and last: 0-14; for every stage of the group or for none [default: balanced by measured cost]
    #[arg(long, value_name = "FIRST-LAST")]
    pub layers: Option<String>,
    /// Seconds that the other stages may take to appear
    #[arg(long, env = "RETORT_GROUP_PATIENCE", default_value_t = 600, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub group_patience: u64,
    /// Talk to other machines without TLS: whoever reaches the port can read and change the work
    #[arg(long, env = "RETORT_GROUP_PLAINTEXT")]
    pub plaintext: bool,
    #[command(flatten)]
    pub tls: TlsArgs,
}

/// What LeaderWorkerSet tells a pod.
#[derive(Clone, Debug, Default)]
pub struct LeaderWorkerSet {
    /// `LWS_LEADER_ADDRESS`
    pub leader_address: Option<String>,
    /// `LWS_GROUP_SIZE`
    pub group_size: Option<String>,
    /// `LWS_WORKER_INDEX`
    pub worker_index: Option<String>,
}

/// One stage's place in its group.
#[derive(Clone)]
pub struct Place {
    pub(super) group: String,
    pub(super) stage: usize,
    /// `host:port` of every stage.
    pub(super) peers: Vec<String>,
    pub(super) listen: String,
    /// Given with `--layers`.
    pub(super) layers: Option<Range<u32>>,
    pub(super) patience: std::time::Duration,
    pub(super) tls: Option<Tls>,
}

impl LeaderWorkerSet {
    pub fn from_env() -> Self {
        let read = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self {
            leader_address: read("LWS_LEADER_ADDRESS"),
            group_size: read("LWS_GROUP_SIZE"),
            worker_index: read("LWS_WORKER_INDEX"),
        }
    }
}

impl Place {
    /// `None` for a process that is a whole teacher by itself: no group is named, or one of a single
    /// stage.
    pub fn new(args: &GroupArgs, set: &LeaderWorkerSet) -> Result<Option<Self>> {
        let Some(group) = args.group.clone() else {
            let given = [("--stage", args.stage.is_some()), ("--listen", args.listen.is_some())];
            let given =
                given.into_iter().chain([("--peers", !args.peers.is_empty()), ("--layers", args.layers.is_some())]);
            return match given.into_iter().find(|(_, given)| *given) {
                Some((flag, _)) => Err(invalid(format!("{flag} says where in a group, and --group NAME is missing"))),
                None => Ok(None),
            };
        };
        let (stage, stages) = match (&args.stage, &set.worker_index, &set.group_size) {
            (Some(text), _, _) => stage_of(text)?,
            (None, Some(index), Some(size)) => stage_of(&format!("{index}/{size}"))?,
            _ => {
                return Err(invalid(
                    "--group needs --stage I/N, or LWS_WORKER_INDEX and LWS_GROUP_SIZE, which LeaderWorkerSet sets"
                        .into(),
                ));
            }
        };
        if stages == 1 {
            return Ok(None);
        }
        if group.is_empty() {
            return Err(invalid("--group is empty; all stages of a group are told one name".into()));
        }
        let peers = if args.peers.is_empty() { pods(set, stages, args.listen.as_deref())? } else { args.peers.clone() };
        if peers.len() != stages {
            return Err(invalid(format!(
                "--peers names {} addresses for {stages} stages; name every stage's, this one's too",
                peers.len()
            )));
        }
        for peer in &peers {
            if host_and_port(peer)?.1 == 0 {
                return Err(invalid(format!("--peers names {peer}; the others must know the port")));
            }
        }
        if let Some(twice) = peers.iter().enumerate().find(|(at, peer)| peers[..*at].contains(peer)) {
            return Err(invalid(format!("--peers names {} twice; every stage has its own", twice.1)));
        }
        let listen = match &args.listen {
            Some(listen) => listen.clone(),
            None if args.peers.is_empty() => format!("0.0.0.0:{PORT}"),
            None => peers[stage].clone(),
        };
        host_and_port(&listen)?;
        let tls = args.tls.read()?;
        let addresses = std::iter::once(&listen).chain(&peers).map(String::as_str);
        check_private(addresses, tls.as_ref(), args.plaintext)?;
        let layers = args.layers.as_deref().map(layers_of).transpose()?;
        let patience = std::time::Duration::from_secs(args.group_patience);
        Ok(Some(Self { group, stage, peers, listen, layers, patience, tls }))
    }

    /// Of one who asks a stage and is none: `peer` stands at 0.
    pub(super) fn asking(peer: &str, tls: Option<Tls>) -> Result<Self> {
        host_and_port(peer)?;
        Ok(Self {
            group: String::new(),
            stage: 0,
            peers: vec![peer.to_owned()],
            listen: String::new(),
            layers: None,
            patience: std::time::Duration::ZERO,
            tls,
        })
    }

    /// Stage 0 is the worker; the others serve it.
    pub fn is_first(&self) -> bool {
        self.stage == 0
    }

    pub(super) fn stages(&self) -> usize {
        self.peers.len()
    }

    /// The stage that this one sends its work to.
    pub(super) fn next(&self) -> usize {
        (self.stage + 1) % self.stages()
    }

    /// `stage 1 of group "g" at 10.0.0.2:7475`, for errors.
    pub(super) fn name(&self, stage: usize) -> String {
        let address = self.peers.get(stage).map_or("?", String::as_str);
        // Whoever asks for figures knows an address and nothing else.
        if self.group.is_empty() {
            return format!("a stage at {address} (each says in its log where it listens)");
        }
        format!("stage {stage} of group {:?} at {address}", self.group)
    }
}

fn stage_of(text: &str) -> Result<(usize, usize)> {
    let parsed = text.split_once('/').and_then(|(stage, stages)| Some((stage.parse().ok()?, stages.parse().ok()?)));
    match parsed {
        Some((stage, stages)) if stage < stages && stages <= MAX_STAGES => Ok((stage, stages)),
        _ => Err(invalid(format!(
            "stage {text:?} must be I/N, I from 0 to N - 1 and N at most {MAX_STAGES}; the first of four is 0/4"
        ))),
    }
}

fn layers_of(text: &str) -> Result<Range<u32>> {
    let parsed = text.split_once('-').and_then(|(first, last)| Some((first.parse().ok()?, last.parse::<u32>().ok()?)));
    match parsed {
        Some((first, last)) if first <= last && last < 1 << 16 => Ok(first..last + 1),
        _ => Err(invalid(format!("--layers {text:?} must be the first and the last layer: 0-14 is fifteen layers"))),
    }
}

/// Addresses of a group's pods, from the first one's; all listen on the port that this one listens on.
fn pods(set: &LeaderWorkerSet, stages: usize, listen: Option<&str>) -> Result<Vec<String>> {
    let port = listen.map_or(Ok(PORT), |listen| host_and_port(listen).map(|(_, port)| port))?;
    let leader = set.leader_address.as_deref().ok_or_else(|| {
        invalid("--group needs --peers H0:P0,H1:P1,..., or LWS_LEADER_ADDRESS, which LeaderWorkerSet sets".into())
    })?;
    let (pod, domain) = leader.split_once('.').ok_or_else(|| {
        invalid(format!("LWS_LEADER_ADDRESS is {leader:?}; LeaderWorkerSet writes POD.SUBDOMAIN.NAMESPACE"))
    })?;
    let name = |stage: usize| match stage {
        0 => format!("{pod}.{domain}:{port}"),
        _ => format!("{pod}-{stage}.{domain}:{port}"),
    };
    Ok((0..stages).map(name).collect())
}

fn invalid(message: String) -> Error {
    Error::new(Code::RequestInvalid, message)
}

#[cfg(test)]
mod tests;
