//! Codec of still pictures: a [`VideoCodec`] whose patches are one frame long, so that a picture is a clip of one frame.
//!
//! ```text
//! picture [B,H,W,3] -> patches f x f -> linear -> blocks -> latent [B,H/f,W/f,C] -> linear -> blocks -> picture
//! ```

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_lightnet::config;

use super::{LatentNorm, VideoCodec, VideoCodecConfig};
use crate::error::Error;

/// Largest side of a patch, most latent channels, widest and deepest stack: beyond all reason.
const MOST_FACTOR: usize = 64;
const MOST_CHANNELS: usize = 1 << 10;
const MOST_WIDTH: usize = 1 << 14;
const MOST_DEPTH: usize = 1 << 8;

/// Encoder and decoder of pictures.
#[derive(Clone, Debug)]
pub struct PictureCodec {
    clips: VideoCodec,
    factor: usize,
}

impl PictureCodec {
    /// Channels of the pictures: red, green and blue.
    pub const COLOURS: usize = 3;

    /// Takes what [`VideoCodec::new`] takes, with the encoder.
    ///
    /// # Errors
    /// A shape that [`Self::check`] refuses, or tensors that are missing or have another shape.
    pub fn new(config: &VideoCodecConfig, vb: &VarBuilder) -> Result<Self> {
        Self::check(config)?;
        Ok(Self {
            clips: VideoCodec::new(config, true, vb)?,
            factor: config.patch[1],
        })
    }

    /// Refuses shapes that are not those of a codec of pictures.
    ///
    /// # Errors
    /// The field, what was found and what is expected.
    pub fn check(config: &VideoCodecConfig) -> Result<()> {
        let [frames, rows, columns] = config.patch;
        if frames != 1 || rows != columns || rows == 0 || rows % 2 != 0 || rows > MOST_FACTOR {
            candle_core::bail!(
                "patch is {:?}, expected [1, f, f] of a codec of pictures, f even and at most {MOST_FACTOR}",
                config.patch
            );
        }
        let most = [
            ("latent_channels", config.latent_channels, MOST_CHANNELS),
            ("encoder", config.encoder[0], MOST_WIDTH),
            ("encoder", config.encoder[1], MOST_DEPTH),
            ("decoder", config.decoder[0], MOST_WIDTH),
            ("decoder", config.decoder[1], MOST_DEPTH),
            ("fine", config.fine[0], MOST_WIDTH),
            ("fine", config.fine[1], MOST_DEPTH),
        ];
        for (field, found, most) in most {
            if !(1..=most).contains(&found) {
                candle_core::bail!("{field}: found {found}, expected 1 to {most}");
            }
        }
        Ok(())
    }

    /// Reads the shape in `config.json` of `dir`.
    ///
    /// # Errors
    /// The file is missing or unreadable, or is not of a codec of pictures.
    pub fn read(dir: &Path) -> std::result::Result<VideoCodecConfig, Error> {
        let path = dir.join("config.json");
        let found: serde_json::Value = config::read(&path)?;
        let refuse = |detail: String| Error::model(&path, detail);
        let config: VideoCodecConfig = serde_json::from_value(found).map_err(|error| {
            refuse(format!(
                "{error}, expected the shape of a codec of pictures, as the task picture-codec writes it"
            ))
        })?;
        Self::check(&config).map_err(|error| {
            // What follows the first line is where in the program.
            refuse(error.to_string().lines().next().unwrap_or_default().to_owned())
        })?;
        Ok(config)
    }

    /// Loads `config.json` and `model.safetensors` of `dir` onto `device`.
    ///
    /// # Errors
    /// A missing or unreadable file, a shape that is not of a codec of pictures, no encoder, or weights that are missing,
    /// unexpected or of another shape.
    pub fn load(dir: &Path, device: &Device) -> std::result::Result<Self, Error> {
        let config = Self::read(dir)?;
        let clips = VideoCodec::load(dir, device)?;
        if !clips.has_encoder() {
            return Err(Error::model(
                dir,
                "found a decoder alone, expected an encoder with it",
            ));
        }
        Ok(Self {
            clips,
            factor: config.patch[1],
        })
    }

