//! One token of the decayed recurrence: the form for decoding.
//!
//! ```text
//!   S = diag(a) S_before + k v^T,     o = S^T q
//! ```
//!
//! One task a batch and head; the state is read and written once.

use super::{LogDecay, check_floats, same_device, wide_type};
use crate::error::OpError;
use crate::scalar::wide as wide_instructions;
use crate::slice_math::SliceMath;
use crate::split::{Part, split};
use crate::strided::contiguous;
use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

pub(super) const NAME: &str = "decay::step";

/// One token: `q`, `k` `[B, H, D]`, `v` `[B, H, E]` and the state `[B, H, D, E]` before it, to the output `[B, H, E]` in
/// the type of `v` and the state after it, in f32 or, if any input is, in f64.
///
/// Log-decays are `[H]`, `[B, H]` a token or `[B, H, D]` a channel. Not differentiable: the results are detached.
///
/// # Errors
/// Shapes that do not fit, element types that are not floats, and tensors on different devices.
pub fn step(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    log_decay: LogDecay<'_>,
    state: &Tensor,
) -> Result<(Tensor, Tensor)> {
    check(q, k, v, log_decay, state)?;
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        return super::cuda::step(q, k, v, log_decay, state, false);
    }
    let inputs = [Some(q), Some(k), Some(v), Some(state), log_decay.tensor()];
    let dtype = wide_type(inputs);
    let mut dense = Vec::with_capacity(inputs.len());
    for input in inputs.into_iter().flatten() {
        dense.push(input.detach().to_dtype(dtype)?.contiguous()?);
    }
    let (o, state) = match dtype {
        DType::F64 => typed::<f64>(&dense, log_decay)?,
        _ => typed::<f32>(&dense, log_decay)?,
    };
    Ok((o.to_dtype(v.dtype())?, state))
}

/// As [`step`], but the state after it is written over the one before: every tensor that shares its memory sees it.
///
/// # Errors
/// As [`step`], and a state that is not contiguous or of another type than the one after it.
pub fn step_in_place(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    log_decay: LogDecay<'_>,
    state: &Tensor,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        check(q, k, v, log_decay, state)?;
        check_place(state)?;
        return Ok(super::cuda::step(q, k, v, log_decay, state, true)?.0);
    }
    let (o, after) = step(q, k, v, log_decay, state)?;
    state.slice_set(&after, 0, 0)?;
    Ok(o)
}

/// A state that kernels write over.
#[cfg(feature = "cuda")]
fn check_place(state: &Tensor) -> Result<()> {
    if state.dtype() != DType::F32 || !state.is_contiguous() {
        return Err(OpError::shape(NAME, "state", state, "a contiguous one of f32").into());
    }
    Ok(())
}

/// A token's queries, keys and values side by side in one row of a projection, before their activation.
#[derive(Clone, Copy, Debug)]
pub struct Fused {
    /// Heads H.
    pub heads: usize,
    /// Width D of a head's keys.
    pub keys: usize,
    /// Width E of a head's values.
    pub values: usize,
    /// Whether queries, keys and values go through SiLU.
    pub silu: [bool; 3],
}

impl Fused {
    /// Of queries or keys, and of values, over all heads.
    pub(super) fn widths(&self) -> [usize; 2] {
        [self.heads * self.keys, self.heads * self.values]
    }
}

/// [`step`] of the first columns of `wide` `[B, W]`, which are queries and keys `[H D]` and values `[H E]`: split, activated and
/// joined to the state `[B, H, D, E]` in one kernel on CUDA. The output is `[B, H E]` in the type of `wide`.
///
/// The state is f32, or f64 with `wide`; there are no decays, or those of heads in its type.
///
/// # Errors
/// As [`step`].
pub fn step_fused(
    wide: &Tensor,
    fused: Fused,
    log_decay: LogDecay<'_>,
    state: &Tensor,
) -> Result<(Tensor, Tensor)> {
    check_fused(wide, fused, log_decay, state)?;
    #[cfg(feature = "cuda")]
    if is_fused_on_cuda(wide, state) {
        return super::cuda::step_fused(wide, fused, log_decay, state, false);
    }
    apart(wide, fused, log_decay, state)
}

/// As [`step_fused`], but the state after it is written over the one before: every tensor that shares its memory sees it.
///
/// # Errors
/// As [`step_in_place`].
pub fn step_fused_in_place(
    wide: &Tensor,
    fused: Fused,
    log_decay: LogDecay<'_>,
    state: &Tensor,
) -> Result<Tensor> {
    check_fused(wide, fused, log_decay, state)?;
    #[cfg(feature = "cuda")]
    if is_fused_on_cuda(wide, state) {
        check_place(state)?;
        return Ok(super::cuda::step_fused(wide, fused, log_decay, state, true)?.0);
    }
    let (o, after) = apart(wide, fused, log_decay, state)?;
    state.slice_set(&after, 0, 0)?;
    Ok(o)
}

