//! A small LightNet network that turns a grid of patches into one vector: the towers of the builtin encoder and the
//! classifiers that judge generated clips.

use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};
use fulgur_lightnet::block::{Block, BlockConfig, BlockContext};
use fulgur_lightnet::linear::{Linear, Start};
use fulgur_lightnet::norm::RmsNorm;
use fulgur_lightnet::position::Grid;
use serde::{Deserialize, Serialize};

/// Key width of a mixer head.
const HEAD_DIM: usize = 32;

/// Shape of a [`Tower`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TowerConfig {
    /// Values of a patch.
    pub values: usize,
    /// Tokens along each axis at the trained size; other lengths read the nearest trained coordinate.
    pub axes: Vec<usize>,
    /// Model width.
    pub dim: usize,
    /// Blocks.
    pub depth: usize,
    /// Heads of each mixer.
    pub heads: usize,
    /// Width of the result.
    pub output: usize,
}

/// Patches to one vector: linear map and learned coordinates, blocks, mean and maximum over tokens, linear map.
#[derive(Clone, Debug)]
pub struct Tower {
    config: TowerConfig,
    input: Linear,
    coordinates: Vec<Tensor>,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Linear,
}

impl Tower {
    /// Takes `input`, `coordinates.{axis}`, `blocks.{i}`, `norm` and `head`.
    pub fn new(config: &TowerConfig, vb: &VarBuilder) -> Result<Self> {
        let (dim, axes) = (config.dim, config.axes.len());
        let longest = config.axes.iter().copied().max().unwrap_or(1);
        let block = BlockConfig {
            dim,
            heads: config.heads,
            head_dim: HEAD_DIM,
            hidden: 2 * dim,
            lrpe: Some((axes, longest)),
            token_shift: true,
            context: None,
            modulated: false,
        };
        let coordinate = |(axis, &length): (usize, &usize)| {
            let init = Init::Randn {
                mean: 0.0,
                stdev: 0.02,
            };
            vb.pp("coordinates")
                .get_with_hints((length, dim), &axis.to_string(), init)
        };
        Ok(Self {
            config: config.clone(),
            input: Linear::new(config.values, dim, true, Start::FanIn, &vb.pp("input"))?,
            coordinates: config
                .axes
                .iter()
                .enumerate()
                .map(coordinate)
                .collect::<Result<_>>()?,
            blocks: (0..config.depth)
                .map(|i| Block::new(block, &vb.pp("blocks").pp(i)))
                .collect::<Result<_>>()?,
            norm: RmsNorm::new(dim, &vb.pp("norm"))?,
            head: Linear::new(2 * dim, config.output, true, Start::FanIn, &vb.pp("head"))?,
        })
    }

    /// Patches `[B, n_1 .. n_k, values]` to `[B, output]`.
    pub fn forward(&self, patches: &Tensor) -> Result<Tensor> {
        let dims = patches.dims();
        let k = self.config.axes.len();
        if dims.len() != k + 2 {
            candle_core::bail!("tower: patches {dims:?}, expected {k} axes between batch and values");
        }
        let grid = Grid::new(&dims[1..=k]);
        let mut x = self.input.forward(patches)?;
        for (axis, table) in self.coordinates.iter().enumerate() {
            x = x.broadcast_add(&self.along(axis, table, dims[axis + 1])?)?;
        }
        let mut x = x.reshape((dims[0], grid.tokens(), self.config.dim))?;
        for block in &self.blocks {
            x = block.forward(&x, &BlockContext::on(&grid))?;
        }
        let x = self.norm.forward(&x)?;
        self.head.forward(&Tensor::cat(&[&x.mean(1)?, &x.max(1)?], 1)?)
    }

    /// Coordinates of one axis of `length` tokens, shaped to broadcast over `[B, n_1 .. n_k, d]`.
    fn along(&self, axis: usize, table: &Tensor, length: usize) -> Result<Tensor> {
        let (trained, dim) = table.dims2()?;
        let rows = if length == trained {
            table.clone()
        } else {
            let nearest: Vec<u32> = (0..length)
                .map(|i| ((2 * i + 1) * trained / (2 * length)) as u32)
                .collect();
            table.index_select(&Tensor::from_vec(nearest, length, table.device())?, 0)?
        };
        let mut shape = vec![1; self.config.axes.len() + 2];
        shape[axis + 1] = length;
        shape[self.config.axes.len() + 1] = dim;
        rows.reshape(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use fulgur_kernels::philox::Philox;
    use fulgur_lightnet::params::Params;

    const VALUES: usize = 6;

    fn tower(axes: &[usize]) -> Result<Tower> {
        let config = TowerConfig {
            values: VALUES,
            axes: axes.to_vec(),
            dim: 32,
            depth: 1,
            heads: 1,
            output: 5,
        };
        Tower::new(&config, &Params::random(2, &Device::Cpu).builder())
    }

    fn normal(name: &str, shape: &[usize]) -> Result<Tensor> {
        let count = shape.iter().product();
        Tensor::from_vec(Philox::named(1, name).normals(count), shape, &Device::Cpu)
    }

    fn apart(a: &Tensor, b: &Tensor) -> Result<f32> {
        (a - b)?.abs()?.max_all()?.to_scalar()
    }

    #[test]
    fn grids_of_any_size_become_one_vector() -> Result<()> {
        let tower = tower(&[4, 3])?;
        for [rows, columns] in [[4, 3], [1, 1], [8, 3], [3, 7]] {
            let out = tower.forward(&normal("patches", &[2, rows, columns, VALUES])?)?;
            assert_eq!(out.dims(), [2, 5]);
            assert!(out.abs()?.max_all()?.to_scalar::<f32>()?.is_finite());
        }
        Ok(())
    }

    #[test]
    fn the_batch_does_not_matter_and_places_do() -> Result<()> {
        let tower = tower(&[4, 3])?;
        let patches = normal("patches", &[3, 4, 3, VALUES])?;
        let all = tower.forward(&patches)?;
        let alone = tower.forward(&patches.narrow(0, 2, 1)?)?;
        assert!(apart(&all.narrow(0, 2, 1)?, &alone)? < 1e-5);
        let upside_down = patches.index_select(&Tensor::new(&[3u32, 2, 1, 0], &Device::Cpu)?, 1)?;
        assert!(apart(&all, &tower.forward(&upside_down)?)? > 1e-4);
        Ok(())
    }

    #[test]
    fn other_lengths_read_the_nearest_coordinates() -> Result<()> {
        let tower = tower(&[4, 3])?;
        let table = normal("table", &[4, 2])?;
        let rows = |length: usize| tower.along(0, &table, length)?.flatten_all()?.to_vec1::<f32>();
        let trained = table.to_vec2::<f32>()?;
        let expected = |at: &[usize]| at.iter().flat_map(|&i| trained[i].clone()).collect::<Vec<_>>();
        assert_eq!(rows(4)?, expected(&[0, 1, 2, 3]));
        assert_eq!(rows(8)?, expected(&[0, 0, 1, 1, 2, 2, 3, 3]));
        assert_eq!(rows(2)?, expected(&[1, 3]));
        Ok(())
    }

    #[test]
    fn another_number_of_axes_is_refused() -> Result<()> {
        let message = tower(&[4, 3])?
            .forward(&normal("patches", &[2, 4, VALUES])?)
            .unwrap_err();
        assert!(message.to_string().contains("expected 2 axes"), "{message}");
        Ok(())
    }
}
