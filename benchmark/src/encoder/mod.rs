//! Encoders of picture and sound into one space.

mod any;
mod builtin;
pub mod cache;
mod clip;
pub mod imagebind;
mod tower;

pub use any::{AnyEncoder, AnyError, Sense};
pub use builtin::{BuiltinConfig, BuiltinEncoder, NAME};
pub use clip::ClipEncoder;
pub use imagebind::{ImageBindEncoder, ImageBindOptions};
pub use tower::{Tower, TowerConfig};

use fulgur_datasets::media::Sound;
use fulgur_lightnet::config::ConfigError;
use fulgur_lightnet::params::{ParamsError, folder};

/// Why an encoding failed.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// There is nothing to see.
    #[error("no frames: found 0, expected at least 1")]
    NoFrames,
    /// The work was interrupted.
    #[error("cancelled")]
    Cancelled,
    /// The input does not fit the encoder.
    #[error("{0}")]
    Input(String),
    /// The network failed.
    #[error(transparent)]
    Network(#[from] candle_core::Error),
}

/// Why an encoder cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Its configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its weights.
    #[error(transparent)]
    Weights(#[from] ParamsError),
    /// Its folder.
    #[error(transparent)]
    Folder(#[from] folder::LoadError),
    /// Its network.
    #[error(transparent)]
    Network(#[from] candle_core::Error),
}

/// A pair of networks that put frames and sounds into one space, compared by cosine.
pub trait Encoder: Send + Sync {
    /// Name that goes with every score.
    fn name(&self) -> &str;

    /// Seconds of sound that the encoder hears at a time; shorter soundtracks are padded with silence.
    fn sound_window_s(&self) -> f64;

    /// Frames that it takes at a time, at best.
    fn batch(&self) -> usize {
        16
    }

    /// Everything that its vectors depend on besides the clip, in one line; `None` where they are not worth keeping.
    ///
    /// # Errors
    /// The weights cannot be read.
    fn identity(&self) -> std::io::Result<Option<String>> {
        Ok(None)
    }

    /// One vector a frame; frames are RGB bytes, `height` rows of `width` pixels.
    fn frames(&self, frames: &[&[u8]], width: usize, height: usize) -> Result<Vec<Vec<f32>>, EncodeError>;

    /// One vector for a whole soundtrack.
    fn sound(&self, sound: &Sound) -> Result<Vec<f32>, EncodeError>;
}
