//! Any server that speaks the protocol of OpenAI: it captions frames and sounds, rewrites and merges.
//!
//! A question goes to `BASE/v1/chat/completions`. Tries that fail for a reason that may pass (408, 409, 429, 5xx, no
//! connection, no answer in time) are repeated after growing pauses, or after the pause that the server asks for. Answers are
//! kept on the disk by a hash of the question. Keys, pictures and sounds are never part of a message.

mod answer;
mod cache;
mod encode;
mod limits;
mod retry;
mod server;

use std::sync::Arc;

use fulgur_datasets::media::{Picture, Sound};

use super::prompts;
use super::stage::{About, AudioCaptioner, Clip, FrameCaptioner, Merger, Modality, Rewriter, StageError};
use encode::{jpeg_url, wav_base64};
pub use server::{Counts, Server, ServerError};
use server::{Part, Question};

/// A model behind a server.
#[derive(Debug)]
pub struct Remote {
    server: Arc<Server>,
    model: String,
    prompt_version: &'static str,
}

/// The stages that a model can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// What is seen.
    Frames,
    /// What is heard.
    Audio,
    /// Better words.
    Rewrite,
    /// One description of both.
    Merge,
}

impl Remote {
    /// A model of a server, for one task.
    #[must_use]
    pub fn new(server: Arc<Server>, model: &str, task: Task) -> Self {
        Self {
            server,
            model: model.to_owned(),
            prompt_version: match task {
                Task::Frames => prompts::FRAMES,
                Task::Audio => prompts::AUDIO,
                Task::Rewrite => prompts::REWRITE,
                Task::Merge => prompts::MERGE,
            },
        }
    }

    fn about_it(&self) -> About {
        About {
            backend: "openai-http".to_owned(),
            model: Some(self.model.clone()),
            prompt_version: Some(self.prompt_version.to_owned()),
            costly: true,
            rule: None,
        }
    }

    fn ask(&self, parts: Vec<Part>) -> Result<String, StageError> {
        self.server.ask(&Question {
            model: &self.model,
            prompt_version: self.prompt_version,
            parts,
        })
    }
}

impl FrameCaptioner for Remote {
    fn about(&self) -> About {
        self.about_it()
    }

    fn caption(&self, frames: &[Picture], _: Clip<'_>) -> Result<Vec<String>, StageError> {
        if frames.is_empty() {
            return Err(StageError::Clip("no frame to describe".to_owned()));
        }
        let mut parts = vec![Part::Text(prompts::FRAMES_TEXT.to_owned())];
        for frame in frames {
            parts.push(Part::Picture(jpeg_url(frame).map_err(StageError::Clip)?));
        }
        self.ask(parts).map(|text| vec![text])
    }
}

impl AudioCaptioner for Remote {
    fn about(&self) -> About {
        self.about_it()
    }

    fn caption(&self, sound: Option<&Sound>, _: Clip<'_>) -> Result<Vec<String>, StageError> {
        let sound = sound.ok_or_else(|| StageError::Clip("no sound to describe".to_owned()))?;
        let parts = vec![
            Part::Text(prompts::AUDIO_TEXT.to_owned()),
            Part::Sound(wav_base64(sound)),
        ];
        self.ask(parts).map(|text| vec![text])
    }
}

impl Rewriter for Remote {
    fn about(&self) -> About {
        self.about_it()
    }

    fn rewrite(&self, text: &str, kind: Modality, _: Clip<'_>) -> Result<String, StageError> {
        self.ask(vec![Part::Text(prompts::rewrite(text, kind))])
    }
}

impl Merger for Remote {
    fn about(&self) -> About {
        self.about_it()
    }

    fn merge(&self, video: &str, audio: &str, _: Clip<'_>) -> Result<String, StageError> {
        self.ask(vec![Part::Text(prompts::merge(video, audio))])
    }
}

#[cfg(test)]
mod tests;
