//! The causal form: every token reads the tokens up to itself, weighed by the softmax of their logits.
//!
//! ```text
//!   z_t = log sum_{s <= t} exp(g_s),     S_t = diag(exp(z_{t-1} - z_t)) S_{t-1} + exp(g_t - z_t) v_t^T,     o_t = S_t^T q_t
//! ```
//!
//! It is [`decay::causal`] with the decay `z_{t-1} - z_t` for each channel and the keys `exp(g_t - z_t)`. On a GPU the kernels
//! of that operator make both from logits and gates on the way (`decay/cuda/additive.rs`) where they take the element type
//! and the widths; else it is composed here.

use crate::decay::{self, LogDecay};
use crate::error::OpError;
use crate::exchange::{StateExchange, gathered};
use crate::log_sum::{NOTHING, log_sum};
use candle_core::{D, DType, Device, Result, Tensor};
use std::sync::Arc;

const NAME: &str = "additive::causal";

/// Everything that the tokens so far leave behind.
#[derive(Clone, Debug)]
pub struct CausalState {
    /// The weighted mean of values for each channel, `[B, H, D, E]`.
    pub state: Tensor,
    /// Logarithm of the sum of the weights, `[B, H, D]`.
    pub log_sum: Tensor,
}

/// What [`causal`] takes besides queries, logits and values.
#[derive(Clone, Debug, Default)]
pub struct Causal<'a> {
    /// What tokens before the first have left. Differentiable.
    pub initial: Option<&'a CausalState>,
    /// Joins the parts of a sequence, as [`decay::Causal::exchange`].
    pub exchange: Option<Arc<dyn StateExchange>>,
    /// Borders of packed sequences, as [`decay::Causal::sequences`].
    pub sequences: Option<&'a [usize]>,
}

/// The causal additive recurrence: queries and logits `[B, N, H, D]`, `v` `[B, N, H, E]`, of any strides, to the output
/// `[B, N, H, E]` in the type of `v` and what the tokens leave behind, in f32 (f64 if an input is).
///
/// Element types and devices are those of [`decay::causal`]; on a GPU, f16 and bf16 with D and E multiples of 8 up to 128
/// go through tensor cores, without an exchange. Padding is a logit of negative infinity. Differentiable in all inputs,
/// through the output and through the final state.
///
/// # Errors
/// As [`decay::causal`] and [`log_sum`].
pub fn causal(
    q: &Tensor,
    logits: &Tensor,
    v: &Tensor,
    options: &Causal<'_>,
) -> Result<(Tensor, CausalState)> {
    let Ok((_, _, h, d)) = q.dims4() else {
        return Err(OpError::shape(NAME, "q", q, "[B, N, H, D]").into());
    };
    if logits.dims() != q.dims() {
        return Err(OpError::shape(NAME, "logits", logits, format!("{:?} like q", q.dims())).into());
    }
    let exchange = options.exchange.clone().filter(|exchange| exchange.parts() > 1);
    let decays = decay::Causal {
        decay: LogDecay::None,
        initial: options.initial.map(|initial| &initial.state),
        exchange: exchange.clone(),
        sequences: options.sequences,
    };
    let dims = decay::check(q, logits, v, &decays)?;
    let sequences = options.sequences.map_or(dims.b, |borders| borders.len() - 1);
    if let Some(CausalState { log_sum, .. }) = options.initial
        && log_sum.dims() != [sequences, h, d]
    {
        let expected = format!("[{sequences}, {h}, {d}]");
        return Err(OpError::shape(NAME, "initial log_sum", log_sum, expected).into());
    }
    #[cfg(feature = "cuda")]
    if exchange.is_none()
        && let Some(found) = decay::cuda::additive(q, logits, v, options, dims)?
    {
        return Ok(found);
    }
    let before = match (&exchange, options.initial) {
        (None, initial) => initial.map(|initial| initial.log_sum.clone()),
        (Some(exchange), initial) => {
            let own = initial.map(|initial| &initial.log_sum);
            Some(log_sum_before(exchange, logits, own, options.sequences)?)
        }
    };
    let z = log_sum(logits, before.as_ref(), options.sequences)?;
    let shifted = shifted(&z, before.as_ref(), options.sequences)?;
    let log = (shifted.rows - &z)?;
    let k = (logits.to_dtype(z.dtype())? - &z)?.exp()?;
    let decays = decay::Causal {
        decay: LogDecay::Channel(&log),
        ..decays
    };
    let (o, state) = decay::causal(q, &k, v, &decays)?;
    let log_sum = shifted.last;
    Ok((o, CausalState { state, log_sum }))
}

