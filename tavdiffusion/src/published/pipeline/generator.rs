//! A published generator from its folder: what it can make, and the stages of a clip.

use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use fulgur_lightnet::config;
use fulgur_lightnet::diffusion::{Method, Solver, SolverConfig};
use fulgur_lightnet::params::folder::{LoadError, Weights, load};
use serde::Deserialize;

use super::codecs::{Pictures, Sounds};
use super::decode;
use super::denoise::{Guided, Loop, Streams, noise};
use super::places::{Piece, Places};
use super::request::{AudioSizes, Plan, PublishedMode, PublishedRequest, Sizes, VideoSizes};
use super::words::Texts;
use crate::error::Error;
use crate::pipeline::{Clip, Progress, Stage};
use crate::published::{Fusion, TavUnet, Unet, UnetSizes};

/// Fewest frames at a time that are advised.
const LEAST_WINDOW: usize = 4;
/// The file of a schedule.
const SCHEDULE: &str = "scheduler_config.json";
/// What stands before the attention of the clip to the sound, and of the sound to the clip.
const FUSIONS: [&str; 2] = ["cross_attn", "cross_attn_audio"];

/// Clips and how long their stages took.
#[derive(Clone, Debug)]
pub struct Made {
    /// The clips, in the order of the requests.
    pub clips: Vec<Clip>,
    /// Seconds of each stage, with the time that it took to load its networks, in the order in which they ran.
    pub seconds: Vec<(Stage, f64)>,
}

/// A published generator: its folder was looked at, and no weights are held.
#[derive(Clone, Debug)]
pub struct PublishedGenerator {
    places: Places,
    sizes: Sizes,
    schedule: SolverConfig,
    method: Method,
    compute: DType,
    device: Device,
}

/// How the networks lie.
enum Layout {
    /// Both in one file.
    Joint,
    /// Each by itself, as many as there are.
    Apart,
}

#[derive(Deserialize)]
struct Marks {
    #[serde(rename = "_class_name")]
    class_name: Option<String>,
    clip_sample: Option<bool>,
}

impl PublishedGenerator {
    /// Looks at the folder `dir`: the configurations of its parts have to fit each other. Networks will be of type `compute`, f32, and on a
    /// GPU bf16, on `device`.
    ///
    /// # Errors
    /// A missing or unreadable file, a network that is not understood, parts that do not fit each other.
    pub fn open(dir: &Path, compute: DType, device: &Device) -> Result<Self, Error> {
        let places = Places::read(dir)?;
        let [video, audio] = unets(&places)?;
        let sizes = Sizes {
            video: video.map(|unet| video_sizes(&places, unet)).transpose()?,
            audio: audio.map(|unet| audio_sizes(&places, unet)).transpose()?,
        };
        if sizes.video.is_none() && sizes.audio.is_none() {
            return Err(Error::model(
                dir,
                "found no networks that denoise, expected unet, audio_unet or both",
            ));
        }
        let (schedule, method) = schedule(&places)?;
        Ok(Self {
            places,
            sizes,
            schedule,
            method,
            compute,
            device: device.clone(),
        })
    }

    /// What clips say they were made with.
    #[must_use]
    pub fn name(&self) -> &str {
        self.places.name()
    }

    /// Samples a second of the sounds; 0 where there are none.
    #[must_use]
    pub fn sample_rate(&self) -> u32 {
        self.sizes.audio.map_or(0, |audio| audio.rate as u32)
    }

    /// A request with the defaults of the folder, for the streams that it has.
    #[must_use]
    pub fn request(&self, prompt: &str) -> PublishedRequest {
        let most = self.sizes.video.map_or(usize::MAX, |video| video.most_frames);
        let mut request = PublishedRequest::of(prompt, &self.places.defaults, most);
        request.method = Some(self.method);
        request.sequential = self.device.is_cpu();
        request
    }

