//! Short convolution along the tokens, each channel by itself (arXiv 2302.10866, section 3.1): what lets a token of a recurrent
//! model see its neighbours.
//!
//! ```text
//! y_tc = sum over j < W of w_cj x_{t + j - before, c}        x is zero before its first token and behind its last
//! dx_sc = sum over j of w_cj dy_{s + before - j, c}          dw_cj = sum over batches and t of dy_tc x_{t + j - before, c}
//! ```
//!
//! With W - 1 zeros before and none behind it is causal, and W - 1 tokens of history in the place of zeros go on from earlier
//! ones. Sums go through partial sums of fixed runs of tokens, so that they have the same bits each time.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use crate::autograd::{Gradient, Value, attach2};
use crate::error::OpError;
use crate::pass::{check_beside, check_kind};
use crate::tape::{Needs, Set};
use candle_core::{DType, Result, Tensor};

/// Zeros at the ends of the tokens.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Padding {
    /// In front of the first.
    pub before: usize,
    /// Behind the last.
    pub behind: usize,
}

impl Padding {
    /// None: the first result belongs to token W - 1.
    pub const NONE: Self = Self { before: 0, behind: 0 };

    /// No token sees what comes behind it.
    pub fn causal(taps: usize) -> Self {
        Self {
            before: taps.saturating_sub(1),
            behind: 0,
        }
    }

    /// A token sees as many on each side; of an even number of taps one more in front of it.
    pub fn centred(taps: usize) -> Self {
        let behind = taps.saturating_sub(1) / 2;
        Self {
            before: taps.saturating_sub(1) - behind,
            behind,
        }
    }
}

/// One call.
#[derive(Clone, Copy, Debug)]
struct ShortConv {
    batch: usize,
    tokens: usize,
    /// Tokens of the result.
    out: usize,
    channels: usize,
    taps: usize,
    before: usize,
}

/// Convolves `x` `[B, N, C]` with `weights` `[C, W]`, `[B, N + before + behind - W + 1, C]`.
///
/// Differentiable in both. `x` is f32 or f64 on the CPU, f32 or bf16 on CUDA; weights are of its type or f32.
///
/// # Errors
/// If a shape, an element type or a device does not fit, or there are fewer tokens than taps.
pub fn short_conv(x: &Tensor, weights: &Tensor, padding: Padding) -> Result<Tensor> {
    const OP: &str = "short_conv";
    let &[batch, tokens, channels] = x.dims() else {
        return Err(OpError::shape(OP, "x", x, "[B, N, C]").into());
    };
    let &[rows, taps] = weights.dims() else {
        return Err(OpError::shape(OP, "weights", weights, "[C, W]").into());
    };
    if rows != channels || taps == 0 {
        let expected = format!("[{channels}, W] with W of at least 1");
        return Err(OpError::shape(OP, "weights", weights, expected).into());
    }
    check_kind(OP, x)?;
    check_beside(OP, x, "weights", weights)?;
    let padded = tokens
        .saturating_add(padding.before)
        .saturating_add(padding.behind);
    if padding.before.max(padding.behind) >= taps || padded < taps {
        let found = format!("{tokens} tokens, {padding:?}");
        let expected = format!("{taps} tokens or more with less than {taps} zeros on a side");
        return Err(OpError::value(OP, "x", found, expected).into());
    }
    let call = ShortConv {
        batch,
        tokens,
        out: padded + 1 - taps,
        channels,
        taps,
        before: padding.before,
    };
    let (x, weights) = (x.contiguous()?, weights.contiguous()?);
    attach2(call.forward(&x, &weights)?, [&x, &weights], call)
}

impl ShortConv {
    fn forward(&self, x: &Tensor, weights: &Tensor) -> Result<Value> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return match x.dtype() {
                DType::BF16 => cuda::forward::<half::bf16>(self, x, weights),
                _ => cuda::forward::<f32>(self, x, weights),
            };
        }
        match x.dtype() {
            DType::F64 => cpu::forward::<f64>(self, x, weights),
            _ => cpu::forward::<f32>(self, x, weights),
        }
    }
}

