//! A backward pass that writes gradients once.
//!
//! Candle's own pass fills a tensor with zeros and adds to it for every node that it crosses, which on a GPU costs as
//! much as the gradients themselves. While a [`Tape`] records, operators of this crate note themselves down on it, and
//! to candle their results are variables: its graph falls into the short pieces of plain tensor operations between them.
//! [`Tape::backward`] walks the operators and lets candle walk the pieces. Nothing else changes: any code may be
//! recorded, and without a tape operators enter candle's graph as usual.
//!
//! A tape keeps what gradients read and no more. An operator says which of its operands and results those are (`Needs`);
//! of the others shape and type are enough. Results of some cheap operators are not kept even then, but made again when a
//! gradient asks for them, with the same bits. Gradients do not change with any of it.
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

mod node;
#[cfg(test)]
mod tests;
mod walk;

pub(crate) use node::{Needs, Part, Recorded, Set, exactly, only, run1};

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

use candle_core::{CustomOp1, CustomOp2, CustomOp3, DType, Device, Result, Shape, Tensor, TensorId, Var};

use node::Custom;

/// What operators noted down, in the order in which they ran.
#[derive(Default)]
pub struct Tape {
    entries: Vec<Entry>,
    /// Where the results are.
    places: HashMap<TensorId, Place>,
    ghosts: Vec<Tensor>,
}

struct Entry {
    work: Work,
    needs: Needs,
    operands: Vec<Operand>,
    results: Vec<Outcome>,
    /// Operators whose gradients wait for the result of this one, on the way back.
    waiting: Vec<Waiting>,
}

/// An operator of which only those adjoints are left that read its first operand.
struct Waiting {
    node: Box<dyn Recorded>,
    operands: Vec<Operand>,
    adjoints: Vec<Option<Tensor>>,
}

enum Work {
    Operator(Box<dyn Recorded>),
    /// Work that is done again in the backward pass.
    Replay(Box<Replay>),
    /// What is done when the backward pass comes by.
    Mark(Box<Mark>),
}

type Mark = dyn FnOnce(&mut Gradients<'_>) -> Result<()>;

/// The gradients of variables that the part of the backward pass behind a mark has found, from [`on_the_way_back`].
pub struct Gradients<'a>(&'a mut walk::Adjoints);

impl Gradients<'_> {
    /// Takes that of `variable` away: what is found later begins anew.
    pub fn take(&mut self, variable: &Tensor) -> Option<Tensor> {
        self.0.take(variable.id())
    }
}

type Replay = dyn Fn() -> Result<Vec<Tensor>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    entry: usize,
    result: usize,
}

#[derive(Clone)]
enum Operand {
    /// A result on this tape, in some shape.
    Result(Place, Shape),
    /// Anything else: a variable, a constant, what has a piece of candle's graph behind it.
    Other(Tensor),
}

/// A result: to candle a variable, of which the elements are kept only if a gradient reads them.
struct Outcome {
    id: TensorId,
    shape: Shape,
    dtype: DType,
    device: Device,
    value: Option<Tensor>,
}

