//! Prepared sets whose pictures have one size: where their tensors are and what their labels mean.

use std::path::Path;

use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use super::{Entry, Labelled, LabelledError, Pixels, Skipped};
use crate::media::Picture;
use crate::store::{Mapped, StoreError};

/// `fashion-mnist`: `SPLIT.images` u8 [n, 28, 28] and `SPLIT.labels` u8 [n].
pub mod fashion_mnist {
    use std::path::Path;

    use safetensors::tensor::Dtype;

    use crate::store::{Mapped, StoreError};

    pub(crate) const FILE: &str = "fashion-mnist.safetensors";
    /// Width and height of a picture.
    pub const SIDE: usize = 28;
    /// Name of a split here, in the package, and its number of pictures.
    pub(crate) const SPLITS: [(&str, &str, usize); 2] =
        [("train", "train", 60_000), ("test", "t10k", 10_000)];
    /// What the labels mean.
    pub const CLASSES: [&str; 10] = [
        "t-shirt",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ];

    /// The prepared set.
    #[derive(Debug)]
    pub struct FashionMnist(pub(super) Mapped);

    impl FashionMnist {
        /// Opens the prepared set in the folder `dir`.
        ///
        /// # Errors
        /// The file is missing or damaged.
        pub fn open(dir: &Path) -> Result<Self, StoreError> {
            Mapped::open(&dir.join(FILE)).map(Self)
        }

        /// Pictures, row-major bytes [n, 28, 28], and their labels 0..10 [n], of `train` or `test`.
        ///
        /// # Errors
        /// A tensor is missing or of another shape.
        pub fn split(&self, train: bool) -> Result<(&[u8], &[u8]), StoreError> {
            let (name, _, count) = SPLITS[usize::from(!train)];
            let (images, _) = self
                .0
                .expect(&format!("{name}.images"), Dtype::U8, &[count, SIDE, SIDE])?;
            let (labels, _) = self.0.expect(&format!("{name}.labels"), Dtype::U8, &[count])?;
            Ok((images, labels))
        }
    }
}

/// `mnist-5k`: `images` u8 [5000, 28, 28] and `labels` u8 [5000].
pub mod mnist_5k {
    pub(crate) const FILE: &str = "mnist-5k.safetensors";
    /// Width and height of a picture.
    pub const SIDE: usize = 28;
    /// Number of pictures.
    pub const COUNT: usize = 5000;
}

/// `emoji`: `images` u8 [n, 64, 64, 4], and a JSON list of labels in the metadata entry `emoji`.
pub mod emoji {
    pub(crate) const FILE: &str = "emoji.safetensors";
    pub(crate) const KEY: &str = "emoji";
    /// Width and height of a picture.
    pub const SIDE: usize = 64;
}

/// What is known about the picture of an emoji.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Emoji {
    /// Code points in lower-case hexadecimal, joined by hyphens.
    pub code: String,
    /// Code of the variant without skin tone; the code itself where there is none.
    pub base: String,
    /// Lower-case name.
    pub name: String,
    /// One of 10 categories.
    pub category: String,
    /// One of 99 subcategories.
    pub subcategory: String,
}

/// What the classes of emoji are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmojiClasses {
    /// The 10 categories.
    Category,
    /// The 99 subcategories.
    Subcategory,
}

impl Labelled {
    /// The prepared set `fashion-mnist` in the folder `dir`: its 10,000 test pictures are held out.
    ///
    /// # Errors
    /// It is not there or damaged.
    pub fn fashion_mnist(dir: &Path) -> Result<Self, LabelledError> {
        use fashion_mnist::{CLASSES, FashionMnist, SIDE, SPLITS};
        let damaged = |source| LabelledError::Set {
            set: "fashion-mnist",
            source,
        };
        let prepared = FashionMnist::open(dir).map_err(damaged)?;
        let (mut bytes, mut labels) = (Vec::new(), Vec::new());
        for train in [true, false] {
            let (images, values) = prepared.split(train).map_err(damaged)?;
            bytes.extend_from_slice(images);
            labels.extend_from_slice(values);
        }
        let mut set = grey("fashion-mnist", &prepared.0, (bytes, SIDE), &labels, &CLASSES)?;
        for (index, entry) in set.entries.iter_mut().enumerate() {
            entry.held_out = index >= SPLITS[0].2;
        }
        Ok(set)
    }

