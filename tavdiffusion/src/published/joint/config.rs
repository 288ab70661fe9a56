//! How the networks of TAVDiffusion are configured, and what their tensors belong to.

use std::collections::BTreeMap;

use candle_core::Result;
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::super::fusion::{Aligned, Fusion};
use super::super::names::below;
use super::super::unet::{MotionAdapterConfig, Unet, UnetConfig};
use super::WRAPPER;

/// Where the UNet over spectrograms lies among the tensors.
pub(super) const AUDIO: &str = "audio_unet";
/// First parts of the names of the heads that only training calls.
const HEADS: [&str; 4] = [
    "linear_a.",
    "linear_b.",
    "audio_fine_weight.",
    "video_fine_weight.",
];
/// Names of what joins the networks: the clip reads, and the sound reads.
pub(super) const FUSIONS: [&str; 2] = ["cross_attn", "cross_attn_audio"];

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

/// What a stream reads where it is said to read the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reads {
    /// The other, as published.
    #[default]
    Other,
    /// Itself, with as many parameters where both streams are equally wide: what the other one is worth is told by comparing the two.
    Itself,
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
    /// What it reads.
    #[serde(default)]
    pub reads: Reads,
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
            reads: Reads::Other,
            alignment: None,
        }
    }

    /// As [`Self::authors`], with what the shapes of a checkpoint say of the network over spectrograms, whose configuration was not published.
    pub(super) fn of_shapes(shapes: &BTreeMap<String, Vec<usize>>) -> Self {
        const READS: &str = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight";
        let shape = |name: &str| {
            [WRAPPER, ""]
                .iter()
                .find_map(|prefix| shapes.get(&format!("{prefix}{AUDIO}.{name}")))
        };
        let width = shape(READS).and_then(|shape| shape.get(1)).copied();
        Self::authors(width.unwrap_or(768))
    }

    /// Channels at the largest sides of both networks: as many waves a step of time is written as.
    #[must_use]
    pub fn first_channels(&self) -> [usize; 2] {
        [&self.video, &self.audio].map(|unet| unet.block_out_channels.first().copied().unwrap_or(0))
    }

    /// Refuses networks that cannot be.
    ///
    /// # Errors
    /// Settings that are not understood, contradict each other, or are beyond all reason.
    pub fn check(&self) -> Result<()> {
        self.motion.plan(&self.video)?;
        self.audio.plan().map(drop)
    }
}

impl TavConfig {
    /// How the networks that are there read each other, or themselves.
    pub(super) fn fusions(
        &self,
        [video, audio]: [Option<&Unet>; 2],
        vb: &VarBuilder,
    ) -> Result<[Option<Fusion>; 2]> {
        let reads = |asked: bool, own: Option<&Unet>, other: Option<&Unet>, name: &str| {
            let read = match self.reads {
                Reads::Other => other,
                Reads::Itself => own,
            };
            match (own, read) {
                (Some(own), Some(read)) if asked => {
                    Fusion::new(own.bottleneck(), read.bottleneck(), &vb.pp(name)).map(Some)
                }
                _ => Ok(None),
            }
        };
        Ok([
            reads(self.fuse.video_reads(), video, audio, FUSIONS[0])?,
            reads(self.fuse.audio_reads(), audio, video, FUSIONS[1])?,
        ])
    }
}

/// What a tensor of both networks belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TavPart {
    /// The network over pictures.
    Video,
    /// Its motion modules.
    Motion,
    /// The network over spectrograms.
    Audio,
    /// What lets streams read each other.
    Fusion,
    /// What only training calls.
    Alignment,
}

impl TavPart {
    /// In one word, as recipes have it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Video => "video",
            Self::Motion => "motion",
            Self::Audio => "audio",
            Self::Fusion => "fusion",
            Self::Alignment => "alignment",
        }
    }

    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Video,
        Self::Motion,
        Self::Audio,
        Self::Fusion,
        Self::Alignment,
    ];

    /// The part that the tensor `name` is of.
    #[must_use]
    pub fn of(name: &str) -> Self {
        match name {
            _ if HEADS.iter().any(|head| name.starts_with(head)) => Self::Alignment,
            _ if FUSIONS.iter().any(|fusion| below(name, fusion).is_some()) => Self::Fusion,
            _ if below(name, AUDIO).is_some() => Self::Audio,
            _ if name.contains(".motion_modules.") => Self::Motion,
            _ => Self::Video,
        }
    }
}
