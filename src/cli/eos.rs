//! `fulgur eos`: experiments with the EOS layer.

use std::fmt;
use std::path::PathBuf;

use anyhow::bail;
use clap::Subcommand;
use serde::Serialize;

use super::answer::{Answer, Report, Status};
use super::context::Context;
use super::progress::Unit;
use crate::eos::{self, Plan, SETTINGS, Setting, Sweep, Told};

/// Experiment with the layer that recurrent mixers are instances of
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  fulgur eos sweep --settings data,mamba --data book.txt --steps 2000")]
pub(super) struct Arguments {
    #[command(subcommand)]
    experiment: Experiment,
}

#[derive(Debug, Subcommand)]
enum Experiment {
    Sweep(SweepArguments),
}

/// Train settings of the layer on a text and on associative recall, and write one table
///
/// Each setting is a small language model of this layer, trained with the same budget on the next token of a text, of which a
/// twentieth is held out, and on recalling the values of keys (multi-query associative recall). The folder gets table.md
/// and table.json after every setting, and keeps runs and results: the same command goes on where it stopped. The exit
/// code is 1 where Ctrl-C stopped it before the end. docs/eos.md lists the settings.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur eos sweep --data book.txt --steps 4000 --out runs/eos\n  fulgur eos sweep --settings data,rows-64,mamba --data book.txt"
)]
struct SweepArguments {
    /// Which settings: all, or names with commas between them
    #[arg(
        long,
        value_name = "all|NAME,..",
        default_value = "all",
        value_delimiter = ','
    )]
    settings: Vec<String>,
    /// A text, a byte a token; or token ids of two bytes in a file that ends in .u16
    #[arg(long, value_name = "TEXT")]
    data: PathBuf,
    /// Size of the vocabulary of the data; 0 for bytes
    #[arg(long, value_name = "V", default_value_t = 0)]
    vocabulary: usize,
    /// Steps of each run
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Where runs, results and the table go
    #[arg(short, long, value_name = "DIR", default_value = "runs/eos")]
    out: PathBuf,
    /// Seed of weights and data
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Peak of the learning rate
    #[arg(long, default_value_t = 2e-3)]
    lr: f64,
    /// Layers of the models
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Their width
    #[arg(long, default_value_t = 128)]
    width: usize,
    /// Windows of text in a batch
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Tokens of a window
    #[arg(long, default_value_t = 256)]
    context: usize,
    /// Examples of recall in a batch
    #[arg(long, default_value_t = 64)]
    recall_batch: usize,
    /// Tokens of an example of recall
    #[arg(long, default_value_t = 128)]
    recall_context: usize,
    /// Pairs of key and value in it
    #[arg(long, default_value_t = 16)]
    pairs: usize,
    /// Its vocabulary
    #[arg(long, value_name = "V", default_value_t = 1024)]
    recall_vocabulary: usize,
    /// Examples of recall, and windows of held-out text at most, that are judged by
    #[arg(long, value_name = "N", default_value_t = 512)]
    validation: usize,
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    match arguments.experiment {
        Experiment::Sweep(arguments) => sweep(context, arguments),
    }
}

fn sweep(context: &Context, arguments: SweepArguments) -> anyhow::Result<Answer> {
    let settings = chosen(&arguments.settings)?;
    let plan = Plan {
        data: arguments.data,
        vocabulary: arguments.vocabulary,
        steps: arguments.steps,
        seed: arguments.seed,
        lr: arguments.lr,
        layers: arguments.layers,
        width: arguments.width,
        batch: arguments.batch,
        context: arguments.context,
        recall_batch: arguments.recall_batch,
        recall_context: arguments.recall_context,
        pairs: arguments.pairs,
        recall_vocabulary: arguments.recall_vocabulary,
        validation: arguments.validation,
    };
    let device = context.open_device()?;
    let mut progress = context.progress("sweep", Unit::Items("steps"));
    let flag = context.interrupt.flag();
    let sweep = eos::sweep(
        &plan,
        &settings,
        &arguments.out,
        &device,
        flag,
        |told| match told {
            Told::Note(line) => context.note(&line),
            Told::Progress(done, all, label) => {
                progress.relabel(label);
                progress.set(done, Some(all));
            }
        },
    )?;
    drop(progress);
    Answer::new(&Swept {
        path: arguments.out,
        sweep,
    })
}

/// The settings of these names, in their order.
fn chosen(names: &[String]) -> anyhow::Result<Vec<&'static Setting>> {
    if names == ["all"] {
        return Ok(SETTINGS.iter().collect());
    }
    let mut chosen: Vec<&Setting> = Vec::new();
    for name in names {
        let Some(setting) = SETTINGS.iter().find(|setting| setting.name == *name) else {
            let known: Vec<_> = SETTINGS.iter().map(|setting| setting.name).collect();
            bail!(
                "--settings: found {name:?}, expected all, or some of {}",
                known.join(", ")
            );
        };
        if chosen.iter().all(|before| before.name != setting.name) {
            chosen.push(setting);
        }
    }
    Ok(chosen)
}

#[derive(Serialize)]
struct Swept {
    /// The folder with table.md and table.json.
    path: PathBuf,
    #[serde(flatten)]
    sweep: Sweep,
}

impl Report for Swept {
    fn status(&self) -> Status {
        if self.sweep.finished {
            Status::Done
        } else {
            Status::Partial
        }
    }
}

impl fmt::Display for Swept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sweep.table())?;
        if !self.sweep.finished {
            writeln!(f, "stopped before the end; the same command goes on")?;
        }
        writeln!(f, "{}", self.path.join("table.md").display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_settings() {
        let names = |list: &[&str]| -> Vec<String> { list.iter().map(|&name| name.to_owned()).collect() };
        assert_eq!(chosen(&names(&["all"])).unwrap().len(), SETTINGS.len());
        let two = chosen(&names(&["mamba", "data", "mamba"])).unwrap();
        assert_eq!(two.iter().map(|s| s.name).collect::<Vec<_>>(), ["mamba", "data"]);
        let line = chosen(&names(&["weave"])).unwrap_err().to_string();
        assert!(line.starts_with("--settings: found \"weave\""), "{line}");
    }
}
