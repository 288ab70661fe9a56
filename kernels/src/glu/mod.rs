//! Gated linear units: the activation between two matrix products in one pass, forward and backward.
//!
//! ```text
//! swiglu   x = [a | b]     y = silu(a) b          silu(a) = a s,  s = 1 / (1 + e^-a)
//!          da = dy b s (1 + a (1 - s))            db = dy a s
//! gated    y = x s(g)      dx = dy s              dg = dy x s (1 - s)
//! ```
//!
//! A tape does not keep y of swiglu: the backward pass, which reads x anyway, writes it once more for the gradient of the
//! map behind.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use crate::error::OpError;
use crate::pass::{self, forward, same_kind};
use crate::tape::{self, Needs, Recorded, Set, exactly, only};
use candle_core::{CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

/// Forward of [`swiglu`]; `half` is the width of the result.
#[derive(Clone, Copy, Debug)]
struct SwiGlu {
    half: usize,
}

/// Gradient of [`swiglu`] from x and dy, and y if it is wanted once more.
#[derive(Clone, Copy, Debug)]
struct SwiGluBackward {
    half: usize,
    along: bool,
}

/// Forward of [`gated`].
#[derive(Clone, Copy, Debug)]
struct Gated;

/// Gradients of [`gated`] from x, gate and dy.
#[derive(Clone, Copy, Debug)]
struct GatedBackward;

/// `silu(first half) * second half` over the last axis: `x` [.., 2 m] -> [.., m].
///
/// Differentiable. Elements f32 or f64 on the CPU, f32 or bf16 on CUDA.
///
/// # Errors
/// If the last axis is odd, `x` is empty, or its element type is not supported.
pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    const OP: &str = "swiglu";
    match x.dims().last() {
        Some(&width) if width % 2 == 0 => {
            same_kind(OP, &[("x", x)])?;
            let (x, op) = (x.contiguous()?, SwiGlu { half: width / 2 });
            if !tape::takes(&[&x]) {
                return x.apply_op1(op);
            }
            let y = tape::run1(&op, &x)?;
            tape::note(op, &[&x], std::slice::from_ref(&y))?;
            Ok(y)
        }
        _ => Err(OpError::shape(OP, "x", x, "[.., 2 m]").into()),
    }
}

/// `x * sigmoid(gate)` for two tensors of one shape: the output gate of LightNet.
///
/// Differentiable in both. Elements f32 or f64 on the CPU, f32 or bf16 on CUDA.
///
/// # Errors
/// If shapes, element types or devices differ, or the element type is not supported.
pub fn gated(x: &Tensor, gate: &Tensor) -> Result<Tensor> {
    const OP: &str = "gated";
    if x.dims() != gate.dims() {
        return Err(OpError::shape(OP, "gate", gate, format!("{:?} like x", x.dims())).into());
    }
    same_kind(OP, &[("x", x), ("gate", gate)])?;
    let needs = Needs::operands(Set::ALL);
    tape::apply2(&x.contiguous()?, &gate.contiguous()?, Gated, needs)
}

impl SwiGlu {
    fn output(&self, x: &Layout) -> Shape {
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.half;
        }
        Shape::from(dims)
    }
}

impl CustomOp1 for SwiGlu {
    forward!(1: x x_layout);

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let backward = SwiGluBackward {
            half: self.half,
            along: false,
        };
        let grads = pass::tensors(&backward, [x, dy], &[x.shape()])?;
        Ok(Some(pass::single(grads)))
    }
}

impl Recorded for SwiGlu {
    fn needs(&self) -> Needs {
        Needs::operands(Set::ALL).made_along()
    }

    fn backward(
        &self,
        operands: &[Tensor],
        results: &[Tensor],
        adjoints: Vec<Option<Tensor>>,
    ) -> Result<Vec<Option<Tensor>>> {
        let ([x], [y]) = (exactly(self.name(), operands)?, exactly(self.name(), results)?);
        Ok(vec![self.bwd(x, y, &only(self.name(), adjoints)?)?])
    }

