//! The seam between single-device operators and sequences that are split into parts.
//!
//! A part holds consecutive tokens. Operators compute on their own tokens and pass fixed-size states through a
//! [`StateExchange`]; whether parts are threads, processes or hosts is the affair of its implementation. With
//! local state `U_i` (from a zero start) and total log-decay `A_i` of part i, causal scans need
//!
//! ```text
//!   prefix  P_i = sum_{j<i} exp(sum_{j<p<i} A_p) U_j        the incoming state S_{i-1}
//!   suffix  R_i = sum_{j>i} exp(sum_{i<p<j} A_p) dU_j       the adjoint of the outgoing state S_i
//! ```
//!
//! A scan from the last token to the first swaps the two. The non-causal form needs no order: it merges
//! (max, den, num) over all parts and, in backward, adds the adjoints of the state.
//!
//! Every method is collective: all parts call the same methods in the same order, forward and backward.

use crate::autograd::{Gradient, Value, attach2};
use candle_core::{Result, Tensor, bail};
use std::fmt::Debug;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// Running softmax statistics and the unnormalised state of an additive recurrence.
#[derive(Clone, Debug)]
pub struct AdditiveState {
    /// Largest logit of each channel, `[B, H, D]`; negative infinity where no token counts.
    pub max: Tensor,
    /// Sum of `exp(logit - max)` over tokens, `[B, H, D]`.
    pub den: Tensor,
    /// Sum of `exp(logit - max) v^T` over tokens, `[B, H, D, E]`, or `[B, H, 2D, E]` with cosine rows first and
    /// sine rows after them.
    pub num: Tensor,
}

impl AdditiveState {
    /// Merges the states of several parts in the order given, which fixes the rounding.
    ///
    /// Fails when `parts` is empty or shapes differ.
    pub fn merge(parts: &[Self]) -> Result<Self> {
        let Some((first, rest)) = parts.split_first() else {
            bail!("no states to merge");
        };
        let mut whole = first.clone();
        for part in rest {
            let max = whole.max.maximum(&part.max)?;
            let reference = finite(&max)?;
            let ours = (finite_difference(&whole.max, &reference))?;
            let theirs = (finite_difference(&part.max, &reference))?;
            whole = Self {
                den: ((&whole.den * &ours)? + (&part.den * &theirs)?)?,
                num: (scale_rows(&whole.num, &ours)? + scale_rows(&part.num, &theirs)?)?,
                max,
            };
        }
        Ok(whole)
    }

    /// The state `num / den`, `[B, H, D or 2D, E]`; rows without any token are zero.
    pub fn normalise(&self) -> Result<Tensor> {
        let empty = self.den.eq(0f64)?;
        let inverse = empty.where_cond(&self.den.zeros_like()?, &self.den.recip()?)?;
        scale_rows(&self.num, &inverse)
    }
}

/// Negative infinity becomes the lowest `f32`, so that differences of logits are never infinity minus infinity.
pub(crate) fn finite(max: &Tensor) -> Result<Tensor> {
    max.maximum(f64::from(f32::MIN))
}

fn finite_difference(max: &Tensor, reference: &Tensor) -> Result<Tensor> {
    (max - reference)?.exp()
}

/// Scales row c of `num [B, H, D or 2D, E]` by `factor [B, H, D]`, the second half by the same factors.
fn scale_rows(num: &Tensor, factor: &Tensor) -> Result<Tensor> {
    let halves = num.dim(2)? / factor.dim(2)?;
    let factor = if halves == 2 {
        Tensor::cat(&[factor, factor], 2)?
    } else {
        factor.clone()
    };
    num.broadcast_mul(&factor.unsqueeze(3)?)
}

/// How parts of one sequence exchange states. The default of every method is a sequence of one part.
///
/// All tensors are detached. An error on one part (a timeout, a mismatched shape) ends the step there; the other
/// parts must then end by their own timeouts.
pub trait StateExchange: Debug + Send + Sync {
    /// Number of parts of the sequence; 1 means that nothing is exchanged and no other method is called.
    fn parts(&self) -> usize {
        1
    }

