//! `fulgur lm eval answers`: answers in words.

use std::fmt;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use fulgur_datasets::atomic::AtomicFile;
use serde::Serialize;

use super::super::super::answer::{Answer, Report, Status};
use super::super::super::context::Context;
use super::super::super::files::check_output;
use super::super::super::progress::Unit;
use super::super::generate::end_tokens;
use super::{ModelArguments, note_of_the_end, with_error};
use crate::lm_eval::answers::{Answers, Options, answers};
use crate::lm_eval::figures::Estimate;

/// Most tokens of an answer.
const MOST_TOKENS: usize = 1 << 16;

/// Answers in words, scored by F1, exact match and ROUGE as in SCROLLS
///
/// A file has an object {"input": "...", "outputs": ["...", ..]} a line, or "output" with one answer. The model goes on with the input
/// by the likeliest token, up to --max-tokens, a stop string or the end of a text. Of several right answers the best counts. F1 and
/// exact match leave out case, punctuation and articles; ROUGE does not stem words.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur lm eval answers --model DIR qasper.jsonl\n  fulgur lm eval answers --model DIR report.jsonl --max-tokens 512 --write answers.jsonl --json"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Inputs and right answers
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Most tokens of an answer
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    /// End answers before this string; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Most inputs
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Write each answer with its scores, a line of JSON each
    #[arg(long, value_name = "OUT.jsonl")]
    write: Option<PathBuf>,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    if !(1..=MOST_TOKENS).contains(&arguments.max_tokens) {
        bail!(
            "max-tokens is {}, expected 1 to {MOST_TOKENS}",
            arguments.max_tokens
        );
    }
    if arguments.stop.iter().any(String::is_empty) {
        bail!("stop is empty, expected a string to stop at");
    }
    if arguments.limit == Some(0) {
        bail!("limit is 0, expected 1 or more");
    }
    if let Some(path) = &arguments.write {
        check_output(path)?;
    }
    let subject = arguments.model.open(context)?;
    let options = Options {
        max_tokens: arguments.max_tokens,
        end: end_tokens(&subject.folder, subject.tokenizer.as_ref(), subject.vocabulary())?,
        stop: arguments.stop.clone(),
        limit: arguments.limit,
    };
    let cannot = |path: &PathBuf| format!("{}: cannot write", path.display());
    let mut out = match &arguments.write {
        Some(path) => Some((AtomicFile::create(path).with_context(|| cannot(path))?, path)),
        None => None,
    };
    let mut failed = None;
    let mut progress = context.progress("answers", Unit::Items("answers"));
    let mut count = 0;
    let go_on = || !context.interrupt.requested();
    let figures = answers(&subject, &arguments.file, &options, go_on, |answered| {
        count += 1;
        progress.set(count, arguments.limit.map(|limit| limit as u64));
        if let Some((file, _)) = &mut out {
            let line = serde_json::to_string(answered).map_err(std::io::Error::other);
            failed = line.and_then(|line| writeln!(file.file(), "{line}")).err();
        }
        failed.is_none()
    })?;
    drop(progress);
    if let Some((file, path)) = out {
        if let Some(error) = failed {
            return Err(error).with_context(|| cannot(path));
        }
        file.commit().with_context(|| cannot(path))?;
    }
    Answer::new(&Judged {
        model: arguments.model.model.clone(),
        file: arguments.file.clone(),
        answers: arguments.write.clone(),
        figures: Figures::of(&figures),
        n: figures.n,
        finished: figures.finished,
    })
}

#[derive(Serialize)]
struct Judged {
    model: PathBuf,
    file: PathBuf,
    /// The file with all answers.
    answers: Option<PathBuf>,
    n: usize,
    #[serde(flatten)]
    figures: Figures,
    finished: bool,
}

#[derive(Serialize)]
struct Figures {
    f1: f64,
    f1_stderr: Option<f64>,
    exact_match: f64,
    exact_match_stderr: Option<f64>,
    rouge_1: f64,
    rouge_1_stderr: Option<f64>,
    rouge_2: f64,
    rouge_2_stderr: Option<f64>,
    rouge_l: f64,
    rouge_l_stderr: Option<f64>,
    rouge_mean: f64,
    rouge_mean_stderr: Option<f64>,
}

impl Figures {
    fn of(answers: &Answers) -> Self {
        let split = |estimate: Estimate| (estimate.mean, estimate.stderr);
        let (f1, f1_stderr) = split(answers.f1);
        let (exact_match, exact_match_stderr) = split(answers.exact_match);
        let (rouge_1, rouge_1_stderr) = split(answers.rouge_1);
        let (rouge_2, rouge_2_stderr) = split(answers.rouge_2);
        let (rouge_l, rouge_l_stderr) = split(answers.rouge_l);
        let (rouge_mean, rouge_mean_stderr) = split(answers.rouge_mean);
        Self {
            f1,
            f1_stderr,
            exact_match,
            exact_match_stderr,
            rouge_1,
            rouge_1_stderr,
            rouge_2,
            rouge_2_stderr,
            rouge_l,
            rouge_l_stderr,
            rouge_mean,
            rouge_mean_stderr,
        }
    }
}

impl Report for Judged {
    fn status(&self) -> Status {
        match self.finished {
            true => Status::Done,
            false => Status::Partial,
        }
    }
}

impl fmt::Display for Judged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let figures = &self.figures;
        for (name, mean, stderr) in [
            ("F1", figures.f1, figures.f1_stderr),
            ("exact match", figures.exact_match, figures.exact_match_stderr),
            ("ROUGE-1", figures.rouge_1, figures.rouge_1_stderr),
            ("ROUGE-2", figures.rouge_2, figures.rouge_2_stderr),
            ("ROUGE-L", figures.rouge_l, figures.rouge_l_stderr),
            ("ROUGE, mean", figures.rouge_mean, figures.rouge_mean_stderr),
        ] {
            writeln!(f, "{name:<12} {}", with_error(mean, stderr))?;
        }
        writeln!(f, "{} answers", self.n)?;
        if let Some(path) = &self.answers {
            writeln!(f, "written to {}", path.display())?;
        }
        f.write_str(note_of_the_end(self.finished))
    }
}
