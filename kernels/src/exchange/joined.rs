//! Exchanges as nodes of the graph: every part joins in forward, and again in backward.

use super::{Coming, StateExchange};
use crate::autograd::{Gradient, Value, attach1, attach2};
use crate::tape::{Needs, Set};
use candle_core::{Result, Tensor, bail};
use std::ops::Range;
use std::sync::Arc;

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

/// The last `count` rows `[B, count, ..]` of the part before this one, zeros for the first part: what a convolution along tokens
/// sees in front of `x` `[B, N, ..]`. Backward, the first rows of the part behind it. Differentiable.
///
/// # Errors
/// Fewer tokens than rows, and an exchange that fails.
pub fn halo(
    exchange: &Arc<dyn StateExchange>,
    x: &Tensor,
    count: usize,
    direction: Direction,
) -> Result<Tensor> {
    let tokens = x.dim(1)?;
    if tokens < count {
        bail!("a part of {tokens} tokens has no {count} rows for its neighbour, expected longer parts");
    }
    let start = match direction {
        Direction::Forward => tokens - count,
        Direction::Backward => 0,
    };
    let rows = x.narrow(1, start, count)?.contiguous()?;
    // A state that is forgotten at once reaches the next part and no other.
    let forgotten = Tensor::full(f32::NEG_INFINITY, vec![1; x.rank()], x.device())?.to_dtype(x.dtype())?;
    incoming(exchange, &rows, &forgotten, direction)
}

/// What all parts have, `[parts, ..]`, all of one shape. Differentiable.
///
/// # Errors
/// An exchange that fails.
pub fn gathered(exchange: &Arc<dyn StateExchange>, own: &Tensor) -> Result<Tensor> {
    let all = Tensor::stack(&exchange.gather(&own.detach().contiguous()?)?, 0)?;
    attach1(Value::Tensor(all), own, Gather(exchange.clone()))
}

struct Gather(Arc<dyn StateExchange>);

impl Gradient<1> for Gather {
    fn name(&self) -> &'static str {
        "gathered"
    }

    fn backward(&self, [own]: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let sum = self.0.scatter_sum(&grad.detach().contiguous()?)?;
        Ok([Some(sum.reshape(own.shape())?)])
    }
}

/// The borders of packed sequences as the part sees them that has the tokens `tokens` of all: from 0 to their number. A border
/// where the part begins leaves an empty sequence in front, which lets nothing in; the first part has none before it.
pub fn part_borders(borders: &[usize], tokens: &Range<usize>) -> Vec<usize> {
    let inside = borders
        .iter()
        .filter(|&&border| tokens.contains(&border) && border > 0)
        .map(|border| border - tokens.start);
    let mut own = vec![0];
    own.extend(inside);
    own.push(tokens.len());
    own
}

/// The sum over all parts of what each computed of the same thing, which all of them read on. Differentiable: the adjoint of the
/// sum is that of each term.
///
/// # Errors
/// An exchange that fails.
pub fn summed(exchange: &Arc<dyn StateExchange>, own: &Tensor) -> Result<Tensor> {
    let sum = exchange.sum(&own.detach().contiguous()?)?;
    attach1(Value::Tensor(sum), own, Shared::new(exchange, false))
}

/// `x`, which all parts have, where each goes on to compute something else from it. Differentiable: adjoints of all parts are
/// summed.
///
/// # Errors
/// A device that is out of memory.
pub fn shared(exchange: &Arc<dyn StateExchange>, x: &Tensor) -> Result<Tensor> {
    attach1(Value::Tensor(x.detach()), x, Shared::new(exchange, true))
}

/// The sum over all parts, from which each goes on to compute something else: [`summed`], then [`shared`].
///
/// # Errors
/// An exchange that fails.
pub fn summed_alike(exchange: &Arc<dyn StateExchange>, own: &Tensor) -> Result<Tensor> {
    let sum = exchange.sum(&own.detach().contiguous()?)?;
    attach1(Value::Tensor(sum), own, Shared::new(exchange, true))
}

/// Passes adjoints on as they are, or as the sum of those of all parts.
struct Shared {
    exchange: Arc<dyn StateExchange>,
    sums: bool,
}

impl Shared {
    fn new(exchange: &Arc<dyn StateExchange>, sums: bool) -> Self {
        Self {
            exchange: exchange.clone(),
            sums,
        }
    }
}

impl Gradient<1> for Shared {
    fn name(&self) -> &'static str {
        "shared"
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::NONE)
    }

    fn backward(&self, _: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let grad = grad.detach().contiguous()?;
        Ok([Some(match self.sums {
            true => self.exchange.sum(&grad)?,
            false => grad,
        })])
    }
}

/// What other parts hand to this one, `[S, ..]`, where the states `leaving` `[S, ..]` of S sequences leave it, with the
/// log-decays `log` of the sequences.
///
/// Of packed sequences the first goes on from the part before, and the last into the part behind: a border between them lets
/// nothing through. For batches of sequences that are all in several parts `packed` is false.
pub(crate) fn arriving(
    exchange: &Arc<dyn StateExchange>,
    leaving: &Tensor,
    log: &Tensor,
    direction: Direction,
    packed: bool,
) -> Result<Tensor> {
    start_arriving(&**exchange, leaving, log, direction, packed)?.wait()
}

/// Starts [`arriving`]: what does not need the states of other parts may be done before it is waited for.
pub(crate) fn start_arriving<'a>(
    exchange: &'a dyn StateExchange,
    leaving: &Tensor,
    log: &Tensor,
    direction: Direction,
    packed: bool,
) -> Result<Coming<'a>> {
    let sequences = leaving.dim(0)?;
    let hand_over = |state: &Tensor, log: &Tensor| {
        let coming = match direction {
            Direction::Forward => exchange.start_prefix(state, log)?,
            Direction::Backward => exchange.start_suffix(state, log)?,
        };
        let expected = state.shape().clone();
        Ok(Coming::later(move || {
            let found = coming.wait()?;
            if found.shape() != &expected {
                bail!("exchanged state: expected {expected:?}, found {:?}", found.dims());
            }
            Ok(found)
        }))
    };
    if !packed || sequences == 1 {
        return hand_over(leaving, log);
    }
    let (from, to) = match direction {
        Direction::Forward => (sequences - 1, 0),
        Direction::Backward => (0, sequences - 1),
    };
    let state = leaving.narrow(0, from, 1)?.contiguous()?;
    let log = log.narrow(0, from, 1)?;
    let closed = Tensor::full(f32::NEG_INFINITY, log.shape(), log.device())?.to_dtype(log.dtype())?;
    let coming = hand_over(&state, &closed)?;
    Ok(Coming::later(move || {
        coming.wait()?.pad_with_zeros(0, to, sequences - 1 - to)
    }))
}
