//! Video codec: 8x smaller in height and width, 4x in time.
//!
//! ```text
//! frames [B,F,H,W,3] -> patches 4x8x8 -> linear -> blocks -> latent [B,F/4,H/8,W/8,C]
//! latent -> linear -> blocks -> each token becomes 2x2 finer ones -> blocks -> patches 4x4x4 -> frames
//! ```
//! The finer tokens of the decoder carry edges across patch borders, where a single scale leaves blocks.

use std::path::Path;

use candle_core::{Device, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_lightnet::linear::{Linear, Start};
use serde::{Deserialize, Serialize};

use super::{LatentNorm, ShiftStack, from_patches, to_patches};
use crate::error::Error;
use crate::folder;

const AXES: usize = 3;
const RGB: usize = 3;
/// Height and width of the finer tokens within a coarse one.
const FINER: usize = 2;

/// Shape of a [`VideoCodec`] (`config.json`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VideoCodecConfig {
    /// Frames, rows and columns of a patch.
    pub patch: [usize; 3],
    /// Channels C of a latent token.
    pub latent_channels: usize,
    /// Width and depth of the encoder.
    pub encoder: [usize; 2],
    /// Width and depth of the decoder's coarse stage.
    pub decoder: [usize; 2],
    /// Width and depth of the decoder's fine stage.
    pub fine: [usize; 2],
}

impl Default for VideoCodecConfig {
    fn default() -> Self {
        Self {
            patch: [4, 8, 8],
            latent_channels: 20,
            encoder: [384, 4],
            decoder: [336, 5],
            fine: [192, 3],
        }
    }
}

/// Encoder and decoder of frames.
#[derive(Clone, Debug)]
pub struct VideoCodec {
    config: VideoCodecConfig,
    encoder: Option<Encoder>,
    decoder: Decoder,
    norm: LatentNorm,
}

#[derive(Clone, Debug)]
struct Encoder {
    input: Linear,
    stack: ShiftStack,
    output: Linear,
}

#[derive(Clone, Debug)]
struct Decoder {
    input: Linear,
    coarse: ShiftStack,
    refine: Linear,
    fine: ShiftStack,
    output: Linear,
}

impl VideoCodec {
    /// Takes `encoder`, `decoder` and `latent`. The encoder is left out where `vb` does not have it
    /// (a generator needs the decoder alone) unless `with_encoder` asks for it.
    pub fn new(config: &VideoCodecConfig, with_encoder: bool, vb: &VarBuilder) -> Result<Self> {
        let [frames, rows, columns] = config.patch;
        if frames == 0 || rows % FINER != 0 || columns % FINER != 0 || rows * columns == 0 {
            candle_core::bail!(
                "video codec: patch {:?} must be even in height and width",
                config.patch
            );
        }
        let channels = config.latent_channels;
        let values = frames * rows * columns * RGB;
        let encoder = if with_encoder {
            let ([dim, depth], vb) = (config.encoder, vb.pp("encoder"));
            Some(Encoder {
                input: Linear::new(values, dim, true, Start::FanIn, &vb.pp("input"))?,
                stack: ShiftStack::new(AXES, dim, depth, &vb.pp("stack"))?,
                output: Linear::new(dim, channels, true, Start::FanIn, &vb.pp("output"))?,
            })
        } else {
            None
        };
        let ([dim, depth], [fine_dim, fine_depth]) = (config.decoder, config.fine);
        let decoder_vb = vb.pp("decoder");
        let fine_values = values / (FINER * FINER);
        let decoder = Decoder {
            input: Linear::new(channels, dim, true, Start::FanIn, &decoder_vb.pp("input"))?,
            coarse: ShiftStack::new(AXES, dim, depth, &decoder_vb.pp("coarse"))?,
            refine: Linear::new(
                dim,
                FINER * FINER * fine_dim,
                true,
                Start::FanIn,
                &decoder_vb.pp("refine"),
            )?,
            fine: ShiftStack::new(AXES, fine_dim, fine_depth, &decoder_vb.pp("fine"))?,
            output: Linear::new(
                fine_dim,
                fine_values,
                true,
                Start::Normal(0.02),
                &decoder_vb.pp("output"),
            )?,
        };
        Ok(Self {
            config: config.clone(),
            encoder,
            decoder,
            norm: LatentNorm::new(channels, &vb.pp("latent"))?,
        })
    }

    /// Loads `config.json` and `model.safetensors` of `dir` onto `device`, with the encoder where the file has one.
    ///
    /// # Errors
    /// A missing or unreadable file, weights that are missing, unexpected or of another shape.
    pub fn load(dir: &Path, device: &Device) -> std::result::Result<Self, Error> {
        folder::load(dir, device, |config, weights| {
            Self::new(config, weights.has_below("encoder."), &weights.builder())
        })
    }

    /// How raw latents become standardised ones.
    pub fn norm(&self) -> &LatentNorm {
        &self.norm
    }

    /// Shape of the codec.
    pub fn config(&self) -> &VideoCodecConfig {
        &self.config
    }

    /// Whether the encoder is there; a generator's folder may hold the decoder alone.
    pub fn has_encoder(&self) -> bool {
        self.encoder.is_some()
    }

    /// Latent grid `[F/4, H/8, W/8]` of a clip. Errors when a size is no multiple of the patch.
    pub fn grid(&self, frames: usize, height: usize, width: usize) -> Result<[usize; 3]> {
        let [pf, ph, pw] = self.config.patch;
        if frames == 0 || height == 0 || width == 0 || frames % pf + height % ph + width % pw != 0 {
            candle_core::bail!(
                "video codec: {frames} frames of {width}x{height}, expected multiples of {pf} frames, {pw}x{ph}"
            );
        }
        Ok([frames / pf, height / ph, width / pw])
    }

    /// Frames `[B, F, H, W, 3]` in [-1, 1] to raw latents `[B, F/4, H/8, W/8, C]`, as trained on.
    pub fn encode_raw(&self, frames: &Tensor) -> Result<Tensor> {
        let Some(encoder) = &self.encoder else {
            candle_core::bail!("video codec: this model has no encoder")
        };
        let tokens = encoder.input.forward(&to_patches(frames, &self.config.patch)?)?;
        encoder.output.forward(&encoder.stack.forward(&tokens)?)
    }

    /// Raw latents to frames, not clamped.
    pub fn decode_raw(&self, latent: &Tensor) -> Result<Tensor> {
        let [frames, rows, columns] = self.config.patch;
        let coarse = self
            .decoder
            .coarse
            .forward(&self.decoder.input.forward(latent)?)?;
        let fine = from_patches(&self.decoder.refine.forward(&coarse)?, &[1, FINER, FINER])?;
        let values = self.decoder.output.forward(&self.decoder.fine.forward(&fine)?)?;
        from_patches(&values, &[frames, rows / FINER, columns / FINER])
    }

    /// Frames to standardised latents.
    pub fn encode(&self, frames: &Tensor) -> Result<Tensor> {
        self.norm.normalise(&self.encode_raw(frames)?)
    }

    /// Standardised latents to frames in [-1, 1].
    pub fn decode(&self, latent: &Tensor) -> Result<Tensor> {
        self.decode_raw(&self.norm.restore(latent)?)?.clamp(-1f32, 1f32)
    }
}
