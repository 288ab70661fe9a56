//! Scores of audible video: AVHScore over any pair of picture and sound encoders, and the classifiers that judge what a
//! generator made.
#![forbid(unsafe_code)]

pub mod avhscore;
pub mod encoder;
pub mod judge;
