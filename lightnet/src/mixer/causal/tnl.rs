//! TNL: linear attention with one constant decay a head (arXiv 2405.17381, and the scaling-law study's variant of it).
//!
//! ```text
//! q = silu(x W_q)   k = silu(x W_k)   v = silu(x W_v)
//! S_t = lambda S_{t-1} + k_t v_t^T    o_t = S_t^T q_t
//! y = (norm(o) * sigmoid(x W_1 W_2)) W_o
//! ```
//!
//! Decays are fixed: by default the slopes of ALiBi, slower from layer to layer. Activations, the norm of the output and the
//! place of its gate are those of the configuration; layers with LRPE turn queries and keys after their activation, and on pictures
//! they may turn by MD-LRPE.

use std::sync::Arc;

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::decay::{Fused, LogDecay};
use fulgur_kernels::exchange::StateExchange;
use fulgur_kernels::lrpe::double;
use fulgur_kernels::split::{Part, split};

use super::memory::{decayed, decayed_token};
use super::parts::{Theta, cosine_frequencies};
use super::projections::{Projections, queries_keys_values};
use super::{CausalContext, Memory};
use crate::lm::{Activation, Config, DecaySchedule};

/// The mixer.
#[derive(Clone, Debug)]
pub struct Tnl {
    projections: Projections,
    log_decay: Option<Tensor>,
    theta: Option<Theta>,
    /// How single tokens go from the maps to the state at once, where nothing else is between them.
    fused: Option<Fused>,
}

impl Tnl {
    /// The mixer of layer number `layer`; takes `q_proj`, `k_proj`, `v_proj`, `g_proj`, `g_norm` and `o_proj`, and `lrpe.theta`
    /// where the layer has LRPE.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(config: &Config, layer: usize, vb: &VarBuilder) -> Result<Self> {
        let (keys, values) = (config.key_size(), config.value_size());
        let (heads, acts) = (
            config.num_attention_heads,
            [config.linear_act, config.linear_act, config.value_act],
        );
        let theta = theta(config, layer, vb)?;
        let known = |act: &Activation| matches!(act, Activation::Silu | Activation::None);
        let fused = Fused {
            heads,
            keys: keys / heads,
            values: values / heads,
            silu: acts.map(|act| act == Activation::Silu),
        };
        Ok(Self {
            projections: Projections::new(config, &queries_keys_values(config, config.linear_act), true, vb)?,
            log_decay: log_decays(config, layer, vb.device())?,
            fused: (theta.is_none() && acts.iter().all(known)).then_some(fused),
            theta,
        })
    }

    /// The mixer of some heads of the layer of `whole`; `ranks` have the others.
    ///
    /// # Errors
    /// A failing operation.
    pub(crate) fn over(
        mut self,
        whole: &Config,
        layer: usize,
        ranks: &Arc<dyn StateExchange>,
    ) -> Result<Self> {
        let device = self.projections.device();
        self.log_decay = of_heads(log_decays(whole, layer, device)?, &**ranks)?;
        self.projections.over(ranks);
        Ok(self)
    }

    /// As [`crate::linear::Linear::round`], of all its maps.
    ///
    /// # Errors
    /// A failing operation.
    pub fn round(&mut self, dtype: DType) -> Result<()> {
        self.projections.round(dtype)
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
        let wide = self.projections.wide(x, memory.as_deref_mut())?;
        let decay = self.log_decay.as_ref().map_or(LogDecay::None, LogDecay::Head);
        if let (Some(fused), None) = (self.fused, context.turn)
            && let Some(o) = decayed_token(&wide, fused, decay, memory.as_deref_mut())?
        {
            let used = self.projections.width();
            let parts = match self.projections.gate_part() {
                None => Vec::new(),
                // Of one sequence the columns lie together.
                Some(part) if wide.dim(0)? == 1 => vec![wide.narrow(D::Minus1, used, part.width())?],
                Some(part) => split(&wide, &[Part::Plain(used), part])?,
            };
            return self.projections.finish(&o, x, &parts);
        }
        let parts = self.projections.parts(&wide, None)?;
        let [q, k, v] = [0, 1, 2].map(|part| self.projections.heads(&parts[part]));
        let [mut q, mut k] = Theta::turn(self.theta.as_ref(), [q?, k?], context)?;
        if let Some(phase) = context.turn {
            [q, k] = [double(&q, phase)?, double(&k, phase)?];
        }
        let o = decayed(&q, &k, &v?, decay, memory)?.flatten_from(2)?;
        self.projections.finish(&o, x, &parts)
    }
}

