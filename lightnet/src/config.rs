//! `config.json` and other short JSON files of model folders.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Largest JSON file that is read.
const MOST_BYTES: u64 = 1 << 20;
/// Most classes of a classifier, or of what is drawn.
pub(crate) const MOST_CLASSES: usize = 1 << 16;
/// Longest side of the pictures that a model is made for.
pub(crate) const LONGEST_SIDE: usize = 1 << 14;
/// Most layers of a model of pictures, and its widest stream and hidden layer: beyond all reason.
pub(crate) const MOST_LAYERS: usize = 1 << 10;
pub(crate) const MOST_WIDTH: usize = 1 << 16;

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

/// As [`read`], and refuses what `check` refuses, under the name of the file.
///
/// # Errors
/// As [`read`], or what is read describes a model that cannot be.
pub fn read_checked<T: DeserializeOwned>(
    path: &Path,
    check: impl FnOnce(&T) -> candle_core::Result<()>,
) -> Result<T, ConfigError> {
    let config = read(path)?;
    check(&config).map_err(|e| ConfigError {
        path: path.to_owned(),
        // What follows the first line is where in the program.
        detail: e.to_string().lines().next().unwrap_or_default().to_owned(),
    })?;
    Ok(config)
}

/// Refuses a size of zero, or beyond `most`.
pub(crate) fn within(field: &str, found: usize, most: usize) -> candle_core::Result<()> {
    match (1..=most).contains(&found) {
        true => Ok(()),
        false => candle_core::bail!("{field} is {found}, expected 1 to {most}"),
    }
}

/// Refuses sides of pictures that are not whole patches, or beyond all reason.
pub(crate) fn whole_patches(sides: [usize; 2], patch: usize) -> candle_core::Result<()> {
    within("patch_size", patch, LONGEST_SIDE)?;
    for side in sides {
        within("image_size", side, LONGEST_SIDE)?;
        if !side.is_multiple_of(patch) {
            candle_core::bail!("image_size is {sides:?}, expected multiples of the patch_size {patch}");
        }
    }
    Ok(())
}
