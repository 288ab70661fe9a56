//! Task `picture-codec`: pictures through latents and back.
//!
//! What denoises latents (task `image`) sees fewer and smoother values than there are pixels. The loss is the one of the video codec
//! without motion: differences of pixels and of their edges, and a penalty that keeps latents near mean zero and variance one, with
//! noise on them.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use fulgur_datasets::labelled::{Labelled, Part};
use fulgur_datasets::media::{Picture, write_png};
use fulgur_lightnet::params::{Params, Precision};
use fulgur_tavdiffusion::codec::{LatentNorm, PictureCodec, VideoCodecConfig};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::export::write_part;
use super::mean::mean;
use super::pictures::{Frame, LONGEST_SIDE, MOST, mirrors};
use super::video_codec::{SquaredError, difference};
use crate::device::compute_dtype;
use crate::paint::grid;
use crate::train::{Batch, Cursor, Losses, Step, Task, TaskResult};

/// Pictures that are coded at a time where no gradient is needed.
const TOGETHER: usize = 64;
/// Pictures that the statistics of the latents are measured on, at most.
const MEASURED: usize = 4096;
/// Pictures that are drawn to be looked at, and their columns.
const SAMPLES: usize = 16;
const COLUMNS: usize = 8;

/// Recipe of the task.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// The pictures: the name of a prepared set, a folder, JSONL or IDX; grey ones are coded as colours that are all alike.
    pub set: String,
    /// Folder of prepared data sets.
    pub data: PathBuf,
    /// Height and width of the pictures.
    pub size: [usize; 2],
    /// Pictures in a batch.
    pub batch: usize,
    /// Held-out pictures of a validation.
    pub validation: usize,
    /// Whether pictures are mirrored, one in two.
    pub flip: bool,
    /// Weight of the differences between neighbouring pixels.
    pub gradient_weight: f64,
    /// Weight of the penalty on the latents' statistics.
    pub latent_weight: f64,
    /// Standard deviation of the noise on the latents: what the denoiser leaves must not show.
    pub latent_noise: f32,
    /// The network.
    pub model: ModelOptions,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            set: "emoji".to_owned(),
            data: "data".into(),
            size: [64, 64],
            batch: 64,
            validation: 256,
            flip: true,
            gradient_weight: 0.5,
            latent_weight: 0.01,
            latent_noise: 0.1,
            model: ModelOptions::default(),
        }
    }
}

/// The network of a recipe.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ModelOptions {
    /// Side of a patch, even: so many times smaller is a latent.
    pub patch: usize,
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Width and depth of the encoder; widths are multiples of 12.
    pub encoder: [usize; 2],
    /// Width and depth of the decoder's coarse stage.
    pub decoder: [usize; 2],
    /// Width and depth of the decoder's fine stage.
    pub fine: [usize; 2],
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            patch: 4,
            latent_channels: 8,
            encoder: [144, 3],
            decoder: [192, 4],
            fine: [96, 3],
        }
    }
}

impl Options {
    /// The network, a codec of clips of one frame.
    ///
    /// # Errors
    /// Settings out of range, or that do not fit together.
    pub(super) fn config(&self) -> TaskResult<VideoCodecConfig> {
        let [height, width] = self.size;
        for (field, found, most) in [
            ("batch", self.batch, MOST),
            ("size", height, LONGEST_SIDE),
            ("size", width, LONGEST_SIDE),
        ] {
            if !(1..=most).contains(&found) {
                return Err(format!("[picture-codec]: {field} is {found}, expected 1 to {most}").into());
            }
        }
        for (field, found) in [
            ("gradient_weight", self.gradient_weight),
            ("latent_weight", self.latent_weight),
            ("latent_noise", f64::from(self.latent_noise)),
        ] {
            if !found.is_finite() || found < 0.0 {
                return Err(format!("[picture-codec]: {field} is {found}, expected 0 or more").into());
            }
        }
        let ModelOptions {
            patch,
            latent_channels,
            encoder,
            decoder,
            fine,
        } = self.model;
        let config = VideoCodecConfig {
            patch: [1, patch, patch],
            latent_channels,
            encoder,
            decoder,
            fine,
        };
        PictureCodec::check(&config).map_err(|error| {
            let words = error.to_string();
            format!(
                "[picture-codec.model]: {}",
                words.lines().next().unwrap_or_default()
            )
        })?;
        if height < 2 || width < 2 || self.size.iter().any(|side| !side.is_multiple_of(patch)) {
            return Err(format!(
                "[picture-codec]: size is {:?}, expected multiples of the patch {patch}",
                self.size
            )
            .into());
        }
        Ok(config)
    }

