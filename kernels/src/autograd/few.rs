//! Functions of one, two and three tensors: candle's own kinds of nodes.

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, MetalStorage, Result, Shape, Storage,
    Tensor, bail,
};
use std::sync::Mutex;

use super::{Value, record_one};
use crate::tape::{self, Needs, Part, Recorded, exactly, only};

/// The backward pass of a function of `N` tensors.
pub(crate) trait Gradient<const N: usize>: Send + Sync + 'static {
    /// Name for error messages.
    fn name(&self) -> &'static str;

    /// What [`Self::backward`] reads.
    fn needs(&self) -> Needs {
        Needs::EVERYTHING
    }

    /// The value once more, for those whose needs say that they do this.
    fn again(&self, _: [&Tensor; N]) -> Result<Value> {
        bail!("{}: made once only", self.name())
    }

    /// Some of the adjoints, for those whose needs say that they do this.
    fn part(&self, _: Part, _: [&Tensor; N], _grad: &Tensor) -> Result<[Option<Tensor>; N]> {
        bail!("{}: all adjoints or none", self.name())
    }

    /// Memory that is kept besides arguments and value.
    fn holds(&self) -> Vec<Tensor> {
        Vec::new()
    }

    /// Adjoints of the arguments, given the value `res` and its adjoint `grad`; `None` where none is due.
    fn backward(&self, args: [&Tensor; N], res: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; N]>;
}

struct Node<G> {
    value: Mutex<Option<Value>>,
    gradient: G,
}

impl<G> Node<G> {
    fn new(value: Value, gradient: G) -> Self {
        Self {
            value: Mutex::new(Some(value)),
            gradient,
        }
    }

    fn take(&self) -> Result<Value> {
        match self.value.lock() {
            Ok(mut value) => match value.take() {
                Some(value) => Ok(value),
                None => bail!("the forward value was already handed over"),
            },
            Err(_) => bail!("the forward value was lost in a panic"),
        }
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            Value::Cpu(storage, shape) => Ok((storage, shape)),
            #[cfg(feature = "cuda")]
            Value::Cuda(..) => bail!("value and arguments lie on different devices"),
            Value::Tensor(tensor) => {
                let tensor = tensor.force_contiguous()?;
                match &*tensor.storage_and_layout().0 {
                    Storage::Cpu(storage) => Ok((storage.clone(), tensor.shape().clone())),
                    _ => bail!("value and arguments lie on different devices"),
                }
            }
        }
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.take()? {
            #[cfg(feature = "cuda")]
            Value::Cuda(storage, shape) => Ok((storage, shape)),
            Value::Tensor(tensor) => {
                let tensor = tensor.force_contiguous()?;
                let (storage, layout) = tensor.storage_and_layout();
                match &*storage {
                    Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, tensor.shape().clone())),
                    _ => bail!("value and arguments lie on different devices"),
                }
            }
            Value::Cpu(..) => bail!("value and arguments lie on different devices"),
        }
    }

    fn metal(&self) -> Result<(MetalStorage, Shape)> {
        match self.take()? {
            Value::Tensor(tensor) => {
                let tensor = tensor.force_contiguous()?;
                let (storage, layout) = tensor.storage_and_layout();
                match &*storage {
                    Storage::Metal(storage) => Ok((storage.try_clone(layout)?, tensor.shape().clone())),
                    _ => bail!("value and arguments lie on different devices"),
                }
            }
            _ => bail!("value and arguments lie on different devices"),
        }
    }
}

impl<G: Gradient<1>> CustomOp1 for Node<G> {
    fn name(&self) -> &'static str {
        self.gradient.name()
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(&self, a: &Tensor, res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [da] = self.gradient.backward([a], res, grad)?;
        Ok(da)
    }
}

impl<G: Gradient<2>> CustomOp2 for Node<G> {
    fn name(&self) -> &'static str {
        self.gradient.name()
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [da, db] = self.gradient.backward([a, b], res, grad)?;
        Ok((da, db))
    }
}

impl<G: Gradient<3>> CustomOp3 for Node<G> {
    fn name(&self) -> &'static str {
        self.gradient.name()
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [da, db, dc] = self.gradient.backward([a, b, c], res, grad)?;
        Ok((da, db, dc))
    }
}

/// A gradient of `N` arguments, and how many there are.
struct OfFew<G, const N: usize>(G);

impl<G: Gradient<N>, const N: usize> Recorded for OfFew<G, N> {
    fn needs(&self) -> Needs {
        self.0.needs()
    }

    fn backward(
        &self,
        args: &[Tensor],
        results: &[Tensor],
        adjoints: Vec<Option<Tensor>>,
    ) -> Result<Vec<Option<Tensor>>> {
        let name = self.0.name();
        let [res] = exactly::<1>(name, results)?;
        let adjoints = self
            .0
            .backward(exactly(name, args)?, res, &only(name, adjoints)?)?;
        Ok(adjoints.into())
    }

    fn again(&self, args: &[Tensor]) -> Result<Vec<Tensor>> {
        let value = self.0.again(exactly(self.0.name(), args)?)?;
        Ok(vec![value.variable()?])
    }

    fn part(
        &self,
        part: Part,
        args: &[Tensor],
        adjoints: Vec<Option<Tensor>>,
    ) -> Result<Vec<Option<Tensor>>> {
        let name = self.0.name();
        let adjoints = self.0.part(part, exactly(name, args)?, &only(name, adjoints)?)?;
        Ok(adjoints.into())
    }

    fn holds(&self) -> Vec<Tensor> {
        self.0.holds()
    }
}

/// Enters `value` into the graph as a function of one tensor.
pub(crate) fn attach1<G: Gradient<1>>(value: Value, arg: &Tensor, gradient: G) -> Result<Tensor> {
    if tape::takes(&[arg]) {
        return record_one(value, &[arg], OfFew::<_, 1>(gradient));
    }
    arg.apply_op1(Node::new(value, gradient))
}

/// Enters `value` into the graph as a function of two tensors.
pub(crate) fn attach2<G: Gradient<2>>(value: Value, args: [&Tensor; 2], gradient: G) -> Result<Tensor> {
    if tape::takes(&args) {
        return record_one(value, &args, OfFew::<_, 2>(gradient));
    }
    args[0].apply_op2(args[1], Node::new(value, gradient))
}

/// Enters `value` into the graph as a function of three tensors.
pub(crate) fn attach3<G: Gradient<3>>(value: Value, args: [&Tensor; 3], gradient: G) -> Result<Tensor> {
    if tape::takes(&args) {
        return record_one(value, &args, OfFew::<_, 3>(gradient));
    }
    args[0].apply_op3(args[1], args[2], Node::new(value, gradient))
}
