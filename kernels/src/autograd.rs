//! Hand-written gradients for values that were computed outside candle's graph.
//!
//! Candle's custom operators tie forward and backward together and see raw storages. Here the forward value is
//! computed first, by any code, and then handed to the graph together with its [`Gradient`]. Nothing is kept
//! when no argument is tracked. What a gradient does not read, a [`tape`] does not keep.

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, MetalStorage, Result, Shape,
    Storage, Tensor, Var, bail,
};
use std::sync::{Arc, Mutex};

use crate::tape::{self, Needs, Part, Recorded, Set, exactly, only};

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

impl Value {
    /// As a variable without a graph.
    fn variable(self) -> Result<Tensor> {
        let (storage, shape) = match self {
            Self::Cpu(storage, shape) => (Storage::Cpu(storage), shape),
            #[cfg(feature = "cuda")]
            Self::Cuda(storage, shape) => (Storage::Cuda(storage), shape),
            Self::Tensor(tensor) => {
                return Ok(Var::from_tensor(&tensor.detach().contiguous()?)?.into_inner());
            }
        };
        Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), true))
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

fn record_one(value: Value, args: &[&Tensor], node: impl Recorded + 'static) -> Result<Tensor> {
    let result = value.variable()?;
    tape::note(node, args, std::slice::from_ref(&result))?;
    Ok(result)
}

/// The backward pass of a function of up to five tensors.
pub(crate) trait GradientOfMany: Send + Sync + 'static {
    /// Name for error messages.
    fn name(&self) -> &'static str;

    /// What [`Self::backward`] reads.
    fn needs(&self) -> Needs {
        Needs::EVERYTHING
    }

    /// Memory that is kept besides arguments and value.
    fn holds(&self) -> Vec<Tensor> {
        Vec::new()
    }

    /// Adjoints of all arguments in order, given the value `res` and its adjoint `grad`; `None` where none is due.
    fn backward(&self, args: &[Tensor], res: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>>;
}

/// Enters `value` into the graph as a function of one to five tensors.
///
/// Candle's nodes have three arguments at most. Of more, the first three get a node of their own, a scalar, which is
/// an argument of the value's node. The value's node comes first in backward: it computes all adjoints, leaves those
/// of the first three for their node, and gives the scalar a zero so that its node runs. A tape takes it as it is.
pub(crate) fn attach_many<G: GradientOfMany>(value: Value, args: &[&Tensor], gradient: G) -> Result<Tensor> {
    if args.is_empty() || args.len() > 5 {
        bail!(
            "{}: {} arguments, expected one to five",
            gradient.name(),
            args.len()
        );
    }
    if tape::takes(args) {
        return record_one(value, args, OfMany(gradient));
    }
    let left = Arc::new(Mutex::new(Vec::new()));
    let node = Last {
        args: args.iter().map(|&arg| arg.clone()).collect(),
        left: left.clone(),
        gradient,
    };
    if let &[a, b, c, ref rest @ ..] = args
        && !rest.is_empty()
    {
        let name = node.gradient.name();
        let scalar = Value::Tensor(Tensor::zeros((), DType::F32, a.device())?);
        let first = attach3(scalar, [a, b, c], First { left, name })?;
        return match *rest {
            [d] => attach2(value, [&first, d], node),
            [d, e] => attach3(value, [&first, d, e], node),
            _ => bail!("{name}: {} arguments, expected one to five", args.len()),
        };
    }
    match *args {
        [a] => attach1(value, a, node),
        [a, b] => attach2(value, [a, b], node),
        [a, b, c] => attach3(value, [a, b, c], node),
        _ => bail!("{}: no arguments", node.gradient.name()),
    }
}

struct OfMany<G>(G);

impl<G: GradientOfMany> Recorded for OfMany<G> {
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
        self.0.backward(args, res, &only(name, adjoints)?)
    }

    fn again(&self, _: &[Tensor]) -> Result<Vec<Tensor>> {
        bail!("{}: made once only", self.0.name())
    }

    fn holds(&self) -> Vec<Tensor> {
        self.0.holds()
    }
}

