//! Cut-outs reduced to the size at which they are drawn, and sampled in rows.
//!
//! Colours are premultiplied: outside a cut-out is transparent black. Four channels are treated alike everywhere, so
//! that the compiler makes one vector operation of them.

use crate::things::Cutout;

/// Transparent pixels around a sprite, before and after together.
const BORDER: usize = 3;

/// Red, green, blue and coverage in 0..255, premultiplied.
pub(super) type Texel = [f32; 4];

/// A picture with a transparent border, one pixel before and two after.
pub(super) struct Sprite {
    pub(super) width: usize,
    pub(super) height: usize,
    /// Row-major texels, `(height + BORDER) * (width + BORDER)` of them.
    texels: Vec<Texel>,
}

/// Where the middles of pixels lie in a sprite, in texels from its upper left corner: that of the first pixel, and
/// how far the next one in the row is.
#[derive(Clone, Copy)]
pub(super) struct Row {
    pub(super) first: [f32; 2],
    pub(super) step: [f32; 2],
}

/// Scratch memory for sampling, to be used for many rows.
#[derive(Default)]
pub(super) struct Scratch {
    /// Texel before each pixel and share of the next, for upright sprites.
    columns: Vec<(usize, f32)>,
    /// A row between two rows of texels.
    between: Vec<Texel>,
    line: Vec<Texel>,
}

/// For every output position of an area average: first input position and the shares of the inputs from there on.
fn shares(from: usize, to: usize) -> Vec<(usize, Vec<f32>)> {
    let ratio = from as f64 / to as f64;
    (0..to)
        .map(|i| {
            let (low, high) = (i as f64 * ratio, (i + 1) as f64 * ratio);
            let first = (low as usize).min(from - 1);
            let end = (high.ceil() as usize).clamp(first + 1, from);
            let share = |j: usize| ((high.min((j + 1) as f64) - low.max(j as f64)) / ratio) as f32;
            (first, (first..end).map(share).collect())
        })
        .collect()
}

impl Sprite {
    /// `source` (at x, y) averaged to `width` by `height`, with a border: down the columns first, because whole rows
    /// are added up fastest.
    fn reduced(
        source: impl Fn(usize, usize) -> Texel,
        (from_width, from_height): (usize, usize),
        (width, height): (usize, usize),
    ) -> Self {
        let columns = shares(from_width, width);
        let mut texels = vec![[0.0; 4]; (width + BORDER) * (height + BORDER)];
        let mut sums = vec![[0.0; 4]; from_width];
        for (y, (first, parts)) in shares(from_height, height).iter().enumerate() {
            sums.fill([0.0; 4]);
            for (i, &part) in parts.iter().enumerate() {
                for (x, sum) in sums.iter_mut().enumerate() {
                    *sum = added(*sum, part, source(x, first + i));
                }
            }
            let start = (y + 1) * (width + BORDER) + 1;
            let row = &mut texels[start..start + width];
            for (texel, (first, parts)) in row.iter_mut().zip(&columns) {
                let inputs = parts.iter().zip(&sums[*first..]);
                *texel = inputs.fold([0.0; 4], |sum, (&part, &input)| added(sum, part, input));
            }
        }
        Self {
            width,
            height,
            texels,
        }
    }

    pub(super) fn of_cutout(cutout: &Cutout, mirrored: bool, size: (usize, usize)) -> Self {
        let (width, height) = (cutout.width as usize, cutout.height as usize);
        let (texels, _) = cutout.rgba.as_chunks::<4>();
        let texel = |x: usize, y: usize| {
            let x = if mirrored { width - 1 - x } else { x };
            texels[y * width + x].map(f32::from)
        };
        Self::reduced(texel, (width, height), size)
    }

    pub(super) fn halved(&self, size: (usize, usize)) -> Self {
        let texel = |x: usize, y: usize| self.texels[(y + 1) * (self.width + BORDER) + x + 1];
        Self::reduced(texel, (self.width, self.height), size)
    }

