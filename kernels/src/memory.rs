//! The memory of tensors that others keep: given up while nobody needs the elements, and taken again with them.
//!
//! Shape, type and whoever holds the tensor stay as they are; only the elements are away. Reading them then is an error of the
//! program, which CPU operators end in a panic and not in wrong numbers. For f32, the type of trained weights.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor, bail};

/// Gives up the memory of `tensor`, a whole and contiguous one of type f32.
///
/// # Errors
/// It is a view or of another type, or the device failed.
pub fn give_up(tensor: &Tensor) -> Result<()> {
    whole(tensor)?;
    tensor.inplace_op1(&Change(Mutex::new(None)))
}

/// Gives `tensor`, of which the memory was given up, the elements of `values`, as many and of the same type and device.
///
/// # Errors
/// They do not fit, or the device is out of memory.
pub fn take(tensor: &Tensor, values: &Tensor) -> Result<()> {
    whole(tensor)?;
    let fits = values.elem_count() == tensor.elem_count()
        && values.dtype() == tensor.dtype()
        && values.device().same_device(tensor.device());
    if !fits {
        bail!(
            "elements of {:?} {:?} for a tensor of {:?} {:?}",
            values.dims(),
            values.dtype(),
            tensor.dims(),
            tensor.dtype()
        );
    }
    // Of its own, and no larger than the tensor: `values` may be a view.
    let own = values.detach().force_contiguous()?;
    let (storage, layout) = own.storage_and_layout();
    let storage = storage.try_clone(layout)?;
    tensor.inplace_op1(&Change(Mutex::new(Some(storage))))
}

/// Bytes of memory that `tensor` holds at present, with whoever shares it.
pub fn held(tensor: &Tensor) -> usize {
    let size = tensor.dtype().size_in_bytes();
    match &*tensor.storage_and_layout().0 {
        Storage::Cpu(CpuStorage::F32(values)) => size * values.len(),
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => match &storage.slice {
            // A GPU has no memory of no elements: one stands for it.
            candle_core::cuda_backend::CudaStorageSlice::F32(values) if values.len() > 1 => {
                size * values.len()
            }
            candle_core::cuda_backend::CudaStorageSlice::F32(_) if tensor.elem_count() != 1 => 0,
            _ => size * tensor.elem_count(),
        },
        _ => size * tensor.elem_count(),
    }
}

fn whole(tensor: &Tensor) -> Result<()> {
    if tensor.dtype() != candle_core::DType::F32
        || !tensor.is_contiguous()
        || tensor.layout().start_offset() != 0
    {
        bail!(
            "memory is given up by whole tensors of type F32, found {:?} {:?}",
            tensor.layout(),
            tensor.dtype()
        );
    }
    Ok(())
}

/// Puts another storage in the place of the present one; none for no elements.
struct Change(Mutex<Option<Storage>>);

impl InplaceOp1 for Change {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        let new = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        *storage = match new {
            None => CpuStorage::F32(Vec::new()),
            Some(Storage::Cpu(new)) => new,
            Some(_) => bail!("{}: elements on another device", self.name()),
        };
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, _: &Layout) -> Result<()> {
        use candle_core::cuda_backend::CudaStorageSlice;
        let new = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        *storage = match new {
            None => {
                let device = storage.device.clone();
                let slice = CudaStorageSlice::F32(device.alloc_zeros::<f32>(1)?);
                candle_core::CudaStorage { slice, device }
            }
            Some(Storage::Cuda(new)) => new,
            Some(_) => bail!("{}: elements on another device", self.name()),
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn memory_goes_and_comes_for_all_who_hold_it() -> Result<()> {
        let var = Var::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu)?;
        let other = var.as_tensor().clone();
        assert_eq!(held(&other), 16);
        give_up(&var)?;
        assert_eq!((held(&var), held(&other)), (0, 0));
        let rows = Tensor::new(&[[0f32, 5.0, 6.0, 7.0, 8.0]], &Device::Cpu)?.narrow(1, 1, 4)?;
        take(&var, &rows)?;
        assert_eq!(other.to_vec2::<f32>()?, [[5.0, 6.0], [7.0, 8.0]]);
        assert_eq!(held(&other), 16);
        let line = take(&var, &rows.narrow(1, 0, 3)?).unwrap_err().to_string();
        assert!(line.contains("[1, 3] F32 for a tensor of [2, 2] F32"), "{line}");
        assert!(give_up(&other.narrow(0, 1, 1)?).is_err());
        Ok(())
    }
}
