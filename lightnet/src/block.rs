//! Residual blocks: mixer, optional cross-attention to a text, gated linear unit; plain or modulated (adaLN-Zero).

use candle_core::{DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use fulgur_kernels::norm::rms_norm_modulated_to;
use fulgur_kernels::residual::add_branch;

use crate::attention::CrossAttention;
use crate::glu::{Glu, shift_on_grid};
use crate::linear::Start;
use crate::mixer::{LightNet, LightNetConfig, MixerContext};
use crate::norm::{EPS, RmsNorm};
use crate::position::Grid;

/// Vectors of a modulated block: shift, scale and gate of the mixer, then of the gated linear unit.
pub const MODULATIONS: usize = 6;

/// Shape of a block.
#[derive(Clone, Copy, Debug)]
pub struct BlockConfig {
    /// Model width d.
    pub dim: usize,
    /// Heads of the mixer.
    pub heads: usize,
    /// Key width of a mixer head.
    pub head_dim: usize,
    /// Hidden width of the gated linear unit.
    pub hidden: usize,
    /// Axes of MD-LRPE and the length of the longest.
    pub lrpe: Option<(usize, usize)>,
    /// Shifts tokens along the grid before the gated linear unit.
    pub token_shift: bool,
    /// Width of the text that the block reads by cross-attention.
    pub context: Option<usize>,
    /// adaLN-Zero: norms without gains, modulated by a condition, branches gated from zero.
    pub modulated: bool,
}

/// What a block is told beside its tokens.
#[derive(Clone, Copy, Debug)]
pub struct BlockContext<'a> {
    /// Where the tokens are.
    pub grid: &'a Grid,
    /// `[B, N]`, 1 for tokens and 0 for padding.
    pub mask: Option<&'a Tensor>,
    /// Condition `[B, 6, d]` of a modulated block.
    pub modulation: Option<&'a Tensor>,
    /// Text `[B, L, c]` and its mask `[B, L]`.
    pub text: Option<(&'a Tensor, &'a Tensor)>,
    /// Dtype inside the branches (`BF16` on a GPU); the residual stream keeps its own.
    pub compute: Option<DType>,
}

impl<'a> BlockContext<'a> {
    /// Tokens on `grid` and nothing else.
    pub fn on(grid: &'a Grid) -> Self {
        Self {
            grid,
            mask: None,
            modulation: None,
            text: None,
            compute: None,
        }
    }
}

/// One residual block.
#[derive(Clone, Debug)]
pub struct Block {
    norms: Norms,
    mixer: LightNet,
    text: Option<(RmsNorm, CrossAttention)>,
    glu: Glu,
    token_shift: bool,
}

#[derive(Clone, Debug)]
enum Norms {
    Plain {
        mixer: RmsNorm,
        glu: RmsNorm,
    },
    /// Added to the condition that all blocks share.
    Modulated {
        table: Tensor,
    },
}

impl Block {
    /// Takes `norm_mixer`, `norm_glu` or `modulation` `[6, d]`; `mixer`, `glu` and, with a context, `norm_text`, `text`.
    pub fn new(config: BlockConfig, vb: &VarBuilder) -> Result<Self> {
        let BlockConfig {
            dim,
            heads,
            head_dim,
            hidden,
            lrpe,
            token_shift,
            context,
            modulated,
        } = config;
        // A modulated branch is silenced by its gate; a second zero behind it would never get a gradient.
        let start = if modulated { Start::FanIn } else { Start::Zero };
        let norms = if modulated {
            Norms::Modulated {
                table: vb.get_with_hints((MODULATIONS, dim), "modulation", Init::Const(0.0))?,
            }
        } else {
            Norms::Plain {
                mixer: RmsNorm::new(dim, &vb.pp("norm_mixer"))?,
                glu: RmsNorm::new(dim, &vb.pp("norm_glu"))?,
            }
        };
        let text = match context {
            None => None,
            Some(width) => Some((
                RmsNorm::new(dim, &vb.pp("norm_text"))?,
                CrossAttention::new(dim, width, dim, heads, Start::Zero, &vb.pp("text"))?,
            )),
        };
        let mixer = LightNetConfig {
            dim,
            heads,
            head_dim,
            lrpe,
            start,
        };
        Ok(Self {
            norms,
            mixer: LightNet::new(mixer, &vb.pp("mixer"))?,
            text,
            glu: Glu::new(dim, hidden, start, &vb.pp("glu"))?,
            token_shift,
        })
    }

