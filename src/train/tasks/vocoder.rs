//! Task `vocoder`: log-mel spectrograms to waveforms, half of them as the mel codec gives them.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use fulgur_datasets::media::{Sound, WavFormat, write_wav};
use fulgur_datasets::scenes::Split;
use fulgur_kernels::spectrum::{LogMel, Stft};
use fulgur_lightnet::config;
use fulgur_lightnet::params::{Frozen, Params, Precision};
use fulgur_tavdiffusion::codec::{MelCodec, Vocoder, VocoderConfig};
use serde::{Deserialize, Serialize};

use super::clips::{ClipOptions, Clips, HostClip, Want, render, samples_tensor};
use super::export::write_part;
use crate::device::compute_dtype;
use crate::train::{Batch, Cursor, Losses, Step, Task, TaskResult};

const WANT: Want = Want {
    frames: false,
    mask: false,
    samples: true,
};
/// Windows of the spectral loss; hops are a quarter of them.
const WINDOWS: [usize; 4] = [256, 512, 1024, 2048];
/// Magnitudes below this are silence.
const FLOOR: f64 = 3e-3;

/// Recipe of the task.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// Clips.
    pub clips: ClipOptions,
    /// Clips in a batch.
    pub batch: usize,
    /// Folder of a trained mel codec, whose output makes half of the inputs; none uses exact spectrograms alone.
    pub mel_codec: Option<PathBuf>,
    /// Held-out scenes of a validation.
    pub validation: usize,
    /// The network.
    pub model: VocoderConfig,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            clips: ClipOptions {
                film: 0.2,
                ..ClipOptions::default()
            },
            batch: 32,
            mel_codec: None,
            validation: 16,
            model: VocoderConfig::default(),
        }
    }
}

/// The task.
pub(super) struct VocoderTask {
    options: Options,
    clips: Clips,
    params: Params,
    vocoder: Vocoder,
    codec: Option<MelCodec>,
    mel: LogMel,
    spectra: Vec<Stft>,
    compute: DType,
}

impl VocoderTask {
    /// Builds the network and opens the data.
    ///
    /// # Errors
    /// Data that is not prepared, or a network that cannot be.
    pub(super) fn open(options: Options, seed: u64, device: &Device) -> TaskResult<Self> {
        let clips = Clips::open(&options.clips)?;
        let params = Params::random(seed, device);
        let vocoder = Vocoder::new(&options.model, &params.builder())?;
        let codec = match &options.mel_codec {
            None => None,
            Some(dir) => {
                let weights = Frozen::open(&dir.join("model.safetensors"), device)?;
                Some(MelCodec::new(
                    &config::read(&dir.join("config.json"))?,
                    true,
                    &weights.builder(),
                )?)
            }
        };
        let spectrum = |window: &usize| Stft::new(*window, *window, window / 4, DType::F32, device);
        Ok(Self {
            vocoder,
            codec,
            mel: LogMel::speech_16k(device)?,
            spectra: WINDOWS.iter().map(spectrum).collect::<Result<_, _>>()?,
            compute: compute_dtype(device),
            options,
            clips,
            params,
        })
    }

    fn through_codec(&self, mel: &Tensor) -> TaskResult<Tensor> {
        let Some(codec) = &self.codec else {
            return Ok(mel.clone());
        };
        let latent = codec.encode_raw(&mel.to_dtype(self.compute)?)?;
        Ok(codec.decode_raw(&latent)?.to_dtype(DType::F32)?.detach())
    }

    /// Waveform of a spectrogram; only the transform at the end needs full precision.
    fn speak(&self, mel: &Tensor) -> TaskResult<Tensor> {
        Ok(self.vocoder.forward(mel)?)
    }

    fn held_out(&self, n: usize) -> TaskResult<(Vec<HostClip>, Tensor)> {
        let clips = render(n, |i| self.clips.scene(Split::HeldOutCombination, i as u64, WANT));
        let samples = samples_tensor(&clips, &self.clips.spec())?.to_device(self.params.device())?;
        Ok((clips, samples))
    }
}

impl Task for VocoderTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        let mut noise = cursor.noise("clips");
        let clips: Vec<_> = (0..self.options.batch)
            .map(|_| self.clips.draw(Split::Train, &mut noise, WANT))
            .collect();
        Ok(Batch::new(clips.len()).with("samples", samples_tensor(&clips, &self.clips.spec())?))
    }

    fn loss(&self, batch: &Batch, _: &Step) -> TaskResult<Losses> {
        let wave = batch.get("samples")?;
        let exact = self.mel.forward(wave)?.detach();
        let half = exact.dim(0)? / 2;
        let mel = if half == 0 {
            self.through_codec(&exact)?
        } else {
            let rest = exact.dim(0)? - half;
            let coded = self.through_codec(&exact.narrow(0, half, rest)?)?;
            Tensor::cat(&[&exact.narrow(0, 0, half)?, &coded], 0)?
        };
        let made = self.speak(&mel)?;
        let bands = (self.mel.forward(&made)? - exact)?.abs()?.mean_all()?;
        let mut logs = bands.zeros_like()?;
        let mut convergence = bands.zeros_like()?;
        for spectrum in &self.spectra {
            let (got, want) = (spectrum.magnitude(&made)?, spectrum.magnitude(wave)?.detach());
            let log = |x: &Tensor| x.maximum(FLOOR)?.log();
            logs = (logs + (log(&got)? - log(&want)?)?.abs()?.mean_all()?)?;
            let distance = ((got - &want)?.sqr()?.sum_all()? + 1e-8)?.sqrt()?;
            convergence = (convergence + (distance / (want.sqr()?.sum_all()? + 1e-8)?.sqrt()?)?)?;
        }
        let total = (((&bands * 0.5)? + (&logs * 0.25)?)? + (&convergence * 0.25)?)?;
        Ok(Losses {
            total,
            parts: vec![("bands", bands), ("logs", logs), ("convergence", convergence)],
        })
    }

    fn validate(&self) -> TaskResult<Vec<(String, f64)>> {
        let (_, wave) = self.held_out(self.options.validation)?;
        let exact = self.mel.forward(&wave)?;
        let error = |mel: &Tensor| -> TaskResult<f64> {
            let made = self.mel.forward(&self.speak(mel)?)?;
            let error = (made - &exact)?.abs()?.mean_all()?.to_scalar::<f32>()?;
            Ok(f64::from(error) * self.mel.scale())
        };
        Ok(vec![
            ("log_mel_l1".to_owned(), error(&exact)?),
            (
                "log_mel_l1_coded".to_owned(),
                error(&self.through_codec(&exact)?)?,
            ),
        ])
    }

    fn sample(&self, folder: &Path, step: u64) -> TaskResult<Vec<PathBuf>> {
        let (clips, wave) = self.held_out(4)?;
        let made = self.speak(&self.through_codec(&self.mel.forward(&wave)?)?)?;
        let made = made
            .clamp(-1f32, 1f32)?
            .to_device(&Device::Cpu)?
            .to_vec2::<f32>()?;
        let rate = self.clips.spec().sample_rate;
        // Each real sound is followed by its copy, so that one file is enough to compare by ear.
        let joined = clips
            .iter()
            .zip(made)
            .flat_map(|(clip, made)| [clip.samples.clone(), made].concat());
        let path = folder.join(format!("vocoder-{step:06}.wav"));
        write_wav(&path, &Sound::new(joined.collect(), 1, rate)?, WavFormat::Int16)?;
        Ok(vec![path])
    }

    fn export(&self, folder: &Path) -> TaskResult<()> {
        write_part(folder, &self.options.model, &self.params, None, Precision::F16)
    }
}
