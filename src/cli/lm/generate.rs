//! `fulgur lm generate`: a language model goes on with a text.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::bail;
use candle_core::DType;
use fulgur_lightnet::lm::generate::{Continuation, Request, Stop, generate, generate_each};
use fulgur_lightnet::lm::sampling::Sampling;
use fulgur_lightnet::lm::tokenizer::LmTokenizer;
use fulgur_lightnet::lm::{Config, LanguageModel, MOST_TOGETHER, Session};
use serde::Serialize;
use serde_json::Value;

use super::super::answer::{Answer, Report, Status};
use super::super::context::Context;
use super::super::files::check_output;
use super::super::progress::Unit;
use super::{Weights, causal, free_memory, read_text, tokenizer_of};
use crate::decode::compute;
use crate::doctor::available_memory;

/// Most tokens that are written.
const MOST_TOKENS: usize = 1 << 24;
/// Most texts behind one prompt.
const MOST_SAMPLES: usize = 1 << 12;
/// Texts that are decoded at once on a GPU.
const ON_A_GPU: usize = 1024;
/// Most tokens that are read at once.
pub(super) const LONGEST_CHUNK: usize = 1 << 17;

/// Go on with a text
///
/// The text appears on standard output while it is written. Prompts are read in chunks, and what the model keeps of them has a size
/// that does not depend on their length, except for softmax attention. --save-state writes it to a file, from which --state goes
/// on without the prompt. The same seed gives the same text.
///
/// Tokens are chosen in this order: repetition penalty, temperature, top-k, top-p, min-p, draw.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur lm generate --model runs/book/export --prompt \"The bell\" --max-tokens 200 --seed 7\n  \
                  fulgur lm generate --model DIR --prompt-file book.txt --max-tokens 0 --save-state book.state\n  \
                  fulgur lm generate --model DIR --state book.state --prompt \"In short,\" --top-p 0.9"
)]
pub(super) struct Arguments {
    /// Folder of the model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Text to go on with; several are gone on with at once
    #[arg(short, long, value_name = "TEXT", conflicts_with_all = ["prompt_file", "prompt_ids", "prompts"])]
    prompt: Vec<String>,
    /// File with the text to go on with; - for standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt_ids", "prompts"])]
    prompt_file: Option<PathBuf>,
    /// File with a text to go on with in each line; - for standard input
    #[arg(long, value_name = "FILE", conflicts_with = "prompt_ids")]
    prompts: Option<PathBuf>,
    /// Token ids to go on with, for models without a tokenizer
    #[arg(long, value_name = "ID,..", value_delimiter = ',')]
    prompt_ids: Option<Vec<u32>>,
    /// tokenizer.json, instead of the one in the folder of the model
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Most tokens to write
    #[arg(short = 'n', long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// Seed of the draws
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Texts to write behind the one prompt
    #[arg(long, value_name = "N", default_value_t = 1)]
    samples: usize,
    /// Most texts that are decoded at once, as far as there is memory; 16 on a CPU if absent, which have the logits that they have
    /// alone, and 1024 on a GPU. With more the last digits differ
    #[arg(long, value_name = "N")]
    together: Option<usize>,
    /// What logits are divided by; 0 takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 1.0, allow_negative_numbers = true)]
    temperature: f64,
    /// Choose among the K likeliest tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Choose among the fewest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f64,
    /// Choose among tokens at least so probable beside the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    min_p: f64,
    /// Divide positive logits of recent tokens by this, multiply negative ones; 1 for nothing
    #[arg(long, value_name = "R", default_value_t = 1.0, allow_negative_numbers = true)]
    repetition_penalty: f64,
    /// How many of the last tokens are recent
    #[arg(long, value_name = "N", default_value_t = 64)]
    penalty_window: usize,
    /// End the text before this string; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Tokens of the prompt that are read at once
    #[arg(long, value_name = "N", default_value_t = 4096)]
    chunk: usize,
    /// Type of the weights; on a GPU also of what is computed between the sums
    #[arg(long, value_enum, default_value_t = Weights::F32)]
    dtype: Weights,
    /// Go on from a state that was saved
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Save the state behind the text
    #[arg(long, value_name = "FILE")]
    save_state: Option<PathBuf>,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    let mut request = arguments.request()?;
    if let Some(path) = &arguments.save_state {
        check_output(path)?;
    }
    let config = causal(&arguments.model)?;
    let vocabulary = config.vocab_size;
    let tokenizer = tokenizer_of(&arguments.model, arguments.tokenizer.as_deref(), vocabulary)?;
    request.end = end_tokens(&arguments.model, tokenizer.as_ref(), vocabulary)?;
    let prompts = arguments.prompts(tokenizer.as_ref(), vocabulary)?;
    if prompts.len() > 1
        && (request.samples > 1 || arguments.state.is_some() || arguments.save_state.is_some())
    {
        bail!(
            "{} prompts, expected one with --samples, --state or --save-state",
            prompts.len()
        );
    }
    let began = Instant::now();
    let device = context.open_device()?;
    let weights = arguments.dtype.dtype();
    let compute = compute(weights, &device);
    let model = LanguageModel::load(&arguments.model, None, compute, &device)?.rounded(weights)?;
    let load_s = began.elapsed().as_secs_f64();
    let first = match &arguments.state {
        Some(path) => Session::load(&model, path)?,
        None => Session::new(&model),
    };
    let tokens_before = first.tokens();
    request.together = arguments.at_once(&model, &prompts)?;
    check_memory(&config, compute, tokens_before, &prompts, &request)?;

