//! The EOS layer: expand, oscillate, shrink (arXiv 2405.17383), of which the other recurrent mixers are instances.
//!
//! ```text
//! e, s = act(x W_e), act(x W_s) in R^k, or constants in R^{k x d}      i = x W_i in R^d
//! m_t = o_t (*) m_{t-1} + e_t i_t^T      y_t = m_t^T s_t               o_t in R^{k x d}: `gates.rs`
//! result = norm(y) W_o
//! ```
//!
//! k is the width of a head's keys, d that of its values. A memory that turns is the real part of a complex one,
//! `o_t exp(i theta)`: e and s are multiplied by the cosine and the sine of the angle so far, side by side, and gates doubled.
//!
//! Three forms: matrix products where gates are alike along d; the element-wise scan where they are not; and a scan with the
//! elements of the memory as its columns where expand or shrink has a value for each of them, or k is 1. Between maps and norm
//! all but the first computes in f32.
//!
//! Tensors: `q_proj` for s, `k_proj` for e, `v_proj` for i, `f_proj` and `w_proj` for gates of rows and columns, `p_proj` for
//! angles, `expand` and `shrink` `[H, k, d]` for constants, `gates` for those of gates, `dt_proj` for the steps of a state
//! space model, `g_proj` where the output has a gate, `g_norm` and `o_proj`.

mod gates;
#[cfg(test)]
mod tests;

use candle_core::{D, DType, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};
use fulgur_kernels::decay::LogDecay;
use fulgur_kernels::split::{Part, split};

use self::gates::{Gates, Steps};
use super::memory::{decayed, log_sums, scanned, summed_angles, wide};
use super::parts::{LowRankGate, Maps, Output, Theta, cosine_frequencies};
use super::{CausalContext, Memory, heads, map};
use crate::linear::Linear;
use crate::lm::{Activation, Config, EosConfig, GateForm, Oscillation, OutputGate, Source, Turn};

/// Standard deviation of constants at first.
const CONSTANT_START: f64 = 0.1;
/// The angle of a token where all rows share one: a quarter turn in 1024 tokens.
const SHARED_ANGLE: f64 = std::f64::consts::FRAC_PI_2 / 1024.0;
/// Logits of sums of exponentials that weigh given keys stay below this.
const LARGEST_LOGIT: f64 = 10.0;

/// What a column of the input map is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Role {
    Shrink,
    Expand,
    Input,
    RowGate,
    ColumnGate,
    Angle,
}

impl Role {
    fn letter(self) -> char {
        match self {
            Self::Shrink => 'q',
            Self::Expand => 'k',
            Self::Input => 'v',
            Self::RowGate => 'f',
            Self::ColumnGate => 'w',
            Self::Angle => 'p',
        }
    }
}

/// The layer.
#[derive(Clone, Debug)]
pub struct Eos {
    eos: EosConfig,
    heads: usize,
    rows: usize,
    acts: [Activation; 3],
    roles: Vec<(Role, usize)>,
    maps: Maps,
    expand: Option<Tensor>,
    shrink: Option<Tensor>,
    gates: Gates,
    steps: Option<Steps>,
    theta: Option<Theta>,
    gate: Option<LowRankGate>,
    norm: Output,
    output: Linear,
}

/// What the maps of a token give.
#[derive(Default)]
struct Parts {
    shrink: Option<Tensor>,
    expand: Option<Tensor>,
    input: Option<Tensor>,
    row_gate: Option<Tensor>,
    column_gate: Option<Tensor>,
    angle: Option<Tensor>,
    /// One minus the gate, and the logarithm of the gate, where they are made together.
    forgotten: Option<[Tensor; 2]>,
}

