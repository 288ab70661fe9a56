//! One tower: stem, positions, trunk and head, with the names of the published checkpoint.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::config::{EPS, Input, Sizes};
use super::{HEADS, Modality, POSTPROCESSORS, PREPROCESSORS, TRUNKS};
use crate::encoders::transformer::{Map, Names, Norm, Transformer, patches, small, unit};

/// Added to the variance in the norm behind the audio stem.
const STEM_EPS: f64 = 1e-5;
/// Lengths below this are taken for this.
const LEAST: f64 = 1e-12;
/// Logarithms of the scales where the checkpoint has none: 20 for sounds, 1 / 0.07 for texts.
const AUDIO_SCALE: f64 = 20.0;
const TEXT_SCALE: f64 = 1.0 / 0.07;
/// Largest scale.
const MOST_SCALE: f64 = 100.0;

#[derive(Clone, Debug)]
enum Stem {
    /// Patches of clips, and of still pictures, all of whose frames are the same.
    Vision {
        clip: Map,
        still: Map,
        class: Tensor,
    },
    Audio {
        map: Map,
        norm: Norm,
        class: Tensor,
    },
    Text {
        words: Tensor,
    },
}

/// A network from preprocessed inputs to vectors of the common space.
#[derive(Clone, Debug)]
pub struct Tower {
    sizes: Sizes,
    compute: DType,
    stem: Stem,
    positions: Tensor,
    before: Option<Norm>,
    trunk: Transformer,
    norm: Norm,
    head: Map,
    scale: f64,
}

impl Tower {
    /// Takes the tensors of one modality from `vb`, the root of the checkpoint in f32; products are of type `compute`.
    ///
    /// # Errors
    /// Tensors that are missing or of another shape.
    pub fn new(modality: Modality, sizes: &Sizes, compute: DType, vb: &VarBuilder) -> Result<Self> {
        let width = sizes.trunk.width;
        let part = |group: &str| vb.pp(group).pp(modality.name());
        let (pre, trunk, head) = (part(PREPROCESSORS), part(TRUNKS), part(HEADS));
        let (stem, positions) = match sizes.input {
            Input::Pictures { side, patch } => {
                let [t, h, w] = patch;
                let weight = small((width, 3, t, h, w), "rgbt_stem.proj.1.weight", &pre)?;
                let places = (side / h) * (side / w);
                let stem = Stem::Vision {
                    clip: Map::of(&weight, compute)?,
                    still: Map::of(&weight.sum(2)?, compute)?,
                    class: small((1, 1, width), "cls_token", &pre)?,
                };
                (
                    stem,
                    small((1, places + 1, width), "pos_embedding_helper.pos_embed", &pre)?,
                )
            }
            Input::Sounds {
                bands,
                frames,
                kernel,
                stride,
            } => {
                let weight = small((width, 1, kernel, kernel), "rgbt_stem.proj.weight", &pre)?;
                let places = ((bands - kernel) / stride + 1) * ((frames - kernel) / stride + 1);
                let stem = Stem::Audio {
                    map: Map::of(&weight, compute)?,
                    norm: Norm::new(width, STEM_EPS, &pre.pp("rgbt_stem.norm_layer"))?,
                    class: small((1, 1, width), "cls_token", &pre)?,
                };
                (
                    stem,
                    small((1, places + 1, width), "pos_embedding_helper.pos_embed", &pre)?,
                )
            }
            Input::Texts { vocabulary, context } => {
                let words = small((vocabulary, width), "token_embedding.weight", &pre)?;
                (
                    Stem::Text { words },
                    small((1, context, width), "pos_embed", &pre)?,
                )
            }
        };
        let before = match modality {
            Modality::Vision => Some(Norm::new(width, EPS, &trunk.pp("pre_transformer_layer.0"))?),
            _ => None,
        };
        let [norm, out] = match modality {
            Modality::Text => ["proj.0", "proj.1"],
            _ => ["0", "2"],
        };
        let post = vb.pp(POSTPROCESSORS).pp(modality.name());
        let scale = match modality {
            Modality::Vision => 1.0,
            Modality::Audio => scale(&post, AUDIO_SCALE)?,
            Modality::Text => scale(&post, TEXT_SCALE)?,
        };
        Ok(Self {
            stem,
            positions,
            before,
            trunk: Transformer::new(&sizes.trunk, Names::Packed, compute, &trunk.pp("blocks"))?,
            norm: Norm::new(width, EPS, &head.pp(norm))?,
            head: Map::new(width, sizes.embedding, false, compute, &head.pp(out))?,
            scale,
            sizes: sizes.clone(),
            compute,
        })
    }

