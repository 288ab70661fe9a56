//! HiFi-GAN: sound of log-mel spectrograms (Kong et al., 2020).
//!
//! Reference: `SpeechT5HifiGan` of transformers; the vocoder in AudioLDM's checkpoint has other names.
//!
//! ```text
//! x = conv(mel);  stages: x = up(lrelu(x)), then the mean of residual stacks;  tanh(conv(lrelu(x)))
//! stack: for each dilation d: x = x + conv(lrelu(conv_d(lrelu(x))))
//! ```

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::{VarBuilder, ops::leaky_relu};
use fulgur_lightnet::config as files;
use fulgur_lightnet::params::folder::{self, LoadError, Weights};
use serde::Deserialize;

use super::layers::{Conv1d, ConvTranspose1d};
use super::limits::{MOST_BLOCKS, MOST_CHANNELS, MOST_TAPS, within};
use super::names::{Stored, Translation, below, translated};

/// Slope of the last leaky rectifier, which is not the configured one.
const LAST_SLOPE: f64 = 0.01;
/// Most samples a frame of a spectrogram.
const MOST_HOP: usize = 1 << 16;
/// Taps of the first and the last convolution.
const OUTER: usize = 7;
/// What may come before the names of the original vocoder.
const PREFIXES: [&str; 3] = ["", "vocoder.", "first_stage_model.vocoder."];

/// A vocoder as `SpeechT5HifiGan` is configured.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct HifiGanConfig {
    /// Bands of the spectrogram.
    pub model_in_dim: usize,
    /// Samples a second.
    pub sampling_rate: usize,
    upsample_initial_channel: usize,
    upsample_rates: Vec<usize>,
    upsample_kernel_sizes: Vec<usize>,
    resblock_kernel_sizes: Vec<usize>,
    resblock_dilation_sizes: Vec<Vec<usize>>,
    leaky_relu_slope: f64,
    normalize_before: bool,
}

impl Default for HifiGanConfig {
    fn default() -> Self {
        Self {
            model_in_dim: 80,
            sampling_rate: 16_000,
            upsample_initial_channel: 512,
            upsample_rates: vec![4; 4],
            upsample_kernel_sizes: vec![8; 4],
            resblock_kernel_sizes: vec![3, 7, 11],
            resblock_dilation_sizes: vec![vec![1, 3, 5]; 3],
            leaky_relu_slope: 0.1,
            normalize_before: true,
        }
    }
}

impl HifiGanConfig {
    /// The vocoder of AudioLDM.
    #[must_use]
    pub fn audio_ldm() -> Self {
        Self {
            model_in_dim: 64,
            upsample_initial_channel: 1024,
            upsample_rates: vec![5, 4, 2, 2, 2],
            upsample_kernel_sizes: vec![16, 16, 8, 4, 4],
            normalize_before: false,
            ..Self::default()
        }
    }

    /// Samples a frame of the spectrogram.
    #[must_use]
    pub fn hop(&self) -> usize {
        self.upsample_rates
            .iter()
            .fold(1, |hop, &rate| hop.saturating_mul(rate))
    }