    let streaming = !context.json && request.samples * prompts.len() == 1;
    let show = Show {
        context,
        streaming,
        failed: None,
    };
    let mut writing = Writing {
        model: &model,
        tokenizer: tokenizer.as_ref(),
        request: &request,
        chunk: arguments.chunk,
        show,
        texts: BTreeMap::new(),
        done: Done::default(),
    };
    writing.all(first, &prompts, arguments.save_state.as_deref())?;
    let Writing {
        show, texts, done, ..
    } = writing;
    // A reader that has seen enough is no error.
    if let Some(error) = show
        .failed
        .filter(|error| error.kind() != io::ErrorKind::BrokenPipe)
    {
        bail!("standard output: {error}");
    }
    let samples: Vec<Continuation> = texts.into_values().flatten().collect();
    let written: usize = samples.iter().map(|text| text.ids.len()).sum();
    let rate = |tokens: usize, seconds: f64| (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds);
    let answer = Generated {
        model: arguments.model.clone(),
        seed: arguments.seed,
        tokens_before,
        prompt_tokens: done.prompt_tokens,
        tokens: done.tokens,
        together: request.together,
        tokens_per_s: rate(written, done.generate_s),
        prompt_tokens_per_s: rate(done.prompt_tokens, done.prefill_s),
        state_bytes: done.state_bytes,
        state: arguments.save_state.clone(),
        samples,
        timings: Timings {
            load_s,
            prefill_s: done.prefill_s,
            generate_s: done.generate_s,
        },
        streamed: streaming && tokenizer.is_some(),
        has_text: tokenizer.is_some(),
    };
    context.note(&answer.summary(written));
    Answer::new(&answer)
}

/// Where text goes while it is written.
struct Show<'a> {
    context: &'a Context,
    streaming: bool,
    failed: Option<io::Error>,
}

impl Show<'_> {
    /// Shows some text; whether to go on.
    fn push(&mut self, new: &str) -> bool {
        if self.streaming && !new.is_empty() && self.failed.is_none() {
            let mut out = io::stdout().lock();
            let written = out.write_all(new.as_bytes()).and_then(|()| out.flush());
            self.failed = written.err();
        }
        self.failed.is_none() && !self.context.interrupt.requested()
    }
}

/// What was done, over all prompts.
#[derive(Default)]
struct Done {
    prompt_tokens: usize,
    tokens: usize,
    state_bytes: usize,
    prefill_s: f64,
    generate_s: f64,
}

