//! The nearest training clips of a clip, by pixels: does a generator compose, or replay?
//!
//! Clips are compared as a whole, backdrop included, through small pictures of evenly spaced moments. The distance is the
//! root mean square of the differences, black to white being 1. Nothing learned takes part, so that no network can
//! overlook a copy.
//!
//! A plain or blurred clip is near to many others without being a copy of any. So the distance of the nearest one is also
//! given as a share of the mean distance of the next ones: close to 1 for a clip among others, close to 0 for a copy.

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{D, Device, Result, Tensor};
use fulgur_benchmark::judge::median;
use fulgur_datasets::scenes::{ClipSpec, Split};
use serde::Serialize;

use crate::train::tasks::clips::{Clips, HostClip, Want, render};

/// Moments of a clip that are compared, at most.
const MOMENTS: usize = 12;
/// Side of the small pictures in pixels, at most.
const SIDE: usize = 24;
/// Training clips that are rendered and compared at a time.
const CHUNK: usize = 64;
/// Clips after the nearest one that its distance is compared with.
const NEXT: usize = 10;
/// Frames alone: sounds of one thing are alike by design.
pub(super) const WANT: Want = Want {
    frames: true,
    mask: false,
    samples: false,
};

/// A clip's nearest training clip.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nearest {
    /// Its number in the training split.
    pub index: u64,
    /// Root mean square difference of the pixels of the small pictures, in [0, 1].
    pub distance: f64,
    /// The distance as a share of the mean distance of the next ten; absent where there are no others, or equal ones.
    pub share: Option<f64>,
}

/// Distances to the nearest training clips, of generated clips and, as the yardstick, of real held-out ones.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Distances {
    /// Training clips that were searched.
    pub training_clips: usize,
    /// Median over the generated clips.
    pub generated_median: Option<f64>,
    /// The nearest that any generated clip comes to a training clip.
    pub generated_least: Option<f64>,
    /// Median over the real held-out clips.
    pub real_median: Option<f64>,
    /// The nearest that any of them comes.
    pub real_least: Option<f64>,
    /// The least share of any generated clip's nearest distance in those of the next ten training clips: near 0 for a
    /// copy.
    pub generated_share_least: Option<f64>,
    /// The same of the real held-out clips.
    pub real_share_least: Option<f64>,
}

impl Distances {
    pub(super) fn of(generated: &[Nearest], real: &[Nearest], training_clips: usize) -> Self {
        let values = |nearest: &[Nearest]| nearest.iter().map(|n| n.distance).collect::<Vec<_>>();
        let least = |values: &[f64]| values.iter().copied().min_by(f64::total_cmp);
        let shares = |nearest: &[Nearest]| nearest.iter().filter_map(|n| n.share).collect::<Vec<_>>();
        let (generated_shares, real_shares) = (shares(generated), shares(real));
        let (generated, real) = (values(generated), values(real));
        Self {
            training_clips,
            generated_median: median(&generated),
            generated_least: least(&generated),
            real_median: median(&real),
            real_least: least(&real),
            generated_share_least: least(&generated_shares),
            real_share_least: least(&real_shares),
        }
    }
}

/// Small pictures of evenly spaced moments of a clip, RGB bytes in one row.
pub(super) fn small(frames: &[u8], spec: &ClipSpec) -> Vec<u8> {
    let (width, height, count) = (spec.width, spec.height, spec.frames());
    let (columns, rows) = (width.min(SIDE), height.min(SIDE));
    let moments = count.min(MOMENTS);
    let mut values = Vec::with_capacity(moments * rows * columns * 3);
    for moment in 0..moments {
        let frame = (2 * moment + 1) * count / (2 * moments);
        let pixels = &frames[frame * width * height * 3..][..width * height * 3];
        for row in 0..rows {
            let ys = row * height / rows..(row + 1) * height / rows;
            for column in 0..columns {
                let xs = column * width / columns..(column + 1) * width / columns;
                let area = (xs.len() * ys.len()) as u32;
                for c in 0..3 {
                    let inside = ys
                        .clone()
                        .flat_map(|y| xs.clone().map(move |x| 3 * (y * width + x) + c));
                    let sum: u32 = inside.map(|at| u32::from(pixels[at])).sum();
                    values.push(((sum + area / 2) / area) as u8);
                }
            }
        }
    }
    values
}

