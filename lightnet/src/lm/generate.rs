//! Texts that a model writes behind a prompt: tokens until there are enough, a text ends, or a stop string has been written.

use std::collections::BTreeMap;

use super::model::LanguageModel;
use super::sampling::Sampling;
#[cfg(doc)]
use super::session::MOST_TOGETHER;
use super::session::{Session, SessionError};
use super::tokenizer::{LmTokenizer, TextStream, TokenizerError};

/// What ends a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stop {
    /// It is as long as was asked for.
    Length,
    /// A token that ends texts.
    End,
    /// One of the stop strings; the text ends before it.
    String,
    /// The caller.
    Interrupted,
}

/// What is to be written.
#[derive(Clone, Debug)]
pub struct Request {
    /// Most tokens of a text.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens that end a text; they are not part of it, but of its ids.
    pub end: Vec<u32>,
    /// Strings that end a text, none of them empty.
    pub stop: Vec<String>,
    /// Texts behind the same prompt.
    pub samples: usize,
    /// Most texts that are decoded at once. Up to [`MOST_TOGETHER`] have the logits that they have alone; of more the last digits
    /// may differ, as products of many rows are summed in another order.
    pub together: usize,
}

/// A text that was written.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Continuation {
    /// The text, where there is a tokenizer.
    pub text: String,
    /// The tokens.
    pub ids: Vec<u32>,
    /// What ended it.
    pub stop: Stop,
}

/// Why nothing more is written.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// The model.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// Writes texts behind the one sequence of `session`, which goes on to the end of the text if there is one alone. `show` is given
/// the number of a text and what has come to it, and ends everything by `false`.
///
/// Texts are decoded so many at a time as the request says.
///
/// # Errors
/// Logits that are no numbers, a tokenizer that fails, or a failing operation.
pub fn generate(
    model: &LanguageModel,
    tokenizer: Option<&LmTokenizer>,
    session: &mut Session,
    request: &Request,
    mut show: impl FnMut(usize, &str) -> bool,
) -> Result<Vec<Continuation>, GenerateError> {
    session.settle(model).map_err(SessionError::from)?;
    let before = session.recent(0);
    let mut texts = Vec::with_capacity(request.samples);
    for _ in 0..request.samples {
        texts.push(Writing::new(tokenizer, &before, &request.stop)?);
    }
    let mut writer = Writer::new(model, tokenizer, request, texts, &mut show);
    let numbers: Vec<u32> = (0..request.samples as u32).collect();
    for together in numbers.chunks(request.together.max(1)) {
        let places = together.iter().map(|&number| number as usize).collect();
        if request.samples == 1 {
            writer.write(session, places)?;
        } else {
            let mut group = session.fork(together).map_err(SessionError::from)?;
            writer.write(&mut group, places)?;
        }
    }
    writer.end()
}

/// Writes a text behind each of `sessions`, each of which is one sequence: what [`generate`] would write behind it alone. Those of
/// one length, or all where the model sees no positions, are decoded so many at a time as the request says.
///
/// # Errors
/// As [`generate`].
pub fn generate_each(
    model: &LanguageModel,
    tokenizer: Option<&LmTokenizer>,
    sessions: &mut [Session],
    request: &Request,
    mut show: impl FnMut(usize, &str) -> bool,
) -> Result<Vec<Continuation>, GenerateError> {
    let (mut texts, mut groups) = (Vec::with_capacity(sessions.len()), BTreeMap::new());
    for (place, session) in sessions.iter_mut().enumerate() {
        session.settle(model).map_err(SessionError::from)?;
        texts.push(Writing::new(tokenizer, &session.recent(0), &request.stop)?);
        let length = match model.config().sees_positions() {
            true => session.tokens(),
            false => 0,
        };
        groups.entry(length).or_insert_with(Vec::new).push(place);
    }
    let mut writer = Writer::new(model, tokenizer, request, texts, &mut show);
    for together in groups
        .values()
        .flat_map(|places| places.chunks(request.together.max(1)))
    {
        let apart: Vec<&Session> = together.iter().map(|&place| &sessions[place]).collect();
        let mut group = Session::joined(model, &apart).map_err(SessionError::from)?;
        writer.write(&mut group, together.to_vec())?;
    }
    writer.end()
}

/// Texts on their way.
struct Writer<'a, F> {
    model: &'a LanguageModel,
    request: &'a Request,
    vocabulary: usize,
    texts: Vec<Writing<'a>>,
    show: F,
    stopped: bool,
}

