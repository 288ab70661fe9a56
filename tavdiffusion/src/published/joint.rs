//! TAVDiffusion: a UNet over clips and one over spectrograms that meet at their narrowest places (TAVGBench, section 4).
//!
//! ```text
//! a = audio way down;  v = video mid(video way down)
//! video: v <- v + attention(v, a)      audio: a <- a + attention(a, v)      (each only where it is configured)
//! audio: mid, way up;  video: way up
//! ```
//!
//! Published sampling has the first direction alone.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::VarBuilder;
use fulgur_lightnet::config;
use fulgur_lightnet::diffusion::ddpm_step;
use fulgur_lightnet::params::folder::{self, LoadError, Weights};
use serde::Deserialize;

use super::fusion::{Aligned, Alignment, Fusion};
use super::names::{Stored, Translation, translated};
use super::unet::{MotionAdapterConfig, Running, Unet, UnetConfig, UnetNames, UnetSizes};
use crate::denoiser::{Denoiser, Latents, TextCondition};

/// Where the UNet over spectrograms lies among the tensors.
const AUDIO: &str = "audio_unet";
/// What comes before all names where a wrapper of training was saved.
const WRAPPER: &str = "module.";
/// First parts of the names of the heads that only training calls.
const HEADS: [&str; 4] = [
    "linear_a.",
    "linear_b.",
    "audio_fine_weight.",
    "video_fine_weight.",
];
/// First parts of the names of what joins the networks.
const FUSIONS: [&str; 2] = ["cross_attn.", "cross_attn_audio."];
/// `_class_name` of a folder with both networks.
const CLASS_NAME: &str = "TavDiffusionUnet";
/// Ends of the names of tables of places, which follow from their size.
const TABLES: [&str; 2] = [".pos_embed.pe", ".pos_encoder.pe"];

/// Which stream reads which.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Neither.
    Apart,
    /// The clip reads the sound, as published.
    #[default]
    VFromA,
    /// The sound reads the clip.
    AFromV,
    /// Each reads the other.
    Both,
}

impl Direction {
    fn video_reads(self) -> bool {
        matches!(self, Self::VFromA | Self::Both)
    }

    fn audio_reads(self) -> bool {
        matches!(self, Self::AFromV | Self::Both)
    }
}

/// Both networks, and how they meet.
#[derive(Clone, Debug, Deserialize)]
pub struct TavConfig {
    /// Over pictures.
    pub video: UnetConfig,
    /// Along frames.
    pub motion: MotionAdapterConfig,
    /// Over spectrograms.
    pub audio: UnetConfig,
    /// Which stream reads which.
    #[serde(default)]
    pub fuse: Direction,
    /// Heads of the alignment, where training needs them.
    #[serde(default)]
    pub alignment: Option<Aligned>,
}

impl TavConfig {
    /// The published networks, of which the one over spectrograms reads states of this width.
    #[must_use]
    pub fn authors(audio_text: usize) -> Self {
        Self {
            video: UnetConfig::stable_diffusion(),
            motion: MotionAdapterConfig::authors(),
            audio: UnetConfig::tango(audio_text),
            fuse: Direction::VFromA,
            alignment: None,
        }
    }

    /// As [`Self::authors`], with what the shapes of a checkpoint say of the network over spectrograms, whose configuration was not published.
    fn of_shapes(shapes: &BTreeMap<String, Vec<usize>>) -> Self {
        const READS: &str = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight";
        let shape = |name: &str| {
            [WRAPPER, ""]
                .iter()
                .find_map(|prefix| shapes.get(&format!("{prefix}{AUDIO}.{name}")))
        };
        let width = shape(READS).and_then(|shape| shape.get(1)).copied();
        Self::authors(width.unwrap_or(768))
    }

    fn check(&self) -> Result<()> {
        self.motion.plan(&self.video)?;
        self.audio.plan().map(drop)
    }
}

