//! One pass of an operator over contiguous operands: checks, dispatch on device and element type, several results.
//!
//! A differentiable operator is a candle `CustomOp` whose forward runs one [`Pass`] on storages and whose backward
//! runs another on tensors; what a pass computes is written once for all element types.

use crate::error::OpError;
#[cfg(feature = "cuda")]
use crate::gpu;
use crate::scalar::Real;
#[cfg(feature = "cuda")]
use candle_core::cuda_backend::{CudaDType, CudaStorage, cudarc::driver};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Layout, Result, Shape, Storage, Tensor};
#[cfg(feature = "cuda")]
use candle_core::{CudaDevice, backend::BackendStorage};

/// Element of a CUDA operator: its kernels carry the name as a suffix.
#[cfg(feature = "cuda")]
pub(crate) trait CudaReal: CudaDType + driver::DeviceRepr + driver::ValidAsZeroBits {
    /// What kernel names of this type end with.
    const SUFFIX: &'static str;
}

#[cfg(feature = "cuda")]
impl CudaReal for f32 {
    const SUFFIX: &'static str = "f32";
}

#[cfg(feature = "cuda")]
impl CudaReal for half::bf16 {
    const SUFFIX: &'static str = "bf16";
}

/// A computation from `I` contiguous operands of one element type to any number of results of that type.
pub(crate) trait Pass<const I: usize> {
    /// Name for error messages.
    const NAME: &'static str;

    /// Runs on the processor; the results have the same bits for any number of threads.
    fn cpu<T: Real>(&self, operands: [&[T]; I]) -> Vec<Vec<T>>;

    /// Runs on a GPU: statistics in `f32`, no floating-point atomics.
    #[cfg(feature = "cuda")]
    fn cuda<T: CudaReal>(
        &self,
        device: &CudaDevice,
        operands: [driver::CudaView<'_, T>; I],
    ) -> Result<Vec<driver::CudaSlice<T>>>;
}

/// The elements of a contiguous operand.
pub(crate) fn slice<'a, T: Real>(
    op: &'static str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<T>()?[start..end]),
        None => Err(candle_core::Error::RequiresContiguous { op }),
    }
}

/// The elements of a contiguous operand on a GPU.
#[cfg(feature = "cuda")]
pub(crate) fn view<'a, T: CudaReal>(
    op: &'static str,
    storage: &'a CudaStorage,
    layout: &Layout,
) -> Result<driver::CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(start..end)),
        None => Err(candle_core::Error::RequiresContiguous { op }),
    }
}

fn unsupported(op: &'static str, found: DType, device: &'static str, supported: &'static str) -> OpError {
    OpError::DType {
        op,
        field: "operand",
        found,
        device,
        supported,
    }
}

/// Runs `pass` on processor storages.
pub(crate) fn cpu<P: Pass<I>, const I: usize>(
    pass: &P,
    operands: [(&CpuStorage, &Layout); I],
) -> Result<Vec<CpuStorage>> {
    fn typed<T: Real, P: Pass<I>, const I: usize>(
        pass: &P,
        operands: [(&CpuStorage, &Layout); I],
    ) -> Result<Vec<CpuStorage>> {
        let mut slices: [&[T]; I] = [&[]; I];
        for (slot, (storage, layout)) in slices.iter_mut().zip(operands) {
            *slot = slice(P::NAME, storage, layout)?;
        }
        Ok(pass
            .cpu(slices)
            .into_iter()
            .map(T::to_cpu_storage_owned)
            .collect())
    }
    match operands[0].0 {
        CpuStorage::F32(_) => typed::<f32, P, I>(pass, operands),
        CpuStorage::F64(_) => typed::<f64, P, I>(pass, operands),
        other => {
            use candle_core::backend::BackendStorage;
            Err(unsupported(P::NAME, other.dtype(), "the CPU", "f32, f64").into())
        }
    }
}

/// Runs `pass` on GPU storages.
#[cfg(feature = "cuda")]
pub(crate) fn cuda<P: Pass<I>, const I: usize>(
    pass: &P,
    operands: [(&CudaStorage, &Layout); I],
) -> Result<Vec<CudaStorage>> {
    fn typed<T: CudaReal, P: Pass<I>, const I: usize>(
        pass: &P,
        operands: [(&CudaStorage, &Layout); I],
    ) -> Result<Vec<CudaStorage>> {
        let device = operands[0].0.device();
        let mut views = Vec::with_capacity(I);
        for (storage, layout) in operands {
            views.push(view::<T>(P::NAME, storage, layout)?);
        }
        let Ok(views) = <[_; I]>::try_from(views) else {
            unreachable!("one view was pushed for each operand");
        };
        let results = pass.cuda(device, views)?;
        Ok(results
            .into_iter()
            .map(|data| gpu::storage(data, device))
            .collect())
    }
    match operands[0].0.dtype() {
        DType::F32 => typed::<f32, P, I>(pass, operands),
        DType::BF16 => typed::<half::bf16, P, I>(pass, operands),
        other => Err(unsupported(P::NAME, other, "CUDA", "f32, bf16").into()),
    }
}

