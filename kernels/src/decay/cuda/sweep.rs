//! One pass over all tokens on a GPU, `out = S^T read`, `S <- decay S + write value^T`: which kernel runs it, and how.

use super::cut::Cut;
use crate::autograd::Value;
use crate::cuda_module::{Module, THREADS, launch, module, room};
use crate::decay::{Kind, NAME};
use crate::exchange::Direction;
use crate::gpu::{self, Locked};
use crate::probe;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaStorage;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DeviceRepr, LaunchConfig};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, DType, Result, Shape, Storage, Tensor, bail};
use half::bf16;
use std::sync::Arc;

const UNIFORM: Module = module!("decay_uniform");
const KEYS: Module = module!("decay_channel_keys");
const VALUES: Module = module!("decay_channel_values");
pub(super) const PLAIN: Module = module!("decay_plain");

/// Tokens of a chunk, chunks on their way, and columns of a state that a warp holds: as in `decay_uniform.cu`.
const CHUNK: usize = 64;
const STAGES: usize = 3;
const WARP_COLUMNS: usize = 16;
/// Tokens of a chunk, its levels, bytes of a small tile, chunks on their way for either side, and tokens between borders:
/// as in `decay_channel_keys.cu` and `decay_channel_values.cu`.
const FEW: usize = 16;
const LEVELS: usize = 4;
const SMALL_TILE: usize = FEW * 48;
const RAW: usize = 5;
const RING: usize = 4;
const BORDER: usize = 64;
/// Columns of a state that a block of `decay_plain.cu` holds.
const PLAIN_COLUMNS: usize = 32;

/// Which kernels run a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Products of bf16 on tensor cores, in chunks; one decay for all channels of a head.
    Uniform,
    /// The same with a decay for each key channel.
    Channel(Gate),
    /// f32, token by token.
    Plain,
}

/// What the gates of channels are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    /// Logarithms of decays.
    Decay,
    /// Logarithms of sums of exponentials of logits, which stand in the place of keys.
    Additive,
}

impl Gate {
    fn name(self) -> &'static str {
        match self {
            Self::Decay => "decay",
            Self::Additive => "additive",
        }
    }
}

impl Form {
    /// Widest keys and values of a head.
    pub(super) fn widest(self) -> usize {
        match self {
            Self::Uniform | Self::Channel(_) => 128,
            Self::Plain => 256,
        }
    }

    /// Type of queries, keys, values and outputs.
    pub(super) fn dtype(self) -> DType {
        match self {
            Self::Uniform | Self::Channel(_) => DType::BF16,
            Self::Plain => DType::F32,
        }
    }

    /// Blocks that share a state of `e` columns.
    pub(super) fn tiles(self, e: usize) -> usize {
        match self {
            Self::Uniform | Self::Channel(_) => e.div_ceil(WARP_COLUMNS * warps(e)),
            Self::Plain => e.div_ceil(PLAIN_COLUMNS),
        }
    }
}

/// Width for which there is a kernel that reads `d` channels on tensor cores.
fn width(d: usize) -> usize {
    if d <= 64 { 64 } else { 128 }
}

/// Bytes of the gates of a chunk, with those of the token before it, in rows of `width` channels and a gap.
fn floats(width: usize) -> usize {
    4 * (FEW + 1) * (width + 8)
}

fn config(blocks: usize, warps: usize, shared: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (blocks as u32, 1, 1),
        block_dim: (32 * warps as u32, 1, 1),
        shared_mem_bytes: shared as u32,
    }
}

/// Warps of a block on tensor cores for values of width `e`.
fn warps(e: usize) -> usize {
    if e <= 64 { 4 } else { 8 }
}

/// Which side of the state `[D, E]` of the recurrence is read: its keys' or its values'.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Keys,
    Values,
}

/// What a sweep takes; see the table in `cuda/decay_uniform.cu`.
pub(super) struct Sweep<'a> {
    /// `[B, N, H, D]` of the sweep; nothing is read where no output is wanted.
    pub(super) read: Option<&'a Tensor>,
    pub(super) write: &'a Tensor,
    pub(super) value: &'a Tensor,
    pub(super) side: Side,
    pub(super) direction: Direction,
    /// States that enter the segments, `[segments, H, D, E]` of the recurrence; zeros if absent.
    pub(super) enter: Option<&'a Tensor>,
    /// Whether the states that leave are wanted.
    pub(super) leave: bool,
    pub(super) gates: GateWork<'a>,
}