/// Texts on their way. Prompts are read and written behind in groups, so that there are states of one group alone.
struct Writing<'a> {
    model: &'a LanguageModel,
    tokenizer: Option<&'a LmTokenizer>,
    request: &'a Request,
    chunk: usize,
    show: Show<'a>,
    /// By the place of the prompt.
    texts: BTreeMap<usize, Vec<Continuation>>,
    done: Done,
}

impl Writing<'_> {
    /// Writes behind all prompts, which stand behind `first`; the state behind the only one goes to the file `save`.
    fn all(&mut self, first: Session, prompts: &[Vec<u32>], save: Option<&Path>) -> anyhow::Result<()> {
        let all: usize = prompts.iter().map(Vec::len).sum();
        let context = self.show.context;
        let mut progress = context.progress("read", Unit::Items("tokens"));
        for group in self.groups(prompts) {
            let began = Instant::now();
            let mut sessions = vec![first.clone(); group.len()];
            let mut read = 0;
            for (session, &place) in sessions.iter_mut().zip(&group) {
                let before = self.done.prompt_tokens + read;
                read += session.read(self.model, &prompts[place], self.chunk, |done| {
                    // A prompt that is read at once needs no progress.
                    if all > self.chunk {
                        progress.set((before + done) as u64, Some(all as u64));
                    }
                    !context.interrupt.requested()
                })?;
            }
            self.done.prompt_tokens += read;
            self.done.prefill_s += began.elapsed().as_secs_f64();
            let wanted: usize = group.iter().map(|&place| prompts[place].len()).sum();
            if read < wanted {
                if self.texts.is_empty() {
                    bail!("stopped after {read} of {all} tokens of the prompt");
                }
                break;
            }
            let began = Instant::now();
            let (model, tokenizer, show) = (self.model, self.tokenizer, &mut self.show);
            let show = |_: usize, new: &str| show.push(new);
            match sessions.as_mut_slice() {
                [session] => {
                    let texts = generate(model, tokenizer, session, self.request, show)?;
                    self.texts.insert(group[0], texts);
                    if let Some(path) = save {
                        session.save(model, path)?;
                    }
                }
                sessions => {
                    let texts = generate_each(model, tokenizer, sessions, self.request, show)?;
                    let texts = texts.into_iter().map(|text| vec![text]);
                    self.texts.extend(group.iter().copied().zip(texts));
                }
            }
            self.done.generate_s += began.elapsed().as_secs_f64();
            self.done.tokens += sessions.iter().map(Session::tokens).sum::<usize>();
            self.done.state_bytes += sessions.iter().map(Session::state_bytes).sum::<usize>();
            if context.interrupt.requested() {
                break;
            }
        }
        // Those that nobody got to.
        for place in 0..prompts.len() {
            self.texts.entry(place).or_insert_with(|| {
                vec![Continuation {
                    text: String::new(),
                    ids: Vec::new(),
                    stop: Stop::Interrupted,
                }]
            });
        }
        Ok(())
    }

    /// Places of prompts that are written behind at once: of one length where the model sees positions.
    fn groups(&self, prompts: &[Vec<u32>]) -> Vec<Vec<usize>> {
        let mut lengths: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (place, prompt) in prompts.iter().enumerate() {
            let length = match self.model.config().sees_positions() {
                true => prompt.len(),
                false => 0,
            };
            lengths.entry(length).or_default().push(place);
        }
        let chunks = lengths
            .values()
            .flat_map(|places| places.chunks(self.request.together));
        chunks.map(<[usize]>::to_vec).collect()
    }
}

