//! What is summed up between two log lines: on the device, so that a step waits for nothing.

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::{Device, Result, Tensor};
use fulgur_kernels::adamw::Clip;

/// Where sums are kept among the tensors of a checkpoint.
const PREFIX: &str = "window.";

/// Sums since the last log line.
pub(super) struct Window {
    /// By name, over the steps that were not skipped.
    sums: BTreeMap<String, Tensor>,
    /// Norm of the gradients of the last step.
    norm: Option<Tensor>,
    /// Learning rate of the last step.
    pub(super) lr: f64,
    /// Updates of the run before the first step of the window.
    pub(super) first_update: u64,
    pub(super) since: Instant,
    pub(super) samples: u64,
}

/// A finished window.
pub(super) struct Means {
    /// Means by name; none where every step was skipped.
    pub(super) values: Vec<(String, f64)>,
    /// Norm of the gradients of the last step.
    pub(super) norm: f64,
}

impl Window {
    pub(super) fn new() -> Self {
        Self {
            sums: BTreeMap::new(),
            norm: None,
            lr: 0.0,
            first_update: 0,
            since: Instant::now(),
            samples: 0,
        }
    }

    /// Adds the scalars of the step of `clip`, nothing where that was skipped; they may be anything then.
    pub(super) fn add(&mut self, scalars: Vec<(String, Tensor)>, clip: &Clip) -> Result<()> {
        let taken = clip.taken()?.reshape(())?;
        for (name, value) in scalars {
            let (before, after) = match self.sums.get(&name) {
                Some(sum) => (sum.clone(), (sum + value)?),
                None => (value.zeros_like()?, value),
            };
            self.sums.insert(name, taken.where_cond(&after, &before)?);
        }
        self.norm = Some(clip.norm().clone());
        Ok(())
    }

    /// The means over `steps` steps; the sums begin anew.
    pub(super) fn finish(&mut self, steps: u64) -> Result<Means> {
        let mut values = Vec::new();
        for (name, sum) in std::mem::take(&mut self.sums) {
            if steps > 0 {
                values.push((name, f64::from(sum.to_scalar::<f32>()?) / steps as f64));
            }
        }
        let norm = match &self.norm {
            Some(norm) => f64::from(norm.to_vec1::<f32>()?[0]),
            None => 0.0,
        };
        Ok(Means { values, norm })
    }

    /// The sums as tensors of a checkpoint.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (String, Tensor)> {
        self.sums
            .iter()
            .map(|(name, sum)| (format!("{PREFIX}{name}"), sum.clone()))
    }

    /// Takes up those sums that are among the tensors of a checkpoint.
    pub(super) fn restore(&mut self, tensors: &BTreeMap<String, Tensor>, device: &Device) -> Result<()> {
        for (name, sum) in tensors {
            if let Some(name) = name.strip_prefix(PREFIX) {
                self.sums.insert(name.to_string(), sum.to_device(device)?);
            }
        }
        Ok(())
    }
}
