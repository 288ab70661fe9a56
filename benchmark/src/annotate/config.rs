//! Settings of an annotation, as a TOML file has them. Unknown keys are refused.
//!
//! ```toml
//! frames = "precomputed"            # what is seen: see `Backend` for the names
//! audio = "precomputed:heard.csv"   # what is heard
//! rewrite = "none"                  # both in better words
//! merge = "openai-http"             # both as one
//!
//! [http]
//! base = "http://127.0.0.1:8000"
//! model = "some-model"
//!
//! [filters]
//! still = false
//! min_words = 8
//! ```

use serde::{Deserialize, Serialize};

use super::backend::Backend;

/// All settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Describes what is seen.
    pub frames: Backend,
    /// Describes what is heard.
    pub audio: Backend,
    /// Rewrites both.
    pub rewrite: Backend,
    /// Joins both. `none` leaves the caption of the manifest as it is.
    pub merge: Backend,
    /// Of `openai-http`.
    pub http: Http,
    /// Of `lm`.
    pub lm: Lm,
    /// Of `candle-blip`.
    pub blip: Blip,
    /// Of `tags`.
    pub tags: Tags,
    /// How media are looked at.
    pub media: Looking,
    /// What is left out.
    pub filters: Filters,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            frames: Backend::Precomputed(None),
            audio: Backend::Precomputed(None),
            rewrite: Backend::None,
            merge: Backend::Template,
            http: Http::default(),
            lm: Lm::default(),
            blip: Blip::default(),
            tags: Tags::default(),
            media: Looking::default(),
            filters: Filters::default(),
        }
    }
}

/// Settings of `openai-http`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Http {
    /// Address before `/v1/chat/completions`.
    pub base: String,
    /// Name of the model, for stages that name none.
    pub model: String,
    /// Environment variable with the key; without the variable no key is sent.
    pub key_env: String,
    /// Tokens of an answer, at most.
    pub max_tokens: u32,
    /// Temperature of the draws.
    pub temperature: f64,
    /// Seed that is sent along.
    pub seed: u64,
    /// Seconds for an answer.
    pub timeout_s: f64,
    /// Tries of a request, the first one included.
    pub tries: u32,
    /// Seconds before the second try; later pauses are twice as long each, up to `most_backoff_s`.
    pub backoff_s: f64,
    /// Longest pause of our own, in seconds; a server may ask for more.
    pub most_backoff_s: f64,
    /// Requests at the same time.
    pub concurrency: u32,
    /// Requests a minute; 0 for any number.
    pub requests_per_minute: u32,
    /// Tokens a minute, questions and answers; 0 for any number.
    pub tokens_per_minute: u32,
}

impl Default for Http {
    fn default() -> Self {
        Self {
            base: "https://api.openai.com".to_owned(),
            model: String::new(),
            key_env: "OPENAI_API_KEY".to_owned(),
            max_tokens: 128,
            temperature: 0.0,
            seed: 0,
            timeout_s: 60.0,
            tries: 5,
            backoff_s: 1.0,
            most_backoff_s: 60.0,
            concurrency: 8,
            requests_per_minute: 0,
            tokens_per_minute: 0,
        }
    }
}

/// Settings of `lm`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lm {
    /// Tokens of an answer, at most.
    pub max_tokens: usize,
    /// Temperature of the draws; 0 takes the likeliest token.
    pub temperature: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Lm {
    fn default() -> Self {
        Self {
            max_tokens: 128,
            temperature: 0.0,
            seed: 0,
        }
    }
}

/// Settings of `candle-blip`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Blip {
    /// Texts at a time of the search; 1 takes the likeliest token.
    pub beams: usize,
    /// Tokens of a caption, at most.
    pub max_tokens: usize,
    /// Power of the length that texts of a search are judged with: above 0 favours long ones.
    pub length_penalty: f64,
    /// What captions begin with; it is not part of them.
    pub prompt: String,
}

impl Default for Blip {
    fn default() -> Self {
        Self {
            beams: 1,
            max_tokens: 20,
            length_penalty: 1.0,
            prompt: String::new(),
        }
    }
}

/// Settings of `tags`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tags {
    /// The list: a file, or the folder of a prepared set of things; ours if empty.
    pub list: String,
    /// Tags of a clip, at most.
    pub count: usize,
    /// Cosine below which nothing is said.
    pub least: f64,
    /// How far below the best tag's cosine others may be.
    pub margin: f64,
    /// What an encoder of texts reads; `{}` is the tag.
    pub prompt: String,
    /// The caption; `{}` are the tags.
    pub phrase: String,
}

impl Default for Tags {
    fn default() -> Self {
        Self {
            list: String::new(),
            count: 3,
            least: 0.1,
            margin: 0.1,
            prompt: "the sound of {}".to_owned(),
            phrase: "The sound of {}.".to_owned(),
        }
    }
}

