//! LightNet mixer in its non-causal one-scan form.
//!
//! With logits `g = x W_k`, per channel of a head:
//!
//! ```text
//! K = softmax over tokens of g        S = rotate(K)^T V        O = rotate(silu(x W_q)) S
//! Y = (Norm(O) * sigmoid(x W_u1 W_u2)) W_o
//! ```
//!
//! Source: "You Only Scan Once" (LightNet), section 3; rotate is MD-LRPE after the softmax, so that the weights stay
//! positive. Cost: 4 N D E flops a head (8 with LRPE), whatever the order or number of axes.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::additive::{self, NonCausal};
use fulgur_kernels::exchange::StateExchange;
use fulgur_kernels::norm::Gate;

use crate::linear::{Linear, Start};
use crate::norm::RmsNorm;
use crate::position::{Grid, MdLrpe};

/// Shape of a [`LightNet`] mixer.
#[derive(Clone, Copy, Debug)]
pub struct LightNetConfig {
    /// Model width d.
    pub dim: usize,
    /// Heads H; the value width of a head is d / H.
    pub heads: usize,
    /// Key width D of a head.
    pub head_dim: usize,
    /// Axes of MD-LRPE and the length of the longest; `None` switches the encoding off.
    pub lrpe: Option<(usize, usize)>,
    /// How the output map starts.
    pub start: Start,
}

/// The mixer.
#[derive(Clone, Debug)]
pub struct LightNet {
    config: LightNetConfig,
    input: Linear,
    lrpe: Option<MdLrpe>,
    norm: RmsNorm,
    gate_down: Linear,
    gate_up: Linear,
    output: Linear,
}

/// What a mixer is told beside its tokens.
#[derive(Clone, Debug, Default)]
pub struct MixerContext<'a> {
    /// Where the tokens are; needed by MD-LRPE.
    pub grid: Option<&'a Grid>,
    /// `[B, N]`, 1 for tokens and 0 for padding.
    pub mask: Option<&'a Tensor>,
    /// Joins the parts of a sequence that is split over devices.
    pub exchange: Option<Arc<dyn StateExchange>>,
}

impl LightNet {
    /// Takes `input` (queries, logits and values in one map), `norm`, `gate_down`, `gate_up`, `output` and `lrpe`.
    pub fn new(config: LightNetConfig, vb: &VarBuilder) -> Result<Self> {
        let LightNetConfig {
            dim,
            heads,
            head_dim,
            lrpe,
            start,
        } = config;
        if heads == 0 || dim % heads != 0 {
            candle_core::bail!("lightnet: width {dim} does not split into {heads} heads");
        }
        let lrpe = lrpe
            .map(|(axes, longest)| MdLrpe::new(head_dim, axes, longest, &vb.pp("lrpe")))
            .transpose()?;
        Ok(Self {
            config,
            input: Linear::new(
                dim,
                2 * heads * head_dim + dim,
                false,
                Start::FanIn,
                &vb.pp("input"),
            )?,
            lrpe,
            norm: RmsNorm::grouped(dim, heads, &vb.pp("norm"))?,
            gate_down: Linear::new(dim, head_dim, false, Start::FanIn, &vb.pp("gate_down"))?,
            gate_up: Linear::new(head_dim, dim, false, Start::FanIn, &vb.pp("gate_up"))?,
            output: Linear::new(dim, dim, false, start, &vb.pp("output"))?,
        })
    }

