//! `fulgur eval image`: how good a generator of pictures is.

use std::fmt;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::anyhow;
use fulgur_datasets::fetch::DataDir;
use fulgur_datasets::labelled::Skipped;
use fulgur_datasets::media::write_png;
use serde::Serialize;

use super::super::answer::{Answer, Report, Status};
use super::super::context::Context;
use super::super::files::check_output;
use super::super::progress::{Progress, Unit};
use crate::eval::pictures::{
    Accuracy, By, Distances, Evaluation, Judge, Judged as OfJudge, Labellings, Likeness, Options, Parts,
    Stage, Yardstick, evaluate,
};
use crate::lm_eval::figures::Estimate;
use crate::paint::{Model, Settings};

/// Judge a generator of pictures on what it was not trained on
///
/// An equal number of pictures is drawn of each class, and of each caption that held-out pictures have and training pictures have
/// not. Classifiers trained on real pictures (task classify) say what they show, beside real held-out pictures as the ceiling;
/// the classes of a judge are those of the model, or coarser ones of the same set. Features of each judge give Frechet distances,
/// precision, recall, density and coverage, of equally many pictures on both sides and in the proportions of real ones, with
/// held-out pictures beside training pictures as the reference. Nearest training pictures by features and by pixels tell making
/// from remembering. Shares are in 0..1. Ctrl-C while pictures are drawn ends with the figures of the whole rounds that were
/// drawn by then, and exit code 1.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur eval image --model runs/emoji/model --judge runs/emoji-judge/model --judge runs/emoji-subcategory-judge/model\n  \
                  fulgur eval image --model runs/emoji/model --judge runs/emoji-judge/model --by class --grid grid.png --neighbours near.png --json"
)]
pub(super) struct Arguments {
    /// Folder of the generator, as `fulgur train` writes it
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of a classifier that judges; may be given several times, features of the first one say what is near
    #[arg(long = "judge", value_name = "DIR", required = true)]
    judges: Vec<PathBuf>,
    /// The pictures: a prepared set, a folder with a folder a class, JSONL or IDX
    #[arg(long, value_name = "SET|PATH", default_value = "emoji/subcategory")]
    set: String,
    /// Folder of prepared data sets [default: $FULGUR_DATA, else ./data]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// What steers the pictures; may be given several times [default: class, and text, where model and set have them]
    #[arg(long, value_enum, value_name = "KIND", value_delimiter = ',')]
    by: Vec<By>,
    /// Pictures of each class that are judged
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000), default_value_t = 10)]
    samples: u32,
    /// Pictures of each held-out caption that are judged
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000), default_value_t = 1)]
    per_caption: u32,
    /// Pictures by class in the proportions of training for distances, 0 for no distances [default: as many as are held out, at
    /// most 1000]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    distances: Option<u32>,
    /// At most so many training pictures, chosen by lot [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    training: Option<u32>,
    /// Pictures that are drawn at a time
    #[arg(long, value_name = "B", value_parser = clap::value_parser!(u16).range(1..=4096), default_value_t = 64)]
    batch: u16,
    /// Steps of the sampler
    #[arg(long, value_name = "N", default_value_t = 24)]
    steps: usize,
    /// How strongly class and text steer (1 follows the model alone)
    #[arg(long, value_name = "SCALE", default_value_t = 3.0)]
    guidance: f64,
    /// Bends the steps of a flow towards noise (1 is even)
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    shift: f64,
    /// Seed of the noise and of choices by lot; picture i of a kind has the noise of picture i of `fulgur image generate`
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Draw up to 10 x 10 pictures of each kind
    #[arg(long, value_name = "FILE.png")]
    grid: Option<PathBuf>,
    /// Draw pictures beside their nearest training pictures: the nearest of all, and some others
    #[arg(long, value_name = "FILE.png")]
    neighbours: Option<PathBuf>,
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    for path in [&arguments.grid, &arguments.neighbours].into_iter().flatten() {
        check_output(path)?;
    }
    let began = Instant::now();
    let data = arguments
        .data
        .clone()
        .map_or_else(DataDir::from_env, DataDir::new);
    let labellings = Labellings::open(&arguments.set, data.path())?;
    let device = context.open_device()?;
    let model = Model::load(&arguments.model, &device)?;
    let judges: Vec<Judge> = (arguments.judges.iter())
        .map(|folder| Judge::load(folder, &labellings, &device))
        .collect::<anyhow::Result<_>>()?;
    let load_s = began.elapsed().as_secs_f64();
    let began = Instant::now();
    let parts = Parts {
        painter: model.painter(),
        model: arguments.model.display().to_string(),
        labellings: &labellings,
        judges: &judges,
    };
    let options = Options {
        by: arguments.by.clone(),
        samples: arguments.samples as usize,
        per_caption: arguments.per_caption as usize,
        matched: arguments.distances.map(|count| count as usize),
        training: arguments.training.map(|count| count as usize),
        batch: usize::from(arguments.batch),
        settings: Settings {
            steps: arguments.steps,
            guidance: arguments.guidance,
            shift: arguments.shift,
            seed: arguments.seed,
            size: model.painter().size(),
        },
        grid: arguments.grid.is_some(),
        sheet: arguments.neighbours.is_some(),
    };
    let mut shown: Option<(Stage, Progress)> = None;
    let evaluation = evaluate(&parts, &options, context.interrupt.flag(), &mut |progress| {
        if shown.as_ref().is_none_or(|(stage, _)| *stage != progress.stage) {
            // The old bar has to go before the new one comes.
            shown = None;
            let (label, unit) = match progress.stage {
                Stage::Real => ("real pictures", "pictures"),
                Stage::Draw => ("draw", "steps of pictures"),
                Stage::Drawn => ("judge", "pictures"),
                Stage::Neighbours => ("neighbours", "pictures"),
            };
            shown = Some((progress.stage, context.progress(label, Unit::Items(unit))));
        }
        if let Some((_, bar)) = &mut shown {
            bar.set(progress.done, Some(progress.total));
        }
    })
    .map_err(|error| anyhow!("{error:#}"))?;
    drop(shown);
    for (path, picture) in [
        (&arguments.grid, &evaluation.grid),
        (&arguments.neighbours, &evaluation.sheet),
    ] {
        if let (Some(path), Some(picture)) = (path, picture) {
            write_png(path, picture)?;
        }
    }
    Answer::new(&Judged {
        grid: arguments.grid.filter(|_| evaluation.grid.is_some()),
        neighbour_sheet: arguments.neighbours.filter(|_| evaluation.sheet.is_some()),
        model: arguments.model,
        set: arguments.set,
        seed: arguments.seed,
        steps: options.settings.steps,
        guidance: options.settings.guidance,
        shift: options.settings.shift,
        device: if device.is_cuda() { "cuda" } else { "cpu" },
        skipped: labellings.set.skipped().clone(),
        evaluation,
        load_s,
        seconds: began.elapsed().as_secs_f64(),
    })
}

