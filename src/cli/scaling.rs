//! `fulgur scaling`: studies of many runs, and their power laws.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Subcommand;
use fulgur_datasets::atomic::write_atomic;
use serde::Serialize;

use super::answer::{Answer, Report, Status};
use super::context::Context;
use super::progress::Unit;
use super::sweep::{chosen, swept};
use crate::report::grouped;
use crate::scaling::{self, Counted, Fit, PFLOPS_DAY, Planned, Study};
use crate::sweep::{cell, markdown};

/// Scaling laws: train many sizes, fit power laws, draw them
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur scaling run recipes/scaling.toml --out runs/scaling\n  fulgur scaling fit runs/scaling\n  fulgur scaling plot runs/scaling -o plots"
)]
pub(super) struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Run(RunArguments),
    Fit(FitArguments),
    Plot(PlotArguments),
}

/// Train the runs of a study and write one table
///
/// A study is a TOML file: data, budget, sizes, architectures (docs/scaling.md). Runs are trained one after the other, small
/// ones first. The folder gets NAME.jsonl with the held-out loss along each run, NAME.json with its result, and table.md and
/// table.json; models stay in runs/NAME/full/model. The same command goes on where it was stopped. Several of them may run at
/// once, on one GPU or several: each passes over the runs that another is at work on. The exit code is 1 where a run that was asked
/// for is not done.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur scaling run recipes/scaling.toml --out runs/scaling\n  fulgur scaling run recipes/scaling.toml --out runs/scaling --only llama,tnl --sizes 0.3M,0.8M\n  fulgur scaling run recipes/scaling.toml --estimate"
)]
struct RunArguments {
    /// The study, a TOML file
    study: PathBuf,
    /// Where runs, results and the table go
    #[arg(short, long, value_name = "DIR", default_value = "runs/scaling")]
    out: PathBuf,
    /// Only these architectures, with commas between them
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    only: Vec<String>,
    /// Only these sizes, with commas between them
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    sizes: Vec<String>,
    /// Train nothing: list the runs with their weights, tokens and operations
    #[arg(long)]
    estimate: bool,
}

/// What of the results is fitted.
#[derive(Debug, clap::Args)]
struct Choice {
    /// The folder that `fulgur scaling run` wrote
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Points of the envelope in a decade of compute
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    per_decade: u32,
    /// Count the head's weights and operations too, which the paper leaves out
    #[arg(long)]
    with_head: bool,
}

/// Fit power laws to the results of a study
///
/// For each architecture: the lowest held-out loss of all sizes over compute, and power laws of loss, weights and tokens through it
/// (arXiv 2406.16690): `L(C) = beta C^alpha`, C in PFLOP/s-days. Points that the smallest or the largest size wins are dropped. Writes
/// fit.json and fit.md into the folder. The exit code is 1 where an architecture has too few points for a law.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur scaling fit runs/scaling\n  fulgur scaling fit runs/scaling --with-head --json"
)]
struct FitArguments {
    #[command(flatten)]
    choice: Choice,
}

/// Draw curves, envelopes, laws and the published slopes as SVG
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  fulgur scaling plot runs/scaling -o plots")]
struct PlotArguments {
    #[command(flatten)]
    choice: Choice,
    /// Where the plots go
    #[arg(short, long, value_name = "DIR", default_value = "plots")]
    out: PathBuf,
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    match arguments.action {
        Action::Run(arguments) => sweep(context, arguments),
        Action::Fit(arguments) => fit(&arguments.choice),
        Action::Plot(arguments) => plot(arguments),
    }
}

fn sweep(context: &Context, arguments: RunArguments) -> anyhow::Result<Answer> {
    let RunArguments {
        study: path,
        out,
        only,
        sizes,
        estimate,
    } = arguments;
    let study = Study::load(&path)?;
    // Names that the study does not have are refused.
    chosen("--only", &only, &[], &study.architectures, String::as_str)?;
    chosen("--sizes", &sizes, &[], &study.sizes, |size| &size.name)?;
    let name = path.display().to_string();
    let wanted = |run: &Planned| {
        let among = |names: &[String], name: &String| names.is_empty() || names.contains(name);
        among(&only, &run.architecture) && among(&sizes, &run.size.name)
    };
    if estimate {
        let runs = study.runs().with_context(|| name)?;
        let runs: Vec<Estimated> = runs
            .iter()
            .filter(|run| wanted(run))
            .map(|run| Estimated::of(run, &study))
            .collect();
        return Answer::new(&Estimate { runs });
    }
    swept(context, ("scaling", Unit::Items("parts")), out, |place, tell| {
        scaling::sweep(&study, wanted, &place, tell).with_context(|| name)
    })
}

#[derive(Serialize)]
struct Estimated {
    name: String,
    /// Weights of the layers.
    weights: u64,
    parameters: u64,
    /// Hidden width of gated linear units.
    hidden: usize,
    /// Steps and what they make; none where seconds are given.
    steps: Option<u64>,
    tokens: Option<u64>,
    epochs: Option<f64>,
    flops: Option<f64>,
    /// With the trials of learning rates.
    tokens_with_trials: Option<u64>,
}

impl Estimated {
    fn of(run: &Planned, study: &Study) -> Self {
        let per_step = (study.batch * study.context) as u64;
        let [own, all] = match run.steps(study) {
            Some(steps) => steps.map(Some),
            None => [None, None],
        };
        let tokens = own.map(|steps| steps * per_step);
        Self {
            name: run.name.clone(),
            weights: run.account.weights,
            parameters: run.account.parameters,
            hidden: run.size.hidden,
            steps: own,
            tokens,
            epochs: tokens.map(|tokens| tokens as f64 / run.corpus as f64),
            flops: tokens.map(|tokens| tokens as f64 * run.account.flops),
            tokens_with_trials: all.map(|steps| steps * per_step),
        }
    }
}