/// How media are looked at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Looking {
    /// Frames that are described: frame k of n is the one at (k + 0.5)/n of the clip.
    pub frames: usize,
    /// Longer side to which they are scaled, in pixels.
    pub side: usize,
    /// Sample rate of the sound that is described, in Hz.
    pub sample_rate: u32,
    /// Seconds that are decoded at most.
    pub max_s: f64,
}

impl Default for Looking {
    fn default() -> Self {
        Self {
            frames: 3,
            side: 512,
            sample_rate: 16_000,
            max_s: 120.0,
        }
    }
}

/// What is left out, and what is noted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Filters {
    /// Clips that do not decode, lack picture or sound, are too short, too long, too slow or too small.
    pub media: bool,
    /// Shortest clip in seconds.
    pub min_duration_s: f64,
    /// Longest clip in seconds.
    pub max_duration_s: f64,
    /// Fewest frames per second.
    pub min_fps: f64,
    /// Smallest shorter side in pixels.
    pub min_side: u64,
    /// Clips in which nothing is heard.
    pub silence: bool,
    /// Level below which a sound is silence, in dB of full scale.
    pub silence_db: f64,
    /// Share of silent pieces of 50 ms above which a clip is silent.
    pub silent_share: f64,
    /// Notes clips in which nothing moves, as `static`.
    pub still: bool,
    /// Mean difference of grey, of 0 to 1, below which nothing moves.
    pub still_difference: f64,
    /// Clips without a text about the picture, or without one about the sound.
    pub both: bool,
    /// Captions that are not English.
    pub language: bool,
    /// Least share of ASCII among letters.
    pub ascii_share: f64,
    /// Least number of stop words among 20 words.
    pub stop_words_per_20: f64,
    /// Captions that are too short, too long, refusals, repetitions, or hold addresses.
    pub quality: bool,
    /// Fewest words.
    pub min_words: usize,
    /// Most words.
    pub max_words: usize,
    /// How often four words in a row may come.
    pub max_repeats: usize,
    /// Notes clips in which somebody speaks most of the time, as `speech`.
    pub speech: bool,
    /// Share of the time above which somebody does.
    pub speech_share: f64,
    /// Encoder that compares picture, sound and caption: a folder or `builtin`; none if empty.
    pub agreement: String,
    /// Least cosine of caption and picture; absent where it does not matter.
    pub least_text_video: Option<f64>,
    /// Least cosine of caption and sound.
    pub least_text_audio: Option<f64>,
    /// Least cosine of picture and sound.
    pub least_audio_video: Option<f64>,
    /// Captions that an earlier clip has as well.
    pub duplicates: bool,
    /// Clips of one video, in the order of the manifest; 0 for any number.
    pub clips_per_video: u32,
}

impl Default for Filters {
    fn default() -> Self {
        Self {
            media: true,
            min_duration_s: 2.0,
            max_duration_s: 30.0,
            min_fps: 8.0,
            min_side: 128,
            silence: true,
            silence_db: -60.0,
            silent_share: 0.9,
            still: true,
            still_difference: 1.0 / 255.0,
            both: true,
            language: true,
            ascii_share: 0.9,
            stop_words_per_20: 2.0,
            quality: true,
            min_words: 5,
            max_words: 200,
            max_repeats: 2,
            speech: false,
            speech_share: 0.8,
            agreement: String::new(),
            least_text_video: None,
            least_text_audio: None,
            least_audio_video: None,
            duplicates: true,
            clips_per_video: 0,
        }
    }
}

impl Filters {
    /// The thresholds of the agreement that are set, by the name of what is compared.
    #[must_use]
    pub fn wanted(&self) -> Vec<(&'static str, f64)> {
        let all = [
            ("text_video", self.least_text_video),
            ("text_audio", self.least_text_audio),
            ("audio_video", self.least_audio_video),
        ];
        all.into_iter()
            .filter_map(|(name, least)| Some((name, least?)))
            .collect()
    }
}

/// What stands for a tag, or for all of them.
pub const PLACE: &str = "{}";

/// A setting that is out of range.
#[derive(Debug, thiserror::Error)]
#[error("{field}: found {found}, expected {expected}")]
pub struct ConfigError {
    field: &'static str,
    found: String,
    expected: String,
}

