//! Pictures with labels and captions, whatever they lie in.
//!
//! [`Labelled`] is one data set: its classes, and for every picture the pixels, a class, a caption and a key, where there are any. It
//! comes from a prepared set, a folder with a folder per class, JSONL or a pair of IDX files; [`Labelled::open`] takes all of them by
//! name. Pictures are decoded when they are asked for, from any number of threads.
//!
//! A set that was published in two parts keeps them. Of others, one picture in [`HELD_OUT_ONE_IN`] is held out by the hash of its key,
//! so that more pictures move none, and pictures that share a key stay together.
//!
//! ```
//! use fulgur_datasets::labelled::{Item, Labelled, Part};
//! use fulgur_datasets::media::Picture;
//!
//! let item = |grey, label| Item {
//!     picture: Picture { pixels: vec![grey; 12], width: 2, height: 2, channels: 3 },
//!     label: Some(label),
//!     caption: None,
//!     key: format!("{grey}"),
//! };
//! let items = (0..100).map(|n| item(n, usize::from(n > 50))).collect();
//! let set = Labelled::in_memory("greys", vec!["dark".into(), "light".into()], items)?;
//! assert_eq!(set.part(Part::Train).len() + set.part(Part::HeldOut).len(), 100);
//! assert_eq!((set.label(7), set.picture(7)?.pixels[0]), (Some(0), 7));
//! # Ok::<(), fulgur_datasets::labelled::LabelledError>(())
//! ```

mod error;
mod files;
mod folder;
pub(crate) mod idx;
mod jsonl;
pub(crate) mod packed;
pub mod prepared;

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

pub use error::{LabelledError, Reason, Skipped};
pub use prepared::EmojiClasses;

use crate::media::{Picture, read_upright};
use crate::store::Mapped;
use packed::Packed;

/// Of so many pictures one is held out, where a set was not published in parts.
pub const HELD_OUT_ONE_IN: u64 = 10;
/// Names of prepared sets that [`Labelled::open`] takes.
pub const SETS: [&str; 6] = [
    "fashion-mnist",
    "mnist-5k",
    "emoji",
    "emoji/subcategory",
    "gcompris",
    "openclipart",
];
/// What shows through pictures with opacity.
pub const BACKGROUND: [u8; 3] = [255; 3];

/// A part of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// What may be trained on.
    Train,
    /// What is judged on.
    HeldOut,
    /// Both.
    All,
}

/// A picture of a set in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// RGB or RGBA.
    pub picture: Picture,
    /// Its class, below the number of classes.
    pub label: Option<usize>,
    /// What it shows, in words.
    pub caption: Option<String>,
    /// Decides whether it is held out.
    pub key: String,
}

/// The labelled pictures of one data set.
#[derive(Debug)]
pub struct Labelled {
    name: String,
    classes: Vec<String>,
    entries: Vec<Entry>,
    pixels: Pixels,
    skipped: Skipped,
}

/// What is known about a picture without decoding it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    /// Its place among the pixels.
    place: usize,
    label: Option<usize>,
    caption: Option<String>,
    key: String,
    held_out: bool,
}

impl Entry {
    /// An entry whose part the hash of its key decides.
    fn hashed(place: usize, label: Option<usize>, caption: Option<String>, key: String) -> Self {
        Self {
            held_out: is_held_out(&key),
            place,
            label,
            caption,
            key,
        }
    }
}

/// Where the pixels are.
#[derive(Debug)]
enum Pixels {
    /// Grey pictures of one size, one behind the other.
    Grey {
        bytes: Vec<u8>,
        width: usize,
        height: usize,
    },
    /// RGBA pictures of one size in the tensor `images` of a prepared file.
    Opacity { file: Mapped, side: usize },
    /// Encoded pictures in one prepared file.
    Packed(Packed),
    /// Files of their own.
    Files(Vec<PathBuf>),
    /// Decoded RGB pictures.
    Memory(Vec<Picture>),
}

