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
use fulgur_lightnet::patches::{from_patches, to_patches};
use serde::{Deserialize, Serialize};

use super::{LatentNorm, ShiftStack};
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{apart, normal, perturb};
    use fulgur_lightnet::params::Params;

    fn small() -> VideoCodecConfig {
        VideoCodecConfig {
            latent_channels: 3,
            encoder: [24, 1],
            decoder: [24, 1],
            fine: [12, 1],
            ..VideoCodecConfig::default()
        }
    }

    fn codec(with_encoder: bool) -> Result<VideoCodec> {
        let params = Params::random(2, &Device::Cpu);
        VideoCodec::new(&small(), with_encoder, &params.builder())
    }

    #[test]
    fn clips_of_any_whole_size_come_back_in_their_shape() -> Result<()> {
        let codec = codec(true)?;
        for [batch, frames, height, width] in [[1, 4, 8, 8], [2, 8, 24, 16], [1, 12, 8, 40]] {
            let clip = Tensor::full(0.25f32, (batch, frames, height, width, 3), &Device::Cpu)?;
            let latent = codec.encode(&clip)?;
            let [t, h, w] = codec.grid(frames, height, width)?;
            assert_eq!([t, h, w], [frames / 4, height / 8, width / 8]);
            assert_eq!(latent.dims(), [batch, t, h, w, 3]);
            assert_eq!(codec.decode(&latent)?.dims(), clip.dims());
        }
        Ok(())
    }

    #[test]
    fn decoded_frames_stay_in_range() -> Result<()> {
        let params = Params::random(2, &Device::Cpu);
        let codec = VideoCodec::new(&small(), false, &params.builder())?;
        perturb(&params, 1.0)?;
        let latent = normal("latent", &[1, 1, 2, 2, 3])?;
        let largest = |frames: Tensor| frames.abs()?.max_all()?.to_scalar::<f32>();
        let raw = largest(codec.decode_raw(&codec.norm().restore(&latent)?)?)?;
        assert!(raw > 1.0 && raw.is_finite(), "{raw}");
        assert_eq!(largest(codec.decode(&latent)?)?, 1.0);
        Ok(())
    }

    #[test]
    fn a_latent_knows_its_neighbourhood_alone() -> Result<()> {
        let codec = codec(true)?;
        let clip = normal("clip", &[1, 4, 8, 64, 3])?;
        let other = normal("other", &[1, 4, 8, 8, 3])?;
        // Another first patch; one block looks one token far.
        let changed = Tensor::cat(&[&other, &clip.narrow(3, 8, 56)?], 3)?;
        let (a, b) = (codec.encode_raw(&clip)?, codec.encode_raw(&changed)?);
        let column = |i: usize| apart(&a.narrow(3, i, 1)?, &b.narrow(3, i, 1)?);
        assert!(column(0)? > 1e-3 && column(1)? > 0.0);
        for i in 2..8 {
            assert_eq!(column(i)?, 0.0, "token {i}");
        }
        Ok(())
    }

    #[test]
    fn a_clip_is_coded_alike_alone_and_in_a_batch() -> Result<()> {
        let codec = codec(true)?;
        let clips = normal("clips", &[3, 4, 16, 8, 3])?;
        let all = codec.decode(&codec.encode(&clips)?)?;
        let one = codec.decode(&codec.encode(&clips.narrow(0, 1, 1)?)?)?;
        assert!(apart(&all.narrow(0, 1, 1)?, &one)? < 1e-5);
        Ok(())
    }

    #[test]
    fn odd_sizes_are_refused_by_name() -> Result<()> {
        let codec = codec(true)?;
        for (frames, height, width) in [(5, 16, 16), (4, 12, 16), (4, 16, 15), (0, 16, 16), (4, 0, 16)] {
            let message = codec.grid(frames, height, width).unwrap_err().to_string();
            let found = format!("{frames} frames of {width}x{height}, expected multiples of 4 frames, 8x8");
            assert!(message.contains(&found), "{message}");
        }
        let clip = Tensor::zeros((1, 4, 12, 16, 3), candle_core::DType::F32, &Device::Cpu)?;
        let message = codec.encode_raw(&clip).unwrap_err().to_string();
        assert!(message.contains("[1, 4, 12, 16, 3]"), "{message}");
        Ok(())
    }

    #[test]
    fn a_decoder_alone_says_that_it_cannot_encode() -> Result<()> {
        let codec = codec(false)?;
        assert!(!codec.has_encoder());
        let clip = Tensor::zeros((1, 4, 8, 8, 3), candle_core::DType::F32, &Device::Cpu)?;
        let message = codec.encode(&clip).unwrap_err().to_string();
        assert!(message.contains("no encoder"), "{message}");
        assert_eq!(
            codec.decode(&normal("latent", &[1, 1, 1, 1, 3])?)?.dims(),
            clip.dims()
        );
        Ok(())
    }

    #[test]
    fn patches_that_cannot_be_halved_are_refused() {
        for patch in [[4, 7, 8], [4, 8, 9], [0, 8, 8], [4, 0, 8]] {
            let config = VideoCodecConfig { patch, ..small() };
            let params = Params::random(2, &Device::Cpu);
            let message = VideoCodec::new(&config, true, &params.builder()).unwrap_err();
            assert!(message.to_string().contains(&format!("{patch:?}")), "{message}");
        }
    }
}
