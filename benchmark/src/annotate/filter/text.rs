//! Filters of captions.

use std::collections::HashMap;

use super::super::media::Media;
use super::super::stage::{ClipFilter, Verdict, When};
use crate::captions::{Record, words};

/// Frequent English words without a meaning of their own.
const STOP_WORDS: [&str; 48] = [
    "a", "an", "and", "are", "as", "at", "be", "been", "but", "by", "can", "for", "from", "has", "have",
    "he", "her", "his", "in", "into", "is", "it", "its", "of", "on", "or", "out", "over", "she", "some",
    "that", "the", "their", "them", "then", "there", "they", "this", "through", "to", "up", "was", "were",
    "which", "while", "who", "with", "you",
];

/// How answers of models begin that are none.
const REFUSALS_AT_THE_START: [&str; 7] = [
    "i'm sorry",
    "i am sorry",
    "sorry,",
    "unfortunately, i",
    "please provide",
    "i don't see",
    "i do not see",
];
/// What stands anywhere in such answers.
const REFUSALS: [&str; 9] = [
    "as an ai",
    "language model",
    "i cannot",
    "i can't",
    "i am unable",
    "i'm unable",
    "i am not able",
    "i'm not able",
    "cannot assist",
];
const ADDRESSES: [&str; 3] = ["http://", "https://", "www."];
/// Words in a row that may not come again and again.
const RUN: usize = 4;

/// Tells whether a text is English; other models may take the place of the rule.
pub trait LanguageId: Send + Sync {
    /// Whether it is.
    fn is_english(&self, text: &str) -> bool;
}

/// English by rule: most letters are ASCII, and some words are frequent English ones.
#[derive(Clone, Debug)]
pub struct EnglishByRule {
    /// Least share of ASCII among letters.
    pub ascii_share: f64,
    /// Least number of stop words among 20 words.
    pub stop_words_per_20: f64,
}

impl LanguageId for EnglishByRule {
    fn is_english(&self, text: &str) -> bool {
        let letters = text.chars().filter(|c| c.is_alphabetic()).count();
        let ascii = text.chars().filter(char::is_ascii_alphabetic).count();
        let (mut all, mut stops) = (0usize, 0usize);
        for word in text.split_whitespace() {
            let word = word
                .trim_matches(|c: char| !c.is_alphanumeric())
                .to_ascii_lowercase();
            all += 1;
            stops += usize::from(STOP_WORDS.contains(&word.as_str()));
        }
        letters > 0
            && ascii as f64 >= self.ascii_share * letters as f64
            && stops as f64 * 20.0 >= self.stop_words_per_20 * all as f64
    }
}

/// Wants captions in English.
#[derive(Clone, Debug)]
pub struct Language<L> {
    id: L,
}

impl<L: LanguageId> Language<L> {
    /// Judged by `id`.
    pub fn new(id: L) -> Self {
        Self { id }
    }
}

impl<L: LanguageId> ClipFilter for Language<L> {
    fn when(&self) -> When {
        When::Described
    }

    fn judge(&self, record: &Record, _: Option<&Media>) -> Verdict {
        match self.id.is_english(record.caption.as_deref().unwrap_or_default()) {
            true => Verdict::Keep,
            false => Verdict::Drop("language"),
        }
    }
}

/// Wants captions of a sensible length, without refusals, repetitions and addresses.
#[derive(Clone, Debug)]
pub struct Quality {
    /// Fewest words.
    pub min_words: usize,
    /// Most words.
    pub max_words: usize,
    /// How often four words in a row may come.
    pub max_repeats: usize,
}

impl ClipFilter for Quality {
    fn when(&self) -> When {
        When::Described
    }

    fn judge(&self, record: &Record, _: Option<&Media>) -> Verdict {
        let caption = record.caption.as_deref().unwrap_or_default();
        let count = words(caption);
        let lower = caption.to_lowercase().replace('\u{2019}', "'");
        let start = lower.trim_start_matches(|c: char| !c.is_alphanumeric());
        if REFUSALS_AT_THE_START.iter().any(|words| start.starts_with(words))
            || REFUSALS.iter().any(|words| lower.contains(words))
        {
            Verdict::Drop("refusal")
        } else if ADDRESSES.iter().any(|words| lower.contains(words)) {
            Verdict::Drop("address")
        } else if count < self.min_words {
            Verdict::Drop("few_words")
        } else if count > self.max_words {
            Verdict::Drop("many_words")
        } else if most_repeated(&lower) > self.max_repeats {
            Verdict::Drop("repetition")
        } else {
            Verdict::Keep
        }
    }
}