/// Finds the nearest of the first `count` training clips for each of `clips`, which are [`small`]. Returns them with
/// the number of training clips that were searched; `on_progress` hears that number, and `cancel` ends the search early,
/// without any result where it comes at once.
pub(super) fn search(
    clips: &[Vec<u8>],
    training: &Clips,
    count: usize,
    device: &Device,
    cancel: &AtomicBool,
    on_progress: &mut dyn FnMut(usize),
) -> Result<(Vec<Nearest>, usize)> {
    let spec = training.spec();
    let queries = matrix(clips, device)?;
    // The nearest of each clip so far, with their numbers, nearest first.
    let mut nearest: Vec<Vec<(f32, u64)>> = vec![Vec::new(); clips.len()];
    let mut done = 0;
    while done < count && !cancel.load(Ordering::Relaxed) {
        let now = CHUNK.min(count - done);
        let rendered: Vec<HostClip> = render(now, |i| training.scene(Split::Train, (done + i) as u64, WANT));
        let known: Vec<Vec<u8>> = rendered.iter().map(|clip| small(&clip.frames, &spec)).collect();
        let distances = distances(&queries, &matrix(&known, device)?)?;
        for (best, row) in nearest.iter_mut().zip(distances.to_vec2::<f32>()?) {
            best.extend(row.into_iter().zip(done as u64..));
            best.sort_by(|a, b| a.0.total_cmp(&b.0));
            best.truncate(1 + NEXT);
        }
        done += now;
        on_progress(done);
    }
    Ok((nearest.iter().filter_map(|best| first_of(best)).collect(), done))
}

/// The nearest clip of a list that begins with it; `None` of an empty list.
fn first_of(best: &[(f32, u64)]) -> Option<Nearest> {
    let (&(distance, index), next) = best.split_first()?;
    let mean = next.iter().map(|(distance, _)| f64::from(*distance)).sum::<f64>() / next.len().max(1) as f64;
    Some(Nearest {
        index,
        distance: f64::from(distance),
        share: (mean > 0.0).then(|| f64::from(distance) / mean),
    })
}

/// Small clips as rows in [-0.5, 0.5].
fn matrix(clips: &[Vec<u8>], device: &Device) -> Result<Tensor> {
    let columns = clips.first().map_or(0, Vec::len);
    let values = clips
        .iter()
        .flatten()
        .map(|&x| f32::from(x) / 255.0 - 0.5)
        .collect();
    Tensor::from_vec(values, (clips.len(), columns), device)
}

