//! Pictures in another size, to the bit as Pillow makes them in 8 bits.
//!
//! A pixel is a weighted mean of those around its place, with a filter that is as wide as the scale where pictures become smaller
//! (antialiasing). Rows first, then columns; weights are whole numbers of 22 bits behind the point, and both passes round to bytes.

use std::ops::Range;

use super::{MediaError, Picture};

/// Bits behind the point of a weight: 8 bits of colour and 2 of room leave as many of 32.
const BITS: u32 = 32 - 8 - 2;
/// The parameter of the cubic.
const A: f64 = -0.5;
/// Most pixels of a result.
const MOST: usize = super::MAX_PICTURE_PIXELS as usize;

/// How pixels between pixels are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Filter {
    /// A triangle, one pixel to each side.
    Bilinear,
    /// A cubic with a = -0.5, two pixels to each side.
    #[default]
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    fn at(self, x: f64) -> f64 {
        let x = x.abs();
        match self {
            Self::Bilinear if x < 1.0 => 1.0 - x,
            Self::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
            Self::Bilinear | Self::Bicubic => 0.0,
        }
    }
}

impl Picture {
    /// The picture in `width` by `height` pixels. Colours are weighted with their opacity.
    ///
    /// # Errors
    /// A size of zero, or of more pixels than [`super::MAX_PICTURE_PIXELS`].
    pub fn resized(&self, width: usize, height: usize, filter: Filter) -> Result<Self, MediaError> {
        self.resized_part([width, height], [0, 0], [width, height], filter)
    }

    /// The part of `size` (width, height) from column and row `corner` of the picture that [`Self::resized`] gives in `whole`, to the
    /// bit. The rest is not made, so that `whole` may be as large as it likes: a hair of a picture that shall fill a square is.
    ///
    /// # Errors
    /// The part is empty, has more pixels than [`super::MAX_PICTURE_PIXELS`], or reaches beyond the whole.
    pub fn resized_part(
        &self,
        whole: [usize; 2],
        corner: [usize; 2],
        size: [usize; 2],
        filter: Filter,
    ) -> Result<Self, MediaError> {
        let [[width, height], [left, top]] = [size, corner];
        let area = width.checked_mul(height).filter(|area| (1..=MOST).contains(area));
        if area.is_none() {
            let expected = format!("1 to {MOST} pixels");
            return Err(MediaError::invalid(
                "picture size",
                format!("{width} x {height}"),
                expected,
            ));
        }
        check_part(corner, size, whole)?;
        if whole == [self.width, self.height] {
            return self.cropped(left, top, width, height);
        }
        // A side that stays is cut, not filtered.
        let columns =
            (whole[0] != self.width).then(|| taps(self.width, whole[0], left..left + width, filter));
        let rows = (whole[1] != self.height).then(|| taps(self.height, whole[1], top..top + height, filter));
        let seen = match &rows {
            None => top..top + height,
            Some(taps) => {
                let first = taps.iter().map(|tap| tap.first).min();
                let end = taps.iter().map(|tap| tap.first + tap.weights.len()).max();
                first.unwrap_or(0)..end.unwrap_or(0)
            }
        };
        let channels = self.channels;
        let line = self.width * channels;
        let source = &self.pixels[seen.start * line..seen.end * line];
        let weighted: Vec<u8>;
        let source = match channels {
            4 => {
                weighted = source.as_chunks::<4>().0.iter().flat_map(weigh).collect();
                &weighted
            }
            _ => source,
        };
        let mut pixels = match &columns {
            Some(taps) => across(source, line, channels, taps),
            None => {
                let kept = left * channels..(left + width) * channels;
                let lines = source.chunks_exact(line);
                lines.flat_map(|line| &line[kept.clone()]).copied().collect()
            }
        };
        if let Some(taps) = &rows {
            pixels = down(&pixels, width * channels, seen.start, taps);
        }
        if channels == 4 {
            for pixel in pixels.as_chunks_mut::<4>().0 {
                unweigh(pixel);
            }
        }
        Self::new(pixels, width, height, channels)
    }

    /// The part of `width` by `height` pixels from column `left` and row `top`.
    ///
    /// # Errors
    /// It is empty or reaches beyond the picture.
    pub fn cropped(&self, left: usize, top: usize, width: usize, height: usize) -> Result<Self, MediaError> {
        let whole = [self.width, self.height];
        check_part([left, top], [width, height], whole)?;
        if [width, height] == whole {
            return Ok(self.clone());
        }
        let rows = self.pixels.chunks_exact(self.width * self.channels);
        let columns = left * self.channels..(left + width) * self.channels;
        let pixels = rows
            .skip(top)
            .take(height)
            .flat_map(|row| &row[columns.clone()])
            .copied();
        Self::new(pixels.collect(), width, height, self.channels)
    }
}

