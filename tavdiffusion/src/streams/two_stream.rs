//! The two streams.
//!
//! ```text
//! video latents [B,F/4,h,w,C] -> 2x2 patches -> linear + coordinates -> MD-TPE -> blocks --+-- blocks -> velocity
//! audio latents [B,T/4,b,C]   ->                linear + coordinates -> MD-TPE -> blocks --+-- blocks -> velocity
//!                                                             cross-attention both ways ---^  at a few depths
//! ```
//! Blocks are non-causal LightNet with MD-LRPE, cross-attention to the text and token shifts before the gated linear
//! unit, modulated by diffusion time and text. Cost grows linearly with duration and area, the cross-attention between
//! the streams apart.

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::norm::rms_norm_modulated;
use fulgur_kernels::residual::add_branch;
use fulgur_kernels::rows::add_row;
use fulgur_lightnet::block::{Block, BlockConfig, BlockContext, MODULATIONS};
use fulgur_lightnet::linear::{Linear, Start};
use fulgur_lightnet::norm::EPS;
use fulgur_lightnet::position::{Grid, MdTpe, TpeConfig};
use serde::{Deserialize, Serialize};

use super::condition::Condition;
use super::embed::{AxisEmbedding, seconds};
use super::fusion::Fusion;
use crate::codec::{from_patches, to_patches};
use crate::denoiser::{Denoiser, Latents, TextCondition};
use crate::diffusion::Objective;
use crate::error::Error;
use crate::folder;

/// Shape of one stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StreamConfig {
    /// Channels of a latent.
    pub channels: usize,
    /// Latents in a token, one number an axis.
    pub patch: Vec<usize>,
    /// Model width.
    pub dim: usize,
    /// Heads of the mixers.
    pub heads: usize,
    /// Key width of a head.
    pub head_dim: usize,
    /// Hidden width of the gated linear units.
    pub hidden: usize,
    /// Seconds between latents along the first axis.
    pub step_s: f64,
    /// Longest axis in tokens at the default size: sets the slowest MD-LRPE frequency.
    pub longest: usize,
}

/// Shape of a [`TwoStream`] (`config.json`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TwoStreamConfig {
    /// Picture.
    pub video: StreamConfig,
    /// Sound.
    pub audio: StreamConfig,
    /// Blocks of each stream.
    pub depth: usize,
    /// Every so many blocks, from the first, one reads the text.
    pub text_every: usize,
    /// Depths after which the streams read each other.
    pub fusion: Vec<usize>,
    /// Heads of the cross-attention between the streams.
    pub fusion_heads: usize,
    /// Width of the text states.
    pub text_dim: usize,
    /// Width of the features that the contrastive loss compares.
    pub contrast_dim: usize,
    /// What the network predicts.
    pub objective: Objective,
}

impl Default for TwoStreamConfig {
    fn default() -> Self {
        let video = StreamConfig {
            channels: 20,
            patch: vec![1, 2, 2],
            dim: 320,
            heads: 5,
            head_dim: 64,
            hidden: 576,
            step_s: 1.0 / 3.0,
            longest: 12,
        };
        let audio = StreamConfig {
            channels: 8,
            patch: vec![1, 1],
            dim: 160,
            heads: 5,
            head_dim: 64,
            hidden: 320,
            step_s: 0.04,
            longest: 100,
        };
        Self {
            video,
            audio,
            depth: 8,
            text_every: 2,
            fusion: vec![1, 4, 7],
            fusion_heads: 5,
            text_dim: 256,
            contrast_dim: 128,
            objective: Objective::Flow,
        }
    }
}

impl TwoStreamConfig {
    /// Whether the block at `depth` reads the text.
    fn reads_text(&self, depth: usize) -> bool {
        depth.is_multiple_of(self.text_every.max(1))
    }
}

/// The denoiser of the builtin generator.
#[derive(Clone, Debug)]
pub struct TwoStream {
    config: TwoStreamConfig,
    device: Device,
    compute: DType,
    condition: Condition,
    video: Stream,
    audio: Stream,
    fusion: Vec<(usize, Fusion)>,
    contrast: Option<(Linear, Linear)>,
}

#[derive(Clone, Debug)]
struct Stream {
    config: StreamConfig,
    input: Linear,
    coordinates: AxisEmbedding,
    tpe: MdTpe,
    modulation: Linear,
    blocks: Vec<Block>,
    head_modulation: Linear,
    head: Linear,
}

