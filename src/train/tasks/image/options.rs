//! Recipe of the task `image`, and the network that it asks for.

use std::path::PathBuf;

use fulgur_lightnet::diffusion::Objective;
use fulgur_lightnet::vision::{DitConfig, DitKind, DitSize};
use fulgur_tavdiffusion::codec::{PictureCodec, VideoCodecConfig};
use serde::{Deserialize, Serialize};

use super::super::pictures::{Frame, LONGEST_SIDE, MOST};
use crate::train::TaskResult;

/// Recipe of the task.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Options {
    /// The data set: the name of a prepared one, a folder with a folder per class, or JSONL with captions.
    pub set: String,
    /// Folder of prepared data sets.
    pub data: PathBuf,
    /// Height and width of the pictures, in pixels.
    pub size: [usize; 2],
    /// 1 for grey, 3 for colours; as in the set if absent, and those of the codec where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channels: Option<usize>,
    /// Folder of the codec of pictures whose latents are denoised; pixels are if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub codec: Option<PathBuf>,
    /// Whether the class of a picture steers it.
    pub classes: bool,
    /// Folder of the text encoder whose states of the captions steer it, if they do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<PathBuf>,
    /// Pictures in a batch.
    pub batch: usize,
    /// Held-out pictures of a validation.
    pub validation: usize,
    /// Share of pictures whose class is left open, and share of those whose text is: for guidance.
    pub dropout: f32,
    /// Whether pictures are mirrored, one in two.
    pub flip: bool,
    /// Steps and guidance of the pictures that are drawn to be looked at.
    pub sample_steps: usize,
    /// See above.
    pub sample_guidance: f64,
    /// The network.
    pub model: ModelOptions,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            set: "emoji".to_owned(),
            data: "data".into(),
            size: [64, 64],
            channels: None,
            codec: None,
            classes: true,
            text: None,
            batch: 128,
            validation: 256,
            dropout: 0.1,
            flip: false,
            sample_steps: 24,
            sample_guidance: 3.0,
            model: ModelOptions::default(),
        }
    }
}

/// The network of a recipe.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ModelOptions {
    /// A size of the paper, `small`, `base`, `large` or `extra-large` (also `S`, `B`, `L`, `XL`), whose numbers the others replace; if
    /// absent, those of [`Shape::OWN`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// Side of a patch, in pixels or latents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch: Option<usize>,
    /// Layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<usize>,
    /// Width.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<usize>,
    /// Heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heads: Option<usize>,
    /// Hidden width of the gated linear units.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hidden: Option<usize>,
    /// Every so many layers one reads the text.
    pub text_every: usize,
    /// Whether gated linear units see neighbours.
    pub token_shift: bool,
    /// What it predicts.
    pub objective: Objective,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            size: None,
            patch: None,
            layers: None,
            width: None,
            heads: None,
            hidden: None,
            text_every: 2,
            token_shift: true,
            objective: Objective::Flow,
        }
    }
}

/// The numbers that a size stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    patch: usize,
    layers: usize,
    width: usize,
    heads: usize,
    hidden: usize,
}

impl Shape {
    /// Of a recipe that names no size: a small network for small pictures.
    const OWN: Self = Self {
        patch: 4,
        layers: 8,
        width: 256,
        heads: 4,
        hidden: 352,
    };

    fn of(size: DitSize) -> Self {
        let config = DitConfig::of(size, Vec::new());
        Self {
            patch: config.patch_size,
            layers: config.num_hidden_layers,
            width: config.hidden_size,
            heads: config.num_attention_heads,
            hidden: config.intermediate_size,
        }
    }
}

