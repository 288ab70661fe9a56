//! Functions of up to five tensors.

use candle_core::{DType, Result, Tensor, bail};
use std::sync::{Arc, Mutex};

use super::{Gradient, Value, attach1, attach2, attach3, fixed, record_one};
use crate::tape::{self, Needs, Recorded, exactly, only};

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
