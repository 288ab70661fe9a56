//! MD-LRPE: linearised relative positions along several axes (LightNet paper, section on MD-LRPE).
//!
//! Channel c of a head belongs to one axis and turns by `position * frequency_c`. Cosine and sine parts double the key
//! width, so that the score of two tokens depends on their offset alone.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};
use fulgur_kernels::lrpe::Steps;

use super::Grid;

/// Highest starting frequency in radians a step: neighbours are clearly told apart.
const HIGHEST: f64 = 2.0;

/// `count` frequencies that fall geometrically from 2 rad a step to a quarter turn over `longest` steps.
pub(crate) fn spread_frequencies(count: usize, longest: usize) -> Vec<f64> {
    let lowest = std::f64::consts::FRAC_PI_2 / longest.max(1) as f64;
    let last = (count.max(2) - 1) as f64;
    (0..count)
        .map(|i| HIGHEST * (lowest / HIGHEST).powf(i as f64 / last))
        .collect()
}

/// Learnable frequencies of one mixer, shared by its heads.
#[derive(Clone, Debug)]
pub struct MdLrpe {
    log_scale: Tensor,
    base: Tensor,
    width: usize,
    last: Arc<Mutex<Option<(Grid, Steps)>>>,
}

impl MdLrpe {
    /// Takes `log_scale` `[ceil(width / axes)]` from `vb`; `width` is D, the key width of a head.
    ///
    /// A frequency is its base times `exp(log_scale)`, which starts at one. Bases fall geometrically from 2 rad a step
    /// to a quarter turn over `longest` steps, the length of the longest axis: the slowest does not wrap.
    pub fn new(width: usize, axes: usize, longest: usize, vb: &VarBuilder) -> Result<Self> {
        if axes == 0 || width == 0 {
            candle_core::bail!("md-lrpe: width {width} and {axes} axes, expected at least one of each");
        }
        let count = width.div_ceil(axes);
        let log_scale = vb.get_with_hints(count, "log_scale", Init::Const(0.0))?;
        let base = spread_frequencies(count, longest);
        let base = Tensor::from_vec(base, count, log_scale.device())?.to_dtype(log_scale.dtype())?;
        Ok(Self {
            log_scale,
            base,
            width,
            last: Arc::default(),
        })
    }

    /// Angles `[N, D]` of the tokens of `grid`; zero for condition tokens.
    pub fn phases(&self, grid: &Grid) -> Result<Tensor> {
        let theta = (&self.base * self.log_scale.exp()?)?;
        self.steps(grid)?.phases(&theta)
    }

    /// The steps of the grid that was seen last are kept: it rarely changes.
    fn steps(&self, grid: &Grid) -> Result<Steps> {
        // A panic elsewhere cannot leave a half-written entry.
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, steps)) = &*last
            && of == grid
        {
            return Ok(steps.clone());
        }
        let device = self.base.device();
        let steps = Steps::new(&grid.positions(device)?, self.width, self.base.dtype(), device)?;
        *last = Some((grid.clone(), steps.clone()));
        Ok(steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::Params;
    use candle_core::Device;
    use fulgur_kernels::lrpe::phases;

    /// The grid that was seen last is kept; another one must not get its phases.
    #[test]
    fn every_grid_gets_its_own_phases() -> Result<()> {
        let params = Params::random(1, &Device::Cpu);
        let lrpe = MdLrpe::new(7, 2, 9, &params.builder())?;
        let grids = [
            Grid::new(&[2, 3]),
            Grid::new(&[3, 2]),
            Grid {
                condition: 1,
                axes: vec![2, 3],
            },
        ];
        for grid in grids.iter().chain(&grids).chain([&grids[2]]) {
            let expected = phases(&grid.positions(&Device::Cpu)?, &lrpe.base, 7)?;
            let found = lrpe.phases(grid)?;
            assert_eq!(found.dims(), [grid.tokens(), 7]);
            let far = (found - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(far < 1e-6, "{grid:?}: {far}");
        }
        Ok(())
    }
}
