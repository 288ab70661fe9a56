//! How fast a language model reads and writes, and what it keeps, against the length of its context.
//!
//! One text is read in chunks as far as the longest context; at each length that is asked for its state is forked into a batch,
//! which goes on for some tokens, twice: by the model alone, and with the choice of the likeliest token. Both are the ways of
//! `fulgur lm generate`. The text goes on behind the length afterwards as if nothing had been written, so that a million tokens
//! are read once.

pub mod verify;

use std::time::Instant;

use anyhow::bail;
use candle_core::{DType, Device};
use fulgur_kernels::philox::Philox;
use fulgur_lightnet::lm::sampling::Sampling;
use fulgur_lightnet::lm::{LanguageModel, Session};
use serde::Serialize;

use crate::report::picture::{Framed, picture};
use crate::report::svg::{Line, Plot, Scale};
use crate::timing::{Spread, Watch};

/// Tokens that are decoded before any is timed: on a GPU a step is recorded meanwhile.
const WARM: usize = 5;
/// Stream of the tokens that are read.
const STREAM: u64 = 0x1e57;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Lengths of contexts in tokens, rising.
    pub lengths: Vec<usize>,
    /// How many sequences are decoded together.
    pub batches: Vec<usize>,
    /// Tokens that are decoded, of each sequence, for one measure.
    pub tokens: usize,
    /// Tokens that are read at once.
    pub chunk: usize,
    /// Keys and values of softmax attention may take so many bytes.
    pub most_bytes: u64,
    /// Seed of the tokens that are read.
    pub seed: u64,
}

/// Decoding behind one length.
#[derive(Clone, Debug, Serialize)]
pub struct Measure {
    /// Tokens of the context.
    pub context: usize,
    /// Sequences.
    pub batch: usize,
    /// Whether steps were recorded once and launched as a whole.
    pub recorded: bool,
    /// Tokens a second with which the last part of the context was read, one sequence at a time.
    pub prefill_tokens_per_s: f64,
    /// Milliseconds of a step of the model, without a choice.
    pub step_ms: Spread,
    /// Milliseconds of a step with the choice of a token for each sequence.
    pub token_ms: Spread,
    /// Tokens a second of all sequences together, with choices.
    pub tokens_per_s: f64,
    /// Bytes of what the model keeps, of all sequences.
    pub state_bytes: usize,
    /// The most bytes that tensors took up on the GPU meanwhile, weights included.
    pub device_bytes: Option<u64>,
    /// The most memory of the process meanwhile, in bytes.
    pub resident_bytes: Option<u64>,
}

/// Launches of one of our kernels in a step on a GPU.
#[derive(Clone, Debug, Serialize)]
pub struct Kernel {
    /// Its name.
    pub name: String,
    /// How often it is launched.
    pub launches: usize,
    /// Milliseconds of all of them, each waited for.
    pub ms: f64,
}

/// All measures of a model.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Measures {
    /// By length, then by batch.
    pub measures: Vec<Measure>,
    /// What was left out, and why.
    pub left_out: Vec<String>,
    /// Kernels of one step of the first batch on a GPU; products of cuBLAS are not among them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kernels: Vec<Kernel>,
}

/// What [`measure`] tells its caller, who ends it by `false`.
#[derive(Clone, Copy, Debug)]
pub enum Told {
    /// So many of all tokens of the longest context are read.
    Read(usize, usize),
    /// A length is being decoded behind.
    Decoding(usize),
}