/// Adjoints on their way from the node of the value to that of the first three arguments.
type Left = Arc<Mutex<Vec<Option<Tensor>>>>;

/// The node that holds the value.
struct Last<G> {
    args: Vec<Tensor>,
    left: Left,
    gradient: G,
}

impl<G: GradientOfMany, const N: usize> Gradient<N> for Last<G> {
    fn name(&self) -> &'static str {
        self.gradient.name()
    }

    fn backward(&self, args: [&Tensor; N], res: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; N]> {
        let mut adjoints = self.gradient.backward(&self.args, res, grad)?;
        if self.args.len() > N {
            let mut own = adjoints.split_off(3);
            let zero = args[0].track_op().then(|| args[0].zeros_like()).transpose()?;
            own.insert(0, zero);
            match self.left.lock() {
                Ok(mut left) => *left = adjoints,
                Err(_) => bail!("{}: adjoints were lost in a panic", self.gradient.name()),
            }
            adjoints = own;
        }
        fixed(self.gradient.name(), adjoints)
    }
}

/// The node of the first three arguments.
struct First {
    left: Left,
    name: &'static str,
}

impl Gradient<3> for First {
    fn name(&self) -> &'static str {
        self.name
    }

    fn backward(&self, _: [&Tensor; 3], _: &Tensor, _: &Tensor) -> Result<[Option<Tensor>; 3]> {
        match self.left.lock() {
            Ok(mut left) => fixed(self.name, std::mem::take(&mut *left)),
            Err(_) => bail!("{}: adjoints were lost in a panic", self.name),
        }
    }
}

fn fixed<const N: usize>(name: &str, adjoints: Vec<Option<Tensor>>) -> Result<[Option<Tensor>; N]> {
    match <[_; N]>::try_from(adjoints) {
        Ok(adjoints) => Ok(adjoints),
        Err(found) => bail!("{name}: {} adjoints, expected {N}", found.len()),
    }
}

/// The backward pass of a function with several results.
pub(crate) trait GradientOfSeveral: Send + Sync + 'static {
    /// Name for error messages.
    fn name(&self) -> &'static str;

    /// What [`Self::backward`] reads of the arguments; results it never sees.
    fn needs(&self) -> Needs {
        Needs::operands(Set::ALL)
    }

    /// The values once more, for those whose needs say that they do this.
    fn again(&self, _: &[Tensor]) -> Result<Vec<Value>> {
        bail!("{}: made once only", self.name())
    }

    /// Memory that is kept besides arguments and values.
    fn holds(&self) -> Vec<Tensor> {
        Vec::new()
    }

    /// Adjoints of all arguments in order, given those of the results: `None` for a result that the loss does not depend
    /// on, though never for all. An argument's may be `None` where none is due.
    fn backward(&self, args: &[Tensor], adjoints: Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>>;
}

/// Enters several values into the graph as a function of one to five tensors.
///
/// The function is a scalar node, and the results are nodes behind it: they leave their adjoints for it, so that it finds
/// all of them, and give it a zero so that it runs.
pub(crate) fn attach_several<G: GradientOfSeveral>(
    values: Vec<Value>,
    args: &[&Tensor],
    gradient: G,
) -> Result<Vec<Tensor>> {
    let Some(first) = args.first() else {
        bail!("{}: no arguments", gradient.name())
    };
    if tape::takes(args) {
        let results: Vec<Tensor> = values.into_iter().map(Value::variable).collect::<Result<_>>()?;
        tape::note(OfSeveral(gradient), args, &results)?;
        return Ok(results);
    }
    let name = gradient.name();
    let left: LeftByResults = Arc::new(Mutex::new(values.iter().map(|_| None).collect()));
    let scalar = Value::Tensor(Tensor::zeros((), DType::F32, first.device())?);
    let function = Function {
        left: left.clone(),
        gradient,
    };
    let function = attach_many(scalar, args, function)?;
    let result = |(index, value)| {
        let left = left.clone();
        attach1(value, &function, ResultOf { index, left, name })
    };
    values.into_iter().enumerate().map(result).collect()
}

