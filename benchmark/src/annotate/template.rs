//! Texts by rule, without a model.

use super::stage::{About, Clip, Merger, Modality, Rewriter, StageError};
use super::texts::collapsed;

/// Cleans captions, and joins two of them: `Seen. Heard.`
#[derive(Clone, Copy, Debug, Default)]
pub struct Template;

impl Template {
    fn about_it() -> About {
        About {
            backend: "template".to_owned(),
            prompt_version: Some("template-v1".to_owned()),
            ..About::default()
        }
    }
}

impl Rewriter for Template {
    fn about(&self) -> About {
        Self::about_it()
    }

    fn rewrite(&self, text: &str, _: Modality, _: Clip<'_>) -> Result<String, StageError> {
        Ok(sentence(text))
    }
}

impl Merger for Template {
    fn about(&self) -> About {
        Self::about_it()
    }

    fn merge(&self, video: &str, audio: &str, _: Clip<'_>) -> Result<String, StageError> {
        let both = [sentence(video), sentence(audio)];
        Ok(collapsed(&both.join(" ")))
    }
}

/// The text on one line, with a capital at its beginning and a mark at its end.
fn sentence(text: &str) -> String {
    let text = collapsed(text);
    let text = text.trim_end_matches(|c: char| c == '.' || c.is_whitespace());
    let mut letters = text.chars();
    let Some(first) = letters.next() else {
        return String::new();
    };
    let end = if text.ends_with(['!', '?']) { "" } else { "." };
    first.to_uppercase().chain(letters).collect::<String>() + end
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::captions::Record;

    fn merge(video: &str, audio: &str) -> String {
        let record = Record::default();
        let clip = Clip {
            id: "a",
            record: &record,
        };
        Template.merge(video, audio, clip).unwrap()
    }

    #[test]
    fn two_captions_become_two_sentences() {
        assert_eq!(merge("a dog runs", "a dog barks"), "A dog runs. A dog barks.");
        assert_eq!(merge(" a dog\nruns.. ", "What?"), "A dog runs. What?");
        assert_eq!(merge("", "a bell"), "A bell.");
        assert_eq!(merge("...", ""), "");
        assert_eq!(
            merge("\u{e9}tude. then a song", "\u{df}"),
            "\u{c9}tude. then a song. SS."
        );
    }
}
