//! Metrics of folders: options, networks, figures.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{anyhow, bail};
use candle_core::Device;
use fulgur_benchmark::encoder::{ClipEncoder, ImageBindEncoder, ImageBindOptions};
use fulgur_benchmark::features::checkpoint;
use fulgur_benchmark::features::frames::Framing;
use fulgur_benchmark::metrics::javis::Windows;
use fulgur_benchmark::metrics::joint::Part;
use fulgur_benchmark::metrics::readers::{
    AlignReader, ClapReader, ClipReader, EncoderReader, I3dReader, JointReader, PannsReader, Reader,
    SyncReader, VggishReader,
};
use fulgur_benchmark::metrics::suite::{self, Beside, METRICS, Metric, Reads};
use fulgur_datasets::atomic::write_atomic;
use fulgur_datasets::media::Clip;
use serde::Serialize;
use serde::ser::SerializeMap as _;

use super::super::answer::{Answer, Report, Status};
use super::super::clips::{self, CLIPS, SOUNDS};
use super::super::context::Context;
use super::super::encoder::{EncoderOptions, open_encoder};
use super::super::files::check_page;
use super::super::progress::Unit;
use super::prompts::Prompts;
use super::{Arguments, Compat};
use crate::device::compute_dtype;
use crate::metrics::folders::{Figure, Item, Plan, measure};
use crate::models;
use crate::report::clips::{Column, Gallery, Look, Row};

/// The weights that the project brings along.
const BUILTIN: &str = "builtin";

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    let metrics = chosen(&arguments.metric)?;
    if let Some(page) = &arguments.report {
        check_page(page)?;
    }
    let Some(generated) = &arguments.generated else {
        bail!("--generated is needed; see --help")
    };
    let compares = |metric: &&'static Metric| matches!(metric.beside, Beside::Set | Beside::Pair);
    let reference = match (metrics.iter().copied().find(compares), &arguments.reference) {
        (Some(metric), None) => bail!(
            "--metric {}: expected --reference with a folder of real clips",
            metric.name
        ),
        (Some(_), Some(dir)) => items(dir, &Prompts::default())?,
        (None, _) => Vec::new(),
    };
    let prompts = match &arguments.prompts {
        Some(path) => Prompts::read(path)?,
        None => Prompts::default(),
    };
    let generated = items(generated, &prompts)?;
    let readers = open(context, &arguments, &metrics)?;
    let plan = Plan {
        metrics,
        readers,
        generated,
        reference,
        seconds: arguments.seconds,
        jobs: usize::from(arguments.jobs),
        seed: arguments.seed,
        cancel: context.interrupt.flag(),
    };
    let looks: Mutex<BTreeMap<usize, Look>> = Mutex::default();
    let see = |number: usize, clip: &Clip| {
        if arguments.report.is_some() {
            let look = Look::of(clip.video.as_ref(), clip.sound.as_ref());
            looks
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(number, look);
        }
    };
    let mut progress = context.progress("metrics", Unit::Items("clips"));
    let measured = measure(&plan, &see, &mut |done, total| progress.set(done, Some(total)))?;
    drop(progress);
    if let Some(path) = &arguments.report {
        let looks = looks.into_inner().unwrap_or_else(PoisonError::into_inner);
        let page = gallery(&plan, &measured.figures, looks).page();
        write_atomic(path, |file| file.write_all(page.as_bytes()))?;
    }
    Answer::new(&Figures {
        metrics: Ordered(measured.figures),
        report: arguments.report,
        complete: measured.complete,
    })
}

/// The metrics of these names, each once.
fn chosen(names: &[String]) -> anyhow::Result<Vec<&'static Metric>> {
    let mut metrics: Vec<&'static Metric> = Vec::new();
    for name in names {
        let metric = suite::find(name).ok_or_else(|| {
            let known: Vec<&str> = METRICS.iter().map(|metric| metric.name).collect();
            anyhow!("--metric: found {name:?}, expected some of {}", known.join(", "))
        })?;
        if !metrics.iter().any(|known| known.name == metric.name) {
            metrics.push(metric);
        }
    }
    Ok(metrics)
}

