//! Models of pictures: classifiers of patches ([`Classifier`]) and denoisers ([`Dit`]).

mod attention;
mod classifier;
mod config;
mod dit;
mod mixer;
mod patches;
#[cfg(test)]
mod tests;

pub use classifier::{Classifier, soft_cross_entropy};
pub use config::{Config, Kind, Mixer, Size, Tpe};
pub use dit::{Dit, DitConfig, DitKind, DitSize, Wanted};
pub use patches::unfold;
