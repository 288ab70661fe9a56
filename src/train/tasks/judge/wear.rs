//! Wear: what codecs and vocoders do to a clip, imitated on real ones.
//!
//! A judge that has only seen pristine pictures marks a generator down for the softness of its codec instead of judging
//! what it shows. Nothing that a generator or its codecs made takes part here: frames are softened, coarsened or cut to
//! the low cosines of blocks, moments and spectrograms are smeared, colours drift, and grain is laid over all of it.

use candle_core::{D, Device, Result, Tensor};
use fulgur_datasets::scenes::ClipSpec;
use fulgur_kernels::philox::Philox;

use crate::train::Batch;

/// Share of clips that stay as they are.
const UNWORN: f32 = 0.3;
/// Different tiles of grain; frames and spectrograms take one each, for drawing a normal number for every pixel of a
/// batch would take longer than the step.
const TILES: usize = 8;
/// Side of the blocks whose high cosines are lost.
const BLOCK: usize = 8;
/// Furthest that the level of a colour drifts, as a factor and in units of [-1, 1].
const COLOUR: (f32, f32) = (0.1, 0.06);
/// Highest standard deviation of the noise on standardised log-mels.
const MEL_NOISE: f32 = 0.2;
/// Furthest that the highest band is raised over the lowest, in standardised log-mels.
const MEL_TILT: f32 = 0.3;
/// Where the noise floor of worn sound lies, in standardised log-mels; that of digital silence is below.
const MEL_FLOOR: (f32, f32) = (-1.2, -0.5);

/// Sizes of what is worn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// The clips.
    pub(super) spec: ClipSpec,
    /// Frames of a spectrogram and its bands.
    pub(super) mel: [usize; 2],
    /// Highest standard deviation of the grain on frames, in units of [-1, 1].
    pub(super) grain: f32,
}

/// A linear map along one axis.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Filter {
    /// Nothing changes.
    Keep,
    /// A Gaussian of this standard deviation, in steps of the axis.
    Soft(f32),
    /// Averaged over so many steps, then interpolated.
    Coarse(usize),
    /// So many of the cosines of every block are left, the slowest ones.
    Blocks(usize),
}

impl Filter {
    /// For the height or width of frames.
    fn of_frames(noise: &mut Philox) -> Self {
        match noise.below(3) {
            0 => Self::Soft(noise.range(0.4, 1.5)),
            1 => Self::Coarse(2 + noise.below(2)),
            _ => Self::Blocks(3 + noise.below(3)),
        }
    }

    /// For moments: less than a frame, and as much before as after, so that a contact stays where it is.
    fn of_moments(noise: &mut Philox) -> Self {
        if noise.chance(0.5) {
            Self::Keep
        } else {
            Self::Soft(noise.range(0.3, 0.8))
        }
    }

    /// The matrix `[n, n]` by rows; the values of a row sum to one, so that a plain picture stays as it is.
    fn matrix(self, n: usize) -> Vec<f32> {
        let mut matrix = vec![0.0; n * n];
        for (i, row) in matrix.chunks_exact_mut(n).enumerate() {
            match self {
                Self::Keep => row[i] = 1.0,
                Self::Soft(sigma) => {
                    for (j, value) in row.iter_mut().enumerate() {
                        let away = (j as f32 - i as f32) / sigma;
                        *value = (-0.5 * away * away).exp();
                    }
                }
                Self::Coarse(factor) => {
                    // Between the middles of the two nearest groups; the last group may be a short one.
                    let groups = n.div_ceil(factor);
                    let at = ((i as f32 + 0.5) / factor as f32 - 0.5).clamp(0.0, (groups - 1) as f32);
                    let (lower, part) = (at as usize, at.fract());
                    for (group, share) in [(lower, 1.0 - part), ((lower + 1).min(groups - 1), part)] {
                        let members = group * factor..((group + 1) * factor).min(n);
                        let each = share / members.len() as f32;
                        row[members].iter_mut().for_each(|value| *value += each);
                    }
                }
                Self::Blocks(kept) => {
                    let first = i / BLOCK * BLOCK;
                    let length = BLOCK.min(n - first);
                    for (j, value) in row[first..first + length].iter_mut().enumerate() {
                        *value = block_projection(i - first, j, length, kept);
                    }
                }
            }
            let sum: f32 = row.iter().sum();
            row.iter_mut().for_each(|value| *value /= sum);
        }
        matrix
    }
}