    fn again(&self, operands: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x] = exactly(self.name(), operands)?;
        Ok(vec![tape::run1(self, x)?])
    }

    fn along(
        &self,
        operands: &[Tensor],
        adjoints: Vec<Option<Tensor>>,
    ) -> Result<(Vec<Option<Tensor>>, Vec<Tensor>)> {
        let [x] = exactly(self.name(), operands)?;
        let dy = only(self.name(), adjoints)?;
        let backward = SwiGluBackward {
            half: self.half,
            along: true,
        };
        let mut made = pass::tensors(&backward, [x, &dy], &[x.shape(), dy.shape()])?.into_iter();
        Ok((vec![made.next()], made.collect()))
    }

    fn holds(&self) -> Vec<Tensor> {
        Vec::new()
    }
}

impl Gated {
    fn output(&self, x: &Layout) -> Shape {
        x.shape().clone()
    }
}

impl CustomOp2 for Gated {
    forward!(2: x x_layout, gate gate_layout);

    fn bwd(
        &self,
        x: &Tensor,
        gate: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let shapes = [x.shape(), gate.shape()];
        let mut grads = pass::tensors(&GatedBackward, [x, gate, dy], &shapes)?.into_iter();
        Ok((grads.next(), grads.next()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, check_precision, check_threads, normal, relative_rms, values};
    use candle_core::DType;

    fn sigmoid(x: f64) -> f64 {
        1.0 / (1.0 + (-x).exp())
    }

    #[test]
    fn agrees_with_the_formula() -> Result<()> {
        for [rows, m] in [[1, 1], [3, 5], [63, 60], [500, 33]] {
            let (x, gate) = (normal(1, &[rows, m]), normal(2, &[rows, m]));
            let (a, b) = (values(&x), values(&gate));
            let both = Tensor::cat(&[&x, &gate], 1)?;
            let wanted: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a * sigmoid(*a) * b).collect();
            assert!(relative_rms(&values(&swiglu(&both)?), &wanted) < 1e-14);
            let wanted: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a * sigmoid(*b)).collect();
            assert!(relative_rms(&values(&gated(&x, &gate)?), &wanted) < 1e-14);
        }
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        check_gradients(&[normal(1, &[2, 3, 10])], |t| swiglu(&t[0]))?;
        check_gradients(&[normal(1, &[2, 3, 5]), normal(2, &[2, 3, 5])], |t| {
            gated(&t[0], &t[1])
        })?;
        for shape in [[1, 1, 2], [2, 63, 60], [3, 500, 34]] {
            check_precision(&[normal(1, &shape)], |t| swiglu(&t[0]), 1e-6)?;
            check_precision(
                &[normal(1, &shape), normal(2, &shape)],
                |t| gated(&t[0], &t[1]),
                1e-6,
            )?;
        }
        let large = [normal(1, &[300, 64]), normal(2, &[300, 64])];
        check_threads(&large[..1], |t| swiglu(&t[0]))?;
        check_threads(&large, |t| gated(&t[0], &t[1]))
    }

    #[test]
    fn far_arguments_stay_finite_and_nan_stays_nan() -> Result<()> {
        let x = Tensor::new(
            &[[-1e4f32, 1e4, f32::NAN, 1.0, 1.0, 1.0]],
            &candle_core::Device::Cpu,
        )?;
        let y = swiglu(&x)?.to_vec2::<f32>()?;
        assert!(
            y[0][0].abs() < 1e-30 && y[0][1] == 1e4 && y[0][2].is_nan(),
            "{y:?}"
        );
        let y = gated(&x.ones_like()?, &x)?.to_vec2::<f32>()?;
        assert!(y[0][0] < 1e-30 && y[0][1] == 1.0 && y[0][2].is_nan(), "{y:?}");
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit() -> Result<()> {
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        let x = normal(1, &[2, 3]);
        assert_eq!(
            message(swiglu(&x)),
            "swiglu: x has shape [2, 3], expected [.., 2 m]"
        );
        assert_eq!(
            message(gated(&x, &x.t()?)),
            "gated: gate has shape [3, 2], expected [2, 3] like x"
        );
        assert_eq!(
            message(gated(&x, &x.to_dtype(DType::F32)?)),
            "gated: gate is F32, expected F64 like x"
        );
        Ok(())
    }
}
