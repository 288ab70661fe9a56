//! A generator's folder: `model_index.json` and a folder for each part with `config.json` and `model.safetensors`.

use std::path::Path;

use fulgur_lightnet::config;
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Parts of a generator and the names of their folders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Prompt to token states.
    TextEncoder,
    /// The two streams.
    Denoiser,
    /// Latents to frames and back.
    VideoCodec,
    /// Latents to log-mel and back.
    MelCodec,
    /// Log-mel to waveform.
    Vocoder,
}

impl Part {
    /// All parts, in the order of their use.
    pub const ALL: [Self; 5] = [
        Self::TextEncoder,
        Self::Denoiser,
        Self::VideoCodec,
        Self::MelCodec,
        Self::Vocoder,
    ];

    /// Name of the part's folder.
    pub fn folder(self) -> &'static str {
        match self {
            Self::TextEncoder => "text_encoder",
            Self::Denoiser => "denoiser",
            Self::VideoCodec => "video_codec",
            Self::MelCodec => "mel_codec",
            Self::Vocoder => "vocoder",
        }
    }
}

/// Name of the file that makes a folder a generator.
pub const FILE_NAME: &str = "model_index.json";

/// `model_index.json`: what the generator is and its defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelIndex {
    /// Kind of the generator: `FulgurTwoStream`.
    #[serde(rename = "_class_name")]
    pub class_name: String,
    /// Name that goes with every clip.
    pub name: String,
    /// Frames per second that the model was trained on.
    pub fps: f64,
    /// Default width in pixels.
    pub width: usize,
    /// Default height in pixels.
    pub height: usize,
    /// Default length in seconds.
    pub duration_s: f64,
    /// Samples per second of the sound.
    pub sample_rate: u32,
    /// Samples between mel frames.
    pub hop: usize,
    /// Widths and heights are multiples of this.
    pub size_multiple: usize,
    /// Numbers of frames are multiples of this inside the model.
    pub frames_multiple: usize,
    /// Numbers of mel frames are multiples of this inside the model.
    pub mel_frames_multiple: usize,
    /// Default number of steps.
    pub steps: usize,
    /// Default bend of the sampling times.
    pub shift: f64,
    /// Default guidance of the picture.
    pub guidance_video: f64,
    /// Default guidance of the sound.
    pub guidance_audio: f64,
}

/// `_class_name` in the `model_index.json` of the builtin architecture.
pub const CLASS_NAME: &str = "FulgurTwoStream";

impl Default for ModelIndex {
    fn default() -> Self {
        Self {
            class_name: CLASS_NAME.into(),
            name: "fulgur-builtin".into(),
            fps: 12.0,
            width: 96,
            height: 96,
            duration_s: 4.0,
            sample_rate: 16_000,
            hop: 160,
            size_multiple: 16,
            frames_multiple: 4,
            mel_frames_multiple: 4,
            steps: 16,
            shift: 1.5,
            guidance_video: 5.0,
            guidance_audio: 5.0,
        }
    }
}

impl ModelIndex {
    /// Reads `model_index.json` of `dir`.
    pub fn read(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(FILE_NAME);
        let index: Self = config::read(&path)?;
        match index.fault() {
            Some(fault) => Err(Error::model(&path, fault)),
            None => Ok(index),
        }
    }

    /// The first field that no generator can have: what was found and what is expected.
    pub(super) fn fault(&self) -> Option<String> {
        if self.class_name != CLASS_NAME {
            let found = &self.class_name;
            return Some(format!("_class_name: found {found:?}, expected {CLASS_NAME:?}"));
        }
        let whole = [
            ("size_multiple", self.size_multiple),
            ("frames_multiple", self.frames_multiple),
            ("mel_frames_multiple", self.mel_frames_multiple),
            ("hop", self.hop),
            ("steps", self.steps),
            ("sample_rate", self.sample_rate as usize),
        ];
        if let Some((field, _)) = whole.iter().find(|(_, value)| *value == 0) {
            return Some(format!("{field}: found 0, expected 1 or more"));
        }
        let positive = [("fps", self.fps), ("shift", self.shift)];
        let odd = positive.iter().find(|(_, x)| !(x.is_finite() && *x > 0.0));
        odd.map(|(field, value)| format!("{field}: found {value}, expected more than 0"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_or_foreign_folder_is_named() -> std::io::Result<()> {
        let dir = tempfile::tempdir()?;
        let message = ModelIndex::read(dir.path()).map(|_| ()).unwrap_err().to_string();
        assert!(message.contains("model_index.json"), "{message}");
        let foreign = ModelIndex {
            class_name: "StableDiffusionPipeline".into(),
            ..Default::default()
        };
        std::fs::write(
            dir.path().join("model_index.json"),
            serde_json::to_string(&foreign)?,
        )?;
        let message = ModelIndex::read(dir.path()).map(|_| ()).unwrap_err().to_string();
        assert!(
            message.contains("StableDiffusionPipeline") && message.contains(CLASS_NAME),
            "{message}"
        );
        std::fs::write(dir.path().join("model_index.json"), "{\"fps\": ")?;
        let message = ModelIndex::read(dir.path()).map(|_| ()).unwrap_err().to_string();
        assert!(!message.contains('\n') && message.contains("line 1"), "{message}");
        Ok(())
    }
}
