//! What stands between clips and latents: the published autoencoders with HiFi-GAN, or the codecs of the builtin generator, which lie in
//! the same folders and are told by their configuration.

use std::path::Path;

use candle_core::{DType, Device, Result as CandleResult, Tensor};
use fulgur_lightnet::config;
use serde::Deserialize;

use super::places::{Piece, Places};
use super::request::{AUDIO_UNIT, AudioSizes, VideoSizes};
use crate::codec::{MelCodec, MelCodecConfig, VideoCodec, VideoCodecConfig, VocoderConfig};
use crate::error::Error;
use crate::published::{AutoencoderKl, AutoencoderKlConfig, Half, HifiGan};

/// Samples a frame of the spectrograms of the builtin generator, and samples a second.
const HOP: usize = 160;
const RATE: usize = 16_000;

/// Pixels that a published autoencoder encodes at a time: it keeps some hundred values of each.
const PIXELS: usize = 1 << 21;

/// Tells codecs of the builtin generator from published ones.
#[derive(Deserialize)]
struct Marks {
    #[serde(default)]
    patch: Option<Vec<usize>>,
    #[serde(default)]
    stack: Option<Vec<usize>>,
}

impl Marks {
    /// Of a folder without a configuration nothing is known: it is no codec of the builtin generator.
    fn read(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("config.json");
        match path.is_file() {
            true => Ok(config::read(&path)?),
            false => Ok(Self {
                patch: None,
                stack: None,
            }),
        }
    }
}

/// A codec of pictures, before its weights are read.
#[derive(Clone, Debug)]
pub(super) enum Pictures {
    /// Picture by picture.
    Kl(AutoencoderKlConfig),
    /// Patches of several frames.
    Patches(VideoCodecConfig),
}

impl Pictures {
    /// Looks at the folder of a generator.
    pub(super) fn read(places: &Places) -> Result<Self, Error> {
        let dir = places.require(Piece::Vae, "pictures")?;
        if Marks::read(dir)?.patch.is_some() {
            let own: VideoCodecConfig = config::read(&dir.join("config.json"))?;
            if own.patch[1] != own.patch[2] || own.patch.contains(&0) {
                let words = format!("patch is {:?}, expected frames and two equal sides", own.patch);
                return Err(Error::model(dir, words));
            }
            return Ok(Self::Patches(own));
        }
        let vae = AutoencoderKl::config_in(dir)?;
        if (vae.in_channels(), vae.out_channels()) != (3, 3) {
            let words = format!(
                "in_channels and out_channels are {} and {}, expected 3 of pictures",
                vae.in_channels(),
                vae.out_channels()
            );
            return Err(Error::model(dir, words));
        }
        Ok(Self::Kl(vae))
    }

    /// What latents are like, for a network that sees `most` of their frames at once.
    pub(super) fn sizes(&self, most: usize) -> VideoSizes {
        match self {
            Self::Kl(vae) => VideoSizes {
                channels: vae.latent_channels(),
                factor: vae.factor(),
                stride: 1,
                most_frames: most,
            },
            Self::Patches(own) => VideoSizes {
                channels: own.latent_channels,
                factor: own.patch[1],
                stride: own.patch[0],
                most_frames: most.saturating_mul(own.patch[0]),
            },
        }
    }
}

/// A codec of spectrograms and the vocoder behind it, before their weights are read.
#[derive(Clone, Debug)]
pub(super) enum Sounds {
    /// AudioLDM's and HiFi-GAN.
    Kl(AudioSizes),
    /// Those of the builtin generator.
    Patches(AudioSizes),
}

