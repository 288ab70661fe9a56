//! Softmax cross-attention with normalised queries and keys: from one stream to another, or to the text.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::attention::attention;

use crate::linear::{Linear, Start};
use crate::norm::RmsNorm;

/// Attention of `dim`-wide tokens over `context`-wide tokens.
#[derive(Clone, Debug)]
pub struct CrossAttention {
    heads: usize,
    query: Linear,
    key_value: Linear,
    query_norm: RmsNorm,
    key_norm: RmsNorm,
    output: Linear,
}

impl CrossAttention {
    /// Takes `query`, `key_value`, `query_norm`, `key_norm` and `output`; `inner` is the width over all heads.
    pub fn new(
        dim: usize,
        context: usize,
        inner: usize,
        heads: usize,
        start: Start,
        vb: &VarBuilder,
    ) -> Result<Self> {
        if heads == 0 || !inner.is_multiple_of(heads) {
            candle_core::bail!("cross-attention: width {inner} does not split into {heads} heads");
        }
        Ok(Self {
            heads,
            query: Linear::new(dim, inner, false, Start::FanIn, &vb.pp("query"))?,
            key_value: Linear::new(context, 2 * inner, false, Start::FanIn, &vb.pp("key_value"))?,
            query_norm: RmsNorm::new(inner / heads, &vb.pp("query_norm"))?,
            key_norm: RmsNorm::new(inner / heads, &vb.pp("key_norm"))?,
            output: Linear::new(inner, dim, false, start, &vb.pp("output"))?,
        })
    }

    /// `x` `[B, N, dim]` reads from `context` `[B, L, context]`; `mask` `[B, L]` is 1 where the context is valid.
    ///
    /// A fully masked context gives the mean of its values (no NaN).
    pub fn forward(&self, x: &Tensor, context: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let length = context.dim(1)?;
        let q = self.query.forward(x)?;
        let inner = q.dim(2)?;
        let kv = self.key_value.forward(context)?;
        let split = |x: &Tensor, n: usize| x.reshape((batch, n, self.heads, inner / self.heads));
        let q = self.query_norm.forward(&split(&q, tokens)?)?;
        let k = self
            .key_norm
            .forward(&split(&kv.narrow(2, 0, inner)?.contiguous()?, length)?)?;
        let v = split(&kv.narrow(2, inner, inner)?.contiguous()?, length)?;
        let o = attention(&q, &k, &v, mask)?.reshape((batch, tokens, inner))?;
        self.output.forward(&o)
    }
}
