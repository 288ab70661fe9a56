//! The shape of a denoiser of pictures, as its `config.json` says.

use std::path::Path;

use candle_core::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::config::{
    ConfigError, MOST_CLASSES, MOST_LAYERS, MOST_WIDTH, read_checked, whole_patches, within,
};
use crate::diffusion::Objective;

/// Most channels, and most pixels of a side for one latent: beyond all reason.
const MOST_CHANNELS: usize = 1 << 10;
const MOST_FACTOR: usize = 1 << 6;

/// What a folder says it is.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub enum DitKind {
    /// A [`super::Dit`].
    #[default]
    #[serde(rename = "vision_dit")]
    VisionDit,
}

/// Sizes of the paper (LightNet, arXiv 2405.21022, image generation): layers, width and heads of the DiT family.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum DitSize {
    /// 12 layers of 384, 6 heads.
    Small,
    /// 12 layers of 768, 12 heads.
    Base,
    /// 24 layers of 1024, 16 heads.
    Large,
    /// 28 layers of 1152, 16 heads.
    ExtraLarge,
}

/// The shape. Unknown keys are refused.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DitConfig {
    /// What this is.
    pub model_type: DitKind,
    /// Height and width, in pixels or latents, that it is made for; others are taken too.
    pub image_size: [usize; 2],
    /// Channels: 1 for grey, 3 for colours, those of a codec for latents.
    pub num_channels: usize,
    /// Pixels of a picture's side for one latent, of a model that denoises the latents of a codec; none of one that denoises pixels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub codec_factor: Option<usize>,
    /// Side of a patch.
    pub patch_size: usize,
    /// Model width d.
    pub hidden_size: usize,
    /// Layers L.
    pub num_hidden_layers: usize,
    /// Heads H of d / H channels.
    pub num_attention_heads: usize,
    /// Hidden width of the gated linear units.
    pub intermediate_size: usize,
    /// Names of the classes; none for a model without classes.
    #[serde(default)]
    pub labels: Vec<String>,
    /// Width of the text states that it reads, if it reads a text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_dim: Option<usize>,
    /// Folder of the encoder of these texts, as seen from the model's; `text_encoder` within it if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_encoder: Option<String>,
    /// Every so many layers, from the first, one attends to the text.
    #[serde(default = "two")]
    pub text_every: usize,
    /// Gated linear units see, of half of their channels, the neighbours of a token.
    #[serde(default = "yes")]
    pub token_shift: bool,
    /// What it predicts.
    pub objective: Objective,
}

fn two() -> usize {
    2
}

fn yes() -> bool {
    true
}

impl DitConfig {
    /// A size of the paper for pictures of 32 x 32 latents with 4 channels, in patches of 2.
    #[must_use]
    pub fn of(size: DitSize, labels: Vec<String>) -> Self {
        let (layers, width, heads) = match size {
            DitSize::Small => (12, 384, 6),
            DitSize::Base => (12, 768, 12),
            DitSize::Large => (24, 1024, 16),
            DitSize::ExtraLarge => (28, 1152, 16),
        };
        Self {
            model_type: DitKind::VisionDit,
            image_size: [32, 32],
            num_channels: 4,
            codec_factor: None,
            patch_size: 2,
            hidden_size: width,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            // Three maps of 8/3 of the width have the weights of two of four times the width.
            intermediate_size: 8 * width / 3,
            labels,
            text_dim: None,
            text_encoder: None,
            text_every: 2,
            token_shift: true,
            objective: Objective::Flow,
        }
    }

    /// # Errors
    /// What cannot be, in one line: the field, what was found and what is expected.
    pub fn check(&self) -> Result<()> {
        whole_patches(self.image_size, self.patch_size)?;
        for (field, found, most) in [
            ("num_channels", self.num_channels, MOST_CHANNELS),
            ("codec_factor", self.codec_factor.unwrap_or(1), MOST_FACTOR),
            ("hidden_size", self.hidden_size, MOST_WIDTH),
            ("num_hidden_layers", self.num_hidden_layers, MOST_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MOST_WIDTH),
            ("intermediate_size", self.intermediate_size, MOST_WIDTH),
            ("text_dim", self.text_dim.unwrap_or(1), MOST_WIDTH),
            ("text_every", self.text_every, MOST_LAYERS),
        ] {
            within(field, found, most)?;
        }
        if !self.hidden_size.is_multiple_of(2 * self.num_attention_heads) {
            bail!(
                "hidden_size is {}, expected a multiple of twice num_attention_heads, {}",
                self.hidden_size,
                2 * self.num_attention_heads
            );
        }
        if self.labels.len() > MOST_CLASSES {
            bail!(
                "labels: found {}, expected at most {MOST_CLASSES}",
                self.labels.len()
            );
        }
        Ok(())
    }

    /// Reads `config.json`.
    ///
    /// # Errors
    /// The file is unreadable, or describes a model that cannot be.
    pub fn read(path: &Path) -> std::result::Result<Self, ConfigError> {
        read_checked(path, Self::check)
    }
}
