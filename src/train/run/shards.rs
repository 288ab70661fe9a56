//! Moments, and gradients and parameters too, in shards: each rank keeps those of some parameters, updates these, and hands them
//! to the others (ZeRO, arXiv 1910.02054, stages 1 to 3). A parameter belongs to one rank as a whole.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};

use super::super::error::TrainError;
use super::super::optimiser::{Gradients, Optimiser};
use crate::distributed::{Call, Communicator, Parameters, Reduce, Shard};

/// Most elements that a message gathers for a checkpoint, unless a single tensor has more.
const MOST_AT_ONCE: usize = 1 << 24;

/// Who owns what, from the side of one rank.
pub(super) struct Shards {
    group: Arc<dyn Communicator>,
    pub(super) kind: Shard,
    /// Where parameters are in shards too.
    pub(super) parameters: Option<Arc<Parameters>>,
    /// Owner of each parameter, in the order of names.
    owners: Vec<usize>,
    vars: Vec<Var>,
    /// Name and shape of the moments of each.
    moments: Vec<(String, Vec<usize>)>,
}

/// Tensors that there is one of for each parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The parameters themselves, or averages of them.
    Weights,
    /// Their moments.
    Moments,
}

impl Shards {
    /// Gives each parameter of `optimiser` to a rank of `group`, the largest first and to the one that has least, or as
    /// `parameters` are shared already, and lets the optimiser give up what is not its own.
    ///
    /// # Errors
    /// The device failed.
    pub(super) fn new(
        group: Arc<dyn Communicator>,
        kind: Shard,
        parameters: Option<Arc<Parameters>>,
        optimiser: &mut Optimiser,
    ) -> std::result::Result<Self, TrainError> {
        let layout = optimiser.layout();
        let owners = match &parameters {
            Some(parameters) => parameters.owners().to_vec(),
            None => {
                let mut order: Vec<usize> = (0..layout.len()).collect();
                order.sort_by_key(|&index| std::cmp::Reverse(layout[index].1.elem_count()));
                let mut held = vec![0; group.size()];
                let mut owners = vec![0; layout.len()];
                for index in order {
                    let least = (0..held.len()).min_by_key(|&rank| held[rank]).unwrap_or(0);
                    owners[index] = least;
                    held[least] += layout[index].1.elem_count();
                }
                owners
            }
        };
        let own = group.rank();
        optimiser.leave(|index| owners[index] != own)?;
        let (mut vars, mut moments) = (Vec::new(), Vec::new());
        for (name, var, shape) in layout {
            vars.push(var);
            moments.push((name, shape));
        }
        Ok(Self {
            group,
            kind,
            parameters,
            owners,
            vars,
            moments,
        })
    }

    /// Whether the parameter of this number, in the order of names, is updated by this rank.
    pub(super) fn owns(&self, index: usize) -> bool {
        self.owners[index] == self.group.rank()
    }

    /// Leaves of the gradients those of the own parameters, summed over all ranks and divided by `shares()`, which is asked for
    /// while they are on their way. Gives the norm of all gradients, `[1]`.
    ///
    /// # Errors
    /// A rank is missing.
    pub(super) fn scatter(
        &self,
        gradients: &mut Gradients,
        shares: impl FnOnce() -> std::result::Result<Tensor, TrainError>,
    ) -> std::result::Result<Tensor, TrainError> {
        // What lies in units was summed when it was complete.
        let summed = match &self.parameters {
            Some(parameters) => parameters.gradients()?,
            None => Vec::new(),
        };
        let slots = gradients.slots();
        let device = self.vars[0].device();
        let mut rows = vec![Vec::new(); self.group.size()];
        for (slot, &owner) in slots.iter().zip(&self.owners) {
            if let Some(gradient) = slot {
                rows[owner].push(gradient.to_dtype(DType::F32)?.flatten_all()?);
            }
        }
        let pending = match rows.iter().all(Vec::is_empty) {
            true => None,
            false => Some(self.group.start(Call::ReduceScatter, &padded(&rows, device)?)?),
        };
        let shares = shares()?.to_device(device)?;
        let own = match pending {
            None => None,
            Some(pending) => pending.wait()?.pop(),
        };
        let mut square = Tensor::zeros(1, DType::F32, device)?;
        let mut at = 0;
        for (index, slot) in slots.iter_mut().enumerate() {
            let found = match (slot.take(), &own) {
                (Some(gradient), Some(own)) if self.owns(index) => {
                    let count = gradient.elem_count();
                    at += count;
                    let sum = own.narrow(0, at - count, count)?.reshape(gradient.shape())?;
                    Some(sum.to_dtype(gradient.dtype())?)
                }
                _ => summed.get(index).cloned().flatten(),
            };
            if let Some(sum) = found {
                let mean = sum.broadcast_div(&shares)?;
                square = (square + mean.to_dtype(DType::F32)?.sqr()?.sum_all()?.reshape(1)?)?;
                *slot = Some(mean.contiguous()?);
            }
        }
        Ok(self.group.all_reduce(&square, Reduce::Sum)?.sqrt()?)
    }