impl Arguments {
    /// How many texts are decoded at once: as many as were asked for, or as there is memory for.
    fn at_once(&self, model: &LanguageModel, prompts: &[Vec<u32>]) -> anyhow::Result<usize> {
        let wanted = self.together.unwrap_or(match model.device().is_cpu() {
            true => MOST_TOGETHER,
            false => ON_A_GPU,
        });
        let wanted = wanted.min(self.samples.max(prompts.len()));
        if wanted == 1 {
            return Ok(1);
        }
        let Some(free) = free_memory(model.device())? else {
            return Ok(wanted);
        };
        let mut probe = Session::new(model);
        probe.read(model, &[0], 1, |_| true)?;
        let config = model.config();
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0) + self.max_tokens;
        let kept = config.growth(model.compute()).saturating_mul(longest as u64);
        let kept = kept.max(probe.state_bytes() as u64);
        // A text's state as it is read, as one of many, and as the next token makes it; and its logits.
        let each = kept
            .saturating_mul(3)
            .saturating_add(16 * config.vocab_size as u64);
        Ok(wanted.min((free / 2 / each.max(1)) as usize).max(1))
    }

    fn request(&self) -> anyhow::Result<Request> {
        let sampling = Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            penalty_window: self.penalty_window,
            seed: self.seed,
        };
        sampling.check()?;
        for (name, value, range) in [
            ("max-tokens", self.max_tokens, 0..=MOST_TOKENS),
            ("samples", self.samples, 1..=MOST_SAMPLES),
            ("chunk", self.chunk, 1..=LONGEST_CHUNK),
            ("together", self.together.unwrap_or(1), 1..=MOST_SAMPLES),
        ] {
            if !range.contains(&value) {
                bail!("{name} is {value}, expected {} to {}", range.start(), range.end());
            }
        }
        if self.stop.iter().any(String::is_empty) {
            bail!("stop is empty, expected a string to stop at");
        }
        if self.save_state.is_some() && self.samples > 1 {
            bail!("{} samples, expected one to save the state behind", self.samples);
        }
        Ok(Request {
            max_tokens: self.max_tokens,
            sampling,
            end: Vec::new(),
            stop: self.stop.clone(),
            samples: self.samples,
            together: 1,
        })
    }

    /// The ids of the prompts; some of each, unless there is a state to go on from.
    fn prompts(&self, tokenizer: Option<&LmTokenizer>, vocabulary: usize) -> anyhow::Result<Vec<Vec<u32>>> {
        let texts = match (&self.prompt_file, &self.prompts) {
            (Some(path), _) => vec![read_text(path)?],
            (None, Some(path)) => read_text(path)?.lines().map(str::to_owned).collect(),
            (None, None) => self.prompt.clone(),
        };
        let prompts = match (&self.prompt_ids, tokenizer) {
            (Some(ids), _) => vec![ids.clone()],
            (None, Some(tokenizer)) if !texts.is_empty() => {
                let encoded = texts
                    .iter()
                    .map(|text| tokenizer.encode(text, self.state.is_none()));
                encoded.collect::<Result<_, _>>()?
            }
            (None, None) if !texts.is_empty() => bail!(
                "{}: found no tokenizer.json and a vocabulary of {vocabulary}, expected --tokenizer or --prompt-ids",
                self.model.display()
            ),
            (None, _) => vec![Vec::new()],
        };
        if prompts.len() > MOST_SAMPLES {
            bail!("{} prompts, expected at most {MOST_SAMPLES}", prompts.len());
        }
        for (number, ids) in prompts.iter().enumerate() {
            let name = match prompts.len() {
                1 => "the prompt".to_owned(),
                _ => format!("prompt {}", number + 1),
            };
            if let Some(at) = ids.iter().position(|&id| id as usize >= vocabulary) {
                let id = ids[at];
                bail!("token {at} of {name} is {id}, expected less than {vocabulary}, the vocabulary");
            }
            if ids.is_empty() && self.state.is_none() {
                bail!("{name} is empty, expected text to go on with");
            }
        }
        Ok(prompts)
    }
}

