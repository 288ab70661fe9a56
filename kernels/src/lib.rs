//! Operators of the Fulgur toolkit: linear-attention recurrences with hand-written gradients, and the
//! counter-based random numbers that every other crate draws from.
//!
//! Layout is `[B, N, H, D]` for tokens and `[B, H, D, E]` in `f32` for states.

pub mod adamw;
pub mod additive;
pub mod attention;
mod autograd;
pub mod average;
pub mod convolution;
pub mod cross_entropy;
#[cfg(feature = "cuda")]
mod cublas;
#[cfg(feature = "cuda")]
mod cuda_module;
pub mod decay;
#[cfg(feature = "cuda")]
pub mod device;
pub mod ema;
pub mod embedding;
pub mod eos;
pub mod error;
pub mod exchange;
pub mod gelu;
pub mod glu;
#[cfg(feature = "cuda")]
mod gpu;
#[cfg(feature = "cuda")]
pub mod graph;
pub mod likeliest;
pub mod linear;
pub mod log_sum;
pub mod lrpe;
pub mod memory;
mod named;
#[cfg(feature = "nccl")]
pub mod nccl;
pub mod norm;
pub mod order;
mod pass;
pub mod philox;
#[cfg(feature = "cuda")]
pub mod probe;
pub mod residual;
pub mod rows;
mod scalar;
mod sequences;
pub mod shift;
pub mod short_conv;
mod sizes;
mod slice_math;
pub mod spectrum;
pub mod split;
mod strided;
pub mod tape;
#[cfg(test)]
mod testing;
pub mod unfold;
pub mod upload;
