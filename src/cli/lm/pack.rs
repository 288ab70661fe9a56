//! `fulgur lm pack`: a trained language model becomes a small folder that is used and shipped.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use candle_core::{DType, Device};
use fulgur_lightnet::lm::tokenizer::LmTokenizer;
use fulgur_lightnet::lm::{Config, LanguageModel, expected_shapes};
use fulgur_lightnet::params::file::read_bounded;
use fulgur_lightnet::params::pack::{PackedFolder, Rounding};
use serde::Serialize;

use super::super::answer::{Answer, Report};
use super::super::context::Context;
use super::super::packing::{CARD, Kind, LANGUAGE_FILES, Stored, check_target, model_folder, write_folder};
use super::super::progress::Unit;
use super::card::{Card, Change, FileSize, HeldOut};
use super::{causal, parameters, tokenizer_of};
use crate::lm_eval::Subject;
use crate::lm_eval::perplexity::{Options, Perplexity, perplexity};
use crate::report::grouped;

/// Longest window.
const MOST_CONTEXT: usize = 1 << 17;
/// Tokens of a text that are read at once.
const CHUNK: usize = 4096;
/// Largest `generation_config.json`.
const MOST_SETTINGS: u64 = 1 << 20;
const CONFIG: &str = LANGUAGE_FILES[0];
const TOKENIZER: &str = LANGUAGE_FILES[2];
const SETTINGS: &str = LANGUAGE_FILES[3];

/// Pack a trained language model with its tokenizer into a small folder
///
/// Weights are stored in 8 bits, which every command reads as it reads others. With --held-out the loss on a text is measured before
/// and after. The folder gets a card, README.md, that says what is known of the model, unless there is one; it appears whole or not
/// at all.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur lm pack runs/lm --tokenizer tokenizer.json -o models/english --held-out held_out.u16 --max-bytes 4000000"
)]
pub(super) struct Arguments {
    /// Run or model folder
    #[arg(value_name = "DIR")]
    model: PathBuf,
    /// The folder to write
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// tokenizer.json, instead of the one in the folder of the model
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// How weights are stored
    #[arg(long, value_enum, default_value_t = Stored::EightBit)]
    precision: Stored,
    /// Text, documents (.jsonl) or token ids (.u16) to measure the loss on, before and after
    #[arg(long, value_name = "FILE")]
    held_out: Option<PathBuf>,
    /// Tokens of the windows that it is cut in, as in training
    #[arg(long, value_name = "N", default_value_t = 1024)]
    context: usize,
    /// Refuse to write a folder of more bytes
    #[arg(long, value_name = "N")]
    max_bytes: Option<u64>,
    /// Replace an older language model; files in the folder that pack does not write, and its card, are kept. A folder with
    /// nothing but a README.md is filled without asking
    #[arg(long)]
    force: bool,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    let Arguments {
        output, precision, ..
    } = arguments;
    if !(1..=MOST_CONTEXT).contains(&arguments.context) {
        bail!("context is {}, expected 1 to {MOST_CONTEXT}", arguments.context);
    }
    let kept = check_target(output, Kind::LanguageModel, arguments.force)?;
    let has_card = kept.iter().any(|path| path.ends_with(CARD));
    let source = model_folder(&arguments.model);
    let config = causal(&source)?;
    let tokenizer = tokenizer_of(&source, arguments.tokenizer.as_deref(), config.vocab_size)?;
    let Some(tokenizer) = tokenizer else {
        bail!(
            "{}: found no tokenizer.json and a vocabulary of {}, expected --tokenizer",
            source.display(),
            config.vocab_size
        );
    };
    let device = context.open_device()?;
    // A damaged model is found before anything is made of it.
    let before = Judge::open(&source, &tokenizer, &device)?;
    let packed = pack(&source, &config, &tokenizer, *precision)?;
    let files: Vec<FileSize> = (packed.files.iter())
        .map(|&(name, ref bytes)| FileSize {
            name,
            bytes: bytes.len() as u64,
        })
        .collect();
    check_bytes(arguments, packed.bytes(), &files)?;
    let before = match &arguments.held_out {
        Some(file) => Some(before.losses(context, "before", file, arguments.context)?),
        None => None,
    };
    let parameters = parameters(&config)?;
    let (files, held_out) = write_folder(output, &kept, |dir| {
        packed.write(dir)?;
        // Loaded as its users will.
        let after = Judge::open(dir, &tokenizer, &device)?;
        let held_out = match (&arguments.held_out, before) {
            (Some(file), Some(before)) => {
                let after = after.losses(context, "after", file, arguments.context)?;
                Some(held_out(file, arguments.context, &before, &after))
            }
            _ => None,
        };
        let mut files = files;
        let card = Card {
            path: output,
            config: &config,
            parameters,
            files: &files,
            precision: *precision,
            error: packed.rounding.error,
            held_out: held_out.as_ref(),
        };
        let bytes = match has_card {
            true => fs::metadata(output.join(CARD)).map_or(0, |card| card.len()),
            false => {
                let card = card.to_string();
                fs::write(dir.join(CARD), &card)
                    .with_context(|| format!("{}: cannot write", output.display()))?;
                card.len() as u64
            }
        };
        files.push(FileSize { name: CARD, bytes });
        check_bytes(arguments, files.iter().map(|file| file.bytes).sum(), &files)?;
        Ok((files, held_out))
    })?;
    Answer::new(&Written {
        path: output.clone(),
        architecture: config.architecture.name(),
        parameters,
        precision: *precision,
        bytes: files.iter().map(|file| file.bytes).sum(),
        files,
        card: match has_card {
            true => "kept",
            false => "written",
        },
        error: packed.rounding.error,
        rounding: packed.rounding,
        held_out,
    })
}

