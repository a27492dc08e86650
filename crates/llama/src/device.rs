//! Which device and which number format a process computes in, from its flags.

use tch::{Cuda, Device, Kind};

use crate::{Error, Result};

/// Reads `auto` (the first GPU if there is one), `cpu` or `cuda:N`.
pub fn device_from_flag(flag: &str) -> Result<Device> {
    match flag {
        "auto" if Cuda::is_available() => Ok(Device::Cuda(0)),
        "auto" | "cpu" => Ok(Device::Cpu),
        _ => {
            let index = flag.strip_prefix("cuda:").and_then(|index| index.parse::<usize>().ok());
            let Some(index) = index else {
                return Err(Error::Device(format!("{flag:?} is no device: say auto, cpu or cuda:0")));
            };
            let count = Cuda::device_count().max(0) as usize;
            if index < count {
                Ok(Device::Cuda(index))
            } else if count == 0 {
                Err(Error::Device(format!("{flag} is not there: libtorch finds no GPU; say cpu or auto")))
            } else {
                Err(Error::Device(format!("{flag} is not there: the last GPU is cuda:{}", count - 1)))
            }
        }
    }
}

/// Reads `auto`, `f32` or `bf16`. `auto` is bf16 where the hardware multiplies it (GPUs, and CPUs
/// with AVX512-BF16); elsewhere bf16 products are several times slower than f32 ones.
pub fn dtype_from_flag(flag: &str, device: Device) -> Result<Kind> {
    match flag {
        "auto" if multiplies_bf16(device) => Ok(Kind::BFloat16),
        "auto" | "f32" => Ok(Kind::Float),
        "bf16" => Ok(Kind::BFloat16),
        _ => Err(Error::Device(format!("{flag:?} is no dtype: say auto, f32 or bf16"))),
    }
}

fn multiplies_bf16(device: Device) -> bool {
    match device {
        Device::Cuda(_) => true,
        // Every CPU with AMX-BF16 has AVX512-BF16 too.
        #[cfg(target_arch = "x86_64")]
        Device::Cpu => std::arch::is_x86_feature_detected!("avx512bf16"),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_name_devices() {
        assert_eq!(device_from_flag("cpu").unwrap(), Device::Cpu);
        for flag in ["gpu", "cuda", "cuda:x", "", "cuda:-1"] {
            let error = device_from_flag(flag).unwrap_err().to_string();
            assert!(error.contains("say auto, cpu or cuda:0"), "{error}");
        }
        assert!(device_from_flag("cuda:4095").is_err());
    }

    #[test]
    fn flags_name_dtypes() {
        assert_eq!(dtype_from_flag("f32", Device::Cpu).unwrap(), Kind::Float);
        assert_eq!(dtype_from_flag("bf16", Device::Cpu).unwrap(), Kind::BFloat16);
        assert_eq!(dtype_from_flag("auto", Device::Cuda(0)).unwrap(), Kind::BFloat16);
        assert!(dtype_from_flag("fp16", Device::Cpu).is_err());
    }
}
