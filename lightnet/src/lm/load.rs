//! Models from folders: `config.json` beside `model.safetensors`, or beside shards with their index.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};

use super::{Architecture, Config, LanguageModel};
use crate::params::Outline;
use crate::params::folder::{self, LoadError};

/// Names and shapes of all tensors of a model, without its values.
///
/// # Errors
/// The model cannot be.
pub fn expected_shapes(config: &Config) -> candle_core::Result<BTreeMap<String, Vec<usize>>> {
    let outline = Outline::new();
    LanguageModel::new(config, DType::F32, &outline.builder())?;
    Ok(outline.shapes())
}

impl LanguageModel {
    /// Loads the model in `dir` onto `device`; where its configuration does not say what it is, it is taken to be of the
    /// `fallback` kind. All tensors are compared by name and shape before any is read.
    ///
    /// # Errors
    /// The folder holds no model, one of no known kind, or other tensors than those of the model, all of which are listed.
    pub fn load(
        dir: &Path,
        fallback: Option<Architecture>,
        compute: DType,
        device: &Device,
    ) -> Result<Self, LoadError> {
        let config = Config::read(&dir.join("config.json"), fallback)?;
        // Old files hold the frequencies of positions, and some the head that is the embedding.
        let ignored = |name: &str| {
            name.ends_with(".rotary_emb.inv_freq") || (config.tie_word_embeddings && name == "lm_head.weight")
        };
        folder::load(dir, compute, device, ignored, |compute, vb| {
            Self::new(&config, compute, vb)
        })
    }
}
