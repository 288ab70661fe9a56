//! A backward pass that writes gradients once.
//!
//! Candle's own pass fills a tensor with zeros and adds to it for every node that it crosses, which on a GPU costs as
//! much as the gradients themselves. While a [`Tape`] records, operators of this crate note themselves down on it, and
//! to candle their results are variables: its graph falls into the short pieces of plain tensor operations between them.
//! [`Tape::backward`] walks the operators and lets candle walk the pieces. Nothing else changes: any code may be
//! recorded, and without a tape operators enter candle's graph as usual.
//!
//! ```
//! # use candle_core::{Device, Result, Tensor, Var};
//! use fulgur_kernels::{linear::linear, tape};
//! # fn main() -> Result<()> {
//! let weight = Var::ones((2, 3), candle_core::DType::F32, &Device::Cpu)?;
//! let x = Tensor::ones((4, 3), candle_core::DType::F32, &Device::Cpu)?;
//! let (loss, tape) = tape::record(|| linear(&x, &weight, None)?.sqr()?.sum_all());
//! let gradients = tape.backward(&loss?)?;
//! assert_eq!(gradients.get(&weight).unwrap().to_vec2::<f32>()?, [[24.0; 3]; 2]);
//! # Ok(())
//! # }
//! ```

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

use candle_core::backprop::GradStore;
use candle_core::op::BackpropOp;
use candle_core::{CustomOp1, CustomOp2, CustomOp3, DType, Result, Storage, Tensor, TensorId, Var, bail};

use crate::autograd::{Gradient, Value, attach1, attach2};

/// What operators noted down, in the order in which they ran.
#[derive(Default)]
pub struct Tape {
    entries: Vec<Entry>,
}

struct Entry {
    step: Step,
    /// Variables in candle's eyes; one, but for a replay.
    results: Vec<Tensor>,
}

enum Step {
    One(Box<dyn CustomOp1>, [Tensor; 1]),
    Two(Box<dyn CustomOp2>, [Tensor; 2]),
    Three(Box<dyn CustomOp3>, [Tensor; 3]),
    /// Work that is done again in the backward pass.
    Replay(Box<Replay>),
}

type Replay = dyn Fn() -> Result<Vec<Tensor>>;

thread_local! {
    static RECORDING: RefCell<Option<Tape>> = const { RefCell::new(None) };
}

/// Runs `work` while the operators that it calls on this thread note themselves down; the tape belongs to its results.
pub fn record<T>(work: impl FnOnce() -> T) -> (T, Tape) {
    /// Puts back what was there before, whatever `work` does.
    struct Restore(Option<Tape>);
    impl Drop for Restore {
        fn drop(&mut self) {
            RECORDING.set(self.0.take());
        }
    }
    let restore = Restore(RECORDING.replace(Some(Tape::default())));
    let result = work();
    let tape = RECORDING.take().unwrap_or_default();
    drop(restore);
    (result, tape)
}

fn is_recording() -> bool {
    RECORDING.with_borrow(Option::is_some)
}

fn note(step: Step, results: Vec<Tensor>) {
    RECORDING.with_borrow_mut(|tape| {
        if let Some(tape) = tape {
            tape.entries.push(Entry { step, results });
        }
    });
}

/// Runs `work` and forgets what lies between its operands and its results: the backward pass runs it again. `work` must give
/// the same each time. Whatever it captures may be tracked, and gets its gradients.
///
/// Saves memory for time: a block of a network keeps its results only. Without a recording tape it is just `work`.
///
/// # Errors
/// Those of `work`.
pub fn recompute(work: impl Fn() -> Result<Vec<Tensor>> + 'static) -> Result<Vec<Tensor>> {
    if !is_recording() {
        return work();
    }
    let (made, forgotten) = record(&work);
    drop(forgotten);
    // Results of operators are variables already; of others there are copies, which are cut off from their graph.
    let results: Vec<Tensor> = made?
        .iter()
        .map(|result| Ok(Var::from_tensor(result)?.into_inner()))
        .collect::<Result<_>>()?;
    note(Step::Replay(Box::new(work)), results.clone());
    Ok(results)
}

