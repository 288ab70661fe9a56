//! Figures of what models make, beside what they should have made.

pub mod text;
