//! What training sees of a few pictures, to be looked at, and how fast it is:
//! `cargo run --release -p fulgur-datasets --example augment_sheet -- emoji data sheet.png`
//!
//! A row is one picture: as evaluation sees it, then random crops with flips, RandAugment, erasing, CutMix and mixup with its neighbour.

use std::path::Path;
use std::time::Instant;

use fulgur_datasets::augment::{Augment, Batch, Erasing, RandAugment, RandomCrop, Sample, View};
use fulgur_datasets::draw::{Area, Canvas, grid};
use fulgur_datasets::labelled::{Labelled, Part};
use fulgur_datasets::media::write_png;

const ROWS: usize = 8;
const SIDE: usize = 96;
/// Pictures of a batch that is timed.
const BATCH: u64 = 256;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [source, data, out] = arguments.as_slice() else {
        return Err("usage: augment_sheet PICTURES DATA OUT.png".into());
    };
    let set = Labelled::open(source, Path::new(data))?;
    let train = set.part(Part::Train);
    let chosen: Vec<usize> = (0..ROWS).map(|row| train[row * train.len() / ROWS]).collect();
    let view = View {
        height: SIDE,
        width: SIDE,
        ..View::default()
    };
    let crop = Augment {
        crop: Some(RandomCrop::default()),
        flip: 0.5,
        ..Augment::default()
    };
    let strong = Augment {
        randaugment: Some(RandAugment::default()),
        ..crop.clone()
    };
    let columns = [
        Augment::default(),
        crop.clone(),
        crop.clone(),
        strong.clone(),
        strong.clone(),
        strong.clone(),
        Augment {
            erasing: Some(Erasing {
                probability: 1.0,
                ..Erasing::default()
            }),
            ..Augment::default()
        },
        Augment {
            cutmix: 1.0,
            ..Augment::default()
        },
        Augment {
            mixup: 1.0,
            ..Augment::default()
        },
    ];
    let mut batches = Vec::new();
    for (column, augment) in columns.iter().enumerate() {
        let sample = |(row, &picture): (usize, &usize)| Sample {
            picture,
            number: (column * ROWS + row) as u64,
        };
        let samples: Vec<Sample> = chosen.iter().enumerate().map(sample).collect();
        batches.push(augment.batch(&view, &set, &samples, 1)?);
    }
    let cells: Vec<Canvas> = (0..ROWS)
        .flat_map(|row| batches.iter().map(move |batch| cell(batch, row)))
        .collect();
    write_png(out.as_ref(), &grid(&cells, columns.len()).into_picture())?;

    let erasing = Augment {
        erasing: Some(Erasing::default()),
        mixup: 0.8,
        cutmix: 1.0,
        ..strong
    };
    let shifts = Augment {
        crop: None,
        pad: 2,
        randaugment: None,
        ..erasing.clone()
    };
    let mut views = vec![View::default()];
    if let Some(side) = set.side() {
        views.push(View {
            channels: if set.is_grey() { 1 } else { 3 },
            ..View::filled(side)
        });
    }
    for view in views {
        for (name, augment) in [
            ("evaluation", &Augment::default()),
            ("crop and flip", &crop),
            ("shift, flip, erasing and mixing", &shifts),
            ("everything", &erasing),
        ] {
            let rate = rate(&set, &train, &view, augment)?;
            eprintln!(
                "{source}, {name}: {rate:.0} pictures/s at {} x {} on one thread",
                view.width, view.height
            );
        }
    }
    Ok(())
}

/// Pictures a second on one thread, over half a second at least.
fn rate(
    set: &Labelled,
    train: &[usize],
    view: &View,
    augment: &Augment,
) -> Result<f64, Box<dyn std::error::Error>> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    let start = Instant::now();
    let mut drawn = 0;
    while drawn < BATCH || start.elapsed().as_secs_f64() < 0.5 {
        let samples: Vec<Sample> = (drawn..drawn + BATCH)
            .map(|number| Sample {
                picture: train[number as usize * 7919 % train.len()],
                number,
            })
            .collect();
        pool.install(|| augment.batch(view, set, &samples, 1))?;
        drawn += BATCH;
    }
    Ok(drawn as f64 / start.elapsed().as_secs_f64())
}

fn cell(batch: &Batch, row: usize) -> Canvas {
    let size = SIDE * SIDE * 3;
    let values = &batch.pixels[row * size..(row + 1) * size];
    let byte = |x: f32| ((x * 0.5 + 0.5) * 255.0).round() as u8;
    let area = SIDE * SIDE;
    let pixels = (0..area).flat_map(|at| [0, 1, 2].map(|channel| byte(values[channel * area + at])));
    let bytes: Vec<u8> = pixels.collect();
    let mut canvas = Canvas::new(SIDE + 4, SIDE + 4, [90; 3]);
    let area = Area {
        x: 2,
        y: 2,
        width: SIDE,
        height: SIDE,
    };
    canvas.blit(area, &bytes, SIDE, SIDE);
    canvas
}