/// Entry (i, j) of the projection of `length` values onto their `kept` slowest cosines.
fn block_projection(i: usize, j: usize, length: usize, kept: usize) -> f32 {
    let cosine = |k: usize, at: usize| {
        let turn = std::f32::consts::PI * k as f32 * (at as f32 + 0.5) / length as f32;
        let scale: f32 = if k == 0 { 1.0 } else { 2.0 };
        (scale / length as f32).sqrt() * turn.cos()
    };
    (0..kept.min(length)).map(|k| cosine(k, i) * cosine(k, j)).sum()
}

/// Adds to `batch` all that [`moments`], [`frames`] and [`mels`] need for the clips in it.
pub(super) fn draw(batch: Batch, shape: &Shape, noise: &mut Philox) -> Result<Batch> {
    let (clips, spec) = (batch.samples, &shape.spec);
    let (height, width) = (spec.height, spec.width);
    let [length, bands] = shape.mel;
    let on_host = |values: Vec<f32>, shape: &[usize]| Tensor::from_vec(values, shape, &Device::Cpu);
    let square = |filter: Filter, n: usize| on_host(filter.matrix(n), &[n, n]);
    // The same kind of filter down and across: codecs know no preferred direction.
    let (picture, moment) = (Filter::of_frames(noise), Filter::of_moments(noise));
    let (smear, blend) = (
        Filter::Soft(noise.range(0.3, 1.5)),
        Filter::Soft(noise.range(0.3, 1.0)),
    );
    let strength: Vec<f32> = (0..clips)
        .map(|_| {
            if noise.chance(UNWORN) {
                0.0
            } else {
                noise.uniform()
            }
        })
        .collect();
    let scaled = |most: f32, unit: f32, strength: f32| most * unit * strength.min(1.0);
    let (mut gain, mut shift) = (Vec::with_capacity(3 * clips), Vec::with_capacity(3 * clips));
    let (mut grain, mut hiss, mut tilt, mut floor) = (vec![], vec![], vec![], vec![]);
    for &worn in &strength {
        for _ in 0..3 {
            gain.push(1.0 + scaled(COLOUR.0, noise.range(-1.0, 1.0), worn));
            shift.push(scaled(COLOUR.1, noise.range(-1.0, 1.0), worn));
        }
        grain.push(scaled(shape.grain, noise.uniform(), worn));
        hiss.push(scaled(MEL_NOISE, noise.uniform(), worn));
        tilt.push(scaled(MEL_TILT, noise.range(-1.0, 1.0), worn));
        let raised = noise.range(MEL_FLOOR.0, MEL_FLOOR.1);
        floor.push(if worn > 0.0 { raised } else { MEL_FLOOR.0 });
    }
    let picks = |noise: &mut Philox| {
        let tiles: Vec<u32> = (0..clips).map(|_| noise.below(TILES) as u32).collect();
        Tensor::from_vec(tiles, clips, &Device::Cpu)
    };
    let slope = (0..bands).map(|band| band as f32 / bands as f32 - 0.5).collect();
    let hiss_tiles = noise.normals(TILES * length * bands);
    let grain_tiles = noise.normals(TILES * height * width * 3);
    Ok(batch
        .with("wear.rows", square(picture, height)?)
        .with(
            "wear.columns",
            on_host(for_colours(&picture.matrix(width), width), &[3 * width; 2])?,
        )
        .with("wear.moments", square(moment, spec.frames())?)
        .with("wear.strength", on_host(strength, &[clips, 1])?)
        .with("wear.gain", on_host(gain, &[clips, 1, 1, 1, 3])?)
        .with("wear.shift", on_host(shift, &[clips, 1, 1, 1, 3])?)
        .with("wear.grain", on_host(grain, &[clips, 1, 1, 1, 1])?)
        .with(
            "wear.grain_tiles",
            on_host(grain_tiles, &[TILES, height, width, 3])?,
        )
        .with("wear.smear", square(smear, length)?)
        .with("wear.blend", square(blend, bands)?)
        .with("wear.hiss", on_host(hiss, &[clips, 1, 1])?)
        .with("wear.hiss_tiles", on_host(hiss_tiles, &[TILES, length, bands])?)
        .with("wear.hiss_picks", picks(noise)?)
        .with("wear.tilt", on_host(tilt, &[clips, 1, 1])?)
        .with("wear.slope", on_host(slope, &[1, 1, bands])?)
        .with("wear.floor", on_host(floor, &[clips, 1, 1])?))
}

