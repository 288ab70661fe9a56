//! Splits on a GPU: launches of `cuda/split.cu`.

use super::{Activation, OP, Plan, Run};
use crate::autograd::Value;
use crate::cuda_module::{Module, THREADS, by_rows, launch, module, pointer, room};
use crate::gpu::{self, Locked};
use crate::pass::CudaReal;
use crate::rows::sum_rows;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DeviceRepr, LaunchConfig};
use candle_core::{Result, Tensor, bail};

const SPLIT: Module = module!("split");
/// Rows whose share of the adjoint of the lower bound one block sums.
const ROWS_PER_RUN: usize = 32;

/// Elements that move at once: 16 bytes where all columns of all operands allow it.
fn vector<T: CudaReal>(plan: &Plan, run: &Run, starts: &[u64]) -> usize {
    let widest = 16 / size_of::<T>();
    let fits = [plan.width, run.first, run.width]
        .iter()
        .all(|columns| columns % widest == 0)
        && starts.iter().all(|start| start % 16 == 0);
    if fits { widest } else { 1 }
}

fn kernel<T: CudaReal>(name: &str, vector: usize) -> String {
    format!("split_{name}_{}_v{vector}", T::SUFFIX)
}

fn name(activation: Activation) -> &'static str {
    match activation {
        Activation::Plain => "plain",
        Activation::Silu => "silu",
        Activation::Gate => "gate",
    }
}

/// So many rows are split in one launch instead of one a part.
const FEW_ROWS: usize = 64;
/// Most parts of such a launch.
const MOST_RUNS: usize = 8;

/// `Run` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Target {
    y: u64,
    log: u64,
    first: u32,
    width: u32,
    activation: u32,
    unused: u32,
}

/// `Runs` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Targets([Target; MOST_RUNS]);

// SAFETY: plain numbers in the layout of C, as the kernels declare them.
unsafe impl DeviceRepr for Targets {}

/// All parts of a few rows.
fn all<T: CudaReal>(plan: &Plan, x: &Tensor, start: u64, bound: u64) -> Result<Vec<Value>> {
    let device = x.device().as_cuda_device()?;
    let stream = device.cuda_stream();
    let (mut targets, mut rooms) = (Targets::default(), Vec::with_capacity(plan.runs.len()));
    for (target, run) in targets.0.iter_mut().zip(&plan.runs) {
        let count = plan.rows * run.width;
        let y = room::<T>(device, count)?;
        let is_gate = run.activation == Activation::Gate;
        let log = is_gate.then(|| room::<f32>(device, count)).transpose()?;
        *target = Target {
            y: y.device_ptr(&stream).0,
            log: log.as_ref().map_or(0, |log| log.device_ptr(&stream).0),
            first: run.first as u32,
            width: run.width as u32,
            activation: match run.activation {
                Activation::Plain => 0,
                Activation::Silu => 1,
                Activation::Gate => 2,
            },
            unused: 0,
        };
        rooms.push((plan.shape(x, run), y, log));
    }
    let widest = plan.runs.iter().map(|run| run.width).max().unwrap_or(0);
    let config = LaunchConfig {
        grid_dim: (
            (widest as u32).div_ceil(THREADS),
            plan.rows as u32,
            plan.runs.len() as u32,
        ),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    };
    launch!(device, SPLIT, format!("split_all_{}", T::SUFFIX), config; start, bound, targets, plan.width as u32);
    let mut values = Vec::with_capacity(rooms.len() + 1);
    for (shape, y, log) in rooms {
        values.push(gpu::value(y, device, &shape));
        values.extend(log.map(|log| gpu::value(log, device, &shape)));
    }
    Ok(values)
}

