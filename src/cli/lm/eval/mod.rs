//! `fulgur lm eval`: how good a language model is.

mod answers;
mod choice;
mod needle;
mod perplexity;
mod recall;

use std::path::PathBuf;

use anyhow::bail;
use candle_core::DType;
use fulgur_lightnet::lm::LanguageModel;
use fulgur_lightnet::lm::tokenizer::LmTokenizer;

use super::super::answer::Answer;
use super::super::context::Context;
use super::generate::LONGEST_CHUNK;
use super::{causal, tokenizer_of};
use crate::lm_eval::Subject;

/// Judge a language model: perplexity, choices, needles, recall, answers
///
/// Everything is read from local files. Figures come with standard errors. Ctrl-C ends with the figures of what was done by then,
/// and exit code 1.
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = false,
    after_help = "Example:\n  fulgur lm eval perplexity --model DIR held_out.jsonl\n  fulgur lm eval choice --model DIR boolq=boolq.jsonl piqa=piqa.jsonl"
)]
pub(super) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Perplexity(perplexity::Arguments),
    Choice(choice::Arguments),
    Needle(needle::Arguments),
    Recall(recall::Arguments),
    Answers(answers::Arguments),
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    match arguments.what {
        What::Perplexity(arguments) => perplexity::run(context, &arguments),
        What::Choice(arguments) => choice::run(context, &arguments),
        What::Needle(arguments) => needle::run(context, &arguments),
        What::Recall(arguments) => recall::run(context, &arguments),
        What::Answers(arguments) => answers::run(context, &arguments),
    }
}

/// The model that is judged.
#[derive(Debug, clap::Args)]
struct ModelArguments {
    /// Folder of the model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// tokenizer.json, instead of the one in the folder of the model
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Tokens that are read at once
    #[arg(long, value_name = "N", default_value_t = 4096)]
    chunk: usize,
}

impl ModelArguments {
    fn open(&self, context: &Context) -> anyhow::Result<Subject> {
        if !(1..=LONGEST_CHUNK).contains(&self.chunk) {
            bail!("chunk is {}, expected 1 to {LONGEST_CHUNK}", self.chunk);
        }
        let config = causal(&self.model)?;
        let tokenizer = tokenizer_of(&self.model, self.tokenizer.as_deref(), config.vocab_size)?;
        let device = context.open_device()?;
        Ok(Subject {
            folder: self.model.clone(),
            model: LanguageModel::load(&self.model, None, DType::F32, &device)?,
            // What a text spells out is text.
            tokenizer: tokenizer.map(LmTokenizer::literal),
            chunk: self.chunk,
        })
    }
}

/// A value with its error, as `0.512 +- 0.031`.
fn with_error(mean: f64, stderr: Option<f64>) -> String {
    match stderr {
        Some(stderr) => format!("{mean:.4} +- {stderr:.4}"),
        None => format!("{mean:.4}"),
    }
}

/// What the text of a report ends with.
fn note_of_the_end(finished: bool) -> &'static str {
    match finished {
        true => "",
        false => "stopped before the end\n",
    }
}