impl Sounds {
    /// Looks at the folder of a generator.
    pub(super) fn read(places: &Places) -> Result<Self, Error> {
        let dir = places.require(Piece::AudioVae, "sounds")?;
        let place = places.require(Piece::Vocoder, "sounds")?;
        let own = Marks::read(dir)?.patch.is_some();
        if own != Marks::read(place)?.stack.is_some() {
            let kinds = ["a published one", "one of the builtin generator"];
            let (of_mels, of_waves) = if own {
                (kinds[1], kinds[0])
            } else {
                (kinds[0], kinds[1])
            };
            let words = format!("{of_waves}, expected {of_mels} as in audio_vae: their spectrograms differ");
            return Err(Error::model(place, words));
        }
        if own {
            return Self::patches(dir, place);
        }
        let vae = AutoencoderKl::config_in(dir)?;
        let vocoder = HifiGan::config_in(place)?;
        let bands = vocoder.model_in_dim;
        if vae.out_channels() != 1 || !bands.is_multiple_of(vae.factor()) {
            let words = format!(
                "out_channels is {} and the sides shrink {} times, expected 1 channel and a divisor of the {bands} bands of the vocoder",
                vae.out_channels(),
                vae.factor()
            );
            return Err(Error::model(dir, words));
        }
        if vocoder.sampling_rate == 0 || u32::try_from(vocoder.sampling_rate).is_err() {
            let words = format!(
                "sampling_rate is {}, expected samples a second",
                vocoder.sampling_rate
            );
            return Err(Error::model(place, words));
        }
        Ok(Self::Kl(AudioSizes {
            channels: vae.latent_channels(),
            bands: bands / vae.factor(),
            hop: vocoder.hop() * vae.factor(),
            rate: vocoder.sampling_rate,
        }))
    }

    fn patches(dir: &Path, place: &Path) -> Result<Self, Error> {
        let own: MelCodecConfig = config::read(&dir.join("config.json"))?;
        let vocoder: VocoderConfig = config::read(&place.join("config.json"))?;
        let [frames, bands] = own.patch;
        if vocoder.bands != own.bands || frames == 0 || bands == 0 || !own.bands.is_multiple_of(bands) {
            let words = format!(
                "{} bands in patches of {frames} x {bands}, expected whole patches of the {} bands of the vocoder",
                own.bands, vocoder.bands
            );
            return Err(Error::model(dir, words));
        }
        Ok(Self::Patches(AudioSizes {
            channels: own.latent_channels,
            bands: own.bands / bands,
            hop: HOP * frames,
            rate: RATE,
        }))
    }

    pub(super) fn sizes(&self) -> AudioSizes {
        match self {
            Self::Kl(sizes) | Self::Patches(sizes) => *sizes,
        }
    }
}

/// The spectrogram that a codec encodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// AudioLDM's: magnitudes in 64 bands, logarithms of their own.
    AudioLdm,
    /// The one of the builtin generator.
    Speech,
}

/// Sizes of one clip's latents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClipSizes {
    /// `[C, f, h, w]`.
    pub video: [usize; 4],
    /// `[C, T, bands]`.
    pub audio: [usize; 3],
    /// Samples of sound that these steps are made of, with the silence behind the end.
    pub samples: usize,
    /// Samples a second.
    pub rate: usize,
    /// Frames a frame of the latents.
    pub stride: usize,
}

enum PictureEncoder {
    Kl(Box<AutoencoderKl>),
    Patches(Box<VideoCodec>),
}

enum SoundEncoder {
    Kl(Box<AutoencoderKl>),
    Patches(Box<MelCodec>),
}

/// The encoders of a generator's folder: clips to latents as its networks denoise them.
pub struct Encoders {
    pictures: PictureEncoder,
    sounds: SoundEncoder,
    compute: DType,
}

impl std::fmt::Debug for Encoders {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Encoders({:?})", self.heard())
    }
}

impl Encoders {
    /// Loads them onto `device`; products are of type `compute`.
    ///
    /// # Errors
    /// A codec that is missing, is not understood, or has no encoder.
    pub fn load(places: &Places, compute: DType, device: &Device) -> Result<Self, Error> {
        let (pictures, sounds) = (Pictures::read(places)?, Sounds::read(places)?);
        let seen = places.require(Piece::Vae, "pictures")?;
        let heard = places.require(Piece::AudioVae, "sounds")?;
        let autoencoder = |dir: &Path| {
            Ok::<_, Error>(Box::new(AutoencoderKl::load(
                dir,
                &[Half::Encoder],
                compute,
                device,
            )?))
        };
        let without = |dir: &Path| Error::model(dir, "found no encoder, expected one for training");
        Ok(Self {
            pictures: match pictures {
                Pictures::Kl(_) => PictureEncoder::Kl(autoencoder(seen)?),
                Pictures::Patches(_) => match VideoCodec::load(seen, device)? {
                    codec if codec.has_encoder() => PictureEncoder::Patches(Box::new(codec)),
                    _ => return Err(without(seen)),
                },
            },
            sounds: match sounds {
                Sounds::Kl(_) => SoundEncoder::Kl(autoencoder(heard)?),
                Sounds::Patches(_) => match MelCodec::load(heard, device)? {
                    codec if codec.has_encoder() => SoundEncoder::Patches(Box::new(codec)),
                    _ => return Err(without(heard)),
                },
            },
            compute,
        })
    }