    /// Shape of the codec.
    #[must_use]
    pub fn config(&self) -> &VideoCodecConfig {
        self.clips.config()
    }

    /// Pixels of a picture's side for one of its latent's.
    #[must_use]
    pub fn factor(&self) -> usize {
        self.factor
    }

    /// Channels C of a latent.
    #[must_use]
    pub fn channels(&self) -> usize {
        self.config().latent_channels
    }

    /// How raw latents become standardised ones.
    #[must_use]
    pub fn norm(&self) -> &LatentNorm {
        self.clips.norm()
    }

    /// Pictures `[B, H, W, 3]` in [-1, 1] to raw latents `[B, H/f, W/f, C]`, as trained on.
    ///
    /// # Errors
    /// Sides that are not multiples of the factor, or a failing operation.
    pub fn encode_raw(&self, pictures: &Tensor) -> Result<Tensor> {
        self.clips.encode_raw(&pictures.unsqueeze(1)?)?.squeeze(1)
    }

    /// Raw latents to pictures, not clamped.
    ///
    /// # Errors
    /// Another number of channels, or a failing operation.
    pub fn decode_raw(&self, latent: &Tensor) -> Result<Tensor> {
        self.clips.decode_raw(&latent.unsqueeze(1)?)?.squeeze(1)
    }

    /// Pictures `[B, H, W, 3]` in [-1, 1] to standardised latents `[B, H/f, W/f, C]` in `f32`.
    ///
    /// # Errors
    /// As [`Self::encode_raw`].
    pub fn encode(&self, pictures: &Tensor) -> Result<Tensor> {
        let raw = self.encode_raw(&pictures.to_dtype(DType::F32)?)?;
        self.norm().normalise(&raw)
    }

    /// Standardised latents to pictures, not clamped: values that are not finite stay so.
    ///
    /// # Errors
    /// As [`Self::decode_raw`].
    pub fn decode(&self, latent: &Tensor) -> Result<Tensor> {
        self.decode_raw(&self.norm().restore(&latent.to_dtype(DType::F32)?)?)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;

    use super::*;
    use crate::testing::{apart, normal};
    use fulgur_lightnet::params::{Params, Precision};

    fn small() -> VideoCodecConfig {
        VideoCodecConfig {
            patch: [1, 4, 4],
            latent_channels: 3,
            encoder: [24, 1],
            decoder: [24, 1],
            fine: [12, 1],
        }
    }

    fn save(dir: &Path, config: &VideoCodecConfig, with_encoder: bool) -> Params {
        let params = Params::random(2, &Device::Cpu);
        VideoCodec::new(config, with_encoder, &params.builder()).unwrap();
        fs::write(dir.join("config.json"), serde_json::to_string(config).unwrap()).unwrap();
        let weights = dir.join("model.safetensors");
        params.save(&weights, &BTreeMap::new(), Precision::F32).unwrap();
        params
    }

    /// Pictures are coded as clips of one frame are, whatever lies beside them.
    #[test]
    fn pictures_are_clips_of_one_frame() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let params = save(folder.path(), &small(), true);
        let clips = VideoCodec::new(&small(), true, &params.builder())?;
        let codec = PictureCodec::load(folder.path(), &Device::Cpu).unwrap();
        assert_eq!((codec.factor(), codec.channels()), (4, 3));
        let pictures = normal("pictures", &[2, 8, 12, 3])?;
        let latent = codec.encode(&pictures)?;
        assert_eq!(latent.dims(), [2, 2, 3, 3]);
        let of_clips = clips.encode(&pictures.reshape((2, 1, 8, 12, 3))?)?;
        assert!(apart(&latent, &of_clips.squeeze(1)?)? < 1e-6);
        let drawn = codec.decode(&latent)?;
        assert_eq!(drawn.dims(), pictures.dims());
        let clamped = drawn.clamp(-1f32, 1f32)?;
        assert!(apart(&clamped, &clips.decode(&of_clips)?.squeeze(1)?)? < 1e-6);
        let second = codec.decode(&codec.encode(&pictures.narrow(0, 1, 1)?)?)?;
        assert!(apart(&second, &drawn.narrow(0, 1, 1)?)? < 1e-5);
        Ok(())
    }

