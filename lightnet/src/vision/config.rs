//! The shape of a classifier of pictures, as its `config.json` says.

use std::path::Path;

use candle_core::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::config::{
    ConfigError, MOST_CLASSES, MOST_LAYERS, MOST_WIDTH, read_checked, whole_patches, within,
};
use crate::lm;
use crate::mixer::causal::Form;
use crate::norm::EPS;

/// Longest name of a class, in bytes.
const LONGEST_LABEL: usize = 256;

/// What a folder says it is.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub enum Kind {
    /// A [`super::Classifier`].
    #[default]
    #[serde(rename = "vision_classifier")]
    VisionClassifier,
}

/// How tokens are mixed.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mixer {
    /// LightNet in its own form: all tokens in one scan without order.
    #[default]
    LightNet,
    /// HGRN2, along several scans.
    Hgrn2,
    /// TNL, along several scans.
    Tnl,
    /// Softmax attention of all tokens: the baseline.
    Softmax,
}

impl Mixer {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::LightNet, Self::Hgrn2, Self::Tnl, Self::Softmax];

    /// Its name in files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::LightNet => "lightnet",
            Self::Hgrn2 => "hgrn2",
            Self::Tnl => "tnl",
            Self::Softmax => "softmax",
        }
    }

    /// The recurrence that it scans with; none where all tokens meet.
    #[must_use]
    pub fn scans(self) -> Option<lm::Architecture> {
        match self {
            Self::LightNet | Self::Softmax => None,
            Self::Hgrn2 => Some(lm::Architecture::Hgrn2),
            Self::Tnl => Some(lm::Architecture::Tnl),
        }
    }

    /// How it goes through the tokens unless something else is asked for.
    #[must_use]
    pub fn form(self) -> Form {
        match self {
            Self::LightNet | Self::Softmax => Form::Whole,
            Self::Hgrn2 => Form::Parallel2d,
            Self::Tnl => Form::Parallel,
        }
    }
}

/// MD-TPE behind the embedding.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tpe {
    /// There is none.
    None,
    /// A token sees those before it along each axis, as in the authors' code.
    OneSided,
    /// A token sees both sides, so that no direction is preferred.
    #[default]
    TwoSided,
}

/// The standard sizes of the field: 12 layers of patches of 16, pictures of 224, heads of 64.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Size {
    /// Width 192.
    Tiny,
    /// Width 384.
    Small,
    /// Width 768.
    Base,
}

/// The shape, in the names of Hugging Face's ViT where it has them. Unknown keys are refused.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What this is.
    pub model_type: Kind,
    /// Names of the classes.
    pub labels: Vec<String>,
    /// Height and width of the pictures that it is made for; others are taken too.
    pub image_size: [usize; 2],
    /// 1 for grey, 3 for colours.
    pub num_channels: usize,
    /// Side of a patch.
    pub patch_size: usize,
    /// What is taken from values of 0 to 1, by channel.
    pub image_mean: Vec<f32>,
    /// What they are then divided by.
    pub image_std: Vec<f32>,
    /// Model width d.
    pub hidden_size: usize,
    /// Layers L.
    pub num_hidden_layers: usize,
    /// Heads H of d / H channels.
    pub num_attention_heads: usize,
    /// Hidden width of the gated linear units.
    pub intermediate_size: usize,
    /// How tokens are mixed.
    #[serde(default)]
    pub mixer: Mixer,
    /// How the mixer goes through them.
    pub form: Form,
    /// MD-TPE behind the embedding.
    #[serde(default)]
    pub tpe: Tpe,
    /// MD-LRPE in every layer.
    #[serde(default = "yes")]
    pub lrpe: bool,
    /// Gated linear units see, of half of their channels, the neighbours of a token.
    #[serde(default)]
    pub token_shift: bool,
    /// What the learnt scales of the branches start from; absent without layer scale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer_scale: Option<f64>,
}

fn yes() -> bool {
    true
}