/// What a sweep over the values' side does for the adjoint of the gates of channels.
#[derive(Clone, Copy)]
pub(super) enum GateWork<'a> {
    None,
    /// Leaves the states at borders.
    States,
    /// Makes the adjoint of log-decays.
    Decays {
        key: &'a Tensor,
        d_query: &'a Tensor,
        states: &'a Tensor,
    },
    /// Makes the adjoint of logits instead of that of keys, from the sums of `cuda/decay_additive.cu`.
    Logits {
        key: &'a Tensor,
        sums: &'a Tensor,
    },
}

/// What a sweep made.
pub(super) struct Swept {
    /// `[B, N, H, E]` of the sweep, if it reads.
    pub(super) out: Option<Made>,
    /// States that leave the segments, if wanted.
    pub(super) leave: Option<Made>,
    /// States at borders, or the adjoint of log-decays.
    pub(super) gates: Option<Made>,
}

/// Log-decays, or gates of the additive recurrence, as the kernels take them.
#[derive(Clone, Debug)]
pub(super) struct LogDecays {
    pub(super) kind: Kind,
    /// f32, of the shape of its kind; absent without decay.
    pub(super) tensor: Option<Tensor>,
    /// Gates of the additive recurrence before each sequence, contiguous `[S, H, D]`.
    pub(super) before: Option<Tensor>,
}

impl LogDecays {
    /// Gates for `form`: copies of 16 bytes want dense channels.
    pub(super) fn new(kind: Kind, tensor: Option<Tensor>, form: Form) -> Result<Self> {
        let tensor = match (tensor, form) {
            (Some(log), Form::Channel(_)) => {
                let (stride, start) = (log.stride(), Locked::new(NAME, &log).start()?);
                let dense =
                    stride[3] == 1 && stride[..3].iter().all(|stride| stride % 4 == 0) && start % 16 == 0;
                Some(if dense { log } else { log.force_contiguous()? })
            }
            (tensor, _) => tensor,
        };
        Ok(Self {
            kind,
            tensor,
            before: None,
        })
    }

    /// Without the tensor, for those who are handed it again.
    pub(super) fn forgotten(&self) -> Self {
        Self {
            kind: self.kind,
            tensor: None,
            before: self.before.clone(),
        }
    }

    /// Decays of a token and head.
    pub(super) fn width(&self) -> usize {
        match (self.kind, &self.tensor) {
            (Kind::Channel, Some(log)) => log.dims()[3],
            _ => 1,
        }
    }

    pub(super) fn argument(&self) -> Result<LogDecayArg> {
        let Some(log) = &self.tensor else {
            return Ok(LogDecayArg::default());
        };
        let stride: Vec<i64> = log.stride().iter().map(|&stride| stride as i64).collect();
        let (batch, token, head, channel) = match (self.kind, stride.as_slice()) {
            (Kind::Token, &[batch, token, head]) => (batch, token, head, 0),
            (Kind::Channel, &[batch, token, head, channel]) => (batch, token, head, channel),
            (_, stride) => (0, 0, stride.first().copied().unwrap_or(0), 0),
        };
        Ok(LogDecayArg {
            data: Locked::new(NAME, log).start()?,
            batch,
            token,
            head,
            channel,
        })
    }
}

/// `LogDecay` of `cuda/decay.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(in crate::decay) struct LogDecayArg {
    pub(in crate::decay) data: u64,
    pub(in crate::decay) batch: i64,
    pub(in crate::decay) token: i64,
    pub(in crate::decay) head: i64,
    pub(in crate::decay) channel: i64,
}

// SAFETY: plain numbers in the layout of C, as the kernels declare them.
unsafe impl DeviceRepr for LogDecayArg {}

/// `Rows` of `cuda/token_rows.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct RowsArg {
    pub(crate) data: u64,
    pub(crate) batch: i64,
    pub(crate) token: i64,
    pub(crate) head: i64,
}

// SAFETY: plain numbers in the layout of C, as the kernels declare them.
unsafe impl DeviceRepr for RowsArg {}

/// `Cut` of `cuda/decay.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct CutArg {
    pub(super) table: u64,
    pub(super) parts: i32,
    pub(super) length: i32,
    pub(super) tokens: i32,
}

// SAFETY: plain numbers in the layout of C, as the kernels declare them.
unsafe impl DeviceRepr for CutArg {}

