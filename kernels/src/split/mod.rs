//! A fused projection cut into the operands of a mixer, each activated on the way, as one node of the graph.
//!
//! ```text
//! plain   y = x                                  dx = dy
//! silu    y = x s(x)                             dx = dy s (1 + x (1 - s)),   s = 1 / (1 + e^-x)
//! gate    f = b + (1 - b) s(x)                   of a lower bound b for each channel, in [0, 1)
//!         key  k = 1 - f = (1 - b) s(-x)         decay  g = max(log f, -60)
//!         dx = dg r - dk (1 - b) s(x) s(-x)      r = (1 - b) s(x) s(-x) / f, exactly s(-x) where b is 0
//!         db = sum over rows of (dg / f - dk) s(-x)
//! ```
//!
//! The gate is that of HGRN2 (arXiv 2404.07904, section 3), whose key is tied to its decay. Keys are never one minus a rounded
//! gate, and the logarithm is `log1p(-k)` where f is above one half: neither cancels.
//!
//! Without this node every operand would be a view of the projection, and candle's gradient of a view is a tensor of the
//! whole width. Kept for the backward pass: the projection, if a part is activated; a tape then makes the parts again.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

use crate::autograd::{GradientOfSeveral, Value, attach_several};
use crate::error::OpError;
use crate::pass::same_kind;
use crate::tape::{Needs, Set};
use candle_core::{DType, Result, Tensor, bail};

const OP: &str = "split";
/// Lowest logarithm of a gate: e^-60 is below anything that a state remembers.
const LOWEST_LOG: f64 = -60.0;

/// A run of columns, and what becomes of it.
#[derive(Clone, Copy, Debug)]
pub enum Part<'a> {
    /// So many columns as they are.
    Plain(usize),
    /// So many columns through SiLU.
    Silu(usize),
    /// So many columns as the gates of HGRN2: keys, and logarithms of decays.
    Gate(usize, Option<&'a Tensor>),
}

impl Part<'_> {
    /// How many columns it takes.
    pub fn width(&self) -> usize {
        match *self {
            Self::Plain(width) | Self::Silu(width) | Self::Gate(width, _) => width,
        }
    }
}

/// Cuts `x` [.., W] into its `parts`, in order: one tensor [.., width] for each, and two, keys and log-decays, for a gate,
/// whose lower bound is [width] in f32, or f64 with `x`, and 0 where there is none.
///
/// Differentiable in `x` and in the lower bound, of which one call takes one at most. `x` is f32 or f64 on the CPU, f32 or
/// bf16 on CUDA; results are of its type, log-decays of bf16 are f32.
///
/// # Errors
/// Widths do not add up to W or one is 0, or a shape, an element type or a device does not fit.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use fulgur_kernels::split::{Part, split};
/// let x = Tensor::new(&[[1f64, 0.0, 7.0]], &Device::Cpu)?;
/// let parts = split(&x, &[Part::Silu(1), Part::Gate(1, None), Part::Plain(1)])?;
/// let values: Vec<f64> = parts.iter().map(|t| t.to_vec2().map(|t: Vec<Vec<f64>>| t[0][0])).collect::<Result<_, _>>()?;
/// assert!((values[0] - 0.731058578630).abs() < 1e-9);
/// assert_eq!((values[1], values[3]), (0.5, 7.0));
/// assert!((values[2] - 0.5f64.ln()).abs() < 1e-12);
/// # candle_core::Result::Ok(())
/// ```
pub fn split(x: &Tensor, parts: &[Part<'_>]) -> Result<Vec<Tensor>> {
    let plan = Plan::new(x, parts)?;
    let x = x.contiguous()?;
    let bound = bound(parts)?;
    let values = plan.forward(&x, bound.as_ref())?;
    let mut args = vec![&x];
    args.extend(&bound);
    attach_several(values, &args, plan)
}

/// What is done to a run of columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Activation {
    Plain,
    Silu,
    Gate,
}

/// Columns from `first` on.
#[derive(Clone, Copy, Debug)]
struct Run {
    activation: Activation,
    first: usize,
    width: usize,
    /// Number of its first result.
    result: usize,
}

/// One call of the operator.
#[derive(Clone, Debug)]
struct Plan {
    runs: Vec<Run>,
    rows: usize,
    width: usize,
}

