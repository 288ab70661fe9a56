//! The root-mean-square norm of each head times a gate, the way in which mixers give their output: one pass each way.
//!
//! ```text
//! r    = 1 / sqrt(mean_j x_j^2 + eps)          over the channels j of a head
//! y_j  = x_j r w_j a(g_j)                      a: identity, sigmoid or SiLU
//!
//! u_j  = dy_j w_j a(g_j)
//! dx_j = r u_j - x_j r^3 mean_i(u_i x_i)
//! dg_j = dy_j x_j r w_j a'(g_j)                dw_j = sum over tokens of dy_j x_j r a(g_j)
//! ```
//!
//! `x` and the gate may be columns of one wide projection: rows with gaps between them are read where they lie. The gain
//! w may be an f32 master while the others are bf16. Only the inputs are kept for the backward pass.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use super::{check_elements, check_eps, checked_parameter};
use crate::autograd::{Gradient, Value, attach2, attach3};
use crate::error::OpError;
use crate::pass::same_kind;
use crate::strided::in_rows;
use crate::tape::{Needs, Set};
use candle_core::{DType, Result, Tensor};

const OP: &str = "rms_norm_gated";

/// What is done to a gate before it multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// The gate as it is.
    Identity,
    /// `1 / (1 + e^-g)`.
    Sigmoid,
    /// `g / (1 + e^-g)`.
    Silu,
}

/// One call of the operator.
#[derive(Clone, Copy, Debug)]
struct Gated {
    activation: Gate,
    heads: usize,
    /// Channels of a head.
    width: usize,
    tokens: usize,
    eps: f64,
}

impl Gated {
    fn columns(&self) -> usize {
        self.heads * self.width
    }
}

/// `x / sqrt(mean(x^2) + eps) * gain * activation(gate)` for `x` and `gate` [.., D] and `gain` [D] or none, with statistics
/// of their own for each of `heads` equal runs of channels.
///
/// Differentiable in `x`, `gain` and `gate`. `x` and `gate` are f32 or f64 on the CPU, f32 or bf16 on CUDA; the gain is of
/// their type or f32. Statistics are f32 for bf16.
///
/// # Errors
/// If a shape, an element type or a device does not fit, D does not split into `heads`, or `eps` is not a positive number.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use fulgur_kernels::norm::{Gate, rms_norm_gated};
/// let x = Tensor::new(&[[3f64, 4.0, 0.0, 5.0]], &Device::Cpu)?;
/// let gate = Tensor::new(&[[1f64, 2.0, 1.0, -1.0]], &Device::Cpu)?;
/// let y = rms_norm_gated(&x, None, &gate, Gate::Identity, 2, 1e-9)?;
/// let expected = [3.0 / 12.5f64.sqrt(), 8.0 / 12.5f64.sqrt(), 0.0, -(2f64.sqrt())];
/// for (y, expected) in y.to_vec2::<f64>()?[0].iter().zip(expected) {
///     assert!((y - expected).abs() < 1e-8);
/// }
/// # candle_core::Result::Ok(())
/// ```
pub fn rms_norm_gated(
    x: &Tensor,
    gain: Option<&Tensor>,
    gate: &Tensor,
    activation: Gate,
    heads: usize,
    eps: f64,
) -> Result<Tensor> {
    let Some(&columns) = x.dims().last() else {
        return Err(OpError::shape(OP, "x", x, "[.., D]").into());
    };
    check_eps(OP, eps)?;
    if gate.dims() != x.dims() {
        return Err(OpError::shape(OP, "gate", gate, format!("{:?} like x", x.dims())).into());
    }
    same_kind(OP, &[("x", x), ("gate", gate)])?;
    check_elements(OP, "x", x)?;
    if heads == 0 || columns % heads != 0 {
        return Err(OpError::shape(OP, "x", x, format!("[.., D] with D a multiple of {heads}")).into());
    }
    let gain = gain
        .map(|gain| checked_parameter(OP, "gain", gain, x))
        .transpose()?;
    let op = Gated {
        activation,
        heads,
        width: columns / heads,
        tokens: x.elem_count() / columns,
        eps,
    };
    let (x, gate) = (in_rows(x)?, in_rows(gate)?);
    let value = op.forward(&x, &gate, gain.as_ref())?;
    match &gain {
        None => attach2(value, [&x, &gate], op),
        Some(gain) => attach3(value, [&x, &gate, gain], op),
    }
}

