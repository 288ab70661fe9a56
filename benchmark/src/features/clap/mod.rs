//! CLAP: sounds and texts in one space (Wu et al., arXiv 2211.06687), with the sound tower HTSAT without fusion and RoBERTa for
//! texts.
//!
//! Reference: `ClapModel` and `ClapFeatureExtractor` of Hugging Face transformers; folders that they write load as they are.
//!
//! ```text
//! sound, 48 kHz, repeated to 10 s -> |STFT|^2 1024/480 -> 64 bands -> dB -> HTSAT -> W2 relu(W1 x) -> unit vector
//! text -> RoBERTa -> tanh(W first token) -> W2 relu(W1 x) -> unit vector
//! ```
//!
//! Of a sound of more than ten seconds the reference takes ten at random; here they are the first ten.

mod tower;

use std::path::Path;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::{Activation, Module, VarBuilder};
use fulgur_lightnet::config;
use fulgur_lightnet::encoders::bert::{Bert, BertConfig};
use fulgur_lightnet::params::folder::Weights;
use serde::Deserialize;
use tokenizers::{Tokenizer, TruncationParams};

use super::layers::Dense;
use super::spectrogram::{Bands, Padding, Spectrogram, decibels};
use super::{FeatureError, absent};
pub use tower::{AudioConfig, AudioTower, Sides};

/// `model_type` of the folders.
pub const MODEL_TYPE: &str = "clap";
/// Largest `tokenizer.json` that is read.
const LARGEST_TOKENIZER: u64 = 64 << 20;

/// Samples that sounds are brought to, at most: some minutes.
const MOST_SAMPLES: usize = 1 << 24;

/// `config.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct ClapConfig {
    /// The text tower.
    pub text_config: TextConfig,
    /// The sound tower.
    #[serde(default)]
    pub audio_config: AudioConfig,
}

/// `text_config`: that of a BERT, and what RoBERTa adds.
#[derive(Clone, Debug, Deserialize)]
pub struct TextConfig {
    /// What both have.
    #[serde(flatten)]
    pub bert: BertConfig,
    /// Id of padding; the first token has the position behind it.
    #[serde(default = "default_pad")]
    pub pad_token_id: usize,
    /// Activation of the projection.
    #[serde(default = "default_activation")]
    pub projection_hidden_act: Activation,
}

fn default_pad() -> usize {
    1
}

fn default_activation() -> Activation {
    Activation::Relu
}

/// `preprocessor_config.json`: how sounds become spectrograms. What it does not name is as in the published model.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct FrontEnd {
    /// Bands.
    pub feature_size: usize,
    /// Samples a second.
    pub sampling_rate: u32,
    /// Samples from frame to frame.
    pub hop_length: usize,
    /// Samples of a frame.
    pub fft_window_size: usize,
    /// Seconds that a sound is brought to.
    pub max_length_s: usize,
    /// Lower edge of the lowest band, in Hz.
    pub frequency_min: f64,
    /// Upper edge of the highest band, in Hz.
    pub frequency_max: f64,
}

impl Default for FrontEnd {
    fn default() -> Self {
        Self {
            feature_size: 64,
            sampling_rate: 48_000,
            hop_length: 480,
            fft_window_size: 1024,
            max_length_s: 10,
            frequency_min: 50.0,
            frequency_max: 14_000.0,
        }
    }
}

impl FrontEnd {
    fn check(&self) -> candle_core::Result<()> {
        let sizes = [self.feature_size, self.hop_length, self.max_length_s];
        let small = sizes.iter().all(|size| (1..=1 << 14).contains(size));
        let window = (2..=1 << 16).contains(&self.fft_window_size) && self.fft_window_size.is_multiple_of(2);
        let rate = (1_000..=768_000).contains(&self.sampling_rate);
        let top = f64::from(self.sampling_rate) / 2.0;
        let range =
            self.frequency_min >= 0.0 && self.frequency_min < self.frequency_max && self.frequency_max <= top;
        let samples = self.max_length_s.saturating_mul(self.sampling_rate as usize);
        if small && window && rate && range && samples <= MOST_SAMPLES {
            return Ok(());
        }
        candle_core::bail!("found {self:?}, expected sizes of a sound's spectrogram")
    }