/// The folder in memory. What the model does not read is left out, and the tokenizer has no spaces.
fn pack(
    source: &Path,
    config: &Config,
    tokenizer: &LmTokenizer,
    precision: Stored,
) -> anyhow::Result<PackedFolder> {
    let expected = expected_shapes(config)?;
    let mut packed = PackedFolder::new(source, precision.into(), |name| expected.contains_key(name))?;
    packed.files.retain(|(name, _)| *name != TOKENIZER);
    if let Some(json) = tokenizer.file()? {
        packed.files.push((TOKENIZER, json.into_bytes()));
    }
    let settings = source.join(SETTINGS);
    if settings.is_file() {
        packed
            .files
            .push((SETTINGS, read_bounded(&settings, MOST_SETTINGS)?));
    }
    packed.files.sort_by_key(|(name, _)| (*name != CONFIG, *name));
    Ok(packed)
}

fn check_bytes(arguments: &Arguments, bytes: u64, files: &[FileSize]) -> anyhow::Result<()> {
    if let Some(most) = arguments.max_bytes.filter(|&most| bytes > most) {
        let files: Vec<String> = files
            .iter()
            .map(|file| format!("{} {}", file.name, file.bytes))
            .collect();
        bail!(
            "{}: found {bytes} bytes ({}), expected at most {most}; nothing was written",
            arguments.output.display(),
            files.join(", ")
        );
    }
    Ok(())
}

/// A model whose loss is measured.
struct Judge(Subject);

impl Judge {
    fn open(folder: &Path, tokenizer: &LmTokenizer, device: &Device) -> anyhow::Result<Self> {
        Ok(Self(Subject {
            folder: folder.to_owned(),
            model: LanguageModel::load(folder, None, DType::F32, device)?,
            // What a text spells out is text.
            tokenizer: Some(tokenizer.clone().literal()),
            chunk: CHUNK,
        }))
    }

    fn losses(
        &self,
        context: &Context,
        label: &str,
        file: &Path,
        window: usize,
    ) -> anyhow::Result<Perplexity> {
        let total = fs::metadata(file).ok().map(|found| found.len());
        let mut progress = context.progress(label, Unit::Bytes);
        let options = Options {
            context: Some(window),
            before: None,
        };
        let losses = perplexity(&self.0, &[file.to_owned()], &options, |bytes| {
            progress.set(bytes, total);
            !context.interrupt.requested()
        })?;
        if !losses.finished {
            bail!("stopped before the loss was measured; nothing was written");
        }
        Ok(losses)
    }
}

fn held_out(file: &Path, context: usize, before: &Perplexity, after: &Perplexity) -> HeldOut {
    let change = |of: fn(&Perplexity) -> f64| Change {
        before: of(before),
        after: of(after),
    };
    HeldOut {
        file: file.to_owned(),
        context,
        tokens: after.tokens,
        nats_per_token: change(|of| of.nats_per_token),
        perplexity: change(|of| of.perplexity),
        bits_per_byte: (before.bits_per_byte.zip(after.bits_per_byte))
            .map(|(before, after)| Change { before, after }),
    }
}

#[derive(Serialize)]
struct Written {
    path: PathBuf,
    architecture: &'static str,
    parameters: u64,
    precision: Stored,
    bytes: u64,
    files: Vec<FileSize>,
    /// Whether the card was `written` or `kept`.
    card: &'static str,
    /// Root mean square of the rounding errors over that of the weights.
    error: f64,
    #[serde(skip)]
    rounding: Rounding,
    held_out: Option<HeldOut>,
}

impl Report for Written {}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} weights, rounding {:.3} %",
            self.architecture,
            grouped(self.parameters),
            100.0 * self.error
        )?;
        if let Some((tensor, error)) = &self.rounding.worst {
            writeln!(f, "worst rounded: {tensor}, {:.3} %", 100.0 * error)?;
        }
        for file in &self.files {
            let kept = match file.name == CARD && self.card == "kept" {
                true => ", kept as it was",
                false => "",
            };
            writeln!(f, "{:<22} {:>11} bytes{kept}", file.name, grouped(file.bytes))?;
        }
        if let Some(held_out) = &self.held_out {
            let Change { before, after } = held_out.nats_per_token;
            writeln!(
                f,
                "held out: {before:.4} nats a token before, {after:.4} after ({:+.4}), on {} tokens in windows of {}",
                after - before,
                grouped(held_out.tokens),
                held_out.context
            )?;
        }
        write!(f, "{}: {} bytes", self.path.display(), grouped(self.bytes))
    }
}
