//! One token of the decayed recurrence: the form for decoding.
//!
//! ```text
//!   S = diag(a) S_before + k v^T,     o = S^T q
//! ```
//!
//! One task a batch and head; the state is read and written once.

use super::{LogDecay, check_floats, same_device, wide_type};
use crate::error::OpError;
use crate::scalar::wide;
use crate::slice_math::SliceMath;
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
        return super::cuda::step(q, k, v, log_decay, state);
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
    wide(
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
