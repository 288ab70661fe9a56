//! BLIP (Li et al., 2022): what is seen in a picture, in words.
//!
//! Reference: `BlipForConditionalGeneration` of Hugging Face transformers; its folders load as they are.
//!
//! ```text
//! picture  patches W + b, class token, positions -> pre-norm blocks -> LN: states [P, d_v]
//! text     LN(words + positions) -> L times:
//!          x = LN(x + W_o attention(x, x before))          the text so far
//!          x = LN(x + W_o attention(x, states))            the picture
//!          x = LN(x + W_2 gelu(W_1 x))
//! next     LN(gelu(W x)) words^T + b
//! ```
//!
//! [`search`] finds likely texts, [`words`] turns them into letters. The network serves as a frozen captioner.
//!
//! Shapes: B pictures, P = 1 + patches, N tokens of text, d width of the text, V pieces of the vocabulary.

mod config;
mod decoder;
pub mod search;
mod vision;
pub mod words;

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

pub use config::{Config, Sizes, TextConfig, VisionConfig};
pub use decoder::{Cache, Decoder};
pub use vision::Vision;

use crate::config as json;
use crate::params::folder::{LoadError, Weights, load_part};

/// `model_type` of the folders.
pub const MODEL_TYPE: &str = "blip";

/// A tensor by which a captioner is known: other models of the family have no text decoder, or more than one.
pub const MARK: &str = "text_decoder.cls.predictions.transform.dense.weight";

/// The captioner: a tower of pictures and a decoder of texts.
#[derive(Clone, Debug)]
pub struct Blip {
    sizes: Sizes,
    vision: Vision,
    decoder: Decoder,
    device: Device,
    files: Vec<PathBuf>,
}

impl Blip {
    /// The sizes of the model in a folder, from its configuration and the header of its weights.
    ///
    /// # Errors
    /// There are no weights, they are damaged or not those of a captioner, or the configuration does not agree with them.
    pub fn sizes_in(dir: &Path) -> std::result::Result<Sizes, LoadError> {
        Ok(sized(dir)?.1)
    }

    /// Loads `config.json` and the weights of `dir` onto `device`. Products are of type `compute`: f32, and on a GPU bf16 or f16.
    ///
    /// # Errors
    /// As [`Self::sizes_in`], or tensors that are missing, unexpected or of another shape, all of which are listed.
    pub fn load(dir: &Path, compute: DType, device: &Device) -> std::result::Result<Self, LoadError> {
        let (weights, sizes) = sized(dir)?;
        // Copies of what is tied, and numbers of places, which older versions wrote.
        let tied = sizes.tied;
        let ignored = |name: &str| {
            name.ends_with("position_ids")
                || (tied && name.starts_with("text_decoder.cls.predictions.decoder."))
        };
        let build = |compute: DType, vb: &VarBuilder| {
            Ok((
                Vision::new(&sizes, compute, &vb.pp("vision_model"))?,
                Decoder::new(&sizes, compute, &vb.pp("text_decoder"))?,
            ))
        };
        let (vision, decoder) = load_part(&weights, |_| true, compute, device, ignored, build)?;
        Ok(Self {
            vision,
            decoder,
            device: device.clone(),
            files: weights.files().to_vec(),
            sizes,
        })
    }

    /// The sizes.
    pub fn sizes(&self) -> &Sizes {
        &self.sizes
    }

    /// The device that the network lies on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The files of the weights.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Pictures `[B, 3, side, side]` in f32, with CLIP's mean taken off and divided by its deviation, to states `[B, P, d_v]`.
    ///
    /// # Errors
    /// Pictures of another size.
    pub fn states(&self, pixel_values: &Tensor) -> Result<Tensor> {
        self.vision.forward(pixel_values)
    }

    /// Scores `[B, N, V]` of the next token behind each of `input_ids` `[B, N]`, beside `states` `[B, P, d_v]`; `attention_mask` `[B, N]`
    /// is zero on padding.
    ///
    /// # Errors
    /// Texts that are too long, ids outside the vocabulary, or shapes that do not fit.
    pub fn logits(
        &self,
        states: &Tensor,
        input_ids: &Tensor,
        attention_mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        let mut cache = self.decoder.begin(states)?;
        self.decoder.forward(input_ids, attention_mask, &mut cache)
    }

    /// The likeliest text behind `prompt` beside the states `[1, P, d_v]` of a picture, without the prompt and without its end. The
    /// first token of the prompt has to be [`Sizes::begin`]; `go_on` is asked between tokens.
    ///
    /// # Errors
    /// A prompt without tokens, with more than there is room for or with ids outside the vocabulary; arithmetic that fails.
    pub fn caption(
        &self,
        states: &Tensor,
        prompt: &[u32],
        options: &search::Options,
        go_on: &dyn Fn() -> bool,
    ) -> Result<search::Found> {
        let mut options = *options;
        options.most = options
            .most
            .min((self.sizes.longest + 1).saturating_sub(prompt.len()));
        let mut next = decoder::Next {
            decoder: &self.decoder,
            cache: self.decoder.begin(states)?,
            prompt,
        };
        search::search(&mut next, self.sizes.end, &options, go_on)
    }
}

fn sized(dir: &Path) -> std::result::Result<(Weights, Sizes), LoadError> {
    let Some(weights) = Weights::find(dir)? else {
        return Err(LoadError::Absent { path: dir.to_owned() });
    };
    let origin = dir.join("config.json");
    let config: Config = json::read(&origin)?;
    let sizes = Sizes::find(&config, &weights.shapes()?, &origin)?;
    Ok((weights, sizes))
}

#[cfg(test)]
mod tests;
