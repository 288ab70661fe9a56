//! `fulgur forward`: runs an operator on named tensors, to compare it with any other implementation.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;

use candle_core::Tensor;
use clap::ValueEnum;
use serde::Serialize;

use super::answer::{Answer, Report};
use super::context::Context;
use super::files::check_output;
use crate::tensors;

/// Run an operator on named tensors
///
/// Inputs are f32, f16 or bf16: q, g [B,N,H,D] and v [B,N,H,E], where g are the logits of the gates. Outputs are f32:
/// o [B,N,H,E] and state [B,H,D,E]. With do [B,N,H,E] among the inputs, and optionally dstate [B,H,D,E], the gradients
/// dq, dg and dv of sum(o do) + sum(state dstate) come out too.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur forward --op lightnet-noncausal --inputs in.safetensors --out out.safetensors"
)]
pub(super) struct Arguments {
    /// The operator
    #[arg(long, value_name = "NAME")]
    op: Operator,
    /// The tensors to run it on
    #[arg(long, value_name = "FILE.safetensors")]
    inputs: PathBuf,
    /// Where to write what comes out
    #[arg(long, value_name = "FILE.safetensors")]
    out: PathBuf,
}

/// Operators that run on their own.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Operator {
    /// LightNet's additive recurrence without causality: every token sees the sum of all
    LightnetNoncausal,
}

/// What is run.
enum Target {
    Operator(Operator),
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    let Arguments { op, inputs, out } = arguments;
    let target = Target::Operator(op);
    // A name that cannot be written is found before the work, not after it.
    check_output(&out)?;
    let device = context.open_device()?;
    let inputs = tensors::read(&inputs, &device)?;
    let outputs = BTreeMap::from_iter(target.run(&inputs)?);
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

impl Target {
    fn run(&self, inputs: &HashMap<String, Tensor>) -> anyhow::Result<HashMap<String, Tensor>> {
        let Self::Operator(operator) = self;
        Ok(match operator {
            Operator::LightnetNoncausal => fulgur_kernels::additive::forward_op(inputs)?,
        })
    }
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
