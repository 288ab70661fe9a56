//! From a picture with transparency to a cut-out: drawn, cropped to what is visible, scaled.

use image::imageops::{self, FilterType};
use image::{ImageBuffer, Rgba};

use crate::fetch::FetchError;
use crate::media::{Picture, decode_picture};
use crate::sets::svg;
use crate::things::{CUTOUT_SIDE, Cutout};

/// Smaller pictures are enlarged to this longer side.
const SMALLEST_SIDE: u32 = 64;
/// Drawings are made this large, then reduced: their empty margins are unknown before.
const DRAWING_SIDE: u32 = 6 * CUTOUT_SIDE;
/// Opacity below which a pixel counts as empty when the picture is cropped.
const VISIBLE: u8 = 24;

/// The cut-out of a PNG or SVG file; `path` tells which, and names it in errors.
pub(super) fn cut(bytes: &[u8], path: &str) -> Result<Cutout, FetchError> {
    let picture = if path.ends_with(".svg") {
        svg::draw(bytes, DRAWING_SIDE, path)?
    } else {
        decode_picture(bytes, path.as_ref())?
    };
    if picture.channels != 4 {
        let found = format!("{} channels", picture.channels);
        return Err(FetchError::format(path, "picture", found, "RGBA"));
    }
    reduce(&picture).ok_or_else(|| FetchError::format(path, "picture", "no visible pixel", "a thing"))
}

/// Crops and scales; None where nothing is visible.
fn reduce(picture: &Picture) -> Option<Cutout> {
    let (left, top, right, bottom) = visible(picture)?;
    let (width, height) = ((right - left) as u32, (bottom - top) as u32);
    let premultiplied = ImageBuffer::<Rgba<f32>, Vec<f32>>::from_fn(width, height, |x, y| {
        let at = 4 * ((top + y as usize) * picture.width + left + x as usize);
        let [r, g, b, a] = std::array::from_fn(|c| f32::from(picture.pixels[at + c]) / 255.0);
        Rgba([r * a, g * a, b * a, a])
    });
    let longer = width.max(height);
    let side = longer.clamp(SMALLEST_SIDE, CUTOUT_SIDE);
    let scaled = |length: u32| ((length * side + longer / 2) / longer).max(1);
    let small = imageops::resize(
        &premultiplied,
        scaled(width),
        scaled(height),
        FilterType::CatmullRom,
    );
    let rgba = small.pixels().flat_map(|pixel| {
        let [r, g, b, a] = pixel.0;
        // The filter overshoots: opacity stays in 0..1, premultiplied colour below opacity.
        let a = a.clamp(0.0, 1.0);
        [r.clamp(0.0, a), g.clamp(0.0, a), b.clamp(0.0, a), a].map(|x| (x * 255.0).round() as u8)
    });
    Some(Cutout {
        width: small.width(),
        height: small.height(),
        rgba: rgba.collect(),
    })
}

/// Left, top, right and bottom of the visible pixels; the latter two are exclusive.
fn visible(picture: &Picture) -> Option<(usize, usize, usize, usize)> {
    let mut bounds = None;
    for (index, pixel) in picture.pixels.as_chunks::<4>().0.iter().enumerate() {
        if pixel[3] > VISIBLE {
            let (x, y) = (index % picture.width, index / picture.width);
            let (l, t, r, b) = bounds.unwrap_or((x, y, x + 1, y + 1));
            bounds = Some((l.min(x), t.min(y), r.max(x + 1), b.max(y + 1)));
        }
    }
    bounds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_cropped_scaled_and_premultiplied() {
        // A half-opaque red bar of 40 x 20 in an empty picture of 100 x 100.
        let mut pixels = vec![0; 100 * 100 * 4];
        for y in 30..50 {
            for x in 10..50 {
                pixels[4 * (y * 100 + x)..][..4].copy_from_slice(&[255, 0, 0, 128]);
            }
        }
        let cutout = reduce(&Picture::new(pixels, 100, 100, 4).unwrap()).unwrap();
        assert_eq!((cutout.width, cutout.height), (64, 32));
        assert_eq!(cutout.rgba.len(), 64 * 32 * 4);
        assert_eq!(&cutout.rgba[4 * (16 * 64 + 32)..][..4], [128, 0, 0, 128]);
    }

    #[test]
    fn an_empty_picture_is_no_thing() {
        assert_eq!(reduce(&Picture::new(vec![0; 64], 4, 4, 4).unwrap()), None);
    }

    #[test]
    fn drawings_are_drawn() {
        let svg = br##"<svg xmlns="http://www.w3.org/2000/svg" width="20" height="40">
            <rect x="0" y="0" width="10" height="40" fill="#00ff00"/></svg>"##;
        let cutout = cut(svg, "a.svg").unwrap();
        assert_eq!((cutout.width, cutout.height), (24, 96));
        assert_eq!(&cutout.rgba[4 * (48 * 24 + 12)..][..4], [0, 255, 0, 255]);
        let text = cut(b"no drawing", "a.svg").unwrap_err().to_string();
        assert!(text.starts_with("a.svg: drawing: found "), "{text}");
    }
}
