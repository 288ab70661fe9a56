//! `emoji`: Noto emoji as RGBA pictures of 64 by 64, with names and categories.
//!
//! Prepared tensors: `images` u8 [n, 64, 64, 4], straight colour. The metadata entry `emoji` is a JSON list with code,
//! name, category, subcategory and base code of every picture; skin-tone variants share their base, so that a split by
//! base keeps near copies together.

use std::path::Path;

use safetensors::tensor::Dtype;
use serde::Deserialize;

use super::{Job, Set};
use crate::fetch::FetchError;
use crate::fetch::packages::EMOJI;
pub use crate::labelled::prepared::Emoji as Label;
pub use crate::labelled::prepared::emoji::SIDE;
use crate::labelled::prepared::emoji::{FILE, KEY};
use crate::labelled::prepared::open_emoji;
use crate::media::decode_picture;
use crate::store::{Mapped, Plain, StoreError, write_tensors};

pub(super) const SET: Set = Set {
    name: "emoji",
    description: "Noto emoji, 64x64 RGBA, with names, 10 categories and 99 subcategories",
    licence: "Apache-2.0 (Noto Emoji), MIT (names)",
    packages: &[&EMOJI],
    prepare,
};

const NAMES: &str = "package/emoji.json";
const FOLDER: &str = "package/img/google/64/";
/// Bytes of a picture.
const BYTES: usize = SIDE * SIDE * 4;

/// The prepared set.
#[derive(Debug)]
pub struct Emoji {
    file: Mapped,
    labels: Vec<Label>,
}

impl Emoji {
    /// Opens the prepared set in the folder `dir`.
    ///
    /// # Errors
    /// The file is missing or damaged.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let (file, labels) = open_emoji(dir)?;
        Ok(Self { file, labels })
    }

    /// What the pictures show.
    pub fn labels(&self) -> &[Label] {
        &self.labels
    }

    /// Picture `index` as bytes [64, 64, 4]; None beyond the end.
    pub fn image(&self, index: usize) -> Option<&[u8]> {
        let (bytes, _) = self.file.expect("images", Dtype::U8, &[0, SIDE, SIDE, 4]).ok()?;
        bytes.get(index.checked_mul(BYTES)?..)?.get(..BYTES)
    }
}

#[derive(Deserialize)]
struct Named {
    name: Option<String>,
    short_name: String,
    image: String,
    category: String,
    subcategory: String,
    has_img_google: bool,
    #[serde(default)]
    skin_variations: std::collections::BTreeMap<String, Variant>,
}

#[derive(Deserialize)]
struct Variant {
    image: String,
    has_img_google: bool,
}

fn prepare(job: &Job<'_>) -> Result<usize, FetchError> {
    let entries = job.read(0, &|path| path == NAMES || path.starts_with(FOLDER))?;
    let named: Vec<Named> = serde_json::from_slice(job.entry(&entries, NAMES)?)
        .map_err(|e| FetchError::format(NAMES, "list", e.to_string(), "names and categories"))?;
    let labels = labels(&named);
    job.begin(labels.len());
    let mut pixels = Vec::with_capacity(labels.len() * BYTES);
    for (index, label) in labels.iter().enumerate() {
        job.advance(index)?;
        let path = format!("{FOLDER}{}.png", label.code);
        let picture = decode_picture(job.entry(&entries, &path)?, path.as_ref())?;
        if (picture.width, picture.height, picture.channels) != (SIDE, SIDE, 4) {
            let found = format!("{} x {} x {}", picture.width, picture.height, picture.channels);
            return Err(FetchError::format(path, "picture", found, "64 x 64 x 4"));
        }
        pixels.extend(picture.pixels);
    }
    let text = serde_json::to_string(&labels)
        .map_err(|e| FetchError::format(NAMES, "list", e.to_string(), "text that JSON can hold"))?;
    let images = Plain::u8(&[labels.len(), SIDE, SIDE, 4], pixels);
    write_tensors(
        &job.out.join(FILE),
        vec![("images".to_owned(), images)],
        Some((KEY, text)),
    )?;
    job.advance(labels.len())?;
    Ok(labels.len())
}

/// Every picture with its variants, in the order of the list.
fn labels(named: &[Named]) -> Vec<Label> {
    let mut labels = Vec::new();
    for emoji in named {
        let code = |image: &str| image.trim_end_matches(".png").to_owned();
        let base = code(&emoji.image);
        let own = std::iter::once((&emoji.image, emoji.has_img_google));
        let variants = emoji
            .skin_variations
            .values()
            .map(|v| (&v.image, v.has_img_google));
        for (image, _) in own.chain(variants).filter(|(_, drawn)| *drawn) {
            labels.push(Label {
                code: code(image),
                base: base.clone(),
                name: emoji.name.as_deref().unwrap_or(&emoji.short_name).to_lowercase(),
                category: emoji.category.clone(),
                subcategory: emoji.subcategory.clone(),
            });
        }
    }
    labels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_share_their_base_and_undrawn_ones_are_left_out() {
        let text = r#"[{"name": "CLAPPING HANDS", "short_name": "clap", "image": "1f44f.png", "category": "People",
            "subcategory": "hands", "has_img_google": true, "skin_variations": {
            "1F3FB": {"image": "1f44f-1f3fb.png", "has_img_google": true},
            "1F3FC": {"image": "1f44f-1f3fc.png", "has_img_google": false}}}]"#;
        let labels = labels(&serde_json::from_str::<Vec<Named>>(text).unwrap());
        let codes: Vec<_> = labels
            .iter()
            .map(|l| (l.code.as_str(), l.base.as_str()))
            .collect();
        assert_eq!(codes, [("1f44f", "1f44f"), ("1f44f-1f3fb", "1f44f")]);
        assert_eq!(labels[1].name, "clapping hands");
    }
}
