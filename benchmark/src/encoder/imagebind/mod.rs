//! ImageBind as an encoder of scores, with its published preprocessing.
//!
//! A frame is a still picture: the shorter side to 224 by Pillow's bicubic, the square in the middle. A soundtrack is the mean of three
//! clips of two seconds. A video as a whole is the mean of fifteen views of two frames. The network is
//! [`fulgur_lightnet::encoders::imagebind`].

pub mod filterbank;
pub mod hearing;
mod joint;
pub mod seeing;

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use fulgur_datasets::augment::View;
use fulgur_datasets::media::{Sound, Video};
use fulgur_lightnet::encoders::clip_tokenizer::ClipTokenizer;
use fulgur_lightnet::encoders::imagebind::{ImageBind, Input, Modality, prefix};
use fulgur_lightnet::params::folder::Weights;

use self::filterbank::Filterbank;
use super::{EncodeError, Encoder, LoadError};
use crate::checkpoint;

/// Name of the encoder in results.
pub const NAME: &str = "imagebind";
/// Version of the preprocessing: vectors of another one are not taken from the cache.
pub const PREPROCESSING: u32 = 1;
/// Seconds of a clip of sound.
const WINDOW_S: f64 = 2.0;
/// Frames that go through the network at a time, on the CPU and on a GPU.
const BATCH_CPU: usize = 8;
const BATCH_GPU: usize = 128;

/// Settings that change vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageBindOptions {
    /// Type of products: f32, and on a GPU bf16 or f16.
    pub compute: DType,
    /// Hear the mean of all channels instead of the first one.
    pub downmix: bool,
}

/// The network with everything that stands before it.
#[derive(Debug)]
pub struct ImageBindEncoder {
    path: PathBuf,
    model: ImageBind,
    options: ImageBindOptions,
    side: usize,
    view: View,
    bank: Filterbank,
    frames: usize,
}

impl ImageBindEncoder {
    /// Whether a folder or file holds weights of ImageBind.
    ///
    /// # Errors
    /// It holds weights that are damaged.
    pub fn is_in(path: &Path) -> Result<bool, LoadError> {
        let Some(weights) = Weights::find(path)? else {
            return Ok(false);
        };
        Ok(prefix(weights.shapes()?.keys().map(String::as_str)).is_some())
    }

    /// Opens a folder or the file of a checkpoint; towers are loaded when they are first needed.
    ///
    /// # Errors
    /// There are no weights, they are damaged, or lack a tensor of the towers of pictures and sounds.
    pub fn open(path: &Path, options: ImageBindOptions, device: &Device) -> Result<Self, LoadError> {
        let model = ImageBind::open(path, options.compute, device)?;
        let vision = model.check(Modality::Vision)?;
        let audio = model.check(Modality::Audio)?;
        let (Input::Pictures { side, .. }, Input::Sounds { bands, frames, .. }) =
            (&vision.input, &audio.input)
        else {
            return Err(LoadError::Network(candle_core::Error::Msg(
                "towers of other inputs".to_owned(),
            )));
        };
        let (side, bands, frames) = (*side, *bands, *frames);
        Ok(Self {
            path: path.to_owned(),
            side,
            view: seeing::view(side),
            bank: Filterbank::new(bands),
            frames,
            options,
            model,
        })
    }

    /// The network.
    pub fn model(&self) -> &ImageBind {
        &self.model
    }

    /// Frames `[B, side, side, 3]` of bytes in the size of the network, to vectors `[B, embedding]` in f32.
    ///
    /// # Errors
    /// Frames of another size, or a network that cannot be loaded or run.
    pub fn embed_frames(&self, frames: &Tensor) -> Result<Tensor, EncodeError> {
        let tower = self.model.tower(Modality::Vision).map_err(unusable)?;
        Ok(tower.embed(&seeing::normalised(frames, self.model.device())?)?)
    }

    /// Frames of any one size, RGB bytes, in the size of the network: `[B, side, side, 3]` u8 on the CPU.
    ///
    /// # Errors
    /// Frames whose bytes do not fit their size.
    pub fn fit_frames(&self, frames: &[&[u8]], width: usize, height: usize) -> Result<Tensor, EncodeError> {
        seeing::fitted(&self.view, frames, width, height)
    }

    /// One vector of a whole video: the mean of its fifteen views.
    ///
    /// # Errors
    /// There is no frame, or the network cannot be loaded or run.
    pub fn video(&self, video: &Video) -> Result<Vec<f32>, EncodeError> {
        if video.frame_count == 0 {
            return Err(EncodeError::NoFrames);
        }
        let tower = self.model.tower(Modality::Vision).map_err(unusable)?;
        let shape = vec![1, seeing::VIEWS, 3, 2, self.side, self.side];
        let views = Tensor::from_vec(seeing::views(video, self.side), shape, self.model.device())?;
        Ok(tower.embed(&views)?.squeeze(0)?.to_vec1()?)
    }