impl ModelOptions {
    /// # Errors
    /// A size that is not known.
    fn shape(&self) -> TaskResult<Shape> {
        let size = match self.size.as_deref() {
            None => None,
            Some("small" | "S") => Some(DitSize::Small),
            Some("base" | "B") => Some(DitSize::Base),
            Some("large" | "L") => Some(DitSize::Large),
            Some("extra-large" | "XL") => Some(DitSize::ExtraLarge),
            Some(other) => {
                return Err(format!(
                    "[image.model]: size is {other:?}, expected small (S), base (B), large (L) or extra-large (XL)"
                )
                .into());
            }
        };
        let standard = size.map_or(Shape::OWN, Shape::of);
        let width = self.width.unwrap_or(standard.width);
        // Of another width than that of the size, heads stay 64 wide and gated linear units in proportion, as for classifiers.
        let in_proportion = size.is_some() && width != standard.width;
        let (heads, hidden) = match in_proportion {
            true => ((width / 64).max(1), width.saturating_mul(8) / 3),
            false => (standard.heads, standard.hidden),
        };
        Ok(Shape {
            patch: self.patch.unwrap_or(standard.patch),
            layers: self.layers.unwrap_or(standard.layers),
            width,
            heads: self.heads.unwrap_or(heads),
            hidden: self.hidden.unwrap_or(hidden),
        })
    }
}

/// What is denoised: pixels, or latents of a codec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Space {
    /// The pictures, in pixels.
    pub(super) frame: Frame,
    /// Height and width of what the network sees.
    pub(super) size: [usize; 2],
    /// And its channels.
    pub(super) channels: usize,
    /// Pixels of a side for one latent, where it sees latents.
    pub(super) factor: Option<usize>,
}

impl Space {
    /// Values that the network sees of a picture.
    pub(super) fn values(&self) -> usize {
        let [height, width] = self.size;
        height * width * self.channels
    }
}

impl Options {
    /// # Errors
    /// What cannot be.
    pub(super) fn check(&self) -> TaskResult<()> {
        let [height, width] = self.size;
        let counts = [
            ("batch", self.batch, MOST),
            ("size", height, LONGEST_SIDE),
            ("size", width, LONGEST_SIDE),
            ("sample_steps", self.sample_steps, 1000),
        ];
        for (field, found, most) in counts {
            if !(1..=most).contains(&found) {
                return Err(format!("[image]: {field} is {found}, expected 1 to {most}").into());
            }
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(format!(
                "[image]: dropout is {}, expected 0 or more and below 1",
                self.dropout
            )
            .into());
        }
        if !self.sample_guidance.is_finite() || self.sample_guidance < 0.0 {
            let found = self.sample_guidance;
            return Err(format!("[image]: sample_guidance is {found}, expected 0 or more").into());
        }
        if self.channels.is_some_and(|channels| !matches!(channels, 1 | 3)) {
            let found = self.channels.unwrap_or_default();
            return Err(format!("[image]: channels is {found}, expected 1 or 3").into());
        }
        Ok(())
    }

    /// What is denoised of a set that is grey or not, with a codec of this shape if with one.
    ///
    /// # Errors
    /// Settings that do not fit together.
    pub(crate) fn space(&self, grey: bool, codec: Option<&VideoCodecConfig>) -> TaskResult<Space> {
        self.check()?;
        let own = self.channels.unwrap_or(if grey { 1 } else { 3 });
        let frame = |channels| Frame {
            size: self.size,
            channels,
        };
        let Some(codec) = codec else {
            return Ok(Space {
                frame: frame(own),
                size: self.size,
                channels: own,
                factor: None,
            });
        };
        let (channels, factor) = (PictureCodec::COLOURS, codec.patch[1]);
        if let Some(found) = self.channels.filter(|&found| found != channels) {
            return Err(
                format!("[image]: channels is {found}, expected {channels}, those of the codec").into(),
            );
        }
        if self.size.iter().any(|side| !side.is_multiple_of(factor)) {
            return Err(format!(
                "[image]: size is {:?}, expected multiples of {factor}, the patch of the codec",
                self.size
            )
            .into());
        }
        Ok(Space {
            frame: frame(channels),
            size: self.size.map(|side| side / factor),
            channels: codec.latent_channels,
            factor: Some(factor),
        })
    }

