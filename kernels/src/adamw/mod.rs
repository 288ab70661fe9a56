//! AdamW (Loshchilov and Hutter, 2019) as in-place steps on all parameters of a group, and clipping by the global norm.
//!
//! ```text
//! g = scale gradient
//! m = b1 m + (1 - b1) g                  v = b2 v + (1 - b2) g^2
//! p = p (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
//! ```
//!
//! Parameters are f32 masters, of which a step may leave a bf16 copy to compute with. Gradients are f32 or bf16. The
//! moments of a parameter are one tensor [2, ..] that the caller owns, saves and restores: the step has no other memory.
//! In f32, or in bf16, rounded to nearest: a change of less than 1/512 of a moment is then lost, so that the second one
//! stands still with b2 above 0.99 or so.
//!
//! `t` counts the steps that were made. A step whose gradients have no finite norm is none: [`Clipper`] counts both kinds on
//! the device, and [`AdamW::step_clipped`] takes `t` from there.
//!
//! On a GPU a step is one launch for all tensors, and the global norm two; nothing waits for the GPU:
//!
//! ```
//! use candle_core::{DType, Device, Tensor, Var};
//! use fulgur_kernels::adamw::{AdamW, Clipper, Slot, zero_moments};
//! # fn main() -> candle_core::Result<()> {
//! let device = Device::Cpu;
//! let (weight, bias) = (Var::ones((2, 2), DType::F32, &device)?, Var::ones(2, DType::F32, &device)?);
//! let moments = [zero_moments(&weight)?, zero_moments(&bias)?];
//! let mut clipper = Clipper::new(Some(1.0), &device)?;
//! for _ in 0..3 {
//!     let loss = (weight.sqr()?.sum_all()? + bias.sqr()?.sum_all()?)?;
//!     let gradients = loss.backward()?;
//!     let (dweight, dbias) = (gradients.get(&weight).unwrap(), gradients.get(&bias).unwrap());
//!     let clip = clipper.measure(&[dweight, dbias])?;
//!     let group = |decay: f64| AdamW { weight_decay: decay, ..AdamW::default() };
//!     group(0.1).step_clipped(&[Slot::new(&weight, &moments[0], dweight)], &clip)?;
//!     group(0.0).step_clipped(&[Slot::new(&bias, &moments[1], dbias)], &clip)?;
//! }
//! assert!(bias.to_vec1::<f32>()?[0] < 0.9971);
//! assert_eq!((clipper.counts()?.made, clipper.counts()?.skipped), (3, 0));
//! # Ok(())
//! # }
//! ```

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod norm;
#[cfg(test)]
mod tests;

use crate::error::OpError;
use candle_core::{DType, Error, Result, Tensor};

#[cfg(feature = "cuda")]
pub(crate) use cuda::follow;
pub use norm::{Clip, Clipper, Counts, clip_scale, squared_norm};

const OP: &str = "adamw";

/// Settings of the optimiser; the learning rate may change from step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the mean of the gradients, in [0, 1).
    pub beta1: f64,
    /// Decay of the mean of the squared gradients, in [0, 1).
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay: each step takes `lr * weight_decay` of the parameter away.
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
        }
    }
}

/// What gradients are multiplied with before the step.
#[derive(Clone, Copy, Debug)]
pub enum GradientScale<'a> {
    /// A finite number known to the host.
    Host(f64),
    /// One `f32` on the device of the parameters, such as [`Clip::scale`]. If it is not finite, there is no step: nothing
    /// changes.
    Device(&'a Tensor),
}

/// A parameter with what a step reads and writes of it: contiguous tensors of one shape and device, but for the moments.
#[derive(Clone, Copy, Debug)]
pub struct Slot<'a> {
    /// The f32 master, which the step changes.
    pub parameter: &'a Tensor,
    /// Both moments [2, ..shape], f32 or bf16, which the step changes.
    pub moments: &'a Tensor,
    /// f32 or bf16, of any strides.
    pub gradient: &'a Tensor,
    /// Where the step leaves the new parameter in bf16.
    pub rounded: Option<&'a Tensor>,
}

