//! `fulgur lm eval recall`: multi-query associative recall.

use std::fmt;
use std::path::PathBuf;

use anyhow::bail;
use fulgur_datasets::text::Recall;
use fulgur_kernels::philox::Philox;
use serde::Serialize;

use super::super::super::answer::{Answer, Report, Status};
use super::super::super::context::Context;
use super::super::super::progress::Unit;
use super::{ModelArguments, note_of_the_end, with_error};
use crate::lm_eval::recall::{Measured, measure};

/// Most examples of a setting.
const MOST_EXAMPLES: usize = 1 << 20;
/// Most examples that are asked together.
const TOGETHER: usize = 64;

/// Multi-query associative recall, for models that were trained on it
///
/// Examples are pairs of keys and values, then every key once more, as in the task recall; an answer is right where the value is
/// the likeliest of all tokens. With several lengths and numbers of pairs, all of them that fit (pairs at most a quarter of the
/// length) are asked.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur lm eval recall --model runs/recall/model\n  fulgur lm eval recall --model DIR --context 128,256,512 --pairs 4,16,64 --json"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Tokens of an example
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "128")]
    context: Vec<usize>,
    /// Pairs of key and value in it
    #[arg(long, value_name = "D,..", value_delimiter = ',', default_value = "16")]
    pairs: Vec<usize>,
    /// Tokens that examples are made of, instead of all of the model's vocabulary
    #[arg(long, value_name = "V")]
    vocabulary: Option<usize>,
    /// How near queries are: 1 for anywhere
    #[arg(long, value_name = "P", default_value_t = 0.01, allow_negative_numbers = true)]
    power: f64,
    /// Examples of each setting
    #[arg(long, value_name = "N", default_value_t = 512)]
    examples: usize,
    /// Seed of the examples
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    if !(1..=MOST_EXAMPLES).contains(&arguments.examples) {
        bail!(
            "examples is {}, expected 1 to {MOST_EXAMPLES}",
            arguments.examples
        );
    }
    let subject = arguments.model.open(context)?;
    let rows = subject.vocabulary();
    let vocabulary = arguments.vocabulary.unwrap_or(rows);
    if vocabulary > rows {
        bail!("vocabulary is {vocabulary}, expected at most {rows}, the model's");
    }
    let shapes = shapes(arguments, vocabulary)?;
    let total = (shapes.len() * arguments.examples) as u64;
    let mut progress = context.progress("recall", Unit::Items("examples"));
    let (mut settings, mut before, mut finished) = (Vec::with_capacity(shapes.len()), 0, true);
    for shape in shapes {
        let noise = &mut Philox::named(
            arguments.seed,
            &format!("recall/{}/{}", shape.context, shape.pairs),
        );
        let together = (subject.chunk / shape.context).clamp(1, TOGETHER);
        let measured = measure(
            &subject.model,
            &shape,
            arguments.examples,
            together,
            noise,
            |done| {
                progress.set(before + done as u64, Some(total));
                !context.interrupt.requested()
            },
        )?;
        let Some(measured) = measured else {
            bail!("found no query, expected some");
        };
        before += measured.examples as u64;
        finished = measured.examples == arguments.examples;
        settings.push(Setting::of(&shape, &measured)?);
        if !finished {
            break;
        }
    }
    drop(progress);
    Answer::new(&Judged {
        model: arguments.model.model.clone(),
        vocabulary,
        power: arguments.power,
        seed: arguments.seed,
        settings,
        finished: finished && before == total,
    })
}

/// All lengths and numbers of pairs that go together.
fn shapes(arguments: &Arguments, vocabulary: usize) -> anyhow::Result<Vec<Recall>> {
    let mut shapes = Vec::new();
    let mut refused = None;
    for &context in &arguments.context {
        for &pairs in &arguments.pairs {
            let shape = Recall {
                context,
                pairs,
                vocabulary,
                power: arguments.power,
            };
            match shape.check() {
                Ok(()) => shapes.push(shape),
                // A grid may have corners that are not to be.
                Err(_) if pairs > context / 4 && arguments.context.len() > 1 => refused = shape.check().err(),
                Err(error) => return Err(error.into()),
            }
        }
    }
    match (shapes.is_empty(), refused) {
        (true, Some(error)) => Err(error.into()),
        _ => Ok(shapes),
    }
}

#[derive(Serialize)]
struct Setting {
    context: usize,
    pairs: usize,
    examples: usize,
    queries: usize,
    accuracy: f64,
    accuracy_stderr: Option<f64>,
    /// Nats a query.
    loss: f64,
    loss_stderr: Option<f64>,
}

impl Setting {
    fn of(shape: &Recall, measured: &Measured) -> anyhow::Result<Self> {
        if !measured.loss.mean.is_finite() {
            bail!(
                "a loss of {} nats a query, expected a finite number",
                measured.loss.mean
            );
        }
        Ok(Self {
            context: shape.context,
            pairs: shape.pairs,
            examples: measured.examples,
            queries: measured.queries,
            accuracy: measured.accuracy.mean,
            accuracy_stderr: measured.accuracy.stderr,
            loss: measured.loss.mean,
            loss_stderr: measured.loss.stderr,
        })
    }
}

#[derive(Serialize)]
struct Judged {
    model: PathBuf,
    vocabulary: usize,
    power: f64,
    seed: u64,
    settings: Vec<Setting>,
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
            "{:>8} {:>6} {:>8}  {:<18} nats",
            "context", "pairs", "queries", "accuracy"
        )?;
        for setting in &self.settings {
            writeln!(
                f,
                "{:>8} {:>6} {:>8}  {:<18} {}",
                setting.context,
                setting.pairs,
                setting.queries,
                with_error(setting.accuracy, setting.accuracy_stderr),
                with_error(setting.loss, setting.loss_stderr)
            )?;
        }
        f.write_str(note_of_the_end(self.finished))
    }
}
