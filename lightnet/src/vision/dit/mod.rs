//! A denoiser of pictures on LightNet blocks (DiT of arXiv 2212.09748, with the mixers of LightNet, arXiv 2405.21022, image generation).
//!
//! ```text
//! c = silu(time + class + mean of text)                       adaLN-Zero: six vectors for each block
//! x = patches W + coordinates, MD-TPE
//! x = x + g_1 (*) mixer((1 + s_1) (*) norm(x) + b_1)          one scan over all tokens, MD-LRPE
//! x = x + attention(norm(x), text)                            in every second block, where there is a text
//! x = x + g_2 (*) glu((1 + s_2) (*) norm(x) + b_2)
//! prediction = patches of ((1 + s) (*) norm(x) + b) W
//! ```
//!
//! Cost grows linearly with the number of pixels. Positions are relative but for coordinates as fractions of the sides, so that other sizes
//! than those of training go through as they are.

mod config;
#[cfg(test)]
mod tests;

pub use config::{DitConfig, DitKind, DitSize};

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};
use fulgur_kernels::embedding::{Ids, lookup};
use fulgur_kernels::norm::rms_norm_modulated;
use fulgur_kernels::rows::add_row;

use crate::block::{Block, BlockConfig, BlockContext, MODULATIONS};
use crate::diffusion::{TimeEmbedding, mean_of_words};
use crate::linear::{Linear, Start};
use crate::norm::EPS;
use crate::params::folder::{self, LoadError};
use crate::patches::{from_patches, to_patches};
use crate::position::{FRACTION_WIDTH, Grid, MdTpe, TpeConfig, fractions};

/// Axes of a picture.
const AXES: usize = 2;
/// Standard deviation of the vectors of classes at first.
const CLASS_START: f64 = 0.02;

/// What the pictures of a batch shall be.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted<'a> {
    /// `[B]`, numbers of classes; [`Dit::no_class`] leaves it open.
    pub classes: Option<&'a Ids>,
    /// States `[B, L, c]` of a text and its mask `[B, L]`, 1 where there is a word.
    pub text: Option<(&'a Tensor, &'a Tensor)>,
}

/// The network.
#[derive(Clone, Debug)]
pub struct Dit {
    config: DitConfig,
    device: Device,
    compute: DType,
    time: TimeEmbedding,
    /// A row for each class, and one for none.
    classes: Option<Tensor>,
    text: Option<Linear>,
    input: Linear,
    coordinates: Linear,
    tpe: MdTpe,
    modulation: Linear,
    blocks: Vec<Block>,
    head_modulation: Linear,
    head: Linear,
}

impl Dit {
    /// Takes `time_input`, `time_output`, `classes` `[C + 1, d]`, `text`, `input`, `coordinates`, `tpe`, `modulation`, `blocks.{i}`,
    /// `head_modulation` and `head`, those of them that the shape has.
    ///
    /// `compute` is the dtype of the blocks' products (`BF16` on a GPU, `F32` on the CPU); the residual stream stays in `F32`.
    ///
    /// # Errors
    /// A shape that cannot be, or tensors that are missing or have another shape.
    pub fn new(config: &DitConfig, compute: DType, vb: &VarBuilder) -> Result<Self> {
        config.check()?;
        let &DitConfig {
            hidden_size: dim,
            num_attention_heads: heads,
            intermediate_size: hidden,
            patch_size: patch,
            ..
        } = config;
        let values = config.num_channels * patch * patch;
        let longest = config.image_size.into_iter().max().unwrap_or(1) / patch;
        let block = BlockConfig {
            dim,
            heads,
            head_dim: dim / heads,
            hidden,
            lrpe: Some((AXES, longest)),
            token_shift: config.token_shift,
            context: None,
            modulated: true,
        };
        let blocks = (0..config.num_hidden_layers).map(|i| {
            let context = config.text_dim.filter(|_| i.is_multiple_of(config.text_every));
            Block::new(BlockConfig { context, ..block }, &vb.pp("blocks").pp(i))
        });
        let classes = config.labels.len();
        let start = Init::Randn {
            mean: 0.0,
            stdev: CLASS_START,
        };
        let map = |width: usize, name: &str| Linear::new(width, dim, true, Start::FanIn, &vb.pp(name));
        let zero = |width: usize, name: &str| Linear::new(dim, width, true, Start::Zero, &vb.pp(name));
        Ok(Self {
            device: vb.device().clone(),
            compute,
            time: TimeEmbedding::new(dim, vb)?,
            classes: (classes > 0)
                .then(|| vb.get_with_hints((classes + 1, dim), "classes", start))
                .transpose()?,
            text: config.text_dim.map(|width| map(width, "text")).transpose()?,
            input: map(values, "input")?,
            coordinates: map(AXES * FRACTION_WIDTH, "coordinates")?,
            tpe: MdTpe::new(
                TpeConfig {
                    dim,
                    heads,
                    axes: AXES,
                    two_sided: true,
                    residual: true,
                },
                &vb.pp("tpe"),
            )?,
            modulation: zero(MODULATIONS * dim, "modulation")?,
            blocks: blocks.collect::<Result<_>>()?,
            head_modulation: zero(2 * dim, "head_modulation")?,
            head: zero(values, "head")?,
            config: config.clone(),
        })
    }

