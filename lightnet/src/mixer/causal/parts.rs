//! What causal mixers are made of: maps that run as one product, short convolutions, the norm and gate of the output.

use std::sync::Arc;

use candle_core::{D, DType, Result, Tensor, bail};
use candle_nn::ops::sigmoid;
use candle_nn::{Init, VarBuilder};
use fulgur_kernels::exchange::{Direction, StateExchange, halo, shared, summed_alike};
use fulgur_kernels::lrpe::{double, token_phases, token_phases_at};
use fulgur_kernels::norm::{Gate, layer_norm, rms_norm_gated, rms_norm_to};
use fulgur_kernels::short_conv::{Padding, short_conv};
use fulgur_kernels::split::Part;

use super::{CausalContext, Memory, map};
use crate::linear::{Joined, Linear};
use crate::lm::{Activation, Config, OutputGate, OutputNorm};
use crate::position::spread_frequencies;

/// Maps of one input side by side, each behind a short convolution where the model has them.
#[derive(Clone, Debug)]
pub(super) struct Maps {
    maps: Joined,
    /// Kernels `[C, 1, W]` of the columns of each map.
    kernels: Vec<Tensor>,
    /// Whether convolutions see what comes behind a token.
    two_sided: bool,
}

impl Maps {
    /// Takes `{letter}_proj`, and `{letter}_conv1d.weight` `[C, 1, W]`, for each letter with its width C.
    pub(super) fn new(config: &Config, widths: &[(char, usize)], vb: &VarBuilder) -> Result<Self> {
        let mut kernels = Vec::new();
        if let Some(taps) = config.conv_size {
            for &(letter, width) in widths {
                // As torch's convolutions start, a tap sees a token with one over their number.
                let init = Init::Randn {
                    mean: 0.0,
                    stdev: (taps as f64).powf(-0.5),
                };
                let vb = vb.pp(format!("{letter}_conv1d"));
                kernels.push(vb.get_with_hints((width, 1, taps), "weight", init)?);
            }
        }
        let maps = widths.iter().map(|&(letter, width)| {
            map(
                config,
                config.hidden_size,
                width,
                &vb.pp(format!("{letter}_proj")),
            )
        });
        Ok(Self {
            maps: Joined::new(maps.collect::<Result<_>>()?)?,
            kernels,
            two_sided: config.bidirectional,
        })
    }

    /// As [`Linear::round`]; the narrow side of `gate` joins the maps where nothing is between it and their input.
    pub(super) fn round(&mut self, dtype: DType, gate: Option<&mut LowRankGate>) -> Result<()> {
        self.maps.round(dtype)?;
        let Some(gate) = gate else {
            return Ok(());
        };
        gate.up.round(dtype)?;
        if let Some(mut down) = gate.down.take() {
            down.round(dtype)?;
            match self.kernels.is_empty() {
                true => self.maps.push(down)?,
                false => gate.down = Some(down),
            }
        }
        Ok(())
    }

    /// `x` `[B, N, d]` to the columns of all maps.
    pub(super) fn forward(&self, x: &Tensor, memory: Option<&mut Memory>) -> Result<Tensor> {
        let y = self.maps.forward(x)?;
        let Some(first) = self.kernels.first() else {
            return Ok(y);
        };
        let taps = first.dim(2)?;
        let kernels = Tensor::cat(&self.kernels, 0)?.squeeze(1)?;
        match memory {
            Some(memory) if self.two_sided => {
                let padding = Padding::centred(taps);
                let Some(exchange) = Memory::exchange(Some(memory)) else {
                    return short_conv(&y, &kernels, padding);
                };
                let before = halo(&exchange, &y, padding.before, Direction::Forward)?;
                let behind = halo(&exchange, &y, padding.behind, Direction::Backward)?;
                short_conv(&Tensor::cat(&[&before, &y, &behind], 1)?, &kernels, Padding::NONE)
            }
            Some(memory) => {
                let columns = memory.after_columns(&y, taps - 1)?;
                short_conv(&columns, &kernels, Padding::NONE)
            }
            None if self.two_sided => short_conv(&y, &kernels, Padding::centred(taps)),
            None => short_conv(&y, &kernels, Padding::causal(taps)),
        }
    }
}

/// Largest number that [`Activation::Exp`] takes: products of its results stay finite.
const MOST_EXPONENT: f64 = 20.0;

impl Activation {
    /// The part of a projection that it is applied to; [`Self::finish`] does what the split does not.
    pub(crate) fn part<'a>(self, width: usize) -> Part<'a> {
        match self {
            Self::Silu => Part::Silu(width),
            _ => Part::Plain(width),
        }
    }

    /// The activation of a part that [`Self::part`] made.
    pub(crate) fn finish(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Silu | Self::None => Ok(x.clone()),
            Self::Sigmoid => sigmoid(x),
            Self::OnePlusElu => x.elu(1.0)? + 1.0,
            Self::Relu => x.relu(),
            Self::Elu => x.elu(1.0),
            Self::ReluSquared => x.relu()?.sqr(),
            Self::Square => x.sqr(),
            Self::Exp => x.minimum(MOST_EXPONENT)?.exp(),
        }
    }
}

