//! Parameters in shards (ZeRO stage 3, arXiv 1910.02054): each rank keeps some matrices of every unit of a model, which all ranks
//! gather while the unit works, and whose gradients are summed as soon as they are complete.
//!
//! A matrix belongs to one rank as a whole, as its moments do. What is small, as the gains of norms, all ranks keep.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use fulgur_kernels::memory;
use fulgur_kernels::tape::Gradients;
use fulgur_lightnet::lm::Lender;

use super::communicator::{Call, Communicator, Pending};

/// The parameters of a model, from the side of one rank.
#[derive(Debug)]
pub struct Parameters {
    group: Arc<dyn Communicator>,
    vars: Vec<Var>,
    /// The rank that keeps each, in the order of names.
    owners: Vec<usize>,
    /// Numbers of the matrices of each unit.
    units: Vec<Vec<usize>>,
    /// Whether those of other ranks are taken away at all.
    begun: AtomicBool,
    state: Mutex<State>,
    /// Most bytes that parameters took at a time.
    most: AtomicUsize,
}

#[derive(Debug)]
struct State {
    /// Whether the weights of each unit are here.
    here: Vec<bool>,
    /// Sums of the own gradients over all ranks, by number.
    sums: Vec<Option<Tensor>>,
    /// A sum that is under way, and the numbers of the parameters in it.
    pending: Option<(Box<dyn Pending>, Vec<usize>)>,
}

impl Parameters {
    /// Of `vars`, a name, a variable and its unit each, in the order of names; of variables in units, matrices are shared among
    /// the ranks of `group`, the largest of a unit first and to the rank that has least of it.
    pub fn new(group: Arc<dyn Communicator>, vars: Vec<(Var, Option<usize>)>) -> Self {
        let count = vars
            .iter()
            .filter_map(|(_, unit)| *unit)
            .max()
            .map_or(0, |unit| unit + 1);
        let mut units = vec![Vec::new(); count];
        for (index, (var, unit)) in vars.iter().enumerate() {
            if let Some(unit) = unit.filter(|_| var.rank() == 2) {
                units[unit].push(index);
            }
        }
        let size = group.size();
        let mut owners = vec![0; vars.len()];
        let mut held = vec![0; size];
        let loose = (0..vars.len()).filter(|index| !units.iter().flatten().any(|other| other == index));
        for unit in units.iter().cloned().chain([loose.collect()]) {
            let mut order = unit;
            order.sort_by_key(|&index| std::cmp::Reverse(vars[index].0.elem_count()));
            let mut own = vec![0; size];
            for index in order {
                let least = (0..size).min_by_key(|&rank| (own[rank], held[rank])).unwrap_or(0);
                owners[index] = least;
                own[least] += vars[index].0.elem_count();
                held[least] += vars[index].0.elem_count();
            }
        }
        Self {
            state: Mutex::new(State {
                here: vec![true; units.len()],
                sums: vec![None; vars.len()],
                pending: None,
            }),
            vars: vars.into_iter().map(|(var, _)| var).collect(),
            group,
            owners,
            units,
            begun: AtomicBool::new(false),
            most: AtomicUsize::new(0),
        }
    }

    /// The rank that keeps each parameter, in the order of names.
    pub fn owners(&self) -> &[usize] {
        &self.owners
    }

    /// Whether the parameter of this number is here only while it is needed.
    pub fn is_lent(&self, index: usize) -> bool {
        self.units.iter().flatten().any(|&other| other == index)
    }

    /// Takes away what other ranks keep: from now on weights are brought when they are needed.
    ///
    /// # Errors
    /// A device failed.
    pub fn begin(&self) -> Result<()> {
        self.begun.store(true, Ordering::SeqCst);
        (0..self.units.len()).try_for_each(|unit| self.take_back(unit))?;
        self.most.store(self.held(), Ordering::SeqCst);
        Ok(())
    }

    /// Bytes of parameters that are here at present.
    pub fn held(&self) -> usize {
        self.vars.iter().map(|var| memory::held(var)).sum()
    }

    /// Most bytes of parameters that were here at a time, since [`Self::begin`].
    pub fn most_held(&self) -> usize {
        self.most.load(Ordering::SeqCst)
    }