    /// The bilinear values at `count` pixels of each row, given to `put` with the number of the row.
    ///
    /// `rows` must have equal steps and, where the step does not go down, equal first columns.
    pub(super) fn lines(
        &self,
        rows: impl Iterator<Item = Row>,
        count: usize,
        scratch: &mut Scratch,
        mut put: impl FnMut(usize, &[Texel]),
    ) {
        let Scratch {
            columns,
            between,
            line,
        } = scratch;
        columns.clear();
        for (y, row) in rows.enumerate() {
            let at = |i: usize, axis: usize| row.first[axis] + i as f32 * row.step[axis];
            line.clear();
            if row.step[1] == 0.0 {
                if columns.is_empty() {
                    columns.extend((0..count).map(|i| whole_and_rest(at(i, 0), self.width)));
                }
                let (above, t) = whole_and_rest(at(0, 1), self.height);
                let stride = self.width + BORDER;
                let (upper, lower) = self.texels[above * stride..(above + 2) * stride].split_at(stride);
                between.clear();
                between.extend(upper.iter().zip(lower).map(|(&a, &b)| mixed(a, b, t)));
                let pixel = |&(left, s): &(usize, f32)| mixed(between[left], between[left + 1], s);
                line.extend(columns.iter().map(pixel));
            } else {
                line.extend((0..count).map(|i| self.sample(at(i, 0), at(i, 1))));
            }
            put(y, line);
        }
    }

    /// The bilinear value at (x, y), in texels from the upper left corner of the border's inside.
    #[inline]
    fn sample(&self, x: f32, y: f32) -> Texel {
        let (column, s) = whole_and_rest(x, self.width);
        let (row, t) = whole_and_rest(y, self.height);
        let stride = self.width + BORDER;
        let at = row * stride + column;
        let upper = mixed(self.texels[at], self.texels[at + 1], s);
        let lower = mixed(self.texels[at + stride], self.texels[at + stride + 1], s);
        mixed(upper, lower, t)
    }
}

/// Position before `x` in a row or column with its border, and the share of the one after it.
#[inline]
fn whole_and_rest(x: f32, size: usize) -> (usize, f32) {
    // Shifted by the border's width less half a texel; beyond the border everything is transparent.
    let x = (x + 0.5).clamp(0.0, (size + 1) as f32);
    // Through a signed whole number, because that is one instruction.
    let whole = x as i32;
    (whole as usize, x - whole as f32)
}

#[inline]
fn added(sum: Texel, share: f32, texel: Texel) -> Texel {
    std::array::from_fn(|c| sum[c] + share * texel[c])
}

#[inline]
fn mixed(a: Texel, b: Texel, share: f32) -> Texel {
    std::array::from_fn(|c| a[c] + (b[c] - a[c]) * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn area_shares_sum_to_one_and_cover_each_input_equally() {
        for (from, to) in [(96, 41), (64, 64), (7, 3), (10, 1), (5, 4)] {
            let mut used = vec![0.0; from];
            for (first, parts) in shares(from, to) {
                assert!((parts.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{from} to {to}");
                for (i, part) in parts.iter().enumerate() {
                    used[first + i] += part;
                }
            }
            let each = to as f32 / from as f32;
            assert!(
                used.iter().all(|share| (share - each).abs() < 1e-5),
                "{from} to {to}: {used:?}"
            );
        }
    }

    #[test]
    fn a_sprite_keeps_its_mean_colour_at_every_size() {
        let rgba: Vec<u8> = (0..30 * 20 * 4).map(|i| (i * 37 % 251) as u8).collect();
        let cutout = Cutout {
            width: 30,
            height: 20,
            rgba,
        };
        let mean = |sprite: &Sprite| {
            let sum: f32 = sprite.texels.iter().map(|texel| texel[1]).sum();
            sum / (sprite.width * sprite.height) as f32
        };
        let whole = Sprite::of_cutout(&cutout, false, (30, 20));
        let smaller = Sprite::of_cutout(&cutout, true, (13, 9));
        assert!((mean(&whole) - mean(&smaller)).abs() < 0.01);
        assert!((mean(&whole) - mean(&whole.halved((15, 10)))).abs() < 0.01);
    }

    #[test]
    fn sampling_at_texel_middles_returns_texels_and_fades_outside() {
        let cutout = Cutout {
            width: 2,
            height: 1,
            rgba: vec![10, 20, 30, 255, 50, 60, 70, 255],
        };
        let sprite = Sprite::of_cutout(&cutout, false, (2, 1));
        assert_eq!(sprite.sample(0.5, 0.5), [10.0, 20.0, 30.0, 255.0]);
        assert_eq!(sprite.sample(1.0, 0.5), [30.0, 40.0, 50.0, 255.0]);
        assert_eq!(sprite.sample(2.5, 0.5), [0.0; 4]);
        assert_eq!(sprite.sample(-9.0, 70.0), [0.0; 4]);
    }
}