    /// Makes clips at a time, from requests that differ in texts and seed alone; `on_progress` returns false to stop, and then there are
    /// none. Its neighbours in a batch change a clip by no more than rounding.
    ///
    /// # Errors
    /// No request, requests that do not go together or that the networks cannot fulfil, weights that are missing or damaged, values that
    /// are not finite, or a device without memory.
    pub fn generate(
        &self,
        requests: &[PublishedRequest],
        on_progress: &mut dyn FnMut(Progress) -> bool,
    ) -> Result<Option<Made>, Error> {
        let Some(request) = requests.first() else {
            return Err(Error::request("batch", "no request", "one or more"));
        };
        let plan = request.plan(&self.sizes)?;
        for other in &requests[1..] {
            other.plan(&self.sizes)?;
            if !request.goes_with(other) {
                let found = "requests of different settings";
                return Err(Error::request(
                    "batch",
                    found,
                    "differences in texts and seed alone",
                ));
            }
        }
        let method = request.method.unwrap_or(self.method);
        let solver = Solver::new(&self.schedule, method, request.steps)
            .map_err(|error| Error::request("steps", request.steps, error.to_string()))?;
        let mut watch = Watch {
            began: Instant::now(),
            seconds: Vec::new(),
        };
        let mut step = |stage, done, total| on_progress(Progress { stage, done, total });
        let texts = Texts::read(&self.places, requests, self.compute, &self.device)
            .map_err(|error| advised(error, Stage::Text, request))?;
        watch.lap(Stage::Text);
        if !step(Stage::Text, 1, 1) {
            return Ok(None);
        }
        let start = match &request.start {
            None => None,
            Some(start) => {
                let sides = [request.height, request.width];
                let latent = decode::encoded(&self.places, &start.pixels, sides, self.compute, &self.device)
                    .map_err(|error| advised(error, Stage::Start, request))?;
                watch.lap(Stage::Start);
                if !step(Stage::Start, 1, 1) {
                    return Ok(None);
                }
                Some(latent)
            }
        };
        let latents = self
            .latents(requests, &plan, &solver, &texts, start, &mut |done, total| {
                step(Stage::Denoise, done, total)
            })
            .map_err(|error| advised(error, Stage::Denoise, request))?;
        drop(texts);
        watch.lap(Stage::Denoise);
        let Some(latents) = latents else { return Ok(None) };
        let blank = Clip {
            frames: Vec::new(),
            frame_count: 0,
            width: request.width,
            height: request.height,
            fps: request.fps,
            samples: Vec::new(),
            sample_rate: self.sample_rate(),
        };
        let mut clips = vec![blank; requests.len()];
        if let Some(latents) = &latents.video {
            let total = plan.frames * clips.len();
            // A codec of several frames at a time may make more than are shown.
            let mut on_frame = |done: usize| step(Stage::Picture, done.min(total), total);
            let frames = decode::pictures(
                &self.places,
                latents,
                request.tile,
                self.compute,
                &self.device,
                &mut on_frame,
            )
            .map_err(|error| advised(error, Stage::Picture, request))?;
            watch.lap(Stage::Picture);
            let Some(frames) = frames else { return Ok(None) };
            for (clip, mut frames) in clips.iter_mut().zip(frames) {
                frames.truncate(plan.frames * request.width * request.height * 3);
                (clip.frames, clip.frame_count) = (frames, plan.frames);
            }
        }
        if let Some(latents) = &latents.audio {
            let samples = decode::samples(&self.places, latents, plan.samples, self.compute, &self.device)
                .map_err(|error| advised(error, Stage::Sound, request))?;
            for (clip, samples) in clips.iter_mut().zip(samples) {
                clip.samples = samples;
            }
            watch.lap(Stage::Sound);
            if !step(Stage::Sound, 1, 1) {
                return Ok(None);
            }
        }
        Ok(Some(Made {
            clips,
            seconds: watch.seconds,
        }))
    }

