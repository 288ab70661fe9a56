//! Operators of the Fulgur toolkit: linear-attention recurrences with hand-written gradients, and the
//! counter-based random numbers that every other crate draws from.
//!
//! Layout is `[B, N, H, D]` for tokens and `[B, H, D, E]` in `f32` for states.

pub mod philox;
