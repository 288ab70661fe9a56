//! Classifiers of pictures: patches, mixers, a mean over all tokens (LightNet, arXiv 2405.21022; HGRN2, arXiv 2404.07904, the image
//! models).
//!
//! ```text
//! x = patches W_p + b                   then MD-TPE
//! x = x + s_m (*) mixer(norm(x))        once a stage of the form, with the same parameters
//! x = x + s_g (*) glu(norm(x))          for each layer
//! logits = norm(mean over tokens of x) W^T + b
//! ```
//!
//! `s` are the scales of layer scale, where there are some, times what stochastic depth keeps of a branch: 0, or 1 / (1 - p). There
//! are no absolute positions, so that pictures of any size go through as they are.
//!
//! ```
//! # fn main() -> candle_core::Result<()> {
//! use candle_core::{DType, Device, Tensor};
//! use fulgur_lightnet::params::Params;
//! use fulgur_lightnet::vision::{Classifier, Config, Size};
//! let labels = vec!["cat".to_owned(), "dog".to_owned()];
//! let config = Config { image_size: [32, 32], num_hidden_layers: 2, ..Config::of(Size::Tiny, labels) };
//! let model = Classifier::new(&config, DType::F32, &Params::random(1, &Device::Cpu).builder())?;
//! let wide = Tensor::zeros((1, 3, 32, 64), DType::F32, &Device::Cpu)?;
//! assert_eq!(model.logits(&wide, None)?.dims(), [1, 2]);
//! # Ok(()) }
//! ```

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{D, DType, Device, Result, Tensor, bail};
use candle_nn::ops::log_softmax;
use candle_nn::{Init, VarBuilder};
use fulgur_kernels::norm::{add_norm, rms_norm_to};
use fulgur_kernels::residual::add_branch;

use super::config::{Config, Tpe};
use super::mixer::{TokenMixer, Told};
use super::patches::unfold;
use crate::glu::{Glu, shift_on_grid};
use crate::linear::{Linear, Start};
use crate::lm::lower_bounds;
use crate::mixer::causal::Paths;
use crate::norm::EPS;
use crate::params::folder::{self, LoadError};
use crate::position::{Grid, MdTpe, TpeConfig};

/// Standard deviation of the weights of the head at first: logits begin near zero.
const HEAD_START: f64 = 0.02;

/// The model.
#[derive(Clone, Debug)]
pub struct Classifier {
    config: Config,
    embed: Linear,
    tpe: Option<MdTpe>,
    layers: Vec<Layer>,
    lower_bounds: Option<Tensor>,
    /// Gain of the last norm.
    gain: Tensor,
    head: Linear,
    compute: DType,
    last: Arc<Mutex<Option<(Grid, Stages)>>>,
}

/// The ways of a layer's mixer, one stage after the other.
type Stages = Arc<[Arc<Paths>]>;

/// The mixer and the gated linear unit, each with the gain of its norm and its layer scale.
#[derive(Clone, Debug)]
struct Layer {
    mixer: TokenMixer,
    glu: Glu,
    gains: [Tensor; 2],
    scales: [Option<Tensor>; 2],
}

impl Layer {
    fn new(config: &Config, index: usize, vb: &VarBuilder) -> Result<Self> {
        let width = config.hidden_size;
        let gain = |name: &str| vb.pp(name).get_with_hints(width, "weight", Init::Const(1.0));
        let scale = |name: &str| {
            let start = config.layer_scale.map(Init::Const);
            start
                .map(|start| vb.get_with_hints(width, name, start))
                .transpose()
        };
        Ok(Self {
            gains: [gain("norm_mixer")?, gain("norm_glu")?],
            scales: [scale("scale_mixer")?, scale("scale_glu")?],
            mixer: TokenMixer::new(config, index, &vb.pp("mixer"))?,
            glu: Glu::new(width, config.intermediate_size, Start::FanIn, &vb.pp("glu"))?,
        })
    }
}

