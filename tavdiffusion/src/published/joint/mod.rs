//! TAVDiffusion: a UNet over clips and one over spectrograms that meet at their narrowest places (TAVGBench, section 4).
//!
//! ```text
//! a = audio way down;  v = video mid(video way down)
//! video: v <- v + attention(v, a)      audio: a <- a + attention(a, v)      (each only where it is configured)
//! audio: mid, way up;  video: way up
//! ```
//!
//! Published sampling has the first direction alone.

mod config;
mod start;

pub use config::{Direction, Reads, TavConfig, TavPart};
pub use start::{TavStart, TrainedTav};

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::VarBuilder;
use fulgur_lightnet::config as files;
use fulgur_lightnet::diffusion::ddpm_step;
use fulgur_lightnet::params::folder::{self, LoadError, Weights};
use serde::Deserialize;

use self::config::{AUDIO, FUSIONS};
use super::fusion::{Alignment, Fusion};
use super::names::{Stored, Translation, below, translated};
use super::unet::{Running, Unet, UnetNames, UnetSizes};
use crate::denoiser::{Denoiser, Latents, TextCondition};

/// What comes before all names where a wrapper of training was saved.
const WRAPPER: &str = "module.";
/// `_class_name` of a folder with both networks.
const CLASS_NAME: &str = "TavDiffusionUnet";
/// Ends of the names of tables of places, which follow from their size.
const TABLES: [&str; 2] = [".pos_embed.pe", ".pos_encoder.pe"];

/// Both networks with their weights, or one of them.
#[derive(Clone, Debug)]
pub struct TavUnet {
    video: Option<Unet>,
    audio: Option<Unet>,
    video_reads: Option<Fusion>,
    audio_reads: Option<Fusion>,
    reads: Reads,
    alignment: Option<Alignment>,
}

/// What [`TavUnet::forward`] gives.
#[derive(Clone, Debug)]
pub struct Predicted {
    /// As the noisy clip, where there was one.
    pub video: Option<Tensor>,
    /// As the noisy spectrogram, where there was one.
    pub audio: Option<Tensor>,
    /// Narrowest places of sound and clip, `[B, N, C]` each, where there were both: what an alignment compares.
    pub places: Option<(Tensor, Tensor)>,
}

impl TavUnet {
    /// Takes the UNet over clips from the root of `vb`, `audio_unet`, `cross_attn`, where the sound reads also `cross_attn_audio`, and the
    /// heads of the alignment.
    ///
    /// # Errors
    /// Networks that cannot be; a tensor that is missing or has another shape.
    pub fn new(config: &TavConfig, vb: &VarBuilder) -> Result<Self> {
        let video = Unet::with_motion(&config.video, &config.motion, vb)?;
        let audio = Unet::new(&config.audio, &vb.pp(AUDIO))?;
        let [video_reads, audio_reads] = config.fusions([Some(&video), Some(&audio)], vb)?;
        Ok(Self {
            video_reads,
            audio_reads,
            reads: config.reads,
            alignment: config
                .alignment
                .map(|sizes| Alignment::new(sizes, vb))
                .transpose()?,
            video: Some(video),
            audio: Some(audio),
        })
    }

    /// Networks that lie apart; `fusions` are attentions of the clip to the sound, and of the sound to the clip.
    ///
    /// # Errors
    /// No network, a network over clips without motion modules, or states of a text of two widths.
    pub fn of_parts(video: Option<Unet>, audio: Option<Unet>, fusions: [Option<Fusion>; 2]) -> Result<Self> {
        if video.is_none() && audio.is_none() {
            bail!("no network, expected one over clips, over spectrograms, or both");
        }
        if let (Some(video), Some(audio)) = (&video, &audio)
            && let (Some(seen), Some(heard)) = (video.context(), audio.context())
            && seen != heard
        {
            bail!(
                "cross_attention_dim is {seen} over clips and {heard} over spectrograms, expected the same"
            );
        }
        let [video_reads, audio_reads] = fusions;
        Ok(Self {
            video,
            audio,
            video_reads,
            audio_reads,
            reads: Reads::Other,
            alignment: None,
        })
    }

