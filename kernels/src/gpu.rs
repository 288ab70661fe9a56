//! Tensors of a GPU as the operands and results of our kernels.

use crate::autograd::Value;
use crate::pass::{self, CudaReal};
use crate::probe;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DevicePtr};
use candle_core::cuda_backend::{CudaDType, CudaStorage};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, DType, Layout, Result, Shape, Storage, StorageRef, Tensor, bail};

/// A contiguous tensor of a GPU whose memory cannot go away.
pub(crate) struct Locked<'a> {
    op: &'static str,
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Locked<'a> {
    /// Locks a tensor for the operator `op`.
    pub(crate) fn new(op: &'static str, tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { op, storage, layout }
    }

    /// Its elements.
    pub(crate) fn view<T: CudaReal>(&self) -> Result<CudaView<'_, T>> {
        pass::view(self.op, self.cuda()?, self.layout)
    }

    /// Its shape.
    pub(crate) fn shape(&self) -> &Shape {
        self.layout.shape()
    }

    /// Address of its first element, of whatever type, and whether a vector of four elements may start there.
    pub(crate) fn address(&self) -> Result<(u64, bool)> {
        if !self.layout.is_contiguous() {
            return Err(candle_core::Error::RequiresContiguous { op: self.op });
        }
        let address = self.start()?;
        let vector = 4 * self.cuda()?.dtype().size_in_bytes() as u64;
        Ok((address, address % vector == 0))
    }

    /// Address of its first element, of whatever type and strides.
    pub(crate) fn start(&self) -> Result<u64> {
        fn of<T: CudaDType>(storage: &CudaStorage, layout: &Layout) -> Result<u64> {
            let slice = storage.as_cuda_slice::<T>()?.slice(layout.start_offset()..);
            let stream = storage.device().cuda_stream();
            Ok(slice.device_ptr(&stream).0)
        }
        let storage = self.cuda()?;
        match storage.dtype() {
            DType::F32 => of::<f32>(storage, self.layout),
            DType::BF16 => of::<half::bf16>(storage, self.layout),
            DType::U8 => of::<u8>(storage, self.layout),
            DType::U32 => of::<u32>(storage, self.layout),
            DType::I64 => of::<i64>(storage, self.layout),
            other => bail!(
                "{}: {other:?} on CUDA, supported: f32, bf16, u8, u32, i64",
                self.op
            ),
        }
    }

    fn cuda(&self) -> Result<&CudaStorage> {
        match &*self.storage {
            Storage::Cuda(storage) => Ok(storage),
            _ => bail!("{}: operands lie on different devices", self.op),
        }
    }
}

/// What a kernel wrote.
pub(crate) fn storage<T: CudaDType>(slice: CudaSlice<T>, device: &CudaDevice) -> CudaStorage {
    probe::look_behind(device, &slice);
    CudaStorage::wrap_cuda_slice(slice, device.clone())
}

/// What a kernel wrote, as a tensor without a graph.
pub(crate) fn tensor<T: CudaDType>(slice: CudaSlice<T>, device: &CudaDevice, shape: &Shape) -> Tensor {
    let storage = storage(slice, device);
    Tensor::from_storage(Storage::Cuda(storage), shape.clone(), BackpropOp::none(), false)
}

/// What a kernel wrote, as the value of a node of the graph.
pub(crate) fn value<T: CudaDType>(slice: CudaSlice<T>, device: &CudaDevice, shape: &Shape) -> Value {
    Value::Cuda(storage(slice, device), shape.clone())
}
