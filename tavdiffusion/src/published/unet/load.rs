//! UNets from folders.

use std::path::Path;

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use fulgur_lightnet::config::{self, ConfigError};
use fulgur_lightnet::params::folder::{self, LoadError, Weights};
use serde::Deserialize;

use super::super::names::translated;
use super::motion::TABLE;
use super::names::UnetNames;
use super::plan::Plan;
use super::{Builder, MotionAdapterConfig, MotionUnetConfig, Unet, UnetConfig};

const CONFIG: &str = "config.json";
/// What comes before all names where a wrapper of training was saved.
const WRAPPER: &str = "module.";
/// What folders of networks over clips call themselves.
const OVER_CLIPS: &str = "UNetMotionModel";
/// The table of places by the name of AnimateDiff.
const ANIMATE_DIFF_TABLE: &str = ".pos_encoder.pe";

#[derive(Deserialize)]
struct Marks {
    #[serde(rename = "_class_name")]
    class_name: Option<String>,
}

/// Reads a configuration, and what it comes to.
fn plan_of<C: serde::de::DeserializeOwned>(
    path: &Path,
    plan: impl Fn(&C) -> candle_core::Result<Plan>,
) -> Result<Plan, ConfigError> {
    let config: C = config::read_checked(path, |config| plan(config).map(drop))?;
    plan(&config).map_err(|error| ConfigError {
        path: path.to_owned(),
        detail: error.to_string(),
    })
}

/// What a UNet takes and gives, before any weight is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnetSizes {
    /// Channels of the sample.
    pub in_channels: usize,
    /// Channels of what is predicted.
    pub out_channels: usize,
    /// Width of the states of the text, where they are read.
    pub context: Option<usize>,
    /// Most frames of a clip, where the network is one over clips.
    pub most_frames: Option<usize>,
}

impl UnetSizes {
    pub(crate) fn of(plan: &Plan) -> Self {
        Self {
            in_channels: plan.in_channels,
            out_channels: plan.out_channels,
            context: plan.context(),
            most_frames: plan.has_motion().then_some(plan.most_frames),
        }
    }
}

impl Unet {
    /// What the network in the folder `dir` takes and gives.
    ///
    /// # Errors
    /// Its configuration is unreadable or not understood.
    pub fn sizes_in(dir: &Path) -> Result<UnetSizes, LoadError> {
        Ok(UnetSizes::of(&Self::plan_in(dir)?))
    }

    /// As [`Self::sizes_in`], with the motion modules in the folder `motion`.
    ///
    /// # Errors
    /// As before, or the modules are those of another network.
    pub fn sizes_with_motion(dir: &Path, motion: &Path) -> Result<UnetSizes, LoadError> {
        let (_, plan) = Self::plans_in(dir, motion)?;
        Ok(UnetSizes::of(&plan))
    }

    /// Loads the UNet in the folder `dir` onto `device`, with weights in `compute`: f32, or bf16 on a GPU. It is one over clips if its
    /// configuration is that of `UNetMotionModel`. All tensors are compared by name and shape before any is read; tables of places may be
    /// there or not.
    ///
    /// # Errors
    /// No such folder, a network that is not understood, tensors that are missing, unexpected or of another shape: all are listed.
    pub fn load(dir: &Path, compute: DType, device: &Device) -> Result<Self, LoadError> {
        let plan = Self::plan_in(dir)?;
        load(dir, compute, device, &plan, |vb| Self::of_plan(plan.clone(), vb))
    }

    /// What the configuration in `dir` describes, or the shapes of a file of latent diffusion that has none beside it.
    fn plan_in(dir: &Path) -> Result<Plan, LoadError> {
        let path = dir.join(CONFIG);
        if !path.is_file()
            && let UnetNames::LatentDiffusion(prefix) = names_in(dir)?
        {
            return Ok(of_latent_diffusion(dir, prefix)?.plan()?);
        }
        let marks: Marks = config::read(&path)?;
        match marks.class_name.as_deref() {
            Some(OVER_CLIPS) => Ok(plan_of(&path, MotionUnetConfig::plan)?),
            _ => Ok(plan_of(&path, UnetConfig::plan)?),
        }
    }

    /// The network over pictures in `dir`, and with the modules in `motion`.
    fn plans_in(dir: &Path, motion: &Path) -> Result<(Plan, Plan), LoadError> {
        let path = dir.join(CONFIG);
        let unet: UnetConfig = match path.is_file() {
            true => config::read_checked(&path, |config: &UnetConfig| config.plan().map(drop))?,
            false => match names_in(dir)? {
                UnetNames::LatentDiffusion(prefix) => of_latent_diffusion(dir, prefix)?,
                // The error names the file that is missing.
                _ => config::read(&path)?,
            },
        };
        let still = unet.plan()?;
        let own = motion.join(CONFIG);
        let moved = match own.is_file() || names_in(motion)? != UnetNames::AnimateDiff {
            true => plan_of(&own, |adapter: &MotionAdapterConfig| adapter.plan(&unet))?,
            false => MotionAdapterConfig::of_shapes(&unet, &weights_in(motion)?.shapes()?).plan(&unet)?,
        };
        Ok((still, moved))
    }

