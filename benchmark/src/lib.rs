//! Scores of audible video: AVHScore over any pair of picture and sound encoders, and the classifiers that judge what a
//! generator made; and figures of texts.
#![forbid(unsafe_code)]

pub mod avhscore;
pub mod encoder;
pub mod features;
pub mod judge;
pub mod metrics;
