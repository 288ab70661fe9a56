//! What a task will need, found without building it: the shapes of its parameters, and the sizes that its settings fix.
//!
//! Constructors run as they are, on an [`Outline`]; what depends on data that are not there stays unknown.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use fulgur_benchmark::encoder::BuiltinEncoder;
use fulgur_benchmark::judge::{JudgeConfig, Judges};
use fulgur_datasets::labelled::Labelled;
use fulgur_datasets::scenes::{ClipSpec, Motion};
use fulgur_datasets::things::Things;
use fulgur_kernels::spectrum::LogMel;
use fulgur_lightnet::config;
use fulgur_lightnet::lm::classifier::SequenceClassifier;
use fulgur_lightnet::lm::{Architecture, Config, LanguageModel};
use fulgur_lightnet::params::Outline;
use fulgur_lightnet::vision::{Classifier, Dit};
use fulgur_tavdiffusion::codec::{
    MelCodec, MelCodecConfig, PictureCodec, VideoCodec, VideoCodecConfig, Vocoder,
};
use fulgur_tavdiffusion::published::{Encoders, TavPart, TavUnet};
use fulgur_tavdiffusion::streams::TwoStream;
use fulgur_tavdiffusion::text::{TextConfig, TextEncoder};

use super::super::error::{TaskResult, TrainError};
use super::super::recipe::Recipe;
use super::{
    classify, encoder, image, judge, lm, lra, mel_codec, picture_codec, recall, tav, tav_published, text,
    video_codec, vocoder,
};
use crate::estimate::time::Work;

/// Bytes of an f32 or u32 value.
const WIDE: u64 = 4;
/// Bytes of a bf16 value.
const NARROW: u64 = 2;
const RGB: usize = 3;
/// The name of every matrix contains this.
const ALL: &[&str] = &[""];

/// What a task needs on the device of its parameters.
#[derive(Clone, Debug, Default)]
pub struct Needs {
    /// The parameters that are trained.
    pub params: Outline,
    /// What the names of those matrices contain that are rounded to bf16 on a GPU; a step keeps the rounded copies for
    /// its way back.
    pub rounded: &'static [&'static str],
    /// Folders of trained networks that take part and stay as they are.
    pub frozen: Vec<PathBuf>,
    /// Bytes of data that lie on the device for the whole run; 0 where the task keeps none.
    pub pool: Option<u64>,
    /// Bytes of a batch, where its size does not depend on what is in it.
    pub batch: Option<u64>,
    /// Floating-point operations of a batch forward and backward, as [`Task::flops_per_sample`] counts them.
    ///
    /// [`Task::flops_per_sample`]: crate::train::Task::flops_per_sample
    pub flops: Option<f64>,
    /// What the time of a batch on a GPU follows from.
    pub(crate) work: Option<Work>,
    /// Bytes that a step on a GPU keeps for its way back, where that can be told from shapes.
    pub kept: Option<u64>,
    /// What is not known, and why.
    pub unknown: Vec<String>,
}

/// Finds what the task of a recipe needs.
type Look = fn(&Recipe) -> TaskResult<Needs>;

/// The tasks that can be looked at before they are built.
const OUTLINES: &[(&str, Look)] = &[
    ("text", text),
    ("video-codec", video_codec),
    ("mel-codec", mel_codec),
    ("vocoder", vocoder),
    ("encoder", encoder),
    ("judge", judge),
    ("lm", lm),
    ("recall", recall),
    ("lra", lra),
    ("classify", classify),
    ("picture-codec", picture_codec),
    ("image", image),
    ("tav", tav),
    ("tav-published", tav_published),
];

