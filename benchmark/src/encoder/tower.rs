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
