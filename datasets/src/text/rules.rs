//! Rules that tell prose from what only looks like text, in the spirit of those of Gopher (arXiv 2112.11446, table A1).
//!
//! Words are runs of characters between white space, lines are not empty.
//!
//! | reason | dropped where |
//! |---|---|
//! | `garbled` | more than 1 in 1,000 characters is U+FFFD or a control character other than tab and ends of line and page |
//! | `too_short` | fewer than 50 words |
//! | `word_length` | the mean length of words is below 3 or above 10 characters |
//! | `symbols` | there is more than one `#`, `…` or `...` for 10 words |
//! | `few_letters` | fewer than 7 in 10 words have a letter |
//! | `bullets` | more than 9 in 10 lines begin with a bullet |
//! | `repeated_lines` | more than 3 in 10 lines were there before in the document |
//! | `repeated_phrase` | one run of 3 words makes up more than 18 in 100 characters of words |
//! | `no_stop_words` | fewer than 2 of: the, be, to, of, and, that, have, with |

use std::collections::{HashMap, HashSet};

use super::Reason;

/// Fewest words of a document.
pub const LEAST_WORDS: usize = 50;
const STOP_WORDS: [&str; 8] = ["the", "be", "to", "of", "and", "that", "have", "with"];

/// Why a document is dropped: the first rule of the table that it breaks; None keeps it.
pub fn broken(text: &str, least_words: usize) -> Option<Reason> {
    let (mut characters, mut odd) = (0usize, 0usize);
    for c in text.chars() {
        characters += 1;
        odd += usize::from(c == '\u{fffd}' || (c.is_control() && !"\t\n\r\u{c}".contains(c)));
    }
    if odd * 1000 > characters {
        return Some(Reason::Garbled);
    }
    let words: Vec<&str> = text.split_whitespace().collect();
    let count = words.len();
    if count < least_words.max(1) {
        return Some(Reason::TooShort);
    }
    let length: usize = words.iter().map(|word| word.chars().count()).sum();
    if length < 3 * count || length > 10 * count {
        return Some(Reason::WordLength);
    }
    let symbols = text.matches('#').count() + text.matches('\u{2026}').count() + text.matches("...").count();
    if symbols * 10 > count {
        return Some(Reason::Symbols);
    }
    let lettered = words
        .iter()
        .filter(|word| word.contains(char::is_alphabetic))
        .count();
    if lettered * 10 < count * 7 {
        return Some(Reason::FewLetters);
    }
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let bullets = lines
        .iter()
        .filter(|line| line.starts_with(['-', '*', '\u{2022}', '+']))
        .count();
    if bullets * 10 > lines.len() * 9 {
        return Some(Reason::Bullets);
    }
    let different = lines.iter().collect::<HashSet<_>>().len();
    if (lines.len() - different) * 10 > lines.len() * 3 {
        return Some(Reason::RepeatedLines);
    }
    let mut phrases: HashMap<&[&str], usize> = HashMap::new();
    let mut most = 0;
    for phrase in words.windows(3) {
        let times = phrases.entry(phrase).or_default();
        *times += 1;
        if *times > 1 {
            let one: usize = phrase.iter().map(|word| word.chars().count()).sum();
            most = most.max(*times * one);
        }
    }
    if most * 100 > length * 18 {
        return Some(Reason::RepeatedPhrase);
    }
    let seen = |stop: &&str| words.iter().any(|word| word.eq_ignore_ascii_case(stop));
    if STOP_WORDS.iter().filter(|stop| seen(stop)).count() < 2 {
        return Some(Reason::NoStopWords);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hundred words, all different but for the small ones.
    fn prose() -> String {
        (0..25).map(|i| format!("the word{i} of page{i}\n")).collect()
    }

    #[test]
    fn each_rule_drops_what_it_is_for() {
        assert_eq!(broken(&prose(), 50), None);
        let bullets: String = (0..60).map(|i| format!("- the reason of{i}\n")).collect();
        for (text, reason) in [
            (format!("{}\u{0}\u{fffd}", prose()), Reason::Garbled),
            ("the end of it".into(), Reason::TooShort),
            (String::new(), Reason::TooShort),
            ("a ".repeat(100), Reason::WordLength),
            ("incomprehensibilities ".repeat(60), Reason::WordLength),
            (format!("{}{}", prose(), "# ... ".repeat(6)), Reason::Symbols),
            (
                format!("{}{}", prose(), "1234 5678 ".repeat(50)),
                Reason::FewLetters,
            ),
            (bullets, Reason::Bullets),
            (
                format!("{}{}", prose(), "say it again\n".repeat(20)),
                Reason::RepeatedLines,
            ),
            (
                format!("{}{}", prose(), "say it again ".repeat(20)),
                Reason::RepeatedPhrase,
            ),
            (
                (0..60).map(|i| format!("word{i} ")).collect(),
                Reason::NoStopWords,
            ),
        ] {
            assert_eq!(broken(&text, 50), Some(reason), "{text}");
        }
        assert_eq!(broken("the ends of them", 0), None);
    }
}