impl Classifier {
    /// Takes its tensors from `vb`; branches compute in `compute` (`BF16` on a GPU, `F32` on the CPU), the residual stream stays in
    /// the type of the weights.
    ///
    /// # Errors
    /// The shape is none, or a tensor is missing or has another shape.
    pub fn new(config: &Config, compute: DType, vb: &VarBuilder) -> Result<Self> {
        config.check()?;
        let (width, count) = (config.hidden_size, config.num_hidden_layers);
        let values = config.num_channels * config.patch_size * config.patch_size;
        let tpe = TpeConfig {
            dim: width,
            heads: config.num_attention_heads,
            axes: 2,
            two_sided: config.tpe == Tpe::TwoSided,
            residual: true,
        };
        let bounds = || vb.get_with_hints((count, width), "lower_bounds", Init::Const(1.0));
        let scan = config.mixer.scans().map(|scan| config.layers(scan));
        let bounded = scan.is_some_and(|layers| layers.has_lower_bounds());
        Ok(Self {
            embed: Linear::new(values, width, true, Start::FanIn, &vb.pp("embed"))?,
            tpe: (config.tpe != Tpe::None)
                .then(|| MdTpe::new(tpe, &vb.pp("tpe")))
                .transpose()?,
            layers: (0..count)
                .map(|index| Layer::new(config, index, &vb.pp("layers").pp(index)))
                .collect::<Result<_>>()?,
            lower_bounds: bounded.then(bounds).transpose()?,
            gain: vb.pp("norm").get_with_hints(width, "weight", Init::Const(1.0))?,
            head: Linear::new(
                width,
                config.classes(),
                true,
                Start::Normal(HEAD_START),
                &vb.pp("head"),
            )?,
            config: config.clone(),
            compute,
            last: Arc::default(),
        })
    }

    /// Loads the model in `dir` onto `device`. All tensors are compared by name and shape before any is read.
    ///
    /// # Errors
    /// The folder holds no such model, or other tensors than its own, all of which are listed.
    pub fn load(dir: &Path, compute: DType, device: &Device) -> std::result::Result<Self, LoadError> {
        let config = Config::read(&dir.join("config.json"))?;
        folder::load(
            dir,
            compute,
            device,
            |_| false,
            |compute, vb| Self::new(&config, compute, vb),
        )
    }

    /// Its shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where its weights are.
    pub fn device(&self) -> &Device {
        self.gain.device()
    }

    /// Branches of the residual stream: what stochastic depth may drop.
    pub fn branches(&self) -> usize {
        2 * self.layers.len()
    }

    /// Logits `[B, classes]` of `pixels` `[B, C, H, W]`, in the type of the weights. `pixels` are less [`Config::image_mean`] and
    /// divided by [`Config::image_std`]; their sides are any multiples of the patch.
    ///
    /// `kept` `[2 L, B]` is what stochastic depth multiplies each branch of each picture by, in the order mixer and gated linear
    /// unit of the first layer, then of the next.
    ///
    /// # Errors
    /// Pixels or `kept` of another shape, or a failing operation.
    pub fn logits(&self, pixels: &Tensor, kept: Option<&Tensor>) -> Result<Tensor> {
        self.head.forward(&self.features(pixels, kept)?)
    }

    /// Logits `[B, classes]` of `features` `[B, d]`, as [`Self::features`] gives them.
    ///
    /// # Errors
    /// Features of another width, or a failing operation.
    pub fn logits_of(&self, features: &Tensor) -> Result<Tensor> {
        self.head.forward(features)
    }

    /// What the head sees of pictures: the norm of the mean of all tokens, `[B, d]` in the type of the weights. `pixels` and
    /// `kept` as for [`Self::logits`].
    ///
    /// # Errors
    /// As [`Self::logits`].
    pub fn features(&self, pixels: &Tensor, kept: Option<&Tensor>) -> Result<Tensor> {
        let (batch, channels, ..) = pixels.dims4()?;
        if channels != self.config.num_channels {
            bail!(
                "pictures have {channels} channels, expected {}",
                self.config.num_channels
            );
        }
        if let Some(kept) = kept
            && kept.dims() != [self.branches(), batch]
        {
            bail!(
                "kept has shape {:?}, expected [{}, {batch}]",
                kept.dims(),
                self.branches()
            );
        }
        let (patches, grid) = unfold(pixels, self.config.patch_size)?;
        let mut x = self.embed.forward(&patches.to_dtype(self.compute)?)?;
        if let Some(tpe) = &self.tpe {
            x = tpe.forward(&x, &grid, None)?;
        }
        let end = self.run(x.to_dtype(self.gain.dtype())?, &grid, kept)?;
        rms_norm_to(&end.mean(1)?, Some(&self.gain), 1, EPS, end.dtype())
    }

