//! LightNet layers and models on the Fulgur operators.
//!
//! LightNet mixes tokens with an additive recurrence: every token sees all others in one unordered pass, at a cost
//! linear in their number, and relative positions enter through MD-TPE and MD-LRPE along any number of axes.
//!
//! Layers take their tensors from a candle `VarBuilder`; [`params::Params`] is the store behind it.
//! Shapes: B batch, N tokens, d model width, H heads, D key width and E value width of a head, k axes.
#![forbid(unsafe_code)]

pub mod attention;
pub mod block;
pub mod config;
pub mod diffusion;
pub mod encoders;
pub mod glu;
pub mod linear;
pub mod lm;
pub mod mixer;
pub mod norm;
pub mod params;
pub mod patches;
pub mod position;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vision;