/// The forward pass of `$op` on `$x`, .., as a variable.
macro_rules! run {
    ($op:ident, $first:expr $(, $x:expr)*) => {{
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
        Tensor::from_storage(storage, shape, BackpropOp::none(), true)
    }};
}

fn mixed(op: &str) -> candle_core::Error {
    candle_core::Error::Msg(format!("{op}: operands lie on different devices"))
}

/// Applies `op`: on the tape where one records and a gradient may be wanted, else in candle's graph.
pub(crate) fn apply1<C: CustomOp1 + Send + Sync + 'static>(x: &Tensor, op: C) -> Result<Tensor> {
    if !is_recording() || !x.track_op() {
        return x.apply_op1(op);
    }
    let result = run!(op, x);
    note(Step::One(Box::new(op), [x.clone()]), vec![result.clone()]);
    Ok(result)
}

/// [`apply1`] for two operands.
pub(crate) fn apply2<C: CustomOp2 + Send + Sync + 'static>(x: &Tensor, y: &Tensor, op: C) -> Result<Tensor> {
    if !is_recording() || !(x.track_op() || y.track_op()) {
        return x.apply_op2(y, op);
    }
    let result = run!(op, x, y);
    note(
        Step::Two(Box::new(op), [x.clone(), y.clone()]),
        vec![result.clone()],
    );
    Ok(result)
}

/// [`apply1`] for three operands.
pub(crate) fn apply3<C: CustomOp3 + Send + Sync + 'static>(
    x: &Tensor,
    y: &Tensor,
    z: &Tensor,
    op: C,
) -> Result<Tensor> {
    if !is_recording() || !(x.track_op() || y.track_op() || z.track_op()) {
        return x.apply_op3(y, z, op);
    }
    let result = run!(op, x, y, z);
    note(
        Step::Three(Box::new(op), [x.clone(), y.clone(), z.clone()]),
        vec![result.clone()],
    );
    Ok(result)
}

impl Step {
    /// Operands and their adjoints, but for a replay.
    fn adjoints(&self, result: &Tensor, grad: &Tensor) -> Result<Vec<(&Tensor, Option<Tensor>)>> {
        Ok(match self {
            Self::One(op, [x]) => vec![(x, op.bwd(x, result, grad)?)],
            Self::Two(op, [x, y]) => {
                let (dx, dy) = op.bwd(x, y, result, grad)?;
                vec![(x, dx), (y, dy)]
            }
            Self::Three(op, [x, y, z]) => {
                let (dx, dy, dz) = op.bwd(x, y, z, result, grad)?;
                vec![(x, dx), (y, dy), (z, dz)]
            }
            Self::Replay(_) => Vec::new(),
        })
    }
}

impl Tape {
    /// Gradients of `loss`, which was computed from what was recorded, with respect to all variables. Memory of the
    /// forward pass is freed on the way.
    ///
    /// # Errors
    /// A gradient does not exist, or a tensor operation fails.
    pub fn backward(self, loss: &Tensor) -> Result<GradStore> {
        self.walk(loss.backward()?, Pieces::default())
    }

    /// Gradients of `sum(result * adjoint)`: [`Self::backward`] from a result of an operator on, without the sum.
    ///
    /// # Errors
    /// As [`Self::backward`], and an adjoint of another shape or type than the result.
    pub fn backward_from(self, result: &Tensor, adjoint: &Tensor) -> Result<GradStore> {
        if result.shape() != adjoint.shape() || result.dtype() != adjoint.dtype() {
            bail!(
                "tape: the adjoint is {:?} of {:?}, expected {:?} of {:?} like the result",
                adjoint.dims(),
                adjoint.dtype(),
                result.dims(),
                result.dtype()
            );
        }
        self.backward_from_all(&[(result, adjoint.clone())])
    }