    /// The network in `space`, for these classes and texts of this width.
    ///
    /// # Errors
    /// Settings that do not fit together.
    pub(crate) fn config(
        &self,
        space: &Space,
        labels: Vec<String>,
        text_dim: Option<usize>,
    ) -> TaskResult<DitConfig> {
        let (model, shape) = (&self.model, self.model.shape()?);
        let config = DitConfig {
            model_type: DitKind::VisionDit,
            image_size: space.size,
            num_channels: space.channels,
            codec_factor: space.factor,
            patch_size: shape.patch,
            hidden_size: shape.width,
            num_hidden_layers: shape.layers,
            num_attention_heads: shape.heads,
            intermediate_size: shape.hidden,
            labels: if self.classes { labels } else { Vec::new() },
            text_dim,
            text_encoder: None,
            text_every: model.text_every,
            token_shift: model.token_shift,
            objective: model.objective,
        };
        config.check().map_err(|e| {
            let words = e.to_string();
            format!("[image.model]: {}", words.lines().next().unwrap_or_default())
        })?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(own: &str) -> TaskResult<Shape> {
        let options: ModelOptions = toml::from_str(own).unwrap();
        options.shape()
    }

    #[test]
    fn sizes_have_names_and_every_number_can_be_replaced() {
        let shape = |patch, layers, width, heads, hidden| Shape {
            patch,
            layers,
            width,
            heads,
            hidden,
        };
        for (own, expected) in [
            ("", shape(4, 8, 256, 4, 352)),
            ("width = 128", shape(4, 8, 128, 4, 352)),
            ("size = 'S'", shape(2, 12, 384, 6, 1024)),
            ("size = 'small'", shape(2, 12, 384, 6, 1024)),
            ("size = 'B'", shape(2, 12, 768, 12, 2048)),
            ("size = 'L'", shape(2, 24, 1024, 16, 2730)),
            ("size = 'XL'", shape(2, 28, 1152, 16, 3072)),
            ("size = 'extra-large'\nlayers = 3", shape(2, 3, 1152, 16, 3072)),
            ("size = 'S'\npatch = 8\nhidden = 99", shape(8, 12, 384, 6, 99)),
            ("size = 'XL'\nwidth = 192", shape(2, 28, 192, 3, 512)),
            ("size = 'B'\nheads = 6", shape(2, 12, 768, 6, 2048)),
        ] {
            assert_eq!(model(own).unwrap(), expected, "{own}");
        }
        let line = model("size = 'XXL'").unwrap_err().to_string();
        assert_eq!(
            line,
            "[image.model]: size is \"XXL\", expected small (S), base (B), large (L) or extra-large (XL)"
        );
    }

    #[test]
    fn latents_are_of_the_codec() {
        let codec = VideoCodecConfig {
            patch: [1, 4, 4],
            latent_channels: 6,
            ..VideoCodecConfig::default()
        };
        let options = |own: &str| -> Options { toml::from_str(own).unwrap() };
        let plain = options("size = [16, 24]\nmodel = { size = 'S' }");
        let pixels = plain.space(true, None).unwrap();
        assert_eq!((pixels.size, pixels.channels, pixels.factor), ([16, 24], 1, None));
        // Grey pictures go through the codec as colours that are all alike.
        let latents = plain.space(true, Some(&codec)).unwrap();
        assert_eq!(
            (latents.size, latents.channels, latents.factor),
            ([4, 6], 6, Some(4))
        );
        assert_eq!((latents.frame.channels, latents.values()), (3, 4 * 6 * 6));
        let config = plain.config(&latents, vec!["a".to_owned()], None).unwrap();
        assert_eq!(
            (config.image_size, config.num_channels, config.codec_factor),
            ([4, 6], 6, Some(4))
        );
        for (own, words) in [
            (
                "channels = 1\nsize = [16, 16]",
                "channels is 1, expected 3, those of the codec",
            ),
            (
                "size = [16, 18]",
                "size is [16, 18], expected multiples of 4, the patch of the codec",
            ),
        ] {
            let line = options(own).space(false, Some(&codec)).unwrap_err().to_string();
            assert_eq!(line, format!("[image]: {words}"));
        }
        // Patches are of latents.
        let line = options("size = [8, 12]\nmodel = { patch = 2 }");
        let space = line.space(false, Some(&codec)).unwrap();
        let line = line.config(&space, Vec::new(), None).unwrap_err().to_string();
        assert!(
            line.contains("[image.model]: image_size is [2, 3], expected multiples of the patch_size 2"),
            "{line}"
        );
    }
}
