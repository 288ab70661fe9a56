//! ImageBind (Girdhar et al., 2023): pictures, sounds and texts in one space.
//!
//! Each modality is a tower: a stem makes tokens, a pre-norm transformer mixes them, a head maps one of them into the common
//! space, and the vector is scaled to length one times a factor.
//!
//! ```text
//! vision  patches 14 x 14 of two frames + class token -> LN -> blocks -> LN, class token, W -> unit
//! audio   patches 16 x 16 every 10 of the filterbank, LN + class token -> blocks with bias_k, bias_v -> LN, class token, W -> 20 unit
//! text    token embedding -> causal blocks -> token at the end of the text, LN, W -> min(exp(s), 100) unit
//! ```
//!
//! Tensor names are those of `imagebind_huge.pth`. Towers are loaded when they are first asked for; those of depth, heat and motion are
//! not read. A checkpoint may lie in a wrapping dictionary, and under a prefix.

mod config;
mod tower;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};
use candle_nn::VarBuilder;

pub use config::{Config, Input, Sizes};
pub use tower::Tower;

use super::lazy::Lazy;
use crate::config::{self as json, ConfigError};
use crate::params::folder::{LoadError, Weights, check_part};

const PREPROCESSORS: &str = "modality_preprocessors";
const TRUNKS: &str = "modality_trunks";
const HEADS: &str = "modality_heads";
const POSTPROCESSORS: &str = "modality_postprocessors";
/// Names by which a checkpoint is known, one of each modality.
const MARKS: [&str; 3] = [
    "modality_preprocessors.vision.cls_token",
    "modality_preprocessors.audio.cls_token",
    "modality_preprocessors.text.token_embedding.weight",
];

/// What a tower takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Modality {
    /// Pictures, and clips of a few frames.
    Vision,
    /// Sounds.
    Audio,
    /// Texts.
    Text,
}

impl Modality {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Vision, Self::Audio, Self::Text];

    /// Its name in checkpoints and of its inputs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vision => "vision",
            Self::Audio => "audio",
            Self::Text => "text",
        }
    }

    /// Whether a tensor of the checkpoint belongs to it.
    fn owns(self, name: &str) -> bool {
        let mut parts = name.splitn(3, '.');
        let group = parts.next().unwrap_or_default();
        [PREPROCESSORS, TRUNKS, HEADS, POSTPROCESSORS].contains(&group) && parts.next() == Some(self.name())
    }
}

/// What stands before the names of ImageBind in a checkpoint with these tensors: `None` where it holds no ImageBind.
pub fn prefix<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    names.into_iter().find_map(|name| {
        let before = MARKS.iter().find_map(|mark| name.strip_suffix(mark))?;
        (before.is_empty() || before.ends_with('.')).then_some(before)
    })
}

/// A checkpoint whose towers are loaded when they are asked for.
#[derive(Debug)]
pub struct ImageBind {
    weights: Weights,
    /// The configuration, or the weights where there is none: names it in errors.
    origin: PathBuf,
    sizes: [Option<Sizes>; 3],
    compute: DType,
    device: Device,
    towers: [Lazy<Tower>; 3],
}

impl ImageBind {
    /// Opens a folder with `config.json` and weights, a folder with a published checkpoint alone, or the file of one. No values are
    /// read. Products will be of type `compute`: f32, and on a GPU bf16 or f16.
    ///
    /// # Errors
    /// There are no weights, they are damaged or not those of ImageBind, or the configuration does not agree with them.
    pub fn open(path: &Path, compute: DType, device: &Device) -> Result<Self, LoadError> {
        let Some(mut weights) = Weights::find(path)? else {
            return Err(LoadError::Absent {
                path: path.to_owned(),
            });
        };
        let json = path.join("config.json");
        let (origin, config) = match json.is_file() {
            true => (json.clone(), json::read(&json)?),
            false => (weights.origin.clone(), Config::default()),
        };
        let all = weights.shapes()?;
        let Some(before) = prefix(all.keys().map(String::as_str)) else {
            return Err(LoadError::Config(ConfigError {
                path: weights.origin,
                detail: format!(
                    "{} tensors, expected those of ImageBind, such as {}",
                    all.len(),
                    MARKS[0]
                ),
            }));
        };
        weights.below(before);
        let shapes = weights.shapes()?;
        let sizes = |modality: Modality| -> Result<Option<Sizes>, ConfigError> {
            let there = shapes.keys().any(|name| modality.owns(name));
            there
                .then(|| config.sizes(modality, &shapes, &origin))
                .transpose()
        };
        let sizes = [
            sizes(Modality::Vision)?,
            sizes(Modality::Audio)?,
            sizes(Modality::Text)?,
        ];
        Ok(Self {
            weights,
            origin,
            sizes,
            compute,
            device: device.clone(),
            towers: [const { Lazy::new() }; 3],
        })
    }

    /// The sizes of a tower; `None` where the checkpoint does not have it.
    pub fn sizes(&self, modality: Modality) -> Option<&Sizes> {
        self.sizes[modality as usize].as_ref()
    }

    /// The files of the weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// The device that towers lie on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The type of products.
    pub fn compute(&self) -> DType {
        self.compute
    }

    /// Compares the tensors of a tower with those that it needs, and reads no values.
    ///
    /// # Errors
    /// The checkpoint does not have it, or tensors are missing or of another shape, all of which are listed.
    pub fn check(&self, modality: Modality) -> Result<&Sizes, LoadError> {
        let Some(sizes) = self.sizes(modality) else {
            return Err(LoadError::Config(ConfigError {
                path: self.origin.clone(),
                detail: format!("no {} tower in this checkpoint", modality.name()),
            }));
        };
        let build = |vb: &VarBuilder| Tower::new(modality, sizes, DType::F32, vb);
        check_part(&self.weights, |name| modality.owns(name), is_ignored, build)?;
        Ok(sizes)
    }

    /// A tower, which is loaded the first time.
    ///
    /// # Errors
    /// As [`Self::check`], or its values are damaged.
    pub fn tower(&self, modality: Modality) -> Result<Arc<Tower>, LoadError> {
        self.towers[modality as usize].get(|| {
            let sizes = self.check(modality)?;
            let weights = self.weights.load_part(&self.device, |name| modality.owns(name))?;
            Ok(Tower::new(modality, sizes, self.compute, &weights.builder())?)
        })
    }
}

/// Tensors that may be there or not: the causal mask is made, scales have usual values.
fn is_ignored(name: &str) -> bool {
    name.ends_with(".log_logit_scale") || name.ends_with(".mask")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_what_stands_before_a_known_name() {
        let mark = MARKS[1];
        let prefixed = format!("module.net.{mark}");
        for (names, expected) in [
            (vec!["a.b", mark], Some("")),
            (vec!["module.net.x", prefixed.as_str()], Some("module.net.")),
            (vec!["a.modality_preprocessors.vision.pos"], None),
        ] {
            assert_eq!(prefix(names), expected);
        }
        let glued = format!("x{mark}");
        assert_eq!(prefix([glued.as_str()]), None);
    }

    #[test]
    fn tensors_belong_to_one_modality() {
        assert!(Modality::Audio.owns("modality_trunks.audio.blocks.0.norm_1.weight"));
        assert!(!Modality::Audio.owns("modality_trunks.vision.blocks.0.norm_1.weight"));
        assert!(!Modality::Text.owns("text.modality_trunks.text"));
        assert!(Modality::ALL.iter().all(|m| !m.owns("modality_trunks.depth.x")));
    }
}
