//! A sheet of all prepared things with their pictures and spectrograms, to be looked at:
//! `cargo run --release -p fulgur-datasets --example things_sheet -- data/stamps sheet.png`

use fulgur_datasets::draw::{Area, Canvas, grid};
use fulgur_datasets::media::write_png;
use fulgur_datasets::things::{CUTOUT_SIDE, SOUND_RATE, Thing, Things};

const COLUMNS: usize = 10;
const SIDE: usize = CUTOUT_SIDE as usize;
const GREY: u8 = 150;
const INK: [u8; 3] = [0, 0, 0];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(folder), Some(out)) = (arguments.next(), arguments.next()) else {
        return Err("usage: things_sheet FOLDER OUT.png".into());
    };
    let things = Things::load(folder.as_ref())?;
    let cells: Vec<Canvas> = things.iter().map(cell).collect();
    write_png(out.as_ref(), &grid(&cells, COLUMNS).into_picture())?;
    Ok(())
}

fn cell(thing: &Thing) -> Canvas {
    let mut canvas = Canvas::new(2 * SIDE + 8, SIDE + 24, [GREY; 3]);
    let cutout = &thing.cutout;
    let over = cutout.rgba.as_chunks::<4>().0.iter().flat_map(|[r, g, b, a]| {
        let rest = (u16::from(GREY) * u16::from(255 - a) / 255) as u8;
        [r, g, b].map(|x| x.saturating_add(rest))
    });
    let (width, height) = (cutout.width as usize, cutout.height as usize);
    let picture = Area {
        x: 2,
        y: 2,
        width,
        height,
    };
    canvas.blit(picture, &over.collect::<Vec<_>>(), width, height);
    let mut sound = thing.sound.clone();
    sound.resize(2 * SOUND_RATE as usize, 0.0);
    let area = Area {
        x: SIDE as i32 + 4,
        y: 2,
        width: SIDE,
        height: SIDE,
    };
    canvas.spectrogram(area, &sound, SOUND_RATE);
    canvas.text(2, SIDE as i32 + 4, &thing.id, INK, 1);
    canvas.text(2, SIDE as i32 + 13, &thing.words.verb.finite, INK, 1);
    canvas
}
