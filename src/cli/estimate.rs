//! `fulgur estimate`: what a run or a model needs.

use std::fmt;
use std::path::PathBuf;

use anyhow::bail;
use serde::Serialize;

use super::answer::{Answer, Report};
use super::context::Context;
use crate::distributed::Network;
use crate::distributed::forecast::{Forecast, Measured};
use crate::estimate::Estimate;
use crate::report::grouped;
use crate::train::tasks::outline;
use crate::train::{Recipe, peak};

/// The recipe in the folder of a run.
const RECIPE: &str = "recipe.toml";
/// Most ranks that anything is foretold for.
const MOST_RANKS: usize = 1 << 20;
/// Units of bytes, each a thousand of the one before it.
const UNITS: [&str; 6] = ["B", "kB", "MB", "GB", "TB", "PB"];

/// Show what a run or a model needs, before anything is allocated
///
/// For a recipe: parameters by part, memory by kind (weights, gradients, moments of the optimiser, averages and so on), the
/// size of a checkpoint, and for language models the operations of a step and its time on a GPU. Networks are built on shapes alone, so that
/// this takes neither memory nor a GPU. For a model folder: parameters and bytes by part, from the headers of its files.
/// What cannot be known from shapes and settings is named and not counted.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur estimate recipes/tav.toml --set tav.model.depth=24\n  fulgur estimate models/builtin\n  \
                  fulgur estimate recipes/english.toml --world 8,64,1024 --network 5us,100Gbit/s"
)]
pub(super) struct Arguments {
    /// A recipe, the folder of a run, or the folder of a model
    #[arg(value_name = "RECIPE|MODEL_DIR")]
    what: PathBuf,
    /// Replace or add one value of the recipe; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// GPU for which the time of a step is told, such as H100, A100-SXM4-80GB or "RTX 4090"
    #[arg(long, value_name = "NAME", default_value = "H100")]
    gpu: String,
    /// Foretell steps on so many ranks, such as 8,64,1024
    #[arg(long, value_name = "N,N,..", value_delimiter = ',', requires = "network")]
    world: Vec<usize>,
    /// Links between the ranks, such as 5us,400Gbit/s
    #[arg(long, value_name = "LATENCY,BANDWIDTH", requires = "world")]
    network: Option<Network>,
    /// Milliseconds of a step as it was measured on one rank; what is estimated for the GPU by default
    #[arg(long, value_name = "MILLISECONDS", requires = "world")]
    step_ms: Option<f64>,
}

pub(super) fn run(_: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    let Arguments {
        what: path,
        sets,
        gpu: name,
        world,
        network,
        step_ms,
    } = arguments;
    if let Some(&ranks) = world.iter().find(|&&ranks| !(1..=MOST_RANKS).contains(&ranks)) {
        bail!("--world: found {ranks}, expected 1 to {MOST_RANKS}");
    }
    if let Some(ms) = step_ms.filter(|ms| !(*ms > 0.0 && ms.is_finite())) {
        bail!("--step-ms: found {ms}, expected more than 0");
    }
    let Some(gpu) = peak::by_name(&name) else {
        bail!("--gpu: found {name}, expected one of {}", peak::names())
    };
    let of_run = path.join(RECIPE);
    let recipe = if !path.is_dir() {
        Some(&path)
    } else {
        Some(&of_run).filter(|recipe| recipe.is_file())
    };
    let mut forecasts = Vec::new();
    let estimate = match recipe {
        Some(recipe) => {
            let recipe = Recipe::load(recipe, &sets)?;
            let estimate = Estimate::of_recipe(&recipe, gpu)?;
            if let Some(network) = network {
                let step_s = step_ms.map(|ms| 1e-3 * ms).or(estimate.step_s);
                let Some(step_s) = step_s else {
                    bail!(
                        "--step-ms is missing, expected the time of a step, which nobody can tell for this task"
                    )
                };
                let measured = foretold(&recipe, &estimate, step_s)?;
                forecasts = world.iter().map(|&ranks| measured.on(ranks, &network)).collect();
            }
            estimate
        }
        None if !world.is_empty() => bail!(
            "--world: {} is the folder of a model, expected a recipe",
            path.display()
        ),
        None if sets.is_empty() => Estimate::of_model(&path)?,
        None => bail!(
            "--set: {} is the folder of a model, expected a recipe",
            path.display()
        ),
    };
    Answer::new(&Estimated {
        path,
        gpu: name,
        estimate,
        forecasts,
    })
}