    fn check(&self) -> Result<()> {
        within("model_in_dim", self.model_in_dim, MOST_CHANNELS)?;
        within(
            "upsample_initial_channel",
            self.upsample_initial_channel,
            MOST_CHANNELS,
        )?;
        within("upsample_rates", self.upsample_rates.len(), MOST_BLOCKS)?;
        within(
            "resblock_kernel_sizes",
            self.resblock_kernel_sizes.len(),
            MOST_BLOCKS,
        )?;
        for (field, found, expected) in [
            (
                "upsample_kernel_sizes",
                self.upsample_kernel_sizes.len(),
                self.upsample_rates.len(),
            ),
            (
                "resblock_dilation_sizes",
                self.resblock_dilation_sizes.len(),
                self.resblock_kernel_sizes.len(),
            ),
        ] {
            if found != expected {
                bail!("{field} has {found} entries, expected {expected}");
            }
        }
        for (&rate, &size) in self.upsample_rates.iter().zip(&self.upsample_kernel_sizes) {
            within("upsample_rates", rate, MOST_TAPS)?;
            within("upsample_kernel_sizes", size, MOST_TAPS)?;
            if size < rate {
                bail!("upsample_kernel_sizes has {size}, expected at least the rate {rate}");
            }
        }
        for (&size, dilations) in self
            .resblock_kernel_sizes
            .iter()
            .zip(&self.resblock_dilation_sizes)
        {
            within("resblock_kernel_sizes", size, MOST_TAPS)?;
            if size.is_multiple_of(2) {
                bail!("resblock_kernel_sizes has {size}, expected odd numbers");
            }
            within("resblock_dilation_sizes", dilations.len(), MOST_BLOCKS)?;
            for &dilation in dilations {
                within("resblock_dilation_sizes", dilation, MOST_TAPS)?;
            }
        }
        within("the product of upsample_rates", self.hop(), MOST_HOP)?;
        let halvings = self.upsample_rates.len() as u32;
        if self.upsample_initial_channel >> halvings == 0 {
            bail!(
                "upsample_initial_channel is {}, expected at least {} for {halvings} stages",
                self.upsample_initial_channel,
                1u64 << halvings
            );
        }
        if !self.leaky_relu_slope.is_finite() {
            bail!("leaky_relu_slope is {}, expected a number", self.leaky_relu_slope);
        }
        Ok(())
    }
}

/// Convolutions with growing dilations, each added to what came before.
#[derive(Clone, Debug)]
struct Stack {
    pairs: Vec<(Conv1d, Conv1d)>,
    slope: f64,
}

