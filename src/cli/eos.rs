//! `fulgur eos`: experiments with the EOS layer.

use std::path::PathBuf;

use clap::Subcommand;

use super::answer::Answer;
use super::context::Context;
use super::progress::Unit;
use super::sweep::{Common, chosen, swept};
use crate::eos::{self, Plan, SETTINGS, Setting};

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
#[command(mut_arg("steps", |steps| steps.default_value("2000")))]
#[command(mut_arg("out", |out| out.default_value("runs/eos")))]
#[command(mut_arg("lr", |lr| lr.default_value("0.002")))]
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
    #[command(flatten)]
    common: Common,
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
    /// Taps of short convolutions in models of recall, so that it tests the memory and not how a key gets beside its value; 0 for none
    #[arg(long, value_name = "TAPS", default_value_t = 4)]
    recall_convolution: usize,
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
    let settings = settings(&arguments.settings)?;
    let plan = Plan {
        data: arguments.data,
        vocabulary: arguments.vocabulary,
        budget: arguments.common.budget(),
        batch: arguments.batch,
        context: arguments.context,
        recall_batch: arguments.recall_batch,
        recall_context: arguments.recall_context,
        pairs: arguments.pairs,
        recall_vocabulary: arguments.recall_vocabulary,
        recall_convolution: arguments.recall_convolution,
        validation: arguments.validation,
    };
    let out = arguments.common.out;
    swept(context, ("sweep", Unit::Items("steps")), out, |place, tell| {
        eos::sweep(&plan, &settings, place, tell)
    })
}

/// The settings of these names, in their order.
fn settings(names: &[String]) -> anyhow::Result<Vec<&'static Setting>> {
    chosen("--settings", names, &[("all", |_| true)], SETTINGS, |setting| {
        setting.name
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_settings() {
        let names = |list: &[&str]| -> Vec<String> { list.iter().map(|&name| name.to_owned()).collect() };
        assert_eq!(settings(&names(&["all"])).unwrap().len(), SETTINGS.len());
        let two = settings(&names(&["mamba", "data", "mamba"])).unwrap();
        assert_eq!(two.iter().map(|s| s.name).collect::<Vec<_>>(), ["mamba", "data"]);
        let line = settings(&names(&["weave"])).unwrap_err().to_string();
        assert!(line.starts_with("--settings: found \"weave\""), "{line}");
    }
}
