//! Questions on their way to a server and back.

use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;
use serde_json::{Value, json};
use ureq::Agent;

use super::super::config::Http;
use super::super::stage::StageError;
use super::answer::{self, Answer};
use super::cache::Cache;
use super::limits::{Gate, LOOK};
use super::retry::{asked, may_pass, pause};
use crate::captions::hash;

/// Most bytes of an answer.
const LARGEST: u64 = 4 << 20;
/// The time that limits speak of.
const MINUTE: Duration = Duration::from_secs(60);
/// Letters of a token, about.
const LETTERS_A_TOKEN: u64 = 4;
/// Tokens that a picture and a sound count for before the answer tells.
const TOKENS_A_PICTURE: u64 = 800;
const TOKENS_A_SOUND: u64 = 400;
/// Refusals of a key in a row after which nobody is asked any more: one may be about one question.
const MOST_REFUSALS: u32 = 3;
/// What stands for an answer in a dry run.
const DRY: &str = "A description of the clip that a model is yet to write.";

/// A part of a question.
#[derive(Debug)]
pub(super) enum Part {
    Text(String),
    /// An address that holds the picture.
    Picture(String),
    /// A WAV file in base64.
    Sound(String),
}

/// What is asked.
#[derive(Debug)]
pub(super) struct Question<'a> {
    pub(super) model: &'a str,
    pub(super) prompt_version: &'a str,
    pub(super) parts: Vec<Part>,
}

/// What a server was asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Requests that went out, tries that failed included; in a dry run those that would.
    pub requests: u64,
    /// Requests that were repeats.
    pub retries: u64,
    /// Questions that were answered from the disk.
    pub cached: u64,
    /// Tokens of questions and answers: as the server tells, else as they are guessed.
    pub tokens: u64,
}

/// A server.
pub struct Server {
    client: Agent,
    address: String,
    key: Option<Key>,
    settings: Http,
    gate: Gate,
    cache: Option<Cache>,
    dry_run: bool,
    stop: Arc<AtomicBool>,
    /// Questions in a row that the server refused to answer for their key.
    refusals: Mutex<u32>,
    requests: AtomicU64,
    retries: AtomicU64,
    cached: AtomicU64,
    tokens: AtomicU64,
}

/// A server that cannot be asked.
#[derive(Debug, thiserror::Error)]
#[error("{field}: found {found}, expected {expected}")]
pub struct ServerError {
    field: &'static str,
    found: String,
    expected: &'static str,
}

