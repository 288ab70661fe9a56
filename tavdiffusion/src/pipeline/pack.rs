//! A generator's folder out of the folders of its trained parts, small enough to be shipped.
//!
//! What only training needs is left out: the encoders of the codecs and the maps of the contrastive loss. What the parts
//! say about their clips (rates, multiples of sizes) goes to `model_index.json`, after a check that they fit together.

use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use fulgur_lightnet::params::Precision;
use fulgur_lightnet::params::file::write_atomically;
use fulgur_lightnet::params::pack::PackedFolder;

use super::folder::{FILE_NAME, ModelIndex, Part};
use super::request::Request;
use crate::codec::{MelCodec, MelCodecConfig, VideoCodec, VideoCodecConfig, Vocoder, VocoderConfig};
use crate::error::Error;
use crate::streams::{TwoStream, TwoStreamConfig};
use crate::text::{TextConfig, TextModel};

/// Tensors of the contrastive loss of a denoiser.
const CONTRAST: &str = "contrast.";
/// Tensors of a codec's encoder.
const ENCODER: &str = "encoder.";
/// Relative difference of two rates that counts as none.
const SAME: f64 = 1e-6;
/// Rates are rounded to millionths.
const MICRO: f64 = 1e6;

/// Folders of the trained parts, each with `config.json` and `model.safetensors`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    /// The text encoder, with `tokenizer.json`.
    pub text_encoder: PathBuf,
    /// The two streams.
    pub denoiser: PathBuf,
    /// The video codec.
    pub video_codec: PathBuf,
    /// The mel codec.
    pub mel_codec: PathBuf,
    /// The vocoder.
    pub vocoder: PathBuf,
}

impl Sources {
    fn folder(&self, part: Part) -> &Path {
        match part {
            Part::TextEncoder => &self.text_encoder,
            Part::Denoiser => &self.denoiser,
            Part::VideoCodec => &self.video_codec,
            Part::MelCodec => &self.mel_codec,
            Part::Vocoder => &self.vocoder,
        }
    }
}

/// How a generator is packed, and the defaults of its use; [`ModelIndex`] explains them.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// How weights are stored.
    pub precision: Precision,
    /// Whether the codecs keep their encoders.
    pub with_encoders: bool,
    /// Name that goes with every clip.
    pub name: String,
    /// Default width in pixels.
    pub width: usize,
    /// Default height in pixels.
    pub height: usize,
    /// Default length in seconds.
    pub duration_s: f64,
    /// Default number of steps.
    pub steps: usize,
    /// Default bend of the sampling times.
    pub shift: f64,
    /// Default guidance of the picture.
    pub guidance_video: f64,
    /// Default guidance of the sound.
    pub guidance_audio: f64,
}

/// A generator's folder in memory.
#[derive(Clone, Debug)]
pub struct PackedGenerator {
    index: Vec<u8>,
    parts: Vec<(Part, PackedFolder)>,
}

impl PackedGenerator {
    /// Reads the parts, checks that they are whole and fit together, and packs them. `on_part` is told of every finished
    /// part and returns false to stop, and then there is no generator.
    ///
    /// # Errors
    /// A part that is missing, damaged or another network; parts that do not fit together; defaults that the generator
    /// cannot fulfil; a value that does not fit the precision.
    pub fn new(
        sources: &Sources,
        options: &Options,
        on_part: &mut dyn FnMut(Part) -> bool,
    ) -> Result<Option<Self>, Error> {
        let index = Shapes::read(sources)?.index(sources, options)?;
        let mut parts = Vec::with_capacity(Part::ALL.len());
        for part in Part::ALL {
            let keep = |name: &str| match part {
                Part::Denoiser => !name.starts_with(CONTRAST),
                Part::VideoCodec | Part::MelCodec => options.with_encoders || !name.starts_with(ENCODER),
                Part::TextEncoder | Part::Vocoder => true,
            };
            let folder = PackedFolder::new(sources.folder(part), options.precision, keep)?;
            parts.push((part, folder));
            if !on_part(part) {
                return Ok(None);
            }
        }
        let mut index =
            serde_json::to_vec_pretty(&index).map_err(|error| Error::model(Path::new(FILE_NAME), error))?;
        index.push(b'\n');
        Ok(Some(Self { index, parts }))
    }

    /// The parts in the order of [`Part::ALL`].
    pub fn parts(&self) -> &[(Part, PackedFolder)] {
        &self.parts
    }