/// Clips and sounds of a folder.
fn items(dir: &Path, prompts: &Prompts) -> anyhow::Result<Vec<Item>> {
    if !dir.is_dir() {
        bail!("{}: found no folder, expected one with clips", dir.display());
    }
    let extensions: Vec<&str> = CLIPS.into_iter().chain(SOUNDS).collect();
    let paths = clips::expand(&[dir.to_owned()], &extensions)?;
    let item = |path: PathBuf| {
        let inside = path.strip_prefix(dir).unwrap_or(&path).with_extension("");
        let name = inside.to_string_lossy().into_owned();
        Item {
            prompt: prompts.of(&path, &name),
            name,
            path,
        }
    };
    Ok(paths.into_iter().map(item).collect())
}

/// Opens what the metrics read with.
fn open(
    context: &Context,
    arguments: &Arguments,
    metrics: &[&'static Metric],
) -> anyhow::Result<BTreeMap<Reads, Box<dyn Reader>>> {
    let weights = weights(&arguments.weights)?;
    let device = context.open_device()?;
    let mut readers = BTreeMap::new();
    for metric in metrics {
        if readers.contains_key(&metric.reads) {
            continue;
        }
        let parts = parts(metrics);
        let reader = open_one(context, arguments, metric, (&weights, parts), &device)?;
        readers.insert(metric.reads, reader);
    }
    Ok(readers)
}

/// Folders by name.
fn weights(arguments: &[String]) -> anyhow::Result<BTreeMap<&str, &Path>> {
    let known: Vec<&str> = {
        let mut names: Vec<&str> = METRICS
            .iter()
            .filter_map(|metric| metric.reads.weights())
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    };
    let mut weights = BTreeMap::new();
    for argument in arguments {
        let Some((name, dir)) = argument.split_once('=') else {
            bail!("--weights: found {argument:?}, expected NAME=DIR");
        };
        if !known.contains(&name) {
            bail!("--weights: found {name:?}, expected one of {}", known.join(", "));
        }
        weights.insert(name, Path::new(dir));
    }
    Ok(weights)
}

/// Parts of clips that joint metrics compare.
fn parts(metrics: &[&'static Metric]) -> Vec<Part> {
    let mut parts: Vec<Part> = metrics
        .iter()
        .filter_map(|metric| metric.pair)
        .flatten()
        .collect();
    parts.sort_unstable();
    parts.dedup();
    parts
}

fn open_one(
    context: &Context,
    arguments: &Arguments,
    metric: &Metric,
    (weights, parts): (&BTreeMap<&str, &Path>, Vec<Part>),
    device: &Device,
) -> anyhow::Result<Box<dyn Reader>> {
    let dir = || {
        let name = metric.reads.weights().unwrap_or_default();
        weights.get(name).copied().ok_or_else(|| {
            anyhow!(
                "--metric {}: expected --weights {name}=DIR with the folder of its weights",
                metric.name
            )
        })
    };
    Ok(match metric.reads {
        Reads::I3d => {
            let usual = match arguments.compat {
                Some(Compat::Javisbench) => Framing::JAVISBENCH,
                None => Framing::USUAL,
            };
            let framing = Framing {
                frames: arguments.frames.map_or(usual.frames, usize::from),
                ..usual
            };
            Box::new(I3dReader::load(dir()?, framing, device)?)
        }
        Reads::Vggish => Box::new(VggishReader::load(dir()?, device)?),
        Reads::Panns => Box::new(PannsReader::load(dir()?, device)?),
        Reads::Clap => Box::new(ClapReader::load(dir()?, device)?),
        Reads::Joint => {
            let dir = dir()?;
            let options = ImageBindOptions {
                compute: compute_dtype(device),
                downmix: false,
            };
            let encoder = ImageBindEncoder::open(dir, options, device)?;
            Box::new(JointReader::new(Box::new(encoder), parts, &checkpoint(dir)?))
        }
        Reads::Clip => {
            let dir = dir()?;
            let encoder = ClipEncoder::open(dir, compute_dtype(device), device)?;
            Box::new(ClipReader::new(Box::new(encoder), &checkpoint(dir)?))
        }
        Reads::Align => Box::new(AlignReader),
        Reads::Sync => Box::new(SyncReader),
        Reads::Avh | Reads::Javis => {
            let name = weights.get("encoder").copied().unwrap_or(Path::new(BUILTIN));
            let dir = if name == Path::new(BUILTIN) {
                models::encoder()?
            } else {
                name.to_owned()
            };
            let windows = (metric.reads == Reads::Javis).then_some(Windows {
                window_s: arguments.window,
                overlap_s: arguments.overlap,
            });
            Box::new(EncoderReader::new(
                open_encoder(name, EncoderOptions::default(), context)?,
                windows,
                &checkpoint(&dir)?,
            ))
        }
    })
}

/// Figures by name in the order that was asked for.
struct Ordered(Vec<(&'static str, Figure)>);

impl Serialize for Ordered {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, figure) in &self.0 {
            map.serialize_entry(name, figure)?;
        }
        map.end()
    }
}

#[derive(Serialize)]
struct Figures {
    metrics: Ordered,
    #[serde(skip_serializing_if = "Option::is_none")]
    report: Option<PathBuf>,
    #[serde(skip)]
    complete: bool,
}

impl Report for Figures {
    fn status(&self) -> Status {
        let figures = || self.metrics.0.iter().map(|(_, figure)| figure);
        if figures().all(|figure| figure.value.is_none()) {
            Status::Error
        } else if self.complete && figures().all(|figure| figure.value.is_some() && figure.skipped.is_empty())
        {
            Status::Done
        } else {
            Status::Partial
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, figure) in &self.metrics.0 {
            match figure.value {
                Some(value) => write!(f, "{name:<11} {value:.4}")?,
                None => write!(f, "{name:<11} none")?,
            }
            if let Some(deviation) = figure.deviation {
                write!(f, " +- {deviation:.4}")?;
            }
            write!(f, "  {} clips", figure.n)?;
            if let Some(n) = figure.n_reference {
                write!(f, " beside {n}")?;
            }
            writeln!(f, "  ({})", figure.feature)?;
            let mut note = |text: &str| writeln!(f, "            {text}");
            if let Some(reason) = &figure.reason {
                note(reason)?;
            }
            for warning in &figure.warnings {
                note(&format!("note: {warning}"))?;
            }
            for skipped in figure.skipped.iter().take(SHOWN) {
                note(&format!("skipped {}: {}", skipped.path.display(), skipped.reason))?;
            }
            if figure.skipped.len() > SHOWN {
                note(&format!("and {} more skipped", figure.skipped.len() - SHOWN))?;
            }
        }
        match &self.report {
            Some(path) => writeln!(f, "written to {}", path.display()),
            None => Ok(()),
        }
    }
}

/// Skipped clips that are named; `--json` has all.
const SHOWN: usize = 5;

/// The page of all clips.
fn gallery(plan: &Plan<'_>, figures: &[(&'static str, Figure)], mut looks: BTreeMap<usize, Look>) -> Gallery {
    let own: Vec<&(&'static str, Figure)> = figures
        .iter()
        .filter(|(_, figure)| !figure.samples.is_empty())
        .collect();
    let values: Vec<BTreeMap<&Path, f64>> = own
        .iter()
        .map(|(_, figure)| {
            figure
                .samples
                .iter()
                .map(|own| (own.path.as_path(), own.value))
                .collect()
        })
        .collect();
    let mut reasons: BTreeMap<&Path, Vec<String>> = BTreeMap::new();
    for (name, figure) in figures {
        for skipped in &figure.skipped {
            let words = format!("{name}: {}", skipped.reason);
            reasons.entry(&skipped.path).or_default().push(words);
        }
    }
    let row = |(number, item): (usize, &Item)| Row {
        name: item.name.clone(),
        prompt: item.prompt.clone(),
        look: looks.remove(&number).unwrap_or_default(),
        values: values
            .iter()
            .map(|values| values.get(item.path.as_path()).copied())
            .collect(),
        notes: reasons.remove(item.path.as_path()).unwrap_or_default(),
    };
    Gallery {
        title: "Metrics".to_owned(),
        summary: figures
            .iter()
            .map(|(name, figure)| {
                let clips = match figure.n_reference {
                    Some(n) => format!("{} clips beside {n}; {}", figure.n, figure.feature),
                    None => format!("{} clips; {}", figure.n, figure.feature),
                };
                ((*name).to_owned(), figure.value, clips)
            })
            .collect(),
        columns: own
            .iter()
            .map(|(name, _)| Column {
                name: (*name).to_owned(),
                lower_is_better: suite::find(name).is_some_and(|metric| metric.lower_is_better),
            })
            .collect(),
        rows: plan.generated.iter().enumerate().map(row).collect(),
    }
}