/// A map along the width as one along rows of interleaved colours: `[3 w, 3 w]`, to be multiplied from the right.
fn for_colours(matrix: &[f32], width: usize) -> Vec<f32> {
    let mut wide = vec![0.0; 9 * width * width];
    for (to, row) in matrix.chunks_exact(width).enumerate() {
        for (from, &share) in row.iter().enumerate() {
            for c in 0..3 {
                wide[(3 * from + c) * 3 * width + 3 * to + c] = share;
            }
        }
    }
    wide
}

/// Clips `[B, F, H, W, 3]` whose moments run into one another.
pub(super) fn moments(batch: &Batch, clips: &Tensor) -> Result<Tensor> {
    let (n, frames) = (clips.dim(0)?, clips.dim(1)?);
    let flat = clips.reshape((n, frames, ()))?;
    let smeared = batch.get("wear.moments")?.broadcast_matmul(&flat)?;
    mixed(&flat, &smeared, &batch.get("wear.strength")?.unsqueeze(2)?)?.reshape(clips.shape())
}

/// Frames `[B, K, H, W, 3]` in [-1, 1], softened, recoloured and grained; `tiles` `[B * K]` (u32) chooses the grain of
/// each frame.
pub(super) fn frames(batch: &Batch, frames: &Tensor, tiles: &Tensor) -> Result<Tensor> {
    let (n, count) = (frames.dim(0)?, frames.dim(1)?);
    let (height, width) = (frames.dim(2)?, frames.dim(3)?);
    let rows = frames.reshape((n * count, height, width * 3))?;
    let filtered = batch
        .get("wear.rows")?
        .broadcast_matmul(&rows)?
        .reshape((n * count * height, width * 3))?
        .matmul(batch.get("wear.columns")?)?
        .reshape((n, ()))?;
    let worn = mixed(&rows.reshape((n, ()))?, &filtered, batch.get("wear.strength")?)?
        .reshape(frames.shape())?
        .broadcast_mul(batch.get("wear.gain")?)?
        .broadcast_add(batch.get("wear.shift")?)?;
    let grain = batch
        .get("wear.grain_tiles")?
        .index_select(tiles, 0)?
        .reshape(frames.shape())?
        .broadcast_mul(batch.get("wear.grain")?)?;
    worn + grain
}

/// Spectrograms `[B, T, bands]`, smeared, tilted and noisy above a raised floor.
pub(super) fn mels(batch: &Batch, mel: &Tensor) -> Result<Tensor> {
    let (n, length, bands) = mel.dims3()?;
    let filtered = batch
        .get("wear.smear")?
        .broadcast_matmul(mel)?
        .reshape((n * length, bands))?
        .matmul(&batch.get("wear.blend")?.t()?)?
        .reshape((n, length, bands))?;
    let strength = batch.get("wear.strength")?.unsqueeze(D::Minus1)?;
    let hiss = batch
        .get("wear.hiss_tiles")?
        .index_select(batch.get("wear.hiss_picks")?, 0)?
        .broadcast_mul(batch.get("wear.hiss")?)?;
    let tilt = batch.get("wear.tilt")?.broadcast_mul(batch.get("wear.slope")?)?;
    (mixed(mel, &filtered, &strength)? + hiss)?
        .broadcast_add(&tilt)?
        .broadcast_maximum(batch.get("wear.floor")?)
}

/// Which tile of grain each of `n` frames takes.
pub(super) fn tiles(n: usize, noise: &mut Philox) -> Result<Tensor> {
    let tiles: Vec<u32> = (0..n).map(|_| noise.below(TILES) as u32).collect();
    Tensor::from_vec(tiles, n, &Device::Cpu)
}

