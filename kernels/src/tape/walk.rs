//! The way back over a tape.

use std::collections::{HashMap, HashSet};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, TensorId, bail};

use super::{
    Entry, Gradients, Needs, Operand, Outcome, Part, Place, Recorded, Replay, Set, Tape, Waiting, Work,
    record,
};
use crate::autograd::{Gradient, Value, attach1, attach2};

impl Tape {
    /// Gradients of `loss`, which was computed from what was recorded, with respect to all variables. Memory of the
    /// forward pass is freed on the way.
    ///
    /// # Errors
    /// A gradient does not exist, or a tensor operation fails.
    pub fn backward(self, loss: &Tensor) -> Result<GradStore> {
        let mut adjoints = Adjoints::default();
        adjoints.merge(&loss.backward()?)?;
        self.walk(adjoints, Pieces::default())?.into_store()
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
        self.backward_from_all(&[(result, adjoint.clone())])?.into_store()
    }

    fn backward_from_all(self, ends: &[(&Tensor, Tensor)]) -> Result<Adjoints> {
        let (mut adjoints, mut pieces) = (Adjoints::default(), Pieces::default());
        for (end, adjoint) in ends {
            if end.is_variable() {
                adjoints.add(end.id(), adjoint.clone())?;
            } else {
                pieces.push(end, adjoint.clone())?;
            }
        }
        self.walk(adjoints, pieces)
    }

    fn walk(mut self, mut adjoints: Adjoints, mut pieces: Pieces) -> Result<Adjoints> {
        while let Some(entry) = self.entries.last() {
            let ids: Vec<TensorId> = entry.results.iter().map(|result| result.id).collect();
            for &id in &ids {
                pieces.walk_if_they_lead_to(id, &mut adjoints)?;
            }
            let own: Vec<Option<Tensor>> = ids.iter().map(|&id| adjoints.take(id)).collect();
            if let Work::Mark(_) = entry.work {
                // What is done may take away what pieces that wait read, or the gradients that they lead to.
                pieces.walk(&mut adjoints)?;
                if let Some(Entry {
                    work: Work::Mark(work),
                    ..
                }) = self.entries.pop()
                {
                    work(&mut Gradients(&mut adjoints))?;
                }
                continue;
            }
            // Where the loss depends on no result, nothing is due.
            if own.iter().all(Option::is_none) && entry.waiting.is_empty() {
                self.entries.pop();
                continue;
            }
            let results = self.last_results()?;
            let Some(entry) = self.entries.pop() else { break };
            match entry.work {
                Work::Replay(work) => replay(&work, own, &mut adjoints)?,
                Work::Mark(_) => bail!("tape: a mark has no results"),
                Work::Operator(node) => match self.worth_waiting(entry.needs, &entry.operands) {
                    Some(place) if entry.waiting.is_empty() => {
                        let operands = self.gather(&entry.operands, Set::NONE)?;
                        let found = node.part(Part::Sooner, &operands, own.clone())?;
                        self.pass_on(&entry.operands, found, &mut adjoints, &mut pieces)?;
                        self.entries[place.entry].waiting.push(Waiting {
                            node,
                            operands: entry.operands,
                            adjoints: own,
                        });
                    }
                    _ => {
                        let operands = self.gather(&entry.operands, entry.needs.operands)?;
                        let (found, made) = match entry.waiting.is_empty() {
                            true => (node.backward(&operands, &results, own)?, Vec::new()),
                            false => along(&*node, &operands, &entry.results, own)?,
                        };
                        self.pass_on(&entry.operands, found, &mut adjoints, &mut pieces)?;
                        for waiting in entry.waiting {
                            self.finish(waiting, &made, &mut adjoints, &mut pieces)?;
                        }
                    }
                },
            }
        }
        pieces.walk(&mut adjoints)?;
        Ok(adjoints)
    }

    /// Where the first operand comes from, if its adjoint should go there first: what makes it makes it again on the way
    /// back, and then the other operands, all variables, get their adjoints.
    fn worth_waiting(&self, needs: Needs, operands: &[Operand]) -> Option<Place> {
        let [Operand::Result(place, _), others @ ..] = operands else {
            return None;
        };
        let entry = &self.entries[place.entry];
        let known = entry.results[place.result].value.is_some();
        let simple = others.iter().all(|other| match other {
            Operand::Other(other) => other.is_variable() || !other.track_op(),
            Operand::Result(..) => false,
        });
        (needs.late && entry.needs.along && !known && simple).then_some(*place)
    }

    /// The rest of the adjoints of an operator, once its first operand is among the results that were `made`.
    fn finish(
        &mut self,
        waiting: Waiting,
        made: &[Tensor],
        adjoints: &mut Adjoints,
        pieces: &mut Pieces,
    ) -> Result<()> {
        let Waiting {
            node,
            operands,
            adjoints: own,
        } = waiting;
        let [Operand::Result(place, shape), others @ ..] = operands.as_slice() else {
            bail!("tape: an operator waits for nothing")
        };
        let Some(first) = made.get(place.result) else {
            bail!("tape: an operator made fewer results than before")
        };
        let mut elements = vec![first.reshape(shape)?];
        elements.extend(self.gather(others, Set::ALL)?);
        let found = node.part(Part::Later, &elements, own)?;
        let rest = found.into_iter().skip(1).collect();
        self.pass_on(others, rest, adjoints, pieces)
    }