impl Config {
    /// Checks all numbers.
    ///
    /// # Errors
    /// One of them is out of range; NaN always is.
    pub fn check(&self) -> Result<(), ConfigError> {
        let Self {
            http,
            blip,
            tags,
            media,
            filters,
            ..
        } = self;
        let numbers: [(&'static str, f64, f64, f64); 29] = [
            ("http.max_tokens", f64::from(http.max_tokens), 1.0, 1e6),
            ("http.temperature", http.temperature, 0.0, 10.0),
            ("http.timeout_s", http.timeout_s, 0.001, 86_400.0),
            ("http.tries", f64::from(http.tries), 1.0, 100.0),
            ("http.backoff_s", http.backoff_s, 0.0, 3600.0),
            ("http.most_backoff_s", http.most_backoff_s, 0.0, 3600.0),
            ("http.concurrency", f64::from(http.concurrency), 1.0, 1024.0),
            ("media.frames", media.frames as f64, 1.0, 16.0),
            ("media.side", media.side as f64, 16.0, 4096.0),
            (
                "media.sample_rate",
                f64::from(media.sample_rate),
                8000.0,
                192_000.0,
            ),
            ("media.max_s", media.max_s, 0.1, 36_000.0),
            ("filters.min_duration_s", filters.min_duration_s, 0.0, 1e6),
            ("filters.max_duration_s", filters.max_duration_s, 0.0, 1e6),
            ("filters.min_fps", filters.min_fps, 0.0, 1000.0),
            ("filters.silence_db", filters.silence_db, -200.0, 0.0),
            ("filters.silent_share", filters.silent_share, 0.0, 1.0),
            ("filters.still_difference", filters.still_difference, 0.0, 1.0),
            ("filters.ascii_share", filters.ascii_share, 0.0, 1.0),
            ("filters.stop_words_per_20", filters.stop_words_per_20, 0.0, 20.0),
            ("filters.speech_share", filters.speech_share, 0.0, 1.0),
            (
                "filters.least_text_video",
                filters.least_text_video.unwrap_or(0.0),
                -1.0,
                1.0,
            ),
            (
                "filters.least_text_audio",
                filters.least_text_audio.unwrap_or(0.0),
                -1.0,
                1.0,
            ),
            (
                "filters.least_audio_video",
                filters.least_audio_video.unwrap_or(0.0),
                -1.0,
                1.0,
            ),
            ("blip.beams", blip.beams as f64, 1.0, 64.0),
            ("blip.max_tokens", blip.max_tokens as f64, 1.0, 4096.0),
            ("blip.length_penalty", blip.length_penalty, -10.0, 10.0),
            ("tags.count", tags.count as f64, 1.0, 100.0),
            ("tags.least", tags.least, -1.0, 1.0),
            ("tags.margin", tags.margin, 0.0, 2.0),
        ];
        for (field, value, low, high) in numbers {
            if !(low..=high).contains(&value) {
                return Err(ConfigError {
                    field,
                    found: value.to_string(),
                    expected: format!("{low} to {high}"),
                });
            }
        }
        for (field, text) in [("tags.prompt", &tags.prompt), ("tags.phrase", &tags.phrase)] {
            if text.matches(PLACE).count() != 1 {
                return Err(ConfigError {
                    field,
                    found: format!("{text:?}"),
                    expected: format!("a text with one {PLACE}"),
                });
            }
        }
        let wanted = filters.wanted();
        if wanted.is_empty() != filters.agreement.is_empty() {
            return Err(ConfigError {
                field: "filters.agreement",
                found: format!("{:?} beside {} thresholds", filters.agreement, wanted.len()),
                expected: "an encoder and at least one of filters.least_text_video, least_text_audio and least_audio_video"
                    .to_owned(),
            });
        }
        Ok(())
    }

    /// Backends of all stages, with their names.
    #[must_use]
    pub fn stages(&self) -> [(&'static str, &Backend); 4] {
        [
            ("frames", &self.frames),
            ("audio", &self.audio),
            ("rewrite", &self.rewrite),
            ("merge", &self.merge),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_in_range_and_nan_is_not() {
        Config::default().check().unwrap();
        let mut config = Config::default();
        config.filters.silence_db = f64::NAN;
        let error = config.check().unwrap_err().to_string();
        assert_eq!(error, "filters.silence_db: found NaN, expected -200 to 0");
        let mut config = Config::default();
        config.filters.stop_words_per_20 = f64::INFINITY;
        assert!(config.check().is_err());
        let mut config = Config::default();
        config.media.frames = 17;
        assert!(config.check().is_err());
        let line = |change: &dyn Fn(&mut Config)| {
            let mut config = Config::default();
            change(&mut config);
            config.check().unwrap_err().to_string()
        };
        assert!(line(&|c| c.tags.phrase = "{} and {}".to_owned()).starts_with("tags.phrase: found"));
        assert!(
            line(&|c| c.filters.least_text_audio = Some(f64::NAN)).contains("least_text_audio: found NaN")
        );
        assert!(
            line(&|c| c.filters.least_text_audio = Some(0.1))
                .contains("filters.agreement: found \"\" beside 1")
        );
        assert!(line(&|c| c.filters.agreement = "builtin".to_owned()).contains("beside 0 thresholds"));
    }
}