struct OfSeveral<G>(G);

impl<G: GradientOfSeveral> Recorded for OfSeveral<G> {
    fn needs(&self) -> Needs {
        self.0.needs()
    }

    fn backward(
        &self,
        args: &[Tensor],
        _: &[Tensor],
        adjoints: Vec<Option<Tensor>>,
    ) -> Result<Vec<Option<Tensor>>> {
        self.0.backward(args, adjoints)
    }

    fn again(&self, args: &[Tensor]) -> Result<Vec<Tensor>> {
        self.0.again(args)?.into_iter().map(Value::variable).collect()
    }

    fn holds(&self) -> Vec<Tensor> {
        self.0.holds()
    }
}

/// Adjoints on their way from the nodes of results to that of the function.
type LeftByResults = Arc<Mutex<Vec<Option<Tensor>>>>;

/// The node of a function with several results.
struct Function<G> {
    left: LeftByResults,
    gradient: G,
}

impl<G: GradientOfSeveral> GradientOfMany for Function<G> {
    fn name(&self) -> &'static str {
        self.gradient.name()
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, _: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let adjoints = match self.left.lock() {
            Ok(mut left) => left.iter_mut().map(Option::take).collect(),
            Err(_) => bail!("{}: adjoints were lost in a panic", self.gradient.name()),
        };
        self.gradient.backward(args, adjoints)
    }
}

/// The node of one of several results.
struct ResultOf {
    index: usize,
    left: LeftByResults,
    name: &'static str,
}

impl Gradient<1> for ResultOf {
    fn name(&self) -> &'static str {
        self.name
    }

    fn backward(&self, [function]: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        match self.left.lock() {
            Ok(mut left) => left[self.index] = Some(grad.detach()),
            Err(_) => bail!("{}: adjoints were lost in a panic", self.name),
        }
        Ok([Some(function.detach().zeros_like()?)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, normal};

    /// `sum_i i x_i`, with i from 1.
    struct Weighted;

    impl GradientOfMany for Weighted {
        fn name(&self) -> &'static str {
            "weighted"
        }

        fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
            (1..=args.len()).map(|i| Ok(Some((grad * i as f64)?))).collect()
        }
    }

    fn weighted(args: &[&Tensor]) -> Result<Tensor> {
        let mut sum = args[0].detach();
        for (i, arg) in args.iter().enumerate().skip(1) {
            sum = (sum + (arg.detach() * (i + 1) as f64)?)?;
        }
        attach_many(Value::Tensor(sum), args, Weighted)
    }

    #[test]
    fn one_to_five_arguments() -> Result<()> {
        for count in 1..=5 {
            let inputs: Vec<Tensor> = (0..count).map(|i| normal(i, &[2, 3])).collect();
            check_gradients(&inputs, |t| weighted(&t.iter().collect::<Vec<_>>()))?;
        }
        let x = normal(1, &[2]);
        let refused = weighted(&[&x; 6]).unwrap_err().to_string();
        assert!(refused.contains("6 arguments"), "{refused}");
        Ok(())
    }

    /// An argument that is used twice, by two nodes, of which some arguments are constants.
    #[test]
    fn shared_arguments_and_constants() -> Result<()> {
        let constant = normal(7, &[2, 3]);
        check_gradients(&[normal(1, &[2, 3]), normal(2, &[2, 3])], |t| {
            let first = weighted(&[&t[0], &t[0], &constant, &t[1]])?;
            weighted(&[&constant, &constant, &constant, &first, &t[0]])
        })
    }
}