    fn backward_from_all(self, ends: &[(&Tensor, Tensor)]) -> Result<GradStore> {
        let Some((first, _)) = ends.first() else {
            bail!("tape: no result to start from")
        };
        // Candle makes gradient stores only by backward passes.
        let mut store = Tensor::zeros((), DType::F32, first.device())?.backward()?;
        let mut pieces = Pieces::default();
        for (end, adjoint) in ends {
            if end.is_variable() {
                add(&mut store, end, adjoint.clone())?;
            } else {
                pieces.push(end, adjoint.clone())?;
            }
        }
        self.walk(store, pieces)
    }

    fn walk(mut self, mut store: GradStore, mut pieces: Pieces) -> Result<GradStore> {
        let results: HashMap<usize, (usize, usize)> = self
            .entries
            .iter()
            .enumerate()
            .flat_map(|(index, entry)| {
                let results = entry.results.iter().enumerate();
                results.map(move |(place, result)| (memory(result), (index, place)))
            })
            .collect();
        while let Some(Entry { step, results: own }) = self.entries.pop() {
            for result in &own {
                pieces.walk_if_they_lead_to(result, &mut store)?;
            }
            if let Step::Replay(work) = &step {
                replay(work, &own, &mut store)?;
                continue;
            }
            let [result] = own.as_slice() else { continue };
            // A result that the loss does not depend on.
            let Some(grad) = store.remove(result) else {
                continue;
            };
            for (operand, adjoint) in step.adjoints(result, &grad)? {
                let Some(adjoint) = adjoint else { continue };
                let adjoint = adjoint.detach().contiguous()?;
                if operand.is_variable() {
                    add(&mut store, operand, adjoint)?;
                } else if let Some(whole) = self.reshaped(&results, operand) {
                    add(&mut store, whole, adjoint.reshape(whole.shape())?)?;
                } else if operand.track_op() {
                    pieces.push(operand, adjoint)?;
                }
            }
        }
        pieces.walk(&mut store)?;
        Ok(store)
    }

    /// The result of which `operand` is another shape: candle's graph need not be asked then.
    fn reshaped(&self, results: &HashMap<usize, (usize, usize)>, operand: &Tensor) -> Option<&Tensor> {
        let &(index, place) = results.get(&memory(operand))?;
        let whole = self.entries.get(index)?.results.get(place)?;
        let same = operand.track_op()
            && operand.is_contiguous()
            && operand.layout().start_offset() == 0
            && operand.elem_count() == whole.elem_count();
        same.then_some(whole)
    }
}

/// Does `work` again, whose results had the adjoints in `store`, and adds the gradients of all that it depends on.
fn replay(work: &Replay, results: &[Tensor], store: &mut GradStore) -> Result<()> {
    let adjoints: Vec<Option<Tensor>> = results.iter().map(|result| store.remove(result)).collect();
    if adjoints.iter().all(Option::is_none) {
        return Ok(());
    }
    let (again, tape) = record(work);
    let again = again?;
    let ends: Vec<(&Tensor, Tensor)> = again
        .iter()
        .zip(adjoints)
        .filter_map(|(end, adjoint)| adjoint.map(|adjoint| (end, adjoint)))
        .filter(|(end, _)| end.track_op())
        .collect();
    if ends.is_empty() {
        return Ok(());
    }
    merge(store, &tape.backward_from_all(&ends)?)
}

/// Adds all gradients of `found`.
fn merge(store: &mut GradStore, found: &GradStore) -> Result<()> {
    for &id in found.get_ids() {
        let Some(gradient) = found.get_id(id) else {
            continue;
        };
        let sum = match store.get_id(id) {
            Some(sum) => (sum + gradient)?,
            None => gradient.clone(),
        };
        store.insert_id(id, sum);
    }
    Ok(())
}

/// Ends of pieces of candle's graph with their adjoints, until a gradient is needed that they lead to: pieces that share
/// nodes are walked together.
#[derive(Default)]
struct Pieces {
    /// A scalar that depends on all ends.
    root: Option<Tensor>,
    /// The variables where the pieces begin.
    leaves: HashSet<TensorId>,
}

