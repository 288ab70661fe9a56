//! The pre-norm transformer of CLIP (Radford et al., 2021), BLIP's pictures (Li et al., 2022) and ImageBind (Girdhar et al., 2023).
//!
//! ```text
//! x = x + W_o softmax(q k^T / sqrt(D) + mask) v + b_o        [q | k | v] = W_qkv LN(x) + b_qkv
//! x = x + W_2 gelu(W_1 LN(x) + b_1) + b_2
//! ```
//!
//! With a learned key and value (`bias_k`, `bias_v`) every sequence of keys has one more, the same for all.
//!
//! The stream, norms and softmax are f32; products are of the type that the encoder computes in. It serves as a frozen feature
//! extractor.
//!
//! Shapes: B batch, N tokens, d width, H heads, D = d / H.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use fulgur_kernels::attention::{Options, softmax};
use fulgur_kernels::linear::linear;
use fulgur_kernels::norm::layer_norm_to;
use fulgur_kernels::residual::{add_biased, add_branch};

use super::gelu::Gelu;

/// Sizes of a tower.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Width d of the stream.
    pub width: usize,
    /// Width of the layer in the middle of a feed-forward block.
    pub hidden: usize,
    /// Heads H; d is a multiple of it.
    pub heads: usize,
    /// Blocks.
    pub layers: usize,
    /// Added to the variance in every norm.
    pub eps: f64,
    /// The activation of the feed-forward blocks.
    pub gelu: Gelu,
    /// Whether there is a learned key and value behind those of the tokens.
    pub bias_kv: bool,
}

/// How a checkpoint names the parts of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    /// `norm_1`, `attn.in_proj_weight`, `norm_2`: ImageBind, as `torch.nn.MultiheadAttention`.
    Packed,
    /// `layer_norm1`, `self_attn.q_proj`, `layer_norm2`: CLIP of Hugging Face transformers.
    Separate,
    /// `layer_norm1`, `self_attn.qkv`, `self_attn.projection`, `layer_norm2`: BLIP of Hugging Face transformers.
    Joined,
}

/// A weight, which starts with the variance of its input kept.
fn matrix(output: usize, input: usize, name: &str, vb: &VarBuilder) -> Result<Tensor> {
    let stdev = (input as f64).powf(-0.5);
    vb.get_with_hints((output, input), name, Init::Randn { mean: 0.0, stdev })
}

/// A bias, position or learned token, which starts near zero.
pub(super) fn small(shape: impl Into<candle_core::Shape>, name: &str, vb: &VarBuilder) -> Result<Tensor> {
    let init = Init::Randn {
        mean: 0.0,
        stdev: 0.02,
    };
    vb.get_with_hints(shape.into(), name, init)
}

/// An affine map with its weight `[O, I]` in the type of products; the bias is f32.
#[derive(Clone, Debug)]
pub(super) struct Map {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Map {
    /// Takes `weight`, and `bias` when asked for.
    pub(super) fn new(
        input: usize,
        output: usize,
        bias: bool,
        compute: DType,
        vb: &VarBuilder,
    ) -> Result<Self> {
        Ok(Self {
            weight: matrix(output, input, "weight", vb)?.to_dtype(compute)?,
            bias: bias.then(|| small(output, "bias", vb)).transpose()?,
        })
    }

    /// A map of a weight `[O, ..]` whose other axes are one.
    pub(super) fn of(weight: &Tensor, compute: DType) -> Result<Self> {
        Ok(Self {
            weight: weight.flatten_from(1)?.to_dtype(compute)?.contiguous()?,
            bias: None,
        })
    }

    /// The same map, and a bias `[O]` in f32.
    pub(super) fn with_bias(self, bias: Tensor) -> Self {
        Self {
            bias: Some(bias),
            ..self
        }
    }

    /// `[.., I]` in the type of products to `[.., O]` of the same type.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // The fused map knows f32 and bf16.
        if x.dtype() != DType::F16 {
            return linear(x, &self.weight, self.bias.as_ref());
        }
        let y = self.product(x)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?),
            None => Ok(y),
        }
    }

    /// Without the bias.
    fn product(&self, x: &Tensor) -> Result<Tensor> {
        if x.dtype() != DType::F16 {
            return linear(x, &self.weight, None);
        }
        let mut dims = x.dims().to_vec();
        let input = dims.pop().unwrap_or_default();
        dims.push(self.weight.dim(0)?);
        let rows = x.contiguous()?.reshape(((), input))?;
        rows.matmul(&self.weight.t()?)?.reshape(dims)
    }
}