impl<'a> Slot<'a> {
    /// A parameter without a copy in bf16.
    pub fn new(parameter: &'a Tensor, moments: &'a Tensor, gradient: &'a Tensor) -> Self {
        Self {
            parameter,
            moments,
            gradient,
            rounded: None,
        }
    }
}

/// Constants of a step, as the kernels know them.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Step {
    beta1: f32,
    beta2: f32,
    /// 1 - lr decay.
    keep: f32,
    /// lr / (1 - b1^t).
    rate: f32,
    /// 1 / (1 - b2^t).
    second: f32,
    eps: f32,
}

/// The number `t` of a step.
#[derive(Clone, Copy, Debug)]
enum Number<'a> {
    Host(u64),
    /// First of these counts, [4] u32 on the device.
    Counted(&'a Clip),
}

/// Moments of a parameter before its first step: zeros, `[2, ..shape]`, `f32`.
///
/// # Errors
/// If the device has no memory left.
pub fn zero_moments(parameter: &Tensor) -> Result<Tensor> {
    zero_moments_in(parameter, DType::F32)
}

/// [`zero_moments`] in f32 or bf16.
///
/// # Errors
/// If the device has no memory left.
pub fn zero_moments_in(parameter: &Tensor, dtype: DType) -> Result<Tensor> {
    let dims: Vec<usize> = [2].iter().chain(parameter.dims()).copied().collect();
    Tensor::zeros(dims, dtype, parameter.device())
}

impl AdamW {
    /// Takes step number `step` (the first is 1) on one parameter: [`Self::step_all`] for `Slot::new` of it.
    ///
    /// # Errors
    /// As [`Self::step_all`].
    pub fn step(
        &self,
        parameter: &Tensor,
        moments: &Tensor,
        gradient: &Tensor,
        step: u64,
        scale: GradientScale,
    ) -> Result<()> {
        self.step_all(&[Slot::new(parameter, moments, gradient)], step, scale)
    }

    /// Takes step number `step` (the first is 1) on all parameters of a group, in place; no tensor may be written twice.
    ///
    /// The number of a step that a scale on the device forbids is not seen by the host: use [`Self::step_clipped`] where
    /// such steps shall not count.
    ///
    /// # Errors
    /// If a setting, shape, element type or device does not fit. Nothing is changed then.
    pub fn step_all(&self, slots: &[Slot], step: u64, scale: GradientScale) -> Result<()> {
        if step == 0 {
            return Err(OpError::value(OP, "step", 0.0, "at least 1").into());
        }
        self.take(slots, Number::Host(step), scale)
    }

    /// [`Self::step_all`] with the scale of `clip`, as the step that its [`Clipper`] has counted: nothing changes where
    /// the norm is not finite, and the next step has the number that this one would have had.
    ///
    /// # Errors
    /// As [`Self::step_all`].
    pub fn step_clipped(&self, slots: &[Slot], clip: &Clip) -> Result<()> {
        self.take(slots, Number::Counted(clip), clip.scale())
    }

    fn take(&self, slots: &[Slot], number: Number, scale: GradientScale) -> Result<()> {
        self.validate()?;
        let Some(first) = slots.first() else {
            return Ok(());
        };
        for slot in slots {
            check_slot(slot, first)?;
        }
        match scale {
            GradientScale::Host(factor) if !factor.is_finite() => {
                return Err(OpError::value(OP, "scale", factor, "a finite number").into());
            }
            GradientScale::Host(_) => {}
            GradientScale::Device(factor) => {
                check_operand(OP, "scale", factor, F32, first.parameter)?;
                if factor.elem_count() != 1 {
                    return Err(OpError::shape(OP, "scale", factor, "one element").into());
                }
            }
        }
        let dense: Vec<Tensor> = slots
            .iter()
            .map(|slot| slot.gradient.contiguous())
            .collect::<Result<_>>()?;
        let slots: Vec<Slot> = slots
            .iter()
            .zip(&dense)
            .map(|(slot, gradient)| Slot { gradient, ..*slot })
            .collect();
        #[cfg(feature = "cuda")]
        if first.parameter.device().is_cuda() {
            return cuda::step(&slots, self, number, scale);
        }
        let step = match number {
            Number::Host(step) => step,
            Number::Counted(clip) => clip.made()?.into(),
        };
        cpu::step(&slots, &self.constants(step), scale)
    }

