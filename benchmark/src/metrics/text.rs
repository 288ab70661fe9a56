//! Words that two texts share: F1, exact match and ROUGE, as question answering and summaries are scored (SQuAD, arXiv 1606.05250;
//! SCROLLS, arXiv 2201.03533).
//!
//! ```text
//! precision = shared / words of the answer        recall = shared / words of the reference        F1 = 2 P R / (P + R)
//! f1            shared words, each as often as in both; without case, ASCII punctuation and the articles a, an, the
//! exact match   whether the words are the same ones in the same order, after the same
//! ROUGE-n       shared runs of n words, each as often as in both; words are runs of a-z and 0-9, without case, not stemmed
//! ROUGE-L       words of the longest common subsequence
//! ```
//!
//! All are within 0..1, and 0 where one of the texts has no words. Of several references the best one counts.

use std::collections::HashMap;

/// All of them, of one answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct TextScores {
    /// Shared words.
    pub f1: f64,
    /// 1 for the same words, else 0.
    pub exact_match: f64,
    /// Shared words, as summaries count them.
    pub rouge_1: f64,
    /// Shared pairs of words.
    pub rouge_2: f64,
    /// The longest common subsequence.
    pub rouge_l: f64,
    /// Geometric mean of the three, as SCROLLS takes it: of each the best over references first.
    pub rouge_mean: f64,
}

impl TextScores {
    /// Scores of `answer` beside `references`; of each the best.
    ///
    /// ```
    /// use fulgur_benchmark::metrics::text::TextScores;
    /// let scores = TextScores::of("The bell rang.", &["a bell rang", "a dog barked"]);
    /// assert_eq!((scores.exact_match, scores.f1, scores.rouge_2), (1.0, 1.0, 0.5));
    /// ```
    pub fn of(answer: &str, references: &[impl AsRef<str>]) -> Self {
        let mut best = Self::default();
        let (answer_plain, answer_words) = (plain(answer), words(answer));
        for reference in references {
            let (reference_plain, reference_words) = (plain(reference.as_ref()), words(reference.as_ref()));
            let same = answer_plain == reference_plain;
            for (best, value) in [
                (&mut best.f1, shared_f1(&answer_plain, &reference_plain, 1)),
                (&mut best.exact_match, f64::from(u8::from(same))),
                (&mut best.rouge_1, shared_f1(&answer_words, &reference_words, 1)),
                (&mut best.rouge_2, shared_f1(&answer_words, &reference_words, 2)),
                (&mut best.rouge_l, subsequence_f1(&answer_words, &reference_words)),
            ] {
                *best = best.max(value);
            }
        }
        best.rouge_mean = (best.rouge_1 * best.rouge_2 * best.rouge_l).cbrt();
        best
    }
}

/// Words without case, ASCII punctuation and articles.
fn plain(text: &str) -> Vec<String> {
    let text: String = (text.to_lowercase().chars())
        .filter(|letter| !letter.is_ascii_punctuation())
        .collect();
    let mut kept = String::with_capacity(text.len());
    // Articles are runs of letters and digits, whatever stands around them.
    for run in text.split_inclusive(|letter: char| !letter.is_alphanumeric()) {
        let (word, end) = match run.char_indices().next_back() {
            Some((at, letter)) if !letter.is_alphanumeric() => run.split_at(at),
            _ => (run, ""),
        };
        if !["a", "an", "the"].contains(&word) {
            kept.push_str(word);
        } else {
            kept.push(' ');
        }
        kept.push_str(end);
    }
    kept.split_whitespace().map(str::to_owned).collect()
}

/// Runs of ASCII letters and digits, without case.
fn words(text: &str) -> Vec<String> {
    let text = text.to_lowercase();
    let runs = text.split(|letter: char| !letter.is_ascii_alphanumeric());
    runs.filter(|run| !run.is_empty()).map(str::to_owned).collect()
}

/// F1 of shared runs of `n` words.
fn shared_f1(answer: &[String], reference: &[String], n: usize) -> f64 {
    let mut left: HashMap<&[String], usize> = HashMap::new();
    for run in reference.windows(n) {
        *left.entry(run).or_default() += 1;
    }
    let mut shared = 0;
    for run in answer.windows(n) {
        if let Some(count) = left.get_mut(run).filter(|count| **count > 0) {
            *count -= 1;
            shared += 1;
        }
    }
    let runs = |words: &[String]| (words.len() + 1).saturating_sub(n);
    f1(shared, runs(answer), runs(reference))
}

