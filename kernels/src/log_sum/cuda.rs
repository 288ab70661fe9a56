//! The scans on a GPU: launches of `cuda/decay_additive.cu`.

use super::{NAME, Scan};
use crate::cuda_module::{Module, Slice, THREADS, launch, module, room};
use crate::decay::cuda::sweep::{RowsArg, rows_of};
use crate::gpu::{self, Locked};
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DeviceRepr, LaunchConfig};
use candle_core::{CudaDevice, DType, Result, Tensor, bail};

const ADDITIVE: Module = module!("decay_additive");

/// Channels of a block, its slices, blocks that keep the GPU busy, and fewest tokens of a slice.
const BLOCK_CHANNELS: usize = 64;
const BLOCK_SLICES: usize = THREADS as usize / 32;
const BLOCKS: usize = 1056;
const FEWEST: usize = 32;

/// Terms of the sums of the backward pass.
#[derive(Clone, Copy)]
pub(crate) enum Terms<'a> {
    /// Contiguous, f32.
    Dense(&'a Tensor),
    /// Products of two tensors of bf16 with dense last axes.
    Products(&'a Tensor, &'a Tensor),
}

/// `Products` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct ProductsArg {
    q: RowsArg,
    dq: RowsArg,
}

// SAFETY: plain numbers in the layout of C, as the kernels declare them.
unsafe impl DeviceRepr for ProductsArg {}

/// How a call is launched.
struct Slices {
    /// Borders of packed sequences.
    borders: Option<Slice<i32>>,
    count: usize,
    config: LaunchConfig,
}

impl Slices {
    fn new(scan: &Scan, device: &CudaDevice) -> Result<Self> {
        let columns = scan.columns();
        if columns % 2 == 1 {
            bail!("{NAME}: {columns} channels of all heads on a GPU, expected an even number");
        }
        let sequences = scan.batch * scan.ends.len();
        let across = columns.div_ceil(BLOCK_CHANNELS);
        let count =
            (BLOCK_SLICES * BLOCKS.div_ceil(across * sequences)).clamp(1, (scan.tokens / FEWEST).max(1));
        let borders = if scan.ends.len() > 1 {
            let borders: Vec<i32> = std::iter::once(0)
                .chain(scan.ends.iter().map(|&end| end as i32))
                .collect();
            Some(device.clone_htod(&borders)?)
        } else {
            None
        };
        Ok(Self {
            borders,
            count,
            config: LaunchConfig {
                grid_dim: (
                    across as u32,
                    count.div_ceil(BLOCK_SLICES) as u32,
                    sequences as u32,
                ),
                block_dim: (THREADS, 1, 1),
                shared_mem_bytes: 0,
            },
        })
    }

    fn borders(&self, device: &CudaDevice) -> u64 {
        self.borders
            .as_ref()
            .map_or(0, |borders| borders.device_ptr(&device.cuda_stream()).0)
    }

    /// Floats of partial results, `each` for a channel of a slice.
    fn partial(&self, scan: &Scan, device: &CudaDevice, each: usize) -> Result<Slice<f32>> {
        room::<f32>(
            device,
            scan.batch * scan.ends.len() * self.count * scan.columns() * each,
        )
    }
}

/// Gates of logits in f32 or bf16, whose last axis is dense, and of what comes before them, contiguous.
pub(crate) fn gates(scan: &Scan, logits: &Tensor, before: Option<&Tensor>) -> Result<Tensor> {
    let device = logits.device().as_cuda_device()?;
    let slices = Slices::new(scan, device)?;
    let kind = match logits.dtype() {
        DType::BF16 => "bf16",
        DType::F32 => "f32",
        found => bail!("{NAME}: logits are {found:?} on a GPU, expected f32, f16 or bf16"),
    };
    let z = room::<f32>(device, logits.elem_count())?;
    let partial = slices.partial(scan, device, 2)?;
    {
        let before = before.map(|before| Locked::new(NAME, before));
        let before = before.as_ref().map_or(Ok(0), Locked::start)?;
        let passes: &[&str] = if slices.count > 1 {
            &["_partial", ""]
        } else {
            &[""]
        };
        for pass in passes {
            launch!(device, ADDITIVE, format!("additive_gates_{kind}{pass}"), slices.config;
                rows_of(logits)?, before, z.as_view(), partial.as_view(), slices.borders(device), scan.tokens as i32,
                slices.count as i32, scan.heads as i32, scan.width as i32);
        }
    }
    Ok(gpu::tensor(z, device, logits.shape()))
}

/// Sums of `terms` over the tokens after each, decayed by gates `z`, and of `last` `[S, H, D]` behind them, contiguous.
pub(crate) fn pull(scan: &Scan, terms: Terms<'_>, z: &Tensor, last: Option<&Tensor>) -> Result<Tensor> {
    let device = z.device().as_cuda_device()?;
    let slices = Slices::new(scan, device)?;
    let y = room::<f32>(device, z.elem_count())?;
    let partial = slices.partial(scan, device, 1)?;
    {
        let (gates, last) = (Locked::new(NAME, z), last.map(|last| Locked::new(NAME, last)));
        let last = last.as_ref().map_or(Ok(0), Locked::start)?;
        let passes: &[&str] = if slices.count > 1 {
            &["_partial", ""]
        } else {
            &[""]
        };
        for pass in passes {
            match terms {
                Terms::Dense(terms) => {
                    let terms = Locked::new(NAME, terms);
                    launch!(device, ADDITIVE, format!("additive_pull_dense{pass}"), slices.config;
                        terms.view::<f32>()?, gates.view::<f32>()?, last, y.as_view(),
                        partial.as_view(), slices.borders(device), scan.tokens as i32, slices.count as i32,
                        scan.heads as i32, scan.width as i32);
                }
                Terms::Products(q, dq) => {
                    let products = ProductsArg {
                        q: rows_of(q)?,
                        dq: rows_of(dq)?,
                    };
                    launch!(device, ADDITIVE, format!("additive_pull_products{pass}"), slices.config;
                        products, gates.view::<f32>()?, last, y.as_view(), partial.as_view(), slices.borders(device),
                        scan.tokens as i32, slices.count as i32, scan.heads as i32, scan.width as i32);
                }
            }
        }
    }
    Ok(gpu::tensor(y, device, z.shape()))
}
