//! The tasks of the Long Range Arena that there are, and their examples.

use std::path::Path;

use candle_core::{Device, Tensor};
use fulgur_datasets::labelled::prepared::fashion_mnist::FashionMnist;
use fulgur_datasets::long_range::{ListOps, listops, pathfinder};
use fulgur_kernels::embedding::Ids;
use fulgur_lightnet::lm::classifier::Input;
use rayon::prelude::*;

use crate::train::{Batch, TaskResult};

/// Examples that are drawn have numbers below this where they are trained on, and from it on where they are held out.
const HELD_OUT: u64 = 1 << 40;
/// Side of the pictures of clothes.
const CLOTHES: usize = 28;
/// Their classes.
const CLOTHES_CLASSES: usize = 10;
/// How many of them are held out.
const CLOTHES_HELD_OUT: usize = 10_000;

/// A task.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Arena {
    /// Nested lists of digits.
    ListOps,
    /// Dashed paths between two dots.
    Pathfinder,
    /// Pictures of clothes, pixel by pixel.
    FashionMnist,
}

/// Tasks that are asked for by these names and cannot be had, and why.
const UNAVAILABLE: &[(&[&str], &str)] = &[
    (&["text", "imdb"], "its reviews (IMDB) are in no package"),
    (&["retrieval", "aan"], "its papers (AAN) are in no package"),
    (
        &["image", "cifar10", "cifar-10"],
        "its pictures (CIFAR-10) are in no package; fashion-mnist takes its place",
    ),
    (
        &[
            "pathfinder-64",
            "pathfinder-128",
            "pathfinder-256",
            "pathfinder-x",
            "path-x",
            "pathx",
            "path256",
        ],
        "its pictures are in no package, and the generator here is for 32 x 32; pathfinder has those",
    ),
];

impl Arena {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::ListOps, Self::Pathfinder, Self::FashionMnist];

    /// Its name in recipes.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::ListOps => "listops",
            Self::Pathfinder => "pathfinder",
            Self::FashionMnist => "fashion-mnist",
        }
    }

    /// The task of this name.
    ///
    /// # Errors
    /// There is none, or it is one that cannot be had, in words.
    pub(crate) fn named(name: &str) -> Result<Self, String> {
        if let Some(arena) = Self::ALL.into_iter().find(|arena| arena.name() == name) {
            return Ok(arena);
        }
        let known = Self::ALL.map(Self::name).join(", ");
        let lower = name.to_lowercase();
        let missing = UNAVAILABLE
            .iter()
            .find(|(names, _)| names.contains(&lower.as_str()));
        Err(match missing {
            Some((_, reason)) => format!("{name} is not available: {reason}; there are {known}"),
            None => format!("found {name:?}, expected one of {known}"),
        })
    }

    /// What its sequences are made of.
    pub(crate) fn input(self) -> Input {
        match self {
            Self::ListOps => Input::Tokens,
            Self::Pathfinder | Self::FashionMnist => Input::Pixels,
        }
    }

    /// Rows and columns of its pictures.
    pub(crate) fn grid(self) -> Option<[usize; 2]> {
        match self {
            Self::ListOps => None,
            Self::Pathfinder => Some([pathfinder::SIDE; 2]),
            Self::FashionMnist => Some([CLOTHES; 2]),
        }
    }

    /// Number of classes.
    pub(crate) fn classes(self) -> usize {
        match self {
            Self::ListOps => listops::CLASSES,
            Self::Pathfinder => pathfinder::CLASSES,
            Self::FashionMnist => CLOTHES_CLASSES,
        }
    }

    /// How many held-out examples a validation of `asked` takes: a data set has no more than it has.
    pub(crate) fn held_out(self, asked: usize) -> usize {
        match self {
            Self::ListOps | Self::Pathfinder => asked,
            Self::FashionMnist => asked.min(CLOTHES_HELD_OUT),
        }
    }

    /// Examples to train on, as published; of drawn ones as many are drawn.
    pub(crate) fn published(self) -> u64 {
        match self {
            Self::ListOps => 96_000,
            Self::Pathfinder => 160_000,
            Self::FashionMnist => 60_000,
        }
    }
}

/// Where examples come from.
pub(super) enum Source {
    ListOps {
        options: ListOps,
        seed: u64,
    },
    Pathfinder {
        seed: u64,
    },
    /// What is trained on and what is held out.
    Pictures([Pictures; 2]),
}

/// Pictures of one size with their classes.
pub(super) struct Pictures {
    pixels: Vec<u8>,
    labels: Vec<u8>,
}

