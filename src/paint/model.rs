//! A model that draws, from its folder: `config.json`, `model.safetensors` and, where it reads texts, their encoder in `text_encoder`.

use std::path::Path;

use anyhow::bail;
use candle_core::Device;
use fulgur_lightnet::vision::Dit;
use fulgur_tavdiffusion::text::TextModel;

use super::Painter;
use crate::device::compute_dtype;

/// Folder of the text encoder within a model's.
pub const TEXT_ENCODER: &str = "text_encoder";

/// What a folder holds.
#[derive(Debug)]
pub struct Model {
    dit: Dit,
    text: Option<TextModel>,
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
            let folder = dir.join(TEXT_ENCODER);
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
        Ok(Self {
            dit,
            text: text.transpose()?,
        })
    }

    /// What draws.
    pub fn painter(&self) -> Painter<'_> {
        Painter {
            dit: &self.dit,
            text: self.text.as_ref(),
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
