//! The gates of the EOS layer, as logarithms of five axes `[B, N, H, k, d]`, each of which may be 1.
//!
//! ```text
//! u        a map of the token [k] or [d], a constant, or the product of both
//! root     log o = log sigmoid(u) / tau
//! slope    log o = -sigmoid(u) slope           slopes of ALiBi, 2^(-8 j / k)
//! outer    the sum of a row's and a column's
//! fixed    log o = -slope
//! ```
//!
//! They are made in f32. Gates start near 1: with tau = 16 at `0.5^(1/16) = 0.958`.

use candle_core::{Device, Result, Tensor, bail};
use candle_nn::ops::sigmoid;
use candle_nn::{Init, VarBuilder};

use super::super::memory::wide;
use super::super::parts::started;
use super::super::tnl::{log_decays, slopes};
use super::super::{heads, map};
use super::CONSTANT_START;
use crate::linear::Linear;
use crate::lm::{Config, GateForm, Oscillation};

/// Rank of the map to the steps of a state space model.
const STEP_RANK: usize = 16;

/// Gates that do not depend on what came before.
#[derive(Clone, Debug)]
pub(super) struct Gates {
    kind: Oscillation,
    form: GateForm,
    tau: f64,
    /// `[H, k | 1, d | 1]`.
    constant: Option<Tensor>,
    /// Logarithms of gates that nothing changes, of the same shape.
    fixed: Option<Tensor>,
    /// Of heads `[H, 1, 1]`, rows `[k, 1]` and columns `[d]`.
    slopes: [Tensor; 3],
}

impl Gates {
    /// Takes `gates`, where there are learnt constants.
    pub(super) fn new(config: &Config, layer: usize, vb: &VarBuilder) -> Result<Self> {
        use Oscillation as O;
        let (heads, rows) = (config.num_attention_heads, config.head_width());
        let columns = config.value_size() / heads;
        let kind = config.eos.oscillation;
        let shape = match kind {
            O::Constant | O::KeysByConstant | O::ValuesByConstant => Some((heads, rows, columns)),
            O::ConstantKeys | O::ValuesByConstantKeys => Some((heads, rows, 1)),
            O::ConstantValues | O::KeysByConstantValues => Some((heads, 1, columns)),
            O::Head => Some((heads, 1, 1)),
            O::Outer | O::Values | O::Keys | O::None | O::Cumulative | O::StateSpace => None,
        };
        let device = vb.device();
        let slopes = [
            slope_tensor(heads, &[heads, 1, 1], device)?,
            slope_tensor(rows, &[rows, 1], device)?,
            slope_tensor(columns, &[columns], device)?,
        ];
        let fixed = match kind {
            _ if !config.eos.fixed => None,
            O::Head => match log_decays(config, layer, device)? {
                Some(log) => Some(log.reshape((heads, 1, 1))?),
                None => Some(Tensor::zeros((heads, 1, 1), slopes[0].dtype(), device)?),
            },
            O::ConstantValues => Some(slopes[2].neg()?.reshape((1, 1, columns))?.repeat((heads, 1, 1))?),
            _ => Some(slopes[1].neg()?.unsqueeze(0)?.repeat((heads, 1, 1))?),
        };
        let products = [
            O::KeysByConstant,
            O::ValuesByConstant,
            O::ValuesByConstantKeys,
            O::KeysByConstantValues,
        ];
        let start = if products.contains(&kind) {
            Init::Const(1.0)
        } else {
            Init::Randn {
                mean: 0.0,
                stdev: CONSTANT_START,
            }
        };
        let learnt = shape.filter(|_| fixed.is_none());
        Ok(Self {
            kind,
            form: config.eos.gate,
            tau: config.eos.tau,
            constant: learnt
                .map(|shape| vb.get_with_hints(shape, "gates", start))
                .transpose()?,
            fixed,
            slopes,
        })
    }

