//! The program `fulgur`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    fulgur::cli::main()
}