    /// Denoised latents; the networks are freed.
    fn latents(
        &self,
        requests: &[PublishedRequest],
        plan: &Plan,
        solver: &Solver,
        texts: &Texts,
        start: Option<Tensor>,
        on_step: &mut dyn FnMut(usize, usize) -> bool,
    ) -> Result<Option<Streams>, Error> {
        let Some(request) = requests.first() else {
            return Ok(None);
        };
        let (mode, device) = (request.mode, &self.device);
        let seeds: Vec<u64> = requests.iter().map(|request| request.seed).collect();
        let networks = self.networks([mode.has_video(), mode.has_audio()])?;
        let guided = |streams| Guided::new(&networks, texts, request.guidance, streams, request.sequential);
        let draw =
            |name: &str, shape: &[usize]| Ok::<_, Error>(solver.start(&noise(&seeds, name, shape, device)?)?);
        let video = match (plan.video, start) {
            (None, _) => None,
            (Some(shape), None) => Some(draw("noise.video", &shape)?),
            (Some(shape), Some(picture)) => {
                let noise = noise(&seeds, "noise.video", &shape, device)?;
                let clean = picture.broadcast_as(noise.shape())?.contiguous()?;
                Some(solver.noisy(&clean, &noise, plan.first)?)
            }
        };
        let audio = match plan.heard {
            Some(shape) => Some(draw("noise.audio", &shape)?),
            None => None,
        };
        let (mut done, apart) = (0, mode == PublishedMode::Reference);
        let steps = request.steps;
        let of_clip = if audio.is_some() && !apart {
            steps
        } else {
            steps - plan.first
        };
        let total = if apart {
            of_clip + steps
        } else {
            steps.min(of_clip)
        };
        let mut count = || {
            done += 1;
            on_step(done, total)
        };
        let joined = |guided, windows, fresh, first| Loop {
            guided,
            solver,
            windows,
            fade: plan.fade,
            first,
            fresh,
        };
        // What is made at once: in the published loop the clip beside fresh noise, else all there is.
        let together = guided([video.is_some(), audio.is_some() && !apart])?;
        let windows = match &video {
            Some(_) => &plan.windows,
            None => &plan.sound_windows,
        };
        let fresh = match (&plan.audio, apart) {
            (Some(shape), true) => Some((shape.as_slice(), seeds.as_slice())),
            _ => None,
        };
        let streams = Streams {
            video,
            audio: if apart { None } else { audio.clone() },
        };
        let Some(mut made) = joined(&together, windows, fresh, plan.first).run(streams, &mut count)? else {
            return Ok(None);
        };
        if apart {
            let alone = guided([false, true])?;
            let streams = Streams { video: None, audio };
            let Some(sound) = joined(&alone, &plan.sound_windows, None, 0).run(streams, &mut count)? else {
                return Ok(None);
            };
            made.audio = sound.audio;
        }
        Ok(Some(made))
    }

    /// The networks of the streams that are asked for.
    fn networks(&self, [video, audio]: [bool; 2]) -> Result<TavUnet, Error> {
        let (compute, device) = (self.compute, &self.device);
        let places = &self.places;
        if let (Layout::Joint, Some(dir)) = (layout(places)?, places.find(Piece::Unet)) {
            return Ok(TavUnet::load_streams(dir, [video, audio], compute, device)?);
        }
        let unet = match video {
            false => None,
            true => {
                let dir = places.require(Piece::Unet, "pictures")?;
                Some(match places.find(Piece::MotionAdapter) {
                    Some(motion) => Unet::load_with_motion(dir, motion, compute, device)?,
                    None => Unet::load(dir, compute, device)?,
                })
            }
        };
        let heard = match audio {
            false => None,
            true => {
                let dir = places.require(Piece::AudioUnet, "sounds")?;
                Some(Unet::load(dir, compute, device)?)
            }
        };
        let fusions = match (places.find(Piece::Fusion), &unet, &heard) {
            (Some(dir), Some(unet), Some(heard)) => fusions(dir, [unet, heard], compute, device)?,
            _ => [None, None],
        };
        Ok(TavUnet::of_parts(unet, heard, fusions)?)
    }
}

/// Seconds of stages.
struct Watch {
    began: Instant,
    seconds: Vec<(Stage, f64)>,
}

impl Watch {
    fn lap(&mut self, stage: Stage) {
        let now = Instant::now();
        self.seconds
            .push((stage, now.duration_since(self.began).as_secs_f64()));
        self.began = now;
    }
}

/// Whether both streams lie in one file.
fn layout(places: &Places) -> Result<Layout, Error> {
    match places.find(Piece::Unet) {
        Some(dir) if TavUnet::is_in(dir)? => Ok(Layout::Joint),
        _ => Ok(Layout::Apart),
    }
}

