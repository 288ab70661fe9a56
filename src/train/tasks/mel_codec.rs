//! Task `mel-codec`: log-mel spectrograms through a latent 8 times smaller and back.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use fulgur_datasets::media::{Picture, write_png};
use fulgur_datasets::scenes::Split;
use fulgur_kernels::spectrum::LogMel;
use fulgur_lightnet::params::{Params, Precision};
use fulgur_tavdiffusion::codec::{LatentNorm, MelCodec, MelCodecConfig};
use serde::{Deserialize, Serialize};

use super::clips::{ClipOptions, Clips, HostClip, Want, render, samples_tensor};
use super::export::write_part;
use super::video_codec::difference;
use crate::device::compute_dtype;
use crate::train::{Batch, Cursor, Losses, Step, Task, TaskResult};

const WANT: Want = Want {
    frames: false,
    mask: false,
    samples: true,
};
/// Clips that the statistics of the latents are measured on.
const MEASURED: usize = 256;

/// Recipe of the task.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// Clips.
    pub clips: ClipOptions,
    /// Clips in a batch.
    pub batch: usize,
    /// Weight of the differences between neighbouring values in time and frequency.
    pub gradient_weight: f64,
    /// Weight of the penalty on the latents' statistics.
    pub latent_weight: f64,
    /// Standard deviation of the noise on the latents.
    pub latent_noise: f32,
    /// Held-out scenes of a validation.
    pub validation: usize,
    /// The network.
    pub model: MelCodecConfig,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            clips: ClipOptions {
                film: 0.2,
                ..ClipOptions::default()
            },
            batch: 64,
            gradient_weight: 0.3,
            latent_weight: 0.01,
            latent_noise: 0.1,
            validation: 32,
            model: MelCodecConfig::default(),
        }
    }
}

/// The task.
pub(super) struct MelCodecTask {
    options: Options,
    clips: Clips,
    params: Params,
    codec: MelCodec,
    mel: LogMel,
    compute: DType,
}

impl MelCodecTask {
    /// Builds the network and opens the data.
    ///
    /// # Errors
    /// Data that is not prepared, or a network that cannot be.
    pub(super) fn open(options: Options, seed: u64, device: &Device) -> TaskResult<Self> {
        let clips = Clips::open(&options.clips)?;
        let params = Params::random(seed, device);
        let codec = MelCodec::new(&options.model, true, &params.builder())?;
        let mel = LogMel::speech_16k(device)?;
        Ok(Self {
            compute: compute_dtype(device),
            options,
            clips,
            params,
            codec,
            mel,
        })
    }

    fn mel_of(&self, clips: &[HostClip]) -> TaskResult<Tensor> {
        let samples = samples_tensor(clips, &self.clips.spec())?.to_device(self.params.device())?;
        Ok(self.mel.forward(&samples)?)
    }

    fn reconstruct(&self, mel: &Tensor) -> TaskResult<Tensor> {
        let raw = self.codec.encode_raw(&mel.to_dtype(self.compute)?)?;
        Ok(self.codec.decode_raw(&raw)?.to_dtype(DType::F32)?)
    }

    fn held_out(&self, n: usize) -> Vec<HostClip> {
        render(n, |i| self.clips.scene(Split::HeldOutCombination, i as u64, WANT))
    }
}

