//! Fulgur: linear-complexity models that see, hear and write.

pub use fulgur_kernels as kernels;