    /// Size of all files together.
    pub fn bytes(&self) -> u64 {
        let parts: u64 = self.parts.iter().map(|(_, folder)| folder.bytes()).sum();
        self.index.len() as u64 + parts
    }

    /// Writes the folder's content into `dir`, which exists and is empty.
    ///
    /// # Errors
    /// The folder cannot be written, or the disk is full.
    pub fn write(&self, dir: &Path) -> Result<(), Error> {
        for (part, folder) in &self.parts {
            let target = dir.join(part.folder());
            std::fs::create_dir(&target).map_err(|error| Error::model(&target, error))?;
            folder.write(&target)?;
        }
        write_atomically(&dir.join(FILE_NAME), |out| out.write_all(&self.index))?;
        Ok(())
    }
}

/// What the parts say about themselves.
struct Shapes {
    text: TextConfig,
    denoiser: TwoStreamConfig,
    video: VideoCodecConfig,
    mel: MelCodecConfig,
    vocoder: VocoderConfig,
}

impl Shapes {
    /// Loads every part once, so that a damaged or a wrong one is named by its own folder.
    fn read(sources: &Sources) -> Result<Self, Error> {
        let device = &Device::Cpu;
        let text = TextModel::load(&sources.text_encoder, device)?;
        let denoiser = TwoStream::load(&sources.denoiser, DType::F32, device)?;
        Ok(Self {
            text: text.encoder().config().clone(),
            denoiser: denoiser.config().clone(),
            video: VideoCodec::load(&sources.video_codec, device)?.config().clone(),
            mel: MelCodec::load(&sources.mel_codec, device)?.config().clone(),
            vocoder: Vocoder::load(&sources.vocoder, device)?.config().clone(),
        })
    }

    /// `model_index.json` of the generator that the parts make together.
    fn index(&self, sources: &Sources, options: &Options) -> Result<ModelIndex, Error> {
        let Self {
            text,
            denoiser,
            video,
            mel,
            vocoder,
        } = self;
        let config = sources.denoiser.join("config.json");
        let unfit = |field: &str, found: String, expected: String| {
            Error::model(&config, format!("{field}: found {found}, expected {expected}"))
        };
        let of = |dir: &Path, what: &str| format!("the {what} of {}", dir.display());
        let widths = [
            (
                "text_dim",
                denoiser.text_dim,
                text.hidden_size,
                of(&sources.text_encoder, "hidden_size"),
            ),
            (
                "video.channels",
                denoiser.video.channels,
                video.latent_channels,
                of(&sources.video_codec, "latent_channels"),
            ),
            (
                "audio.channels",
                denoiser.audio.channels,
                mel.latent_channels,
                of(&sources.mel_codec, "latent_channels"),
            ),
        ];
        if let Some((field, found, expected, place)) = widths.into_iter().find(|(_, a, b, _)| a != b) {
            return Err(unfit(field, found.to_string(), format!("{expected}, {place}")));
        }
        if vocoder.bands != mel.bands {
            let expected = of(&sources.mel_codec, "bands");
            let found = format!(
                "bands: found {}, expected {}, {expected}",
                vocoder.bands, mel.bands
            );
            return Err(Error::model(&sources.vocoder.join("config.json"), found));
        }
        let [token_frames, token_rows, token_columns] = denoiser.video.patch[..] else {
            let found = format!("{:?}", denoiser.video.patch);
            return Err(unfit("video.patch", found, "three axes".into()));
        };
        let [token_times, _] = denoiser.audio.patch[..] else {
            let found = format!("{:?}", denoiser.audio.patch);
            return Err(unfit("audio.patch", found, "two axes".into()));
        };
        let [frames, rows, columns] = video.patch;
        let [mel_frames, _] = mel.patch;
        let sound = ModelIndex::default();
        let step_s = (mel_frames * sound.hop) as f64 / f64::from(sound.sample_rate);
        if (denoiser.audio.step_s / step_s - 1.0).abs() > SAME {
            let expected = format!("{step_s}, a patch of the mel codec in seconds");
            return Err(unfit("audio.step_s", denoiser.audio.step_s.to_string(), expected));
        }
        // A latent of the video codec spans its patch; the rate follows, up to the rounding of the division.
        let fps = (frames as f64 / denoiser.video.step_s * MICRO).round() / MICRO;
        let index = ModelIndex {
            name: options.name.clone(),
            fps,
            width: options.width,
            height: options.height,
            duration_s: options.duration_s,
            size_multiple: least_common_multiple(rows * token_rows, columns * token_columns),
            frames_multiple: frames * token_frames,
            mel_frames_multiple: mel_frames * token_times,
            steps: options.steps,
            shift: options.shift,
            guidance_video: options.guidance_video,
            guidance_audio: options.guidance_audio,
            ..sound
        };
        if let Some(fault) = index.fault() {
            return Err(Error::model(Path::new(FILE_NAME), fault));
        }
        Request::new("any words", &index).plan(&index)?;
        Ok(index)
    }
}