impl Pieces {
    fn push(&mut self, end: &Tensor, adjoint: Tensor) -> Result<()> {
        let leaves = end.sorted_nodes().into_iter().filter(|node| node.is_variable());
        self.leaves.extend(leaves.map(Tensor::id));
        let value = Value::Tensor(Tensor::zeros((), DType::F32, end.device())?);
        self.root = Some(match &self.root {
            None => attach1(value, end, Seed(adjoint))?,
            Some(root) => attach2(value, [end, root], Seed(adjoint))?,
        });
        Ok(())
    }

    fn walk_if_they_lead_to(&mut self, result: &Tensor, store: &mut GradStore) -> Result<()> {
        if self.leaves.contains(&result.id()) {
            self.walk(store)?;
        }
        Ok(())
    }

    fn walk(&mut self, store: &mut GradStore) -> Result<()> {
        self.leaves.clear();
        let Some(root) = self.root.take() else {
            return Ok(());
        };
        merge(store, &root.backward()?)
    }
}

/// Sets the adjoint of the end of a piece, and passes on to the other pieces.
struct Seed(Tensor);

impl Gradient<1> for Seed {
    fn name(&self) -> &'static str {
        "tape"
    }

    fn backward(&self, _: [&Tensor; 1], _: &Tensor, _: &Tensor) -> Result<[Option<Tensor>; 1]> {
        Ok([Some(self.0.clone())])
    }
}

impl Gradient<2> for Seed {
    fn name(&self) -> &'static str {
        "tape"
    }

    fn backward(&self, _: [&Tensor; 2], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        Ok([Some(self.0.clone()), Some(grad.clone())])
    }
}

/// Where the elements of a tensor are: equal for tensors that share them.
fn memory(tensor: &Tensor) -> usize {
    std::ptr::from_ref(&*tensor.storage_and_layout().0) as usize
}

