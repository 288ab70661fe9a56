//! Published generators of random weights, of any size: for measures and tests. What they make means nothing.
//!
//! A configuration names the parts as `model_index.json` does, each with what its own `config.json` would say; what it does not name is as
//! published. Weights depend on the seed and their names alone.

use std::collections::BTreeMap;

use candle_core::{Device, Result, Tensor, bail};
use fulgur_kernels::philox::{Philox, stream_of};
use fulgur_lightnet::params::Outline;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::places::Piece;
use crate::published::limits::{MOST_CHANNELS, MOST_LAYERS, within};
use crate::published::{AutoencoderKl, Half, HifiGan, TavUnet, Unet};

/// The published configurations, by the folders of the parts.
const PUBLISHED: &str = include_str!("published.json");
/// Letters of bytes, alone and at the end of a word.
const LETTERS: usize = 512;
/// Deviation of gains around one, and of biases around zero.
const AROUND: f32 = 0.1;
/// Deviation of embeddings.
const EMBEDDED: f32 = 0.5;
/// Over the root of the inputs: the deviation of matrices and kernels.
const GAIN: f32 = 0.8;

/// A part before its weights are drawn.
#[derive(Clone, Debug)]
pub struct RandomPart {
    /// Which.
    pub piece: Piece,
    /// Its `config.json`, or for the schedule its own file.
    pub config: Value,
    /// Its tensors; none for the schedule.
    pub shapes: BTreeMap<String, Vec<usize>>,
}

fn published() -> Result<Map<String, Value>> {
    serde_json::from_str(PUBLISHED).map_err(candle_core::Error::wrap)
}

/// The published `config.json` of a part, by the name of its folder.
pub(in crate::published) fn published_config(folder: &str) -> Result<Value> {
    match published()?.remove(folder) {
        Some(config) => Ok(config),
        None => bail!("{folder}: there is no published configuration"),
    }
}

/// The parts of the generator that `config` describes.
///
/// # Errors
/// A part that is not understood.
pub fn random_parts(config: &Map<String, Value>) -> Result<Vec<RandomPart>> {
    let published = published()?;
    let mut parts = Vec::new();
    for piece in Piece::ALL {
        let own = config.get(piece.folder());
        let Some(config) = own.or_else(|| published.get(piece.folder())) else {
            continue;
        };
        if config.is_null() {
            continue;
        }
        if !config.is_object() {
            bail!(
                "{} is {config}, expected what its config.json says, or null",
                piece.folder()
            );
        }
        let shapes = shapes(piece, config).map_err(|error| {
            let words = error.to_string();
            candle_core::Error::msg(format!(
                "{}: {}",
                piece.folder(),
                words.lines().next().unwrap_or_default()
            ))
        })?;
        parts.push(RandomPart {
            piece,
            config: config.clone(),
            shapes,
        });
    }
    Ok(parts)
}

fn shapes(piece: Piece, config: &Value) -> Result<BTreeMap<String, Vec<usize>>> {
    let outline = Outline::new();
    let vb = outline.builder();
    match piece {
        Piece::TextEncoder => return text(config),
        Piece::Scheduler => {}
        Piece::Unet | Piece::AudioUnet => match config["_class_name"].as_str() {
            Some("TavDiffusionUnet") => drop(TavUnet::new(&parsed(config)?, &vb)?),
            Some("UNetMotionModel") => drop(Unet::over_clips(&parsed(config)?, &vb)?),
            Some("UNet2DConditionModel") => drop(Unet::new(&parsed(config)?, &vb)?),
            _ => bail!(
                "_class_name is {}, expected TavDiffusionUnet, UNetMotionModel or UNet2DConditionModel",
                config["_class_name"]
            ),
        },
        Piece::Vae | Piece::AudioVae => {
            drop(AutoencoderKl::new(
                &parsed(config)?,
                &[Half::Encoder, Half::Decoder],
                &vb,
            )?);
        }
        Piece::Vocoder => drop(HifiGan::new(&parsed(config)?, &vb)?),
        Piece::Tokenizer | Piece::MotionAdapter | Piece::Fusion => {
            bail!("made of no configuration, expected TavDiffusionUnet or UNetMotionModel as unet")
        }
    }
    Ok(outline.shapes())
}

