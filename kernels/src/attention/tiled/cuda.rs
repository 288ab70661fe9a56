//! The tiles on a GPU: launches of `cuda/attention_*.cu`.

use super::super::{OP, Problem};
use crate::autograd::{Gradient, attach3};
use crate::cuda_module::{Module, Slice, THREADS, launch, module, room};
use crate::decay::cuda::sweep::{RowsArg, rows_of};
use crate::error::OpError;
use crate::gpu::{self, Locked};
use crate::pass::CudaReal;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DeviceRepr, LaunchConfig};
use candle_core::{CudaDevice, DType, Result, Shape, Tensor};
use half::bf16;

const FORWARD: Module = module!("attention_forward");
const BACKWARD: Module = module!("attention_backward");
const PLAIN: Module = module!("attention_plain");
const LIVE: Module = module!("attention_live");

/// Rows that a block of `attention_plain.cu` owns, and that it meets at a time.
const PLAIN_ROWS: usize = 32;
/// Keys of a word of a mask.
const WORD: usize = 64;
/// Most blocks along the second and the third axis of a grid.
const MOST_BLOCKS: usize = 65_535;
/// Most tokens: kernels count rows and their tiles with 32 bits.
const MOST_TOKENS: usize = 1 << 30;

/// Which kernels run a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// Products of bf16 on tensor cores, for widths up to this.
    Tiles(usize),
    /// f32.
    Plain,
}

/// A kernel of a form, each a pass over all tiles of queries or of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Forward,
    Queries,
    Keys,
}

impl Form {
    fn of(problem: &Problem, dtype: DType) -> Result<Self> {
        let &Problem { b, n, l, h, d, e, .. } = problem;
        let width = d.max(e);
        let form = match dtype {
            DType::BF16 if d % 8 == 0 && e % 8 == 0 && width <= 128 => {
                Self::Tiles(width.next_multiple_of(32))
            }
            DType::BF16 | DType::F32 => Self::Plain,
            found => {
                return Err(OpError::DType {
                    op: OP,
                    field: "q",
                    found,
                    device: "CUDA",
                    supported: "f32, bf16",
                }
                .into());
            }
        };
        let refuse = |field, found: String, expected: String| -> Result<Self> {
            Err(OpError::value(OP, field, found, expected).into())
        };
        if width > 256 {
            return refuse(
                "width",
                format!("D {d}, E {e}"),
                "widths up to 256 on a GPU".to_owned(),
            );
        }
        if b.max(h) > MOST_BLOCKS || n.max(l) > MOST_TOKENS {
            let expected = format!("B and H up to {MOST_BLOCKS}, N and L up to {MOST_TOKENS} on a GPU");
            return refuse("size", format!("B {b}, N {n}, L {l}, H {h}"), expected);
        }
        Ok(form)
    }

    /// How a kernel is launched: warps, rows that a block owns and rows that it meets at a time, as at the ends of
    /// `attention_forward.cu` and `attention_backward.cu`.
    fn block(self, part: Part) -> (usize, usize, usize) {
        match (self, part) {
            (Self::Plain, _) => (THREADS as usize / 32, PLAIN_ROWS, PLAIN_ROWS),
            (Self::Tiles(128), Part::Forward) => (4, 128, 32),
            (Self::Tiles(_), Part::Forward) => (4, 128, 64),
            (Self::Tiles(width), _) if width <= 64 => (4, 128, 32),
            (Self::Tiles(_), _) => (8, 128, 64),
        }
    }

    /// Bytes of shared memory of a block.
    fn shared(self, part: Part, problem: &Problem) -> usize {
        let (_, own, met) = self.block(part);
        match self {
            Self::Tiles(width) => {
                // Rows in shared memory are as wide as a swizzle needs; what is met is there twice.
                let row = 2 * if width <= 64 { 64 } else { 128 };
                match part {
                    Part::Forward => (own + 4 * met) * row,
                    Part::Queries | Part::Keys => (2 * own + 4 * met) * row + 4 * met * size_of::<f32>(),
                }
            }
            Self::Plain => {
                let (d, e) = (problem.d | 1, problem.e | 1);
                let floats = match part {
                    Part::Forward => own * d + met * (d + e),
                    Part::Queries | Part::Keys => (own + met) * (d + e),
                };
                floats * size_of::<f32>()
            }
        }
    }

    fn kernel(self, part: Part) -> (Module, String) {
        let name = match part {
            Part::Forward => "forward",
            Part::Queries => "queries",
            Part::Keys => "keys",
        };
        match self {
            Self::Plain => (PLAIN, format!("attention_plain_{name}")),
            Self::Tiles(width) => {
                let module = if part == Part::Forward { FORWARD } else { BACKWARD };
                (module, format!("attention_{name}_d{width}"))
            }
        }
    }

