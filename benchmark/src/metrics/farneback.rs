//! Dense flow between two frames by polynomial expansion (Farneback, "Two-frame motion estimation based on polynomial expansion",
//! 2003), with the details of the implementation that everybody measures with, OpenCV's.
//!
//! ```text
//! around each pixel   f(x) = x^T A x + b^T x + c, weighted by a Gaussian (n = 5, sigma = 1.2)
//! a moved picture     b_2 = b_1 - 2 A d, so that sums of A^T A and A^T (b_1 - b_2) / 2 over 15x15 pixels give d
//! ```
//!
//! It runs from coarse to fine: levels of half the size each (three, while both sides have 32 pixels), three rounds at each, where the second picture is looked up at the flow so far.
//! Near the borders of a picture the sums are weighted down.

/// Half of the neighbourhood of a polynomial, and the deviation of its weights.
const NEAR: usize = 5;
const SIGMA: f64 = 1.2;
/// Half of the window that sums go over.
const HALF: usize = 7;
const ROUNDS: usize = 3;
const LEVELS: usize = 3;
const SCALE: f64 = 0.5;
/// Sides below this are not halved to.
const SMALLEST: f64 = 32.0;
/// Weights of the pixels next to a border.
const BORDER: [f32; 5] = [0.14, 0.14, 0.4472, 0.4472, 0.4472];
/// Added to the determinant of the sums.
const FLAT: f64 = 1e-3;

/// Values of a picture, row after row, `channels` each.
#[derive(Clone, Debug)]
struct Plane {
    width: usize,
    height: usize,
    channels: usize,
    values: Vec<f32>,
}

impl Plane {
    fn row(&self, y: usize) -> &[f32] {
        let length = self.width * self.channels;
        &self.values[y * length..(y + 1) * length]
    }
}

/// Grey values of RGB bytes.
pub fn grey(rgb: &[u8]) -> Vec<u8> {
    let of = |pixel: &[u8]| {
        let [r, g, b] = [pixel[0], pixel[1], pixel[2]].map(u32::from);
        ((r * 9798 + g * 19_235 + b * 3735 + (1 << 14)) >> 15) as u8
    };
    rgb.chunks_exact(3).map(of).collect()
}

/// Displacement (across, down) of each pixel from `first` to `second`, grey bytes of `height` rows of `width`.
///
/// # Panics
/// The pictures are empty or of another size.
pub fn flow(first: &[u8], second: &[u8], width: usize, height: usize) -> Vec<[f32; 2]> {
    assert!(width > 0 && height > 0 && first.len() == width * height && second.len() == first.len());
    let fits = |level: &usize| {
        let scale = SCALE.powi(*level as i32);
        width as f64 * scale >= SMALLEST && height as f64 * scale >= SMALLEST
    };
    let levels = (1..=LEVELS).take_while(fits).count();
    let plane = |bytes: &[u8]| Plane {
        width,
        height,
        channels: 1,
        values: bytes.iter().map(|&byte| f32::from(byte)).collect(),
    };
    let pictures = [plane(first), plane(second)];
    let mut flow: Option<Plane> = None;
    for level in (0..=levels).rev() {
        let scale = SCALE.powi(level as i32);
        let size = |side: usize| (side as f64 * scale).round_ties_even() as usize;
        let (wide, high) = (size(width), size(height));
        let mut now = match flow {
            None => Plane {
                width: wide,
                height: high,
                channels: 2,
                values: vec![0.0; wide * high * 2],
            },
            Some(coarse) => {
                let mut fine = resize(&coarse, wide, high);
                fine.values
                    .iter_mut()
                    .for_each(|value| *value *= (1.0 / SCALE) as f32);
                fine
            }
        };
        let sigma = (1.0 / scale - 1.0) * 0.5;
        let kernel = gaussian(((sigma * 5.0).round_ties_even() as usize | 1).max(3), sigma);
        let [a, b] = [0, 1].map(|i| expand(&resize(&blur(&pictures[i], &kernel), wide, high)));
        for _ in 0..ROUNDS {
            let sums = equations(&a, &b, &now);
            now.values = solve(&sums);
        }
        flow = Some(now);
    }
    let values = flow.map(|plane| plane.values).unwrap_or_default();
    values.as_chunks::<2>().0.to_vec()
}

