//! What a run or a model needs, before anything is allocated: parameters by part, memory by kind, disk by checkpoint.
//!
//! Everything here follows from shapes and settings; the time of a step of a language model, also from what an H100 reaches.
//! What does not follow (for all other tasks, what a step keeps for its way back) is named and not counted.
//!
//! ```
//! use fulgur::estimate::Estimate;
//! use fulgur::train::{Recipe, peak};
//!
//! let recipe = "task = 'mel-codec'\n[train]\nmax_steps = 100\n".parse()?;
//! let recipe = Recipe::check(recipe, "example".into(), "runs/example".as_ref())?;
//! let gpu = peak::by_name("H100").expect("in the table");
//! let estimate = Estimate::of_recipe(&recipe, gpu)?;
//! assert_eq!(estimate.stages[0].bytes, 4 * estimate.parameters);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub(crate) mod time;
mod weights;

use std::path::{Path, PathBuf};

use fulgur_lightnet::params::outline::values_of;
use fulgur_tavdiffusion::published::{Piece, is_published};
use serde::Serialize;

use crate::train::peak::Gpu;
use crate::train::tasks::outline;
use crate::train::{Recipe, TrainError};
use weights::Stored;

/// Bytes of an f32 value.
const WIDE: u64 = 4;
/// Bytes of a bf16 value.
const NARROW: u64 = 2;

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum EstimateError {
    /// A file or folder cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// This holds no weights, or damaged ones.
    #[error("{}: {reason}", path.display())]
    NoModel {
        /// The folder or file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// The recipe, or its task, refuses.
    #[error(transparent)]
    Train(#[from] TrainError),
}

/// What is needed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// What this is about: `task NAME` or `model`.
    pub kind: String,
    /// Parameters of all parts together; those of frozen networks do not count.
    pub parameters: u64,
    /// The parts by name.
    pub parts: Vec<Part>,
    /// Memory by kind, without what is not known.
    pub stages: Vec<Stage>,
    /// Memory of all kinds together: the least that is needed.
    pub memory_bytes: u64,
    /// Disk that a checkpoint takes, for a run.
    pub checkpoint_bytes: Option<u64>,
    /// Disk that the checkpoints of a run take together, or the files of a model.
    pub disk_bytes: u64,
    /// Floating-point operations of a step, forward and backward, where the task counts them: by the formulas of the model,
    /// without what kernels or recomputation add.
    pub step_flops: Option<f64>,
    /// Seconds of a step on the GPU that was named, where the task can tell.
    pub step_s: Option<f64>,
    /// What is needed too and cannot be known from here.
    pub unknown: Vec<String>,
}

/// A part of a model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Part {
    /// The beginning of the names of its tensors, or its folder.
    pub name: String,
    /// Its parameters.
    pub parameters: u64,
    /// Its size: as f32 in a run, as it is stored in a model folder.
    pub bytes: u64,
}

/// Memory of one kind.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stage {
    /// The kind, in one word.
    pub name: &'static str,
    /// Its bytes.
    pub bytes: u64,
    /// What it is.
    #[serde(skip)]
    pub words: &'static str,
}

