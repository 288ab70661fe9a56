//! Writes the smallest networks and data that a recipe can name into a new folder, for scripts that try the engine out:
//! `cargo run --example tiny_models -- DIR`. Their weights are random; nothing can be learnt from the data.

use std::path::Path;

// Judges and encoders are for the tests alone.
#[allow(dead_code)]
#[path = "../tests/end_to_end/tiny.rs"]
mod tiny;

/// Prepared things.
const THINGS: usize = 6;

fn main() {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [dir] = arguments.as_slice() else {
        eprintln!("usage: tiny_models DIR");
        std::process::exit(2);
    };
    let parts = tiny::generator(Path::new(dir));
    tiny::mel_codec(&parts, true);
    tiny::data(Path::new(dir), THINGS);
}