thread_local! {
    static RECORDING: RefCell<Option<Tape>> = const { RefCell::new(None) };
    #[cfg(test)]
    static KEEP_EVERYTHING: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
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

/// Whether a tape records and a gradient of one of `operands` may be wanted.
pub(crate) fn takes(operands: &[&Tensor]) -> bool {
    is_recording() && operands.iter().any(|operand| operand.track_op())
}

/// Notes an operator down; its `results` are variables.
pub(crate) fn note(node: impl Recorded + 'static, operands: &[&Tensor], results: &[Tensor]) -> Result<()> {
    let needs = node.needs();
    note_work(Work::Operator(Box::new(node)), needs, operands, results)
}

fn note_work(work: Work, needs: Needs, operands: &[&Tensor], results: &[Tensor]) -> Result<()> {
    RECORDING.with_borrow_mut(|tape| match tape {
        Some(tape) => tape.enter(work, needs, operands, results),
        None => Ok(()),
    })
}

/// Has `work` done when the backward pass comes to this place: after the adjoints of all operators that run from here on, and
/// before those of the operators so far. Only the gradient of a weight by which something is multiplied that the last operator
/// before this place made may come after it. Without a recording tape nothing is done.
///
/// # Errors
/// None at present.
pub fn on_the_way_back(work: impl FnOnce(&mut Gradients<'_>) -> Result<()> + 'static) -> Result<()> {
    if !is_recording() {
        return Ok(());
    }
    note_work(Work::Mark(Box::new(work)), Needs::operands(Set::NONE), &[], &[])
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
    note_work(
        Work::Replay(Box::new(work)),
        Needs::operands(Set::NONE),
        &[],
        &results,
    )?;
    Ok(results)
}

/// Applies `op`: on the tape where one records and a gradient may be wanted, else in candle's graph.
pub(crate) fn apply1<C>(x: &Tensor, op: C, needs: Needs) -> Result<Tensor>
where
    C: CustomOp1 + Send + Sync + 'static,
{
    if !takes(&[x]) {
        return x.apply_op1(op);
    }
    let node = Custom::<C, 1> { op, needs };
    let result = node.run([x])?;
    note(node, &[x], std::slice::from_ref(&result))?;
    Ok(result)
}

/// [`apply1`] for two operands.
pub(crate) fn apply2<C>(x: &Tensor, y: &Tensor, op: C, needs: Needs) -> Result<Tensor>
where
    C: CustomOp2 + Send + Sync + 'static,
{
    if !takes(&[x, y]) {
        return x.apply_op2(y, op);
    }
    let node = Custom::<C, 2> { op, needs };
    let result = node.run([x, y])?;
    note(node, &[x, y], std::slice::from_ref(&result))?;
    Ok(result)
}

/// [`apply1`] for three operands.
pub(crate) fn apply3<C>(x: &Tensor, y: &Tensor, z: &Tensor, op: C, needs: Needs) -> Result<Tensor>
where
    C: CustomOp3 + Send + Sync + 'static,
{
    if !takes(&[x, y, z]) {
        return x.apply_op3(y, z, op);
    }
    let node = Custom::<C, 3> { op, needs };
    let result = node.run([x, y, z])?;
    note(node, &[x, y, z], std::slice::from_ref(&result))?;
    Ok(result)
}

impl Tape {
    fn enter(&mut self, work: Work, needs: Needs, operands: &[&Tensor], results: &[Tensor]) -> Result<()> {
        #[cfg(test)]
        let needs = if KEEP_EVERYTHING.get() {
            Needs::EVERYTHING
        } else {
            needs
        };
        let read = if needs.again { Set::ALL } else { needs.operands };
        let operands = operands
            .iter()
            .enumerate()
            .map(|(index, operand)| self.operand(operand, read.contains(index)))
            .collect::<Result<_>>()?;
        let entry = self.entries.len();
        let outcome = |(result, tensor): (usize, &Tensor)| {
            self.places.insert(tensor.id(), Place { entry, result });
            Outcome {
                id: tensor.id(),
                shape: tensor.shape().clone(),
                dtype: tensor.dtype(),
                device: tensor.device().clone(),
                value: (needs.results.contains(result) && !needs.again).then(|| tensor.clone()),
            }
        };
        let results = results.iter().enumerate().map(outcome).collect();
        self.entries.push(Entry {
            work,
            needs,
            operands,
            results,
            waiting: Vec::new(),
        });
        Ok(())
    }

    /// What to keep of an operand of which the elements will be `read`.
    fn operand(&mut self, operand: &Tensor, read: bool) -> Result<Operand> {
        if let Some((place, result)) = self.found(operand) {
            let entry = &mut self.entries[place.entry];
            if read && !entry.needs.again {
                entry.results[place.result]
                    .value
                    .get_or_insert_with(|| result.clone());
            }
            return Ok(Operand::Result(place, operand.shape().clone()));
        }
        Ok(Operand::Other(if read || operand.track_op() {
            operand.clone()
        } else {
            self.ghost(operand.shape(), operand.dtype(), operand.device())?
                .detach()
        }))
    }

    /// The result that `operand` is, perhaps in another shape: candle's graph need not be asked then.
    fn found<'a>(&self, operand: &'a Tensor) -> Option<(Place, &'a Tensor)> {
        if operand.is_variable() {
            return self.places.get(&operand.id()).map(|&place| (place, operand));
        }
        let dense = operand.is_contiguous() && operand.layout().start_offset() == 0;
        if !operand.track_op() || !dense {
            return None;
        }
        // Both are alive: they share memory only if one is a view of the other.
        operand.sorted_nodes().into_iter().find_map(|node| {
            let place = *self.places.get(&node.id())?;
            let same = memory(node) == memory(operand) && node.elem_count() == operand.elem_count();
            same.then_some((place, node))
        })
    }

    /// A tracked tensor of which only shape, type and device may be asked: one element, not a number, behind all.
    fn ghost(&mut self, shape: &Shape, dtype: DType, device: &Device) -> Result<Tensor> {
        let fits = |ghost: &&Tensor| ghost.dtype() == dtype && ghost.device().same_device(device);
        if let Some(ghost) = self.ghosts.iter().find(fits) {
            return ghost.broadcast_as(shape);
        }
        let ghost = Tensor::full(f32::NAN, (), device)?.to_dtype(dtype)?;
        let ghost = Var::from_tensor(&ghost)?.into_inner();
        self.ghosts.push(ghost.clone());
        ghost.broadcast_as(shape)
    }

    /// Bytes that it holds beside the variables from which the recorded work began, each memory once. What replays
    /// capture does not count.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Result, Tensor, Var};
    /// use fulgur_kernels::{linear::linear, tape};
    /// # fn main() -> Result<()> {
    /// let weight = Var::ones((2, 3), DType::F32, &Device::Cpu)?;
    /// let x = Tensor::ones((4, 3), DType::F32, &Device::Cpu)?;
    /// let (_y, tape) = tape::record(|| linear(&x, &weight, None));
    /// // The gradient of the weight reads x, and none reads y.
    /// assert_eq!(tape.kept_bytes(), 4 * 3 * 4);
    /// # Ok(())
    /// # }
    /// ```
    pub fn kept_bytes(&self) -> usize {
        let (mut kept, mut given) = (HashMap::new(), HashSet::new());
        let mut see = |tensor: &Tensor| {
            let bytes = kept.entry(memory(tensor)).or_insert(0);
            *bytes = reach(tensor).max(*bytes);
        };
        for entry in &self.entries {
            entry
                .results
                .iter()
                .filter_map(|result| result.value.as_ref())
                .for_each(&mut see);
            if let Work::Operator(node) = &entry.work {
                node.holds().iter().for_each(&mut see);
            }
            for operand in &entry.operands {
                let Operand::Other(operand) = operand else {
                    continue;
                };
                for node in operand.sorted_nodes().into_iter().chain([operand]) {
                    if node.is_variable() && !self.places.contains_key(&node.id()) {
                        given.insert(memory(node));
                    } else {
                        see(node);
                    }
                }
            }
        }
        let own = kept.iter().filter(|(memory, _)| !given.contains(memory));
        own.map(|(_, bytes)| bytes).sum()
    }
}

/// Where the elements of a tensor are: equal for living tensors that share them.
fn memory(tensor: &Tensor) -> usize {
    std::ptr::from_ref(&*tensor.storage_and_layout().0) as usize
}

/// Bytes of its memory up to its last element.
fn reach(tensor: &Tensor) -> usize {
    let layout = tensor.layout();
    let steps = layout.dims().iter().zip(layout.stride());
    let last: usize = steps.map(|(size, stride)| size.saturating_sub(1) * stride).sum();
    (layout.start_offset() + last + 1) * tensor.dtype().size_in_bytes()
}
