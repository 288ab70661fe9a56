//! A model that draws, from its folder: `config.json`, `model.safetensors`, where it reads texts their encoder in `text_encoder` or
//! where it says, and where it draws latents their codec in `codec`.

use std::path::Path;

use anyhow::bail;
use candle_core::Device;
use fulgur_lightnet::vision::Dit;
use fulgur_tavdiffusion::codec::PictureCodec;
use fulgur_tavdiffusion::text::TextModel;

use super::Painter;
use crate::device::compute_dtype;

/// Folder of the text encoder within a model's, if its `config.json` names no other one.
pub const TEXT_ENCODER: &str = "text_encoder";
/// Folder of the codec of pictures within a model's.
pub const CODEC: &str = "codec";

/// What a folder holds.
#[derive(Debug)]
pub struct Model {
    dit: Dit,
    text: Option<TextModel>,
    codec: Option<PictureCodec>,
}

impl Model {
    /// Reads a folder onto `device`.
    ///
    /// # Errors
    /// A file is missing, damaged or of another model.
    pub fn load(dir: &Path, device: &Device) -> anyhow::Result<Self> {
        let compute = compute_dtype(device);
        let dit = Dit::load(dir, compute, device)?;
        let text = dit.config().text_dim.map(|width| {
            let folder = dir.join(dit.config().text_encoder.as_deref().unwrap_or(TEXT_ENCODER));
            let text = TextModel::load(&folder, device)?;
            let found = text.encoder().config().hidden_size;
            if found != width {
                bail!(
                    "{}: hidden_size is {found}, expected {width}, the text_dim of the model",
                    folder.display()
                );
            }
            Ok(text)
        });
        let codec = dit.config().codec_factor.map(|factor| {
            let folder = dir.join(CODEC);
            let codec = PictureCodec::load(&folder, device)?;
            let channels = dit.config().num_channels;
            for (field, found, expected, of_model) in [
                ("patch", codec.factor(), factor, "codec_factor"),
                ("latent_channels", codec.channels(), channels, "num_channels"),
            ] {
                if found != expected {
                    bail!(
                        "{}: {field} is {found}, expected {expected}, the {of_model} of the model",
                        folder.join("config.json").display()
                    );
                }
            }
            Ok(codec)
        });
        Ok(Self {
            text: text.transpose()?,
            codec: codec.transpose()?,
            dit,
        })
    }

    /// What draws.
    pub fn painter(&self) -> Painter<'_> {
        Painter {
            dit: &self.dit,
            text: self.text.as_ref(),
            codec: self.codec.as_ref(),
        }
    }

    /// The class called `name`, or of that number.
    ///
    /// # Errors
    /// There is none.
    pub fn class(&self, name: &str) -> anyhow::Result<usize> {
        let labels = &self.dit.config().labels;
        if let Some(index) = labels.iter().position(|label| label == name) {
            return Ok(index);
        }
        match name.parse::<usize>() {
            Ok(index) if index < labels.len() => Ok(index),
            _ if labels.is_empty() => bail!("class: found {name:?}, expected none: the model has no classes"),
            _ => {
                let some: Vec<&str> = labels.iter().map(String::as_str).take(12).collect();
                let more = if labels.len() > some.len() { ", .." } else { "" };
                bail!(
                    "class: found {name:?}, expected 0 to {} or one of {}{more}",
                    labels.len() - 1,
                    some.join(", ")
                )
            }
        }
    }
}