#[derive(Serialize)]
struct Judged {
    model: PathBuf,
    set: String,
    seed: u64,
    steps: usize,
    guidance: f64,
    shift: f64,
    /// Judges and model compute in bf16 on a GPU, in f32 on the CPU.
    device: &'static str,
    #[serde(flatten)]
    evaluation: Evaluation,
    grid: Option<PathBuf>,
    neighbour_sheet: Option<PathBuf>,
    /// Files that are no pictures or cannot be read.
    skipped: Skipped,
    load_s: f64,
    seconds: f64,
}

impl Report for Judged {
    fn status(&self) -> Status {
        match self.evaluation.finished {
            true => Status::Done,
            false => Status::Partial,
        }
    }
}

/// Width of the first column, and of those of shares with their errors.
const NAME: usize = 28;
const SHARE: usize = 16;

fn percent(share: Estimate) -> String {
    let error = share
        .stderr
        .map_or_else(String::new, |stderr| format!(" +- {:.1}", 100.0 * stderr));
    format!("{:.1}{error} %", 100.0 * share.mean)
}

fn by(kind: By) -> String {
    format!("by {}", kind.name())
}

impl fmt::Display for Judged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let evaluation = &self.evaluation;
        let [height, width] = evaluation.image_size;
        writeln!(
            f,
            "{}: pictures of {width}x{height}, {} steps, guidance {}, seed {}",
            self.model.display(),
            self.steps,
            self.guidance,
            self.seed
        )?;
        writeln!(
            f,
            "{}: {} training pictures, {} held-out",
            self.set, evaluation.training, evaluation.held_out
        )?;
        for (kind, count) in &evaluation.drawn {
            let what = match kind {
                By::Class => "classes",
                By::Text | By::Both => "held-out captions",
            };
            writeln!(
                f,
                "{}: {} of each of {} {what}; {} in the proportions of real pictures, for distances; {} in all",
                by(*kind),
                count.each,
                count.wishes,
                count.matched,
                count.drawn
            )?;
        }
        for judge in &evaluation.judges {
            writeln!(f)?;
            judge_table(f, judge)?;
        }
        if let Some(near) = &evaluation.neighbours {
            writeln!(f)?;
            writeln!(
                f,
                "nearest of {} training pictures; nearer than {:.0} % of the held-out pictures are:",
                near.training,
                100.0 * near.expected
            )?;
            yardstick(f, "features of the first judge", &near.features)?;
            yardstick(f, "pixels, rms", &near.pixels)?;
        }
        writeln!(f)?;
        if self.skipped.total() > 0 {
            let words = self.skipped.messages.join("; ");
            writeln!(f, "{} skipped: {words}", self.skipped.total())?;
        }
        for (what, path) in [("grid", &self.grid), ("neighbours", &self.neighbour_sheet)] {
            if let Some(path) = path {
                writeln!(f, "{what} in {}", path.display())?;
            }
        }
        write!(
            f,
            "loaded in {:.1} s, judged in {:.1} s, of which {:.1} s to draw",
            self.load_s, self.seconds, evaluation.draw_s
        )?;
        match evaluation.finished {
            true => Ok(()),
            false => f.write_str("\nstopped before the end"),
        }
    }
}

