//! Why a clip cannot be made.

use std::path::{Path, PathBuf};

use fulgur_lightnet::config::ConfigError;
use fulgur_lightnet::encoders::clip_tokenizer::ClipTokenizerError;
use fulgur_lightnet::params::ParamsError;
use fulgur_lightnet::params::folder::LoadError;

use crate::text::TextError;

/// Errors of the generator, one line each.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A request that the model cannot fulfil.
    #[error("{field}: found {found}, expected {expected}")]
    Request {
        /// Which part of the request.
        field: &'static str,
        /// What it was.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// A file of the model folder that is missing, unreadable or wrong.
    #[error("{}: {detail}", path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// A configuration that cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Weights that do not fit.
    #[error(transparent)]
    Weights(#[from] ParamsError),
    /// The text encoder.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A network cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A vocabulary of CLIP.
    #[error(transparent)]
    Vocabulary(#[from] ClipTokenizerError),
    /// The device has too little memory.
    #[error("out of memory on the device: {advice} ({line})")]
    Memory {
        /// The smallest change that helps.
        advice: String,
        /// What the device said.
        line: String,
    },
    /// The arithmetic failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn request(field: &'static str, found: impl ToString, expected: impl Into<String>) -> Self {
        Self::Request {
            field,
            found: found.to_string(),
            expected: expected.into(),
        }
    }

    pub(crate) fn model(path: &Path, detail: impl ToString) -> Self {
        Self::Model {
            path: path.to_owned(),
            detail: detail.to_string(),
        }
    }
}
