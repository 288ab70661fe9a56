//! CLIP (Radford et al., 2021): pictures and texts in one space, with the names of Hugging Face transformers.
//!
//! A folder holds a whole model (`CLIPModel`) or one tower of it, with its projection or without (`CLIPTextModel`,
//! `CLIPVisionModel`, `..WithProjection`). Towers are loaded when they are first asked for.
//!
//! ```text
//! picture  patches W + class token + positions -> LN -> blocks; class token -> LN (pooled) -> W_p
//! text     words + positions -> causal blocks -> LN; token at the end of the text (pooled) -> W_p
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use serde::Deserialize;

use super::gelu::Gelu;
use super::lazy::Lazy;
use super::transformer::{Map, Names, Norm, Shape, Transformer, patches, small};
use crate::config::{self as json, ConfigError};
use crate::params::folder::{LoadError, Weights, load_part};

/// The `eos_token_id` of the first published files, which does not name the end of a text: the largest id does.
const UNNAMED_END: u32 = 2;

/// Where the texts of CLIP lie in a file of latent diffusion, which holds whole pipelines.
pub const LATENT_DIFFUSION: &str = "cond_stage_model.transformer.";
/// Width of a head in all published models.
const HEAD: usize = 64;

/// A tower of CLIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Pictures.
    Vision,
    /// Texts.
    Text,
}

impl Side {
    /// Both, in the order of their numbers.
    pub const BOTH: [Self; 2] = [Self::Vision, Self::Text];

    fn model(self) -> &'static str {
        match self {
            Self::Vision => "vision_model",
            Self::Text => "text_model",
        }
    }

    fn projection(self) -> &'static str {
        match self {
            Self::Vision => "visual_projection",
            Self::Text => "text_projection",
        }
    }

    /// A tensor that every such tower has.
    fn mark(self) -> &'static str {
        match self {
            Self::Vision => "embeddings.class_embedding",
            Self::Text => "embeddings.token_embedding.weight",
        }
    }
}

/// `config.json` of one tower.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct TowerConfig {
    /// Width of the stream.
    pub hidden_size: Option<usize>,
    /// Width of the layer in the middle of a feed-forward block.
    pub intermediate_size: Option<usize>,
    /// Blocks.
    pub num_hidden_layers: Option<usize>,
    /// Heads; 12 for pictures and 8 for texts if absent.
    pub num_attention_heads: Option<usize>,
    /// The activation; `quick_gelu` if absent.
    pub hidden_act: Option<Gelu>,
    /// Added to the variance in every norm; 1e-5 if absent.
    pub layer_norm_eps: Option<f64>,
    /// Side of the pictures in pixels.
    pub image_size: Option<usize>,
    /// Side of a patch.
    pub patch_size: Option<usize>,
    /// Longest text in tokens.
    pub max_position_embeddings: Option<usize>,
    /// Pieces of the vocabulary.
    pub vocab_size: Option<usize>,
    /// The token that ends a text; 49407 if absent.
    pub eos_token_id: Option<u32>,
}

/// `config.json` of a whole model, or of one tower.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Config {
    text_config: Option<TowerConfig>,
    vision_config: Option<TowerConfig>,
    #[serde(flatten)]
    own: TowerConfig,
}

impl Config {
    /// Of texts, as their shapes and all published models have it.
    fn of_shapes(shapes: &Shapes) -> Self {
        let mut names = shapes.iter();
        let words = names.find(|(name, _)| name.ends_with(Side::Text.mark()));
        let width = words.and_then(|(_, shape)| shape.get(1)).copied().unwrap_or(0);
        Self {
            own: TowerConfig {
                num_attention_heads: Some((width / HEAD).max(1)),
                ..TowerConfig::default()
            },
            ..Self::default()
        }
    }

    fn of(&self, side: Side) -> &TowerConfig {
        let part = match side {
            Side::Vision => &self.vision_config,
            Side::Text => &self.text_config,
        };
        part.as_ref().unwrap_or(&self.own)
    }
}

