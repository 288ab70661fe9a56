//! AdamW (Loshchilov and Hutter, 2019) as in-place steps on one parameter tensor, and what clipping needs.
//!
//! ```text
//! g = scale gradient
//! m = b1 m + (1 - b1) g                  v = b2 v + (1 - b2) g^2
//! p = p (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
//! ```
//!
//! The moments are one tensor [2, ..] that the caller owns, saves and restores: the step has no other memory. The
//! scale may lie on the device, so that clipping by the global norm never waits for the GPU:
//!
//! ```
//! use candle_core::{DType, Device, Tensor, Var};
//! use fulgur_kernels::adamw::{AdamW, GradientScale, clip_scale, squared_norm, zero_moments};
//! # fn main() -> candle_core::Result<()> {
//! let p = Var::ones(4, DType::F32, &Device::Cpu)?;
//! let moments = zero_moments(&p)?;
//! for step in 1..=3 {
//!     let grads = p.sqr()?.sum_all()?.backward()?;
//!     let gradient = grads.get(&p).unwrap();
//!     let scale = clip_scale(&squared_norm(&[gradient])?, 1.0)?;
//!     AdamW::default().step(&p, &moments, gradient, step, GradientScale::Device(&scale))?;
//! }
//! assert!(p.to_vec1::<f32>()?[0] < 0.9971);
//! # Ok(())
//! # }
//! ```

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use crate::error::OpError;
use candle_core::op::BackpropOp;
use candle_core::{DType, Result, Shape, Storage, Tensor};

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
    /// A number known to the host.
    Host(f64),
    /// One `f32` on the device of the parameter, such as the result of [`clip_scale`].
    Device(&'a Tensor),
}

/// First half of a step: the moments from the gradient and, if there is one, a scale on the device.
#[derive(Clone, Copy, Debug)]
struct MomentUpdate {
    beta1: f32,
    beta2: f32,
    scale: f32,
}

/// Second half of a step: the parameter from the moments.
#[derive(Clone, Copy, Debug)]
struct ParameterUpdate {
    /// 1 - lr decay.
    keep: f32,
    /// lr / (1 - b1^t).
    rate: f32,
    /// 1 / (1 - b2^t).
    second: f32,
    eps: f32,
}

/// Moments of a parameter before its first step: zeros, `[2, ..shape]`, `f32`.
///
/// # Errors
/// If the device has no memory left.
pub fn zero_moments(parameter: &Tensor) -> Result<Tensor> {
    let dims: Vec<usize> = [2].iter().chain(parameter.dims()).copied().collect();
    Tensor::zeros(dims, DType::F32, parameter.device())
}

impl AdamW {
    /// Takes step number `step` (the first is 1) on `parameter`, in place, and updates its `moments` [2, ..shape].
    ///
    /// All tensors are `f32`, on one device; `parameter` and `moments` contiguous.
    ///
    /// # Errors
    /// If a setting, shape, element type or device does not fit. Nothing is changed then.
    pub fn step(
        &self,
        parameter: &Tensor,
        moments: &Tensor,
        gradient: &Tensor,
        step: u64,
        scale: GradientScale,
    ) -> Result<()> {
        const OP: &str = "adamw";
        self.validate(step)?;
        check_f32(
            OP,
            &[
                ("parameter", parameter),
                ("moments", moments),
                ("gradient", gradient),
            ],
        )?;
        if gradient.dims() != parameter.dims() {
            let expected = format!("{:?} like parameter", parameter.dims());
            return Err(OpError::shape(OP, "gradient", gradient, expected).into());
        }
        if moments.dims().first() != Some(&2) || moments.dims()[1..] != *parameter.dims() {
            let expected = format!("2 x {:?}", parameter.dims());
            return Err(OpError::shape(OP, "moments", moments, expected).into());
        }
        for (field, tensor) in [("parameter", parameter), ("moments", moments)] {
            if !tensor.is_contiguous() {
                return Err(OpError::value(OP, field, "strided", "contiguous").into());
            }
        }
        let gradient = gradient.contiguous()?;
        let mut update = MomentUpdate {
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            scale: 1.0,
        };
        match scale {
            GradientScale::Host(factor) => {
                update.scale = factor as f32;
                moments.inplace_op2(&gradient, &update)?;
            }
            GradientScale::Device(factor) => {
                check_f32(OP, &[("parameter", parameter), ("scale", factor)])?;
                if factor.elem_count() != 1 {
                    return Err(OpError::shape(OP, "scale", factor, "one element").into());
                }
                moments.inplace_op3(&gradient, factor, &update)?;
            }
        }
        let exponent = step as f64;
        let update = ParameterUpdate {
            keep: (1.0 - self.lr * self.weight_decay) as f32,
            rate: (self.lr / (1.0 - self.beta1.powf(exponent))) as f32,
            second: (1.0 / (1.0 - self.beta2.powf(exponent))) as f32,
            eps: self.eps as f32,
        };
        parameter.inplace_op2(moments, &update)
    }

