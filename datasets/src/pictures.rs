//! The prepared pictures to put things in front of, read without a codec library.

use std::path::Path;

use safetensors::tensor::Dtype;

use crate::media::{MediaError, Picture};
use crate::store::{Mapped, StoreError};
use crate::things::Origin;

/// Width and height of a picture.
pub const SIDE: usize = 128;
/// Name of the prepared file.
pub(crate) const FILE: &str = "backgrounds.safetensors";
/// Its metadata entry with the origins.
pub(crate) const KEY: &str = "sources";

/// Reads the prepared pictures in the folder `dir`, with their origins.
///
/// # Errors
/// The file is missing or damaged.
pub fn load(dir: &Path) -> Result<Vec<(Picture, Origin)>, PicturesError> {
    let file = Mapped::open(&dir.join(FILE))?;
    let origins: Vec<Origin> =
        serde_json::from_str(file.metadata(KEY).unwrap_or("absent")).map_err(|e| StoreError::Damaged {
            path: file.path().to_owned(),
            found: format!("metadata entry {KEY}: {e}"),
        })?;
    let (bytes, _) = file.expect("images", Dtype::U8, &[origins.len(), SIDE, SIDE, 3])?;
    let pictures = bytes
        .chunks_exact(SIDE * SIDE * 3)
        .map(|pixels| Picture::new(pixels.to_vec(), SIDE, SIDE, 3));
    let pictures = pictures.collect::<Result<Vec<_>, MediaError>>()?;
    Ok(pictures.into_iter().zip(origins).collect())
}

/// Why the pictures cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum PicturesError {
    /// The file.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A picture in it.
    #[error(transparent)]
    Picture(#[from] MediaError),
}