/// `Sweep` of `cuda/decay.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct SweepArg {
    read: RowsArg,
    write: RowsArg,
    value: RowsArg,
    out: RowsArg,
    log_decay: LogDecayArg,
    before: u64,
    enter: u64,
    leave: u64,
    state_size: i64,
    state_row: i64,
    state_column: i64,
    cut: CutArg,
    heads: i32,
    d: i32,
    e: i32,
}

// SAFETY: plain numbers in the layout of C, as the kernels declare them.
unsafe impl DeviceRepr for SweepArg {}

/// `Gates` of `cuda/decay_channel_values.cu`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct GatesArg {
    states: u64,
    borders: i32,
    key: RowsArg,
    d_query: RowsArg,
    sums: u64,
    d_log: u64,
}

// SAFETY: plain numbers in the layout of C, as the kernels declare them.
unsafe impl DeviceRepr for GatesArg {}

/// Rows whose last axis is dense and, for the copies of 16 bytes of the tensor-core form, aligned: itself or a copy.
fn aligned_rows(tensor: &Tensor, form: Form) -> Result<Tensor> {
    let stride = tensor.stride();
    let dense = stride[3] == 1 || tensor.dims()[3] == 1;
    let aligned = form == Form::Plain
        || (stride[..3].iter().all(|stride| stride % 8 == 0) && Locked::new(NAME, tensor).start()? % 16 == 0);
    if dense && aligned {
        Ok(tensor.clone())
    } else {
        tensor.force_contiguous()
    }
}

/// Where the rows of `[B, N, H, D]` lie, whose last axis is dense.
pub(crate) fn rows_of(tensor: &Tensor) -> Result<RowsArg> {
    let stride: Vec<i64> = tensor.stride().iter().map(|&stride| stride as i64).collect();
    Ok(RowsArg {
        data: Locked::new(NAME, tensor).start()?,
        batch: stride[0],
        token: stride[1],
        head: stride[2],
    })
}

/// Memory that a kernel writes, on its way to a tensor or to a node of the graph.
pub(crate) struct Made {
    storage: CudaStorage,
    shape: Shape,
}

impl Made {
    pub(crate) fn new(device: &CudaDevice, dtype: DType, shape: Shape) -> Result<Self> {
        let count = shape.elem_count();
        let storage = match dtype {
            DType::BF16 => CudaStorage::wrap_cuda_slice(room::<bf16>(device, count)?, device.clone()),
            _ => CudaStorage::wrap_cuda_slice(room::<f32>(device, count)?, device.clone()),
        };
        Ok(Self { storage, shape })
    }

    fn look_behind(&self) {
        let device = self.storage.device();
        if let Ok(slice) = self.storage.as_cuda_slice::<bf16>() {
            probe::look_behind(device, slice);
        } else if let Ok(slice) = self.storage.as_cuda_slice::<f32>() {
            probe::look_behind(device, slice);
        }
    }

    pub(crate) fn start(&self) -> Result<u64> {
        let stream = self.storage.device().cuda_stream();
        Ok(match self.storage.dtype() {
            DType::BF16 => self.storage.as_cuda_slice::<bf16>()?.device_ptr(&stream).0,
            _ => self.storage.as_cuda_slice::<f32>()?.device_ptr(&stream).0,
        })
    }

    /// As a tensor without a graph.
    pub(crate) fn tensor(self) -> Tensor {
        self.look_behind();
        Tensor::from_storage(Storage::Cuda(self.storage), self.shape, BackpropOp::none(), false)
    }

    /// As the value of a node.
    pub(crate) fn value(self) -> Value {
        self.look_behind();
        Value::Cuda(self.storage, self.shape)
    }
}

/// What stays the same over the sweeps of a call.
#[derive(Debug)]
pub(super) struct Sweeper {
    pub(super) form: Form,
    pub(super) cut: Arc<Cut>,
    pub(super) decays: LogDecays,
    pub(super) device: CudaDevice,
}

