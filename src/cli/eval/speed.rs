//! `fulgur eval speed`: how fast classifiers of pictures train and answer.

use std::fmt;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context as _, anyhow, bail};
use clap::ValueEnum;
use fulgur_datasets::atomic::write_atomic;
use fulgur_lightnet::mixer::causal::Form;
use fulgur_lightnet::vision::{Config, Mixer, Size};
use serde::Serialize;

use super::super::answer::{Answer, Report, Status};
use super::super::context::Context;
use super::super::files::check_output;
use super::super::progress::Unit;
use crate::classify::speed::{Measure, Plan, Use, measure, plots};
use crate::device::{compute_dtype, device_name};
use crate::report::grouped;

/// Longest side.
const LONGEST: usize = 1 << 14;
/// Most patches of a batch.
const MOST_TOKENS: usize = 1 << 24;
/// Most classes.
const MOST_CLASSES: usize = 1 << 16;

/// Measure how fast classifiers of pictures train and answer
///
/// For each mixer a classifier of random weights takes batches of noise of each size: whole steps of training (loss, gradients, the
/// limit of their norm, AdamW), and answers alone. A batch has about as many patches at every size, so that the time of a patch and the
/// memory of a picture compare. On a GPU branches compute in bf16; steps are waited for four at a time. Times are medians.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur eval speed --size small --sides 224,512,1024 --mixer lightnet,softmax --plot speed.svg\n  \
                  fulgur eval speed --size tiny --sides 2048 --steps 1 --answers-only --device cpu"
)]
pub(super) struct Arguments {
    /// What mixes tokens: lightnet, hgrn2, tnl, softmax
    #[arg(
        long,
        value_name = "NAME,..",
        value_delimiter = ',',
        default_value = "lightnet,softmax"
    )]
    mixer: Vec<String>,
    /// How mixers go through the tokens, such as causal for one scan; the usual way of each if absent
    #[arg(long, value_name = "FORM")]
    form: Option<String>,
    /// Layers, width and heads
    #[arg(long, value_enum, default_value_t = Shape::Small)]
    size: Shape,
    /// Side of a patch in pixels
    #[arg(long, value_name = "N", default_value_t = 16)]
    patch: usize,
    /// Sides of the pictures in pixels, whole patches
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "224")]
    sides: Vec<usize>,
    /// Patches of a batch, about
    #[arg(long, value_name = "N", default_value_t = 50_176)]
    tokens: usize,
    /// Classes
    #[arg(long, value_name = "N", default_value_t = 1000)]
    classes: usize,
    /// Steps that are timed, of each kind
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..), default_value_t = 40)]
    steps: u16,
    /// Time no training
    #[arg(long)]
    answers_only: bool,
    /// Let gated linear units see the neighbours of a token
    #[arg(long)]
    token_shift: bool,
    /// Seed of weights and pictures
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Plot time and memory of a picture against its pixels
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

/// A standard size.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Shape {
    /// 12 layers of 192
    Tiny,
    /// 12 layers of 384
    Small,
    /// 12 layers of 768
    Base,
}

impl Shape {
    fn size(self) -> Size {
        match self {
            Self::Tiny => Size::Tiny,
            Self::Small => Size::Small,
            Self::Base => Size::Base,
        }
    }
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    if let Some(path) = &arguments.plot {
        check_output(path)?;
    }
    let shapes = arguments.shapes()?;
    let device = context.open_device()?;
    let compute = compute_dtype(&device);
    let plan = Plan {
        tokens: arguments.tokens,
        steps: arguments.steps.into(),
        train: !arguments.answers_only,
        seed: arguments.seed,
    };
    let mut found = Speeds {
        device: device_name(&device),
        compute: compute.as_str(),
        threads: device.is_cpu().then(rayon::current_num_threads),
        finished: true,
        plot: arguments.plot.clone(),
        models: Vec::new(),
    };
    'all: for (name, config) in shapes {
        let mut model = Model {
            name,
            measures: Vec::new(),
        };
        for &side in &arguments.sides {
            let mut progress = context.progress(&format!("{} at {side}", model.name), Unit::Items("groups"));
            let mut groups = 0;
            let told = || {
                groups += 1;
                progress.set(groups, None);
                !context.interrupt.requested()
            };
            let measured = measure(&config, side, &plan, compute, &device, told)
                .with_context(|| format!("{} with pictures of {side}", model.name))
                .map_err(|error| anyhow!("{}", first_line(&format!("{error:#}"))))?;
            match measured {
                Some(measured) => model.measures.push(measured),
                None => {
                    found.finished = false;
                    found.models.push(model);
                    break 'all;
                }
            }
        }
        found.models.push(model);
    }
    if let Some(path) = &arguments.plot {
        let lines: Vec<(String, Vec<Measure>)> = (found.models.iter())
            .map(|model| (model.name.clone(), model.measures.clone()))
            .collect();
        let svg = plots(&lines);
        write_atomic(path, |file| file.write_all(svg.as_bytes()))
            .with_context(|| format!("{}: cannot write", path.display()))?;
    }
    Answer::new(&found)
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

