//! The scan on a GPU: launches of `cuda/eos.cu`.
//!
//! Memories stay in registers, a block for a tile of columns of each head. Where that makes too few blocks, sequences are
//! cut into segments: what each of them adds to the memory alone comes first, then a scan over segments, then the outputs.
//!
//! The backward pass starts from memories at borders, one for every 16 tokens in f32: kept by the forward pass where gates are
//! full (a sixteenth of f32 gates), else made by another forward sweep and freed after it.
//!
//! The adjoint of gates that are alike along axes is summed in a fixed order: over tokens of a segment, columns of a tile, or
//! rows inside of the sweep, over the rest by launches of their own. Only gates that vary along tokens, rows and columns but are
//! alike along batches or heads take f32 room for a full adjoint first.

mod gradient;
mod lanes;

use super::{Dims, NAME, Options, check};
use crate::autograd::{attach_many, attach1};
use crate::cuda_module::{Module, flat, launch, module};
use crate::decay::cuda::cut::Cut;
use crate::decay::cuda::sweep::{CutArg, Made, RowsArg, rows_of};
use crate::decay::{Passed, StateGradient};
use crate::error::OpError;
use crate::exchange::{Direction, StateExchange, arriving};
use crate::gpu::Locked;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    DeviceRepr, LaunchConfig, sys::CUdevice_attribute_enum as Attribute,
};
use candle_core::{CudaDevice, DType, Result, Tensor, bail};
use gradient::ScanGradient;
use lanes::{Adjoint, Buffers, CHUNK, Lanes, WIDEST};
use std::sync::{Arc, Mutex};

const EOS: Module = module!("eos");

/// `Gates` of `cuda/eos.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct GatesArg {
    data: u64,
    batch: i64,
    head: i64,
    column: i64,
    token: i32,
    row: i32,
    half: i32,
}

// SAFETY: plain numbers in the layout of C, as the kernels declare them.
unsafe impl DeviceRepr for GatesArg {}

/// `Scan` of `cuda/eos.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct ScanArg {
    expand: RowsArg,
    input: RowsArg,
    shrink: RowsArg,
    d_output: RowsArg,
    gates: GatesArg,
    enter: u64,
    leave: u64,
    totals: u64,
    borders: u64,
    output: u64,
    d_input: u64,
    d_expand: u64,
    d_shrink: u64,
    d_log: u64,
    cut: CutArg,
    adjoint: i32,
    d_log_half: i32,
    rows: i64,
    heads: i32,
    k: i32,
    d: i32,
    columns: i32,
    vector: i32,
}

// SAFETY: plain numbers in the layout of C, as the kernels declare them.
unsafe impl DeviceRepr for ScanArg {}

/// [`super::scan`] for checked inputs on a GPU: the output in the type of the rows.
pub(super) fn scan(
    rows: [&Tensor; 3],
    log_oscillation: &Tensor,
    options: &Options<'_>,
    dims: Dims,
) -> Result<(Tensor, Tensor)> {
    let dtype = row_type(rows);
    let mut args = Vec::with_capacity(5);
    for row in rows {
        args.push(row.to_dtype(dtype)?);
    }
    args.push(log_oscillation.clone());
    if let Some(initial) = options.initial {
        args.push(initial.to_dtype(DType::F32)?.contiguous()?);
    }
    let scan = Scan::new(rows[0].device().as_cuda_device()?, dtype, dims, options)?;
    let gates = log_oscillation.dims();
    let keep =
        gates[1] == dims.n && gates[3] == dims.k && gates[4] == dims.d && args.iter().any(Tensor::track_op);
    let initial = args.get(4).map(Tensor::detach);
    let Forward {
        output,
        finals,
        entering,
        borders,
    } = scan.forward(&Operands::new(&args)?, initial, keep)?;
    let d_state: Passed = Arc::new(Mutex::new(None));
    let gradient = ScanGradient {
        scan,
        entering,
        borders,
        d_state: d_state.clone(),
    };
    let y = attach_many(output.value(), &args.iter().collect::<Vec<_>>(), gradient)?;
    let state = attach1(finals.value(), &y, StateGradient { d_state })?;
    Ok((y, state))
}

