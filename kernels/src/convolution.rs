//! Convolutions of channels-last pictures that keep their sides, as one node of the graph.
//!
//! ```text
//! y[p] = sum over taps k of x[p + d_k] W_k^T + b
//! dx[p] = sum over taps k of dy[p - d_k] W_k        dW_k = sum over p of dy[p]^T x[p + d_k]        db = sum over p of dy[p]
//! ```
//!
//! Forward and backward are products with neighbours side by side ([`unfold`]): dx is the convolution of dy with the taps in the other
//! order. Neighbours are made again for dW rather than kept: they are as many times larger than the picture as there are taps.

use crate::autograd::{Gradient, Value, attach3};
use crate::error::OpError;
use crate::linear::linear;
use crate::rows::sum_rows;
use crate::tape::{Needs, Set};
use crate::unfold::{Window, unfold};
use candle_core::{Result, Tensor};
use std::ops::Range;

const OP: &str = "convolution";

/// The convolution of `x` [B, H, W, I] by `weight` [O, size^2 I], taps outside, and `bias` [O], with zeros around: [B, H, W, O] in the type
/// of `x`. `size` is odd. Neighbours of `at_a_time` places lie side by side at once.
///
/// Differentiable in all three. `x` is f32 or f64 on the CPU, f32 or bf16 on CUDA; weights and biases are f32 masters, or of its type.
///
/// # Errors
/// If a shape, an element type or a device does not fit.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use fulgur_kernels::convolution::convolution;
/// let x = Tensor::new(&[1f32, 2.0, 4.0], &Device::Cpu)?.reshape((1, 1, 3, 1))?;
/// let sum = Tensor::ones((1, 9), DType::F32, &Device::Cpu)?;
/// let y = convolution(&x, &sum, &Tensor::zeros(1, DType::F32, &Device::Cpu)?, 3, 64)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [3.0, 7.0, 6.0]);
/// # candle_core::Result::Ok(())
/// ```
pub fn convolution(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    size: usize,
    at_a_time: usize,
) -> Result<Tensor> {
    let &[_, _, _, input] = x.dims() else {
        return Err(OpError::shape(OP, "x", x, "[B, H, W, I]").into());
    };
    if size.is_multiple_of(2) || at_a_time == 0 {
        let found = format!("{size} and {at_a_time}");
        return Err(OpError::value(OP, "size and at_a_time", found, "an odd number, and one or more").into());
    }
    let taps = size * size;
    let output = match weight.dims() {
        &[output, width] if width == taps * input => output,
        _ => return Err(OpError::shape(OP, "weight", weight, format!("[O, {}]", taps * input)).into()),
    };
    if bias.dims() != [output] {
        return Err(OpError::shape(OP, "bias", bias, format!("[{output}]")).into());
    }
    let (x, weight, bias) = (x.contiguous()?, weight.contiguous()?, bias.contiguous()?);
    let own = Convolution {
        window: Window {
            size,
            stride: 1,
            padding: [size / 2; 2],
        },
        at_a_time,
        rounded: weight.detach().to_dtype(x.dtype())?,
    };
    let y = own.mapped(&x, &own.rounded, Some(&bias.detach()))?;
    attach3(Value::Tensor(y), [&x, &weight, &bias], own)
}

struct Convolution {
    window: Window,
    at_a_time: usize,
    /// The weight in the type of x.
    rounded: Tensor,
}

impl Convolution {
    fn parts(&self, x: &Tensor) -> Result<Vec<Range<usize>>> {
        let (batch, high, wide, _) = x.dims4()?;
        let places = batch * high * wide;
        let starts = (0..places).step_by(self.at_a_time);
        Ok(starts
            .map(|start| start..places.min(start + self.at_a_time))
            .collect())
    }

    /// Neighbours of all places of `x` by `matrix` [N, taps C]: [B, H, W, N].
    fn mapped(&self, x: &Tensor, matrix: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (batch, high, wide, _) = x.dims4()?;
        let parts = self.parts(x)?.into_iter();
        let parts: Vec<Tensor> = parts
            .map(|places| linear(&unfold(x, self.window, places)?, matrix, bias))
            .collect::<Result<_>>()?;
        match parts.as_slice() {
            [one] => one.clone(),
            _ => Tensor::cat(&parts, 0)?,
        }
        .reshape((batch, high, wide, matrix.dim(0)?))
    }

    /// The weight that leads back, [I, taps O]: taps in the other order.
    fn turned(&self, input: usize) -> Result<Tensor> {
        let taps = self.window.size * self.window.size;
        let output = self.rounded.dim(0)?;
        let weight = self.rounded.reshape((output, taps, input))?;
        let taps: Vec<Tensor> = (0..taps)
            .rev()
            .map(|tap| weight.narrow(1, tap, 1)?.permute((2, 1, 0)))
            .collect::<Result<_>>()?;
        Tensor::cat(&taps, 1)?.contiguous()?.reshape((input, ()))
    }
}

