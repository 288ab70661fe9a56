//! A BLIP captioner in a folder, as Hugging Face transformers writes it, describes frames.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device, Tensor};
use fulgur_datasets::media::{Filter, Picture};
use fulgur_lightnet::encoders::blip::search::Options;
use fulgur_lightnet::encoders::blip::words::{Words, WordsError};
use fulgur_lightnet::encoders::blip::{Blip, Sizes};
use fulgur_lightnet::params::folder::LoadError;

use super::config::Blip as Settings;
use super::stage::{About, Clip, FrameCaptioner, StageError};
use crate::checkpoint;
use crate::encoder::imagebind::seeing;

/// Name of the backend.
pub const NAME: &str = "candle-blip";

/// Why there is no captioner.
#[derive(Debug, thiserror::Error)]
pub enum BlipError {
    /// Its network.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Its vocabulary.
    #[error(transparent)]
    Words(#[from] WordsError),
    /// Its weights cannot be hashed.
    #[error("{path}: {source}")]
    Io {
        /// The folder.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// A prompt that leaves no room.
    #[error("blip.prompt: found {found} tokens, expected less than {longest}")]
    Prompt {
        /// Its tokens.
        found: usize,
        /// Longest text of the model.
        longest: usize,
    },
}

/// The captioner.
pub struct BlipCaptioner {
    blip: Blip,
    words: Words,
    prompt: Vec<u32>,
    options: Options,
    about: About,
    stop: Arc<AtomicBool>,
}

impl fmt::Debug for BlipCaptioner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlipCaptioner")
            .field("about", &self.about)
            .finish_non_exhaustive()
    }
}

impl BlipCaptioner {
    /// Opens the folder of a captioner. Products are of type `compute`: f32, and on a GPU bf16 or f16. Writing ends when `stop` is
    /// raised.
    ///
    /// # Errors
    /// The weights, their configuration or the vocabulary are missing, damaged or those of another model.
    pub fn open(
        dir: &Path,
        settings: &Settings,
        compute: DType,
        device: &Device,
        stop: Arc<AtomicBool>,
    ) -> Result<Self, BlipError> {
        let words = Words::find(dir)?;
        let blip = Blip::load(dir, compute, device)?;
        let Sizes { begin, longest, .. } = *blip.sizes();
        let mut prompt = vec![begin];
        if !settings.prompt.trim().is_empty() {
            prompt.extend(words.encode(&settings.prompt)?);
        }
        if prompt.len() >= longest {
            return Err(BlipError::Prompt {
                found: prompt.len(),
                longest,
            });
        }
        let hash = checkpoint::short(blip.files()).map_err(|source| BlipError::Io {
            path: dir.display().to_string(),
            source,
        })?;
        // `.` has no name of its own.
        let whole = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
        let name = whole.file_name().unwrap_or(whole.as_os_str()).to_string_lossy();
        let asked = settings.prompt.trim();
        Ok(Self {
            about: About {
                backend: NAME.to_owned(),
                model: Some(format!("{name} {hash}")),
                prompt_version: (!asked.is_empty()).then(|| asked.to_owned()),
                costly: true,
                rule: None,
            },
            options: Options {
                most: settings.max_tokens,
                beams: settings.beams,
                length_penalty: settings.length_penalty,
            },
            blip,
            words,
            prompt,
            stop,
        })
    }

    /// Pictures as the network takes them: `[B, 3, side, side]`. As in the reference the aspect is not kept.
    fn pixels(&self, pictures: &[Picture]) -> Result<Tensor, String> {
        let side = self.blip.sizes().side;
        let mut bytes = Vec::with_capacity(pictures.len() * side * side * 3);
        for picture in pictures {
            let fitted = picture
                .resized(side, side, Filter::Bicubic)
                .map_err(|error| error.to_string())?;
            bytes.extend(fitted.pixels);
        }
        let frames = Tensor::from_vec(bytes, (pictures.len(), side, side, 3), &Device::Cpu);
        frames
            .and_then(|frames| seeing::normalised(&frames, self.blip.device()))
            .map_err(|error| error.to_string())
    }