/// `from` where `strength` is 0, `to` where it is 1.
fn mixed(from: &Tensor, to: &Tensor, strength: &Tensor) -> Result<Tensor> {
    from + (to - from)?.broadcast_mul(strength)?
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILTERS: [Filter; 7] = [
        Filter::Keep,
        Filter::Soft(0.5),
        Filter::Soft(1.5),
        Filter::Coarse(2),
        Filter::Coarse(3),
        Filter::Blocks(3),
        Filter::Blocks(5),
    ];

    fn apply(filter: Filter, x: &[f32]) -> Vec<f32> {
        let matrix = filter.matrix(x.len());
        let rows = matrix.chunks_exact(x.len());
        rows.map(|row| row.iter().zip(x).map(|(m, x)| m * x).sum())
            .collect()
    }

    #[test]
    fn plain_stays_plain_and_detail_is_lost() {
        for n in [24, 50, 96] {
            let stripes: Vec<f32> = (0..n).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
            for filter in FILTERS {
                let plain = apply(filter, &vec![0.7; n]);
                assert!(plain.iter().all(|y| (y - 0.7).abs() < 1e-5), "{filter:?} of {n}");
                let energy = apply(filter, &stripes).iter().map(|y| y * y).sum::<f32>() / n as f32;
                let kept = if filter == Filter::Keep {
                    0.99..1.01
                } else {
                    0.0..0.5
                };
                assert!(kept.contains(&energy), "{filter:?} of {n}: {energy}");
            }
        }
        let ramp: Vec<f32> = (0..16).map(|i| i as f32).collect();
        let same = apply(Filter::Blocks(BLOCK), &ramp);
        assert!(
            same.iter().zip(&ramp).all(|(a, b)| (a - b).abs() < 1e-4),
            "{same:?}"
        );
    }

    #[test]
    fn a_moment_stays_where_it_is() {
        let mut flash = vec![0.0; 48];
        flash[20] = 1.0;
        let smeared = apply(Filter::Soft(0.8), &flash);
        let mean: f32 = smeared.iter().enumerate().map(|(i, y)| i as f32 * y).sum();
        assert!((mean - 20.0).abs() < 1e-3 && smeared[20] < 0.9, "{mean}");
    }

    fn shape() -> Shape {
        let spec = ClipSpec {
            width: 32,
            height: 24,
            duration_s: 0.5,
            ..ClipSpec::default()
        };
        let mel = [50, 64];
        Shape {
            spec,
            mel,
            grain: 0.1,
        }
    }

    #[test]
    fn wear_changes_some_clips_a_little_and_leaves_others() -> Result<()> {
        let (n, shape) = (24, shape());
        let mut noise = Philox::new(5, 0);
        let batch = draw(Batch::new(n), &shape, &mut noise)?;
        let of = |count: usize, noise: &mut Philox| noise.normals(count).iter().map(|x| 0.3 * x).collect();
        let pixels: Vec<f32> = of(n * 6 * 24 * 32 * 3, &mut noise);
        let clips = Tensor::from_vec(pixels, (n, 6, 24, 32, 3), &Device::Cpu)?;
        let worn = frames(&batch, &moments(&batch, &clips)?, &tiles(n * 6, &mut noise)?)?;
        let mel = Tensor::from_vec(of(n * 50 * 64, &mut noise), (n, 50, 64), &Device::Cpu)?;
        let heard = mels(&batch, &mel)?;
        let strength = batch.get("wear.strength")?.flatten_all()?.to_vec1::<f32>()?;
        let far =
            |a: &Tensor, b: &Tensor, i: usize| (a.get(i)? - b.get(i)?)?.sqr()?.mean_all()?.to_scalar::<f32>();
        let mut unworn = 0;
        for (i, strength) in strength.into_iter().enumerate() {
            let (seen, heard) = (far(&worn, &clips, i)?, far(&heard, &mel, i)?);
            if strength == 0.0 {
                unworn += 1;
                assert!(seen < 1e-9, "clip {i}: {seen}");
                assert!(heard < 1e-4, "clip {i}: {heard}");
            } else if strength > 0.2 {
                assert!(seen > 1e-4 && heard > 1e-4, "clip {i}: {seen}, {heard}");
            }
            assert!(seen.is_finite() && heard.is_finite());
        }
        assert!((1..n).contains(&unworn), "{unworn}");
        Ok(())
    }

    #[test]
    fn down_and_across_are_filtered_alike() -> Result<()> {
        // A picture and its transpose, worn by one square filter, stay transposes of each other.
        let (n, filter) = (24, Filter::Coarse(3));
        let picture = Tensor::from_vec(Philox::new(1, 0).normals(n * n * 3), (n, n, 3), &Device::Cpu)?;
        let rows = Tensor::from_vec(filter.matrix(n), (n, n), &Device::Cpu)?;
        let columns = Tensor::from_vec(for_colours(&filter.matrix(n), n), (3 * n, 3 * n), &Device::Cpu)?;
        let worn = |x: &Tensor| {
            rows.matmul(&x.contiguous()?.reshape((n, 3 * n))?)?
                .matmul(&columns)?
                .reshape((n, n, 3))
        };
        let turned = worn(&picture.transpose(0, 1)?)?.transpose(0, 1)?;
        let gap = (worn(&picture)? - turned)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(gap < 1e-5, "{gap}");
        Ok(())
    }
}
