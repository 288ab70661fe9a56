//! Networks that metrics look and listen through: each loads the tensors of its published checkpoint by their own names.
//!
//! | network | sees or hears | gives |
//! |---|---|---|
//! | [`i3d`] | clips of nine frames and more | 400 actions |
//! | [`vggish`] | patches of 0.96 s | 128 values a patch |
//! | [`panns`] | whole sounds | 2048 values and 527 classes |
//! | [`clap`] | ten seconds of sound; texts | unit vectors of one space |
//!
//! Their figures depend on the checkpoint, which [`checkpoint`] names by its hash.

pub mod audioldm;
pub mod clap;
pub mod frames;
pub mod i3d;
mod layers;
pub mod panns;
pub mod spectrogram;
#[cfg(test)]
pub(crate) mod testing;
pub mod vggish;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fulgur_lightnet::config::ConfigError;
use fulgur_lightnet::encoders::bert::BertError;
use fulgur_lightnet::params::ParamsError;
use fulgur_lightnet::params::folder::{LoadError, Weights};

pub(crate) use layers::rows;
pub use layers::softmax;

/// Shapes of tensors by name.
pub type Shapes = BTreeMap<String, Vec<usize>>;

/// Why a network cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum FeatureError {
    /// The folder gives no such network.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Its weights.
    #[error(transparent)]
    Weights(#[from] ParamsError),
    /// A short file of the folder.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The text tower.
    #[error(transparent)]
    Bert(#[from] BertError),
    /// `tokenizer.json`.
    #[error("{}: {reason}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A text that the tokenizer refuses.
    #[error("text: {0}")]
    Text(String),
    /// An operation failed.
    #[error(transparent)]
    Network(#[from] candle_core::Error),
}

/// There are no weights in `dir`.
fn absent(dir: &Path) -> FeatureError {
    LoadError::Absent { path: dir.to_owned() }.into()
}

/// Shapes of the weights in `dir`, from their headers alone.
fn shapes(dir: &Path) -> Result<Shapes, FeatureError> {
    let weights = Weights::find(dir)?.ok_or_else(|| absent(dir))?;
    Ok(weights.shapes()?)
}

/// The first 16 digits of the hash of the weights in `dir`: they name a checkpoint in results.
///
/// # Errors
/// There are no weights, or they cannot be read.
pub fn checkpoint(dir: &Path) -> Result<String, FeatureError> {
    let weights = Weights::find(dir)?.ok_or_else(|| absent(dir))?;
    let io = |source| ParamsError::Io {
        path: weights.origin.clone(),
        source,
    };
    Ok(crate::checkpoint::short(weights.files()).map_err(io)?)
}