    /// Maps `x` `[B, N, d]`.
    pub fn forward(&self, x: &Tensor, context: &BlockContext) -> Result<Tensor> {
        let mixer_context = MixerContext {
            grid: Some(context.grid),
            mask: context.mask,
            exchange: None,
        };
        let modulation = self.modulation(x, context)?;
        let dtype = context.compute.unwrap_or(x.dtype());
        let normed = self.normed(x, modulation.as_ref(), 0, dtype)?;
        let mut x = add_gated(
            x,
            &self.mixer.forward(&normed, &mixer_context)?,
            modulation.as_ref(),
            2,
        )?;
        if let Some((norm, attention)) = &self.text {
            let Some((text, mask)) = context.text else {
                candle_core::bail!("block: a text is expected, none was given")
            };
            let normed = norm.forward_to(&x, dtype)?;
            x = add_branch(&x, &attention.forward(&normed, text, Some(mask))?, None)?;
        }
        let mut normed = self.normed(&x, modulation.as_ref(), 3, dtype)?;
        if self.token_shift {
            normed = shift_on_grid(&normed, context.grid.condition, &context.grid.axes)?;
        }
        add_gated(&x, &self.glu.forward(&normed)?, modulation.as_ref(), 5)
    }

    fn modulation(&self, x: &Tensor, context: &BlockContext) -> Result<Option<Tensor>> {
        let Norms::Modulated { table } = &self.norms else {
            return Ok(None);
        };
        let Some(condition) = context.modulation else {
            candle_core::bail!("block: a condition [B, {MODULATIONS}, d] is expected, none was given")
        };
        Ok(Some(
            condition
                .broadcast_add(&table.to_dtype(condition.dtype())?)?
                .to_dtype(x.dtype())?,
        ))
    }

    /// The norm before the branch whose shift is vector `first`, with a result of type `dtype`.
    fn normed(&self, x: &Tensor, modulation: Option<&Tensor>, first: usize, dtype: DType) -> Result<Tensor> {
        match (&self.norms, modulation) {
            (Norms::Plain { mixer, .. }, _) if first == 0 => mixer.forward_to(x, dtype),
            (Norms::Plain { glu, .. }, _) => glu.forward_to(x, dtype),
            (Norms::Modulated { .. }, Some(m)) => {
                let (shift, scale) = (m.get_on_dim(1, first)?, m.get_on_dim(1, first + 1)?);
                rms_norm_modulated_to(x, &scale, &shift, EPS, dtype)
            }
            (Norms::Modulated { .. }, None) => candle_core::bail!("block: modulation is missing"),
        }
    }
}

fn add_gated(x: &Tensor, branch: &Tensor, modulation: Option<&Tensor>, gate: usize) -> Result<Tensor> {
    let gate = modulation.map(|m| m.get_on_dim(1, gate)).transpose()?;
    add_branch(x, branch, gate.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::Params;
    use candle_core::Device;
    use fulgur_kernels::philox::Philox;

    const CONFIG: BlockConfig = BlockConfig {
        dim: 24,
        heads: 3,
        head_dim: 6,
        hidden: 32,
        lrpe: Some((2, 4)),
        token_shift: true,
        context: Some(10),
        modulated: true,
    };

    fn random(shape: &[usize], name: &str) -> Result<Tensor> {
        let count = shape.iter().product();
        Tensor::from_vec(Philox::named(1, name).normals(count), shape, &Device::Cpu)
    }

    /// adaLN-Zero: a fresh block is the identity, whatever its condition projects to through zero tables.
    #[test]
    fn a_fresh_modulated_block_is_the_identity_until_its_gates_open() -> Result<()> {
        let block = Block::new(CONFIG, &Params::random(5, &Device::Cpu).builder())?;
        let grid = Grid {
            condition: 0,
            axes: vec![3, 4],
        };
        let (x, text) = (random(&[2, 12, 24], "x")?, random(&[2, 5, 10], "text")?);
        let mask = Tensor::ones((2, 5), DType::F32, &Device::Cpu)?;
        let zero = Tensor::zeros((2, MODULATIONS, 24), DType::F32, &Device::Cpu)?;
        let context = BlockContext {
            modulation: Some(&zero),
            text: Some((&text, &mask)),
            ..BlockContext::on(&grid)
        };
        let same = (block.forward(&x, &context)? - &x)?
            .abs()?
            .max_all()?
            .to_scalar::<f32>()?;
        assert_eq!(same, 0.0);
        let open = zero.ones_like()?;
        let context = BlockContext {
            modulation: Some(&open),
            ..context
        };
        let moved = (block.forward(&x, &context)? - &x)?
            .abs()?
            .max_all()?
            .to_scalar::<f32>()?;
        assert!(moved > 0.1, "{moved}");
        Ok(())
    }

    #[test]
    fn what_is_missing_is_named() -> Result<()> {
        let block = Block::new(CONFIG, &Params::random(5, &Device::Cpu).builder())?;
        let grid = Grid::new(&[3, 4]);
        let x = random(&[2, 12, 24], "x")?;
        let message = block
            .forward(&x, &BlockContext::on(&grid))
            .map(|_| ())
            .unwrap_err()
            .to_string();
        assert!(message.contains("condition [B, 6, d]"), "{message}");
        Ok(())
    }
}
