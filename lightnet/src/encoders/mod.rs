//! Published encoders that more than one crate uses, with the tensor names of their checkpoints.

pub mod bert;