/// F1 of the longest common subsequence.
fn subsequence_f1(answer: &[String], reference: &[String]) -> f64 {
    // Lengths of common subsequences of the reference so far and each beginning of the answer.
    let mut lengths = vec![0usize; answer.len() + 1];
    for word in reference {
        let mut corner = 0;
        for (at, other) in answer.iter().enumerate() {
            let above = lengths[at + 1];
            lengths[at + 1] = if word == other {
                corner + 1
            } else {
                above.max(lengths[at])
            };
            corner = above;
        }
    }
    f1(lengths[answer.len()], answer.len(), reference.len())
}

fn f1(shared: usize, answer: usize, reference: usize) -> f64 {
    if shared == 0 {
        return 0.0;
    }
    let (precision, recall) = (shared as f64 / answer as f64, shared as f64 / reference as f64);
    2.0 * precision * recall / (precision + recall)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, wanted: f64) {
        assert!((found - wanted).abs() < 1e-12, "{found}, expected {wanted}");
    }

    #[test]
    fn words_are_counted_as_often_as_both_have_them() {
        let one = TextScores::of("the cat sat on the mat", &["a cat on a mat sat there"]);
        // cat sat on mat | cat on mat sat there
        close(one.f1, 2.0 * 4.0 / 9.0);
        // the cat sat on the mat | a cat on a mat sat there: 4 of 6 and 7
        close(one.rouge_1, 2.0 * 4.0 / 13.0);
        close(one.rouge_2, 0.0);
        // cat on mat
        close(one.rouge_l, 2.0 * 3.0 / 13.0);
        close(one.rouge_mean, 0.0);
        let two = TextScores::of("police killed the gunman", &["police kill the gunman"]);
        close(two.rouge_1, 0.75);
        close(two.rouge_2, 1.0 / 3.0);
        close(two.rouge_l, 0.75);
        close(two.rouge_mean, (0.75f64 * 0.75 / 3.0).cbrt());
        let back = TextScores::of("the gunman kill police", &["police kill the gunman"]);
        close(back.rouge_l, 0.5);
        close(back.rouge_2, 1.0 / 3.0);
        let often = TextScores::of("no no no", &["no yes"]);
        close(often.f1, 2.0 * 1.0 / 5.0);
        close(often.rouge_1, 2.0 * 1.0 / 5.0);
    }

    #[test]
    fn answers_are_the_same_without_case_articles_and_punctuation() {
        for (answer, reference, same) in [
            ("The Bell!", "bell", true),
            ("a bell, an owl", "bell owl", true),
            ("an-other bell", "another bell", true),
            ("theatre", "atre", false),
            ("bell owl", "owl bell", false),
            ("the\u{2014}bell", "\u{2014}bell", true),
            ("\u{c9}cole", "\u{e9}cole", true),
            ("", "the", true),
            ("42", "4 2", false),
        ] {
            let scores = TextScores::of(answer, &[reference]);
            assert_eq!(scores.exact_match == 1.0, same, "{answer:?} {reference:?}");
        }
        // Texts without words share none.
        assert_eq!(TextScores::of("the", &["an"]).f1, 0.0);
    }

    #[test]
    fn the_best_reference_counts_and_none_is_no_match() {
        let scores = TextScores::of("a dog", &["a cat sat", "the dog", "dog"]);
        close(scores.f1, 1.0);
        close(scores.exact_match, 1.0);
        close(scores.rouge_1, 2.0 / 3.0);
        assert_eq!(TextScores::of("x", &[] as &[&str]), TextScores::default());
        assert_eq!(TextScores::of("", &["x"]), TextScores::default());
        assert_eq!(TextScores::of("\u{72ac}", &["\u{72ac}"]).rouge_1, 0.0);
    }

    /// Values of the `rouge-score` package, without stemming; `text_golden.py` beside this file wrote them.
    #[test]
    fn rouge_is_that_of_the_package() {
        #[derive(serde::Deserialize)]
        struct Case {
            answer: String,
            reference: String,
            rouge1: f64,
            rouge2: f64,
            #[serde(rename = "rougeL")]
            rouge_l: f64,
        }
        let cases: Vec<Case> = serde_json::from_str(include_str!("text_golden.json")).unwrap();
        assert!(cases.len() > 20);
        for case in cases {
            let found = TextScores::of(&case.answer, &[&case.reference]);
            for (name, found, wanted) in [
                ("1", found.rouge_1, case.rouge1),
                ("2", found.rouge_2, case.rouge2),
                ("L", found.rouge_l, case.rouge_l),
            ] {
                assert!(
                    (found - wanted).abs() < 1e-9,
                    "{name}: {found}, expected {wanted}: {:?} {:?}",
                    case.answer,
                    case.reference
                );
            }
        }
    }
}
