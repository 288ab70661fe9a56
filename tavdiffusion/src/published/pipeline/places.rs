//! Where the parts of a published generator lie: each in a folder of its own beside `model_index.json`, or where that file says.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fulgur_lightnet::config;
use fulgur_lightnet::diffusion::SolverConfig;
use serde::Deserialize;

use super::generator::schedule;
use crate::error::Error;
use crate::pipeline::{CLASS_NAME, FILE_NAME, Part};

/// How the classes of published pipelines end.
pub const PIPELINE: &str = "Pipeline";

/// A part of a generator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Piece {
    /// CLIP.
    TextEncoder,
    /// Its vocabulary.
    Tokenizer,
    /// The network over clips, over pictures where motion modules lie apart, or both streams of TAVDiffusion.
    Unet,
    /// Motion modules for a network over pictures.
    MotionAdapter,
    /// The network over spectrograms.
    AudioUnet,
    /// How networks that lie apart read each other.
    Fusion,
    /// Between pictures and latents.
    Vae,
    /// Between spectrograms and latents.
    AudioVae,
    /// From spectrograms to samples.
    Vocoder,
    /// `scheduler_config.json`.
    Scheduler,
}

impl Piece {
    /// All of them, in the order of their use.
    pub const ALL: [Self; 10] = [
        Self::Tokenizer,
        Self::TextEncoder,
        Self::Scheduler,
        Self::Unet,
        Self::MotionAdapter,
        Self::AudioUnet,
        Self::Fusion,
        Self::Vae,
        Self::AudioVae,
        Self::Vocoder,
    ];

    /// The name of its folder.
    #[must_use]
    pub fn folder(self) -> &'static str {
        match self {
            Self::TextEncoder => "text_encoder",
            Self::Tokenizer => "tokenizer",
            Self::Unet => "unet",
            Self::MotionAdapter => "motion_adapter",
            Self::AudioUnet => "audio_unet",
            Self::Fusion => "fusion",
            Self::Vae => "vae",
            Self::AudioVae => "audio_vae",
            Self::Vocoder => "vocoder",
            Self::Scheduler => "scheduler",
        }
    }
}

/// What `model_index.json` says; what else stands in it is of diffusers.
#[derive(Clone, Debug, Deserialize)]
struct Index {
    #[serde(rename = "_class_name")]
    class_name: String,
    name: Option<String>,
    #[serde(default)]
    folders: BTreeMap<String, PathBuf>,
    #[serde(flatten)]
    defaults: Defaults,
}

/// What a generator makes where a request does not say otherwise; the published settings where its file does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
pub(super) struct Defaults {
    pub(super) frames: Option<usize>,
    pub(super) fps: Option<f64>,
    pub(super) width: Option<usize>,
    pub(super) height: Option<usize>,
    pub(super) steps: Option<usize>,
    pub(super) guidance_video: Option<f64>,
    pub(super) guidance_audio: Option<f64>,
}

/// The class of a folder of a pipeline.
#[derive(Deserialize)]
struct Marks {
    #[serde(rename = "_class_name")]
    class_name: Option<String>,
}

/// Whether the folder `dir` is one of a published pipeline, by the class in its `model_index.json`.
///
/// # Errors
/// The file is missing or unreadable.
pub fn is_published(dir: &Path) -> Result<bool, Error> {
    let marks: Marks = config::read(&dir.join(FILE_NAME))?;
    Ok(marks.class_name.is_some_and(|class| class.ends_with(PIPELINE)))
}

/// The parts of a generator that are there.
#[derive(Clone, Debug)]
pub struct Places {
    dir: PathBuf,
    name: String,
    folders: BTreeMap<Piece, PathBuf>,
    pub(super) defaults: Defaults,
}

impl Places {
    /// Reads `model_index.json` of `dir` and looks for the parts. Its entry `folders`, where there is one, names other places for parts,
    /// from `dir` on: `{"unet": "/models/sd-1.5/unet", "motion_adapter": "mm_sd_v15.ckpt"}`.
    ///
    /// # Errors
    /// The file is missing, unreadable, or of another kind of generator; a place that it names is not there.
    pub fn read(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(FILE_NAME);
        let index: Index = config::read(&path)?;
        if !index.class_name.ends_with(PIPELINE) {
            let found = index.class_name;
            let words = format!("_class_name: found {found:?}, expected a name that ends with {PIPELINE}");
            return Err(Error::model(&path, words));
        }
        let mut folders = BTreeMap::new();
        for piece in Piece::ALL {
            let own = dir.join(piece.folder());
            if own.exists() {
                folders.insert(piece, own);
            }
        }
        for (name, place) in index.folders {
            let Some(piece) = Piece::ALL.into_iter().find(|piece| piece.folder() == name) else {
                let known = Piece::ALL.map(Piece::folder).join(", ");
                return Err(Error::model(
                    &path,
                    format!("folders: found {name:?}, expected some of {known}"),
                ));
            };
            let place = dir.join(place);
            if !place.exists() {
                return Err(Error::model(
                    &path,
                    format!("folders.{name}: there is no {}", place.display()),
                ));
            }
            folders.insert(piece, place);
        }
        let called = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        let called = called.file_name().map(|name| name.to_string_lossy().into_owned());
        Ok(Self {
            dir: dir.to_owned(),
            name: index.name.or(called).unwrap_or(index.class_name),
            folders,
            defaults: index.defaults,
        })
    }

