//! `fulgur lm bench`: how fast a language model reads and writes.

use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use fulgur_datasets::atomic::write_atomic;
use fulgur_lightnet::lm::{Architecture, Config, LanguageModel};
use fulgur_lightnet::params::Params;
use fulgur_lightnet::params::file::read_bounded;
use serde::{Deserialize, Serialize};

use super::super::answer::{Answer, Report, Status};
use super::super::context::Context;
use super::super::files::check_output;
use super::super::progress::Unit;
use super::generate::LONGEST_CHUNK;
use super::{Weights, free_memory, parameters};
use crate::decode::verify::{Check, difference, verify};
use crate::decode::{Measures, Plan, Point, Told, compute, flatness, measure, plots};
use crate::device::device_name;
use crate::report::grouped;
use crate::report::svg::{length, short};

/// Longest context.
const LONGEST: usize = 1 << 26;
/// Most sequences together.
const MOST_TOGETHER: usize = 1 << 12;
/// Most tokens of a measure.
const MOST_TOKENS: usize = 1 << 16;
/// How far two orders of the same sums may be apart in f32, relative RMS.
const F32_BOUND: f64 = 1e-5;
/// The same with weights and activations of 8 bits of precision.
const BF16_BOUND: f64 = 2e-2;

/// Largest file of earlier results.
const MOST_RESULTS: u64 = 64 << 20;

