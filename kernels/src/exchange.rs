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

mod joined;
mod kept;
mod threads;

pub use joined::{Direction, gathered, halo, incoming, part_borders, shared, summed, summed_alike};
pub use kept::Kept;
pub use threads::threads;

pub(crate) use joined::{arriving, start_arriving};

use candle_core::{Result, Tensor, bail};
use std::fmt::Debug;

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

/// A state that is on its way from other parts.
pub struct Coming<'a>(Box<dyn FnOnce() -> Result<Tensor> + 'a>);

impl<'a> Coming<'a> {
    /// One that has arrived.
    pub fn here(state: Tensor) -> Self {
        Self::later(move || Ok(state))
    }

    /// One that `wait` waits for.
    pub fn later(wait: impl FnOnce() -> Result<Tensor> + 'a) -> Self {
        Self(Box::new(wait))
    }

    /// The state, once it is here.
    ///
    /// # Errors
    /// A part is missing.
    pub fn wait(self) -> Result<Tensor> {
        (self.0)()
    }
}

impl Debug for Coming<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Coming")
    }
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

    /// Starts [`Self::prefix`]: what needs no other parts may be done before its result is asked for, and before anything else is
    /// exchanged.
    fn start_prefix(&self, state: &Tensor, log_decay: &Tensor) -> Result<Coming<'_>> {
        self.prefix(state, log_decay).map(Coming::here)
    }

    /// Starts [`Self::suffix`], as [`Self::start_prefix`].
    fn start_suffix(&self, state: &Tensor, log_decay: &Tensor) -> Result<Coming<'_>> {
        self.suffix(state, log_decay).map(Coming::here)
    }

    /// Merges the statistics of all parts; every part gets the same result, bit for bit.
    fn reduce(&self, part: AdditiveState) -> Result<AdditiveState> {
        Ok(part)
    }

    /// Sum over all parts; every part gets the same result, bit for bit.
    fn sum(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.clone())
    }

    /// What every part has, in the order of parts; all have the same shape.
    fn gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>> {
        Ok(vec![tensor.clone()])
    }

    /// Of `[parts, ..]` summed over all parts, this part's row: the adjoint of [`Self::gather`].
    fn scatter_sum(&self, rows: &Tensor) -> Result<Tensor> {
        rows.get(0)
    }
}

/// A sequence in one part.
#[derive(Clone, Copy, Debug, Default)]
pub struct Identity;

impl StateExchange for Identity {}

#[cfg(test)]
mod tests {
    use super::threads::threads_that_wait;
    use super::*;
    use candle_core::{Device, Var};
    use std::time::Duration;

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

    /// The rows of a neighbour, the gradient that goes back to it, and zeros where there is none.
    #[test]
    fn halos_are_the_rows_of_neighbours() -> Result<()> {
        let x: Vec<f64> = (1..=12).map(f64::from).collect();
        for direction in [Direction::Forward, Direction::Backward] {
            let exchanges = threads(&[4, 4, 4]);
            let found: Vec<[Vec<f64>; 2]> = std::thread::scope(|scope| {
                let handles: Vec<_> = exchanges
                    .into_iter()
                    .enumerate()
                    .map(|(i, exchange)| {
                        let own = x[4 * i..4 * i + 4].to_vec();
                        scope.spawn(move || -> Result<[Vec<f64>; 2]> {
                            let own = Var::from_vec(own, (1, 4, 1), &Device::Cpu)?;
                            let rows = halo(&exchange, &own, 2, direction)?;
                            let weights = Tensor::new(&[10.0 + i as f64, 20.0 + i as f64], &Device::Cpu)?;
                            let loss = (rows.flatten_all()? * weights)?.sum_all()?;
                            let grads = loss.backward()?;
                            let Some(grad) = grads.get(&own) else {
                                bail!("no gradient")
                            };
                            Ok([rows.flatten_all()?.to_vec1()?, grad.flatten_all()?.to_vec1()?])
                        })
                    })
                    .collect();
                handles
                    .into_iter()
                    .map(|h| h.join().unwrap())
                    .collect::<Result<_>>()
            })?;
            let expected = match direction {
                Direction::Forward => [
                    [vec![0.0, 0.0], vec![0.0, 0.0, 11.0, 21.0]],
                    [vec![3.0, 4.0], vec![0.0, 0.0, 12.0, 22.0]],
                    [vec![7.0, 8.0], vec![0.0; 4]],
                ],
                Direction::Backward => [
                    [vec![5.0, 6.0], vec![0.0; 4]],
                    [vec![9.0, 10.0], vec![10.0, 20.0, 0.0, 0.0]],
                    [vec![0.0, 0.0], vec![11.0, 21.0, 0.0, 0.0]],
                ],
            };
            assert_eq!(found, expected);
        }
        Ok(())
    }

    #[test]
    fn borders_of_parts() {
        let borders = [0, 3, 5, 5, 12];
        assert_eq!(part_borders(&borders, &(0..5)), [0, 3, 5]);
        assert_eq!(part_borders(&borders, &(5..6)), [0, 0, 0, 1]);
        assert_eq!(part_borders(&borders, &(6..12)), [0, 6]);
        assert_eq!(part_borders(&borders, &(0..12)), [0, 3, 5, 5, 12]);
    }

    /// Work that is done twice exchanges once.
    #[test]
    fn what_was_brought_is_kept() -> Result<()> {
        let exchanges = threads(&[1, 1]);
        std::thread::scope(|scope| {
            let handles: Vec<_> = exchanges
                .into_iter()
                .enumerate()
                .map(|(i, exchange)| {
                    scope.spawn(move || -> Result<[f64; 3]> {
                        let kept = Kept::new(exchange);
                        let ask = |x: f64| -> Result<f64> {
                            let sum = kept.sum(&Tensor::new(&[x], &Device::Cpu)?)?;
                            Ok(sum.to_vec1::<f64>()?[0])
                        };
                        kept.begin();
                        let first = ask(1.0 + i as f64)?;
                        kept.begin();
                        Ok([first, ask(100.0)?, ask(10.0 + i as f64)?])
                    })
                })
                .collect();
            for handle in handles {
                assert_eq!(handle.join().unwrap()?, [3.0, 3.0, 21.0]);
            }
            Ok(())
        })
    }
}