/// Sizes of a tower, which its tensors have.
#[derive(Clone, Debug, PartialEq)]
pub struct Sizes {
    /// The trunk.
    pub trunk: Shape,
    /// Pixels a side of pictures, or tokens of texts.
    pub length: usize,
    /// Pixels a side of a patch, or pieces of the vocabulary.
    pub pieces: usize,
    /// Width of the projection, where there is one.
    pub projection: Option<usize>,
    /// The token that ends a text; `None` for the largest id.
    end: Option<u32>,
    /// What stands before the names of the tower.
    prefix: String,
}

type Shapes = BTreeMap<String, Vec<usize>>;

impl Sizes {
    /// The sizes of a tower in weights with these shapes; `None` where there is none.
    fn find(
        side: Side,
        config: &Config,
        shapes: &Shapes,
        origin: &Path,
    ) -> std::result::Result<Option<Self>, ConfigError> {
        let fail = |detail: String| ConfigError {
            path: origin.to_owned(),
            detail,
        };
        let prefixes = [format!("{}.", side.model()), String::new()];
        let found = prefixes
            .into_iter()
            .find(|prefix| shapes.contains_key(&format!("{prefix}{}", side.mark())));
        let Some(prefix) = found else {
            return Ok(None);
        };
        let find = |name: &str, rank: usize| {
            let name = format!("{prefix}{name}");
            match shapes.get(&name) {
                Some(shape) if shape.len() == rank && shape.iter().all(|&n| n > 0) => Ok(shape.as_slice()),
                Some(shape) => Err(fail(format!(
                    "tensor `{name}` is {shape:?}, expected {rank} dimensions, none empty"
                ))),
                None => Err(fail(format!("tensor `{name}` is missing"))),
            }
        };
        let config = config.of(side);
        let fc1 = find("encoder.layers.0.mlp.fc1.weight", 2)?;
        let (hidden, width) = (fc1[0], fc1[1]);
        let layers = (0..)
            .take_while(|i| shapes.contains_key(&format!("{prefix}encoder.layers.{i}.mlp.fc1.weight")))
            .count();
        let positions = find("embeddings.position_embedding.weight", 2)?[0];
        let (length, pieces) = match side {
            Side::Text => (positions, find("embeddings.token_embedding.weight", 2)?[0]),
            Side::Vision => {
                let stem = find("embeddings.patch_embedding.weight", 4)?;
                let across = (positions - 1).isqrt();
                if across == 0 || across * across != positions - 1 || stem[1] != 3 || stem[2] != stem[3] {
                    return Err(fail(format!(
                        "patches of {stem:?} at {positions} places, expected square ones of 3 channels that fill a square"
                    )));
                }
                let whole = across * stem[2];
                // What is left over beside the patches is not seen.
                let side = config.image_size.unwrap_or(whole);
                (side, stem[2])
            }
        };
        let head = shapes.get(&format!("{}.weight", side.projection()));
        for (field, named, found) in [
            ("hidden_size", config.hidden_size, width),
            ("intermediate_size", config.intermediate_size, hidden),
            ("num_hidden_layers", config.num_hidden_layers, layers),
            (
                "patch_size",
                config.patch_size.filter(|_| side == Side::Vision),
                pieces,
            ),
            (
                "max_position_embeddings",
                config.max_position_embeddings.filter(|_| side == Side::Text),
                length,
            ),
            (
                "vocab_size",
                config.vocab_size.filter(|_| side == Side::Text),
                pieces,
            ),
        ] {
            if let Some(named) = named.filter(|&named| named != found) {
                return Err(fail(format!(
                    "{field} is {named}, expected {found} as in the tensors"
                )));
            }
        }
        if side == Side::Vision && (length / pieces).pow(2) != positions - 1 {
            return Err(fail(format!(
                "image_size is {length}, expected {} places of {pieces} pixels as in the tensors",
                positions - 1
            )));
        }
        let heads = config.num_attention_heads.unwrap_or(match side {
            Side::Vision => 12,
            Side::Text => 8,
        });
        let eps = config.layer_norm_eps.unwrap_or(1e-5);
        if heads == 0 || !width.is_multiple_of(heads) {
            return Err(fail(format!(
                "num_attention_heads is {heads}, expected a divisor of the width {width}"
            )));
        }
        if !(eps > 0.0 && eps.is_finite()) {
            return Err(fail(format!(
                "layer_norm_eps is {eps}, expected a number above zero"
            )));
        }
        let end = config.eos_token_id.unwrap_or(49407);
        Ok(Some(Self {
            trunk: Shape {
                width,
                hidden,
                heads,
                layers,
                eps,
                gelu: config.hidden_act.unwrap_or(Gelu::Quick),
                bias_kv: false,
            },
            length,
            pieces,
            projection: head.and_then(|shape| shape.first().copied()),
            end: (end != UNNAMED_END).then_some(end),
            prefix,
        }))
    }
}

