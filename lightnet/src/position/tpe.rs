//! MD-TPE: a Toeplitz positional encoding along each axis, summed (LightNet paper, section on MD-TPE; equations 5.5
//! and 5.6 of its reference implementation's convention with `lambda = sigmoid(gamma)`).
//!
//! Along one axis, `u_t = lambda_h u_{t-1} + w_h x_t` for each head h, then a norm a head and an output map.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};
use fulgur_kernels::{ema, exchange::StateExchange};

use super::Grid;
use crate::linear::{Linear, Start};
use crate::norm::RmsNorm;

/// Shape of an [`MdTpe`].
#[derive(Clone, Copy, Debug)]
pub struct TpeConfig {
    /// Model width d.
    pub dim: usize,
    /// Heads, each with a decay of its own.
    pub heads: usize,
    /// Number of axes k.
    pub axes: usize,
    /// Sees both directions: `lambda^|t - s|`; otherwise only earlier positions of the axis.
    pub two_sided: bool,
    /// Adds the encoding to its input instead of replacing it.
    pub residual: bool,
}

/// The encoding: parameters of its own for every axis.
#[derive(Clone, Debug)]
pub struct MdTpe {
    axes: Vec<Axis>,
    config: TpeConfig,
}

#[derive(Clone, Debug)]
struct Axis {
    gamma: Tensor,
    weight: Tensor,
    norm: RmsNorm,
    output: Linear,
}

impl MdTpe {
    /// Takes `{axis}.gamma` and `{axis}.weight` `[H]`, `{axis}.norm.weight` `[d]` and `{axis}.output.weight` `[d, d]`.
    pub fn new(config: TpeConfig, vb: &VarBuilder) -> Result<Self> {
        let TpeConfig { dim, heads, .. } = config;
        if heads == 0 || dim % heads != 0 {
            candle_core::bail!("md-tpe: width {dim} does not split into {heads} heads");
        }
        let axis = |index: usize| {
            let vb = vb.pp(index);
            Ok(Axis {
                gamma: vb.get_with_hints(heads, "gamma", Init::Const(0.0))?,
                weight: vb.get_with_hints(heads, "weight", Init::Const(1.0))?,
                norm: RmsNorm::grouped(dim, heads, &vb.pp("norm"))?,
                output: Linear::new(dim, dim, false, Start::FanIn, &vb.pp("output"))?,
            })
        };
        Ok(Self {
            axes: (0..config.axes).map(axis).collect::<Result<_>>()?,
            config,
        })
    }

    /// Encodes `x` `[B, N, d]` on `grid`. Condition tokens pass unchanged.
    ///
    /// `exchange` carries the scan along the first axis when a sequence is split over it.
    pub fn forward(
        &self,
        x: &Tensor,
        grid: &Grid,
        exchange: Option<&Arc<dyn StateExchange>>,
    ) -> Result<Tensor> {
        let (batch, tokens, dim) = x.dims3()?;
        if grid.axes.len() != self.axes.len() || tokens != grid.tokens() {
            candle_core::bail!(
                "md-tpe: {tokens} tokens on {grid:?}, expected {} axes",
                self.axes.len()
            );
        }
        let cells = tokens - grid.condition;
        let body = x.narrow(1, grid.condition, cells)?.contiguous()?;
        let mut sum = if self.config.residual {
            Some(body.clone())
        } else {
            None
        };
        for (index, axis) in self.axes.iter().enumerate() {
            let exchange = exchange.filter(|_| index == 0);
            let encoded = self.along(axis, index, &body, batch, grid, exchange)?;
            sum = Some(match sum {
                Some(sum) => (sum + encoded)?,
                None => encoded,
            });
        }
        let Some(body) = sum else {
            candle_core::bail!("md-tpe: a grid needs at least one axis")
        };
        let body = body.reshape((batch, cells, dim))?;
        if grid.condition == 0 {
            return Ok(body);
        }
        Tensor::cat(&[&x.narrow(1, 0, grid.condition)?, &body], 1)
    }

    /// Encodes tokens `x` `[B, N, d]` of a sequence that goes on: one axis, one-sided. Gives the state `[B, 1, H, d / H]` behind
    /// them, for the tokens after; not differentiable in the state before.
    ///
    /// # Errors
    /// Several axes, or two sides.
    pub fn resume(&self, x: &Tensor, before: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        let TpeConfig {
            dim,
            heads,
            two_sided,
            residual,
            ..
        } = self.config;
        let ([axis], false) = (self.axes.as_slice(), two_sided) else {
            candle_core::bail!("md-tpe: only one axis and one side can be resumed");
        };
        let (batch, tokens, _) = x.dims3()?;
        let lines = x.reshape((batch, tokens, 1, heads, dim / heads))?;
        let options = ema::Options {
            initial: before,
            ..Default::default()
        };
        let rate = ema::rate_of(&axis.gamma)?;
        let (scanned, state) = ema::scan_with_rate(&lines, &rate, &axis.weight, &options)?;
        let y = axis
            .output
            .forward(&axis.norm.forward(&scanned.reshape((batch, tokens, dim))?)?)?;
        Ok((if residual { (x + y)? } else { y }, state.detach()))
    }

    fn along(
        &self,
        axis: &Axis,
        index: usize,
        body: &Tensor,
        batch: usize,
        grid: &Grid,
        exchange: Option<&Arc<dyn StateExchange>>,
    ) -> Result<Tensor> {
        let TpeConfig {
            dim,
            heads,
            two_sided,
            ..
        } = self.config;
        let outer: usize = batch * grid.axes[..index].iter().product::<usize>();
        let length = grid.axes[index];
        let inner: usize = grid.axes[index + 1..].iter().product();
        // The scan runs over dimension 1.
        let lines = body.reshape((outer, length, inner, heads, dim / heads))?;
        let options = ema::Options {
            two_sided,
            exchange: exchange.cloned(),
            ..Default::default()
        };
        let scanned = ema::scan(&lines, &axis.gamma, &axis.weight, &options)?;
        axis.output
            .forward(&axis.norm.forward(&scanned.reshape((batch, (), dim))?)?)
    }
}
