//! `fulgur pack`: trained parts become one small folder that is used and shipped.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use anyhow::bail;
use candle_core::Device;
use fulgur_benchmark::judge::Judges;
use fulgur_lightnet::params::pack::PackedFolder;
use fulgur_tavdiffusion::pipeline::pack::{Options, PackedGenerator, Sources};
use fulgur_tavdiffusion::pipeline::{FILE_NAME, Generator, ModelIndex, Part};
use serde::Serialize;

use super::answer::{Answer, Report};
use super::context::Context;
use super::packing::{Kind, Stored, check_target, model_folder, write_folder};
use super::progress::Unit;
use super::size::Size;
use crate::forward;

mod painter;

use painter::{PackedPainter, is_picture_generator};

/// Pack a trained generator, or one network, into a small folder
///
/// A generator is put together from the models of five runs. Tensors that only training needs are left out, weights are
/// stored in 8 bits, and sampling defaults are written down beside them. Each part is reported with its size and with
/// what rounding cost: the root mean square of the errors over that of the weights. The folder appears whole or not at
/// all.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur pack -o models/builtin --name fulgur-builtin --max-bytes 26000000\n  \
                  fulgur pack --network runs/encoder -o models/encoder\n\n\
                  fulgur lm pack packs a language model."
)]
pub(super) struct Arguments {
    /// The folder to write
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Folder of the runs text, tav, video-codec, mel-codec and vocoder
    #[arg(long, value_name = "DIR", default_value = "runs")]
    runs: PathBuf,
    /// Run or model folder of the text encoder, instead of the one below --runs; with --network, the folder in which a
    /// generator of pictures shall look for its text encoder, as seen from --output, instead of a copy of its own
    #[arg(long, value_name = "DIR")]
    text: Option<PathBuf>,
    /// Run or model folder of the denoiser
    #[arg(long, value_name = "DIR")]
    tav: Option<PathBuf>,
    /// Run or model folder of the video codec
    #[arg(long, value_name = "DIR")]
    video_codec: Option<PathBuf>,
    /// Run or model folder of the mel codec
    #[arg(long, value_name = "DIR")]
    mel_codec: Option<PathBuf>,
    /// Run or model folder of the vocoder
    #[arg(long, value_name = "DIR")]
    vocoder: Option<PathBuf>,
    /// Pack the network of this run or model folder alone (an AVHScore encoder, judges, a part of a generator, a
    /// generator of pictures)
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with_all = [
            "runs", "tav", "video_codec", "mel_codec", "vocoder", "with_encoders", "name", "size", "duration",
            "steps", "shift", "guidance_video", "guidance_audio",
        ]
    )]
    network: Option<PathBuf>,
    /// How weights are stored
    #[arg(long, value_enum, default_value_t = Stored::EightBit)]
    precision: Stored,
    /// Keep the encoders of the codecs too
    #[arg(long)]
    with_encoders: bool,
    /// Name that goes with every clip, instead of the folder's
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Default size in pixels
    #[arg(long, value_name = "WxH", default_value_t = default_size())]
    size: Size,
    /// Default length in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = ModelIndex::default().duration_s)]
    duration: f64,
    /// Default number of denoising steps
    #[arg(long, value_name = "N", default_value_t = ModelIndex::default().steps)]
    steps: usize,
    /// Bend of the sampling times: above 1 spends more steps on noise
    #[arg(long, value_name = "SHIFT", default_value_t = ModelIndex::default().shift)]
    shift: f64,
    /// Default guidance of the picture
    #[arg(long, value_name = "SCALE", default_value_t = ModelIndex::default().guidance_video)]
    guidance_video: f64,
    /// Default guidance of the sound
    #[arg(long, value_name = "SCALE", default_value_t = ModelIndex::default().guidance_audio)]
    guidance_audio: f64,
    /// Refuse to write a folder of more bytes
    #[arg(long, value_name = "N")]
    max_bytes: Option<u64>,
    /// Replace an older folder of the same kind; files in it that pack does not write are kept. A folder with nothing but
    /// a README.md is filled without asking
    #[arg(long)]
    force: bool,
}

fn default_size() -> Size {
    let ModelIndex { width, height, .. } = ModelIndex::default();
    Size { width, height }
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    let kind = match &arguments.network {
        Some(dir) if is_picture_generator(&model_folder(dir)) => Kind::PictureGenerator,
        Some(_) => Kind::Network,
        None => Kind::Generator,
    };
    let output = &arguments.output;
    let kept = check_target(output, kind, arguments.force)?;
    let Some(packed) = Packed::make(context, &arguments)? else {
        bail!("stopped before everything was packed; nothing was written")
    };
    let bytes = packed.bytes();
    if let Some(most) = arguments.max_bytes.filter(|&most| bytes > most) {
        let parts: Vec<String> = packed
            .parts()
            .iter()
            .map(|(name, folder)| format!("{name} {}", folder.bytes()))
            .collect();
        bail!(
            "{}: found {bytes} bytes ({}), expected at most {most}; nothing was written",
            output.display(),
            parts.join(", ")
        );
    }
    write_folder(output, &kept, |dir| packed.write(dir))?;
    Answer::new(&Written {
        path: output.clone(),
        kind,
        precision: arguments.precision,
        bytes,
        parts: packed.parts().into_iter().map(Row::new).collect(),
    })
}

/// A model in memory.
enum Packed {
    Generator(PackedGenerator),
    Network(PackedFolder),
    PictureGenerator(PackedPainter),
}

