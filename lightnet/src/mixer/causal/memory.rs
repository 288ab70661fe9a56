//! What a mixer keeps of the tokens so far, for decoding: its size does not grow with their number, but for keys and values
//! of softmax attention.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor, bail};
use fulgur_kernels::additive::{self, CausalState};
use fulgur_kernels::attention::{Options, softmax};
use fulgur_kernels::decay::{self, LogDecay};
use fulgur_kernels::eos;
use fulgur_kernels::log_sum::NOTHING;

use super::Paths;

/// The memory of one layer. Clones share tensors, which nobody writes to.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// Of a recurrence, `[B, H, D, E]`.
    state: Option<Tensor>,
    /// Of LightNet beside it, `[B, H, D]`.
    log_sum: Option<Tensor>,
    /// Keys and values `[B, L, G, D]` of softmax attention.
    cache: Option<[Tensor; 2]>,
    /// The last columns `[B, W - 1, C]` that entered a short convolution.
    columns: Option<Tensor>,
    /// How far rows have turned, `[B, H, K]`, where data says how fast.
    angle: Option<Tensor>,
    /// Borders of packed sequences, which begin with nothing and leave nothing.
    packed: Option<Arc<[usize]>>,
    /// Several ways through the tokens, which begin with nothing and leave nothing.
    paths: Option<Arc<Paths>>,
}

impl Memory {
    /// That of packed sequences in a batch of one, between `borders`: tokens see nothing of other sequences, and nothing is kept.
    pub(crate) fn packed(borders: Arc<[usize]>) -> Self {
        Self {
            packed: Some(borders),
            ..Self::default()
        }
    }

    /// That of tokens which are gone through in several ways, or all at once; nothing is kept.
    pub(crate) fn along(paths: Arc<Paths>) -> Self {
        Self {
            paths: Some(paths),
            ..Self::default()
        }
    }

    /// The ways through the tokens, where there are several.
    fn paths(memory: Option<&Self>) -> Option<Arc<Paths>> {
        memory.and_then(|memory| memory.paths.clone())
    }

    /// Refuses what goes through tokens in their order alone: `what` is not for packed sequences or for several ways.
    fn refuse(memory: Option<&Self>, what: &str) -> Result<()> {
        if Self::borders(memory).is_some() {
            bail!("packed sequences are not for {what}");
        }
        if Self::paths(memory).is_some() {
            bail!("several ways through the tokens are not for {what}");
        }
        Ok(())
    }

    /// The borders, where sequences are packed.
    fn borders(memory: Option<&Self>) -> Option<Arc<[usize]>> {
        memory.and_then(|memory| memory.packed.clone())
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        let tensors = self.tensors().into_iter();
        tensors
            .map(|(_, tensor)| tensor.elem_count() * tensor.dtype().size_in_bytes())
            .sum()
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let [keys, values] = match &self.cache {
            Some([keys, values]) => [Some(keys), Some(values)],
            None => [None, None],
        };
        let named = [
            ("state", self.state.as_ref()),
            ("log_sum", self.log_sum.as_ref()),
            ("keys", keys),
            ("values", values),
            ("columns", self.columns.as_ref()),
            ("angle", self.angle.as_ref()),
        ];
        named
            .into_iter()
            .filter_map(|(name, tensor)| Some((name, tensor?)))
            .collect()
    }

