//! What can go wrong with files of captions, in one line with the place.

use std::io;
use std::path::{Path, PathBuf};

/// Most characters of what was found that an error repeats.
const SHOWN: usize = 60;

/// A file that cannot be read or written, or that does not hold what it should.
#[derive(Debug, thiserror::Error)]
pub enum CaptionError {
    /// The system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried: "open", "read", "write".
        action: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// A line that is not what it should be.
    #[error("{}: line {line}: {field}: found {found}, expected {expected}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: u64,
        /// The field, or "line".
        field: String,
        /// What is there.
        found: String,
        /// What should be.
        expected: String,
    },
}

impl CaptionError {
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, action, source }
    }

    pub(crate) fn line(path: &Path, line: u64, wrong: Wrong) -> Self {
        Self::Line {
            path: path.to_path_buf(),
            line,
            field: wrong.field,
            found: shortened(&wrong.found),
            expected: wrong.expected,
        }
    }
}

/// A field that is not what it should be, before it is known where.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Wrong {
    pub(crate) field: String,
    pub(crate) found: String,
    pub(crate) expected: String,
}

impl Wrong {
    pub(crate) fn new(field: &str, found: impl Into<String>, expected: impl Into<String>) -> Self {
        Self {
            field: field.to_owned(),
            found: found.into(),
            expected: expected.into(),
        }
    }
}

/// The beginning of a text, on one line and without control characters.
pub(crate) fn shortened(text: &str) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    let mut short: String = text.chars().take(SHOWN).map(clean).collect();
    if text.chars().nth(SHOWN).is_some() {
        short.push_str("...");
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_found_is_shown_in_part_and_on_one_line() {
        let long = format!("a\nb{}", "\u{e9}".repeat(500));
        let wrong = Wrong::new("caption", long, "a string");
        let line = CaptionError::line(Path::new("m.jsonl"), 7, wrong).to_string();
        assert!(
            line.starts_with("m.jsonl: line 7: caption: found a b\u{e9}"),
            "{line}"
        );
        assert!(
            line.ends_with("..., expected a string") && line.chars().count() < 130,
            "{line}"
        );
        assert_eq!(line.lines().count(), 1);
    }
}