impl Config {
    /// A model of a standard size with LightNet, for pictures in colours with these classes.
    #[must_use]
    pub fn of(size: Size, labels: Vec<String>) -> Self {
        let heads = match size {
            Size::Tiny => 3,
            Size::Small => 6,
            Size::Base => 12,
        };
        let width = 64 * heads;
        Self {
            model_type: Kind::VisionClassifier,
            labels,
            image_size: [224; 2],
            num_channels: 3,
            patch_size: 16,
            image_mean: vec![0.5; 3],
            image_std: vec![0.5; 3],
            hidden_size: width,
            num_hidden_layers: 12,
            num_attention_heads: heads,
            // Three maps of this width have as many weights as two of four times the model's.
            intermediate_size: width * 8 / 3,
            mixer: Mixer::LightNet,
            form: Form::Whole,
            tpe: Tpe::TwoSided,
            lrpe: true,
            token_shift: false,
            layer_scale: None,
        }
    }

    /// Number of classes.
    #[must_use]
    pub fn classes(&self) -> usize {
        self.labels.len()
    }

    /// Key width D of a head.
    #[must_use]
    pub fn head_width(&self) -> usize {
        self.hidden_size / self.num_attention_heads.max(1)
    }

    /// Tokens of the longer side of the pictures that it is made for.
    #[must_use]
    pub fn longest(&self) -> usize {
        self.image_size.into_iter().max().unwrap_or(0) / self.patch_size.max(1)
    }

    /// Refuses shapes that no model can have.
    ///
    /// # Errors
    /// A size is zero or beyond all reason, sizes do not fit each other, or the form is not for the mixer.
    pub fn check(&self) -> Result<()> {
        if self.labels.len() < 2 || self.labels.len() > MOST_CLASSES {
            bail!("labels are {}, expected 2 to {MOST_CLASSES}", self.labels.len());
        }
        if let Some(at) = self
            .labels
            .iter()
            .position(|label| label.is_empty() || label.len() > LONGEST_LABEL)
        {
            let length = self.labels[at].len();
            bail!("labels[{at}] has {length} bytes, expected 1 to {LONGEST_LABEL}");
        }
        if !matches!(self.num_channels, 1 | 3) {
            bail!("num_channels is {}, expected 1 or 3", self.num_channels);
        }
        for (name, values, fits) in [
            ("image_mean", &self.image_mean, f32::is_finite as fn(f32) -> bool),
            ("image_std", &self.image_std, |value| {
                value.is_finite() && value > 0.0
            }),
        ] {
            if values.len() != self.num_channels || !values.iter().all(|&value| fits(value)) {
                let words = if name == "image_std" { " above 0" } else { "" };
                bail!(
                    "{name} is {values:?}, expected {} numbers{words}",
                    self.num_channels
                );
            }
        }
        whole_patches(self.image_size, self.patch_size)?;
        within("hidden_size", self.hidden_size, MOST_WIDTH)?;
        within("num_hidden_layers", self.num_hidden_layers, MOST_LAYERS)?;
        within("num_attention_heads", self.num_attention_heads, self.hidden_size)?;
        within("intermediate_size", self.intermediate_size, MOST_WIDTH)?;
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            bail!(
                "hidden_size is {}, expected a multiple of num_attention_heads {}",
                self.hidden_size,
                self.num_attention_heads
            );
        }
        if (self.form == Form::Whole) != self.mixer.scans().is_none() {
            let expected: Vec<&str> = Form::ALL
                .iter()
                .filter(|&&form| (form == Form::Whole) == self.mixer.scans().is_none())
                .map(|form| form.name())
                .collect();
            bail!(
                "form is {:?}, expected {} with mixer {:?}",
                self.form.name(),
                expected.join(", "),
                self.mixer.name()
            );
        }
        if self.lrpe && self.mixer == Mixer::Softmax && !self.head_width().is_multiple_of(2) {
            bail!(
                "heads are {} channels wide, expected an even number for softmax attention with lrpe",
                self.head_width()
            );
        }
        if let Some(scale) = self.layer_scale
            && !(scale.is_finite() && scale > 0.0)
        {
            bail!("layer_scale is {scale}, expected a number above 0, or none");
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

    /// What the layers of a recurrence are told.
    pub(super) fn layers(&self, architecture: lm::Architecture) -> lm::Config {
        lm::Config {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            rms_norm_eps: EPS,
            norm_per_head: true,
            initializer_range: (self.hidden_size as f64).powf(-0.5),
            ..lm::Config::of(architecture)
        }
    }
}