/// The gates one token later, and those of the last tokens.
struct Shifted {
    rows: Tensor,
    last: Tensor,
}

/// Moves gates `[B, N, H, D]` to the token after; first tokens get `before`, or, where nothing comes before, their own.
fn shifted(z: &Tensor, before: Option<&Tensor>, borders: Option<&[usize]>) -> Result<Shifted> {
    let n = z.dim(1)?;
    let whole = [0, n];
    let borders = borders.unwrap_or(&whole);
    let (mut rows, mut last) = (Vec::new(), Vec::new());
    for (index, pair) in borders.windows(2).enumerate() {
        let (start, count) = (pair[0], pair[1] - pair[0]);
        // All batches of one sequence each, or one of several packed sequences.
        let first = match before {
            Some(before) if borders.len() > 2 => Some(before.narrow(0, index, 1)?.unsqueeze(1)?),
            Some(before) => Some(before.unsqueeze(1)?),
            None => None,
        };
        if count == 0 {
            let nothing = || z.narrow(1, 0, 1)?.zeros_like()?.affine(0.0, NOTHING);
            last.push(first.map_or_else(nothing, Ok)?.squeeze(1)?);
            continue;
        }
        rows.push(
            first
                .map_or_else(|| z.narrow(1, start, 1), Ok)?
                .to_dtype(z.dtype())?,
        );
        rows.push(z.narrow(1, start, count - 1)?);
        last.push(z.narrow(1, start + count - 1, 1)?.squeeze(1)?);
    }
    rows.retain(|rows| rows.elem_count() > 0);
    Ok(Shifted {
        rows: Tensor::cat(&rows, 1)?,
        last: Tensor::cat(&last, 0)?,
    })
}

/// Logarithms of the sums of weights before the first tokens of a part of a sequence, `[B, H, D]`: of all parts before it, and of
/// what came before the first, `own`. Of packed sequences `[S, H, D]`: the first goes on from the part before, as far back as
/// there is no border, and the others begin with nothing. Differentiable in logits `[B, N, H, D]` and `own`.
///
/// # Errors
/// As [`log_sum`], and an exchange that fails.
pub fn log_sum_before(
    exchange: &Arc<dyn StateExchange>,
    logits: &Tensor,
    own: Option<&Tensor>,
    borders: Option<&[usize]>,
) -> Result<Tensor> {
    let z = log_sum(logits, own, borders)?;
    let sequences = borders.map_or(1, |borders| borders.len() - 1);
    let total = match borders {
        None => z.narrow(1, z.dim(1)? - 1, 1)?.squeeze(1)?.contiguous()?,
        Some(borders) => shifted(&z, own, Some(borders))?
            .last
            .narrow(0, sequences - 1, 1)?
            .contiguous()?,
    };
    let all = gathered(exchange, &total)?;
    let visible = match borders {
        None => vec![true; exchange.part()],
        Some(_) => visible_parts(exchange, sequences > 1, &total)?,
    };
    // What has no weight stays in the graph: every part has to join in the backward pass.
    let hidden: Vec<f64> = (0..exchange.parts())
        .map(|part| match visible.get(part) {
            Some(true) => 0.0,
            _ => NOTHING,
        })
        .collect();
    let hidden =
        Tensor::from_vec(hidden, (exchange.parts(), 1, 1, 1), &Device::Cpu)?.to_dtype(all.dtype())?;
    let mut known = all.broadcast_add(&hidden.to_device(all.device())?)?;
    let first = |own: &Tensor| match borders {
        None => Ok(own.clone()),
        Some(_) => own.narrow(0, 0, 1),
    };
    if let Some(own) = own {
        let own = first(own)?.to_dtype(known.dtype())?.unsqueeze(0)?;
        known = Tensor::cat(&[&known, &own], 0)?;
    }
    let max = known.detach().max_keepdim(0)?;
    let sum = known.broadcast_sub(&max)?.exp()?.sum_keepdim(0)?.log()?;
    let before = (sum + max)?.squeeze(0)?;
    if sequences == 1 {
        return Ok(before);
    }
    let others = match own {
        Some(own) => own.narrow(0, 1, sequences - 1)?.to_dtype(before.dtype())?,
        None => before
            .detach()
            .affine(0.0, NOTHING)?
            .repeat((sequences - 1, 1, 1))?,
    };
    Tensor::cat(&[&before, &others], 0)
}

