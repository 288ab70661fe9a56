//! Scores of encoders that put frames, clips, sounds and texts into one space: TV, TA and AV of ImageBind (arXiv 2305.05665), and
//! CLIPSIM (arXiv 2104.14806).
//!
//! ```text
//! TV = cos(text, video)      TA = cos(text, sound)      AV = cos(sound, video)
//! CLIPSIM = mean over frames of cos(text, frame)
//! ```

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use fulgur_datasets::media::{Sound, Video};

use crate::avhscore::{cosine, frame_indices};
use crate::encoder::EncodeError;

/// Frames that go through an encoder at a time.
const BATCH: usize = 16;
/// Frames of a clip that CLIPSIM looks at, evenly spaced.
pub const CLIPSIM_FRAMES: usize = 48;

/// Networks that put frames, clips, sounds and texts, or some of them, into one space that is compared by cosine.
pub trait JointEncoder: Send + Sync {
    /// Name that goes with every score.
    fn name(&self) -> &str;

    /// One vector a frame; frames are RGB bytes, `height` rows of `width` pixels.
    ///
    /// # Errors
    /// Frames that do not fit the encoder, or a network that fails.
    fn frames(&self, frames: &[&[u8]], width: usize, height: usize) -> Result<Vec<Vec<f32>>, EncodeError>;

    /// One vector of a text.
    ///
    /// # Errors
    /// A text that cannot be encoded, or a network that fails.
    fn text(&self, text: &str) -> Result<Vec<f32>, EncodeError>;

    /// One vector of a whole soundtrack.
    ///
    /// # Errors
    /// There is no tower for sounds, or as [`Self::frames`].
    fn sound(&self, sound: &Sound) -> Result<Vec<f32>, EncodeError> {
        let _ = sound;
        Err(EncodeError::Input(format!("{} hears no sounds", self.name())))
    }

    /// One vector of a whole clip. ImageBind sees parts of clips; encoders that see frames alone have none.
    ///
    /// # Errors
    /// There is no tower for clips, or as [`Self::frames`].
    fn video(&self, video: &Video) -> Result<Vec<f32>, EncodeError> {
        let _ = video;
        Err(EncodeError::Input(format!("{} sees no clips", self.name())))
    }
}

/// A part of a sample that has a vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The clip.
    Video,
    /// Its sound.
    Sound,
    /// Its prompt.
    Text,
}

/// Vectors of the parts of a sample, or why there is none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Vectors(pub BTreeMap<Part, Result<Vec<f32>, String>>);

impl Vectors {
    /// Cosine of two parts.
    ///
    /// # Errors
    /// Why one of them has no vector.
    pub fn cosine(&self, pair: [Part; 2]) -> Result<f64, String> {
        let of = |part: Part| match self.0.get(&part) {
            Some(vector) => vector.as_ref().map_err(Clone::clone),
            None => Err(format!("no vector of the {part:?} was asked for")),
        };
        let [a, b] = pair.map(of);
        let cosine = cosine(a?, b?);
        if cosine.is_finite() {
            Ok(cosine)
        } else {
            Err("what was read is not finite".to_owned())
        }
    }
}

/// CLIPSIM of a clip and its prompt.
///
/// # Errors
/// No frames, `cancel` is set, or the encoder fails.
pub fn clipsim(
    encoder: &dyn JointEncoder,
    video: &Video,
    prompt: &str,
    cancel: &AtomicBool,
) -> Result<f64, EncodeError> {
    let text = encoder.text(prompt)?;
    let indices = frame_indices(video.frame_count, Some(CLIPSIM_FRAMES));
    if indices.is_empty() {
        return Err(EncodeError::NoFrames);
    }
    let mut sum = 0.0;
    for batch in indices.chunks(BATCH) {
        if cancel.load(Ordering::Relaxed) {
            return Err(EncodeError::Cancelled);
        }
        let frames: Vec<&[u8]> = batch.iter().map(|&i| video.frame(i)).collect();
        let vectors = encoder.frames(&frames, video.width, video.height)?;
        sum += vectors.iter().map(|frame| cosine(frame, &text)).sum::<f64>();
    }
    Ok(sum / indices.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Texts and frames are their first byte beside a one; there is no ear.
    struct Bytes;

    impl JointEncoder for Bytes {
        fn name(&self) -> &str {
            "bytes"
        }
        fn frames(&self, frames: &[&[u8]], _: usize, _: usize) -> Result<Vec<Vec<f32>>, EncodeError> {
            Ok(frames
                .iter()
                .map(|frame| vec![f32::from(frame[0]), 1.0])
                .collect())
        }
        fn text(&self, text: &str) -> Result<Vec<f32>, EncodeError> {
            Ok(vec![text.len() as f32, 1.0])
        }
        fn video(&self, video: &Video) -> Result<Vec<f32>, EncodeError> {
            Ok(vec![f32::from(video.frames[0]), 1.0])
        }
    }

    #[test]
    fn frames_are_averaged_and_missing_towers_say_so() {
        let video = Video::new([[3u8; 3], [0; 3]].concat(), 1, 1, 2.0).unwrap();
        let go = AtomicBool::new(false);
        let found = clipsim(&Bytes, &video, "abc", &go).unwrap();
        let expected = f64::midpoint(1.0, 1.0 / 10f64.sqrt());
        assert!((found - expected).abs() < 1e-6, "{found}");
        let sound = Sound::new(vec![0.0; 10], 1, 8000).unwrap();
        let vectors = Vectors(BTreeMap::from([
            (Part::Text, Bytes.text("abc").map_err(|e| e.to_string())),
            (Part::Video, Bytes.video(&video).map_err(|e| e.to_string())),
            (Part::Sound, Bytes.sound(&sound).map_err(|e| e.to_string())),
        ]));
        let cosine = |a, b| vectors.cosine([a, b]);
        assert!((cosine(Part::Text, Part::Video).unwrap() - 1.0).abs() < 1e-6);
        let line = cosine(Part::Text, Part::Sound).unwrap_err();
        assert_eq!(line, "bytes hears no sounds");
        assert!(cosine(Part::Sound, Part::Video).is_err());
        assert!(Vectors::default().cosine([Part::Text, Part::Video]).is_err());
        let empty = Video::new(Vec::new(), 1, 1, 2.0).unwrap();
        assert!(matches!(
            clipsim(&Bytes, &empty, "abc", &go),
            Err(EncodeError::NoFrames)
        ));
        go.store(true, Ordering::Relaxed);
        assert!(matches!(
            clipsim(&Bytes, &video, "abc", &go),
            Err(EncodeError::Cancelled)
        ));
    }
}