/// Mean length of the displacements.
pub fn mean_magnitude(flow: &[[f32; 2]]) -> f64 {
    let lengths = flow.iter().map(|[x, y]| f64::from((x * x + y * y).sqrt()));
    lengths.sum::<f64>() / flow.len().max(1) as f64
}

/// Weights of `size` pixels that add up to one.
fn gaussian(size: usize, sigma: f64) -> Vec<f32> {
    if sigma <= 0.0 {
        // The binomial that stands for "no deviation given" at three pixels.
        return vec![0.25, 0.5, 0.25];
    }
    let middle = (size - 1) as f64 / 2.0;
    let weights: Vec<f64> = (0..size)
        .map(|i| (-(i as f64 - middle).powi(2) / (2.0 * sigma * sigma)).exp())
        .collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| (weight / sum) as f32).collect()
}

/// Place `at` of `count`, mirrored at the first and the last one as often as it takes.
fn mirrored(at: isize, count: usize) -> usize {
    let last = count as isize - 1;
    if last == 0 {
        return 0;
    }
    let turn = at.rem_euclid(2 * last);
    turn.min(2 * last - turn) as usize
}

/// Rows, then columns, with weights of an odd number of pixels; the picture is mirrored at its ends.
fn blur(x: &Plane, kernel: &[f32]) -> Plane {
    let half = (kernel.len() / 2) as isize;
    let (width, height) = (x.width, x.height);
    let mut rows = vec![0.0; x.values.len()];
    for (y, out) in rows.chunks_exact_mut(width).enumerate() {
        let row = x.row(y);
        for (i, out) in out.iter_mut().enumerate() {
            let places = (-half..=half).map(|k| row[mirrored(i as isize + k, width)]);
            *out = kernel
                .iter()
                .zip(places)
                .map(|(weight, value)| weight * value)
                .sum();
        }
    }
    let mut values = vec![0.0; x.values.len()];
    for (y, out) in values.chunks_exact_mut(width).enumerate() {
        for (k, weight) in kernel.iter().enumerate() {
            let from = mirrored(y as isize + k as isize - half, height);
            for (out, value) in out.iter_mut().zip(&rows[from * width..(from + 1) * width]) {
                *out += weight * value;
            }
        }
    }
    Plane { values, ..*x }
}

/// Between pixel centres, linearly.
fn resize(x: &Plane, width: usize, height: usize) -> Plane {
    if (width, height) == (x.width, x.height) {
        return x.clone();
    }
    let taps = |from: usize, to: usize| -> Vec<(usize, usize, f32)> {
        let scale = from as f64 / to as f64;
        let of = |i: usize| {
            let place = ((i as f64 + 0.5) * scale - 0.5).clamp(0.0, (from - 1) as f64);
            let low = place.floor();
            (
                low as usize,
                (low as usize + 1).min(from - 1),
                (place - low) as f32,
            )
        };
        (0..to).map(of).collect()
    };
    let (columns, rows) = (taps(x.width, width), taps(x.height, height));
    let channels = x.channels;
    let mut values = Vec::with_capacity(width * height * channels);
    for (top, bottom, down) in rows {
        let (above, below) = (x.row(top), x.row(bottom));
        for &(left, right, across) in &columns {
            for c in 0..channels {
                let on = |row: &[f32]| {
                    row[left * channels + c] * (1.0 - across) + row[right * channels + c] * across
                };
                values.push(on(above) * (1.0 - down) + on(below) * down);
            }
        }
    }
    Plane {
        width,
        height,
        channels,
        values,
    }
}

