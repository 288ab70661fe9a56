//! Models of pictures: denoisers ([`Dit`]).

mod dit;

pub use dit::{Dit, DitConfig, DitKind, DitSize, Wanted};