    fn pass_on(
        &self,
        operands: &[Operand],
        found: Vec<Option<Tensor>>,
        adjoints: &mut Adjoints,
        pieces: &mut Pieces,
    ) -> Result<()> {
        for (operand, adjoint) in operands.iter().zip(found) {
            let Some(adjoint) = adjoint else { continue };
            let adjoint = adjoint.detach().contiguous()?;
            match operand {
                Operand::Result(place, _) => {
                    let result = &self.entries[place.entry].results[place.result];
                    adjoints.add(result.id, adjoint.reshape(&result.shape)?)?;
                }
                Operand::Other(operand) if operand.is_variable() => adjoints.add(operand.id(), adjoint)?,
                Operand::Other(operand) if operand.track_op() => pieces.push(operand, adjoint)?,
                Operand::Other(_) => {}
            }
        }
        Ok(())
    }

    /// The results of the last entry; those that its gradient does not read have no elements.
    fn last_results(&mut self) -> Result<Vec<Tensor>> {
        let Some(Entry { results, needs, .. }) = self.entries.last() else {
            return Ok(Vec::new());
        };
        let (entry, read) = (self.entries.len() - 1, needs.results);
        let places = (0..results.len()).map(|result| Place { entry, result });
        let operands: Vec<Operand> = places
            .zip(results)
            .map(|(place, result)| Operand::Result(place, result.shape.clone()))
            .collect();
        self.gather(&operands, read)
    }

    /// Tensors for `operands`, of which those that are not `read` have no elements.
    fn gather(&mut self, operands: &[Operand], read: Set) -> Result<Vec<Tensor>> {
        let mut tensors = Vec::with_capacity(operands.len());
        for (index, operand) in operands.iter().enumerate() {
            tensors.push(match operand {
                Operand::Other(operand) => operand.clone(),
                Operand::Result(place, shape) if read.contains(index) => {
                    self.elements(*place)?.reshape(shape)?
                }
                Operand::Result(place, shape) => {
                    let result = &self.entries[place.entry].results[place.result];
                    let (dtype, device) = (result.dtype, result.device.clone());
                    self.ghost(shape, dtype, &device)?
                }
            });
        }
        Ok(tensors)
    }

    /// The result at `place`, made again if it was not kept: then it stays until its entry is done.
    fn elements(&mut self, place: Place) -> Result<Tensor> {
        let entry = &self.entries[place.entry];
        if let Some(value) = &entry.results[place.result].value {
            return Ok(value.clone());
        }
        let operands = entry.operands.clone();
        let operands = self.gather(&operands, Set::ALL)?;
        let entry = &mut self.entries[place.entry];
        let made = match &entry.work {
            Work::Operator(node) if entry.needs.again => node.again(&operands)?,
            _ => bail!("tape: a gradient reads a result that was not kept"),
        };
        for (result, made) in entry.results.iter_mut().zip(made) {
            result.value.get_or_insert(made);
        }
        match &entry.results[place.result].value {
            Some(value) => Ok(value.clone()),
            None => bail!("tape: an operator made fewer results than before"),
        }
    }
}

/// Adjoints of the operands of `node` and its results, of which all are known or none.
fn along(
    node: &dyn Recorded,
    operands: &[Tensor],
    results: &[Outcome],
    own: Vec<Option<Tensor>>,
) -> Result<(Vec<Option<Tensor>>, Vec<Tensor>)> {
    let known: Option<Vec<Tensor>> = results.iter().map(|result| result.value.clone()).collect();
    match known {
        // Something else needed them in between.
        Some(known) => Ok((node.backward(operands, &known, own)?, known)),
        None => node.along(operands, own),
    }
}

/// Does `work` again, whose results had the adjoints `own`, and adds the gradients of all that it depends on.
fn replay(work: &Replay, own: Vec<Option<Tensor>>, adjoints: &mut Adjoints) -> Result<()> {
    let (again, tape) = record(work);
    let again = again?;
    let ends: Vec<(&Tensor, Tensor)> = again
        .iter()
        .zip(own)
        .filter_map(|(end, adjoint)| adjoint.map(|adjoint| (end, adjoint)))
        .filter(|(end, _)| end.track_op())
        .collect();
    if ends.is_empty() {
        return Ok(());
    }
    for (id, adjoint) in tape.backward_from_all(&ends)?.0 {
        adjoints.add(id, adjoint)?;
    }
    Ok(())
}

/// Sums of adjoints of variables so far.
#[derive(Default)]
pub(super) struct Adjoints(HashMap<TensorId, Tensor>);

impl Adjoints {
    fn add(&mut self, id: TensorId, adjoint: Tensor) -> Result<()> {
        let sum = match self.0.remove(&id) {
            Some(sum) => (sum + adjoint)?,
            None => adjoint,
        };
        self.0.insert(id, sum);
        Ok(())
    }

    pub(super) fn take(&mut self, id: TensorId) -> Option<Tensor> {
        self.0.remove(&id)
    }

    fn merge(&mut self, found: &GradStore) -> Result<()> {
        for &id in found.get_ids() {
            if let Some(adjoint) = found.get_id(id) {
                self.add(id, adjoint.clone())?;
            }
        }
        Ok(())
    }

    fn into_store(self) -> Result<GradStore> {
        // Candle makes gradient stores only by backward passes.
        let nothing = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        let mut store = nothing.backward()?;
        store.remove(&nothing);
        for (id, adjoint) in self.0 {
            store.insert_id(id, adjoint);
        }
        Ok(store)
    }
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

    fn walk_if_they_lead_to(&mut self, result: TensorId, adjoints: &mut Adjoints) -> Result<()> {
        if self.leaves.contains(&result) {
            self.walk(adjoints)?;
        }
        Ok(())
    }

    fn walk(&mut self, adjoints: &mut Adjoints) -> Result<()> {
        self.leaves.clear();
        match self.root.take() {
            Some(root) => adjoints.merge(&root.backward()?),
            None => Ok(()),
        }
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
