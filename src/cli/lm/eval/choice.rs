//! `fulgur lm eval choice`: questions with choices.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::ValueEnum;
use serde::Serialize;

use super::super::super::answer::{Answer, Report, Status};
use super::super::super::context::Context;
use super::super::super::progress::Unit;
use super::{ModelArguments, note_of_the_end, with_error};
use crate::lm_eval::choice::{Format, Options, Scored, score};
use crate::lm_eval::figures::Estimate;

/// Questions with choices, as the standard harness asks them
///
/// A file has a question a line, with the columns that the data set has on the Hugging Face Hub; other columns are refused. The answer
/// is the choice with the largest sum of log p(choice | context): acc. For acc_norm the sum is over the bytes of the choice. Of
/// WinoGrande what follows the blank is compared. With several files their mean is given too: of acc, or of acc_norm for HellaSwag,
/// the challenge of ARC, and OpenBookQA. Formats: boolq, piqa, siqa, hellaswag, winogrande, arc-easy, arc-challenge, openbookqa.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur lm eval choice --model DIR --format piqa piqa.jsonl\n  fulgur lm eval choice --model DIR boolq=boolq.jsonl arc-easy=easy.jsonl --json"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Files of questions, with their format before them or in --format
    #[arg(required = true, value_name = "[FORMAT=]FILE")]
    files: Vec<PathBuf>,
    /// Format of files that come without one
    #[arg(long, value_name = "FORMAT", hide_possible_values = true)]
    format: Option<Format>,
    /// Most questions of each file
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Begin contexts with what the tokenizer puts in front of texts; the standard harness leaves it out
    #[arg(long)]
    start: bool,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    if arguments.limit == Some(0) {
        bail!("limit is 0, expected 1 or more");
    }
    let files: Vec<(Format, PathBuf)> = (arguments.files.iter())
        .map(|file| with_format(file, arguments.format))
        .collect::<anyhow::Result<_>>()?;
    let subject = arguments.model.open(context)?;
    // A model without tokenizer and files that are not there should be heard of before the first answer.
    subject.tokenizer()?;
    for (format, path) in &files {
        drop(format.questions(path)?);
    }
    let options = Options {
        limit: arguments.limit,
        start: arguments.start,
    };
    let mut tasks: Vec<Scored> = Vec::with_capacity(files.len());
    for (format, path) in &files {
        let mut progress = context.progress(format.name(), Unit::Items("questions"));
        let scored = score(&subject, *format, path, &options, |done| {
            progress.set(done as u64, arguments.limit.map(|limit| limit as u64));
            !context.interrupt.requested()
        })?;
        let finished = scored.finished;
        tasks.push(scored);
        if !finished {
            break;
        }
    }
    let finished = tasks.len() == files.len() && tasks.iter().all(|task| task.finished);
    let mean = Estimate::weighed(tasks.iter().map(|task| (task.score(), 1.0)));
    Answer::new(&Judged {
        model: arguments.model.model.clone(),
        mean: mean.map(|mean| mean.mean),
        mean_stderr: mean.and_then(|mean| mean.stderr),
        tasks,
        finished,
    })
}

/// A file with the format in front of it, `piqa=piqa.jsonl`, or else the `other` one.
fn with_format(file: &Path, other: Option<Format>) -> anyhow::Result<(Format, PathBuf)> {
    let split = file.to_str().and_then(|text| text.split_once('='));
    if let Some((name, path)) = split
        && let Ok(format) = Format::from_str(name, false)
    {
        return Ok((format, path.into()));
    }
    if let Some(format) = other {
        return Ok((format, file.to_owned()));
    }
    let names: Vec<_> = Format::value_variants()
        .iter()
        .map(|format| format.name())
        .collect();
    bail!(
        "{}: found no format, expected --format, or one of {} and = in front of it",
        file.display(),
        names.join(", ")
    );
}

#[derive(Serialize)]
struct Judged {
    model: PathBuf,
    tasks: Vec<Scored>,
    /// Of the figure of each that papers report.
    mean: Option<f64>,
    mean_stderr: Option<f64>,
    finished: bool,
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
        writeln!(
            f,
            "{:<14} {:>6}  {:<18} {:<18} chance",
            "", "n", "acc", "acc_norm"
        )?;
        for task in &self.tasks {
            writeln!(
                f,
                "{:<14} {:>6}  {:<18} {:<18} {:.4}",
                task.format.name(),
                task.n,
                with_error(task.acc, task.acc_stderr),
                with_error(task.acc_norm, task.acc_norm_stderr),
                task.chance
            )?;
        }
        if let Some(mean) = self.mean.filter(|_| self.tasks.len() > 1) {
            writeln!(f, "mean {}", with_error(mean, self.mean_stderr))?;
        }
        f.write_str(note_of_the_end(self.finished))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_stand_before_files_or_apart() {
        let of = |file: &str, other| with_format(Path::new(file), other).map_err(|error| error.to_string());
        assert_eq!(
            of("arc-challenge=a=b.jsonl", None).unwrap(),
            (Format::ArcChallenge, "a=b.jsonl".into())
        );
        assert_eq!(of("arc=x", None).unwrap().0, Format::ArcEasy);
        let piqa = Some(Format::Piqa);
        assert_eq!(of("x=y.jsonl", piqa).unwrap(), (Format::Piqa, "x=y.jsonl".into()));
        assert_eq!(of("boolq=y", piqa).unwrap(), (Format::Boolq, "y".into()));
        assert!(
            of("y", None)
                .unwrap_err()
                .contains("y: found no format, expected --format")
        );
        for format in Format::value_variants() {
            assert_eq!(Format::from_str(format.name(), false).as_ref(), Ok(format));
        }
    }
}
