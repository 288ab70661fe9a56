//! The five stages as traits.

use fulgur_datasets::media::{Picture, Sound};
use serde::{Deserialize, Serialize};

use super::media::Media;
use crate::captions::Record;

/// What a text is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Modality {
    /// The picture.
    Visual,
    /// The sound.
    Audio,
}

impl Modality {
    /// The word for it in prompts.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Visual => "visual",
            Self::Audio => "audio",
        }
    }
}

/// The clip that a stage works on.
#[derive(Clone, Copy, Debug)]
pub struct Clip<'a> {
    /// Its name.
    pub id: &'a str,
    /// All that is known of it.
    pub record: &'a Record,
}

/// What a backend is, for the provenance of what it makes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct About {
    /// Its name.
    pub backend: String,
    /// The model behind it.
    pub model: Option<String>,
    /// The version of its prompt.
    pub prompt_version: Option<String>,
    /// What its texts are, where they are no descriptions.
    pub rule: Option<String>,
    /// Whether its results are worth being kept one by one, so that a stopped run does not ask twice.
    pub costly: bool,
}

/// Why a stage gave nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StageError {
    /// No clip can be done: the run ends, and what is done is kept.
    #[error("{0}")]
    Run(String),
    /// This clip cannot be done; the others can.
    #[error("{0}")]
    Clip(String),
    /// The run is to end.
    #[error("stopped")]
    Stopped,
}

/// Describes frames of a clip.
pub trait FrameCaptioner: Send + Sync {
    /// What it is.
    fn about(&self) -> About;

    /// Whether it looks at the frames; else it is given none.
    fn needs_frames(&self) -> bool {
        true
    }

    /// Captions of what is seen; none where there is nothing to say.
    ///
    /// # Errors
    /// The clip cannot be described, or the run is to end.
    fn caption(&self, frames: &[Picture], clip: Clip<'_>) -> Result<Vec<String>, StageError>;
}

/// Describes the sound of a clip.
pub trait AudioCaptioner: Send + Sync {
    /// What it is.
    fn about(&self) -> About;

    /// Whether it listens; else it is given no sound.
    fn needs_sound(&self) -> bool {
        true
    }

    /// Samples a second that it would like at least.
    fn rate(&self) -> u32 {
        0
    }

    /// Captions of what is heard; none where there is nothing to say. The sound has one channel.
    ///
    /// # Errors
    /// The clip cannot be described, or the run is to end.
    fn caption(&self, sound: Option<&Sound>, clip: Clip<'_>) -> Result<Vec<String>, StageError>;
}

/// Says the same in better words.
pub trait Rewriter: Send + Sync {
    /// What it is.
    fn about(&self) -> About;

    /// The text in other words.
    ///
    /// # Errors
    /// The text cannot be rewritten, or the run is to end.
    fn rewrite(&self, text: &str, kind: Modality, clip: Clip<'_>) -> Result<String, StageError>;
}

/// Joins what is seen and what is heard.
pub trait Merger: Send + Sync {
    /// What it is.
    fn about(&self) -> About;

    /// One description of both. One of the two may be empty.
    ///
    /// # Errors
    /// The texts cannot be joined, or the run is to end.
    fn merge(&self, video: &str, audio: &str, clip: Clip<'_>) -> Result<String, StageError>;
}

/// What a filter says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The clip stays.
    Keep,
    /// The clip goes, for this reason.
    Drop(&'static str),
    /// The clip stays, with a note.
    Flag(&'static str),
    /// The clip cannot be judged.
    Fail(String),
}

/// When a filter judges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Once the container is open.
    Opened,
    /// Once frames and sound are decoded.
    Decoded,
    /// Once picture and sound have texts of their own.
    Captioned,
    /// Once the clip is described.
    Described,
}

/// Decides whether a clip stays.
pub trait ClipFilter: Send + Sync {
    /// When it judges. From [`When::Captioned`] on there are no media, unless it needs them.
    fn when(&self) -> When;

    /// Whether it looks at media, or listens, even when the clip is described.
    fn needs_media(&self) -> bool {
        false
    }

    /// Judges a clip.
    fn judge(&self, record: &Record, media: Option<&Media>) -> Verdict;
}
