//! `fulgur lm eval perplexity`: how likely a model finds texts.

use std::fmt;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::bail;
use serde::Serialize;

use super::super::super::answer::{Answer, Report, Status};
use super::super::super::context::Context;
use super::super::super::progress::Unit;
use super::{ModelArguments, note_of_the_end, with_error};
use crate::lm_eval::perplexity::{By, Options, Perplexity, perplexity};

/// Longest window.
const MOST_CONTEXT: usize = 1 << 24;

/// Nats a token, perplexity and bits a byte of texts
///
/// A file that ends in .jsonl has a document {"text": "..."} a line, one that ends in .u16 token ids of two bytes, any other is a
/// text. Documents are read whole, however long they are, or with --context in windows that begin with nothing, as in training.
/// Every token counts once. The token that the tokenizer begins or ends texts with stands in front of each document of text; where
/// there is none, the first token of a document is given and does not count. The standard error is by documents, or by blocks of
/// 512 tokens where there are fewer than 30 documents.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur lm eval perplexity --model DIR held_out.jsonl\n  fulgur lm eval perplexity --model DIR --context 256 book.txt --json"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Texts, documents (.jsonl) or token ids (.u16)
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Cut texts in windows of so many tokens
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// The token in front of each document, instead of the tokenizer's
    #[arg(long, value_name = "ID")]
    before: Option<u32>,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    if let Some(window) = arguments.context
        && !(1..=MOST_CONTEXT).contains(&window)
    {
        bail!("context is {window}, expected 1 to {MOST_CONTEXT}");
    }
    let subject = arguments.model.open(context)?;
    let sizes = arguments.files.iter().map(std::fs::metadata);
    let total: Option<u64> = sizes.map(|size| Some(size.ok()?.len())).sum();
    let options = Options {
        context: arguments.context,
        before: arguments.before,
    };
    let began = Instant::now();
    let mut progress = context.progress("perplexity", Unit::Bytes);
    let figures = perplexity(&subject, &arguments.files, &options, |bytes| {
        progress.set(bytes, total);
        !context.interrupt.requested()
    })?;
    drop(progress);
    let seconds = began.elapsed().as_secs_f64();
    Answer::new(&Judged {
        model: arguments.model.model.clone(),
        files: arguments.files.clone(),
        context: arguments.context,
        tokens_per_s: (seconds > 0.0).then(|| figures.tokens as f64 / seconds),
        figures,
    })
}

#[derive(Serialize)]
struct Judged {
    model: PathBuf,
    files: Vec<PathBuf>,
    context: Option<usize>,
    #[serde(flatten)]
    figures: Perplexity,
    tokens_per_s: Option<f64>,
}

impl Report for Judged {
    fn status(&self) -> Status {
        match self.figures.finished {
            true => Status::Done,
            false => Status::Partial,
        }
    }
}

impl fmt::Display for Judged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let figures = &self.figures;
        let nats = with_error(figures.nats_per_token, figures.nats_per_token_stderr);
        writeln!(f, "nats a token  {nats}")?;
        let perplexity = with_error(figures.perplexity, figures.perplexity_stderr);
        writeln!(f, "perplexity    {perplexity}")?;
        if let Some(bits) = figures.bits_per_byte {
            writeln!(
                f,
                "bits a byte   {}",
                with_error(bits, figures.bits_per_byte_stderr)
            )?;
        }
        let by = match figures.stderr_by {
            By::Documents => "documents",
            By::Blocks => "blocks",
        };
        write!(f, "{} tokens", figures.tokens)?;
        if let Some(bytes) = figures.bytes {
            write!(f, ", {bytes} bytes")?;
        }
        let documents = match figures.documents {
            1 => "1 document".to_owned(),
            count => format!("{count} documents"),
        };
        writeln!(f, ", {documents}; standard errors by {by}")?;
        f.write_str(note_of_the_end(figures.finished))
    }
}