/// Measures `model` by `plan`. Where `told` ends it, what has been measured.
///
/// # Errors
/// A model in both directions, or a failing operation.
pub fn measure(
    model: &LanguageModel,
    plan: &Plan,
    mut told: impl FnMut(Told) -> bool,
) -> anyhow::Result<Measures> {
    let (config, device) = (model.config(), model.device());
    if config.bidirectional {
        bail!("a model in both directions, expected a causal one");
    }
    let mut all = Measures::default();
    let mut session = Session::new(model);
    let mut noise = Philox::new(plan.seed, STREAM);
    let growth = config.growth(model.compute());
    let longest = plan.lengths.last().copied().unwrap_or(0);
    for &length in &plan.lengths {
        let fits = |batch: usize| {
            let rows = length as u64 + batch as u64 * (length + WARM + plan.tokens) as u64;
            // The text's own, those of its forks, and one layer once more while it grows.
            let once_more = 1.0 + 1.0 / config.num_hidden_layers as f64;
            growth as f64 * rows as f64 * once_more <= plan.most_bytes as f64
        };
        let batches: Vec<usize> = plan
            .batches
            .iter()
            .copied()
            .filter(|&batch| fits(batch))
            .collect();
        for batch in plan.batches.iter().filter(|batch| !batches.contains(batch)) {
            all.left_out.push(format!(
                "context {length}, batch {batch}: keys and values need more than {:.1} GB",
                plan.most_bytes as f64 / 1e9
            ));
        }
        if batches.is_empty() {
            continue;
        }
        let before = session.tokens();
        let ids: Vec<u32> = (before..length)
            .map(|_| noise.below(config.vocab_size) as u32)
            .collect();
        device.synchronize()?;
        let began = Instant::now();
        let read = session.read(model, &ids, plan.chunk, |read| {
            told(Told::Read(before + read, longest))
        })?;
        device.synchronize()?;
        let prefill_tokens_per_s = read as f64 / began.elapsed().as_secs_f64();
        if read < ids.len() || !told(Told::Decoding(length)) {
            return Ok(all);
        }
        #[cfg(feature = "cuda")]
        if all.kernels.is_empty() && device.is_cuda() {
            all.kernels = kernels(model, &session, batches[0])?;
        }
        for batch in batches {
            let measured = decode(model, &session, batch, plan.tokens)?;
            all.measures.push(Measure {
                context: length,
                prefill_tokens_per_s,
                ..measured
            });
        }
    }
    Ok(all)
}

/// Decodes `tokens` tokens of `batch` forks of `session`.
fn decode(model: &LanguageModel, session: &Session, batch: usize, tokens: usize) -> anyhow::Result<Measure> {
    let device = model.device();
    let numbers: Vec<u32> = (0..batch as u32).collect();
    let memory = Watch::start(device)?;
    let greedy = Sampling {
        temperature: 0.0,
        ..Sampling::default()
    };
    let vocabulary = model.config().vocab_size;
    let mut group = session.fork(&numbers)?;
    let mut times = Vec::with_capacity(tokens);
    let mut chosen = Vec::new();
    for token in 0..WARM + tokens {
        device.synchronize()?;
        let began = Instant::now();
        chosen = group.next(model, &greedy, vocabulary)?;
        if token >= WARM {
            times.push(1e3 * began.elapsed().as_secs_f64());
        }
    }
    let token_ms = Spread::of(times);
    let mut times = Vec::with_capacity(tokens);
    for token in 0..WARM + tokens {
        device.synchronize()?;
        let began = Instant::now();
        group.append(model, &chosen)?;
        device.synchronize()?;
        if token >= WARM {
            times.push(1e3 * began.elapsed().as_secs_f64());
        }
    }
    let peak = memory.peak(device)?;
    Ok(Measure {
        context: session.tokens(),
        batch,
        recorded: group.is_recorded(),
        prefill_tokens_per_s: 0.0,
        step_ms: Spread::of(times),
        token_ms,
        tokens_per_s: 1e3 * batch as f64 / token_ms.mean,
        state_bytes: group.state_bytes(),
        device_bytes: peak.device,
        resident_bytes: peak.resident,
    })
}