    /// Spectrogram `[1, 1, T, bands]` of a waveform at its rate: cut at its length, or repeated as often as it fits whole
    /// and padded with zeros.
    pub fn features(&self, wave: &[f32]) -> candle_core::Result<Tensor> {
        if wave.is_empty() {
            candle_core::bail!("a sound of 0 samples, expected at least 1");
        }
        let length = self.max_length_s * self.sampling_rate as usize;
        let mut samples = wave[..wave.len().min(length)].to_vec();
        samples = samples.repeat(length / samples.len());
        samples.resize(length, 0.0);
        let spectrogram = Spectrogram::new(
            self.fft_window_size,
            self.fft_window_size,
            self.hop_length,
            Padding::Mirror,
        );
        let range = [self.frequency_min, self.frequency_max];
        let bands = Bands::slaney(
            f64::from(self.sampling_rate),
            self.fft_window_size,
            self.feature_size,
            range,
        );
        let values = bands.apply(&spectrogram.power(&samples), decibels);
        let values: Vec<f32> = values.into_iter().map(|value| value as f32).collect();
        let frames = values.len() / self.feature_size;
        Tensor::from_vec(values, (1, 1, frames, self.feature_size), &Device::Cpu)
    }
}

/// Two layers into the common space.
#[derive(Clone, Debug)]
struct Projection {
    inner: Dense,
    outer: Dense,
    activation: Activation,
}

impl Projection {
    fn new(input: usize, activation: Activation, vb: &VarBuilder) -> candle_core::Result<Self> {
        // The width of the space is not in every config.json.
        let output = vb.get_unchecked("linear2.weight")?.dims2()?.0;
        Ok(Self {
            inner: Dense::new(input, output, true, &vb.pp("linear1"))?,
            outer: Dense::new(output, output, true, &vb.pp("linear2"))?,
            activation,
        })
    }

    /// Unit vectors.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = self
            .outer
            .forward(&self.activation.forward(&self.inner.forward(x)?)?)?;
        x.broadcast_div(&x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)
    }
}

/// Both towers.
pub struct Clap {
    text: Bert,
    pooler: Dense,
    pad: usize,
    text_projection: Projection,
    audio: AudioTower,
    audio_projection: Projection,
    device: Device,
}

impl std::fmt::Debug for Clap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Clap({:?})", self.audio_projection)
    }
}

impl Clap {
    /// Takes the tensors of `ClapModel` from `vb`.
    ///
    /// # Errors
    /// A configuration that is not implemented, a tensor that is missing or has another shape.
    pub fn new(config: &ClapConfig, vb: &VarBuilder) -> Result<Self, FeatureError> {
        config.audio_config.check()?;
        let text = Bert::new(&config.text_config.bert, &vb.pp("text_model"))?;
        let width = text.width();
        let audio = &config.audio_config;
        Ok(Self {
            pooler: Dense::new(width, width, true, &vb.pp("text_model.pooler.dense"))?,
            pad: config.text_config.pad_token_id,
            text_projection: Projection::new(
                width,
                config.text_config.projection_hidden_act,
                &vb.pp("text_projection"),
            )?,
            audio: AudioTower::new(audio, &vb.pp("audio_model.audio_encoder"))?,
            audio_projection: Projection::new(
                audio.hidden_size,
                audio.projection_hidden_act,
                &vb.pp("audio_projection"),
            )?,
            text,
            device: vb.device().clone(),
        })
    }

    /// Reads `config.json` and the weights of `dir`.
    ///
    /// # Errors
    /// A file that is missing or broken, a configuration that is not implemented, weights that do not fit it.
    pub fn load(dir: &Path, device: &Device) -> Result<Self, FeatureError> {
        let config: ClapConfig = config::read_checked(&dir.join("config.json"), |config: &ClapConfig| {
            config.audio_config.check()
        })?;
        let weights = Weights::find(dir)?.ok_or_else(|| absent(dir))?;
        Self::new(&config, &weights.load(device)?.builder())
    }