/// The norm of a mixer's output, with its gate.
#[derive(Clone, Debug)]
pub(super) struct Output {
    norm: OutputNorm,
    groups: usize,
    per_head: bool,
    eps: f64,
    gain: Option<Tensor>,
    /// The gain in another type, for a model that nobody trains.
    rounded: Option<Tensor>,
    gate: OutputGate,
    gate_first: bool,
    /// Ranks that have the other heads.
    ranks: Option<Arc<dyn StateExchange>>,
}

impl Output {
    /// Takes `g_norm.weight`, unless the norm has no gain.
    pub(super) fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let gain = || {
            let vb = vb.pp("g_norm");
            vb.get_with_hints(config.value_size(), "weight", Init::Const(1.0))
        };
        Ok(Self {
            norm: config.output_norm,
            groups: if config.norm_per_head {
                config.num_attention_heads
            } else {
                1
            },
            per_head: config.norm_per_head,
            eps: config.unscaled_output_eps(),
            gain: config.elementwise_affine.then(gain).transpose()?,
            rounded: None,
            gate: config.output_gate,
            gate_first: config.gate_first,
            ranks: None,
        })
    }

    /// That of some heads, whose statistics are of all heads on all `ranks`.
    pub(super) fn over(&mut self, ranks: &Arc<dyn StateExchange>) {
        // Heads that are normed one by one need no others.
        self.ranks = (self.groups == 1 && !self.per_head).then(|| ranks.clone());
    }

    /// Keeps the gain in `dtype` too, for branches that compute in it.
    pub(super) fn round(&mut self, dtype: DType) -> Result<()> {
        let gain = self.gain.as_ref();
        self.rounded = gain.map(|gain| gain.detach().to_dtype(dtype)).transpose()?;
        Ok(())
    }

    /// Norms `o` `[B, N, d]` and multiplies by the gate, or the other way around.
    pub(super) fn forward(&self, o: &Tensor, gate: Option<&Tensor>) -> Result<Tensor> {
        let Some(gate) = gate else {
            return self.normed(o);
        };
        if self.gate_first {
            return self.normed(&(o * self.activated(gate)?)?);
        }
        if self.norm == OutputNorm::Rms && self.ranks.is_none() {
            let activation = match self.gate {
                OutputGate::None => Gate::Identity,
                OutputGate::Sigmoid => Gate::Sigmoid,
                OutputGate::Silu => Gate::Silu,
            };
            return rms_norm_gated(o, self.gain.as_ref(), gate, activation, self.groups, self.eps);
        }
        self.normed(o)? * self.activated(gate)?
    }

    fn normed(&self, o: &Tensor) -> Result<Tensor> {
        let rounded = self.rounded.as_ref().filter(|gain| gain.dtype() == o.dtype());
        let gain = match (rounded, &self.gain) {
            (Some(gain), _) => Some(gain.clone()),
            (None, gain) => gain.as_ref().map(|gain| gain.to_dtype(o.dtype())).transpose()?,
        };
        if let Some(ranks) = &self.ranks {
            let normed = normed_over(ranks, o, self.eps)?;
            return match gain {
                Some(gain) => normed.broadcast_mul(&gain),
                None => Ok(normed),
            };
        }
        match self.norm {
            OutputNorm::Rms => rms_norm_to(o, gain.as_ref(), self.groups, self.eps, o.dtype()),
            OutputNorm::Layer if self.groups == 1 => layer_norm(o, gain.as_ref(), None, self.eps),
            OutputNorm::Layer => {
                let (batch, tokens, width) = o.dims3()?;
                let rows = o.reshape((batch, tokens, self.groups, width / self.groups))?;
                let normed = layer_norm(&rows, None, None, self.eps)?.reshape(o.shape())?;
                match gain {
                    Some(gain) => normed.broadcast_mul(&gain),
                    None => Ok(normed),
                }
            }
        }
    }

    fn activated(&self, gate: &Tensor) -> Result<Tensor> {
        match self.gate {
            OutputGate::None => Ok(gate.clone()),
            OutputGate::Sigmoid => sigmoid(gate),
            OutputGate::Silu => gate * sigmoid(gate)?,
        }
    }
}

/// `o / rms(o)` where `o` `[B, N, d / m]` is what one of m ranks has of the channels: squares are summed over all ranks.
fn normed_over(ranks: &Arc<dyn StateExchange>, o: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = o.to_dtype(super::memory::wide(o))?;
    let channels = (o.dim(D::Minus1)? * ranks.parts()) as f64;
    let squares = summed_alike(ranks, &wide.sqr()?.sum_keepdim(D::Minus1)?)?;
    let root = ((squares / channels)? + eps)?.sqrt()?;
    wide.broadcast_div(&root)?.to_dtype(o.dtype())
}

/// The low-rank output gate `x W_1 W_2`, d -> rank -> d.
#[derive(Clone, Debug)]
pub(super) struct LowRankGate {
    /// None where the map is one of [`Maps`].
    down: Option<Linear>,
    up: Linear,
}

