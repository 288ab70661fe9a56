//! Annotation of audible video, coarse to fine, after TAVGBench: what is seen, what is heard, both rewritten, both merged into
//! one description; and filters that leave out clips which are not worth it.
//!
//! Each of five stages is a trait, so that a model of any kind can do it: [`FrameCaptioner`], [`AudioCaptioner`],
//! [`Rewriter`], [`Merger`] and [`ClipFilter`]. Here are [`precomputed`] texts, [`template`]s, the captioner [`blip`] for frames,
//! zero-shot [`tags`] for sounds, and any server that speaks the protocol of OpenAI ([`openai`]). [`pipeline`] runs them over a manifest,
//! goes on where it was stopped, and writes the same manifest however often that was.

pub mod backend;
pub mod blip;
pub mod config;
pub mod filter;
mod journal;
pub mod media;
pub mod openai;
pub mod pipeline;
pub mod precomputed;
pub mod prompts;
mod stage;
pub mod tags;
pub mod template;
mod texts;

pub use journal::JournalError;
pub use stage::{
    About, AudioCaptioner, Clip, ClipFilter, FrameCaptioner, Merger, Modality, Rewriter, StageError, Verdict,
    When,
};
