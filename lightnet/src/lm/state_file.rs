//! States in files, so that a long text is read once: `fulgur lm generate --save-state` and `--state`.
//!
//! A safetensors file. Its metadata name the format, the model's configuration, a fingerprint of its weights and the number of tokens;
//! its tensors are those of the state (`layer.N.state`, ..), `logits` `[1, V]` of the token after it, and `recent`, the last
//! tokens, for repetition penalties. Nothing else of the text is kept.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::Value;

use super::model::LanguageModel;
use super::sampling::MOST_RECENT;
use super::session::Session;
use crate::params::{ParamsError, Precision, file};

const FORMAT: &str = "fulgur language model state 1";

/// Why a state cannot be kept or taken up again.
#[derive(Debug, thiserror::Error)]
pub enum StateFileError {
    /// The file.
    #[error(transparent)]
    File(#[from] ParamsError),
    /// The file holds no state of this model.
    #[error("{path}: {reason}")]
    Other {
        /// The file.
        path: String,
        /// What was found, and what was expected.
        reason: String,
    },
    /// An operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Session {
    /// Writes the one sequence to a file, whole or not at all.
    ///
    /// # Errors
    /// Several sequences, one without tokens, or a file that cannot be written.
    pub fn save(&mut self, model: &LanguageModel, path: &Path) -> Result<(), StateFileError> {
        self.settle(model)?;
        let other = |reason: &str| StateFileError::Other {
            path: path.display().to_string(),
            reason: reason.to_owned(),
        };
        if self.numbers().len() != 1 {
            return Err(other("a state of several sequences, expected one"));
        }
        let Some(logits) = self.logits() else {
            return Err(other("a state before the first token, expected a text"));
        };
        let mut tensors = self.state()?.tensors();
        tensors.insert("logits".to_owned(), logits.clone());
        let recent = self.recent(0);
        tensors.insert("recent".to_owned(), Tensor::new(&recent[..], logits.device())?);
        let metadata = BTreeMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            (
                "config".to_owned(),
                config_text(model).map_err(|reason| other(&reason))?,
            ),
            ("weights".to_owned(), model.fingerprint()?),
            ("tokens".to_owned(), self.tokens().to_string()),
        ]);
        Ok(file::write(path, &tensors, &metadata, Precision::F32)?)
    }

    /// Takes up the sequence of a file. Everything is compared with the model before any of it is used.
    ///
    /// # Errors
    /// The file cannot be read, is no state, or is one of another model: what differs is named.
    pub fn load(model: &LanguageModel, path: &Path) -> Result<Self, StateFileError> {
        let device = model.device();
        let mut contents = file::read(path, device)?;
        let other = |reason: String| StateFileError::Other {
            path: path.display().to_string(),
            reason,
        };
        let mut said = |key: &str| contents.metadata.remove(key).unwrap_or_default();
        let format = said("format");
        if format != FORMAT {
            return Err(other(format!(
                "format is {format:?}, expected {FORMAT:?}, a state that was saved"
            )));
        }
        let config = config_text(model).map_err(other)?;
        let found = said("config");
        if found != config {
            return Err(other(difference(&found, &config)));
        }
        if said("weights") != model.fingerprint()? {
            return Err(other(
                "a state of other weights, expected those of the model".to_owned(),
            ));
        }
        let tokens = said("tokens");
        let Some(tokens) = tokens.parse::<usize>().ok().filter(|&tokens| tokens > 0) else {
            return Err(other(format!("tokens is {tokens:?}, expected a number above 0")));
        };
        let mut tensors = contents.tensors;
        let mut take = |name: &str, shape: &[usize], dtype: DType| {
            let Some(tensor) = tensors.remove(name) else {
                return Err(other(format!("tensor `{name}` is missing")));
            };
            if tensor.dims() != shape || tensor.dtype() != dtype {
                let found = format!("{:?} {:?}", tensor.dtype(), tensor.dims());
                return Err(other(format!(
                    "tensor `{name}` is {found}, expected {dtype:?} {shape:?}"
                )));
            }
            Ok(tensor)
        };
        // One token leaves tensors of the shapes that any number of them does, but for keys and values.
        let mut like = model.start();
        let logits = model.step(&[0], &mut like)?;
        let state = like.map(|name, tensor| {
            let mut shape = tensor.dims().to_vec();
            if name.ends_with(".keys") || name.ends_with(".values") {
                shape[1] = tokens;
            }
            take(name, &shape, tensor.dtype())
        })?;
        let logits = take("logits", logits.dims(), logits.dtype())?;
        let recent = take("recent", &[tokens.min(MOST_RECENT)], DType::U32)?.to_vec1::<u32>()?;
        if let Some(name) = tensors.keys().next() {
            return Err(other(format!("tensor `{name}` is not one of this model's state")));
        }
        let vocabulary = model.config().vocab_size;
        if let Some(id) = recent.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(other(format!(
                "token {id}, expected less than {vocabulary}, the vocabulary"
            )));
        }
        Ok(Self::kept(state.at(tokens), logits, &recent))
    }
}

fn config_text(model: &LanguageModel) -> Result<String, String> {
    serde_json::to_string(model.config()).map_err(|e| e.to_string())
}

/// The first field in which two configurations differ.
fn difference(found: &str, expected: &str) -> String {
    let parse = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_default();
    let (found, expected) = (parse(found), parse(expected));
    let keys = expected.as_object().into_iter().flat_map(|object| object.keys());
    let mut differing = keys.filter(|key| found[key.as_str()] != expected[key.as_str()]);
    match differing.next() {
        Some(key) => format!(
            "a state of another model: {key} is {}, expected {}",
            found[key.as_str()],
            expected[key.as_str()]
        ),
        None => "a state of another model, expected one of the same configuration".to_owned(),
    }
}
