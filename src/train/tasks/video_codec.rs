//! Task `video-codec`: frames through a latent 48 times smaller and back.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use fulgur_datasets::media::{Picture, write_png};
use fulgur_datasets::scenes::Split;
use fulgur_lightnet::params::{Params, Precision};
use fulgur_tavdiffusion::codec::{LatentNorm, VideoCodec, VideoCodecConfig};
use serde::{Deserialize, Serialize};

use super::clips::{ClipOptions, Clips, HostClip, Want, frames_tensor, mask_tensor, render, to_unit};
use super::export::write_part;
use super::mean::mean;
use crate::device::compute_dtype;
use crate::train::{Batch, Cursor, Losses, Step, Task, TaskResult};

const WANT: Want = Want {
    frames: true,
    mask: true,
    samples: false,
};
/// Clips that are decoded at a time where no gradient is needed.
const CHUNK: usize = 8;
/// Clips that the statistics of the latents are measured on.
const MEASURED: usize = 128;
/// Clips of the pool that are rendered and moved to the device at a time.
const POOL_CHUNK: usize = 64;

/// Recipe of the task.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// Clips.
    pub clips: ClipOptions,
    /// Clips in a batch.
    pub batch: usize,
    /// Clips that are rendered once and kept on the device: a GPU learns faster than processors render. 0 renders every
    /// batch anew.
    pub pool: usize,
    /// Weight of covered pixels over the others.
    pub cutout_weight: f64,
    /// Weight of the differences between neighbouring pixels.
    pub gradient_weight: f64,
    /// Weight of the differences between neighbouring frames.
    pub motion_weight: f64,
    /// Weight of the penalty on the latents' statistics.
    pub latent_weight: f64,
    /// Standard deviation of the noise on the latents: what the denoiser leaves must not show.
    pub latent_noise: f32,
    /// Held-out scenes of a validation.
    pub validation: usize,
    /// The network.
    pub model: VideoCodecConfig,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            clips: ClipOptions {
                film: 0.5,
                ..ClipOptions::default()
            },
            batch: 32,
            pool: 0,
            cutout_weight: 3.0,
            gradient_weight: 0.5,
            motion_weight: 0.25,
            latent_weight: 0.01,
            latent_noise: 0.1,
            validation: 16,
            model: VideoCodecConfig::default(),
        }
    }
}

/// The task.
pub(super) struct VideoCodecTask {
    options: Options,
    clips: Clips,
    params: Params,
    codec: VideoCodec,
    compute: DType,
    /// Frames and coverage of the pool on the device, as bytes.
    pool: Option<[Tensor; 2]>,
}

impl VideoCodecTask {
    /// Builds the network and opens the data.
    ///
    /// # Errors
    /// Data that is not prepared, or a network that cannot be.
    pub(super) fn open(options: Options, seed: u64, device: &Device) -> TaskResult<Self> {
        let clips = Clips::open(&options.clips)?;
        let params = Params::random(seed, device);
        let codec = VideoCodec::new(&options.model, true, &params.builder())?;
        let spec = clips.spec();
        codec.grid(spec.frames(), spec.height, spec.width)?;
        let pool = match options.pool {
            0 => None,
            size => Some(fill(&clips, size, device)?),
        };
        Ok(Self {
            pool,
            compute: compute_dtype(device),
            options,
            clips,
            params,
            codec,
        })
    }

    /// Decoded bytes of clips, `[F, H, W, 3]` each.
    fn reconstruct(&self, clips: &[HostClip]) -> TaskResult<Vec<Vec<u8>>> {
        let mut decoded = Vec::with_capacity(clips.len());
        for chunk in clips.chunks(CHUNK) {
            let frames = frames_tensor(chunk, &self.clips.spec())?.to_device(self.params.device())?;
            let latent = self
                .codec
                .encode_raw(&to_unit(&frames)?.to_dtype(self.compute)?)?;
            let frames = self
                .codec
                .decode_raw(&latent)?
                .to_dtype(DType::F32)?
                .affine(127.5, 127.5)?;
            let bytes = frames.clamp(0f32, 255f32)?.round()?.to_dtype(DType::U8)?;
            for i in 0..chunk.len() {
                decoded.push(bytes.get(i)?.flatten_all()?.to_vec1()?);
            }
        }
        Ok(decoded)
    }

    /// Frames and coverage of a batch.
    fn pictures(&self, batch: &Batch) -> TaskResult<[Tensor; 2]> {
        Ok(match &self.pool {
            None => [batch.get("frames")?.clone(), batch.get("mask")?.clone()],
            Some([frames, mask]) => {
                let chosen = batch.get("chosen")?;
                [frames.index_select(chosen, 0)?, mask.index_select(chosen, 0)?]
            }
        })
    }

