//! The prepared file of things: one safetensors file, read through a memory map.
//!
//! Tensors `cutout.ID` [height, width, 4] u8 and `sound.ID` [samples] i16 (32767 is 1.0); the metadata entry
//! `things` is a JSON object from id to words and source.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{CUTOUT_SIDE, Cutout, MAX_SOUND, Source, Thing, Things, Words};
use crate::store::{self, Mapped, Plain, StoreError};

/// File name of the prepared things inside their folder.
pub const THINGS_FILE: &str = "things.safetensors";
/// Metadata entry that holds words and sources.
pub const WORDS_KEY: &str = "things";

/// Why things could not be read or written.
#[derive(Debug, Error)]
pub enum ThingsError {
    /// The file is absent, unreadable or no safetensors file.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file can be read but does not hold what it should.
    #[error("{path}: {field}: found {found}, expected {expected}")]
    Field {
        /// The file.
        path: PathBuf,
        /// The tensor or metadata entry.
        field: String,
        /// What the file holds.
        found: String,
        /// What was needed.
        expected: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Entry {
    words: Words,
    source: Source,
}

impl Things {
    /// Reads the things of the prepared set in folder `dir` (the folder that `sets::fetch("stamps", ..)` reports).
    ///
    /// # Errors
    /// The file is missing, damaged, or a tensor has another type or shape than the format says.
    pub fn load(dir: &Path) -> Result<Self, ThingsError> {
        let path = dir.join(THINGS_FILE);
        let file = Mapped::open(&path)?;
        let wrong = |field: &str, found: String, expected: &str| ThingsError::Field {
            path: path.clone(),
            field: field.to_owned(),
            found,
            expected: expected.to_owned(),
        };
        let text = file
            .metadata(WORDS_KEY)
            .ok_or_else(|| wrong(WORDS_KEY, "no such metadata entry".to_owned(), "a JSON object"))?;
        let entries: BTreeMap<String, Entry> = serde_json::from_str(text)
            .map_err(|e| wrong(WORDS_KEY, e.to_string(), "words and source by id"))?;
        let mut things = Vec::with_capacity(entries.len());
        for (id, Entry { words, source }) in entries {
            let cutout = read_cutout(&file, &id)?;
            let sound = read_sound(&file, &id)?;
            things.push(Thing {
                id,
                words,
                cutout,
                sound,
                source,
            });
        }
        Ok(Self(things))
    }
}

fn read_cutout(file: &Mapped, id: &str) -> Result<Cutout, ThingsError> {
    let name = format!("cutout.{id}");
    let (rgba, shape) = file.expect(&name, Dtype::U8, &[0, 0, 4])?;
    let side = 1..=CUTOUT_SIDE as usize;
    if !side.contains(&shape[0]) || !side.contains(&shape[1]) {
        return Err(ThingsError::Field {
            path: file.path().to_owned(),
            field: name,
            found: format!("{shape:?}"),
            expected: format!("sides of 1 to {CUTOUT_SIDE}"),
        });
    }
    Ok(Cutout {
        width: shape[1] as u32,
        height: shape[0] as u32,
        rgba: rgba.to_vec(),
    })
}

fn read_sound(file: &Mapped, id: &str) -> Result<Vec<f32>, ThingsError> {
    let name = format!("sound.{id}");
    let sound = file.samples(&name)?;
    if sound.is_empty() || sound.len() > MAX_SOUND {
        return Err(ThingsError::Field {
            path: file.path().to_owned(),
            field: name,
            found: format!("{} samples", sound.len()),
            expected: format!("1 to {MAX_SOUND}"),
        });
    }
    Ok(sound)
}

/// Writes `things` as [`THINGS_FILE`] into the folder `dir`; the same things give the same bytes.
///
/// # Errors
/// The folder cannot be written.
pub fn save(things: &Things, dir: &Path) -> Result<(), ThingsError> {
    let mut tensors = Vec::with_capacity(2 * things.len());
    let mut entries = BTreeMap::new();
    for thing in things.iter() {
        let Cutout { width, height, rgba } = &thing.cutout;
        let shape = [*height as usize, *width as usize, 4];
        tensors.push((format!("cutout.{}", thing.id), Plain::u8(&shape, rgba.clone())));
        tensors.push((format!("sound.{}", thing.id), Plain::samples(&thing.sound)));
        entries.insert(
            thing.id.clone(),
            Entry {
                words: thing.words.clone(),
                source: thing.source.clone(),
            },
        );
    }
    let path = dir.join(THINGS_FILE);
    let text = serde_json::to_string(&entries).map_err(|e| ThingsError::Field {
        path: path.clone(),
        field: WORDS_KEY.to_owned(),
        found: e.to_string(),
        expected: "words that can be written as JSON".to_owned(),
    })?;
    Ok(store::write_tensors(&path, tensors, Some((WORDS_KEY, text)))?)
}
