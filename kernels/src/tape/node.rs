//! Operators as the tape keeps them.

use candle_core::op::BackpropOp;
use candle_core::{CustomOp1, CustomOp2, CustomOp3, Result, Storage, Tensor, bail};

/// Some of the operands or results of an operator, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Set(u32);

impl Set {
    pub(crate) const NONE: Self = Self(0);
    pub(crate) const ALL: Self = Self(u32::MAX);

    /// These numbers, below 32.
    pub(crate) const fn of(members: &[usize]) -> Self {
        let (mut bits, mut i) = (0, 0);
        while i < members.len() {
            bits |= 1 << members[i];
            i += 1;
        }
        Self(bits)
    }

    pub(super) fn contains(self, member: usize) -> bool {
        self.0 >> member & 1 == 1
    }
}

/// What a gradient reads the elements of. Of everything else it sees shape, type, device and whether a gradient is due: the
/// tape then keeps no memory for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Needs {
    pub(super) operands: Set,
    pub(super) results: Set,
    /// Whether results are forgotten, and made again from the operands for gradients that read them: the same bits. For
    /// operators that are cheap beside the memory of their results.
    pub(super) again: bool,
    /// Whether the backward pass can make results again on its way ([`Recorded::along`]).
    pub(super) along: bool,
    /// Whether the first operand is read by adjoints of the others only, and these can be made later on
    /// ([`Recorded::part`]).
    pub(super) late: bool,
}

impl Needs {
    pub(crate) const EVERYTHING: Self = Self {
        operands: Set::ALL,
        results: Set::ALL,
        again: false,
        along: false,
        late: false,
    };

    pub(crate) const fn operands(operands: Set) -> Self {
        Self {
            operands,
            results: Set::NONE,
            ..Self::EVERYTHING
        }
    }

    pub(crate) const fn made_again(self, again: bool) -> Self {
        Self { again, ..self }
    }

    /// [`Self::made_again`], at best on the way of the backward pass.
    pub(crate) const fn made_along(self) -> Self {
        Self {
            again: true,
            along: true,
            ..self
        }
    }

    pub(crate) const fn first_read_late(self) -> Self {
        Self { late: true, ..self }
    }
}

/// Which adjoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Those that do not read the first operand.
    Sooner,
    /// Those that do.
    Later,
}

/// An operator with its backward pass.
pub(crate) trait Recorded {
    fn needs(&self) -> Needs;

    /// Adjoints of the operands in order, given those of the results; at least one of these is there.
    fn backward(
        &self,
        operands: &[Tensor],
        results: &[Tensor],
        adjoints: Vec<Option<Tensor>>,
    ) -> Result<Vec<Option<Tensor>>>;

    /// The results, once more.
    fn again(&self, operands: &[Tensor]) -> Result<Vec<Tensor>>;

    /// [`Self::backward`] and [`Self::again`] in one pass.
    fn along(
        &self,
        _operands: &[Tensor],
        _adjoints: Vec<Option<Tensor>>,
    ) -> Result<(Vec<Option<Tensor>>, Vec<Tensor>)> {
        bail!("tape: an operator does not make its results on the way back")
    }

    /// Some of the adjoints that [`Self::backward`] gives, and `None` for the others.
    fn part(
        &self,
        _part: Part,
        _operands: &[Tensor],
        _adjoints: Vec<Option<Tensor>>,
    ) -> Result<Vec<Option<Tensor>>> {
        bail!("tape: an operator does not make its adjoints one by one")
    }

    /// What it holds besides operands and results.
    fn holds(&self) -> Vec<Tensor>;
}

/// `tensors` by number.
pub(crate) fn exactly<'a, const N: usize>(name: &str, tensors: &'a [Tensor]) -> Result<[&'a Tensor; N]> {
    match <[_; N]>::try_from(tensors.iter().collect::<Vec<_>>()) {
        Ok(tensors) => Ok(tensors),
        Err(found) => bail!("{name}: {} tensors, expected {N}", found.len()),
    }
}