    fn held_out(&self, n: usize) -> Vec<HostClip> {
        render(n, |i| self.clips.scene(Split::HeldOutCombination, i as u64, WANT))
    }
}

impl Task for VideoCodecTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        let (spec, n) = (self.clips.spec(), self.options.batch);
        let [t, h, w] = self.codec.grid(spec.frames(), spec.height, spec.width)?;
        let shape = vec![n, t, h, w, self.options.model.latent_channels];
        let latent_noise = cursor.noise("latent").normals(shape.iter().product());
        let batch = Batch::new(n).with("noise", Tensor::from_vec(latent_noise, shape, &Device::Cpu)?);
        if let Some([frames, _]) = &self.pool {
            let chosen = cursor.shuffled(frames.dim(0)?, n);
            let chosen: Vec<u32> = chosen.into_iter().map(|i| i as u32).collect();
            return Ok(batch.with("chosen", Tensor::from_vec(chosen, n, &Device::Cpu)?));
        }
        let mut noise = cursor.noise("clips");
        let clips: Vec<_> = (0..n)
            .map(|_| self.clips.draw(Split::Train, &mut noise, WANT))
            .collect();
        Ok(batch
            .with("frames", frames_tensor(&clips, &spec)?)
            .with("mask", mask_tensor(&clips, &spec)?))
    }

    fn loss(&self, batch: &Batch, _: &Step) -> TaskResult<Losses> {
        let options = &self.options;
        let [frames, mask] = self.pictures(batch)?;
        let frames = to_unit(&frames)?;
        let raw = self.codec.encode_raw(&frames.to_dtype(self.compute)?)?;
        let noise = (batch.get("noise")?.to_dtype(self.compute)? * f64::from(options.latent_noise))?;
        let decoded = self.codec.decode_raw(&(&raw + noise)?)?.to_dtype(DType::F32)?;
        let error = (decoded - frames)?;
        let extra = (options.cutout_weight - 1.0) / 255.0;
        let weight = mask.to_dtype(DType::F32)?.affine(extra, 1.0)?;
        let pixels = mean(&error.abs()?.broadcast_mul(&weight)?)?;
        let edges = ((difference(&error, 2)? + difference(&error, 3)?)? * 0.5)?;
        let motion = difference(&error, 1)?;
        let statistics = LatentNorm::penalty(&raw)?;
        let total = (((&pixels + (&edges * options.gradient_weight)?)?
            + (&motion * options.motion_weight)?)?
            + (&statistics * options.latent_weight)?)?;
        let parts = vec![
            ("pixels", pixels),
            ("edges", edges),
            ("motion", motion),
            ("statistics", statistics),
        ];
        Ok(Losses { total, parts })
    }

    fn validate(&self) -> TaskResult<Vec<(String, f64)>> {
        let scenes = self.held_out(self.options.validation);
        let film = self.clips.held_out_film(WANT);
        let mut figures = Vec::new();
        let (whole, inside) = self.quality(&scenes)?;
        figures.push(("negative_psnr_cutout_db".to_owned(), -inside));
        figures.push(("psnr_db".to_owned(), whole));
        if !film.is_empty() {
            figures.push(("psnr_film_db".to_owned(), self.quality(&film)?.0));
        }
        Ok(figures)
    }

    fn sample(&self, folder: &Path, step: u64) -> TaskResult<Vec<PathBuf>> {
        let mut clips = self.held_out(4);
        clips.extend(self.clips.held_out_film(WANT).into_iter().step_by(4));
        let decoded = self.reconstruct(&clips)?;
        let spec = self.clips.spec();
        let rows: Vec<&[u8]> = clips
            .iter()
            .zip(&decoded)
            .flat_map(|(clip, made)| [clip.frames.as_slice(), made])
            .collect();
        let path = folder.join(format!("codec-{step:06}.png"));
        write_png(&path, &filmstrips(&rows, spec.width, spec.height)?)?;
        Ok(vec![path])
    }

    fn export(&self, folder: &Path) -> TaskResult<()> {
        let mut raw = Vec::new();
        let clips = render(MEASURED, |i| {
            let mut noise = Cursor {
                seed: self.options.clips.seed,
                index: i as u64,
            }
            .noise("statistics");
            self.clips.draw(Split::Train, &mut noise, WANT)
        });
        for chunk in clips.chunks(CHUNK) {
            let frames = frames_tensor(chunk, &self.clips.spec())?.to_device(self.params.device())?;
            raw.push(
                self.codec
                    .encode_raw(&to_unit(&frames)?.to_dtype(self.compute)?)?
                    .detach(),
            );
        }
        let statistics = LatentNorm::measure(&Tensor::cat(&raw, 0)?)?;
        write_part(
            folder,
            &self.options.model,
            &self.params,
            Some(statistics),
            Precision::F16,
        )
    }
}

