//! KL autoencoders between pictures, or spectrograms, and the latents that are diffused (Rombach et al., 2022).
//!
//! Reference: `AutoencoderKL` of diffusers. Latents are neither scaled nor clamped here: [`AutoencoderKlConfig::scaling_factor`] is what
//! a pipeline multiplies them by.

mod config;
mod names;
mod tiles;

pub use config::AutoencoderKlConfig;
pub use tiles::Tiles;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::VarBuilder;
use fulgur_lightnet::config::{self as files, ConfigError};
use fulgur_lightnet::params::folder::{self, LoadError, Weights};

use self::names::VaeNames;
use super::layers::{
    Activation, Attention, AttentionShape, Conv2d, Downsample, GroupNorm, Padding, Resnet, ResnetShape,
    Upsample,
};
use super::names::translated;

const EPS: f64 = 1e-6;
/// The factor of latents in files of latent diffusion.
const SCALE: &str = "scale_factor";
/// What logarithms of variances are cut to.
const LOG_VARIANCES: [f64; 2] = [-30.0, 20.0];

/// Which half of an autoencoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// From pictures to latents.
    Encoder,
    /// From latents to pictures.
    Decoder,
}

impl Half {
    const ALL: [Self; 2] = [Self::Encoder, Self::Decoder];

    fn name(self) -> &'static str {
        match self {
            Self::Encoder => "encoder",
            Self::Decoder => "decoder",
        }
    }

    /// Whether a tensor of this name, of diffusers or of latent diffusion, belongs to this half.
    fn holds(self, name: &str) -> bool {
        match self {
            Self::Encoder => name.starts_with("encoder.") || name.starts_with("quant_conv."),
            Self::Decoder => name.starts_with("decoder.") || name.starts_with("post_quant_conv."),
        }
    }
}

/// What an encoder says of a picture: a normal distribution of each value of its latent.
#[derive(Clone, Debug)]
pub struct Posterior {
    /// `[B, C, h, w]`.
    pub mean: Tensor,
    /// Logarithm of the variance, `[B, C, h, w]`.
    pub log_variance: Tensor,
}

/// Residual blocks at one resolution.
#[derive(Clone, Debug)]
struct Stage<S> {
    resnets: Vec<Resnet>,
    sampler: Option<S>,
}

/// Residual blocks around attention of one head.
#[derive(Clone, Debug)]
struct Mid {
    first: Resnet,
    attention: Option<(GroupNorm, Attention)>,
    last: Resnet,
}

