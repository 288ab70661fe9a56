//! Phases of tokens in a row, `p_n = (start + n) theta`, exact however far away the tokens are.
//!
//! The product is taken in f64 and kept within half a turn of zero: in f32 alone it loses a digit for every factor of ten
//! in the position. `dtheta = sum over n of (start + n) dp_n`.

use crate::autograd::{Gradient, Value, attach1};
use crate::error::OpError;
use crate::rows::sum_rows;
use crate::tape::{Needs, Set};
use candle_core::{DType, Device, Result, Tensor};
use std::f64::consts::TAU;

const OP: &str = "lrpe::token_phases";

/// Phases `[N, P]` of `tokens` N tokens that follow each other from number `start` on, with frequencies `theta` `[P]`, or
/// `[N, H, P]` with `[H, P]`, in radians a token; whole turns are left out.
///
/// Differentiable in `theta`, whose type (f32, on the CPU also f64) the result has.
///
/// # Errors
/// If a shape or an element type does not fit, or there is no token.
pub fn token_phases(theta: &Tensor, tokens: usize, start: usize) -> Result<Tensor> {
    let theta = checked(theta, tokens)?;
    let shape = [&[tokens], theta.dims()].concat();
    let value = forward(&theta, &shape, start)?;
    attach1(value, &theta, Phases { tokens, start })
}

/// As [`token_phases`] from the number on that `clock` `[1]` of type u32 holds when the phases are made: on a GPU nothing waits
/// for it, and a graph that was recorded reads it anew. Not differentiable.
///
/// # Errors
/// As [`token_phases`], and if `clock` is not one u32 beside `theta`.
pub fn token_phases_at(theta: &Tensor, tokens: usize, clock: &Tensor) -> Result<Tensor> {
    let theta = checked(theta, tokens)?.detach();
    if clock.dims() != [1] || clock.dtype() != DType::U32 {
        return Err(OpError::shape(OP, "clock", clock, "[1] of u32").into());
    }
    let shape = [&[tokens], theta.dims()].concat();
    #[cfg(feature = "cuda")]
    if theta.device().is_cuda() {
        return cuda::forward_at(&theta, &shape, clock);
    }
    let start = clock.to_vec1::<u32>()?[0] as usize;
    attach1(forward(&theta, &shape, start)?, &theta, Phases { tokens, start })
}

fn checked(theta: &Tensor, tokens: usize) -> Result<Tensor> {
    if !matches!(theta.rank(), 1 | 2) || theta.elem_count() == 0 {
        return Err(OpError::shape(OP, "theta", theta, "[P] or [H, P]").into());
    }
    if tokens == 0 {
        return Err(OpError::value(OP, "tokens", tokens, "at least 1").into());
    }
    let fits = match theta.dtype() {
        DType::F32 => true,
        found => found == DType::F64 && !theta.device().is_cuda(),
    };
    if !fits {
        let found = format!("{:?}", theta.dtype());
        return Err(OpError::value(OP, "theta", found, "f32, or f64 on the CPU").into());
    }
    theta.contiguous()
}

/// Frequencies `[width / 2]` of rotary positions in f64, `base^(-2 j / width)` radians a token.
///
/// # Errors
/// If `width` is odd or `base` is not a positive number.
pub fn rotary_frequencies(width: usize, base: f64, device: &Device) -> Result<Tensor> {
    const OP: &str = "lrpe::rotary_frequencies";
    if width == 0 || !width.is_multiple_of(2) {
        return Err(OpError::value(OP, "width", width, "a positive even number").into());
    }
    if !(base.is_finite() && base > 0.0) {
        return Err(OpError::value(OP, "base", base, "a positive number").into());
    }
    let theta: Vec<f64> = (0..width / 2)
        .map(|j| base.powf(-2.0 * j as f64 / width as f64))
        .collect();
    Tensor::from_vec(theta, width / 2, device)
}

struct Phases {
    tokens: usize,
    start: usize,
}

fn forward(theta: &Tensor, shape: &[usize], start: usize) -> Result<Value> {
    #[cfg(feature = "cuda")]
    if theta.device().is_cuda() {
        return cuda::forward(theta, shape, start);
    }
    let frequencies: Vec<f64> = theta.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
    let phases: Vec<f64> = (start..start + shape[0])
        .flat_map(|n| frequencies.iter().map(move |theta| reduced(n as f64 * theta)))
        .collect();
    let phases = Tensor::from_vec(phases, shape, theta.device())?;
    Ok(Value::Tensor(phases.to_dtype(theta.dtype())?))
}

fn reduced(angle: f64) -> f64 {
    angle - (angle / TAU).round() * TAU
}