#[derive(Serialize)]
struct Estimate {
    runs: Vec<Estimated>,
}

impl Report for Estimate {}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = [
            "run",
            "weights of layers",
            "parameters",
            "hidden",
            "steps",
            "tokens",
            "epochs",
            "PFLOP/s-days",
        ];
        let count = |value: Option<u64>| cell(value, |value| value.to_string());
        let cells = |run: &Estimated| {
            vec![
                run.name.clone(),
                run.weights.to_string(),
                run.parameters.to_string(),
                run.hidden.to_string(),
                count(run.steps),
                count(run.tokens),
                cell(run.epochs, |epochs| format!("{epochs:.2}")),
                cell(run.flops, |flops| format!("{:.3e}", flops / PFLOPS_DAY)),
            ]
        };
        f.write_str(&markdown(&columns, self.runs.iter().map(cells)))?;
        let all: u64 = self.runs.iter().filter_map(|run| run.tokens_with_trials).sum();
        writeln!(f, "{} runs, {} tokens with trials", self.runs.len(), grouped(all))
    }
}

fn fits(choice: &Choice) -> anyhow::Result<BTreeMap<String, Fit>> {
    let curves = scaling::read(&choice.dir)?;
    let counted = match choice.with_head {
        true => Counted::WithHead,
        false => Counted::Layers,
    };
    Ok(scaling::fit(&curves, choice.per_decade as usize, counted))
}

fn fit(choice: &Choice) -> anyhow::Result<Answer> {
    let found = Fitted { fits: fits(choice)? };
    let mut json = serde_json::to_string_pretty(&found)?;
    json.push('\n');
    for (name, text) in [("fit.json", json), ("fit.md", found.to_string())] {
        let path = choice.dir.join(name);
        write_atomic(&path, |file| file.write_all(text.as_bytes()))
            .with_context(|| path.display().to_string())?;
    }
    Answer::new(&found)
}

#[derive(Serialize)]
struct Fitted {
    fits: BTreeMap<String, Fit>,
}

impl Report for Fitted {
    fn status(&self) -> Status {
        if self.fits.values().all(|fit| fit.loss.is_some()) {
            Status::Done
        } else {
            Status::Partial
        }
    }
}

impl fmt::Display for Fitted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let laws = self.fits.iter().map(|(name, fit)| laws(name, fit));
        writeln!(f, "{}", markdown(&LAWS, laws))?;
        let envelopes = self.fits.iter().map(|(name, fit)| envelope(name, fit));
        f.write_str(&markdown(&ENVELOPES, envelopes))
    }
}

const LAWS: [&str; 12] = [
    "architecture",
    "L(C)",
    "exponent, 95 %",
    "published",
    "residual",
    "N_opt(C)",
    "95 %",
    "between sizes",
    "published",
    "D_opt(C)",
    "95 %",
    "published",
];

/// The laws of an architecture, beside those that are published.
fn laws(name: &str, fit: &Fit) -> Vec<String> {
    let of_loss = |law: scaling::Law| format!("{:.4} C^{:.4}", law.beta, law.alpha);
    let of_size = |law: scaling::Law| format!("{:.2e} C^{:.3}", law.beta, law.alpha);
    let interval = |law: scaling::Law| format!("{:.4} to {:.4}", law.interval[0], law.interval[1]);
    let number = |value: f64| format!("{value:.4}");
    let published = fit.published;
    vec![
        name.to_owned(),
        cell(fit.loss, of_loss),
        cell(fit.loss, interval),
        cell(published.map(|found| found.loss.alpha), number),
        cell(fit.loss.map(|law| law.residual), number),
        cell(fit.n_opt, of_size),
        cell(fit.n_opt, interval),
        cell(fit.n_between, of_size),
        cell(published.map(|found| found.n_opt.alpha), number),
        cell(fit.d_opt, of_size),
        cell(fit.d_opt, interval),
        cell(
            published.and_then(|found| found.d_opt).map(|power| power.alpha),
            number,
        ),
    ]
}

const ENVELOPES: [&str; 6] = [
    "architecture",
    "points",
    "decades",
    "winning sizes",
    "dropped: smallest, largest, unfinished",
    "largest compute foretold from a third of it",
];

/// What the laws of an architecture were fitted to, and how well they foretell.
fn envelope(name: &str, fit: &Fit) -> Vec<String> {
    let foretold = fit.prediction.map(|found| {
        format!(
            "{:.4}, found {:.4}, {:.2} % off",
            found.predicted,
            found.found,
            100.0 * found.error
        )
    });
    let dropped = fit.dropped;
    vec![
        name.to_owned(),
        fit.envelope.len().to_string(),
        format!("{:.2}", fit.decades),
        fit.sizes.join(", "),
        format!(
            "{}, {}, {}",
            dropped.smallest, dropped.largest, dropped.unfinished
        ),
        cell(foretold.or_else(|| fit.reason.clone()), |words| words),
    ]
}

fn plot(arguments: PlotArguments) -> anyhow::Result<Answer> {
    let fits = fits(&arguments.choice)?;
    let files = scaling::draw(&fits, &arguments.out)?;
    Answer::new(&Plotted {
        path: arguments.out,
        files,
    })
}

#[derive(Serialize)]
struct Plotted {
    /// The folder.
    path: PathBuf,
    /// The plots in it.
    files: Vec<PathBuf>,
}

impl Report for Plotted {}

impl fmt::Display for Plotted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.files
            .iter()
            .try_for_each(|path| writeln!(f, "{}", path.display()))
    }
}