/// Weights of a polynomial around a pixel, and what their sums are multiplied with.
struct Basis {
    /// Of 1, x and x^2 at distances 0..=5.
    weights: [[f32; 3]; NEAR + 1],
    first: f64,
    constant: f64,
    square: f64,
    mixed: f64,
}

impl Basis {
    fn new() -> Self {
        let of = |x: usize| (-((x * x) as f64) / (2.0 * SIGMA * SIGMA)).exp();
        let sum: f64 = (0..=NEAR)
            .map(|x| if x == 0 { 1.0 } else { 2.0 } * f64::from(of(x) as f32))
            .sum();
        let mut weights = [[0.0; 3]; NEAR + 1];
        for (x, own) in weights.iter_mut().enumerate() {
            let g = (f64::from(of(x) as f32) / sum) as f32;
            *own = [g, x as f32 * g, (x * x) as f32 * g];
        }
        // Moments of the weights in two dimensions.
        let along = |power: i32| -> f64 {
            (-(NEAR as i32)..=NEAR as i32)
                .map(|x| f64::from(weights[x.unsigned_abs() as usize][0]) * f64::from(x).powi(power))
                .sum()
        };
        let (m0, m2, m4) = (along(0), along(2), along(4));
        let (one, two, four, both) = (m0 * m0, m2 * m0, m4 * m0, m2 * m2);
        // The inverse of the moments of 1, x^2 and y^2; x, y and xy stand alone.
        let determinant = one * (four * four - both * both) - 2.0 * two * two * (four - both);
        Self {
            weights,
            first: 1.0 / two,
            constant: -two * (four - both) / determinant,
            square: (one * four - two * two) / determinant,
            mixed: 1.0 / both,
        }
    }
}

/// Coefficients of y, x, y^2, x^2 and xy around each pixel (the order of the reference: b_y, b_x, ...).
fn expand(x: &Plane) -> Plane {
    let basis = Basis::new();
    let (width, height) = (x.width, x.height);
    let mut values = vec![0.0; width * height * 5];
    let mut row = vec![[0.0f32; 3]; width + 2 * NEAR];
    for (y, out) in values.chunks_exact_mut(width * 5).enumerate() {
        let own = x.row(y);
        for (sums, value) in row[NEAR..].iter_mut().zip(own) {
            *sums = [value * basis.weights[0][0], 0.0, 0.0];
        }
        for (k, [one, first, square]) in basis.weights.iter().enumerate().skip(1) {
            let (above, below) = (x.row(y.saturating_sub(k)), x.row((y + k).min(height - 1)));
            for ((sums, above), below) in row[NEAR..].iter_mut().zip(above).zip(below) {
                let both = above + below;
                sums[0] += one * both;
                sums[1] += first * (below - above);
                sums[2] += square * both;
            }
        }
        let (left, right) = (row[NEAR], row[NEAR + width - 1]);
        row[..NEAR].fill(left);
        row[NEAR + width..].fill(right);
        for (x, out) in out.chunks_exact_mut(5).enumerate() {
            let centre = row[x + NEAR];
            let zero = f64::from(basis.weights[0][0]);
            let (mut b1, mut b2, mut b3) = (f64::from(centre[0]) * zero, 0.0, f64::from(centre[1]) * zero);
            let (mut b4, mut b5, mut b6) = (0.0, f64::from(centre[2]) * zero, 0.0);
            for (k, own) in basis.weights.iter().enumerate().skip(1) {
                let [one, first, square] = own.map(f64::from);
                let (right, left) = (row[x + NEAR + k], row[x + NEAR - k]);
                let sum = |i: usize| f64::from(right[i]) + f64::from(left[i]);
                let difference = |i: usize| f64::from(right[i]) - f64::from(left[i]);
                b1 += sum(0) * one;
                b4 += sum(0) * square;
                b2 += difference(0) * first;
                b3 += sum(1) * one;
                b6 += difference(1) * first;
                b5 += sum(2) * one;
            }
            out[0] = (b3 * basis.first) as f32;
            out[1] = (b2 * basis.first) as f32;
            out[2] = (b1 * basis.constant + b5 * basis.square) as f32;
            out[3] = (b1 * basis.constant + b4 * basis.square) as f32;
            out[4] = (b6 * basis.mixed) as f32;
        }
    }
    Plane {
        width,
        height,
        channels: 5,
        values,
    }
}

