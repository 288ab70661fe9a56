//! Latents of clips and states of their captions, made once and kept on the device.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use candle_core::{DType, Device, Tensor};
use fulgur_benchmark::features::audioldm;
use fulgur_datasets::scenes::{ClipSpec, Split};
use fulgur_kernels::spectrum::LogMel;
use fulgur_tavdiffusion::published::{ClipSizes, Encoders, Heard, Words};
use rayon::prelude::*;

use super::super::check_stop;
use super::super::clips::{Clips, HostClip, Want, frames_tensor, render, samples_tensor, to_unit};
use super::Options;
use super::manifest::{self, Entry};
use crate::train::TaskResult;

const WANT: Want = Want {
    frames: true,
    mask: false,
    samples: true,
};
/// Clips that are drawn or decoded at a time, enough to keep many cores busy.
const TOGETHER: usize = 64;
/// Frames that are encoded at a time.
const FRAMES: usize = 1024;
/// Texts that are read at a time.
const TEXTS: usize = 128;

/// Latents on the device, and which texts belong to them.
pub(super) struct Pool {
    /// `[N, C, f, h, w]`.
    pub(super) video: Tensor,
    /// `[N, C, T, bands]`.
    pub(super) audio: Tensor,
    /// Two wordings of each clip, as numbers of texts.
    pub(super) captions: Vec<[u32; 2]>,
}

impl Pool {
    pub(super) fn len(&self) -> usize {
        self.captions.len()
    }
}

/// Texts, each once; the first is the empty one.
pub(super) struct Texts {
    numbers: HashMap<String, u32>,
    pub(super) all: Vec<String>,
}

impl Texts {
    pub(super) fn new() -> Self {
        Self {
            numbers: HashMap::from([(String::new(), 0)]),
            all: vec![String::new()],
        }
    }

    fn number(&mut self, text: &str) -> u32 {
        if let Some(&number) = self.numbers.get(text) {
            return number;
        }
        let number = self.all.len() as u32;
        self.numbers.insert(text.to_owned(), number);
        self.all.push(text.to_owned());
        number
    }

    /// States of all texts `[M, L, c]`, in `compute`.
    pub(super) fn states(&self, words: &Words, compute: DType, stop: &AtomicBool) -> TaskResult<Tensor> {
        let mut states = Vec::new();
        for texts in self.all.chunks(TEXTS) {
            check_stop(stop, "captions were read")?;
            states.push(words.states(texts)?.to_dtype(compute)?);
        }
        Ok(Tensor::cat(&states, 0)?)
    }
}

/// Where clips come from.
pub(super) enum Origin {
    Composed(Box<Clips>),
    Listed(manifest::Listed),
}

impl Origin {
    /// # Errors
    /// A set that is not prepared, or as [`manifest::read`].
    pub(super) fn open(options: &Options, spec: ClipSpec) -> TaskResult<Self> {
        Ok(match &options.manifest {
            Some(path) => Self::Listed(manifest::read(path, options)?),
            None => Self::Composed(Box::new(Clips::open_as(&options.clips, spec)?)),
        })
    }
}

/// What turns clips into latents.
pub(super) struct Filling<'a> {
    pub(super) encoders: &'a Encoders,
    pub(super) sizes: ClipSizes,
    pub(super) spec: ClipSpec,
    pub(super) compute: DType,
    pub(super) device: &'a Device,
    pub(super) stop: &'a AtomicBool,
    pub(super) texts: &'a mut Texts,
    /// Clips that are left out, by reason.
    pub(super) left_out: BTreeMap<&'static str, usize>,
}

/// Latents that are made, and their texts.
#[derive(Default)]
struct Made {
    video: Vec<Tensor>,
    audio: Vec<Tensor>,
    captions: Vec<[u32; 2]>,
}