fn parsed<C: DeserializeOwned>(config: &Value) -> Result<C> {
    serde_json::from_value(config.clone()).map_err(candle_core::Error::wrap)
}

/// The tensors of a CLIP of texts.
fn text(config: &Value) -> Result<BTreeMap<String, Vec<usize>>> {
    let size = |field: &str, most: usize| {
        let found = config[field].as_u64().and_then(|n| usize::try_from(n).ok());
        let Some(found) = found else {
            bail!("{field} is {}, expected a number", config[field])
        };
        within(field, found, most)?;
        Ok(found)
    };
    let (pieces, width) = (size("vocab_size", 1 << 20)?, size("hidden_size", MOST_CHANNELS)?);
    if pieces < LETTERS + 2 {
        bail!(
            "vocab_size is {pieces}, expected at least {} for bytes, start and end",
            LETTERS + 2
        );
    }
    let inner = size("intermediate_size", 4 * MOST_CHANNELS)?;
    let mut shapes = BTreeMap::from([
        (
            "embeddings.token_embedding.weight".to_owned(),
            vec![pieces, width],
        ),
        (
            "embeddings.position_embedding.weight".to_owned(),
            vec![size("max_position_embeddings", 1 << 16)?, width],
        ),
    ]);
    let mut vector = |name: String, width: usize| {
        for part in ["weight", "bias"] {
            shapes.insert(format!("{name}.{part}"), vec![width]);
        }
    };
    let layers = size("num_hidden_layers", MOST_LAYERS)?;
    for i in 0..layers {
        vector(format!("encoder.layers.{i}.layer_norm1"), width);
        vector(format!("encoder.layers.{i}.layer_norm2"), width);
    }
    vector("final_layer_norm".to_owned(), width);
    for i in 0..layers {
        for (name, output, input) in [
            ("self_attn.q_proj", width, width),
            ("self_attn.k_proj", width, width),
            ("self_attn.v_proj", width, width),
            ("self_attn.out_proj", width, width),
            ("mlp.fc1", inner, width),
            ("mlp.fc2", width, inner),
        ] {
            shapes.insert(format!("encoder.layers.{i}.{name}.weight"), vec![output, input]);
            shapes.insert(format!("encoder.layers.{i}.{name}.bias"), vec![output]);
        }
    }
    Ok(shapes
        .into_iter()
        .map(|(name, shape)| (format!("text_model.{name}"), shape))
        .collect())
}

/// Weights of these names and shapes, each drawn from `seed` and its name: gains around one, biases around zero, and matrices that keep
/// the size of what they map.
///
/// # Errors
/// No memory.
pub fn random_weights(shapes: &BTreeMap<String, Vec<usize>>, seed: u64) -> Result<BTreeMap<String, Tensor>> {
    let mut weights = BTreeMap::new();
    for (name, shape) in shapes {
        let gain = name.ends_with("weight") || name.ends_with("scale");
        let (mean, deviation) = match shape.len() {
            0 | 1 => (if gain { 1.0 } else { 0.0 }, AROUND),
            _ if name.contains("_embedding.weight") => (0.0, EMBEDDED),
            _ => {
                let inputs: usize = shape[1..].iter().product();
                (0.0, GAIN / (inputs.max(1) as f32).sqrt())
            }
        };
        let count = shape.iter().product();
        let values = Philox::fill(seed, stream_of(name), count, |random| {
            mean + deviation * random.normal()
        });
        weights.insert(
            name.clone(),
            Tensor::from_vec(values, shape.as_slice(), &Device::Cpu)?,
        );
    }
    Ok(weights)
}

