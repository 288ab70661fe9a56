//! `fulgur pack`: trained parts become one small folder that is used and shipped.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use anyhow::{Context as _, bail};
use candle_core::Device;
use clap::ValueEnum;
use fulgur_benchmark::judge::Judges;
use fulgur_datasets::atomic::AtomicFolder;
use fulgur_lightnet::params::Precision;
use fulgur_lightnet::params::pack::PackedFolder;
use fulgur_tavdiffusion::pipeline::pack::{Options, PackedGenerator, Sources};
use fulgur_tavdiffusion::pipeline::{FILE_NAME, Generator, ModelIndex, Part};
use serde::Serialize;

use super::answer::{Answer, Report};
use super::context::Context;
use super::progress::Unit;
use super::size::Size;
use crate::forward;

/// The card of a model, which may be there before the model.
const CARD: &str = "README.md";
/// Files of a network's folder.
const FILES: [&str; 3] = ["config.json", "model.safetensors", "tokenizer.json"];

/// Pack a trained generator, or one network, into a small folder
///
/// A generator is put together from the models of five runs. Tensors that only training needs are left out, weights are
/// stored in 8 bits, and sampling defaults are written down beside them. Each part is reported with its size and with
/// what rounding cost: the root mean square of the errors over that of the weights. The folder appears whole or not at
/// all.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur pack -o models/builtin --name fulgur-builtin --max-bytes 26000000\n  \
                  fulgur pack --network runs/encoder -o models/encoder"
)]
pub(super) struct Arguments {
    /// The folder to write
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Folder of the runs text, tav, video-codec, mel-codec and vocoder
    #[arg(long, value_name = "DIR", default_value = "runs")]
    runs: PathBuf,
    /// Run or model folder of the text encoder, instead of the one below --runs
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
    /// Pack the network of this run or model folder alone (an AVHScore encoder, judges, a part of a generator)
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with_all = [
            "runs", "text", "tav", "video_codec", "mel_codec", "vocoder", "with_encoders", "name", "size", "duration",
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

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
enum Stored {
    /// Matrices in 8 bits with a scale for every 64 weights
    #[value(name = "8bit")]
    #[serde(rename = "8bit")]
    EightBit,
    /// 16 bits
    #[serde(rename = "f16")]
    F16,
    /// As they were trained
    #[serde(rename = "f32")]
    F32,
}

impl From<Stored> for Precision {
    fn from(stored: Stored) -> Self {
        match stored {
            Stored::EightBit => Self::EightBit,
            Stored::F16 => Self::F16,
            Stored::F32 => Self::F32,
        }
    }
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    let kind = match arguments.network {
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
    write(output, &packed, &kept)?;
    Answer::new(&Written {
        path: output.clone(),
        kind,
        precision: arguments.precision,
        bytes,
        parts: packed.parts().into_iter().map(Row::new).collect(),
    })
}

/// What is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Generator,
    Network,
}

impl Kind {
    fn words(self) -> &'static str {
        match self {
            Self::Generator => "generator",
            Self::Network => "network",
        }
    }

    /// Whether a folder holds an older model of this kind.
    fn is(self, dir: &Path) -> bool {
        let has = |name: &str| dir.join(name).is_file();
        match self {
            Self::Generator => has(FILE_NAME),
            Self::Network => has(FILES[0]) && has(FILES[1]) && !has(FILE_NAME),
        }
    }
}

/// A model in memory.
enum Packed {
    Generator(PackedGenerator),
    Network(PackedFolder),
}

impl Packed {
    /// Reads and packs; `None` when the user stopped it.
    fn make(context: &Context, arguments: &Arguments) -> anyhow::Result<Option<Self>> {
        let precision = arguments.precision.into();
        if let Some(dir) = &arguments.network {
            let dir = model_folder(dir);
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
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Generator(generator) => generator.bytes(),
            Self::Network(folder) => folder.bytes(),
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

/// The folder with the model: that of a run is called `model`.
fn model_folder(dir: &Path) -> PathBuf {
    let below = dir.join("model");
    if !dir.join(FILES[0]).is_file() && below.join(FILES[0]).is_file() {
        below
    } else {
        dir.to_owned()
    }
}

/// Checks that the folder may be written, and lists the files of an older one that stay.
fn check_target(dir: &Path, kind: Kind, force: bool) -> anyhow::Result<Vec<PathBuf>> {
    let refuse = |path: &Path, words: String| anyhow::anyhow!("{}: {words}", path.display());
    let Ok(found) = fs::symlink_metadata(dir) else {
        return Ok(Vec::new());
    };
    if !found.is_dir() {
        return Err(refuse(dir, "exists and is not a folder".into()));
    }
    let entries = list(dir)?;
    if entries.is_empty() {
        return Ok(Vec::new());
    }
    if let [(path, name, true)] = entries.as_slice()
        && name == CARD
    {
        return Ok(vec![path.clone()]);
    }
    let words = kind.words();
    if !kind.is(dir) {
        let problem =
            format!("found a folder that holds no {words}, expected a new name or an older {words}");
        return Err(refuse(dir, problem));
    }
    if !force {
        return Err(refuse(
            dir,
            format!("holds a {words} already; --force replaces it"),
        ));
    }
    let parts = Part::ALL.map(Part::folder);
    let foreign = |path: &Path| {
        refuse(
            path,
            format!("found in the {words} to replace, where pack does not write it; move it away"),
        )
    };
    let mut kept = Vec::new();
    for (path, name, is_file) in entries {
        if kind == Kind::Generator && parts.contains(&name.as_str()) {
            for (path, name, is_file) in list(&path)? {
                if !is_file || !FILES.contains(&name.as_str()) {
                    return Err(foreign(&path));
                }
            }
        } else if !is_file {
            return Err(foreign(&path));
        } else if (kind == Kind::Generator && name != FILE_NAME)
            || (kind == Kind::Network && !FILES.contains(&name.as_str()))
        {
            kept.push(path);
        }
    }
    Ok(kept)
}

/// Paths in a folder, with their names and whether they are plain files, sorted.
fn list(dir: &Path) -> anyhow::Result<Vec<(PathBuf, String, bool)>> {
    let read = || -> std::io::Result<Vec<_>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            entries.push((entry.path(), name, entry.file_type()?.is_file()));
        }
        entries.sort();
        Ok(entries)
    };
    read().with_context(|| format!("{}: cannot read", dir.display()))
}

/// Writes the model under a temporary name, with the files that stay, and gives it its own.
fn write(output: &Path, packed: &Packed, kept: &[PathBuf]) -> anyhow::Result<()> {
    let failed = || format!("{}: cannot write", output.display());
    if let Some(parent) = output.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).with_context(failed)?;
    }
    let folder = AtomicFolder::create(output).with_context(failed)?;
    let dir = folder.temporary_path();
    packed.write(dir)?;
    for path in kept {
        let name = path.file_name().unwrap_or_default();
        fs::copy(path, dir.join(name)).with_context(|| format!("{}: cannot copy", path.display()))?;
    }
    folder.commit().with_context(failed)
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
