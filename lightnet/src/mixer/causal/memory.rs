//! What a mixer keeps of the tokens so far, for decoding: its size does not grow with their number, but for keys and values
//! of softmax attention.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Result, Tensor, bail};
use fulgur_kernels::additive::{self, CausalState};
use fulgur_kernels::attention::{Options, softmax};
use fulgur_kernels::decay::{self, Fused, LogDecay};
use fulgur_kernels::eos;
use fulgur_kernels::exchange::{Direction, StateExchange, halo};
use fulgur_kernels::log_sum::NOTHING;

use super::Paths;
use super::in_parts::{attended_in_parts, before_part};

/// The memory of one layer. Clones share tensors, and none sees what another one adds.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// Of a recurrence, `[B, H, D, E]`.
    state: Option<Tensor>,
    /// Of LightNet beside it, `[B, H, D]`.
    log_sum: Option<Tensor>,
    /// Keys and values of softmax attention.
    cache: Option<Cache>,
    /// The last columns `[B, W - 1, C]` that entered a short convolution.
    columns: Option<Tensor>,
    /// How far rows have turned, `[B, H, K]`, where data says how fast.
    angle: Option<Tensor>,
    /// Borders of packed sequences, which begin with nothing and leave nothing.
    packed: Option<Arc<[usize]>>,
    /// Several ways through the tokens, which begin with nothing and leave nothing.
    paths: Option<Arc<Paths>>,
    /// The other parts of sequences that are split; what goes on is theirs, and nothing is kept.
    exchange: Option<Arc<dyn StateExchange>>,
    /// Whether a token may write its state over the one before it, which clones of this one see.
    in_place: bool,
}

impl Memory {
    /// That of packed sequences in a batch of one, between `borders`: tokens see nothing of other sequences, and nothing is kept.
    pub(crate) fn packed(borders: Arc<[usize]>) -> Self {
        Self {
            packed: Some(borders),
            ..Self::default()
        }
    }

    /// That of a part of sequences which are split, and may be packed; nothing is kept.
    pub(crate) fn split(exchange: Arc<dyn StateExchange>, borders: Option<Arc<[usize]>>) -> Self {
        Self {
            packed: borders,
            exchange: Some(exchange).filter(|exchange| exchange.parts() > 1),
            ..Self::default()
        }
    }

    /// The other parts of sequences that are split.
    pub(crate) fn exchange(memory: Option<&Self>) -> Option<Arc<dyn StateExchange>> {
        memory.and_then(|memory| memory.exchange.clone())
    }

    /// Whether it is for tokens that go on later.
    fn keeps(&self) -> bool {
        self.packed.is_none() && self.exchange.is_none()
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

    /// The same tensors, whose states tokens may be written over: nobody else may read them afterwards.
    #[cfg(any(feature = "cuda", test))]
    pub(crate) fn in_place(&self) -> Self {
        Self {
            in_place: true,
            ..self.clone()
        }
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
            Some(Cache {
                own: [keys, values], ..
            }) => [Some(keys), Some(values)],
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
            exchange: self.exchange.clone(),
            in_place: false,
            cache: match &self.cache {
                Some(Cache {
                    own: [keys, values], ..
                }) => Some(Cache::full([tensor("keys", keys)?, tensor("values", values)?])),
                None => None,
            },
        })
    }

    /// Those of several batches as one batch, in their order.
    ///
    /// # Errors
    /// They do not hold the same tensors, or some of other shapes.
    pub(crate) fn joined(parts: &[&Self]) -> Result<Self> {
        let Some(first) = parts.first() else {
            bail!("no states to join")
        };
        first.map(|name, _| {
            let mut rows = Vec::with_capacity(parts.len());
            for part in parts {
                let found = part.tensors().into_iter().find(|(other, _)| *other == name);
                let Some((_, tensor)) = found else {
                    bail!("a state without {name} beside one with it")
                };
                rows.push(tensor.contiguous()?);
            }
            Tensor::cat(&rows, 0)
        })
    }

    /// The columns before `x` `[B, N, C]`, `count` of them and zeros at first, followed by `x`; the last ones are kept.
    pub(super) fn after_columns(&mut self, x: &Tensor, count: usize) -> Result<Tensor> {
        Self::refuse(Some(self), "short convolutions, which see across their borders")?;
        if let Some(exchange) = &self.exchange {
            return Tensor::cat(&[&halo(exchange, x, count, Direction::Forward)?, x], 1);
        }
        let (batch, tokens, channels) = x.dims3()?;
        let before = match &self.columns {
            Some(before) => before.clone(),
            None => Tensor::zeros((batch, count, channels), x.dtype(), x.device())?,
        };
        let all = Tensor::cat(&[&before, x], 1)?;
        self.columns = Some(all.narrow(1, tokens, count)?.contiguous()?.detach());
        Ok(all)
    }
}