/// The lower bound of the gate among `parts`, contiguous.
fn bound(parts: &[Part<'_>]) -> Result<Option<Tensor>> {
    let bounds = parts.iter().find_map(|part| match part {
        Part::Gate(_, bound) => *bound,
        _ => None,
    });
    bounds.map(Tensor::contiguous).transpose()
}

impl Plan {
    fn new(x: &Tensor, parts: &[Part<'_>]) -> Result<Self> {
        let Some(&width) = x.dims().last() else {
            return Err(OpError::shape(OP, "x", x, "[.., W]").into());
        };
        same_kind(OP, &[("x", x)])?;
        let (mut runs, mut first, mut result, mut gates) = (Vec::new(), 0, 0, 0);
        for part in parts {
            let activation = match part {
                Part::Plain(_) => Activation::Plain,
                Part::Silu(_) => Activation::Silu,
                Part::Gate(..) => Activation::Gate,
            };
            let width = part.width();
            if let Part::Gate(_, bound) = part {
                gates += 1;
                if let Some(bound) = bound {
                    check_bound(x, bound, width)?;
                }
            }
            runs.push(Run {
                activation,
                first,
                width,
                result,
            });
            first += width;
            result += 1 + usize::from(activation == Activation::Gate);
        }
        if first != width || gates > 1 || runs.iter().any(|run| run.width == 0) {
            let found = format!("{:?}", runs.iter().map(|run| run.width).collect::<Vec<_>>());
            let expected = format!("widths above 0 that add up to {width}, of one gate at most");
            return Err(OpError::value(OP, "parts", found, expected).into());
        }
        Ok(Self {
            runs,
            rows: x.elem_count() / width,
            width,
        })
    }

    /// Whether no part is activated.
    fn is_plain(&self) -> bool {
        self.runs.iter().all(|run| run.activation == Activation::Plain)
    }

    fn forward(&self, x: &Tensor, bound: Option<&Tensor>) -> Result<Vec<Value>> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return match x.dtype() {
                DType::BF16 => cuda::forward::<half::bf16>(self, x, bound),
                DType::F32 => cuda::forward::<f32>(self, x, bound),
                found => Err(unsupported(found, "CUDA", "f32, bf16")),
            };
        }
        match x.dtype() {
            DType::F64 => cpu::forward::<f64>(self, x, bound),
            DType::F32 => cpu::forward::<f32>(self, x, bound),
            found => Err(unsupported(found, "the CPU", "f32, f64")),
        }
    }

    /// The shape of the results of a run.
    fn shape(&self, x: &Tensor, run: &Run) -> candle_core::Shape {
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = run.width;
        }
        dims.into()
    }
}

fn unsupported(found: DType, device: &'static str, supported: &'static str) -> candle_core::Error {
    let field = "x";
    OpError::DType {
        op: OP,
        field,
        found,
        device,
        supported,
    }
    .into()
}

fn check_bound(x: &Tensor, bound: &Tensor, width: usize) -> Result<()> {
    if bound.dims() != [width] {
        return Err(OpError::shape(OP, "lower bound", bound, format!("[{width}]")).into());
    }
    let expected = if x.dtype() == DType::F64 {
        DType::F64
    } else {
        DType::F32
    };
    if bound.dtype() != expected || !bound.device().same_device(x.device()) {
        let found = format!("{:?} on {:?}", bound.dtype(), bound.device().location());
        let expected = format!("{expected:?} on {:?}", x.device().location());
        return Err(OpError::value(OP, "lower bound", found, expected).into());
    }
    Ok(())
}

impl GradientOfSeveral for Plan {
    fn name(&self) -> &'static str {
        OP
    }

    fn needs(&self) -> Needs {
        // Where the projection is kept anyway, its parts need not be.
        match self.is_plain() {
            true => Needs::operands(Set::NONE),
            false => Needs::operands(Set::ALL).made_again(true),
        }
    }

    fn again(&self, args: &[Tensor]) -> Result<Vec<Value>> {
        match args {
            [x, rest @ ..] => self.forward(x, rest.first()),
            [] => bail!("{OP}: no arguments"),
        }
    }

    fn backward(&self, args: &[Tensor], adjoints: Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> {
        let adjoints: Vec<Option<Tensor>> = adjoints
            .into_iter()
            .map(|adjoint| adjoint.map(|adjoint| adjoint.contiguous()).transpose())
            .collect::<Result<_>>()?;
        let (x, bound) = (&args[0], args.get(1));
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return match x.dtype() {
                DType::BF16 => cuda::backward::<half::bf16>(self, x, bound, &adjoints),
                _ => cuda::backward::<f32>(self, x, bound, &adjoints),
            };
        }
        match x.dtype() {
            DType::F64 => cpu::backward::<f64>(self, x, bound, &adjoints),
            _ => cpu::backward::<f32>(self, x, bound, &adjoints),
        }
    }
}
