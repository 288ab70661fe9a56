//! The mixer's entry: queries, logits and values as one matrix product leaves them.

use super::{NonCausal, noncausal};
use crate::error::OpError;
use candle_core::{Result, Tensor};

/// The recurrence on fused projections `x` `[B, N, 2 H D + H E]`: queries (their SiLU is taken here), logits and values
/// of all `heads` side by side, `key_width` D each. Gives `[B, N, H E]` in the type of `x`.
///
/// Equal to [`noncausal`] on the parts of `x`. On CUDA, for bf16, phases `[N, D]` and no exchange: with D and E of 32 or 64 fused
/// kernels read `x` in place, forward and backward, and sum in f32; with other multiples of 4, kernels and matrix products; else
/// the parts are taken out.
/// Differentiable in `x` and the phases.
///
/// # Errors
/// If shapes do not fit, as for [`noncausal`], and when the exchange fails.
pub fn projected(x: &Tensor, heads: usize, key_width: usize, options: &NonCausal<'_>) -> Result<Tensor> {
    const OP: &str = "additive::projected";
    let keys = heads * key_width;
    let sizes = x.dims3().ok().filter(|&(batch, tokens, width)| {
        keys > 0 && batch * tokens > 0 && width > 2 * keys && (width - 2 * keys).is_multiple_of(heads)
    });
    let Some((batch, tokens, width)) = sizes else {
        let expected = format!("[B, N, 2 H D + H E] with H = {heads}, D = {key_width}");
        return Err(OpError::shape(OP, "x", x, expected).into());
    };
    #[cfg(feature = "cuda")]
    if let Some(sizes) = super::cuda::Sizes::of(x, heads, key_width, options)? {
        return super::cuda::projected(x, sizes, options);
    }
    let part = |start: usize, width: usize| {
        x.narrow(2, start, width)?
            .reshape((batch, tokens, heads, width / heads))
    };
    let (q, logits, v) = (
        part(0, keys)?.silu()?,
        part(keys, keys)?,
        part(2 * keys, width - 2 * keys)?,
    );
    let (o, _state) = noncausal(&q, &logits, &v, options)?;
    o.reshape((batch, tokens, width - 2 * keys))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, check_precision, normal, relative_rms, values};

    const HEADS: usize = 2;
    const KEYS: usize = 3;

    fn run(t: &[Tensor]) -> Result<Tensor> {
        let options = NonCausal {
            phase: t.get(1),
            ..NonCausal::default()
        };
        projected(&t[0], HEADS, KEYS, &options)
    }

    #[test]
    fn is_the_recurrence_on_its_parts() -> Result<()> {
        let x = normal(1, &[2, 9, 2 * HEADS * KEYS + HEADS * 5]);
        let part = |start: usize, width: usize| {
            x.narrow(2, start, HEADS * width)?
                .contiguous()?
                .reshape((2, 9, HEADS, width))
        };
        let (o, _) = noncausal(
            &part(0, KEYS)?.silu()?,
            &part(6, KEYS)?,
            &part(12, 5)?,
            &NonCausal::default(),
        )?;
        let found = run(&[x])?;
        assert_eq!(found.dims(), [2, 9, 10]);
        assert!(relative_rms(&values(&found), &values(&o)) < 1e-14);
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let inputs = |n: usize| [normal(1, &[2, n, 22]), normal(2, &[n, KEYS])];
        check_gradients(&inputs(7)[..1], run)?;
        check_gradients(&inputs(7), run)?;
        check_precision(&inputs(200), run, 1e-5)
    }

    #[test]
    fn refuses_what_does_not_split() {
        let message = run(&[normal(1, &[2, 9, 13])]).unwrap_err().to_string();
        assert_eq!(
            message,
            "additive::projected: x has shape [2, 9, 13], expected [B, N, 2 H D + H E] with H = 2, D = 3"
        );
    }
}
