//! Bits a byte of documents by a language model over bytes.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use fulgur_datasets::text::Scorer;
use fulgur_kernels::cross_entropy::Options;
use fulgur_kernels::embedding::Ids;
use fulgur_lightnet::lm::LanguageModel;

/// Most bytes that are scored of a document, from its beginning.
const MOST: usize = 2048;
/// Fewest rows of a vocabulary of bytes.
const BYTES: usize = 256;

/// A model that scores.
pub struct TextScorer {
    model: LanguageModel,
    device: Device,
}

impl TextScorer {
    /// Loads the model in `folder`.
    ///
    /// # Errors
    /// It cannot be loaded, is no causal one, or its tokens are not bytes.
    pub fn open(folder: &Path, device: &Device) -> anyhow::Result<Self> {
        let model = LanguageModel::load(folder, None, DType::F32, device)?;
        let config = model.config();
        if config.bidirectional || config.vocab_size != BYTES {
            anyhow::bail!(
                "{}: {} model with a vocabulary of {}, expected a causal one of {BYTES}, one a byte",
                folder.display(),
                if config.bidirectional {
                    "a masked"
                } else {
                    "a causal"
                },
                config.vocab_size
            );
        }
        Ok(Self {
            model,
            device: device.clone(),
        })
    }

    /// Mean bits of each byte of `text` but the first, given those before it; of at most 2,048 bytes.
    ///
    /// # Errors
    /// A failing operation.
    pub fn score(&self, text: &str) -> candle_core::Result<f64> {
        let bytes: Vec<u32> = text.bytes().take(MOST).map(u32::from).collect();
        let count = bytes.len().saturating_sub(1);
        if count == 0 {
            return Ok(0.0);
        }
        let ids = Ids::new(&bytes[..count], &[1, count], BYTES)?;
        let targets = Tensor::from_vec(bytes[1..].to_vec(), (1, count), &self.device)?;
        let losses = self.model.losses(&ids, &targets, &Options::default())?;
        let sum: f64 = losses
            .to_dtype(DType::F32)?
            .to_vec1::<f32>()?
            .iter()
            .map(|&loss| f64::from(loss))
            .sum();
        Ok(sum / count as f64 / std::f64::consts::LN_2)
    }
}

impl Scorer for TextScorer {
    fn bits_per_byte(&mut self, text: &str) -> Result<f64, String> {
        match self.score(text) {
            Ok(score) if score.is_finite() => Ok(score),
            Ok(score) => Err(format!("a score of {score}, expected a number")),
            Err(error) => Err(error.to_string()),
        }
    }
}