/// Root mean square differences between the rows of `a` `[n, d]` and `b` `[m, d]`: `[n, m]`.
fn distances(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let d = a.dim(1)?;
    let squares = |x: &Tensor| x.sqr()?.sum_keepdim(D::Minus1);
    let products = (a.matmul(&b.t()?.contiguous()?)? * 2.0)?;
    let sums = squares(a)?.broadcast_add(&squares(b)?.t()?)?;
    // Rounding may take the difference of equal rows below zero.
    ((sums - products)? / d as f64)?.relu()?.sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::tasks::clips::ClipOptions;
    use fulgur_datasets::things::{self, Things};

    fn spec() -> ClipSpec {
        ClipSpec {
            width: 48,
            height: 48,
            duration_s: 1.0,
            ..ClipSpec::default()
        }
    }

    fn training(seed: u64) -> Clips {
        let dir = tempfile::tempdir().unwrap();
        things::save(&Things::synthetic(4), &dir.path().join("stamps")).unwrap();
        let options = ClipOptions {
            data: dir.path().to_owned(),
            pictures: 0.0,
            seed,
            ..ClipOptions::default()
        };
        Clips::open_as(&options, spec()).unwrap()
    }

    #[test]
    fn a_copy_is_found_and_is_nearer_than_anything_new() {
        let (training, cancel) = (training(0), AtomicBool::new(false));
        let of = |split, index| small(&training.scene(split, index, WANT).frames, &spec());
        let clips = [
            of(Split::Train, 37),
            of(Split::HeldOutCombination, 5),
            of(Split::Train, 90),
        ];
        let mut heard = Vec::new();
        let (nearest, searched) = search(&clips, &training, 100, &Device::Cpu, &cancel, &mut |done| {
            heard.push(done);
        })
        .unwrap();
        assert_eq!((searched, heard), (100, vec![64, 100]));
        assert_eq!((nearest[0].index, nearest[2].index), (37, 90));
        assert!(nearest[0].distance < 1e-3, "{nearest:?}");
        assert!(nearest[1].distance > 0.02, "{nearest:?}");
        assert!(
            nearest[0].share < Some(0.02) && nearest[1].share > Some(0.3),
            "{nearest:?}"
        );
        let distances = Distances::of(&nearest[..1], &nearest[1..], searched);
        assert!(distances.generated_median < distances.real_median);
        assert_eq!(distances.generated_least, Some(nearest[0].distance));
        assert_eq!(distances.generated_share_least, nearest[0].share);
    }

    #[test]
    fn distances_are_root_mean_squares() {
        let rows = [vec![0, 0, 0, 0], vec![255, 255, 255, 255], vec![255, 0, 0, 0]];
        let matrix = matrix(&rows, &Device::Cpu).unwrap();
        let found = distances(&matrix, &matrix).unwrap().to_vec2::<f32>().unwrap();
        for (i, j, expected) in [(0, 0, 0.0), (0, 1, 1.0), (0, 2, 0.5), (1, 2, 0.75f32.sqrt())] {
            assert!((found[i][j] - expected).abs() < 1e-3, "{i} {j}: {}", found[i][j]);
        }
    }

    #[test]
    fn a_stopped_search_says_how_far_it_came() {
        let training = training(0);
        let clips = [small(&training.scene(Split::Train, 1, WANT).frames, &spec())];
        let cancel = AtomicBool::new(true);
        let found = search(&clips, &training, 100, &Device::Cpu, &cancel, &mut |_| {}).unwrap();
        assert_eq!((found.0.len(), found.1), (0, 0));
    }

    #[test]
    fn a_plain_clip_is_near_to_many_and_a_copy_of_none() {
        let training = training(0);
        let of = |index| small(&training.scene(Split::Train, index, WANT).frames, &spec());
        let (copy, plain) = (of(3), vec![128; of(3).len()]);
        let cancel = AtomicBool::new(false);
        let (nearest, _) =
            search(&[copy, plain], &training, 128, &Device::Cpu, &cancel, &mut |_| {}).unwrap();
        assert!(
            nearest[0].share < Some(0.02) && nearest[1].share > Some(0.5),
            "{nearest:?}"
        );
        assert_eq!(first_of(&[(0.2, 5)]).and_then(|only| only.share), None);
        let first = first_of(&[(0.1, 7), (0.2, 5), (0.3, 6)]).unwrap();
        assert_eq!(first.index, 7);
        assert!((first.share.unwrap() - 0.4).abs() < 1e-6);
    }

    #[test]
    fn small_pictures_are_averages_of_areas() {
        let spec = ClipSpec {
            width: 48,
            height: 96,
            duration_s: 2.0,
            ..spec()
        };
        // Each column twice: the small picture has each once, in every moment.
        let row: Vec<u8> = (0..48u8).flat_map(|x| [x / 2 * 10, 7, 0]).collect();
        let frames = row.repeat(96 * spec.frames());
        let small = small(&frames, &spec);
        assert_eq!(small.len(), MOMENTS * SIDE * SIDE * 3);
        for (i, pixel) in small.chunks_exact(3).enumerate() {
            assert_eq!(pixel, [(i % SIDE) as u8 * 10, 7, 0]);
        }
    }
}