impl Gated {
    fn forward(&self, x: &Tensor, gate: &Tensor, gain: Option<&Tensor>) -> Result<Value> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return match x.dtype() {
                DType::BF16 => cuda::forward::<half::bf16>(self, x, gate, gain),
                _ => cuda::forward::<f32>(self, x, gate, gain),
            };
        }
        match x.dtype() {
            DType::F64 => cpu::forward::<f64>(self, x, gate, gain),
            _ => cpu::forward::<f32>(self, x, gate, gain),
        }
    }

    /// Adjoints of x, gate and gain, that of the gain in the type of the computation.
    fn gradients(
        &self,
        [x, gate]: [&Tensor; 2],
        gain: Option<&Tensor>,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let grad = grad.contiguous()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return match x.dtype() {
                DType::BF16 => cuda::backward::<half::bf16>(self, [x, gate], gain, &grad),
                _ => cuda::backward::<f32>(self, [x, gate], gain, &grad),
            };
        }
        match x.dtype() {
            DType::F64 => cpu::backward::<f64>(self, [x, gate], gain, &grad),
            _ => cpu::backward::<f32>(self, [x, gate], gain, &grad),
        }
    }
}

impl Gradient<2> for Gated {
    fn name(&self) -> &'static str {
        OP
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::ALL)
    }

    fn backward(&self, args: [&Tensor; 2], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let [dx, dgate, _] = self.gradients(args, None, grad)?;
        Ok([dx, dgate])
    }
}

