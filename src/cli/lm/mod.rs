//! `fulgur lm`: language models that write, and their tokenizers.

mod bench;
mod card;
mod eval;
mod generate;
mod pack;
mod tokenizer;

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context as _, bail};
use candle_core::{DType, Device};
use clap::ValueEnum;
use fulgur_lightnet::lm::tokenizer::LmTokenizer;
use fulgur_lightnet::lm::{Config, LanguageModel, expected_shapes};
use serde::Serialize;

use super::answer::Answer;
use super::context::Context;
use crate::decode::compute;
use crate::doctor::available_memory;

/// Write text with a language model, judge it, measure how fast it is, pack it, train tokenizers
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = false,
    after_help = "Example:\n  fulgur lm generate --model DIR --prompt \"The bell\"\n  fulgur lm tokenizer train book.txt"
)]
pub(super) struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    Generate(generate::Arguments),
    Bench(bench::Arguments),
    Eval(eval::Arguments),
    Pack(pack::Arguments),
    Tokenizer(tokenizer::Arguments),
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    match arguments.action {
        Action::Generate(arguments) => generate::run(context, &arguments),
        Action::Bench(arguments) => bench::run(context, &arguments),
        Action::Eval(arguments) => eval::run(context, arguments),
        Action::Pack(arguments) => pack::run(context, &arguments),
        Action::Tokenizer(arguments) => tokenizer::run(context, arguments),
    }
}

/// Type of the weights that a token reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Weights {
    /// 32 bits
    F32,
    /// The upper 16 of them, half as much to read
    Bf16,
}

impl Weights {
    pub(super) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

/// The configuration of a causal model.
fn causal(model: &Path) -> anyhow::Result<Config> {
    let config = Config::read(&model.join("config.json"), None)?;
    if config.bidirectional {
        bail!(
            "{}: a model in both directions, expected a causal one",
            model.display()
        );
    }
    Ok(config)
}

/// A causal model with its tokenizer and the tokens that end a text, for other commands that let one write.
pub(super) fn writer(
    context: &Context,
    dir: &Path,
) -> anyhow::Result<(LanguageModel, LmTokenizer, Vec<u32>)> {
    let config = causal(dir)?;
    let Some(tokenizer) = tokenizer_of(dir, None, config.vocab_size)? else {
        bail!("{}: found no tokenizer.json, expected one", dir.display());
    };
    let end = generate::end_tokens(dir, Some(&tokenizer), config.vocab_size)?;
    let device = context.open_device()?;
    let model = LanguageModel::load(dir, None, compute(DType::F32, &device), &device)?;
    Ok((model, tokenizer, end))
}

/// Bytes that are free on `device`, where that is known.
#[cfg_attr(
    not(feature = "cuda"),
    allow(unused_variables, clippy::unnecessary_wraps, reason = "there are no GPUs")
)]
fn free_memory(device: &Device) -> anyhow::Result<Option<u64>> {
    #[cfg(feature = "cuda")]
    if let Some(memory) = fulgur_kernels::device::memory(device)? {
        return Ok(Some(memory.free));
    }
    Ok(available_memory())
}

/// How many weights a model has.
fn parameters(config: &Config) -> anyhow::Result<u64> {
    let shapes = expected_shapes(config)?;
    let sizes = shapes
        .values()
        .map(|shape| shape.iter().product::<usize>() as u64);
    Ok(sizes.sum())
}

/// The tokenizer that was chosen, else that of the model's folder.
fn tokenizer_of(
    model: &Path,
    chosen: Option<&Path>,
    vocabulary: usize,
) -> anyhow::Result<Option<LmTokenizer>> {
    let Some(path) = chosen else {
        return Ok(LmTokenizer::of_model(model, vocabulary)?);
    };
    let tokenizer = LmTokenizer::read(path)?;
    tokenizer.fits(vocabulary)?;
    Ok(Some(tokenizer))
}

/// Largest text that is read.
const MOST_BYTES: u64 = 1 << 30;

/// The text of a file, or of standard input where the name is `-`.
fn read_text(path: &Path) -> anyhow::Result<String> {
    let standard_input = path == Path::new("-");
    let name = match standard_input {
        true => "standard input".to_owned(),
        false => path.display().to_string(),
    };
    let mut bytes = Vec::new();
    let read = match standard_input {
        true => io::stdin().lock().take(MOST_BYTES + 1).read_to_end(&mut bytes),
        false => File::open(path).and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut bytes)),
    };
    read.with_context(|| name.clone())?;
    if bytes.len() as u64 > MOST_BYTES {
        bail!("{name}: more than {MOST_BYTES} bytes, expected at most that");
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        anyhow::anyhow!("{name}: byte {at} is no UTF-8, expected text")
    })
}