    /// One vector a text, and whether its end was left out. The vocabulary lies beside the weights.
    ///
    /// # Errors
    /// There is no vocabulary or no tower of texts, or the network cannot be loaded or run.
    pub fn texts<S: AsRef<str>>(&self, texts: &[S]) -> Result<Vec<(Vec<f32>, bool)>, EncodeError> {
        if texts.is_empty() {
            return Ok(Vec::new());
        }
        let tower = self.model.tower(Modality::Text).map_err(unusable)?;
        let Input::Texts { context, .. } = tower.sizes().input else {
            return Err(EncodeError::Input("a tower of other inputs".to_owned()));
        };
        let folder = match self.path.is_dir() {
            true => self.path.as_path(),
            false => self.path.parent().unwrap_or(Path::new("")),
        };
        let vocabulary = ClipTokenizer::find(folder).map_err(unusable)?;
        let batch = vocabulary
            .encode(texts, context, self.model.device())
            .map_err(unusable)?;
        let vectors = tower.embed(&batch.ids)?.to_vec2()?;
        Ok(vectors.into_iter().zip(batch.truncated).collect())
    }
}

fn unusable(error: impl std::fmt::Display) -> EncodeError {
    EncodeError::Input(error.to_string())
}

impl Encoder for ImageBindEncoder {
    fn name(&self) -> &str {
        NAME
    }

    fn sound_window_s(&self) -> f64 {
        WINDOW_S
    }

    fn batch(&self) -> usize {
        match self.model.device().is_cpu() {
            true => BATCH_CPU,
            false => BATCH_GPU,
        }
    }

    fn frames(&self, frames: &[&[u8]], width: usize, height: usize) -> Result<Vec<Vec<f32>>, EncodeError> {
        let fitted = self.fit_frames(frames, width, height)?;
        Ok(self.embed_frames(&fitted)?.to_vec2()?)
    }

    fn sound(&self, sound: &Sound) -> Result<Vec<f32>, EncodeError> {
        let tower = self.model.tower(Modality::Audio).map_err(unusable)?;
        let samples = hearing::heard(sound, self.options.downmix).map_err(unusable)?;
        let pictures = hearing::clips(samples.len()).map(|clip| {
            let clip = samples.get(clip).unwrap_or_default();
            hearing::picture(&self.bank, clip, self.frames)
        });
        let shape = (1, hearing::CLIPS, 1, self.bank.bands(), self.frames);
        let clips = Tensor::from_vec(pictures.concat(), shape, self.model.device())?;
        Ok(tower.embed(&clips)?.squeeze(0)?.to_vec1()?)
    }