/// What a tower makes of its inputs, all in f32.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// `[B, N, d]` behind the blocks; of texts behind the last norm.
    pub states: Tensor,
    /// `[B, d]`: the class token, or the token at the end of the text, behind the last norm.
    pub pooled: Tensor,
    /// `[B, projection]`, not of length one, where the tower has a projection.
    pub projected: Option<Tensor>,
}

#[derive(Clone, Debug)]
enum Stem {
    Vision { map: Map, class: Tensor, before: Norm },
    Text { words: Tensor },
}

/// One tower.
#[derive(Clone, Debug)]
pub struct Tower {
    sizes: Sizes,
    compute: DType,
    stem: Stem,
    positions: Tensor,
    trunk: Transformer,
    last: Norm,
    projection: Option<Map>,
}

impl Tower {
    /// Takes the tensors of one side from `vb`, the root of the weights in f32; products are of type `compute`.
    ///
    /// # Errors
    /// Tensors that are missing or of another shape.
    fn new(side: Side, sizes: &Sizes, compute: DType, vb: &VarBuilder) -> Result<Self> {
        let root = match sizes.prefix.strip_suffix('.') {
            Some(prefix) => vb.pp(prefix),
            None => vb.clone(),
        };
        let Shape { width, eps, .. } = sizes.trunk;
        let embeddings = root.pp("embeddings");
        let (stem, places, last) = match side {
            Side::Vision => {
                let patch = sizes.pieces;
                let weight = small((width, 3, patch, patch), "patch_embedding.weight", &embeddings)?;
                let stem = Stem::Vision {
                    map: Map::of(&weight, compute)?,
                    class: small(width, "class_embedding", &embeddings)?,
                    before: Norm::new(width, eps, &root.pp("pre_layrnorm"))?,
                };
                (stem, (sizes.length / patch).pow(2) + 1, "post_layernorm")
            }
            Side::Text => {
                let words = small((sizes.pieces, width), "token_embedding.weight", &embeddings)?;
                (Stem::Text { words }, sizes.length, "final_layer_norm")
            }
        };
        let projection = |output| Map::new(width, output, false, compute, &vb.pp(side.projection()));
        Ok(Self {
            stem,
            positions: small((places, width), "position_embedding.weight", &embeddings)?,
            trunk: Transformer::new(&sizes.trunk, Names::Separate, compute, &root.pp("encoder.layers"))?,
            last: Norm::new(width, eps, &root.pp(last))?,
            projection: sizes.projection.map(projection).transpose()?,
            sizes: sizes.clone(),
            compute,
        })
    }

    /// Pictures `[B, 3, side, side]` in f32, with CLIP's mean taken off and divided by its deviation.
    ///
    /// # Errors
    /// Pictures of another size, or a tower of texts.
    pub fn pictures(&self, pixel_values: &Tensor) -> Result<Encoded> {
        let Stem::Vision { map, class, before } = &self.stem else {
            candle_core::bail!("pictures for a tower of texts");
        };
        let side = self.sizes.length;
        if pixel_values.rank() != 4 || pixel_values.dims()[1..] != [3, side, side] {
            candle_core::bail!(
                "pixel_values of {:?}, expected [B, 3, {side}, {side}]",
                pixel_values.dims()
            );
        }
        let batch = pixel_values.dim(0)?;
        let patch = self.sizes.pieces;
        let patches = patches(&pixel_values.unsqueeze(2)?, [1, patch, patch])?.to_dtype(self.compute)?;
        let tokens = map.forward(&patches)?.to_dtype(DType::F32)?;
        let class = class
            .reshape((1, 1, ()))?
            .broadcast_as((batch, 1, self.sizes.trunk.width))?;
        let stream = Tensor::cat(&[&class, &tokens], 1)?.broadcast_add(&self.positions)?;
        let states = self
            .trunk
            .forward(&before.forward(&stream, DType::F32)?, false, None)?;
        let pooled = self
            .last
            .forward(&states.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?, DType::F32)?;
        self.encoded(states, pooled)
    }

