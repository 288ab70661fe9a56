//! Sizes of an ImageBind model: what its `config.json` names, and what its tensors say.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::{Modality, PREPROCESSORS, TRUNKS};
use crate::config::ConfigError;
use crate::encoders::gelu::Gelu;
use crate::encoders::transformer::Shape;

/// Added to the variance in the norms of the trunks and heads.
pub(super) const EPS: f64 = 1e-6;
/// Heads of the published model, for files without a `config.json`.
const HEADS: [usize; 3] = [16, 12, 16];
/// Step of the published audio stem, and its picture of a sound: bands and frames.
const STRIDE: usize = 10;
const BANDS: usize = 128;
const FRAMES: usize = 204;

/// Side of the pictures, patches, vocabulary and texts of the published model, and hidden widths for each of the stream.
const SIDE: usize = 224;
const PATCH: [usize; 3] = [2, 14, 14];
const KERNEL: usize = 16;
const VOCABULARY: usize = 49_408;
const CONTEXT: usize = 77;
const HIDDEN: usize = 4;
/// Widest stream and most blocks of a model that is made anew.
const MOST_WIDTH: usize = 1 << 14;
const MOST_BLOCKS: usize = 1 << 10;

/// `config.json`, with the names of the published constructor. Everything may be left out: what is there has to agree with the tensors.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Config {
    /// Width of the vision trunk.
    pub vision_embed_dim: Option<usize>,
    /// Its blocks.
    pub vision_num_blocks: Option<usize>,
    /// Its heads; 16 if absent.
    pub vision_num_heads: Option<usize>,
    /// Width of the audio trunk.
    pub audio_embed_dim: Option<usize>,
    /// Its blocks.
    pub audio_num_blocks: Option<usize>,
    /// Its heads; 12 if absent.
    pub audio_num_heads: Option<usize>,
    /// Side of an audio patch.
    pub audio_kernel_size: Option<usize>,
    /// Step from one audio patch to the next; 10 if absent.
    pub audio_stride: Option<usize>,
    /// Bands of the filterbank; 128 if absent.
    pub audio_num_mel_bins: Option<usize>,
    /// Frames of a clip of sound; 204 if absent.
    pub audio_target_len: Option<usize>,
    /// Width of the text trunk.
    pub text_embed_dim: Option<usize>,
    /// Its blocks.
    pub text_num_blocks: Option<usize>,
    /// Its heads; 16 if absent.
    pub text_num_heads: Option<usize>,
    /// Width of the common space.
    pub out_embed_dim: Option<usize>,
}

/// What a tower sees, before its trunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Pictures of this height and width, in patches of `[frames, height, width]`.
    Pictures {
        /// Height and width in pixels.
        side: usize,
        /// A patch.
        patch: [usize; 3],
    },
    /// Filterbanks of so many bands and frames.
    Sounds {
        /// Bands, from low to high.
        bands: usize,
        /// Frames.
        frames: usize,
        /// Side of a patch.
        kernel: usize,
        /// From one patch to the next.
        stride: usize,
    },
    /// Token ids.
    Texts {
        /// Pieces of the vocabulary.
        vocabulary: usize,
        /// Tokens of a text at most.
        context: usize,
    },
}

/// All sizes of one tower.
#[derive(Clone, Debug, PartialEq)]
pub struct Sizes {
    /// What it sees.
    pub input: Input,
    /// Its trunk.
    pub trunk: Shape,
    /// Width of the common space.
    pub embedding: usize,
}

type Shapes = BTreeMap<String, Vec<usize>>;

impl Config {
    fn named(&self, modality: Modality) -> [Option<usize>; 3] {
        match modality {
            Modality::Vision => [
                self.vision_embed_dim,
                self.vision_num_blocks,
                self.vision_num_heads,
            ],
            Modality::Audio => [self.audio_embed_dim, self.audio_num_blocks, self.audio_num_heads],
            Modality::Text => [self.text_embed_dim, self.text_num_blocks, self.text_num_heads],
        }
    }