/// What the networks over clips and over spectrograms take and give.
fn unets(places: &Places) -> Result<[Option<UnetSizes>; 2], Error> {
    if let (Layout::Joint, Some(dir)) = (layout(places)?, places.find(Piece::Unet)) {
        return Ok(TavUnet::sizes_in(dir)?.map(Some));
    }
    let video = match (places.find(Piece::Unet), places.find(Piece::MotionAdapter)) {
        (None, _) => None,
        (Some(dir), Some(motion)) => Some(Unet::sizes_with_motion(dir, motion)?),
        (Some(dir), None) => Some(Unet::sizes_in(dir)?),
    };
    let audio = places.find(Piece::AudioUnet).map(Unet::sizes_in).transpose()?;
    Ok([video, audio])
}

/// Latents of as many channels as the autoencoder has, in and out.
fn fits(dir: &Path, unet: UnetSizes, channels: usize, place: &str) -> Result<(), Error> {
    for (field, found) in [
        ("in_channels", unet.in_channels),
        ("out_channels", unet.out_channels),
    ] {
        if found != channels {
            let words = format!("{field} is {found}, expected {channels} as latent_channels of {place}");
            return Err(Error::model(dir, words));
        }
    }
    Ok(())
}

fn video_sizes(places: &Places, unet: UnetSizes) -> Result<VideoSizes, Error> {
    let own = places.require(Piece::Unet, "pictures")?;
    let Some(most_frames) = unet.most_frames else {
        let words = "a network over single pictures, expected UNetMotionModel, or the folder motion_adapter beside it";
        return Err(Error::model(own, words));
    };
    let sizes = Pictures::read(places)?.sizes(most_frames);
    fits(own, unet, sizes.channels, Piece::Vae.folder())?;
    Ok(sizes)
}

fn audio_sizes(places: &Places, unet: UnetSizes) -> Result<AudioSizes, Error> {
    let dir = places.require(Piece::AudioVae, "sounds")?;
    let sizes = Sounds::read(places)?.sizes();
    let own = places
        .find(Piece::AudioUnet)
        .or(places.find(Piece::Unet))
        .unwrap_or(dir);
    fits(own, unet, sizes.channels, Piece::AudioVae.folder())?;
    Ok(sizes)
}

/// The schedule of the folder and how its steps are taken: the published ones where it has none.
pub(super) fn schedule(places: &Places) -> Result<(SolverConfig, Method), Error> {
    let Some(dir) = places.find(Piece::Scheduler) else {
        return Ok((SolverConfig::published(), Method::Ddim));
    };
    let path = match dir.is_file() {
        true => dir.to_owned(),
        false => dir.join(SCHEDULE),
    };
    let marks: Marks = config::read(&path)?;
    let class = marks.class_name.as_deref().unwrap_or_default();
    let method = match class {
        name if name.starts_with("DPMSolver") => Method::DpmSolver,
        name if name.starts_with("Euler") => Method::Euler,
        _ => Method::Ddim,
    };
    let mut config = SolverConfig::read(&path)?;
    if class == "DDIMScheduler" && marks.clip_sample.is_none() {
        // The default of that class, and of no other.
        config.clip_sample = true;
    }
    Ok((config, method))
}

/// Attention of the clip to the sound, and of the sound to the clip, as far as the folder has it.
fn fusions(
    dir: &Path,
    [video, audio]: [&Unet; 2],
    compute: DType,
    device: &Device,
) -> Result<[Option<Fusion>; 2], LoadError> {
    let Some(weights) = Weights::find(dir)? else {
        return Err(LoadError::Absent { path: dir.to_owned() });
    };
    let shapes = weights.shapes()?;
    let has = |name: &str| shapes.keys().any(|key| key.starts_with(&format!("{name}.")));
    let (wide, narrow) = (video.bottleneck(), audio.bottleneck());
    load(
        dir,
        compute,
        device,
        |_| false,
        |compute, vb| {
            let vb = vb.to_dtype(compute);
            let fusion = |name: &str, reader, read| {
                has(name)
                    .then(|| Fusion::new(reader, read, &vb.pp(name)))
                    .transpose()
            };
            let [clip, sound] = FUSIONS;
            Ok([fusion(clip, wide, narrow)?, fusion(sound, narrow, wide)?])
        },
    )
}

