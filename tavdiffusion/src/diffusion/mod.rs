//! Noising, what is predicted, and the way back: objectives, schedules, samplers and guidance.

mod objective;
mod sampler;
mod schedule;

pub use objective::{Mixture, Objective};
pub use sampler::{Guidance, Prompts, Sampler, Step};
pub use schedule::LinearSchedule;