    /// The weights of the network over pictures or spectrograms in `dir`, on the host, by the names of diffusers.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub(in crate::published) fn builder_in(dir: &Path) -> Result<VarBuilder<'static>, LoadError> {
        let plan = Self::plan_in(dir)?;
        builder(dir, &plan, |vb| Self::of_plan(plan.clone(), vb))
    }

    /// As [`Self::builder_in`], of a network over pictures and of the motion modules for it.
    ///
    /// # Errors
    /// As [`Self::load_with_motion`].
    pub(in crate::published) fn builders_with_motion(
        dir: &Path,
        motion: &Path,
    ) -> Result<[VarBuilder<'static>; 2], LoadError> {
        let (still, plan) = Self::plans_in(dir, motion)?;
        Ok([
            builder(dir, &still, |vb| Self::of_plan(still.clone(), vb))?,
            builder(motion, &plan, |vb| Builder { plan: &plan }.motions(vb))?,
        ])
    }

    /// As [`Self::load`], a UNet over pictures with the motion modules in the folder `motion`, which is a `MotionAdapter` of diffusers, or
    /// holds modules by the names of AnimateDiff.
    ///
    /// # Errors
    /// As before, or the modules are those of another network.
    pub fn load_with_motion(
        dir: &Path,
        motion: &Path,
        compute: DType,
        device: &Device,
    ) -> Result<Self, LoadError> {
        let (still, plan) = Self::plans_in(dir, motion)?;
        let mut network = load(dir, compute, device, &still, |vb| {
            Self::of_plan(still.clone(), vb)
        })?;
        let motions = load(motion, compute, device, &plan, |vb| {
            Builder { plan: &plan }.motions(vb)
        })?;
        network.set_in_motion(plan, motions);
        Ok(network)
    }
}

/// What the shapes of a file of latent diffusion say, whose names begin with `prefix`.
fn of_latent_diffusion(dir: &Path, prefix: &str) -> Result<UnetConfig, LoadError> {
    let shapes = weights_in(dir)?.shapes()?;
    let own = shapes
        .into_iter()
        .filter_map(|(name, shape)| Some((name.strip_prefix(prefix)?.to_owned(), shape)));
    Ok(UnetConfig::of_shapes(&own.collect())?)
}

/// The weights in `dir`, without what a wrapper of training put before all names.
fn weights_in(dir: &Path) -> Result<Weights, LoadError> {
    let Some(mut weights) = Weights::find(dir)? else {
        return Err(LoadError::Absent { path: dir.to_owned() });
    };
    if weights.shapes()?.keys().all(|name| name.starts_with(WRAPPER)) {
        weights.below(WRAPPER);
    }
    Ok(weights)
}

fn names_in(dir: &Path) -> Result<UnetNames, LoadError> {
    Ok(UnetNames::of(&weights_in(dir)?.shapes()?))
}

/// Whether the tensor may be there or not.
fn is_table(name: &str) -> bool {
    name.ends_with(TABLE) || name.ends_with(ANIMATE_DIFF_TABLE)
}

/// `vb` by the names that a network of this plan asks for.
fn named<'a>(vb: &VarBuilder<'a>, names: UnetNames, plan: &Plan) -> VarBuilder<'a> {
    match names.translation(plan) {
        Some(translation) => translated(vb, translation),
        None => vb.clone(),
    }
}

/// Builds a network, or its modules, of the weights in `dir`, whatever they are called.
fn load<M>(
    dir: &Path,
    compute: DType,
    device: &Device,
    plan: &Plan,
    build: impl Fn(&VarBuilder) -> candle_core::Result<M>,
) -> Result<M, LoadError> {
    let weights = weights_in(dir)?;
    let names = UnetNames::of(&weights.shapes()?);
    // What lies beside the network in a file of a whole pipeline is not read.
    let part = |name: &str| name.starts_with(names.prefix());
    folder::load_part(&weights, part, compute, device, is_table, |compute, vb| {
        build(&named(&vb.to_dtype(compute), names, plan))
    })
}

/// The weights in `dir`, on the host, by the names that `build` asks for, after all were compared with those.
fn builder<M>(
    dir: &Path,
    plan: &Plan,
    build: impl Fn(&VarBuilder) -> candle_core::Result<M>,
) -> Result<VarBuilder<'static>, LoadError> {
    let weights = weights_in(dir)?;
    let names = UnetNames::of(&weights.shapes()?);
    let part = |name: &str| name.starts_with(names.prefix());
    folder::check_part(&weights, part, is_table, |vb| build(&named(vb, names, plan)))?;
    let frozen = weights.load_part(&Device::Cpu, part)?;
    Ok(named(&frozen.builder(), names, plan))
}
