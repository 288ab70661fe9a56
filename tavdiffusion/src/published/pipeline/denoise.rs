//! From noise to latents of both streams: guidance of each by its own text, at the same steps of one schedule.

use candle_core::{DType, Device, Result, Tensor, bail};
use fulgur_kernels::philox::Philox;
use fulgur_lightnet::diffusion::Solver;

use super::windows::{Blend, Span, Window};
use super::words::Texts;
use crate::denoiser::Denoiser;
use crate::diffusion::Guidance;
use crate::published::TavUnet;

/// Axes of frames and of time.
const FRAMES: usize = 2;
const TIME: usize = 2;

/// Latents of the streams that there are, of N clips: `[N, C, F, h, w]` and `[N, C, T, bands]`, f32.
#[derive(Clone, Debug, Default)]
pub(super) struct Streams {
    pub(super) video: Option<Tensor>,
    pub(super) audio: Option<Tensor>,
}

impl Streams {
    fn map(&self, mut f: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            video: self.video.as_ref().map(&mut f).transpose()?,
            audio: self.audio.as_ref().map(&mut f).transpose()?,
        })
    }

    fn narrow(&self, window: Window) -> Result<Self> {
        let cut = |x: &Option<Tensor>, axis: usize, span: Option<Span>| match (x, span) {
            (Some(x), Some(span)) => x.narrow(axis, span.start, span.len)?.contiguous().map(Some),
            (_, _) => Ok(None),
        };
        Ok(Self {
            video: cut(&self.video, FRAMES, window.video)?,
            audio: cut(&self.audio, TIME, window.audio)?,
        })
    }
}

/// Noise of each seed, drawn on the host: the same on every device and at every place of a batch.
pub(super) fn noise(seeds: &[u64], name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
    let count = shape.iter().product();
    let mut values = Vec::with_capacity(seeds.len() * count);
    for &seed in seeds {
        values.extend(Philox::named(seed, name).normals(count));
    }
    Tensor::from_vec(values, [&[seeds.len()], shape].concat(), device)
}

/// Networks with the texts that they follow.
pub(super) struct Guided<'a> {
    networks: &'a TavUnet,
    /// The prompt, then what to keep away from.
    texts: Vec<Tensor>,
    /// Which of the texts each stream keeps away from; none without guidance.
    away: [Option<usize>; 2],
    guidance: Guidance,
    sequential: bool,
}

impl<'a> Guided<'a> {
    /// For the streams `video` and `audio`, whichever are made.
    pub(super) fn new(
        networks: &'a TavUnet,
        texts: &Texts,
        guidance: Guidance,
        [video, audio]: [bool; 2],
        sequential: bool,
    ) -> Result<Self> {
        let mut read = vec![texts.prompt.clone()];
        let mut away = [None, None];
        let audio_negative = texts.audio_negative.as_ref().unwrap_or(&texts.negative);
        let wanted = [
            (video && guidance.video != 1.0, &texts.negative),
            (audio && guidance.audio != 1.0, audio_negative),
        ];
        for (slot, (guided, text)) in away.iter_mut().zip(wanted) {
            if !guided {
                continue;
            }
            let known = read.iter().position(|other| other.id() == text.id());
            *slot = Some(known.unwrap_or(read.len()));
            if known.is_none() {
                read.push(text.clone());
            }
        }
        let dtype = networks.dtype();
        Ok(Self {
            networks,
            texts: read
                .iter()
                .map(|text| text.to_dtype(dtype))
                .collect::<Result<_>>()?,
            away,
            guidance,
            sequential,
        })
    }

    /// What the networks predict for each text, `copies` at a time, with guidance.
    fn predict(&self, streams: &Streams, timestep: f64) -> Result<Streams> {
        let copies = self.texts.len();
        let parts: Vec<Streams> = if self.sequential || copies == 1 {
            self.texts
                .iter()
                .map(|text| self.ask(streams, text, timestep))
                .collect::<Result<_>>()?
        } else {
            let repeated = streams.map(|x| Tensor::cat(&vec![x; copies], 0))?;
            let all = self.ask(&repeated, &Tensor::cat(&self.texts, 0)?, timestep)?;
            let part = |x: &Tensor, copy: usize| x.narrow(0, copy * x.dim(0)? / copies, x.dim(0)? / copies);
            (0..copies)
                .map(|copy| all.map(|x| part(x, copy)))
                .collect::<Result<_>>()?
        };
        let mix = |of: fn(&Streams) -> &Option<Tensor>, away: Option<usize>, scale: f64| {
            let with = match (parts.first().map(of), away) {
                (Some(Some(with)), Some(away)) => {
                    let Some(without) = parts.get(away).and_then(|part| of(part).as_ref()) else {
                        bail!("guidance: text {away} of {}", parts.len());
                    };
                    (without + ((with - without)? * scale)?)?
                }
                (Some(Some(with)), None) => with.clone(),
                _ => return Ok(None),
            };
            Ok(Some(with))
        };
        Ok(Streams {
            video: mix(|part| &part.video, self.away[0], self.guidance.video)?,
            audio: mix(|part| &part.audio, self.away[1], self.guidance.audio)?,
        })
    }

