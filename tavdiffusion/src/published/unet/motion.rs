//! Motion modules: attention of each place of a picture along the frames of a clip (AnimateDiff).
//!
//! ```text
//! t = W_in norm(x);  t = t + attention(LN(t) + p) twice;  t = t + FF(LN(t));  x + W_out t
//! ```
//!
//! p is a fixed table of sines at even and cosines at odd channels.

use candle_core::{Device, Result, Tensor, bail};
use candle_nn::VarBuilder;
use fulgur_lightnet::linear::{Linear, Start};

use super::super::layers::{Attention, AttentionShape, FeedForward, GroupNorm, LayerNorm};
use super::plan::MotionPlan;

/// Added to variances by the norm at the entry.
const ENTRY_EPS: f64 = 1e-6;
/// Longest wavelength of the table, over two pi.
const BASE: f64 = 10_000.0;
/// Name of the table, which many files hold though it follows from its size.
pub(crate) const TABLE: &str = "pos_embed.pe";

/// What a motion module is like, beside its plan.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MotionShape {
    /// Of the picture.
    pub(crate) channels: usize,
    /// Groups of the norm at the entry.
    pub(crate) groups: usize,
    /// Most frames of a clip.
    pub(crate) most_frames: usize,
    /// Whether the norm at the entry takes all frames together.
    pub(crate) over_frames: bool,
}

#[derive(Clone, Debug)]
struct Block {
    norms: [LayerNorm; 3],
    attentions: [Attention; 2],
    feed_forward: FeedForward,
    /// Where a frame lies, `[1, frames, C]`, for as many as there are places for.
    table: Tensor,
}

impl Block {
    fn new(plan: MotionPlan, shape: &MotionShape, vb: &VarBuilder) -> Result<Self> {
        let channels = shape.channels;
        let attention = |name: &str| {
            let shape = AttentionShape {
                query: channels,
                context: None,
                inner: channels,
                heads: plan.heads,
                bias: false,
                upcast: false,
            };
            Attention::new(shape, &vb.pp(name))
        };
        let norm = |name: &str| LayerNorm::new(channels, &vb.pp(name));
        let table = match vb.contains_tensor(TABLE) {
            true => vb.get((1, shape.most_frames, channels), TABLE)?,
            false => positions(shape.most_frames, channels, vb.device())?,
        };
        Ok(Self {
            norms: [norm("norm1")?, norm("norm2")?, norm("norm3")?],
            attentions: [attention("attn1")?, attention("attn2")?],
            feed_forward: FeedForward::new(channels, &vb.pp("ff"))?,
            table,
        })
    }

    /// `x` `[B H W, F, C]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let table = self.table.narrow(1, 0, x.dim(1)?)?.to_dtype(x.dtype())?;
        let mut x = x.clone();
        for (norm, attention) in self.norms.iter().zip(&self.attentions) {
            let placed = norm.forward(&x)?.broadcast_add(&table)?;
            x = (&x + attention.forward(&placed, None)?)?;
        }
        &x + self.feed_forward.forward(&self.norms[2].forward(&x)?)?
    }
}

/// `[1, F, C]`: `sin(f w_i)` at channel 2 i and `cos(f w_i)` at 2 i + 1, with `w_i = BASE^(-2 i / C)`.
fn positions(frames: usize, channels: usize, device: &Device) -> Result<Tensor> {
    let mut values = Vec::with_capacity(frames * channels);
    for frame in 0..frames {
        for channel in 0..channels {
            let pair = (channel / 2 * 2) as f32;
            let frequency = (pair * (-BASE.ln() / channels as f64) as f32).exp();
            let angle = frame as f32 * frequency;
            values.push(if channel % 2 == 0 {
                angle.sin()
            } else {
                angle.cos()
            });
        }
    }
    Tensor::from_vec(values, (1, frames, channels), device)
}

/// Transformer blocks along frames, added to the pictures.
#[derive(Clone, Debug)]
pub(crate) struct MotionModule {
    over_frames: bool,
    norm: GroupNorm,
    input: Linear,
    blocks: Vec<Block>,
    output: Linear,
}

impl MotionModule {
    /// Takes `norm`, `proj_in`, `transformer_blocks.{i}` and `proj_out`; a fresh module changes nothing.
    pub(crate) fn new(plan: MotionPlan, shape: &MotionShape, vb: &VarBuilder) -> Result<Self> {
        let channels = shape.channels;
        let blocks = (0..plan.layers)
            .map(|i| Block::new(plan, shape, &vb.pp("transformer_blocks").pp(i)))
            .collect::<Result<_>>()?;
        let map = |name: &str, start| Linear::new(channels, channels, true, start, &vb.pp(name));
        Ok(Self {
            over_frames: shape.over_frames,
            norm: GroupNorm::new(shape.groups, channels, ENTRY_EPS, &vb.pp("norm"))?,
            input: map("proj_in", Start::FanIn)?,
            blocks,
            output: map("proj_out", Start::Zero)?,
        })
    }

    /// Maps `x` `[B F, H, W, C]`, the pictures of `clips` clips one after the other.
    pub(crate) fn forward(&self, x: &Tensor, clips: usize) -> Result<Tensor> {
        let (pictures, height, width, channels) = x.dims4()?;
        if clips == 0 || !pictures.is_multiple_of(clips) {
            bail!("motion: {pictures} pictures are not {clips} clips");
        }
        let (frames, places) = (pictures / clips, height * width);
        let sets = if self.over_frames { clips } else { pictures };
        let mut tokens = self
            .norm
            .forward(x, sets)?
            .reshape((clips, frames, places, channels))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((clips * places, frames, channels))?;
        tokens = self.input.forward(&tokens)?;
        for block in &self.blocks {
            tokens = block.forward(&tokens)?;
        }
        let moved = self
            .output
            .forward(&tokens)?
            .reshape((clips, places, frames, channels))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape(x.shape())?;
        x + moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{apart, normal};
    use fulgur_lightnet::params::Params;

    #[test]
    fn a_fresh_module_changes_nothing() -> Result<()> {
        let params = Params::random(7, &Device::Cpu);
        let plan = MotionPlan { heads: 2, layers: 1 };
        let shape = MotionShape {
            channels: 8,
            groups: 2,
            most_frames: 4,
            over_frames: false,
        };
        let module = MotionModule::new(plan, &shape, &params.builder())?;
        let x = normal("x", &[6, 2, 3, 8])?;
        assert!(apart(&module.forward(&x, 2)?, &x)? < 1e-7);
        assert!(module.forward(&x, 4).is_err());
        Ok(())
    }

    #[test]
    fn the_table_of_places_is_waves() -> Result<()> {
        let table = positions(3, 4, &Device::Cpu)?.squeeze(0)?.to_vec2::<f32>()?;
        assert_eq!(table[0], [0.0, 1.0, 0.0, 1.0]);
        for (found, expected) in table[2]
            .iter()
            .zip([2f32.sin(), 2f32.cos(), 0.02f32.sin(), 0.02f32.cos()])
        {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
        Ok(())
    }
}