    /// Hands the own parameters to all ranks, and takes theirs, unless they are brought when they are needed.
    ///
    /// # Errors
    /// A rank is missing.
    pub(super) fn share_weights(&self) -> std::result::Result<(), TrainError> {
        let lent = |index: usize| {
            let parameters = self.parameters.as_ref();
            parameters.is_some_and(|parameters| parameters.is_lent(index))
        };
        let numbers: Vec<usize> = (0..self.vars.len()).filter(|&index| !lent(index)).collect();
        let flat = |index: usize| {
            let var = &self.vars[index];
            Ok(Some(
                var.as_detached_tensor().to_dtype(DType::F32)?.flatten_all()?,
            ))
        };
        let size = |index: usize| self.vars[index].elem_count();
        for (index, piece) in self.gathered(&numbers, flat, size)? {
            if !self.owns(index) {
                let var = &self.vars[index];
                var.set(&piece.reshape(var.shape())?.to_dtype(var.dtype())?.contiguous()?)?;
            }
        }
        Ok(())
    }

    /// The tensors of all parameters, on the host of the rank that `leads`, from those of the own ones by name; nothing on the
    /// other ranks, all of which call it.
    ///
    /// # Errors
    /// A rank is missing.
    pub(super) fn whole(
        &self,
        kind: Kind,
        own: &BTreeMap<String, Tensor>,
        leads: bool,
    ) -> std::result::Result<BTreeMap<String, Tensor>, TrainError> {
        let shape = |index: usize| match kind {
            Kind::Weights => self.vars[index].dims(),
            Kind::Moments => &self.moments[index].1,
        };
        let name = |index: usize| {
            let of_moments = &self.moments[index].0;
            match kind {
                Kind::Weights => of_moments.strip_prefix(super::super::optimiser::MOMENTS),
                Kind::Moments => None,
            }
            .unwrap_or(of_moments)
        };
        let size = |index: usize| shape(index).iter().product::<usize>();
        let mut all = BTreeMap::new();
        let mut first = 0;
        while first < self.vars.len() {
            let (mut end, mut count) = (first + 1, size(first));
            while end < self.vars.len() && count + size(end) <= MOST_AT_ONCE {
                count += size(end);
                end += 1;
            }
            let numbers: Vec<usize> = (first..end).collect();
            let flat = |index: usize| own.get(name(index)).map(Tensor::flatten_all).transpose();
            for (index, piece) in self.gathered(&numbers, flat, size)? {
                if leads {
                    let piece = piece.to_device(&Device::Cpu)?.reshape(shape(index))?;
                    all.insert(name(index).to_owned(), piece.force_contiguous()?);
                }
            }
            first = end;
        }
        Ok(all)
    }

    /// The flat tensors, `size` long, of the parameters `numbers`, each from the rank that owns it.
    fn gathered(
        &self,
        numbers: &[usize],
        flat: impl Fn(usize) -> Result<Option<Tensor>>,
        size: impl Fn(usize) -> usize,
    ) -> std::result::Result<Vec<(usize, Tensor)>, TrainError> {
        let device = self.vars[0].device();
        let mut own = Vec::new();
        let mut lengths = vec![0; self.group.size()];
        for &index in numbers {
            lengths[self.owners[index]] += size(index);
            if self.owns(index)
                && let Some(tensor) = flat(index)?
            {
                own.push(tensor.to_device(device)?);
            }
        }
        let longest = lengths.iter().copied().max().unwrap_or(0).max(1);
        let rows = self.group.all_gather(&padded_to(&own, longest, device)?)?;
        let mut at = vec![0; rows.len()];
        let pieces = numbers.iter().map(|&index| {
            let owner = self.owners[index];
            let piece = rows[owner].narrow(0, at[owner], size(index))?;
            at[owner] += size(index);
            Ok((index, piece))
        });
        Ok(pieces.collect::<Result<_>>()?)
    }
}

/// Rows of one length, `[rows, length]`.
fn padded(rows: &[Vec<Tensor>], device: &Device) -> Result<Tensor> {
    let length = |row: &Vec<Tensor>| row.iter().map(Tensor::elem_count).sum::<usize>();
    let longest = rows.iter().map(length).max().unwrap_or(0).max(1);
    let rows: Vec<Tensor> = rows
        .iter()
        .map(|row| padded_to(row, longest, device))
        .collect::<Result<_>>()?;
    Tensor::stack(&rows, 0)
}

/// Flat tensors one behind the other, with zeros up to `length`.
fn padded_to(pieces: &[Tensor], length: usize, device: &Device) -> Result<Tensor> {
    let count: usize = pieces.iter().map(Tensor::elem_count).sum();
    let mut pieces: Vec<Tensor> = pieces.to_vec();
    if count < length {
        pieces.push(Tensor::zeros(length - count, DType::F32, device)?);
    }
    Tensor::cat(&pieces, 0)
}
