//! What is done to pictures on their way into a batch: pure functions of what a stream of random numbers gives.
//!
//! A picture is moved, mirrored and partly erased by itself; then it is mixed with another one of its batch, by transparency (mixup,
//! arXiv 1710.09412) or by a rectangle (CutMix, arXiv 1905.04899), and so are the classes.

use fulgur_kernels::philox::Philox;
use serde::{Deserialize, Serialize};

/// Most that pictures are moved by, in pixels.
const MOST_SHIFT: usize = 1 << 12;
/// Largest parameter of the shares of mixed pictures.
const MOST_ALPHA: f32 = 4.0;
/// Erased rectangles have these shares of the area, and these ratios of height and width.
const ERASED: [f32; 2] = [0.02, 0.2];
const RATIOS: [f32; 2] = [0.3, 3.3];

/// How pictures are changed.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(in crate::train::tasks) struct Augment {
    /// Pixels that a picture is moved by at most, in both axes; zeros come in.
    pub shift: usize,
    /// Half of the pictures are mirrored.
    pub flip: bool,
    /// Share of pictures of which a rectangle becomes noise.
    pub erase: f32,
    /// Share of pictures that are mixed with another.
    pub mix: f32,
    /// Parameter of the shares in mixup; 0 for none.
    pub mixup: f32,
    /// Parameter of the shares in CutMix; 0 for none.
    pub cutmix: f32,
}

impl Default for Augment {
    fn default() -> Self {
        Self {
            shift: 2,
            flip: true,
            erase: 0.0,
            mix: 0.0,
            mixup: 0.2,
            cutmix: 1.0,
        }
    }
}

impl Augment {
    /// Refuses what is no share.
    ///
    /// # Errors
    /// A setting is out of range, by name.
    pub(super) fn check(&self) -> Result<(), String> {
        let within = |name: &str, value: f32, most: f32| match (0.0..=most).contains(&value) {
            true => Ok(()),
            false => Err(format!("{name} is {value}, expected 0 to {most}")),
        };
        if self.shift > MOST_SHIFT {
            return Err(format!("shift is {}, expected 0 to {MOST_SHIFT}", self.shift));
        }
        within("erase", self.erase, 1.0)?;
        within("mix", self.mix, 1.0)?;
        within("mixup", self.mixup, MOST_ALPHA)?;
        within("cutmix", self.cutmix, MOST_ALPHA)?;
        if self.mix > 0.0 && self.mixup == 0.0 && self.cutmix == 0.0 {
            return Err(format!(
                "mix is {}, expected 0 without mixup and cutmix",
                self.mix
            ));
        }
        Ok(())
    }
}

/// Values `[C, H, W]`, normalised: zero is the mean.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Planes {
    pub(super) values: Vec<f32>,
    pub(super) side: [usize; 2],
}

/// A rectangle: rows and columns, ends excluded.
type Rectangle = [[usize; 2]; 2];

impl Planes {
    fn planes(&mut self) -> impl Iterator<Item = &mut [f32]> {
        self.values.chunks_mut(self.side[0] * self.side[1])
    }

    /// A picture of a batch by itself; what comes in at an edge is `empty`.
    pub(super) fn alone(mut self, how: &Augment, empty: f32, noise: &mut Philox) -> Self {
        if how.flip && noise.chance(0.5) {
            let width = self.side[1];
            self.values.chunks_mut(width).for_each(<[f32]>::reverse);
        }
        if how.shift > 0 {
            let mut by = || noise.below(2 * how.shift + 1) as isize - how.shift as isize;
            let by = [by(), by()];
            self = self.moved(by, empty);
        }
        if noise.chance(how.erase) {
            let share = noise.range(ERASED[0], ERASED[1]);
            let ratio = noise.range(RATIOS[0].ln(), RATIOS[1].ln()).exp();
            let within = rectangle(self.side, share, ratio, noise);
            let width = self.side[1];
            for plane in self.planes() {
                for row in within[0][0]..within[0][1] {
                    plane[row * width..][within[1][0]..within[1][1]].fill_with(|| noise.normal());
                }
            }
        }
        self
    }

