//! Local steps between outer updates: CO2 (arXiv 2401.16265) and its relatives.
//!
//! Each of G workers takes tau steps of its own optimiser; then its parameters are averaged with those of the others, and an outer
//! optimiser moves the point x from which all go on. With x_{t,k} after k steps of round t and xbar_t the mean of x_{t,tau}:
//!
//! ```text
//!   CO2                                               SlowMo, Local SGD, DiLoCo
//!     wait for the mean of the round before             wait for the mean of this round
//!     start the mean of this round, of a copy
//!     d = (x_{t-1,0} - xbar_{t-1}) / Lam_t              d = x_{t,0} - xbar_t
//!     m <- clip(beta m + d)                             m <- clip(beta m + d)
//!     x_{t+1,0} = x_{t,0} - alpha m                     x_{t+1,0} = x_{t,0} - alpha m     or, by Nesterov, - alpha (d + beta m)
//! ```
//!
//! so that the mean of CO2 travels while the next round is computed. In its first round nothing has arrived and x stays; after the
//! last one [`Outer::finish`] waits for what is still under way. Local SGD is beta = 0, alpha = 1.
//!
//! The staleness gap Lam_t is 1 or more and grows with how far x has moved since the information was made:
//!
//! ```text
//!   Lam_t = 1 + |x_{t,0} - x_{t-1,0}| / (c_t + eps)     c_t: mean of |x_{s,0} - xbar_s| over the rounds that have arrived
//! ```
//!
//! over all parameters or for each tensor. Everything is computed from what all workers share, in the same order: x, m and Lam have
//! the same bits everywhere.

mod options;
#[cfg(test)]
mod tests;
mod tune;

use std::sync::Arc;

use candle_core::{DType, Result, Tensor, bail};

use super::communicator::{Call, Communicator, Pending, Reduce};

pub use options::{Gap, OuterMethod, OuterOptions, Rule};
pub use tune::{INNER_STEPS, least_steps};

/// Keeps the gap finite where nothing has moved yet.
const EPS: f64 = 1e-12;

/// The outer optimiser of one worker.
#[derive(Debug)]
pub struct Outer {
    rule: Rule,
    workers: Arc<dyn Communicator>,
    /// Ranks that hold the same parameters: each lets a part of them travel, and they put the parts together.
    alike: Option<Arc<dyn Communicator>>,
    /// Elements of each tensor, in the order of the flat vector.
    sizes: Vec<usize>,
    state: OuterState,
    travelling: Option<Box<dyn Pending>>,
    /// The staleness gaps of the last update, of all or of each tensor.
    gaps: Vec<f64>,
}

/// What an outer optimiser knows between rounds; flat vectors of all parameters.
#[derive(Clone, Debug)]
pub struct OuterState {
    /// x_{t,0}, from which the inner steps begin.
    pub start: Tensor,
    /// x_{t-1,0}; none before the first update of CO2.
    pub previous: Option<Tensor>,
    /// m.
    pub momentum: Tensor,
    /// Sums of |x_{s,0} - xbar_s| over rounds, of all or of each tensor; and the number of rounds.
    pub moved: (Vec<f64>, u64),
    /// A mean that has arrived and was not used yet: where a run is interrupted.
    pub arrived: Option<Tensor>,
}

impl OuterState {
    /// Before the first round, at `start`.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn new(start: &Tensor) -> Result<Self> {
        Ok(Self {
            start: start.copy()?,
            previous: None,
            momentum: start.zeros_like()?,
            moved: (Vec::new(), 0),
            arrived: None,
        })
    }
}

impl Outer {
    /// Of a worker that begins with `state`, whose parameters are tensors of so many elements. `workers` hold a rank of each
    /// worker, and `alike` the ranks of this one.
    pub fn new(
        rule: Rule,
        workers: Arc<dyn Communicator>,
        alike: Option<Arc<dyn Communicator>>,
        sizes: Vec<usize>,
        state: OuterState,
    ) -> Self {
        Self {
            rule,
            workers,
            alike: alike.filter(|alike| alike.size() > 1),
            sizes,
            state,
            travelling: None,
            gaps: Vec::new(),
        }
    }

    /// Its rule.
    pub fn rule(&self) -> &Rule {
        &self.rule
    }

    /// The staleness gaps of the last update.
    pub fn gaps(&self) -> &[f64] {
        &self.gaps
    }

    /// Ends a round whose inner steps led to `inner`; gives x_{t+1,0}, where the next one begins.
    ///
    /// # Errors
    /// A worker is missing, or a tensor operation failed.
    pub fn round(&mut self, inner: &Tensor) -> Result<Tensor> {
        if !self.rule.stale {
            let mean = self.depart(inner)?;
            let mean = self.arrive(mean)?;
            let start = self.state.start.clone();
            self.update(&start, &mean, false)?;
            return Ok(self.state.start.clone());
        }
        let arrived = self.take_arrived()?;
        self.travelling = Some(self.depart(inner)?);
        let origin = self.state.start.clone();
        if let (Some(mean), Some(previous)) = (arrived, self.state.previous.clone()) {
            self.update(&previous, &mean, true)?;
        }
        self.state.previous = Some(origin);
        Ok(self.state.start.clone())
    }