    fn ask(&self, streams: &Streams, text: &Tensor, timestep: f64) -> Result<Streams> {
        let (device, dtype) = (self.networks.device(), self.networks.dtype());
        let given = streams.map(|x| x.to_dtype(dtype))?;
        let steps = Tensor::full(timestep as f32, text.dim(0)?, device)?;
        let predicted =
            self.networks
                .forward(given.video.as_ref(), given.audio.as_ref(), &steps, Some(text))?;
        let predicted = Streams {
            video: predicted.video,
            audio: predicted.audio,
        };
        predicted.map(|x| x.to_dtype(DType::F32))
    }

    /// As [`Self::predict`], out of windows; in those of a sound, `fade` steps lead over from one to the next.
    fn predict_windows(
        &self,
        streams: &Streams,
        windows: &[Window],
        fade: usize,
        timestep: f64,
    ) -> Result<Streams> {
        let length = |x: &Option<Tensor>, axis: usize| x.as_ref().map_or(Ok(0), |x| x.dim(axis));
        let mut video = Blend::new(FRAMES, length(&streams.video, FRAMES)?, 0);
        let mut audio = Blend::new(TIME, length(&streams.audio, TIME)?, fade);
        for &window in windows {
            let predicted = self.predict(&streams.narrow(window)?, timestep)?;
            if let (Some(part), Some(span)) = (&predicted.video, window.video) {
                video.add(part, span)?;
            }
            if let (Some(part), Some(span)) = (&predicted.audio, window.audio) {
                audio.add(part, span)?;
            }
        }
        Ok(Streams {
            video: video.finish()?,
            audio: audio.finish()?,
        })
    }
}

/// A loop over the steps of a schedule.
pub(super) struct Loop<'a> {
    pub(super) guided: &'a Guided<'a>,
    pub(super) solver: &'a Solver,
    pub(super) windows: &'a [Window],
    pub(super) fade: usize,
    /// The first step of the clip; a sound beside it takes all of them.
    pub(super) first: usize,
    /// A shape and seeds: what the clips read in place of a sound is drawn anew at each step, in the published loop.
    pub(super) fresh: Option<(&'a [usize], &'a [u64])>,
}

impl Loop<'_> {
    /// Denoises `streams`, which hold noise; the clip holds what belongs to its first step. `on_step` is called after each step and ends
    /// the loop with `None` by returning false.
    ///
    /// # Errors
    /// A failing operation, or values that are not finite.
    pub(super) fn run(&self, streams: Streams, on_step: &mut dyn FnMut() -> bool) -> Result<Option<Streams>> {
        let mut solvers = [self.solver.clone(), self.solver.clone()];
        let mut x = streams;
        let dtype = self.guided.networks.dtype();
        let sound_alone: Vec<Window> = self
            .windows
            .iter()
            .map(|window| Window {
                video: None,
                ..*window
            })
            .collect();
        for (k, timestep) in self.solver.timesteps().into_iter().enumerate() {
            let waits = k < self.first;
            if waits && x.audio.is_none() {
                continue;
            }
            let mut given = x.clone();
            if waits {
                given.video = None;
            }
            if let Some((shape, seeds)) = self.fresh {
                given.audio = Some(noise(
                    seeds,
                    &format!("noise.heard.{k}"),
                    shape,
                    self.guided.networks.device(),
                )?);
            }
            let windows = if waits { &sound_alone } else { self.windows };
            let predicted = self
                .guided
                .predict_windows(&given, windows, self.fade, timestep)?;
            let [clip, sound] = &mut solvers;
            if let (Some(now), Some(predicted)) = (&x.video, &predicted.video) {
                x.video = Some(finite(clip.advance(now, predicted, k)?, "clip", k, dtype)?);
            }
            if let (Some(now), Some(predicted)) = (&x.audio, &predicted.audio) {
                x.audio = Some(finite(sound.advance(now, predicted, k)?, "sound", k, dtype)?);
            }
            if !on_step() {
                return Ok(None);
            }
        }
        Ok(Some(x))
    }
}

/// Refuses latents with values that are not finite, before they become pictures of nothing.
fn finite(x: Tensor, stream: &str, k: usize, dtype: DType) -> Result<Tensor> {
    let size = x.abs()?.max_all()?.to_scalar::<f32>()?;
    let sum = x.sum_all()?.to_scalar::<f32>()?;
    if size.is_finite() && sum.is_finite() {
        return Ok(x);
    }
    bail!(
        "step {} of the {stream}: values that are not finite in {}; the weights, or the guidance, are beyond its range",
        k + 1,
        dtype.as_str()
    )
}