impl LowRankGate {
    /// Takes `0` and `1`.
    pub(super) fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let (width, rank) = (config.hidden_size, config.gate_rank());
        Ok(Self {
            down: Some(map(config, width, rank, &vb.pp("0"))?),
            up: map(config, rank, config.value_size(), &vb.pp("1"))?,
        })
    }

    /// As [`Linear::round`], of a gate that stays on its own.
    pub(super) fn round(&mut self, dtype: DType) -> Result<()> {
        if let Some(down) = &mut self.down {
            down.round(dtype)?;
        }
        self.up.round(dtype)
    }

    /// The part of a wide projection that its narrow side is, where it is one.
    pub(super) fn part<'a>(&self) -> Option<Part<'a>> {
        let rank = self.up.weight().dims()[1];
        self.down.is_none().then_some(Part::Plain(rank))
    }

    /// The gate of `x`, by the last of `parts` where the narrow side is among them; where it is that of some heads, `ranks` have the
    /// others and the same narrow side.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        parts: &[Tensor],
        ranks: Option<&Arc<dyn StateExchange>>,
    ) -> Result<Tensor> {
        match (&self.down, parts) {
            (Some(down), _) => {
                let narrow = down.forward(x)?;
                match ranks {
                    Some(ranks) => self.up.forward(&shared(ranks, &narrow)?),
                    None => self.up.forward(&narrow),
                }
            }
            (None, [.., narrow]) => self.up.forward(narrow),
            (None, []) => bail!("the gate's narrow side is missing"),
        }
    }
}

/// Frequencies `[P]`, or `[H, P]` with `[H, 1, P]` in checkpoints, of LRPE (arXiv 2307.09270): fixed or learnt.
#[derive(Clone, Debug)]
pub(super) struct Theta(Tensor);

impl Theta {
    /// From `start`, of the given shape; learnt ones are `lrpe.theta`.
    pub(super) fn new(start: &[f64], shape: &[usize], learnt: bool, vb: &VarBuilder) -> Result<Self> {
        let theta = if learnt {
            started(start, shape, "theta", &vb.pp("lrpe"))?
        } else {
            let values: Vec<f32> = start.iter().map(|&theta| theta as f32).collect();
            Tensor::from_vec(values, shape, vb.device())?
        };
        match *theta.dims() {
            [heads, 1, width] => Ok(Self(theta.reshape((heads, width))?)),
            _ => Ok(Self(theta)),
        }
    }

    /// Frequencies that all heads share, where the configuration has some: of all channels of a head, or of the half that turns
    /// fastest.
    pub(super) fn shared(config: &Config, vb: &VarBuilder) -> Result<Option<Self>> {
        if !config.use_lrpe {
            return Ok(None);
        }
        let width = config.head_width();
        let turning = if config.half_lrpe {
            width.div_ceil(2)
        } else {
            width
        };
        let start = match config.lrpe_longest {
            Some(longest) => spread_frequencies(turning, longest),
            None => cosine_frequencies(width, turning),
        };
        Self::new(&start, &[turning], config.learn_theta, vb).map(Some)
    }

    /// Queries and keys `[B, N, H, D]`, turned where there are frequencies.
    pub(super) fn turn(
        theta: Option<&Self>,
        [q, k]: [Tensor; 2],
        context: &CausalContext<'_>,
    ) -> Result<[Tensor; 2]> {
        let Some(theta) = theta else {
            return Ok([q, k]);
        };
        let phase = theta.phases(q.dim(1)?, context)?;
        Ok([double(&q, &phase)?, double(&k, &phase)?])
    }

    /// Phases of `tokens` tokens behind those that `context` tells of.
    pub(super) fn phases(&self, tokens: usize, context: &CausalContext<'_>) -> Result<Tensor> {
        match context.clock {
            Some(clock) => token_phases_at(&self.0, tokens, clock),
            None => token_phases(&self.0, tokens, context.position),
        }
    }
}

/// A value that none starts from.
const UNSET: f64 = -1.0;

/// The parameter `name`, which starts from values of its own, none of which may be [`UNSET`].
pub(super) fn started(start: &[f64], shape: &[usize], name: &str, vb: &VarBuilder) -> Result<Tensor> {
    let parameter = vb.get_with_hints(shape, name, Init::Const(UNSET))?;
    // No start of candle's gives every value its own, so a fresh variable is marked, and written once.
    let is_unset = || {
        let first = parameter.flatten_all()?.get(0)?.to_dtype(DType::F32)?;
        Ok::<_, candle_core::Error>(first.to_scalar::<f32>()? == UNSET as f32)
    };
    if parameter.is_variable() && is_unset()? {
        let values: Vec<f32> = start.iter().map(|&value| value as f32).collect();
        parameter.slice_set(&Tensor::from_vec(values, shape, vb.device())?, 0, 0)?;
    }
    Ok(parameter)
}

/// `10000^(-2 j / width)` for the channels of `turning` of them.
pub(super) fn cosine_frequencies(width: usize, turning: usize) -> Vec<f64> {
    (0..turning)
        .map(|j| 1e4f64.powf(-2.0 * j as f64 / width as f64))
        .collect()
}
