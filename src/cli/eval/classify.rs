//! `fulgur eval classify`: how often a classifier of pictures is right.

use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, anyhow, bail};
use fulgur_datasets::atomic::write_atomic;
use fulgur_datasets::fetch::DataDir;
use fulgur_datasets::labelled::{Labelled, Part, Skipped};
use serde::Serialize;

use super::super::answer::{Answer, Report, Status};
use super::super::context::Context;
use super::super::files::check_output;
use super::super::progress::Unit;
use crate::classify::Model;
use crate::classify::figures::{Figures, Tally};
use crate::classify::prepare::{self, Fit};

/// Columns of the tables of results that timm publishes.
const CSV: &str = "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation";

/// Judge a classifier of pictures on what it was not trained on
///
/// Prints the shares of pictures whose class is the likeliest (top-1) and among the five likeliest (top-5), and both by class.
/// Ctrl-C ends with the figures of the pictures that were looked at by then, and exit code 1.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur eval classify --model runs/classify/model --set fashion-mnist\n  \
                  fulgur eval classify --model runs/classify/model --confusion confusion.svg --csv results.csv --json"
)]
pub(super) struct Arguments {
    /// Folder of the classifier, as `fulgur train` writes it
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The pictures, whose held-out part is looked at: a prepared set, a folder with a folder a class, JSONL or IDX
    #[arg(long, value_name = "SET|PATH", default_value = "fashion-mnist")]
    set: String,
    /// Folder of prepared data sets [default: $FULGUR_DATA, else ./data]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// At most so many pictures, the first ones
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Draw what classes are taken for
    #[arg(long, value_name = "FILE.svg")]
    confusion: Option<PathBuf>,
    /// Write a line of results in the columns of timm
    #[arg(long, value_name = "FILE.csv")]
    csv: Option<PathBuf>,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    for path in [&arguments.confusion, &arguments.csv].into_iter().flatten() {
        check_output(path)?;
    }
    let data = arguments
        .data
        .clone()
        .map_or_else(DataDir::from_env, DataDir::new);
    let mut set = Labelled::open(&arguments.set, data.path()).map_err(|error| anyhow!("--set: {error}"))?;
    let device = context.open_device()?;
    let model = Model::load(&arguments.model, &device)?;
    let config = model.config();
    check_classes(&arguments.model, &config.labels, set.classes())?;
    let [height, width] = config.image_size;
    set.drop_broken();
    let mut indices = set.part(Part::HeldOut);
    indices.truncate(arguments.limit.map_or(usize::MAX, |limit| limit as usize));
    let count = indices.len();

    let began = Instant::now();
    let mut progress = context.progress("eval", Unit::Items("pictures"));
    let mut tally = Tally::new(config.classes());
    let mut done = 0;
    for indices in indices.chunks(Model::together(height, width)) {
        if context.interrupt.requested() {
            break;
        }
        let pictures = indices
            .iter()
            .map(|&index| Ok(prepare::fit(&set.picture(index)?, config, Fit::Model)?))
            .collect::<anyhow::Result<Vec<_>>>()?;
        for (&index, shares) in indices.iter().zip(model.look(&pictures)?) {
            let Some(label) = set.label(index) else {
                bail!("--set: picture {:?} has no class", set.key(index));
            };
            tally.add(label, &shares);
        }
        done += indices.len();
        progress.set(done as u64, Some(count as u64));
    }
    drop(progress);
    let seconds = began.elapsed().as_secs_f64();
    let Some(figures) = tally.figures(&config.labels) else {
        bail!("--set: no picture was looked at");
    };
    let judged = Judged {
        model: arguments.model.clone(),
        set: arguments.set.clone(),
        parameters: model.parameters(),
        image_size: config.image_size,
        images_per_s: (seconds > 0.0).then(|| done as f64 / seconds),
        finished: done == count,
        confusion_picture: arguments.confusion.clone(),
        csv: arguments.csv.clone(),
        skipped: set.skipped().clone(),
        figures,
    };
    if let Some(path) = &judged.confusion_picture {
        write(path, &judged.figures.picture())?;
    }
    if let Some(path) = &judged.csv {
        write(path, &format!("{CSV}\n{}\n", judged.row()))?;
    }
    Answer::new(&judged)
}