/// What the task that `recipe` names needs. Data sets are looked at where the network depends on them; weights are not
/// read, and none are made.
///
/// # Errors
/// The task is none of those that can be looked at, or it refuses its part of the recipe.
pub fn needs(recipe: &Recipe) -> Result<Needs, TrainError> {
    let Some((name, look)) = OUTLINES.iter().find(|(name, _)| *name == recipe.task) else {
        let known: Vec<_> = OUTLINES.iter().map(|(name, _)| *name).collect();
        return Err(TrainError::Recipe {
            origin: recipe.origin.clone(),
            reason: format!(
                "the needs of a task `{}` are not known, only those of {}",
                recipe.task,
                known.join(", ")
            ),
        });
    };
    look(recipe).map_err(TrainError::task(format!("{}: task {name}", recipe.origin)))
}

/// Bytes of the states f32 that one rank hands to the next in a forward pass of a whole batch of `recipe`, where ranks share
/// sequences; and the layers that do. Zero for what has no recurrence.
///
/// # Errors
/// The task refuses its part of the recipe.
pub fn states(recipe: &Recipe) -> Result<(usize, usize), TrainError> {
    if recipe.task != "lm" {
        return Ok((0, 0));
    }
    let options: lm::Options = recipe.own()?;
    let config = options.model.config();
    let layers = (0..config.num_hidden_layers)
        .filter(|&layer| config.architecture != Architecture::Llama && config.softmax_layer(layer).is_none())
        .count();
    let turned = match config.use_lrpe || config.architecture == Architecture::Cosformer2 {
        true => 2,
        false => 1,
    };
    // H heads of D by E, where H E is the width of values.
    let state = turned * config.value_size() * config.head_width();
    Ok((WIDE as usize * options.batch * state * layers, layers))
}

/// The clips of all tasks.
fn clips() -> ClipSpec {
    ClipSpec::default()
}

/// The number of values, as a product that does not overflow.
fn values(dims: &[usize]) -> u64 {
    fulgur_lightnet::params::outline::values_of(dims)
}

fn samples_bytes(batch: usize) -> u64 {
    WIDE.saturating_mul(values(&[batch, clips().samples()]))
}

fn text(recipe: &Recipe) -> TaskResult<Needs> {
    let settings: text::Settings = recipe.own()?;
    let params = Outline::new();
    TextEncoder::new(&settings.model, &params.builder())?;
    Ok(Needs {
        params,
        rounded: &["blocks."],
        pool: Some(0),
        unknown: vec!["a batch, which is as wide as its longest sentence".to_owned()],
        ..Needs::default()
    })
}

/// The network of a recipe of the task `lm`, without its weights.
///
/// # Errors
/// The recipe's table is none of this task, or the network cannot be.
pub(crate) fn language_model(recipe: &Recipe) -> TaskResult<(Config, Outline)> {
    let options: lm::Options = recipe.own()?;
    options.model.check()?;
    let params = Outline::new();
    let config = options.model.config();
    LanguageModel::new(&config, DType::F32, &params.builder())?;
    Ok((config, params))
}

fn lm(recipe: &Recipe) -> TaskResult<Needs> {
    let options: lm::Options = recipe.own()?;
    let (config, params) = language_model(recipe)?;
    let window = [options.batch, options.context];
    Ok(windows(&config, params, window, options.recompute))
}

fn recall(recipe: &Recipe) -> TaskResult<Needs> {
    let options: recall::Options = recipe.own()?;
    let params = Outline::new();
    let config = options.config()?;
    LanguageModel::new(&config, DType::F32, &params.builder())?;
    Ok(windows(&config, params, [options.batch, options.context], false))
}

fn lra(recipe: &Recipe) -> TaskResult<Needs> {
    let options: lra::Options = recipe.own()?;
    let params = Outline::new();
    let config = options.config()?;
    SequenceClassifier::new(&config, DType::F32, &params.builder())?;
    // Pixels and targets; ids stay on the host.
    let pixels = config.grid.map_or(0, |[rows, columns]| values(&[rows, columns]));
    let batch = WIDE.saturating_mul(values(&[options.batch]).saturating_mul(pixels.saturating_add(1)));
    Ok(Needs {
        params,
        rounded: ALL,
        pool: Some(0),
        batch: Some(batch),
        ..Needs::default()
    })
}

