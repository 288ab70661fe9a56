//! Texts as the networks read them: the states of CLIP behind its last norm, those of padding included.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use fulgur_lightnet::encoders::clip::{Clip, Side};
use fulgur_lightnet::encoders::clip_tokenizer::ClipTokenizer;
use fulgur_lightnet::params::file::read_bounded;
use serde::Deserialize;

use super::places::{Piece, Places};
use super::request::PublishedRequest;
use crate::error::Error;

/// What pads a text where the vocabulary does not say otherwise: the end again, as in Stable Diffusion 1.x.
const PADDING: &str = "<|endoftext|>";
/// Says what pads a text.
const SPECIAL: &str = "special_tokens_map.json";
const LONGEST_MAP: u64 = 1 << 20;

/// A special token, as it is or with more words about it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Token {
    Plain(String),
    Described { content: String },
}

#[derive(Default, Deserialize)]
struct SpecialTokens {
    pad_token: Option<Token>,
}

/// States of a text for both streams, and of what each keeps away from, `[1, L, c]`.
pub(super) struct Texts {
    pub(super) prompt: Tensor,
    pub(super) negative: Tensor,
    /// Where it is another one.
    pub(super) audio_negative: Option<Tensor>,
}

impl Texts {
    /// Loads the encoder, reads the texts of `request`, and frees it.
    pub(super) fn read(
        places: &Places,
        request: &PublishedRequest,
        compute: DType,
        device: &Device,
    ) -> Result<Self, Error> {
        let encoder_dir = places.require(Piece::TextEncoder, "texts")?;
        // Some folders hold the vocabulary beside the weights.
        let vocabulary_dir = places.find(Piece::Tokenizer).unwrap_or(encoder_dir);
        let vocabulary = ClipTokenizer::find(vocabulary_dir)?;
        let padding = padding(vocabulary_dir)?;
        let clip = Clip::open(encoder_dir, compute, device)?;
        let Some(length) = clip.sizes(Side::Text).map(|sizes| sizes.length) else {
            return Err(Error::model(
                encoder_dir,
                "found no text_model, expected CLIP of texts",
            ));
        };
        let fields: [(&'static str, Option<&String>); 3] = [
            ("prompt", Some(&request.prompt)),
            ("negative-prompt", Some(&request.negative_prompt)),
            ("audio-negative-prompt", request.audio_negative_prompt.as_ref()),
        ];
        // Too long a text is found before the weights are read.
        let mut ids = Vec::new();
        for (field, text) in fields {
            let Some(text) = text else { continue };
            let pieces = vocabulary.pieces_of(text)?.len();
            if pieces + 2 > length {
                let expected = format!("at most {length} with start and end");
                return Err(Error::request(field, format!("{} tokens", pieces + 2), expected));
            }
            ids.push(vocabulary.padded(&[text.as_str()], length, &padding, device)?.ids);
        }
        let tower = clip.tower(Side::Text)?;
        let mut states = ids.iter().map(|ids| Ok(tower.texts(ids, None)?.states));
        let mut next = || {
            states
                .next()
                .unwrap_or_else(|| Err(Error::request("prompt", "none", "a text")))
        };
        Ok(Self {
            prompt: next()?,
            negative: next()?,
            audio_negative: match request.audio_negative_prompt {
                Some(_) => Some(next()?),
                None => None,
            },
        })
    }
}

/// The token that pads texts.
fn padding(dir: &Path) -> Result<String, Error> {
    let path = dir.join(SPECIAL);
    if !path.is_file() {
        return Ok(PADDING.to_owned());
    }
    let bytes = read_bounded(&path, LONGEST_MAP)?;
    let map: SpecialTokens = serde_json::from_slice(&bytes).map_err(|error| Error::model(&path, error))?;
    Ok(match map.pad_token {
        Some(Token::Plain(token) | Token::Described { content: token }) => token,
        None => PADDING.to_owned(),
    })
}