    /// The network over clips.
    #[must_use]
    pub fn video(&self) -> Option<&Unet> {
        self.video.as_ref()
    }

    /// The network over spectrograms.
    #[must_use]
    pub fn audio(&self) -> Option<&Unet> {
        self.audio.as_ref()
    }

    /// Whether a stream reads the other: without it the two need not be asked together.
    #[must_use]
    pub fn meet(&self) -> bool {
        self.reads == Reads::Other && (self.video_reads.is_some() || self.audio_reads.is_some())
    }

    /// As [`Unet::set_recompute`], of both networks.
    pub fn set_recompute(&mut self, recompute: bool) {
        for network in [&mut self.video, &mut self.audio].into_iter().flatten() {
            network.set_recompute(recompute);
        }
    }

    /// What aligns the streams in training.
    #[must_use]
    pub fn alignment(&self) -> Option<&Alignment> {
        self.alignment.as_ref()
    }

    /// What the networks predict for `video` `[B, C, F, H, W]`, `audio` `[B, C, T, bands]`, or one of them alone, at the steps `timestep`
    /// `[B]`, reading `text` `[B, L, c]`.
    ///
    /// # Errors
    /// No stream, or shapes that do not fit.
    pub fn forward(
        &self,
        video: Option<&Tensor>,
        audio: Option<&Tensor>,
        timestep: &Tensor,
        text: Option<&Tensor>,
    ) -> Result<Predicted> {
        self.forward_at(video, audio, [timestep; 2], text)
    }

