//! What a GPU says about targets, when asked.

use super::{OP, out_of_range};
use crate::error::OpError;
use candle_core::{Device, Result, Tensor};

/// Remembers, on its device, the first target that was out of range, over any number of calls.
///
/// A kernel that meets one leaves its position and id here, and training goes on without waiting; [`Self::check`] waits.
/// Ask where the loss is read anyway, or once it is NaN. Targets on the CPU need no watch.
///
/// ```
/// # use candle_core::{DType, Device, Result, Tensor};
/// use fulgur_kernels::cross_entropy::{Options, TargetWatch, head};
/// # fn main() -> Result<()> {
/// # let device = Device::Cpu;
/// # let x = Tensor::ones((2, 3), DType::F32, &device)?;
/// # let weight = Tensor::ones((5, 3), DType::F32, &device)?;
/// # let targets = Tensor::new(&[0u32, 4], &device)?;
/// let watch = TargetWatch::new(5, &device)?;
/// let options = Options { watch: Some(&watch), ..Default::default() };
/// let loss = head(&x, &weight, &targets, &options)?.to_scalar::<f32>()?;
/// watch.check()?;
/// assert!((loss - 5f32.ln()).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct TargetWatch {
    vocabulary: usize,
    /// 2^32 position + id, least of all calls.
    first: Tensor,
}

impl TargetWatch {
    /// Watches targets of a vocabulary of `vocabulary` ids on `device`.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn new(vocabulary: usize, device: &Device) -> Result<Self> {
        Ok(Self {
            vocabulary,
            first: Tensor::new(i64::MAX, device)?,
        })
    }

    /// Waits for the device, and for what was launched on it.
    ///
    /// # Errors
    /// If a target was out of range since the watch exists: with its position in its batch, the id, and the size of the
    /// vocabulary; of several, the one of the lowest position.
    pub fn check(&self) -> Result<()> {
        match self.first.to_scalar::<i64>()? {
            i64::MAX => Ok(()),
            first => Err(out_of_range(
                (first >> 32) as usize,
                first as u32,
                self.vocabulary,
            )),
        }
    }

    /// Errors unless it watches such a call.
    pub(super) fn fits(&self, vocabulary: usize, device: &Device) -> Result<()> {
        if self.vocabulary != vocabulary {
            let expected = format!("{vocabulary} like the weight");
            return Err(OpError::value(OP, "vocabulary of the watch", self.vocabulary, expected).into());
        }
        if !self.first.device().same_device(device) {
            let (found, expected) = (self.first.device().location(), device.location());
            let (found, expected) = (format!("{found:?}"), format!("{expected:?} like x"));
            return Err(OpError::value(OP, "device of the watch", found, expected).into());
        }
        Ok(())
    }

    /// Where the kernel writes.
    #[cfg(feature = "cuda")]
    pub(super) fn address(&self) -> Result<u64> {
        crate::gpu::Locked::new(OP, &self.first).start()
    }
}