/// Tokens of one stream on their way, with what every block needs.
struct Tokens {
    x: Tensor,
    grid: Grid,
    modulation: Tensor,
    moments: Tensor,
}

impl TwoStream {
    /// Takes `condition`, `video`, `audio`, `fusion.{i}` and, for training, `contrast`.
    ///
    /// `compute` is the dtype of the blocks' products (`BF16` on a GPU, `F32` on the CPU); the residual streams stay
    /// in `F32`.
    pub fn new(config: &TwoStreamConfig, training: bool, compute: DType, vb: &VarBuilder) -> Result<Self> {
        if let Some(depth) = config.fusion.iter().find(|&&d| d >= config.depth) {
            candle_core::bail!(
                "two streams: fusion after block {depth}, expected one of 0..{}",
                config.depth
            );
        }
        let (video, audio) = (&config.video, &config.audio);
        let fusion = |&depth: &usize| {
            let vb = vb.pp("fusion").pp(depth);
            Ok((
                depth,
                Fusion::new(video.dim, audio.dim, config.fusion_heads, &vb)?,
            ))
        };
        let contrast = if training {
            let vb = vb.pp("contrast");
            let map = |dim: usize, name: &str| {
                Linear::new(dim, config.contrast_dim, false, Start::FanIn, &vb.pp(name))
            };
            Some((map(video.dim, "video")?, map(audio.dim, "audio")?))
        } else {
            None
        };
        Ok(Self {
            config: config.clone(),
            device: vb.device().clone(),
            compute,
            condition: Condition::new(config.text_dim, video.dim, &vb.pp("condition"))?,
            video: Stream::new(config, video, &vb.pp("video"))?,
            audio: Stream::new(config, audio, &vb.pp("audio"))?,
            fusion: config.fusion.iter().map(fusion).collect::<Result<_>>()?,
            contrast,
        })
    }

    /// Loads `config.json` and `model.safetensors` of `dir` onto `device`, for use or, where the file has the tensors of
    /// `contrast`, as it was trained; `compute` as in [`TwoStream::new`].
    ///
    /// # Errors
    /// A missing or unreadable file, weights that are missing, unexpected or of another shape.
    pub fn load(dir: &Path, compute: DType, device: &Device) -> std::result::Result<Self, Error> {
        folder::load(dir, device, |config, weights| {
            Self::new(
                config,
                weights.has_below("contrast."),
                compute,
                &weights.builder(),
            )
        })
    }

    /// Shape of the network.
    pub fn config(&self) -> &TwoStreamConfig {
        &self.config
    }

    /// Prediction, and for a network made for training the pooled features `[B, c]` of picture and sound half way.
    pub fn forward(
        &self,
        latents: &Latents,
        time: &Tensor,
        text: &TextCondition,
    ) -> Result<(Latents, Option<(Tensor, Tensor)>)> {
        let condition = self.condition.forward(time, text)?;
        let text_states = text.states.to_dtype(self.compute)?;
        let text = (&text_states, &text.mask);
        let mut video = self.video.start(&latents.video, &condition, self.compute)?;
        let mut audio = self.audio.start(&latents.audio, &condition, self.compute)?;
        let mut features = None;
        for depth in 0..self.config.depth {
            video.x = self.video.block(depth, &video, text, self.compute)?;
            audio.x = self.audio.block(depth, &audio, text, self.compute)?;
            if let Some((_, fusion)) = self.fusion.iter().find(|(at, _)| *at == depth) {
                let (to_video, to_audio) = fusion.forward(
                    (&video.x, &video.moments),
                    (&audio.x, &audio.moments),
                    self.compute,
                )?;
                video.x = add_branch(&video.x, &to_video, None)?;
                audio.x = add_branch(&audio.x, &to_audio, None)?;
            }
            if depth == self.config.depth / 2 {
                features = self.features(&video, &audio)?;
            }
        }
        let latents = Latents {
            video: self.video.finish(&video, &condition)?,
            audio: self.audio.finish(&audio, &condition)?,
        };
        Ok((latents, features))
    }

    fn features(&self, video: &Tokens, audio: &Tokens) -> Result<Option<(Tensor, Tensor)>> {
        let Some((seen, heard)) = &self.contrast else {
            return Ok(None);
        };
        Ok(Some((
            seen.forward(&video.x.mean(1)?)?,
            heard.forward(&audio.x.mean(1)?)?,
        )))
    }
}

