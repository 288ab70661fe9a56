//! The nearest training pictures: does a generator make pictures, or remember some?
//!
//! Pictures that were drawn are looked for among the training pictures twice: by a judge's features, which see the same thing
//! moved or in another colour, and by pixels, which no network can overlook a copy in. The yardstick are held-out pictures: the
//! distance within which one in twenty of them has a training picture. Of a generator that remembers nothing, about one in twenty
//! pictures is as near.

use fulgur_benchmark::judge::median;
use fulgur_benchmark::metrics::points::Near;
use fulgur_datasets::media::Picture;
use rayon::prelude::*;
use serde::Serialize;

use super::samples::By;
use crate::lm_eval::figures::{Estimate, Ratio};
use crate::train::tasks::pictures::levels;

/// Share of the held-out pictures that are nearer to a training picture than the yardstick.
const NEARER: f64 = 0.05;
/// Training pictures that are shown beside one that was drawn.
pub(super) const SHOWN: usize = 3;
/// Values that are compared before asking whether a picture is too far away already.
const STRETCH: usize = 2048;

/// How near pictures come to training pictures.
#[derive(Clone, Debug, Serialize)]
pub struct Neighbours {
    /// Training pictures that were searched.
    pub training: usize,
    /// Share of the held-out pictures that are nearer than the yardsticks.
    pub expected: f64,
    /// By Euclidean distance of the first judge's features.
    pub features: Yardstick,
    /// By root mean square difference of the pixels, black to white being 1.
    pub pixels: Yardstick,
}

/// Distances of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct Yardstick {
    /// The distance that is asked about.
    pub distance: f64,
    /// Of held-out pictures.
    pub held_out: Spread,
    /// Of drawn pictures.
    pub drawn: Vec<Remembered>,
}

/// Distances to the nearest training picture.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    /// Pictures.
    pub n: usize,
    /// Median of the distances.
    pub median: f64,
    /// The least of them.
    pub least: f64,
}

/// Distances of pictures that were drawn by one kind of wish.
#[derive(Clone, Debug, Serialize)]
pub struct Remembered {
    /// What steered them.
    pub by: By,
    /// The distances.
    #[serde(flatten)]
    pub spread: Spread,
    /// Share of the pictures that are nearer than the yardstick.
    pub nearer: Estimate,
}

impl Spread {
    fn of(distances: &[f64]) -> Option<Self> {
        Some(Self {
            n: distances.len(),
            median: median(distances)?,
            least: distances.iter().copied().min_by(f64::total_cmp)?,
        })
    }
}

impl Yardstick {
    /// Of the distances of held-out pictures, and of drawn ones by what steered them; none without any.
    pub(super) fn of(held_out: &[f64], drawn: &[(By, Vec<f64>)]) -> Option<Self> {
        let mut sorted = held_out.to_vec();
        sorted.sort_by(f64::total_cmp);
        let distance = *sorted.get((NEARER * sorted.len() as f64) as usize)?;
        let remembered = drawn.iter().filter_map(|(by, distances)| {
            let mut nearer = Ratio::default();
            distances
                .iter()
                .for_each(|own| nearer.add(f64::from(*own < distance), 1.0));
            Some(Remembered {
                by: *by,
                spread: Spread::of(distances)?,
                nearer: nearer.estimate()?,
            })
        });
        Some(Self {
            distance,
            held_out: Spread::of(held_out)?,
            drawn: remembered.collect(),
        })
    }
}

impl Neighbours {
    pub(super) fn of(training: usize, features: Yardstick, pixels: Yardstick) -> Self {
        Self {
            training,
            expected: NEARER,
            features,
            pixels,
        }
    }
}

/// The bytes of a picture that a model of so many channels learns.
pub(super) fn bytes(picture: Picture, channels: usize) -> Vec<u8> {
    levels(picture, channels)
}