impl Gradient<1> for Phases {
    fn name(&self) -> &'static str {
        OP
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::NONE)
    }

    fn backward(&self, [theta]: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let positions: Vec<f64> = (self.start..self.start + self.tokens).map(|n| n as f64).collect();
        let positions = Tensor::from_vec(positions, (self.tokens, 1), &Device::Cpu)?
            .to_dtype(theta.dtype())?
            .to_device(theta.device())?;
        let rows = grad.detach().reshape((self.tokens, ()))?;
        let dtheta = sum_rows(&rows.broadcast_mul(&positions)?)?;
        Ok([Some(dtheta.reshape(theta.shape())?)])
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    //! Launches of `cuda/lrpe.cu`.

    use super::OP;
    use crate::autograd::Value;
    use crate::cuda_module::{Slice, flat, launch, room};
    use crate::gpu::{self, Locked};
    use crate::lrpe::turn::cuda::LRPE;
    use candle_core::{Result, Tensor};

    pub(super) fn forward(theta: &Tensor, shape: &[usize], start: usize) -> Result<Value> {
        let phase = phases(theta, shape[0], start, 0)?;
        Ok(gpu::value(phase, theta.device().as_cuda_device()?, &shape.into()))
    }

    pub(super) fn forward_at(theta: &Tensor, shape: &[usize], clock: &Tensor) -> Result<Tensor> {
        let clock = Locked::new(OP, clock);
        let phase = phases(theta, shape[0], 0, clock.start()?)?;
        Ok(gpu::tensor(
            phase,
            theta.device().as_cuda_device()?,
            &shape.into(),
        ))
    }

    /// From `start` on, or where the address of a clock is not null from what that says.
    fn phases(theta: &Tensor, tokens: usize, start: usize, clock: u64) -> Result<Slice<f32>> {
        let device = theta.device().as_cuda_device()?;
        let count = theta.elem_count();
        let theta = Locked::new(OP, theta);
        let phase = room::<f32>(device, tokens * count)?;
        launch!(device, LRPE, "phases", flat(tokens * count);
            theta.view::<f32>()?, phase.as_view(), tokens as u32, count as u32, start as u64, clock);
        Ok(phase)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, normal, relative_rms, values};

    #[test]
    fn phases_are_products_without_whole_turns() -> Result<()> {
        for shape in [&[5][..], &[3, 4]] {
            let theta = normal(1, shape);
            let frequencies = values(&theta);
            for start in [0, 7] {
                let phase = token_phases(&theta, 6, start)?;
                assert_eq!(phase.dims(), [&[6], shape].concat());
                for (i, phase) in values(&phase).iter().enumerate() {
                    let angle = (start + i / frequencies.len()) as f64 * frequencies[i % frequencies.len()];
                    assert!(phase.abs() <= TAU / 2.0 + 1e-12);
                    assert!((phase.sin() - angle.sin()).abs() < 1e-13);
                    assert!((phase.cos() - angle.cos()).abs() < 1e-13);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_clock_says_where_to_start() -> Result<()> {
        let theta = normal(1, &[3, 4]);
        for start in [0u32, 7, 1_000_003] {
            let clock = Tensor::new(&[5u32, start], &Device::Cpu)?.narrow(0, 1, 1)?;
            let found = token_phases_at(&theta, 2, &clock)?;
            assert_eq!(values(&found), values(&token_phases(&theta, 2, start as usize)?));
        }
        let wide = Tensor::new(&[1u32, 2], &Device::Cpu)?;
        let message = token_phases_at(&theta, 2, &wide).unwrap_err().to_string();
        assert!(message.contains("clock"), "{message}");
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        check_gradients(&[normal(1, &[5])], |t| token_phases(&t[0], 4, 3)?.sin())?;
        check_gradients(&[normal(1, &[3, 2])], |t| token_phases(&t[0], 4, 0)?.sin())
    }

    /// A million tokens away f32 phases are as good as near ones.
    #[test]
    fn far_tokens_are_exact() -> Result<()> {
        let theta = rotary_frequencies(64, 1e4, &Device::Cpu)?.to_dtype(DType::F32)?;
        let wide = theta.to_dtype(DType::F64)?;
        let found = values(&token_phases(&theta, 3, 1_000_000)?.sin()?);
        let wanted = values(&token_phases(&wide, 3, 1_000_000)?.sin()?);
        assert!(relative_rms(&found, &wanted) < 1e-6);
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        let theta = normal(1, &[2, 2, 2]);
        assert_eq!(
            message(token_phases(&theta, 3, 0)),
            "lrpe::token_phases: theta has shape [2, 2, 2], expected [P] or [H, P]"
        );
        assert_eq!(
            message(token_phases(&normal(1, &[2]), 0, 0)),
            "lrpe::token_phases: tokens is 0, expected at least 1"
        );
        assert_eq!(
            message(rotary_frequencies(5, 1e4, &Device::Cpu)),
            "lrpe::rotary_frequencies: width is 5, expected a positive even number"
        );
    }
}