    /// Number of this part, from 0 in the order of tokens.
    fn part(&self) -> usize {
        0
    }

    /// Position in the whole sequence of this part's first token, in tokens.
    fn position_offset(&self) -> usize {
        0
    }

    /// State of all tokens before this part: `P_i` above; zeros for the first part. `log_decay` has the rank of
    /// `state` and broadcasts to it.
    fn prefix(&self, state: &Tensor, log_decay: &Tensor) -> Result<Tensor> {
        let _ = log_decay;
        state.zeros_like()
    }

    /// The mirror image over the parts after this one: `R_i` above; zeros for the last part.
    fn suffix(&self, state: &Tensor, log_decay: &Tensor) -> Result<Tensor> {
        let _ = log_decay;
        state.zeros_like()
    }

    /// Merges the statistics of all parts; every part gets the same result, bit for bit.
    fn reduce(&self, part: AdditiveState) -> Result<AdditiveState> {
        Ok(part)
    }

    /// Sum over all parts; every part gets the same result, bit for bit.
    fn sum(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.clone())
    }
}

/// A sequence in one part.
#[derive(Clone, Copy, Debug, Default)]
pub struct Identity;

impl StateExchange for Identity {}

/// Which way a scan runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the first token to the last.
    Forward,
    /// From the last token to the first.
    Backward,
}

/// The state that enters this part of a scan, differentiable in the part's own `state` (from a zero start) and in
/// its total `log_decay`, which has the rank of `state` and broadcasts to it.
///
/// Compute everything that does not need the incoming state before this call: it may wait for other parts.
pub fn incoming(
    exchange: &Arc<dyn StateExchange>,
    state: &Tensor,
    log_decay: &Tensor,
    direction: Direction,
) -> Result<Tensor> {
    if state.rank() != log_decay.rank() {
        bail!(
            "log_decay: expected {} dimensions, found {:?}",
            state.rank(),
            log_decay.dims()
        );
    }
    let value = match direction {
        Direction::Forward => exchange.prefix(&state.detach(), &log_decay.detach())?,
        Direction::Backward => exchange.suffix(&state.detach(), &log_decay.detach())?,
    };
    if value.shape() != state.shape() {
        bail!(
            "incoming state: expected {:?}, found {:?}",
            state.dims(),
            value.dims()
        );
    }
    let gradient = Chain {
        exchange: exchange.clone(),
        direction,
    };
    attach2(Value::Tensor(value), [state, log_decay], gradient)
}

struct Chain {
    exchange: Arc<dyn StateExchange>,
    direction: Direction,
}

impl Gradient<2> for Chain {
    fn name(&self) -> &'static str {
        "incoming-state"
    }

    fn backward(&self, args: [&Tensor; 2], res: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let log_decay = args[1].detach();
        let outgoing = match self.direction {
            Direction::Forward => self.exchange.suffix(grad, &log_decay)?,
            Direction::Backward => self.exchange.prefix(grad, &log_decay)?,
        };
        // The state that leaves is exp(A) P + U, so that its adjoint reaches U as it is and A through P.
        let mut d_log_decay = (res.broadcast_mul(&log_decay.exp()?)? * &outgoing)?;
        for (dim, &size) in log_decay.dims().iter().enumerate() {
            if size == 1 {
                d_log_decay = d_log_decay.sum_keepdim(dim)?;
            }
        }
        Ok([Some(outgoing), Some(d_log_decay)])
    }
}

/// Parts as threads of one process: one exchange for each part, `tokens` long, in order.
///
/// Serves tests and small machines. A part that waits longer than a minute for the others gets an error that
/// names the missing ones.
pub fn threads(tokens: &[usize]) -> Vec<Arc<dyn StateExchange>> {
    threads_that_wait(tokens, PATIENCE)
}