    /// Moved down and to the right.
    fn moved(&self, [down, right]: [isize; 2], empty: f32) -> Self {
        let [height, width] = self.side;
        let from =
            |to: usize, by: isize, length: usize| to.checked_add_signed(-by).filter(|&from| from < length);
        let mut values = vec![empty; self.values.len()];
        let planes = values
            .chunks_mut(height * width)
            .zip(self.values.chunks(height * width));
        for (to, of) in planes {
            for row in 0..height {
                let Some(source) = from(row, down, height) else {
                    continue;
                };
                for column in 0..width {
                    if let Some(place) = from(column, right, width) {
                        to[row * width + column] = of[source * width + place];
                    }
                }
            }
        }
        Self {
            values,
            side: self.side,
        }
    }

    /// Mixed with `other`: the picture, and the share of it that is its own. Draws nothing where nothing is mixed.
    pub(super) fn mixed(mut self, other: &Self, how: &Augment, noise: &mut Philox) -> (Self, f32) {
        if how.mix == 0.0 || !noise.chance(how.mix) {
            return (self, 1.0);
        }
        let cut = how.cutmix > 0.0 && (how.mixup == 0.0 || noise.chance(0.5));
        if !cut {
            let own = beta(how.mixup, noise);
            let values = self.values.iter_mut().zip(&other.values);
            values.for_each(|(value, other)| *value = own * *value + (1.0 - own) * other);
            return (self, own);
        }
        let within = rectangle(self.side, 1.0 - beta(how.cutmix, noise), 1.0, noise);
        let [height, width] = self.side;
        let others = other.values.chunks(height * width);
        for (plane, other) in self.planes().zip(others) {
            for row in within[0][0]..within[0][1] {
                let line = row * width;
                let columns = line + within[1][0]..line + within[1][1];
                plane[columns.clone()].copy_from_slice(&other[columns]);
            }
        }
        let area = (within[0][1] - within[0][0]) * (within[1][1] - within[1][0]);
        (self, 1.0 - area as f32 / (height * width) as f32)
    }
}

/// A rectangle with about this share of the area, and this ratio of height and width, around any pixel; what is outside is cut off.
fn rectangle(side: [usize; 2], share: f32, ratio: f32, noise: &mut Philox) -> Rectangle {
    let mut ends = |length: usize, scale: f32| {
        let half = (share.sqrt() * scale * length as f32 / 2.0).round() as usize;
        let middle = noise.below(length);
        [middle.saturating_sub(half), (middle + half).min(length)]
    };
    [ends(side[0], ratio.sqrt()), ends(side[1], 1.0 / ratio.sqrt())]
}

