//! Mel codec: log-mel spectrograms in patches of 4 frames by 16 bands.
//!
//! ```text
//! log-mel [B,T,64] -> patches 4x16 -> linear -> blocks -> latent [B,T/4,4,C] -> linear -> blocks -> log-mel
//! ```

use std::path::Path;

use candle_core::{Device, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_lightnet::linear::{Linear, Start};
use serde::{Deserialize, Serialize};

use super::{LatentNorm, ShiftStack, from_patches, to_patches};
use crate::error::Error;
use crate::folder;

const AXES: usize = 2;

/// Shape of a [`MelCodec`] (`config.json`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MelCodecConfig {
    /// Bands of the spectrogram.
    pub bands: usize,
    /// Frames and bands of a patch.
    pub patch: [usize; 2],
    /// Channels C of a latent token.
    pub latent_channels: usize,
    /// Width and depth of the encoder.
    pub encoder: [usize; 2],
    /// Width and depth of the decoder.
    pub decoder: [usize; 2],
}

impl Default for MelCodecConfig {
    fn default() -> Self {
        Self {
            bands: 64,
            patch: [4, 16],
            latent_channels: 8,
            encoder: [256, 3],
            decoder: [192, 4],
        }
    }
}

/// Encoder and decoder of standardised log-mel spectrograms.
#[derive(Clone, Debug)]
pub struct MelCodec {
    config: MelCodecConfig,
    encoder: Option<(Linear, ShiftStack, Linear)>,
    decoder: (Linear, ShiftStack, Linear),
    norm: LatentNorm,
}

impl MelCodec {
    /// Takes `encoder` (if `with_encoder`), `decoder` and `latent`, each half with `input`, `stack` and `output`.
    pub fn new(config: &MelCodecConfig, with_encoder: bool, vb: &VarBuilder) -> Result<Self> {
        let [frames, bands] = config.patch;
        if frames == 0 || bands == 0 || !config.bands.is_multiple_of(bands) {
            candle_core::bail!(
                "mel codec: patch {:?} does not divide {} bands",
                config.patch,
                config.bands
            );
        }
        let half = |name: &str, [dim, depth]: [usize; 2], input: usize, output: usize, start: Start| {
            let vb = vb.pp(name);
            Ok::<_, candle_core::Error>((
                Linear::new(input, dim, true, Start::FanIn, &vb.pp("input"))?,
                ShiftStack::new(AXES, dim, depth, &vb.pp("stack"))?,
                Linear::new(dim, output, true, start, &vb.pp("output"))?,
            ))
        };
        let (values, channels) = (frames * bands, config.latent_channels);
        let encoder = with_encoder
            .then(|| half("encoder", config.encoder, values, channels, Start::FanIn))
            .transpose()?;
        let decoder = half("decoder", config.decoder, channels, values, Start::Normal(0.02))?;
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
    pub fn config(&self) -> &MelCodecConfig {
        &self.config
    }

    /// Whether the encoder is there; a generator's folder may hold the decoder alone.
    pub fn has_encoder(&self) -> bool {
        self.encoder.is_some()
    }

    /// Latent grid `[T/4, bands/16]` of a spectrogram of `frames` frames.
    pub fn grid(&self, frames: usize) -> Result<[usize; 2]> {
        let [pf, pb] = self.config.patch;
        if frames == 0 || !frames.is_multiple_of(pf) {
            candle_core::bail!("mel codec: {frames} frames, expected a multiple of {pf}");
        }
        Ok([frames / pf, self.config.bands / pb])
    }

    /// Standardised log-mel `[B, T, bands]` to raw latents `[B, T/4, bands/16, C]`, as trained on.
    pub fn encode_raw(&self, mel: &Tensor) -> Result<Tensor> {
        let Some(encoder) = &self.encoder else {
            candle_core::bail!("mel codec: this model has no encoder")
        };
        run(encoder, &to_patches(&mel.unsqueeze(3)?, &self.config.patch)?)
    }

    /// Raw latents to standardised log-mel.
    pub fn decode_raw(&self, latent: &Tensor) -> Result<Tensor> {
        from_patches(&run(&self.decoder, latent)?, &self.config.patch)?.squeeze(3)
    }

    /// Standardised log-mel to standardised latents.
    pub fn encode(&self, mel: &Tensor) -> Result<Tensor> {
        self.norm.normalise(&self.encode_raw(mel)?)
    }

    /// Standardised latents to standardised log-mel.
    pub fn decode(&self, latent: &Tensor) -> Result<Tensor> {
        self.decode_raw(&self.norm.restore(latent)?)
    }
}

fn run((input, stack, output): &(Linear, ShiftStack, Linear), x: &Tensor) -> Result<Tensor> {
    output.forward(&stack.forward(&input.forward(x)?)?)
}