    /// Sums of the own gradients over all ranks since the last call, by number; `None` for all others. All ranks call it.
    ///
    /// # Errors
    /// A rank is missing.
    pub fn gradients(&self) -> Result<Vec<Option<Tensor>>> {
        let mut state = self.state();
        self.settle(&mut state)?;
        let nothing = vec![None; self.vars.len()];
        Ok(std::mem::replace(&mut state.sums, nothing))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Elements of each rank of a unit, and the longest row that they make.
    fn longest(&self, unit: usize) -> usize {
        let mut lengths = vec![0; self.group.size()];
        for &index in &self.units[unit] {
            lengths[self.owners[index]] += self.vars[index].elem_count();
        }
        lengths.into_iter().max().unwrap_or(0)
    }

    /// Waits for the sum that is under way, and adds its own row to the sums.
    fn settle(&self, state: &mut State) -> Result<()> {
        let Some((pending, numbers)) = state.pending.take() else {
            return Ok(());
        };
        let Some(row) = pending.wait()?.pop() else {
            bail!("a reduction brought nothing")
        };
        let mut at = 0;
        for index in numbers {
            let var = &self.vars[index];
            if self.owners[index] == self.group.rank() {
                let count = var.elem_count();
                let own = row.narrow(0, at, count)?.reshape(var.shape())?;
                state.sums[index] = Some(match state.sums[index].take() {
                    Some(sum) => (sum + own)?,
                    None => own,
                });
                at += count;
            }
        }
        Ok(())
    }
}

impl Lender for Parameters {
    fn bring(&self, unit: usize) -> Result<()> {
        let numbers = &self.units[unit];
        if self.state().here[unit] || numbers.is_empty() {
            return Ok(());
        }
        let own = numbers
            .iter()
            .filter(|&&index| self.owners[index] == self.group.rank());
        let mut row = Vec::new();
        for &index in own {
            row.push(self.vars[index].as_detached_tensor().flatten_all()?);
        }
        let device = self.vars[numbers[0]].device();
        let rows = self.group.all_gather(&padded(row, self.longest(unit), device)?)?;
        let mut at = vec![0; rows.len()];
        for &index in numbers {
            let (var, owner) = (&self.vars[index], self.owners[index]);
            if owner != self.group.rank() {
                memory::take(var, &rows[owner].narrow(0, at[owner], var.elem_count())?)?;
            }
            at[owner] += var.elem_count();
        }
        self.state().here[unit] = true;
        self.most.fetch_max(self.held(), Ordering::SeqCst);
        Ok(())
    }

    fn take_back(&self, unit: usize) -> Result<()> {
        let mut state = self.state();
        if !self.begun.load(Ordering::SeqCst) || !state.here[unit] {
            return Ok(());
        }
        for &index in &self.units[unit] {
            if self.owners[index] != self.group.rank() {
                memory::give_up(&self.vars[index])?;
            }
        }
        state.here[unit] = false;
        Ok(())
    }

    fn finished(&self, unit: usize, gradients: &mut Gradients<'_>) -> Result<()> {
        let mut found = Vec::new();
        let mut rows = vec![Vec::new(); self.group.size()];
        for &index in &self.units[unit] {
            if let Some(gradient) = gradients.take(&self.vars[index]) {
                let gradient = gradient.detach().to_dtype(DType::F32)?.contiguous()?;
                rows[self.owners[index]].push(gradient.flatten_all()?);
                found.push(index);
            }
        }
        let Some(&first) = found.first() else {
            return Ok(());
        };
        let (device, longest) = (self.vars[first].device(), self.longest(unit));
        let rows: Vec<Tensor> = rows
            .into_iter()
            .map(|row| padded(row, longest, device))
            .collect::<Result<_>>()?;
        let pending = self.group.start(Call::ReduceScatter, &Tensor::stack(&rows, 0)?)?;
        // One sum is under way while the next unit computes its adjoints.
        let mut state = self.state();
        self.settle(&mut state)?;
        state.pending = Some((pending, found));
        Ok(())
    }
}

/// Flat tensors one behind the other, with zeros up to `length`.
fn padded(mut pieces: Vec<Tensor>, length: usize, device: &Device) -> Result<Tensor> {
    let count: usize = pieces.iter().map(Tensor::elem_count).sum();
    if count < length {
        pieces.push(Tensor::zeros(length - count, DType::F32, device)?);
    }
    Tensor::cat(&pieces, 0)
}
