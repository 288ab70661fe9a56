//! The pictures of a data set with their classes, in memory.

use std::path::Path;

use fulgur_datasets::media::Picture;

use crate::train::TaskResult;

/// A part of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// What is trained on.
    Train,
    /// What is judged on.
    HeldOut,
}

/// Grey pictures of one size.
#[derive(Debug)]
pub(crate) struct Set {
    classes: Vec<String>,
    /// Height and width.
    side: [usize; 2],
    /// The pixels and labels of both parts.
    parts: [(Vec<u8>, Vec<u8>); 2],
}

impl Set {
    /// Opens the set of this name in the folder `data` of prepared sets.
    ///
    /// # Errors
    /// There is none of this name, or it is not there or damaged.
    pub(crate) fn open(name: &str, data: &Path) -> TaskResult<Self> {
        match name {
            "fashion-mnist" => clothes(&data.join(name)),
            _ => Err(format!("found set {name:?}, expected fashion-mnist").into()),
        }
    }

    /// Names of the classes.
    pub(crate) fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Height and width of its pictures.
    pub(crate) fn side(&self) -> [usize; 2] {
        self.side
    }

    /// Number of pictures of a part.
    pub(crate) fn len(&self, part: Part) -> usize {
        self.parts[part as usize].1.len()
    }

    /// Class of a picture of a part.
    pub(crate) fn label(&self, part: Part, index: usize) -> usize {
        usize::from(self.parts[part as usize].1[index])
    }

    /// It in colours.
    pub(crate) fn picture(&self, part: Part, index: usize) -> Picture {
        let [height, width] = self.side;
        let size = height * width;
        let grey = &self.parts[part as usize].0[index * size..][..size];
        Picture {
            pixels: grey.iter().flat_map(|&level| [level; 3]).collect(),
            width,
            height,
            channels: 3,
        }
    }
}

/// Names of the classes of the set `name`, and height and width of its pictures, without opening it.
///
/// # Errors
/// There is none of this name.
pub(super) fn shape(name: &str) -> TaskResult<(Vec<String>, [usize; 2])> {
    match name {
        #[cfg(feature = "media")]
        "fashion-mnist" => {
            use fulgur_datasets::sets::fashion_mnist::{CLASSES, SIDE};
            Ok((CLASSES.map(str::to_owned).to_vec(), [SIDE; 2]))
        }
        _ => Err(format!("found set {name:?}, expected fashion-mnist").into()),
    }
}

/// The prepared pictures of clothes in the folder `dir`.
#[cfg(feature = "media")]
fn clothes(dir: &Path) -> TaskResult<Set> {
    use fulgur_datasets::sets::fashion_mnist::{CLASSES, FashionMnist, SIDE};
    let set = FashionMnist::open(dir).map_err(|e| format!("{e}; run `fulgur data fetch fashion-mnist`"))?;
    let part = |train: bool| -> TaskResult<(Vec<u8>, Vec<u8>)> {
        let (pixels, labels) = set.split(train)?;
        if let Some(at) = labels
            .iter()
            .position(|&label| usize::from(label) >= CLASSES.len())
        {
            return Err(format!(
                "{}: label {at} is {}, expected less than {}",
                dir.display(),
                labels[at],
                CLASSES.len()
            )
            .into());
        }
        Ok((pixels.to_vec(), labels.to_vec()))
    };
    Ok(Set {
        classes: CLASSES.map(str::to_owned).to_vec(),
        side: [SIDE; 2],
        parts: [part(true)?, part(false)?],
    })
}

#[cfg(not(feature = "media"))]
fn clothes(_: &Path) -> TaskResult<Set> {
    Err("fashion-mnist: this program is built without the feature `media`, which prepares data sets".into())
}

#[cfg(test)]
pub(super) mod testing {
    use super::Set;

    /// Two classes of noisy 8 x 8 pictures: stripes that lie, and stripes that stand.
    pub(crate) fn stripes(counts: [usize; 2]) -> Set {
        let part = |(at, count): (usize, usize)| {
            let mut noise = fulgur_kernels::philox::Philox::new(at as u64, 0);
            let labels: Vec<u8> = (0..count).map(|index| (index % 2) as u8).collect();
            let pixels = labels.iter().flat_map(|&label| {
                let phase = noise.below(2);
                let mut grain: Vec<usize> = (0..64).map(|_| noise.below(100)).collect();
                (0..64)
                    .map(|place| {
                        let line = if label == 0 { place / 8 } else { place % 8 };
                        let light = (line / 2 + phase) % 2 * 150;
                        (light + grain.pop().unwrap_or_default()) as u8
                    })
                    .collect::<Vec<u8>>()
            });
            let pixels: Vec<u8> = pixels.collect();
            (pixels, labels)
        };
        Set {
            classes: ["lying", "standing"].map(str::to_owned).to_vec(),
            side: [8, 8],
            parts: [part((0, counts[0])), part((1, counts[1]))],
        }
    }
}