impl Eos {
    /// The layer number `layer`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(config: &Config, layer: usize, vb: &VarBuilder) -> Result<Self> {
        use Oscillation as O;
        let eos = config.eos;
        let (keys, values) = (config.key_size(), config.value_size());
        let (heads, rows) = (config.num_attention_heads, config.head_width());
        let columns = values / heads;
        let kind = eos.oscillation;
        let by_rows = [
            O::Outer,
            O::Keys,
            O::KeysByConstant,
            O::KeysByConstantValues,
            O::Cumulative,
        ];
        let by_columns = [O::Outer, O::Values, O::ValuesByConstant, O::ValuesByConstantKeys];
        let roles = [
            (Role::Shrink, keys, eos.shrink == Source::Data),
            (Role::Expand, keys, eos.expand == Source::Data),
            (Role::Input, values, true),
            (Role::RowGate, keys, by_rows.contains(&kind)),
            (Role::ColumnGate, values, by_columns.contains(&kind)),
            (Role::Angle, keys, eos.turn == Turn::Data),
        ];
        let roles: Vec<(Role, usize)> = roles
            .into_iter()
            .filter(|&(_, _, has)| has)
            .map(|(role, width, _)| (role, width))
            .collect();
        let letters: Vec<(char, usize)> = roles
            .iter()
            .map(|(role, width)| (role.letter(), *width))
            .collect();
        let constant = |source: Source, name: &str| {
            let start = Init::Randn {
                mean: 0.0,
                stdev: CONSTANT_START,
            };
            (source == Source::Constant)
                .then(|| vb.get_with_hints((heads, rows, columns), name, start))
                .transpose()
        };
        let frequencies = match eos.turn {
            Turn::Shared => Some(vec![SHARED_ANGLE]),
            Turn::Rows => Some(cosine_frequencies(rows, rows)),
            Turn::None | Turn::Data => None,
        };
        let theta = frequencies.map(|start| Theta::new(&start, &[start.len()], config.learn_theta, vb));
        Ok(Self {
            eos,
            heads,
            rows,
            acts: [
                config.linear_act,
                eos.expand_act.unwrap_or(config.linear_act),
                config.value_act,
            ],
            roles,
            maps: Maps::new(config, &letters, vb)?,
            expand: constant(eos.expand, "expand")?,
            shrink: constant(eos.shrink, "shrink")?,
            gates: Gates::new(config, layer, vb)?,
            steps: (kind == O::StateSpace)
                .then(|| Steps::new(config, vb))
                .transpose()?,
            theta: theta.transpose()?,
            gate: (config.output_gate != OutputGate::None)
                .then(|| LowRankGate::new(config, &vb.pp("g_proj")))
                .transpose()?,
            norm: Output::new(config, vb)?,
            output: map(config, values, config.hidden_size, &vb.pp("o_proj"))?,
        })
    }

    /// As [`Linear::round`], of the maps before and behind the recurrence.
    ///
    /// # Errors
    /// A failing operation.
    pub fn round(&mut self, dtype: DType) -> Result<()> {
        self.maps.round(dtype, None)?;
        if let Some(gate) = &mut self.gate {
            gate.round(dtype)?;
        }
        self.norm.round(dtype)?;
        self.output.round(dtype)
    }

    /// Mixes `x` `[B, N, d]`.
    ///
    /// # Errors
    /// A failing operation.
    pub fn forward(
        &self,
        x: &Tensor,
        context: &CausalContext<'_>,
        mut memory: Option<&mut Memory>,
    ) -> Result<Tensor> {
        let mut parts = self.parts(x, context, memory.as_deref_mut())?;
        let (log, forgotten) = self.oscillation(x, &mut parts, memory.as_deref_mut())?;
        let expand = match (self.eos.expand, parts.expand.take()) {
            (Source::Tied, _) => forgotten,
            (_, Some(e)) => Some(match forgotten {
                // What cumulative sums take in weighs keys too.
                Some(share) if self.eos.oscillation == Oscillation::Cumulative => {
                    (e.to_dtype(share.dtype())? * share)?
                }
                _ => e,
            }),
            (_, None) => None,
        };
        let Some(input) = parts.input.take() else {
            bail!("eos: the maps gave no input")
        };
        let phase = self.phases(&parts, x.dim(1)?, context, memory.as_deref_mut())?;
        let y = match (expand, parts.shrink.take()) {
            (Some(e), Some(s)) if self.rows > 1 && !self.eos.has_full_sides() => {
                self.by_rows([&e, &s], &input, log, phase.as_ref(), memory)?
            }
            (expand, shrink) => {
                let sides = [
                    side(expand.as_ref(), self.expand.as_ref(), &input)?,
                    side(shrink.as_ref(), self.shrink.as_ref(), &input)?,
                ];
                by_elements(sides, &input, log, phase.as_ref(), memory)?
            }
        };
        let y = y.to_dtype(x.dtype())?.flatten_from(2)?;
        let gate = self
            .gate
            .as_ref()
            .map(|gate| gate.forward(x, &[], None))
            .transpose()?;
        self.output.forward(&self.norm.forward(&y, gate.as_ref())?)
    }

    /// Whether gates are made as HGRN2's, keys and logarithms together.
    fn is_plain(&self) -> bool {
        let EosConfig {
            oscillation,
            gate,
            tau,
            ..
        } = self.eos;
        oscillation == Oscillation::Keys && gate == GateForm::Root && tau == 1.0
    }

    fn parts(&self, x: &Tensor, context: &CausalContext<'_>, memory: Option<&mut Memory>) -> Result<Parts> {
        let act = |role| match role {
            Role::Shrink => self.acts[0],
            Role::Expand => self.acts[1],
            Role::Input => self.acts[2],
            _ => Activation::None,
        };
        let runs: Vec<Part<'_>> = self
            .roles
            .iter()
            .map(|&(role, width)| match role {
                Role::RowGate if self.is_plain() => Part::Gate(width, context.lower_bound),
                _ => act(role).part(width),
            })
            .collect();
        let mut pieces = split(&self.maps.forward(x, memory)?, &runs)?.into_iter();
        let mut piece = || match pieces.next() {
            Some(piece) => Ok(piece),
            None => bail!("eos: the maps gave too few columns"),
        };
        let mut parts = Parts::default();
        for &(role, _) in &self.roles {
            let first = heads(&act(role).finish(&piece()?)?, self.heads)?;
            match role {
                Role::Shrink => parts.shrink = Some(first),
                Role::Expand => parts.expand = Some(first),
                Role::Input => parts.input = Some(first),
                Role::RowGate if self.is_plain() => {
                    parts.forgotten = Some([first, heads(&piece()?, self.heads)?]);
                }
                Role::RowGate => parts.row_gate = Some(first),
                Role::ColumnGate => parts.column_gate = Some(first),
                Role::Angle => parts.angle = Some(first),
            }
        }
        Ok(parts)
    }

    /// Logarithms of gates, of five axes, and one minus the gates of rows where they are asked for. Steps of a state space model
    /// multiply the input.
    fn oscillation(
        &self,
        x: &Tensor,
        parts: &mut Parts,
        memory: Option<&mut Memory>,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        if let Some([forgotten, log]) = parts.forgotten.take() {
            return Ok((Some(log.unsqueeze(D::Minus1)?), Some(forgotten)));
        }
        if let Some(steps) = &self.steps {
            let (delta, log) = steps.forward(x, self.heads)?;
            if let Some(input) = &mut parts.input {
                *input = (input.to_dtype(delta.dtype())? * delta)?.to_dtype(input.dtype())?;
            }
            return Ok((Some(log), None));
        }
        if self.eos.oscillation == Oscillation::Cumulative {
            let Some(mut logits) = parts.row_gate.take() else {
                bail!("eos: the maps gave no logits")
            };
            logits = logits.to_dtype(wide(&logits))?;
            if self.eos.expand == Source::Data {
                logits = logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)?;
            }
            let [z, log] = log_sums(&logits, false, memory)?;
            let share = (logits.to_dtype(z.dtype())? - z)?.exp()?;
            return Ok((Some(log.unsqueeze(D::Minus1)?), Some(share)));
        }
        let log = self
            .gates
            .log(parts.row_gate.as_ref(), parts.column_gate.as_ref())?;
        let forgotten = match (&log, self.eos.expand) {
            (Some(log), Source::Tied) => Some((1.0 - log.squeeze(D::Minus1)?.exp()?)?),
            _ => None,
        };
        Ok((log, forgotten))
    }

    /// Angles so far of all rows, `[B | 1, N, H | 1, K]`.
    fn phases(
        &self,
        parts: &Parts,
        tokens: usize,
        context: &CausalContext<'_>,
        memory: Option<&mut Memory>,
    ) -> Result<Option<Tensor>> {
        if let Some(angle) = &parts.angle {
            return summed_angles(&angle.to_dtype(wide(angle))?, memory).map(Some);
        }
        let Some(theta) = &self.theta else {
            return Ok(None);
        };
        let phase = theta.phases(tokens, context)?;
        let phase = phase.broadcast_as((tokens, self.rows))?;
        phase.contiguous()?.reshape((1, tokens, 1, self.rows)).map(Some)
    }

    /// Memories of rows: `e` and `s` `[B, N, H, K]`, the input `[B, N, H, E]`.
    fn by_rows(
        &self,
        [e, s]: [&Tensor; 2],
        input: &Tensor,
        log: Option<Tensor>,
        phase: Option<&Tensor>,
        memory: Option<&mut Memory>,
    ) -> Result<Tensor> {
        let kind = wide(input);
        let scan = log.as_ref().is_some_and(|log| log.dims()[4] != 1);
        let kind = if scan { kind } else { input.dtype() };
        let turned = |x: &Tensor| match phase {
            None => x.to_dtype(kind),
            Some(phase) => turn(&x.to_dtype(wide(x))?, phase)?.to_dtype(kind),
        };
        let (e, s) = (turned(e)?, turned(s)?);
        let Some(log) = log else {
            return decayed(&s, &e, input, LogDecay::None, memory);
        };
        let log = doubled(log, phase.is_some())?;
        if scan {
            return scanned(&e, &input.to_dtype(kind)?, &log, &s, memory);
        }
        let &[_, _, heads, rows, _] = log.dims() else {
            bail!("eos: gates have shape {:?}, expected five axes", log.dims())
        };
        if self.eos.oscillation == Oscillation::Head {
            return decayed(&s, &e, input, LogDecay::Head(&log.reshape(heads)?), memory);
        }
        let (batch, tokens, _, _) = input.dims4()?;
        let log = log
            .squeeze(4)?
            .broadcast_as((batch, tokens, heads, rows))?
            .contiguous()?;
        decayed(&s, &e, input, LogDecay::Channel(&log), memory)
    }
}

