//! What a measure of speed tells: how long things take, and how much memory they need meanwhile.

use std::fs;

use candle_core::Device;
use serde::Serialize;

/// Milliseconds of the same thing, done several times.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// A tenth takes no longer than this.
    pub low: f64,
    /// Nine tenths take no longer than this.
    pub high: f64,
    /// The mean.
    pub mean: f64,
}

impl Spread {
    /// Of some durations, at least one, in any order.
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| values[(share * (values.len() - 1) as f64).round() as usize];
        Self {
            median: at(0.5),
            low: at(0.1),
            high: at(0.9),
            mean: values.iter().sum::<f64>() / values.len() as f64,
        }
    }
}

/// Watches memory from a moment on.
pub(crate) struct Watch {
    /// What tensors took up on the GPU at that moment, in bytes.
    #[cfg(feature = "cuda")]
    before: Option<u64>,
    /// Whether the peak of the process is one since then.
    resident: bool,
}

/// The most memory since a moment, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Peak {
    /// Of tensors on the GPU, where there is one.
    pub device: Option<u64>,
    /// The same without what was there at that moment.
    pub grown: Option<u64>,
    /// Of the process, on a CPU.
    pub resident: Option<u64>,
}

impl Watch {
    pub(crate) fn start(device: &Device) -> anyhow::Result<Self> {
        #[cfg(feature = "cuda")]
        fulgur_kernels::device::forget_peak(device)?;
        // The kernel lets a process begin its peak anew.
        let resident = device.is_cpu() && fs::write("/proc/self/clear_refs", "5").is_ok();
        Ok(Self {
            #[cfg(feature = "cuda")]
            before: fulgur_kernels::device::memory(device)?.map(|memory| memory.used),
            resident,
        })
    }

    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "there are no GPUs"))]
    pub(crate) fn peak(&self, device: &Device) -> anyhow::Result<Peak> {
        #[cfg(feature = "cuda")]
        let on_device = fulgur_kernels::device::memory(device)?.map(|memory| memory.peak);
        #[cfg(feature = "cuda")]
        let grown = on_device
            .zip(self.before)
            .map(|(peak, before)| peak.saturating_sub(before));
        #[cfg(not(feature = "cuda"))]
        let (on_device, grown) = (None, None);
        let status = match self.resident {
            true => fs::read_to_string("/proc/self/status").unwrap_or_default(),
            false => String::new(),
        };
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        Ok(Peak {
            device: on_device,
            grown,
            resident: kilobytes.map(|kilobytes| 1024 * kilobytes),
        })
    }
}
