//! Networks of diffusers and transformers that make pictures, clips and sounds, alone or in the folder of a pipeline, and those of
//! TAVDiffusion.

use std::path::{Path, PathBuf};

use candle_core::DType;
use fulgur_lightnet::encoders::clip::LATENT_DIFFUSION;
use fulgur_tavdiffusion::published::{AutoencoderKl, Half, HifiGan, TavUnet, Unet, UnetSizes};

use super::Dim::{Free, Size};
use super::{Content, Folder, Inputs, Model, Network, NetworkError, Outputs, Part, Port, clip, named};

const UNETS: [&str; 2] = ["UNet2DConditionModel", "UNetMotionModel"];
const AUTOENCODER: &str = "AutoencoderKL";
/// Both names that configurations of this vocoder have had.
const VOCODERS: [&str; 2] = ["speecht5_hifigan", "hifigan"];
const TAV: &str = "TavDiffusionUnet";
const MOTION_ADAPTER: &str = "MotionAdapter";
/// What comes before names in files of latent diffusion: of the UNet, and of what makes latents.
const DIFFUSED: &str = "model.diffusion_model.";
const FIRST_STAGE: &str = "first_stage_model.";
/// How classes of pipelines end.
const PIPELINE: &str = "Pipeline";
/// Folders of a pipeline that hold networks.
const PLACES: [&str; 6] = [
    "text_encoder",
    "unet",
    "audio_unet",
    "vae",
    "audio_vae",
    "vocoder",
];
/// Steps of time are exact in f32 below this.
const MOST_STEPS: usize = 1 << 24;

/// Recognises networks by their class or `model_type`, else by their tensors.
pub(super) fn recognise(folder: &Folder) -> Result<Option<Model>, NetworkError> {
    let below = |names: &[&str]| folder.class().is_none() && names.iter().any(|name| folder.has_below(name));
    let class = folder.class().unwrap_or_default();
    let dir = folder.path();
    let parts = if class == TAV || below(&["audio_unet.", "module.audio_unet."]) {
        vec![tav(dir)?]
    } else if below(&[DIFFUSED, FIRST_STAGE, LATENT_DIFFUSION]) {
        whole(folder)?
    } else if UNETS.contains(&class) || below(&["time_embedding.linear_1."]) {
        vec![unet(dir)?]
    } else if class == AUTOENCODER || below(&["decoder.mid_block.", "decoder.mid."]) {
        autoencoder(folder)?
    } else if VOCODERS.contains(&class) || below(&["conv_pre.", "vocoder.conv_pre."]) {
        vec![vocoder(dir)?]
    } else if class.ends_with(PIPELINE) {
        pipeline(dir)?
    } else {
        return Ok(None);
    };
    Ok(Some(Model {
        path: dir.to_owned(),
        kind: folder.class().unwrap_or("published").to_owned(),
        parts,
    }))
}

/// The networks of a file of latent diffusion, which holds all of them.
fn whole(folder: &Folder) -> Result<Vec<Part>, NetworkError> {
    let dir = folder.path();
    let mut parts = Vec::new();
    if folder.has_below(LATENT_DIFFUSION) {
        parts.push(Part {
            name: PLACES[0].to_owned(),
            ..clip::texts_in(folder)?
        });
    }
    if folder.has_below(DIFFUSED) {
        parts.push(unet(dir)?);
    }
    if folder.has_below(&format!("{FIRST_STAGE}decoder.")) {
        let halves = autoencoder(folder)?;
        parts.extend(halves.into_iter().map(|part| below_place("vae", part)));
    }
    if folder.has_below(&format!("{FIRST_STAGE}vocoder.")) {
        parts.push(vocoder(dir)?);
    }
    Ok(parts)
}

/// A part of several that lie in one place.
fn below_place(place: &str, part: Part) -> Part {
    Part {
        name: format!("{place}.{}", part.name),
        ..part
    }
}

/// The networks of a pipeline, each in a folder of its own; motion modules in one beside them move the UNet.
fn pipeline(dir: &Path) -> Result<Vec<Part>, NetworkError> {
    let open = |place: &str| {
        let dir = dir.join(place);
        dir.is_dir().then(|| Folder::open(&dir)).transpose()
    };
    let mut parts = Vec::new();
    for place in PLACES {
        let Some(folder) = open(place)? else { continue };
        if folder.class().is_some_and(|class| class.ends_with(PIPELINE)) {
            continue;
        }
        let Some(model) = super::known(&folder)? else {
            continue;
        };
        let single = model.parts.len() == 1;
        parts.extend(model.parts.into_iter().map(|part| match single {
            true => Part {
                name: place.to_owned(),
                ..part
            },
            false => below_place(place, part),
        }));
    }
    if let (Some(still), Some(motion)) = (open("unet")?, open("motion_adapter")?)
        && still.class() == Some(UNETS[0])
        && motion.class() == Some(MOTION_ADAPTER)
    {
        parts.push(moved(still.path(), motion.path())?);
    }
    Ok(parts)
}

fn timestep() -> Port {
    Port::new("timestep", Content::Ids(MOST_STEPS), [Free("B")])
}

/// States of a text, which networks without attention to it take and do not read.
fn text(context: Option<usize>) -> Port {
    let name = "encoder_hidden_states";
    match context {
        Some(width) => Port::numbers(name, [Free("B"), Free("L"), Size(width)]),
        None => Port::numbers(name, [Free("B"), Free("L"), Free("D")]).optional(),
    }
}