impl Gradient<3> for Gated {
    fn name(&self) -> &'static str {
        OP
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::ALL)
    }

    fn backward(
        &self,
        [x, gate, gain]: [&Tensor; 3],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let [dx, dgate, dgain] = self.gradients([x, gate], Some(gain), grad)?;
        let dgain = dgain.map(|dgain| dgain.to_dtype(gain.dtype())).transpose()?;
        Ok([dx, dgate, dgain])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::norm::rms_norm_to;
    use crate::strided::row_stride;
    use crate::testing::{check_gradients, check_precision, check_threads, normal, relative_rms, values};
    use candle_core::{Device, Var};

    const EPS: f64 = 1e-6;
    const ALL: [Gate; 3] = [Gate::Identity, Gate::Sigmoid, Gate::Silu];

    fn activate(activation: Gate, g: f64) -> f64 {
        match activation {
            Gate::Identity => g,
            Gate::Sigmoid => 1.0 / (1.0 + (-g).exp()),
            Gate::Silu => g / (1.0 + (-g).exp()),
        }
    }

    /// The definition, one row of statistics at a time.
    fn literal(t: &[Tensor], activation: Gate, heads: usize) -> Vec<f64> {
        let columns = t[0].dims()[t[0].rank() - 1];
        let (x, gate, gain) = (values(&t[0]), values(&t[1]), t.get(2).map(values));
        let width = columns / heads;
        let mut y = vec![f64::NAN; x.len()];
        for at in (0..x.len()).step_by(width) {
            let mean = x[at..at + width].iter().map(|x| x * x).sum::<f64>() / width as f64;
            for i in at..at + width {
                let gain = gain.as_ref().map_or(1.0, |gain| gain[i % columns]);
                y[i] = x[i] / (mean + EPS).sqrt() * gain * activate(activation, gate[i]);
            }
        }
        y
    }

    fn inputs([b, n, d]: [usize; 3]) -> [Tensor; 3] {
        [normal(1, &[b, n, d]), normal(2, &[b, n, d]), normal(3, &[d])]
    }

    /// Three heads where each keeps four channels: the gradient of a norm of one number is all cancellation.
    fn heads_of(t: &Tensor) -> usize {
        match t.dims().last() {
            Some(&d) if d >= 12 && d.is_multiple_of(3) => 3,
            _ => 1,
        }
    }

    fn run(t: &[Tensor], activation: Gate) -> Result<Tensor> {
        rms_norm_gated(&t[0], t.get(2), &t[1], activation, heads_of(&t[0]), EPS)
    }

    #[test]
    fn agrees_with_the_definition() -> Result<()> {
        for shape in [[1, 1, 1], [2, 3, 5], [2, 131, 63], [3, 7, 48]] {
            let t = inputs(shape);
            for activation in ALL {
                for count in [2, 3] {
                    let wanted = literal(&t[..count], activation, heads_of(&t[0]));
                    let error = relative_rms(&values(&run(&t[..count], activation)?), &wanted);
                    assert!(error < 1e-14, "{activation:?} {shape:?}: {error:e}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        for activation in ALL {
            for count in [2, 3] {
                for shape in [[1, 1, 2], [2, 3, 5], [2, 70, 3], [2, 5, 12]] {
                    check_gradients(&inputs(shape)[..count], |t| run(t, activation))?;
                }
                for shape in [[1, 1, 60], [2, 63, 60], [3, 500, 33]] {
                    check_precision(&inputs(shape)[..count], |t| run(t, activation), 1e-5)?;
                }
            }
            check_threads(&inputs([3, 700, 33]), |t| run(t, activation))?;
        }
        Ok(())
    }

    /// Columns of one wide projection, and layouts that have no rows.
    #[test]
    fn views_are_the_same_as_copies() -> Result<()> {
        let columns =
            |t: &[Tensor]| -> Result<[Tensor; 2]> { Ok([t[0].narrow(2, 1, 12)?, t[0].narrow(2, 13, 12)?]) };
        let wide = normal(1, &[2, 5, 26]);
        let [x, gate] = columns(std::slice::from_ref(&wide))?;
        assert!(!x.is_contiguous() && row_stride(x.layout()) == Some(26));
        let found = rms_norm_gated(&x, None, &gate, Gate::Silu, 3, EPS)?;
        let dense = [x.force_contiguous()?, gate.force_contiguous()?];
        assert_eq!(
            values(&found),
            values(&rms_norm_gated(&dense[0], None, &dense[1], Gate::Silu, 3, EPS)?)
        );
        check_gradients(&[wide], |t| {
            let [x, gate] = columns(t)?;
            rms_norm_gated(&x, None, &gate, Gate::Silu, 3, EPS)
        })?;
        let [x, gate] = [normal(1, &[2, 5, 7]), normal(2, &[2, 5, 7])].map(|t| t.transpose(1, 2).unwrap());
        let found = rms_norm_gated(&x, None, &gate, Gate::Sigmoid, 1, EPS)?;
        let wanted = literal(&[x.contiguous()?, gate.contiguous()?], Gate::Sigmoid, 1);
        assert!(relative_rms(&values(&found), &wanted) < 1e-14);
        Ok(())
    }

    #[test]
    fn is_the_norm_times_a_gate_of_ones() -> Result<()> {
        let [x, gate, gain] = inputs([2, 7, 12]);
        let found = rms_norm_gated(&x, Some(&gain), &gate.ones_like()?, Gate::Identity, 3, EPS)?;
        let wanted = rms_norm_to(&x, Some(&gain), 3, EPS, DType::F64)?;
        assert!(relative_rms(&values(&found), &values(&wanted)) < 1e-15);
        Ok(())
    }

    /// A master of another type has a gradient of its own type.
    #[test]
    fn gains_may_be_f32_masters() -> Result<()> {
        let [x, gate, gain] = inputs([2, 7, 12]);
        let master = Var::from_tensor(&gain.to_dtype(DType::F32)?)?;
        let y = rms_norm_gated(&x, Some(&master), &gate, Gate::Silu, 2, EPS)?;
        let grads = y.sum_all()?.backward()?;
        assert_eq!(grads.get(&master).expect("a gradient").dtype(), DType::F32);
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let [x, gate, gain] = inputs([2, 3, 6]);
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        assert_eq!(
            message(rms_norm_gated(&x, None, &gain, Gate::Silu, 1, EPS)),
            "rms_norm_gated: gate has shape [6], expected [2, 3, 6] like x"
        );
        assert_eq!(
            message(rms_norm_gated(&x, Some(&gate), &gate, Gate::Silu, 1, EPS)),
            "rms_norm_gated: gain has shape [2, 3, 6], expected [6]"
        );
        let small = Tensor::zeros(6, DType::F16, &Device::Cpu).unwrap();
        assert_eq!(
            message(rms_norm_gated(&x, Some(&small), &gate, Gate::Silu, 1, EPS)),
            "rms_norm_gated: gain is F16, expected F64 like x, or F32"
        );
        assert_eq!(
            message(rms_norm_gated(&x, None, &gate, Gate::Silu, 4, EPS)),
            "rms_norm_gated: x has shape [2, 3, 6], expected [.., D] with D a multiple of 4"
        );
        assert_eq!(
            message(rms_norm_gated(&x, None, &gate, Gate::Silu, 1, -1.0)),
            "rms_norm_gated: eps is -1, expected a positive number"
        );
        let half = x.to_dtype(DType::F16).unwrap();
        assert_eq!(
            message(rms_norm_gated(&half, None, &half, Gate::Silu, 1, EPS)),
            "rms_norm_gated: x is F16 on the CPU, supported: f32, f64"
        );
    }
}