impl Mid {
    fn new(config: &AutoencoderKlConfig, vb: &VarBuilder) -> Result<Self> {
        let channels = config.block_out_channels.last().copied().unwrap_or(0);
        let resnet = |j: usize| resnet(config, channels, channels, &vb.pp("resnets").pp(j));
        let attention = || -> Result<_> {
            let vb = vb.pp("attentions.0");
            let shape = AttentionShape {
                query: channels,
                context: None,
                inner: channels,
                heads: 1,
                bias: true,
                upcast: false,
            };
            let norm = GroupNorm::new(config.norm_num_groups, channels, EPS, &vb.pp("group_norm"))?;
            Ok((norm, Attention::new(shape, &vb)?))
        };
        Ok(Self {
            first: resnet(0)?,
            attention: config.mid_block_add_attention.then(attention).transpose()?,
            last: resnet(1)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (pictures, height, width, channels) = x.dims4()?;
        let mut x = self.first.forward(x, None, pictures)?;
        if let Some((norm, attention)) = &self.attention {
            let tokens = norm
                .forward(&x, pictures)?
                .reshape((pictures, height * width, channels))?;
            x = (&x + attention.forward(&tokens, None)?.reshape(x.shape())?)?;
        }
        self.last.forward(&x, None, pictures)
    }
}

fn resnet(config: &AutoencoderKlConfig, input: usize, output: usize, vb: &VarBuilder) -> Result<Resnet> {
    let shape = ResnetShape {
        input,
        output,
        time: None,
        scale_shift: false,
        groups: config.norm_num_groups,
        eps: EPS,
        activation: config.act_fn,
        divisor: 1.0,
    };
    Resnet::new(shape, vb)
}

/// The end of both halves: norm, activation, convolution.
#[derive(Clone, Debug)]
struct End {
    activation: Activation,
    norm: GroupNorm,
    output: Conv2d,
}

impl End {
    fn new(config: &AutoencoderKlConfig, input: usize, output: usize, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            // Not the configured one: so it is in the reference.
            activation: Activation::Silu,
            norm: GroupNorm::new(config.norm_num_groups, input, EPS, &vb.pp("conv_norm_out"))?,
            output: Conv2d::new(input, output, 3, &vb.pp("conv_out"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let active = self.norm.activated(x, x.dim(0)?, self.activation)?;
        self.output.forward(&active)
    }
}

/// From pictures to the distribution of their latents.
#[derive(Clone, Debug)]
struct Encoder {
    input: Conv2d,
    stages: Vec<Stage<Downsample>>,
    mid: Mid,
    end: End,
    quantise: Option<Conv2d>,
}

impl Encoder {
    fn new(config: &AutoencoderKlConfig, root: &VarBuilder) -> Result<Self> {
        let vb = root.pp(Half::Encoder.name());
        let widths = &config.block_out_channels;
        let (first, last) = ends(widths)?;
        let both = 2 * config.latent_channels;
        let stage = |(i, &width): (usize, &usize)| {
            let vb = vb.pp("down_blocks").pp(i);
            let before = widths[i.saturating_sub(1)];
            let resnets = (0..config.layers_per_block)
                .map(|j| {
                    let input = if j == 0 { before } else { width };
                    resnet(config, input, width, &vb.pp("resnets").pp(j))
                })
                .collect::<Result<_>>()?;
            let sampler = (i + 1 < widths.len())
                .then(|| Downsample::new(width, Padding::After, &vb.pp("downsamplers.0")));
            Ok(Stage {
                resnets,
                sampler: sampler.transpose()?,
            })
        };
        let quantise = config
            .use_quant_conv
            .then(|| Conv2d::new(both, both, 1, &root.pp("quant_conv")));
        Ok(Self {
            input: Conv2d::new(config.in_channels, first, 3, &vb.pp("conv_in"))?,
            stages: widths.iter().enumerate().map(stage).collect::<Result<_>>()?,
            mid: Mid::new(config, &vb.pp("mid_block"))?,
            end: End::new(config, last, both, &vb)?,
            quantise: quantise.transpose()?,
        })
    }

    fn forward(&self, picture: &Tensor) -> Result<Tensor> {
        let mut x = self.input.forward(picture)?;
        for stage in &self.stages {
            for resnet in &stage.resnets {
                x = resnet.forward(&x, None, x.dim(0)?)?;
            }
            if let Some(sampler) = &stage.sampler {
                x = sampler.forward(&x)?;
            }
        }
        x = self.end.forward(&self.mid.forward(&x)?)?;
        match &self.quantise {
            Some(quantise) => quantise.forward(&x),
            None => Ok(x),
        }
    }
}

/// From latents to pictures.
#[derive(Clone, Debug)]
struct Decoder {
    quantise: Option<Conv2d>,
    input: Conv2d,
    mid: Mid,
    stages: Vec<Stage<Upsample>>,
    end: End,
}

impl Decoder {
    fn new(config: &AutoencoderKlConfig, root: &VarBuilder) -> Result<Self> {
        let vb = root.pp(Half::Decoder.name());
        let widths: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last) = ends(&widths)?;
        let latent = config.latent_channels;
        let stage = |(i, &width): (usize, &usize)| {
            let vb = vb.pp("up_blocks").pp(i);
            let before = widths[i.saturating_sub(1)];
            let resnets = (0..=config.layers_per_block)
                .map(|j| {
                    let input = if j == 0 { before } else { width };
                    resnet(config, input, width, &vb.pp("resnets").pp(j))
                })
                .collect::<Result<_>>()?;
            let sampler = (i + 1 < widths.len()).then(|| Upsample::new(width, &vb.pp("upsamplers.0")));
            Ok(Stage {
                resnets,
                sampler: sampler.transpose()?,
            })
        };
        let quantise = config
            .use_post_quant_conv
            .then(|| Conv2d::new(latent, latent, 1, &root.pp("post_quant_conv")));
        Ok(Self {
            quantise: quantise.transpose()?,
            input: Conv2d::new(latent, first, 3, &vb.pp("conv_in"))?,
            mid: Mid::new(config, &vb.pp("mid_block"))?,
            stages: widths.iter().enumerate().map(stage).collect::<Result<_>>()?,
            end: End::new(config, last, config.out_channels, &vb)?,
        })
    }

    fn forward(&self, latent: &Tensor) -> Result<Tensor> {
        let mut x = match &self.quantise {
            Some(quantise) => quantise.forward(latent)?,
            None => latent.clone(),
        };
        x = self.mid.forward(&self.input.forward(&x)?)?;
        for stage in &self.stages {
            for resnet in &stage.resnets {
                x = resnet.forward(&x, None, x.dim(0)?)?;
            }
            if let Some(sampler) = &stage.sampler {
                x = sampler.forward(&x, None)?;
            }
        }
        self.end.forward(&x)
    }
}

/// The first and the last width.
fn ends(widths: &[usize]) -> Result<(usize, usize)> {
    match widths {
        [] => bail!("block_out_channels has 0 entries, expected some"),
        [first, ..] => Ok((*first, widths[widths.len() - 1])),
    }
}

/// An autoencoder, or half of one.
#[derive(Clone, Debug)]
pub struct AutoencoderKl {
    config: AutoencoderKlConfig,
    encoder: Option<Encoder>,
    decoder: Option<Decoder>,
}

impl AutoencoderKl {
    /// The halves that are asked for, with the tensors of `vb` by the names of diffusers.
    ///
    /// # Errors
    /// A network that cannot be; a tensor that is missing or has another shape.
    pub fn new(config: &AutoencoderKlConfig, halves: &[Half], vb: &VarBuilder) -> Result<Self> {
        config.check()?;
        let asked = |half: Half| halves.contains(&half);
        Ok(Self {
            config: config.clone(),
            encoder: asked(Half::Encoder)
                .then(|| Encoder::new(config, vb))
                .transpose()?,
            decoder: asked(Half::Decoder)
                .then(|| Decoder::new(config, vb))
                .transpose()?,
        })
    }

    /// How it is made.
    #[must_use]
    pub fn config(&self) -> &AutoencoderKlConfig {
        &self.config
    }

    /// The distribution of the latents of pictures `[B, C, H, W]`, in [-1, 1].
    ///
    /// # Errors
    /// Another number of channels, sides that vanish, or there is no encoder.
    pub fn encode(&self, picture: &Tensor) -> Result<Posterior> {
        let Some(encoder) = &self.encoder else {
            bail!("the encoder was not loaded");
        };
        let x = encoder.forward(&channels_last(picture, "sample", self.config.in_channels)?)?;
        let both = channels_first(&x)?;
        let half = self.config.latent_channels;
        let [low, high] = LOG_VARIANCES;
        Ok(Posterior {
            mean: both.narrow(1, 0, half)?.contiguous()?,
            log_variance: both.narrow(1, half, half)?.clamp(low, high)?,
        })
    }

    /// Pictures of latents `[B, C, h, w]`, without a clamp.
    ///
    /// # Errors
    /// Another number of channels, or there is no decoder.
    pub fn decode(&self, latent: &Tensor) -> Result<Tensor> {
        let Some(decoder) = &self.decoder else {
            bail!("the decoder was not loaded");
        };
        channels_first(&decoder.forward(&channels_last(latent, "latent", self.config.latent_channels)?)?)
    }

    /// What the folder says of its autoencoder: `config.json`, else the shapes of an original checkpoint.
    ///
    /// # Errors
    /// Neither describes one.
    pub fn config_in(dir: &Path) -> std::result::Result<AutoencoderKlConfig, LoadError> {
        let shapes = shapes_in(dir)?;
        let path = dir.join("config.json");
        if !matches!(VaeNames::of(&shapes), VaeNames::LatentDiffusion(_)) {
            return Ok(files::read_checked(&path, AutoencoderKlConfig::check)?);
        }
        let prefix = VaeNames::of(&shapes).prefix();
        let own: BTreeMap<String, Vec<usize>> = shapes
            .iter()
            .filter_map(|(name, shape)| Some((name.strip_prefix(prefix)?.to_owned(), shape.clone())))
            .collect();
        let mut scaling = AutoencoderKlConfig::default().scaling_factor;
        if shapes.contains_key(SCALE)
            && let Some(weights) = Weights::find(dir)?
        {
            // A number of the checkpoint, which no configuration repeats.
            let value = weights
                .load_part(&Device::Cpu, |name| name == SCALE)?
                .builder()
                .get_unchecked(SCALE)?;
            scaling = f64::from(
                value
                    .flatten_all()?
                    .get(0)?
                    .to_dtype(DType::F32)?
                    .to_scalar::<f32>()?,
            );
        }
        AutoencoderKlConfig::of_shapes(&own, scaling).map_err(|error| {
            LoadError::Config(ConfigError {
                path: dir.to_owned(),
                detail: error.to_string(),
            })
        })
    }

    /// Loads `halves` of the autoencoder in the folder `dir` onto `device`, with weights in `compute`: f32, or bf16 on a GPU. Names of
    /// diffusers, older ones, and those of latent diffusion are understood.
    ///
    /// # Errors
    /// No such folder, a network that is not understood, tensors that are missing, unexpected or of another shape: all are listed.
    pub fn load(
        dir: &Path,
        halves: &[Half],
        compute: DType,
        device: &Device,
    ) -> std::result::Result<Self, LoadError> {
        let config = Self::config_in(dir)?;
        let Some(weights) = Weights::find(dir)? else {
            return Err(LoadError::Absent { path: dir.to_owned() });
        };
        let names = VaeNames::of(&weights.shapes()?);
        // The other half is not read, nor what lies beside it: files of latent diffusion hold what trained them, and other networks.
        let part = |name: &str| {
            let Some(name) = name.strip_prefix(names.prefix()) else {
                return false;
            };
            let other = Half::ALL
                .iter()
                .any(|half| !halves.contains(half) && half.holds(name));
            let latent = matches!(names, VaeNames::LatentDiffusion(_));
            !other && (!latent || Half::ALL.iter().any(|half| half.holds(name)))
        };
        folder::load_part(
            &weights,
            part,
            compute,
            device,
            |_| false,
            |compute, vb| {
                let vb = vb.to_dtype(compute);
                match names.translation(config.block_out_channels.len()) {
                    Some(translation) => Self::new(&config, halves, &translated(&vb, translation)),
                    None => Self::new(&config, halves, &vb),
                }
            },
        )
    }
}

fn shapes_in(dir: &Path) -> std::result::Result<BTreeMap<String, Vec<usize>>, LoadError> {
    match Weights::find(dir)? {
        Some(weights) => Ok(weights.shapes()?),
        None => Err(LoadError::Absent { path: dir.to_owned() }),
    }
}

fn channels_last(x: &Tensor, name: &str, channels: usize) -> Result<Tensor> {
    match x.dims() {
        [_, c, _, _] if *c == channels => x.permute((0, 2, 3, 1))?.contiguous(),
        found => bail!("{name} is {found:?}, expected [B, {channels}, H, W]"),
    }
}

fn channels_first(x: &Tensor) -> Result<Tensor> {
    x.permute((0, 3, 1, 2))?.contiguous()
}