/// A file of text, whole or not at all.
fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    write_atomic(path, |file| file.write_all(text.as_bytes()))
        .with_context(|| format!("{}: cannot write", path.display()))
}

/// The classes of the model have to be those of the set, in their order.
fn check_classes(model: &Path, found: &[String], expected: &[String]) -> anyhow::Result<()> {
    if found.len() != expected.len() {
        bail!(
            "{}: {} classes, expected the {} of the set",
            model.display(),
            found.len(),
            expected.len()
        );
    }
    match found
        .iter()
        .zip(expected)
        .position(|(found, expected)| found != expected)
    {
        None => Ok(()),
        Some(at) => bail!(
            "{}: labels[{at}] is {:?}, expected {:?} as in the set",
            model.display(),
            found[at],
            expected[at]
        ),
    }
}

#[derive(Serialize)]
struct Judged {
    model: PathBuf,
    set: String,
    parameters: u64,
    image_size: [usize; 2],
    #[serde(flatten)]
    figures: Figures,
    images_per_s: Option<f64>,
    finished: bool,
    confusion_picture: Option<PathBuf>,
    csv: Option<PathBuf>,
    /// Files that are no pictures or cannot be read.
    skipped: Skipped,
}

impl Judged {
    /// The line below [`CSV`]: shares in per cent, parameters in millions. Resizing fills the size, so that nothing around it is cut.
    fn row(&self) -> String {
        let (top1, top5) = (100.0 * self.figures.top1, 100.0 * self.figures.top5);
        let side = self.image_size.into_iter().max().unwrap_or(0);
        // A comma in a name would begin another column.
        let name = self.model.display().to_string().replace([',', '"', '\n'], "_");
        format!(
            "{name},{top1:.3},{:.3},{top5:.3},{:.3},{:.2},{side},1.0,bicubic",
            100.0 - top1,
            100.0 - top5,
            self.parameters as f64 / 1e6
        )
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
        writeln!(
            f,
            "{}: {} held-out pictures of {}, {:.2} M parameters",
            self.model.display(),
            figures.n,
            self.set,
            self.parameters as f64 / 1e6
        )?;
        writeln!(
            f,
            "top-1 {:.2} %, top-5 {:.2} %, mean of classes {:.2} %, loss {:.4}",
            100.0 * figures.top1,
            100.0 * figures.top5,
            100.0 * figures.macro_top1,
            figures.loss
        )?;
        let width = figures
            .classes
            .iter()
            .map(|class| class.label.chars().count())
            .max();
        let width = width.unwrap_or(0).max(5);
        writeln!(
            f,
            "{:width$} {:>7} {:>9} {:>9} {:>9}  most often mistaken for",
            "class", "n", "recall", "precision", "top-5"
        )?;
        let share =
            |share: Option<f64>| share.map_or("-".to_owned(), |share| format!("{:.2} %", 100.0 * share));
        for class in &figures.classes {
            writeln!(
                f,
                "{:width$} {:>7} {:>9} {:>9} {:>9}  {}",
                class.label,
                class.n,
                share(class.recall),
                share(class.precision),
                share(class.top5),
                class.mistaken_for.as_deref().unwrap_or("-")
            )?;
        }
        if let Some(line) = self.skipped.summary() {
            writeln!(f, "{line}")?;
        }
        if let Some(speed) = self.images_per_s {
            writeln!(f, "{speed:.0} images/s")?;
        }
        match self.finished {
            true => Ok(()),
            false => f.write_str("stopped before the end"),
        }
    }
}
