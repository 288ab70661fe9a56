//! The norm of all gradients together, and what follows from it for a step.

use super::{F32_BF16, GradientScale, check_operand, cpu, different_devices};
use crate::error::OpError;
use candle_core::op::BackpropOp;
use candle_core::{Device, Result, Shape, Storage, Tensor};

/// Sum of the squares of all elements of all tensors: [1], `f32`, on their device. The order of the sum is fixed.
///
/// # Errors
/// If there is no tensor, one is empty or neither f32 nor bf16, or devices differ.
pub fn squared_norm(gradients: &[&Tensor]) -> Result<Tensor> {
    let dense = checked("squared_norm", gradients)?;
    #[cfg(feature = "cuda")]
    if dense[0].device().is_cuda() {
        return super::cuda::squared_norm(&dense);
    }
    let locked: Vec<_> = dense.iter().map(Tensor::storage_and_layout).collect();
    Ok(Tensor::from_storage(
        Storage::Cpu(cpu::squared_norm(&locked)?),
        Shape::from(1),
        BackpropOp::none(),
        false,
    ))
}

/// `min(1, max_norm / sqrt(squared_norm))`: the scale that keeps the global norm of gradients at `max_norm` or less.
///
/// # Errors
/// If `max_norm` is not positive.
pub fn clip_scale(squared_norm: &Tensor, max_norm: f64) -> Result<Tensor> {
    check_max_norm("clip_scale", max_norm)?;
    // Raising the norm to max_norm first makes the quotient at most one and keeps zero out of the division.
    (squared_norm.sqrt()?.maximum(max_norm)?.recip()? * max_norm)?
        .detach()
        .contiguous()
}

/// What became of the steps so far.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counts {
    /// Steps with a finite norm.
    pub made: u32,
    /// Steps without.
    pub skipped: u32,
    /// Of those, how many in a row at the end.
    pub in_a_row: u32,
    /// The most in a row since counting began.
    pub longest_row: u32,
}

impl Counts {
    fn of([made, skipped, in_a_row, longest_row]: [u32; 4]) -> Self {
        Self {
            made,
            skipped,
            in_a_row,
            longest_row,
        }
    }

    fn numbers(self) -> [u32; 4] {
        [self.made, self.skipped, self.in_a_row, self.longest_row]
    }

    /// After another step.
    fn after(self, finite: bool) -> Self {
        if finite {
            return Self {
                made: self.made + 1,
                in_a_row: 0,
                ..self
            };
        }
        let in_a_row = self.in_a_row + 1;
        Self {
            skipped: self.skipped + 1,
            in_a_row,
            longest_row: self.longest_row.max(in_a_row),
            ..self
        }
    }

    fn read(counts: &Tensor) -> Result<Self> {
        match counts.to_vec1::<u32>()?[..] {
            [made, skipped, in_a_row, longest_row] => Ok(Self::of([made, skipped, in_a_row, longest_row])),
            ref other => candle_core::bail!("clipper: {} counts, expected 4", other.len()),
        }
    }
}

/// Measures gradients before each step, and counts the steps that their norm allows and forbids.
///
/// A norm is not finite if a gradient is not, or if the sum of squares leaves f32, from norms of 1.8e19 on. The scale of
/// such gradients is NaN, so that [`super::AdamW::step_clipped`] changes nothing. Counts lie on the device: nobody waits
/// for it before they are asked for.
#[derive(Debug)]
pub struct Clipper {
    max_norm: Option<f32>,
    device: Device,
    /// [4], u32: the numbers of [`Counts`].
    counts: Tensor,
}

/// The norm of all gradients of a step, and what follows from it, on the device.
#[derive(Clone, Debug)]
pub struct Clip {
    norm: Tensor,
    scale: Tensor,
    counts: Tensor,
}

impl Clip {
    /// The global norm before clipping: [1], f32.
    pub fn norm(&self) -> &Tensor {
        &self.norm
    }