fn classify(recipe: &Recipe) -> TaskResult<Needs> {
    let options: classify::Options = recipe.own()?;
    let config = classify::outlined(&options)?;
    let params = Outline::new();
    let model = Classifier::new(&config, DType::F32, &params.builder())?;
    let [height, width] = config.image_size;
    // Pixels, shares of classes, and what stochastic depth keeps.
    let picture = [config.num_channels, height, width];
    let branches = if options.stochastic_depth > 0.0 {
        model.branches()
    } else {
        0
    };
    let values = values(&picture)
        .saturating_add((config.classes() + branches) as u64)
        .saturating_mul(values(&[options.batch]));
    let shapes = params.shapes().into_iter().collect();
    let flops = classify::flops::per_picture(&config, &shapes);
    Ok(Needs {
        params,
        rounded: ALL,
        pool: Some(0),
        batch: Some(WIDE.saturating_mul(values)),
        flops: Some(options.batch as f64 * flops),
        ..Needs::default()
    })
}

fn picture_codec(recipe: &Recipe) -> TaskResult<Needs> {
    let options: picture_codec::Options = recipe.own()?;
    let (config, frame, params) = (options.config()?, options.frame(), Outline::new());
    let codec = PictureCodec::new(&config, &params.builder())?;
    let [height, width] = frame.size.map(|side| side / codec.factor());
    // Pixels and the noise on latents.
    let picture = values(&[frame.values()]).saturating_add(values(&[height, width, codec.channels()]));
    Ok(Needs {
        params,
        rounded: ALL,
        pool: Some(0),
        batch: Some(WIDE.saturating_mul(picture.saturating_mul(options.batch as u64))),
        ..Needs::default()
    })
}

/// Of a denoiser of pictures; without a text encoder, whose width and captions are not known before they are read.
fn image(recipe: &Recipe) -> TaskResult<Needs> {
    let options: image::Options = recipe.own()?;
    let set = Labelled::open(&options.set, &options.data)?;
    let codec = options.codec.as_ref().map(|folder| {
        PictureCodec::read(folder)
            .map_err(|error| format!("{error}; without the codec the needs of its latents are not known"))
    });
    let space = options.space(set.is_grey(), codec.transpose()?.as_ref())?;
    let width = options.text.as_ref().map(|folder| TextConfig::read(folder));
    let width = width.transpose()?.map(|config| config.hidden_size);
    let config = options.config(&space, set.classes().to_vec(), width)?;
    let params = Outline::new();
    Dit::new(&config, DType::F32, &params.builder())?;
    let [height, width] = config.image_size;
    // Pixels or latents and noise, both weights, time and class.
    let picture = values(&[2, config.num_channels, height, width]).saturating_add(4);
    let known = config.text_dim.is_none();
    Ok(Needs {
        params,
        rounded: ALL,
        pool: Some(0),
        batch: known.then(|| WIDE.saturating_mul(picture.saturating_mul(values(&[options.batch])))),
        frozen: options.text.into_iter().chain(options.codec).collect(),
        unknown: match known {
            true => Vec::new(),
            false => vec!["the batch: how long the longest caption is".to_owned()],
        },
        ..Needs::default()
    })
}

/// Of a language model that trains on a batch of windows.
fn windows(config: &Config, params: Outline, [batch, context]: [usize; 2], recompute: bool) -> Needs {
    let shapes = params.shapes().into_iter().collect();
    let operations = lm::flops::per_token(config, &shapes, context);
    let tokens = values(&[batch, context]);
    let all = tokens as f64;
    let kept = |recompute| config.kept_bytes(tokens, DType::BF16, recompute);
    let work = kept(false).map(|kept| Work {
        products: all * operations.products,
        mixers: all * operations.paced,
        kept: kept as f64,
        again: recompute,
    });
    Needs {
        flops: Some(all * operations.all()),
        work,
        params,
        kept: kept(recompute),
        rounded: ALL,
        pool: Some(0),
        // Targets; ids stay on the host.
        batch: Some(WIDE.saturating_mul(tokens)),
        ..Needs::default()
    }
}