    /// Its like with what `tensor` makes of each tensor and its name.
    ///
    /// # Errors
    /// Those of `tensor`.
    pub fn map<E>(
        &self,
        mut tensor: impl FnMut(&'static str, &Tensor) -> std::result::Result<Tensor, E>,
    ) -> std::result::Result<Self, E> {
        let mut one = |name, of: &Option<Tensor>| of.as_ref().map(|of| tensor(name, of)).transpose();
        Ok(Self {
            state: one("state", &self.state)?,
            log_sum: one("log_sum", &self.log_sum)?,
            columns: one("columns", &self.columns)?,
            angle: one("angle", &self.angle)?,
            packed: self.packed.clone(),
            paths: self.paths.clone(),
            cache: match &self.cache {
                Some([keys, values]) => Some([tensor("keys", keys)?, tensor("values", values)?]),
                None => None,
            },
        })
    }

    /// The columns before `x` `[B, N, C]`, `count` of them and zeros at first, followed by `x`; the last ones are kept.
    pub(super) fn after_columns(memory: Option<&mut Self>, x: &Tensor, count: usize) -> Result<Tensor> {
        Self::refuse(
            memory.as_deref(),
            "short convolutions, which see across their borders",
        )?;
        let (batch, tokens, channels) = x.dims3()?;
        let before = match memory.as_ref().and_then(|memory| memory.columns.clone()) {
            Some(before) => before,
            None => Tensor::zeros((batch, count, channels), x.dtype(), x.device())?,
        };
        let all = Tensor::cat(&[&before, x], 1)?;
        if let Some(memory) = memory {
            memory.columns = Some(all.narrow(1, tokens, count)?.contiguous()?.detach());
        }
        Ok(all)
    }
}

/// The decayed recurrence behind what `memory` holds: `q`, `k` `[B, N, H, D]`, `v` `[B, N, H, E]` and log-decays as those of
/// [`decay::causal`] to `[B, N, H, E]`. One token goes by the form for decoding.
pub(super) fn decayed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    log_decay: LogDecay<'_>,
    memory: Option<&mut Memory>,
) -> Result<Tensor> {
    if let Some(paths) = Memory::paths(memory.as_deref()) {
        let mut tensors = vec![q, k, v];
        if let LogDecay::Token(log) | LogDecay::Channel(log) = log_decay {
            tensors.push(log);
        }
        return paths.sum(&tensors, |parts, borders| {
            let decay = match (log_decay, parts.get(3)) {
                (LogDecay::Token(_), Some(log)) => LogDecay::Token(log),
                (LogDecay::Channel(_), Some(log)) => LogDecay::Channel(log),
                (constant, _) => constant,
            };
            let options = decay::Causal {
                decay,
                sequences: borders,
                ..Default::default()
            };
            Ok(decay::causal(&parts[0], &parts[1], &parts[2], &options)?.0)
        });
    }
    let mut options = decay::Causal {
        decay: log_decay,
        ..Default::default()
    };
    let borders = Memory::borders(memory.as_deref());
    options.sequences = borders.as_deref();
    let memory = match memory {
        Some(memory) if borders.is_none() => memory,
        _ => return Ok(decay::causal(q, k, v, &options)?.0),
    };
    let (o, state) = if q.dim(1)? == 1 {
        let before = state_before(memory, q, v)?;
        let row = |x: &Tensor| x.squeeze(1);
        let log = match log_decay {
            LogDecay::Token(log) | LogDecay::Channel(log) => Some(log.squeeze(1)?),
            LogDecay::None | LogDecay::Head(_) => None,
        };
        let log_decay = match (log_decay, &log) {
            (LogDecay::Token(_), Some(log)) => LogDecay::Token(log),
            (LogDecay::Channel(_), Some(log)) => LogDecay::Channel(log),
            (constant, _) => constant,
        };
        let (o, state) = decay::step(&row(q)?, &row(k)?, &row(v)?, log_decay, &before)?;
        (o.unsqueeze(1)?, state)
    } else {
        options.initial = memory.state.as_ref();
        decay::causal(q, k, v, &options)?
    };
    memory.state = Some(state.detach());
    Ok(o)
}

/// LightNet's recurrence behind what `memory` holds, as [`decayed`] from logits; `seeded` starts with a token of logit zero
/// and value zero.
pub(super) fn additive(
    q: &Tensor,
    logits: &Tensor,
    v: &Tensor,
    seeded: bool,
    memory: Option<&mut Memory>,
) -> Result<Tensor> {
    if seeded {
        Memory::refuse(memory.as_deref(), "a LightNet that is seeded")?;
    }
    if let Some(paths) = Memory::paths(memory.as_deref()) {
        return paths.sum(&[q, logits, v], |parts, borders| {
            let options = additive::Causal {
                sequences: borders,
                ..Default::default()
            };
            Ok(additive::causal(&parts[0], &parts[1], &parts[2], &options)?.0)
        });
    }
    let borders = Memory::borders(memory.as_deref());
    if (memory.is_none() || borders.is_some()) && !seeded {
        let options = additive::Causal {
            sequences: borders.as_deref(),
            ..Default::default()
        };
        return Ok(additive::causal(q, logits, v, &options)?.0);
    }
    let known = match memory.as_ref() {
        Some(Memory {
            state: Some(state),
            log_sum: Some(log_sum),
            ..
        }) => Some(CausalState {
            state: state.clone(),
            log_sum: log_sum.clone(),
        }),
        _ => None,
    };
    let empty = || {
        Ok::<_, candle_core::Error>(CausalState {
            state: empty_state(q, v)?,
            log_sum: first_log_sum(q, seeded)?,
        })
    };
    let (o, after) = if q.dim(1)? == 1 && memory.is_some() {
        let row = |x: &Tensor| x.squeeze(1);
        let before = known.map_or_else(empty, Ok)?;
        let (o, after) = additive::step(&row(q)?, &row(logits)?, &row(v)?, &before)?;
        (o.unsqueeze(1)?, after)
    } else {
        // A sum of nothing is so low that its difference to others would lose all of their digits.
        let before = match known {
            None if seeded => Some(empty()?),
            known => known,
        };
        let options = additive::Causal {
            initial: before.as_ref(),
            ..Default::default()
        };
        additive::causal(q, logits, v, &options)?
    };
    if let Some(memory) = memory {
        memory.state = Some(after.state.detach());
        memory.log_sum = Some(after.log_sum.detach());
    }
    Ok(o)
}

