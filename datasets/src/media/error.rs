//! What can go wrong with media, always with the file it went wrong with.

use std::io;
use std::path::{Path, PathBuf};

/// An error of reading, writing or converting media. Every message is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MediaError {
    /// The operating system refused: absent file, read-only folder, full disk.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried: "open", "read", "write".
        action: &'static str,
        /// The reason of the operating system.
        source: io::Error,
    },
    /// The bytes are no media of a supported kind.
    #[error("{}: not a media file: {detail}", path.display())]
    NotMedia {
        /// The file.
        path: PathBuf,
        /// What the reader found.
        detail: String,
    },
    /// It is media, and the stream that was asked for does not exist.
    #[error("{}: has no {wanted} stream", path.display())]
    NoStream {
        /// The file.
        path: PathBuf,
        /// "video" or "audio".
        wanted: &'static str,
    },
    /// A stream exists, but nothing in it can be decoded.
    #[error("{}: cannot decode: {detail}", path.display())]
    Decode {
        /// The file.
        path: PathBuf,
        /// What the decoder found.
        detail: String,
    },
    /// The encoder or the container refused.
    #[error("{}: cannot encode: {detail}", path.display())]
    Encode {
        /// The file.
        path: PathBuf,
        /// What the encoder found.
        detail: String,
    },
    /// A limit of the options was passed; nothing of that size was allocated.
    #[error("{}: {what} {found} exceeds the limit of {limit}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The quantity, with its unit.
        what: &'static str,
        /// The value in the file.
        found: u64,
        /// The limit of the options.
        limit: u64,
    },
    /// Values that do not describe media: lengths that do not fit, sizes of zero, odd sizes for H.264.
    #[error("{field}: found {found}, expected {expected}")]
    Invalid {
        /// The offending field or argument.
        field: &'static str,
        /// What it held.
        found: String,
        /// What it may hold.
        expected: String,
    },
    /// No progress within the time limit.
    #[error("{}: no progress for {seconds:.1} s, given up", path.display())]
    TimedOut {
        /// The file.
        path: PathBuf,
        /// The limit in seconds.
        seconds: f64,
    },
    /// The caller's flag was raised.
    #[error("{}: cancelled", path.display())]
    Cancelled {
        /// The file.
        path: PathBuf,
    },
}

impl MediaError {
    pub(crate) fn io(path: &Path, action: &'static str, source: io::Error) -> Self {
        Self::Io {
            path: path.to_path_buf(),
            action,
            source,
        }
    }

    pub(crate) fn not_media(path: &Path, detail: impl Into<String>) -> Self {
        Self::NotMedia {
            path: path.to_path_buf(),
            detail: detail.into(),
        }
    }

    #[expect(
        clippy::needless_pass_by_value,
        reason = "what is found is a temporary at most call sites"
    )]
    pub(crate) fn invalid(field: &'static str, found: impl ToString, expected: impl Into<String>) -> Self {
        Self::Invalid {
            field,
            found: found.to_string(),
            expected: expected.into(),
        }
    }
}