    /// As [`Self::forward`], with the steps of each network, or with its [`Unet::waves`] of them.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn forward_at(
        &self,
        video: Option<&Tensor>,
        audio: Option<&Tensor>,
        [video_steps, audio_steps]: [&Tensor; 2],
        text: Option<&Tensor>,
    ) -> Result<Predicted> {
        if video.is_none() && audio.is_none() {
            bail!("neither a clip nor a sound, expected one of them or both");
        }
        let sound = audio.map(|audio| encode(audio, self.audio(), audio_steps, text));
        let clip = video.map(|video| encode(video, self.video(), video_steps, text));
        let (mut sound, mut clip) = (sound.transpose()?, clip.transpose()?);
        if let Some((unet, clip)) = &mut clip {
            unet.middle(clip)?;
        }
        let mut places = None;
        // Both read what the other was before it read.
        let heard = sound.as_ref().map(|(_, sound)| sound.x.clone());
        let seen = clip.as_ref().map(|(_, clip)| clip.x.clone());
        if let Some((_, clip)) = &mut clip {
            self.read(self.video_reads.as_ref(), clip, heard.as_ref())?;
        }
        if let Some((_, sound)) = &mut sound {
            self.read(self.audio_reads.as_ref(), sound, seen.as_ref())?;
        }
        if let (Some(heard), Some(seen), Some((_, clip))) = (&heard, &seen, &clip) {
            let flat = |x: &Tensor| x.reshape((clip.clips(), (), x.dim(3)?));
            places = Some((flat(heard)?, flat(seen)?));
        }
        let audio = match sound {
            Some((unet, mut sound)) => {
                unet.middle(&mut sound)?;
                Some(unet.decode(sound)?)
            }
            None => None,
        };
        Ok(Predicted {
            video: clip.map(|(unet, clip)| unet.decode(clip)).transpose()?,
            audio,
            places,
        })
    }

    /// Lets a stream at its narrowest place read the other, or itself; without what it reads it stays as it is.
    fn read(&self, fusion: Option<&Fusion>, stream: &mut Running, other: Option<&Tensor>) -> Result<()> {
        let source = match self.reads {
            Reads::Other => other.cloned(),
            Reads::Itself => Some(stream.x.clone()),
        };
        if let (Some(fusion), Some(source)) = (fusion, source) {
            stream.x = fusion.forward(&stream.x, &source, stream.clips())?;
        }
        Ok(())
    }

    /// What the folder says of its networks: `config.json`, else what the shapes of the authors' checkpoint say.
    ///
    /// # Errors
    /// The file does not describe them, or there are no weights.
    pub fn config_in(dir: &Path) -> std::result::Result<TavConfig, LoadError> {
        let path = dir.join("config.json");
        if path.is_file() {
            return Ok(files::read_checked(&path, TavConfig::check)?);
        }
        Ok(TavConfig::of_shapes(&shapes_in(dir)?))
    }

    /// What the networks in the folder `dir` take and give: over clips, and over spectrograms.
    ///
    /// # Errors
    /// As [`Self::config_in`].
    pub fn sizes_in(dir: &Path) -> std::result::Result<[UnetSizes; 2], LoadError> {
        let config = Self::config_in(dir)?;
        let video = UnetSizes::of(&config.motion.plan(&config.video)?);
        Ok([video, UnetSizes::of(&config.audio.plan()?)])
    }

    /// Whether the folder `dir` holds both networks in one file.
    ///
    /// # Errors
    /// Its files are damaged.
    pub fn is_in(dir: &Path) -> std::result::Result<bool, LoadError> {
        #[derive(Deserialize)]
        struct Marks {
            #[serde(rename = "_class_name")]
            class_name: Option<String>,
        }
        let path = dir.join("config.json");
        if path.is_file() {
            let marks: Marks = files::read(&path)?;
            return Ok(marks.class_name.as_deref() == Some(CLASS_NAME));
        }
        let inside = |name: &String| {
            name.strip_prefix(WRAPPER)
                .unwrap_or(name)
                .starts_with("audio_unet.")
        };
        Ok(shapes_in(dir)?.keys().any(inside))
    }

    /// Loads the networks in the folder `dir` onto `device`, with weights in `compute`: f32, or bf16 on a GPU. Names are those of the
    /// authors' checkpoint, with or without the prefix of its wrapper, or those of diffusers for motion modules.
    ///
    /// # Errors
    /// No such folder, networks that are not understood, tensors that are missing, unexpected or of another shape: all are listed.
    pub fn load(dir: &Path, compute: DType, device: &Device) -> std::result::Result<Self, LoadError> {
        Self::load_streams(dir, [true, true], compute, device)
    }

    /// As [`Self::load`], of the network over clips, that over spectrograms, or both; the tensors of the other are not read.
    ///
    /// # Errors
    /// As [`Self::load`], or neither is asked for.
    pub fn load_streams(
        dir: &Path,
        [clips, sounds]: [bool; 2],
        compute: DType,
        device: &Device,
    ) -> std::result::Result<Self, LoadError> {
        let file = InFile::find(dir)?;
        let config = &file.config;
        // What joins the networks, and what only training calls, is of both.
        let part = |name: &str| {
            let own = file.own(name);
            match (TavPart::of(own), config.reads) {
                (TavPart::Fusion, Reads::Itself) if below(own, FUSIONS[1]).is_some() => sounds,
                (TavPart::Fusion, Reads::Itself) => clips,
                (TavPart::Fusion | TavPart::Alignment, _) => clips && sounds,
                (TavPart::Audio, _) => sounds,
                (TavPart::Video | TavPart::Motion, _) => clips,
            }
        };
        let ignored = |name: &str| file.is_ignored(name);
        folder::load_part(&file.weights, part, compute, device, ignored, |compute, vb| {
            let vb = translated(&vb.to_dtype(compute), file.translation.clone());
            match (clips, sounds) {
                (true, true) => Self::new(config, &vb),
                _ => {
                    let video = clips.then(|| Unet::with_motion(&config.video, &config.motion, &vb));
                    let audio = sounds.then(|| Unet::new(&config.audio, &vb.pp(AUDIO)));
                    let (video, audio) = (video.transpose()?, audio.transpose()?);
                    let fusions = match config.reads {
                        Reads::Other => [None, None],
                        Reads::Itself => config.fusions([video.as_ref(), audio.as_ref()], &vb)?,
                    };
                    let mut whole = Self::of_parts(video, audio, fusions)?;
                    whole.reads = config.reads;
                    Ok(whole)
                }
            }
        })
    }
}