/// For each of `queries` the [`SHOWN`] nearest of `among`, all of one length, by root mean square difference.
pub(super) fn by_pixels(queries: &[&[u8]], among: &[Vec<u8>]) -> Vec<Vec<Near>> {
    queries
        .par_iter()
        .map(|query| {
            let mut best: Vec<(u64, usize)> = Vec::with_capacity(SHOWN + 1);
            for (index, other) in among.iter().enumerate() {
                let most = match best.get(SHOWN - 1) {
                    Some(&(most, _)) => most,
                    None => u64::MAX,
                };
                if let Some(sum) = squares(query, other, most) {
                    let place = best.partition_point(|&(own, _)| own <= sum);
                    best.insert(place, (sum, index));
                    best.truncate(SHOWN);
                }
            }
            let count = query.len().max(1) as f64;
            let near = |(sum, index): (u64, usize)| Near {
                index,
                distance: (sum as f64 / count).sqrt() / 255.0,
            };
            best.into_iter().map(near).collect()
        })
        .collect()
}

/// Sum of the squares of the differences, exactly; none where it is not below `most`.
fn squares(a: &[u8], b: &[u8], most: u64) -> Option<u64> {
    let mut sum = 0;
    for (a, b) in a.chunks(STRETCH).zip(b.chunks(STRETCH)) {
        let part: u32 = (a.iter().zip(b))
            .map(|(&a, &b)| {
                let apart = u32::from(a.abs_diff(b));
                apart * apart
            })
            .sum();
        sum += u64::from(part);
        if sum >= most {
            return None;
        }
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_kernels::philox::Philox;

    #[test]
    fn the_nearest_by_pixels_are_those_of_all_distances() {
        let mut draw = Philox::new(3, 0);
        let mut picture = || -> Vec<u8> { (0..5000).map(|_| draw.below(256) as u8).collect() };
        let mut among: Vec<Vec<u8>> = (0..30).map(|_| picture()).collect();
        let (query, copy) = (picture(), among[17].clone());
        // A little apart from number 17, and black beside white.
        let mut near = copy.clone();
        near[4000] ^= 1;
        among.push(vec![255; 5000]);
        let black = vec![0; 5000];
        let found = by_pixels(&[&query, &copy, &near, &black], &among);
        for (query, found) in [&query, &copy, &near, &black].into_iter().zip(&found) {
            let mut all: Vec<(f64, usize)> = among
                .iter()
                .map(|other| {
                    let squares = query.iter().zip(other).map(|(&a, &b)| {
                        let apart = (f64::from(a) - f64::from(b)) / 255.0;
                        apart * apart
                    });
                    (squares.sum::<f64>() / 5000.0).sqrt()
                })
                .zip(0..)
                .collect();
            all.sort_by(|a, b| a.0.total_cmp(&b.0));
            assert_eq!(found.len(), SHOWN);
            for (near, (distance, index)) in found.iter().zip(&all) {
                assert_eq!(near.index, *index);
                assert!((near.distance - distance).abs() < 1e-12);
            }
        }
        assert_eq!((found[1][0].index, found[1][0].distance), (17, 0.0));
        assert_eq!(by_pixels(&[&black], &among[30..])[0][0].distance, 1.0);
    }

    #[test]
    fn one_held_out_picture_in_twenty_is_nearer_than_the_yardstick() {
        let held_out: Vec<f64> = (0..100).rev().map(f64::from).collect();
        let drawn = [
            (By::Class, vec![0.0, 0.0, 0.0, 50.0]),
            (By::Text, held_out.clone()),
            (By::Both, Vec::new()),
        ];
        let found = Yardstick::of(&held_out, &drawn).unwrap();
        assert_eq!(
            (found.distance, found.held_out.median, found.held_out.least),
            (5.0, 49.5, 0.0)
        );
        let [class, text] = found.drawn.as_slice() else {
            panic!("{found:?}");
        };
        assert_eq!(
            (class.by, class.nearer.mean, class.spread.n),
            (By::Class, 0.75, 4)
        );
        assert_eq!((text.by, text.nearer.mean), (By::Text, NEARER));
        assert!((text.nearer.stderr.unwrap() - (0.05f64 * 0.95 / 99.0).sqrt()).abs() < 1e-12);
        assert!(Yardstick::of(&[], &drawn).is_none());
    }
}
