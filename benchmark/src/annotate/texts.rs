//! Texts side by side and cleaned.

use std::collections::BTreeSet;

/// Share of words in common above which two captions say the same.
const ALIKE: f64 = 0.8;

/// Words of a text in lower case, without marks at their ends.
fn tokens(text: &str) -> BTreeSet<String> {
    let words = text
        .split_whitespace()
        .map(|word| word.trim_matches(|c: char| !c.is_alphanumeric()).to_lowercase());
    words.filter(|word| !word.is_empty()).collect()
}

/// Words in common by all words (Jaccard), of two texts without words 1.
pub(crate) fn jaccard(a: &str, b: &str) -> f64 {
    let (a, b) = (tokens(a), tokens(b));
    let union = a.union(&b).count();
    if union == 0 {
        return 1.0;
    }
    a.intersection(&b).count() as f64 / union as f64
}

/// Captions without empty ones and those that say what an earlier one said, joined to one text.
pub(crate) fn joined(captions: &[String]) -> String {
    let mut kept: Vec<&str> = Vec::new();
    for caption in captions {
        let caption = caption.trim().trim_end_matches('.').trim_end();
        if !caption.is_empty() && kept.iter().all(|known| jaccard(known, caption) <= ALIKE) {
            kept.push(caption);
        }
    }
    kept.join(". ")
}

/// A text on one line, with single spaces.
pub(crate) fn collapsed(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_duplicates_are_dropped() {
        let captions = [
            "a dog runs on the wide green grass.",
            "",
            "A dog runs on the wide, green grass",
            "a cat sleeps",
        ];
        let captions = captions.map(str::to_owned);
        assert_eq!(
            joined(&captions),
            "a dog runs on the wide green grass. a cat sleeps"
        );
        assert_eq!(joined(&[]), "");
        // 4 words of 5 in common are not more than 0.8.
        assert_eq!(
            joined(&["a b c d".to_owned(), "a b c d e".to_owned()]),
            "a b c d. a b c d e"
        );
        assert_eq!(
            joined(&["a b c d e".to_owned(), "a b c d e f".to_owned()]),
            "a b c d e"
        );
    }

    #[test]
    fn words_are_compared_without_case_and_marks() {
        assert_eq!(jaccard("A dog!", "a, dog"), 1.0);
        assert_eq!(jaccard("a b", "b c"), 1.0 / 3.0);
        assert_eq!(jaccard("", "..."), 1.0);
    }
}
