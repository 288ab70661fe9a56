//! What was counted while a file of clips was read, with a few examples of everything that is wrong with it.

use std::collections::BTreeMap;

use serde::Serialize;

use super::error::shortened;

/// Examples that are kept of each kind.
const EXAMPLES: usize = 5;

/// What is unusual about a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Problem {
    /// The name of an earlier clip.
    Duplicate,
    /// Text that belongs to no clip.
    IgnoredLine,
    /// A clip that cannot be: see `rejected_reasons`.
    Rejected,
    /// Bytes that are no UTF-8.
    BrokenUtf8,
    /// A clip without a caption.
    NoCaption,
}

/// Where a problem is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Example {
    /// Number of the line, from 1.
    pub line: u64,
    /// Name of the clip, or the beginning of the line.
    pub text: String,
}

/// What was counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Lines of the file.
    pub lines: u64,
    /// Clips that were kept.
    pub records: u64,
    /// Kept clips with a caption.
    pub captions: u64,
    /// Kept clips without one.
    pub no_caption: u64,
    /// Clips whose whole name came before.
    pub duplicates: u64,
    /// Lines that belong to no clip, blank ones included.
    pub ignored_lines: u64,
    /// Those of them with nothing but white space.
    pub blank_lines: u64,
    /// Clips that cannot be.
    pub rejected: u64,
    /// The same by reason.
    pub rejected_reasons: BTreeMap<&'static str, u64>,
    /// Kept clips whose caption stands on the line below their name.
    pub two_line: u64,
    /// Lines with bytes that are no UTF-8.
    pub broken_utf8: u64,
    /// The first few of each kind.
    pub examples: BTreeMap<Problem, Vec<Example>>,
}

impl Counts {
    /// Keeps the first few lines of each kind.
    pub(crate) fn example(&mut self, problem: Problem, line: u64, text: &str) {
        let examples = self.examples.entry(problem).or_default();
        if examples.len() < EXAMPLES {
            examples.push(Example {
                line,
                text: shortened(text),
            });
        }
    }

    pub(crate) fn reject(&mut self, reason: &'static str, line: u64, text: &str) {
        self.rejected += 1;
        *self.rejected_reasons.entry(reason).or_default() += 1;
        self.example(Problem::Rejected, line, text);
    }

    pub(crate) fn duplicate(&mut self, line: u64, text: &str) {
        self.duplicates += 1;
        self.example(Problem::Duplicate, line, text);
    }

    pub(crate) fn keep(&mut self, line: u64, name: &str, has_caption: bool) {
        self.records += 1;
        if has_caption {
            self.captions += 1;
        } else {
            self.no_caption += 1;
            self.example(Problem::NoCaption, line, name);
        }
    }
}
