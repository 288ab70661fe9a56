//! `fulgur preprocess`: files as published networks take them, to compare with the preprocessing of any other implementation.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use candle_core::{Device, Tensor};
use fulgur_benchmark::encoder::imagebind::filterbank::Filterbank;
use fulgur_benchmark::encoder::imagebind::{hearing, seeing};
use fulgur_benchmark::features::audioldm;
use fulgur_datasets::media::{Picture, read_picture, read_sound};
use serde::Serialize;

use super::answer::{Answer, Report};
use super::files::check_output;
use crate::tensors;

/// A preprocessing: its name, and what it makes of a file.
type Kind = (&'static str, fn(&Path) -> anyhow::Result<Tensor>);

/// All of them.
const KINDS: [Kind; 3] = [
    ("imagebind-audio", imagebind_audio),
    ("clip-image", clip_image),
    ("audioldm-mel", audioldm_mel),
];

/// Bands and frames of a clip of sound, and the side of a picture.
const BANDS: usize = 128;
const FRAMES: usize = 204;
const SIDE: usize = 224;

/// Prepare a file as a published network takes it
///
/// Writes `features`: imagebind-audio gives [1, 128, 204], the Kaldi filterbank of the first channel of the whole file as one clip, at 16
/// kHz, cut or padded at the end; clip-image gives [3, 224, 224], the shorter side resized by Pillow's bicubic, the square in the middle,
/// less CLIP's mean and divided by its deviation; audioldm-mel gives [frames, 64], the log-mel spectrogram of AudioLDM at 16 kHz, without
/// its gain normalisation.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur preprocess imagebind-audio bark.wav --out features.safetensors\n  fulgur preprocess clip-image \
                  dog.png --out features.safetensors"
)]
pub(super) struct Arguments {
    /// What for
    #[arg(value_name = "KIND", value_parser = clap::builder::PossibleValuesParser::new(KINDS.map(|(name, _)| name)))]
    kind: String,
    /// A sound, a clip or a picture
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Where to write the features
    #[arg(long, value_name = "FILE.safetensors")]
    out: PathBuf,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<Answer> {
    let Arguments { kind, file, out } = arguments;
    check_output(&out)?;
    let (_, prepare) = KINDS
        .iter()
        .find(|(name, _)| *name == kind)
        .ok_or_else(|| anyhow!("found {kind}, which is no preprocessing"))?;
    let features = prepare(&file)?;
    let shape = features.dims().to_vec();
    tensors::write_f32(&out, &BTreeMap::from([("features".to_owned(), features)]))?;
    Answer::new(&Prepared {
        kind,
        features: shape,
        path: out,
    })
}

fn imagebind_audio(path: &Path) -> anyhow::Result<Tensor> {
    let sound = read_sound(path, None)?;
    let samples = hearing::heard(&sound, false)?;
    let picture = hearing::picture(&Filterbank::new(BANDS), &samples, FRAMES);
    Ok(Tensor::from_vec(picture, (1, BANDS, FRAMES), &Device::Cpu)?)
}

fn clip_image(path: &Path) -> anyhow::Result<Tensor> {
    let picture = read_picture(path)?;
    // Opacity is dropped, as Pillow does it when it makes RGB of a picture.
    let picture = match picture.channels {
        4 => {
            let pixels = picture.pixels.as_chunks::<4>().0.iter();
            let pixels = pixels.flat_map(|&[r, g, b, _]| [r, g, b]).collect();
            Picture::new(pixels, picture.width, picture.height, 3)?
        }
        _ => picture,
    };
    let view = seeing::view(SIDE);
    let values = view.normalised(&[view.middle(&picture)?]);
    Ok(Tensor::from_vec(values, (3, SIDE, SIDE), &Device::Cpu)?)
}

fn audioldm_mel(path: &Path) -> anyhow::Result<Tensor> {
    let sound = read_sound(path, Some(audioldm::RATE))?.mono();
    audioldm::log_mel(&sound.samples).map_err(|error| anyhow!("{}: {error}", path.display()))
}

#[derive(Serialize)]
struct Prepared {
    kind: String,
    features: Vec<usize>,
    path: PathBuf,
}

impl Report for Prepared {}

impl fmt::Display for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "features {:?}\nwritten to {}",
            self.features,
            self.path.display()
        )
    }
}