/// Which of the parts before this one its first sequence goes on from: those up to the last border.
fn visible_parts(exchange: &Arc<dyn StateExchange>, has_border: bool, like: &Tensor) -> Result<Vec<bool>> {
    let own = Tensor::new(&[u32::from(has_border)], &Device::Cpu)?.to_dtype(DType::F32)?;
    let mut borders = Vec::with_capacity(exchange.parts());
    for flag in exchange.gather(&own.to_device(like.device())?)? {
        borders.push(flag.to_vec1::<f32>()?[0] > 0.0);
    }
    let before = &borders[..exchange.part()];
    let first = before.iter().rposition(|&border| border).unwrap_or(0);
    Ok((0..before.len()).map(|part| part >= first).collect())
}

/// One token of the causal recurrence: `q`, `logits` `[B, H, D]`, `v` `[B, H, E]` and what came before, to the output
/// `[B, H, E]` in the type of `v` and what is left behind. Not differentiable.
///
/// # Errors
/// As [`decay::step`].
pub fn step(q: &Tensor, logits: &Tensor, v: &Tensor, before: &CausalState) -> Result<(Tensor, CausalState)> {
    let [log_sum, decay, k] = weights(q, logits, before)?;
    let (o, state) = decay::step(q, &k, v, LogDecay::Channel(&decay), &before.state)?;
    Ok((o, CausalState { state, log_sum }))
}

/// As [`step`], but the state after it is written over the one before, as by [`decay::step_in_place`]. Its logarithms of sums
/// are tensors of their own.
///
/// # Errors
/// As [`decay::step_in_place`].
pub fn step_in_place(
    q: &Tensor,
    logits: &Tensor,
    v: &Tensor,
    before: &CausalState,
) -> Result<(Tensor, CausalState)> {
    let [log_sum, decay, k] = weights(q, logits, before)?;
    let o = decay::step_in_place(q, &k, v, LogDecay::Channel(&decay), &before.state)?;
    let state = before.state.clone();
    Ok((o, CausalState { state, log_sum }))
}

