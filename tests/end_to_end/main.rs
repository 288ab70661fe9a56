//! What the whole program promises, tried on the built binary.

#[cfg(unix)]
mod annotate;
mod annotate_models;
#[cfg(feature = "media")]
mod bad_input;
#[cfg(feature = "media")]
mod builtin;
#[cfg(unix)]
mod checkpoints;
mod classify;
mod data;
#[cfg(unix)]
mod distributed;
mod documentation;
mod encoders;
mod eval;
mod eval_image;
mod forward;
#[cfg(feature = "media")]
mod generate;
mod image;
mod image_latent;
#[cfg(feature = "media")]
mod inspect;
#[cfg(unix)]
mod language;
mod language_models;
mod lm;
mod lm_eval;
mod lm_pack;
mod long_range;
#[cfg(feature = "media")]
mod metrics;
mod models;
mod pack;
mod program;
mod published;
#[cfg(feature = "media")]
mod published_clips;
mod report;
mod repository;
mod scaling;
#[cfg(unix)]
mod signals;
mod speed;
mod support;
#[cfg(feature = "media")]
mod tav_published;
mod tavgbench;
mod tiny;
mod training;
