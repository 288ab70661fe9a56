//! Judging a generator of pictures by classifiers that were trained on real ones.
//!
//! Pictures are drawn by class, an equal number of each, and by the captions of held-out pictures that no training picture has.
//! Classifiers say what they show, beside real held-out pictures as the ceiling; features of the classifiers give distances of
//! what is drawn from real pictures; and the nearest training pictures tell making from remembering.
//!
//! Figures of distances depend on how many pictures there are and on what their classes are. So they are taken at equal numbers
//! on both sides, of pictures whose classes and captions are in the proportions of real ones, with real held-out pictures in
//! their place as the reference.

mod accuracy;
mod distances;
mod judge;
mod labellings;
mod neighbours;
mod run;
mod samples;
mod search;
mod sheet;

pub use accuracy::Accuracy;
pub use distances::{Distances, Likeness};
pub use judge::Judge;
pub use labellings::{Labelling, Labellings};
pub use neighbours::{Neighbours, Remembered, Spread, Yardstick};
pub use run::{Count, Evaluation, Judged, OfDrawn, Options, Parts, Progress, Stage, evaluate};
pub use samples::By;
pub use sheet::{Cell, Row};