/// The logarithms of the sums with the token, the log-decays of what came before it, and its keys.
fn weights(q: &Tensor, logits: &Tensor, before: &CausalState) -> Result<[Tensor; 3]> {
    for (field, tensor) in [("logits", logits), ("log_sum", &before.log_sum)] {
        if tensor.dims() != q.dims() {
            let expected = format!("{:?} like q", q.dims());
            return Err(OpError::shape("additive::step", field, tensor, expected).into());
        }
    }
    let logits = logits.detach().to_dtype(before.log_sum.dtype())?;
    let pair = Tensor::stack(&[&before.log_sum.detach(), &logits], D::Minus1)?;
    let max = pair.max(D::Minus1)?;
    let log_sum = (pair
        .broadcast_sub(&max.unsqueeze(D::Minus1)?)?
        .exp()?
        .sum(D::Minus1)?
        .log()?
        + max)?;
    let (decay, k) = ((&before.log_sum - &log_sum)?, (logits - &log_sum)?.exp()?);
    let decay = decay.detach().to_dtype(match log_sum.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    })?;
    Ok([log_sum, decay, k])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{
        PACKED, PARTS, check_gradients, check_parts, check_precision, normal, own_borders, relative_rms,
        values,
    };
    use candle_core::IndexOp;

    /// Sums over all pairs of tokens, in f64: output, state and log-sum.
    fn literal(t: &[Tensor]) -> [Vec<f64>; 3] {
        let &[b, n, h, d] = t[0].dims() else {
            panic!("four axes")
        };
        let e = t[2].dims()[3];
        let [q, g, v] = [values(&t[0]), values(&t[1]), values(&t[2])];
        let before = t.get(3).map(|s| (values(s), values(&t[4])));
        let (mut o, mut state, mut sums) = (vec![0.0; b * n * h * e], Vec::new(), Vec::new());
        for batch in 0..b {
            for head in 0..h {
                for c in 0..d {
                    let line = (batch * h + head) * d + c;
                    let row = |t: usize| (batch * n + t) * h + head;
                    let (mut num, mut den) = match &before {
                        Some((s, z)) => {
                            let den = z[line].exp();
                            ((0..e).map(|i| den * s[line * e + i]).collect(), den)
                        }
                        None => (vec![0.0; e], 0.0),
                    };
                    for t in 0..n {
                        let weight = g[row(t) * d + c].exp();
                        den += weight;
                        for i in 0..e {
                            num[i] += weight * v[row(t) * e + i];
                            o[row(t) * e + i] += q[row(t) * d + c] * num[i] / den;
                        }
                    }
                    state.extend(num.iter().map(|x| x / den));
                    sums.push(den.ln());
                }
            }
        }
        [o, state, sums]
    }

    fn inputs(n: usize) -> Vec<Tensor> {
        vec![
            normal(1, &[2, n, 3, 4]),
            normal(2, &[2, n, 3, 4]),
            normal(3, &[2, n, 3, 5]),
            normal(4, &[2, 3, 4, 5]),
            normal(5, &[2, 3, 4]),
        ]
    }

    /// Output, state and log-sum in a row.
    fn run(t: &[Tensor]) -> Result<Tensor> {
        run_packed(t, None)
    }

    fn run_packed(t: &[Tensor], sequences: Option<&[usize]>) -> Result<Tensor> {
        let initial = match t {
            [_, _, _, state, log_sum] => Some(CausalState {
                state: state.clone(),
                log_sum: log_sum.clone(),
            }),
            _ => None,
        };
        let options = Causal {
            initial: initial.as_ref(),
            sequences,
            ..Default::default()
        };
        let (o, last) = causal(&t[0], &t[1], &t[2], &options)?;
        let rows = [
            o.flatten_all()?,
            last.state.flatten_all()?,
            last.log_sum.flatten_all()?,
        ];
        Tensor::cat(&rows, 0)
    }

    #[test]
    fn it_is_the_softmax_over_earlier_tokens() -> Result<()> {
        for n in [1, 2, 17, 65, 130] {
            let t = inputs(n);
            for t in [&t[..3], &t] {
                let found = values(&run(t)?);
                assert!(relative_rms(&found, &literal(t).concat()) < 1e-10, "{n} tokens");
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_are_those_of_differences() -> Result<()> {
        check_gradients(&inputs(4), run)?;
        check_gradients(&inputs(3)[..3], run)?;
        // Packed sequences, one of them empty.
        let pack = |t: &Tensor| t.narrow(0, 0, 1);
        let all = inputs(5);
        let spread = |t: &Tensor| Tensor::cat(&[t, &t.narrow(0, 0, 1)?], 0);
        let packed = [
            pack(&all[0])?,
            pack(&all[1])?,
            pack(&all[2])?,
            spread(&all[3])?,
            spread(&all[4])?,
        ];
        check_gradients(&packed, |t| run_packed(t, Some(&[0, 2, 2, 5])))
    }

    #[test]
    fn single_precision_is_close() -> Result<()> {
        check_precision(&inputs(200), run, 2e-5)
    }

    /// A constant added to the logits of a channel changes nothing but the sums.
    #[test]
    fn a_shift_of_logits_changes_nothing() -> Result<()> {
        let mut t: Vec<Tensor> = inputs(40)[..3]
            .iter()
            .map(|t| t.to_dtype(DType::F32))
            .collect::<Result<_>>()?;
        let (o, _) = causal(&t[0], &t[1], &t[2], &Causal::default())?;
        t[1] = (&t[1] + 64.0)?;
        let (moved, _) = causal(&t[0], &t[1], &t[2], &Causal::default())?;
        assert!(relative_rms(&values(&moved), &values(&o)) < 1e-4);
        Ok(())
    }

    #[test]
    fn steps_and_packed_sequences_are_the_whole() -> Result<()> {
        let t = inputs(9);
        let expected = literal(&t);
        let mut last = CausalState {
            state: t[3].clone(),
            log_sum: t[4].clone(),
        };
        let mut rows = Vec::new();
        for i in 0..9 {
            let at = |t: &Tensor| t.i((.., i));
            let (o, after) = step(&at(&t[0])?, &at(&t[1])?, &at(&t[2])?, &last)?;
            rows.push(o);
            last = after;
        }
        assert!(relative_rms(&values(&Tensor::stack(&rows, 1)?), &expected[0]) < 1e-10);
        assert!(relative_rms(&values(&last.state), &expected[1]) < 1e-10);
        assert!(relative_rms(&values(&last.log_sum), &expected[2]) < 1e-10);

        // Both batches as packed sequences, with an empty one between them.
        let pack = |t: &Tensor| Tensor::cat(&[t.narrow(0, 0, 1)?, t.narrow(0, 1, 1)?], 1);
        let spread =
            |t: &Tensor| Tensor::cat(&[t.narrow(0, 0, 1)?, t.narrow(0, 0, 1)?, t.narrow(0, 1, 1)?], 0);
        let initial = CausalState {
            state: spread(&t[3])?,
            log_sum: spread(&t[4])?,
        };
        let options = Causal {
            initial: Some(&initial),
            sequences: Some(&[0, 9, 9, 18]),
            ..Default::default()
        };
        let (o, last) = causal(&pack(&t[0])?, &pack(&t[1])?, &pack(&t[2])?, &options)?;
        assert!(relative_rms(&values(&o), &expected[0]) < 1e-10);
        assert_eq!(last.log_sum.dims(), [3, 3, 4]);
        assert!(relative_rms(&values(&last.log_sum.i(1)?), &values(&t[4].i(0)?)) < 1e-14);
        Ok(())
    }

    /// Three parts that exchange states are the whole, gradients included.
    #[test]
    fn parts_are_the_whole() -> Result<()> {
        check_parts(&inputs(12)[..3], &[5, 1, 6], |t, exchange| {
            let options = Causal {
                exchange,
                ..Default::default()
            };
            Ok(causal(&t[0], &t[1], &t[2], &options)?.0)
        })
    }

    /// Packed sequences in parts are those in one: the state and the sums of weights stop at borders.
    #[test]
    fn packed_sequences_may_be_in_parts() -> Result<()> {
        let t: Vec<Tensor> = inputs(12)[..3]
            .iter()
            .map(|t| t.narrow(0, 0, 1))
            .collect::<Result<_>>()?;
        for borders in PACKED {
            check_parts(&t, &PARTS, |t, exchange| {
                let own = own_borders(borders, t[0].dim(1)?, exchange.as_ref());
                let options = Causal {
                    exchange,
                    sequences: Some(&own),
                    ..Default::default()
                };
                Ok(causal(&t[0], &t[1], &t[2], &options)?.0)
            })?;
        }
        Ok(())
    }

    #[test]
    fn wrong_inputs_are_refused() {
        let q = normal(1, &[2, 3, 2, 4]);
        let message =
            |logits: &Tensor, options: &Causal<'_>| causal(&q, logits, &q, options).unwrap_err().to_string();
        let text = message(&normal(1, &[2, 3, 2, 5]), &Causal::default());
        assert!(text.contains("logits has shape [2, 3, 2, 5]"), "{text}");
        let initial = CausalState {
            state: normal(1, &[2, 2, 4, 4]),
            log_sum: Tensor::zeros((2, 4), DType::F64, &Device::Cpu).unwrap(),
        };
        let options = Causal {
            initial: Some(&initial),
            ..Default::default()
        };
        let text = message(&q, &options);
        assert!(text.contains("expected [2, 2, 4]"), "{text}");
        let token = normal(1, &[2, 2, 4]);
        let text = step(&token, &normal(1, &[2, 2, 3]), &token, &initial)
            .unwrap_err()
            .to_string();
        assert!(text.contains("logits has shape [2, 2, 3]"), "{text}");
    }
}
