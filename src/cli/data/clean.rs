//! `fulgur data clean`: text that is worth training on.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use fulgur_datasets::text::{Cleaned, Options, Reason, Scorer, clean};
use serde::Serialize;

use super::super::answer::{Answer, Report};
use super::super::context::Context;
use super::super::files::check_output;
use super::super::progress::Unit;
use crate::text_score::TextScorer;

/// Documents between two looks at the clock.
const OFTEN: usize = 64;
/// Bytes that are read at once to count lines.
const PIECE: usize = 1 << 20;

/// Keep the documents that are worth training on
///
/// Reads .jsonl files, one {"text": "..."} a line, and any other file as one document of UTF-8. Drops what breaks a rule
/// (length, words, symbols, repetition), exact duplicates and near duplicates; with --score-with also the documents that
/// a language model finds hardest by bits a byte, which is one round of self-cleaning. The same input gives the same output.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur data clean data/english/train.jsonl -o clean.jsonl\n  fulgur data clean clean.jsonl -o cleaner.jsonl --score-with runs/lm/model --drop 0.1"
)]
pub(super) struct Arguments {
    /// Files of text or JSONL
    #[arg(required = true, value_name = "IN")]
    inputs: Vec<PathBuf>,
    /// The file to write
    #[arg(short, long = "output", value_name = "OUT.jsonl")]
    output: PathBuf,
    /// Fewest words of a document
    #[arg(long, value_name = "N", default_value_t = Options::default().least_words)]
    min_words: usize,
    /// Keep near duplicates
    #[arg(long)]
    keep_near: bool,
    /// Folder of a language model that scores what is left
    #[arg(long, value_name = "MODEL_DIR")]
    score_with: Option<PathBuf>,
    /// tokenizer.json of that model, instead of the one in its folder
    #[arg(long, value_name = "FILE", requires = "score_with")]
    tokenizer: Option<PathBuf>,
    /// Share of the scored documents to drop, those with the most bits a byte
    #[arg(long, value_name = "SHARE", requires = "score_with", default_value_t = Options::default().drop)]
    drop: f64,
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    let Arguments {
        inputs,
        output,
        min_words,
        keep_near,
        score_with,
        tokenizer,
        drop,
    } = arguments;
    if !output
        .extension()
        .is_some_and(|ending| ending.eq_ignore_ascii_case("jsonl"))
    {
        bail!(
            "--output: found {}, expected a name that ends in .jsonl",
            output.display()
        );
    }
    if !(0.0..1.0).contains(&drop) {
        bail!("--drop: found {drop}, expected 0 or more and less than 1");
    }
    check_output(&output)?;
    let mut scorer = match &score_with {
        Some(folder) => {
            let device = context.open_device()?;
            Some(TextScorer::open(folder, tokenizer.as_deref(), &device)?)
        }
        None => None,
    };
    let options = Options {
        least_words: min_words,
        near: !keep_near,
        drop,
    };
    // Scores take long enough that the end should be foreseen.
    let total = match &scorer {
        Some(_) => Some(count(&inputs)?),
        None => None,
    };
    let mut progress = context.progress("clean", Unit::Items("documents"));
    let mut advance = |documents: usize| {
        if documents.is_multiple_of(OFTEN) {
            progress.set(documents as u64, total);
        }
        !context.interrupt.requested()
    };
    let scorer = scorer.as_mut().map(|scorer| scorer as &mut dyn Scorer);
    let cleaned = clean(&inputs, &output, &options, scorer, &mut advance)?;
    std::mem::drop(progress);
    Answer::new(&Written {
        path: output,
        cleaned,
    })
}

/// How many documents there are: lines of JSONL, and other files.
fn count(inputs: &[PathBuf]) -> anyhow::Result<u64> {
    let mut documents = 0;
    for path in inputs {
        let is_jsonl = path
            .extension()
            .is_some_and(|ending| ending.eq_ignore_ascii_case("jsonl"));
        if !is_jsonl {
            documents += 1;
            continue;
        }
        let cannot = || format!("{}: cannot read", path.display());
        let mut file = File::open(path).with_context(cannot)?;
        let mut room = vec![0; PIECE];
        loop {
            let read = file.read(&mut room).with_context(cannot)?;
            if read == 0 {
                break;
            }
            documents += room[..read].iter().filter(|&&byte| byte == b'\n').count() as u64;
        }
    }
    Ok(documents)
}

#[derive(Serialize)]
struct Written {
    path: PathBuf,
    #[serde(flatten)]
    cleaned: Cleaned,
}

impl Report for Written {}

/// A reason in words.
fn words(reason: Reason) -> &'static str {
    match reason {
        Reason::Garbled => "garbled",
        Reason::TooShort => "too short",
        Reason::WordLength => "length of words",
        Reason::Symbols => "symbols",
        Reason::FewLetters => "few words with letters",
        Reason::Bullets => "bullets",
        Reason::RepeatedLines => "repeated lines",
        Reason::RepeatedPhrase => "a repeated phrase",
        Reason::NoStopWords => "no stop words",
        Reason::Duplicate => "duplicate",
        Reason::NearDuplicate => "near duplicate",
        Reason::HardToPredict => "hard to predict",
    }
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cleaned {
            documents,
            kept,
            bytes,
            kept_bytes,
            dropped,
            scores,
        } = &self.cleaned;
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        writeln!(
            f,
            "{}: {kept} of {documents} documents, {:.1} of {:.1} MB",
            self.path.display(),
            megabytes(*kept_bytes),
            megabytes(*bytes)
        )?;
        for (&reason, count) in dropped {
            writeln!(f, "{count:>8}  {}", words(reason))?;
        }
        if let Some(scores) = scores {
            writeln!(
                f,
                "bits a byte: {:.4} before, {:.4} after, at most {:.4}",
                scores.bits_per_byte, scores.kept_bits_per_byte, scores.highest_kept
            )?;
        }
        Ok(())
    }
}