    /// Reads `config.json` and the weights of `dir` onto `device`; `compute` as in [`Self::new`].
    ///
    /// # Errors
    /// A file is missing or unreadable, a shape that cannot be, or weights that are missing, unexpected or of another shape, all of
    /// them named.
    pub fn load(dir: &Path, compute: DType, device: &Device) -> std::result::Result<Self, LoadError> {
        let config = DitConfig::read(&dir.join("config.json"))?;
        folder::load(
            dir,
            compute,
            device,
            |_| false,
            |compute, vb| Self::new(&config, compute, vb),
        )
    }

    /// The shape.
    pub fn config(&self) -> &DitConfig {
        &self.config
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The number that stands for no class.
    pub fn no_class(&self) -> u32 {
        self.config.labels.len() as u32
    }

    /// What it predicts for noisy pictures or latents `x` `[B, H, W, C]` at `time` `[B]` in [0, 1]: of the same shape, f32.
    ///
    /// # Errors
    /// Sides that are not multiples of the patch, what is wanted is missing or not known to this model, or a failing operation.
    pub fn forward(&self, x: &Tensor, time: &Tensor, wanted: &Wanted<'_>) -> Result<Tensor> {
        let patch = [self.config.patch_size; AXES];
        let patches = to_patches(x, &patch)?;
        let (batch, rows, columns, _) = patches.dims4()?;
        let grid = Grid::new(&[rows, columns]);
        let condition = self.condition(time, wanted)?;
        let modulation =
            self.modulation
                .forward(&condition)?
                .reshape((batch, MODULATIONS, self.config.hidden_size))?;
        let tokens = patches
            .reshape((batch, rows * columns, ()))?
            .to_dtype(self.compute)?;
        let places = self.coordinates.forward(&fractions(&grid.axes, x.device())?)?;
        let tokens = add_row(&self.input.forward(&tokens)?, &places)?;
        let mut tokens = self.tpe.forward(&tokens, &grid, None)?.to_dtype(DType::F32)?;
        let states = wanted
            .text
            .map(|(states, mask)| Ok::<_, candle_core::Error>((states.to_dtype(self.compute)?, mask)))
            .transpose()?;
        let context = BlockContext {
            modulation: Some(&modulation),
            text: states.as_ref().map(|(states, mask)| (states, *mask)),
            compute: Some(self.compute),
            ..BlockContext::on(&grid)
        };
        for block in &self.blocks {
            tokens = block.forward(&tokens, &context)?;
        }
        let dim = self.config.hidden_size;
        let modulation = self.head_modulation.forward(&condition)?;
        let (shift, scale) = (modulation.narrow(1, 0, dim)?, modulation.narrow(1, dim, dim)?);
        let tokens = rms_norm_modulated(&tokens, &scale.contiguous()?, &shift.contiguous()?, EPS)?;
        let values = self.head.forward(&tokens)?.to_dtype(DType::F32)?;
        from_patches(&values.reshape((batch, rows, columns, ()))?, &patch)
    }

    /// Time, class and text as the vector `[B, d]` that modulates every block.
    fn condition(&self, time: &Tensor, wanted: &Wanted<'_>) -> Result<Tensor> {
        let mut sum = self.time.forward(time)?;
        match (&self.classes, wanted.classes) {
            (Some(table), Some(ids)) => {
                sum = (sum + lookup(table, ids, DType::F32)?)?;
            }
            (None, None) => {}
            (Some(_), None) => bail!("picture: a class is expected, none was given"),
            (None, Some(_)) => bail!("picture: a class was given, but the model has none"),
        }
        match (&self.text, wanted.text) {
            (Some(map), Some((states, mask))) => {
                sum = (sum + map.forward(&mean_of_words(states, mask)?)?)?;
            }
            (None, None) => {}
            (Some(_), None) => bail!("picture: a text is expected, none was given"),
            (None, Some(_)) => bail!("picture: a text was given, but the model reads none"),
        }
        sum.silu()
    }
}