/// A part that is not empty and lies in the whole; all are columns and rows.
fn check_part(corner: [usize; 2], size: [usize; 2], whole: [usize; 2]) -> Result<(), MediaError> {
    let fits = |axis: usize| {
        let end = corner[axis].checked_add(size[axis]);
        size[axis] > 0 && end.is_some_and(|end| end <= whole[axis])
    };
    if fits(0) && fits(1) {
        return Ok(());
    }
    Err(MediaError::invalid(
        "part of a picture",
        format!("{} x {} at {}, {}", size[0], size[1], corner[0], corner[1]),
        format!("a part of {} x {}", whole[0], whole[1]),
    ))
}

/// The weights of one pixel of the result.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

/// Those of the pixels `places` of `to` that a side of `from` pixels becomes.
fn taps(from: usize, to: usize, places: Range<usize>, filter: Filter) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let spread = scale.max(1.0);
    let support = filter.support() * spread;
    let of = |place: usize| {
        let center = (place as f64 + 0.5) * scale;
        let first = (center - support + 0.5).max(0.0) as usize;
        let end = ((center + support + 0.5) as usize).min(from);
        let mut weights: Vec<f64> = (first..end)
            .map(|x| filter.at((x as f64 - center + 0.5) * (1.0 / spread)))
            .collect();
        let sum: f64 = weights.iter().sum();
        if sum != 0.0 {
            weights.iter_mut().for_each(|weight| *weight /= sum);
        }
        let whole = |weight: f64| {
            let scaled = weight * f64::from(1u32 << BITS);
            (scaled + 0.5f64.copysign(scaled)) as i32
        };
        Taps {
            first,
            weights: weights.into_iter().map(whole).collect(),
        }
    };
    places.map(of).collect()
}

/// Where sums begin, so that they round.
const HALF: i32 = 1 << (BITS - 1);

fn to_byte(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

/// Every line of `pixels`, `line` bytes, with the weights of its pixels.
fn across(pixels: &[u8], line: usize, channels: usize, taps: &[Taps]) -> Vec<u8> {
    match channels {
        3 => across_of::<3>(pixels, line, taps),
        _ => across_of::<4>(pixels, line, taps),
    }
}

/// [`across`] for pixels of `C` bytes.
fn across_of<const C: usize>(pixels: &[u8], line: usize, taps: &[Taps]) -> Vec<u8> {
    let mut out = vec![0; pixels.len() / line * taps.len() * C];
    let rows = pixels
        .chunks_exact(line)
        .zip(out.chunks_exact_mut((taps.len() * C).max(1)));
    for (row, out) in rows {
        let (row, out) = (row.as_chunks::<C>().0, out.as_chunks_mut::<C>().0);
        for (tap, out) in taps.iter().zip(out) {
            let mut sums = [HALF; C];
            for (pixel, weight) in row[tap.first..].iter().zip(&tap.weights) {
                for (sum, &value) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(value) * weight;
                }
            }
            *out = sums.map(to_byte);
        }
    }
    out
}

/// Lines of `line` bytes, of which `pixels` has those from number `first` on, with the weights of whole lines.
fn down(pixels: &[u8], line: usize, first: usize, taps: &[Taps]) -> Vec<u8> {
    let mut out = Vec::with_capacity(line * taps.len());
    let mut sums = vec![HALF; line];
    for tap in taps {
        sums.fill(HALF);
        let lines = pixels.chunks_exact(line).skip(tap.first - first);
        for (values, weight) in lines.zip(&tap.weights) {
            for (sum, &value) in sums.iter_mut().zip(values) {
                *sum += i32::from(value) * weight;
            }
        }
        out.extend(sums.iter().map(|&sum| to_byte(sum)));
    }
    out
}

fn weigh(&[red, green, blue, alpha]: &[u8; 4]) -> [u8; 4] {
    let times = |value: u8| {
        let product = u32::from(value) * u32::from(alpha) + 128;
        (((product >> 8) + product) >> 8) as u8
    };
    [times(red), times(green), times(blue), alpha]
}

fn unweigh(pixel: &mut [u8; 4]) {
    let alpha = u32::from(pixel[3]);
    if alpha != 0 && alpha != 255 {
        for value in &mut pixel[..3] {
            *value = (255 * u32::from(*value) / alpha).min(255) as u8;
        }
    }
}