    /// Waits for the mean that is under way and applies it: at the end of a run, so that no work is lost. Gives the last x.
    ///
    /// # Errors
    /// As [`Self::round`].
    pub fn finish(&mut self) -> Result<Tensor> {
        let arrived = self.take_arrived()?;
        if let (Some(mean), Some(previous)) = (arrived, self.state.previous.take()) {
            self.update(&previous, &mean, true)?;
        }
        Ok(self.state.start.clone())
    }

    /// What a later run goes on from; waits for the mean that is under way, and keeps it.
    ///
    /// # Errors
    /// As [`Self::round`].
    pub fn settle(&mut self) -> Result<&OuterState> {
        if let Some(mean) = self.take_arrived()? {
            self.state.arrived = Some(mean);
        }
        Ok(&self.state)
    }

    fn take_arrived(&mut self) -> Result<Option<Tensor>> {
        if let Some(mean) = self.state.arrived.take() {
            return Ok(Some(mean));
        }
        self.travelling
            .take()
            .map(|pending| self.arrive(pending))
            .transpose()
    }

    /// Sends a copy of the own part on its way.
    fn depart(&self, inner: &Tensor) -> Result<Box<dyn Pending>> {
        let own = match &self.alike {
            None => inner.clone(),
            Some(alike) => {
                let each = inner.elem_count().div_ceil(alike.size());
                let missing = each * alike.size() - inner.elem_count();
                inner
                    .pad_with_zeros(0, 0, missing)?
                    .narrow(0, alike.rank() * each, each)?
            }
        };
        Ok(self.workers.start(Call::AllReduce(Reduce::Sum), &own)?)
    }

    /// The mean over workers, put together from all parts.
    fn arrive(&self, pending: Box<dyn Pending>) -> Result<Tensor> {
        let Some(sum) = pending.wait()?.pop() else {
            bail!("an average brought nothing")
        };
        let mean = (sum / self.workers.size() as f64)?;
        match &self.alike {
            None => Ok(mean),
            Some(alike) => {
                let parts = alike.all_gather(&mean)?;
                Tensor::cat(&parts, 0)?.narrow(0, 0, self.state.start.elem_count())
            }
        }
    }

    /// The outer step from the mean that was made of rounds from `origin`.
    fn update(&mut self, origin: &Tensor, mean: &Tensor, is_stale: bool) -> Result<()> {
        let Rule {
            lr,
            momentum,
            nesterov,
            clip,
            clip_norm,
            ..
        } = self.rule;
        let mut change = (origin - mean)?;
        if is_stale {
            change = self.divided_by_gap(change, origin)?;
        }
        let mut m = ((&self.state.momentum * momentum)? + &change)?;
        if clip > 0.0 {
            m = m.clamp(-clip, clip)?;
        }
        if clip_norm > 0.0 {
            let norm = length(&m)?;
            if norm > clip_norm {
                m = (m * (clip_norm / norm))?;
            }
        }
        let step = match nesterov {
            true => (change + (&m * momentum)?)?,
            false => m.clone(),
        };
        self.state.start = (&self.state.start - (step * lr)?)?;
        self.state.momentum = m;
        Ok(())
    }

    /// Divides what workers have moved by the staleness gap, since x has moved on from `origin`.
    fn divided_by_gap(&mut self, change: Tensor, origin: &Tensor) -> Result<Tensor> {
        let pieces = match self.rule.gap {
            Gap::Off => return Ok(change),
            Gap::Constant(gap) => {
                self.gaps = vec![gap];
                return change / gap;
            }
            Gap::Global => vec![change.elem_count()],
            Gap::Tensor => self.sizes.clone(),
        };
        let since = (&self.state.start - origin)?;
        let (sums, rounds) = &mut self.state.moved;
        sums.resize(pieces.len(), 0.0);
        *rounds += 1;
        let (mut divided, mut at) = (Vec::with_capacity(pieces.len()), 0);
        self.gaps.clear();
        for (sum, count) in sums.iter_mut().zip(pieces) {
            let piece = change.narrow(0, at, count)?;
            *sum += length(&piece)?;
            let gap = 1.0 + length(&since.narrow(0, at, count)?)? / (*sum / *rounds as f64 + EPS);
            divided.push((piece / gap)?);
            self.gaps.push(gap);
            at += count;
        }
        Tensor::cat(&divided, 0)
    }
}

/// Euclidean norm, summed in f64.
fn length(x: &Tensor) -> Result<f64> {
    let square = x
        .to_device(&candle_core::Device::Cpu)?
        .to_dtype(DType::F64)?
        .sqr()?;
    Ok(square.sum_all()?.to_scalar::<f64>()?.sqrt())
}
