//! Figures of what models make, beside what they should have made.

pub mod av_align;
pub mod classes;
pub mod eigen;
pub mod farneback;
pub mod frechet;
pub mod javis;
pub mod joint;
pub mod kvd;
pub mod manifold;
pub mod onset;
pub mod points;
pub mod readers;
pub mod suite;
pub mod sync;
pub mod text;