/// `vocab.json` of a vocabulary of single letters, for `pieces` ids: the last two are start and end, as in CLIP's own. There are no merges.
#[must_use]
pub fn letters(pieces: usize) -> Value {
    // Bytes that can be seen stand for themselves, the others for letters from 256 on.
    let seen = |byte: &u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let hidden = (0..256u32).filter(|byte| !seen(byte)).count() as u32;
    let all: Vec<char> = (0..256)
        .filter(seen)
        .chain(256..256 + hidden)
        .filter_map(char::from_u32)
        .collect();
    let single = all.iter().map(char::to_string);
    let last = all.iter().map(|letter| format!("{letter}</w>"));
    let mut ids: Map<String, Value> = single
        .chain(last)
        .enumerate()
        .map(|(id, letter)| (letter, id.into()))
        .collect();
    for (mark, id) in [("<|startoftext|>", pieces - 2), ("<|endoftext|>", pieces - 1)] {
        ids.insert(mark.to_owned(), id.into());
    }
    Value::Object(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_parts_have_their_sizes() -> Result<()> {
        let parts = random_parts(&Map::new())?;
        let count = |piece: Piece| {
            let part = parts.iter().find(|part| part.piece == piece);
            let shapes = part.map(|part| &part.shapes).into_iter().flatten();
            shapes
                .map(|(_, shape)| shape.iter().product::<usize>())
                .sum::<usize>()
        };
        // Published counts: CLIP ViT-L/14 of texts, the autoencoder of Stable Diffusion, the vocoder of AudioLDM.
        assert_eq!(count(Piece::TextEncoder), 123_060_480);
        assert_eq!(count(Piece::Vae), 83_653_863);
        assert_eq!(count(Piece::Scheduler), 0);
        let unet = parts.iter().find(|part| part.piece == Piece::Unet);
        let shapes = unet.map(|part| part.shapes.clone()).unwrap_or_default();
        let below = |first: &str| -> usize {
            let own = shapes.iter().filter(|(name, _)| name.starts_with(first));
            own.map(|(_, shape)| shape.iter().product::<usize>()).sum()
        };
        assert_eq!(below("cross_attn."), 6_558_720);
        let motion: usize = shapes
            .iter()
            .filter(|(name, _)| name.contains(".motion_modules."))
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        // Stable Diffusion 1.5 and AnimateDiff's first modules, without their tables of places.
        let sound = below("audio_unet.");
        assert_eq!(below("") - below("cross_attn.") - sound - motion, 859_520_964);
        assert_eq!(motion, 417_137_600);
        Ok(())
    }

    #[test]
    fn parts_are_left_out_or_refused() {
        let of = |text: &str| random_parts(&serde_json::from_str(text).unwrap());
        let parts = of(r#"{"unet": null, "vae": null, "width": 8}"#).unwrap();
        assert!(
            parts
                .iter()
                .all(|part| !matches!(part.piece, Piece::Unet | Piece::Vae))
        );
        for (text, words) in [
            (r#"{"unet": {}}"#, "unet: _class_name is null"),
            (
                r#"{"vae": 3}"#,
                "vae is 3, expected what its config.json says, or null",
            ),
            (
                r#"{"vae": {"layers_per_block": 0}}"#,
                "vae: layers_per_block is 0",
            ),
            (
                r#"{"text_encoder": {"vocab_size": 99}}"#,
                "text_encoder: hidden_size is null",
            ),
            (
                r#"{"text_encoder": {"vocab_size": 99, "hidden_size": 8}}"#,
                "vocab_size is 99, expected at least 514",
            ),
            (r#"{"fusion": {}}"#, "fusion: made of no configuration"),
        ] {
            let words_found = of(text).unwrap_err().to_string();
            let line = words_found.lines().next().unwrap_or_default();
            assert!(line.contains(words), "{words}: {line}");
        }
    }

    #[test]
    fn weights_depend_on_seed_and_name() -> Result<()> {
        let shapes = BTreeMap::from([
            ("a.weight".to_owned(), vec![50, 40]),
            ("b.weight".to_owned(), vec![300]),
        ]);
        let (first, second) = (random_weights(&shapes, 1)?, random_weights(&shapes, 2)?);
        let values = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
        assert_eq!(
            values(&first["a.weight"])?,
            values(&random_weights(&shapes, 1)?["a.weight"])?
        );
        assert_ne!(values(&first["a.weight"])?, values(&second["a.weight"])?);
        let mean = values(&first["b.weight"])?.iter().sum::<f32>() / 300.0;
        assert!((mean - 1.0).abs() < 0.03, "{mean}");
        Ok(())
    }
}
