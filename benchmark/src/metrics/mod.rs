//! Figures of what models make, beside what they should have made.

pub mod eigen;
pub mod frechet;
pub mod manifold;
pub mod points;
pub mod text;