/// Both networks in one file of weights, which may be named by one of two libraries and lie below a wrapper.
struct InFile {
    config: TavConfig,
    weights: Weights,
    wrapper: &'static str,
    translation: Translation,
}

impl InFile {
    fn find(dir: &Path) -> std::result::Result<Self, LoadError> {
        let config = TavUnet::config_in(dir)?;
        let Some(weights) = Weights::find(dir)? else {
            return Err(LoadError::Absent { path: dir.to_owned() });
        };
        let shapes = weights.shapes()?;
        let wrapper = match shapes.keys().all(|name| name.starts_with(WRAPPER)) {
            true => WRAPPER,
            false => "",
        };
        Ok(Self {
            translation: translation(&config, wrapper, UnetNames::of(&shapes))?,
            config,
            weights,
            wrapper,
        })
    }

    /// A name without that of the wrapper.
    fn own<'a>(&self, name: &'a str) -> &'a str {
        name.strip_prefix(self.wrapper).unwrap_or(name)
    }

    /// Whether the tensor may be there or not.
    fn is_ignored(&self, name: &str) -> bool {
        let own = self.own(name);
        let head = TavPart::of(own) == TavPart::Alignment;
        TABLES.iter().any(|table| own.ends_with(table)) || (head && self.config.alignment.is_none())
    }
}

/// A stream on its way down through its network.
fn encode<'a>(
    stream: &Tensor,
    unet: Option<&'a Unet>,
    timestep: &Tensor,
    text: Option<&Tensor>,
) -> Result<(&'a Unet, Running)> {
    match unet {
        Some(unet) => Ok((unet, unet.encode(stream, timestep, text)?)),
        None => bail!("no network for {:?}, which was not loaded", stream.dims()),
    }
}

impl TavUnet {
    /// Either network: both are of one type on one device.
    fn network(&self) -> Option<&Unet> {
        self.video.as_ref().or(self.audio.as_ref())
    }
}

/// Names of the networks in a file: those of the network over clips are of one of two libraries.
fn translation(config: &TavConfig, wrapper: &'static str, names: UnetNames) -> Result<Translation> {
    let clips = names.translation(&config.motion.plan(&config.video)?);
    Ok(Arc::new(move |name: &str| {
        match (&clips, name.starts_with(AUDIO)) {
            (Some(clips), false) => match clips(name) {
                Stored::As(name) => Stored::As(format!("{wrapper}{name}")),
                other => other,
            },
            _ => Stored::As(format!("{wrapper}{name}")),
        }
    }))
}

/// As generators are asked: latents are channels-last, and time is a fraction of the 1,000 steps of the schedule. The states of padding are
/// read like those of words, as in training.
impl Denoiser for TavUnet {
    fn predict(&self, latents: &Latents, time: &Tensor, text: &TextCondition) -> Result<Latents> {
        let steps = time.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        let steps: Vec<f32> = steps.into_iter().map(|time| ddpm_step(time) as f32).collect();
        let count = steps.len();
        let steps = Tensor::from_vec(steps, count, time.device())?;
        let video = latents.video.permute((0, 4, 1, 2, 3))?.contiguous()?;
        let audio = latents.audio.permute((0, 3, 1, 2))?.contiguous()?;
        let predicted = self.forward(Some(&video), Some(&audio), &steps, Some(&text.states))?;
        match (predicted.video, predicted.audio) {
            (Some(video), Some(audio)) => Ok(Latents {
                video: video.permute((0, 2, 3, 4, 1))?.contiguous()?,
                audio: audio.permute((0, 2, 3, 1))?.contiguous()?,
            }),
            _ => bail!("a stream is missing"),
        }
    }

    fn device(&self) -> &Device {
        self.network().map_or(&Device::Cpu, Unet::device)
    }

    fn dtype(&self) -> DType {
        self.network().map_or(DType::F32, Unet::dtype)
    }
}

fn shapes_in(dir: &Path) -> std::result::Result<BTreeMap<String, Vec<usize>>, LoadError> {
    match Weights::find(dir)? {
        Some(weights) => Ok(weights.shapes()?),
        None => Err(LoadError::Absent { path: dir.to_owned() }),
    }
}

#[cfg(test)]
mod tests;