impl Sweeper {
    /// Runs a sweep.
    pub(super) fn run(&self, sweep: &Sweep<'_>) -> Result<Swept> {
        let read = sweep.read.map(|read| aligned_rows(read, self.form)).transpose()?;
        let write = aligned_rows(sweep.write, self.form)?;
        let value = aligned_rows(sweep.value, self.form)?;
        let (b, n, h, d) = write.dims4()?;
        let e = value.dim(3)?;
        let out = read
            .as_ref()
            .map(|_| Made::new(&self.device, self.form.dtype(), (b, n, h, e).into()))
            .transpose()?;
        // The state of the recurrence is [D, E]: a sweep that reads its values' side meets it transposed.
        let (state_row, state_column, key_width, value_width) = match sweep.side {
            Side::Keys => (e, 1, d, e),
            Side::Values => (1, d, e, d),
        };
        let states = self.cut.segments();
        let leave = sweep
            .leave
            .then(|| {
                Made::new(
                    &self.device,
                    DType::F32,
                    (states, h, key_width, value_width).into(),
                )
            })
            .transpose()?;
        let start = |tensor: Option<&Tensor>| match tensor {
            Some(tensor) => Locked::new(NAME, tensor).start(),
            None => Ok(0),
        };
        let argument = SweepArg {
            read: read.as_ref().map(rows_of).transpose()?.unwrap_or_default(),
            write: rows_of(&write)?,
            value: rows_of(&value)?,
            out: RowsArg {
                data: out.as_ref().map_or(Ok(0), Made::start)?,
                batch: (n * h * e) as i64,
                token: (h * e) as i64,
                head: e as i64,
            },
            log_decay: self.decays.argument()?,
            before: start(self.decays.before.as_ref())?,
            enter: start(sweep.enter)?,
            leave: leave.as_ref().map_or(Ok(0), Made::start)?,
            state_size: (d * e) as i64,
            state_row: state_row as i64,
            state_column: state_column as i64,
            cut: self.cut.argument()?,
            heads: h as i32,
            d: d as i32,
            e: e as i32,
        };
        let mut made = Swept {
            out,
            leave,
            gates: None,
        };
        let blocks = self.form.tiles(e) * h * states;
        if blocks > 0 {
            match (self.form, sweep.side) {
                (Form::Uniform, _) => self.uniform(sweep, argument, blocks)?,
                (Form::Plain, _) => self.plain(sweep, argument, blocks)?,
                (Form::Channel(gate), Side::Keys) => self.keys(sweep, gate, argument, blocks)?,
                (Form::Channel(gate), Side::Values) => {
                    made.gates = self.values(sweep, gate, argument, blocks, (b, n, h, e, d))?;
                }
            }
        }
        Ok(made)
    }

    fn keys(&self, sweep: &Sweep<'_>, gate: Gate, argument: SweepArg, blocks: usize) -> Result<()> {
        let (width, warps) = (width(argument.d as usize), warps(argument.e as usize));
        let rows = 2 * FEW * width;
        let stage = (2 * rows + 2 * FEW * WARP_COLUMNS * warps + floats(width)).next_multiple_of(128);
        let shared = RAW * stage + (3 * 2 + 2 * LEVELS) * rows + 3 * 4 * width + 2 * SMALL_TILE;
        let state = if sweep.read.is_none() { "_state" } else { "" };
        let name = format!(
            "decay_keys_{}_d{width}_w{warps}_{}{state}",
            gate.name(),
            direction(sweep.direction)
        );
        launch!(&self.device, KEYS, name, config(blocks, warps, shared); argument);
        Ok(())
    }

    /// Gives the states at borders or the adjoint of log-decays, `[B, N, H, D]`.
    fn values(
        &self,
        sweep: &Sweep<'_>,
        gate: Gate,
        argument: SweepArg,
        blocks: usize,
        (b, n, h, d, e): (usize, usize, usize, usize, usize),
    ) -> Result<Option<Made>> {
        let (width, warps) = (width(argument.d as usize), warps(argument.e as usize));
        let rows = 2 * FEW * WARP_COLUMNS * warps;
        let stage = (2 * 2 * FEW * width + 3 * rows + 2 * floats(WARP_COLUMNS * warps)).next_multiple_of(128);
        let shared = RING * stage + warps * (LEVELS + 1) * SMALL_TILE;
        let borders = self.cut.longest().div_ceil(BORDER);
        let mut gates = GatesArg {
            borders: borders as i32,
            ..Default::default()
        };
        let mut made = None;
        // Copies of operands, until the kernel is launched.
        let mut dense = Vec::new();
        match sweep.gates {
            GateWork::None => {}
            GateWork::States => {
                let shape = (self.cut.segments(), borders, h, d, e);
                let states = Made::new(&self.device, DType::BF16, shape.into())?;
                gates.states = states.start()?;
                made = Some(states);
            }
            GateWork::Decays { key, d_query, states } => {
                let d_log = Made::new(&self.device, DType::F32, (b, n, h, d).into())?;
                dense.extend([aligned_rows(key, self.form)?, aligned_rows(d_query, self.form)?]);
                gates.states = Locked::new(NAME, states).start()?;
                (gates.key, gates.d_query) = (rows_of(&dense[0])?, rows_of(&dense[1])?);
                gates.d_log = d_log.start()?;
                made = Some(d_log);
            }
            GateWork::Logits { key, sums } => {
                dense.push(aligned_rows(key, self.form)?);
                gates.key = rows_of(&dense[0])?;
                gates.sums = Locked::new(NAME, sums).start()?;
            }
        }
        let name = format!(
            "decay_values_{}_d{width}_w{warps}_{}",
            gate.name(),
            direction(sweep.direction)
        );
        launch!(&self.device, VALUES, name, config(blocks, warps, shared); argument, gates);
        Ok(made)
    }

