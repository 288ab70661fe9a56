//! Filters: which clips are left out, and what is noted about others. Each can be switched off, and every clip that goes has a
//! reason.
//!
//! | reason | filter |
//! |---|---|
//! | `missing`, `unreadable` | media: there is no file, or nothing in it decodes |
//! | `no_video`, `no_audio` | media: no such stream |
//! | `too_short`, `too_long`, `low_fps`, `too_small` | media |
//! | `silent` | silence |
//! | `no_video_caption`, `no_audio_caption` | both |
//! | `language` | language |
//! | `few_words`, `many_words`, `refusal`, `repetition`, `address` | quality |
//! | `text_video`, `text_audio`, `audio_video` | agreement: an encoder finds these two apart |
//! | `duplicate_caption` | duplicates, in the order of the manifest |
//! | `video_cap` | clips of one video beyond the cap, in the order of the manifest |
//!
//! The flag `static` notes clips in which nothing moves, `speech` those in which somebody speaks most of the time.

mod agreement;
mod media;
mod speech;
mod text;

pub use agreement::{Agreement, AgreementError};
pub use media::{MediaFilter, Silence, Still};
pub use speech::{Speech, spoken_share};
pub use text::{Both, EnglishByRule, Language, LanguageId, Quality};

use super::config::Filters;
use super::stage::ClipFilter;

/// The filters that are switched on, but for those that compare clips with each other, and [`Agreement`], which needs an encoder.
#[must_use]
pub fn of(settings: &Filters) -> Vec<Box<dyn ClipFilter>> {
    let mut all: Vec<Box<dyn ClipFilter>> = Vec::new();
    if settings.media {
        all.push(Box::new(MediaFilter::new(settings)));
    }
    if settings.silence {
        all.push(Box::new(Silence::new(settings)));
    }
    if settings.still {
        all.push(Box::new(Still {
            difference: settings.still_difference,
        }));
    }
    if settings.speech {
        all.push(Box::new(Speech {
            share: settings.speech_share,
        }));
    }
    if settings.both {
        all.push(Box::new(Both));
    }
    if settings.language {
        all.push(Box::new(Language::new(EnglishByRule {
            ascii_share: settings.ascii_share,
            stop_words_per_20: settings.stop_words_per_20,
        })));
    }
    if settings.quality {
        all.push(Box::new(Quality {
            min_words: settings.min_words,
            max_words: settings.max_words,
            max_repeats: settings.max_repeats,
        }));
    }
    all
}
