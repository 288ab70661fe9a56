//! Whether caption, picture and sound of a clip belong together, as an encoder has it: cosines of their vectors.

use crate::annotate::config::Filters;
use crate::annotate::media::Media;
use crate::annotate::stage::{ClipFilter, Verdict, When};
use crate::avhscore::{cosine, mean_cosine};
use crate::captions::Record;
use crate::encoder::{AnyEncoder, EncodeError, Sense};

/// An encoder that cannot compare what is asked for.
#[derive(Debug, thiserror::Error)]
pub enum AgreementError {
    /// It does not take one of the two.
    #[error("filters.least_{pair}: found {name}, expected an encoder that takes both")]
    Pair {
        /// What is compared.
        pair: &'static str,
        /// The encoder.
        name: String,
    },
    /// Texts cannot be read.
    #[error("filters.agreement: {0}")]
    Texts(#[from] EncodeError),
}

/// Compares and leaves out.
#[derive(Debug)]
pub struct Agreement {
    encoder: AnyEncoder,
    wanted: Vec<(&'static str, f64)>,
}

/// What a pair is of; caption stands for text.
fn senses(pair: &str) -> [Sense; 2] {
    match pair {
        "text_video" => [Sense::Texts, Sense::Frames],
        "text_audio" => [Sense::Texts, Sense::Sounds],
        _ => [Sense::Sounds, Sense::Frames],
    }
}

impl Agreement {
    /// With the thresholds of the settings.
    ///
    /// # Errors
    /// The encoder does not take what a threshold is about, or cannot read texts.
    pub fn new(encoder: AnyEncoder, settings: &Filters) -> Result<Self, AgreementError> {
        let wanted = settings.wanted();
        for (pair, _) in &wanted {
            if senses(pair).iter().any(|sense| !encoder.takes(*sense)) {
                return Err(AgreementError::Pair {
                    pair,
                    name: encoder.name().to_owned(),
                });
            }
        }
        let agreement = Self { encoder, wanted };
        if agreement.needs(Sense::Texts) {
            // A vocabulary that is missing is told before the first clip.
            agreement.encoder.text("a dog barks")?;
        }
        Ok(agreement)
    }

    /// Whether it compares such a thing.
    #[must_use]
    pub fn needs(&self, sense: Sense) -> bool {
        self.wanted.iter().any(|(pair, _)| senses(pair).contains(&sense))
    }

    /// Samples a second that it would like at least.
    #[must_use]
    pub fn rate(&self) -> u32 {
        match self.needs(Sense::Sounds) {
            true => self.encoder.rate(),
            false => 0,
        }
    }

    /// The cosines that are wanted, in the order of the thresholds.
    fn cosines(&self, record: &Record, media: &Media) -> Result<Vec<f64>, String> {
        let words = |error: EncodeError| error.to_string();
        let mut seen = Vec::new();
        if self.needs(Sense::Frames) {
            if media.frames.is_empty() {
                return Err("no frame to compare".to_owned());
            }
            seen = self.encoder.pictures(&media.frames).map_err(words)?;
        }
        let mut heard = Vec::new();
        if self.needs(Sense::Sounds) {
            let sound = media.sound.as_ref().ok_or("no sound to compare")?;
            heard = self.encoder.sound(sound).map_err(words)?;
        }
        let mut read = Vec::new();
        if self.needs(Sense::Texts) {
            let caption = record.caption_text().ok_or("no caption to compare")?;
            read = self.encoder.text(caption).map_err(words)?;
        }
        let of = |pair: &str| match pair {
            "text_video" => mean_cosine(&seen, &read).unwrap_or(0.0),
            "text_audio" => cosine(&read, &heard),
            _ => mean_cosine(&seen, &heard).unwrap_or(0.0),
        };
        Ok(self.wanted.iter().map(|(pair, _)| of(pair)).collect())
    }
}

impl ClipFilter for Agreement {
    fn when(&self) -> When {
        When::Described
    }

    fn needs_media(&self) -> bool {
        true
    }

    fn judge(&self, record: &Record, media: Option<&Media>) -> Verdict {
        let Some(media) = media else {
            return Verdict::Keep;
        };
        match self.cosines(record, media) {
            Ok(cosines) => {
                let low = self
                    .wanted
                    .iter()
                    .zip(cosines)
                    .find(|((_, least), cosine)| cosine < least);
                low.map_or(Verdict::Keep, |((pair, _), _)| Verdict::Drop(pair))
            }
            Err(why) => Verdict::Fail(format!("agreement: {why}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::{DType, Device};
    use fulgur_datasets::media::{Picture, Sound};

    use super::*;

    fn open(dir: &Path) -> AnyEncoder {
        AnyEncoder::open(dir, DType::F32, &Device::Cpu).unwrap()
    }

    fn builtin() -> AnyEncoder {
        open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/encoder"))
    }

    fn media() -> Media {
        let picture = |seed: usize| {
            let bytes = (0..96 * 96 * 3)
                .map(|i| (i * i * seed / 977 % 251) as u8)
                .collect();
            Picture::new(bytes, 96, 96, 3).unwrap()
        };
        let wave = (0..32_000).map(|i| 0.3 * (i as f32 * 0.05).sin()).collect();
        Media {
            frames: vec![picture(1), picture(7)],
            sound: Some(Sound::new(wave, 1, 16_000).unwrap()),
            ..Media::default()
        }
    }

    #[test]
    fn clips_below_a_threshold_go_with_its_name() {
        let (media, record) = (media(), Record::default());
        let with = |least: f64| {
            let settings = Filters {
                least_audio_video: Some(least),
                ..Filters::default()
            };
            Agreement::new(builtin(), &settings).unwrap()
        };
        let found = with(0.0).cosines(&record, &media).unwrap()[0];
        let encoder = builtin();
        let heard = encoder.sound(media.sound.as_ref().unwrap()).unwrap();
        let seen = encoder.pictures(&media.frames).unwrap();
        let by_hand = (cosine(&seen[0], &heard) + cosine(&seen[1], &heard)) / 2.0;
        assert!((found - by_hand).abs() < 1e-9 && found.abs() < 1.0);
        let judge = |least, media: Option<&Media>| with(least).judge(&record, media);
        assert_eq!(judge(found - 1e-6, Some(&media)), Verdict::Keep);
        assert_eq!(judge(found + 1e-6, Some(&media)), Verdict::Drop("audio_video"));
        assert_eq!(judge(0.9, None), Verdict::Keep);
        assert_eq!(
            judge(0.9, Some(&Media::default())),
            Verdict::Fail("agreement: no frame to compare".to_owned())
        );
        let filter = with(0.1);
        assert!(filter.needs_media() && filter.needs(Sense::Sounds) && !filter.needs(Sense::Texts));
    }

    #[test]
    fn encoders_that_cannot_compare_are_refused_at_once() {
        let settings = Filters {
            least_text_audio: Some(0.1),
            ..Filters::default()
        };
        let line = Agreement::new(builtin(), &settings).unwrap_err().to_string();
        assert_eq!(
            line,
            "filters.least_text_audio: found builtin, expected an encoder that takes both"
        );
        let root = tempfile::tempdir().unwrap();
        let imagebind = open(&fulgur_lightnet::testing::model("imagebind_tiny", root.path()));
        let line = Agreement::new(imagebind, &settings).unwrap_err().to_string();
        assert!(
            line.contains("filters.agreement: ") && line.contains("vocabulary"),
            "{line}"
        );
    }
}
