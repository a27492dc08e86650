use clap::Args;
use retort_process::LogArgs;

/// Flags of every worker.
#[derive(Clone, Debug, Args)]
pub struct WorkerArgs {
    /// Where the orchestrator listens
    #[arg(long, env = "RETORT_ORCHESTRATOR", default_value = "http://127.0.0.1:7474", value_name = "URL")]
    pub orchestrator: String,
    /// Kafka brokers, comma separated
    #[arg(long, env = "RETORT_BROKERS", default_value = "127.0.0.1:9092", value_name = "HOST:PORT")]
    pub brokers: String,
    /// The object store: a folder or a URL; the orchestrator makes it
    #[arg(long, env = "RETORT_STORE", value_name = "URL_OR_PATH")]
    pub store: String,
    /// Pool whose tasks this worker takes
    #[arg(long, env = "RETORT_POOL", default_value = "default")]
    pub pool: String,
    /// auto, cpu or cuda:N; a teacher takes several, with commas between
    #[arg(long, env = "RETORT_DEVICE", default_value = "auto")]
    pub device: String,
    /// auto, f32 or bf16; auto is bf16 only where the device multiplies it fast
    #[arg(long, env = "RETORT_DTYPE", default_value = "auto")]
    pub dtype: String,
    /// Stop when the process that started this one dies
    #[arg(long)]
    pub die_with_parent: bool,
    #[command(flatten)]
    pub log: LogArgs,
}