/// Both networks with their weights, or one of them.
#[derive(Clone, Debug)]
pub struct TavUnet {
    video: Option<Unet>,
    audio: Option<Unet>,
    video_reads: Option<Fusion>,
    audio_reads: Option<Fusion>,
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
        let (wide, narrow) = (video.bottleneck(), audio.bottleneck());
        let reads = |asked: bool, reader, read, name: &str| {
            asked.then(|| Fusion::new(reader, read, &vb.pp(name))).transpose()
        };
        Ok(Self {
            video_reads: reads(config.fuse.video_reads(), wide, narrow, "cross_attn")?,
            audio_reads: reads(config.fuse.audio_reads(), narrow, wide, "cross_attn_audio")?,
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
        self.video_reads.is_some() || self.audio_reads.is_some()
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
        if video.is_none() && audio.is_none() {
            bail!("neither a clip nor a sound, expected one of them or both");
        }
        let sound = audio.map(|audio| encode(audio, self.audio(), timestep, text));
        let clip = video.map(|video| encode(video, self.video(), timestep, text));
        let (mut sound, mut clip) = (sound.transpose()?, clip.transpose()?);
        if let Some((unet, clip)) = &mut clip {
            unet.middle(clip)?;
        }
        let mut places = None;
        if let (Some((_, sound)), Some((_, clip))) = (&mut sound, &mut clip) {
            let clips = clip.clips();
            // Both read what the other was before it read.
            let (heard, seen) = (sound.x.clone(), clip.x.clone());
            if let Some(fusion) = &self.video_reads {
                clip.x = fusion.forward(&seen, &heard, clips)?;
            }
            if let Some(fusion) = &self.audio_reads {
                sound.x = fusion.forward(&heard, &seen, clips)?;
            }
            let flat = |x: &Tensor| x.reshape((clips, (), x.dim(3)?));
            places = Some((flat(&heard)?, flat(&seen)?));
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

    /// What the folder says of its networks: `config.json`, else what the shapes of the authors' checkpoint say.
    ///
    /// # Errors
    /// The file does not describe them, or there are no weights.
    pub fn config_in(dir: &Path) -> std::result::Result<TavConfig, LoadError> {
        let path = dir.join("config.json");
        if path.is_file() {
            return Ok(config::read_checked(&path, TavConfig::check)?);
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
            let marks: Marks = config::read(&path)?;
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
        let config = Self::config_in(dir)?;
        let Some(weights) = Weights::find(dir)? else {
            return Err(LoadError::Absent { path: dir.to_owned() });
        };
        let shapes = weights.shapes()?;
        let wrapper = match shapes.keys().all(|name| name.starts_with(WRAPPER)) {
            true => WRAPPER,
            false => "",
        };
        let translation = translation(&config, wrapper, UnetNames::of(&shapes))?;
        let ignored = |name: &str| {
            let own = name.strip_prefix(wrapper).unwrap_or(name);
            let head = HEADS.iter().any(|head| own.starts_with(head));
            TABLES.iter().any(|table| own.ends_with(table)) || (head && config.alignment.is_none())
        };
        // What joins the networks, and what only training calls, is of both.
        let part = |name: &str| {
            let own = name.strip_prefix(wrapper).unwrap_or(name);
            let joint = HEADS.iter().chain(&FUSIONS).any(|head| own.starts_with(head));
            match (own.starts_with("audio_unet."), joint) {
                (_, true) => clips && sounds,
                (true, _) => sounds,
                (false, _) => clips,
            }
        };
        folder::load_part(&weights, part, compute, device, ignored, |compute, vb| {
            let vb = translated(&vb.to_dtype(compute), translation.clone());
            match (clips, sounds) {
                (true, true) => Self::new(&config, &vb),
                _ => {
                    let video = clips.then(|| Unet::with_motion(&config.video, &config.motion, &vb));
                    let audio = sounds.then(|| Unet::new(&config.audio, &vb.pp(AUDIO)));
                    Self::of_parts(video.transpose()?, audio.transpose()?, [None, None])
                }
            }
        })
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
mod tests {
    use super::*;
    use crate::testing::{apart, normal, perturb};
    use fulgur_lightnet::params::Params;

    fn config(fuse: &str) -> TavConfig {
        let unet = |channels: usize| {
            format!(
                r#"{{"in_channels": {channels}, "out_channels": {channels}, "block_out_channels": [8, 16], "norm_num_groups": 4,
                "layers_per_block": 1, "cross_attention_dim": 6, "attention_head_dim": 2,
                "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}}"#
            )
        };
        let json = format!(
            r#"{{"video": {}, "audio": {}, "fuse": "{fuse}",
            "motion": {{"block_out_channels": [8, 16], "motion_layers_per_block": 1, "motion_norm_num_groups": 4,
            "motion_num_attention_heads": 2, "motion_max_seq_length": 5, "use_motion_mid_block": false}}}}"#,
            unet(4),
            unet(3)
        );
        serde_json::from_str(&json).unwrap()
    }

    struct Inputs {
        video: Tensor,
        audio: Tensor,
        time: Tensor,
        text: Tensor,
    }

    fn inputs() -> Result<Inputs> {
        Ok(Inputs {
            video: normal("video", &[2, 4, 3, 4, 6])?,
            audio: normal("audio", &[2, 3, 8, 4])?,
            time: Tensor::new(&[7f32, 901.0], &Device::Cpu)?,
            text: normal("text", &[2, 5, 6])?,
        })
    }

    fn run(network: &TavUnet, video: bool, audio: bool) -> Result<Predicted> {
        let given = inputs()?;
        network.forward(
            video.then_some(&given.video),
            audio.then_some(&given.audio),
            &given.time,
            Some(&given.text),
        )
    }

    fn far(a: &Option<Tensor>, b: &Option<Tensor>) -> Result<f32> {
        match (a, b) {
            (Some(a), Some(b)) => apart(a, b),
            _ => bail!("a stream is missing"),
        }
    }

    #[test]
    fn streams_that_are_apart_are_two_networks() -> Result<()> {
        for (fuse, video_changes, audio_changes) in [
            ("apart", false, false),
            ("v_from_a", true, false),
            ("a_from_v", false, true),
            ("both", true, true),
        ] {
            let params = Params::random(10, &Device::Cpu);
            let network = TavUnet::new(&config(fuse), &params.builder())?;
            // A fresh fusion has an output of zeros: joint is as apart.
            let (both, video, audio) = (
                run(&network, true, true)?,
                run(&network, true, false)?,
                run(&network, false, true)?,
            );
            assert!(far(&both.video, &video.video)? < 1e-6 && far(&both.audio, &audio.audio)? < 1e-6);
            assert!(video.audio.is_none() && audio.video.is_none() && audio.places.is_none());
            perturb(&params, 0.1)?;
            let network = TavUnet::new(&config(fuse), &params.builder())?;
            let (both, video, audio) = (
                run(&network, true, true)?,
                run(&network, true, false)?,
                run(&network, false, true)?,
            );
            assert_eq!(far(&both.video, &video.video)? > 1e-5, video_changes, "{fuse}");
            assert_eq!(far(&both.audio, &audio.audio)? > 1e-5, audio_changes, "{fuse}");
            let Some((heard, seen)) = both.places else {
                bail!("no places");
            };
            // 8 x 4 and 3 x 4 x 6 places, at half the sides.
            assert_eq!((heard.dims(), seen.dims()), (&[2, 8, 16][..], &[2, 18, 16][..]));
            assert!(run(&network, false, false).is_err());
        }
        Ok(())
    }

    #[test]
    fn generators_ask_in_fractions_of_the_schedule() -> Result<()> {
        let params = Params::random(11, &Device::Cpu);
        let network = TavUnet::new(&config("v_from_a"), &params.builder())?;
        perturb(&params, 0.1)?;
        let given = inputs()?;
        let latents = Latents {
            video: given.video.permute((0, 2, 3, 4, 1))?.contiguous()?,
            audio: given.audio.permute((0, 2, 3, 1))?.contiguous()?,
        };
        let text = TextCondition {
            states: given.text.clone(),
            mask: Tensor::ones((2, 5), DType::F32, &Device::Cpu)?,
        };
        let time = (given.time.clone() / 999.0)?;
        let found = network.predict(&latents, &time, &text)?;
        let expected = run(&network, true, true)?;
        assert!(
            far(
                &Some(found.video.permute((0, 4, 1, 2, 3))?.contiguous()?),
                &expected.video
            )? < 1e-6
        );
        assert!(
            far(
                &Some(found.audio.permute((0, 3, 1, 2))?.contiguous()?),
                &expected.audio
            )? < 1e-6
        );
        Ok(())
    }

    #[test]
    fn the_authors_names_are_understood() -> Result<()> {
        let translation = translation(&config("v_from_a"), WRAPPER, UnetNames::AnimateDiff)?;
        for (name, expected) in [
            ("conv_in.weight", "module.conv_in.weight"),
            (
                "down_blocks.0.motion_modules.0.transformer_blocks.0.norm3.bias",
                "module.down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.ff_norm.bias",
            ),
            ("audio_unet.conv_in.bias", "module.audio_unet.conv_in.bias"),
            ("cross_attn.query.bias", "module.cross_attn.query.bias"),
        ] {
            assert_eq!(translation(name), Stored::As(expected.to_owned()));
        }
        Ok(())
    }
}