    /// Mixes `x` `[B, N, d]`.
    pub fn forward(&self, x: &Tensor, context: &MixerContext) -> Result<Tensor> {
        let LightNetConfig { heads, head_dim, .. } = self.config;
        let phase = match (&self.lrpe, context.grid) {
            (None, _) => None,
            (Some(lrpe), Some(grid)) => Some(lrpe.phases(grid)?),
            (Some(_), None) => candle_core::bail!("lightnet: md-lrpe needs the grid of the tokens"),
        };
        let options = NonCausal {
            phase: phase.as_ref(),
            mask: context.mask,
            exchange: context.exchange.clone(),
        };
        let projections = self.input.forward(x)?;
        let o = additive::projected(&projections, heads, head_dim, &options)?;
        let gate = self.gate_up.forward(&self.gate_down.forward(x)?)?;
        self.output.forward(&self.norm.gated(&o, &gate, Gate::Sigmoid)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::Params;
    use candle_core::{DType, Device};
    use fulgur_kernels::philox::Philox;

    fn config(lrpe: Option<(usize, usize)>) -> LightNetConfig {
        LightNetConfig {
            dim: 24,
            heads: 3,
            head_dim: 6,
            lrpe,
            start: Start::FanIn,
        }
    }

    fn random(shape: &[usize], name: &str) -> Result<Tensor> {
        let count = shape.iter().product();
        Tensor::from_vec(Philox::named(1, name).normals(count), shape, &Device::Cpu)
    }

    fn far(a: &Tensor, b: &Tensor) -> Result<f32> {
        (a - b)?.abs()?.max_all()?.to_dtype(DType::F32)?.to_scalar()
    }

    fn order(n: usize) -> Result<Tensor> {
        let order: Vec<u32> = Philox::new(2, 0)
            .permutation(n)
            .into_iter()
            .map(|i| i as u32)
            .collect();
        Tensor::from_vec(order, n, &Device::Cpu)
    }

    #[test]
    fn without_positions_the_order_of_tokens_does_not_matter() -> Result<()> {
        let mixer = LightNet::new(config(None), &Params::random(3, &Device::Cpu).builder())?;
        let (x, order) = (random(&[2, 37, 24], "x")?, order(37)?);
        let context = MixerContext::default();
        let permuted = mixer.forward(&x.index_select(&order, 1)?, &context)?;
        let expected = mixer.forward(&x, &context)?.index_select(&order, 1)?;
        assert!(far(&permuted, &expected)? < 1e-5);
        Ok(())
    }

    #[test]
    fn with_positions_it_does() -> Result<()> {
        let mixer = LightNet::new(config(Some((1, 37))), &Params::random(3, &Device::Cpu).builder())?;
        let (x, order, grid) = (random(&[2, 37, 24], "x")?, order(37)?, Grid::new(&[37]));
        let context = MixerContext {
            grid: Some(&grid),
            ..Default::default()
        };
        let permuted = mixer.forward(&x.index_select(&order, 1)?, &context)?;
        let moved = far(&permuted, &mixer.forward(&x, &context)?.index_select(&order, 1)?)?;
        assert!(moved > 1e-2, "{moved}");
        Ok(())
    }

    #[test]
    fn transposing_a_grid_transposes_the_output_when_its_axes_share_frequencies() -> Result<()> {
        // Widths of the two axes are equal (6 = 2 * 3), so swapping the axes swaps the channel blocks of q, k and S;
        // the summed scores are the same once both axes have the same logits and queries.
        let params = Params::random(3, &Device::Cpu);
        let mixer = LightNet::new(config(Some((2, 5))), &params.builder())?;
        let weight = &params.vars()["input.weight"];
        let rows = weight.as_tensor().copy()?;
        let shared = |start: usize| -> Result<Vec<Tensor>> {
            (0..3)
                .flat_map(|head| [head, head])
                .map(|head| rows.narrow(0, start + head * 6, 3))
                .collect()
        };
        let mut parts = shared(0)?;
        parts.extend(shared(18)?);
        parts.push(rows.narrow(0, 36, 24)?);
        weight.set(&Tensor::cat(&parts, 0)?)?;
        let x = random(&[1, 3, 5, 24], "x")?;
        let (tall, wide) = (Grid::new(&[3, 5]), Grid::new(&[5, 3]));
        let on = |grid, x: Tensor| {
            mixer.forward(
                &x.contiguous()?,
                &MixerContext {
                    grid: Some(grid),
                    ..Default::default()
                },
            )
        };
        let straight = on(&tall, x.reshape((1, 15, 24))?)?.reshape((1, 3, 5, 24))?;
        let turned = on(&wide, x.transpose(1, 2)?.reshape((1, 15, 24))?)?.reshape((1, 5, 3, 24))?;
        assert!(far(&straight.transpose(1, 2)?.contiguous()?, &turned)? < 1e-5);
        Ok(())
    }

    #[test]
    fn padding_changes_nothing() -> Result<()> {
        let mixer = LightNet::new(config(Some((1, 20))), &Params::random(3, &Device::Cpu).builder())?;
        let x = random(&[1, 20, 24], "x")?;
        let (short, long) = (Grid::new(&[13]), Grid::new(&[20]));
        let context = MixerContext {
            grid: Some(&short),
            ..Default::default()
        };
        let alone = mixer.forward(&x.narrow(1, 0, 13)?.contiguous()?, &context)?;
        let mask: Vec<f32> = (0..20).map(|i| if i < 13 { 1.0 } else { 0.0 }).collect();
        let mask = Tensor::from_vec(mask, (1, 20), &Device::Cpu)?;
        let context = MixerContext {
            grid: Some(&long),
            mask: Some(&mask),
            ..Default::default()
        };
        let padded = mixer.forward(&x, &context)?.narrow(1, 0, 13)?;
        assert!(far(&alone, &padded.contiguous()?)? < 1e-5);
        Ok(())
    }
}
