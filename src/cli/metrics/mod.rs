//! `fulgur metrics`: FVD, FAD, CLAP and the others, of folders of clips or of features.

#[cfg(feature = "media")]
mod folders;
#[cfg(feature = "media")]
mod prompts;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::ValueEnum;
use fulgur_benchmark::metrics::suite::{Beside, LEFT_OUT, METRICS};
use serde::Serialize;

use super::answer::{Answer, Report};
use super::context::Context;
use crate::metrics::features::{Distances, distances};

/// Measure generated clips: FVD, KVD, FAD, IS, CLAP, AV-Align and others
///
/// --list prints all metrics with what they need and what their numbers were compared with, and those of the field that are left
/// out. Networks are loaded from folders with their published weights: --weights i3d=DIR, vggish=DIR, panns=DIR, clap=DIR,
/// encoder=builtin|DIR (AVHScore, JavisScore). Every figure names what it was read with; figures of different checkpoints do not
/// compare. Prompts come from --prompts, else from the file clip.json beside clip.mp4 that fulgur generate writes.
///
/// --features computes the Frechet and the kernel distance of features that lie in a file: `generated` and `reference`, [n, d].
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur metrics --generated clips/ --metric av_align,avhscore,javisscore\n  fulgur metrics \
                  --generated made/ --reference real/ --metric fvd,fad --weights i3d=i3d/ --weights vggish=vggish/\n  fulgur \
                  metrics --features features.safetensors --json\n  fulgur metrics --list"
)]
pub(super) struct Arguments {
    /// Folder of generated clips
    #[arg(long, value_name = "DIR", required_unless_present_any = ["features", "list"], requires = "metric")]
    generated: Option<PathBuf>,
    /// Folder of real clips
    #[arg(long, value_name = "DIR", requires = "generated")]
    reference: Option<PathBuf>,
    /// The metrics, with commas between them
    #[arg(long, value_name = "LIST", value_delimiter = ',', requires = "generated")]
    metric: Vec<String>,
    /// Where the weights of a network lie; may be given several times
    #[arg(long, value_name = "NAME=DIR", requires = "generated")]
    weights: Vec<String>,
    /// Prompts by clip: JSON lines with `path` and `prompt`
    #[arg(long, value_name = "FILE.jsonl", requires = "generated")]
    prompts: Option<PathBuf>,
    /// Take the first S seconds of each clip alone
    #[arg(long, value_name = "S", value_parser = positive, requires = "generated")]
    seconds: Option<f64>,
    /// Frames that I3D sees of each clip, evenly spaced
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(9..=1024), requires = "generated")]
    frames: Option<u16>,
    /// Seconds of a window of JavisScore
    #[arg(long, value_name = "S", value_parser = positive, default_value_t = 2.0)]
    window: f64,
    /// Seconds that windows of JavisScore share
    #[arg(long, value_name = "S", value_parser = not_negative, default_value_t = 1.5)]
    overlap: f64,
    /// Repeat what another tool does differently
    #[arg(long, value_name = "TOOL", requires = "generated")]
    compat: Option<Compat>,
    /// Seed of the parts of the inception score
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Clips that are read at the same time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256), default_value_t = 2)]
    jobs: u16,
    /// Write a page with all clips, to be sorted by each figure
    #[arg(long, value_name = "PAGE.html", requires = "generated")]
    report: Option<PathBuf>,
    /// Distances of features in a file
    #[arg(long, value_name = "FILE.safetensors", conflicts_with_all = ["generated", "list"])]
    features: Option<PathBuf>,
    /// Print the metrics and measure nothing
    #[arg(long, conflicts_with = "generated")]
    list: bool,
}

/// Another tool whose numbers are to be met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Compat {
    /// FVD and KVD as the tool of JavisBench computes them: 24 frames in a letterbox, bytes in the upper half of their range
    Javisbench,
}

/// A finite number above 0.
fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value > 0.0 => Ok(value),
        _ => Err("expected a finite number above 0".to_owned()),
    }
}