/// Measure how fast a language model reads and writes, and what it keeps
///
/// A text of random tokens is read as far as the longest context. At each length its state is forked into a batch, which goes on
/// for some tokens: by the model alone (step), and with the choice of the likeliest token (token), each waited for. Times are
/// medians, with tenth and ninetieth percentiles. Reading is measured with one sequence, from the length before on. Lengths whose
/// keys and values would not fit are left out, and named.
///
/// The model is a folder, or one of random weights for each --architecture.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur lm bench --model DIR --lengths 1024,4096,16384\n  \
                  fulgur lm bench --architecture tnl,llama --layers 8 --width 512 --heads 4 --hidden 1408 --vocabulary 4096 --dtype bf16 --plot decoding.svg\n  \
                  fulgur lm bench --from tnl.json,llama.json --plot decoding.svg"
)]
pub(super) struct Arguments {
    /// Folder of the model
    #[arg(long, value_name = "DIR", conflicts_with = "architecture")]
    model: Option<PathBuf>,
    /// Random weights instead: tnl, transnormer, hgrn1, hgrn2, cosformer2, lightnet, eos, llama
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    architecture: Vec<String>,
    /// Their layers
    #[arg(long, value_name = "N", default_value_t = 6)]
    layers: usize,
    /// Their width
    #[arg(long, value_name = "N", default_value_t = 256)]
    width: usize,
    /// Their heads
    #[arg(long, value_name = "N", default_value_t = 4)]
    heads: usize,
    /// Width of their gated linear units
    #[arg(long, value_name = "N", default_value_t = 704)]
    hidden: usize,
    /// Their vocabulary
    #[arg(long, value_name = "N", default_value_t = 256)]
    vocabulary: usize,
    /// Lengths of contexts in tokens
    #[arg(
        long,
        value_name = "N,..",
        value_delimiter = ',',
        default_value = "1024,4096,16384"
    )]
    lengths: Vec<usize>,
    /// How many sequences are decoded together
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1")]
    batch: Vec<usize>,
    /// Tokens that each sequence goes on for, for one measure
    #[arg(short = 'n', long, value_name = "N", default_value_t = 64)]
    tokens: usize,
    /// Tokens that are read at once
    #[arg(long, value_name = "N", default_value_t = 4096)]
    chunk: usize,
    /// Type of the weights; on a GPU also of what is computed between the sums
    #[arg(long, value_enum, default_value_t = Weights::F32)]
    dtype: Weights,
    /// Bytes that keys and values of softmax attention may take; half of the free memory if absent
    #[arg(long, value_name = "BYTES")]
    most_bytes: Option<u64>,
    /// Seed of weights and tokens
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Plot time a token and bytes of state against the context
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Measure nothing: plot what earlier runs measured, from their --json
    #[arg(
        long,
        value_name = "FILE.json,..",
        value_delimiter = ',',
        requires = "plot",
        conflicts_with_all = ["model", "architecture", "verify"]
    )]
    from: Vec<PathBuf>,
    /// Measure nothing: compare bit for bit what recorded steps and ordinary ones decode behind the shortest length, and both with a
    /// pass over the whole text, on a GPU also with the CPU
    #[arg(long, conflicts_with = "plot")]
    verify: bool,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    if let Some(path) = &arguments.plot
        && !arguments.from.is_empty()
    {
        return plotted(&arguments.from, path);
    }
    let mut plan = arguments.plan()?;
    let sources = arguments.sources()?;
    if let Some(path) = &arguments.plot {
        check_output(path)?;
    }
    let device = context.open_device()?;
    if arguments.verify {
        return verified(arguments, &plan, sources, &device);
    }
    plan.most_bytes = match arguments.most_bytes {
        Some(bytes) => bytes,
        None => free_memory(&device)?.map_or(u64::MAX, |bytes| bytes / 2),
    };
    let mut benched = Benched {
        device: device_name(&device),
        dtype: arguments.dtype,
        threads: device.is_cpu().then(rayon::current_num_threads),
        tokens: plan.tokens,
        chunk: plan.chunk,
        most_bytes: plan.most_bytes,
        plot: arguments.plot.clone(),
        interrupted: false,
        models: Vec::new(),
    };
    for (name, config) in sources {
        let parameters = parameters(&config)?;
        let model = arguments.open(&config, parameters, &device)?;
        let mut progress = context.progress(&name, Unit::Items("tokens"));
        let measures = measure(&model, &plan, |told| {
            match told {
                Told::Read(done, all) => progress.set(done as u64, Some(all as u64)),
                Told::Decoding(at) => progress.relabel(format!("{name} at {}", length(at as f64))),
            }
            !context.interrupt.requested()
        })?;
        drop(progress);
        benched.models.push(Model {
            name,
            parameters,
            flatness: (plan.batches.iter())
                .filter_map(|&batch| Some((batch, flatness(&measures.measures, batch)?)))
                .collect(),
            measures,
        });
        if context.interrupt.requested() {
            benched.interrupted = true;
            break;
        }
    }
    if let Some(path) = &arguments.plot {
        let lines = benched.models.iter();
        let lines: Vec<(String, Vec<Point>)> = lines
            .map(|model| {
                (
                    model.name.clone(),
                    (model.measures.measures.iter()).map(Point::of).collect(),
                )
            })
            .collect();
        write_plot(path, &lines)?;
    }
    Answer::new(&benched)
}

fn write_plot(path: &Path, lines: &[(String, Vec<Point>)]) -> anyhow::Result<()> {
    let svg = plots(lines);
    write_atomic(path, |file| file.write_all(svg.as_bytes()))
        .with_context(|| format!("{}: cannot write", path.display()))
}

/// Plots the results of earlier runs together.
fn plotted(from: &[PathBuf], plot: &Path) -> anyhow::Result<Answer> {
    check_output(plot)?;
    let mut models = Vec::new();
    for path in from {
        let bytes = read_bounded(path, MOST_RESULTS)?;
        let found: Earlier = serde_json::from_slice(&bytes)
            .with_context(|| format!("{}: found no results of fulgur lm bench --json", path.display()))
            .map_err(|error| anyhow!("{error:#}"))?;
        for model in found.models {
            if let Some(at) = model
                .measures
                .iter()
                .position(|measure| !measure.point().is_one())
            {
                bail!(
                    "{}: measure {at} of {}: found a context, a time or a size that is not above 0",
                    path.display(),
                    model.name
                );
            }
            models.push(PlottedModel {
                name: model.name,
                from: path.clone(),
                measures: model.measures.iter().map(EarlierMeasure::point).collect(),
            });
        }
    }
    if models.iter().all(|model| model.measures.is_empty()) {
        bail!("{}: found no measures to plot", from[0].display());
    }
    // Of models of one name the files tell which they are.
    let lines: Vec<(String, Vec<Point>)> = (models.iter())
        .map(|model| {
            let same = models.iter().filter(|other| other.name == model.name).count();
            let stem = model.from.file_stem().unwrap_or_default().to_string_lossy();
            let name = match same > 1 {
                true => format!("{} ({stem})", model.name),
                false => model.name.clone(),
            };
            (name, model.measures.clone())
        })
        .collect();
    write_plot(plot, &lines)?;
    Answer::new(&Plotted {
        plot: plot.to_owned(),
        models,
    })
}