fn threads_that_wait(tokens: &[usize], patience: Duration) -> Vec<Arc<dyn StateExchange>> {
    let meeting = Arc::new(Meeting {
        round: Mutex::new(Round {
            number: 0,
            posted: vec![None; tokens.len()],
            last: Arc::new(Vec::new()),
        }),
        complete: Condvar::new(),
        patience,
    });
    (0..tokens.len())
        .map(|part| {
            Arc::new(Threads {
                part,
                offset: tokens[..part].iter().sum(),
                parts: tokens.len(),
                meeting: meeting.clone(),
            }) as Arc<dyn StateExchange>
        })
        .collect()
}

const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Threads {
    part: usize,
    parts: usize,
    offset: usize,
    meeting: Arc<Meeting>,
}

#[derive(Debug)]
struct Meeting {
    round: Mutex<Round>,
    complete: Condvar,
    patience: Duration,
}

#[derive(Debug)]
struct Round {
    number: u64,
    posted: Vec<Option<Vec<Tensor>>>,
    last: Arc<Vec<Vec<Tensor>>>,
}

impl Threads {
    /// What every part posted, in the order of parts.
    fn gather(&self, tensors: Vec<Tensor>) -> Result<Arc<Vec<Vec<Tensor>>>> {
        let Ok(mut round) = self.meeting.round.lock() else {
            bail!("part {}: another part panicked during an exchange", self.part);
        };
        round.posted[self.part] = Some(tensors);
        if round.posted.iter().all(Option::is_some) {
            round.last = Arc::new(round.posted.iter_mut().filter_map(Option::take).collect());
            round.number += 1;
            self.meeting.complete.notify_all();
            return Ok(round.last.clone());
        }
        let number = round.number;
        let waited = self
            .meeting
            .complete
            .wait_timeout_while(round, self.meeting.patience, |r| r.number == number);
        let Ok((round, timeout)) = waited else {
            bail!("part {}: another part panicked during an exchange", self.part);
        };
        if timeout.timed_out() {
            let missing: Vec<usize> = (0..self.parts).filter(|&p| round.posted[p].is_none()).collect();
            bail!(
                "part {}: waited {:?} for parts {missing:?}",
                self.part,
                self.meeting.patience
            );
        }
        Ok(round.last.clone())
    }

    /// Decayed sum of the states of `parts`, the farthest first.
    fn chain(
        &self,
        state: &Tensor,
        log_decay: &Tensor,
        order: impl Fn(usize) -> Vec<usize>,
    ) -> Result<Tensor> {
        let all = self.gather(vec![state.clone(), log_decay.clone()])?;
        let mut sum = state.zeros_like()?;
        for part in order(self.parts) {
            sum = (sum.broadcast_mul(&all[part][1].exp()?)? + &all[part][0])?;
        }
        Ok(sum)
    }
}

impl StateExchange for Threads {
    fn parts(&self) -> usize {
        self.parts
    }

    fn part(&self) -> usize {
        self.part
    }

    fn position_offset(&self) -> usize {
        self.offset
    }

    fn prefix(&self, state: &Tensor, log_decay: &Tensor) -> Result<Tensor> {
        self.chain(state, log_decay, |_| (0..self.part).collect())
    }

    fn suffix(&self, state: &Tensor, log_decay: &Tensor) -> Result<Tensor> {
        self.chain(state, log_decay, |parts| (self.part + 1..parts).rev().collect())
    }

    fn reduce(&self, part: AdditiveState) -> Result<AdditiveState> {
        let all = self.gather(vec![part.max, part.den, part.num])?;
        let parts: Vec<AdditiveState> = all
            .iter()
            .map(|tensors| AdditiveState {
                max: tensors[0].clone(),
                den: tensors[1].clone(),
                num: tensors[2].clone(),
            })
            .collect();
        AdditiveState::merge(&parts)
    }