    /// `min(1, max_norm / norm)`, 1 without a limit, NaN if the norm is not finite.
    pub fn scale(&self) -> GradientScale<'_> {
        GradientScale::Device(&self.scale)
    }

    /// [`Self::scale`] as a tensor: [1], f32.
    pub fn factor(&self) -> &Tensor {
        &self.scale
    }

    /// Whether the norm is finite: [1], u8, 1 or 0.
    ///
    /// # Errors
    /// If the device fails.
    pub fn taken(&self) -> Result<Tensor> {
        // Of all numbers only NaN differs from itself.
        self.scale.eq(&self.scale)
    }

    /// The counts after this step: [4], u32, in the order of [`Counts`].
    pub(crate) fn counts(&self) -> &Tensor {
        &self.counts
    }

    /// How many steps were made, this one included; waits for the device.
    pub(crate) fn made(&self) -> Result<u32> {
        Ok(Counts::read(self.counts())?.made)
    }
}

impl Clipper {
    /// Limits the global norm to `max_norm`, if that is given, for gradients on `device`.
    ///
    /// # Errors
    /// If `max_norm` is not positive, or the device has no memory left.
    pub fn new(max_norm: Option<f64>, device: &Device) -> Result<Self> {
        if let Some(max_norm) = max_norm {
            check_max_norm("clipper", max_norm)?;
        }
        Ok(Self {
            max_norm: max_norm.map(|max_norm| max_norm as f32),
            device: device.clone(),
            counts: Tensor::new(&Counts::default().numbers(), device)?,
        })
    }

    /// Norm, scale and counts of a step with these gradients, f32 or bf16; nothing waits for the device.
    ///
    /// # Errors
    /// If there is no gradient, one is empty or of another type, or devices differ.
    pub fn measure(&mut self, gradients: &[&Tensor]) -> Result<Clip> {
        const OP: &str = "clipper";
        let dense = checked(OP, gradients)?;
        if !dense[0].device().same_device(&self.device) {
            return Err(different_devices(OP));
        }
        let clip = self.clip(&dense)?;
        self.counts = clip.counts.clone();
        Ok(clip)
    }

    fn clip(&self, dense: &[Tensor]) -> Result<Clip> {
        #[cfg(feature = "cuda")]
        if self.device.is_cuda() {
            let [norm, scale, counts] = super::cuda::clip(dense, self.max_norm, &self.counts)?;
            return Ok(Clip { norm, scale, counts });
        }
        let norm = squared_norm(&dense.iter().collect::<Vec<_>>())?.sqrt()?;
        let length = norm.to_vec1::<f32>()?[0];
        let scale = match self.max_norm {
            _ if !length.is_finite() => f32::NAN,
            Some(max_norm) => length.max(max_norm).recip() * max_norm,
            None => 1.0,
        };
        let counts = Counts::read(&self.counts)?.after(length.is_finite());
        Ok(Clip {
            norm,
            scale: Tensor::new(&[scale], &self.device)?,
            counts: Tensor::new(&counts.numbers(), &self.device)?,
        })
    }

    /// What became of the steps so far; waits for the device.
    ///
    /// # Errors
    /// If the device fails.
    pub fn counts(&self) -> Result<Counts> {
        Counts::read(&self.counts)
    }

    /// Goes on from `counts`, those of a saved run.
    ///
    /// # Errors
    /// If the device fails.
    pub fn restore(&mut self, counts: Counts) -> Result<()> {
        self.counts = Tensor::new(&counts.numbers(), &self.device)?;
        Ok(())
    }
}

fn check_max_norm(op: &'static str, max_norm: f64) -> Result<()> {
    if max_norm.is_nan() || max_norm <= 0.0 {
        return Err(OpError::value(op, "max_norm", max_norm, "a positive number").into());
    }
    Ok(())
}

/// Contiguous gradients, after a look at them.
fn checked(op: &'static str, gradients: &[&Tensor]) -> Result<Vec<Tensor>> {
    let Some(first) = gradients.first() else {
        return Err(OpError::value(op, "number of tensors", 0, "at least 1").into());
    };
    gradients
        .iter()
        .map(|gradient| {
            check_operand(op, "gradient", gradient, F32_BF16, first)?;
            gradient.contiguous()
        })
        .collect()
}