    /// The sizes of a tower of a new model, whose other sizes are those of the published one; `None` where the configuration names no width of
    /// it. `origin` names the configuration in errors.
    ///
    /// # Errors
    /// Sizes that are missing or cannot be.
    pub fn fresh(&self, modality: Modality, origin: &Path) -> Result<Option<Sizes>, ConfigError> {
        let word = modality.name();
        let fail = |detail: String| ConfigError {
            path: origin.to_owned(),
            detail,
        };
        let [Some(width), layers, heads] = self.named(modality) else {
            return Ok(None);
        };
        let named = |field: String, found: Option<usize>, most: usize| match found {
            Some(found) if (1..=most).contains(&found) => Ok(found),
            Some(found) => Err(fail(format!("{field} is {found}, expected 1 to {most}"))),
            None => Err(fail(format!("{field} is missing, expected 1 to {most}"))),
        };
        named(format!("{word}_embed_dim"), Some(width), MOST_WIDTH)?;
        let layers = named(format!("{word}_num_blocks"), layers, MOST_BLOCKS)?;
        let embedding = named("out_embed_dim".to_owned(), self.out_embed_dim, MOST_WIDTH)?;
        let heads = heads.unwrap_or(HEADS[modality as usize]);
        if heads == 0 || !width.is_multiple_of(heads) {
            return Err(fail(format!(
                "{word}_num_heads is {heads}, expected a divisor of the width {width}"
            )));
        }
        let input = match modality {
            Modality::Vision => Input::Pictures {
                side: SIDE,
                patch: PATCH,
            },
            Modality::Audio => {
                let kernel = self.audio_kernel_size.unwrap_or(KERNEL);
                let stride = self.audio_stride.unwrap_or(STRIDE);
                let bands = self.audio_num_mel_bins.unwrap_or(BANDS);
                let frames = self.audio_target_len.unwrap_or(FRAMES);
                let whole = (1..=bands.min(frames).min(MOST_WIDTH)).contains(&kernel) && stride > 0;
                if !whole || bands.max(frames) > MOST_WIDTH {
                    return Err(fail(format!(
                        "audio patches of {kernel} every {stride} in {bands} x {frames}, expected ones that fit"
                    )));
                }
                Input::Sounds {
                    bands,
                    frames,
                    kernel,
                    stride,
                }
            }
            Modality::Text => Input::Texts {
                vocabulary: VOCABULARY,
                context: CONTEXT,
            },
        };
        Ok(Some(Sizes {
            input,
            embedding,
            trunk: Shape {
                width,
                hidden: HIDDEN * width,
                heads,
                layers,
                eps: EPS,
                gelu: Gelu::Exact,
                bias_kv: modality == Modality::Audio,
            },
        }))
    }

