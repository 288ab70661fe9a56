//! Devices by name: `auto`, `cpu`, `cuda`, `cuda:N`.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device};

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The name is none of the known ones.
    #[error("unknown device `{found}`, expected auto, cpu, cuda or cuda:N")]
    Name {
        /// The name as given.
        found: String,
    },
    /// A GPU was asked for and the program was built without the `cuda` feature.
    #[error(
        "device {wanted}: this program was built without cuda; build with `--features cuda` or use --device cpu"
    )]
    NotBuilt {
        /// The device that was asked for.
        wanted: DeviceChoice,
    },
    /// A GPU was asked for and the driver gives none.
    #[error("device {wanted}: no usable GPU ({reason}); use --device cpu")]
    NoGpu {
        /// The device that was asked for.
        wanted: DeviceChoice,
        /// The driver's words.
        reason: String,
    },
}

/// A device as a user names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The first GPU where there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

/// Type of the products of a network on `device`: bf16 where the hardware makes it fast.
#[must_use]
pub fn compute_dtype(device: &Device) -> DType {
    if device.is_cuda() { DType::BF16 } else { DType::F32 }
}

/// What a device calls itself: the model of a GPU, else `CPU`.
#[must_use]
pub fn device_name(device: &Device) -> String {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = device
        && let Ok(name) = cuda.cuda_stream().context().name()
    {
        return name;
    }
    match device.is_cpu() {
        true => "CPU".to_owned(),
        false => "GPU".to_owned(),
    }
}

/// A device ready for use.
#[derive(Debug, Clone)]
pub struct Opened {
    /// The device.
    pub device: Device,
    /// One line for the user where `auto` fell back to the CPU although the program was built for GPUs.
    pub note: Option<String>,
}

impl DeviceChoice {
    /// Opens the device.
    ///
    /// # Errors
    /// A GPU that was asked for by name and is not there; `auto` and `cpu` never fail.
    pub fn open(self) -> Result<Opened, DeviceError> {
        let cpu = |note| Opened {
            device: Device::Cpu,
            note,
        };
        match self {
            Self::Cpu => Ok(cpu(None)),
            Self::Cuda(index) => Ok(Opened {
                device: self.open_cuda(index)?,
                note: None,
            }),
            Self::Auto if !cfg!(feature = "cuda") => Ok(cpu(None)),
            Self::Auto => Ok(match self.open_cuda(0) {
                Ok(device) => Opened { device, note: None },
                Err(error) => cpu(Some(format!("running on the CPU: {error}"))),
            }),
        }
    }

    #[cfg(feature = "cuda")]
    fn open_cuda(self, index: usize) -> Result<Device, DeviceError> {
        fulgur_kernels::device::open_cuda(index).map_err(|error| {
            let words = error.to_string();
            let reason = words.lines().next().unwrap_or_default().to_owned();
            DeviceError::NoGpu { wanted: self, reason }
        })
    }

    #[cfg(not(feature = "cuda"))]
    fn open_cuda(self, _: usize) -> Result<Device, DeviceError> {
        Err(DeviceError::NotBuilt { wanted: self })
    }
}

impl FromStr for DeviceChoice {
    type Err = DeviceError;

    fn from_str(name: &str) -> Result<Self, DeviceError> {
        let unknown = || DeviceError::Name {
            found: name.to_owned(),
        };
        match name {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => {
                let digits = name.strip_prefix("cuda:").ok_or_else(unknown)?;
                if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
                    return Err(unknown());
                }
                digits.parse().map(Self::Cuda).map_err(|_| unknown())
            }
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for (name, choice, shown) in [
            ("auto", DeviceChoice::Auto, "auto"),
            ("cpu", DeviceChoice::Cpu, "cpu"),
            ("cuda", DeviceChoice::Cuda(0), "cuda:0"),
            ("cuda:3", DeviceChoice::Cuda(3), "cuda:3"),
        ] {
            let read: DeviceChoice = name.parse().unwrap();
            assert_eq!(read, choice);
            assert_eq!(read.to_string(), shown);
        }
        for name in [
            "",
            "gpu",
            "CPU",
            "cuda:",
            "cuda:+1",
            "cuda:-1",
            "cuda:x",
            "cuda:99999999999999999999999",
        ] {
            let error = name.parse::<DeviceChoice>().unwrap_err().to_string();
            assert!(
                error.contains(&format!("`{name}`")) && error.contains("cuda:N"),
                "{error}"
            );
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn without_cuda_a_gpu_is_refused_and_auto_is_the_cpu() {
        let error = DeviceChoice::Cuda(1).open().unwrap_err().to_string();
        assert!(
            error.starts_with("device cuda:1: ") && error.contains("without cuda"),
            "{error}"
        );
        assert!(DeviceChoice::Auto.open().unwrap().device.is_cpu());
    }
}