/// A layer norm of the f32 stream.
#[derive(Clone, Debug)]
pub(super) struct Norm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl Norm {
    pub(super) fn new(width: usize, eps: f64, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get_with_hints(width, "weight", Init::Const(1.0))?,
            bias: small(width, "bias", vb)?,
            eps,
        })
    }

    /// The norm over the last axis of f32 `x`, in `dtype`.
    pub(super) fn forward(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        let made = match dtype {
            DType::F16 => DType::F32,
            other => other,
        };
        layer_norm_to(x, Some(&self.weight), Some(&self.bias), self.eps, made)?.to_dtype(dtype)
    }
}

#[derive(Clone, Debug)]
struct Block {
    norms: [Norm; 2],
    /// Queries, keys and values side by side.
    qkv: Map,
    /// A key and a value `[1, 1, d]`.
    extra: Option<[Tensor; 2]>,
    out: Map,
    inner: Map,
    outer: Map,
    gelu: Gelu,
    heads: usize,
}

impl Block {
    fn new(shape: &Shape, names: Names, compute: DType, vb: &VarBuilder) -> Result<Self> {
        let Shape {
            width, hidden, eps, ..
        } = *shape;
        let (first, second, attention) = match names {
            Names::Packed => ("norm_1", "norm_2", "attn"),
            Names::Separate | Names::Joined => ("layer_norm1", "layer_norm2", "self_attn"),
        };
        let attn = vb.pp(attention);
        let (weight, bias) = match names {
            Names::Packed => (
                matrix(3 * width, width, "in_proj_weight", &attn)?,
                small(3 * width, "in_proj_bias", &attn)?,
            ),
            Names::Joined => (
                matrix(3 * width, width, "qkv.weight", &attn)?,
                small(3 * width, "qkv.bias", &attn)?,
            ),
            Names::Separate => {
                let parts = ["q_proj", "k_proj", "v_proj"].map(|name| attn.pp(name));
                let weights = parts.each_ref().map(|part| matrix(width, width, "weight", part));
                let biases = parts.each_ref().map(|part| small(width, "bias", part));
                let [q, k, v] = weights;
                let [qb, kb, vb] = biases;
                (Tensor::cat(&[q?, k?, v?], 0)?, Tensor::cat(&[qb?, kb?, vb?], 0)?)
            }
        };
        let extra = match shape.bias_kv {
            true => {
                let row = |name: &str| small((1, 1, width), name, &attn)?.to_dtype(compute);
                Some([row("bias_k")?, row("bias_v")?])
            }
            false => None,
        };
        let out = match names {
            Names::Packed | Names::Separate => "out_proj",
            Names::Joined => "projection",
        };
        Ok(Self {
            norms: [
                Norm::new(width, eps, &vb.pp(first))?,
                Norm::new(width, eps, &vb.pp(second))?,
            ],
            qkv: Map {
                weight: weight.to_dtype(compute)?,
                bias: Some(bias),
            },
            extra,
            out: Map::new(width, width, true, compute, &attn.pp(out))?,
            inner: Map::new(width, hidden, true, compute, &vb.pp("mlp.fc1"))?,
            outer: Map::new(hidden, width, true, compute, &vb.pp("mlp.fc2"))?,
            gelu: shape.gelu,
            heads: shape.heads,
        })
    }

    fn forward(&self, x_bnd: &Tensor, compute: DType, meeting: &Meeting) -> Result<Tensor> {
        let (batch, tokens, width) = x_bnd.dims3()?;
        let qkv = self.qkv.forward(&self.norms[0].forward(x_bnd, compute)?)?;
        let qkv_bn3hd = qkv.reshape((batch, tokens, 3, self.heads, width / self.heads))?;
        let part = |i: usize| qkv_bn3hd.narrow(2, i, 1)?.squeeze(2);
        let (q, mut k, mut v) = (part(0)?, part(1)?, part(2)?);
        if let Some([key, value]) = &self.extra {
            let longer = |x: &Tensor, row: &Tensor| {
                let row = row.reshape((1, 1, self.heads, width / self.heads))?;
                let row = row.broadcast_as((batch, 1, self.heads, width / self.heads))?;
                Tensor::cat(&[x, &row], 1)
            };
            (k, v) = (longer(&k, key)?, longer(&v, value)?);
        }
        let mixed = attend(&q, &k, &v, meeting)?.reshape((batch, tokens, width))?;
        // Biases are added by what reads the products.
        let x_bnd = join(x_bnd, &mixed, &self.out)?;
        let h = self.inner.product(&self.norms[1].forward(&x_bnd, compute)?)?;
        let h = self.gelu.behind(&h, self.inner.bias.as_ref())?;
        join(&x_bnd, &h, &self.outer)
    }
}