/// What a step of `batch` forks of `session` launches, those that take longest first.
#[cfg(feature = "cuda")]
fn kernels(model: &LanguageModel, session: &Session, batch: usize) -> anyhow::Result<Vec<Kernel>> {
    let mut state = session.state()?.select(&vec![0; batch])?;
    let ids = vec![0; batch];
    model.step(&ids, &mut state)?;
    let (_, launches) = fulgur_kernels::probe::time_launches(|| model.step(&ids, &mut state))?;
    let mut kernels: Vec<Kernel> = Vec::new();
    for (name, ms) in launches {
        match kernels.iter_mut().find(|kernel| kernel.name == name) {
            Some(kernel) => {
                kernel.launches += 1;
                kernel.ms += ms;
            }
            None => kernels.push(Kernel {
                name,
                launches: 1,
                ms,
            }),
        }
    }
    kernels.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    Ok(kernels)
}

/// By how much the time of a token differs between contexts: the longest median over the shortest, of steps of one batch.
pub fn flatness(measures: &[Measure], batch: usize) -> Option<f64> {
    let medians = measures.iter().filter(|measure| measure.batch == batch);
    let medians: Vec<f64> = medians.map(|measure| measure.step_ms.median).collect();
    let (low, high) = medians.iter().fold((f64::INFINITY, 0f64), |(low, high), &ms| {
        (low.min(ms), high.max(ms))
    });
    (medians.len() > 1 && low > 0.0).then(|| high / low)
}

/// What is plotted of a [`Measure`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    /// Tokens of the context.
    pub context: f64,
    /// Sequences.
    pub batch: usize,
    /// Median milliseconds of a token.
    pub token_ms: f64,
    /// Bytes of what is kept.
    pub state_bytes: f64,
}

impl Point {
    /// Of a measure.
    pub fn of(measure: &Measure) -> Self {
        Self {
            context: measure.context as f64,
            batch: measure.batch,
            token_ms: measure.token_ms.median,
            state_bytes: measure.state_bytes as f64,
        }
    }

    /// Whether it has a place on logarithmic axes.
    pub fn is_one(&self) -> bool {
        let values = [self.context, self.batch as f64, self.token_ms, self.state_bytes];
        values.iter().all(|value| value.is_finite() && *value > 0.0)
    }
}

/// Time a token and bytes of state against the context, one line a model and batch, as an SVG file.
pub fn plots(models: &[(String, Vec<Point>)]) -> String {
    let (mut times, mut bytes) = (Vec::new(), Vec::new());
    let alone = models
        .iter()
        .flat_map(|(_, points)| points)
        .all(|point| point.batch == 1);
    for (name, points) in models {
        let mut batches: Vec<usize> = points.iter().map(|point| point.batch).collect();
        batches.sort_unstable();
        batches.dedup();
        for batch in batches {
            let colour = times.len();
            let line = |of: &dyn Fn(&Point) -> f64| {
                let points = points.iter().filter(|point| point.batch == batch);
                let mut points: Vec<(f64, f64)> = points.map(|point| (point.context, of(point))).collect();
                points.sort_by(|a, b| a.0.total_cmp(&b.0));
                Line {
                    name: match alone {
                        true => name.clone(),
                        false => format!("{name}, batch {batch}"),
                    },
                    colour,
                    points,
                    ..Line::default()
                }
            };
            times.push(line(&|point| point.token_ms));
            bytes.push(line(&|point| point.state_bytes / 1e6));
        }
    }
    let plot = |title: &str, lines: Vec<Line>| Plot {
        title: title.to_owned(),
        logarithmic: true,
        steps: Scale::Doubling,
        lines,
        ..Plot::default()
    };
    let (times, bytes) = (plot("Time of decoding", times), plot("State", bytes));
    let frame = |plot, values| Framed {
        plot,
        steps: "tokens of context",
        values,
    };
    picture(&[frame(&times, "ms a token"), frame(&bytes, "MB")])
}

/// Type in which branches compute on `device`, of a model whose weights are `weights`: CPUs compute in f32.
pub fn compute(weights: DType, device: &Device) -> DType {
    match device.is_cpu() {
        true => DType::F32,
        false => weights,
    }
}