/// [`super::step`] on a GPU: a scan of one token.
pub(super) fn step(
    [expand, input, shrink]: [&Tensor; 3],
    log_oscillation: &Tensor,
    memory: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let token = |t: &Tensor| t.detach().unsqueeze(1);
    let [e, i, s] = [token(expand)?, token(input)?, token(shrink)?];
    let log = token(&log_oscillation.broadcast_as(memory.shape())?)?;
    let memory = memory.detach();
    let options = Options {
        initial: Some(&memory),
        ..Default::default()
    };
    let dims = check(&e, &i, &log, &s, &options)?;
    let dtype = row_type([&e, &i, &s]);
    let args = [e.to_dtype(dtype)?, i.to_dtype(dtype)?, s.to_dtype(dtype)?, log];
    let scan = Scan::new(memory.device().as_cuda_device()?, dtype, dims, &options)?;
    let initial = memory.to_dtype(DType::F32)?.contiguous()?;
    let made = scan.forward(&Operands::new(&args)?, Some(initial), false)?;
    let y = made.output.tensor().squeeze(1)?.to_dtype(input.dtype())?;
    Ok((y, made.finals.tensor().to_dtype(memory.dtype())?))
}

fn row_type(rows: [&Tensor; 3]) -> DType {
    if rows.iter().all(|row| row.dtype() == DType::BF16) {
        DType::BF16
    } else {
        DType::F32
    }
}

/// Rows whose last axis is dense: the tensor itself or a copy.
fn dense(rows: &Tensor) -> Result<Tensor> {
    if rows.stride()[3] == 1 || rows.dims()[3] == 1 {
        Ok(rows.detach())
    } else {
        rows.detach().force_contiguous()
    }
}

/// What all sweeps read.
struct Operands {
    expand: Tensor,
    input: Tensor,
    shrink: Tensor,
    gates: Tensor,
}

impl Operands {
    /// From the arguments of the node.
    fn new(args: &[Tensor]) -> Result<Self> {
        let gates = args[3].detach();
        // The kernels step over tokens and rows with 32 bits.
        let far = [1, 3].iter().any(|&axis| {
            gates.dims()[axis] > 1 && gates.stride()[axis] > i32::MAX as usize / gates.dtype().size_in_bytes()
        });
        Ok(Self {
            expand: dense(&args[0])?,
            input: dense(&args[1])?,
            shrink: dense(&args[2])?,
            gates: if far { gates.force_contiguous()? } else { gates },
        })
    }

    fn gates(&self) -> Result<GatesArg> {
        let size = self.gates.dtype().size_in_bytes();
        let step = |axis: usize| match self.gates.dims()[axis] {
            1 => 0,
            _ => self.gates.stride()[axis] * size,
        };
        Ok(GatesArg {
            data: Locked::new(NAME, &self.gates).start()?,
            batch: step(0) as i64,
            head: step(2) as i64,
            column: step(4) as i64,
            token: step(1) as i32,
            row: step(3) as i32,
            half: i32::from(self.gates.dtype() == DType::BF16),
        })
    }
}

/// What a forward pass made.
struct Forward {
    output: Made,
    finals: Made,
    /// Memories that enter segments; zeros if absent.
    entering: Option<Tensor>,
    borders: Option<Tensor>,
}

/// One call of the operator.
struct Scan {
    device: CudaDevice,
    /// Of the rows.
    dtype: DType,
    dims: Dims,
    lanes: Lanes,
    cut: Cut,
    exchange: Option<Arc<dyn StateExchange>>,
    packed: bool,
}

