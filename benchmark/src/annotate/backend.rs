//! Names of backends: `none`, `precomputed`, `precomputed:FILE`, `template`, `candle-blip:DIR`, `tags:ENCODER`, `openai-http`,
//! `openai-http:MODEL`, `lm:DIR`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What does the work of a stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Backend {
    /// Nothing: the stage is left out.
    None,
    /// Texts that are there already: in a table by the clips' ids, or in the manifest itself.
    Precomputed(Option<PathBuf>),
    /// A rule.
    Template,
    /// A server that speaks the protocol of OpenAI, with this model or that of the settings.
    OpenaiHttp(Option<String>),
    /// A language model in this folder.
    Lm(PathBuf),
    /// A BLIP captioner in this folder.
    Blip(PathBuf),
    /// Zero-shot tags of the encoder in this folder, or of `builtin`.
    Tags(PathBuf),
}

/// A name that is none of a backend.
#[derive(Debug, thiserror::Error)]
#[error(
    "found {0:?}, expected none, precomputed, precomputed:FILE, template, candle-blip:DIR, tags:ENCODER, openai-http, openai-http:MODEL or lm:DIR"
)]
pub struct BackendError(String);

impl FromStr for Backend {
    type Err = BackendError;

    fn from_str(text: &str) -> Result<Self, BackendError> {
        let (name, more) = match text.split_once(':') {
            Some((name, more)) => (name, Some(more).filter(|more| !more.is_empty())),
            None => (text, None),
        };
        match (name, more) {
            ("none", None) => Ok(Self::None),
            ("template", None) => Ok(Self::Template),
            ("precomputed", file) => Ok(Self::Precomputed(file.map(PathBuf::from))),
            ("openai-http", model) => Ok(Self::OpenaiHttp(model.map(str::to_owned))),
            ("lm", Some(dir)) => Ok(Self::Lm(PathBuf::from(dir))),
            ("candle-blip", Some(dir)) => Ok(Self::Blip(PathBuf::from(dir))),
            ("tags", Some(dir)) => Ok(Self::Tags(PathBuf::from(dir))),
            _ => Err(BackendError(text.to_owned())),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Template => f.write_str("template"),
            Self::Precomputed(None) => f.write_str("precomputed"),
            Self::Precomputed(Some(file)) => write!(f, "precomputed:{}", file.display()),
            Self::OpenaiHttp(None) => f.write_str("openai-http"),
            Self::OpenaiHttp(Some(model)) => write!(f, "openai-http:{model}"),
            Self::Lm(dir) => write!(f, "lm:{}", dir.display()),
            Self::Blip(dir) => write!(f, "candle-blip:{}", dir.display()),
            Self::Tags(dir) => write!(f, "tags:{}", dir.display()),
        }
    }
}

impl TryFrom<String> for Backend {
    type Error = BackendError;

    fn try_from(text: String) -> Result<Self, BackendError> {
        text.parse()
    }
}

impl From<Backend> for String {
    fn from(backend: Backend) -> Self {
        backend.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for name in [
            "none",
            "precomputed",
            "precomputed:a/b.csv",
            "template",
            "openai-http",
            "openai-http:org/model:tag",
            "lm:models/x",
            "candle-blip:a/blip",
            "tags:builtin",
        ] {
            assert_eq!(name.parse::<Backend>().unwrap().to_string(), name);
        }
        for name in [
            "",
            "gpt",
            "lm",
            "lm:",
            "none:x",
            "template:y",
            "candle-blip",
            "tags:",
        ] {
            assert!(
                name.parse::<Backend>()
                    .unwrap_err()
                    .to_string()
                    .contains("expected none"),
                "{name}"
            );
        }
    }
}