impl Packed {
    /// Reads and packs; `None` when the user stopped it.
    fn make(context: &Context, arguments: &Arguments) -> anyhow::Result<Option<Self>> {
        let precision = arguments.precision.into();
        if let Some(dir) = &arguments.network {
            let dir = model_folder(dir);
            if is_picture_generator(&dir) {
                let packed = PackedPainter::new(&dir, precision, arguments.text.as_deref())?;
                return Ok(Some(Self::PictureGenerator(packed)));
            }
            if let Some(text) = &arguments.text {
                bail!(
                    "--text: found {} with a network that reads no texts, expected none",
                    text.display()
                );
            }
            // A damaged or a foreign model is found before anything is made of it.
            check_network(&dir)?;
            return Ok(Some(Self::Network(PackedFolder::new(&dir, precision, |_| true)?)));
        }
        let part = |named: &Option<PathBuf>, run: &str| {
            model_folder(named.as_ref().unwrap_or(&arguments.runs.join(run)))
        };
        let sources = Sources {
            text_encoder: part(&arguments.text, "text"),
            denoiser: part(&arguments.tav, "tav"),
            video_codec: part(&arguments.video_codec, "video-codec"),
            mel_codec: part(&arguments.mel_codec, "mel-codec"),
            vocoder: part(&arguments.vocoder, "vocoder"),
        };
        let folder_name = || {
            let name = arguments.output.file_name().unwrap_or_default();
            name.to_string_lossy().into_owned()
        };
        let options = Options {
            precision,
            with_encoders: arguments.with_encoders,
            name: arguments.name.clone().unwrap_or_else(folder_name),
            width: arguments.size.width,
            height: arguments.size.height,
            duration_s: arguments.duration,
            steps: arguments.steps,
            shift: arguments.shift,
            guidance_video: arguments.guidance_video,
            guidance_audio: arguments.guidance_audio,
        };
        let mut progress = context.progress("pack", Unit::Items("parts"));
        let (mut done, total) = (0, Part::ALL.len() as u64);
        progress.set(done, Some(total));
        let packed = PackedGenerator::new(&sources, &options, &mut |_| {
            done += 1;
            progress.set(done, Some(total));
            !context.interrupt.flag().load(Ordering::Relaxed)
        })?;
        Ok(packed.map(Self::Generator))
    }

    fn parts(&self) -> Vec<(&'static str, &PackedFolder)> {
        match self {
            Self::Generator(generator) => {
                let parts = generator.parts().iter();
                parts.map(|(part, folder)| (part.folder(), folder)).collect()
            }
            Self::Network(folder) => vec![("network", folder)],
            Self::PictureGenerator(painter) => painter.parts(),
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Generator(generator) => generator.bytes(),
            Self::Network(folder) => folder.bytes(),
            Self::PictureGenerator(painter) => painter.parts().iter().map(|(_, folder)| folder.bytes()).sum(),
        }
    }

    /// Writes the model into an empty folder and loads it once, as its users will.
    fn write(&self, dir: &Path) -> anyhow::Result<()> {
        match self {
            Self::Generator(generator) => {
                generator.write(dir)?;
                Generator::load(dir, &Device::Cpu)?;
            }
            Self::Network(folder) => {
                folder.write(dir)?;
                check_network(dir)?;
            }
            Self::PictureGenerator(painter) => painter.write(dir)?,
        }
        Ok(())
    }
}

/// Checks that a folder holds one network that the program knows, whole.
fn check_network(dir: &Path) -> anyhow::Result<()> {
    if dir.join(FILE_NAME).is_file() {
        bail!("{}: found a generator, expected one network", dir.display());
    }
    match forward::Model::open(dir) {
        Ok(model) => {
            for part in &model.parts {
                part.check(&Device::Cpu)?;
            }
        }
        // Judges are no model to run on tensors.
        Err(unknown) => {
            Judges::load(dir, &Device::Cpu).map_err(|_| unknown)?;
        }
    }
    Ok(())
}

#[derive(Serialize)]
struct Written {
    path: PathBuf,
    kind: Kind,
    precision: Stored,
    bytes: u64,
    parts: Vec<Row>,
}

/// One part: its size, and what rounding cost.
#[derive(Serialize)]
struct Row {
    name: &'static str,
    bytes: u64,
    values: usize,
    dropped: usize,
    error: f64,
    worst_tensor: Option<String>,
    worst_error: Option<f64>,
}

impl Row {
    fn new((name, folder): (&'static str, &PackedFolder)) -> Self {
        let rounding = folder.rounding.clone();
        let (worst_tensor, worst_error) = rounding.worst.unzip();
        Self {
            name,
            bytes: folder.bytes(),
            values: rounding.values,
            dropped: rounding.dropped,
            error: rounding.error,
            worst_tensor,
            worst_error,
        }
    }
}

impl Report for Written {}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for row in &self.parts {
            write!(
                f,
                "{:<13} {:>11} bytes, {:>10} values",
                row.name, row.bytes, row.values
            )?;
            if row.dropped > 0 {
                write!(f, " ({} left out)", row.dropped)?;
            }
            write!(f, ", rounding {:.3} %", 100.0 * row.error)?;
            if let (Some(tensor), Some(error)) = (&row.worst_tensor, row.worst_error) {
                write!(f, " (worst {:.3} %, {tensor})", 100.0 * error)?;
            }
            writeln!(f)?;
        }
        write!(f, "{}: {} bytes", self.path.display(), self.bytes)
    }
}
