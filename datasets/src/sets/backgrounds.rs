//! `backgrounds`: real pictures to put things in front of, 128 by 128, under free terms that are stated per picture.
//!
//! Stills of Big Buck Bunny (landscapes of its training part, CC-BY 3.0) and photographs of GCompris that are in the
//! public domain. Prepared tensor: `images` u8 [n, 128, 128, 3]; the metadata entry `sources` is a JSON list with the
//! origin of every picture.

use std::ops::ControlFlow;

use image::RgbImage;
use image::imageops::{self, FilterType};

use super::{Job, Set, bbb, stamps};
use crate::fetch::FetchError;
use crate::fetch::packages::{GCOMPRIS, MOVIEPY};
use crate::media::{ReadOptions, decode_picture, for_each_frame};
use crate::pictures::{FILE, KEY};
pub use crate::pictures::{SIDE, load};
use crate::store::{Plain, write_tensors};
use crate::things::Origin;

pub(super) const SET: Set = Set {
    name: "backgrounds",
    description: "128x128 photographs and film stills to put things in front of",
    licence: "CC-BY 3.0 (c) Blender Foundation, peach.blender.org; public domain; per picture in backgrounds.safetensors",
    packages: &[&MOVIEPY, &GCOMPRIS],
    prepare,
};

/// Seconds between two stills.
const STILL_STEP_S: usize = 8;
/// Mean brightness below which a still is a fade or a title, in 0..255.
const DARK: f32 = 40.0;
/// Photographs that show a place rather than an object on white: archive and path.
const PHOTOGRAPHS: [(&str, &str); 12] = [
    ("categorization", "images/fishes/fish1.webp"),
    ("categorization", "images/fishes/fish2.webp"),
    ("categorization", "images/fishes/fish4.webp"),
    ("categorization", "images/fishes/fish5.webp"),
    ("categorization", "images/fishes/fish23.webp"),
    ("categorization", "images/fishes/fish24.webp"),
    ("categorization", "images/fishes/fish25.webp"),
    ("categorization", "images/others/igloo.webp"),
    ("categorization", "images/renewable/dam2.webp"),
    ("categorization", "images/renewable/solar4.webp"),
    ("categorization", "images/renewable/windmill.webp"),
    ("explore_world_animals", "animals/moose.webp"),
];

fn prepare(job: &Job<'_>) -> Result<usize, FetchError> {
    let stills = bbb::TRAINING_S.end / STILL_STEP_S;
    job.begin(stills + PHOTOGRAPHS.len());
    let mut all = film_stills(job)?;
    job.advance(stills)?;
    all.extend(photographs(job)?);
    let (pictures, origins): (Vec<Vec<u8>>, Vec<Origin>) = all.into_iter().unzip();
    let text = serde_json::to_string(&origins)
        .map_err(|e| FetchError::format(FILE, KEY, e.to_string(), "text that JSON can hold"))?;
    let images = Plain::u8(&[origins.len(), SIDE, SIDE, 3], pictures.concat());
    write_tensors(
        &job.out.join(FILE),
        vec![("images".to_owned(), images)],
        Some((KEY, text)),
    )?;
    job.advance(stills + PHOTOGRAPHS.len())?;
    Ok(origins.len())
}

fn film_stills(job: &Job<'_>) -> Result<Vec<(Vec<u8>, Origin)>, FetchError> {
    let film = bbb::film(job)?;
    let options = ReadOptions {
        duration_s: Some(bbb::TRAINING_S.end as f64),
        fps: Some(1.0 / STILL_STEP_S as f64),
        size: Some((SIDE * 16 / 9, SIDE)),
        ..ReadOptions::default()
    };
    let mut stills = Vec::new();
    let mut failure = None;
    for_each_frame(film.path(), &options, |frame| {
        let mean = frame.rgb.iter().map(|x| f32::from(*x)).sum::<f32>() / frame.rgb.len().max(1) as f32;
        if mean >= DARK {
            let second = frame.index * STILL_STEP_S;
            let origin = Origin {
                package: MOVIEPY.citation(),
                path: format!("{}!/{} at {second} s", bbb::ARCHIVE, bbb::FILM),
                licence: "CC-BY-3.0".to_owned(),
                holders: "Blender Foundation, peach.blender.org".to_owned(),
            };
            match square(frame.rgb.to_vec(), frame.width, frame.height, &origin.path) {
                Ok(pixels) => stills.push((pixels, origin)),
                Err(e) => failure = Some(e),
            }
        }
        match job.advance(frame.index) {
            Ok(()) if failure.is_none() => ControlFlow::Continue(()),
            Ok(()) => ControlFlow::Break(()),
            Err(e) => {
                failure = Some(e);
                ControlFlow::Break(())
            }
        }
    })?;
    failure.map_or(Ok(stills), Err)
}

fn photographs(job: &Job<'_>) -> Result<Vec<(Vec<u8>, Origin)>, FetchError> {
    let shelf = stamps::gcompris_shelf(job, 1, &PHOTOGRAPHS.map(|(archive, _)| archive))?;
    let photographs = PHOTOGRAPHS.iter().map(|(archive, path)| {
        let asset = shelf.gcompris_asset(archive, path)?;
        let picture = decode_picture(&asset.bytes, asset.origin.path.as_ref())?.over([255; 3]);
        let pixels = square(picture.pixels, picture.width, picture.height, &asset.origin.path)?;
        Ok((pixels, asset.origin))
    });
    photographs.collect()
}

/// The square in the middle of an RGB picture, scaled to [`SIDE`].
fn square(pixels: Vec<u8>, width: usize, height: usize, label: &str) -> Result<Vec<u8>, FetchError> {
    let picture = RgbImage::from_raw(width as u32, height as u32, pixels).ok_or_else(|| {
        FetchError::format(label, "picture", "other bytes", format!("{width} x {height} RGB"))
    })?;
    let (width, height) = picture.dimensions();
    let side = width.min(height);
    let middle = imageops::crop_imm(&picture, (width - side) / 2, (height - side) / 2, side, side).to_image();
    Ok(imageops::resize(&middle, SIDE as u32, SIDE as u32, FilterType::CatmullRom).into_raw())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_is_kept() {
        // Red, green and blue squares side by side: green is the middle.
        let row: Vec<u8> = (0..768)
            .flat_map(|x| [[255, 0, 0], [0, 255, 0], [0, 0, 255]][x / 256])
            .collect();
        let pixels = square(row.repeat(256), 768, 256, "a").unwrap();
        assert_eq!(pixels.len(), SIDE * SIDE * 3);
        assert!(pixels.chunks_exact(3).all(|pixel| pixel == [0, 255, 0]));
        assert!(square(vec![0; 5], 2, 2, "a").is_err());
    }
}