/// A draw from Beta(alpha, alpha) by Johnk's method: two powers of uniform draws, taken where their sum is at most one.
fn beta(alpha: f32, noise: &mut Philox) -> f32 {
    loop {
        let mut power = || f64::from(noise.uniform()).powf(1.0 / f64::from(alpha));
        let (x, y) = (power(), power());
        if x + y > 0.0 && x + y <= 1.0 {
            return (x / (x + y)) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Augment = Augment {
        shift: 0,
        flip: false,
        erase: 0.0,
        mix: 0.0,
        mixup: 0.0,
        cutmix: 0.0,
    };

    fn picture() -> Planes {
        Planes {
            values: (1..=12u8).map(f32::from).collect(),
            side: [2, 3],
        }
    }

    #[test]
    fn moving_brings_in_what_is_empty() {
        let moved = picture().moved([1, -1], 0.0);
        assert_eq!(
            moved.values,
            [0.0, 0.0, 0.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 8.0, 9.0, 0.0]
        );
        assert_eq!(picture().moved([5, 0], 7.0).values, [7.0; 12]);
    }

    #[test]
    fn half_of_the_pictures_are_mirrored_and_draws_repeat() {
        let how = Augment {
            flip: true,
            ..NOTHING
        };
        let mirrored = [3.0, 2.0, 1.0, 6.0, 5.0, 4.0, 9.0, 8.0, 7.0, 12.0, 11.0, 10.0];
        let draw = |seed| picture().alone(&how, 0.0, &mut Philox::new(seed, 0));
        let count = (0..400).filter(|&seed| draw(seed).values == mirrored).count();
        assert!((160..240).contains(&count), "{count}");
        assert!((0..400).all(|seed| draw(seed) == draw(seed)));
        let same = picture().alone(&NOTHING, 0.0, &mut Philox::new(1, 0));
        assert_eq!(same, picture());
    }

    #[test]
    fn erasing_leaves_the_rest() {
        let how = Augment {
            erase: 1.0,
            ..NOTHING
        };
        let whole = Planes {
            values: vec![9.0; 2 * 400],
            side: [20, 20],
        };
        let mut shares = 0.0;
        for seed in 0..100 {
            let erased = whole.clone().alone(&how, 0.0, &mut Philox::new(seed, 0));
            let gone = |plane: &[f32]| plane.iter().map(|&value| value != 9.0).collect::<Vec<_>>();
            assert_eq!(gone(&erased.values[..400]), gone(&erased.values[400..]));
            shares += gone(&erased.values).iter().filter(|&&gone| gone).count() as f32 / 800.0;
        }
        // Some of it is cut off at the edges.
        assert!((4.0..11.0).contains(&shares), "{shares}");
    }

    /// What is mixed is said truly: a picture of ones mixed with one of zeros has its share as its mean.
    #[test]
    fn shares_are_those_of_the_mixture() {
        let plane = |value| Planes {
            values: vec![value; 64],
            side: [8, 8],
        };
        for (mixup, cutmix) in [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)] {
            let how = Augment {
                mix: 1.0,
                mixup,
                cutmix,
                ..NOTHING
            };
            let mut noise = Philox::new(3, 0);
            let mut mean = 0.0;
            for _ in 0..500 {
                let (mixed, own) = plane(1.0).mixed(&plane(0.0), &how, &mut noise);
                let found = mixed.values.iter().sum::<f32>() / 64.0;
                assert!((found - own).abs() < 1e-5, "{found} {own}");
                mean += own / 500.0;
            }
            assert!((0.45..0.7).contains(&mean), "{mixup} {cutmix}: {mean}");
        }
        assert_eq!(
            plane(1.0).mixed(&plane(0.0), &NOTHING, &mut Philox::new(1, 0)).1,
            1.0
        );
    }

    /// Mean and variance of Beta(a, a): 1/2 and 1 / (4 (2 a + 1)).
    #[test]
    fn shares_have_the_moments_of_their_distribution() {
        for alpha in [0.2, 1.0, 3.0] {
            let mut noise = Philox::new(5, 0);
            let draws: Vec<f64> = (0..20_000).map(|_| f64::from(beta(alpha, &mut noise))).collect();
            let mean = draws.iter().sum::<f64>() / draws.len() as f64;
            let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / draws.len() as f64;
            let expected = 0.25 / (2.0 * f64::from(alpha) + 1.0);
            assert!((mean - 0.5).abs() < 0.01, "{alpha}: {mean}");
            assert!(
                (variance / expected - 1.0).abs() < 0.05,
                "{alpha}: {variance} {expected}"
            );
        }
    }

    #[test]
    fn what_is_no_share_is_refused() {
        for (how, words) in [
            (
                Augment {
                    erase: 1.5,
                    ..NOTHING
                },
                "erase is 1.5",
            ),
            (
                Augment {
                    mix: f32::NAN,
                    ..NOTHING
                },
                "mix is NaN",
            ),
            (
                Augment { mix: 0.5, ..NOTHING },
                "expected 0 without mixup and cutmix",
            ),
            (
                Augment {
                    mixup: 9.0,
                    ..NOTHING
                },
                "mixup is 9",
            ),
            (
                Augment {
                    cutmix: -1.0,
                    ..NOTHING
                },
                "cutmix is -1",
            ),
            (
                Augment {
                    shift: 1 << 20,
                    ..NOTHING
                },
                "shift is",
            ),
        ] {
            let line = how.check().unwrap_err();
            assert!(line.contains(words), "{line}");
        }
        Augment::default().check().unwrap();
    }
}