    fn sum(&self, tensor: &Tensor) -> Result<Tensor> {
        let all = self.gather(vec![tensor.clone()])?;
        let mut sum = all[0][0].clone();
        for part in &all[1..] {
            sum = (sum + &part[0])?;
        }
        Ok(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    /// Three parts of a scalar chain: S_i = exp(A_i) S_{i-1} + U_i, loss = sum_i c_i P_i; gradients by hand.
    #[test]
    fn chain_and_its_gradient() -> Result<()> {
        let (u, a, c) = ([2.0, 3.0, 5.0f64], [-0.1, -0.7, -0.3f64], [1.5, -2.0, 4.0f64]);
        let exchanges = threads(&[4, 5, 6]);
        let handles: Vec<_> = exchanges
            .into_iter()
            .enumerate()
            .map(|(i, exchange)| {
                std::thread::spawn(move || -> Result<(usize, [f64; 3])> {
                    let state = Var::new(&[u[i]], &Device::Cpu)?;
                    let decay = Var::new(&[a[i]], &Device::Cpu)?;
                    let p = incoming(&exchange, &state, &decay, Direction::Forward)?;
                    let grads = (&p * c[i])?.sum_all()?.backward()?;
                    let read = |t: &Var| match grads.get(t) {
                        Some(g) => g.to_vec1::<f64>().map(|g| g[0]),
                        None => Ok(f64::NAN),
                    };
                    Ok((
                        exchange.position_offset(),
                        [p.to_vec1::<f64>()?[0], read(&state)?, read(&decay)?],
                    ))
                })
            })
            .collect();
        let found: Vec<_> = handles
            .into_iter()
            .map(|h| h.join().unwrap())
            .collect::<Result<_>>()?;
        let expected = [
            [0.0, c[1] + c[2] * a[1].exp(), 0.0],
            [u[0], c[2], c[2] * a[1].exp() * u[0]],
            [u[1] + a[1].exp() * u[0], 0.0, 0.0],
        ];
        for (i, (offset, values)) in found.iter().enumerate() {
            assert_eq!(*offset, [0, 4, 9][i]);
            for (value, expected) in values.iter().zip(expected[i]) {
                assert!(
                    (value - expected).abs() < 1e-12,
                    "part {i}: {values:?}, expected {expected:?}"
                );
            }
        }
        Ok(())
    }

    #[test]
    fn a_missing_part_is_named() {
        let exchanges = threads_that_wait(&[1, 1, 1], Duration::from_millis(20));
        let tensor = Tensor::new(&[1f32], &Device::Cpu).unwrap();
        let text = exchanges[1].sum(&tensor).unwrap_err().to_string();
        assert!(text.contains("part 1: waited 20ms for parts [0, 2]"), "{text}");
    }

    #[test]
    fn merging_keeps_parts_without_tokens_out() -> Result<()> {
        let device = &Device::Cpu;
        let empty = AdditiveState {
            max: Tensor::full(f32::NEG_INFINITY, (1, 1, 1), device)?,
            den: Tensor::zeros((1, 1, 1), candle_core::DType::F32, device)?,
            num: Tensor::zeros((1, 1, 1, 2), candle_core::DType::F32, device)?,
        };
        let part = AdditiveState {
            max: Tensor::full(3f32, (1, 1, 1), device)?,
            den: Tensor::full(2f32, (1, 1, 1), device)?,
            num: Tensor::new(&[[[[4f32, 6.0]]]], device)?,
        };
        let merged = AdditiveState::merge(&[empty.clone(), part, empty.clone()])?;
        assert_eq!(merged.normalise()?.flatten_all()?.to_vec1::<f32>()?, [2.0, 3.0]);
        let nothing = AdditiveState::merge(&[empty.clone(), empty])?;
        assert_eq!(nothing.normalise()?.flatten_all()?.to_vec1::<f32>()?, [0.0, 0.0]);
        assert!(AdditiveState::merge(&[]).is_err());
        Ok(())
    }
}