/// Logarithms of the sums of weights before the first token of `x` `[B, N, H, D]`.
fn first_log_sum(x: &Tensor, seeded: bool) -> Result<Tensor> {
    let (batch, _, heads, width) = x.dims4()?;
    let start = if seeded { 0.0 } else { NOTHING };
    Tensor::full(start as f32, (batch, heads, width), x.device())?.to_dtype(wide(x))
}

/// Running sums of weights `z` and log-decays `z_{t-1} - z_t` of `logits` `[B, N, H, D]`, behind what `memory` holds.
///
/// The first decay without a seed is 0, for its state is.
pub(super) fn log_sums(logits: &Tensor, seeded: bool, memory: Option<&mut Memory>) -> Result<[Tensor; 2]> {
    Memory::refuse(
        memory.as_deref(),
        "LightNet with scalar or tied decays or with LRPE",
    )?;
    let known = memory.as_ref().and_then(|memory| memory.log_sum.clone());
    let before = match known {
        None if seeded => Some(first_log_sum(logits, seeded)?),
        known => known,
    };
    let z = fulgur_kernels::log_sum::log_sum(logits, before.as_ref(), None)?;
    let tokens = z.dim(1)?;
    let first = match &before {
        None => z.narrow(1, 0, 1)?,
        Some(before) => before.unsqueeze(1)?.to_dtype(z.dtype())?,
    };
    let mut rows = vec![first];
    if tokens > 1 {
        rows.push(z.narrow(1, 0, tokens - 1)?);
    }
    let shifted = Tensor::cat(&rows, 1)?;
    if let Some(memory) = memory {
        memory.log_sum = Some(z.narrow(1, tokens - 1, 1)?.squeeze(1)?.contiguous()?.detach());
    }
    let log = (shifted - &z)?;
    Ok([z, log])
}

/// The element-wise gated recurrence `h_t = f_t h_{t-1} + k_t v_t` of `k`, `v` and `log f` `[B, N, C]`.
pub(super) fn elementwise(
    k: &Tensor,
    v: &Tensor,
    log: &Tensor,
    memory: Option<&mut Memory>,
) -> Result<Tensor> {
    // One head of one row whose columns are the channels: the gates are all that differs between them.
    let input = (k * v)?.unsqueeze(2)?;
    let (batch, tokens, channels) = log.dims3()?;
    let ones = Tensor::ones((batch, tokens, 1, 1), input.dtype(), input.device())?;
    let log = log.reshape((batch, tokens, 1, 1, channels))?;
    scanned(&ones, &input, &log, &ones, memory)?.squeeze(2)
}

