//! Compiles `proto/retort/v1` with protox, so that no protoc is needed on the machine.

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["job", "model", "worker", "bus", "stage", "train"].map(|name| format!("proto/retort/v1/{name}.proto"));
    let descriptors = protox::compile(&files, ["proto"])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("retort.v1.bin"), descriptors.encode_to_vec())?;
    let with_chunks = [".retort.v1.PassRequest", ".retort.v1.FollowRequest", ".retort.v1.FollowResponse"];
    let config = with_chunks.into_iter().fold(tonic_prost_build::configure(), |config, message| config.bytes(message));
    config.compile_fds(descriptors)?;
    println!("cargo:rerun-if-changed=proto");
    Ok(())
}
