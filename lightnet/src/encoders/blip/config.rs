//! Sizes of a captioner: those of its tensors, which `config.json` has to agree with.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::MARK;
use crate::config::ConfigError;
use crate::encoders::gelu::Gelu;
use crate::encoders::transformer::Shape;

/// `config.json`, as far as it is read.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Config {
    /// The decoder of texts.
    pub text_config: TextConfig,
    /// The tower of pictures.
    pub vision_config: VisionConfig,
    /// Whether scores of words are taken with the table of words; true if absent.
    pub tie_word_embeddings: Option<bool>,
}

/// `text_config`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct TextConfig {
    /// Pieces of the vocabulary.
    pub vocab_size: Option<usize>,
    /// Width of the stream.
    pub hidden_size: Option<usize>,
    /// Width of the layer in the middle of a feed-forward block.
    pub intermediate_size: Option<usize>,
    /// Layers.
    pub num_hidden_layers: Option<usize>,
    /// Heads; 8 if absent.
    pub num_attention_heads: Option<usize>,
    /// Longest text in tokens.
    pub max_position_embeddings: Option<usize>,
    /// The activation; `gelu` if absent.
    pub hidden_act: Option<Gelu>,
    /// Added to the variance in every norm; 1e-12 if absent.
    pub layer_norm_eps: Option<f64>,
    /// The token that a text begins with; 30522 if absent.
    pub bos_token_id: Option<u32>,
    /// The token that ends a text; 102 if absent.
    pub sep_token_id: Option<u32>,
    /// The token behind the end of shorter texts; 0 if absent.
    pub pad_token_id: Option<u32>,
    /// As [`Config::tie_word_embeddings`].
    pub tie_word_embeddings: Option<bool>,
}

/// `vision_config`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct VisionConfig {
    /// Width of the stream.
    pub hidden_size: Option<usize>,
    /// Width of the layer in the middle of a feed-forward block.
    pub intermediate_size: Option<usize>,
    /// Blocks.
    pub num_hidden_layers: Option<usize>,
    /// Heads; 12 if absent.
    pub num_attention_heads: Option<usize>,
    /// Side of the pictures in pixels.
    pub image_size: Option<usize>,
    /// Side of a patch.
    pub patch_size: Option<usize>,
    /// The activation; `gelu` if absent.
    pub hidden_act: Option<Gelu>,
    /// Added to the variance in every norm; 1e-5 if absent.
    pub layer_norm_eps: Option<f64>,
}

/// Sizes of a captioner.
#[derive(Clone, Debug, PartialEq)]
pub struct Sizes {
    /// The tower of pictures.
    pub vision: Shape,
    /// Side of the pictures in pixels.
    pub side: usize,
    /// Side of a patch.
    pub patch: usize,
    /// The decoder of texts.
    pub text: Shape,
    /// Pieces of the vocabulary.
    pub vocabulary: usize,
    /// Longest text in tokens.
    pub longest: usize,
    /// The token that a text begins with.
    pub begin: u32,
    /// The token that ends a text.
    pub end: u32,
    /// The token behind the end of shorter texts.
    pub pad: u32,
    /// Whether scores of words are taken with the table of words.
    pub tied: bool,
    /// Whether the bias of the scores has its newer name.
    pub(super) bias_of_decoder: bool,
}

/// Shapes of tensors, with the file that names them in errors.
struct Shapes<'a> {
    all: &'a BTreeMap<String, Vec<usize>>,
    origin: &'a Path,
}

impl Shapes<'_> {
    fn fail(&self, detail: String) -> ConfigError {
        ConfigError {
            path: self.origin.to_owned(),
            detail,
        }
    }

    fn of<const R: usize>(&self, name: &str) -> Result<[usize; R], ConfigError> {
        match self.all.get(name) {
            Some(shape) => match <[usize; R]>::try_from(shape.as_slice()) {
                Ok(sizes) if sizes.iter().all(|&n| n > 0) => Ok(sizes),
                _ => Err(self.fail(format!(
                    "tensor `{name}` is {shape:?}, expected {R} dimensions, none empty"
                ))),
            },
            None => Err(self.fail(format!("tensor `{name}` is missing"))),
        }
    }

    /// How many layers there are, by a tensor that each has.
    fn layers(&self, name: impl Fn(usize) -> String) -> usize {
        (0..).take_while(|&i| self.all.contains_key(&name(i))).count()
    }

    fn agree(&self, part: &str, fields: &[(&str, Option<usize>, usize)]) -> Result<(), ConfigError> {
        for (field, named, found) in fields {
            if let Some(named) = named.filter(|named| named != found) {
                return Err(self.fail(format!(
                    "{part}.{field} is {named}, expected {found} as in the tensors"
                )));
            }
        }
        Ok(())
    }

    fn heads(&self, part: &str, heads: usize, width: usize) -> Result<usize, ConfigError> {
        if heads == 0 || !width.is_multiple_of(heads) {
            return Err(self.fail(format!(
                "{part}.num_attention_heads is {heads}, expected a divisor of the width {width}"
            )));
        }
        Ok(heads)
    }

    fn eps(&self, part: &str, eps: f64) -> Result<f64, ConfigError> {
        if !(eps > 0.0 && eps.is_finite()) {
            return Err(self.fail(format!(
                "{part}.layer_norm_eps is {eps}, expected a number above zero"
            )));
        }
        Ok(eps)
    }
}