/// What an earlier run printed, as far as it is plotted.
#[derive(Deserialize)]
struct Earlier {
    models: Vec<EarlierModel>,
}

#[derive(Deserialize)]
struct EarlierModel {
    name: String,
    measures: Vec<EarlierMeasure>,
}

#[derive(Deserialize)]
struct EarlierMeasure {
    context: u64,
    batch: usize,
    token_ms: EarlierSpread,
    state_bytes: u64,
}

#[derive(Deserialize)]
struct EarlierSpread {
    median: f64,
}

impl EarlierMeasure {
    fn point(&self) -> Point {
        Point {
            context: self.context as f64,
            batch: self.batch,
            token_ms: self.token_ms.median,
            state_bytes: self.state_bytes as f64,
        }
    }
}

#[derive(Serialize)]
struct Plotted {
    plot: PathBuf,
    models: Vec<PlottedModel>,
}

#[derive(Serialize)]
struct PlottedModel {
    name: String,
    from: PathBuf,
    measures: Vec<Point>,
}

impl Report for Plotted {}

impl fmt::Display for Plotted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for model in &self.models {
            writeln!(
                f,
                "{}: {} measures of {}",
                model.name,
                model.measures.len(),
                model.from.display()
            )?;
        }
        writeln!(f, "{}", self.plot.display())
    }
}

/// Compares both ways of decoding.
fn verified(
    arguments: &Arguments,
    plan: &Plan,
    sources: Vec<(String, Config)>,
    device: &Device,
) -> anyhow::Result<Answer> {
    let mut models = Vec::with_capacity(sources.len());
    for (name, config) in sources {
        let model = arguments.open(&config, parameters(&config)?, device)?;
        let checks = verify(&model, plan)?;
        let processor = match device.is_cpu() {
            true => None,
            false => {
                let other = arguments.open(&config, parameters(&config)?, &Device::Cpu)?;
                Some(difference(&model, &other, plan)?)
            }
        };
        models.push(VerifiedModel {
            name,
            checks,
            processor,
        });
    }
    let all = || models.iter().flat_map(|model| &model.checks);
    let bound = match arguments.dtype {
        Weights::F32 => F32_BOUND,
        Weights::Bf16 => BF16_BOUND,
    };
    let near = |model: &VerifiedModel| model.processor.is_none_or(|difference| difference <= bound);
    Answer::new(&Verified {
        device: device_name(device),
        dtype: arguments.dtype,
        bound,
        equal: all().all(|check| check.is_equal(bound)) && models.iter().all(near),
        recorded: all().filter(|check| check.recorded).count(),
        models,
    })
}

impl Arguments {
    fn plan(&self) -> anyhow::Result<Plan> {
        let sorted = |values: &[usize]| {
            let mut values = values.to_vec();
            values.sort_unstable();
            values.dedup();
            values
        };
        let (lengths, batches) = (sorted(&self.lengths), sorted(&self.batch));
        let all = lengths.iter().map(|&length| ("lengths", length, LONGEST));
        let all = all.chain(batches.iter().map(|&batch| ("batch", batch, MOST_TOGETHER)));
        let others = [
            ("tokens", self.tokens, MOST_TOKENS),
            ("chunk", self.chunk, LONGEST_CHUNK),
        ];
        for (name, value, most) in all.chain(others) {
            if !(1..=most).contains(&value) {
                bail!("{name} is {value}, expected 1 to {most}");
            }
        }
        Ok(Plan {
            lengths,
            batches,
            tokens: self.tokens,
            chunk: self.chunk,
            most_bytes: u64::MAX,
            seed: self.seed,
        })
    }

