//! Attention of the published networks: plain heads, scaled by their width, over the same tokens or over those of a context.

use candle_core::{DType, Result, Tensor, bail};
use candle_nn::VarBuilder;
use fulgur_kernels::attention::{Options, attention, softmax};
use fulgur_lightnet::linear::{Joined, Linear, Start};

/// Widest heads, and what their width is a multiple of, that tensor cores take tile by tile.
const WIDEST_TILE: usize = 128;
const TILE_STEP: usize = 8;

/// Attention of `q` `[B, N, H, D]` over `k` and `v` `[B, L, H, D]`, of any strides: `[B, N, H D]`.
///
/// On a GPU heads that are too wide for tiles take the form that keeps the scores: published networks have them where pictures are
/// smallest. `upcast` computes in f32 whatever the inputs are.
pub(crate) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, upcast: bool) -> Result<Tensor> {
    let (batch, tokens, heads, width) = q.dims4()?;
    let dtype = q.dtype();
    let merged = |o: Tensor| o.reshape((batch, tokens, heads * v.dim(3)?))?.to_dtype(dtype);
    if upcast && dtype != DType::F32 {
        let wide = |x: &Tensor| x.to_dtype(DType::F32);
        return merged(attention(&wide(q)?, &wide(k)?, &wide(v)?, None)?);
    }
    let in_tiles = q.device().is_cpu() || (width <= WIDEST_TILE && width.is_multiple_of(TILE_STEP));
    merged(match in_tiles {
        true => softmax(q, k, v, &Options::default())?,
        false => attention(q, k, v, None)?,
    })
}

/// Widths of an attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionShape {
    /// Of the tokens that ask.
    pub(crate) query: usize,
    /// Of the tokens that answer; none where they are the same.
    pub(crate) context: Option<usize>,
    /// Of all heads together.
    pub(crate) inner: usize,
    /// Number of heads.
    pub(crate) heads: usize,
    /// Whether the maps to heads have biases.
    pub(crate) bias: bool,
    /// Whether scores are computed in f32 whatever the tokens are.
    pub(crate) upcast: bool,
}

/// Maps to heads, and back.
#[derive(Clone, Debug)]
pub(crate) struct Attention {
    shape: AttentionShape,
    /// None where the tokens are the same: then all maps are one product.
    query: Option<Linear>,
    others: Joined,
    output: Linear,
}

impl Attention {
    /// Takes `to_q`, `to_k`, `to_v` and `to_out.0`.
    pub(crate) fn new(shape: AttentionShape, vb: &VarBuilder) -> Result<Self> {
        let AttentionShape {
            query,
            context,
            inner,
            heads,
            bias,
            ..
        } = shape;
        if heads == 0 || !inner.is_multiple_of(heads) {
            bail!("attention: width {inner} does not split into {heads} heads");
        }
        let map = |input: usize, name: &str| Linear::new(input, inner, bias, Start::FanIn, &vb.pp(name));
        let from = context.unwrap_or(query);
        let (asking, key, value) = (map(query, "to_q")?, map(from, "to_k")?, map(from, "to_v")?);
        let (query_map, others) = match context {
            Some(_) => (Some(asking), vec![key, value]),
            None => (None, vec![asking, key, value]),
        };
        Ok(Self {
            shape,
            query: query_map,
            others: Joined::new(others)?,
            output: Linear::new(inner, query, true, Start::FanIn, &vb.pp("to_out.0"))?,
        })
    }

    /// `x` `[B, N, query]` reads from `context` `[B, L, context]`, which those that have one of their own width need.
    pub(crate) fn forward(&self, x: &Tensor, context: Option<&Tensor>) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let AttentionShape { inner, heads, .. } = self.shape;
        let width = inner / heads;
        let source = match (&self.query, context) {
            (None, _) => x,
            (Some(_), Some(context)) => context,
            (Some(_), None) => bail!("attention: expected the states of a text"),
        };
        let length = source.dim(1)?;
        let parts = self.others.maps().len();
        let made = self
            .others
            .forward(source)?
            .reshape(vec![batch, length, parts, heads, width])?;
        let part = |index: usize| made.narrow(2, index, 1)?.squeeze(2);
        let (k, v) = (part(parts - 2)?, part(parts - 1)?);
        let q = match &self.query {
            Some(query) => query.forward(x)?.reshape((batch, tokens, heads, width))?,
            None => part(0)?,
        };
        self.output.forward(&attend(&q, &k, &v, self.shape.upcast)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{apart, normal, perturb};
    use candle_core::{D, Device};
    use fulgur_lightnet::params::Params;

    /// Softmax attention out of plain operations.
    fn expected(params: &Params, x: &Tensor, context: &Tensor, heads: usize) -> Result<Tensor> {
        let vars = params.vars();
        let map = |x: &Tensor, name: &str| {
            let y = x.broadcast_matmul(&vars[&format!("{name}.weight")].as_tensor().t()?)?;
            match vars.get(&format!("{name}.bias")) {
                Some(bias) => y.broadcast_add(bias.as_tensor()),
                None => Ok(y),
            }
        };
        let split = |x: Tensor| {
            let (batch, tokens, inner) = x.dims3()?;
            x.reshape((batch, tokens, heads, inner / heads))?
                .transpose(1, 2)?
                .contiguous()
        };
        let (q, k, v) = (
            split(map(x, "to_q")?)?,
            split(map(context, "to_k")?)?,
            split(map(context, "to_v")?)?,
        );
        let scores = (q.matmul(&k.t()?)? * (q.dim(D::Minus1)? as f64).powf(-0.5))?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
        let mixed = weights
            .matmul(&v)?
            .transpose(1, 2)?
            .contiguous()?
            .flatten_from(2)?;
        map(&mixed, "to_out.0")
    }

    #[test]
    fn heads_read_tokens_and_contexts() -> Result<()> {
        let x = normal("x", &[2, 5, 6])?;
        let text = normal("text", &[2, 3, 4])?;
        for (context, bias) in [(None, true), (None, false), (Some(4), false)] {
            let params = Params::random(6, &Device::Cpu);
            let shape = AttentionShape {
                query: 6,
                context,
                inner: 8,
                heads: 2,
                bias,
                upcast: true,
            };
            let attention = Attention::new(shape, &params.builder())?;
            perturb(&params, 0.5)?;
            let source = if context.is_some() { &text } else { &x };
            let far = apart(
                &attention.forward(&x, Some(&text))?,
                &expected(&params, &x, source, 2)?,
            )?;
            assert!(far < 1e-5, "{context:?} {far}");
            assert_eq!(attention.forward(&x, None).is_err(), context.is_some());
        }
        Ok(())
    }
}