/// The learnt frequencies of a layer with LRPE, `10000^(-2 j / d)` over the channels of all heads at first.
pub(super) fn theta(config: &Config, layer: usize, vb: &VarBuilder) -> Result<Option<Theta>> {
    if !config.lrpe_layers.contains(&layer) {
        return Ok(None);
    }
    let (heads, width) = (config.num_attention_heads, config.head_width());
    let start = cosine_frequencies(heads * width, heads * width);
    Theta::new(&start, &[heads, 1, width], true, vb).map(Some)
}

/// The logarithms of the decays of a layer, `[H]` in f32; none without decay.
pub(super) fn log_decays(config: &Config, layer: usize, device: &Device) -> Result<Option<Tensor>> {
    let (heads, layers) = (config.num_attention_heads, config.num_hidden_layers);
    let rates = match config.decay_schedule {
        DecaySchedule::None => return Ok(None),
        DecaySchedule::Alibi => decay_rates(slopes(heads), layer, layers),
        DecaySchedule::Log => decay_rates(log_slopes(heads), layer, layers),
        DecaySchedule::Linear8 => {
            let share = 1.0 - layer as f64 / layers as f64;
            (0..heads)
                .map(|h| 8.0 * h as f64 / heads as f64 * share)
                .collect()
        }
    };
    let logs: Vec<f32> = rates.iter().map(|rate| -rate as f32).collect();
    Tensor::new(logs, device).map(Some)
}

/// Of the decays of all heads, those that this one of the `ranks` has.
pub(super) fn of_heads(decays: Option<Tensor>, ranks: &dyn StateExchange) -> Result<Option<Tensor>> {
    let own = |decays: Tensor| {
        let heads = decays.dim(0)? / ranks.parts();
        decays.narrow(0, ranks.part() * heads, heads)?.force_contiguous()
    };
    decays.map(own).transpose()
}

/// Rates of decay, `-log lambda`, of the heads of a layer: slopes times a factor that falls from 1 in the first layer to 1e-5 in
/// the last.
fn decay_rates(slopes: Vec<f64>, layer: usize, layers: usize) -> Vec<f64> {
    let factor = if layers > 1 {
        1.0 - layer as f64 / (layers - 1) as f64 + 1e-5
    } else {
        1.0
    };
    slopes.into_iter().map(|slope| slope * factor).collect()
}

/// The slopes of ALiBi: `2^(-8 (h + 1) / H)` for a power of two; otherwise those of the power below, and every other one of
/// twice as many heads.
pub(super) fn slopes(heads: usize) -> Vec<f64> {
    let of = |count: usize| (1..=count).map(move |h| (-8.0 * h as f64 / count as f64).exp2());
    let below = 1 << heads.max(1).ilog2();
    of(below).chain(of(2 * below).step_by(2)).take(heads).collect()
}

/// `1 / n` for n from 2 to 256 at equal ratios.
fn log_slopes(heads: usize) -> Vec<f64> {
    let steps = (heads.max(2) - 1) as f64;
    (0..heads)
        .map(|h| 0.5 * (1f64 / 128.0).powf(h as f64 / steps))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_those_of_alibi() {
        let expected: Vec<f64> = (1..=8).map(|h| 0.5f64.powi(h)).collect();
        assert_eq!(slopes(8), expected);
        let twelve = slopes(12);
        assert_eq!(twelve[..8], expected);
        let sixteen = slopes(16);
        assert_eq!(twelve[8..], [sixteen[0], sixteen[2], sixteen[4], sixteen[6]]);
        assert_eq!(slopes(1), [2f64.powi(-8)]);
    }

    #[test]
    fn later_layers_forget_more_slowly() {
        let rates: Vec<f64> = (0..4).map(|layer| decay_rates(slopes(4), layer, 4)[0]).collect();
        assert!(rates.is_sorted_by(|a, b| a > b));
        assert!((rates[3] / rates[0] - 1e-5 / (1.0 + 1e-5)).abs() < 1e-12);
        assert_eq!(decay_rates(slopes(4), 0, 1), slopes(4));
    }

    #[test]
    fn the_other_schedules_are_those_of_their_formulas() -> Result<()> {
        let of = |schedule, layer| {
            let config = Config {
                num_attention_heads: 8,
                num_hidden_layers: 4,
                decay_schedule: schedule,
                ..Config::of(crate::lm::Architecture::Tnl)
            };
            let logs = log_decays(&config, layer, &Device::Cpu)?;
            logs.map(|logs| logs.to_vec1::<f32>()).transpose()
        };
        let expected: Vec<f32> = (0..8).map(|h| -(h as f32) * 0.75).collect();
        assert_eq!(of(DecaySchedule::Linear8, 1)?, Some(expected));
        let log = of(DecaySchedule::Log, 0)?.unwrap_or_default();
        assert!((log[0] + 0.5 * (1.0 + 1e-5)).abs() < 1e-6 && (log[7] * 256.0 + 1.0).abs() < 1e-4);
        assert_eq!(of(DecaySchedule::None, 0)?, None);
        Ok(())
    }
}