impl Denoiser for TwoStream {
    fn predict(&self, latents: &Latents, time: &Tensor, text: &TextCondition) -> Result<Latents> {
        Ok(self.forward(latents, time, text)?.0)
    }

    fn device(&self) -> &Device {
        &self.device
    }
}

impl Stream {
    fn new(shared: &TwoStreamConfig, config: &StreamConfig, vb: &VarBuilder) -> Result<Self> {
        let StreamConfig {
            dim,
            heads,
            head_dim,
            hidden,
            ..
        } = *config;
        let axes = config.patch.len();
        let values = config.channels * config.patch.iter().product::<usize>();
        let block = BlockConfig {
            dim,
            heads,
            head_dim,
            hidden,
            lrpe: Some((axes, config.longest)),
            token_shift: true,
            context: None,
            modulated: true,
        };
        let tpe = TpeConfig {
            dim,
            heads,
            axes,
            two_sided: true,
            residual: true,
        };
        let condition = shared.video.dim;
        let zero = |width: usize, name: &str| Linear::new(condition, width, true, Start::Zero, &vb.pp(name));
        Ok(Self {
            config: config.clone(),
            input: Linear::new(values, dim, true, Start::FanIn, &vb.pp("input"))?,
            coordinates: AxisEmbedding::new(axes, dim, &vb.pp("coordinates"))?,
            tpe: MdTpe::new(tpe, &vb.pp("tpe"))?,
            modulation: zero(MODULATIONS * dim, "modulation")?,
            blocks: (0..shared.depth)
                .map(|i| {
                    let context = shared.reads_text(i).then_some(shared.text_dim);
                    Block::new(BlockConfig { context, ..block }, &vb.pp("blocks").pp(i))
                })
                .collect::<Result<_>>()?,
            head_modulation: zero(2 * dim, "head_modulation")?,
            head: Linear::new(dim, values, true, Start::Zero, &vb.pp("head"))?,
        })
    }

    fn start(&self, latents: &Tensor, condition: &Tensor, compute: DType) -> Result<Tokens> {
        let patches = to_patches(latents, &self.config.patch)?;
        let axes = patches.dims()[1..patches.rank() - 1].to_vec();
        let grid = Grid::new(&axes);
        let (batch, device) = (latents.dim(0)?, latents.device());
        let tokens = self
            .input
            .forward(&patches.reshape((batch, grid.tokens(), ()))?.to_dtype(compute)?)?;
        let step_s = self.config.step_s * self.config.patch[0] as f64;
        let tokens = add_row(&tokens, &self.coordinates.forward(&axes, step_s, device)?)?;
        let inner: usize = axes[1..].iter().product();
        let moments = seconds(axes[0], step_s, device)?;
        let width = moments.dim(1)?;
        let moments = moments
            .unsqueeze(1)?
            .broadcast_as((axes[0], inner, width))?
            .contiguous()?
            .reshape((grid.tokens(), width))?;
        Ok(Tokens {
            x: self.tpe.forward(&tokens, &grid, None)?.to_dtype(DType::F32)?,
            modulation: self
                .modulation
                .forward(condition)?
                .reshape((batch, MODULATIONS, self.config.dim))?,
            grid,
            moments,
        })
    }

    fn block(
        &self,
        depth: usize,
        tokens: &Tokens,
        text: (&Tensor, &Tensor),
        compute: DType,
    ) -> Result<Tensor> {
        let context = BlockContext {
            modulation: Some(&tokens.modulation),
            text: Some(text),
            compute: Some(compute),
            ..BlockContext::on(&tokens.grid)
        };
        self.blocks[depth].forward(&tokens.x, &context)
    }

    fn finish(&self, tokens: &Tokens, condition: &Tensor) -> Result<Tensor> {
        let dim = self.config.dim;
        let modulation = self.head_modulation.forward(condition)?;
        let (shift, scale) = (modulation.narrow(1, 0, dim)?, modulation.narrow(1, dim, dim)?);
        let x = rms_norm_modulated(&tokens.x, &scale.contiguous()?, &shift.contiguous()?, EPS)?;
        let values = self.head.forward(&x)?;
        let (batch, width) = (values.dim(0)?, values.dim(2)?);
        from_patches(
            &values.reshape([&[batch], tokens.grid.axes.as_slice(), &[width]].concat())?,
            &self.config.patch,
        )
    }
}