    /// A caption of each picture in RGB; none where the user stopped it.
    ///
    /// # Errors
    /// A picture of no size, or arithmetic that fails.
    pub fn describe(&self, pictures: &[Picture]) -> Result<Option<Vec<String>>, String> {
        let pixels = self.pixels(pictures)?;
        let go_on = || !self.stop.load(Ordering::SeqCst);
        let mut captions = Vec::with_capacity(pictures.len());
        for row in 0..pictures.len() {
            if !go_on() {
                return Ok(None);
            }
            let found = pixels
                .narrow(0, row, 1)
                .and_then(|one| self.blip.states(&one))
                .and_then(|states| self.blip.caption(&states, &self.prompt, &self.options, &go_on));
            let found = found.map_err(|error| error.to_string())?;
            captions.push(
                self.words
                    .decode(&found.tokens)
                    .map_err(|error| error.to_string())?,
            );
        }
        // A caption that was cut short by the user is none.
        Ok(go_on().then_some(captions))
    }
}

impl FrameCaptioner for BlipCaptioner {
    fn about(&self) -> About {
        self.about.clone()
    }

    fn caption(&self, frames: &[Picture], _: Clip<'_>) -> Result<Vec<String>, StageError> {
        if frames.is_empty() {
            return Err(StageError::Clip("no frame to describe".to_owned()));
        }
        match self.describe(frames) {
            Ok(Some(captions)) => Ok(captions),
            Ok(None) => Err(StageError::Stopped),
            Err(why) => Err(StageError::Clip(why)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::captions::Record;
    use fulgur_lightnet::testing;

    fn open(dir: &Path, settings: &Settings, stop: &Arc<AtomicBool>) -> Result<BlipCaptioner, BlipError> {
        BlipCaptioner::open(dir, settings, DType::F32, &Device::Cpu, Arc::clone(stop))
    }

    fn picture(seed: usize) -> Picture {
        let bytes = (0..40 * 30 * 3)
            .map(|i| (i * i * seed / 577 % 251) as u8)
            .collect();
        Picture::new(bytes, 40, 30, 3).unwrap()
    }

    #[test]
    fn frames_are_described_as_the_network_alone_describes_them() {
        let root = tempfile::tempdir().unwrap();
        let dir = testing::model("blip_tiny", root.path());
        let stop = Arc::default();
        let captioner = open(&dir, &Settings::default(), &stop).unwrap();
        let record = Record::default();
        let clip = Clip {
            id: "a",
            record: &record,
        };
        let frames = [picture(1), picture(3), picture(1)];
        let captions = captioner.caption(&frames, clip).unwrap();
        assert_eq!(captions.len(), 3);
        assert!(captions[0] == captions[2] && !captions[0].is_empty());
        // By hand: 12 x 12 pixels of Pillow's bicubic, less CLIP's mean, by its deviation.
        let small = frames[1].resized(12, 12, Filter::Bicubic).unwrap();
        let value = |c: usize, at: usize| {
            ((f64::from(small.pixels[3 * at + c]) / 255.0 - seeing::MEAN[c]) / seeing::DEVIATION[c]) as f32
        };
        let pixels: Vec<f32> = (0..3)
            .flat_map(|c| (0..144).map(move |at| (c, at)))
            .map(|(c, at)| value(c, at))
            .collect();
        let pixels = Tensor::from_vec(pixels, (1, 3, 12, 12), &Device::Cpu).unwrap();
        let states = captioner.blip.states(&pixels).unwrap();
        let begin = [captioner.blip.sizes().begin];
        let found = captioner
            .blip
            .caption(&states, &begin, &captioner.options, &|| true)
            .unwrap();
        assert_eq!(captions[1], captioner.words.decode(&found.tokens).unwrap());
        let about = captioner.about();
        assert!(about.costly && about.model.unwrap().starts_with("blip_tiny "));
        assert!(captioner.caption(&[], clip).is_err());
        stop.store(true, Ordering::SeqCst);
        assert_eq!(captioner.caption(&frames, clip), Err(StageError::Stopped));
    }

    #[test]
    fn prompts_lead_and_are_left_out() {
        let root = tempfile::tempdir().unwrap();
        let dir = testing::model("blip_tiny", root.path());
        let stop = Arc::default();
        let with = |prompt: &str| {
            let settings = Settings {
                prompt: prompt.to_owned(),
                ..Settings::default()
            };
            open(&dir, &settings, &stop)
        };
        let plain = with("").unwrap().describe(&[picture(2)]).unwrap().unwrap();
        let led = with("a picture of").unwrap();
        assert_eq!(led.about().prompt_version.as_deref(), Some("a picture of"));
        let said = led.describe(&[picture(2)]).unwrap().unwrap();
        assert!(
            said != plain && !said[0].starts_with("a picture of"),
            "{said:?} {plain:?}"
        );
        let line = with(&"dog ".repeat(30)).unwrap_err().to_string();
        assert_eq!(line, "blip.prompt: found 31 tokens, expected less than 24");
    }
}