    fn constants(&self, step: u64) -> Step {
        let exponent = step as f64;
        Step {
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            keep: (1.0 - self.lr * self.weight_decay) as f32,
            rate: (self.lr / (1.0 - self.beta1.powf(exponent))) as f32,
            second: (1.0 / (1.0 - self.beta2.powf(exponent))) as f32,
            eps: self.eps as f32,
        }
    }

    fn validate(&self) -> Result<()> {
        let fraction = 0.0..1.0;
        let wrong =
            |field, found: f64, expected: &str| Err(OpError::value(OP, field, found, expected).into());
        for (field, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !fraction.contains(&beta) {
                return wrong(field, beta, "0 up to but not 1");
            }
        }
        for (field, value) in [("lr", self.lr), ("weight_decay", self.weight_decay)] {
            if !(value.is_finite() && value >= 0.0) {
                return wrong(field, value, "a number of at least 0");
            }
        }
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return wrong("eps", self.eps, "a positive number");
        }
        Ok(())
    }
}

fn check_slot(slot: &Slot, first: &Slot) -> Result<()> {
    let dims = slot.parameter.dims();
    let like = first.parameter;
    check_operand(OP, "parameter", slot.parameter, F32, like)?;
    check_operand(OP, "moments", slot.moments, F32_BF16, like)?;
    check_operand(OP, "gradient", slot.gradient, F32_BF16, like)?;
    if slot.gradient.dims() != dims {
        let expected = format!("{dims:?} like parameter");
        return Err(OpError::shape(OP, "gradient", slot.gradient, expected).into());
    }
    if slot.moments.dims().first() != Some(&2) || slot.moments.dims()[1..] != *dims {
        return Err(OpError::shape(OP, "moments", slot.moments, format!("2 x {dims:?}")).into());
    }
    let mut written = vec![("parameter", slot.parameter), ("moments", slot.moments)];
    if let Some(rounded) = slot.rounded {
        check_operand(OP, "rounded", rounded, BF16, like)?;
        if rounded.dims() != dims {
            return Err(OpError::shape(OP, "rounded", rounded, format!("{dims:?} like parameter")).into());
        }
        written.push(("rounded", rounded));
    }
    for (field, tensor) in written {
        if !tensor.is_contiguous() {
            return Err(OpError::value(OP, field, "strided", "contiguous").into());
        }
    }
    Ok(())
}

/// Element types that an operand may have, and their names.
type Types = (&'static [DType], &'static str);

const F32: Types = (&[DType::F32], "f32");
const BF16: Types = (&[DType::BF16], "bf16");
const F32_BF16: Types = (&[DType::F32, DType::BF16], "f32, bf16");

/// Errors unless `tensor` has one of `types` and elements, and lies on the device of `like`.
fn check_operand(
    op: &'static str,
    field: &'static str,
    tensor: &Tensor,
    (types, supported): Types,
    like: &Tensor,
) -> Result<()> {
    if !types.contains(&tensor.dtype()) {
        return Err(OpError::DType {
            op,
            field,
            found: tensor.dtype(),
            device: if tensor.device().is_cuda() {
                "CUDA"
            } else {
                "the CPU"
            },
            supported,
        }
        .into());
    }
    if tensor.elem_count() == 0 {
        return Err(OpError::shape(op, field, tensor, "at least one element").into());
    }
    if !tensor.device().same_device(like.device()) {
        return Err(different_devices(op));
    }
    Ok(())
}

fn different_devices(op: &str) -> Error {
    Error::Msg(format!("{op}: tensors lie on different or unsupported devices"))
}