impl Scan {
    fn new(device: &CudaDevice, dtype: DType, dims: Dims, options: &Options<'_>) -> Result<Self> {
        let Dims { b, n, h, k, d } = dims;
        if k > WIDEST {
            let expected = format!("at most {WIDEST} channels on a GPU");
            return Err(OpError::value(NAME, "the last axis of expand", k, expected).into());
        }
        let lanes = Lanes::new(k, d);
        let shared = lanes.shared(Buffers::Backward(Adjoint::Rows), dtype.size_in_bytes());
        let context = device.cuda_stream().context().clone();
        let most = context
            .attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
            .w()?;
        if shared > most as usize {
            let expected =
                format!("fewer channels on this GPU, whose blocks have {most} bytes of shared memory");
            return Err(OpError::value(NAME, "the last axis of expand", k, expected).into());
        }
        // Distances of tokens and elements of a row are counted with 32 bits.
        let (memories, tokens) = (h * k * d, b * n);
        if memories > i32::MAX as usize / 4 || tokens > i32::MAX as usize {
            let found = format!("{tokens} tokens, memories of {memories} elements");
            let expected = format!("at most {} and {} on a GPU", i32::MAX, i32::MAX / 4);
            return Err(OpError::value(NAME, "size", found, expected).into());
        }
        // Two blocks run at once on a multiprocessor.
        let blocks = (d.div_ceil(lanes.columns) * h).div_ceil(2);
        let scan = Self {
            device: device.clone(),
            dtype,
            dims,
            lanes,
            cut: Cut::new(device, (b, n), options.sequences, blocks)?,
            exchange: options.exchange.clone().filter(|exchange| exchange.parts() > 1),
            packed: options.sequences.is_some(),
        };
        tracing::debug!(
            b,
            n,
            h,
            k,
            d,
            ?dtype,
            ?lanes,
            parts = scan.cut.parts(),
            "eos::scan"
        );
        Ok(scan)
    }

    /// Whether every sequence is one segment and starts from what is known.
    fn whole(&self) -> bool {
        self.cut.parts() == 1 && self.exchange.is_none()
    }

    fn tiles(&self) -> usize {
        self.dims.d.div_ceil(self.lanes.columns)
    }

    fn memories(&self, count: usize) -> Result<Made> {
        let Dims { h, k, d, .. } = self.dims;
        Made::new(&self.device, DType::F32, (count, h, k, d).into())
    }

    /// Room for the memories at borders of chunks; see `Spot::border` in `eos.cu`.
    fn borders(&self) -> Result<Made> {
        self.memories(self.dims.b * self.dims.n / CHUNK + self.cut.segments())
    }

    /// A sweep with `[expand, input, shrink, d_output]` in their places, which makes nothing yet.
    fn argument(&self, rows: [Option<&Tensor>; 4], gates: &Operands) -> Result<ScanArg> {
        let Dims { b, n, h, k, d } = self.dims;
        let piece = 16 / self.dtype.size_in_bytes();
        let mut vector = k % piece == 0 && d % piece == 0;
        let mut places = [RowsArg::default(); 4];
        for (place, rows) in places.iter_mut().zip(rows) {
            let Some(rows) = rows else { continue };
            *place = rows_of(rows)?;
            vector &= Locked::new(NAME, rows).start()? % 16 == 0
                && rows.stride()[..3].iter().all(|stride| stride % piece == 0);
        }
        let [expand, input, shrink, d_output] = places;
        Ok(ScanArg {
            expand,
            input,
            shrink,
            d_output,
            gates: gates.gates()?,
            enter: 0,
            leave: 0,
            totals: 0,
            borders: 0,
            output: 0,
            d_input: 0,
            d_expand: 0,
            d_shrink: 0,
            d_log: 0,
            cut: self.cut.argument()?,
            adjoint: Adjoint::Unwanted as i32,
            d_log_half: 0,
            rows: (b * n * h) as i64,
            heads: h as i32,
            k: k as i32,
            d: d as i32,
            columns: self.lanes.columns as i32,
            vector: i32::from(vector),
        })
    }

    fn launch(&self, name: &str, buffers: Buffers, argument: ScanArg) -> Result<()> {
        let blocks = self.cut.segments() * self.dims.h * self.tiles();
        if blocks > i32::MAX as usize {
            bail!("{NAME}: {blocks} blocks on a GPU, expected at most {}", i32::MAX);
        }
        let config = LaunchConfig {
            grid_dim: (blocks as u32, 1, 1),
            block_dim: (self.lanes.threads() as u32, 1, 1),
            shared_mem_bytes: self.lanes.shared(buffers, self.dtype.size_in_bytes()) as u32,
        };
        let name = format!("eos_{name}_{}_{}", suffix(self.dtype), self.lanes.rows);
        launch!(&self.device, EOS, name, config; argument);
        Ok(())
    }