fn add(store: &mut GradStore, tensor: &Tensor, gradient: Tensor) -> Result<()> {
    let sum = match store.remove(tensor) {
        Some(sum) => (sum + gradient)?,
        None => gradient,
    };
    store.insert(tensor, sum);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::glu::swiglu;
    use crate::linear::linear;
    use crate::norm::rms_norm;
    use crate::residual::add_branch;
    use crate::testing::{normal, relative_rms, values};
    use candle_core::Var;

    /// Two residual branches with shared weights, views, a result that is used twice, and plain operations between.
    fn network(x: &Tensor, weights: &[Tensor]) -> Result<Tensor> {
        let mut x = x.clone();
        for _ in 0..2 {
            let normed = rms_norm(&x, Some(&weights[2]), 1e-6)?;
            let folded = normed.reshape((2, 6, 8))?;
            let hidden = swiglu(&linear(&folded, &weights[0], None)?)?;
            let turned = hidden.transpose(0, 1)?.contiguous()?.tanh()?.transpose(0, 1)?;
            let branch = linear(&turned, &weights[1], Some(&weights[2]))?.reshape(x.shape())?;
            x = add_branch(&x, &(branch + &normed)?, None)?;
        }
        x.sqr()?.mean_all()
    }

    fn inputs() -> (Tensor, Vec<Var>) {
        let var = |seed: u64, shape: &[usize]| Var::from_tensor(&normal(seed, shape)).unwrap();
        (
            normal(1, &[3, 4, 8]),
            vec![var(2, &[10, 8]), var(3, &[8, 5]), var(4, &[8]), var(5, &[3, 3])],
        )
    }

    #[test]
    fn a_given_adjoint_is_that_of_a_weighted_sum() -> Result<()> {
        let (x, vars) = inputs();
        let weights = normal(9, &[3, 4, 8]);
        for turned in [false, true] {
            // The result of an operator, and one that candle's graph lies behind.
            let run = || -> Result<Tensor> {
                let y = rms_norm(&x, Some(&vars[2]), 1e-6)?;
                if turned { y.neg() } else { Ok(y) }
            };
            let expected = (run()? * &weights)?.sum_all()?.backward()?;
            let (y, tape) = record(run);
            let y = y?;
            let found = tape.backward_from(&y, &weights)?;
            let [found, expected] = [&found, &expected].map(|store| values(store.get(&vars[2]).unwrap()));
            assert!(relative_rms(&found, &expected) < 1e-13);
            let (_, tape) = record(run);
            let refused = tape.backward_from(&y, &x.t()?).unwrap_err().to_string();
            assert!(refused.contains("expected [3, 4, 8]"), "{refused}");
        }
        Ok(())
    }

    #[test]
    fn gradients_are_those_of_the_graph() {
        let (x, vars) = inputs();
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let expected = network(&x, &tensors).unwrap().backward().unwrap();
        let (loss, tape) = record(|| network(&x, &tensors));
        assert!(tape.entries.len() >= 10);
        let found = tape.backward(&loss.unwrap()).unwrap();
        for var in &vars[..3] {
            let (found, expected) = (
                values(found.get(var).unwrap()),
                values(expected.get(var).unwrap()),
            );
            assert!(relative_rms(&found, &expected) < 1e-14);
        }
        assert!(found.get(&vars[3]).is_none());
        // Nothing is left but the gradients of the weights.
        assert_eq!(found.get_ids().count(), 3);
    }

    /// A block of the network twice, as it is and forgotten; both of its results go on.
    #[test]
    fn what_is_recomputed_has_the_same_gradients() -> Result<()> {
        let (x, vars) = inputs();
        let weights: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let block = |x: &Tensor, scale: &Tensor, weights: &[Tensor]| -> Result<Vec<Tensor>> {
            let normed = rms_norm(x, Some(&weights[2]), 1e-6)?;
            let branch = linear(&swiglu(&linear(&normed, &weights[0], None)?)?, &weights[1], None)?;
            // One result of an operator, one of candle's graph, from a scale that lies outside.
            Ok(vec![add_branch(x, &branch, None)?, branch.broadcast_mul(scale)?])
        };
        let run = |forget: bool| -> Result<Vec<Vec<f64>>> {
            let (loss, tape) = record(|| -> Result<Tensor> {
                let mut x = linear(
                    &x,
                    &weights[3].repeat((3, 3))?.narrow(0, 0, 8)?.narrow(1, 0, 8)?,
                    None,
                )?;
                let scale = weights[2].tanh()?;
                for _ in 0..2 {
                    let (inner, outer) = ((x.clone(), scale.clone()), weights.clone());
                    let results = if forget {
                        recompute(move || block(&inner.0, &inner.1, &outer))?
                    } else {
                        block(&x, &scale, &weights)?
                    };
                    x = (&results[0] + &results[1])?;
                }
                x.sqr()?.mean_all()
            });
            if forget {
                assert_eq!(tape.entries.len(), 3);
            }
            let loss = loss?;
            let found = tape.backward(&loss)?;
            let gradients = vars.iter().map(|var| values(found.get(var).unwrap()));
            Ok([values(&loss)].into_iter().chain(gradients).collect())
        };
        for (forgotten, kept) in run(true)?.iter().zip(&run(false)?) {
            assert!(relative_rms(forgotten, kept) < 1e-14);
        }
        Ok(())
    }

    #[test]
    fn records_nest_and_end_with_their_work() {
        let (x, vars) = inputs();
        let map = |x: &Tensor| linear(x, vars[0].as_tensor(), None);
        let (inner, outer) = record(|| {
            map(&x).unwrap();
            record(|| map(&x).unwrap()).1
        });
        assert_eq!((inner.entries.len(), outer.entries.len()), (1, 1));
        let caught = std::panic::catch_unwind(|| record(|| panic!("on purpose")));
        assert!(caught.is_err() && !is_recording());
        // Without gradients there is nothing to note down.
        let weight = vars[0].as_detached_tensor();
        let (y, tape) = record(|| linear(&x, &weight, None).unwrap());
        assert!(tape.entries.is_empty() && !y.track_op());
    }
}
