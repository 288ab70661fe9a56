//! Any encoder of a folder, whatever it takes: frames, sounds and texts, or some of them.
//!
//! | folder | frames | sounds | texts |
//! |---|---|---|---|
//! | ImageBind | yes | yes | with a vocabulary beside the weights |
//! | CLIP | yes | | yes |
//! | CLAP | | yes | yes |
//! | of the builtin's architecture | yes | yes | |

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use fulgur_datasets::media::{Picture, Sound, resample};
use fulgur_lightnet::config::{self, ConfigError};
use fulgur_lightnet::params::folder::Weights;
use serde::Deserialize;

use super::{
    BuiltinEncoder, ClipEncoder, EncodeError, Encoder, ImageBindEncoder, ImageBindOptions, LoadError,
};
use crate::checkpoint;
use crate::features::FeatureError;
use crate::features::clap::{self, ClapEncoder};
use crate::metrics::joint::JointEncoder;

/// Rates that encoders listen at, in Hz; CLAP says its own.
const RATE: u32 = 16_000;
/// `model_type` of CLIP.
const CLIP: &str = "clip";

/// Something that is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sense {
    /// Frames.
    Frames,
    /// Sounds.
    Sounds,
    /// Texts.
    Texts,
}

impl Sense {
    fn name(self) -> &'static str {
        match self {
            Self::Frames => "frames",
            Self::Sounds => "sounds",
            Self::Texts => "texts",
        }
    }
}

