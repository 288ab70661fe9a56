//! What the whole program promises, tried on the built binary.

mod data;
mod documentation;
mod forward;
#[cfg(feature = "media")]
mod generate;
#[cfg(feature = "media")]
mod inspect;
mod models;
mod pack;
mod program;
mod repository;
mod support;
mod tiny;