    /// The prepared set `mnist-5k` in the folder `dir`: 5,000 digits, 500 a class.
    ///
    /// # Errors
    /// It is not there or damaged.
    pub fn mnist_5k(dir: &Path) -> Result<Self, LabelledError> {
        use mnist_5k::{COUNT, FILE, SIDE};
        let damaged = |source| LabelledError::Set {
            set: "mnist-5k",
            source,
        };
        let file = Mapped::open(&dir.join(FILE)).map_err(damaged)?;
        let images = file.expect("images", Dtype::U8, &[COUNT, SIDE, SIDE]);
        let bytes = images.map_err(damaged)?.0.to_vec();
        let labels = file.expect("labels", Dtype::U8, &[COUNT]).map_err(damaged)?.0;
        let classes: Vec<String> = (0..10).map(|digit| digit.to_string()).collect();
        let classes: Vec<&str> = classes.iter().map(String::as_str).collect();
        grey("mnist-5k", &file, (bytes, SIDE), labels, &classes)
    }

    /// The prepared set `emoji` in the folder `dir`: captions are the names, keys are the base codes, so that skin tones of one emoji
    /// stay together.
    ///
    /// # Errors
    /// It is not there or damaged.
    pub fn emoji(dir: &Path, classes: EmojiClasses) -> Result<Self, LabelledError> {
        let (file, labels) = open_emoji(dir).map_err(|source| LabelledError::Set { set: "emoji", source })?;
        let class = |label: &Emoji| match classes {
            EmojiClasses::Category => label.category.clone(),
            EmojiClasses::Subcategory => label.subcategory.clone(),
        };
        let mut names: Vec<String> = labels.iter().map(class).collect();
        names.sort_unstable();
        names.dedup();
        let entry = |(place, label): (usize, Emoji)| {
            let class = names.binary_search(&class(&label)).ok();
            Entry::hashed(place, class, Some(label.name), label.base)
        };
        Ok(Self {
            name: "emoji".to_owned(),
            entries: labels.into_iter().enumerate().map(entry).collect(),
            classes: names,
            pixels: Pixels::Opacity {
                file,
                side: emoji::SIDE,
            },
            skipped: Skipped::default(),
        })
    }
}

/// The prepared emoji in the folder `dir` and what they show.
pub(crate) fn open_emoji(dir: &Path) -> Result<(Mapped, Vec<Emoji>), StoreError> {
    use emoji::{FILE, KEY, SIDE};
    let file = Mapped::open(&dir.join(FILE))?;
    let labels: Vec<Emoji> =
        serde_json::from_str(file.metadata(KEY).unwrap_or("absent")).map_err(|e| StoreError::Damaged {
            path: file.path().to_owned(),
            found: format!("metadata entry {KEY}: {e}"),
        })?;
    file.expect("images", Dtype::U8, &[labels.len(), SIDE, SIDE, 4])?;
    Ok((file, labels))
}

/// Picture `place` of the tensor `images` [n, side, side, 4].
pub(super) fn opaque(file: &Mapped, place: usize, side: usize) -> Result<Picture, LabelledError> {
    let (bytes, _) = file.expect("images", Dtype::U8, &[0, side, side, 4])?;
    let size = side * side * 4;
    let pixels = bytes.get(place * size..(place + 1) * size).unwrap_or_default();
    Ok(Picture::new(pixels.to_vec(), side, side, 4)?)
}

/// Grey squares with labels, their number being the key.
fn grey(
    name: &'static str,
    file: &Mapped,
    (bytes, side): (Vec<u8>, usize),
    labels: &[u8],
    classes: &[&str],
) -> Result<Labelled, LabelledError> {
    let wrong = labels
        .iter()
        .position(|&label| usize::from(label) >= classes.len());
    if let Some(at) = wrong {
        return Err(LabelledError::invalid(
            file.path(),
            format!("label of picture {at}"),
            labels[at],
            format!("less than {}", classes.len()),
        ));
    }
    let entry = |(place, &label): (usize, &u8)| {
        Entry::hashed(place, Some(usize::from(label)), None, place.to_string())
    };
    Ok(Labelled {
        name: name.to_owned(),
        classes: classes.iter().map(|&class| class.to_owned()).collect(),
        entries: labels.iter().enumerate().map(entry).collect(),
        pixels: Pixels::Grey {
            bytes,
            width: side,
            height: side,
        },
        skipped: Skipped::default(),
    })
}
