//! What can go wrong while fetching and preparing.

use std::path::{Path, PathBuf};

use crate::media::MediaError;
use crate::store::StoreError;
use crate::things::ThingsError;

/// Why a set could not be fetched or prepared. Every message is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// There is no set of that name.
    #[error("data set {name:?}: no such set, expected one of {known}")]
    UnknownSet {
        /// The name.
        name: String,
        /// All names, separated by commas.
        known: String,
    },
    /// A package client is not installed.
    #[error("{client} not found: install it ({install}), or place {file} in {}", folder.display())]
    MissingClient {
        /// The program.
        client: &'static str,
        /// How to get it.
        install: &'static str,
        /// The file that the client would have brought.
        file: String,
        /// Where that file can be placed by hand.
        folder: PathBuf,
    },
    /// A package client ran and failed.
    #[error("{command} failed: {message}; place {file} in {} to go on without it", folder.display())]
    Client {
        /// The command line.
        command: String,
        /// The last line of what it said.
        message: String,
        /// The file that the client would have brought.
        file: String,
        /// Where that file can be placed by hand.
        folder: PathBuf,
    },
    /// A file is not the pinned one.
    #[error("{}: found SHA-256 {found}, expected {expected}", path.display())]
    Hash {
        /// The file.
        path: PathBuf,
        /// Its hash.
        found: String,
        /// The pinned hash.
        expected: String,
    },
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried: "read", "write", "create".
        action: &'static str,
        /// The reason.
        source: std::io::Error,
    },
    /// A file of a package does not hold what it should.
    #[error("{file}: {field}: found {found}, expected {expected}")]
    Format {
        /// The package file, or the file inside it.
        file: String,
        /// Which part of it.
        field: String,
        /// What it holds.
        found: String,
        /// What was needed.
        expected: String,
    },
    /// The fetch was stopped from outside.
    #[error("stopped; finished downloads are kept, run the same command to go on")]
    Cancelled,
    /// A prepared file could not be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The prepared things could not be read or written.
    #[error(transparent)]
    Things(#[from] ThingsError),
    /// A picture, sound or film could not be decoded.
    #[error(transparent)]
    Media(#[from] MediaError),
}

impl FetchError {
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, action, source }
    }

    pub(crate) fn format(
        file: impl Into<String>,
        field: impl Into<String>,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) -> Self {
        Self::Format {
            file: file.into(),
            field: field.into(),
            found: found.into(),
            expected: expected.into(),
        }
    }
}
