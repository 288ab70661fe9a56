//! `fulgur eval encoder`: how many frames a second an encoder sees.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::bail;
use candle_core::{DType, Device, Tensor};
use fulgur_benchmark::encoder::{Encoder, ImageBindEncoder, ImageBindOptions};
use serde::Serialize;

use super::super::answer::{Answer, Report, Status};
use super::super::context::Context;
use super::super::encoder::Products;
use super::super::progress::Unit;
use crate::device::device_name;
use crate::tensors;

/// Name of the frames in the file, where there are other tensors.
const FRAMES: &str = "frames";

/// Measure how many frames a second ImageBind sees
///
/// Frames are bytes [F, H, W, 3] in a safetensors file. They are gone through again and again: resized and cut on the CPU as for a score,
/// encoded, and averaged; while the network works on a batch, the next one is prepared. Loading and the first batch are not timed.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur eval encoder --encoder imagebind --frames frames.safetensors --seconds 20 --device cuda"
)]
pub(super) struct Arguments {
    /// Folder or checkpoint of ImageBind
    #[arg(long, value_name = "DIR")]
    encoder: PathBuf,
    /// The frames
    #[arg(long, value_name = "FILE.safetensors")]
    frames: PathBuf,
    /// How long at least
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=3600), default_value_t = 20)]
    seconds: u32,
    /// Frames at a time; as for a score if absent
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    batch: Option<u16>,
    /// Type of products
    #[arg(long, value_enum, default_value_t)]
    precision: Products,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    let (bytes, [count, height, width]) = frames(arguments)?;
    let device = context.open_device()?;
    let options = ImageBindOptions {
        compute: arguments.precision.dtype(&device)?,
        downmix: false,
    };
    let encoder = ImageBindEncoder::open(&arguments.encoder, options, &device)?;
    let batch = arguments.batch.map_or(encoder.batch(), usize::from);
    let size = height * width * 3;
    let all: Vec<&[u8]> = bytes.chunks_exact(size).collect();
    let mut next = all.iter().copied().cycle();
    let mut embed = || -> anyhow::Result<Tensor> {
        let frames: Vec<&[u8]> = next.by_ref().take(batch).collect();
        let fitted = encoder.fit_frames(&frames, width, height)?;
        Ok(encoder.embed_frames(&fitted)?.sum(0)?)
    };
    let warm: Vec<f32> = embed()?.to_vec1()?;

    let limit = Duration::from_secs(arguments.seconds.into());
    let mut progress = context.progress("encode", Unit::Items("s"));
    let began = Instant::now();
    let mut total = Tensor::zeros(warm.len(), DType::F32, &device)?;
    let (mut seen, mut earlier): (usize, Option<Tensor>) = (0, None);
    while began.elapsed() < limit && !context.interrupt.flag().load(Ordering::Relaxed) {
        let sum = embed()?;
        total = (total + &sum)?;
        // Waits for the batch before: the GPU has this one while the next is prepared.
        if let Some(earlier) = earlier.replace(sum) {
            earlier.to_vec1::<f32>()?;
        }
        seen += batch;
        progress.set(began.elapsed().as_secs(), Some(limit.as_secs()));
    }
    let mean = (total / seen.max(1) as f64)?.to_vec1::<f32>()?;
    let seconds = began.elapsed().as_secs_f64();
    drop(progress);
    Answer::new(&Speed {
        frames_per_s: seen as f64 / seconds,
        frames: seen,
        seconds,
        batch,
        width,
        height,
        distinct_frames: count,
        mean_length: mean.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt(),
        compute: options.compute.as_str(),
        device: device_name(&device),
        complete: began.elapsed() >= limit,
    })
}

/// The bytes of all frames, their number, height and width.
fn frames(arguments: &Arguments) -> anyhow::Result<(Vec<u8>, [usize; 3])> {
    let path = &arguments.frames;
    let tensors = tensors::read(path, &Device::Cpu)?;
    let found = match tensors.get(FRAMES) {
        Some(tensor) => Some(tensor),
        None if tensors.len() == 1 => tensors.values().next(),
        None => None,
    };
    let Some(tensor) = found else {
        bail!(
            "{}: found {} tensors, expected one, or `{FRAMES}`",
            path.display(),
            tensors.len()
        );
    };
    match *tensor.dims() {
        [count, height, width, 3] if tensor.dtype() == DType::U8 && tensor.elem_count() > 0 => {
            Ok((tensor.flatten_all()?.to_vec1()?, [count, height, width]))
        }
        _ => bail!(
            "{}: found {:?} of {}, expected u8 frames [F, H, W, 3]",
            path.display(),
            tensor.dims(),
            tensor.dtype().as_str()
        ),
    }
}

#[derive(Serialize)]
struct Speed {
    frames_per_s: f64,
    frames: usize,
    seconds: f64,
    batch: usize,
    width: usize,
    height: usize,
    distinct_frames: usize,
    mean_length: f64,
    compute: &'static str,
    device: String,
    #[serde(skip)]
    complete: bool,
}

impl Report for Speed {
    fn status(&self) -> Status {
        match self.complete {
            true => Status::Done,
            false => Status::Partial,
        }
    }
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.1} frames/s: {} frames of {}x{} in {:.1} s, {} at a time, {} on {}",
            self.frames_per_s,
            self.frames,
            self.width,
            self.height,
            self.seconds,
            self.batch,
            self.compute,
            self.device
        )
    }
}
