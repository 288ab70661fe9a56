//! Judging a generator of audible video on prompts that it was not trained on.
//!
//! Each prompt is the caption of a held-out scene: a thing in a motion in which training never shows it. Classifiers that
//! know real cut-outs and real sounds alone say what a generated clip shows, plays and does; the sound's onset is
//! compared with the contact in the picture, and an encoder scores how well both belong together. Real clips of the same
//! scenes give the ceiling, real pictures with the sound of another clip the floor.
//!
//! A search for the nearest training clips tells composing from replaying: a generator that replays is nearer to its
//! training clips than new real clips are.

mod figures;
pub mod harmony;
mod jury;
mod maker;
mod neighbours;
pub mod pictures;
mod run;
mod sheet;

pub use figures::{Figures, Found, Shuffled, Truth, derangement, ratio};
pub use jury::{ClassError, Jury, clip_spec};
pub use maker::{Maker, Wanted};
pub use neighbours::{Distances, Nearest};
pub use run::{
    EvalError, Evaluation, Judged, Options, Parts, Progress, Stage, Training, evaluate, open_clips,
    open_training_clips,
};
