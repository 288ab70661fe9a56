//! `fulgur forward`: runs a model, a part of it or a bare operator on named tensors, to compare it with any other
//! implementation.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::bail;
use candle_core::Device;
use clap::ValueEnum;
use fulgur_kernels::decay::Gate;
use serde::Serialize;

use super::answer::{Answer, Report};
use super::context::Context;
use super::files::check_output;
use crate::forward::{Model, Part, Port, operator};
use crate::{models, tensors};

/// Run a model, or one part of it, on named tensors
///
/// Inputs are f32, f16 or bf16 (ids i64 or u32), outputs f32. --list prints the parts of a model with the names and
/// shapes of their inputs and outputs; without --model those of the builtin models and of the operators.
///
/// Models are the builtin generator and the folders of its parts, the AVHScore encoder, ImageBind (vision, audio, text), CLIP
/// (pixel_values, input_ids), BERT encoders such as MiniLM, classifiers of pictures (pixel_values to logits), UNets and KL autoencoders
/// of diffusers, HiFi-GAN of transformers, TAVDiffusion, files of their first releases and folders of whole pipelines, and language
/// models (input_ids to logits): LLaMA of Hugging Face, HGRN2 and LightNet of flash-linear-attention, TransNormerLLM, and those that
/// fulgur train makes, in one file or in shards with an index. Operators take q, k, v and log-decays g, or rates with the decay
/// exp(-rate), or, for LightNet, logits g instead of k; with do, and optionally dstate, among the inputs they also give the gradients of
/// sum(o do) + sum(state dstate).
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur forward --model models/builtin --part vocoder --inputs in.safetensors --out \
                  out.safetensors\n  fulgur forward --model data/minilm --inputs in.safetensors --out out.safetensors\n  \
                  fulgur forward --op lightnet-noncausal --inputs in.safetensors --out out.safetensors\n  fulgur forward \
                  --list --model models/encoder"
)]
pub(super) struct Arguments {
    /// Folder of the model; `builtin` is the builtin generator
    #[arg(long, value_name = "builtin|DIR", required_unless_present_any = ["op", "list"])]
    model: Option<PathBuf>,
    /// Part of the model, where it has several
    #[arg(long, value_name = "NAME", requires = "model")]
    part: Option<String>,
    /// A bare operator instead of a model
    #[arg(long, value_name = "NAME", conflicts_with_all = ["model", "part"])]
    op: Option<Operator>,
    /// The tensors to run it on
    #[arg(long, value_name = "FILE.safetensors", required_unless_present = "list")]
    inputs: Option<PathBuf>,
    /// Where to write what comes out
    #[arg(long, value_name = "FILE.safetensors", required_unless_present = "list")]
    out: Option<PathBuf>,
    /// Print parts with their inputs and outputs, and run nothing
    #[arg(long, conflicts_with_all = ["op", "part", "inputs", "out"])]
    list: bool,
}

/// Operators that run on their own.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Operator {
    /// The causal recurrence with one decay a head, constant (rate) or for every token (g), or none
    ScalarDecay,
    /// The causal recurrence with a decay for every token and key channel (g)
    VectorDecay,
    /// LightNet's causal additive recurrence: every token reads the softmax-weighted mean of those before it
    LightnetCausal,
    /// LightNet's additive recurrence without causality: every token sees the sum of all
    LightnetNoncausal,
}

impl Operator {
    fn part(self) -> Part {
        match self {
            Self::ScalarDecay => operator::causal_decay(Gate::Scalar),
            Self::VectorDecay => operator::causal_decay(Gate::Vector),
            Self::LightnetCausal => operator::lightnet_causal(),
            Self::LightnetNoncausal => operator::lightnet_noncausal(),
        }
    }
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    if arguments.list {
        return list(context, arguments.model.as_deref());
    }
    let (Some(inputs), Some(out)) = (arguments.inputs, arguments.out) else {
        bail!("--inputs and --out are needed; see --help");
    };
    // A name that cannot be written is found before the work, not after it.
    check_output(&out)?;
    let outputs = match (arguments.op, arguments.model) {
        (Some(op), _) => run_part(context, &op.part(), &inputs)?,
        (None, Some(model)) => {
            let model = open(&model)?;
            run_part(context, model.part(arguments.part.as_deref())?, &inputs)?
        }
        (None, None) => bail!("--model or --op is needed; see --help"),
    };
    tensors::write_f32(&out, &outputs)?;
    let shapes = outputs
        .into_iter()
        .map(|(name, tensor)| (name, tensor.dims().to_vec()))
        .collect();
    Answer::new(&Written {
        outputs: shapes,
        path: out,
    })
}

fn open(name: &Path) -> anyhow::Result<Model> {
    let dir = if name == Path::new("builtin") {
        models::generator()?
    } else {
        name.to_owned()
    };
    Ok(Model::open(&dir)?)
}

fn run_part(context: &Context, part: &Part, inputs: &Path) -> anyhow::Result<crate::forward::Outputs> {
    let device = context.open_device()?;
    let tensors = tensors::read(inputs, &Device::Cpu)?;
    Ok(part.run(inputs, &tensors, &device)?)
}

fn list(context: &Context, model: Option<&Path>) -> anyhow::Result<Answer> {
    let listing = match model {
        Some(name) => Listing {
            models: vec![open(name)?],
            operators: Vec::new(),
        },
        None => {
            let found = [models::generator(), models::encoder()];
            let found: Vec<PathBuf> = found.into_iter().flatten().collect();
            if found.is_empty() {
                context.note("no builtin model here; --model lists that of a folder");
            }
            Listing {
                models: found.iter().map(|dir| open(dir)).collect::<Result<_, _>>()?,
                operators: Operator::value_variants().iter().map(|op| op.part()).collect(),
            }
        }
    };
    Answer::new(&listing)
}

#[derive(Serialize)]
struct Written {
    outputs: BTreeMap<String, Vec<usize>>,
    path: PathBuf,
}

impl Report for Written {}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, shape) in &self.outputs {
            writeln!(f, "{name} {shape:?}")?;
        }
        write!(f, "written to {}", self.path.display())
    }
}

#[derive(Serialize)]
struct Listing {
    models: Vec<Model>,
    operators: Vec<Part>,
}

impl Report for Listing {}

impl fmt::Display for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for model in &self.models {
            writeln!(f, "{}: {}", model.path.display(), model.kind)?;
            for part in &model.parts {
                writeln!(f, "  --part {}", part.name)?;
                ports(f, part)?;
            }
        }
        for operator in &self.operators {
            writeln!(f, "--op {}", operator.name)?;
            ports(f, operator)?;
        }
        Ok(())
    }
}

/// Inputs and outputs of a part, a line each.
fn ports(f: &mut fmt::Formatter<'_>, part: &Part) -> fmt::Result {
    let mut line = |side: &str, port: &Port| {
        let optional = if port.optional { ", optional" } else { "" };
        let (name, shape) = (port.name, port.shape_words());
        writeln!(f, "    {side:<3} {name} {shape}, {}{optional}", port.content)
    };
    part.inputs.iter().try_for_each(|port| line("in", port))?;
    part.outputs.iter().try_for_each(|port| line("out", port))
}