    /// Names and shapes of the models.
    fn sources(&self) -> anyhow::Result<Vec<(String, Config)>> {
        if let Some(dir) = &self.model {
            let config = Config::read(&dir.join("config.json"), None)?;
            if config.bidirectional {
                bail!(
                    "{}: a model in both directions, expected a causal one",
                    dir.display()
                );
            }
            return Ok(vec![(dir.display().to_string(), config)]);
        }
        if self.architecture.is_empty() {
            bail!("found no model, expected --model or --architecture");
        }
        let named = |name: &String| {
            let known = Architecture::ALL;
            let Some(architecture) = known.into_iter().find(|known| known.name() == name) else {
                let known: Vec<_> = known.iter().map(|known| known.name()).collect();
                bail!(
                    "--architecture: found {name:?}, expected some of {}",
                    known.join(", ")
                );
            };
            let config = self.shape(architecture);
            if let Err(error) = config.check() {
                bail!("{name}: {error}");
            }
            Ok((name.clone(), config))
        };
        self.architecture.iter().map(named).collect()
    }

    fn shape(&self, architecture: Architecture) -> Config {
        let plain = Config::of(architecture);
        // HGRN has no heads: each channel is one.
        let elementwise = architecture == Architecture::Hgrn1;
        Config {
            vocab_size: self.vocabulary,
            hidden_size: self.width,
            intermediate_size: self.hidden,
            num_hidden_layers: self.layers,
            num_attention_heads: if elementwise { self.width } else { self.heads },
            head_dim: if elementwise { Some(1) } else { plain.head_dim },
            ..plain
        }
    }

    /// The model, as it decodes.
    fn open(&self, config: &Config, parameters: u64, device: &Device) -> anyhow::Result<LanguageModel> {
        let weights = self.dtype.dtype();
        let compute = compute(weights, device);
        // Masters, and those of a layer beside them while they are rounded.
        let needed = parameters.saturating_mul(4 + weights.size_in_bytes() as u64);
        if let Some(free) = free_memory(device)?.filter(|&free| needed > free) {
            bail!(
                "{parameters} parameters need {:.1} GB, expected at most the {:.1} GB that are free",
                needed as f64 / 1e9,
                free as f64 / 1e9
            );
        }
        let model = match &self.model {
            Some(dir) => LanguageModel::load(dir, None, compute, device)?,
            None => {
                let params = Params::random(self.seed, device);
                LanguageModel::new(config, compute, &params.builder())?;
                let weights = params.vars().into_iter();
                let weights = weights.map(|(name, weight)| (name, weight.as_detached_tensor()));
                let builder = VarBuilder::from_tensors(weights.collect(), DType::F32, device);
                LanguageModel::new(config, compute, &builder)?
            }
        };
        Ok(model.rounded(weights)?)
    }
}

/// The device as its driver calls it.
#[derive(Serialize)]
struct Benched {
    device: String,
    dtype: Weights,
    /// Of a CPU.
    threads: Option<usize>,
    tokens: usize,
    chunk: usize,
    most_bytes: u64,
    plot: Option<PathBuf>,
    interrupted: bool,
    models: Vec<Model>,
}

#[derive(Serialize)]
struct Model {
    name: String,
    parameters: u64,
    /// Batches with the longest median of a step over the shortest, over all contexts.
    flatness: Vec<(usize, f64)>,
    #[serde(flatten)]
    measures: Measures,
}

impl Report for Benched {
    fn status(&self) -> Status {
        match self.interrupted {
            true => Status::Partial,
            false => Status::Done,
        }
    }
}