impl Gradient<2> for ShortConv {
    fn name(&self) -> &'static str {
        "short_conv"
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::ALL)
    }

    fn backward(&self, [x, weights]: [&Tensor; 2], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let grad = grad.contiguous()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            let [dx, dw] = match x.dtype() {
                DType::BF16 => cuda::backward::<half::bf16>(self, x, weights, &grad)?,
                _ => cuda::backward::<f32>(self, x, weights, &grad)?,
            };
            return Ok([Some(dx), Some(dw.to_dtype(weights.dtype())?)]);
        }
        let [dx, dw] = match x.dtype() {
            DType::F64 => cpu::backward::<f64>(self, x, weights, &grad)?,
            _ => cpu::backward::<f32>(self, x, weights, &grad)?,
        };
        Ok([Some(dx), Some(dw.to_dtype(weights.dtype())?)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, check_precision, check_threads, normal, relative_rms, values};

    /// The definition, element by element.
    fn literal(
        x: &[f64],
        w: &[f64],
        [batch, tokens, channels, taps]: [usize; 4],
        padding: Padding,
    ) -> Vec<f64> {
        let out = tokens + padding.before + padding.behind + 1 - taps;
        let mut y = Vec::new();
        for b in 0..batch {
            for t in 0..out {
                for c in 0..channels {
                    let mut sum = 0.0;
                    for j in 0..taps {
                        let at = (t + j) as i64 - padding.before as i64;
                        if (0..tokens as i64).contains(&at) {
                            sum += w[c * taps + j] * x[(b * tokens + at as usize) * channels + c];
                        }
                    }
                    y.push(sum);
                }
            }
        }
        y
    }

    /// Sizes, and all paddings that are used.
    fn cases() -> Vec<([usize; 4], Padding)> {
        let sizes = [
            [1, 1, 1, 1],
            [2, 5, 3, 4],
            [1, 9, 7, 3],
            [3, 4, 2, 4],
            [2, 140, 33, 5],
            [1, 12, 4, 11],
        ];
        let paddings = |taps| [Padding::NONE, Padding::causal(taps), Padding::centred(taps)];
        sizes
            .into_iter()
            .flat_map(|sizes| paddings(sizes[3]).map(|padding| (sizes, padding)))
            .collect()
    }

    #[test]
    fn agrees_with_the_definition() -> Result<()> {
        for (sizes, padding) in cases() {
            let [batch, tokens, channels, taps] = sizes;
            let (x, w) = (
                normal(1, &[batch, tokens, channels]),
                normal(2, &[channels, taps]),
            );
            let found = values(&short_conv(&x, &w, padding)?);
            let wanted = literal(&values(&x), &values(&w), sizes, padding);
            assert_eq!(found.len(), wanted.len());
            assert!(relative_rms(&found, &wanted) < 1e-14, "{sizes:?} {padding:?}");
        }
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        for (sizes, padding) in cases() {
            let [batch, tokens, channels, taps] = sizes;
            let inputs = [
                normal(3, &[batch, tokens, channels]),
                normal(4, &[channels, taps]),
            ];
            if tokens < 100 {
                check_gradients(&inputs, |t| short_conv(&t[0], &t[1], padding))?;
            }
            check_precision(&inputs, |t| short_conv(&t[0], &t[1], padding), 1e-5)?;
            check_threads(&inputs, |t| short_conv(&t[0], &t[1], padding))?;
        }
        Ok(())
    }

    /// What went before in the place of zeros: tokens may come in any pieces.
    #[test]
    fn history_goes_on() -> Result<()> {
        let (x, w) = (normal(5, &[2, 9, 6]), normal(6, &[6, 4]));
        let whole = short_conv(&x, &w, Padding::causal(4))?;
        let before = x.narrow(1, 1, 8)?;
        let later = short_conv(&before, &w, Padding::NONE)?;
        assert_eq!(values(&later), values(&whole.narrow(1, 4, 5)?.contiguous()?));
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let (x, w) = (normal(7, &[2, 3, 4]), normal(8, &[4, 3]));
        let message = |x: &Tensor, w: &Tensor, padding| short_conv(x, w, padding).unwrap_err().to_string();
        assert_eq!(
            message(&x, &normal(8, &[5, 3]), Padding::NONE),
            "short_conv: weights has shape [5, 3], expected [4, W] with W of at least 1"
        );
        assert_eq!(
            message(&x.narrow(1, 0, 2).unwrap(), &w, Padding::NONE),
            "short_conv: x is 2 tokens, Padding { before: 0, behind: 0 }, expected 3 tokens or more with less than 3 zeros on a side"
        );
        let far = Padding { before: 3, behind: 0 };
        assert!(message(&x, &w, far).contains("less than 3 zeros"));
        let half = x.to_dtype(DType::F16).unwrap();
        assert_eq!(
            message(&half, &w, Padding::NONE),
            "short_conv: x is F16, expected f32 or f64 on the CPU, f32 or bf16 on CUDA"
        );
    }
}
