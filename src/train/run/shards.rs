//! Moments, and gradients too, in shards: each rank keeps those of some parameters, updates these, and hands them to the others
//! (ZeRO, arXiv 1910.02054, stages 1 and 2). A parameter belongs to one rank as a whole.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Result, Tensor, Var};

use super::super::error::TrainError;
use super::super::optimiser::{Gradients, Optimiser};
use crate::distributed::{Communicator, Reduce, Shard};

/// Who owns what, from the side of one rank.
pub(super) struct Shards {
    group: Arc<dyn Communicator>,
    pub(super) kind: Shard,
    /// Owner of each parameter, in the order of names.
    owners: Vec<usize>,
    vars: Vec<Var>,
    /// Name and shape of the moments of each.
    moments: Vec<(String, Vec<usize>)>,
}

impl Shards {
    /// Gives each parameter of `optimiser` to a rank of `group`, the largest first and to the one that has least, and lets the
    /// optimiser give up what is not its own.
    ///
    /// # Errors
    /// The device failed.
    pub(super) fn new(
        group: Arc<dyn Communicator>,
        kind: Shard,
        optimiser: &mut Optimiser,
    ) -> std::result::Result<Self, TrainError> {
        let layout = optimiser.layout();
        let mut order: Vec<usize> = (0..layout.len()).collect();
        order.sort_by_key(|&index| std::cmp::Reverse(layout[index].1.elem_count()));
        let mut held = vec![0; group.size()];
        let mut owners = vec![0; layout.len()];
        for index in order {
            let least = (0..held.len()).min_by_key(|&rank| held[rank]).unwrap_or(0);
            owners[index] = least;
            held[least] += layout[index].1.elem_count();
        }
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
            owners,
            vars,
            moments,
        })
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
        let slots = gradients.slots();
        let Some(device) = slots
            .iter()
            .flatten()
            .next()
            .map(|tensor| tensor.device().clone())
        else {
            let nothing = Tensor::zeros(1, DType::F32, &candle_core::Device::Cpu)?;
            shares()?;
            return Ok(nothing);
        };
        let mut rows = vec![Vec::new(); self.group.size()];
        for (slot, &owner) in slots.iter().zip(&self.owners) {
            if let Some(gradient) = slot {
                rows[owner].push(gradient.to_dtype(DType::F32)?.flatten_all()?);
            }
        }
        let rows = padded(&rows, &device)?;
        let pending = self.group.start(crate::distributed::Call::ReduceScatter, &rows)?;
        let shares = shares()?;
        let Some(own) = pending.wait()?.pop() else {
            return Err(candle_core::Error::Msg("a reduction brought nothing".to_owned()).into());
        };
        let own = own.broadcast_div(&shares.to_device(&device)?)?;
        let square = own.sqr()?.sum_all()?.reshape(1)?;
        let norm = self.group.all_reduce(&square, Reduce::Sum)?.sqrt()?;
        let mut at = 0;
        for (slot, &owner) in slots.iter_mut().zip(&self.owners) {
            let Some(gradient) = slot.take() else { continue };
            if owner == self.group.rank() {
                let count = gradient.elem_count();
                let mean = own.narrow(0, at, count)?.reshape(gradient.shape())?;
                *slot = Some(mean.to_dtype(gradient.dtype())?.contiguous()?);
                at += count;
            }
        }
        Ok(norm)
    }

    /// Hands the own parameters to all ranks, and takes theirs.
    ///
    /// # Errors
    /// A rank is missing.
    pub(super) fn share_weights(&self) -> std::result::Result<(), TrainError> {
        let flat: Vec<Tensor> = self
            .vars
            .iter()
            .map(|var| var.as_detached_tensor().to_dtype(DType::F32)?.flatten_all())
            .collect::<Result<_>>()?;
        let sizes: Vec<usize> = flat.iter().map(Tensor::elem_count).collect();
        let rows = self.gathered(&flat.iter().map(Some).collect::<Vec<_>>(), &sizes)?;
        for (index, piece) in self.pieces(&rows, &sizes)?.into_iter().enumerate() {
            if self.owners[index] != self.group.rank() {
                let var = &self.vars[index];
                var.set(&piece.reshape(var.shape())?.to_dtype(var.dtype())?.contiguous()?)?;
            }
        }
        Ok(())
    }

    /// The moments of all parameters, from those of the own ones.
    ///
    /// # Errors
    /// A rank is missing.
    pub(super) fn all_moments(
        &self,
        own: &BTreeMap<String, Tensor>,
    ) -> std::result::Result<BTreeMap<String, Tensor>, TrainError> {
        let flat: Vec<Option<Tensor>> = self
            .moments
            .iter()
            .map(|(name, _)| own.get(name).map(Tensor::flatten_all).transpose())
            .collect::<Result<_>>()?;
        let sizes: Vec<usize> = self
            .moments
            .iter()
            .map(|(_, shape)| shape.iter().product())
            .collect();
        let rows = self.gathered(&flat.iter().map(Option::as_ref).collect::<Vec<_>>(), &sizes)?;
        let pieces = self.pieces(&rows, &sizes)?;
        let named = self.moments.iter().zip(pieces);
        named
            .map(|((name, shape), piece)| Ok((name.clone(), piece.reshape(shape.as_slice())?)))
            .collect()
    }

    /// What each rank owns of `flat`, one behind the other and padded to one length.
    fn gathered(
        &self,
        flat: &[Option<&Tensor>],
        sizes: &[usize],
    ) -> std::result::Result<Vec<Tensor>, TrainError> {
        let device = self.vars[0].device();
        let mut own = Vec::new();
        let mut lengths = vec![0; self.group.size()];
        for ((tensor, &size), &owner) in flat.iter().zip(sizes).zip(&self.owners) {
            lengths[owner] += size;
            if let (Some(tensor), true) = (tensor, owner == self.group.rank()) {
                own.push((*tensor).clone());
            }
        }
        let longest = lengths.iter().copied().max().unwrap_or(0).max(1);
        let own = padded_to(&own, longest, device)?;
        Ok(self.group.all_gather(&own)?)
    }

    /// The tensors again that [`Self::gathered`] has put into rows.
    fn pieces(&self, rows: &[Tensor], sizes: &[usize]) -> Result<Vec<Tensor>> {
        let mut at = vec![0; rows.len()];
        let pieces = self.owners.iter().zip(sizes).map(|(&owner, &size)| {
            let piece = rows[owner].narrow(0, at[owner], size);
            at[owner] += size;
            piece
        });
        pieces.collect()
    }
}

/// Rows of one length, `[rows, length]`.
fn padded(rows: &[Vec<Tensor>], device: &candle_core::Device) -> Result<Tensor> {
    let length = |row: &Vec<Tensor>| row.iter().map(Tensor::elem_count).sum::<usize>();
    let longest = rows.iter().map(length).max().unwrap_or(0).max(1);
    let rows: Vec<Tensor> = rows
        .iter()
        .map(|row| padded_to(row, longest, device))
        .collect::<Result<_>>()?;
    Tensor::stack(&rows, 0)
}

/// Flat tensors one behind the other, with zeros up to `length`.
fn padded_to(pieces: &[Tensor], length: usize, device: &candle_core::Device) -> Result<Tensor> {
    let count: usize = pieces.iter().map(Tensor::elem_count).sum();
    let mut pieces: Vec<Tensor> = pieces.to_vec();
    if count < length {
        pieces.push(Tensor::zeros(length - count, DType::F32, device)?);
    }
    Tensor::cat(&pieces, 0)
}