/// The element-wise scan behind what `memory` holds: `expand`, `shrink` `[B, N, H, K]`, `input` `[B, N, H, D]` and log-gates of
/// five axes as those of [`eos::scan`] to `[B, N, H, D]`. One token goes by the form for decoding.
pub(super) fn scanned(
    expand: &Tensor,
    input: &Tensor,
    log: &Tensor,
    shrink: &Tensor,
    memory: Option<&mut Memory>,
) -> Result<Tensor> {
    if let Some(paths) = Memory::paths(memory.as_deref()) {
        // Gates that are the same for all tokens have no order.
        let (batch, tokens, ..) = input.dims4()?;
        let mut shape = log.dims().to_vec();
        shape[..2].copy_from_slice(&[batch, tokens]);
        let log = &log.broadcast_as(shape)?;
        return paths.sum(&[expand, input, log, shrink], |parts, borders| {
            let options = eos::Options {
                sequences: borders,
                ..Default::default()
            };
            Ok(eos::scan(&parts[0], &parts[1], &parts[2], &parts[3], &options)?.0)
        });
    }
    let borders = Memory::borders(memory.as_deref());
    let memory = match memory {
        Some(memory) if borders.is_none() => memory,
        _ => {
            let options = eos::Options {
                sequences: borders.as_deref(),
                ..Default::default()
            };
            return Ok(eos::scan(expand, input, log, shrink, &options)?.0);
        }
    };
    let (y, state) = if input.dim(1)? == 1 {
        let before = state_before(memory, expand, input)?;
        let row = |x: &Tensor| x.squeeze(1);
        let (y, state) = eos::step(&row(expand)?, &row(input)?, &row(log)?, &row(shrink)?, &before)?;
        (y.unsqueeze(1)?, state)
    } else {
        let options = eos::Options {
            initial: memory.state.as_ref(),
            ..Default::default()
        };
        eos::scan(expand, input, log, shrink, &options)?
    };
    memory.state = Some(state.detach());
    Ok(y)
}

/// Sums of `angles` `[B, N, H, K]` over tokens, behind what `memory` holds.
pub(super) fn summed_angles(angles: &Tensor, memory: Option<&mut Memory>) -> Result<Tensor> {
    Memory::refuse(
        memory.as_deref(),
        "angles that data say, which sum up across their borders",
    )?;
    let by_token = angles.flatten_from(2)?.transpose(1, 2)?.contiguous()?;
    let sums = by_token.cumsum(2)?.transpose(1, 2)?;
    let mut sums = sums.reshape(angles.shape())?;
    if let Some(memory) = memory {
        if let Some(before) = &memory.angle {
            sums = sums.broadcast_add(&before.unsqueeze(1)?)?;
        }
        let last = sums.narrow(1, sums.dim(1)? - 1, 1)?.squeeze(1)?;
        memory.angle = Some(last.contiguous()?.detach());
    }
    Ok(sums)
}

/// Causal softmax attention over what `memory` holds and `k`, `v`; over all tokens where its paths say so.
pub(super) fn attended(q: &Tensor, k: &Tensor, v: &Tensor, memory: Option<&mut Memory>) -> Result<Tensor> {
    if let Some(paths) = Memory::paths(memory.as_deref()) {
        if paths.is_whole() {
            let options = Options {
                sequences: paths.borders(),
                ..Default::default()
            };
            return softmax(q, k, v, &options);
        }
        return paths.sum(&[q, k, v], |parts, borders| {
            let options = Options {
                causal: true,
                sequences: borders,
                ..Default::default()
            };
            softmax(&parts[0], &parts[1], &parts[2], &options)
        });
    }
    let borders = Memory::borders(memory.as_deref());
    let options = Options {
        causal: true,
        sequences: borders.as_deref(),
        ..Default::default()
    };
    let memory = match memory {
        Some(memory) if borders.is_none() => memory,
        _ => return softmax(q, k, v, &options),
    };
    let [k, v] = match &memory.cache {
        Some([keys, values]) => [Tensor::cat(&[keys, k], 1)?, Tensor::cat(&[values, v], 1)?],
        None => [k.contiguous()?, v.contiguous()?],
    };
    let o = softmax(q, &k, &v, &options)?;
    memory.cache = Some([k.detach(), v.detach()]);
    Ok(o)
}

/// f64 beside f64, else f32: the type of states.
pub(super) fn wide(x: &Tensor) -> DType {
    if x.dtype() == DType::F64 {
        DType::F64
    } else {
        DType::F32
    }
}

fn empty_state(q: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (batch, _, heads, width) = q.dims4()?;
    Tensor::zeros((batch, heads, width, v.dim(3)?), wide(q), q.device())
}

fn state_before(memory: &Memory, q: &Tensor, v: &Tensor) -> Result<Tensor> {
    match &memory.state {
        Some(state) => Ok(state.clone()),
        None => empty_state(q, v),
    }
}
