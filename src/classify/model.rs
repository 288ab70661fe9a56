//! A classifier from a folder, and its guesses.

use std::path::{Path, PathBuf};

use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::softmax;
use fulgur_datasets::media::Picture;
use fulgur_lightnet::params::Outline;
use fulgur_lightnet::params::folder::LoadError;
use fulgur_lightnet::vision::{Classifier, Config};
use serde::Serialize;

use super::prepare;
use crate::device::compute_dtype;

/// Most values of a batch that goes through at once, so that memory stays bounded whatever the pictures.
const MOST_PIXELS: usize = 1 << 22;
/// Most pictures of it.
const MOST_PICTURES: usize = 256;

/// Why there is no classifier, or no guess.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The folder holds none.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// An operation failed.
    #[error("{}: {source}", path.display())]
    Run {
        /// The model.
        path: PathBuf,
        /// What failed.
        source: candle_core::Error,
    },
}

/// A loaded classifier.
#[derive(Debug)]
pub struct Model {
    path: PathBuf,
    pub(super) network: Classifier,
    parameters: u64,
}

/// What a classifier makes of some pictures.
#[derive(Clone, Debug)]
pub struct Examined {
    /// Shares of the classes, by picture and class.
    pub shares: Vec<Vec<f32>>,
    /// What the head sees, a row of [`Config::hidden_size`] values a picture.
    pub features: Vec<Vec<f32>>,
}

/// A class and how likely it is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Guess {
    /// Number of the class.
    pub class: usize,
    /// Its name.
    pub label: String,
    /// Share of all classes, 0 to 1.
    pub probability: f64,
}

impl Model {
    /// Loads the classifier in `dir` onto `device`; branches compute in bf16 on a GPU.
    ///
    /// # Errors
    /// The folder holds no classifier of pictures.
    pub fn load(dir: &Path, device: &Device) -> Result<Self, ModelError> {
        let compute = compute_dtype(device);
        let network = Classifier::load(dir, compute, device)?;
        let outline = Outline::new();
        Classifier::new(network.config(), DType::F32, &outline.builder()).map_err(LoadError::from)?;
        Ok(Self {
            path: dir.to_owned(),
            parameters: outline.count(),
            network,
        })
    }

    /// Its shape.
    #[must_use]
    pub fn config(&self) -> &Config {
        self.network.config()
    }

    /// Pictures of `height` and `width` that go through at once.
    #[must_use]
    pub fn together(height: usize, width: usize) -> usize {
        (MOST_PIXELS / (height * width).max(1)).clamp(1, MOST_PICTURES)
    }

    /// Number of its parameters.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.parameters
    }

    /// Shares of the classes, by picture and class, of pictures of one size as [`super::prepare::fit`] gives them.
    ///
    /// # Errors
    /// As [`Self::probabilities`].
    pub fn look(&self, pictures: &[Picture]) -> Result<Vec<Vec<f32>>, ModelError> {
        let pixels = prepare::batch(pictures, self.config(), self.network.device());
        self.probabilities(&pixels.map_err(|source| self.failed(source))?)
    }

    /// Shares of the classes `[B, K]` for `pixels` `[B, C, H, W]`.
    ///
    /// # Errors
    /// Pixels of another shape than the model takes, or a failing operation.
    pub fn probabilities(&self, pixels: &Tensor) -> Result<Vec<Vec<f32>>, ModelError> {
        let run = || {
            let logits = self.network.logits(pixels, None)?.to_dtype(DType::F32)?;
            softmax(&logits, D::Minus1)?.to_vec2::<f32>()
        };
        run().map_err(|source| self.failed(source))
    }

    /// Shares of the classes as [`Self::look`] gives them, and what the head sees: the norm of the mean of all tokens.
    ///
    /// # Errors
    /// As [`Self::probabilities`].
    pub fn examine(&self, pictures: &[Picture]) -> Result<Examined, ModelError> {
        let run = || {
            let pixels = prepare::batch(pictures, self.config(), self.network.device())?;
            let features = self.network.features(&pixels, None)?;
            let logits = self.network.logits_of(&features)?.to_dtype(DType::F32)?;
            let shares = softmax(&logits, D::Minus1)?.to_vec2::<f32>()?;
            let features = features.to_dtype(DType::F32)?.to_vec2::<f32>()?;
            Ok(Examined { shares, features })
        };
        run().map_err(|source| self.failed(source))
    }

    /// The `count` likeliest classes of one picture's shares, the likeliest first.
    #[must_use]
    pub fn guesses(&self, shares: &[f32], count: usize) -> Vec<Guess> {
        ranked(shares)
            .into_iter()
            .take(count)
            .map(|class| Guess {
                class,
                label: self.config().labels[class].clone(),
                probability: f64::from(shares[class]),
            })
            .collect()
    }

    pub(super) fn failed(&self, source: candle_core::Error) -> ModelError {
        ModelError::Run {
            path: self.path.clone(),
            source,
        }
    }
}

/// Classes from the largest share to the smallest; of equal ones the first comes first.
pub(crate) fn ranked(shares: &[f32]) -> Vec<usize> {
    let mut classes: Vec<usize> = (0..shares.len()).collect();
    classes.sort_by(|&a, &b| shares[b].total_cmp(&shares[a]));
    classes
}