    /// The codecs and the text encoder of a generator of either kind, to train networks on: as [`Self::read`], and of the folder of a
    /// builtin generator its `video_codec`, `mel_codec`, `vocoder` and `text_encoder`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn of_codecs(dir: &Path) -> Result<Self, Error> {
        let marks: Marks = config::read(&dir.join(FILE_NAME))?;
        if marks.class_name.as_deref() != Some(CLASS_NAME) {
            return Self::read(dir);
        }
        let own = [
            (Piece::TextEncoder, Part::TextEncoder),
            (Piece::Vae, Part::VideoCodec),
            (Piece::AudioVae, Part::MelCodec),
            (Piece::Vocoder, Part::Vocoder),
        ];
        Ok(Self {
            dir: dir.to_owned(),
            name: CLASS_NAME.to_owned(),
            folders: own.map(|(piece, part)| (piece, dir.join(part.folder()))).into(),
            defaults: Defaults::default(),
        })
    }

    /// Takes a part from another place.
    ///
    /// # Errors
    /// There is none.
    pub fn take(&mut self, piece: Piece, place: &Path) -> Result<(), Error> {
        if !place.exists() {
            return Err(Error::model(
                place,
                format!("there is no such folder, expected one for {}", piece.folder()),
            ));
        }
        self.folders.insert(piece, place.to_owned());
        Ok(())
    }

    /// The noise schedule of the folder: the published one where it has none.
    ///
    /// # Errors
    /// It is not understood.
    pub fn noise_schedule(&self) -> Result<SolverConfig, Error> {
        Ok(schedule(self)?.0)
    }

    /// What clips say they were made with: `name` of the file, else that of the folder.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder, or the file, of a part that is there.
    #[must_use]
    pub fn find(&self, piece: Piece) -> Option<&Path> {
        self.folders.get(&piece).map(PathBuf::as_path)
    }

    /// As [`Self::find`], of a part that is needed for `what`.
    ///
    /// # Errors
    /// It is not there.
    pub(crate) fn require(&self, piece: Piece, what: &str) -> Result<&Path, Error> {
        self.find(piece).ok_or_else(|| {
            let words = format!("there is no such folder, expected one for {what}");
            Error::model(&self.dir.join(piece.folder()), words)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn parts_lie_in_folders_or_elsewhere() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path();
        for name in ["unet", "vae", "elsewhere"] {
            fs::create_dir(dir.join(name)).unwrap();
        }
        let write = |text: &str| fs::write(dir.join(FILE_NAME), text).unwrap();
        write(
            r#"{"_class_name": "AnimateDiffPipeline", "_diffusers_version": "0.3", "unet": ["diffusers", "UNetMotionModel"],
            "folders": {"audio_unet": "elsewhere"}, "steps": 7, "name": "x"}"#,
        );
        assert!(is_published(dir).unwrap());
        let places = Places::read(dir).unwrap();
        assert_eq!(places.name(), "x");
        assert_eq!(places.defaults.steps, Some(7));
        assert_eq!(
            places.find(Piece::AudioUnet),
            Some(dir.join("elsewhere").as_path())
        );
        assert_eq!(places.find(Piece::Unet), Some(dir.join("unet").as_path()));
        assert!(places.find(Piece::Vocoder).is_none());
        let line = places.require(Piece::Vocoder, "sounds").unwrap_err().to_string();
        assert!(
            line.contains("vocoder: there is no such folder, expected one for sounds"),
            "{line}"
        );
        for (text, words) in [
            (r#"{"_class_name": "Other"}"#, "_class_name: found \"Other\""),
            (
                r#"{"_class_name": "XPipeline", "folders": {"net": "a"}}"#,
                "folders: found \"net\", expected some of tokenizer, text_encoder",
            ),
            (
                r#"{"_class_name": "XPipeline", "folders": {"vae": "gone"}}"#,
                "folders.vae: there is no",
            ),
        ] {
            write(text);
            let line = Places::read(dir).unwrap_err().to_string();
            assert!(line.contains(words) && !line.contains('\n'), "{line}");
        }
    }
}