impl<'a, F: FnMut(usize, &str) -> bool> Writer<'a, F> {
    fn new(
        model: &'a LanguageModel,
        tokenizer: Option<&LmTokenizer>,
        request: &'a Request,
        texts: Vec<Writing<'a>>,
        show: F,
    ) -> Self {
        Self {
            model,
            request,
            vocabulary: tokenizer.map_or(model.config().vocab_size, LmTokenizer::rows),
            texts,
            show,
            stopped: false,
        }
    }

    /// Writes the texts `live`, whose sequences are those of `group` in their order.
    fn write(&mut self, group: &mut Session, mut live: Vec<usize>) -> Result<(), GenerateError> {
        for _ in 0..self.request.max_tokens {
            if self.stopped || live.is_empty() {
                break;
            }
            let chosen = group.next(self.model, &self.request.sampling, self.vocabulary)?;
            let mut places = Vec::with_capacity(live.len());
            for (place, (&number, id)) in live.iter().zip(chosen).enumerate() {
                let new = self.texts[number].push(id, &self.request.end)?;
                self.stopped |= !(self.show)(number, &new);
                if self.texts[number].stop.is_none() {
                    places.push(place as u32);
                }
            }
            if places.len() < live.len() && !places.is_empty() {
                group.keep(&places).map_err(SessionError::from)?;
            }
            live = places.iter().map(|&place| live[place as usize]).collect();
        }
        Ok(())
    }

    /// All texts, whole.
    fn end(mut self) -> Result<Vec<Continuation>, GenerateError> {
        let mut all = Vec::with_capacity(self.texts.len());
        for (number, text) in self.texts.into_iter().enumerate() {
            let ended = match self.stopped {
                true => Stop::Interrupted,
                false => Stop::Length,
            };
            let (continuation, new) = text.end(ended, self.request.max_tokens)?;
            (self.show)(number, &new);
            all.push(continuation);
        }
        Ok(all)
    }
}

/// A text that is being written.
struct Writing<'a> {
    stream: Option<TextStream<'a>>,
    stops: Stops<'a>,
    text: String,
    ids: Vec<u32>,
    stop: Option<Stop>,
}

impl<'a> Writing<'a> {
    fn new(
        tokenizer: Option<&'a LmTokenizer>,
        before: &[u32],
        stops: &'a [String],
    ) -> Result<Self, GenerateError> {
        Ok(Self {
            stream: tokenizer.map(|tokenizer| tokenizer.stream(before)).transpose()?,
            stops: Stops {
                strings: stops,
                held: String::new(),
            },
            text: String::new(),
            ids: Vec::new(),
            stop: None,
        })
    }

    /// What can be shown with one more token.
    fn push(&mut self, id: u32, end: &[u32]) -> Result<String, GenerateError> {
        self.ids.push(id);
        if end.contains(&id) {
            self.stop = Some(Stop::End);
            return Ok(String::new());
        }
        let Some(stream) = &mut self.stream else {
            return Ok(String::new());
        };
        let new = stream.push(id)?;
        let (shown, stopped) = self.stops.push(&new);
        if stopped {
            self.stop = Some(Stop::String);
        }
        self.text.push_str(&shown);
        Ok(shown)
    }

    /// The whole text, and what of it was not shown.
    fn end(mut self, otherwise: Stop, most: usize) -> Result<(Continuation, String), GenerateError> {
        let mut new = String::new();
        if self.stop != Some(Stop::String) {
            if let Some(stream) = &mut self.stream {
                let (shown, stopped) = self.stops.push(&stream.finish()?);
                new = shown;
                if stopped {
                    self.stop = Some(Stop::String);
                } else {
                    new.push_str(&self.stops.held);
                }
            }
            self.text.push_str(&new);
        }
        let stop = self.stop.unwrap_or(match self.ids.len() >= most {
            true => Stop::Length,
            false => otherwise,
        });
        let continuation = Continuation {
            text: self.text,
            ids: self.ids,
            stop,
        };
        Ok((continuation, new))
    }
}

/// Finds strings in a text that comes in pieces, and holds back what may be the beginning of one.
struct Stops<'a> {
    strings: &'a [String],
    held: String,
}

