//! Encoded pictures of a prepared collection in one file.
//!
//! Tensors: `files` u8, the files one behind the other, and `offsets` i64 [n + 1]. The metadata entry `pictures` is a JSON list with
//! class, caption, key and origin of every picture.

use std::path::Path;

use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use super::{Entry, Labelled, LabelledError, Pixels, Skipped};
use crate::media::{Picture, decode_upright};
use crate::store::{Mapped, StoreError};
#[cfg(feature = "media")]
use crate::store::{Plain, write_tensors};
use crate::things::Origin;

pub(crate) const FILE: &str = "pictures.safetensors";
const KEY: &str = "pictures";

/// What is known about a picture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Card {
    pub(crate) class: String,
    pub(crate) caption: String,
    pub(crate) key: String,
    pub(crate) origin: Origin,
}

/// Writes a collection into the folder `dir`.
#[cfg(feature = "media")]
pub(crate) fn write(dir: &Path, pictures: Vec<(Card, Vec<u8>)>) -> Result<(), StoreError> {
    let path = dir.join(FILE);
    let (cards, files): (Vec<Card>, Vec<Vec<u8>>) = pictures.into_iter().unzip();
    let text = serde_json::to_string(&cards).map_err(|e| StoreError::Damaged {
        path: path.clone(),
        found: e.to_string(),
    })?;
    let mut offsets = vec![0];
    for file in &files {
        offsets.push(offsets[offsets.len() - 1] + file.len() as i64);
    }
    let files = files.concat();
    let tensors = vec![
        ("files".to_owned(), Plain::u8(&[files.len()], files)),
        ("offsets".to_owned(), Plain::i64(&offsets)),
    ];
    write_tensors(&path, tensors, Some((KEY, text)))
}

/// An open collection.
#[derive(Debug)]
pub(super) struct Packed {
    file: Mapped,
    offsets: Vec<usize>,
    /// For errors.
    paths: Vec<String>,
}

impl Packed {
    fn open(dir: &Path) -> Result<(Self, Vec<Card>), StoreError> {
        let file = Mapped::open(&dir.join(FILE))?;
        let damaged = |found: String| StoreError::Damaged {
            path: file.path().to_owned(),
            found,
        };
        let cards: Vec<Card> = serde_json::from_str(file.metadata(KEY).unwrap_or("absent"))
            .map_err(|e| damaged(format!("metadata entry {KEY}: {e}")))?;
        let (bytes, _) = file.expect("files", Dtype::U8, &[0])?;
        let offsets = file.indices("offsets")?;
        let ascending = offsets.is_sorted() && offsets.first() == Some(&0);
        if !ascending || offsets.len() != cards.len() + 1 || offsets.last() != Some(&(bytes.len() as i64)) {
            return Err(damaged(format!(
                "offsets that do not fit {} pictures",
                cards.len()
            )));
        }
        let paths = cards.iter().map(|card| card.origin.path.clone()).collect();
        let offsets = offsets.iter().map(|&offset| offset as usize).collect();
        Ok((Self { file, offsets, paths }, cards))
    }

    pub(super) fn picture(&self, place: usize) -> Result<Picture, LabelledError> {
        let (bytes, _) = self.file.expect("files", Dtype::U8, &[0])?;
        let bytes = &bytes[self.offsets[place]..self.offsets[place + 1]];
        Ok(decode_upright(bytes, self.paths[place].as_ref())?)
    }
}

impl Labelled {
    /// The prepared collection `name` in the folder `dir`.
    pub(super) fn packed(name: &'static str, dir: &Path) -> Result<Self, LabelledError> {
        let (packed, cards) = Packed::open(dir).map_err(|source| LabelledError::Set { set: name, source })?;
        let mut classes: Vec<String> = cards.iter().map(|card| card.class.clone()).collect();
        classes.sort_unstable();
        classes.dedup();
        let entry = |(place, card): (usize, Card)| {
            let label = classes.binary_search(&card.class).ok();
            Entry::hashed(place, label, Some(card.caption), card.key)
        };
        Ok(Self {
            name: name.to_owned(),
            entries: cards.into_iter().enumerate().map(entry).collect(),
            classes,
            pixels: Pixels::Packed(packed),
            skipped: Skipped::default(),
        })
    }
}
