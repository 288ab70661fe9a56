//! Cut-outs reduced to the size at which they are drawn, and sampled in rows.
//!
//! Colours are premultiplied: outside a cut-out is transparent black. Rows are mixed as flat lines of numbers, all
//! channels alike, because the compiler makes vector operations of that and not of one texel after another.

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
    /// For upright sprites, the texel before each pixel.
    columns: Vec<usize>,
    /// For each pixel, the share of the next texel, once for every channel.
    shares: Vec<Texel>,
    /// A row between two rows of texels.
    between: Vec<Texel>,
    /// The texels before the pixels and after them.
    before: Vec<Texel>,
    after: Vec<Texel>,
    /// For turned sprites, the texels below those, and the shares of these.
    before_below: Vec<Texel>,
    after_below: Vec<Texel>,
    shares_below: Vec<Texel>,
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
    /// The picture in `source`, whose rows begin every `stride` texels, averaged to `width` by `height`, with a border:
    /// down the columns first, because whole rows are added up fastest.
    fn reduced(
        source: &[Texel],
        stride: usize,
        (from_width, from_height): (usize, usize),
        (width, height): (usize, usize),
    ) -> Self {
        let columns = shares(from_width, width);
        let mut texels = vec![[0.0; 4]; (width + BORDER) * (height + BORDER)];
        let mut sums = vec![[0.0; 4]; from_width];
        for (y, (first, parts)) in shares(from_height, height).iter().enumerate() {
            sums.fill([0.0; 4]);
            for (input, &part) in source[first * stride..].chunks(stride).zip(parts) {
                let values = input[..from_width].as_flattened();
                for (sum, &value) in sums.as_flattened_mut().iter_mut().zip(values) {
                    *sum += part * value;
                }
            }
            let start = (y + 1) * (width + BORDER) + 1;
            let row = &mut texels[start..start + width];
            for (texel, (first, parts)) in row.iter_mut().zip(&columns) {
                for (&part, input) in parts.iter().zip(&sums[*first..]) {
                    *texel = std::array::from_fn(|c| texel[c] + part * input[c]);
                }
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
        let mut source: Vec<Texel> = cutout
            .rgba
            .as_chunks()
            .0
            .iter()
            .map(|rgba| rgba.map(f32::from))
            .collect();
        if mirrored {
            source.chunks_mut(width).for_each(<[Texel]>::reverse);
        }
        Self::reduced(&source, width, (width, height), size)
    }

    pub(super) fn halved(&self, size: (usize, usize)) -> Self {
        let stride = self.width + BORDER;
        Self::reduced(
            &self.texels[stride + 1..],
            stride,
            (self.width, self.height),
            size,
        )
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
        scratch.columns.clear();
        scratch.shares.clear();
        for (y, row) in rows.enumerate() {
            let at = |i: usize, axis: usize| row.first[axis] + i as f32 * row.step[axis];
            scratch.line.clear();
            if row.step[1] == 0.0 {
                if scratch.columns.is_empty() {
                    let places = (0..count).map(|i| whole_and_rest(at(i, 0), self.width));
                    let (columns, shares) = (&mut scratch.columns, &mut scratch.shares);
                    for (column, share) in places {
                        columns.push(column);
                        shares.push([share; 4]);
                    }
                }
                self.upright_line(at(0, 1), scratch);
            } else {
                self.turned_line((0..count).map(|i| [at(i, 0), at(i, 1)]), scratch);
            }
            put(y, &scratch.line);
        }
    }

    /// The values at height `y` and at the places that `scratch` holds.
    fn upright_line(&self, y: f32, scratch: &mut Scratch) {
        let (above, t) = whole_and_rest(y, self.height);
        let stride = self.width + BORDER;
        let (upper, lower) = self.texels[above * stride..(above + 2) * stride].split_at(stride);
        let Scratch {
            columns,
            shares,
            between,
            before,
            after,
            line,
            ..
        } = scratch;
        between.resize(stride, [0.0; 4]);
        mix(between, upper, lower, std::iter::repeat(t));
        before.clear();
        before.extend(columns.iter().map(|&column| between[column]));
        after.clear();
        after.extend(columns.iter().map(|&column| between[column + 1]));
        line.resize(columns.len(), [0.0; 4]);
        mix(line, before, after, shares.as_flattened().iter().copied());
    }

    /// The values at `places`, in texels from the upper left corner of the border's inside.
    fn turned_line(&self, places: impl Iterator<Item = [f32; 2]>, scratch: &mut Scratch) {
        let Scratch {
            shares,
            before,
            after,
            between,
            before_below,
            after_below,
            shares_below,
            line,
            ..
        } = scratch;
        for list in [
            &mut *shares,
            before,
            after,
            before_below,
            after_below,
            shares_below,
        ] {
            list.clear();
        }
        let stride = self.width + BORDER;
        for [x, y] in places {
            let (column, s) = whole_and_rest(x, self.width);
            let (row, t) = whole_and_rest(y, self.height);
            let at = row * stride + column;
            before.push(self.texels[at]);
            after.push(self.texels[at + 1]);
            before_below.push(self.texels[at + stride]);
            after_below.push(self.texels[at + stride + 1]);
            shares.push([s; 4]);
            shares_below.push([t; 4]);
        }
        between.resize(shares.len(), [0.0; 4]);
        mix(between, before, after, shares.as_flattened().iter().copied());
        // What was before and after is spent: its memory takes the lower values.
        let below = before;
        mix(
            below,
            before_below,
            after_below,
            shares.as_flattened().iter().copied(),
        );
        line.resize(shares.len(), [0.0; 4]);
        mix(line, between, below, shares_below.as_flattened().iter().copied());
    }
}

/// Position before `x` in a row or column with its border, and the share of the one after it.
#[inline(always)]
fn whole_and_rest(x: f32, size: usize) -> (usize, f32) {
    // Shifted by the border's width less half a texel; beyond the border everything is transparent.
    let x = (x + 0.5).clamp(0.0, (size + 1) as f32);
    // Through a signed whole number, because that is one instruction.
    let whole = x as i32;
    (whole as usize, x - whole as f32)
}

/// Writes into `out` what lies between `from` and `to`, number by number.
fn mix(out: &mut [Texel], from: &[Texel], to: &[Texel], shares: impl Iterator<Item = f32>) {
    let inputs = from.as_flattened().iter().zip(to.as_flattened());
    let out = out.as_flattened_mut().iter_mut();
    for ((value, (a, b)), share) in out.zip(inputs).zip(shares) {
        *value = a + (b - a) * share;
    }
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
        // Along the row of texels, level and going down by what is no difference.
        for down in [0.0, 1e-12] {
            let sample = |x: f32, y: f32| {
                let row = Row {
                    first: [x - 1.0, y],
                    step: [1.0, down],
                };
                let mut found = Vec::new();
                let mut put = |_, line: &[Texel]| found.push(line[1]);
                sprite.lines(std::iter::once(row), 2, &mut Scratch::default(), &mut put);
                found[0]
            };
            assert_eq!(sample(0.5, 0.5), [10.0, 20.0, 30.0, 255.0]);
            assert_eq!(sample(1.0, 0.5), [30.0, 40.0, 50.0, 255.0]);
            assert_eq!(sample(1.0, 0.0), [15.0, 20.0, 25.0, 127.5]);
            assert_eq!(sample(2.5, 0.5), [0.0; 4]);
            assert_eq!(sample(-9.0, 70.0), [0.0; 4]);
        }
    }
}
