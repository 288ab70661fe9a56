//! `config.json` and other short JSON files of model folders.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Largest JSON file that is read.
const MOST_BYTES: u64 = 1 << 20;

/// A JSON file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {detail}", path.display())]
pub struct ConfigError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub detail: String,
}

/// Reads a JSON file of at most 1 MiB; keys that `T` does not know are ignored.
///
/// # Errors
/// The file is unreadable or too long, or its text does not describe a `T` (line and column are named).
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let fail = |detail: String| ConfigError {
        path: path.to_owned(),
        detail,
    };
    let file = File::open(path).map_err(|e| fail(e.to_string()))?;
    let mut text = String::new();
    file.take(MOST_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(|e| fail(e.to_string()))?;
    if text.len() as u64 > MOST_BYTES {
        return Err(fail(format!(
            "more than {MOST_BYTES} bytes, expected a short JSON file"
        )));
    }
    serde_json::from_str(&text).map_err(|e| fail(e.to_string()))
}
