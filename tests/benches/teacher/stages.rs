//! A teacher group of several processes on this machine, which share its cores: whoever asks for it is its
//! first stage, and starts the others.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
};

use retort_core::{Code, Error};
use retort_teacher::{
    engine::native::Loaded,
    group::{self, Formed, Group, GroupArgs, Keeper, Layers, LeaderWorkerSet, Place},
    stage::Arithmetic,
};
use tch::Device;
use tokio_util::sync::CancellationToken;

use crate::Failure;

/// Seconds that the other stages may take to appear.
const PATIENCE: u64 = 60;

#[derive(clap::Args)]
pub struct Options {
    /// Which stage of how many: 1/2
    stage: String,
    /// Where all stages listen, with commas between
    peers: String,
    /// f32 or bf16
    dtype: String,
    threads: usize,
}

/// A group that stands.
pub struct Stages {
    pub models: Loaded,
    pub group: Kept,
}

/// What keeps a group alive, for as long as it is.
pub struct Kept {
    keeper: Option<Keeper>,
    /// Its tasks carry the heartbeats.
    runtime: tokio::runtime::Runtime,
    others: Vec<Child>,
}

impl Drop for Kept {
    /// Ends the group, and waits for its processes: the time they took is then this one's children's, and the
    /// bench does not take it for somebody else's.
    fn drop(&mut self) {
        if let Some(keeper) = self.keeper.take() {
            self.runtime.block_on(keeper.end(&Error::new(Code::WorkerStopped, "the bench is over")));
        }
        for other in &mut self.others {
            let _ = other.wait();
        }
    }
}

impl Stages {
    /// Each stage has its share of `threads`, at least one.
    pub fn start(stages: usize, dtype: &str, threads: usize) -> Result<Self, Failure> {
        let threads = (threads / stages).max(1);
        let listeners: Vec<_> = (0..stages).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
        let addresses = listeners.iter().map(|listener| Ok(listener.local_addr()?.to_string()));
        let peers = addresses.collect::<Result<Vec<_>, std::io::Error>>()?.join(",");
        drop(listeners);
        let program = std::env::current_exe()?;
        let mut others = Vec::new();
        for stage in 1..stages {
            // They end when the group does, and the group ends with this process.
            let mut command = Command::new(&program);
            command
                .args(["stage", &format!("{stage}/{stages}"), &peers, dtype, &threads.to_string()])
                .stdin(Stdio::null())
                .stdout(Stdio::null());
            others.push(command.spawn()?);
        }
        let arithmetic = arithmetic(dtype, threads)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let place = place(&format!("0/{stages}"), &peers)?;
        let formed = runtime.block_on(Formed::new(place, &numbers(&arithmetic), &CancellationToken::new()))?;
        let group = Group::new(formed.parts, Box::new(Layers::new(arithmetic.clone())));
        let kept = Kept { keeper: Some(formed.keeper), runtime, others };
        Ok(Self { models: Loaded::in_group(group, arithmetic), group: kept })
    }
}

/// Serves as a stage until the group ends.
pub fn serve(options: &Options) -> Result<(), Failure> {
    let arithmetic = arithmetic(&options.dtype, options.threads)?;
    let numbers = numbers(&arithmetic);
    let make = move || Box::new(Layers::new(arithmetic)) as Box<dyn group::Computer>;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let place = place(&options.stage, &options.peers)?;
    Ok(runtime.block_on(group::serve(place, &numbers, make, &CancellationToken::new()))?)
}

fn arithmetic(dtype: &str, threads: usize) -> Result<Arithmetic, Failure> {
    tch::set_num_threads(i32::try_from(threads)?);
    Ok(Arithmetic::on(Device::Cpu, retort_llama::dtype_from_flag(dtype, Device::Cpu)?, Some(threads)))
}

fn numbers(arithmetic: &Arithmetic) -> String {
    format!("{} {}", arithmetic.engine(), arithmetic.dtype())
}

fn place(stage: &str, peers: &str) -> Result<Place, Failure> {
    let args = GroupArgs {
        group: Some("bench".to_owned()),
        stage: Some(stage.to_owned()),
        peers: peers.split(',').map(str::to_owned).collect(),
        group_patience: PATIENCE,
        ..GroupArgs::default()
    };
    Ok(Place::new(&args, &LeaderWorkerSet::default())?.ok_or("one stage is no group")?)
}
