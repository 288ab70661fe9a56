//! Hand-written gradients for values that were computed outside candle's graph.
//!
//! Candle's custom operators tie forward and backward together and see raw storages. Here the forward value is
//! computed first, by any code, and then handed to the graph together with its [`Gradient`]. Nothing is kept
//! when no argument is tracked. What a gradient does not read, a [`tape`] does not keep.

mod few;
mod many;
mod several;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, Result, Shape, Storage, Tensor, Var, bail};

use crate::tape::{self, Recorded};
pub(crate) use few::{Gradient, attach1, attach2, attach3};
pub(crate) use many::{GradientOfMany, attach_many};
pub(crate) use several::{GradientOfSeveral, attach_several};

/// A forward value: a fresh buffer (handed over without a copy) or a tensor of any device.
pub(crate) enum Value {
    /// Contiguous CPU buffer.
    Cpu(CpuStorage, Shape),
    /// Contiguous GPU buffer.
    #[cfg(feature = "cuda")]
    Cuda(CudaStorage, Shape),
    /// Any tensor; its memory is copied once.
    Tensor(Tensor),
}

impl Value {
    /// As a variable without a graph.
    fn variable(self) -> Result<Tensor> {
        match self {
            Self::Tensor(tensor) => Ok(Var::from_tensor(&tensor.detach().contiguous()?)?.into_inner()),
            value => Ok(value.leaf(true)),
        }
    }

    /// As a tensor that no gradient reaches.
    pub(crate) fn detached(self) -> Tensor {
        self.leaf(false)
    }

    fn leaf(self, variable: bool) -> Tensor {
        let (storage, shape) = match self {
            Self::Cpu(storage, shape) => (Storage::Cpu(storage), shape),
            #[cfg(feature = "cuda")]
            Self::Cuda(storage, shape) => (Storage::Cuda(storage), shape),
            Self::Tensor(tensor) => return tensor.detach(),
        };
        Tensor::from_storage(storage, shape, BackpropOp::none(), variable)
    }
}

fn record_one(value: Value, args: &[&Tensor], node: impl Recorded + 'static) -> Result<Tensor> {
    let result = value.variable()?;
    tape::note(node, args, std::slice::from_ref(&result))?;
    Ok(result)
}

fn fixed<const N: usize>(name: &str, adjoints: Vec<Option<Tensor>>) -> Result<[Option<Tensor>; N]> {
    match <[_; N]>::try_from(adjoints) {
        Ok(adjoints) => Ok(adjoints),
        Err(found) => bail!("{name}: {} adjoints, expected {N}", found.len()),
    }
}