impl Estimate {
    /// What a run of `recipe` needs, and how long its steps take on `gpu`.
    ///
    /// # Errors
    /// The task is unknown or refuses its table, or a frozen network is damaged.
    pub fn of_recipe(recipe: &Recipe, gpu: Gpu) -> Result<Self, EstimateError> {
        let needs = outline::needs(recipe)?;
        let mut unknown = needs.unknown;
        let shapes = needs.params.shapes();
        let count = needs.params.count();
        let wide = WIDE.saturating_mul(count);
        let (mut moments, mut rounded) = (0u64, 0u64);
        for (name, shape) in &shapes {
            let values = values_of(shape);
            let kept = recipe.optimiser.moments(name, shape) as u64;
            moments = moments.saturating_add(kept.saturating_mul(values));
            let is_weight = shape.len() == 2 && name.ends_with("weight");
            if is_weight && needs.rounded.iter().any(|part| name.contains(part)) {
                rounded = rounded.saturating_add(values);
            }
        }
        let train = &recipe.train;
        // With several batches a step, the sum and the newest gradients are there at once.
        let gradients = wide.saturating_mul(if train.accumulate > 1 { 2 } else { 1 });
        let averages = if train.ema > 0.0 { wide } else { 0 };
        let frozen = frozen(&needs.frozen, &mut unknown)?;
        let all = [
            ("weights", Some(wide), "f32"),
            ("gradients", Some(gradients), "f32"),
            (
                "moments",
                Some(WIDE.saturating_mul(moments)),
                "of the optimiser, f32",
            ),
            ("averages", Some(averages), "of the weights, f32"),
            (
                "rounded",
                Some(NARROW.saturating_mul(rounded)),
                "copies of matrices, bf16, on a GPU",
            ),
            ("frozen", frozen, "networks that are used and not trained, f32"),
            ("pool", needs.pool, "of data that stay on the device"),
            ("batch", needs.batch, "as it comes to the device"),
            (
                "kept",
                needs.kept,
                "by a step for its way back, on a GPU, where branches are bf16",
            ),
        ];
        let stages: Vec<Stage> = all
            .into_iter()
            .filter_map(|(name, bytes, words)| Some((name, bytes.filter(|&bytes| bytes > 0)?, words)))
            .map(|(name, bytes, words)| Stage { name, bytes, words })
            .collect();
        let kept = match needs.kept {
            None => "what a step keeps for its way back, and ",
            Some(_) => "",
        };
        unknown.push(format!("{kept}the work space of its operators"));
        let narrow = |bytes: u64| {
            if train.compact {
                bytes / WIDE * NARROW
            } else {
                bytes
            }
        };
        let checkpoint = wide
            .saturating_add(narrow(WIDE.saturating_mul(moments)))
            .saturating_add(narrow(averages));
        let trained = shapes.iter().map(|(name, shape)| {
            let parameters = values_of(shape);
            Stored {
                folder: None,
                name: name.clone(),
                parameters,
                bytes: WIDE.saturating_mul(parameters),
                loaded: 0,
            }
        });
        Ok(Self {
            kind: format!("task {}", recipe.task),
            parameters: count,
            parts: parts(&trained.collect::<Vec<_>>()),
            memory_bytes: sum(&stages),
            stages,
            checkpoint_bytes: Some(checkpoint),
            disk_bytes: checkpoint.saturating_mul(train.keep.max(1) as u64),
            step_flops: needs.flops.map(|flops| flops * train.accumulate as f64),
            step_s: needs.work.map(|work| work.seconds(gpu) * train.accumulate as f64),
            unknown,
        })
    }

    /// What the model in the folder `dir` needs; of its weights only the headers are read.
    ///
    /// # Errors
    /// There are no weights, or a file of them is damaged or cut off.
    pub fn of_model(dir: &Path) -> Result<Self, EstimateError> {
        let mut stored = Vec::new();
        let mut disk = 0;
        for path in weights::files(dir)? {
            let folder = path.parent().filter(|parent| *parent != dir);
            let folder = folder
                .and_then(Path::file_name)
                .map(|name| name.to_string_lossy());
            stored.extend(weights::read(&path, folder.as_deref())?);
            disk += std::fs::metadata(&path).map_or(0, |info| info.len());
        }
        let in_turn = generator_stages(dir, &stored);
        let peak = in_turn.iter().map(|stage| stage.bytes).max();
        let stages = match in_turn.is_empty() {
            false => in_turn,
            true => vec![Stage {
                name: "weights",
                bytes: loaded(&stored),
                words: "f32, as this program computes with them",
            }],
        };
        let parameters = |sum: u64, tensor: &Stored| sum.saturating_add(tensor.parameters);
        Ok(Self {
            kind: "model".to_owned(),
            parameters: stored.iter().fold(0, parameters),
            parts: parts(&stored),
            // Stages of a generator come one after the other, and each frees what it loaded.
            memory_bytes: peak.unwrap_or_else(|| sum(&stages)),
            stages,
            checkpoint_bytes: None,
            disk_bytes: disk,
            step_flops: None,
            step_s: None,
            unknown: vec!["what the model computes with on the way".to_owned()],
        })
    }
}