fn video_codec(recipe: &Recipe) -> TaskResult<Needs> {
    let options: video_codec::Options = recipe.own()?;
    let (params, spec, n) = (Outline::new(), clips(), options.batch);
    let codec = VideoCodec::new(&options.model, true, &params.builder())?;
    let [t, h, w] = codec.grid(spec.frames(), spec.height, spec.width)?;
    // Pictures and how much of each pixel is covered, in bytes.
    let clip = values(&[spec.frames(), spec.height, spec.width, RGB + 1]);
    let noise = WIDE.saturating_mul(values(&[n, t, h, w, options.model.latent_channels]));
    let drawn = if options.pool == 0 { clip } else { WIDE };
    Ok(Needs {
        params,
        rounded: ALL,
        pool: Some(clip.saturating_mul(options.pool as u64)),
        batch: Some(noise.saturating_add(drawn.saturating_mul(n as u64))),
        ..Needs::default()
    })
}

fn mel_codec(recipe: &Recipe) -> TaskResult<Needs> {
    let options: mel_codec::Options = recipe.own()?;
    let (params, n) = (Outline::new(), options.batch);
    let codec = MelCodec::new(&options.model, true, &params.builder())?;
    let [frames, bands] = codec.grid(mel_frames()?)?;
    let noise = values(&[n, frames, bands, options.model.latent_channels]);
    Ok(Needs {
        params,
        rounded: ALL,
        pool: Some(0),
        batch: Some(samples_bytes(n).saturating_add(WIDE.saturating_mul(noise))),
        ..Needs::default()
    })
}

fn vocoder(recipe: &Recipe) -> TaskResult<Needs> {
    let options: vocoder::Options = recipe.own()?;
    let params = Outline::new();
    Vocoder::new(&options.model, &params.builder())?;
    Ok(Needs {
        params,
        frozen: options.mel_codec.into_iter().collect(),
        pool: Some(0),
        batch: Some(samples_bytes(options.batch)),
        ..Needs::default()
    })
}

fn encoder(recipe: &Recipe) -> TaskResult<Needs> {
    let options: encoder::Options = recipe.own()?;
    let (params, spec, n) = (Outline::new(), clips(), options.batch);
    BuiltinEncoder::new(&options.model, &params.builder())?;
    // A frame in bytes and its grain; the strength of the grain and the class of the clip.
    let frame = values(&[spec.height, spec.width, RGB]).saturating_mul(1 + WIDE) + 2 * WIDE;
    Ok(Needs {
        params,
        pool: Some(0),
        batch: Some(samples_bytes(n).saturating_add(frame.saturating_mul(n as u64))),
        ..Needs::default()
    })
}

/// The judges tell the things apart that the data have.
fn judge(recipe: &Recipe) -> TaskResult<Needs> {
    let options: judge::Options = recipe.own()?;
    let dir = options.clips.data.join("stamps");
    let mut things = Things::load(&dir).map_err(|e| format!("{e}; run `fulgur data fetch stamps`"))?;
    if options.clips.without_gpl {
        things.retain_licences(|licence| !licence.contains("GPL"));
    }
    let (params, spec) = (Outline::new(), clips());
    let config = JudgeConfig {
        things: things.iter().map(|thing| thing.id.clone()).collect(),
        motions: Motion::ALL
            .iter()
            .map(|motion| motion.name().to_owned())
            .collect(),
        size: spec.width,
        frames: spec.frames(),
        fps: spec.fps,
        samples: spec.samples(),
        dim: options.dim,
        depth: options.depth,
    };
    Judges::new(&config, &params.builder())?;
    Ok(Needs {
        params,
        pool: Some(0),
        unknown: vec!["a batch, which holds filters besides its clips".to_owned()],
        ..Needs::default()
    })
}