    /// Texts: `input_ids` `[B, L]` of any integer type, and `attention_mask` `[B, L]`, zero where there is padding.
    ///
    /// # Errors
    /// Texts that are too long, ids outside the vocabulary, a mask of another shape, or a tower of pictures.
    pub fn texts(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<Encoded> {
        let Stem::Text { words } = &self.stem else {
            candle_core::bail!("texts for a tower of pictures");
        };
        let (batch, length) = input_ids.dims2()?;
        if batch == 0 || !(1..=self.sizes.length).contains(&length) {
            candle_core::bail!(
                "input_ids of [{batch}, {length}], expected 1 to {} tokens",
                self.sizes.length
            );
        }
        let rows = input_ids.to_dtype(DType::I64)?.to_vec2::<i64>()?;
        let ids: Option<Vec<u32>> = rows.iter().flatten().map(|&id| u32::try_from(id).ok()).collect();
        let Some(ids) = ids.filter(|ids| ids.iter().all(|&id| (id as usize) < self.sizes.pieces)) else {
            candle_core::bail!("input_ids, expected ids from 0 to below {}", self.sizes.pieces);
        };
        let ends = ids.chunks_exact(length).enumerate().map(|(row, ids)| {
            let wanted = self.sizes.end.or(ids.iter().max().copied());
            // A text without an end is read at its first token, as the reference does.
            let end = ids.iter().position(|&id| Some(id) == wanted).unwrap_or(0);
            (row * length + end) as u32
        });
        let ends = Tensor::from_iter(ends, words.device())?;
        let ids = Tensor::from_vec(ids, batch * length, words.device())?;
        let tokens = words
            .index_select(&ids, 0)?
            .reshape((batch, length, self.sizes.trunk.width))?;
        let stream = tokens.broadcast_add(&self.positions.narrow(0, 0, length)?)?;
        let states = self.trunk.forward(&stream, true, attention_mask)?;
        let states = self.last.forward(&states, DType::F32)?;
        let pooled = states.flatten(0, 1)?.index_select(&ends, 0)?;
        self.encoded(states, pooled)
    }

    fn encoded(&self, states: Tensor, pooled: Tensor) -> Result<Encoded> {
        let project = |map: &Map| map.forward(&pooled.to_dtype(self.compute)?)?.to_dtype(DType::F32);
        Ok(Encoded {
            projected: self.projection.as_ref().map(project).transpose()?,
            states,
            pooled,
        })
    }
}

/// Vectors `[B, d]` divided by their length.
///
/// # Errors
/// The device has no memory.
pub fn normalised(x: &Tensor) -> Result<Tensor> {
    x.broadcast_div(&x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)
}

/// A model whose towers are loaded when they are asked for.
#[derive(Debug)]
pub struct Clip {
    weights: Weights,
    origin: PathBuf,
    sizes: [Option<Sizes>; 2],
    compute: DType,
    device: Device,
    towers: [Lazy<Tower>; 2],
}

impl Clip {
    /// Opens a folder with `config.json` and weights, or one with a file of latent diffusion, or that file; no values are read. Products will be of type `compute`: f32, and on a GPU bf16 or
    /// f16.
    ///
    /// # Errors
    /// There are no weights, they are damaged or not those of CLIP, or the configuration does not agree with them.
    pub fn open(dir: &Path, compute: DType, device: &Device) -> std::result::Result<Self, LoadError> {
        let Some(mut weights) = Weights::find(dir)? else {
            return Err(LoadError::Absent { path: dir.to_owned() });
        };
        let origin = dir.join("config.json");
        let mut shapes = weights.shapes()?;
        let is_part = shapes.keys().any(|name| name.starts_with(LATENT_DIFFUSION));
        if is_part {
            weights.below(LATENT_DIFFUSION);
            shapes = weights.shapes()?;
        }
        let config = match is_part && !origin.is_file() {
            true => Config::of_shapes(&shapes),
            false => json::read(&origin)?,
        };
        let sizes = Side::BOTH.map(|side| Sizes::find(side, &config, &shapes, &origin));
        let [vision, text] = sizes;
        let sizes = [vision?, text?];
        if sizes.iter().all(Option::is_none) {
            return Err(LoadError::Config(ConfigError {
                path: weights.origin,
                detail: format!(
                    "{} tensors, expected those of CLIP, such as vision_model.{}",
                    shapes.len(),
                    Side::Vision.mark()
                ),
            }));
        }
        Ok(Self {
            weights,
            origin,
            sizes,
            compute,
            device: device.clone(),
            towers: [const { Lazy::new() }; 2],
        })
    }

