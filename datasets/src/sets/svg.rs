//! Drawings (SVG) as pictures.

use resvg::{tiny_skia, usvg};

use crate::fetch::FetchError;
use crate::media::Picture;

/// Draws the SVG file `bytes` so that its longer side has `side` pixels; RGBA, straight (not premultiplied) colour.
/// `label` names the file in errors.
pub(super) fn draw(bytes: &[u8], side: u32, label: &str) -> Result<Picture, FetchError> {
    let wrong = |found: String| FetchError::format(label, "drawing", found, "an SVG file that can be drawn");
    let tree = usvg::Tree::from_data(bytes, &usvg::Options::default()).map_err(|e| wrong(e.to_string()))?;
    let size = tree.size();
    let scale = side as f32 / size.width().max(size.height());
    let pixels = |length: f32| ((length * scale).round() as u32).clamp(1, side);
    let (width, height) = (pixels(size.width()), pixels(size.height()));
    let mut canvas =
        tiny_skia::Pixmap::new(width, height).ok_or_else(|| wrong(format!("{width} x {height} pixels")))?;
    resvg::render(
        &tree,
        tiny_skia::Transform::from_scale(scale, scale),
        &mut canvas.as_mut(),
    );
    let straight = canvas.pixels().iter().flat_map(|pixel| {
        let colour = pixel.demultiply();
        [colour.red(), colour.green(), colour.blue(), colour.alpha()]
    });
    Ok(Picture::new(
        straight.collect(),
        width as usize,
        height as usize,
        4,
    )?)
}