    /// The folder's mean and spread stand between raw latents and those that are denoised.
    #[test]
    fn latents_are_standardised_by_what_the_folder_holds() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let params = save(folder.path(), &small(), true);
        let (mean, std) = ([0.5f32, -1.0, 0.0], [2f32, 0.5, 1.0]);
        for (name, values) in [("latent.mean", mean), ("latent.std", std)] {
            params.vars()[name].set(&Tensor::new(&values, &Device::Cpu)?)?;
        }
        let weights = folder.path().join("model.safetensors");
        params.save(&weights, &BTreeMap::new(), Precision::F32).unwrap();
        let codec = PictureCodec::load(folder.path(), &Device::Cpu).unwrap();
        let pictures = normal("pictures", &[1, 8, 8, 3])?;
        let list = |x: Tensor| x.flatten_all()?.to_vec1::<f32>();
        let raw = list(codec.encode_raw(&pictures)?)?;
        for (i, (found, raw)) in list(codec.encode(&pictures)?)?.iter().zip(raw).enumerate() {
            let expected = (raw - mean[i % 3]) / std[i % 3];
            assert!((found - expected).abs() < 1e-5, "{i}: {found} {expected}");
        }
        Ok(())
    }

    #[test]
    fn other_folders_are_refused_in_a_line() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let line = || {
            let error = PictureCodec::load(dir, &Device::Cpu).unwrap_err().to_string();
            assert!(!error.contains('\n'), "{error}");
            error
        };
        assert!(line().contains("config.json: "));
        let config = |text: &str| fs::write(dir.join("config.json"), text).unwrap();
        config("{\"model_type\": \"vision_dit\", \"patch_size\": 4}");
        let found = line();
        assert!(
            found.contains("missing field `patch`")
                && found.contains("expected the shape of a codec of pictures"),
            "{found}"
        );
        for (wrong, words) in [
            (
                VideoCodecConfig::default(),
                "config.json: patch is [4, 8, 8], expected [1, f, f] of a codec of pictures",
            ),
            (
                VideoCodecConfig {
                    patch: [1, 4, 8],
                    ..small()
                },
                "patch is [1, 4, 8]",
            ),
            (
                VideoCodecConfig {
                    patch: [1, 1 << 40, 1 << 40],
                    ..small()
                },
                "at most 64",
            ),
            (
                VideoCodecConfig {
                    latent_channels: 0,
                    ..small()
                },
                "latent_channels: found 0, expected 1 to 1024",
            ),
            (
                VideoCodecConfig {
                    fine: [12, 1 << 40],
                    ..small()
                },
                "fine: found 1099511627776, expected 1 to 256",
            ),
        ] {
            config(&serde_json::to_string(&wrong).unwrap());
            assert!(line().contains(words), "{}", line());
        }
        save(dir, &small(), false);
        assert!(line().contains("found a decoder alone"), "{}", line());
        let other = VideoCodecConfig {
            latent_channels: 5,
            ..small()
        };
        save(dir, &small(), true);
        config(&serde_json::to_string(&other).unwrap());
        assert!(line().contains("encoder.output"), "{}", line());
        fs::remove_file(dir.join("model.safetensors")).unwrap();
        assert!(line().contains("model.safetensors: "), "{}", line());
    }
}