impl Labelled {
    /// Opens the pictures called `source`: one of [`SETS`] in the folder `data`, a folder, a file `*.jsonl`, or an IDX file of pictures
    /// (its name holds `images` and `idx3`; the labels lie beside it, under the same name with `labels` and `idx1`). A name of a set
    /// goes before a folder of that name; `./NAME` is the folder.
    ///
    /// # Errors
    /// There is nothing of this name, the set is not prepared, or it is damaged.
    pub fn open(source: &str, data: &Path) -> Result<Self, LabelledError> {
        match source {
            "fashion-mnist" => return Self::fashion_mnist(&data.join(source)),
            "mnist-5k" => return Self::mnist_5k(&data.join(source)),
            "emoji" => return Self::emoji(&data.join(source), EmojiClasses::Category),
            "emoji/subcategory" => return Self::emoji(&data.join("emoji"), EmojiClasses::Subcategory),
            "gcompris" => return Self::packed("gcompris", &data.join(source)),
            "openclipart" => return Self::packed("openclipart", &data.join(source)),
            _ => {}
        }
        let path = Path::new(source);
        if path.is_dir() {
            return Self::folder(path);
        }
        if !path.is_file() {
            return Err(LabelledError::Unknown {
                name: source.to_owned(),
            });
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.contains("images") && name.contains("idx3") {
            let labels = name.replace("images", "labels").replace("idx3", "idx1");
            Self::idx(path, &path.with_file_name(labels))
        } else {
            Self::jsonl(path)
        }
    }

    /// Pictures that are in memory already, by the hash of their keys in two parts.
    ///
    /// # Errors
    /// A label is beyond the classes, or the fields of a picture do not fit each other.
    pub fn in_memory(name: &str, classes: Vec<String>, items: Vec<Item>) -> Result<Self, LabelledError> {
        let mut entries = Vec::with_capacity(items.len());
        let mut pictures = Vec::with_capacity(items.len());
        for (place, item) in items.into_iter().enumerate() {
            if let Some(label) = item.label.filter(|&label| label >= classes.len()) {
                return Err(LabelledError::invalid(
                    name.as_ref(),
                    format!("label of picture {place}"),
                    label,
                    format!("less than {}", classes.len()),
                ));
            }
            let Picture {
                pixels,
                width,
                height,
                channels,
            } = item.picture;
            pictures.push(Picture::new(pixels, width, height, channels)?.over(BACKGROUND));
            entries.push(Entry::hashed(place, item.label, item.caption, item.key));
        }
        Ok(Self {
            name: name.to_owned(),
            classes,
            entries,
            pixels: Pixels::Memory(pictures),
            skipped: Skipped::default(),
        })
    }

    /// Name of the set, or the path.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of pictures.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Names of the classes; a label is a place here. Empty where pictures have captions only.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Class of picture `index`; none where it has none, or beyond the end.
    pub fn label(&self, index: usize) -> Option<usize> {
        self.entries.get(index)?.label
    }

    /// What picture `index` shows, in words; none where nobody said, or beyond the end.
    pub fn caption(&self, index: usize) -> Option<&str> {
        self.entries.get(index)?.caption.as_deref()
    }

    /// What decides whether picture `index` is held out, and names it: a path, a number, the base code of an emoji. Empty beyond the end.
    pub fn key(&self, index: usize) -> &str {
        self.entries.get(index).map_or("", |entry| &entry.key)
    }

    /// Whether all pictures are grey, so that one channel says everything.
    pub fn is_grey(&self) -> bool {
        matches!(self.pixels, Pixels::Grey { .. })
    }

    /// Height and width where all pictures have the same.
    pub fn side(&self) -> Option<[usize; 2]> {
        match &self.pixels {
            Pixels::Grey { width, height, .. } => Some([*height, *width]),
            Pixels::Opacity { side, .. } => Some([*side; 2]),
            Pixels::Memory(pictures) => {
                let side = |picture: &Picture| [picture.height, picture.width];
                let first = side(pictures.first()?);
                pictures
                    .iter()
                    .all(|picture| side(picture) == first)
                    .then_some(first)
            }
            Pixels::Packed(_) | Pixels::Files(_) => None,
        }
    }

    /// Numbers of the pictures of a part, ascending.
    pub fn part(&self, part: Part) -> Vec<usize> {
        let wanted = |entry: &Entry| match part {
            Part::Train => !entry.held_out,
            Part::HeldOut => entry.held_out,
            Part::All => true,
        };
        (0..self.len())
            .filter(|&index| wanted(&self.entries[index]))
            .collect()
    }

    /// How many pictures of a part each class has.
    pub fn counts(&self, part: Part) -> Vec<usize> {
        let mut counts = vec![0; self.classes.len()];
        for label in self.part(part).into_iter().filter_map(|index| self.label(index)) {
            counts[label] += 1;
        }
        counts
    }

    /// What was left out: files that are no pictures, pictures that cannot be read, classes without pictures.
    pub fn skipped(&self) -> &Skipped {
        &self.skipped
    }

    /// Decodes picture `index`: RGB, upright, over white where it has opacity.
    ///
    /// # Errors
    /// It cannot be read or decoded, or there is none of this number.
    pub fn picture(&self, index: usize) -> Result<Picture, LabelledError> {
        let Some(entry) = self.entries.get(index) else {
            return Err(LabelledError::invalid(
                self.name.as_ref(),
                "picture",
                index,
                format!("less than {}", self.len()),
            ));
        };
        let place = entry.place;
        Ok(match &self.pixels {
            Pixels::Grey { bytes, width, height } => {
                let area = width * height;
                let grey = &bytes[place * area..(place + 1) * area];
                let mut rgb = vec![0; 3 * area];
                for (pixel, &value) in rgb.as_chunks_mut::<3>().0.iter_mut().zip(grey) {
                    *pixel = [value; 3];
                }
                Picture::new(rgb, *width, *height, 3)?
            }
            Pixels::Opacity { file, side } => {
                let picture = prepared::opaque(file, place, *side)?;
                picture.over(BACKGROUND)
            }
            Pixels::Packed(packed) => packed.picture(place)?.over(BACKGROUND),
            Pixels::Files(paths) => read_upright(&paths[place])?.over(BACKGROUND),
            Pixels::Memory(pictures) => pictures[place].clone(),
        })
    }

    /// Decodes every picture once and leaves out those that cannot be, counted in [`Labelled::skipped`]. Classes stay as they are.
    /// Takes as long as one pass through the pictures.
    pub fn drop_broken(&mut self) {
        if !matches!(self.pixels, Pixels::Files(_) | Pixels::Packed(_)) {
            return;
        }
        let broken: Vec<Option<String>> = (0..self.len())
            .into_par_iter()
            .map(|index| self.picture(index).err().map(|error| error.to_string()))
            .collect();
        let mut broken = broken.into_iter();
        let skipped = &mut self.skipped;
        self.entries.retain(|_| match broken.next().flatten() {
            Some(message) => {
                skipped.add(Reason::Broken, message);
                false
            }
            None => true,
        });
    }

    /// Checks that a classifier can be trained on these pictures: at least two classes, each with a picture to train on, a class for
    /// every picture, and something held out.
    ///
    /// # Errors
    /// What is missing, by name.
    pub fn check_classes(&self) -> Result<(), LabelledError> {
        let wrong = |field: &str, found: String, expected: &str| {
            Err(LabelledError::invalid(
                self.name.as_ref(),
                field,
                found,
                expected.to_owned(),
            ))
        };
        if self.classes.len() < 2 {
            let found = match self.classes.first() {
                Some(only) => format!("only {only:?}"),
                None => "none".to_owned(),
            };
            return wrong("classes", found, "at least two");
        }
        if let Some(entry) = self.entries.iter().find(|entry| entry.label.is_none()) {
            return wrong(
                "label",
                format!("none for {:?}", entry.key),
                "a class for every picture",
            );
        }
        let empty = self.counts(Part::Train).into_iter().position(|count| count == 0);
        if let Some(class) = empty {
            let found = format!("none of class {:?} to train on", self.classes[class]);
            return wrong("pictures", found, "at least one of every class");
        }
        if self.part(Part::HeldOut).is_empty() {
            return wrong("pictures", "none held out".to_owned(), "at least one");
        }
        Ok(())
    }
}

/// Whether the hash of a key puts a picture among those held out.
fn is_held_out(key: &str) -> bool {
    let hash = Sha256::digest(key.as_bytes());
    let first = hash
        .iter()
        .take(8)
        .fold(0u64, |sum, &byte| sum << 8 | u64::from(byte));
    first % HELD_OUT_ONE_IN == 0
}