impl Source {
    /// Opens the data of `arena`, those of packages in the folder `data`.
    ///
    /// # Errors
    /// Settings of expressions that cannot be, or a data set that is not there.
    pub(super) fn open(arena: Arena, options: ListOps, seed: u64, data: &Path) -> TaskResult<Self> {
        Ok(match arena {
            Arena::ListOps => {
                options.check().map_err(|e| format!("[lra.listops]: {e}"))?;
                Self::ListOps { options, seed }
            }
            Arena::Pathfinder => Self::Pathfinder { seed },
            Arena::FashionMnist => Self::Pictures(clothes(&data.join(Arena::FashionMnist.name()))?),
        })
    }

    /// The examples of these numbers, of those to train on or of those held out, on the host: `targets` and `ids` `[1, N]` with
    /// `borders`, or `pixels` `[B, N]`.
    ///
    /// # Errors
    /// A failing operation.
    pub(super) fn examples(&self, numbers: &[u64], held_out: bool) -> TaskResult<Batch> {
        let drawn = |number: u64| if held_out { HELD_OUT + number } else { number };
        let batch = Batch::new(numbers.len());
        match self {
            Self::ListOps { options, seed } => {
                let examples = numbers
                    .par_iter()
                    .map(|&number| options.example(*seed, drawn(number)))
                    .collect::<Result<Vec<_>, _>>()?;
                let ids: Vec<u32> = examples
                    .iter()
                    .flat_map(|example| example.tokens.iter().map(|&id| u32::from(id)))
                    .collect();
                let mut borders = vec![0u32];
                for example in &examples {
                    borders.push(borders[borders.len() - 1] + example.tokens.len() as u32);
                }
                let targets = examples.iter().map(|example| example.value);
                let count = ids.len();
                Ok(batch
                    .with_ids("ids", Ids::new(&ids, &[1, count], listops::VOCABULARY)?)
                    .on_host("borders", Tensor::new(borders, &Device::Cpu)?)
                    .with("targets", labels(targets)?))
            }
            Self::Pathfinder { seed } => {
                let examples: Vec<_> = numbers
                    .par_iter()
                    .map(|&number| pathfinder::example(*seed, drawn(number)))
                    .collect();
                let pixels = examples.iter().flat_map(|example| &example.pixels);
                Ok(batch
                    .with("pixels", grey(pixels, numbers.len())?)
                    .with("targets", labels(examples.iter().map(|e| u8::from(e.connected)))?))
            }
            Self::Pictures(parts) => {
                let Pictures { pixels, labels: all } = &parts[usize::from(held_out)];
                let size = CLOTHES * CLOTHES;
                let at = |number: u64| number as usize % all.len().max(1);
                let pixels = numbers
                    .iter()
                    .flat_map(|&number| &pixels[at(number) * size..][..size]);
                Ok(batch
                    .with("pixels", grey(pixels, numbers.len())?)
                    .with("targets", labels(numbers.iter().map(|&number| all[at(number)]))?))
            }
        }
    }
}

fn labels(of: impl Iterator<Item = u8>) -> candle_core::Result<Tensor> {
    let labels: Vec<u32> = of.map(u32::from).collect();
    Tensor::new(labels, &Device::Cpu)
}

/// Grey values from -1 to 1, `[B, N]`.
fn grey<'a>(pixels: impl Iterator<Item = &'a u8>, batch: usize) -> candle_core::Result<Tensor> {
    let values: Vec<f32> = pixels.map(|&level| f32::from(level) / 127.5 - 1.0).collect();
    let size = values.len() / batch.max(1);
    Tensor::from_vec(values, (batch, size), &Device::Cpu)
}