/// A picture, or a clip, of so many channels.
fn sample(name: &'static str, channels: usize, is_clip: bool) -> Port {
    match is_clip {
        false => Port::numbers(name, [Free("B"), Size(channels), Free("H"), Free("W")]),
        true => Port::numbers(name, [Free("B"), Size(channels), Free("F"), Free("H"), Free("W")]),
    }
}

fn unet(dir: &Path) -> Result<Part, NetworkError> {
    let sizes = Unet::sizes_in(dir)?;
    let dir = dir.to_owned();
    Ok(unet_part("unet", sizes, move |device| {
        Unet::load(&dir, DType::F32, device)
    }))
}

fn moved(still: &Path, motion: &Path) -> Result<Part, NetworkError> {
    let sizes = Unet::sizes_with_motion(still, motion)?;
    let (still, motion): (PathBuf, PathBuf) = (still.to_owned(), motion.to_owned());
    Ok(unet_part("motion_unet", sizes, move |device| {
        Unet::load_with_motion(&still, &motion, DType::F32, device)
    }))
}

fn unet_part<E: Into<NetworkError>>(
    name: &str,
    sizes: UnetSizes,
    load: impl Fn(&candle_core::Device) -> Result<Unet, E> + 'static,
) -> Part {
    let is_clip = sizes.most_frames.is_some();
    Part::new(
        name,
        [
            sample("sample", sizes.in_channels, is_clip),
            timestep(),
            text(sizes.context),
        ],
        [sample("sample", sizes.out_channels, is_clip)],
        move |device| {
            let unet = load(device).map_err(Into::<NetworkError>::into)?;
            let network: Network = Box::new(move |inputs| {
                let predicted = unet.forward(
                    inputs.get("sample")?,
                    &steps(inputs)?,
                    inputs.find("encoder_hidden_states"),
                )?;
                Ok(named([("sample", predicted)]))
            });
            Ok(network)
        },
    )
}

fn steps(inputs: &Inputs) -> Result<candle_core::Tensor, NetworkError> {
    Ok(inputs.get("timestep")?.to_dtype(DType::F32)?)
}

/// Latents are neither scaled nor clamped.
fn autoencoder(folder: &Folder) -> Result<Vec<Part>, NetworkError> {
    let dir = folder.path();
    let config = AutoencoderKl::config_in(dir)?;
    let has = |half: &str| folder.has_below(half) || folder.has_below(&format!("{FIRST_STAGE}{half}"));
    let latent = |name| {
        Port::numbers(
            name,
            [Free("B"), Size(config.latent_channels()), Free("h"), Free("w")],
        )
    };
    let mut parts = Vec::new();
    if has("encoder.") {
        let dir = dir.to_owned();
        parts.push(Part::new(
            "encoder",
            [sample("sample", config.in_channels(), false)],
            [latent("mean"), latent("logvar")],
            move |device| {
                let autoencoder = AutoencoderKl::load(&dir, &[Half::Encoder], DType::F32, device)?;
                let network: Network = Box::new(move |inputs| {
                    let posterior = autoencoder.encode(inputs.get("sample")?)?;
                    Ok(named([
                        ("mean", posterior.mean),
                        ("logvar", posterior.log_variance),
                    ]))
                });
                Ok(network)
            },
        ));
    }
    if has("decoder.") {
        let dir = dir.to_owned();
        parts.push(Part::new(
            "decoder",
            [latent("latent")],
            [sample("sample", config.out_channels(), false)],
            move |device| {
                let autoencoder = AutoencoderKl::load(&dir, &[Half::Decoder], DType::F32, device)?;
                let network: Network = Box::new(move |inputs| {
                    Ok(named([("sample", autoencoder.decode(inputs.get("latent")?)?)]))
                });
                Ok(network)
            },
        ));
    }
    Ok(parts)
}

fn vocoder(dir: &Path) -> Result<Part, NetworkError> {
    let config = HifiGan::config_in(dir)?;
    let samples = match config.hop() {
        160 => "160 T",
        _ => "hop T",
    };
    let dir = dir.to_owned();
    Ok(Part::new(
        "vocoder",
        [Port::numbers(
            "mel",
            [Free("B"), Free("T"), Size(config.model_in_dim)],
        )],
        [Port::numbers("waveform", [Free("B"), Free(samples)])],
        move |device| {
            let vocoder = HifiGan::load(&dir, DType::F32, device)?;
            let network: Network =
                Box::new(move |inputs| Ok(named([("waveform", vocoder.forward(inputs.get("mel")?)?)])));
            Ok(network)
        },
    ))
}

/// Both streams, or one of them.
fn tav(dir: &Path) -> Result<Part, NetworkError> {
    let [video, audio] = TavUnet::sizes_in(dir)?;
    let sound =
        |channels| Port::numbers("audio", [Free("B"), Size(channels), Free("T"), Free("M")]).optional();
    let dir = dir.to_owned();
    Ok(Part::new(
        "unet",
        [
            sample("video", video.in_channels, true).optional(),
            sound(audio.in_channels),
            timestep(),
            text(video.context.or(audio.context)),
        ],
        [
            sample("video", video.out_channels, true).optional(),
            sound(audio.out_channels),
        ],
        move |device| {
            let networks = TavUnet::load(&dir, DType::F32, device)?;
            let network: Network = Box::new(move |inputs| {
                let predicted = networks.forward(
                    inputs.find("video"),
                    inputs.find("audio"),
                    &steps(inputs)?,
                    inputs.find("encoder_hidden_states"),
                )?;
                let streams = [("video", predicted.video), ("audio", predicted.audio)];
                let outputs: Outputs = streams
                    .into_iter()
                    .filter_map(|(name, tensor)| Some((name.to_owned(), tensor?)))
                    .collect();
                Ok(outputs)
            });
            Ok(network)
        },
    ))
}