impl Stack {
    fn new(channels: usize, size: usize, dilations: &[usize], slope: f64, vb: &VarBuilder) -> Result<Self> {
        let pair = |(i, &dilation): (usize, &usize)| {
            Ok((
                Conv1d::new(channels, channels, size, dilation, &vb.pp("convs1").pp(i))?,
                Conv1d::new(channels, channels, size, 1, &vb.pp("convs2").pp(i))?,
            ))
        };
        Ok(Self {
            pairs: dilations.iter().enumerate().map(pair).collect::<Result<_>>()?,
            slope,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for (first, second) in &self.pairs {
            let inner = first.forward(&leaky_relu(&x, self.slope)?)?;
            x = (x + second.forward(&leaky_relu(&inner, self.slope)?)?)?;
        }
        Ok(x)
    }
}

/// The vocoder.
#[derive(Clone, Debug)]
pub struct HifiGan {
    config: HifiGanConfig,
    input: Conv1d,
    stages: Vec<(ConvTranspose1d, Vec<Stack>)>,
    output: Conv1d,
    /// Mean and scale of each band, where spectrograms are normed.
    norm: Option<(Tensor, Tensor)>,
}

impl HifiGan {
    /// Takes the tensors of `vb` by the names of transformers.
    ///
    /// # Errors
    /// A network that cannot be; a tensor that is missing or has another shape.
    pub fn new(config: &HifiGanConfig, vb: &VarBuilder) -> Result<Self> {
        config.check()?;
        let channels = |stage: usize| config.upsample_initial_channel >> stage;
        let sizes = &config.resblock_kernel_sizes;
        let (slope, bands) = (config.leaky_relu_slope, config.model_in_dim);
        let mut stages = Vec::new();
        for (i, (&rate, &size)) in config
            .upsample_rates
            .iter()
            .zip(&config.upsample_kernel_sizes)
            .enumerate()
        {
            let (from, to) = (channels(i), channels(i + 1));
            let up =
                ConvTranspose1d::new(from, to, size, rate, (size - rate) / 2, &vb.pp("upsampler").pp(i))?;
            let stacks = sizes
                .iter()
                .zip(&config.resblock_dilation_sizes)
                .enumerate()
                .map(|(j, (&size, dilations))| {
                    Stack::new(
                        to,
                        size,
                        dilations,
                        slope,
                        &vb.pp("resblocks").pp(i * sizes.len() + j),
                    )
                })
                .collect::<Result<_>>()?;
            stages.push((up, stacks));
        }
        let wide = vb.to_dtype(DType::F32);
        let norm = config
            .normalize_before
            .then(|| -> Result<_> { Ok((wide.get(bands, "mean")?, wide.get(bands, "scale")?)) });
        Ok(Self {
            input: Conv1d::new(bands, channels(0), OUTER, 1, &vb.pp("conv_pre"))?,
            output: Conv1d::new(channels(stages.len()), 1, OUTER, 1, &vb.pp("conv_post"))?,
            stages,
            norm: norm.transpose()?,
            config: config.clone(),
        })
    }

    /// How it is made.
    #[must_use]
    pub fn config(&self) -> &HifiGanConfig {
        &self.config
    }

    /// Sound of log-mel spectrograms `[B, T, bands]`: the first `hop T` samples, in [-1, 1], `[B, hop T]`.
    ///
    /// # Errors
    /// Another number of bands, or no frames.
    pub fn forward(&self, mel: &Tensor) -> Result<Tensor> {
        let (_, frames, bands) = mel.dims3()?;
        if bands != self.config.model_in_dim || frames == 0 {
            bail!(
                "mel is {:?}, expected [B, T, {}]",
                mel.dims(),
                self.config.model_in_dim
            );
        }
        let mut x = match &self.norm {
            Some((mean, scale)) => {
                let (mean, scale) = (mean.to_dtype(mel.dtype())?, scale.to_dtype(mel.dtype())?);
                mel.broadcast_sub(&mean)?.broadcast_div(&scale)?
            }
            None => mel.clone(),
        };
        x = self.input.forward(&x)?;
        for (up, stacks) in &self.stages {
            x = up.forward(&leaky_relu(&x, self.config.leaky_relu_slope)?)?;
            let mut sum: Option<Tensor> = None;
            for stack in stacks {
                let part = stack.forward(&x)?;
                sum = Some(match sum {
                    None => part,
                    Some(sum) => (sum + part)?,
                });
            }
            if let Some(sum) = sum {
                x = (sum / stacks.len() as f64)?;
            }
        }
        let wave = self
            .output
            .forward(&leaky_relu(&x, LAST_SLOPE)?)?
            .tanh()?
            .squeeze(2)?;
        let samples = (frames * self.config.hop()).min(wave.dim(1)?);
        wave.narrow(1, 0, samples)?.contiguous()
    }

    /// What the folder says of its vocoder; one of AudioLDM where there is no `config.json`.
    ///
    /// # Errors
    /// The file does not describe one.
    pub fn config_in(dir: &Path) -> std::result::Result<HifiGanConfig, LoadError> {
        let path = dir.join("config.json");
        match path.is_file() {
            true => Ok(files::read_checked(&path, HifiGanConfig::check)?),
            false => Ok(HifiGanConfig::audio_ldm()),
        }
    }

    /// Loads the vocoder in the folder `dir` onto `device`, with weights in `compute`: f32, or bf16 on a GPU. Names of transformers and
    /// of the original are understood; weights that are held as lengths and directions are folded.
    ///
    /// # Errors
    /// No such folder, a network that is not understood, tensors that are missing, unexpected or of another shape: all are listed.
    pub fn load(dir: &Path, compute: DType, device: &Device) -> std::result::Result<Self, LoadError> {
        let config = Self::config_in(dir)?;
        let Some(weights) = Weights::find(dir)? else {
            return Err(LoadError::Absent { path: dir.to_owned() });
        };
        let names = Names::of(&weights.shapes()?);
        // What lies beside the vocoder in a file of a whole pipeline is not read.
        let part = |name: &str| name.starts_with(names.prefix);
        let ignored = |name: &str| matches!(name, "mean" | "scale") && !config.normalize_before;
        folder::load_part(&weights, part, compute, device, ignored, |compute, vb| {
            Self::new(&config, &translated(&vb.to_dtype(compute), names.translation()))
        })
    }
}

/// How weights lie in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Whole,
    /// `weight_g` and `weight_v`.
    Parts,
    /// `parametrizations.weight.original0` and `original1`.
    Parametrized,
}

/// By which names a file holds a vocoder.
#[derive(Clone, Copy, Debug)]
struct Names {
    prefix: &'static str,
    /// Whether the stages are called `ups`.
    original: bool,
    form: Form,
}

impl Names {
    fn of(shapes: &BTreeMap<String, Vec<usize>>) -> Self {
        let under = |prefix: &str, name: &str| {
            shapes
                .keys()
                .any(|key| key.starts_with(&format!("{prefix}{name}")))
        };
        let prefix = PREFIXES
            .into_iter()
            .find(|prefix| under(prefix, "conv_pre."))
            .unwrap_or_default();
        let form = if under(prefix, "conv_pre.weight_g") {
            Form::Parts
        } else if under(prefix, "conv_pre.parametrizations.") {
            Form::Parametrized
        } else {
            Form::Whole
        };
        Self {
            prefix,
            original: under(prefix, "ups."),
            form,
        }
    }

