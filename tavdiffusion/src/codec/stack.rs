//! A stack of token-shift blocks: `x + GLU(shift(Norm x))`, local and free of positions.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::residual::add_branch;
use fulgur_kernels::shift::token_shift;
use fulgur_lightnet::glu::Glu;
use fulgur_lightnet::linear::Start;
use fulgur_lightnet::norm::RmsNorm;

/// Hidden width of a block over its width.
const EXPANSION: usize = 2;

/// Blocks over a grid of `axes` axes, then a norm.
#[derive(Clone, Debug)]
pub struct ShiftStack {
    blocks: Vec<(RmsNorm, Glu)>,
    norm: RmsNorm,
}

impl ShiftStack {
    /// Takes `{i}.norm`, `{i}.glu` and `norm`.
    pub fn new(axes: usize, dim: usize, depth: usize, vb: &VarBuilder) -> Result<Self> {
        if !dim.is_multiple_of(4 * axes) {
            candle_core::bail!("token-shift blocks: width {dim} is no multiple of {}", 4 * axes);
        }
        let block = |index: usize| {
            let vb = vb.pp(index);
            let glu = Glu::new(dim, EXPANSION * dim, Start::Normal(0.01), &vb.pp("glu"))?;
            Ok((RmsNorm::new(dim, &vb.pp("norm"))?, glu))
        };
        let blocks = (0..depth).map(block).collect::<Result<_>>()?;
        Ok(Self {
            blocks,
            norm: RmsNorm::new(dim, &vb.pp("norm"))?,
        })
    }

    /// Maps `x` `[B, n_1 .. n_k, dim]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for (norm, glu) in &self.blocks {
            let shifted = token_shift(&norm.forward(&x)?)?;
            x = add_branch(&x, &glu.forward(&shifted)?, None)?;
        }
        self.norm.forward(&x)
    }
}
