//! Bits a byte of documents by a language model.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use fulgur_datasets::text::Scorer;
use fulgur_kernels::cross_entropy::Options;
use fulgur_kernels::embedding::Ids;
use fulgur_lightnet::lm::LanguageModel;
use fulgur_lightnet::lm::tokenizer::LmTokenizer;

/// Most bytes that are scored of a document, from its beginning.
const MOST: usize = 2048;

/// A model that scores.
pub struct TextScorer {
    model: LanguageModel,
    tokenizer: LmTokenizer,
    /// Bytes of text that each token stands for.
    bytes: Vec<u32>,
    device: Device,
}

impl TextScorer {
    /// Loads the model in `folder`, with the `tokenizer` that was chosen, else its own.
    ///
    /// # Errors
    /// It cannot be loaded, is no causal one, or has no tokenizer whose tokens are pieces of bytes.
    pub fn open(folder: &Path, tokenizer: Option<&Path>, device: &Device) -> anyhow::Result<Self> {
        let model = LanguageModel::load(folder, None, DType::F32, device)?;
        let config = model.config();
        if config.bidirectional {
            anyhow::bail!(
                "{}: found a model in both directions, expected a causal one",
                folder.display()
            );
        }
        let found = match tokenizer {
            Some(path) => {
                let tokenizer = LmTokenizer::read(path)?;
                tokenizer.fits(config.vocab_size)?;
                Some(tokenizer)
            }
            None => LmTokenizer::of_model(folder, config.vocab_size)?,
        };
        let Some(found) = found else {
            anyhow::bail!(
                "{}: found no tokenizer.json and a vocabulary of {}, expected --tokenizer, or 256 for bytes",
                folder.display(),
                config.vocab_size
            );
        };
        let Some(bytes) = found.byte_counts() else {
            anyhow::bail!(
                "{}: found a tokenizer of other pieces, expected one of bytes",
                folder.display()
            );
        };
        Ok(Self {
            model,
            // What a text spells out is text.
            tokenizer: found.literal(),
            bytes,
            device: device.clone(),
        })
    }

    /// Mean bits of each byte of `text`, of at most its first 2,048 ones, each token given those before it. What ends texts stands in
    /// front of it; where there is no such token, the first one is given and does not count.
    ///
    /// # Errors
    /// A failing tokenizer or operation.
    pub fn score(&self, text: &str) -> anyhow::Result<f64> {
        let mut end = text.len().min(MOST);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let mut ids: Vec<u32> = self.tokenizer.end().into_iter().collect();
        ids.extend(self.tokenizer.encode(&text[..end], false)?);
        let Some(count) = ids.len().checked_sub(1).filter(|&count| count > 0) else {
            return Ok(0.0);
        };
        let bytes: u32 = ids[1..].iter().map(|&id| self.bytes[id as usize]).sum();
        let inputs = Ids::new(&ids[..count], &[1, count], self.model.config().vocab_size)?;
        let targets = Tensor::from_vec(ids[1..].to_vec(), (1, count), &self.device)?;
        let losses = self.model.losses(&inputs, &targets, &Options::default())?;
        let sum: f64 = losses
            .to_dtype(DType::F32)?
            .to_vec1::<f32>()?
            .iter()
            .map(|&loss| f64::from(loss))
            .sum();
        Ok(sum / f64::from(bytes.max(1)) / std::f64::consts::LN_2)
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