/// The sums before they are sums: A^T A (three numbers) and A^T b of each pixel.
fn equations(a: &Plane, b: &Plane, flow: &Plane) -> Plane {
    let (width, height) = (a.width, a.height);
    let mut values = Vec::with_capacity(width * height * 5);
    // The reference counts without a sign, so that in pictures of less than ten pixels few places are next to a border.
    let outer = |at: usize, count: usize| {
        let border = BORDER.len() as u32;
        (at as u32).wrapping_sub(border) >= (count as u32).wrapping_sub(2 * border)
    };
    let edge = |at: usize, count: usize| {
        let near = |distance: usize| BORDER.get(distance).copied().unwrap_or(1.0);
        near(at) * near(count - 1 - at)
    };
    for y in 0..height {
        for x in 0..width {
            let at = y * width + x;
            let (dx, dy) = (flow.values[2 * at], flow.values[2 * at + 1]);
            let own = &a.values[5 * at..5 * at + 5];
            let (fx, fy) = (x as f32 + dx, y as f32 + dy);
            let (x1, y1) = (fx.floor(), fy.floor());
            let inside = x1 >= 0.0 && y1 >= 0.0 && x1 < (width - 1) as f32 && y1 < (height - 1) as f32;
            let mut r = if inside {
                let (fx, fy) = (fx - x1, fy - y1);
                let first = (y1 as usize * width + x1 as usize) * 5;
                let below = first + width * 5;
                let weights = [(1.0 - fx) * (1.0 - fy), fx * (1.0 - fy), (1.0 - fx) * fy, fx * fy];
                let there = |c: usize| {
                    weights[0] * b.values[first + c]
                        + weights[1] * b.values[first + 5 + c]
                        + weights[2] * b.values[below + c]
                        + weights[3] * b.values[below + 5 + c]
                };
                [
                    (own[0] - there(0)) * 0.5,
                    (own[1] - there(1)) * 0.5,
                    (own[2] + there(2)) * 0.5,
                    (own[3] + there(3)) * 0.5,
                    (own[4] + there(4)) * 0.25,
                ]
            } else {
                [own[0] * 0.5, own[1] * 0.5, own[2], own[3], own[4] * 0.5]
            };
            r[0] += r[2] * dy + r[4] * dx;
            r[1] += r[4] * dy + r[3] * dx;
            if outer(x, width) || outer(y, height) {
                let scale = edge(x, width) * edge(y, height);
                r.iter_mut().for_each(|value| *value *= scale);
            }
            let [r2, r3, r4, r5, r6] = r;
            values.extend([
                r4 * r4 + r6 * r6,
                (r4 + r5) * r6,
                r5 * r5 + r6 * r6,
                r4 * r2 + r6 * r3,
                r6 * r2 + r5 * r3,
            ]);
        }
    }
    Plane {
        width,
        height,
        channels: 5,
        values,
    }
}