#[cfg(feature = "cuda")]
fn is_fused_on_cuda(wide: &Tensor, state: &Tensor) -> bool {
    wide.device().is_cuda() && matches!(wide.dtype(), DType::F32 | DType::BF16) && state.dtype() == DType::F32
}

fn check_fused(wide: &Tensor, fused: Fused, log_decay: LogDecay<'_>, state: &Tensor) -> Result<()> {
    let Fused {
        heads, keys, values, ..
    } = fused;
    let [all_keys, all_values] = fused.widths();
    let Ok((b, width)) = wide.dims2() else {
        return Err(OpError::shape(NAME, "wide", wide, "[B, W]").into());
    };
    let used = 2 * all_keys + all_values;
    if used > width || used == 0 || b == 0 {
        return Err(OpError::shape(NAME, "wide", wide, format!("[B, W] with W at least {used}")).into());
    }
    if state.dims() != [b, heads, keys, values] {
        let expected = format!("[{b}, {heads}, {keys}, {values}]");
        return Err(OpError::shape(NAME, "state", state, expected).into());
    }
    match log_decay {
        LogDecay::None => {}
        LogDecay::Head(log) if log.dims() == [heads] && log.dtype() == state.dtype() => {}
        LogDecay::Head(log) | LogDecay::Token(log) | LogDecay::Channel(log) => {
            let expected = format!("[{heads}] of {:?}", state.dtype());
            return Err(OpError::shape(NAME, "log_decay", log, expected).into());
        }
    }
    let named = [
        ("wide", Some(wide)),
        ("state", Some(state)),
        ("log_decay", log_decay.tensor()),
    ];
    check_floats(NAME, &named)?;
    same_device(NAME, &named)
}

/// [`step_fused`] of checked inputs, one operation after the other.
fn apart(wide: &Tensor, fused: Fused, log_decay: LogDecay<'_>, state: &Tensor) -> Result<(Tensor, Tensor)> {
    let Fused {
        heads,
        keys,
        values,
        silu,
    } = fused;
    let ([all_keys, all_values], b) = (fused.widths(), wide.dim(0)?);
    let used = 2 * all_keys + all_values;
    let part = |silu: bool, width: usize| match silu {
        true => Part::Silu(width),
        false => Part::Plain(width),
    };
    let parts = split(
        &wide.detach().narrow(1, 0, used)?,
        &[
            part(silu[0], all_keys),
            part(silu[1], all_keys),
            part(silu[2], all_values),
        ],
    )?;
    let head = |part: &Tensor, width: usize| part.reshape((b, heads, width));
    let (q, k, v) = (
        head(&parts[0], keys)?,
        head(&parts[1], keys)?,
        head(&parts[2], values)?,
    );
    let (o, state) = step(&q, &k, &v, log_decay, state)?;
    Ok((o.reshape((b, all_values))?, state))
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, log_decay: LogDecay<'_>, state: &Tensor) -> Result<()> {
    let Ok((b, h, d)) = q.dims3() else {
        return Err(OpError::shape(NAME, "q", q, "[B, H, D]").into());
    };
    let e = v.dims().last().copied().unwrap_or(0);
    if b * h * d == 0 {
        return Err(OpError::shape(NAME, "q", q, "[B, H, D] with at least one element").into());
    }
    if k.dims() != q.dims() {
        return Err(OpError::shape(NAME, "k", k, format!("{:?} like q", q.dims())).into());
    }
    if v.dims() != [b, h, e] || e == 0 {
        return Err(OpError::shape(NAME, "v", v, format!("[{b}, {h}, E] to go with q")).into());
    }
    if state.dims() != [b, h, d, e] {
        return Err(OpError::shape(NAME, "state", state, format!("[{b}, {h}, {d}, {e}]")).into());
    }
    let expected = match log_decay {
        LogDecay::None => Vec::new(),
        LogDecay::Head(_) => vec![h],
        LogDecay::Token(_) => vec![b, h],
        LogDecay::Channel(_) => vec![b, h, d],
    };
    let decay = log_decay.tensor();
    if let Some(log) = decay
        && log.dims() != expected
    {
        return Err(OpError::shape(NAME, "log_decay", log, format!("{expected:?}")).into());
    }
    let named = [
        ("q", Some(q)),
        ("k", Some(k)),
        ("v", Some(v)),
        ("state", Some(state)),
        ("log_decay", decay),
    ];
    check_floats(NAME, &named)?;
    same_device(NAME, &named)
}

