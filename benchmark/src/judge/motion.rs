//! How a thing moves and when it touches the ground or appears, read from the frames alone.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_lightnet::block::{Block, BlockConfig, BlockContext};
use fulgur_lightnet::linear::{Linear, Start};
use fulgur_lightnet::norm::RmsNorm;
use fulgur_lightnet::position::{Grid, MdTpe, TpeConfig};
use serde::{Deserialize, Serialize};

const RGB: usize = 3;
/// Height and width of a patch of one frame.
const PATCH: usize = 12;
/// Differences between frames are small; this brings them to the scale of the frames.
const DIFFERENCE_GAIN: f64 = 4.0;

/// Shape of a [`MotionJudge`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MotionJudgeConfig {
    /// Frames of a clip.
    pub frames: usize,
    /// Height and width of a frame.
    pub size: usize,
    /// Classes of motion.
    pub motions: usize,
    /// Width of the network.
    pub dim: usize,
    /// Blocks of the network.
    pub depth: usize,
}

/// What the judge says of a batch of clips.
#[derive(Clone, Debug)]
pub struct MotionVerdict {
    /// Logits of the motions, `[B, motions]`.
    pub motion: Tensor,
    /// Logits of the frame of first contact and, last, of "there is none", `[B, frames + 1]`.
    pub contact: Tensor,
}

/// Frames and their differences, cut in patches, through LightNet blocks over time, height and width.
#[derive(Clone, Debug)]
pub struct MotionJudge {
    config: MotionJudgeConfig,
    input: Linear,
    rows: Tensor,
    columns: Tensor,
    tpe: MdTpe,
    blocks: Vec<Block>,
    norm: RmsNorm,
    contact: Linear,
    nothing: Linear,
    motion: Linear,
}

impl MotionJudge {
    /// Takes `input`, `rows`, `columns`, `tpe`, `blocks.{i}`, `norm`, `contact`, `nothing` and `motion`.
    pub fn new(config: &MotionJudgeConfig, vb: &VarBuilder) -> Result<Self> {
        let (dim, n) = (config.dim, config.size / PATCH);
        let heads = dim / 32;
        let block = BlockConfig {
            dim,
            heads,
            head_dim: 32,
            hidden: 2 * dim,
            lrpe: Some((3, config.frames)),
            token_shift: true,
            context: None,
            modulated: false,
        };
        let tpe = TpeConfig {
            dim,
            heads,
            axes: 3,
            two_sided: true,
            residual: true,
        };
        let start = candle_nn::Init::Randn {
            mean: 0.0,
            stdev: 0.02,
        };
        let linear = |input: usize, output: usize, name: &str| {
            Linear::new(input, output, true, Start::FanIn, &vb.pp(name))
        };
        Ok(Self {
            input: linear(2 * PATCH * PATCH * RGB, dim, "input")?,
            rows: vb.get_with_hints((n, dim), "rows", start)?,
            columns: vb.get_with_hints((n, dim), "columns", start)?,
            tpe: MdTpe::new(tpe, &vb.pp("tpe"))?,
            blocks: (0..config.depth)
                .map(|i| Block::new(block, &vb.pp("blocks").pp(i)))
                .collect::<Result<_>>()?,
            norm: RmsNorm::new(dim, &vb.pp("norm"))?,
            contact: linear(2 * dim, 1, "contact")?,
            nothing: linear(2 * dim, 1, "nothing")?,
            motion: linear(2 * dim, config.motions, "motion")?,
            config: config.clone(),
        })
    }

    /// Judges clips `[B, F, size, size, 3]` in [-1, 1].
    pub fn forward(&self, clips: &Tensor) -> Result<MotionVerdict> {
        let (batch, frames) = (clips.dim(0)?, clips.dim(1)?);
        let n = self.config.size / PATCH;
        let still = clips.narrow(1, 0, 1)?.zeros_like()?;
        let moved = (clips.narrow(1, 1, frames - 1)? - clips.narrow(1, 0, frames - 1)?)?;
        let difference = (Tensor::cat(&[&still, &moved], 1)? * DIFFERENCE_GAIN)?;
        let both = Tensor::cat(&[clips, &difference], D::Minus1)?;
        let patches = both
            .reshape(vec![batch * frames, n, PATCH, n, PATCH, 2 * RGB])?
            .permute(vec![0, 1, 3, 2, 4, 5])?
            .contiguous()?
            .reshape((batch, frames, n, n, 2 * PATCH * PATCH * RGB))?;
        let x = self.input.forward(&patches)?;
        let x = x.broadcast_add(&self.rows.reshape((1, 1, n, 1, ()))?)?;
        let x = x.broadcast_add(&self.columns.reshape((1, 1, 1, n, ()))?)?;
        let grid = Grid::new(&[frames, n, n]);
        let mut x = self
            .tpe
            .forward(&x.reshape((batch, grid.tokens(), ()))?, &grid, None)?;
        for block in &self.blocks {
            x = block.forward(&x, &BlockContext::on(&grid))?;
        }
        let x = self
            .norm
            .forward(&x)?
            .reshape((batch, frames, n * n, self.config.dim))?;
        let moments = Tensor::cat(&[&x.mean(2)?, &x.max(2)?], D::Minus1)?;
        let clip = {
            let (mean, max) = (moments.mean(1)?, moments.max(1)?);
            let dim = self.config.dim;
            Tensor::cat(&[&mean.narrow(1, 0, dim)?, &max.narrow(1, dim, dim)?], 1)?
        };
        let contact = self.contact.forward(&moments)?.squeeze(2)?;
        Ok(MotionVerdict {
            motion: self.motion.forward(&clip)?,
            contact: Tensor::cat(&[&contact, &self.nothing.forward(&clip)?], 1)?,
        })
    }
}

impl MotionVerdict {
    /// Moment of first contact of each clip in seconds, or `None` where the judge sees none.
    pub fn contact_s(&self, fps: f64) -> Result<Vec<Option<f64>>> {
        let logits = self.contact.to_dtype(DType::F32)?;
        let weights = candle_nn::ops::softmax(&logits, D::Minus1)?.to_vec2::<f32>()?;
        Ok(weights.iter().map(|row| read_contact(row, fps)).collect())
    }
}

/// Mean time around the most likely frame; frames show the middle of their display time.
fn read_contact(weights: &[f32], fps: f64) -> Option<f64> {
    const AROUND: usize = 2;
    let (best, _) = weights.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1))?;
    let frames = weights.len() - 1;
    if best == frames {
        return None;
    }
    let near = best.saturating_sub(AROUND)..(best + AROUND + 1).min(frames);
    let (sum, mass) = near.fold((0.0, 0.0), |(sum, mass), i| {
        let w = f64::from(weights[i]);
        (sum + w * (i as f64 + 0.5), mass + w)
    });
    Some(sum / mass / fps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contact_is_read_around_the_peak_or_not_at_all() {
        let mut weights = vec![0.0f32; 13];
        weights[4] = 0.5;
        weights[5] = 0.5;
        let time = read_contact(&weights, 12.0).unwrap_or(-1.0);
        assert!((time - 5.0 / 12.0).abs() < 1e-9, "{time}");
        weights[12] = 0.9;
        assert_eq!(read_contact(&weights, 12.0), None);
    }
}