/// Why there is no encoder.
#[derive(Debug, thiserror::Error)]
pub enum AnyError {
    /// Its folder.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A network that listens.
    #[error(transparent)]
    Feature(#[from] FeatureError),
    /// A network that sees.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// `config.json`.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights cannot be hashed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

#[derive(Debug)]
enum Kind {
    Builtin(Box<BuiltinEncoder>),
    ImageBind(Box<ImageBindEncoder>),
    Clip(Box<ClipEncoder>),
    Clap(Box<ClapEncoder>),
}

/// An encoder.
#[derive(Debug)]
pub struct AnyEncoder {
    kind: Kind,
    checkpoint: String,
}

#[derive(Default, Deserialize)]
struct Marks {
    model_type: Option<String>,
}

impl AnyEncoder {
    /// Opens a folder, or the file of an ImageBind checkpoint. Products of published encoders are of type `compute`.
    ///
    /// # Errors
    /// There are no weights, or they are damaged, incomplete or those of another network.
    pub fn open(dir: &Path, compute: DType, device: &Device) -> Result<Self, AnyError> {
        let path = dir.join("config.json");
        let marks: Marks = match path.is_file() {
            true => config::read(&path)?,
            false => Marks::default(),
        };
        let kind = match marks.model_type.as_deref() {
            Some(clap::MODEL_TYPE) => Kind::Clap(Box::new(ClapEncoder::load(dir, device)?)),
            Some(CLIP) => Kind::Clip(Box::new(ClipEncoder::open(dir, compute, device)?)),
            _ if ImageBindEncoder::is_in(dir)? => {
                let options = ImageBindOptions {
                    compute,
                    downmix: false,
                };
                Kind::ImageBind(Box::new(ImageBindEncoder::open(dir, options, device)?))
            }
            _ => Kind::Builtin(Box::new(BuiltinEncoder::load(dir, device)?)),
        };
        let weights = Weights::find(dir).map_err(LoadError::from)?;
        let files = weights.as_ref().map(Weights::files).unwrap_or_default();
        let checkpoint = checkpoint::short(files).map_err(|source| AnyError::Io {
            path: dir.to_owned(),
            source,
        })?;
        Ok(Self { kind, checkpoint })
    }

    /// Its name in results.
    pub fn name(&self) -> &str {
        match &self.kind {
            Kind::Builtin(encoder) => encoder.name(),
            Kind::ImageBind(encoder) => Encoder::name(&**encoder),
            Kind::Clip(encoder) => JointEncoder::name(&**encoder),
            Kind::Clap(_) => clap::MODEL_TYPE,
        }
    }

    /// The first digits of the hash of its weights.
    pub fn checkpoint(&self) -> &str {
        &self.checkpoint
    }

    /// Whether it takes such a thing.
    pub fn takes(&self, sense: Sense) -> bool {
        match (&self.kind, sense) {
            (Kind::ImageBind(_), _) => true,
            (Kind::Builtin(_), _) => sense != Sense::Texts,
            (Kind::Clip(_), _) => sense != Sense::Sounds,
            (Kind::Clap(_), _) => sense != Sense::Frames,
        }
    }

    /// Samples a second that it listens at: sounds of a lower rate lack what it could hear.
    pub fn rate(&self) -> u32 {
        match &self.kind {
            Kind::Clap(encoder) => encoder.rate(),
            _ => RATE,
        }
    }

    fn refused(&self, sense: Sense) -> EncodeError {
        EncodeError::Input(format!("{} takes no {}", self.name(), sense.name()))
    }

    /// One vector for each of some pictures in RGB.
    ///
    /// # Errors
    /// It takes no frames, or the network fails.
    pub fn pictures(&self, pictures: &[Picture]) -> Result<Vec<Vec<f32>>, EncodeError> {
        let one = |picture: &Picture| {
            let (frames, width, height) = ([picture.pixels.as_slice()], picture.width, picture.height);
            let vectors = match &self.kind {
                Kind::Builtin(encoder) => encoder.frames(&frames, width, height),
                Kind::ImageBind(encoder) => Encoder::frames(&**encoder, &frames, width, height),
                Kind::Clip(encoder) => JointEncoder::frames(&**encoder, &frames, width, height),
                Kind::Clap(_) => Err(self.refused(Sense::Frames)),
            }?;
            Ok(vectors.into_iter().next().unwrap_or_default())
        };
        pictures.iter().map(one).collect()
    }

    /// One vector of a whole sound.
    ///
    /// # Errors
    /// It takes no sounds, the sound is empty, or the network fails.
    pub fn sound(&self, sound: &Sound) -> Result<Vec<f32>, EncodeError> {
        if sound.samples.is_empty() {
            return Err(EncodeError::Input(
                "a sound of 0 samples, expected at least 1".to_owned(),
            ));
        }
        match &self.kind {
            Kind::Builtin(encoder) => encoder.sound(sound),
            Kind::ImageBind(encoder) => Encoder::sound(&**encoder, sound),
            Kind::Clip(_) => Err(self.refused(Sense::Sounds)),
            Kind::Clap(encoder) => {
                let wave = resample(&sound.mono(), encoder.rate()).map_err(input)?;
                encoder.sound(&wave.samples).map_err(input)
            }
        }
    }

    /// One vector of a text.
    ///
    /// # Errors
    /// It takes no texts, has no vocabulary, or the network fails.
    pub fn text(&self, text: &str) -> Result<Vec<f32>, EncodeError> {
        match &self.kind {
            Kind::Builtin(_) => Err(self.refused(Sense::Texts)),
            Kind::ImageBind(encoder) => JointEncoder::text(&**encoder, text),
            Kind::Clip(encoder) => JointEncoder::text(&**encoder, text),
            Kind::Clap(encoder) => encoder.text(text).map_err(input),
        }
    }
}

fn input(error: impl std::fmt::Display) -> EncodeError {
    EncodeError::Input(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_known_and_say_what_they_take() {
        let root = tempfile::tempdir().unwrap();
        let open = |dir: &Path| AnyEncoder::open(dir, DType::F32, &Device::Cpu);
        let picture = Picture::new((0..48 * 48 * 3).map(|i| (i % 251) as u8).collect(), 48, 48, 3).unwrap();
        let wave = (0..16_000).map(|i| 0.3 * (i as f32 * 0.1).sin()).collect();
        let sound = Sound::new(wave, 1, 16_000).unwrap();
        let imagebind = open(&fulgur_lightnet::testing::model("imagebind_tiny", root.path())).unwrap();
        assert_eq!((imagebind.name(), imagebind.rate()), ("imagebind", 16_000));
        let seen = imagebind.pictures(&[picture.clone(), picture.clone()]).unwrap();
        assert!(
            seen.len() == 2 && seen[0] == seen[1] && seen[0].len() == imagebind.sound(&sound).unwrap().len()
        );
        assert_eq!(imagebind.checkpoint().len(), 16);
        let empty = Sound::new(Vec::new(), 1, 16_000).unwrap();
        assert!(imagebind.sound(&empty).is_err());
        // A folder of CLIP lacks its vocabulary here.
        let clip = open(&fulgur_lightnet::testing::model("clip_gelu", root.path()));
        assert!(clip.unwrap_err().to_string().contains("vocabulary"));
        assert!(open(root.path()).is_err());
        let builtin = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/encoder");
        let builtin = open(&builtin).unwrap();
        assert!(builtin.takes(Sense::Frames) && !builtin.takes(Sense::Texts));
        assert_eq!(
            builtin.text("a dog").unwrap_err().to_string(),
            "builtin takes no texts"
        );
    }
}