    /// Channels of the latents of pictures and of sounds, before weights are read.
    ///
    /// # Errors
    /// A codec that is missing or not understood.
    pub fn channels_in(places: &Places) -> Result<[usize; 2], Error> {
        Ok([
            Pictures::read(places)?.sizes(1).channels,
            Sounds::read(places)?.sizes().channels,
        ])
    }

    /// Of which spectrograms [`Self::sounds`] makes latents.
    #[must_use]
    pub fn heard(&self) -> Heard {
        match &self.sounds {
            SoundEncoder::Kl(_) => Heard::AudioLdm,
            SoundEncoder::Patches(_) => Heard::Speech,
        }
    }

    /// What the latents of a clip of so many frames of this size are like, before weights are read: as generating plans them.
    ///
    /// # Errors
    /// A codec that is missing or not understood, or a size that is not whole latents.
    pub fn sizes_in(
        places: &Places,
        frames: usize,
        fps: f64,
        [height, width]: [usize; 2],
    ) -> Result<ClipSizes, Error> {
        let VideoSizes {
            channels,
            factor,
            stride,
            ..
        } = Pictures::read(places)?.sizes(1);
        for (field, found, unit) in [
            ("frames", frames, stride),
            ("height", height, factor),
            ("width", width, factor),
        ] {
            if found == 0 || !found.is_multiple_of(unit) {
                return Err(Error::request(field, found, format!("a multiple of {unit}")));
            }
        }
        let AudioSizes {
            channels: heard,
            bands,
            hop,
            rate,
        } = Sounds::read(places)?.sizes();
        let samples = (frames as f64 / fps * rate as f64).round() as usize;
        let steps = samples.max(1).div_ceil(hop).next_multiple_of(AUDIO_UNIT);
        Ok(ClipSizes {
            video: [channels, frames / stride, height / factor, width / factor],
            audio: [heard, steps, bands],
            samples: steps * hop,
            rate,
            stride,
        })
    }

    /// Frames `[B, F, H, W, 3]` in [-1, 1] to latents `[B, C, f, h, w]`, f32: means of the distributions.
    ///
    /// # Errors
    /// Sizes that are not whole latents, or a failing operation.
    pub fn pictures(&self, frames: &Tensor) -> CandleResult<Tensor> {
        let frames = frames.to_dtype(self.compute)?;
        match &self.pictures {
            PictureEncoder::Patches(codec) => codec
                .encode(&frames)?
                .to_dtype(DType::F32)?
                .permute((0, 4, 1, 2, 3))?
                .contiguous(),
            PictureEncoder::Kl(vae) => {
                let (clips, count, height, width, _) = frames.dims5()?;
                let pictures = frames.reshape((clips * count, height, width, 3))?;
                let pictures = pictures.permute((0, 3, 1, 2))?.contiguous()?;
                let at_a_time = (PIXELS / (height * width).max(1)).max(1);
                let parts: Vec<Tensor> = (0..clips * count)
                    .step_by(at_a_time)
                    .map(|first| {
                        let part = pictures.narrow(0, first, at_a_time.min(clips * count - first))?;
                        vae.encode(&part)?.mean.to_dtype(DType::F32)
                    })
                    .collect::<CandleResult<_>>()?;
                let mean = Tensor::cat(&parts, 0)?;
                let (_, channels, h, w) = mean.dims4()?;
                (mean * vae.config().scaling_factor)?
                    .reshape((clips, count, channels, h, w))?
                    .transpose(1, 2)?
                    .contiguous()
            }
        }
    }

    /// Spectrograms `[B, T, bands]` of the kind [`Self::heard`] to latents `[B, C, T', bands']`, f32: means of the distributions.
    ///
    /// # Errors
    /// Sizes that are not whole latents, or a failing operation.
    pub fn sounds(&self, mel: &Tensor) -> CandleResult<Tensor> {
        let mel = mel.to_dtype(self.compute)?;
        match &self.sounds {
            SoundEncoder::Patches(codec) => codec
                .encode(&mel)?
                .to_dtype(DType::F32)?
                .permute((0, 3, 1, 2))?
                .contiguous(),
            SoundEncoder::Kl(vae) => {
                let mean = vae.encode(&mel.unsqueeze(1)?)?.mean.to_dtype(DType::F32)?;
                mean * vae.config().scaling_factor
            }
        }
    }
}
