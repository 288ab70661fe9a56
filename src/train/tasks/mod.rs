//! What can be trained: one file a task, one line in the table.

pub(crate) mod classify;
pub mod clips;
mod encoder;
mod export;
pub(crate) mod image;
mod judge;
mod lm;
pub(crate) mod lra;
mod mean;
mod mel_codec;
pub mod outline;
mod picture_codec;
pub(crate) mod pictures;
mod recall;
pub(crate) mod tav;
pub(crate) mod tav_published;
mod text;
mod video_codec;
mod vocoder;

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Device;

use super::error::{TaskResult, TrainError};
use super::recipe::Recipe;
use super::task::Task;

/// Builds a task from its recipe, with all its parameters on the device. What takes long looks at the flag now and then
/// and gives up where it is set.
pub type Build = fn(&Recipe, &Device, &AtomicBool) -> TaskResult<Box<dyn Task>>;

/// All tasks: the name that recipes use, and how to build it.
pub const TASKS: &[(&str, Build)] = &[
    ("text", text::build),
    ("video-codec", |r, d, _| {
        Ok(Box::new(video_codec::VideoCodecTask::open(r.own()?, r.seed, d)?))
    }),
    ("mel-codec", |r, d, _| {
        Ok(Box::new(mel_codec::MelCodecTask::open(r.own()?, r.seed, d)?))
    }),
    ("vocoder", |r, d, _| {
        Ok(Box::new(vocoder::VocoderTask::open(r.own()?, r.seed, d)?))
    }),
    ("encoder", |r, d, _| {
        Ok(Box::new(encoder::EncoderTask::open(r.own()?, r.seed, d)?))
    }),
    ("judge", |r, d, _| {
        Ok(Box::new(judge::JudgeTask::open(r.own()?, r.seed, d)?))
    }),
    ("lm", |r, d, _| {
        Ok(Box::new(lm::LmTask::open(r.own()?, r.seed, d)?))
    }),
    ("recall", |r, d, _| {
        Ok(Box::new(recall::RecallTask::open(r.own()?, r.seed, d)?))
    }),
    ("lra", |r, d, _| {
        Ok(Box::new(lra::LraTask::open(r.own()?, r.seed, d)?))
    }),
    ("classify", |r, d, _| {
        Ok(Box::new(classify::ClassifyTask::open(r.own()?, r.seed, d)?))
    }),
    ("picture-codec", |r, d, _| {
        Ok(Box::new(picture_codec::PictureCodecTask::open(
            r.own()?,
            r.seed,
            d,
        )?))
    }),
    ("image", |r, d, stop| {
        Ok(Box::new(image::ImageTask::open(r.own()?, r.seed, d, stop)?))
    }),
    ("tav", |r, d, stop| {
        Ok(Box::new(tav::TavTask::open(r.own()?, r.seed, d, stop)?))
    }),
    ("tav-published", |r, d, stop| {
        Ok(Box::new(tav_published::PublishedTask::open(
            r.own()?,
            r.seed,
            d,
            stop,
        )?))
    }),
];

/// Builds the task that `recipe` names, from a table of tasks; `stop` is set from elsewhere to give up.
///
/// # Errors
/// The table has no such task, the task refuses its part of the recipe, or `stop` was set before it was ready.
pub fn build(
    tasks: &[(&str, Build)],
    recipe: &Recipe,
    device: &Device,
    stop: &AtomicBool,
) -> Result<Box<dyn Task>, TrainError> {
    let Some((name, build)) = tasks.iter().find(|(name, _)| *name == recipe.task) else {
        let known: Vec<_> = tasks.iter().map(|(name, _)| *name).collect();
        let reason = format!(
            "unknown task `{}`, expected one of {}",
            recipe.task,
            known.join(", ")
        );
        return Err(TrainError::Recipe {
            origin: recipe.origin.clone(),
            reason,
        });
    };
    build(recipe, device, stop).map_err(TrainError::task(format!("{}: task {name}", recipe.origin)))
}

/// An error once `stop` is set, about the work that it ends.
fn check_stop(stop: &AtomicBool, work: &str) -> TaskResult<()> {
    if stop.load(Ordering::SeqCst) {
        return Err(format!("stopped while {work}; nothing was written").into());
    }
    Ok(())
}
