//! Times the parts of rendering a scene on one thread, and whole batches on all.
//!
//!     cargo run -p fulgur-datasets --example time_scenes -- DATA_DIR [COUNT [DUMP]]
//!
//! DATA_DIR holds the prepared sets `stamps` and `backgrounds`. COUNT scenes are timed (50 unless said), each part of each the shortest of
//! some tries, so that other work on the machine hardly counts. DUMP is a file for what was rendered, frames then
//! mask of every scene; where it exists already, it is compared with instead of written, so that a change of the
//! renderer can be judged.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::time::Instant;

use fulgur_datasets::pictures;
use fulgur_datasets::scenes::{Composer, Options, Split};
use fulgur_datasets::things::Things;
use rayon::prelude::*;

/// Tries of each part; the shortest counts.
const TRIES: usize = 7;
/// Clips rendered at once, as for a step of training, and how often.
const BATCH: (u64, u32) = (64, 8);
const PARTS: [&str; 4] = ["scene", "render_frames", "render_mask", "render_sound"];

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let data = arguments
        .first()
        .map(Path::new)
        .ok_or("usage: time_scenes DATA_DIR [COUNT [DUMP]]")?;
    let count: u64 = arguments.get(1).map_or("50", String::as_str).parse()?;
    let things = Things::load(&data.join("stamps"))?;
    let pictures = pictures::load(&data.join("backgrounds"))?;
    let pictures: Vec<_> = pictures.into_iter().map(|(picture, _)| picture).collect();
    let composer = Composer::new(things, &pictures, Options::default())?;
    let splits = [Split::Train, Split::Train, Split::Train, Split::Judge];
    let mut seconds = [0.0; PARTS.len()];
    let mut rendered = Vec::new();
    for index in 0..count {
        let split = splits[index as usize % splits.len()];
        let (mut best, mut time) = ([f64::INFINITY; PARTS.len()], Instant::now());
        for _ in 0..TRIES {
            let mut lap = |part: usize| {
                best[part] = time.elapsed().as_secs_f64().min(best[part]);
                time = Instant::now();
            };
            let scene = composer.scene(split, index);
            lap(0);
            let frames = composer.render_frames(&scene);
            lap(1);
            let mask = composer.render_mask(&scene);
            lap(2);
            let sound = composer.render_sound(&scene);
            lap(3);
            if arguments.len() > 2 && rendered.len() <= index as usize {
                rendered.push([frames, mask].concat());
            }
            drop(sound);
            time = Instant::now();
        }
        for (sum, best) in seconds.iter_mut().zip(best) {
            *sum += best;
        }
    }
    for (part, sum) in PARTS.iter().zip(seconds) {
        eprintln!("{part:14} {:8.3} ms a clip", 1e3 * sum / count as f64);
    }
    let whole: f64 = seconds.iter().sum();
    eprintln!("{:.0} clips/s on one core", count as f64 / whole);
    let start = Instant::now();
    for _ in 0..BATCH.1 {
        // All are kept until the last is done, so this counts the time for fresh memory too.
        let batch: Vec<_> = (0..BATCH.0)
            .into_par_iter()
            .map(|index| {
                let scene = composer.scene(Split::Train, index);
                (
                    composer.render_frames(&scene),
                    composer.render_mask(&scene),
                    composer.render_sound(&scene),
                )
            })
            .collect();
        assert_eq!(batch.len() as u64, BATCH.0);
    }
    eprintln!(
        "{:.0} clips/s in batches of {} on {} threads",
        (BATCH.0 * u64::from(BATCH.1)) as f64 / start.elapsed().as_secs_f64(),
        BATCH.0,
        rayon::current_num_threads(),
    );
    if let Some(dump) = arguments.get(2) {
        compare(Path::new(dump), &rendered.concat())?;
    }
    Ok(())
}

/// Writes `rendered` where `dump` does not exist, else reports how much they differ.
fn compare(dump: &Path, rendered: &[u8]) -> Result<(), Box<dyn Error>> {
    if !dump.exists() {
        return Ok(fs::write(dump, rendered)?);
    }
    let before = fs::read(dump)?;
    if before.len() != rendered.len() {
        let (found, expected) = (before.len(), rendered.len());
        return Err(format!("{}: found {found} bytes, expected {expected}", dump.display()).into());
    }
    let mut differences = [0u64; 256];
    for (&a, &b) in before.iter().zip(rendered) {
        differences[usize::from(a.abs_diff(b))] += 1;
    }
    let sum: u64 = (0..).zip(differences).map(|(level, n)| level * n).sum();
    eprintln!(
        "against {}: mean difference {:.5}, largest {}, {:.3} % of bytes differ",
        dump.display(),
        sum as f64 / before.len() as f64,
        differences.iter().rposition(|&n| n > 0).unwrap_or(0),
        100.0 * (before.len() as f64 - differences[0] as f64) / before.len() as f64,
    );
    Ok(())
}