/// Rows of a cache that are kept room for, at least; and as a share of those that are there.
const LEAST_ROOM: usize = 64;
const SHARE_OF_ROOM: usize = 8;

/// Keys and values, in tensors with room for some more: one more token is written behind them, and only a full cache is
/// copied.
///
/// Clones share the tensors. Who first adds to a place of them owns it; another clone that stands at the same place has to copy.
#[derive(Clone, Debug)]
struct Cache {
    /// `[B, R, G, D]` and `[B, R, G, E]`.
    rooms: [Tensor; 2],
    /// The rows in front, `[B, L, G, D]` and `[B, L, G, E]`, which nobody writes to any more.
    own: [Tensor; 2],
    /// Rows of the rooms that belong to somebody.
    taken: Arc<AtomicUsize>,
}

impl Cache {
    /// Of keys and values `[B, L, G, ..]`, without room.
    fn full(own: [Tensor; 2]) -> Self {
        let taken = own[0].dims().get(1).copied().unwrap_or(0);
        Self {
            rooms: own.clone(),
            own,
            taken: Arc::new(AtomicUsize::new(taken)),
        }
    }

    /// With `new` rows behind its own.
    fn followed_by(&self, new: [Tensor; 2]) -> Result<Self> {
        let (before, room) = (self.own[0].dim(1)?, self.rooms[0].dim(1)?);
        let length = before + new[0].dim(1)?;
        let is_first = || {
            let taken = self
                .taken
                .compare_exchange(before, length, Ordering::AcqRel, Ordering::Acquire);
            taken.is_ok()
        };
        let (rooms, taken) = if length <= room && is_first() {
            (self.rooms.clone(), self.taken.clone())
        } else {
            let more = (length / SHARE_OF_ROOM).max(LEAST_ROOM);
            let wider = |own: &Tensor| {
                let mut shape = own.dims().to_vec();
                shape[1] = length + more;
                let room = Tensor::zeros(shape, own.dtype(), own.device())?;
                room.slice_set(&own.contiguous()?, 1, 0)?;
                Ok::<_, candle_core::Error>(room)
            };
            let [keys, values] = &self.own;
            ([wider(keys)?, wider(values)?], Arc::new(AtomicUsize::new(length)))
        };
        for (room, new) in rooms.iter().zip(&new) {
            room.slice_set(new, 1, before)?;
        }
        let own = [rooms[0].narrow(1, 0, length)?, rooms[1].narrow(1, 0, length)?];
        Ok(Self { rooms, own, taken })
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
    options.exchange = Memory::exchange(memory.as_deref());
    let memory = match memory {
        Some(memory) if memory.keeps() => memory,
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
        let (q, k, v) = (row(q)?, row(k)?, row(v)?);
        let (o, state) = match memory.in_place {
            true => (decay::step_in_place(&q, &k, &v, log_decay, &before)?, before),
            false => decay::step(&q, &k, &v, log_decay, &before)?,
        };
        (o.unsqueeze(1)?, state)
    } else {
        options.initial = memory.state.as_ref();
        decay::causal(q, k, v, &options)?
    };
    memory.state = Some(state.detach());
    Ok(o)
}

/// One token of the recurrence with constant decays behind what `memory` holds, of the first columns of `wide` `[B, 1, W]`, to
/// `[B, 1, H E]`; none where there are several tokens or several ways through them, or nothing is kept.
pub(super) fn decayed_token(
    wide: &Tensor,
    fused: Fused,
    log_decay: LogDecay<'_>,
    memory: Option<&mut Memory>,
) -> Result<Option<Tensor>> {
    let (batch, tokens, _) = wide.dims3()?;
    let memory = match memory {
        Some(memory) if memory.keeps() && memory.paths.is_none() && tokens == 1 => memory,
        _ => return Ok(None),
    };
    let before = match &memory.state {
        Some(state) => state.clone(),
        None => {
            let shape = (batch, fused.heads, fused.keys, fused.values);
            Tensor::zeros(shape, self::wide(wide), wide.device())?
        }
    };
    let wide = wide.squeeze(1)?;
    let (o, state) = match memory.in_place {
        true => (
            decay::step_fused_in_place(&wide, fused, log_decay, &before)?,
            before,
        ),
        false => decay::step_fused(&wide, fused, log_decay, &before)?,
    };
    memory.state = Some(state.detach());
    o.unsqueeze(1).map(Some)
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
    let empty = || {
        Ok::<_, candle_core::Error>(CausalState {
            state: empty_state(q, v)?,
            log_sum: first_log_sum(q, seeded)?,
        })
    };
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
    let exchange = Memory::exchange(memory.as_deref());
    if exchange.is_some() || (memory.is_none() || borders.is_some()) && !seeded {
        let is_first = exchange.as_ref().is_none_or(|exchange| exchange.part() == 0);
        let seed = (seeded && is_first).then(empty).transpose()?;
        let options = additive::Causal {
            initial: seed.as_ref(),
            sequences: borders.as_deref(),
            exchange,
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
    let (o, after) = if q.dim(1)? == 1 && memory.is_some() {
        let row = |x: &Tensor| x.squeeze(1);
        let before = known.map_or_else(empty, Ok)?;
        let step = match memory.as_ref().is_some_and(|memory| memory.in_place) {
            true => additive::step_in_place,
            false => additive::step,
        };
        let (o, after) = step(&row(q)?, &row(logits)?, &row(v)?, &before)?;
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
    let exchange = Memory::exchange(memory.as_deref());
    let known = memory.as_ref().and_then(|memory| memory.log_sum.clone());
    let is_later = exchange.as_ref().is_some_and(|exchange| exchange.part() > 0);
    let own = match known {
        None if seeded && !is_later => Some(first_log_sum(logits, seeded)?),
        known => known,
    };
    let begins = own.is_none() && !is_later;
    let before = match &exchange {
        Some(exchange) => Some(additive::log_sum_before(exchange, logits, own.as_ref(), None)?),
        None => own,
    };
    let z = fulgur_kernels::log_sum::log_sum(logits, before.as_ref(), None)?;
    let tokens = z.dim(1)?;
    let first = match &before {
        Some(before) if !begins => before.unsqueeze(1)?.to_dtype(z.dtype())?,
        _ => z.narrow(1, 0, 1)?,
    };
    let mut rows = vec![first];
    if tokens > 1 {
        rows.push(z.narrow(1, 0, tokens - 1)?);
    }
    let shifted = Tensor::cat(&rows, 1)?;
    if let Some(memory) = memory.filter(|memory| memory.keeps()) {
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
    let exchange = Memory::exchange(memory.as_deref());
    let memory = match memory {
        Some(memory) if memory.keeps() => memory,
        _ => {
            let options = eos::Options {
                sequences: borders.as_deref(),
                exchange,
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
    if let Some(exchange) = Memory::exchange(memory.as_deref()) {
        return sums.broadcast_add(&before_part(&exchange, &sums)?);
    }
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
    if let Some(exchange) = Memory::exchange(memory.as_deref()) {
        return attended_in_parts(q, k, v, &exchange, borders.as_deref());
    }
    let options = Options {
        causal: true,
        sequences: borders.as_deref(),
        ..Default::default()
    };
    let memory = match memory {
        Some(memory) if borders.is_none() => memory,
        _ => return softmax(q, k, v, &options),
    };
    let new = [k.detach().contiguous()?, v.detach().contiguous()?];
    let cache = match &memory.cache {
        Some(before) => before.followed_by(new)?,
        None => Cache::full(new),
    };
    let [k, v] = &cache.own;
    let o = softmax(q, k, v, &options)?;
    memory.cache = Some(cache);
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

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// Forks of a cache add rows of their own, in turn and at once, and each sees what it would see alone.
    #[test]
    fn forks_of_a_cache_do_not_see_each_other() -> Result<()> {
        let cpu = &Device::Cpu;
        let rows = |count: usize| -> Result<[Tensor; 2]> {
            Ok([
                Tensor::randn(0f32, 1.0, (2, count, 3, 4), cpu)?,
                Tensor::randn(0f32, 1.0, (2, count, 3, 5), cpu)?,
            ])
        };
        let start = rows(6)?;
        let mut forks: Vec<(Cache, [Tensor; 2])> = vec![(Cache::full(start.clone()), start)];
        for round in 0..3 * LEAST_ROOM {
            if round % 50 == 1 {
                forks.push(forks[0].clone());
            }
            for (cache, wanted) in &mut forks {
                let new = rows(1 + round % 3)?;
                *cache = cache.followed_by(new.clone())?;
                for (wanted, new) in wanted.iter_mut().zip(&new) {
                    *wanted = Tensor::cat(&[&*wanted, new], 1)?;
                }
            }
            for (cache, wanted) in &forks {
                for (found, wanted) in cache.own.iter().zip(wanted) {
                    assert_eq!(
                        found.flatten_all()?.to_vec1::<f32>()?,
                        wanted.flatten_all()?.to_vec1::<f32>()?
                    );
                }
            }
        }
        assert!(forks.len() > 3);
        // A cache that is alone is copied now and then, not at each token.
        let mut copies = 0;
        let mut cache = forks.remove(0).0;
        for _ in 0..100 {
            let before = cache.taken.clone();
            cache = cache.followed_by(rows(1)?)?;
            copies += usize::from(!Arc::ptr_eq(&before, &cache.taken));
        }
        assert!((1..=3).contains(&copies), "{copies}");
        Ok(())
    }
}
