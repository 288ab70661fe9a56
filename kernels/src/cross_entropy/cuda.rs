//! The head on a GPU: products by cuBLAS, launches of `cuda/cross_entropy.cu` between them.

use super::{Head, Made, OP, Reduction};
use crate::cublas::{Matrix, product};
use crate::cuda_module::{Module, aligned, flat, launch, module, room, vector};
use crate::gpu::{self, Locked};
use crate::pass::{CudaReal, view};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, LaunchConfig};
use candle_core::{CudaStorage, DType, Layout, Result, Shape, Tensor};

const MODULE: Module = module!("cross_entropy");

/// Threads of a block that owns a row.
const ROW_THREADS: u32 = 512;

fn blocks(count: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (count as u32, 1, 1),
        block_dim: (ROW_THREADS, 1, 1),
        shared_mem_bytes: 0,
    }
}

pub(super) fn run<T: CudaReal>(head: &Head) -> Result<Made> {
    let [rows, vocabulary, width] = head.sizes()?;
    let device = head.x.device().as_cuda_device()?;
    let stream = device.cuda_stream();
    let (options, dtype) = (&head.options, head.x.dtype());
    // Rows of logits start at multiples of 16 bytes, which the kernel needs and cuBLAS likes.
    let stride = vocabulary.next_multiple_of(16 / size_of::<T>());
    let logits = room::<T>(device, head.chunk * stride)?;
    let losses = room::<f32>(device, rows)?;
    let dx = head
        .wanted
        .dx
        .then(|| room::<T>(device, rows * width))
        .transpose()?;
    let dweight = head
        .wanted
        .dweight
        .then(|| room::<f32>(device, vocabulary * width))
        .transpose()?;
    {
        let locked = [&head.x, &head.weight, &head.targets].map(|t| Locked::new(OP, t));
        let [x, weight, targets] = [locked[0].start()?, locked[1].start()?, locked[2].start()?];
        let watch = options.watch.map_or(Ok(0), super::TargetWatch::address)?;
        let x = Matrix::new(x, dtype, [rows, width]);
        let weight = Matrix::new(weight, dtype, [vocabulary, width]);
        let dx = dx
            .as_ref()
            .map(|dx| Matrix::new(dx.device_ptr(&stream).0, dtype, [rows, width]));
        let dweight = dweight
            .as_ref()
            .map(|dw| Matrix::new(dw.device_ptr(&stream).0, DType::F32, [vocabulary, width]));
        let whole = Matrix::new(logits.device_ptr(&stream).0, dtype, [head.chunk, vocabulary]).spread(stride);
        let kernel = if head.wanted.any() { "gradient" } else { "loss" };
        for start in (0..rows).step_by(head.chunk) {
            let count = head.chunk.min(rows - start);
            let (x, chunk) = (x.rows(start, count), whole.rows(0, count));
            product(device, x, weight.t(), chunk, false)?;
            launch!(device, MODULE, format!("cross_entropy_{kernel}_{}", T::SUFFIX), blocks(count);
                logits.as_view(), targets + (start * size_of::<u32>()) as u64,
                losses.slice(start..start + count), watch, start as u32, vocabulary as u32, stride as u32,
                options.ignore.unwrap_or(0), u32::from(options.ignore.is_some()),
                options.label_smoothing as f32, options.z_loss as f32);
            if let Some(dx) = dx {
                product(device, chunk, weight, dx.rows(start, count), false)?;
            }
            if let Some(dweight) = dweight {
                product(device, chunk.t(), x, dweight, start > 0)?;
            }
        }
    }
    let shape = |sizes: &[usize]| Shape::from(sizes);
    Ok(Made {
        losses: gpu::tensor(losses, device, &shape(&[rows])),
        dx: dx.map(|dx| gpu::tensor(dx, device, &shape(&[rows, width]))),
        dweight: dweight.map(|dw| gpu::tensor(dw, device, &shape(&[vocabulary, width]))),
    })
}

/// The loss and the weight of a token in it, without waiting for either.
pub(super) fn reduce(
    losses: &Tensor,
    targets: &Tensor,
    ignore: Option<u32>,
    reduction: Reduction,
) -> Result<(Tensor, Tensor)> {
    let device = losses.device().as_cuda_device()?;
    let result = room::<f32>(device, 2)?;
    {
        let (losses, targets) = (Locked::new(OP, losses), Locked::new(OP, targets));
        let rows = losses.shape().elem_count();
        launch!(device, MODULE, "cross_entropy_sum", blocks(1);
            losses.view::<f32>()?, targets.start()?, result.as_view(), rows as u32, ignore.unwrap_or(0),
            u32::from(ignore.is_some()), u32::from(reduction == Reduction::Mean));
    }
    let result = gpu::tensor(result, device, &Shape::from(2));
    Ok((result.get(0)?, result.get(1)?))
}

/// Multiplies `values` by two scalars.
pub(super) fn scale(
    values: (&CudaStorage, &Layout),
    grad: (&CudaStorage, &Layout),
    share: (&CudaStorage, &Layout),
) -> Result<()> {
    fn typed<T: CudaReal>(
        (values, layout): (&CudaStorage, &Layout),
        grad: (&CudaStorage, &Layout),
        share: (&CudaStorage, &Layout),
    ) -> Result<()> {
        let device = values.device();
        let values = view::<T>(OP, values, layout)?;
        let count = values.len();
        let v = vector(&[count], aligned(device, &[&values]));
        launch!(device, MODULE, format!("scale_{}_v{v}", T::SUFFIX), flat(count / v);
            values, view::<f32>(OP, grad.0, grad.1)?, view::<f32>(OP, share.0, share.1)?, count as u64);
        Ok(())
    }
    match values.0.dtype() {
        DType::BF16 => typed::<half::bf16>(values, grad, share),
        _ => typed::<f32>(values, grad, share),
    }
}