impl Stops<'_> {
    /// What is surely no part of a string, and whether one has been found; what comes before it is given out.
    fn push(&mut self, new: &str) -> (String, bool) {
        self.held.push_str(new);
        let first = self
            .strings
            .iter()
            .filter_map(|string| self.held.find(string.as_str()))
            .min();
        if let Some(at) = first {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let begins = |at: &usize| {
            let tail = &self.held[*at..];
            self.strings.iter().any(|string| string.starts_with(tail))
        };
        let mut places = self.held.char_indices().map(|(at, _)| at);
        let sure = places.find(begins).unwrap_or(self.held.len());
        let rest = self.held.split_off(sure);
        (std::mem::replace(&mut self.held, rest), false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lm::session::MOST_TOGETHER;
    use crate::lm::{Architecture, Config, SoftmaxLayers};
    use crate::params::Params;
    use candle_core::{DType, Device};

    fn model(architecture: Architecture) -> LanguageModel {
        let config = Config {
            hidden_size: 24,
            intermediate_size: 32,
            num_attention_heads: match architecture {
                Architecture::Hgrn1 => 24,
                _ => 2,
            },
            num_hidden_layers: 3,
            vocab_size: 256,
            // Logits that differ, so that texts do.
            initializer_range: 0.4,
            attn: match architecture {
                Architecture::Hgrn2 => vec![SoftmaxLayers {
                    layers: vec![1],
                    num_heads: 2,
                    num_kv_heads: None,
                    qkv_bias: false,
                    window_size: None,
                    rope_theta: 100.0,
                }],
                _ => Vec::new(),
            },
            conv_size: (architecture == Architecture::Lightnet).then_some(3),
            ..Config::of(architecture)
        };
        LanguageModel::new(&config, DType::F32, &Params::random(3, &Device::Cpu).builder()).unwrap()
    }

    fn request(max_tokens: usize, samples: usize) -> Request {
        Request {
            max_tokens,
            sampling: Sampling {
                seed: 11,
                temperature: 0.9,
                top_k: 80,
                top_p: 0.95,
                repetition_penalty: 1.2,
                ..Sampling::default()
            },
            end: Vec::new(),
            stop: Vec::new(),
            samples,
            together: MOST_TOGETHER,
        }
    }

    const PROMPT: &str = "the bell rings as the rain falls";

    fn read(model: &LanguageModel, chunk: usize) -> Session {
        let mut session = Session::new(model);
        let ids = LmTokenizer::bytes().encode(PROMPT, true).unwrap();
        assert_eq!(session.read(model, &ids, chunk, |_| true).unwrap(), ids.len());
        session
    }

    /// One text, however it is made: at once, shown bit by bit, beside others, in parts, and behind a state in a file.
    #[test]
    fn the_same_seed_gives_the_same_text() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        let bytes = LmTokenizer::bytes();
        for architecture in Architecture::ALL {
            let model = model(architecture);
            let write = |session: &mut Session, request: &Request| {
                let mut shown = vec![String::new(); request.samples];
                let all = generate(&model, Some(&bytes), session, request, |number, new| {
                    shown[number].push_str(new);
                    true
                });
                let all = all.unwrap();
                let texts: Vec<&str> = all.iter().map(|text| text.text.as_str()).collect();
                assert_eq!(shown, texts);
                all
            };
            let mut session = read(&model, 4096);
            let one = write(&mut session, &request(40, 1)).remove(0);
            assert_eq!((one.ids.len(), one.stop), (40, Stop::Length));
            assert_eq!(session.tokens(), PROMPT.len() + 40);
            let many = write(&mut read(&model, 4096), &request(40, 19));
            assert_eq!(many[0], one, "{architecture:?}");
            assert!(many[1..].iter().all(|text| text.ids != one.ids));
            // In parts, by a file: as if it had not been left.
            let mut first = read(&model, 4096);
            let early = write(&mut first, &request(15, 1)).remove(0);
            first.save(&model, &path).unwrap();
            let mut second = Session::load(&model, &path).unwrap();
            assert_eq!(second.tokens(), PROMPT.len() + 15);
            let late = write(&mut second, &request(25, 1)).remove(0);
            assert_eq!([early.ids, late.ids].concat(), one.ids, "{architecture:?}");
            // A prompt in pieces has other last digits.
            let pieces = write(&mut read(&model, 7), &request(5, 1)).remove(0);
            assert_eq!(pieces.ids, one.ids[..5], "{architecture:?}");
        }
    }

    /// Prompts of different lengths, written behind together: what each alone gives, whichever ends first.
    #[test]
    fn texts_of_several_prompts_are_those_of_each() {
        let bytes = LmTokenizer::bytes();
        let prompts = [
            PROMPT,
            "rain",
            "the bell rings as the rain falls, and then",
            "bell",
        ];
        for architecture in Architecture::ALL {
            let model = model(architecture);
            let read = |prompt: &str| {
                let mut session = Session::new(&model);
                let ids = bytes.encode(prompt, true).unwrap();
                session.read(&model, &ids, 4096, |_| true).unwrap();
                session
            };
            let mut request = request(30, 1);
            let alone = |request: &Request| -> Vec<Continuation> {
                let text = |prompt: &&str| {
                    let all = generate(&model, Some(&bytes), &mut read(prompt), request, |_, _| true);
                    all.unwrap().remove(0)
                };
                prompts.iter().map(text).collect()
            };
            let first = alone(&request);
            request.end = vec![first[1].ids[11]];
            let wanted = alone(&request);
            assert!(wanted[1].ids.len() <= 12);
            let mut sessions: Vec<Session> = prompts.iter().map(|prompt| read(prompt)).collect();
            let mut shown = vec![String::new(); prompts.len()];
            let found = generate_each(&model, Some(&bytes), &mut sessions, &request, |number, new| {
                shown[number].push_str(new);
                true
            });
            assert_eq!(found.unwrap(), wanted, "{architecture:?}");
            let texts: Vec<&str> = wanted.iter().map(|text| text.text.as_str()).collect();
            assert_eq!(shown, texts);
            let all: Vec<&Session> = sessions.iter().collect();
            assert_eq!(
                Session::joined(&model, &all).is_err(),
                model.config().sees_positions()
            );
        }
    }

    /// Many at once, in one group or in several: texts stay in their order. The likeliest tokens are those of each alone but where
    /// two are as good as equal.
    #[test]
    fn many_texts_are_written_at_once() {
        let bytes = LmTokenizer::bytes();
        for architecture in [Architecture::Hgrn2, Architecture::Tnl, Architecture::Llama] {
            let model = model(architecture);
            let sessions = |count: usize| -> Vec<Session> {
                let read = |at: usize| {
                    let mut session = Session::new(&model);
                    let ids = bytes
                        .encode(&format!("{at:03} {}", &PROMPT[..4 + at % 3]), true)
                        .unwrap();
                    session.read(&model, &ids, 4096, |_| true).unwrap();
                    session
                };
                (0..count).map(read).collect()
            };
            let write = |together: usize| {
                let request = Request {
                    together,
                    sampling: Sampling {
                        temperature: 0.0,
                        ..Sampling::default()
                    },
                    ..request(8, 1)
                };
                generate_each(&model, Some(&bytes), &mut sessions(70), &request, |_, _| true).unwrap()
            };
            let alone = write(1);
            assert_eq!(alone, write(MOST_TOGETHER), "{architecture:?}");
            for together in [33, 70] {
                let many = write(together);
                let same = many
                    .iter()
                    .zip(&alone)
                    .filter(|(many, alone)| many == alone)
                    .count();
                assert!(
                    same >= 68,
                    "{architecture:?}: {same} of 70 texts in groups of {together}"
                );
            }
        }
    }

    #[test]
    fn texts_end_where_they_should() {
        let model = model(Architecture::Tnl);
        let bytes = LmTokenizer::bytes();
        let write = |request: &Request| {
            let shown = std::cell::RefCell::new(String::new());
            let mut session = read(&model, 4096);
            let all = generate(&model, Some(&bytes), &mut session, request, |number, new| {
                if number == 0 {
                    shown.borrow_mut().push_str(new);
                }
                true
            });
            let all = all.unwrap();
            assert_eq!(all[0].text, shown.into_inner());
            all
        };
        let whole = write(&request(60, 3));
        // Three characters from the midst of the text.
        let characters: Vec<char> = whole[0].text.chars().collect();
        let string: String = characters[10..13].iter().collect();
        let stopped = write(&Request {
            stop: vec!["never written at all".into(), string.clone()],
            ..request(60, 3)
        });
        let (before, _) = whole[0].text.split_once(&string).unwrap();
        assert_eq!(
            (stopped[0].text.as_str(), stopped[0].stop),
            (before, Stop::String)
        );
        assert!(whole[0].ids.starts_with(&stopped[0].ids));
        let ended = write(&Request {
            end: vec![whole[0].ids[20]],
            ..request(60, 3)
        });
        let at = whole[0]
            .ids
            .iter()
            .position(|&id| id == whole[0].ids[20])
            .unwrap();
        assert_eq!((ended[0].ids.len(), ended[0].stop), (at + 1, Stop::End));
        // What the others write does not depend on who has left.
        for text in &ended[1..] {
            assert!(whole[1..].iter().any(|whole| whole.ids.starts_with(&text.ids)));
        }
        let mut session = read(&model, 4096);
        let mut count = 0;
        let interrupted = generate(&model, None, &mut session, &request(60, 1), |_, _| {
            count += 1;
            count < 5
        });
        let interrupted = interrupted.unwrap();
        assert_eq!(
            (interrupted[0].ids.len(), interrupted[0].stop),
            (5, Stop::Interrupted)
        );
        assert_eq!(interrupted[0].ids, whole[0].ids[..5]);
        let none = write(&request(0, 1));
        assert_eq!((none[0].ids.len(), none[0].stop), (0, Stop::Length));
    }

    #[test]
    fn stop_strings_are_found_across_pieces() {
        let strings = ["abac".to_owned(), "\u{e9}\u{e8}".to_owned()];
        for (pieces, expected, found) in [
            (vec!["xab", "abac", "y"], "xab", true),
            (vec!["aba", "bab"], "ababab", false),
            (vec!["z\u{e9}", "\u{e9}", "\u{e8}q"], "z\u{e9}", true),
            (vec!["abac"], "", true),
            (vec!["", "a", ""], "a", false),
        ] {
            let mut stops = Stops {
                strings: &strings,
                held: String::new(),
            };
            let (mut text, mut stopped) = (String::new(), false);
            for piece in pieces {
                let (shown, now) = stops.push(piece);
                text.push_str(&shown);
                stopped |= now;
                if stopped {
                    break;
                }
            }
            if !stopped {
                text.push_str(&stops.held);
            }
            assert_eq!((text.as_str(), stopped), (expected, found));
        }
    }

    #[test]
    fn states_of_other_models_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        let tnl = model(Architecture::Tnl);
        read(&tnl, 4096).save(&tnl, &path).unwrap();
        let refused = |model: &LanguageModel, words: &str| {
            let line = Session::load(model, &path).unwrap_err().to_string();
            assert!(
                line.contains("state.safetensors") && line.contains(words) && !line.contains('\n'),
                "{line}"
            );
        };
        refused(&model(Architecture::Llama), "a state of another model");
        let config = tnl.config().clone();
        let others = Params::random(4, &Device::Cpu);
        refused(
            &LanguageModel::new(&config, DType::F32, &others.builder()).unwrap(),
            "other weights",
        );
        let whole = crate::params::file::read(&path, &Device::Cpu).unwrap();
        let change = |change: &dyn Fn(&mut crate::params::file::Contents)| {
            let mut contents = crate::params::file::read(&path, &Device::Cpu).unwrap();
            contents.tensors.clone_from(&whole.tensors);
            contents.metadata.clone_from(&whole.metadata);
            change(&mut contents);
            crate::params::file::write(&path, &contents.tensors, &contents.metadata, Default::default())
                .unwrap();
        };
        change(&|c| drop(c.tensors.remove("layer.1.state")));
        refused(&tnl, "`layer.1.state` is missing");
        change(&|c| drop(c.metadata.insert("tokens".into(), "-4".into())));
        refused(&tnl, "tokens is \"-4\"");
        change(&|c| drop(c.metadata.insert("tokens".into(), "7".into())));
        refused(&tnl, "`recent` is U32 [32], expected U32 [7]");
        change(&|c| {
            let far = candle_core::Tensor::full(256u32, 32, &Device::Cpu).unwrap();
            c.tensors.insert("recent".into(), far);
        });
        refused(&tnl, "token 256, expected less than 256");
        change(&|c| {
            let more = c.tensors["logits"].clone();
            c.tensors.insert("more".into(), more);
        });
        refused(&tnl, "`more` is not one");
        std::fs::write(&path, "no state").unwrap();
        refused(&tnl, "not a usable safetensors file");
        let mut empty = Session::new(&tnl);
        assert!(
            empty
                .save(&tnl, &path)
                .unwrap_err()
                .to_string()
                .contains("before the first token")
        );
    }
}