    /// The end `[B, N, d]` of the residual stream that begins with `x`.
    fn run(&self, mut x: Tensor, grid: &Grid, kept: Option<&Tensor>) -> Result<Tensor> {
        let stages = self.stages(grid)?;
        let bounds = match self.config.mixer.scans() {
            Some(scan) => lower_bounds(&self.config.layers(scan), self.lower_bounds.as_ref())?,
            None => Vec::new(),
        };
        let mut normed = None;
        for (index, layer) in self.layers.iter().enumerate() {
            let gate = |branch: usize| -> Result<Option<Tensor>> {
                let kept = kept
                    .map(|kept| kept.get(2 * index + branch)?.unsqueeze(1))
                    .transpose()?;
                gate(kept, layer.scales[branch].as_ref(), &x)
            };
            let gates = [gate(0)?, gate(1)?];
            for (stage, paths) in stages.iter().enumerate() {
                let told = Told {
                    grid,
                    paths,
                    lower_bound: bounds.get(index),
                };
                let input = self.normed(&x, normed.take(), &layer.gains[0])?;
                let branch = layer.mixer.forward(&input, &told)?;
                let next = &layer.gains[usize::from(stage + 1 == stages.len())];
                (x, normed) = join(&x, &branch, gates[0].as_ref(), Some(next))?;
            }
            let mut input = self.normed(&x, normed.take(), &layer.gains[1])?;
            if self.config.token_shift {
                input = shift_on_grid(&input, grid.condition, &grid.axes)?;
            }
            let branch = layer.glu.forward(&input)?;
            let next = self.layers.get(index + 1).map(|layer| &layer.gains[0]);
            (x, normed) = join(&x, &branch, gates[1].as_ref(), next)?;
        }
        Ok(x)
    }

    /// The norm of `x` where it is not there already.
    fn normed(&self, x: &Tensor, normed: Option<Tensor>, gain: &Tensor) -> Result<Tensor> {
        match normed {
            Some(normed) => Ok(normed),
            None => rms_norm_to(x, Some(gain), 1, EPS, self.compute),
        }
    }

    /// The ways through the grid that was seen last are kept: it rarely changes.
    fn stages(&self, grid: &Grid) -> Result<Stages> {
        // A panic elsewhere cannot leave a half-written entry.
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, stages)) = &*last
            && of == grid
        {
            return Ok(Arc::clone(stages));
        }
        let sides = match *grid.axes {
            [rows, columns] => Some([rows, columns]),
            _ => None,
        };
        let stages: Stages = self
            .config
            .form
            .stages(grid.tokens(), None, sides, self.device())?
            .into();
        *last = Some((grid.clone(), Arc::clone(&stages)));
        Ok(stages)
    }
}

/// What multiplies a branch, `[B, d]` in the type of `x` `[B, N, d]`: what is `kept` `[B, 1]` of it, times its scale `[d]`.
fn gate(kept: Option<Tensor>, scale: Option<&Tensor>, x: &Tensor) -> Result<Option<Tensor>> {
    let (batch, _, width) = x.dims3()?;
    let gate = match (kept, scale) {
        (None, None) => return Ok(None),
        (Some(kept), None) => kept.to_dtype(x.dtype())?.broadcast_as((batch, width))?,
        (None, Some(scale)) => scale.unsqueeze(0)?.broadcast_as((batch, width))?,
        (Some(kept), Some(scale)) => kept.to_dtype(x.dtype())?.broadcast_mul(&scale.unsqueeze(0)?)?,
    };
    gate.contiguous().map(Some)
}

/// The stream with a branch, and the norm of the sum where it comes with it: in one pass where nothing gates the branch.
fn join(
    x: &Tensor,
    branch: &Tensor,
    gate: Option<&Tensor>,
    next: Option<&Tensor>,
) -> Result<(Tensor, Option<Tensor>)> {
    match (gate, next) {
        (None, Some(gain)) => {
            let (x, normed) = add_norm(x, branch, Some(gain), EPS)?;
            Ok((x, Some(normed)))
        }
        _ => Ok((add_branch(x, branch, gate)?, None)),
    }
}

/// Mean cross-entropy of `logits` `[B, K]` against shares of classes `targets` `[B, K]`, in nats a picture: a scalar.
///
/// Shares come from mixed pictures and smoothed labels, and sum to one.
///
/// # Errors
/// Shapes that differ, or a failing operation.
pub fn soft_cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    if logits.dims() != targets.dims() {
        bail!(
            "targets have shape {:?}, expected {:?} like the logits",
            targets.dims(),
            logits.dims()
        );
    }
    let log_p = log_softmax(logits, D::Minus1)?;
    (log_p * targets.to_dtype(logits.dtype())?)?
        .sum(D::Minus1)?
        .mean_all()?
        .neg()
}
