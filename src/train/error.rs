//! What can stop a training run.

use std::path::PathBuf;

use fulgur_lightnet::params::ParamsError;

use crate::distributed::CommError;

/// What a task answers: any error will do, the engine adds where it happened.
pub type TaskResult<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Why training cannot start or go on. The message is one line.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A file or folder of the run cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The recipe, or a `--set`, asks for something that does not exist or makes no sense.
    #[error("{origin}: {reason}")]
    Recipe {
        /// The recipe file, or the `--set` argument.
        origin: String,
        /// The field, what was found and what was expected.
        reason: String,
    },
    /// The run folder is not in the state that was expected.
    #[error("{}: {reason}", path.display())]
    Run {
        /// The folder.
        path: PathBuf,
        /// What was found and what to do.
        reason: String,
    },
    /// A checkpoint cannot be used.
    #[error("{}: not a usable checkpoint: {reason}", path.display())]
    Checkpoint {
        /// The folder of the checkpoint.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// The task failed.
    #[error("{doing}: {}", one_line(&source.to_string()))]
    Task {
        /// What the task was doing.
        doing: String,
        /// Its own words.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Gradients were not finite too many times in a row.
    #[error(
        "step {step}: gradients were not finite {skips} times in a row; the last checkpoint is from step {kept}"
    )]
    Diverged {
        /// The last step tried.
        step: u64,
        /// How many steps were skipped in a row.
        skips: u64,
        /// The step of the newest checkpoint; 0 where there is none.
        kept: u64,
    },
    /// A file of weights or moments is not what it should be.
    #[error(transparent)]
    Params(#[from] ParamsError),
    /// Ranks do not come together.
    #[error(transparent)]
    Ranks(#[from] CommError),
    /// A tensor operation of the engine failed.
    #[error("{}", one_line(&.0.to_string()))]
    Candle(#[from] candle_core::Error),
}

impl TrainError {
    pub(super) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    pub(super) fn task(
        doing: impl Into<String>,
    ) -> impl FnOnce(Box<dyn std::error::Error + Send + Sync>) -> Self {
        let doing = doing.into();
        move |source| Self::Task { doing, source }
    }
}

/// The first line of a message: some libraries append a stack.
pub(super) fn one_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}
