//! Models of pictures: classifiers of patches ([`Classifier`]).

mod attention;
mod classifier;
mod config;
mod mixer;
mod patches;
#[cfg(test)]
mod tests;

pub use classifier::{Classifier, soft_cross_entropy};
pub use config::{Config, Kind, Mixer, Size, Tpe};
pub use patches::unfold;
