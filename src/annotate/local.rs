//! Our own language models as writers.

use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use fulgur_benchmark::annotate::config::Lm;
use fulgur_benchmark::annotate::{About, Clip, Merger, Modality, Rewriter, StageError, prompts};
use fulgur_lightnet::lm::generate::{Request, generate};
use fulgur_lightnet::lm::sampling::Sampling;
use fulgur_lightnet::lm::tokenizer::LmTokenizer;
use fulgur_lightnet::lm::{LanguageModel, Session};

/// What follows a question, so that a model which only goes on with texts does not begin with the end of a line.
const ANSWER: &str = "\nAnswer:";
/// Tokens of a prompt that are read at once.
const CHUNK: usize = 4096;

/// A language model that is asked in words. Texts are made one at a time, each from nothing, so that none depends on another.
pub struct Local {
    name: String,
    model: Mutex<LanguageModel>,
    tokenizer: LmTokenizer,
    request: Request,
    stop: Arc<AtomicBool>,
}

impl fmt::Debug for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Local")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Local {
    /// The model of the folder `dir`; `end` are the tokens that end a text. Writing ends when `stop` is raised.
    pub fn new(
        dir: &Path,
        model: LanguageModel,
        tokenizer: LmTokenizer,
        end: Vec<u32>,
        settings: &Lm,
        stop: Arc<AtomicBool>,
    ) -> Self {
        // `.` has no name of its own.
        let whole = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
        let name = whole.file_name().unwrap_or(whole.as_os_str());
        Self {
            name: name.to_string_lossy().into_owned(),
            model: Mutex::new(model),
            tokenizer,
            request: Request {
                max_tokens: settings.max_tokens,
                sampling: Sampling {
                    temperature: settings.temperature,
                    seed: settings.seed,
                    ..Sampling::default()
                },
                end,
                // The answer is the line behind the question.
                stop: vec!["\n".to_owned()],
                samples: 1,
                together: 1,
            },
            stop,
        }
    }

    fn about_it(&self, prompt_version: &str) -> About {
        About {
            backend: "lm".to_owned(),
            model: Some(self.name.clone()),
            prompt_version: Some(prompt_version.to_owned()),
            costly: true,
            rule: None,
        }
    }

    /// What the model writes behind a question.
    fn ask(&self, question: &str) -> Result<String, StageError> {
        let wrong = |error: &dyn fmt::Display| StageError::Clip(format!("{}: {error}", self.name));
        let ids = self
            .tokenizer
            .encode(&format!("{question}{ANSWER}"), true)
            .map_err(|error| wrong(&error))?;
        let go_on = || !self.stop.load(Ordering::SeqCst);
        let model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        let mut session = Session::new(&model);
        session
            .read(&model, &ids, CHUNK, |_| go_on())
            .map_err(|error| wrong(&error))?;
        let texts = generate(
            &model,
            Some(&self.tokenizer),
            &mut session,
            &self.request,
            |_, _| go_on(),
        )
        .map_err(|error| wrong(&error))?;
        if !go_on() {
            return Err(StageError::Stopped);
        }
        match texts.into_iter().next().map(|text| text.text.trim().to_owned()) {
            Some(text) if !text.is_empty() => Ok(text),
            _ => Err(StageError::Clip(format!("{}: an empty answer", self.name))),
        }
    }
}

impl Rewriter for Local {
    fn about(&self) -> About {
        self.about_it(prompts::REWRITE)
    }

    fn rewrite(&self, text: &str, kind: Modality, _: Clip<'_>) -> Result<String, StageError> {
        self.ask(&prompts::rewrite(text, kind))
    }
}

impl Merger for Local {
    fn about(&self) -> About {
        self.about_it(prompts::MERGE)
    }

    fn merge(&self, video: &str, audio: &str, _: Clip<'_>) -> Result<String, StageError> {
        self.ask(&prompts::merge(video, audio))
    }
}
