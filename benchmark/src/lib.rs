//! Audible video measured: the data set TAVGBench and its captions; AVHScore over any pair of picture and sound encoders;
//! the classifiers that judge what a generator made; and figures of texts.
#![forbid(unsafe_code)]

pub mod annotate;
pub mod avhscore;
pub mod captions;
pub mod checkpoint;
pub mod encoder;
pub mod features;
pub mod judge;
pub mod metrics;