fn typed<T: SliceMath>(dense: &[Tensor], log_decay: LogDecay<'_>) -> Result<(Tensor, Tensor)> {
    let guards: Vec<_> = dense.iter().map(|t| t.storage_and_layout().0).collect();
    let mut slices = Vec::with_capacity(dense.len());
    for (tensor, guard) in dense.iter().zip(&guards) {
        slices.push(contiguous::<T>(tensor, guard)?);
    }
    let (_, heads, d, e) = dense[3].dims4()?;
    let mut decay = slices.get(4).map_or_else(Vec::new, |log| log.to_vec());
    T::exp(&mut decay);
    // Factors of one batch and head: its own row, or one for all channels, or none.
    let factors = |line: usize| match log_decay {
        LogDecay::None => &[],
        LogDecay::Head(_) => &decay[line % heads..][..1],
        LogDecay::Token(_) => &decay[line..][..1],
        LogDecay::Channel(_) => &decay[line * d..][..d],
    };
    let mut state = slices[3].to_vec();
    let mut o = vec![T::zero(); slices[2].len()];
    state
        .par_chunks_mut(d * e)
        .zip(o.par_chunks_mut(e))
        .enumerate()
        .for_each(|(line, (state, o))| {
            let (q, k) = (&slices[0][line * d..][..d], &slices[1][line * d..][..d]);
            token(q, k, &slices[2][line * e..][..e], factors(line), state, o);
        });
    let device = dense[0].device();
    Ok((
        Tensor::from_vec(o, dense[2].shape(), device)?,
        Tensor::from_vec(state, dense[3].shape(), device)?,
    ))
}

/// One head: updates the state and adds to `o`.
fn token<T: SliceMath>(q: &[T], k: &[T], v: &[T], factors: &[T], state: &mut [T], o: &mut [T]) {
    wide_instructions(
        #[inline(always)]
        || {
            for (c, state) in state.chunks_exact_mut(v.len()).enumerate() {
                let factor = match factors {
                    [] => T::one(),
                    factors => factors[c % factors.len()],
                };
                for ((state, &v), o) in state.iter_mut().zip(v).zip(o.iter_mut()) {
                    *state = factor * *state + k[c] * v;
                    *o += q[c] * *state;
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{normal, relative_rms, values};

    /// A wide row is what its parts are, activated one by one.
    #[test]
    fn fused_rows_are_their_parts() -> Result<()> {
        let (b, heads, d, e) = (2, 3, 4, 5);
        let wide = normal(1, &[b, heads * (2 * d + e) + 2]);
        let state = normal(2, &[b, heads, d, e]);
        let log = (normal(3, &[heads]).sqr()? * -0.3)?;
        for silu in [[true, true, false], [false, false, true]] {
            let fused = Fused {
                heads,
                keys: d,
                values: e,
                silu,
            };
            let part = |number: usize, first: usize, width: usize| {
                let x = wide.narrow(1, first, heads * width)?.contiguous()?;
                let x = match silu[number] {
                    true => (&x / (x.neg()?.exp()? + 1.0)?)?,
                    false => x,
                };
                x.reshape((b, heads, width))
            };
            let (q, k, v) = (part(0, 0, d)?, part(1, heads * d, d)?, part(2, 2 * heads * d, e)?);
            let wanted = step(&q, &k, &v, LogDecay::Head(&log), &state)?;
            let found = step_fused(&wide, fused, LogDecay::Head(&log), &state)?;
            assert_eq!(found.0.dims(), [b, heads * e]);
            assert!(relative_rms(&values(&found.0), &values(&wanted.0)) < 1e-13);
            assert!(relative_rms(&values(&found.1), &values(&wanted.1)) < 1e-13);
            let (place, other) = (state.copy()?, state.copy()?);
            let o = step_fused_in_place(&wide, fused, LogDecay::Head(&log), &place)?;
            assert_eq!([values(&o), values(&place)], [values(&found.0), values(&found.1)]);
            let o = step_in_place(&q, &k, &v, LogDecay::Head(&log), &other)?;
            assert_eq!(
                [values(&o), values(&other)],
                [values(&wanted.0), values(&wanted.1)]
            );
            let message = |result: Result<(Tensor, Tensor)>| result.unwrap_err().to_string();
            let token = LogDecay::Token(&log);
            assert!(message(step_fused(&wide, fused, token, &state)).contains("log_decay"));
            let short = wide.narrow(1, 0, 30)?;
            assert!(message(step_fused(&short, fused, LogDecay::None, &state)).contains("at least 39"));
        }
        Ok(())
    }
}