impl Task for MelCodecTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        let spec = self.clips.spec();
        let mut noise = cursor.noise("clips");
        let clips: Vec<_> = (0..self.options.batch)
            .map(|_| self.clips.draw(Split::Train, &mut noise, WANT))
            .collect();
        let [frames, bands] = self.codec.grid(self.mel.frames(spec.samples()))?;
        let shape = (clips.len(), frames, bands, self.options.model.latent_channels);
        let latent_noise = cursor
            .noise("latent")
            .normals(shape.0 * shape.1 * shape.2 * shape.3);
        Ok(Batch::new(clips.len())
            .with("samples", samples_tensor(&clips, &spec)?)
            .with("noise", Tensor::from_vec(latent_noise, shape, &Device::Cpu)?))
    }

    fn loss(&self, batch: &Batch, _: &Step) -> TaskResult<Losses> {
        let options = &self.options;
        let mel = self.mel.forward(batch.get("samples")?)?.detach();
        let raw = self.codec.encode_raw(&mel.to_dtype(self.compute)?)?;
        let noise = (batch.get("noise")?.to_dtype(self.compute)? * f64::from(options.latent_noise))?;
        let error = (self.codec.decode_raw(&(&raw + noise)?)?.to_dtype(DType::F32)? - mel)?;
        let level = error.abs()?.mean_all()?;
        let edges = (difference(&error, 1)? + difference(&error, 2)?)?;
        let statistics = LatentNorm::penalty(&raw)?;
        let total =
            ((&level + (&edges * options.gradient_weight)?)? + (&statistics * options.latent_weight)?)?;
        Ok(Losses {
            total,
            parts: vec![("level", level), ("edges", edges), ("statistics", statistics)],
        })
    }

    fn validate(&self) -> TaskResult<Vec<(String, f64)>> {
        let mel = self.mel_of(&self.held_out(self.options.validation))?;
        let error = (self.reconstruct(&mel)? - &mel)?
            .abs()?
            .mean_all()?
            .to_scalar::<f32>()?;
        let mut figures = vec![("log_mel_l1".to_owned(), f64::from(error) * self.mel.scale())];
        let film = self.clips.held_out_film(WANT);
        if !film.is_empty() {
            let mel = self.mel_of(&film)?;
            let error = (self.reconstruct(&mel)? - &mel)?
                .abs()?
                .mean_all()?
                .to_scalar::<f32>()?;
            figures.push(("log_mel_l1_film".to_owned(), f64::from(error) * self.mel.scale()));
        }
        let (mean, std) = LatentNorm::measure(&mel.flatten_all()?.unsqueeze(1)?)?;
        figures.push(("mel_mean".to_owned(), f64::from(mean.to_vec1::<f32>()?[0])));
        figures.push(("mel_std".to_owned(), f64::from(std.to_vec1::<f32>()?[0])));
        Ok(figures)
    }

    fn sample(&self, folder: &Path, step: u64) -> TaskResult<Vec<PathBuf>> {
        let mel = self.mel_of(&self.held_out(4))?;
        let both = Tensor::cat(&[&mel, &self.reconstruct(&mel)?], 2)?;
        let path = folder.join(format!("mel-{step:06}.png"));
        write_png(&path, &spectrograms(&both)?)?;
        Ok(vec![path])
    }

    fn export(&self, folder: &Path) -> TaskResult<()> {
        let clips = render(MEASURED, |i| {
            let mut noise = Cursor {
                seed: self.options.clips.seed,
                index: i as u64,
            }
            .noise("statistics");
            self.clips.draw(Split::Train, &mut noise, WANT)
        });
        let raw = self
            .codec
            .encode_raw(&self.mel_of(&clips)?.to_dtype(self.compute)?)?
            .detach();
        let statistics = LatentNorm::measure(&raw)?;
        write_part(
            folder,
            &self.options.model,
            &self.params,
            Some(statistics),
            Precision::F16,
        )
    }
}

/// Standardised log-mels `[B, T, bands]` as grey pictures below each other, low bands at the bottom.
pub(super) fn spectrograms(mel: &Tensor) -> TaskResult<Picture> {
    let (batch, frames, bands) = mel.dims3()?;
    let values = mel
        .to_dtype(DType::F32)?
        .to_device(&Device::Cpu)?
        .to_vec3::<f32>()?;
    let mut pixels = Vec::with_capacity(batch * bands * frames * 3);
    for clip in &values {
        for band in (0..bands).rev() {
            for frame in clip {
                pixels.extend([((frame[band] + 1.2) / 4.2 * 255.0).clamp(0.0, 255.0) as u8; 3]);
            }
        }
    }
    Ok(Picture::new(pixels, frames, bands * batch, 3)?)
}