    /// The sizes of a tower whose tensors have these shapes; `origin` names the configuration in errors.
    ///
    /// # Errors
    /// Sizes of the configuration that are not those of the tensors, tensors that are missing or of another rank, heads that do not
    /// divide the width.
    pub fn sizes(&self, modality: Modality, shapes: &Shapes, origin: &Path) -> Result<Sizes, ConfigError> {
        let fail = |detail: String| ConfigError {
            path: origin.to_owned(),
            detail,
        };
        let find = |name: &str, rank: usize| -> Result<&[usize], ConfigError> {
            match shapes.get(name) {
                Some(shape) if shape.len() == rank && shape.iter().all(|&n| n > 0) => Ok(shape),
                Some(shape) => Err(fail(format!(
                    "tensor `{name}` is {shape:?}, expected {rank} dimensions, none empty"
                ))),
                None => Err(fail(format!("tensor `{name}` is missing"))),
            }
        };
        let word = modality.name();
        let trunk = format!("{TRUNKS}.{word}");
        let fc1 = find(&format!("{trunk}.blocks.0.mlp.fc1.weight"), 2)?;
        let (hidden, width) = (fc1[0], fc1[1]);
        let layers = (0..)
            .take_while(|i| shapes.contains_key(&format!("{trunk}.blocks.{i}.mlp.fc1.weight")))
            .count();
        let head = match modality {
            Modality::Text => format!("modality_heads.{word}.proj.1.weight"),
            _ => format!("modality_heads.{word}.2.weight"),
        };
        let embedding = find(&head, 2)?[0];
        let [named_width, named_layers, named_heads] = self.named(modality);
        let agree = |field: String, named: Option<usize>, found: usize| match named {
            Some(named) if named != found => Err(fail(format!(
                "{field} is {named}, expected {found} as in the tensors"
            ))),
            _ => Ok(()),
        };
        agree(format!("{word}_embed_dim"), named_width, width)?;
        agree(format!("{word}_num_blocks"), named_layers, layers)?;
        agree("out_embed_dim".to_owned(), self.out_embed_dim, embedding)?;
        let heads = named_heads.unwrap_or(HEADS[modality as usize]);
        if heads == 0 || !width.is_multiple_of(heads) {
            return Err(fail(format!(
                "{word}_num_heads is {heads}, expected a divisor of the width {width}"
            )));
        }
        let input = match modality {
            Modality::Vision => {
                let stem = find(&format!("{PREPROCESSORS}.vision.rgbt_stem.proj.1.weight"), 5)?;
                let tokens = find(
                    &format!("{PREPROCESSORS}.vision.pos_embedding_helper.pos_embed"),
                    3,
                )?[1]
                    - 1;
                let across = tokens.isqrt();
                if across * across != tokens || tokens == 0 || stem[1] != 3 || stem[3] != stem[4] {
                    return Err(fail(format!(
                        "vision patches of {stem:?} at {tokens} places, expected square ones of 3 channels that fill a square"
                    )));
                }
                Input::Pictures {
                    side: across * stem[3],
                    patch: [stem[2], stem[3], stem[4]],
                }
            }
            Modality::Audio => {
                let stem = find(&format!("{PREPROCESSORS}.audio.rgbt_stem.proj.weight"), 4)?;
                let places = find(
                    &format!("{PREPROCESSORS}.audio.pos_embedding_helper.pos_embed"),
                    3,
                )?[1]
                    - 1;
                agree("audio_kernel_size".to_owned(), self.audio_kernel_size, stem[2])?;
                let stride = self.audio_stride.unwrap_or(STRIDE);
                let bands = self.audio_num_mel_bins.unwrap_or(BANDS);
                let frames = self.audio_target_len.unwrap_or(FRAMES);
                let kernel = stem[2];
                let fits = stem[1] == 1
                    && kernel == stem[3]
                    && stride > 0
                    && bands >= kernel
                    && frames >= kernel
                    && ((bands - kernel) / stride + 1).checked_mul((frames - kernel) / stride + 1)
                        == Some(places);
                if !fits {
                    return Err(fail(format!(
                        "audio_num_mel_bins {bands}, audio_target_len {frames}, audio_stride {stride} and patches of {stem:?} do \
                         not give the {places} places of the tensors"
                    )));
                }
                Input::Sounds {
                    bands,
                    frames,
                    kernel,
                    stride,
                }
            }
            Modality::Text => Input::Texts {
                vocabulary: find(&format!("{PREPROCESSORS}.text.token_embedding.weight"), 2)?[0],
                context: find(&format!("{PREPROCESSORS}.text.pos_embed"), 3)?[1],
            },
        };
        Ok(Sizes {
            input,
            embedding,
            trunk: Shape {
                width,
                hidden,
                heads,
                layers,
                eps: EPS,
                gelu: Gelu::Exact,
                bias_kv: modality == Modality::Audio,
            },
        })
    }
}