    /// Rows whose last axis is dense and, for copies of 16 bytes, aligned: the tensor itself or a copy.
    fn rows(self, tensor: &Tensor) -> Result<Tensor> {
        let stride = tensor.stride();
        let dense = stride[3] == 1 || tensor.dims()[3] == 1;
        let aligned = self == Self::Plain
            || (stride[..3].iter().all(|stride| stride % 8 == 0)
                && Locked::new(OP, tensor).start()? % 16 == 0);
        if dense && aligned {
            Ok(tensor.clone())
        } else {
            tensor.force_contiguous()
        }
    }
}

/// `Attention` of `cuda/attention_job.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct AttentionArg {
    q: RowsArg,
    k: RowsArg,
    v: RowsArg,
    o: RowsArg,
    d_o: RowsArg,
    dq: RowsArg,
    dk: RowsArg,
    dv: RowsArg,
    log_sum: u64,
    dots: u64,
    live: u64,
    tiles: u64,
    live_words: i32,
    tokens: i32,
    keys: i32,
    heads: i32,
    groups: i32,
    d: i32,
    e: i32,
    causal: i32,
    scale: f32,
}

// SAFETY: plain numbers in the layout of C, as the kernels declare them.
unsafe impl DeviceRepr for AttentionArg {}

/// [`super::softmax`] on a GPU.
pub(super) fn softmax(
    problem: Problem,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    let form = Form::of(&problem, q.dtype())?;
    let Problem {
        b, n, l, h, g, d, e, ..
    } = problem;
    tracing::debug!(?form, b, n, l, h, g, d, e, causal = problem.causal, "{OP}");
    let device = q.device().as_cuda_device()?.clone();
    let live = mask.map(|mask| live_words(&problem, &device, mask)).transpose()?;
    let call = Call {
        problem,
        form,
        device,
        live,
    };
    match form {
        Form::Tiles(_) => call.attach::<bf16>([q, k, v]),
        Form::Plain => {
            let wide = |t: &Tensor| t.to_dtype(DType::F32);
            call.attach::<f32>([&wide(q)?, &wide(k)?, &wide(v)?])?
                .to_dtype(q.dtype())
        }
    }
}

/// Words of 64 keys of a batch, of which one lies behind the last key.
fn words(problem: &Problem) -> usize {
    problem.l.div_ceil(WORD) + 1
}

/// One bit for each key: whether it counts.
fn live_words(problem: &Problem, device: &CudaDevice, mask: &Tensor) -> Result<Slice<u64>> {
    let mask = mask.to_dtype(DType::F32)?.contiguous()?;
    let words = words(problem);
    let live = room::<u64>(device, problem.b * words)?;
    let config = LaunchConfig {
        grid_dim: (
            (2 * words).div_ceil(THREADS as usize / 32) as u32,
            problem.b as u32,
            1,
        ),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    };
    let mask = Locked::new(OP, &mask);
    launch!(device, LIVE, "attention_live", config;
        mask.view::<f32>()?, live.as_view(), problem.l as i32, words as i32);
    Ok(live)
}

/// One call of the operator, and what its backward pass needs besides inputs, output and logarithms of sums.
struct Call {
    problem: Problem,
    form: Form,
    device: CudaDevice,
    live: Option<Slice<u64>>,
}

impl Call {
    fn address<T>(&self, slice: &Slice<T>) -> u64 {
        slice.device_ptr(&self.device.cuda_stream()).0
    }

    /// Rows of a contiguous result `[B, tokens, heads, width]`.
    fn made<T>(&self, slice: &Slice<T>, tokens: usize, heads: usize, width: usize) -> RowsArg {
        RowsArg {
            data: self.address(slice),
            batch: (tokens * heads * width) as i64,
            token: (heads * width) as i64,
            head: width as i64,
        }
    }

