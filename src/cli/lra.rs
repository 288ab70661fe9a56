//! `fulgur lra`: experiments with long sequences.

use std::path::PathBuf;

use anyhow::bail;
use clap::Subcommand;
use fulgur_datasets::long_range::ListOps;

use super::answer::Answer;
use super::context::Context;
use super::progress::Unit;
use super::sweep::{Common, Group, chosen, swept};
use crate::lra::{self, Plan, SETTINGS, Setting, Subject};

/// Compare architectures on long sequences
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur lra sweep --tasks listops --settings hgrn2-parallel,softmax-whole --steps 5000"
)]
pub(super) struct Arguments {
    #[command(subcommand)]
    experiment: Experiment,
}

#[derive(Debug, Subcommand)]
enum Experiment {
    Sweep(SweepArguments),
}

/// Train settings on tasks of the Long Range Arena, and write one table
///
/// Each setting is an architecture and the way its layers go through the tokens: one scan, scans in both directions, scans of rows and columns,
/// or all tokens at once. All have about as many parameters and the same budget. The folder gets table.md and table.json after
/// every run, and keeps runs and results: the same command goes on where it stopped. The exit code is 1 where Ctrl-C stopped
/// it before the end. docs/long-range.md lists tasks and settings.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  fulgur lra sweep --steps 10000 --out runs/lra\n  \
                  fulgur lra sweep --tasks pathfinder,fashion-mnist --settings all")]
#[command(mut_arg("out", |out| out.default_value("runs/lra")))]
struct SweepArguments {
    /// Which tasks: all, or some of listops, pathfinder, fashion-mnist
    #[arg(
        long,
        value_name = "all|NAME,..",
        default_value = "all",
        value_delimiter = ','
    )]
    tasks: Vec<String>,
    /// Which settings: main, all, or names with commas between them
    #[arg(
        long,
        value_name = "main|all|NAME,..",
        default_value = "main",
        value_delimiter = ','
    )]
    settings: Vec<String>,
    #[command(flatten)]
    common: Common,
    /// Folder of prepared data sets, for fashion-mnist
    #[arg(long, value_name = "DIR", default_value = "data")]
    data: PathBuf,
    /// Hidden width of their gated linear units
    #[arg(long, default_value_t = 256)]
    hidden: usize,
    /// Heads of keys and values
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Sequences in a batch
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Held-out sequences that are judged by
    #[arg(long, value_name = "N", default_value_t = 2000)]
    validation: usize,
    /// Drawn examples to train on, 0 for new ones without end; as many as published if absent
    #[arg(long, value_name = "N")]
    examples: Option<u64>,
    /// Fewest tokens of an expression of listops
    #[arg(long, value_name = "N", default_value_t = ListOps::default().min_length)]
    min_length: usize,
    /// Most tokens of an expression
    #[arg(long, value_name = "N", default_value_t = ListOps::default().max_length)]
    max_length: usize,
    /// How deep expressions are nested at most
    #[arg(long, value_name = "N", default_value_t = ListOps::default().max_depth)]
    max_depth: usize,
    /// Most arguments of a list
    #[arg(long, value_name = "N", default_value_t = ListOps::default().max_arguments)]
    max_arguments: usize,
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    match arguments.experiment {
        Experiment::Sweep(arguments) => sweep(context, arguments),
    }
}

fn sweep(context: &Context, arguments: SweepArguments) -> anyhow::Result<Answer> {
    let subjects = subjects(&arguments.tasks)?;
    let settings = settings(&arguments.settings)?;
    let by_name = !matches!(arguments.settings.as_slice(), [name] if name == "main" || name == "all");
    for &setting in &settings {
        if by_name && !subjects.iter().any(|subject| subject.takes(setting)) {
            bail!(
                "--settings: {} goes through rows and columns, expected a task of pictures in --tasks",
                setting.name
            );
        }
    }
    let plan = Plan {
        budget: arguments.common.budget(),
        hidden: arguments.hidden,
        heads: arguments.heads,
        batch: arguments.batch,
        validation: arguments.validation,
        examples: arguments.examples,
        listops: ListOps {
            min_length: arguments.min_length,
            max_length: arguments.max_length,
            max_depth: arguments.max_depth,
            max_arguments: arguments.max_arguments,
        },
        data: arguments.data,
    };
    let out = arguments.common.out;
    swept(context, ("sweep", Unit::Items("steps")), out, |place, tell| {
        lra::sweep(&plan, &subjects, &settings, place, tell)
    })
}

/// The tasks of these names, in their order.
fn subjects(names: &[String]) -> anyhow::Result<Vec<Subject>> {
    if names == ["all"] {
        return Ok(Subject::ALL.to_vec());
    }
    let mut chosen: Vec<Subject> = Vec::new();
    for name in names {
        let subject = Subject::named(name).map_err(|e| anyhow::anyhow!("--tasks: {e}"))?;
        if !chosen.contains(&subject) {
            chosen.push(subject);
        }
    }
    Ok(chosen)
}

/// The settings of these names, in their order.
fn settings(names: &[String]) -> anyhow::Result<Vec<&'static Setting>> {
    let groups: [Group<Setting>; 2] = [("main", |setting| setting.main), ("all", |_| true)];
    chosen("--settings", names, &groups, SETTINGS, |setting| setting.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_settings_and_tasks() {
        let names = |list: &[&str]| -> Vec<String> { list.iter().map(|&name| name.to_owned()).collect() };
        assert_eq!(settings(&names(&["all"])).unwrap().len(), SETTINGS.len());
        let main = settings(&names(&["main"])).unwrap();
        assert!(main.len() > 8 && main.len() < SETTINGS.len());
        let two = settings(&names(&["softmax-whole", "hgrn2-series", "softmax-whole"])).unwrap();
        assert_eq!(
            two.iter().map(|s| s.name).collect::<Vec<_>>(),
            ["softmax-whole", "hgrn2-series"]
        );
        let line = settings(&names(&["weave"])).unwrap_err().to_string();
        assert!(line.starts_with("--settings: found \"weave\""), "{line}");
        assert_eq!(subjects(&names(&["all"])).unwrap().len(), 3);
        let line = subjects(&names(&["retrieval"])).unwrap_err().to_string();
        assert!(line.starts_with("--tasks: retrieval is not available"), "{line}");
    }
}