    /// The pictures.
    pub(super) fn frame(&self) -> Frame {
        Frame {
            size: self.size,
            channels: PictureCodec::COLOURS,
        }
    }
}

/// The task.
pub(super) struct PictureCodecTask {
    options: Options,
    frame: Frame,
    /// Bytes of the pictures that are trained on, and of those held out.
    trained: Vec<u8>,
    held_out: Vec<u8>,
    params: Params,
    codec: PictureCodec,
    compute: DType,
}

impl PictureCodecTask {
    /// Reads the pictures and builds the network.
    ///
    /// # Errors
    /// Settings that do not fit together, or a set that is not there.
    pub(super) fn open(options: Options, seed: u64, device: &Device) -> TaskResult<Self> {
        let (config, frame) = (options.config()?, options.frame());
        let mut set = Labelled::open(&options.set, &options.data)?;
        set.drop_broken();
        let read = |part| {
            let bytes = frame.read(&set, &set.part(part));
            bytes.map_err(|error| format!("[picture-codec]: {error}"))
        };
        let (trained, held_out) = (read(Part::Train)?, read(Part::HeldOut)?);
        if trained.is_empty() {
            let set = &options.set;
            return Err(format!("[picture-codec]: set {set:?}: found no pictures to train on").into());
        }
        let params = Params::random(seed, device);
        let codec = PictureCodec::new(&config, &params.builder())?;
        Ok(Self {
            compute: compute_dtype(device),
            options,
            frame,
            trained,
            held_out,
            params,
            codec,
        })
    }