impl Arguments {
    /// What is measured, by name; refuses what cannot be before anything is.
    fn shapes(&self) -> anyhow::Result<Vec<(String, Config)>> {
        for (name, found, most) in [
            ("--patch", self.patch, LONGEST),
            ("--tokens", self.tokens, MOST_TOKENS),
            ("--classes", self.classes, MOST_CLASSES),
        ] {
            if found == 0 || found > most {
                bail!("{name}: found {found}, expected 1 to {most}");
            }
        }
        for &side in &self.sides {
            if side == 0 || side > LONGEST || side % self.patch != 0 {
                bail!(
                    "--sides: found {side}, expected whole patches of {} up to {LONGEST}",
                    self.patch
                );
            }
            if (side / self.patch).pow(2) > MOST_TOKENS {
                bail!(
                    "--sides: {side} has more than {MOST_TOKENS} patches of {}",
                    self.patch
                );
            }
        }
        let labels: Vec<String> = (0..self.classes).map(|class| class.to_string()).collect();
        (self.mixer.iter())
            .map(|name| {
                let mixer = Mixer::ALL.into_iter().find(|mixer| mixer.name() == name);
                let Some(mixer) = mixer else {
                    let known = Mixer::ALL.map(Mixer::name).join(", ");
                    bail!("--mixer: found {name:?}, expected some of {known}");
                };
                let form = match &self.form {
                    None => mixer.form(),
                    Some(name) => Form::ALL
                        .into_iter()
                        .find(|form| form.name() == name)
                        .ok_or_else(|| {
                            let known = Form::ALL.map(Form::name).join(", ");
                            anyhow!("--form: found {name:?}, expected one of {known}")
                        })?,
                };
                let config = Config {
                    patch_size: self.patch,
                    image_size: [self.sides.first().copied().unwrap_or(self.patch); 2],
                    mixer,
                    form,
                    token_shift: self.token_shift,
                    ..Config::of(self.size.size(), labels.clone())
                };
                config
                    .check()
                    .map_err(|error| anyhow!("--mixer {name}: {}", first_line(&error.to_string())))?;
                let shown = match &self.form {
                    None => name.clone(),
                    Some(form) => format!("{name} {form}"),
                };
                Ok((shown, config))
            })
            .collect()
    }
}

#[derive(Serialize)]
struct Speeds {
    device: String,
    compute: &'static str,
    threads: Option<usize>,
    finished: bool,
    plot: Option<PathBuf>,
    models: Vec<Model>,
}

#[derive(Serialize)]
struct Model {
    name: String,
    measures: Vec<Measure>,
}

impl Report for Speeds {
    fn status(&self) -> Status {
        if self.finished {
            Status::Done
        } else {
            Status::Partial
        }
    }
}

impl fmt::Display for Speeds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.device, self.compute)?;
        if let Some(threads) = self.threads {
            write!(f, ", {threads} threads")?;
        }
        writeln!(f)?;
        write!(
            f,
            "{:20} {:>6} {:>7} {:>6} {:>10} {:>12} {:>12} {:>10}",
            "mixer", "side", "patches", "batch", "", "ms a batch", "images/s", "MB/image"
        )?;
        for model in &self.models {
            for measure in &model.measures {
                let uses = [("training", measure.train), ("answers", Some(measure.answer))];
                for (what, used) in uses.into_iter().filter_map(|(what, used)| Some((what, used?))) {
                    let Use { ms, images_per_s, .. } = used;
                    let memory = used
                        .bytes_per_image
                        .map_or("-".to_owned(), |bytes| format!("{:.2}", bytes as f64 / 1e6));
                    write!(
                        f,
                        "\n{:20} {:>6} {:>7} {:>6} {what:>10} {:>12.3} {:>12} {memory:>10}",
                        model.name,
                        measure.side,
                        grouped(measure.tokens as u64),
                        measure.batch,
                        ms.median,
                        rate(images_per_s),
                    )?;
                }
            }
        }
        Ok(())
    }
}

/// Pictures a second: many as a whole number, few with decimals.
fn rate(images_per_s: f64) -> String {
    match images_per_s {
        rate if rate >= 100.0 => grouped(rate.round() as u64),
        rate => format!("{rate:.3}"),
    }
}