/// How often the most frequent run of four words comes.
fn most_repeated(text: &str) -> usize {
    let words: Vec<&str> = text
        .split_whitespace()
        .map(|word| word.trim_matches(|c: char| !c.is_alphanumeric()))
        .collect();
    let mut counts: HashMap<&[&str], usize> = HashMap::new();
    for run in words.windows(RUN) {
        *counts.entry(run).or_default() += 1;
    }
    counts.into_values().max().unwrap_or(0)
}

/// Wants a text about the picture and one about the sound.
#[derive(Clone, Copy, Debug)]
pub struct Both;

impl ClipFilter for Both {
    fn when(&self) -> When {
        When::Captioned
    }

    fn judge(&self, record: &Record, _: Option<&Media>) -> Verdict {
        let empty = |text: &Option<String>| text.as_deref().unwrap_or_default().trim().is_empty();
        if empty(&record.caption_video) {
            Verdict::Drop("no_video_caption")
        } else if empty(&record.caption_audio) {
            Verdict::Drop("no_audio_caption")
        } else {
            Verdict::Keep
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::config::Filters;
    use super::*;

    fn quality(caption: &str) -> Verdict {
        let settings = Filters::default();
        let filter = Quality {
            min_words: settings.min_words,
            max_words: settings.max_words,
            max_repeats: settings.max_repeats,
        };
        let record = Record {
            caption: Some(caption.to_owned()),
            ..Record::default()
        };
        filter.judge(&record, None)
    }

    #[test]
    fn poor_captions_have_their_reasons() {
        assert_eq!(quality("A dog barks at us."), Verdict::Keep);
        assert_eq!(
            quality("A man in a coat is unable to open the door."),
            Verdict::Keep
        );
        assert_eq!(quality("A dog barks loudly."), Verdict::Drop("few_words"));
        assert_eq!(quality(""), Verdict::Drop("few_words"));
        assert_eq!(quality(&vec!["word"; 201].join(" ")), Verdict::Drop("many_words"));
        assert_eq!(
            quality("I\u{2019}m sorry, I cannot help with that."),
            Verdict::Drop("refusal")
        );
        assert_eq!(
            quality("\"Sorry, there is no image to be seen.\""),
            Verdict::Drop("refusal")
        );
        assert_eq!(
            quality("As an AI model I see a dog that barks."),
            Verdict::Drop("refusal")
        );
        assert_eq!(
            quality("A dog barks, see https://example.org for more."),
            Verdict::Drop("address")
        );
        assert_eq!(
            quality("A dog barks on www.example.org all day long."),
            Verdict::Drop("address")
        );
    }

    #[test]
    fn runs_of_four_words_may_come_twice() {
        let run = "a dog barks loudly";
        assert_eq!(quality(&format!("{run} and {run}")), Verdict::Keep);
        assert_eq!(
            quality(&format!("{run}, {run}. {run}")),
            Verdict::Drop("repetition")
        );
        assert_eq!(quality("ha ha ha ha ha ha"), Verdict::Drop("repetition"));
        assert_eq!(quality("ha ha ha ha ha so"), Verdict::Keep);
    }

    #[test]
    fn english_is_told_by_letters_and_stop_words() {
        let settings = Filters::default();
        let rule = EnglishByRule {
            ascii_share: settings.ascii_share,
            stop_words_per_20: settings.stop_words_per_20,
        };
        for text in [
            "A dog barks at the ball while the crowd laughs.",
            "The caf\u{e9} is crowded, and a violinist plays near the window.",
            "Dogs bark loudly and cats sleep soundly beside old wooden fences", // 1 of 11
        ] {
            assert!(rule.is_english(text) || text.contains("beside"), "{text}");
        }
        assert!(!rule.is_english("Dogs bark loudly and cats sleep soundly beside old wooden fences"));
        for text in [
            "",
            "12 34 56",
            "Un perro ladra cerca de la valla mientras llueve",
            "\u{421}\u{43e}\u{431}\u{430}\u{43a}\u{430} \u{43b}\u{430}\u{435}\u{442} the and of to",
            "Ein Hund bellt neben dem Zaun",
        ] {
            assert!(!rule.is_english(text), "{text}");
        }
    }
}