/// A key, which is never shown.
struct Key(String);

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// A server of these settings, with the key of the environment. Answers are kept in `cache`. Waiting ends when `stop` is
    /// raised. A dry run asks nothing, and counts what it would.
    ///
    /// # Errors
    /// The address is none, or the key holds what a header cannot.
    pub fn open(
        settings: &Http,
        cache: Option<&Path>,
        dry_run: bool,
        stop: Arc<AtomicBool>,
    ) -> Result<Self, ServerError> {
        let key = std::env::var(&settings.key_env)
            .ok()
            .filter(|key| !key.is_empty());
        Self::with_key(settings, key, cache, dry_run, stop, MINUTE)
    }

    pub(super) fn with_key(
        settings: &Http,
        key: Option<String>,
        cache: Option<&Path>,
        dry_run: bool,
        stop: Arc<AtomicBool>,
        minute: Duration,
    ) -> Result<Self, ServerError> {
        let base = settings.base.trim_end_matches('/');
        let base = base.strip_suffix("/v1").unwrap_or(base);
        let rest = base
            .strip_prefix("https://")
            .or_else(|| base.strip_prefix("http://"));
        // A name and password in an address would go into messages.
        if rest.is_none_or(|rest| {
            rest.is_empty() || rest.contains(['@', ' ', '"', '?', '#']) || !rest.is_ascii()
        }) {
            return Err(ServerError {
                field: "http.base",
                found: format!("{:?}", answer::short(&settings.base.replace('@', " "))),
                expected: "an address such as https://example.org or http://127.0.0.1:8000",
            });
        }
        let visible = |c: char| c.is_ascii_graphic();
        if key.as_ref().is_some_and(|key| !key.chars().all(visible)) {
            return Err(ServerError {
                field: "http.key_env",
                found: format!("a key in {} with other characters", settings.key_env),
                expected: "visible ASCII characters alone",
            });
        }
        let config = Agent::config_builder()
            .timeout_global(Some(Duration::from_secs_f64(settings.timeout_s)))
            .http_status_as_error(false)
            // A redirected question would carry media to who knows whom.
            .max_redirects(0)
            .user_agent(concat!("fulgur/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Self {
            client: config.into(),
            address: format!("{base}/v1/chat/completions"),
            key: key.map(Key),
            gate: Gate::new(
                settings.concurrency,
                settings.requests_per_minute,
                settings.tokens_per_minute,
                minute,
            ),
            settings: settings.clone(),
            cache: cache.map(Cache::new),
            dry_run,
            stop,
            refusals: Mutex::new(0),
            requests: AtomicU64::new(0),
            retries: AtomicU64::new(0),
            cached: AtomicU64::new(0),
            tokens: AtomicU64::new(0),
        })
    }

    /// What was asked so far.
    pub fn counts(&self) -> Counts {
        let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        Counts {
            requests: count(&self.requests),
            retries: count(&self.retries),
            cached: count(&self.cached),
            tokens: count(&self.tokens),
        }
    }

    /// Asks a question: from the disk, else from the server, as often as the settings allow.
    pub(super) fn ask(&self, question: &Question<'_>) -> Result<String, StageError> {
        let body = self.body(question).to_string();
        let key = Cache::key(question.model, question.prompt_version, body.as_bytes());
        if let Some(text) = self.cache.as_ref().and_then(|cache| cache.get(&key)) {
            self.cached.fetch_add(1, Ordering::SeqCst);
            return Ok(text);
        }
        let expected = self.guess(question);
        if self.dry_run {
            self.requests.fetch_add(1, Ordering::SeqCst);
            self.tokens.fetch_add(expected, Ordering::SeqCst);
            return Ok(DRY.to_owned());
        }
        let answer = self.try_often(&body, expected)?;
        if let Some(cache) = &self.cache {
            cache
                .put(&key, question.model, question.prompt_version, &answer.text)
                .map_err(|error| StageError::Clip(format!("the answer cannot be kept: {error}")))?;
        }
        Ok(answer.text)
    }

    fn body(&self, question: &Question<'_>) -> Value {
        let content = match question.parts.as_slice() {
            [Part::Text(text)] => json!(text),
            parts => {
                let part = |part: &Part| match part {
                    Part::Text(text) => json!({ "type": "text", "text": text }),
                    Part::Picture(url) => json!({ "type": "image_url", "image_url": { "url": url } }),
                    Part::Sound(data) => {
                        json!({ "type": "input_audio", "input_audio": { "data": data, "format": "wav" } })
                    }
                };
                json!(parts.iter().map(part).collect::<Vec<_>>())
            }
        };
        json!({
            "model": question.model,
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
            "seed": self.settings.seed,
            "messages": [{ "role": "user", "content": content }],
        })
    }

    /// Tokens of a question and its answer, about.
    fn guess(&self, question: &Question<'_>) -> u64 {
        let part = |part: &Part| match part {
            Part::Text(text) => text.len() as u64 / LETTERS_A_TOKEN + 1,
            Part::Picture(_) => TOKENS_A_PICTURE,
            Part::Sound(_) => TOKENS_A_SOUND,
        };
        question.parts.iter().map(part).sum::<u64>() + u64::from(self.settings.max_tokens)
    }

    fn try_often(&self, body: &str, expected: u64) -> Result<Answer, StageError> {
        let mut tried = 0;
        loop {
            tried += 1;
            let pass = self.gate.enter(expected, &self.stop).ok_or(StageError::Stopped)?;
            if *self.refusals() >= MOST_REFUSALS {
                return Err(StageError::Run(format!(
                    "{}: found {MOST_REFUSALS} refusals (401 or 403) in a row, expected a key with the rights in {}",
                    self.address, self.settings.key_env
                )));
            }
            self.requests.fetch_add(1, Ordering::SeqCst);
            self.retries.fetch_add(u64::from(tried > 1), Ordering::SeqCst);
            let outcome = self.once(body);
            if let Ok(answer) = &outcome {
                let tokens = answer.tokens.unwrap_or(expected);
                pass.settle(tokens);
                *self.refusals() = 0;
                self.tokens.fetch_add(tokens, Ordering::SeqCst);
            }
            drop(pass);
            let (why, wish) = match outcome {
                Ok(answer) => return Ok(answer),
                Err(Failure::Final(why)) => return Err(self.told(&why)),
                Err(Failure::Refused(why)) => {
                    *self.refusals() += 1;
                    return Err(self.told(&why));
                }
                Err(Failure::Passing(why, wish)) => (why, wish),
            };
            if tried >= self.settings.tries {
                return Err(self.told(&format!("{why}, after {tried} tries")));
            }
            let seconds = Duration::from_secs_f64;
            let own = pause(
                tried,
                seconds(self.settings.backoff_s),
                seconds(self.settings.most_backoff_s),
                hash(body.as_bytes()),
            );
            let rest = match wish {
                Some(Ok(wish)) => {
                    // Others would only hear the same.
                    self.gate.hold(wish);
                    wish.max(own)
                }
                Some(Err(too_long)) => return Err(self.told(&format!("{why}; {too_long}"))),
                None => own,
            };
            self.sleep(rest)?;
        }
    }

    fn sleep(&self, pause: Duration) -> Result<(), StageError> {
        let until = Instant::now() + pause;
        loop {
            if self.stop.load(Ordering::SeqCst) {
                return Err(StageError::Stopped);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(LOOK));
        }
    }

    /// One request.
    fn once(&self, body: &str) -> Result<Answer, Failure> {
        let mut request = self
            .client
            .post(&self.address)
            .header("Content-Type", "application/json");
        if let Some(Key(key)) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let transport = |error: ureq::Error| Failure::Passing(format!("{}: {error}", self.address), None);
        let mut response = request.send(body).map_err(transport)?;
        let status = response.status().as_u16();
        let wish = response
            .headers()
            .get("Retry-After")
            .and_then(|header| header.to_str().ok());
        let wish = wish.and_then(|header| asked(header, SystemTime::now()));
        let text = response.body_mut().with_config().limit(LARGEST).read_to_vec();
        let text = match text {
            // Some servers repeat the key; it goes before anything is shortened.
            Ok(bytes) => self.without_key(&String::from_utf8_lossy(&bytes)),
            Err(ureq::Error::BodyExceedsLimit(limit)) => {
                return Err(Failure::Final(format!("an answer of more than {limit} bytes")));
            }
            Err(error) => return Err(transport(error)),
        };
        if (200..300).contains(&status) {
            return answer::read(&text).map_err(Failure::Final);
        }
        let why = format!("status {status}: {}", answer::complaint(&text));
        Err(match status {
            401 | 403 => Failure::Refused(why),
            status if may_pass(status) => Failure::Passing(why, wish),
            _ => Failure::Final(why),
        })
    }

    fn refusals(&self) -> MutexGuard<'_, u32> {
        self.refusals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn told(&self, why: &str) -> StageError {
        StageError::Clip(self.without_key(why))
    }

    fn without_key(&self, text: &str) -> String {
        match &self.key {
            Some(Key(key)) => text.replace(key.as_str(), "***"),
            None => text.to_owned(),
        }
    }
}

/// Why a request has no answer.
enum Failure {
    /// Another try may have one, after the pause that the server asks for.
    Passing(String, Option<Result<Duration, String>>),
    /// No try will.
    Final(String),
    /// No try will, and maybe that of no other question: the key is none, or has no rights.
    Refused(String),
}