impl VideoCodecTask {
    /// PSNR in decibels over all pixels, and over the boxes of the things.
    fn quality(&self, clips: &[HostClip]) -> TaskResult<(f64, f64)> {
        let spec = self.clips.spec();
        let decoded = self.reconstruct(clips)?;
        let (mut whole, mut inside) = (SquaredError::default(), SquaredError::default());
        for (clip, made) in clips.iter().zip(&decoded) {
            whole.add(clip.frames.iter().zip(made));
            let actors = clip.scene.iter().flat_map(|scene| &scene.actors);
            for (frame, area) in actors.flat_map(|actor| actor.boxes.iter().enumerate()) {
                let Some(area) = area else { continue };
                for y in area.y0..area.y1 {
                    let row = ((frame * spec.height + y) * spec.width) * 3;
                    let line = row + area.x0 * 3..row + area.x1 * 3;
                    inside.add(clip.frames[line.clone()].iter().zip(&made[line]));
                }
            }
        }
        Ok((whole.psnr_db(), inside.psnr_db()))
    }
}

/// Renders the pool: clip i is the first that the random numbers of place i draw.
fn fill(clips: &Clips, size: usize, device: &Device) -> TaskResult<[Tensor; 2]> {
    let spec = clips.spec();
    let (mut frames, mut mask) = (Vec::new(), Vec::new());
    for start in (0..size).step_by(POOL_CHUNK) {
        let rendered = render(POOL_CHUNK.min(size - start), |i| {
            let place = Cursor {
                seed: 0,
                index: (start + i) as u64,
            };
            clips.draw(Split::Train, &mut place.noise("pool"), WANT)
        });
        frames.push(frames_tensor(&rendered, &spec)?.to_device(device)?);
        mask.push(mask_tensor(&rendered, &spec)?.to_device(device)?);
    }
    Ok([Tensor::cat(&frames, 0)?, Tensor::cat(&mask, 0)?])
}

/// Squares of the differences of bytes.
#[derive(Default)]
pub(super) struct SquaredError {
    sum: f64,
    count: f64,
}

impl SquaredError {
    pub(super) fn add<'a>(&mut self, pairs: impl Iterator<Item = (&'a u8, &'a u8)>) {
        for (&a, &b) in pairs {
            let d = f64::from(a) - f64::from(b);
            self.sum += d * d;
            self.count += 1.0;
        }
    }

    pub(super) fn psnr_db(&self) -> f64 {
        10.0 * (255.0 * 255.0 * self.count / self.sum.max(1e-9)).log10()
    }
}

/// Mean absolute difference between neighbours along dimension `dim`.
pub(super) fn difference(x: &Tensor, dim: usize) -> candle_core::Result<Tensor> {
    let n = x.dim(dim)?;
    mean(&(x.narrow(dim, 1, n - 1)? - x.narrow(dim, 0, n - 1)?)?.abs()?)
}

/// Every fourth frame of each clip in a row, one clip a row.
pub(super) fn filmstrips(clips: &[&[u8]], width: usize, height: usize) -> TaskResult<Picture> {
    const EVERY: usize = 4;
    let frame = width * height * 3;
    let columns = clips
        .iter()
        .map(|clip| (clip.len() / frame).div_ceil(EVERY))
        .max()
        .unwrap_or(0);
    let stride = columns * width * 3;
    let mut pixels = vec![0; stride * height * clips.len()];
    for (row, clip) in clips.iter().enumerate() {
        for (column, picture) in clip.chunks_exact(frame).step_by(EVERY).enumerate() {
            for (y, line) in picture.chunks_exact(width * 3).enumerate() {
                let at = (row * height + y) * stride + column * width * 3;
                pixels[at..at + width * 3].copy_from_slice(line);
            }
        }
    }
    Ok(Picture::new(pixels, columns * width, height * clips.len(), 3)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn psnr_of_a_known_error() {
        let mut error = SquaredError::default();
        error.add([10u8, 20, 30].iter().zip(&[20u8, 30, 20]));
        assert!((error.psnr_db() - 28.1308).abs() < 1e-3, "{}", error.psnr_db());
    }

    #[test]
    fn filmstrips_place_frames_in_order() -> TaskResult<()> {
        // Two clips of five 1x1 frames: frames 0 and 4 are shown.
        let (a, b): (Vec<u8>, Vec<u8>) = ((0..15).collect(), (100..115).collect());
        let sheet = filmstrips(&[&a, &b], 1, 1)?;
        assert_eq!((sheet.width, sheet.height), (2, 2));
        assert_eq!(sheet.pixels, [0, 1, 2, 12, 13, 14, 100, 101, 102, 112, 113, 114]);
        Ok(())
    }
}
