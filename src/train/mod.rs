//! Training: one engine for every model.
//!
//! A recipe names a [`task`]; the engine draws batches ahead of time, descends, averages the weights, logs, samples,
//! validates, and keeps checkpoints from which a run goes on as if it had never stopped: bit for bit on the CPU, as
//! long as the schedule counts steps and not seconds.
//!
//! A run folder holds `recipe.toml` with all values, `metrics.jsonl`, TensorBoard event files, `samples/`,
//! `checkpoints/`, `best.safetensors`, a `lock` that keeps other runs out, and at the end the finished `model/`.

pub mod checkpoint;
mod ema;
mod error;
mod heap;
pub mod log;
mod muon;
mod optimiser;
pub mod peak;
mod prefetch;
mod ranks;
pub mod recipe;
mod run;
pub mod schedule;
pub mod task;
pub mod tasks;

#[cfg(test)]
mod tests;

pub use ema::Ema;
pub use error::{TaskResult, TrainError};
pub use optimiser::{Gradients, Optimiser, OptimiserConfig};
pub use prefetch::Prefetch;
pub use ranks::{run_rank, run_threads};
pub use recipe::Recipe;
pub use run::{Options, Outcome, Report, run};
pub use task::{Batch, Cursor, Losses, Step, Task};