/// A device without memory, with the smallest change that helps.
fn advised(error: Error, stage: Stage, request: &PublishedRequest) -> Error {
    let words = error.to_string();
    let line = words.lines().next().unwrap_or_default().to_owned();
    if !words.to_lowercase().contains("out of memory") && !words.contains("OUT_OF_MEMORY") {
        return error;
    }
    let guided = request.guidance.video != 1.0 || request.guidance.audio != 1.0;
    let frames = request.frames();
    let window = request.window.unwrap_or(frames).min(frames) / 2;
    let advice = match stage {
        Stage::Picture if request.tile.is_none() => "--vae-tile 256 decodes pictures out of tiles".to_owned(),
        Stage::Picture => format!(
            "a --vae-tile below {} takes less",
            request.tile.unwrap_or_default()
        ),
        Stage::Denoise if guided && !request.sequential => {
            "--sequential runs the prompt and the negative prompt one after the other".to_owned()
        }
        Stage::Denoise if request.mode.has_video() && window >= LEAST_WINDOW => {
            let overlap = match window / 2 {
                half if half < request.overlap => format!(" --overlap {half}"),
                _ => String::new(),
            };
            format!("--window {window}{overlap} denoises fewer frames at a time")
        }
        Stage::Denoise if request.mode.has_video() => {
            format!("a --size below {}x{} takes less", request.width, request.height)
        }
        _ => "--precision bf16 halves the weights".to_owned(),
    };
    Error::Memory { advice, line }
}

#[cfg(test)]
mod tests {
    use super::super::places::Defaults;
    use super::*;
    use crate::diffusion::Guidance;

    /// What is advised when a stage of a request finds no memory, where the device says so in one of these ways.
    fn advice(stage: Stage, change: impl Fn(&mut PublishedRequest)) -> String {
        let mut request = PublishedRequest::of("a dog barks", &Defaults::default(), 24);
        change(&mut request);
        let said = [
            "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")\nstack backtrace",
            "Out of memory",
        ];
        let lines = said.map(|words| {
            let error = Error::Tensor(candle_core::Error::Msg(words.to_owned()));
            match advised(error, stage, &request) {
                Error::Memory { advice, line } => {
                    assert!(!line.contains('\n'), "{line}");
                    advice
                }
                other => panic!("{other}"),
            }
        });
        assert_eq!(lines[0], lines[1]);
        lines[0].clone()
    }

    /// One change after another, each of which takes less than the one before it, until none is left.
    #[test]
    fn too_little_memory_names_the_smallest_change() {
        let tile = |tile| move |request: &mut PublishedRequest| request.tile = tile;
        assert!(advice(Stage::Picture, tile(None)).starts_with("--vae-tile 256"));
        assert!(advice(Stage::Picture, tile(Some(256))).starts_with("a --vae-tile below 256"));
        assert!(advice(Stage::Denoise, |_| {}).starts_with("--sequential"));
        let unguided = |request: &mut PublishedRequest| {
            request.guidance = Guidance {
                video: 1.0,
                audio: 1.0,
            };
        };
        for change in [&unguided as &dyn Fn(&mut _), &|request: &mut PublishedRequest| {
            request.sequential = true;
        }] {
            assert!(advice(Stage::Denoise, change).starts_with("--window 10 --overlap 5 "));
        }
        let windowed = |window, overlap| {
            move |request: &mut PublishedRequest| {
                request.sequential = true;
                (request.window, request.overlap) = (Some(window), overlap);
            }
        };
        assert!(advice(Stage::Denoise, windowed(12, 2)).starts_with("--window 6 denoises"));
        // What is advised can be asked for.
        assert!(advice(Stage::Denoise, windowed(10, 5)).starts_with("--window 5 --overlap 2 "));
        assert!(advice(Stage::Denoise, windowed(5, 2)).starts_with("a --size below 320x256"));
        let sound = |request: &mut PublishedRequest| {
            (request.sequential, request.mode) = (true, PublishedMode::AudioOnly);
        };
        assert!(advice(Stage::Denoise, sound).starts_with("--precision bf16"));
        assert!(advice(Stage::Text, |_| {}).starts_with("--precision bf16"));
        // Anything else is told as it is.
        let error = Error::Tensor(candle_core::Error::Msg("shape mismatch".to_owned()));
        let request = PublishedRequest::of("a dog barks", &Defaults::default(), 24);
        assert!(matches!(
            advised(error, Stage::Denoise, &request),
            Error::Tensor(_)
        ));
    }
}
