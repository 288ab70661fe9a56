//! The program `fulgur`.
fn main() {}
