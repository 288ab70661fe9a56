//! Copies of the tensors of a run on the host, in buffers that are used again for the next copy: the only part of saving
//! that training waits for. Memory that was used before is filled several times faster than fresh memory, of which the
//! system has to find each page.

use std::collections::BTreeMap;

use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Result, Storage, Tensor};

/// Makes `copies` equal to `tensors`: same names, shapes, types and values, on the host. What fits is overwritten in
/// place, so nothing else may use `copies`.
///
/// # Errors
/// The host is out of memory, or the device failed.
pub(super) fn take(copies: &mut BTreeMap<String, Tensor>, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    copies.retain(|name, _| tensors.contains_key(name));
    for (name, tensor) in tensors {
        let tensor = tensor.contiguous()?;
        match copies.get(name) {
            Some(copy) if copy.shape() == tensor.shape() && copy.dtype() == tensor.dtype() => {
                copy.inplace_op1(&Fill { from: &tensor })?;
            }
            _ => {
                let copy = match tensor.device() {
                    // A tensor that is there already would be shared.
                    Device::Cpu => tensor.copy()?,
                    _ => tensor.to_device(&Device::Cpu)?,
                };
                copies.insert(name.clone(), copy);
            }
        }
    }
    // Copies from a device may still be under way.
    match tensors.values().next() {
        Some(tensor) => tensor.device().synchronize(),
        None => Ok(()),
    }
}

/// Overwrites a tensor on the host with the values of `from`, which is contiguous and of the same shape and type.
struct Fill<'a> {
    from: &'a Tensor,
}

impl InplaceOp1 for Fill<'_> {
    fn name(&self) -> &'static str {
        "fill"
    }

    fn cpu_fwd(&self, target: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (storage, from) = self.from.storage_and_layout();
        // The target is one of our own copies, which has its memory to itself.
        let (Some((0, length)), Some((from, end))) = (layout.contiguous_offsets(), from.contiguous_offsets())
        else {
            candle_core::bail!("a snapshot of a tensor that is not contiguous")
        };
        macro_rules! fill {
            ($($kind:ident)*) => {
                match (&*storage, target) {
                    $(
                        (Storage::Cpu(CpuStorage::$kind(source)), CpuStorage::$kind(target)) => {
                            target[..length].copy_from_slice(&source[from..end]);
                            Ok(())
                        }
                        #[cfg(feature = "cuda")]
                        (Storage::Cuda(source), CpuStorage::$kind(target)) => {
                            let values = source.as_cuda_slice()?.slice(from..end);
                            self.from
                                .device()
                                .as_cuda_device()?
                                .memcpy_dtoh(&values, target)
                        }
                    )*
                    _ => candle_core::bail!("a snapshot of element type {:?}", self.from.dtype()),
                }
            };
        }
        fill!(F32 BF16 F16 F64 I64 U32 U8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    fn address(tensor: &Tensor) -> usize {
        match &*tensor.storage_and_layout().0 {
            Storage::Cpu(storage) => storage.as_slice::<f32>().unwrap().as_ptr() as usize,
            _ => unreachable!("snapshots are on the host"),
        }
    }

    #[test]
    fn holds_the_values_of_its_moment_and_uses_its_memory_again() {
        let named = |tensors: Vec<(&str, Tensor)>| {
            tensors
                .into_iter()
                .map(|(name, tensor)| (name.to_string(), tensor))
                .collect::<BTreeMap<_, _>>()
        };
        let values = |tensor: &Tensor| {
            let flat = tensor
                .flatten_all()
                .and_then(|flat| flat.to_dtype(DType::F32))
                .unwrap();
            flat.to_vec1::<f32>().unwrap()
        };
        let weight = candle_core::Var::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap();
        let half = Tensor::new(&[0.5f32, 7.0], &Device::Cpu)
            .unwrap()
            .to_dtype(DType::BF16)
            .unwrap();
        let now = |turned: bool| {
            let tensor = weight.as_detached_tensor();
            let tensor = if turned { tensor.t().unwrap() } else { tensor };
            named(vec![("weight", tensor), ("half", half.clone())])
        };
        let mut copies = named(vec![("gone", half.clone())]);
        take(&mut copies, &now(false)).unwrap();
        assert_eq!(copies.keys().collect::<Vec<_>>(), ["half", "weight"]);
        let first = address(&copies["weight"]);
        weight
            .set(&Tensor::new(&[[5f32, 6.0], [7.0, 8.0]], &Device::Cpu).unwrap())
            .unwrap();
        assert_eq!(values(&copies["weight"]), [1.0, 2.0, 3.0, 4.0]);
        take(&mut copies, &now(false)).unwrap();
        assert_eq!(values(&copies["weight"]), [5.0, 6.0, 7.0, 8.0]);
        assert_eq!(
            (values(&copies["half"]), copies["half"].dtype()),
            (vec![0.5, 7.0], DType::BF16)
        );
        // Views are brought into order; another shape gets memory of its own.
        take(&mut copies, &now(true)).unwrap();
        assert_eq!(values(&copies["weight"]), [5.0, 7.0, 6.0, 8.0]);
        assert_eq!(address(&copies["weight"]), first);
        let other = named(vec![("weight", Tensor::new(&[9f32], &Device::Cpu).unwrap())]);
        take(&mut copies, &other).unwrap();
        assert_eq!((copies.len(), values(&copies["weight"])), (1, vec![9.0]));
        assert_ne!(address(&other["weight"]), address(&copies["weight"]));
    }
}
