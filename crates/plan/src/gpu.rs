//! What a GPU can do at most, as its maker states it.

use retort_core::{Code, Error, Result};
use serde::Serialize;

/// One accelerator and its links. Rates are a second; a link's is what one GPU sends, one way.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gpu {
    pub name: String,
    pub memory_bytes: u64,
    /// Dense bf16 products with fp32 sums, operations.
    pub bf16_flops: f64,
    /// Dense fp8 products, operations; none where the hardware has none.
    pub fp8_flops: Option<f64>,
    /// Bytes read from its own memory.
    pub memory_bandwidth: f64,
    /// Bytes to another GPU of the node.
    pub node_link: f64,
    /// Bytes to another node.
    pub network: f64,
}

const GIB: f64 = (1_u64 << 30) as f64;
const TERA: f64 = 1e12;
const GIGA: f64 = 1e9;

/// Name, GiB, bf16 and fp8 TFLOP/s, memory GB/s, GB/s to the node, GB/s to the network.
///
/// From NVIDIA's data sheets of each product: dense rates (half of the headline where that one is for
/// sparse matrices), half of the two-way NVLink or PCIe rate. Memory is what the driver shows. The
/// network is that of the vendor's own 8-GPU systems, one adapter a GPU: 200 Gbit/s in DGX A100,
/// 400 Gbit/s in DGX H100, H200 and B200; 200 Gbit/s shared by 8 is assumed for the PCIe cards.
const KNOWN: [(&str, [f64; 6]); 8] = [
    ("a100-40g", [39.5, 312.0, 0.0, 1_555.0, 300.0, 25.0]),
    ("a100-80g", [80.0, 312.0, 0.0, 2_039.0, 300.0, 25.0]),
    ("h100-sxm", [80.0, 989.4, 1_978.9, 3_350.0, 450.0, 50.0]),
    ("h100-pcie", [80.0, 756.0, 1_513.0, 2_039.0, 64.0, 3.125]),
    ("h200", [140.4, 989.4, 1_978.9, 4_800.0, 450.0, 50.0]),
    ("b200", [179.0, 2_250.0, 4_500.0, 8_000.0, 900.0, 50.0]),
    ("l40s", [45.0, 362.0, 733.0, 864.0, 32.0, 3.125]),
    ("l4", [22.5, 121.0, 242.0, 300.0, 32.0, 3.125]),
];

impl Gpu {
    /// The one of this name: `h100-sxm`.
    pub fn find(name: &str) -> Result<Self> {
        let wanted = name.to_lowercase();
        let Some((name, [gib, bf16, fp8, memory, link, network])) = KNOWN.into_iter().find(|(name, _)| *name == wanted)
        else {
            let shown: String = name.chars().take(80).collect();
            return Err(Error::new(
                Code::SpecInvalid,
                format!(
                    "--gpu {shown:?} is not known; take one of {}, or give its figures with --gpu-memory, --tflops, \
                     --memory-bandwidth and --link-bandwidth",
                    Self::names().join(", ")
                ),
            ));
        };
        Ok(Self {
            name: name.to_owned(),
            memory_bytes: (gib * GIB) as u64,
            bf16_flops: bf16 * TERA,
            fp8_flops: (fp8 > 0.0).then_some(fp8 * TERA),
            memory_bandwidth: memory * GIGA,
            node_link: link * GIGA,
            network: network * GIGA,
        })
    }

    pub fn names() -> Vec<&'static str> {
        KNOWN.iter().map(|(name, _)| *name).collect()
    }
}