/// Which keys a query meets.
pub(super) struct Meeting<'a> {
    pub(super) causal: bool,
    pub(super) mask: Option<&'a Tensor>,
}

/// Attention of `[B, N, H, D]` over `[B, L, H, D]`.
pub(super) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, meeting: &Meeting) -> Result<Tensor> {
    if q.dtype() != DType::F16 {
        let options = Options {
            causal: meeting.causal,
            mask: meeting.mask,
            ..Options::default()
        };
        return softmax(q, k, v, &options);
    }
    // The fused operator knows f32 and bf16.
    let rows = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    let (batch, tokens, _, width) = q.dims4()?;
    let keys = k.dim(1)?;
    let q = (rows(q)? * (width as f64).powf(-0.5))?;
    let mut scores = q.matmul(&rows(k)?.t()?)?.to_dtype(DType::F32)?;
    let far = f64::from(f32::MIN) / 4.0;
    if meeting.causal {
        let later = (0..tokens * keys).map(|at| f32::from(u8::from(at % keys > at / keys)));
        let later = Tensor::from_iter(later, q.device())?.reshape((1, 1, tokens, keys))?;
        scores = scores.broadcast_add(&(later * far)?)?;
    }
    if let Some(mask) = meeting.mask {
        let hidden = mask.to_dtype(DType::F32)?.affine(-1.0, 1.0)?;
        scores = scores.broadcast_add(&(hidden.reshape((batch, 1, 1, keys))? * far)?)?;
    }
    let weights = candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(DType::F16)?;
    weights.matmul(&rows(v)?)?.transpose(1, 2)
}

/// The f32 stream `x` with the branch that `map` makes of `input`.
pub(super) fn join(x: &Tensor, input: &Tensor, map: &Map) -> Result<Tensor> {
    let branch = match map.product(input)? {
        branch if branch.dtype() == DType::F16 => branch.to_dtype(DType::F32)?,
        branch => branch,
    };
    match &map.bias {
        Some(bias) => add_biased(x, &branch, bias),
        None => add_branch(x, &branch, None),
    }
}

/// A stack of blocks.
#[derive(Clone, Debug)]
pub struct Transformer {
    blocks: Vec<Block>,
    compute: DType,
}

impl Transformer {
    /// Takes the tensors of blocks `0 .. layers` from `vb`, which gives f32; products are of type `compute`.
    ///
    /// # Errors
    /// A width that heads do not divide, tensors that are missing or of another shape.
    pub fn new(shape: &Shape, names: Names, compute: DType, vb: &VarBuilder) -> Result<Self> {
        if shape.heads == 0 || !shape.width.is_multiple_of(shape.heads) {
            candle_core::bail!(
                "{} heads, expected a divisor of the width {}",
                shape.heads,
                shape.width
            );
        }
        let blocks = (0..shape.layers).map(|i| Block::new(shape, names, compute, &vb.pp(i)));
        Ok(Self {
            blocks: blocks.collect::<Result<_>>()?,
            compute,
        })
    }

    /// The stream `[B, N, d]` in f32 behind the last block.
    ///
    /// With `causal` a token sees those before it and itself. `mask` `[B, N]` is zero where a token is padding, which none sees.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(&self, x_bnd: &Tensor, causal: bool, mask: Option<&Tensor>) -> Result<Tensor> {
        let meeting = Meeting { causal, mask };
        let mut x_bnd = x_bnd.clone();
        for block in &self.blocks {
            x_bnd = block.forward(&x_bnd, self.compute, &meeting)?;
        }
        Ok(x_bnd)
    }
}

/// Vectors of the last axis, in f32, divided by their length where that is above `least`.
pub(super) fn unit(x: &Tensor, least: f64) -> Result<Tensor> {
    let length = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    x.broadcast_div(&length.maximum(least)?)
}

