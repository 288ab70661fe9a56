//! Sequences over several ranks: LASP (arXiv 2404.02882) and LASP-2 (arXiv 2502.07563).
//!
//! Rank i of a group of W holds tokens `[i C, (i + 1) C)` of every sequence. What passes between ranks are states, whose size knows
//! nothing of the number of tokens:
//!
//! ```text
//!   LASP-1   S_i = exp(A_i) S_{i-1} + U_i       from rank to rank, forward; adjoints the other way round
//!   LASP-2   all-gather of (U_j, A_j), and every rank folds those before it, in the same order
//! ```
//!
//! U_i is the state of the rank's own tokens from a zero start and A_i their total log-decay. Both methods fold in the same order
//! and give the same bits. Operators compute what needs no other rank while states are on their way. The non-causal form needs neither: an all-reduce of (max, den, num).

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};
use fulgur_kernels::exchange::{AdditiveState, Coming, StateExchange};
use serde::{Deserialize, Serialize};

use super::communicator::{Call, Communicator, Reduce};

/// How states reach the ranks behind.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub enum Method {
    /// From rank to rank: W - 1 steps, one state sent by each.
    #[serde(rename = "lasp1")]
    Ring,
    /// All states to all ranks at once: one step.
    #[default]
    #[serde(rename = "lasp2")]
    Gather,
}

/// The exchange of one rank of a sequence group.
#[derive(Debug)]
pub struct Lasp {
    group: Arc<dyn Communicator>,
    method: Method,
    tokens: usize,
}

impl Lasp {
    /// Joins the members of `group`, each of which holds `tokens` tokens of every sequence, in the order of ranks.
    pub fn new(group: Arc<dyn Communicator>, method: Method, tokens: usize) -> Self {
        Self {
            group,
            method,
            tokens,
        }
    }

    /// The state that reaches this rank, through the ranks `order` tells of, the farthest first.
    fn folded(
        &self,
        state: &Tensor,
        log_decay: &Tensor,
        order: impl Fn(usize, usize) -> Vec<usize> + 'static,
    ) -> Result<Coming<'_>> {
        // One message: steps are what a network charges for.
        let count = state.elem_count();
        let own = Tensor::cat(&[state.flatten_all()?, log_decay.flatten_all()?], 0)?;
        let pending = self.group.start(Call::AllGather, &own)?;
        let (state, log_decay) = (state.clone(), log_decay.clone());
        Ok(Coming::later(move || {
            let all = pending.wait()?;
            let mut sum = state.zeros_like()?;
            for member in order(self.group.rank(), self.group.size()) {
                let added = all[member].narrow(0, 0, count)?.reshape(state.shape())?;
                let log = all[member].narrow(0, count, log_decay.elem_count())?;
                sum = leaving(&sum, &added, &log.reshape(log_decay.shape())?)?;
            }
            Ok(sum)
        }))
    }

    /// The state that reaches this rank from its neighbour `from`; what leaves it goes on to `to`.
    fn passed(
        &self,
        state: &Tensor,
        log_decay: &Tensor,
        from: Option<usize>,
        to: Option<usize>,
    ) -> Result<Coming<'_>> {
        let (state, log_decay) = (state.clone(), log_decay.clone());
        let pass = move || {
            let entering = match from {
                Some(from) => self.group.receive(from, &state)?,
                None => state.zeros_like()?,
            };
            if let Some(to) = to {
                self.group.send(to, &leaving(&entering, &state, &log_decay)?)?;
            }
            Ok(entering)
        };
        match from {
            Some(_) => Ok(Coming::later(pass)),
            // It waits for nobody, and others wait for it.
            None => pass().map(Coming::here),
        }
    }

    fn neighbours(&self) -> [Option<usize>; 2] {
        let (own, size) = (self.group.rank(), self.group.size());
        [own.checked_sub(1), Some(own + 1).filter(|&next| next < size)]
    }
}

/// What leaves a rank: `exp(A) S + U`.
fn leaving(entering: &Tensor, state: &Tensor, log_decay: &Tensor) -> Result<Tensor> {
    entering.broadcast_mul(&log_decay.exp()?)? + state
}

impl StateExchange for Lasp {
    fn parts(&self) -> usize {
        self.group.size()
    }

    fn part(&self) -> usize {
        self.group.rank()
    }

    fn position_offset(&self) -> usize {
        self.group.rank() * self.tokens
    }

    fn prefix(&self, state: &Tensor, log_decay: &Tensor) -> Result<Tensor> {
        self.start_prefix(state, log_decay)?.wait()
    }

    fn suffix(&self, state: &Tensor, log_decay: &Tensor) -> Result<Tensor> {
        self.start_suffix(state, log_decay)?.wait()
    }

    fn start_prefix(&self, state: &Tensor, log_decay: &Tensor) -> Result<Coming<'_>> {
        let [before, behind] = self.neighbours();
        match self.method {
            Method::Ring => self.passed(state, log_decay, before, behind),
            Method::Gather => self.folded(state, log_decay, |own, _| (0..own).collect()),
        }
    }

    fn start_suffix(&self, state: &Tensor, log_decay: &Tensor) -> Result<Coming<'_>> {
        let [before, behind] = self.neighbours();
        match self.method {
            Method::Ring => self.passed(state, log_decay, behind, before),
            Method::Gather => self.folded(state, log_decay, |own, size| (own + 1..size).rev().collect()),
        }
    }

    fn reduce(&self, part: AdditiveState) -> Result<AdditiveState> {
        let AdditiveState { max, den, num } = part;
        let all = self.group.all_reduce(&max, Reduce::Max)?;
        // Channels without any token have a maximum of negative infinity everywhere, and no difference to it.
        let factor = (&max - all.maximum(f64::from(f32::MIN))?)?.exp()?;
        let (b, h, d) = den.dims3()?;
        let rows = num.dim(2)? / d;
        if rows * d != num.dim(2)? {
            bail!("num has {:?}, expected a multiple of {d} rows", num.dims());
        }
        let factors = Tensor::cat(&vec![&factor; rows], 2)?.unsqueeze(3)?;
        let width = num.dim(3)?;
        let own = [
            (den * &factor)?.flatten_all()?,
            num.broadcast_mul(&factors)?.flatten_all()?,
        ];
        let count = own[0].elem_count();
        let sums = self.group.all_reduce(&Tensor::cat(&own, 0)?, Reduce::Sum)?;
        Ok(AdditiveState {
            max: all,
            den: sums.narrow(0, 0, count)?.reshape((b, h, d))?,
            num: sums
                .narrow(0, count, sums.elem_count() - count)?
                .reshape((b, h, rows * d, width))?,
        })
    }

    fn sum(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(self.group.all_reduce(tensor, Reduce::Sum)?)
    }

    fn gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>> {
        Ok(self.group.all_gather(tensor)?)
    }

    fn scatter_sum(&self, rows: &Tensor) -> Result<Tensor> {
        Ok(self.group.reduce_scatter(rows)?)
    }
}

#[cfg(test)]
pub(super) mod tests;
