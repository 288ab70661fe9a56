//! How rows of channels fall to threads of a GPU, for the kernels on `cuda/rowwise.cuh`.

use crate::cuda_module::{Slice, THREADS, room};
use crate::gpu::Locked;
use crate::rows::cuda::sum_runs;
use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{CudaDevice, DType, Result, Tensor};

/// Threads that keep a GPU busy.
const BUSY: usize = 1 << 17;
/// Fewest tokens of a run, beside which its sums are little to write.
const TOKENS_PER_RUN: usize = 8;
/// Runs that one launch adds up fast enough; more are added in two.
const RUNS_PER_SUM: usize = 32;

/// A parameter in f32, without its graph.
pub(super) fn wide(parameter: Option<&Tensor>) -> Result<Option<Tensor>> {
    parameter
        .map(|parameter| parameter.detach().to_dtype(DType::F32)?.contiguous())
        .transpose()
}

/// Where an operand starts, which may be absent.
pub(super) fn address_or_null(operand: Option<&Locked<'_>>) -> Result<u64> {
    operand.map_or(Ok(0), Locked::start)
}

/// Elements of a vector, and threads of a row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sharing {
    /// Elements that move at once.
    pub(super) vector: usize,
    /// A power of two, at most [`THREADS`].
    pub(super) threads: usize,
}

impl Sharing {
    /// For rows of `width` elements, of which the smallest have `bytes`; `lengths` are what vectors have to fit into beside
    /// it, and `addresses` where operands start.
    pub(super) fn new(width: usize, bytes: usize, lengths: &[usize], addresses: &[u64]) -> Self {
        let widest = 16 / bytes;
        let fits = width.is_multiple_of(widest)
            && lengths.iter().all(|length| length.is_multiple_of(widest))
            && addresses.iter().all(|address| address.is_multiple_of(16));
        let vector = if fits { widest } else { 1 };
        let threads = width.div_ceil(2 * vector).next_power_of_two();
        Self {
            vector,
            threads: threads.min(THREADS as usize),
        }
    }

    /// A launch that gives threads to each of `rows`.
    pub(super) fn launch(self, rows: usize) -> LaunchConfig {
        LaunchConfig {
            grid_dim: (rows.div_ceil(THREADS as usize / self.threads) as u32, 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        }
    }
}

/// Tokens in runs whose sums are taken by the same threads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Runs {
    /// How many; the last ones may be empty.
    pub(super) runs: usize,
    /// Tokens of each but the last ones.
    pub(super) tokens_per_run: usize,
}

impl Runs {
    /// Of `tokens` with `heads` rows each; one token a run where nothing is to be summed.
    pub(super) fn new(tokens: usize, heads: usize, sharing: Sharing, sums: bool) -> Self {
        if !sums {
            return Self {
                runs: tokens,
                tokens_per_run: 1,
            };
        }
        let wanted = BUSY.div_ceil(heads * sharing.threads).max(1);
        let tokens_per_run = tokens.div_ceil(wanted).max(TOKENS_PER_RUN);
        let runs = tokens.div_ceil(tokens_per_run);
        Self {
            runs: if runs > RUNS_PER_SUM {
                runs.next_multiple_of(RUNS_PER_SUM)
            } else {
                runs
            },
            tokens_per_run,
        }
    }

    /// Room for the sums of all runs, `[runs, columns]`.
    pub(super) fn partials(self, device: &CudaDevice, columns: usize) -> Result<Slice<f32>> {
        room::<f32>(device, self.runs * columns)
    }

    /// The sums over the runs, in an order that depends on sizes alone: `[columns]`.
    pub(super) fn sum(
        self,
        device: &CudaDevice,
        partials: &Slice<f32>,
        columns: usize,
    ) -> Result<Slice<f32>> {
        if self.runs <= RUNS_PER_SUM {
            return sum_runs(device, partials, 1, self.runs, columns);
        }
        let groups = self.runs / RUNS_PER_SUM;
        let sums = sum_runs(device, partials, groups, RUNS_PER_SUM, columns)?;
        sum_runs(device, &sums, 1, groups, columns)
    }
}
