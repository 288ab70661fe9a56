//! Transformers over the places of a picture that read a text.

use candle_core::{D, DType, Result, Tensor, bail};
use candle_nn::VarBuilder;
use fulgur_kernels::gelu::geglu;
use fulgur_kernels::linear::linear;
use fulgur_lightnet::linear::{Linear, Start};

use super::{Attention, AttentionShape, Conv2d, GroupNorm, LayerNorm};

/// Added to variances by the norm at the entry.
const ENTRY_EPS: f64 = 1e-6;
/// Hidden width of a feed-forward layer over its width.
const EXPANSION: usize = 4;

/// `(a gelu(b)) W` for the halves `[a | b]` of one map.
#[derive(Clone, Debug)]
pub(crate) struct FeedForward {
    input: Linear,
    output: Linear,
}

impl FeedForward {
    /// Takes `net.0.proj` and `net.2`.
    pub(crate) fn new(width: usize, vb: &VarBuilder) -> Result<Self> {
        let hidden = EXPANSION * width;
        Ok(Self {
            input: Linear::new(width, 2 * hidden, true, Start::FanIn, &vb.pp("net.0.proj"))?,
            output: Linear::new(hidden, width, true, Start::FanIn, &vb.pp("net.2"))?,
        })
    }

    /// Maps `x` `[.., width]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let narrow = x.dtype() == DType::F32 || (x.dtype() == DType::BF16 && x.device().is_cuda());
        if narrow && !x.track_op() && !self.input.weight().track_op() {
            let both = linear(x, self.input.weight(), None)?;
            return self.output.forward(&geglu(&both, self.input.bias())?);
        }
        let both = self.input.forward(x)?;
        let hidden = both.dim(D::Minus1)? / 2;
        let value = both.narrow(D::Minus1, 0, hidden)?;
        let gate = both.narrow(D::Minus1, hidden, hidden)?.contiguous()?.gelu_erf()?;
        self.output.forward(&(value * gate)?)
    }
}

/// What a transformer is like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TransformerShape {
    /// Of the picture.
    pub(crate) channels: usize,
    /// Number of heads.
    pub(crate) heads: usize,
    /// Width of the states of the text.
    pub(crate) context: usize,
    /// Transformer blocks.
    pub(crate) layers: usize,
    /// Groups of the norm at the entry.
    pub(crate) groups: usize,
    /// Whether the maps at both ends are those of tokens, or 1x1 convolutions.
    pub(crate) linear: bool,
    /// Whether scores are computed in f32.
    pub(crate) upcast: bool,
    /// Whether the first attention reads the text too, and none the places of the picture.
    pub(crate) only_text: bool,
}

/// A map of channels, which checkpoints hold as a matrix or as a convolution.
#[derive(Clone, Debug)]
enum Projection {
    Matrix(Linear),
    Convolution(Conv2d),
}

impl Projection {
    fn new(input: usize, output: usize, linear: bool, vb: &VarBuilder) -> Result<Self> {
        Ok(match linear {
            true => Self::Matrix(Linear::new(input, output, true, Start::FanIn, vb)?),
            false => Self::Convolution(Conv2d::new(input, output, 1, vb)?),
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Matrix(map) => map.forward(x),
            Self::Convolution(map) => map.forward(x),
        }
    }
}

/// Self-attention, or what stands in its place, attention to the text, and a feed-forward layer, each after a norm of its own.
#[derive(Clone, Debug)]
struct Block {
    only_text: bool,
    norm1: LayerNorm,
    first: Attention,
    norm2: LayerNorm,
    text: Attention,
    norm3: LayerNorm,
    feed_forward: FeedForward,
}

impl Block {
    fn new(shape: &TransformerShape, inner: usize, vb: &VarBuilder) -> Result<Self> {
        let attention = |context, name: &str| {
            let shape = AttentionShape {
                query: inner,
                context,
                inner,
                heads: shape.heads,
                bias: false,
                upcast: shape.upcast,
            };
            Attention::new(shape, &vb.pp(name))
        };
        Ok(Self {
            only_text: shape.only_text,
            norm1: LayerNorm::new(inner, &vb.pp("norm1"))?,
            first: attention(shape.only_text.then_some(shape.context), "attn1")?,
            norm2: LayerNorm::new(inner, &vb.pp("norm2"))?,
            text: attention(Some(shape.context), "attn2")?,
            norm3: LayerNorm::new(inner, &vb.pp("norm3"))?,
            feed_forward: FeedForward::new(inner, &vb.pp("ff"))?,
        })
    }

    /// `x` `[P, N, inner]`, `text` `[B, L, c]`: the frames of a clip read the same text, as if they were one picture.
    fn forward(&self, x: &Tensor, text: &Tensor) -> Result<Tensor> {
        let read = |attention: &Attention, x: Tensor| {
            let whole = x.reshape((text.dim(0)?, (), x.dim(2)?))?;
            attention.forward(&whole, Some(text))?.reshape(x.shape())
        };
        let normed = self.norm1.forward(x)?;
        let x = match self.only_text {
            true => x + read(&self.first, normed)?,
            false => x + self.first.forward(&normed, None)?,
        }?;
        let x = (&x + read(&self.text, self.norm2.forward(&x)?)?)?;
        &x + self.feed_forward.forward(&self.norm3.forward(&x)?)?
    }
}

/// A norm, a map, blocks over all places, a map, added to the picture.
#[derive(Clone, Debug)]
pub(crate) struct Transformer {
    norm: GroupNorm,
    input: Projection,
    blocks: Vec<Block>,
    output: Projection,
}

impl Transformer {
    /// Takes `norm`, `proj_in`, `transformer_blocks.{i}` and `proj_out`.
    pub(crate) fn new(shape: &TransformerShape, vb: &VarBuilder) -> Result<Self> {
        let TransformerShape {
            channels,
            heads,
            groups,
            linear,
            ..
        } = *shape;
        // As in the reference, heads of whole channels: what is left over is not attended to.
        let inner = channels.checked_div(heads).unwrap_or(0) * heads;
        if inner == 0 {
            bail!("attention: {channels} channels do not make {heads} heads");
        }
        let blocks = (0..shape.layers)
            .map(|i| Block::new(shape, inner, &vb.pp("transformer_blocks").pp(i)))
            .collect::<Result<_>>()?;
        Ok(Self {
            norm: GroupNorm::new(groups, channels, ENTRY_EPS, &vb.pp("norm"))?,
            input: Projection::new(channels, inner, linear, &vb.pp("proj_in"))?,
            blocks,
            output: Projection::new(inner, channels, linear, &vb.pp("proj_out"))?,
        })
    }

    /// Maps `x` `[P, H, W, C]`, the frames of B clips, which read `text` `[B, L, c]`.
    pub(crate) fn forward(&self, x: &Tensor, text: &Tensor) -> Result<Tensor> {
        let (pictures, height, width, _) = x.dims4()?;
        let mut tokens = self.input.forward(&self.norm.forward(x, pictures)?)?;
        let inner = tokens.dim(3)?;
        tokens = tokens.reshape((pictures, height * width, inner))?;
        for block in &self.blocks {
            tokens = block.forward(&tokens, text)?;
        }
        x + self
            .output
            .forward(&tokens.reshape((pictures, height, width, inner))?)?
    }
}