/// Zero where one of the numbers is.
fn least_common_multiple(a: usize, b: usize) -> usize {
    (1..=b).map(|k| k * a).find(|n| n % b == 0).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources() -> Sources {
        let part = |name: &str| PathBuf::from("runs").join(name).join("model");
        Sources {
            text_encoder: part("text"),
            denoiser: part("tav"),
            video_codec: part("video-codec"),
            mel_codec: part("mel-codec"),
            vocoder: part("vocoder"),
        }
    }

    fn shapes() -> Shapes {
        Shapes {
            text: TextConfig::default(),
            denoiser: TwoStreamConfig::default(),
            video: VideoCodecConfig::default(),
            mel: MelCodecConfig::default(),
            vocoder: VocoderConfig::default(),
        }
    }

    fn options() -> Options {
        let ModelIndex {
            name,
            width,
            height,
            duration_s,
            steps,
            shift,
            guidance_video,
            guidance_audio,
            ..
        } = ModelIndex::default();
        Options {
            precision: Precision::EightBit,
            with_encoders: false,
            name,
            width,
            height,
            duration_s,
            steps,
            shift,
            guidance_video,
            guidance_audio,
        }
    }

    #[test]
    fn the_default_parts_make_the_default_index() -> Result<(), Error> {
        assert_eq!(shapes().index(&sources(), &options())?, ModelIndex::default());
        assert_eq!(least_common_multiple(16, 24), 48);
        assert_eq!((least_common_multiple(0, 8), least_common_multiple(8, 0)), (0, 0));
        Ok(())
    }

    #[test]
    fn parts_that_do_not_fit_are_named() {
        let fault = |change: fn(&mut Shapes, &mut Options)| {
            let (mut shapes, mut options) = (shapes(), options());
            change(&mut shapes, &mut options);
            let message = shapes.index(&sources(), &options).unwrap_err().to_string();
            assert!(!message.contains('\n'), "{message}");
            message
        };
        let text = fault(|shapes, _| shapes.text.hidden_size = 128);
        assert!(
            text.contains("tav")
                && text.contains("text_dim: found 256, expected 128")
                && text.contains("text"),
            "{text}"
        );
        let video = fault(|shapes, _| shapes.video.latent_channels = 4);
        assert!(
            video.contains("video.channels: found 20, expected 4") && video.contains("video-codec"),
            "{video}"
        );
        let audio = fault(|shapes, _| shapes.denoiser.audio.channels = 3);
        assert!(audio.contains("audio.channels: found 3, expected 8"), "{audio}");
        let bands = fault(|shapes, _| shapes.vocoder.bands = 80);
        assert!(
            bands.contains("vocoder") && bands.contains("found 80, expected 64"),
            "{bands}"
        );
        let step = fault(|shapes, _| shapes.mel.patch[0] = 8);
        assert!(step.contains("audio.step_s: found 0.04, expected 0.08"), "{step}");
        let patch = fault(|shapes, _| shapes.denoiser.video.patch = vec![2, 2]);
        assert!(patch.contains("video.patch: found [2, 2]"), "{patch}");
        let zero = fault(|shapes, _| shapes.denoiser.video.patch[1] = 0);
        assert!(zero.contains("size_multiple: found 0"), "{zero}");
        let shift = fault(|_, options| options.shift = f64::NAN);
        assert!(shift.contains("shift: found NaN"), "{shift}");
        let size = fault(|_, options| options.width = 100);
        assert!(
            size.contains("width: found 100, expected a multiple of 16"),
            "{size}"
        );
        let guidance = fault(|_, options| options.guidance_audio = f64::INFINITY);
        assert!(guidance.contains("guidance-audio: found inf"), "{guidance}");
    }
}
