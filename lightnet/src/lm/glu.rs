//! The gated linear unit of a layer.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::exchange::{StateExchange, shared, summed};
use fulgur_kernels::glu::swiglu;
use fulgur_kernels::linear::linear_swiglu;
use fulgur_kernels::split::{Part, split};

use super::config::{Activation, Architecture, Config};
use crate::linear::{Joined, Linear, Start};

/// `(act(x W_gate) * x W_up) W_down`.
#[derive(Clone, Debug)]
pub(super) struct Glu {
    act: Activation,
    /// Of the gate, and upwards.
    wide: Joined,
    hidden: usize,
    down: Linear,
    /// Ranks that have the other columns.
    ranks: Option<Arc<dyn StateExchange>>,
}

impl Glu {
    /// Takes `gate_proj`, `up_proj` and `down_proj`; of TransNormerLLM `l1`, `l2` and `l3`.
    pub(super) fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let (width, hidden) = (config.hidden_size, config.intermediate_size);
        let names = match config.architecture {
            Architecture::Transnormer => ["l1", "l2", "l3"],
            _ => ["gate_proj", "up_proj", "down_proj"],
        };
        let map = |input, output, name| {
            let start = Start::Normal(config.initializer_range);
            Linear::new(input, output, config.mlp_bias, start, &vb.pp(name))
        };
        Ok(Self {
            act: config.hidden_act,
            wide: Joined::new(vec![map(width, hidden, names[0])?, map(width, hidden, names[1])?])?,
            hidden,
            down: map(hidden, width, names[2])?,
            ranks: None,
        })
    }

    /// That of some columns; `ranks` have the others.
    pub(super) fn over(&mut self, ranks: &Arc<dyn StateExchange>) {
        self.ranks = Some(ranks.clone());
    }

    /// As [`Linear::round`].
    pub(super) fn round(&mut self, dtype: DType) -> Result<()> {
        self.wide.round(dtype)?;
        self.down.round(dtype)
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.ranks {
            Some(ranks) => summed(ranks, &self.own(&shared(ranks, x)?)?),
            None => self.own(x),
        }
    }

    /// What its columns give.
    fn own(&self, x: &Tensor) -> Result<Tensor> {
        if self.act == Activation::Silu
            && let Some(weight) = self.wide.frozen_weight()
        {
            return self.down.forward(&linear_swiglu(x, weight)?);
        }
        let (wide, hidden) = (self.wide.forward(x)?, self.hidden);
        let y = match self.act {
            Activation::Silu => swiglu(&wide)?,
            act => {
                let halves = split(&wide, &[act.part(hidden), Part::Plain(hidden)])?;
                (act.finish(&halves[0])? * &halves[1])?
            }
        };
        self.down.forward(&y)
    }
}