fn judge_table(f: &mut fmt::Formatter<'_>, judge: &OfJudge) -> fmt::Result {
    writeln!(
        f,
        "judge {}: {} classes of {}, {:.2} M parameters",
        judge.judge.display(),
        judge.real.classes.len(),
        judge.set,
        judge.parameters as f64 / 1e6
    )?;
    writeln!(
        f,
        "{:NAME$}{:>7}{:>9}{:>SHARE$}{:>SHARE$}{:>SHARE$}{:>SHARE$}",
        "recognised", "n", "classes", "top-1", "top-5", "macro top-1", "macro top-5"
    )?;
    accuracy_line(f, "real held-out", Some(&judge.real))?;
    for (kind, of) in &judge.by {
        accuracy_line(f, &by(*kind), of.accuracy.as_ref())?;
    }
    if judge.by.values().all(|of| of.distances.is_none()) {
        return Ok(());
    }
    writeln!(
        f,
        "features: {}, width {}",
        judge.features.layer, judge.features.width
    )?;
    writeln!(
        f,
        "{:NAME$}{:>7}{:>10}{:>11}{:>9}{:>9}{:>10}",
        "distances", "n", "Frechet", "precision", "recall", "density", "coverage"
    )?;
    for (kind, of) in &judge.by {
        if let Some(distances) = &of.distances {
            distance_lines(f, &by(*kind), distances)?;
        }
    }
    writeln!(
        f,
        "Frechet distances of few pictures are too large: only those of one n are to be compared."
    )
}

fn accuracy_line(f: &mut fmt::Formatter<'_>, name: &str, accuracy: Option<&Accuracy>) -> fmt::Result {
    let Some(found) = accuracy else {
        return writeln!(
            f,
            "{name:NAME$}{:>7}  classes of the model lie within no class of the judge",
            "-"
        );
    };
    writeln!(
        f,
        "{name:NAME$}{:>7}{:>9}{:>SHARE$}{:>SHARE$}{:>SHARE$}{:>SHARE$}",
        found.n,
        found.classes_judged,
        percent(found.top1),
        percent(found.top5),
        percent(found.macro_top1),
        percent(found.macro_top5)
    )
}

fn distance_lines(f: &mut fmt::Formatter<'_>, name: &str, distances: &Distances) -> fmt::Result {
    let mut line = |what: String, found: &Likeness| {
        writeln!(
            f,
            "{what:NAME$}{:>7}{:>10.3}{:>11.3}{:>9.3}{:>9.3}{:>10.3}",
            distances.n,
            found.frechet,
            found.cover.precision,
            found.cover.recall,
            found.cover.density,
            found.cover.coverage
        )
    };
    line(format!("{name} - training"), &distances.to_training)?;
    line(format!("{name} - held-out"), &distances.to_held_out)?;
    line("real held-out - training".to_owned(), &distances.reference)?;
    if let Some(more) = &distances.at_more {
        let what = format!("{name} - training");
        writeln!(f, "{what:NAME$}{:>7}{:>10.3}", more.n, more.to_training)?;
    }
    if distances.rank_deficient {
        writeln!(
            f,
            "{} pictures are too few for this width: covariances have rank {}, and the Frechet distance says little.",
            distances.n, distances.rank
        )?;
    }
    Ok(())
}

fn yardstick(f: &mut fmt::Formatter<'_>, name: &str, found: &Yardstick) -> fmt::Result {
    writeln!(f, "{name}: {:.4}", found.distance)?;
    let real = &found.held_out;
    writeln!(
        f,
        "  {:26}{:>7}  median {:.4}, least {:.4}",
        "real held-out", real.n, real.median, real.least
    )?;
    for drawn in &found.drawn {
        writeln!(
            f,
            "  {:26}{:>7}  median {:.4}, least {:.4}, {} nearer",
            by(drawn.by),
            drawn.spread.n,
            drawn.spread.median,
            drawn.spread.least,
            percent(drawn.nearer)
        )?;
    }
    Ok(())
}