/// Patches of `[B, C, T, H, W]` side by side as vectors `[B, T/t H/h W/w, C t h w]`, in the order of a convolution's weight. What is left
/// over at the far edges is not seen.
pub(super) fn patches(x: &Tensor, [t, h, w]: [usize; 3]) -> Result<Tensor> {
    let (batch, channels, frames, height, width) = x.dims5()?;
    let cells = [frames / t, height / h, width / w];
    let mut x = x.clone();
    for (axis, size) in [(2, t), (3, h), (4, w)] {
        x = x.narrow(axis, 0, cells[axis - 2] * size)?;
    }
    x.contiguous()?
        .reshape(vec![batch, channels, cells[0], t, cells[1], h, cells[2], w])?
        .permute(vec![0, 2, 4, 6, 1, 3, 5, 7])?
        .contiguous()?
        .reshape((batch, cells.iter().product::<usize>(), channels * t * h * w))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::Params;
    use candle_core::Device;

    fn shape(bias_kv: bool) -> Shape {
        Shape {
            width: 30,
            hidden: 44,
            heads: 3,
            layers: 2,
            eps: 1e-6,
            gelu: Gelu::Exact,
            bias_kv,
        }
    }

    fn largest(x: &Tensor) -> f32 {
        x.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn a_learned_key_changes_what_tokens_see() {
        let params = Params::random(2, &Device::Cpu);
        let x = Tensor::randn(0f32, 1.0, (2, 5, 30), &Device::Cpu).unwrap();
        let with = Transformer::new(&shape(true), Names::Packed, DType::F32, &params.builder()).unwrap();
        let names: Vec<String> = params.vars().into_keys().collect();
        assert!(names.contains(&"1.attn.bias_k".to_owned()) && names.contains(&"0.mlp.fc2.bias".to_owned()));
        let without = Transformer::new(&shape(false), Names::Packed, DType::F32, &params.builder()).unwrap();
        let (with, without) = (
            with.forward(&x, false, None).unwrap(),
            without.forward(&x, false, None).unwrap(),
        );
        assert!(largest(&(with - without).unwrap()) > 1e-4);
    }

    #[test]
    fn padding_and_later_tokens_are_not_seen() {
        let params = Params::random(3, &Device::Cpu);
        let tower = Transformer::new(&shape(false), Names::Separate, DType::F32, &params.builder()).unwrap();
        let x = Tensor::randn(0f32, 1.0, (1, 6, 30), &Device::Cpu).unwrap();
        let mask = Tensor::new(&[[1u8, 1, 1, 1, 0, 0]], &Device::Cpu).unwrap();
        let near = |a: &Tensor, b: &Tensor| largest(&(a - b).unwrap()) < 1e-5;
        let head = |x: &Tensor, n: usize| x.narrow(1, 0, n).unwrap();
        let masked = tower.forward(&x, false, Some(&mask)).unwrap();
        let short = tower.forward(&head(&x, 4), false, None).unwrap();
        assert!(near(&head(&masked, 4), &short));
        let causal = tower.forward(&x, true, None).unwrap();
        let prefix = tower.forward(&head(&x, 3), true, None).unwrap();
        assert!(near(&head(&causal, 3), &prefix));
        assert!(!near(
            &head(&causal, 3),
            &head(&tower.forward(&x, false, None).unwrap(), 3)
        ));
    }

    #[test]
    fn patches_lie_as_the_weights_of_a_convolution() {
        let x = Tensor::randn(0f32, 1.0, (2, 3, 1, 6, 9), &Device::Cpu).unwrap();
        let weight = Tensor::randn(0f32, 1.0, (4, 3, 2, 3), &Device::Cpu).unwrap();
        let found = Map::of(&weight, DType::F32).unwrap();
        let found = found.forward(&patches(&x, [1, 2, 3]).unwrap()).unwrap();
        // A convolution of unequal strides as sums over places.
        let values = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let w = weight.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mut expected = Vec::new();
        for b in 0..2 {
            for (r, c) in (0..3).flat_map(|r| (0..3).map(move |c| (r, c))) {
                for o in 0..4 {
                    let mut sum = 0.0;
                    for (ch, i, j) in
                        (0..3).flat_map(|ch| (0..2).flat_map(move |i| (0..3).map(move |j| (ch, i, j))))
                    {
                        sum += values[((b * 3 + ch) * 6 + 2 * r + i) * 9 + 3 * c + j]
                            * w[((o * 3 + ch) * 2 + i) * 3 + j];
                    }
                    expected.push(sum);
                }
            }
        }
        let expected = Tensor::from_vec(expected, (2, 9, 4), &Device::Cpu).unwrap();
        assert!(largest(&(found - expected).unwrap()) < 1e-4);
    }
}