    /// What all kernels of the call are told.
    fn argument(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<AttentionArg> {
        let p = &self.problem;
        Ok(AttentionArg {
            q: rows_of(q)?,
            k: rows_of(k)?,
            v: rows_of(v)?,
            live: self.live.as_ref().map_or(0, |live| self.address(live)),
            live_words: words(p) as i32,
            tokens: p.n as i32,
            keys: p.l as i32,
            heads: p.h as i32,
            groups: p.g as i32,
            d: p.d as i32,
            e: p.e as i32,
            causal: i32::from(p.causal),
            scale: p.scale as f32,
            ..Default::default()
        })
    }

    /// Runs one kernel over all tiles.
    fn launch(&self, part: Part, argument: AttentionArg) -> Result<()> {
        let p = &self.problem;
        let (warps, own, _) = self.form.block(part);
        let (rows, heads) = match part {
            Part::Keys => (p.l, p.g),
            Part::Forward | Part::Queries => (p.n, p.h),
        };
        // Of packed sequences: start and length of the sequence, and first row in it.
        let table = match &p.borders {
            None => None,
            Some(_) => {
                let table: Vec<i32> = p
                    .spans()
                    .iter()
                    .flat_map(|span| {
                        let (start, count) = (span.queries.start as i32, span.queries.len() as i32);
                        (0..count)
                            .step_by(own)
                            .flat_map(move |first| [start, count, first])
                    })
                    .collect();
                Some((self.device.clone_htod(&table)?, table.len() / 3))
            }
        };
        let tiles = table.as_ref().map_or(rows.div_ceil(own), |(_, count)| *count);
        let config = LaunchConfig {
            grid_dim: (tiles as u32, heads as u32, p.b as u32),
            block_dim: (32 * warps as u32, 1, 1),
            shared_mem_bytes: self.form.shared(part, p) as u32,
        };
        let argument = AttentionArg {
            tiles: table.as_ref().map_or(0, |(table, _)| self.address(table)),
            ..argument
        };
        let device = &self.device;
        let (module, name) = self.form.kernel(part);
        launch!(device, module, name, config; argument);
        Ok(())
    }

    fn attach<T: CudaReal>(self, args: [&Tensor; 3]) -> Result<Tensor> {
        let &Problem { b, n, h, e, .. } = &self.problem;
        let [q, k, v] = args.map(|t| self.form.rows(&t.detach()));
        let (q, k, v) = (q?, k?, v?);
        let o = room::<T>(&self.device, b * n * h * e)?;
        let log_sum = room::<f32>(&self.device, b * h * n)?;
        let argument = AttentionArg {
            o: self.made(&o, n, h, e),
            log_sum: self.address(&log_sum),
            ..self.argument(&q, &k, &v)?
        };
        self.launch(Part::Forward, argument)?;
        let o = gpu::value(o, &self.device, &Shape::from((b, n, h, e)));
        let log_sum = gpu::tensor(log_sum, &self.device, &Shape::from((b, h, n)));
        attach3(o, args, Saved { call: self, log_sum })
    }

    fn adjoints<T: CudaReal>(
        &self,
        args: [&Tensor; 3],
        o: &Tensor,
        log_sum: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let &Problem {
            b, n, l, h, g, d, e, ..
        } = &self.problem;
        let device = &self.device;
        let [q, k, v] = args.map(|t| self.form.rows(&t.detach()));
        let (q, k, v) = (q?, k?, v?);
        let (o, d_o) = (self.form.rows(&o.detach())?, self.form.rows(&grad.detach())?);
        let (dq, dk, dv) = (
            room::<T>(device, b * n * h * d)?,
            room::<T>(device, b * l * g * d)?,
            room::<T>(device, b * l * g * e)?,
        );
        let dots = room::<f32>(device, b * h * n)?;
        let argument = AttentionArg {
            o: rows_of(&o)?,
            d_o: rows_of(&d_o)?,
            dq: self.made(&dq, n, h, d),
            dk: self.made(&dk, l, g, d),
            dv: self.made(&dv, l, g, e),
            log_sum: Locked::new(OP, log_sum).start()?,
            dots: self.address(&dots),
            ..self.argument(&q, &k, &v)?
        };
        let (module, name, lanes) = match self.form {
            Form::Tiles(_) => (BACKWARD, "attention_dots", 16),
            Form::Plain => (PLAIN, "attention_plain_dots", 32),
        };
        let config = LaunchConfig {
            grid_dim: ((b * h * n).div_ceil(THREADS as usize / lanes) as u32, 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        launch!(device, module, name, config; argument, (b * h * n) as i64);
        self.launch(Part::Queries, argument)?;
        self.launch(Part::Keys, argument)?;
        Ok([
            Some(gpu::tensor(dq, device, &Shape::from((b, n, h, d)))),
            Some(gpu::tensor(dk, device, &Shape::from((b, l, g, d)))),
            Some(gpu::tensor(dv, device, &Shape::from((b, l, g, e)))),
        ])
    }
}

struct Saved {
    call: Call,
    /// `[B, H, N]`.
    log_sum: Tensor,
}

impl Gradient<3> for Saved {
    fn name(&self) -> &'static str {
        OP
    }

    fn holds(&self) -> Vec<Tensor> {
        vec![self.log_sum.clone()]
    }

    fn backward(&self, args: [&Tensor; 3], o: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        match self.call.form {
            Form::Tiles(_) => self.call.adjoints::<bf16>(args, o, &self.log_sum, grad),
            Form::Plain => self.call.adjoints::<f32>(args, o, &self.log_sum, grad),
        }
    }
}
