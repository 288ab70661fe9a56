//! Mel codec: log-mel spectrograms in patches of 4 frames by 16 bands.
//!
//! ```text
//! log-mel [B,T,64] -> patches 4x16 -> linear -> blocks -> latent [B,T/4,4,C] -> linear -> blocks -> log-mel
//! ```

use std::path::Path;

use candle_core::{Device, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_lightnet::linear::{Linear, Start};
use fulgur_lightnet::patches::{from_patches, to_patches};
use serde::{Deserialize, Serialize};

use super::{LatentNorm, ShiftStack};
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{apart, normal};
    use fulgur_lightnet::params::Params;

    fn small() -> MelCodecConfig {
        MelCodecConfig {
            latent_channels: 3,
            encoder: [16, 1],
            decoder: [16, 2],
            ..MelCodecConfig::default()
        }
    }

    fn codec(with_encoder: bool) -> Result<MelCodec> {
        MelCodec::new(&small(), with_encoder, &Params::random(2, &Device::Cpu).builder())
    }

    #[test]
    fn spectrograms_of_any_whole_length_come_back_in_their_shape() -> Result<()> {
        let codec = codec(true)?;
        for (batch, frames) in [(1, 4), (2, 40), (1, 100)] {
            let mel = Tensor::full(-1f32, (batch, frames, 64), &Device::Cpu)?;
            let latent = codec.encode(&mel)?;
            assert_eq!(codec.grid(frames)?, [frames / 4, 4]);
            assert_eq!(latent.dims(), [batch, frames / 4, 4, 3]);
            assert_eq!(codec.decode(&latent)?.dims(), mel.dims());
        }
        Ok(())
    }

    #[test]
    fn a_latent_knows_its_neighbourhood_alone() -> Result<()> {
        let codec = codec(true)?;
        let mel = normal("mel", &[1, 32, 64])?;
        let changed = Tensor::cat(&[&normal("other", &[1, 4, 64])?, &mel.narrow(1, 4, 28)?], 1)?;
        let (a, b) = (codec.encode_raw(&mel)?, codec.encode_raw(&changed)?);
        let moment = |i: usize| apart(&a.narrow(1, i, 1)?, &b.narrow(1, i, 1)?);
        assert!(moment(0)? > 1e-3 && moment(1)? > 0.0);
        for i in 2..8 {
            assert_eq!(moment(i)?, 0.0, "token {i}");
        }
        Ok(())
    }

    #[test]
    fn lengths_and_bands_that_do_not_fit_are_refused() -> Result<()> {
        let codec = codec(true)?;
        for frames in [0, 1, 6, 399] {
            let message = codec.grid(frames).unwrap_err().to_string();
            assert!(
                message.contains(&format!("{frames} frames, expected a multiple of 4")),
                "{message}"
            );
        }
        assert!(codec.encode_raw(&normal("mel", &[1, 6, 64])?).is_err());
        // Bands that patches divide, but not those of the codec.
        let wide = codec.encode_raw(&normal("mel", &[1, 8, 80])?)?;
        assert_eq!(wide.dims(), [1, 2, 5, 3]);
        let config = MelCodecConfig { bands: 60, ..small() };
        let params = Params::random(2, &Device::Cpu);
        let message = MelCodec::new(&config, true, &params.builder())
            .unwrap_err()
            .to_string();
        assert!(message.contains("[4, 16] does not divide 60"), "{message}");
        Ok(())
    }

    #[test]
    fn a_decoder_alone_says_that_it_cannot_encode() -> Result<()> {
        let codec = codec(false)?;
        let message = codec
            .encode(&normal("mel", &[1, 4, 64])?)
            .unwrap_err()
            .to_string();
        assert!(
            !codec.has_encoder() && message.contains("no encoder"),
            "{message}"
        );
        assert_eq!(
            codec.decode(&normal("latent", &[2, 3, 4, 3])?)?.dims(),
            [2, 12, 64]
        );
        Ok(())
    }
}