    /// The sizes of a tower; `None` where the model does not have it.
    pub fn sizes(&self, side: Side) -> Option<&Sizes> {
        self.sizes[side as usize].as_ref()
    }

    /// The files of the weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// A tower, which is loaded the first time.
    ///
    /// # Errors
    /// The model does not have it, or its tensors are damaged, missing or of another shape, all of which are listed.
    pub fn tower(&self, side: Side) -> std::result::Result<Arc<Tower>, LoadError> {
        self.towers[side as usize].get(|| self.load(side))
    }

    fn load(&self, side: Side) -> std::result::Result<Tower, LoadError> {
        let Some(sizes) = self.sizes(side) else {
            return Err(LoadError::Config(ConfigError {
                path: self.origin.clone(),
                detail: format!("no {} in this model", side.model()),
            }));
        };
        let whole = self.sizes.iter().all(Option::is_some);
        let projection = format!("{}.", side.projection());
        let part = |name: &str| !whole || name.starts_with(&sizes.prefix) || name.starts_with(&projection);
        let ignored = |name: &str| name.ends_with("position_ids") || name == "logit_scale";
        let build = |compute: DType, vb: &VarBuilder| Tower::new(side, sizes, compute, vb);
        load_part(&self.weights, part, self.compute, &self.device, ignored, build)
    }

    /// Vectors of length one `[B, projection]` of pictures, as [`Tower::pictures`].
    ///
    /// # Errors
    /// As [`Self::tower`] and [`Tower::pictures`]; the tower has no projection.
    pub fn image_embeds(&self, pixel_values: &Tensor) -> std::result::Result<Tensor, LoadError> {
        let encoded = self.tower(Side::Vision)?.pictures(pixel_values)?;
        self.embeds(Side::Vision, encoded)
    }

    /// Vectors of length one `[B, projection]` of texts, as [`Tower::texts`].
    ///
    /// # Errors
    /// As [`Self::tower`] and [`Tower::texts`]; the tower has no projection.
    pub fn text_embeds(
        &self,
        input_ids: &Tensor,
        attention_mask: Option<&Tensor>,
    ) -> std::result::Result<Tensor, LoadError> {
        let encoded = self.tower(Side::Text)?.texts(input_ids, attention_mask)?;
        self.embeds(Side::Text, encoded)
    }

    fn embeds(&self, side: Side, encoded: Encoded) -> std::result::Result<Tensor, LoadError> {
        match encoded.projected {
            Some(projected) => Ok(normalised(&projected)?),
            None => Err(LoadError::Config(ConfigError {
                path: self.origin.clone(),
                detail: format!("no {} in this model", side.projection()),
            })),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_configuration_serves_a_model_and_a_tower() {
        let whole: Config = serde_json::from_str(
            r#"{"model_type": "clip", "text_config": {"num_attention_heads": 3}, "vision_config": {"hidden_act": "gelu"},
                "projection_dim": 14, "hidden_size": 9}"#,
        )
        .unwrap();
        assert_eq!(whole.of(Side::Text).num_attention_heads, Some(3));
        assert_eq!(whole.of(Side::Vision).hidden_act, Some(Gelu::Exact));
        assert_eq!(whole.of(Side::Text).hidden_size, None);
        let tower: Config =
            serde_json::from_str(r#"{"hidden_size": 9, "hidden_act": "quick_gelu"}"#).unwrap();
        assert_eq!(tower.of(Side::Text).hidden_size, Some(9));
        assert_eq!(tower.of(Side::Vision).hidden_act, Some(Gelu::Quick));
        let odd = serde_json::from_str::<Config>(r#"{"hidden_act": "relu"}"#).unwrap_err();
        assert!(odd.to_string().contains("relu"));
    }
}
