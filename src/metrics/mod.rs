//! Metrics over folders of clips, and over features that somebody else computed.

pub mod features;
#[cfg(feature = "media")]
pub mod folders;
