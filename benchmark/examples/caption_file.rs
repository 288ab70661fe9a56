//! Makes a caption file of any number of clips, as large and as odd as the release, and tells what is in it.
//!
//! ```sh
//! cargo run --release -p fulgur-benchmark --example caption_file -- 1700000 target/captions.txt
//! fulgur tavgbench stats target/captions.txt
//! cargo run --release -p fulgur-benchmark --example caption_file -- 100000 target/clips.jsonl
//! fulgur annotate target/clips.jsonl -o target/annotated.jsonl
//! ```
//!
//! A name that ends in `.jsonl` gives a manifest for `fulgur annotate` instead.

use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use fulgur_benchmark::captions::synthetic::{write_captions, write_manifest};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let usage = "expected a number of clips and the name of a file";
    let records: u64 = arguments
        .next()
        .and_then(|text| text.to_str()?.parse().ok())
        .ok_or(usage)?;
    let path = PathBuf::from(arguments.next().ok_or(usage)?);
    let mut file = BufWriter::with_capacity(1 << 20, File::create(&path)?);
    let mut told = String::new();
    if path.extension().is_some_and(|ending| ending == "jsonl") {
        write_manifest(&mut file, records, 0)?;
    } else {
        told = format!("{:#?}\n", write_captions(&mut file, records, 0)?);
    }
    file.flush()?;
    std::io::stdout().write_all(told.as_bytes())?;
    Ok(())
}
