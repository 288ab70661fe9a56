//! `fulgur image`: pictures by class and by text.

use std::fmt;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, bail};
use fulgur_datasets::augment::View;
use fulgur_datasets::labelled::BACKGROUND;
use fulgur_datasets::media::{read_upright, write_png};
use serde::Serialize;

use super::answer::{Answer, Report, Status};
use super::context::Context;
use super::files::check_output;
use super::progress::Unit;
use super::size::Size;
use crate::paint::{Model, Settings, Start, Wish, grid};

/// Most pictures of a call.
const MOST: usize = 4096;

/// Draw pictures by class and by text
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur image generate --model runs/image/model --class 3 --grid 4x4 -o grid.png"
)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Generate(Generate),
}

/// Draw pictures out of noise
///
/// Several classes or prompts are drawn in turn until the grid is full; a prompt and a class may be joined. The same seed gives the
/// same pictures, and a picture does not depend on those drawn beside it. With --init-image drawing begins with that picture, of
/// which --strength says how much may change.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur image generate --model runs/image/model --class 3 --grid 4x4 -o grid.png\n  \
                  fulgur image generate --model runs/image/model --prompt \"a red apple\" --seed 7 -o apple.png"
)]
struct Generate {
    /// Folder of the model, as `fulgur train` writes it
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Class by name or number; may be given several times
    #[arg(long = "class", value_name = "CLASS")]
    classes: Vec<String>,
    /// What to draw; may be given several times
    #[arg(long = "prompt", value_name = "TEXT")]
    prompts: Vec<String>,
    /// The picture to write
    #[arg(short, long, value_name = "FILE.png")]
    output: PathBuf,
    /// Rows and columns of pictures
    #[arg(long, value_name = "RxC", default_value = "1x1")]
    grid: String,
    /// Seed of the noise
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Steps of the sampler
    #[arg(long, value_name = "N", default_value_t = 24)]
    steps: usize,
    /// How strongly class and text steer (1 follows the model alone)
    #[arg(long, value_name = "SCALE", default_value_t = 3.0)]
    guidance: f64,
    /// Bends the steps of a flow towards noise (1 is even)
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    shift: f64,
    /// Width and height, instead of those of training
    #[arg(long, value_name = "WxH")]
    size: Option<Size>,
    /// A picture to start from; its middle is resized to the size
    #[arg(long, value_name = "FILE")]
    init_image: Option<PathBuf>,
    /// How much of that may change, above 0 and at most 1
    #[arg(long, value_name = "S", default_value_t = 0.6, requires = "init_image")]
    strength: f64,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    match &arguments.command {
        Command::Generate(generate) => generate.run(context),
    }
}

impl Generate {
    fn run(&self, context: &Context) -> anyhow::Result<Answer> {
        let [rows, columns] = pair(&self.grid).with_context(|| format!("--grid {:?}", self.grid))?;
        let count = rows.saturating_mul(columns);
        if count > MOST {
            bail!("--grid: found {count} pictures, expected at most {MOST}");
        }
        check_output(&self.output)?;
        let began = Instant::now();
        let device = context.open_device()?;
        let model = Model::load(&self.model, &device)?;
        let painter = model.painter();
        let size = match &self.size {
            None => painter.size(),
            Some(size) => [size.height, size.width],
        };
        let classes: Vec<usize> = self
            .classes
            .iter()
            .map(|name| model.class(name))
            .collect::<anyhow::Result<_>>()?;
        let wishes: Vec<Wish> = (0..count)
            .map(|i| Wish {
                class: (!classes.is_empty()).then(|| classes[i % classes.len()]),
                prompt: match self.prompts.len() {
                    0 => String::new(),
                    prompts => self.prompts[i % prompts].clone(),
                },
            })
            .collect();
        let settings = Settings {
            steps: self.steps,
            guidance: self.guidance,
            shift: self.shift,
            seed: self.seed,
            size,
        };
        let start = self
            .init_image
            .as_ref()
            .map(|path| {
                Ok::<_, anyhow::Error>(Start {
                    picture: View::filled(size).middle(&read_upright(path)?.over(BACKGROUND))?,
                    strength: self.strength,
                })
            })
            .transpose()?;
        let load_s = began.elapsed().as_secs_f64();
        let began = Instant::now();
        let mut progress = context.progress("image", Unit::Items("steps"));
        let drawn = painter.paint(&wishes, &settings, start.as_ref(), &mut |step| {
            progress.set(step.done as u64, Some(step.total as u64));
            !context.interrupt.requested()
        })?;
        drop(progress);
        let draw_s = began.elapsed().as_secs_f64();
        let finished = drawn.is_some();
        if let Some(pictures) = drawn {
            write_png(&self.output, &grid(&pictures, columns)?)?;
        }
        Answer::new(&Drawn {
            path: finished.then(|| self.output.clone()),
            pictures: count,
            size: [size[1], size[0]],
            seed: self.seed,
            steps: self.steps,
            guidance: self.guidance,
            model: self.model.clone(),
            load_s,
            draw_s,
        })
    }
}

/// Two numbers above 0 with an x between them.
fn pair(text: &str) -> anyhow::Result<[usize; 2]> {
    let numbers = text
        .split_once('x')
        .and_then(|(a, b)| Some([a.parse().ok()?, b.parse().ok()?]));
    match numbers {
        Some([a, b]) if a > 0 && b > 0 => Ok([a, b]),
        _ => bail!("expected two numbers above 0 with an x between them"),
    }
}

#[derive(Serialize)]
struct Drawn {
    path: Option<PathBuf>,
    pictures: usize,
    /// Width and height of each.
    size: [usize; 2],
    seed: u64,
    steps: usize,
    guidance: f64,
    model: PathBuf,
    load_s: f64,
    draw_s: f64,
}

impl Report for Drawn {
    fn status(&self) -> Status {
        match self.path {
            Some(_) => Status::Done,
            None => Status::Partial,
        }
    }
}

impl fmt::Display for Drawn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => writeln!(f, "{}", path.display()),
            None => writeln!(f, "stopped before the end, nothing is written"),
        }
    }
}