    /// From what maps give for rows `[B, N, H, k]` and columns `[B, N, H, d]`; nothing where nothing is forgotten.
    pub(super) fn log(&self, rows: Option<&Tensor>, columns: Option<&Tensor>) -> Result<Option<Tensor>> {
        use Oscillation as O;
        if let Some(fixed) = &self.fixed {
            return fixed.unsqueeze(0)?.unsqueeze(0).map(Some);
        }
        let rows = rows.map(|u| u.to_dtype(wide(u))?.unsqueeze(4)).transpose()?;
        let columns = columns.map(|u| u.to_dtype(wide(u))?.unsqueeze(3)).transpose()?;
        let constant = self
            .constant
            .as_ref()
            .map(|u| u.to_dtype(wide(u))?.unsqueeze(0)?.unsqueeze(0))
            .transpose()?;
        let [heads_slope, rows_slope, columns_slope] = &self.slopes;
        let log = match (self.kind, rows, columns, constant) {
            (O::None, ..) => return Ok(None),
            (O::Outer, Some(rows), Some(columns), _) => self
                .exponent(&rows, rows_slope)?
                .broadcast_add(&self.exponent(&columns, columns_slope)?)?,
            (O::Keys, Some(u), ..) => self.exponent(&u, rows_slope)?,
            (O::Values, _, Some(u), _) => self.exponent(&u, columns_slope)?,
            (O::Constant | O::ConstantKeys, _, _, Some(u)) => self.exponent(&u, rows_slope)?,
            (O::ConstantValues, _, _, Some(u)) => self.exponent(&u, columns_slope)?,
            (O::Head, _, _, Some(u)) => self.exponent(&u, heads_slope)?,
            (O::KeysByConstant | O::KeysByConstantValues, Some(u), _, Some(constant))
            | (O::ValuesByConstant | O::ValuesByConstantKeys, _, Some(u), Some(constant)) => {
                self.exponent(&u.broadcast_mul(&constant.to_dtype(u.dtype())?)?, rows_slope)?
            }
            (kind, ..) => bail!("eos: gates {kind:?} lack what they are made of"),
        };
        Ok(Some(log))
    }

    fn exponent(&self, u: &Tensor, slope: &Tensor) -> Result<Tensor> {
        match self.form {
            GateForm::Root => log_sigmoid(u)? / self.tau,
            GateForm::Slope => sigmoid(u)?.broadcast_mul(&slope.to_dtype(u.dtype())?)?.neg(),
        }
    }
}

fn slope_tensor(count: usize, shape: &[usize], device: &Device) -> Result<Tensor> {
    let values: Vec<f32> = slopes(count).into_iter().map(|slope| slope as f32).collect();
    Tensor::from_vec(values, shape, device)
}

/// `log(1 / (1 + e^-u))`, without ever making what is infinite.
fn log_sigmoid(u: &Tensor) -> Result<Tensor> {
    softplus(&u.neg()?)?.neg()
}

/// `log(1 + e^u)`.
fn softplus(u: &Tensor) -> Result<Tensor> {
    u.relu()? + (u.abs()?.neg()?.exp()? + 1.0)?.log()?
}

/// Steps and gates of a state space model: `delta = softplus(x W_1 W_2)` of each column, `log o = -delta exp(A)`.
#[derive(Clone, Debug)]
pub(super) struct Steps {
    down: Linear,
    up: Linear,
    /// Logarithms of A, `[H, k, d]`.
    log_rates: Tensor,
}

impl Steps {
    /// Takes `dt_proj.0`, `dt_proj.1` and `gates`, which start from `log(1 .. k)`.
    pub(super) fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let (heads, rows, values) = (
            config.num_attention_heads,
            config.head_width(),
            config.value_size(),
        );
        let columns = values / heads;
        let start: Vec<f64> = (0..heads * rows * columns)
            .map(|at| (1.0 + (at / columns % rows) as f64).ln())
            .collect();
        let steps = vb.pp("dt_proj");
        Ok(Self {
            down: map(config, config.hidden_size, STEP_RANK, &steps.pp("0"))?,
            up: map(config, STEP_RANK, values, &steps.pp("1"))?,
            log_rates: started(&start, &[heads, rows, columns], "gates", vb)?,
        })
    }

    /// Steps `[B, N, H, d]` and logarithms of gates `[B, N, H, k, d]`.
    pub(super) fn forward(&self, x: &Tensor, count: usize) -> Result<(Tensor, Tensor)> {
        let delta = self.up.forward(&self.down.forward(x)?)?;
        let delta = softplus(&heads(&delta.to_dtype(wide(&delta))?, count)?)?;
        let rates = self.log_rates.to_dtype(delta.dtype())?.exp()?;
        let log = delta.unsqueeze(3)?.broadcast_mul(&rates)?.neg()?;
        Ok((delta, log))
    }
}