/// The only adjoint.
pub(crate) fn only(name: &str, adjoints: Vec<Option<Tensor>>) -> Result<Tensor> {
    match adjoints.into_iter().next().flatten() {
        Some(adjoint) => Ok(adjoint),
        None => bail!("{name}: no adjoint"),
    }
}

/// The forward pass of `$op` on `$x`, .., as a variable.
macro_rules! run {
    ($op:expr, $first:expr $(, $x:expr)*) => {{
        let (storage, layout) = $first.storage_and_layout();
        let (storage, shape) = match &*storage {
            Storage::Cpu(storage) => {
                let (storage, shape) = $op.cpu_fwd(storage, layout $(, match &*$x.storage_and_layout().0 {
                    Storage::Cpu(storage) => storage,
                    _ => return Err(mixed($op.name())),
                }, $x.layout())*)?;
                (Storage::Cpu(storage), shape)
            }
            Storage::Cuda(storage) => {
                let (storage, shape) = $op.cuda_fwd(storage, layout $(, match &*$x.storage_and_layout().0 {
                    Storage::Cuda(storage) => storage,
                    _ => return Err(mixed($op.name())),
                }, $x.layout())*)?;
                (Storage::Cuda(storage), shape)
            }
            Storage::Metal(storage) => {
                let (storage, shape) = $op.metal_fwd(storage, layout $(, match &*$x.storage_and_layout().0 {
                    Storage::Metal(storage) => storage,
                    _ => return Err(mixed($op.name())),
                }, $x.layout())*)?;
                (Storage::Metal(storage), shape)
            }
        };
        Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), true))
    }};
}

fn mixed(op: &str) -> candle_core::Error {
    candle_core::Error::Msg(format!("{op}: operands lie on different devices"))
}

/// The result of an operator of one operand, as a variable.
pub(crate) fn run1(op: &impl CustomOp1, x: &Tensor) -> Result<Tensor> {
    run!(op, x)
}

/// A custom operator of candle.
pub(super) struct Custom<C, const N: usize> {
    pub(super) op: C,
    pub(super) needs: Needs,
}

impl<C: CustomOp1> Custom<C, 1> {
    pub(super) fn run(&self, [x]: [&Tensor; 1]) -> Result<Tensor> {
        run1(&self.op, x)
    }
}

impl<C: CustomOp2> Custom<C, 2> {
    pub(super) fn run(&self, [x, y]: [&Tensor; 2]) -> Result<Tensor> {
        run!(self.op, x, y)
    }
}

impl<C: CustomOp3> Custom<C, 3> {
    pub(super) fn run(&self, [x, y, z]: [&Tensor; 3]) -> Result<Tensor> {
        run!(self.op, x, y, z)
    }
}

/// [`Recorded`] of a custom operator; `$adjoints` are those of its operands.
macro_rules! recorded {
    ($count:literal $trait:ident |$op:ident, [$($x:ident),+], $res:ident, $grad:ident| $adjoints:expr) => {
        impl<C: $trait> Recorded for Custom<C, $count> {
            fn needs(&self) -> Needs {
                self.needs
            }

            fn backward(
                &self,
                operands: &[Tensor],
                results: &[Tensor],
                adjoints: Vec<Option<Tensor>>,
            ) -> Result<Vec<Option<Tensor>>> {
                let $op = &self.op;
                let [$($x),+] = exactly::<$count>($op.name(), operands)?;
                let [$res] = exactly::<1>($op.name(), results)?;
                let $grad = &only($op.name(), adjoints)?;
                Ok($adjoints)
            }

            fn again(&self, operands: &[Tensor]) -> Result<Vec<Tensor>> {
                Ok(vec![self.run(exactly(self.op.name(), operands)?)?])
            }

            fn holds(&self) -> Vec<Tensor> {
                Vec::new()
            }
        }
    };
}

recorded!(1 CustomOp1 |op, [x], res, grad| vec![op.bwd(x, res, grad)?]);
recorded!(2 CustomOp2 |op, [x, y], res, grad| <[_; 2]>::from(op.bwd(x, y, res, grad)?).into());
recorded!(3 CustomOp3 |op, [x, y, z], res, grad| <[_; 3]>::from(op.bwd(x, y, z, res, grad)?).into());