    /// Pictures `[B, H, W, 3]` of these bytes in [-1, 1] on the host.
    fn pictures(&self, from: &[u8], chosen: &[usize], mirrored: &[bool]) -> TaskResult<Tensor> {
        let ([height, width], size) = (self.frame.size, self.frame.values());
        let mut values = vec![0f32; chosen.len() * size];
        let each = values.par_chunks_mut(size).zip(chosen).zip(mirrored);
        each.for_each(|((to, &index), &mirrored)| {
            self.frame.unit(&from[index * size..][..size], mirrored, to);
        });
        let shape = (chosen.len(), height, width, self.frame.channels);
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    /// Raw latents of these pictures as they are.
    fn encoded(&self, from: &[u8], chosen: &[usize]) -> TaskResult<Tensor> {
        let pictures = self.pictures(from, chosen, &vec![false; chosen.len()])?;
        let pictures = pictures.to_device(self.params.device())?.to_dtype(self.compute)?;
        Ok(self.codec.encode_raw(&pictures)?.detach())
    }

    /// Decoded bytes of the first held-out pictures.
    fn reconstructed(&self, count: usize) -> TaskResult<Vec<u8>> {
        let all: Vec<usize> = (0..count).collect();
        let mut decoded = Vec::with_capacity(count * self.frame.values());
        for chosen in all.chunks(TOGETHER) {
            let made = self.codec.decode_raw(&self.encoded(&self.held_out, chosen)?)?;
            let bytes = made
                .to_dtype(DType::F32)?
                .affine(127.5, 127.5)?
                .round()?
                .clamp(0f32, 255f32)?;
            decoded.extend(bytes.to_dtype(DType::U8)?.flatten_all()?.to_vec1::<u8>()?);
        }
        Ok(decoded)
    }

    /// Held-out pictures, at most so many.
    fn held_out(&self, most: usize) -> usize {
        most.min(self.held_out.len() / self.frame.values())
    }
}

impl Task for PictureCodecTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn unit(&self) -> &'static str {
        "pictures"
    }

    fn repeats(&self) -> bool {
        true
    }

    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        let n = self.options.batch;
        let chosen = cursor.shuffled(self.trained.len() / self.frame.values(), n);
        let mirrored = mirrors(n, self.options.flip, cursor.noise("flip"));
        let [height, width] = self.frame.size.map(|side| side / self.codec.factor());
        let shape = [n, height, width, self.codec.channels()];
        let noise = cursor.noise("latent").normals(shape.iter().product());
        Ok(Batch::new(n)
            .with("pictures", self.pictures(&self.trained, &chosen, &mirrored)?)
            .with("noise", Tensor::from_vec(noise, shape.as_slice(), &Device::Cpu)?))
    }

    fn loss(&self, batch: &Batch, _: &Step) -> TaskResult<Losses> {
        let options = &self.options;
        let pictures = batch.get("pictures")?;
        let raw = self.codec.encode_raw(&pictures.to_dtype(self.compute)?)?;
        let noise = (batch.get("noise")?.to_dtype(self.compute)? * f64::from(options.latent_noise))?;
        let decoded = self.codec.decode_raw(&(&raw + noise)?)?.to_dtype(DType::F32)?;
        let error = (decoded - pictures)?;
        let pixels = mean(&error.abs()?)?;
        let edges = ((difference(&error, 1)? + difference(&error, 2)?)? * 0.5)?;
        let statistics = LatentNorm::penalty(&raw)?;
        let total =
            ((&pixels + (&edges * options.gradient_weight)?)? + (&statistics * options.latent_weight)?)?;
        let parts = vec![("pixels", pixels), ("edges", edges), ("statistics", statistics)];
        Ok(Losses { total, parts })
    }

    /// How far held-out pictures come back from what they were.
    fn validate(&self) -> TaskResult<Vec<(String, f64)>> {
        let count = self.held_out(self.options.validation);
        if count == 0 {
            return Ok(Vec::new());
        }
        let mut error = SquaredError::default();
        error.add(self.held_out.iter().zip(&self.reconstructed(count)?));
        let psnr = error.psnr_db();
        Ok(vec![
            ("negative_psnr_db".to_owned(), -psnr),
            ("psnr_db".to_owned(), psnr),
        ])
    }

    /// Rows of held-out pictures, each over what comes back of them.
    fn sample(&self, folder: &Path, step: u64) -> TaskResult<Vec<PathBuf>> {
        let count = self.held_out(SAMPLES);
        if count == 0 {
            return Ok(Vec::new());
        }
        let ([height, width], size) = (self.frame.size, self.frame.values());
        let made = self.reconstructed(count)?;
        let picture = |bytes: &[u8]| Picture::new(bytes.to_vec(), width, height, self.frame.channels);
        let mut cells = Vec::new();
        let row = COLUMNS.min(count) * size;
        let rows = self.held_out[..count * size].chunks(row).zip(made.chunks(row));
        for (real, made) in rows.filter(|(real, _)| real.len() == row) {
            for bytes in real.chunks(size).chain(made.chunks(size)) {
                cells.push(picture(bytes)?);
            }
        }
        let path = folder.join(format!("codec-{step:06}.png"));
        write_png(&path, &grid(&cells, COLUMNS.min(count))?)?;
        Ok(vec![path])
    }

    fn export(&self, folder: &Path) -> TaskResult<()> {
        let count = self.trained.len() / self.frame.values();
        // Evenly through all of them: sets are in the order of their classes.
        let measured = count.min(MEASURED);
        let chosen: Vec<usize> = (0..measured).map(|i| i * count / measured).collect();
        let mut raw = Vec::new();
        for chosen in chosen.chunks(TOGETHER) {
            raw.push(self.encoded(&self.trained, chosen)?);
        }
        let statistics = LatentNorm::measure(&Tensor::cat(&raw, 0)?)?;
        write_part(
            folder,
            self.codec.config(),
            &self.params,
            Some(statistics),
            Precision::F16,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{Options as RunOptions, Recipe, run};
    use fulgur_kernels::philox::Philox;
    use std::fs;

    /// Pictures of two halves of random colours.
    fn folder(root: &Path) {
        let mut noise = Philox::new(4, 0);
        fs::create_dir_all(root.join("set/a")).unwrap();
        for i in 0..60 {
            let colours = [0; 2].map(|_| [0; 3].map(|_| noise.below(256) as u8));
            let pixels = (0..64).flat_map(|place| colours[usize::from(place % 8 >= 4)]);
            let picture = Picture::new(pixels.collect(), 8, 8, 3).unwrap();
            write_png(&root.join(format!("set/a/{i}.png")), &picture).unwrap();
        }
    }

    fn recipe(own: &str, root: &Path) -> Recipe {
        let text = format!(
            "task = 'picture-codec'\n[train]\nmax_steps = 150\nema = 0.0\ncheckpoint_seconds = 1e9\n[optimiser]\nlr = 5e-3\n[schedule]\n\
             warmup = 10\n[picture-codec]\nset = '{}'\n{own}\n",
            root.join("set").display()
        );
        Recipe::check(text.parse().unwrap(), "test".into(), &root.join("run")).unwrap()
    }

    const SMALL: &str = "size = [8, 8]\nbatch = 16\n[picture-codec.model]\npatch = 4\nlatent_channels = 4\nencoder = [24, 1]\n\
                         decoder = [24, 1]\nfine = [12, 1]";

    /// Held-out pictures come back, and the folder's statistics are those of the latents.
    #[test]
    fn pictures_come_back_and_latents_are_standardised() {
        let root = tempfile::tempdir().unwrap();
        folder(root.path());
        let recipe = recipe(SMALL, root.path());
        let task = PictureCodecTask::open(recipe.own().unwrap(), 1, &Device::Cpu).unwrap();
        let before = -task.validate().unwrap()[0].1;
        run(&task, &recipe, &RunOptions::default(), |_| {}).unwrap();
        let after = -task.validate().unwrap()[0].1;
        assert!(before < 12.0 && after > before + 6.0, "{before} {after} dB");
        let codec = PictureCodec::load(&recipe.run_dir.join("model"), &Device::Cpu).unwrap();
        let count = task.trained.len() / task.frame.values();
        let all: Vec<usize> = (0..count).collect();
        let pictures = task.pictures(&task.trained, &all, &vec![false; count]).unwrap();
        let latents = codec.encode(&pictures).unwrap();
        let (mean, std) = LatentNorm::measure(&latents).unwrap();
        for (mean, std) in mean
            .to_vec1::<f32>()
            .unwrap()
            .into_iter()
            .zip(std.to_vec1::<f32>().unwrap())
        {
            // Weights are rounded to f16.
            assert!(mean.abs() < 0.02 && (std - 1.0).abs() < 0.02, "{mean} {std}");
        }
        let sheet = task.sample(root.path(), 3).unwrap();
        assert!(sheet[0].ends_with("codec-000003.png") && sheet[0].exists());
    }

    #[test]
    fn batches_are_functions_of_their_number() {
        let root = tempfile::tempdir().unwrap();
        folder(root.path());
        let recipe = recipe(SMALL, root.path());
        let task = PictureCodecTask::open(recipe.own().unwrap(), 1, &Device::Cpu).unwrap();
        let values = |index: u64, name: &str| -> Vec<f32> {
            let batch = task.batch(&Cursor { seed: 3, index }).unwrap();
            batch.get(name).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        for name in ["pictures", "noise"] {
            assert_eq!(values(1, name), values(1, name));
            assert_ne!(values(1, name), values(0, name));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let root = tempfile::tempdir().unwrap();
        folder(root.path());
        for (own, words) in [
            ("batch = 0", "batch is 0, expected 1 to"),
            ("latent_noise = nan", "latent_noise is NaN, expected 0 or more"),
            ("gradient_weight = -1.0", "gradient_weight is -1"),
            (
                "size = [8, 10]",
                "size is [8, 10], expected multiples of the patch 4",
            ),
            (
                "model = { patch = 3 }",
                "[picture-codec.model]: patch is [1, 3, 3], expected [1, f, f]",
            ),
            (
                "model = { latent_channels = 0 }",
                "latent_channels: found 0, expected 1 to 1024",
            ),
            (
                "size = [8, 8]\nmodel = { encoder = [20, 1] }",
                "width 20 is no multiple of 12",
            ),
            ("data = 'nowhere'", "fulgur data fetch emoji"),
        ] {
            let mut recipe = recipe(own, root.path());
            if words.contains("fetch") {
                recipe.own.insert("set".to_owned(), "emoji".into());
            }
            let line = match PictureCodecTask::open(recipe.own().unwrap(), 1, &Device::Cpu) {
                Ok(_) => panic!("{own}: not refused"),
                Err(error) => error.to_string(),
            };
            assert!(line.contains(words), "{own}: {line}");
        }
    }
}