    /// Most tokens of a text.
    pub fn longest_text(&self) -> usize {
        self.text.longest().saturating_sub(self.pad + 1)
    }

    /// Unit vectors `[B, d]` of spectrograms `[B, 1, T, bands]` of [`FrontEnd::features`].
    ///
    /// # Errors
    /// Another shape, or arithmetic that fails.
    pub fn audio(&self, features: &Tensor) -> candle_core::Result<Tensor> {
        self.audio_projection.forward(&self.audio.forward(features)?)
    }

    /// Unit vectors `[B, d]` of `input_ids` `[B, N]`; `attention_mask` is 1 on tokens that count.
    ///
    /// # Errors
    /// No tokens or more than [`Self::longest_text`], an id outside the vocabulary, a mask of another shape.
    pub fn text(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<Tensor, FeatureError> {
        let rows = input_ids.to_dtype(DType::I64)?.to_vec2::<i64>()?;
        let pad = self.pad;
        // Positions count the tokens that are no padding, from behind the id of padding on.
        let places = rows.iter().flat_map(|row| {
            let mut count = 0;
            row.iter().map(move |&id| {
                if usize::try_from(id).is_ok_and(|id| id == pad) {
                    pad as u32
                } else {
                    count += 1;
                    (pad + count) as u32
                }
            })
        });
        let places: Vec<u32> = places.collect();
        let places = Tensor::from_vec(places, input_ids.dims2()?, input_ids.device())?;
        let states = self.text.forward_at(input_ids, &places, attention_mask)?;
        let first = states.narrow(1, 0, 1)?.squeeze(1)?;
        Ok(self
            .text_projection
            .forward(&self.pooler.forward(&first)?.tanh()?)?)
    }

    /// Where the network computes.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

/// Both towers with their front ends, from a folder as transformers writes it.
#[derive(Debug)]
pub struct ClapEncoder {
    clap: Clap,
    front_end: FrontEnd,
    tokenizer: Tokenizer,
}

impl ClapEncoder {
    /// Reads `config.json`, the weights, `tokenizer.json` and, where there is one, `preprocessor_config.json` of `dir`.
    ///
    /// # Errors
    /// A file that is missing or broken.
    pub fn load(dir: &Path, device: &Device) -> Result<Self, FeatureError> {
        let clap = Clap::load(dir, device)?;
        let path = dir.join("preprocessor_config.json");
        let front_end = if path.is_file() {
            config::read_checked(&path, FrontEnd::check)?
        } else {
            FrontEnd::default()
        };
        let path = dir.join("tokenizer.json");
        let refuse = |reason: String| FeatureError::Tokenizer {
            path: path.clone(),
            reason,
        };
        let bytes = fulgur_lightnet::params::file::read_bounded(&path, LARGEST_TOKENIZER)
            .map_err(|error| refuse(plain(&error)))?;
        let mut tokenizer = Tokenizer::from_bytes(&bytes).map_err(|error| refuse(error.to_string()))?;
        let truncation = TruncationParams {
            max_length: clap.longest_text(),
            ..TruncationParams::default()
        };
        tokenizer
            .with_truncation(Some(truncation))
            .map_err(|error| refuse(error.to_string()))?;
        tokenizer.with_padding(None);
        Ok(Self {
            clap,
            front_end,
            tokenizer,
        })
    }

    /// Samples a second of the waveforms of [`Self::sound`].
    pub fn rate(&self) -> u32 {
        self.front_end.sampling_rate
    }

    /// The unit vector of a waveform at [`Self::rate`].
    ///
    /// # Errors
    /// No samples, or arithmetic that fails.
    pub fn sound(&self, wave: &[f32]) -> Result<Vec<f32>, FeatureError> {
        let features = self.front_end.features(wave)?.to_device(self.clap.device())?;
        Ok(self.clap.audio(&features)?.squeeze(0)?.to_vec1()?)
    }

    /// The unit vector of a text; one that is too long is cut.
    ///
    /// # Errors
    /// The tokenizer refuses it, or arithmetic fails.
    pub fn text(&self, text: &str) -> Result<Vec<f32>, FeatureError> {
        let encoding = self
            .tokenizer
            .encode_fast(text, true)
            .map_err(|error| FeatureError::Text(error.to_string()))?;
        let ids = encoding.get_ids().to_vec();
        let shape = (1, ids.len());
        let ids = Tensor::from_vec(ids, shape, self.clap.device())?;
        Ok(self.clap.text(&ids, None)?.squeeze(0)?.to_vec1()?)
    }
}

/// What an error of a file says, without the file.
fn plain(error: &fulgur_lightnet::params::ParamsError) -> String {
    let words = error.to_string();
    words
        .split_once(": ")
        .map_or(words.clone(), |(_, rest)| rest.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::testing::{golden, golden_weights, relative_rms, thinned, values};

    const CONFIG: &str = include_str!("../../../../tests/golden/clap.json");

    fn network() -> (Clap, std::collections::BTreeMap<String, Tensor>) {
        let (weights, outputs) = golden_weights(&golden("clap"));
        let config: ClapConfig = serde_json::from_str(CONFIG).unwrap();
        let vb = VarBuilder::from_tensors(weights.into_iter().collect(), DType::F32, &Device::Cpu);
        (Clap::new(&config, &vb).unwrap(), outputs)
    }

    #[test]
    fn equals_transformers() {
        let (clap, outputs) = network();
        for name in ["short", "whole"] {
            let found = clap.audio(&outputs[&format!("input_features.{name}")]).unwrap();
            let apart = relative_rms(&found, &outputs[&format!("audio_embeds.{name}")]);
            assert!(apart < 2e-5, "{name}: {apart}");
        }
        let found = clap
            .text(&outputs["input_ids"], Some(&outputs["attention_mask"]))
            .unwrap();
        let apart = relative_rms(&found, &outputs["text_embeds"]);
        assert!(apart < 2e-5, "text: {apart}");
    }

    #[test]
    fn sounds_become_the_spectrograms_of_transformers() {
        let outputs = golden("clap_features");
        let front_end = FrontEnd {
            max_length_s: 1,
            ..FrontEnd::default()
        };
        for name in ["short", "long"] {
            let wave = values(&outputs[&format!("wave.{name}")]);
            let found = front_end.features(&wave).unwrap();
            assert_eq!(found.dims(), [1, 1, 101, 64]);
            let apart = relative_rms(&thinned(&found, 3), &outputs[&format!("features.{name}")]);
            assert!(apart < 1e-5, "{name}: {apart}");
        }
        assert!(front_end.features(&[]).is_err());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (clap, outputs) = network();
        let wide = Tensor::zeros((1, 1, 10, 9), DType::F32, &Device::Cpu).unwrap();
        let line = clap.audio(&wide).unwrap_err().to_string();
        assert!(line.starts_with("input_features: found [1, 1, 10, 9]"), "{line}");
        let tokens = clap.longest_text() + 1;
        let ids = Tensor::full(5u32, (1, tokens), &Device::Cpu).unwrap();
        assert!(clap.text(&ids, None).is_err());
        let (mut weights, _) = golden_weights(&golden("clap"));
        weights.remove("audio_model.audio_encoder.layers.1.blocks.0.attention.self.key.bias");
        let config: ClapConfig = serde_json::from_str(CONFIG).unwrap();
        let vb = VarBuilder::from_tensors(weights.into_iter().collect(), DType::F32, &Device::Cpu);
        let line = Clap::new(&config, &vb).unwrap_err().to_string();
        assert!(
            line.contains("layers.1.blocks.0.attention.self.key.bias"),
            "{line}"
        );
        assert_eq!(outputs["text_embeds"].dims(), [3, 12]);
    }
}