/// What a step of `recipe` exchanges, where one takes `step_s` seconds.
fn foretold(recipe: &Recipe, estimate: &Estimate, step_s: f64) -> anyhow::Result<Measured> {
    let (state_bytes, layers) = outline::states(recipe)?;
    let outer = recipe.distributed.outer.as_ref();
    Ok(Measured {
        step_s,
        bytes: usize::try_from(estimate.parameters.saturating_mul(4))?,
        state_bytes,
        layers,
        inner_steps: outer.map_or(0, |outer| outer.inner_steps),
    })
}

#[derive(Serialize)]
struct Estimated {
    path: PathBuf,
    gpu: String,
    #[serde(flatten)]
    estimate: Estimate,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    forecasts: Vec<Forecast>,
}

impl Report for Estimated {}

impl fmt::Display for Estimated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let estimate = &self.estimate;
        writeln!(
            f,
            "{}: {}, {} parameters",
            self.path.display(),
            estimate.kind,
            grouped(estimate.parameters)
        )?;
        let names = estimate.parts.iter().map(|part| part.name.as_str());
        let names = names.chain(estimate.stages.iter().map(|stage| stage.name));
        let width = names.map(str::len).max().unwrap_or(0).max("checkpoint".len());
        for part in &estimate.parts {
            let (name, parameters) = (&part.name, grouped(part.parameters));
            writeln!(f, "  {name:<width$}  {:>10}  {parameters:>15}", size(part.bytes))?;
        }
        writeln!(f, "memory")?;
        for stage in &estimate.stages {
            let (name, words) = (stage.name, stage.words);
            writeln!(f, "  {name:<width$}  {:>10}  {words}", size(stage.bytes))?;
        }
        let together: u64 = estimate.stages.iter().map(|stage| stage.bytes).sum();
        if estimate.stages.len() > 1 {
            let name = match estimate.memory_bytes < together {
                true => "at a time",
                false => "together",
            };
            writeln!(f, "  {name:<width$}  {:>10}", size(estimate.memory_bytes))?;
        }
        writeln!(f, "disk")?;
        if let Some(bytes) = estimate.checkpoint_bytes {
            writeln!(f, "  {:<width$}  {:>10}", "checkpoint", size(bytes))?;
        }
        writeln!(f, "  {:<width$}  {:>10}", "together", size(estimate.disk_bytes))?;
        if let Some(flops) = estimate.step_flops {
            let words = "floating-point operations, forward and backward";
            writeln!(f, "work\n  {:<width$}  {flops:>10.2e}  {words}", "step")?;
        }
        if let Some(seconds) = estimate.step_s {
            let words = format!(
                "milliseconds a step on one {}, by what an H100 reaches of its peaks",
                self.gpu
            );
            writeln!(f, "  {:<width$}  {:>10.1}  {words}", "time", 1e3 * seconds)?;
        }
        if !self.forecasts.is_empty() {
            writeln!(
                f,
                "on several ranks, milliseconds: assumptions are in docs/distributed.md"
            )?;
            let head = [
                "ranks",
                "all-reduce",
                "step",
                "share",
                "tau",
                "CO2 step",
                "share",
                "LASP-1",
                "LASP-2",
            ];
            let line = head.map(|name| format!("{name:>12}")).concat();
            writeln!(f, "{line}")?;
        }
        for row in &self.forecasts {
            let ms = |seconds: f64| format!("{:>12.2}", 1e3 * seconds);
            let percent = |share: f64| format!("{:>10.1} %", 100.0 * share);
            writeln!(
                f,
                "{:>12}{}{}{}{:>12}{}{}{}{}",
                row.ranks,
                ms(row.reduce_s),
                ms(row.synchronous_s),
                percent(row.synchronous_share),
                row.inner_steps,
                ms(row.co2_s),
                percent(row.co2_share),
                ms(row.lasp1_s),
                ms(row.lasp2_s),
            )?;
        }
        writeln!(f, "not counted")?;
        estimate
            .unknown
            .iter()
            .try_for_each(|line| writeln!(f, "  {line}"))
    }
}

/// Bytes with three digits or so.
fn size(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let decimals = if unit > 0 && value < 99.95 { 1 } else { 0 };
    format!("{value:.decimals$} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        let sizes = [0, 999, 1000, 99_940, 99_960, 1_234_567, 999_600_000, u64::MAX].map(size);
        let expected = [
            "0 B", "999 B", "1.0 kB", "99.9 kB", "100 kB", "1.2 MB", "1.0 GB", "18447 PB",
        ];
        assert_eq!(sizes, expected);
    }
}