    fn translation(self) -> Translation {
        let Self {
            prefix,
            original,
            form,
        } = self;
        Arc::new(move |name: &str| {
            let place = match below(name, "upsampler") {
                Some(rest) if original => format!("{prefix}ups.{rest}"),
                _ => format!("{prefix}{name}"),
            };
            match (form, place.strip_suffix(".weight")) {
                (Form::Parts, Some(layer)) => Stored::Normed {
                    length: format!("{layer}.weight_g"),
                    direction: format!("{layer}.weight_v"),
                },
                (Form::Parametrized, Some(layer)) => Stored::Normed {
                    length: format!("{layer}.parametrizations.weight.original0"),
                    direction: format!("{layer}.parametrizations.weight.original1"),
                },
                _ => Stored::As(place),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_original_are_understood() {
        let shapes = |names: &[&str]| -> BTreeMap<String, Vec<usize>> {
            names.iter().map(|name| ((*name).to_owned(), vec![1])).collect()
        };
        let names = Names::of(&shapes(&["vocoder.conv_pre.weight_g", "vocoder.ups.0.weight_v"]));
        assert_eq!(
            (names.translation())("upsampler.3.weight"),
            Stored::Normed {
                length: "vocoder.ups.3.weight_g".into(),
                direction: "vocoder.ups.3.weight_v".into(),
            }
        );
        assert_eq!(
            (names.translation())("upsampler.3.bias"),
            Stored::As("vocoder.ups.3.bias".into())
        );
        let names = Names::of(&shapes(&[
            "conv_pre.parametrizations.weight.original0",
            "upsampler.0.bias",
        ]));
        assert_eq!(
            (names.translation())("resblocks.2.convs1.0.weight"),
            Stored::Normed {
                length: "resblocks.2.convs1.0.parametrizations.weight.original0".into(),
                direction: "resblocks.2.convs1.0.parametrizations.weight.original1".into(),
            }
        );
    }

    #[test]
    fn settings_that_cannot_be_are_refused() {
        for (json, words) in [
            (
                r#"{"upsample_rates": [4]}"#,
                "upsample_kernel_sizes has 4 entries, expected 1",
            ),
            (
                r#"{"upsample_rates": [9, 4, 4, 4]}"#,
                "upsample_kernel_sizes has 8, expected at least the rate 9",
            ),
            (
                r#"{"upsample_initial_channel": 8}"#,
                "expected at least 16 for 4 stages",
            ),
            (r#"{"resblock_kernel_sizes": [3, 7, 2]}"#, "expected odd numbers"),
            (r#"{"model_in_dim": 0}"#, "model_in_dim is 0"),
        ] {
            let config: HifiGanConfig = serde_json::from_str(json).unwrap();
            let line = config.check().unwrap_err().to_string();
            assert!(line.contains(words), "{words}: {line}");
        }
    }
}
