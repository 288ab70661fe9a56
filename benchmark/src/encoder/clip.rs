//! CLIP as an encoder of frames and texts, with its published preprocessing: the pictures of [`super::imagebind::seeing`], and the
//! vocabulary beside the weights.

use std::path::Path;

use candle_core::{DType, Device};
use fulgur_datasets::augment::View;
use fulgur_lightnet::encoders::clip::{Clip, Side};
use fulgur_lightnet::encoders::clip_tokenizer::ClipTokenizer;
use fulgur_lightnet::params::folder::LoadError;

use super::EncodeError;
use super::imagebind::seeing;
use crate::metrics::joint::JointEncoder;

/// Name of the encoder in results.
const NAME: &str = "clip";

/// The network with everything that stands before it.
#[derive(Debug)]
pub struct ClipEncoder {
    model: Clip,
    vocabulary: ClipTokenizer,
    view: View,
    context: usize,
    device: Device,
}

impl ClipEncoder {
    /// Opens a folder with both towers and a vocabulary; towers are loaded when they are first needed.
    ///
    /// # Errors
    /// There are no weights of CLIP, a tower or the vocabulary is missing, or one of them is damaged.
    pub fn open(dir: &Path, compute: DType, device: &Device) -> Result<Self, EncodeError> {
        let model = Clip::open(dir, compute, device).map_err(unusable)?;
        let lengths = [Side::Vision, Side::Text].map(|side| model.sizes(side).map(|sizes| sizes.length));
        let [Some(side), Some(context)] = lengths else {
            return Err(EncodeError::Input(format!(
                "{}: found one tower of CLIP, expected those of pictures and of texts",
                dir.display()
            )));
        };
        Ok(Self {
            vocabulary: ClipTokenizer::find(dir).map_err(unusable)?,
            view: seeing::view(side),
            context,
            device: device.clone(),
            model,
        })
    }
}

fn unusable(error: impl std::fmt::Display) -> EncodeError {
    EncodeError::Input(error.to_string())
}

fn failed(error: LoadError) -> EncodeError {
    match error {
        LoadError::Candle(error) => EncodeError::Network(error),
        other => unusable(other),
    }
}

impl JointEncoder for ClipEncoder {
    fn name(&self) -> &str {
        NAME
    }

    fn frames(&self, frames: &[&[u8]], width: usize, height: usize) -> Result<Vec<Vec<f32>>, EncodeError> {
        let fitted = seeing::fitted(&self.view, frames, width, height)?;
        let pixels = seeing::normalised(&fitted, &self.device)?;
        let vectors = self.model.image_embeds(&pixels).map_err(failed)?;
        Ok(vectors.to_dtype(DType::F32)?.to_vec2()?)
    }

    fn text(&self, text: &str) -> Result<Vec<f32>, EncodeError> {
        let batch = self.vocabulary.encode(&[text], self.context, &self.device);
        let batch = batch.map_err(unusable)?;
        let vectors = self.model.text_embeds(&batch.ids, None).map_err(failed)?;
        Ok(vectors.to_dtype(DType::F32)?.squeeze(0)?.to_vec1()?)
    }
}
