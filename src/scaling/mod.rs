//! Scaling laws of language models (arXiv 2406.16690, section 4 of the specification): one study, many runs, power laws.
//!
//! A [`Study`] trains every architecture in every size on the same tokens and notes down the held-out loss along each run.
//! [`Fit`] takes the lower envelope of those curves over compute and fits
//!
//! ```text
//! L(C) = beta_L C^alpha_L     N_opt(C) = beta_N C^a     D_opt(C) = beta_D C^b
//! ```
//!
//! to it: C in PFLOP/s-days of training by the formulas of [`account`], L in nats a token, N weights of the layers, D tokens.
//! There is no irreducible term, and the three are fitted separately, so that none may be extrapolated far.

pub mod account;
mod curve;
mod envelope;
mod fit;
mod line;
mod plan;
mod plot;
pub mod published;
mod study;
mod sweep;

pub use curve::{Curve, Point, read};
pub use envelope::{Dropped, Envelope, Track, Winner};
pub use fit::{Counted, Fit, Law, Prediction, fit};
pub use plan::{Length, Planned};
pub use plot::{Drawn, draw};
pub use study::{Size, Study};
pub use sweep::{Failed, Row, Sweep, Trial, sweep};

pub use crate::sweep::{Place, Results, Told};

/// Floating-point operations of one PFLOP/s-day.
pub const PFLOPS_DAY: f64 = 1e15 * 86_400.0;
