//! What is around the recurrence of a mixer: the maps of its input, and the gate, norm and map of its output.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::exchange::{StateExchange, shared, summed};
use fulgur_kernels::split::{Part, split};

use super::parts::{LowRankGate, Maps, Output};
use super::{Memory, heads, map};
use crate::linear::Linear;
use crate::lm::{Activation, Config};

/// What the columns of a map are for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Use {
    /// They go through an activation.
    Activated(Activation),
    /// They are gates with a lower bound, which give what is forgotten and the logarithms of what is kept.
    Gate,
}

/// A map of the input: the letter of its name, its width, and what it is for.
pub(super) type Column = (char, usize, Use);

/// Queries, keys and values, with this activation of keys.
pub(super) fn queries_keys_values(config: &Config, key_act: Activation) -> [Column; 3] {
    let (keys, values) = (config.key_size(), config.value_size());
    [
        ('q', keys, Use::Activated(config.linear_act)),
        ('k', keys, Use::Activated(key_act)),
        ('v', values, Use::Activated(config.value_act)),
    ]
}

/// Maps before a recurrence, and gate, norm and map behind it.
#[derive(Clone, Debug)]
pub(super) struct Projections {
    pub(super) heads: usize,
    columns: Vec<Column>,
    maps: Maps,
    gate: Option<LowRankGate>,
    norm: Output,
    output: Linear,
    /// Ranks that have the other heads.
    ranks: Option<Arc<dyn StateExchange>>,
}

impl Projections {
    /// Takes the maps of `columns` as [`Maps::new`], `g_proj` where the output is `gated`, `g_norm` and `o_proj`.
    pub(super) fn new(config: &Config, columns: &[Column], gated: bool, vb: &VarBuilder) -> Result<Self> {
        let widths: Vec<(char, usize)> = columns
            .iter()
            .map(|&(letter, width, _)| (letter, width))
            .collect();
        Ok(Self {
            heads: config.num_attention_heads,
            columns: columns.to_vec(),
            maps: Maps::new(config, &widths, vb)?,
            gate: gated
                .then(|| LowRankGate::new(config, &vb.pp("g_proj")))
                .transpose()?,
            norm: Output::new(config, vb)?,
            output: map(config, config.value_size(), config.hidden_size, &vb.pp("o_proj"))?,
            ranks: None,
        })
    }

    /// Where its weights are.
    pub(super) fn device(&self) -> &Device {
        self.output.weight().device()
    }

    /// Those of some heads; `ranks` have the others.
    pub(super) fn over(&mut self, ranks: &Arc<dyn StateExchange>) {
        self.norm.over(ranks);
        self.ranks = Some(ranks.clone());
    }

    /// As [`Linear::round`], of all maps; the narrow side of the gate becomes one of the input's.
    pub(super) fn round(&mut self, dtype: DType) -> Result<()> {
        self.maps.round(dtype, self.gate.as_mut())?;
        self.norm.round(dtype)?;
        self.output.round(dtype)
    }

    /// As [`Self::round`], where the maps of the input have to stay as they are.
    pub(super) fn round_apart(&mut self, dtype: DType) -> Result<()> {
        self.maps.round(dtype, None)?;
        if let Some(gate) = &mut self.gate {
            gate.round(dtype)?;
        }
        self.norm.round(dtype)?;
        self.output.round(dtype)
    }

    /// `x` `[B, N, d]` to the columns of all maps.
    pub(super) fn wide(&self, x: &Tensor, memory: Option<&mut Memory>) -> Result<Tensor> {
        match &self.ranks {
            Some(ranks) => self.maps.forward(&shared(ranks, x)?, memory),
            None => self.maps.forward(x, memory),
        }
    }

    /// Columns of the maps, without those of the gate.
    pub(super) fn width(&self) -> usize {
        self.columns.iter().map(|(_, width, _)| width).sum()
    }

    /// The narrow side of the gate, where it is one of the maps.
    pub(super) fn gate_part<'a>(&self) -> Option<Part<'a>> {
        self.gate.as_ref().and_then(LowRankGate::part)
    }

    /// What the columns are for, each `[B, N, C]`: a gate gives two tensors, and the last is the narrow side of the output's
    /// gate, where it is one of the maps.
    pub(super) fn parts(&self, wide: &Tensor, lower_bound: Option<&Tensor>) -> Result<Vec<Tensor>> {
        let runs: Vec<Part<'_>> = self
            .columns
            .iter()
            .map(|&(_, width, role)| match role {
                Use::Activated(act) => act.part(width),
                Use::Gate => Part::Gate(width, lower_bound),
            })
            .chain(self.gate_part())
            .collect();
        let mut parts = split(wide, &runs)?;
        let mut at = 0;
        for &(_, _, role) in &self.columns {
            match role {
                Use::Activated(act) => {
                    parts[at] = act.finish(&parts[at])?;
                    at += 1;
                }
                Use::Gate => at += 2,
            }
        }
        Ok(parts)
    }

    /// `[B, N, H D]` as `[B, N, H, D]`.
    pub(super) fn heads(&self, part: &Tensor) -> Result<Tensor> {
        heads(part, self.heads)
    }

    /// The branch for what the recurrence gave, `[B, N, d]`; the gate is made of `x`, or is among `parts`.
    pub(super) fn finish(&self, o: &Tensor, x: &Tensor, parts: &[Tensor]) -> Result<Tensor> {
        let gate = self
            .gate
            .as_ref()
            .map(|gate| gate.forward(x, parts, self.ranks.as_ref()))
            .transpose()?;
        let branch = self.output.forward(&self.norm.forward(o, gate.as_ref())?)?;
        match &self.ranks {
            Some(ranks) => summed(ranks, &branch),
            None => Ok(branch),
        }
    }
}
