//! Text: our own sub-word vocabulary, a small bidirectional LightNet encoder, and what it is distilled from.
//!
//! A [`TextModel`] is a folder with `config.json`, `model.safetensors` and `tokenizer.json`. At training time its
//! sentence vector follows a larger teacher ([`distil`], [`teacher`]) on sentences that [`corpus`] writes.

pub mod corpus;
pub mod distil;
pub mod encoder;
mod everyday;
pub mod teacher;
pub mod tokenizer;
pub mod wordnet;

pub use encoder::{TextConfig, TextEncoder, TextModel, TextStates};
pub use tokenizer::{TextBatch, TextTokenizer, Tokens};

use std::path::PathBuf;

use fulgur_lightnet::params::ParamsError;

/// What can go wrong with texts, their models and their training files.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file can be read but does not hold what it should.
    #[error("{}: {field}: found {found}, expected {expected}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// Part of the file.
        field: String,
        /// What it holds.
        found: String,
        /// What was needed.
        expected: String,
    },
    /// A vocabulary cannot be learnt, read or used.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The weights are damaged or those of another model.
    #[error(transparent)]
    Params(#[from] ParamsError),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, TextError>;

/// Reads a whole file, naming it in the error.
pub(crate) fn read(path: PathBuf) -> Result<(PathBuf, Vec<u8>)> {
    match std::fs::read(&path) {
        Ok(bytes) => Ok((path, bytes)),
        Err(source) => Err(TextError::Io { path, source }),
    }
}