    /// What it takes, and the width of what it gives.
    pub fn sizes(&self) -> &Sizes {
        &self.sizes
    }

    /// Vectors `[B, embedding]` in f32, of unit length times the scale of the modality.
    ///
    /// Pictures are `[B, 3, H, W]` or clips `[B, 3, T, H, W]` in f32, sounds `[B, 1, bands, frames]` in f32, texts `[B, L]` ids of any
    /// integer type. Several clips `[B, S, 3, T, H, W]`, pictures `[B, S, 3, H, W]` or sounds `[B, S, 1, bands, frames]` give the mean
    /// of their vectors.
    ///
    /// # Errors
    /// Inputs of other shapes, or ids outside the vocabulary.
    pub fn embed(&self, x: &Tensor) -> Result<Tensor> {
        let dims = x.dims();
        let several = match self.sizes.input {
            Input::Texts { .. } => false,
            Input::Sounds { .. } => dims.len() == 5,
            // A clip alone has its channels where several clips have their number.
            Input::Pictures { patch: [t, ..], .. } => {
                dims.len() == 6 || (dims.len() == 5 && !(dims[1] == 3 && dims[2] == t && t != 3))
            }
        };
        if !several {
            return self.one_each(x);
        }
        let (batch, clips) = (dims[0], dims[1]);
        let vectors = self.one_each(&x.flatten(0, 1)?)?;
        vectors.reshape((batch, clips, self.sizes.embedding))?.mean(1)
    }

    fn one_each(&self, x: &Tensor) -> Result<Tensor> {
        let (tokens, ends) = self.tokens(x)?;
        let mut stream = tokens.broadcast_add(&self.positions.narrow(1, 0, tokens.dim(1)?)?)?;
        if let Some(norm) = &self.before {
            stream = norm.forward(&stream, DType::F32)?;
        }
        let stream = self.trunk.forward(&stream, ends.is_some(), None)?;
        let picked = match ends {
            None => stream.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?,
            Some(places) => stream.flatten(0, 1)?.index_select(&places, 0)?,
        };
        let vectors = self.head.forward(&self.norm.forward(&picked, self.compute)?)?;
        unit(&vectors.to_dtype(DType::F32)?, LEAST)? * self.scale
    }