    fn forward(&self, operands: &Operands, initial: Option<Tensor>, keep: bool) -> Result<Forward> {
        let Dims { b, n, h, d, .. } = self.dims;
        let (entering, finals) = if self.whole() {
            (initial, None)
        } else {
            let rows = [&operands.expand, &operands.input];
            let (entering, finals) = self.join(rows, operands, initial.as_ref(), Direction::Forward)?;
            (Some(entering), Some(finals))
        };
        let output = Made::new(&self.device, self.dtype, (b, n, h, d).into())?;
        let borders = if keep { Some(self.borders()?) } else { None };
        let mut argument = self.forward_argument(operands, entering.as_ref(), borders.as_ref())?;
        argument.output = output.start()?;
        let finals = match finals {
            Some(finals) => finals,
            None => {
                let finals = self.memories(self.cut.sequences())?;
                argument.leave = finals.start()?;
                finals
            }
        };
        self.launch("forward", Buffers::Forward, argument)?;
        Ok(Forward {
            output,
            finals,
            entering,
            borders: borders.map(Made::tensor),
        })
    }

    fn forward_argument(
        &self,
        operands: &Operands,
        entering: Option<&Tensor>,
        borders: Option<&Made>,
    ) -> Result<ScanArg> {
        let Operands {
            expand,
            input,
            shrink,
            ..
        } = operands;
        let argument = self.argument([Some(expand), Some(input), Some(shrink), None], operands)?;
        Ok(ScanArg {
            enter: start(entering)?,
            borders: borders.map_or(Ok(0), Made::start)?,
            ..argument
        })
    }

    /// The memories that enter segments and those that leave sequences, or their adjoints from the last segment to the first.
    /// Rows are expand and input, or shrink and the adjoint of the output.
    fn join(
        &self,
        [keys, values]: [&Tensor; 2],
        operands: &Operands,
        own: Option<&Tensor>,
        direction: Direction,
    ) -> Result<(Tensor, Made)> {
        let (locals, totals) = (
            self.memories(self.cut.segments())?,
            self.memories(self.cut.segments())?,
        );
        let mut argument = self.argument([Some(keys), Some(values), None, None], operands)?;
        (argument.leave, argument.totals) = (locals.start()?, totals.start()?);
        let name = match direction {
            Direction::Forward => "local_forward",
            Direction::Backward => "local_reverse",
        };
        self.launch(name, Buffers::Local, argument)?;
        let (locals, totals) = (locals.tensor(), totals.tensor());
        let Some(exchange) = &self.exchange else {
            let last = self.join_segments(&locals, &totals, own, direction)?;
            return Ok((locals, last));
        };
        let leaving = self
            .join_segments(&locals.copy()?, &totals, own, direction)?
            .tensor();
        let Dims { h, k, d, .. } = self.dims;
        let log = totals
            .reshape((self.cut.sequences(), self.cut.parts(), h, k, d))?
            .sum(1)?;
        let others = arriving(exchange, &leaving, &log, direction, self.packed)?;
        let others = others.to_device(leaving.device())?.to_dtype(DType::F32)?;
        let entering = match own {
            Some(own) => (others + own)?,
            None => others,
        };
        let last = self.join_segments(&locals, &totals, Some(&entering.contiguous()?), direction)?;
        Ok((locals, last))
    }

    /// Turns what segments add into what enters them, in place, and gives what leaves each sequence.
    fn join_segments(
        &self,
        locals: &Tensor,
        totals: &Tensor,
        own: Option<&Tensor>,
        direction: Direction,
    ) -> Result<Made> {
        let Dims { h, k, d, .. } = self.dims;
        let (sequences, size) = (self.cut.sequences(), h * k * d);
        let last = self.memories(sequences)?;
        launch!(&self.device, EOS, "eos_join", flat(sequences * size);
            start(Some(locals))?, start(Some(totals))?, start(own)?, last.start()?, sequences as i64,
            self.cut.parts() as i32, size as i64, i32::from(direction == Direction::Backward));
        Ok(last)
    }
}

fn suffix(dtype: DType) -> &'static str {
    if dtype == DType::BF16 { "bf16" } else { "f32" }
}

/// Address of a tensor, or null.
fn start(tensor: Option<&Tensor>) -> Result<u64> {
    tensor.map_or(Ok(0), |tensor| Locked::new(NAME, tensor).start())
}