/// Runs `pass` on tensors (made contiguous where they are not) and gives its results the `shapes`.
pub(crate) fn tensors<P: Pass<I>, const I: usize>(
    pass: &P,
    operands: [&Tensor; I],
    shapes: &[&Shape],
) -> Result<Vec<Tensor>> {
    let mut dense = Vec::with_capacity(I);
    for operand in operands {
        dense.push(operand.contiguous()?);
    }
    let locked: Vec<_> = dense.iter().map(Tensor::storage_and_layout).collect();
    let results: Vec<Storage> = match &*locked[0].0 {
        Storage::Cpu(first) => {
            let mut parts = [(first, locked[0].1); I];
            for (part, (storage, layout)) in parts.iter_mut().zip(&locked) {
                *part = match &**storage {
                    Storage::Cpu(storage) => (storage, layout),
                    _ => return Err(mixed_devices(P::NAME)),
                };
            }
            cpu(pass, parts)?.into_iter().map(Storage::Cpu).collect()
        }
        #[cfg(feature = "cuda")]
        Storage::Cuda(first) => {
            let mut parts = [(first, locked[0].1); I];
            for (part, (storage, layout)) in parts.iter_mut().zip(&locked) {
                *part = match &**storage {
                    Storage::Cuda(storage) => (storage, layout),
                    _ => return Err(mixed_devices(P::NAME)),
                };
            }
            cuda(pass, parts)?.into_iter().map(Storage::Cuda).collect()
        }
        _ => return Err(mixed_devices(P::NAME)),
    };
    Ok(results
        .into_iter()
        .zip(shapes)
        .map(|(storage, &shape)| Tensor::from_storage(storage, shape.clone(), BackpropOp::none(), false))
        .collect())
}

fn mixed_devices(op: &'static str) -> candle_core::Error {
    candle_core::Error::Msg(format!("{op}: operands lie on different or unsupported devices"))
}

/// Takes the only result of a pass.
pub(crate) fn single<R>(mut results: Vec<R>) -> R {
    debug_assert_eq!(results.len(), 1);
    results.swap_remove(0)
}

/// Errors unless all tensors share the element type and device of the first and none is empty.
pub(crate) fn same_kind(op: &'static str, tensors: &[(&'static str, &Tensor)]) -> Result<()> {
    let first = tensors[0].1;
    for &(field, tensor) in tensors {
        if tensor.elem_count() == 0 {
            return Err(OpError::shape(op, field, tensor, "at least one element").into());
        }
        if tensor.dtype() != first.dtype() {
            let (found, expected) = (
                format!("{:?}", tensor.dtype()),
                format!("{:?} like {}", first.dtype(), tensors[0].0),
            );
            return Err(OpError::value(op, field, found, expected).into());
        }
        if !tensor.device().same_device(first.device()) {
            return Err(mixed_devices(op));
        }
    }
    Ok(())
}

/// Errors unless `x` is f32 or f64 on the CPU, or f32 or bf16 on CUDA, and not empty.
pub(crate) fn check_kind(op: &'static str, x: &Tensor) -> Result<()> {
    same_kind(op, &[("x", x)])?;
    let fits = match x.device().is_cuda() {
        true => matches!(x.dtype(), DType::F32 | DType::BF16),
        false => matches!(x.dtype(), DType::F32 | DType::F64),
    };
    if !fits {
        let found = format!("{:?}", x.dtype());
        return Err(OpError::value(op, "x", found, "f32 or f64 on the CPU, f32 or bf16 on CUDA").into());
    }
    Ok(())
}

/// Errors unless `other` has the type of `x` or is f32, and lies on its device.
pub(crate) fn check_beside(op: &'static str, x: &Tensor, field: &'static str, other: &Tensor) -> Result<()> {
    if other.dtype() != x.dtype() && other.dtype() != DType::F32 {
        let (found, expected) = (
            format!("{:?}", other.dtype()),
            format!("{:?} like x, or F32", x.dtype()),
        );
        return Err(OpError::value(op, field, found, expected).into());
    }
    if !other.device().same_device(x.device()) {
        let found = format!("on {:?}", other.device().location());
        let expected = format!("a tensor on {:?} like x", x.device().location());
        return Err(OpError::value(op, field, found, expected).into());
    }
    Ok(())
}

/// The forward methods of a candle `CustomOp1`, `2` or `3` that is a [`Pass`] with one result, whose shape
/// `self.output(layout of the first operand)` gives.
macro_rules! forward {
    ($count:literal: $($storage:ident $layout:ident),+) => {
        fn name(&self) -> &'static str {
            <Self as $crate::pass::Pass<$count>>::NAME
        }

        fn cpu_fwd(
            &self,
            $($storage: &candle_core::CpuStorage, $layout: &candle_core::Layout),+
        ) -> candle_core::Result<(candle_core::CpuStorage, candle_core::Shape)> {
            let operands: [_; $count] = [$(($storage, $layout)),+];
            let shape = self.output(operands[0].1);
            Ok(($crate::pass::single($crate::pass::cpu(self, operands)?), shape))
        }

        #[cfg(feature = "cuda")]
        fn cuda_fwd(
            &self,
            $($storage: &candle_core::CudaStorage, $layout: &candle_core::Layout),+
        ) -> candle_core::Result<(candle_core::CudaStorage, candle_core::Shape)> {
            let operands: [_; $count] = [$(($storage, $layout)),+];
            let shape = self.output(operands[0].1);
            Ok(($crate::pass::single($crate::pass::cuda(self, operands)?), shape))
        }
    };
}
pub(crate) use forward;