pub(super) fn forward<T: CudaReal>(plan: &Plan, x: &Tensor, bound: Option<&Tensor>) -> Result<Vec<Value>> {
    let device = x.device().as_cuda_device()?;
    let locked = Locked::new(OP, x);
    let bound = bound.map(|bound| Locked::new(OP, bound));
    let bound = bound.as_ref().map_or(Ok(0), Locked::start)?;
    let start = locked.start()?;
    if plan.rows <= FEW_ROWS && (2..=MOST_RUNS).contains(&plan.runs.len()) {
        return all::<T>(plan, x, start, bound);
    }
    let mut values = Vec::new();
    for run in &plan.runs {
        let (shape, count) = (plan.shape(x, run), plan.rows * run.width);
        let v = vector::<T>(plan, run, &[start]);
        let y = room::<T>(device, count)?;
        let sizes = [plan.rows, plan.width, run.first, run.width].map(|size| size as u32);
        let [rows, wide, first, width] = sizes;
        let (kernel, config) = (
            kernel::<T>(name(run.activation), v),
            by_rows(plan.rows, run.width / v),
        );
        if run.activation == Activation::Gate {
            let log = room::<f32>(device, count)?;
            launch!(device, SPLIT, kernel, config;
                start, bound, y.as_view(), log.as_view(), rows, wide, first, width);
            values.push(gpu::value(y, device, &shape));
            values.push(gpu::value(log, device, &shape));
        } else {
            launch!(device, SPLIT, kernel, config; start, y.as_view(), rows, wide, first, width);
            values.push(gpu::value(y, device, &shape));
        }
    }
    Ok(values)
}

pub(super) fn backward<T: CudaReal>(
    plan: &Plan,
    x: &Tensor,
    bound: Option<&Tensor>,
    adjoints: &[Option<Tensor>],
) -> Result<Vec<Option<Tensor>>> {
    let device = x.device().as_cuda_device()?;
    let dx = room::<T>(device, x.elem_count())?;
    let mut d_bound = None;
    {
        let locked = Locked::new(OP, x);
        let limits = bound.map(|bound| Locked::new(OP, bound));
        let limits = limits.as_ref().map_or(Ok(0), Locked::start)?;
        let adjoints: Vec<_> = adjoints
            .iter()
            .map(|t| t.as_ref().map(|t| Locked::new(OP, t)))
            .collect();
        let start = locked.start()?;
        for run in &plan.runs {
            let adjoint = |result: usize| match adjoints.get(result) {
                Some(adjoint) => adjoint.as_ref().map_or(Ok(0), Locked::start),
                None => bail!("{OP}: {} adjoints", adjoints.len()),
            };
            let dy = adjoint(run.result)?;
            let sizes = [plan.rows, plan.width, run.first, run.width].map(|size| size as u32);
            let [rows, wide, first, width] = sizes;
            let name = format!("{}_backward", name(run.activation));
            if run.activation != Activation::Gate {
                let v = vector::<T>(plan, run, &[start, dy]);
                launch!(device, SPLIT, kernel::<T>(&name, v), by_rows(plan.rows, run.width / v);
                    start, dy, dx.as_view(), rows, wide, first, width);
                continue;
            }
            let d_log = adjoint(run.result + 1)?;
            let v = vector::<T>(plan, run, &[start, dy, d_log]);
            let runs = plan.rows.div_ceil(ROWS_PER_RUN);
            let partials = match bound {
                Some(_) => Some(room::<f32>(device, runs * run.width)?),
                None => None,
            };
            let view = partials.as_ref().map(|partials| partials.as_view());
            let config = across(run.width / v, runs);
            launch!(device, SPLIT, kernel::<T>(&name, v), config;
                start, limits, dy, d_log, dx.as_view(), pointer(device, view.as_ref()),
                rows, wide, first, width, ROWS_PER_RUN as u32);
            d_bound = partials
                .map(|partials| sum_rows(&gpu::tensor(partials, device, &(runs, run.width).into())))
                .transpose()?;
        }
    }
    let dx = gpu::tensor(dx, device, x.shape());
    Ok([vec![Some(dx)], bound.map(|_| d_bound).into_iter().collect()].concat())
}

/// A thread for each of `columns`, blocks for `runs`.
fn across(columns: usize, runs: usize) -> LaunchConfig {
    let threads = (columns as u32).next_power_of_two().clamp(32, THREADS);
    LaunchConfig {
        grid_dim: ((columns as u32).div_ceil(threads), runs as u32, 1),
        block_dim: (threads, 1, 1),
        shared_mem_bytes: 0,
    }
}