impl Gradient<3> for Convolution {
    fn name(&self) -> &'static str {
        OP
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::of(&[0]))
    }

    fn holds(&self) -> Vec<Tensor> {
        vec![self.rounded.clone()]
    }

    fn backward(
        &self,
        [x, weight, bias]: [&Tensor; 3],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let (input, output) = (x.dim(3)?, self.rounded.dim(0)?);
        let grad = grad.contiguous()?;
        let rows = grad.reshape(((), output))?;
        let dx = match x.track_op() {
            true => Some(self.mapped(&grad, &self.turned(input)?, None)?),
            false => None,
        };
        let mut dweight: Option<Tensor> = None;
        if weight.track_op() {
            let x = x.detach();
            for places in self.parts(&x)? {
                let own = rows.narrow(0, places.start, places.len())?;
                let part = own.t()?.matmul(&unfold(&x, self.window, places)?)?;
                let part = part.to_dtype(weight.dtype())?;
                dweight = Some(match dweight {
                    None => part,
                    Some(sum) => (sum + part)?,
                });
            }
        }
        let dbias = match bias.track_op() {
            true => Some(sum_rows(&rows)?.to_dtype(bias.dtype())?),
            false => None,
        };
        Ok([dx, dweight, dbias])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normal;
    use candle_core::Var;

    /// Candle's own convolution, whose pictures and kernels are channels-first, with its gradients.
    #[test]
    fn values_and_gradients_are_those_of_a_convolution() -> Result<()> {
        for (size, [batch, high, wide], at_a_time) in [
            (3, [2, 5, 7], 1000),
            (3, [2, 5, 7], 13),
            (1, [1, 4, 3], 5),
            (5, [1, 2, 6], 4),
            (3, [3, 1, 1], 2),
        ] {
            let (input, output, taps) = (3, 4, size * size);
            let x = Var::from_tensor(&normal(1, &[batch, high, wide, input]))?;
            let weight = Var::from_tensor(&normal(2, &[output, taps * input]))?;
            let bias = Var::from_tensor(&normal(3, &[output]))?;
            let adjoint = normal(4, &[batch, high, wide, output]);
            let expected = {
                let kernel = weight
                    .reshape((output, size, size, input))?
                    .permute((0, 3, 1, 2))?
                    .contiguous()?;
                let pictures = x.permute((0, 3, 1, 2))?.contiguous()?;
                let y = pictures.conv2d(&kernel, size / 2, 1, 1, 1)?;
                y.permute((0, 2, 3, 1))?.broadcast_add(&bias)?
            };
            let of_graph = |y: &Tensor| (y * &adjoint)?.sum_all()?.backward();
            let wanted = of_graph(&expected)?;
            let found = of_graph(&convolution(&x, &weight, &bias, size, at_a_time)?)?;
            let (loss, tape) = crate::tape::record(|| {
                (convolution(&x, &weight, &bias, size, at_a_time)? * &adjoint)?.sum_all()
            });
            let noted = tape.backward(&loss?)?;
            let far = |a: &Tensor, b: &Tensor| (a - b)?.abs()?.max_all()?.to_scalar::<f64>();
            let y = convolution(&x, &weight, &bias, size, at_a_time)?;
            assert!(far(&y, &expected)? < 1e-12, "{size} {at_a_time}");
            for var in [&x, &weight, &bias] {
                for store in [&found, &noted] {
                    let (Some(found), Some(wanted)) = (store.get(var), wanted.get(var)) else {
                        candle_core::bail!("no gradient");
                    };
                    assert!(far(found, wanted)? < 1e-11, "{size} {at_a_time}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let (x, weight, bias) = (normal(1, &[1, 4, 4, 2]), normal(2, &[3, 18]), normal(3, &[3]));
        let line = |x: &Tensor, weight: &Tensor, bias: &Tensor, size, at_a_time| {
            convolution(x, weight, bias, size, at_a_time)
                .unwrap_err()
                .to_string()
        };
        for (found, words) in [
            (line(&weight, &weight, &bias, 3, 1), "x has shape [3, 18]"),
            (line(&x, &weight, &bias, 5, 1), "weight has shape [3, 18]"),
            (line(&x, &weight, &weight, 3, 1), "bias has shape [3, 18]"),
            (line(&x, &weight, &bias, 2, 1), "size and at_a_time is 2 and 1"),
            (line(&x, &weight, &bias, 3, 0), "size and at_a_time is 3 and 0"),
        ] {
            assert!(found.contains(words), "{words}: {found}");
        }
    }
}