impl Filling<'_> {
    /// Latents of the first `count` scenes of `split`.
    pub(super) fn composed(&mut self, clips: &Clips, split: Split, count: usize) -> TaskResult<Pool> {
        let mut made = Made::default();
        for start in (0..count).step_by(TOGETHER) {
            let n = TOGETHER.min(count - start);
            let chunk = render(n, |i| clips.scene(split, (start + i) as u64, WANT));
            let captions: Vec<[String; 2]> = chunk
                .iter()
                .map(|clip| match &clip.scene {
                    Some(scene) => [scene.caption.text.clone(), scene.caption.canonical.clone()],
                    None => Default::default(),
                })
                .collect();
            self.add(&mut made, &chunk, &captions)?;
        }
        self.pool(made)
    }

    /// Latents of clips of a manifest, without those that are too short or have no sound.
    ///
    /// # Errors
    /// A clip that cannot be decoded, or none that can be used.
    pub(super) fn listed(&mut self, path: &Path, entries: &[Entry]) -> TaskResult<Pool> {
        let mut made = Made::default();
        for chunk in entries.chunks(TOGETHER) {
            check_stop(self.stop, "clips were read")?;
            let spec = self.spec;
            let read: Vec<_> = chunk.par_iter().map(|entry| entry.read(&spec)).collect();
            let (mut clips, mut captions) = (Vec::new(), Vec::new());
            for (entry, clip) in chunk.iter().zip(read) {
                match clip.map_err(|error| format!("{}: {error}", path.display()))? {
                    Ok(clip) => {
                        clips.push(clip);
                        captions.push([entry.caption.clone(), entry.caption.clone()]);
                    }
                    Err(reason) => *self.left_out.entry(reason).or_default() += 1,
                }
            }
            self.add(&mut made, &clips, &captions)?;
        }
        if made.captions.is_empty() {
            let reasons: Vec<_> = self
                .left_out
                .iter()
                .map(|(reason, n)| format!("{n} {reason}"))
                .collect();
            return Err(format!(
                "{}: found no clip of {} s with sound among {} ({}), expected some",
                path.display(),
                self.spec.duration_s,
                entries.len(),
                reasons.join(", ")
            )
            .into());
        }
        self.pool(made)
    }

    fn add(&mut self, made: &mut Made, clips: &[HostClip], captions: &[[String; 2]]) -> TaskResult<()> {
        let at_a_time = (FRAMES / self.spec.frames().max(1)).clamp(1, TOGETHER);
        for (clips, captions) in clips.chunks(at_a_time).zip(captions.chunks(at_a_time)) {
            check_stop(self.stop, "the pool of latents was filled")?;
            let frames = frames_tensor(clips, &self.spec)?.to_device(self.device)?;
            let video = self.encoders.pictures(&to_unit(&frames)?)?;
            let audio = self.encoders.sounds(&self.spectrograms(clips)?)?;
            made.video.push(video.to_dtype(self.compute)?.detach());
            made.audio.push(audio.to_dtype(self.compute)?.detach());
            let numbers = captions
                .iter()
                .map(|texts| texts.each_ref().map(|text| self.texts.number(text)));
            made.captions.extend(numbers);
        }
        Ok(())
    }

    /// Spectrograms `[B, T, bands]` of sounds with silence behind them, up to whole steps of the latents.
    fn spectrograms(&self, clips: &[HostClip]) -> TaskResult<Tensor> {
        let samples = self.sizes.samples;
        if self.encoders.heard() == Heard::Speech {
            let waves = samples_tensor(clips, &self.spec)?;
            let silence = samples.saturating_sub(waves.dim(1)?);
            let waves = waves.pad_with_zeros(1, 0, silence)?.to_device(self.device)?;
            return Ok(LogMel::speech_16k(self.device)?.forward(&waves)?);
        }
        let one = |clip: &HostClip| {
            let mut wave = clip.samples.clone();
            wave.resize(samples, 0.0);
            let mel = audioldm::log_mel(&wave)?;
            // The last frame is that of the end itself.
            mel.narrow(0, 0, mel.dim(0)? - 1)
        };
        let mels: Vec<Tensor> = clips.par_iter().map(one).collect::<candle_core::Result<_>>()?;
        Ok(Tensor::stack(&mels, 0)?.to_device(self.device)?)
    }

    fn pool(&self, made: Made) -> TaskResult<Pool> {
        let pool = Pool {
            video: Tensor::cat(&made.video, 0)?,
            audio: Tensor::cat(&made.audio, 0)?,
            captions: made.captions,
        };
        let found = (&pool.video.dims()[1..], &pool.audio.dims()[1..]);
        if found != (&self.sizes.video[..], &self.sizes.audio[..]) {
            return Err(format!(
                "[tav-published]: latents are {:?} and {:?}, expected {:?} and {:?}",
                found.0, found.1, self.sizes.video, self.sizes.audio
            )
            .into());
        }
        Ok(pool)
    }
}