impl Sizes {
    /// The sizes of weights with these shapes.
    pub(super) fn find(
        config: &Config,
        all: &BTreeMap<String, Vec<usize>>,
        origin: &Path,
    ) -> Result<Self, ConfigError> {
        let shapes = Shapes { all, origin };
        if !all.contains_key(MARK) {
            return Err(shapes.fail(format!(
                "{} tensors, expected those of a BLIP captioner, such as {MARK}",
                all.len()
            )));
        }
        let (vision, side, patch) = Self::vision(&config.vision_config, &shapes)?;
        let text = &config.text_config;
        let layer = |i: usize| format!("text_decoder.bert.encoder.layer.{i}.intermediate.dense.weight");
        let [hidden, width] = shapes.of(&layer(0))?;
        let [vocabulary, _] = shapes.of("text_decoder.bert.embeddings.word_embeddings.weight")?;
        let [longest, _] = shapes.of("text_decoder.bert.embeddings.position_embeddings.weight")?;
        let layers = shapes.layers(layer);
        shapes.agree(
            "text_config",
            &[
                ("vocab_size", text.vocab_size, vocabulary),
                ("hidden_size", text.hidden_size, width),
                ("intermediate_size", text.intermediate_size, hidden),
                ("num_hidden_layers", text.num_hidden_layers, layers),
                ("max_position_embeddings", text.max_position_embeddings, longest),
            ],
        )?;
        let (begin, end) = (
            text.bos_token_id.unwrap_or(30_522),
            text.sep_token_id.unwrap_or(102),
        );
        let pad = text.pad_token_id.unwrap_or(0);
        for (field, id) in [
            ("bos_token_id", begin),
            ("sep_token_id", end),
            ("pad_token_id", pad),
        ] {
            if id as usize >= vocabulary {
                return Err(shapes.fail(format!(
                    "text_config.{field} is {id}, expected an id below {vocabulary}"
                )));
            }
        }
        Ok(Self {
            vision,
            side,
            patch,
            text: Shape {
                width,
                hidden,
                heads: shapes.heads("text_config", text.num_attention_heads.unwrap_or(8), width)?,
                layers,
                eps: shapes.eps("text_config", text.layer_norm_eps.unwrap_or(1e-12))?,
                gelu: text.hidden_act.unwrap_or_default(),
                bias_kv: false,
            },
            vocabulary,
            longest,
            begin,
            end,
            pad,
            tied: text
                .tie_word_embeddings
                .or(config.tie_word_embeddings)
                .unwrap_or(true),
            bias_of_decoder: !all.contains_key("text_decoder.cls.predictions.bias"),
        })
    }

    fn vision(config: &VisionConfig, shapes: &Shapes<'_>) -> Result<(Shape, usize, usize), ConfigError> {
        let layer = |i: usize| format!("vision_model.encoder.layers.{i}.mlp.fc1.weight");
        let [hidden, width] = shapes.of(&layer(0))?;
        let [_, channels, patch, across] = shapes.of("vision_model.embeddings.patch_embedding.weight")?;
        let [_, places, _] = shapes.of("vision_model.embeddings.position_embedding")?;
        let layers = shapes.layers(layer);
        let squares = (places - 1).isqrt();
        if squares == 0 || squares * squares != places - 1 || channels != 3 || patch != across {
            return Err(shapes.fail(format!(
                "patches of [{channels}, {patch}, {across}] at {places} places, expected square ones of 3 channels that fill a square"
            )));
        }
        // What is left over beside the patches is not seen.
        let side = config.image_size.unwrap_or(squares * patch);
        if side / patch != squares {
            return Err(shapes.fail(format!(
                "vision_config.image_size is {side}, expected {squares} patches of {patch} pixels as in the tensors"
            )));
        }
        shapes.agree(
            "vision_config",
            &[
                ("hidden_size", config.hidden_size, width),
                ("intermediate_size", config.intermediate_size, hidden),
                ("num_hidden_layers", config.num_hidden_layers, layers),
                ("patch_size", config.patch_size, patch),
            ],
        )?;
        let shape = Shape {
            width,
            hidden,
            heads: shapes.heads("vision_config", config.num_attention_heads.unwrap_or(12), width)?,
            layers,
            eps: shapes.eps("vision_config", config.layer_norm_eps.unwrap_or(1e-5))?,
            gelu: config.hidden_act.unwrap_or_default(),
            bias_kv: false,
        };
        Ok((shape, side, patch))
    }
}