    fn validate(&self, step: u64) -> Result<()> {
        const OP: &str = "adamw";
        let fraction = 0.0..1.0;
        let wrong =
            |field, found: f64, expected: &str| Err(OpError::value(OP, field, found, expected).into());
        if step == 0 {
            return wrong("step", 0.0, "at least 1");
        }
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

/// Sum of the squares of all elements of all tensors: [1], `f32`, on their device. The order of the sum is fixed.
///
/// # Errors
/// If there is no tensor, one is empty or not `f32`, or devices differ.
pub fn squared_norm(gradients: &[&Tensor]) -> Result<Tensor> {
    const OP: &str = "squared_norm";
    if gradients.is_empty() {
        return Err(OpError::value(OP, "number of tensors", 0, "at least 1").into());
    }
    let fields: Vec<_> = gradients.iter().map(|&gradient| ("gradient", gradient)).collect();
    check_f32(OP, &fields)?;
    let dense: Vec<Tensor> = gradients
        .iter()
        .map(|gradient| gradient.contiguous())
        .collect::<Result<_>>()?;
    let locked: Vec<_> = dense.iter().map(Tensor::storage_and_layout).collect();
    let sum = match &*locked[0].0 {
        #[cfg(feature = "cuda")]
        Storage::Cuda(_) => Storage::Cuda(cuda::squared_norm(&locked)?),
        _ => Storage::Cpu(cpu::squared_norm(&locked)?),
    };
    Ok(Tensor::from_storage(
        sum,
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
    if max_norm.is_nan() || max_norm <= 0.0 {
        return Err(OpError::value("clip_scale", "max_norm", max_norm, "a positive number").into());
    }
    // Raising the norm to max_norm first makes the quotient at most one and keeps zero out of the division.
    (squared_norm.sqrt()?.maximum(max_norm)?.recip()? * max_norm)?
        .detach()
        .contiguous()
}

fn check_f32(op: &'static str, tensors: &[(&'static str, &Tensor)]) -> Result<()> {
    for &(field, tensor) in tensors {
        if tensor.dtype() != DType::F32 {
            let device = if tensor.device().is_cuda() {
                "CUDA"
            } else {
                "the CPU"
            };
            let found = tensor.dtype();
            return Err(OpError::DType {
                op,
                field,
                found,
                device,
                supported: "f32",
            }
            .into());
        }
    }
    crate::pass::same_kind(op, tensors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{normal, relative_rms, values};
    use candle_core::{Device, Var};

    fn f32_normal(seed: u64, shape: &[usize]) -> Tensor {
        normal(seed, shape).to_dtype(DType::F32).unwrap()
    }

    /// AdamW in f64: parameter after each gradient.
    fn reference(adamw: &AdamW, parameter: &[f64], gradients: &[Vec<f64>]) -> Vec<f64> {
        let (mut p, mut m, mut v) = (
            parameter.to_vec(),
            vec![0.0; parameter.len()],
            vec![0.0; parameter.len()],
        );
        for (t, gradient) in gradients.iter().enumerate() {
            let t = t as i32 + 1;
            for i in 0..p.len() {
                m[i] = adamw.beta1 * m[i] + (1.0 - adamw.beta1) * gradient[i];
                v[i] = adamw.beta2 * v[i] + (1.0 - adamw.beta2) * gradient[i] * gradient[i];
                let mean = m[i] / (1.0 - adamw.beta1.powi(t));
                let spread = (v[i] / (1.0 - adamw.beta2.powi(t))).sqrt() + adamw.eps;
                p[i] -= adamw.lr * (adamw.weight_decay * p[i] + mean / spread);
            }
        }
        p
    }

    #[test]
    fn several_steps_agree_with_reference() -> Result<()> {
        let adamw = AdamW {
            lr: 0.02,
            beta1: 0.9,
            beta2: 0.98,
            eps: 1e-6,
            weight_decay: 0.1,
        };
        for shape in [&[1][..], &[7, 9], &[30_001]] {
            let start = f32_normal(1, shape);
            for device_scale in [false, true] {
                let parameter = Var::from_tensor(&start)?;
                let moments = zero_moments(&parameter)?;
                let factor = Tensor::new(&[0.25f32], &Device::Cpu)?;
                let mut scaled = vec![];
                for step in 1..=6 {
                    let gradient = f32_normal(10 + step, shape);
                    scaled.push(values(&gradient).iter().map(|g| 0.25 * g).collect());
                    let scale = match device_scale {
                        true => GradientScale::Device(&factor),
                        false => GradientScale::Host(0.25),
                    };
                    adamw.step(&parameter, &moments, &gradient, step, scale)?;
                }
                let wanted = reference(&adamw, &values(&start), &scaled);
                let error = relative_rms(&values(&parameter), &wanted);
                assert!(error < 1e-6, "{shape:?} {device_scale}: {error:e}");
            }
        }
        Ok(())
    }

    #[test]
    fn saved_moments_continue_bit_for_bit() -> Result<()> {
        let run = |parameter: &Var, moments: &Tensor, steps: std::ops::Range<u64>| -> Result<()> {
            for step in steps {
                let gradient = f32_normal(step, &[100]);
                AdamW::default().step(parameter, moments, &gradient, step, GradientScale::Host(1.0))?;
            }
            Ok(())
        };
        let whole = Var::from_tensor(&f32_normal(1, &[100]))?;
        let whole_moments = zero_moments(&whole)?;
        run(&whole, &whole_moments, 1..7)?;
        let part = Var::from_tensor(&f32_normal(1, &[100]))?;
        let moments = zero_moments(&part)?;
        run(&part, &moments, 1..4)?;
        let (part, moments) = (Var::from_tensor(&part.copy()?)?, moments.copy()?);
        run(&part, &moments, 4..7)?;
        assert_eq!(values(&part), values(&whole));
        assert_eq!(values(&moments), values(&whole_moments));
        Ok(())
    }

    #[test]
    fn norm_and_clipping() -> Result<()> {
        let tensors = [
            f32_normal(1, &[3]),
            f32_normal(2, &[300, 301]),
            f32_normal(3, &[8, 9]).t()?,
        ];
        let borrowed: Vec<&Tensor> = tensors.iter().collect();
        let wanted: f64 = tensors.iter().flat_map(values).map(|x| x * x).sum();
        let mut bits = vec![];
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let sum = pool.install(|| squared_norm(&borrowed))?;
            assert!((values(&sum)[0] / wanted - 1.0).abs() < 1e-7);
            bits.push(values(&sum));
            let clipped = values(&clip_scale(&sum, 2.0)?)[0];
            assert!((clipped * wanted.sqrt() - 2.0).abs() < 1e-5);
            assert_eq!(values(&clip_scale(&sum, 1e6)?), [1.0]);
        }
        assert_eq!(bits[0], bits[1]);
        assert_eq!(
            values(&clip_scale(&Tensor::zeros(1, DType::F32, &Device::Cpu)?, 1.0)?),
            [1.0]
        );
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit_and_changes_nothing() -> Result<()> {
        let parameter = Var::from_tensor(&f32_normal(1, &[2, 3]))?;
        let (moments, before) = (zero_moments(&parameter)?, values(&parameter));
        let message = |moments: &Tensor, gradient: &Tensor, step| {
            let adamw = AdamW::default();
            adamw
                .step(&parameter, moments, gradient, step, GradientScale::Host(1.0))
                .unwrap_err()
                .to_string()
        };
        let gradient = f32_normal(2, &[2, 3]);
        assert_eq!(
            message(&moments, &f32_normal(2, &[3, 2]), 1),
            "adamw: gradient has shape [3, 2], expected [2, 3] like parameter"
        );
        assert_eq!(
            message(&gradient, &gradient, 1),
            "adamw: moments has shape [2, 3], expected 2 x [2, 3]"
        );
        assert_eq!(
            message(&moments, &gradient, 0),
            "adamw: step is 0, expected at least 1"
        );
        assert_eq!(
            message(&moments, &normal(2, &[2, 3]), 1),
            "adamw: gradient is F64 on the CPU, supported: f32"
        );
        assert_eq!(values(&parameter), before);
        Ok(())
    }
}
