//! Draws a contact sheet of Pathfinder pictures, connected ones with a green frame, and reports how fast examples of it and of ListOps are made.
//!
//!     cargo run -p fulgur-datasets --example pathfinder_sheet -- OUT.png [SEED]

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use fulgur_datasets::draw::{Area, Canvas, grid};
use fulgur_datasets::long_range::ListOps;
use fulgur_datasets::long_range::pathfinder::{SIDE, example};
use fulgur_datasets::media::write_png;
use rayon::prelude::*;

const SHOWN: u64 = 24;
const COLUMNS: usize = 8;
const SCALE: usize = 5;
const TIMED: u64 = 4000;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let out = arguments.next().ok_or("usage: pathfinder_sheet OUT.png [SEED]")?;
    let seed: u64 = arguments.next().unwrap_or("1".into()).parse()?;
    let cells: Vec<Canvas> = (0..SHOWN)
        .map(|index| {
            let example = example(seed, index);
            let (frame, side) = (3, SIDE * SCALE);
            let colour = if example.connected {
                [60, 200, 90]
            } else {
                [200, 70, 60]
            };
            let mut cell = Canvas::new(side + 2 * frame, side + 2 * frame, colour);
            let mut rgb = Vec::with_capacity(side * side * 3);
            for y in 0..side {
                for x in 0..side {
                    rgb.extend([example.pixels[y / SCALE * SIDE + x / SCALE]; 3]);
                }
            }
            let area = Area {
                x: frame as i32,
                y: frame as i32,
                width: side,
                height: side,
            };
            cell.blit(area, &rgb, side, side);
            cell
        })
        .collect();
    write_png(Path::new(&out), &grid(&cells, COLUMNS).into_picture())?;
    let start = Instant::now();
    let sum: u64 = (0..TIMED)
        .into_par_iter()
        .map(|index| u64::from(example(seed, index).pixels[500]))
        .sum();
    eprintln!("pathfinder: {:.0} pictures/s ({sum})", rate(start));
    let (start, options) = (Instant::now(), ListOps::default());
    let tokens: usize = (0..TIMED)
        .into_par_iter()
        .map(|index| options.example(seed, index).map(|example| example.tokens.len()))
        .sum::<Result<_, _>>()?;
    eprintln!(
        "listops: {:.0} expressions/s, {:.0} tokens on average",
        rate(start),
        tokens as f64 / TIMED as f64
    );
    Ok(())
}

fn rate(start: Instant) -> f64 {
    TIMED as f64 / start.elapsed().as_secs_f64()
}
