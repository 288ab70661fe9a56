//! Operators of the Fulgur toolkit: linear-attention recurrences with hand-written gradients, and the
//! counter-based random numbers that every other crate draws from.
//!
//! Layout is `[B, N, H, D]` for tokens and `[B, H, D, E]` in `f32` for states.

pub mod adamw;
pub mod additive;
mod autograd;
#[cfg(feature = "cuda")]
mod cuda_module;
pub mod ema;
pub mod error;
pub mod exchange;
pub mod glu;
pub mod lrpe;
pub mod norm;
mod pass;
pub mod philox;
mod scalar;
pub mod shift;
mod slice_math;
pub mod spectrum;
mod strided;
#[cfg(test)]
mod testing;