impl fmt::Display for Benched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let threads = self
            .threads
            .map_or(String::new(), |count| format!(", {count} threads"));
        for model in &self.models {
            writeln!(
                f,
                "{}: {} parameters, weights in {}, on {}{threads}",
                model.name,
                grouped(model.parameters),
                self.dtype.name(),
                self.device
            )?;
            writeln!(
                f,
                "{:>9} {:>5} {:>10} {:>22} {:>22} {:>10} {:>9} {:>9}",
                "context",
                "batch",
                "read/s",
                "step ms (10-90 %)",
                "token ms (10-90 %)",
                "tokens/s",
                "state",
                "memory"
            )?;
            for measure in &model.measures.measures {
                let spread = |spread: crate::timing::Spread| {
                    format!("{:.3} ({:.3}-{:.3})", spread.median, spread.low, spread.high)
                };
                let memory = measure.device_bytes.or(measure.resident_bytes);
                writeln!(
                    f,
                    "{:>9} {:>5} {:>10.0} {:>22} {:>22} {:>10.1} {:>9} {:>9}",
                    length(measure.context as f64),
                    measure.batch,
                    measure.prefill_tokens_per_s,
                    spread(measure.step_ms),
                    spread(measure.token_ms),
                    measure.tokens_per_s,
                    megabytes(measure.state_bytes as u64),
                    memory.map_or("-".to_owned(), megabytes),
                )?;
            }
            for (batch, ratio) in &model.flatness {
                writeln!(
                    f,
                    "batch {batch}: a step takes at most {ratio:.3} times as long at one context as at another"
                )?;
            }
            if model.measures.measures.iter().any(|measure| measure.recorded) {
                writeln!(f, "steps were recorded once and launched as a whole")?;
            }
            for line in &model.measures.left_out {
                writeln!(f, "left out: {line}")?;
            }
            for kernel in &model.measures.kernels {
                writeln!(
                    f,
                    "{:>6} x {:<32} {:.4} ms",
                    kernel.launches, kernel.name, kernel.ms
                )?;
            }
        }
        match &self.plot {
            Some(path) => writeln!(f, "{}", path.display()),
            None => Ok(()),
        }
    }
}

#[derive(Serialize)]
struct Verified {
    device: String,
    dtype: Weights,
    /// How far logits of two orders of the same sums may be apart.
    bound: f64,
    /// Whether nothing differs.
    equal: bool,
    /// Checks whose steps were recorded.
    recorded: usize,
    models: Vec<VerifiedModel>,
}

#[derive(Serialize)]
struct VerifiedModel {
    name: String,
    checks: Vec<Check>,
    /// Relative RMS difference between logits of a GPU and of the CPU.
    processor: Option<f64>,
}

impl Report for Verified {
    fn status(&self) -> Status {
        match self.equal {
            true => Status::Done,
            false => Status::Partial,
        }
    }
}

impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "weights in {}, on {}", self.dtype.name(), self.device)?;
        for model in &self.models {
            for check in &model.checks {
                let equal = |equal| if equal { "equal" } else { "UNEQUAL" };
                let way = match (check.recorded, &check.why_not) {
                    (true, _) => "recorded".to_owned(),
                    (false, Some(why)) => format!("not recorded: {why}"),
                    (false, None) => "not recorded".to_owned(),
                };
                writeln!(
                    f,
                    "{:<12} batch {:>4}, {} tokens behind {}: ids {}, logits {}, states {}, clones {}, whole pass {:.1e}; \
                     {way}",
                    model.name,
                    check.batch,
                    check.tokens,
                    check.context,
                    equal(check.equal_ids),
                    equal(check.equal_logits),
                    equal(check.equal_states),
                    equal(check.equal_clones),
                    check.whole,
                )?;
            }
            if let Some(difference) = model.processor {
                writeln!(f, "{:<12} beside the CPU {difference:.1e}", model.name)?;
            }
        }
        let all: usize = self.models.iter().map(|model| model.checks.len()).sum();
        let verdict = if self.equal { "equal" } else { "UNEQUAL" };
        writeln!(
            f,
            "{verdict} within {:.0e}; {} of {all} recorded",
            self.bound, self.recorded
        )
    }
}

fn megabytes(bytes: u64) -> String {
    format!("{} MB", short((bytes as f64 / 1e4).round() / 100.0))
}