/// Weights by the stage that loads them, of the folder of a published generator; none of any other folder.
fn generator_stages(dir: &Path, stored: &[Stored]) -> Vec<Stage> {
    // A folder without this file, or with another generator, is a model like any.
    if !is_published(dir).unwrap_or(false) {
        return Vec::new();
    }
    let of = |pieces: &[Piece]| {
        let held = stored.iter().filter(|tensor| {
            let folder = tensor.folder.as_deref();
            pieces.iter().any(|piece| Some(piece.folder()) == folder)
        });
        held.map(|tensor| tensor.loaded).fold(0, u64::saturating_add)
    };
    let networks = [Piece::Unet, Piece::MotionAdapter, Piece::AudioUnet, Piece::Fusion];
    let sounds = [Piece::AudioVae, Piece::Vocoder];
    [
        (
            "text",
            of(&[Piece::TextEncoder]),
            "weights of the text encoder, f32; half in bf16",
        ),
        (
            "denoise",
            of(&networks),
            "weights of the networks that denoise, f32; half in bf16",
        ),
        (
            "picture",
            of(&[Piece::Vae]),
            "weights of the autoencoder of pictures, f32; half in bf16",
        ),
        (
            "sound",
            of(&sounds),
            "weights of the autoencoder of spectrograms, and of the vocoder, f32",
        ),
    ]
    .into_iter()
    .filter(|(_, bytes, _)| *bytes > 0)
    .map(|(name, bytes, words)| Stage { name, bytes, words })
    .collect()
}

/// Memory of the networks in these folders; none where one is missing, which is noted.
fn frozen(dirs: &[PathBuf], unknown: &mut Vec<String>) -> Result<Option<u64>, EstimateError> {
    let mut bytes = 0u64;
    for dir in dirs {
        if !dir.is_dir() {
            unknown.push(format!(
                "the frozen network of {}, which is not there yet",
                dir.display()
            ));
            continue;
        }
        for path in weights::files(dir)? {
            bytes = bytes.saturating_add(loaded(&weights::read(&path, None)?));
        }
    }
    Ok(Some(bytes))
}

fn loaded(tensors: &[Stored]) -> u64 {
    let bytes = tensors.iter().map(|tensor| tensor.loaded);
    bytes.fold(0, u64::saturating_add)
}

fn sum(stages: &[Stage]) -> u64 {
    let bytes = stages.iter().map(|stage| stage.bytes);
    bytes.fold(0, u64::saturating_add)
}

/// Tensors by folder or, where there is but one, by the first piece of their names that tells some from others.
fn parts(tensors: &[Stored]) -> Vec<Part> {
    let pieces = |tensor: &Stored| -> Vec<String> {
        let folder = tensor.folder.iter().cloned();
        folder.chain(tensor.name.split('.').map(str::to_owned)).collect()
    };
    let names: Vec<Vec<String>> = tensors.iter().map(pieces).collect();
    // A prefix that all names share, like `model`, tells nothing.
    let shared = (0..)
        .take_while(|&depth| {
            let first = names.first().and_then(|pieces| pieces.get(depth));
            let whole = names
                .iter()
                .all(|pieces| pieces.get(depth) == first && pieces.len() > depth + 1);
            first.is_some() && whole
        })
        .count();
    let mut parts: Vec<Part> = Vec::new();
    for (tensor, pieces) in tensors.iter().zip(names) {
        let name = pieces[..=shared.min(pieces.len() - 1)].join(".");
        let place = parts.iter().position(|part| part.name == name);
        let place = place.unwrap_or_else(|| {
            parts.push(Part {
                name,
                parameters: 0,
                bytes: 0,
            });
            parts.len() - 1
        });
        let part = &mut parts[place];
        part.parameters = part.parameters.saturating_add(tensor.parameters);
        part.bytes = part.bytes.saturating_add(tensor.bytes);
    }
    parts
}

#[cfg(test)]
mod tests;