fn tav(recipe: &Recipe) -> TaskResult<Needs> {
    let options: tav::Options = recipe.own()?;
    let params = Outline::new();
    TwoStream::new(&options.model, true, DType::F32, &params.builder())?;
    let pool = latents(&options.video_codec, &options.mel_codec)?.map(|[video, audio, things]| {
        let latents = video.saturating_add(audio).saturating_add(things);
        let clips = NARROW
            .saturating_mul(options.pool as u64)
            .saturating_add(WIDE.saturating_mul(options.validation as u64));
        latents.saturating_mul(clips)
    });
    let mut unknown = vec!["a batch, which is as wide as its longest caption".to_owned()];
    if pool.is_none() {
        unknown.push("the pool of latents, for one of the codecs is not there yet".to_owned());
    }
    Ok(Needs {
        kept: None,
        params,
        rounded: &["blocks.", "fusion.", ".input.", ".tpe."],
        frozen: vec![options.text_encoder, options.video_codec, options.mel_codec],
        pool,
        batch: None,
        flops: None,
        work: None,
        unknown,
    })
}

/// Of networks of the published kind; weights of parts that are not trained are not counted.
fn tav_published(recipe: &Recipe) -> TaskResult<Needs> {
    let options: tav_published::Options = recipe.own()?;
    options.check()?;
    let codecs = options
        .codec_places()
        .map_err(|error| format!("{error}; without the codecs the needs of their latents are not known"))?;
    let start = options
        .start
        .as_deref()
        .map(tav_published::described)
        .transpose()?;
    let (_, config) = options.network(start.as_ref(), &codecs)?;
    let (whole, params) = (Outline::new(), Outline::new());
    TavUnet::new(&config, &whole.builder())?;
    let own = params.builder();
    for (name, shape) in whole.shapes() {
        if options.trained.contains(&TavPart::of(&name)) {
            own.get(shape, &name)?;
        }
    }
    let sizes = Encoders::sizes_in(
        &codecs,
        options.frames,
        options.fps,
        [options.height, options.width],
    )?;
    let latents = values(&sizes.video).saturating_add(values(&sizes.audio));
    // Clips and texts, weights of signal and noise, waves of steps, and noise.
    let waves = config.first_channels();
    let sample = latents.saturating_add(4 + waves.iter().sum::<usize>() as u64);
    let mut unknown = vec!["states of captions, whose number is not known before they are read".to_owned()];
    if options.start.is_some() {
        unknown.push("weights of parts that are not trained".to_owned());
    }
    let clips = (options.pool as u64).saturating_add(options.validation as u64);
    Ok(Needs {
        params,
        rounded: ALL,
        pool: Some(NARROW.saturating_mul(latents.saturating_mul(clips))),
        batch: Some(WIDE.saturating_mul(sample.saturating_mul(options.batch as u64))),
        unknown,
        ..Needs::default()
    })
}

/// Values of a clip's picture and sound behind the codecs in these folders, and of the map of its things; none where a
/// codec is not there.
fn latents(video: &Path, mel: &Path) -> TaskResult<Option<[u64; 3]>> {
    let [video, mel] = [video, mel].map(|dir| dir.join("config.json"));
    if !video.is_file() || !mel.is_file() {
        return Ok(None);
    }
    let (video, mel): (VideoCodecConfig, MelCodecConfig) = (config::read(&video)?, config::read(&mel)?);
    let spec = clips();
    let [t, h, w] = VideoCodec::new(&video, true, &Outline::new().builder())?.grid(
        spec.frames(),
        spec.height,
        spec.width,
    )?;
    let [s, bands] = MelCodec::new(&mel, true, &Outline::new().builder())?.grid(mel_frames()?)?;
    Ok(Some([
        values(&[t, h, w, video.latent_channels]),
        values(&[s, bands, mel.latent_channels]),
        values(&[t, h, w]),
    ]))
}

fn mel_frames() -> candle_core::Result<usize> {
    Ok(LogMel::speech_16k(&Device::Cpu)?.frames(clips().samples()))
}

#[cfg(test)]
mod tests;
