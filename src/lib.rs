//! Fulgur: linear-complexity models that see, hear and write.
//!
//! This package is the facade of the toolkit and the home of the program `fulgur`. The crates below it can be
//! used on their own; here they are gathered under one name, with what only the whole can offer: devices chosen
//! by name, models run on named tensors, pages and sheets that show a result, training, and the command line.
//!
//! ```
//! use fulgur::device::DeviceChoice;
//!
//! let choice: DeviceChoice = "cpu".parse()?;
//! let opened = choice.open()?;
//! assert!(opened.device.is_cpu());
//! # Ok::<(), fulgur::device::DeviceError>(())
//! ```
#![forbid(unsafe_code)]

pub use fulgur_benchmark as benchmark;
pub use fulgur_datasets as datasets;
pub use fulgur_kernels as kernels;
pub use fulgur_lightnet as lightnet;
pub use fulgur_tavdiffusion as tavdiffusion;

pub mod annotate;
pub mod classify;
pub mod cli;
pub mod decode;
pub mod device;
pub mod distributed;
pub mod doctor;
pub mod eos;
pub mod estimate;
pub mod eval;
pub mod forward;
pub mod lm_eval;
pub mod lra;
pub mod metrics;
pub mod models;
pub mod paint;
pub mod report;
pub mod scaling;
pub mod sheet;
mod sweep;
pub mod tensors;
pub mod text_score;
pub mod timing;
pub mod train;
