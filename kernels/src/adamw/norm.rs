//! The norm of all gradients together, and what follows from it for a step.

use super::{F32_BF16, GradientScale, check_operand, cpu, different_devices};
use crate::error::OpError;
use candle_core::op::BackpropOp;
use candle_core::{Device, Result, Shape, Storage, Tensor};
use std::sync::atomic::{AtomicU32, Ordering};

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

/// Measures gradients before each step, and counts the steps that their norm forbids.
///
/// A norm is not finite if a gradient is not, or if the sum of squares leaves f32, from norms of 1.8e19 on. The scale of
/// such gradients is NaN, so that [`super::AdamW::step_all`] changes nothing, and a counter on the device is raised.
#[derive(Debug)]
pub struct Clipper {
    max_norm: Option<f32>,
    device: Device,
    skipped: Skipped,
}

#[derive(Debug)]
enum Skipped {
    Host(AtomicU32),
    #[cfg(feature = "cuda")]
    Device(crate::cuda_module::Slice<u32>),
}

/// The norm of all gradients of a step, and the scale that follows from it: both on the device.
#[derive(Clone, Debug)]
pub struct Clip {
    norm: Tensor,
    scale: Tensor,
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
        let skipped = match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Skipped::Device(device.alloc_zeros::<u32>(1)?),
            _ => Skipped::Host(AtomicU32::new(0)),
        };
        Ok(Self {
            max_norm: max_norm.map(|max_norm| max_norm as f32),
            device: device.clone(),
            skipped,
        })
    }

    /// Norm and scale of all gradients of a step, f32 or bf16; nothing waits for the device.
    ///
    /// # Errors
    /// If there is no gradient, one is empty or of another type, or devices differ.
    pub fn measure(&self, gradients: &[&Tensor]) -> Result<Clip> {
        const OP: &str = "clipper";
        let dense = checked(OP, gradients)?;
        if !dense[0].device().same_device(&self.device) {
            return Err(different_devices(OP));
        }
        match &self.skipped {
            #[cfg(feature = "cuda")]
            Skipped::Device(skipped) => {
                let (norm, scale) = super::cuda::clip(&dense, self.max_norm, skipped)?;
                Ok(Clip { norm, scale })
            }
            Skipped::Host(skipped) => {
                let norm = squared_norm(&dense.iter().collect::<Vec<_>>())?.sqrt()?;
                let scale = match norm.to_vec1::<f32>()?[0] {
                    norm if !norm.is_finite() => {
                        skipped.fetch_add(1, Ordering::Relaxed);
                        f32::NAN
                    }
                    norm => self
                        .max_norm
                        .map_or(1.0, |max_norm| norm.max(max_norm).recip() * max_norm),
                };
                let scale = Tensor::new(&[scale], &self.device)?;
                Ok(Clip { norm, scale })
            }
        }
    }

    /// How many norms were not finite so far; waits for the device.
    ///
    /// # Errors
    /// If the device fails.
    pub fn skipped(&self) -> Result<u32> {
        match &self.skipped {
            Skipped::Host(skipped) => Ok(skipped.load(Ordering::Relaxed)),
            #[cfg(feature = "cuda")]
            Skipped::Device(skipped) => Ok(self.device.as_cuda_device()?.clone_dtoh(skipped)?[0]),
        }
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
