//! Copies from the host that do not wait for the device.
//!
//! The driver takes a small copy at once. A large one out of ordinary memory it stages itself, and the caller waits until the
//! work before it on the device is done: a training step would begin only when the last one has ended. Through page-locked
//! memory the copy is queued like any kernel. That memory is made once and used in turn.

use candle_core::{Device, Result, Tensor};

/// Uploads the batches of a run.
#[derive(Debug)]
pub struct Uploader {
    device: Device,
    #[cfg(feature = "cuda")]
    buffers: locked::Buffers,
}

impl Uploader {
    /// For uploads to `device`.
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            #[cfg(feature = "cuda")]
            buffers: locked::Buffers::default(),
        }
    }

    /// The device to which it uploads.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// `tensor`, which lies on the host, on the device; the same one where the device is the CPU.
    ///
    /// # Errors
    /// The device or the page-locked memory of the host is used up.
    pub fn upload(&mut self, tensor: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let (Device::Cpu, Device::Cuda(device)) = (tensor.device(), &self.device)
            && let Some(uploaded) = self.buffers.upload(tensor, device)?
        {
            return Ok(uploaded);
        }
        tensor.to_device(&self.device)
    }
}

#[cfg(feature = "cuda")]
mod locked {
    use std::collections::{BTreeMap, VecDeque};

    use candle_core::cuda_backend::cudarc::driver::{CudaEvent, DeviceRepr, PinnedHostSlice};
    use candle_core::cuda_backend::{CudaDType, WrapErr};
    use candle_core::{CpuStorage, CudaDevice, Result, Shape, Storage, Tensor};

    use crate::gpu;

    /// Copies of this many bytes the driver takes at once.
    const SMALL: usize = 64 << 10;
    /// Copies of one size that may be under way.
    const IN_TURN: usize = 12;
    /// Sizes that are kept memory for.
    const SIZES: usize = 16;

    /// Page-locked memory by its size in bytes, that which was used longest ago first.
    #[derive(Debug, Default)]
    pub(super) struct Buffers(BTreeMap<usize, VecDeque<Buffer>>);

    /// Page-locked memory, and when the last copy out of it is over. The event that the memory has itself is recorded only where
    /// streams track each other, which ours need not.
    #[derive(Debug)]
    struct Buffer {
        memory: PinnedHostSlice<u8>,
        copied: CudaEvent,
    }

    impl Buffer {
        fn new(bytes: usize, device: &CudaDevice) -> Result<Self> {
            let stream = device.cuda_stream();
            let context = stream.context();
            // SAFETY: it is filled before it is read.
            let memory = unsafe { context.alloc_pinned::<u8>(bytes) }.w()?;
            let copied = context.new_event(None).w()?;
            Ok(Self { memory, copied })
        }
    }

    impl Drop for Buffer {
        fn drop(&mut self) {
            // Its memory is given back next, which must not be while it is read. A device that fails reads no more.
            let _ = self.copied.synchronize();
        }
    }

    impl Buffers {
        /// None for what is small, or of a type that batches do not have.
        pub(super) fn upload(&mut self, tensor: &Tensor, device: &CudaDevice) -> Result<Option<Tensor>> {
            let tensor = tensor.contiguous()?;
            let bytes = tensor.elem_count() * tensor.dtype().size_in_bytes();
            if bytes <= SMALL {
                return Ok(None);
            }
            let (storage, layout) = tensor.storage_and_layout();
            let Some((start, end)) = layout.contiguous_offsets() else {
                return Ok(None);
            };
            macro_rules! copied {
                ($($kind:ident)*) => {
                    match &*storage {
                        $(
                            Storage::Cpu(CpuStorage::$kind(data)) => {
                                self.copy(&data[start..end], tensor.shape(), device).map(Some)
                            }
                        )*
                        _ => Ok(None),
                    }
                };
            }
            copied!(F32 BF16 F16 U8 U32 I64)
        }

        fn copy<T: CudaDType + DeviceRepr>(
            &mut self,
            data: &[T],
            shape: &Shape,
            device: &CudaDevice,
        ) -> Result<Tensor> {
            let bytes = size_of_val(data);
            let mut buffer = self.take(bytes, device)?;
            // Of the copy out of this buffer that was begun some turns ago.
            buffer.copied.synchronize().w()?;
            // SAFETY: numbers without padding, seen as the bytes that they are.
            let source = unsafe { std::slice::from_raw_parts(data.as_ptr().cast::<u8>(), bytes) };
            buffer.memory.as_mut_slice().w()?.copy_from_slice(source);
            // SAFETY: the copy fills it.
            let mut target = unsafe { device.alloc::<T>(data.len())? };
            // SAFETY: the same memory, as bytes.
            let Some(mut view) = (unsafe { target.transmute_mut::<u8>(bytes) }) else {
                candle_core::bail!("upload: {bytes} bytes do not fit what was made for them")
            };
            let copy = device.memcpy_htod(&buffer.memory, &mut view);
            let recorded = buffer.copied.record(&device.cuda_stream()).w();
            copy.and(recorded)?;
            self.0.entry(bytes).or_default().push_back(buffer);
            Ok(gpu::tensor(target, device, shape))
        }

        fn take(&mut self, bytes: usize, device: &CudaDevice) -> Result<Buffer> {
            if self.0.len() >= SIZES && !self.0.contains_key(&bytes) {
                // Waits for the copies under way.
                self.0.clear();
            }
            let queue = self.0.entry(bytes).or_default();
            match queue.pop_front() {
                Some(buffer) if queue.len() + 1 >= IN_TURN => Ok(buffer),
                first => {
                    if let Some(first) = first {
                        queue.push_front(first);
                    }
                    Buffer::new(bytes, device)
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_the_cpu_a_tensor_is_where_it_should_be() -> Result<()> {
        let tensor = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu)?;
        let uploaded = Uploader::new(&Device::Cpu).upload(&tensor)?;
        assert_eq!(uploaded.to_vec2::<f32>()?, [[1.0, 2.0], [3.0, 4.0]]);
        Ok(())
    }
}