/// Flow of the mean equations over windows of 15 by 15, whose outer pixels are repeated beyond the ends.
fn solve(equations: &Plane) -> Vec<f32> {
    let (width, height) = (equations.width, equations.height);
    let area = ((2 * HALF + 1) * (2 * HALF + 1)) as f64;
    let inside = |at: isize, count: usize| at.clamp(0, count as isize - 1) as usize;
    let half = HALF as isize;
    // Sums over the rows of a window, of which one row leaves and one comes in.
    let mut columns = vec![[0.0f64; 5]; width];
    let add = |columns: &mut [[f64; 5]], y: isize, sign: f64| {
        let row = equations.row(inside(y, height)).as_chunks::<5>().0;
        for (sums, values) in columns.iter_mut().zip(row) {
            for (sum, &value) in sums.iter_mut().zip(values) {
                *sum += sign * f64::from(value);
            }
        }
    };
    for y in -half..half {
        add(&mut columns, y, 1.0);
    }
    let mut flow = Vec::with_capacity(width * height * 2);
    for y in 0..height as isize {
        add(&mut columns, y + half, 1.0);
        let mut sums = [0.0; 5];
        let step = |sums: &mut [f64; 5], x: isize, sign: f64| {
            for (sum, value) in sums.iter_mut().zip(&columns[inside(x, width)]) {
                *sum += sign * value;
            }
        };
        for x in -half..half {
            step(&mut sums, x, 1.0);
        }
        for x in 0..width as isize {
            step(&mut sums, x + half, 1.0);
            let [g11, g12, g22, h1, h2] = sums.map(|sum| sum / area);
            let inverse = 1.0 / (g11 * g22 - g12 * g12 + FLAT);
            flow.push(((g11 * h2 - g12 * h1) * inverse) as f32);
            flow.push(((g22 * h1 - g12 * h2) * inverse) as f32);
            step(&mut sums, x - half, -1.0);
        }
        add(&mut columns, y - half, -1.0);
    }
    flow
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::testing::{golden, values};

    fn bytes(tensor: &candle_core::Tensor) -> Vec<u8> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn flows_are_those_of_opencv() {
        let tensors = golden("av_align");
        for name in ["large", "odd", "small", "tiny"] {
            let frames = &tensors[&format!("frames.{name}")];
            let (count, height, width, _) = frames.dims4().unwrap();
            let rgb = bytes(frames);
            let grey: Vec<Vec<u8>> = rgb.chunks_exact(rgb.len() / count).map(grey).collect();
            if let Some(expected) = tensors.get(&format!("grey.{name}")) {
                assert_eq!(grey.concat(), bytes(expected), "{name}");
            }
            let means = &tensors[&format!("mean.{name}")].to_vec1::<f64>().unwrap();
            for (i, pair) in grey.windows(2).enumerate() {
                let found = flow(&pair[0], &pair[1], width, height);
                let mean = mean_magnitude(&found);
                assert!(
                    (mean - means[i]).abs() < 1e-3 * means[i],
                    "{name}: {mean} {}",
                    means[i]
                );
                let Some(expected) = tensors.get(&format!("flow.{name}")) else {
                    continue;
                };
                // Every third value of both flows together is there.
                let before = i * 2 * width * height;
                let kept = (before..).zip(found.as_flattened()).filter(|(at, _)| at % 3 == 0);
                let kept: Vec<f32> = kept.map(|(_, value)| *value).collect();
                let expected = &values(expected)[before.div_ceil(3)..];
                assert!(kept.len() <= expected.len());
                let apart = kept.iter().zip(expected).map(|(a, b)| (a - b).abs());
                let worst = apart.fold(0.0, f32::max);
                assert!(worst < 5e-3, "{name}: {worst}");
            }
        }
    }

    #[test]
    fn pictures_that_stand_still_do_not_move() {
        let picture: Vec<u8> = (0..40 * 50).map(|i| ((i * i) % 251) as u8).collect();
        // What moved out of the picture is unknown: the last row and column move a little, as they do in the reference.
        assert!(mean_magnitude(&flow(&picture, &picture, 50, 40)) < 0.05);
        assert_eq!(flow(&[7], &[9], 1, 1), [[0.0, 0.0]]);
    }

    #[test]
    fn ends_are_mirrored() {
        let places: Vec<usize> = (-4..8).map(|at| mirrored(at, 4)).collect();
        assert_eq!(places, [2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1]);
        assert_eq!(mirrored(-3, 1), 0);
    }
}