    /// The stream before positions, `[B, N, d]` in f32; of texts also the places `[B]` of their ends among all tokens.
    fn tokens(&self, x: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let wrong = |expected: String| {
            let found = x.dims();
            Err(candle_core::Error::Msg(format!(
                "an input of {found:?}, expected {expected}"
            )))
        };
        match (&self.stem, &self.sizes.input) {
            (Stem::Vision { clip, still, class }, &Input::Pictures { side, patch }) => {
                let [frames, high, wide] = patch;
                let map = match *x.dims() {
                    [_, 3, h, w] if h == side && w == side => still,
                    [_, 3, t, h, w] if t == frames && h == side && w == side => clip,
                    _ => {
                        return wrong(format!(
                            "[B, 3, {side}, {side}] or [B, 3, {frames}, {side}, {side}]"
                        ));
                    }
                };
                let (x, frames) = match x.rank() {
                    4 => (x.unsqueeze(2)?, 1),
                    _ => (x.clone(), frames),
                };
                let patches = patches(&x, [frames, high, wide])?.to_dtype(self.compute)?;
                Ok((
                    behind(class, &map.forward(&patches)?.to_dtype(DType::F32)?)?,
                    None,
                ))
            }
            (
                Stem::Audio { map, norm, class },
                &Input::Sounds {
                    bands,
                    frames,
                    kernel,
                    stride,
                },
            ) => {
                if x.rank() != 4 || x.dims()[1..] != [1, bands, frames] {
                    return wrong(format!("[B, 1, {bands}, {frames}]"));
                }
                let patches = overlapping(x, kernel, stride)?.to_dtype(self.compute)?;
                let tokens = norm.forward(&map.forward(&patches)?.to_dtype(DType::F32)?, DType::F32)?;
                Ok((behind(class, &tokens)?, None))
            }
            (Stem::Text { words }, &Input::Texts { vocabulary, context }) => {
                let (batch, length) = match *x.dims() {
                    [batch, length] if batch > 0 && (1..=context).contains(&length) => (batch, length),
                    _ => return wrong(format!("[B, L] with L up to {context}")),
                };
                let rows = x.to_dtype(DType::I64)?.to_vec2::<i64>()?;
                let ids: Option<Vec<u32>> = rows.iter().flatten().map(|&id| u32::try_from(id).ok()).collect();
                let Some(ids) = ids.filter(|ids| ids.iter().all(|&id| (id as usize) < vocabulary)) else {
                    candle_core::bail!("token ids, expected 0 to below {vocabulary}");
                };
                // The end of a text is the largest id of the vocabulary.
                let ends = ids.chunks_exact(length).enumerate().map(|(row, ids)| {
                    let largest = ids.iter().max();
                    let end = ids.iter().position(|id| Some(id) == largest).unwrap_or_default();
                    (row * length + end) as u32
                });
                let ends = Tensor::from_iter(ends, words.device())?;
                let ids = Tensor::from_vec(ids, batch * length, words.device())?;
                let tokens = words.index_select(&ids, 0)?;
                Ok((
                    tokens.reshape((batch, length, words.dim(D::Minus1)?))?,
                    Some(ends),
                ))
            }
            _ => candle_core::bail!("a stem of another input"),
        }
    }
}

/// Tokens `[B, N, d]` behind the learned one `[1, 1, d]`.
fn behind(class: &Tensor, tokens: &Tensor) -> Result<Tensor> {
    let (batch, _, width) = tokens.dims3()?;
    Tensor::cat(&[&class.broadcast_as((batch, 1, width))?, tokens], 1)
}

/// Square patches of `[B, 1, H, W]` that begin every `stride` rows and columns: `[B, places, kernel^2]`.
fn overlapping(x: &Tensor, kernel: usize, stride: usize) -> Result<Tensor> {
    let (batch, _, height, width) = x.dims4()?;
    let places = |side: usize| (side - kernel) / stride + 1;
    let lines = |side: usize| {
        let at = (0..places(side)).flat_map(|i| (0..kernel).map(move |j| (i * stride + j) as u32));
        Tensor::from_iter(at, x.device())
    };
    x.squeeze(1)?
        .contiguous()?
        .index_select(&lines(height)?, 1)?
        .index_select(&lines(width)?, 2)?
        .reshape((batch, places(height), kernel, places(width), kernel))?
        .transpose(2, 3)?
        .contiguous()?
        .reshape((batch, places(height) * places(width), kernel * kernel))
}

/// The exponential of the logarithm that the checkpoint has, limited.
fn scale(post: &VarBuilder, absent: f64) -> Result<f64> {
    const NAME: &str = "1.log_logit_scale";
    if !post.contains_tensor(NAME) {
        return Ok(absent);
    }
    let init = Init::Const(absent.ln());
    let log: f32 = post.get_with_hints((), NAME, init)?.to_scalar()?;
    Ok(f64::from(log).exp().min(MOST_SCALE))
}