/// `[B, N, H, K]` or a constant `[H, K, E]` as five axes, in the type that states have.
fn side(data: Option<&Tensor>, constant: Option<&Tensor>, input: &Tensor) -> Result<Tensor> {
    let side = match (data, constant) {
        (Some(data), _) => data.unsqueeze(4)?,
        (None, Some(constant)) => constant.unsqueeze(0)?.unsqueeze(0)?,
        (None, None) => bail!("eos: neither a map nor a constant"),
    };
    side.to_dtype(wide(input))
}

/// Memories of elements: `e` and `s` broadcast to `[B, N, H, K, E]`, the input is `[B, N, H, E]`.
fn by_elements(
    [mut e, mut s]: [Tensor; 2],
    input: &Tensor,
    log: Option<Tensor>,
    phase: Option<&Tensor>,
    memory: Option<&mut Memory>,
) -> Result<Tensor> {
    let (batch, tokens, heads, columns) = input.dims4()?;
    if let Some(phase) = phase {
        let phase = phase.unsqueeze(4)?;
        (e, s) = (turn(&e, &phase)?, turn(&s, &phase)?);
    }
    let input = input.to_dtype(wide(input))?;
    let rows = e.dim(3)?;
    let all = heads * rows * columns;
    let added = e.broadcast_mul(&input.unsqueeze(3)?)?;
    let added = added.reshape((batch, tokens, 1, all))?;
    let log = match log {
        Some(log) => {
            let log = doubled(log, phase.is_some())?;
            let (b, n, ..) = log.dims5()?;
            log.broadcast_as((b, n, heads, rows, columns))?
                .contiguous()?
                .reshape((b, n, 1, 1, all))?
        }
        None => Tensor::zeros((1, 1, 1, 1, 1), added.dtype(), added.device())?,
    };
    let ones = Tensor::ones((batch, tokens, 1, 1), added.dtype(), added.device())?;
    let m = scanned(&ones, &added, &log, &ones, memory)?;
    let m = m.reshape((batch, tokens, heads, rows, columns))?;
    s.broadcast_mul(&m)?.sum(3)
}

/// `[x cos phase, x sin phase]` along the rows, axis 3.
fn turn(x: &Tensor, phase: &Tensor) -> Result<Tensor> {
    let phase = phase.to_dtype(x.dtype())?;
    Tensor::cat(
        &[x.broadcast_mul(&phase.cos()?)?, x.broadcast_mul(&phase.sin()?)?],
        3,
    )
}

/// Gates for the sines beside those of the cosines, where rows differ.
fn doubled(log: Tensor, turns: bool) -> Result<Tensor> {
    if turns && log.dim(3)? > 1 {
        return Tensor::cat(&[&log, &log], 3);
    }
    Ok(log)
}
