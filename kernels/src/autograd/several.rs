//! Functions with several results.

use candle_core::{DType, Result, Tensor, bail};
use std::sync::{Arc, Mutex};

use super::{Gradient, GradientOfMany, Value, attach_many, attach1};
use crate::tape::{self, Needs, Recorded, Set};

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
