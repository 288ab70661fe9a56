//! Noising, what is predicted, and the way back: objectives, schedules and samplers of anything that lies in tensors.

mod condition;
mod objective;
mod sampler;
mod schedule;
mod solver;

pub use condition::{TimeEmbedding, mean_of_words};
pub use objective::{Mixture, Objective};
pub use sampler::{Sampler, Step};
pub use schedule::LinearSchedule;
pub use solver::{Betas, Method, Prediction, Solver, SolverConfig, Spacing};

/// Step of the linear schedule that a time in [0, 1] stands for.
pub use objective::ddpm_step;