/// A finite number from 0 on.
fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err("expected a finite number of 0 or more".to_owned()),
    }
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    if arguments.list {
        return Answer::new(&Listing::new());
    }
    if let Some(path) = &arguments.features {
        return Answer::new(&FromFeatures::new(path, &distances(path)?));
    }
    if arguments.overlap >= arguments.window {
        bail!(
            "--overlap: found {}, expected less than the window of {} s",
            arguments.overlap,
            arguments.window
        );
    }
    measure(context, arguments)
}

#[cfg(feature = "media")]
fn measure(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    folders::run(context, arguments)
}

#[cfg(not(feature = "media"))]
fn measure(_: &Context, _: Arguments) -> anyhow::Result<Answer> {
    bail!("--generated: this build reads no clips (feature media), expected --features")
}

/// What `--features` answers.
#[derive(Serialize)]
struct FromFeatures {
    metrics: BTreeMap<&'static str, Distance>,
}

#[derive(Serialize)]
struct Distance {
    value: f64,
    n: usize,
    n_reference: usize,
    feature: String,
    skipped: [(); 0],
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

impl FromFeatures {
    fn new(path: &Path, found: &Distances) -> Self {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
        let of = |value: f64, warnings: Vec<String>| Distance {
            value,
            n: found.n,
            n_reference: found.n_reference,
            feature: format!("{name}, {} wide", found.width),
            skipped: [],
            warnings,
        };
        let few = found.n.min(found.n_reference);
        let warnings = if few <= found.width {
            vec![format!(
                "{few} rows of {} values: a covariance is singular, so the distance is too large",
                found.width
            )]
        } else {
            Vec::new()
        };
        Self {
            metrics: BTreeMap::from([
                ("frechet", of(found.frechet, warnings)),
                ("kvd", of(found.kvd, Vec::new())),
            ]),
        }
    }
}

impl Report for FromFeatures {}

impl fmt::Display for FromFeatures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, distance) in &self.metrics {
            let Distance {
                value,
                n,
                n_reference,
                feature,
                ..
            } = distance;
            writeln!(f, "{name:<8} {value:.6}  {n} beside {n_reference}, {feature}")?;
            for warning in &distance.warnings {
                writeln!(f, "         note: {warning}")?;
            }
        }
        Ok(())
    }
}

/// What `--list` answers.
#[derive(Serialize)]
struct Listing {
    metrics: Vec<Listed>,
    left_out: Vec<LeftOut>,
}

#[derive(Serialize)]
struct Listed {
    name: &'static str,
    about: &'static str,
    weights: Option<&'static str>,
    beside: Beside,
    lower_is_better: bool,
    compared_with: &'static str,
}

#[derive(Serialize)]
struct LeftOut {
    name: &'static str,
    reason: &'static str,
}

impl Listing {
    fn new() -> Self {
        Self {
            metrics: METRICS
                .iter()
                .map(|metric| Listed {
                    name: metric.name,
                    about: metric.about,
                    weights: metric.reads.weights(),
                    beside: metric.beside,
                    lower_is_better: metric.lower_is_better,
                    compared_with: metric.golden,
                })
                .collect(),
            left_out: LEFT_OUT
                .iter()
                .map(|&(name, reason)| LeftOut { name, reason })
                .collect(),
        }
    }
}

impl Report for Listing {}

impl fmt::Display for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for metric in &self.metrics {
            let better = if metric.lower_is_better { "lower" } else { "higher" };
            writeln!(f, "{:<11} {} ({better} is better)", metric.name, metric.about)?;
            let beside = match metric.beside {
                Beside::Nothing => None,
                Beside::Prompt => Some("prompts"),
                Beside::Set | Beside::Pair => Some("--reference"),
            };
            let weights = metric.weights.map(|name| match name {
                "encoder" => "--weights encoder=DIR, or the builtin encoder".to_owned(),
                name => format!("--weights {name}=DIR"),
            });
            let needs: Vec<String> = weights.into_iter().chain(beside.map(str::to_owned)).collect();
            if !needs.is_empty() {
                writeln!(f, "            needs {}", needs.join(", "))?;
            }
            writeln!(f, "            compared with {}", metric.compared_with)?;
        }
        writeln!(f, "left out:")?;
        for LeftOut { name, reason } in &self.left_out {
            writeln!(f, "  {name}: {reason}")?;
        }
        Ok(())
    }
}