    fn uniform(&self, sweep: &Sweep<'_>, argument: SweepArg, blocks: usize) -> Result<()> {
        let (width, warps) = (width(argument.d as usize), warps(argument.e as usize));
        let direction = direction(sweep.direction);
        let state = if sweep.read.is_none() { "_state" } else { "" };
        let stage = 2 * CHUNK * (2 * width + WARP_COLUMNS * warps);
        let (pairs, logs, sums) = (2 * 2 * CHUNK * CHUNK, STAGES * CHUNK * 4, 2 * warps * CHUNK * 4);
        let config = config(blocks, warps, STAGES * stage + pairs + logs + sums);
        let name = format!("decay_uniform_d{width}_w{warps}_{direction}{state}");
        launch!(&self.device, UNIFORM, name, config; argument);
        Ok(())
    }

    fn plain(&self, sweep: &Sweep<'_>, argument: SweepArg, blocks: usize) -> Result<()> {
        let rows = (argument.d as usize).next_power_of_two().max(32);
        let decay = match (self.decays.kind, sweep.side) {
            (Kind::Channel, Side::Keys) => "rows",
            (Kind::Channel, Side::Values) => "columns",
            _ => "uniform",
        };
        let config = LaunchConfig {
            grid_dim: (blocks as u32, 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        let name = format!("decay_plain_{rows}_{decay}_{}", direction(sweep.direction));
        launch!(&self.device, PLAIN, name, config; argument);
        Ok(())
    }
}

impl Sweeper {
    /// The adjoint `[H]` of the logarithm of a decay for each head; see `tangent` in `cuda/decay_plain.cu`. `sweep` is that
    /// of the output, and `arriving` are the adjoints of the states at the ends of segments.
    pub(super) fn tangent(
        &self,
        sweep: &Sweep<'_>,
        d_o: &Tensor,
        arriving: Option<&Tensor>,
    ) -> Result<Tensor> {
        let Some(read) = sweep.read else {
            bail!("{NAME}: the tangent has nothing to read");
        };
        let rows = [read, sweep.write, sweep.value, d_o].map(|rows| aligned_rows(rows, self.form));
        let [read, write, value, d_o] = rows;
        let (read, write, value, d_o) = (read?, write?, value?, d_o?);
        let (_, _, h, d) = write.dims4()?;
        let e = value.dim(3)?;
        let address =
            |states: Option<&Tensor>| states.map_or(Ok(0), |states| Locked::new(NAME, states).start());
        let argument = SweepArg {
            read: rows_of(&read)?,
            write: rows_of(&write)?,
            value: rows_of(&value)?,
            out: rows_of(&d_o)?,
            log_decay: self.decays.argument()?,
            before: 0,
            enter: address(sweep.enter)?,
            leave: address(arriving)?,
            state_size: (d * e) as i64,
            state_row: e as i64,
            state_column: 1,
            cut: self.cut.argument()?,
            heads: h as i32,
            d: d as i32,
            e: e as i32,
        };
        let (segments, tiles) = (self.cut.segments(), Form::Plain.tiles(e));
        let sums = room::<f32>(&self.device, segments * h * tiles)?;
        let config = LaunchConfig {
            grid_dim: ((segments * h * tiles) as u32, 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        let name = format!("decay_tangent_{}", d.next_power_of_two().max(32));
        launch!(&self.device, PLAIN, name, config; argument, sums.as_view());
        gpu::tensor(sums, &self.device, &(segments, h, tiles).into())
            .sum(2)?
            .sum(0)
    }
}

fn direction(direction: Direction) -> &'static str {
    match direction {
        Direction::Forward => "forward",
        Direction::Backward => "reverse",
    }
}