    fn identity(&self) -> std::io::Result<Option<String>> {
        let weights = checkpoint::of_files(self.model.weights().files())?;
        let compute = self.model.compute().as_str();
        let sound = if self.options.downmix { "mean" } else { "first" };
        Ok(Some(format!(
            "{NAME} preprocessing {PREPROCESSING} compute {compute} channel {sound} size {} {} {} weights {weights}",
            self.side,
            self.bank.bands(),
            self.frames
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::avhscore::{self, cosine};
    use fulgur_datasets::media::Picture;
    use std::sync::LazyLock;
    use std::sync::atomic::AtomicBool;
    use tempfile::TempDir;

    fn encoder(downmix: bool) -> ImageBindEncoder {
        // Towers are read when they are first asked for: the folder stays as long as the tests run.
        static MODEL: LazyLock<(TempDir, PathBuf)> = LazyLock::new(|| {
            let root = tempfile::tempdir().unwrap();
            let path = fulgur_lightnet::testing::model("imagebind_tiny", root.path());
            (root, path)
        });
        let path = &MODEL.1;
        let options = ImageBindOptions {
            compute: DType::F32,
            downmix,
        };
        assert!(ImageBindEncoder::is_in(path).unwrap());
        ImageBindEncoder::open(path, options, &Device::Cpu).unwrap()
    }

    fn video(frames: usize) -> Video {
        let bytes = (0..frames * 48 * 64 * 3)
            .map(|i| (i * i / 977 % 251) as u8)
            .collect();
        Video::new(bytes, 64, 48, 8.0).unwrap()
    }

    fn sound(gain: f32) -> Sound {
        let wave = (0..2 * 30_000).map(|i| gain * ((i / 2) as f32 * 0.02 * (1 + i % 2) as f32).sin());
        Sound::new(wave.collect(), 2, 11_025).unwrap()
    }

    fn score(encoder: &ImageBindEncoder, video: &Video, sound: &Sound) -> f64 {
        let cancel = AtomicBool::new(false);
        let score = avhscore::score(encoder, video, Some(sound), None, &cancel).unwrap();
        assert_eq!((score.frames, score.flags.len()), (video.frame_count, 0));
        score.avhscore.unwrap()
    }

    #[test]
    fn a_frame_is_normalised_as_the_view_says() {
        let encoder = encoder(false);
        let frames = encoder.fit_frames(&[video(1).frame(0)], 64, 48).unwrap();
        assert_eq!(frames.dims(), [1, 35, 35, 3]);
        let picture = Picture::new(frames.flatten_all().unwrap().to_vec1().unwrap(), 35, 35, 3).unwrap();
        let values =
            Tensor::from_vec(encoder.view.normalised(&[picture]), (1, 3, 35, 35), &Device::Cpu).unwrap();
        let tower = encoder.model.tower(Modality::Vision).unwrap();
        let expected = tower.embed(&values).unwrap();
        let far = (encoder.embed_frames(&frames).unwrap() - expected)
            .unwrap()
            .abs()
            .unwrap();
        assert!(far.max_all().unwrap().to_scalar::<f32>().unwrap() < 1e-5);
    }

    /// What `tests/golden/imagebind_clip.py` made of a clip in PyTorch.
    #[test]
    fn a_clip_has_the_vectors_and_scores_of_torch() {
        let golden = fulgur_lightnet::testing::tensors("imagebind_clip");
        let encoder = encoder(false);
        let bytes = golden["frames"].flatten_all().unwrap().to_vec1::<u8>().unwrap();
        let video = Video::new(bytes, 28, 20, 6.0).unwrap();
        let wave = golden["wave"].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let sound = Sound::new(wave, 2, 16_000).unwrap();
        let near = |found: &[f32], name: &str| {
            let wanted = golden[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(found.len(), wanted.len());
            let square = |x: f32| f64::from(x) * f64::from(x);
            let apart: f64 = found.iter().zip(&wanted).map(|(a, b)| square(a - b)).sum();
            let size: f64 = wanted.iter().map(|&x| square(x)).sum();
            let relative = (apart / size).sqrt();
            // The filterbanks agree to 1e-3, the networks to 2e-5.
            assert!(relative < 2e-4, "{name}: {relative}");
        };
        let frames: Vec<&[u8]> = (0..33).map(|i| video.frame(i)).collect();
        near(&encoder.frames(&frames, 28, 20).unwrap().concat(), "seen");
        let heard = encoder.sound(&sound).unwrap();
        near(&heard, "heard");
        let whole = encoder.video(&video).unwrap();
        near(&whole, "video");
        let one = |name: &str| f64::from(golden[name].to_scalar::<f32>().unwrap());
        assert!((score(&encoder, &video, &sound) - one("avhscore")).abs() < 1e-4);
        assert!((cosine(&whole, &heard) - one("av")).abs() < 1e-4);
    }

    #[test]
    fn scores_keep_the_invariants_of_the_definition() {
        let encoder = encoder(false);
        let (video, sound) = (video(5), sound(0.3));
        let whole = score(&encoder, &video, &sound);
        let mut turned = video.clone();
        let bytes = turned.frames.len() / 5;
        turned.frames.rotate_left(2 * bytes);
        assert!((score(&encoder, &turned, &sound) - whole).abs() < 1e-6);
        // Equal frames score as one of them, and vectors of any length do.
        let still = Video::new(video.frame(3).repeat(4), 64, 48, 8.0).unwrap();
        let seen = encoder.frames(&[video.frame(3)], 64, 48).unwrap();
        let heard = encoder.sound(&sound).unwrap();
        let one = cosine(&seen[0], &heard);
        assert!((score(&encoder, &still, &sound) - one).abs() < 1e-6);
        let short: Vec<f32> = heard.iter().map(|x| x / 20.0).collect();
        assert!((cosine(&seen[0], &short) - one).abs() < 1e-6);
        // Gain shifts logarithms: the score moves, but little.
        let louder = score(&encoder, &video, &self::sound(0.6));
        assert!(
            louder != whole && (louder - whole).abs() < 0.3,
            "{whole} {louder}"
        );
    }

    #[test]
    fn the_first_channel_is_heard_unless_all_are() {
        let stereo = sound(0.3);
        let first = encoder(false).sound(&stereo.channel(0).unwrap()).unwrap();
        assert_eq!(encoder(false).sound(&stereo).unwrap(), first);
        let mean = encoder(true).sound(&stereo).unwrap();
        assert_ne!(mean, first);
        assert_eq!(mean, encoder(false).sound(&stereo.mono()).unwrap());
        let identity = |downmix| encoder(downmix).identity().unwrap().unwrap();
        assert_eq!(identity(false), identity(false));
        assert_ne!(identity(false), identity(true));
    }

    #[test]
    fn videos_and_empty_sounds() {
        let encoder = encoder(false);
        let whole = encoder.video(&video(20)).unwrap();
        assert!(whole.len() == 20 && whole.iter().all(|x| x.is_finite()));
        let none = Video::new(Vec::new(), 4, 4, 8.0).unwrap();
        assert!(matches!(encoder.video(&none), Err(EncodeError::NoFrames)));
        let silence = Sound::new(Vec::new(), 1, 16_000).unwrap();
        assert!(encoder.sound(&silence).unwrap().iter().all(|x| x.is_finite()));
        let line = encoder.texts(&["a dog"]).unwrap_err().to_string();
        assert!(line.contains("found no vocabulary"), "{line}");
    }
}
