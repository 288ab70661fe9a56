//! Texts as the networks read them: the states of CLIP behind its last norm, those of padding included, or those of the text encoder of the
//! builtin generator, with zeros behind the end.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Result as CandleResult, Tensor};
use fulgur_lightnet::config;
use fulgur_lightnet::encoders::clip::{Clip, Side, Tower};
use fulgur_lightnet::encoders::clip_tokenizer::ClipTokenizer;
use fulgur_lightnet::params::file::read_bounded;
use serde::Deserialize;

use super::places::{Piece, Places};
use super::request::PublishedRequest;
use crate::error::Error;
use crate::text::{TextConfig, TextModel};

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

/// Tells the text encoder of the builtin generator from CLIP.
#[derive(Deserialize)]
struct Marks {
    model_type: Option<String>,
}

enum Kind {
    Clip {
        vocabulary: Box<ClipTokenizer>,
        padding: String,
        tower: Arc<Tower>,
    },
    Own(Box<TextModel>),
}

/// The text encoder of a generator's folder with its vocabulary.
pub struct Words {
    kind: Kind,
    length: usize,
    device: Device,
}

impl std::fmt::Debug for Words {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Words({} pieces)", self.length)
    }
}

impl Words {
    /// Loads them onto `device`; products of CLIP are of type `compute`.
    ///
    /// # Errors
    /// No encoder or vocabulary, or damaged ones.
    pub fn load(places: &Places, compute: DType, device: &Device) -> Result<Self, Error> {
        let unread = Unread::find(places)?;
        unread.load(compute, device)
    }

    /// Width c of the states, before weights are read.
    ///
    /// # Errors
    /// No encoder, or a configuration that is not understood.
    pub fn width_in(places: &Places) -> Result<usize, Error> {
        let Unread { encoder, clip } = Unread::find(places)?;
        if clip.is_none() {
            return Ok(TextConfig::read(&encoder)?.hidden_size);
        }
        match Clip::open(&encoder, DType::F32, &Device::Cpu)?.sizes(Side::Text) {
            Some(sizes) => Ok(sizes.trunk.width),
            None => Err(Error::model(
                &encoder,
                "found no text_model, expected CLIP of texts",
            )),
        }
    }

    /// States `[N, L, c]` of N texts; L is the same for all texts. What is too long is cut off.
    ///
    /// # Errors
    /// A vocabulary that cannot express a text, or a failing operation.
    pub fn states<S: AsRef<str>>(&self, texts: &[S]) -> Result<Tensor, Error> {
        match &self.kind {
            Kind::Clip {
                vocabulary,
                padding,
                tower,
            } => {
                let ids = vocabulary.padded(texts, self.length, padding, &self.device)?.ids;
                Ok(tower.texts(&ids, None)?.states.detach())
            }
            Kind::Own(model) => {
                let states = model.encode(texts)?.states.detach();
                Ok(padded(&states, self.length)?)
            }
        }
    }
}

fn padded(states: &Tensor, length: usize) -> CandleResult<Tensor> {
    states.pad_with_zeros(1, 0, length.saturating_sub(states.dim(1)?))
}

/// As [`Words`], before weights are read.
struct Unread {
    encoder: PathBuf,
    /// None of the builtin generator's.
    clip: Option<(ClipTokenizer, String)>,
}

impl Unread {
    fn find(places: &Places) -> Result<Self, Error> {
        let encoder = places.require(Piece::TextEncoder, "texts")?.to_owned();
        let path = encoder.join("config.json");
        if path.is_file() {
            let marks: Marks = config::read(&path)?;
            if marks.model_type.as_deref() == Some(TextConfig::default().model_type.as_str()) {
                return Ok(Self { encoder, clip: None });
            }
        }
        // Some folders hold the vocabulary beside the weights.
        let vocabulary = places.find(Piece::Tokenizer).unwrap_or(&encoder);
        let clip = (ClipTokenizer::find(vocabulary)?, padding(vocabulary)?);
        Ok(Self {
            encoder,
            clip: Some(clip),
        })
    }

    fn load(self, compute: DType, device: &Device) -> Result<Words, Error> {
        let Some((vocabulary, padding)) = self.clip else {
            let model = TextModel::load(&self.encoder, device)?;
            return Ok(Words {
                length: model.encoder().config().max_position_embeddings,
                kind: Kind::Own(Box::new(model)),
                device: device.clone(),
            });
        };
        let clip = Clip::open(&self.encoder, compute, device)?;
        let length = length(&self.encoder, &clip)?;
        Ok(Words {
            kind: Kind::Clip {
                vocabulary: Box::new(vocabulary),
                padding,
                tower: clip.tower(Side::Text)?,
            },
            length,
            device: device.clone(),
        })
    }
}

/// Most pieces of a text with start and end.
fn length(dir: &Path, clip: &Clip) -> Result<usize, Error> {
    match clip.sizes(Side::Text) {
        Some(sizes) => Ok(sizes.length),
        None => Err(Error::model(dir, "found no text_model, expected CLIP of texts")),
    }
}

/// States of the texts of N clips for both streams, and of what each keeps away from, `[N, L, c]`.
pub(super) struct Texts {
    pub(super) prompt: Tensor,
    pub(super) negative: Tensor,
    /// Where it is another one.
    pub(super) audio_negative: Option<Tensor>,
}

impl Texts {
    /// Loads the encoder, reads the texts of `requests`, and frees it.
    pub(super) fn read(
        places: &Places,
        requests: &[PublishedRequest],
        compute: DType,
        device: &Device,
    ) -> Result<Self, Error> {
        let unread = Unread::find(places)?;
        // Too long a text is found before the weights are read.
        if let Some((vocabulary, _)) = &unread.clip {
            let length = length(&unread.encoder, &Clip::open(&unread.encoder, compute, device)?)?;
            for request in requests {
                fits(vocabulary, length, request)?;
            }
        }
        let words = unread.load(compute, device)?;
        let read = |of: &dyn Fn(&PublishedRequest) -> String| {
            words.states(&requests.iter().map(of).collect::<Vec<_>>())
        };
        let apart = requests
            .iter()
            .any(|request| request.audio_negative_prompt.is_some());
        let heard = |request: &PublishedRequest| match &request.audio_negative_prompt {
            Some(own) => own.clone(),
            None => request.negative_prompt.clone(),
        };
        Ok(Self {
            prompt: read(&|request| request.prompt.clone())?,
            negative: read(&|request| request.negative_prompt.clone())?,
            audio_negative: apart.then(|| read(&heard)).transpose()?,
        })
    }
}

fn fits(vocabulary: &ClipTokenizer, length: usize, request: &PublishedRequest) -> Result<(), Error> {
    let fields: [(&'static str, Option<&String>); 3] = [
        ("prompt", Some(&request.prompt)),
        ("negative-prompt", Some(&request.negative_prompt)),
        ("audio-negative-prompt", request.audio_negative_prompt.as_ref()),
    ];
    for (field, text) in fields {
        let pieces = match text {
            Some(text) => vocabulary.pieces_of(text)?.len() + 2,
            None => continue,
        };
        if pieces > length {
            let expected = format!("at most {length} with start and end");
            return Err(Error::request(field, format!("{pieces} tokens"), expected));
        }
    }
    Ok(())
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
