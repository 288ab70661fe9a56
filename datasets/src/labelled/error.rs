//! What can be wrong with a set of pictures, and what is left out of one.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::augment::AugmentError;
use crate::media::MediaError;
use crate::store::StoreError;
use crate::text::TextError;

/// Why pictures cannot be had. Every message is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabelledError {
    /// Neither a set nor a file nor a folder.
    #[error("{name}: no such pictures, expected one of {}, a folder, a JSONL file or an IDX file", super::SETS.join(", "))]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// A prepared set is not there or damaged.
    #[error("{source} (fulgur data fetch {set} prepares the set)")]
    Set {
        /// Its name.
        set: &'static str,
        /// What is wrong.
        source: StoreError,
    },
    /// A file does not hold what it should.
    #[error("{}: {field}: found {found}, expected {expected}", path.display())]
    Invalid {
        /// The file, or the name of the set.
        path: PathBuf,
        /// Which part of it.
        field: String,
        /// What it holds.
        found: String,
        /// What it may hold.
        expected: String,
    },
    /// The operating system refused.
    #[error("{}: cannot read: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// A list of pictures cannot be read.
    #[error(transparent)]
    Rows(#[from] TextError),
    /// A prepared file is damaged.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A setting of what is made of pictures.
    #[error(transparent)]
    Setting(#[from] AugmentError),
    /// A picture cannot be read.
    #[error(transparent)]
    Picture(#[from] MediaError),
}

impl LabelledError {
    #[expect(
        clippy::needless_pass_by_value,
        reason = "what is found is a temporary at most call sites"
    )]
    pub(crate) fn invalid(
        path: &Path,
        field: impl Into<String>,
        found: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Self::Invalid {
            path: path.to_owned(),
            field: field.into(),
            found: found.to_string(),
            expected: expected.into(),
        }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}

/// Why something was left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A file that is no picture of a supported format.
    NoPicture,
    /// A picture that cannot be read: truncated, empty, larger than allowed, absent.
    Broken,
    /// A picture beside the folders of classes.
    NoClass,
    /// A folder of a class without a picture.
    EmptyClass,
}

/// What was left out, with the first few messages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// Files that are no pictures of a supported format.
    pub no_picture: usize,
    /// Pictures that cannot be read.
    pub broken: usize,
    /// Pictures beside the folders of classes.
    pub no_class: usize,
    /// Folders of classes without a picture.
    pub empty_classes: usize,
    /// The first [`Skipped::MESSAGES`] of them, a line each.
    pub messages: Vec<String>,
}

impl Skipped {
    /// So many messages are kept.
    pub const MESSAGES: usize = 10;

    /// How many in all.
    pub fn total(&self) -> usize {
        self.no_picture + self.broken + self.no_class + self.empty_classes
    }

    /// How many were left out and the first of them, in a line; none where nothing was.
    #[must_use]
    pub fn summary(&self) -> Option<String> {
        const SHOWN: usize = 3;
        let total = self.total();
        let shown = &self.messages[..self.messages.len().min(SHOWN)];
        let more = match total - shown.len() {
            0 => String::new(),
            more => format!("; and {more} more"),
        };
        (total > 0).then(|| format!("{total} left out: {}{more}", shown.join("; ")))
    }

    pub(crate) fn add(&mut self, reason: Reason, message: String) {
        *match reason {
            Reason::NoPicture => &mut self.no_picture,
            Reason::Broken => &mut self.broken,
            Reason::NoClass => &mut self.no_class,
            Reason::EmptyClass => &mut self.empty_classes,
        } += 1;
        if self.messages.len() < Self::MESSAGES {
            self.messages.push(message);
        }
    }
}