/// Tokens that end a text: what the model says, else the tokenizer's own.
pub(super) fn end_tokens(
    model: &Path,
    tokenizer: Option<&LmTokenizer>,
    vocabulary: usize,
) -> anyhow::Result<Vec<u32>> {
    for name in ["generation_config.json", "config.json"] {
        let path = model.join(name);
        if !path.is_file() {
            continue;
        }
        let all: Value = fulgur_lightnet::config::read(&path)?;
        let said = &all["eos_token_id"];
        let list = match said {
            Value::Null => continue,
            Value::Array(list) => list.clone(),
            one => vec![one.clone()],
        };
        let known = |id: &Value| id.as_u64().filter(|&id| id < vocabulary as u64);
        let ids: Option<Vec<u32>> = list.iter().map(|id| known(id).map(|id| id as u32)).collect();
        let Some(ids) = ids else {
            bail!(
                "{}: eos_token_id is {said}, expected tokens below {vocabulary}",
                path.display()
            );
        };
        return Ok(ids);
    }
    Ok(tokenizer.and_then(LmTokenizer::end).into_iter().collect())
}

/// Refuses what keys and values of softmax attention would not fit into the memory for.
fn check_memory(
    config: &Config,
    compute: DType,
    before: usize,
    prompts: &[Vec<u32>],
    request: &Request,
) -> anyhow::Result<()> {
    let read = before + prompts.iter().map(Vec::len).max().unwrap_or(0);
    let texts = (request.samples * prompts.len()).min(request.together) as u64;
    let prompts = prompts.len().min(request.together) as u64;
    let rows = prompts.saturating_mul(read as u64);
    let rows = rows.saturating_add(texts.saturating_mul((read + request.max_tokens) as u64));
    let bytes = config.growth(compute).saturating_mul(rows);
    let Some(available) = available_memory() else {
        return Ok(());
    };
    if bytes > available {
        bail!(
            "keys and values of {read} tokens and {} more need {:.1} GB, expected at most the {:.1} GB that are free",
            request.max_tokens,
            bytes as f64 / 1e9,
            available as f64 / 1e9
        );
    }
    Ok(())
}

#[derive(Serialize)]
struct Generated {
    model: PathBuf,
    seed: u64,
    /// Of the state that was gone on from.
    tokens_before: usize,
    prompt_tokens: usize,
    /// Of the sequence now, with a single sample; of several prompts, theirs.
    tokens: usize,
    /// Texts that were decoded at once, at most.
    together: usize,
    /// Of all samples together.
    tokens_per_s: Option<f64>,
    prompt_tokens_per_s: Option<f64>,
    state_bytes: usize,
    state: Option<PathBuf>,
    samples: Vec<Continuation>,
    timings: Timings,
    #[serde(skip)]
    streamed: bool,
    #[serde(skip)]
    has_text: bool,
}

#[derive(Serialize)]
struct Timings {
    load_s: f64,
    prefill_s: f64,
    generate_s: f64,
}

impl Generated {
    fn summary(&self, written: usize) -> String {
        let rate = |rate: Option<f64>| rate.map_or(String::new(), |rate| format!(", {rate:.0} a second"));
        let mut line = format!(
            "{} tokens read{}; {written} written{}",
            self.prompt_tokens,
            rate(self.prompt_tokens_per_s),
            rate(self.tokens_per_s)
        );
        if let Some(path) = &self.state {
            line.push_str(&format!(
                "; state of {} tokens, {} bytes, in {}",
                self.tokens,
                self.state_bytes,
                path.display()
            ));
        }
        line
    }
}

impl Report for Generated {
    fn status(&self) -> Status {
        match self.samples.iter().any(|text| text.stop == Stop::Interrupted) {
            true => Status::Partial,
            false => Status::Done,
        }
    }
}

impl fmt::Display for Generated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.streamed {
            // The text is there; the line ends.
            return match self.samples.iter().all(|text| text.ids.is_empty()) {
                true => Ok(()),
                false => writeln!(f),
            };
        }
        for (number, sample) in self.samples.iter().enumerate() {
            if self.samples.len() > 1 {
                writeln!(f, "[{}]", number + 1)?;
            }
            match self.has_text {
                true => writeln!(f, "{}", sample.text)?,
                false => {
                    let ids: Vec<String> = sample.ids.iter().map(u32::to_string).collect();
                    writeln!(f, "{}", ids.join(","))?;
                }
            }
        }
        Ok(())
    }
}
