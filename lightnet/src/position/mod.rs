//! Where tokens are: grids of any number of axes, and the two encodings of LightNet (section 3 of the paper):
//! MD-TPE once after the embedding, MD-LRPE on the queries and keys of every layer.

mod coordinates;
mod lrpe;
mod tpe;

pub use coordinates::{FRACTION_WIDTH, fractions, spread};
pub use lrpe::MdLrpe;
pub(crate) use lrpe::spread_frequencies;
pub use tpe::{MdTpe, TpeConfig};

use candle_core::{Device, Result, Tensor};

/// Tokens on a grid in row-major order, behind leading condition tokens that have no position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Leading tokens without a position (text, class, time).
    pub condition: usize,
    /// Length of each axis, slowest first: `[time, height, width]`.
    pub axes: Vec<usize>,
}

impl Grid {
    /// A grid without condition tokens.
    pub fn new(axes: &[usize]) -> Self {
        Self {
            condition: 0,
            axes: axes.to_vec(),
        }
    }

    /// Number of tokens, condition tokens included.
    pub fn tokens(&self) -> usize {
        self.condition + self.axes.iter().product::<usize>()
    }

    /// Coordinates `[N, k]` as `f32`, in steps; condition tokens are at the origin of every axis.
    pub fn positions(&self, device: &Device) -> Result<Tensor> {
        fulgur_kernels::lrpe::grid_positions(&self.axes, self.condition, device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_row_major_behind_condition_tokens() -> Result<()> {
        let grid = Grid {
            condition: 1,
            axes: vec![2, 3],
        };
        let positions = grid.positions(&Device::Cpu)?.to_vec2::<f32>()?;
        assert_eq!(positions.len(), 7);
        assert_eq!(positions[0], [0.0, 0.0]);
        assert_eq!(positions[1], [0.0, 0.0]);
        assert_eq!(positions[3], [0.0, 2.0]);
        assert_eq!(positions[6], [1.0, 2.0]);
        Ok(())
    }
}
