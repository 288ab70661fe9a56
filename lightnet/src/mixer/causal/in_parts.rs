//! Sequences in parts: what mixers take from other parts beside the states of recurrences.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use fulgur_kernels::attention::{Options, softmax};
use fulgur_kernels::exchange::{Direction, StateExchange, gathered, incoming};

/// The sum over all parts before this one of the last of the running sums `[B, N, ..]`, as `[B, 1, ..]`.
pub(super) fn before_part(exchange: &Arc<dyn StateExchange>, sums: &Tensor) -> Result<Tensor> {
    let total = sums.narrow(1, sums.dim(1)? - 1, 1)?.contiguous()?;
    let kept = Tensor::zeros(vec![1; total.rank()], total.dtype(), total.device())?;
    incoming(exchange, &total, &kept, Direction::Forward)
}

/// Causal softmax attention of a part, over keys and values of all parts up to it (LASP-2H, arXiv 2502.07563): parts have the same
/// number of tokens. Of packed sequences, between `borders`, each sees itself alone.
///
/// # Errors
/// A failing operation or exchange.
pub(super) fn attended_in_parts(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    exchange: &Arc<dyn StateExchange>,
    borders: Option<&[usize]>,
) -> Result<Tensor> {
    let tokens = q.dim(1)?;
    let before = exchange.part() * tokens;
    // Those behind are not seen, but stay in the graph: every part has to join in the backward pass.
    let [k, v] = [rows_up_to(exchange, k)?, rows_up_to(exchange, v)?];
    let Some(borders) = borders else {
        let options = Options {
            causal: true,
            ..Default::default()
        };
        return softmax(q, &k, &v, &options);
    };
    let open = open_tokens(exchange, tokens, borders, k.device())?;
    let first = borders.get(1).copied().unwrap_or(tokens);
    let mut outputs = Vec::new();
    if first > 0 {
        let options = Options {
            causal: true,
            ..Default::default()
        };
        let (start, count) = (before - open, open + first);
        let [k, v] = [k.narrow(1, start, count)?, v.narrow(1, start, count)?];
        outputs.push(softmax(&q.narrow(1, 0, first)?, &k, &v, &options)?);
    }
    if first < tokens {
        let rest: Vec<usize> = borders[1..].iter().map(|border| border - first).collect();
        let options = Options {
            causal: true,
            sequences: Some(&rest),
            ..Default::default()
        };
        let count = tokens - first;
        let [k, v] = [
            k.narrow(1, before + first, count)?,
            v.narrow(1, before + first, count)?,
        ];
        outputs.push(softmax(&q.narrow(1, first, count)?, &k, &v, &options)?);
    }
    Tensor::cat(&outputs, 1)
}

/// Softmax attention of a part over all tokens; keys where `mask` `[B, N]` is zero are padding.
pub(super) fn attended_whole(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    exchange: &Arc<dyn StateExchange>,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    let [k, v] = [joined(&gathered(exchange, k)?)?, joined(&gathered(exchange, v)?)?];
    let mask = match mask {
        Some(mask) => Some(Tensor::cat(&exchange.gather(mask)?, 1)?),
        None => None,
    };
    let options = Options {
        mask: mask.as_ref(),
        ..Default::default()
    };
    softmax(q, &k, &v, &options)
}

/// The rows `[B, N, ..]` of all parts up to this one.
fn rows_up_to(exchange: &Arc<dyn StateExchange>, x: &Tensor) -> Result<Tensor> {
    joined(&gathered(exchange, x)?.narrow(0, 0, exchange.part() + 1)?)
}

/// `[parts, B, N, ..]` as `[B, parts N, ..]`.
fn joined(x: &Tensor) -> Result<Tensor> {
    let parts = x.dim(0)?;
    let rows: Vec<Tensor> = (0..parts).map(|part| x.get(part)).collect::<Result<_>>()?;
    Tensor::cat(&rows, 1)
}

/// How many tokens before this part belong to the sequence that goes on into it.
fn open_tokens(
    exchange: &Arc<dyn StateExchange>,
    tokens: usize,
    borders: &[usize],
    device: &Device,
) -> Result<usize> {
    let last = borders.iter().rev().nth(1).copied().unwrap_or(0);
    let is_cut = borders.len() > 2;
    let own = Tensor::new(
        &[(tokens - last) as f64, f64::from(u8::from(is_cut))],
        &Device::Cpu,
    )?;
    let mut open = 0;
    let all = exchange.gather(&own.to_dtype(DType::F32)?.to_device(device)?)?;
    for part in all[..exchange.part()].iter().rev() {
        let known = part.to_vec1::<f32>()?;
        open += known[0] as usize;
        if known[1] > 0.0 {
            break;
        }
    }
    Ok(open)
}