/// The prepared pictures of clothes in the folder `dir`.
fn clothes(dir: &Path) -> TaskResult<[Pictures; 2]> {
    let set = FashionMnist::open(dir).map_err(|e| format!("{e}; run `fulgur data fetch fashion-mnist`"))?;
    let part = |train: bool| {
        let (pixels, labels) = set.split(train)?;
        Ok::<_, fulgur_datasets::store::StoreError>(Pictures {
            pixels: pixels.to_vec(),
            labels: labels.to_vec(),
        })
    };
    let parts = [part(true)?, part(false)?];
    for Pictures { labels, .. } in &parts {
        if let Some(at) = labels
            .iter()
            .position(|&label| usize::from(label) >= CLOTHES_CLASSES)
        {
            return Err(format!(
                "{}: label {at} is {}, expected less than {CLOTHES_CLASSES}",
                dir.display(),
                labels[at]
            )
            .into());
        }
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_that_cannot_be_had_are_named() {
        for (name, words) in [
            ("text", "IMDB"),
            ("retrieval", "AAN"),
            ("Path-X", "32 x 32"),
            ("cifar10", "fashion-mnist takes its place"),
            ("weave", "expected one of listops, pathfinder, fashion-mnist"),
        ] {
            let line = Arena::named(name).unwrap_err();
            assert!(line.contains(words) && !line.contains('\n'), "{line}");
        }
        for arena in Arena::ALL {
            assert_eq!(Arena::named(arena.name()), Ok(arena));
        }
    }

    /// Held-out examples are other ones than those trained on, and batches hold what their numbers say.
    #[test]
    fn batches_hold_their_examples() {
        let options = ListOps {
            min_length: 5,
            max_length: 40,
            max_depth: 3,
            max_arguments: 5,
        };
        let source = Source::open(Arena::ListOps, options, 7, Path::new("")).unwrap();
        let batch = source.examples(&[3, 9, 4], false).unwrap();
        let ids = batch.ids("ids").unwrap().list();
        let borders = batch.get("borders").unwrap().to_vec1::<u32>().unwrap();
        let targets = batch.get("targets").unwrap().to_vec1::<u32>().unwrap();
        for (at, number) in [3, 9, 4].into_iter().enumerate() {
            let example = options.example(7, number).unwrap();
            let own: Vec<u8> = ids[borders[at] as usize..borders[at + 1] as usize]
                .iter()
                .map(|&id| id as u8)
                .collect();
            assert_eq!((own, targets[at]), (example.tokens, u32::from(example.value)));
        }
        let held_out = source.examples(&[3, 9, 4], true).unwrap();
        assert_ne!(held_out.ids("ids").unwrap().list(), ids);

        let source = Source::open(Arena::Pathfinder, options, 7, Path::new("")).unwrap();
        let batch = source.examples(&[0, 5], false).unwrap();
        let pixels = batch.get("pixels").unwrap();
        assert_eq!(pixels.dims(), [2, 1024]);
        let second = pixels.get(1).unwrap().to_vec1::<f32>().unwrap();
        let example = pathfinder::example(7, 5);
        for (value, level) in second.iter().zip(&example.pixels) {
            assert!((value - (f32::from(*level) / 127.5 - 1.0)).abs() < 1e-6);
        }
        assert_eq!(batch.get("targets").unwrap().to_vec1::<u32>().unwrap(), [1, 0]);
    }

    /// Of a data set the part for tests is held out; labels that are none are refused.
    #[test]
    fn clothes_come_from_their_parts() {
        use fulgur_datasets::store::{Plain, write_tensors};
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("fashion-mnist");
        std::fs::create_dir(&dir).unwrap();
        let write = |last: u8| {
            let mut tensors = Vec::new();
            for (name, count, level) in [("train", 60_000, 0u8), ("test", CLOTHES_HELD_OUT, 100)] {
                let mut labels: Vec<u8> = (0..count).map(|at| (at % CLOTHES_CLASSES) as u8).collect();
                labels[count - 1] = last;
                let images: Vec<u8> = (0..count)
                    .flat_map(|at| [level + (at % 50) as u8; CLOTHES * CLOTHES])
                    .collect();
                let shape = [count, CLOTHES, CLOTHES];
                tensors.push((format!("{name}.images"), Plain::u8(&shape, images)));
                tensors.push((format!("{name}.labels"), Plain::u8(&[count], labels)));
            }
            write_tensors(&dir.join("fashion-mnist.safetensors"), tensors, None).unwrap();
        };
        let open = || Source::open(Arena::FashionMnist, ListOps::default(), 0, folder.path());
        write(9);
        let source = open().unwrap();
        for (held_out, level) in [(false, 0.0), (true, 100.0)] {
            let batch = source.examples(&[3, 47], held_out).unwrap();
            assert_eq!(batch.get("targets").unwrap().to_vec1::<u32>().unwrap(), [3, 7]);
            let pixels = batch.get("pixels").unwrap().to_vec2::<f32>().unwrap();
            for (row, own) in pixels.iter().zip([3.0, 47.0]) {
                assert_eq!(row.len(), CLOTHES * CLOTHES);
                assert!(
                    row.iter()
                        .all(|value| (value - ((level + own) / 127.5 - 1.0)).abs() < 1e-6)
                );
            }
        }
        write(10);
        let line = open().map(drop).unwrap_err().to_string();
        assert!(
            line.contains("label 59999 is 10, expected less than 10"),
            "{line}"
        );
    }
}
