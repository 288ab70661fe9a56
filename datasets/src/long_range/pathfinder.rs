//! Pathfinder, 32 by 32: are two dots on one dashed path? After the task of Linsley and others (arXiv 1805.08315) that the Long Range Arena
//! took over; the generator is our own, and its pictures are not the published ones.
//!
//! A picture has two long paths A and B, which end in a0, a1, b0 and b1, and short ones that mean nothing. The dots are on a0 and a1, or on b0 and
//! a1. Everything but the dots is drawn without a look at which, and so that both pairs look alike: a0 and b0 are equally far from a1, lie in
//! about the same direction, the middle of either pair is about as far from that of the picture, and paths leave under about the same angle. Numbers of bright pixels and distances of dots
//! have the same distribution in both classes, so only following the path tells.

use std::f32::consts::{PI, TAU};

use fulgur_kernels::philox::Philox;

/// Width and height of a picture.
pub const SIDE: usize = 32;
/// Not connected, and connected.
pub const CLASSES: usize = 2;

/// Length of a dash and of the gap behind it, in pixels.
const DASH: f32 = 2.6;
const GAP: f32 = 1.4;
/// Dashes of long and of short paths.
const LONG: [usize; 2] = [5, 7];
const SHORT: [usize; 2] = [2, 3];
/// Number of short paths.
const SHORTS: [usize; 2] = [2, 4];
/// From end to end of a long path, and between the dots.
const DISTANCE: [f32; 2] = [13.0, 18.0];
/// By how much that may be missed.
const NEAR: f32 = 0.4;
/// Largest turn from dash to dash, of the whole path and of each dash beside it, in radians.
const BEND: f32 = 0.65;
const JITTER: f32 = 0.2;
/// How often two long paths are placed anew before others are drawn.
const PLACINGS: usize = 12;
/// Between any two paths, and between dashes of one that do not follow each other.
const APART: f32 = 3.5;
/// Between dots and paths that do not end there.
const CLEAR: f32 = 4.4;
/// Between paths and the border.
const MARGIN: f32 = 2.5;
/// Half the width of a dash, and the radius of a dot.
const HALF_WIDTH: f32 = 0.55;
const DOT: f32 = 1.5;
/// Brightness of dashes and dots.
const DASH_LEVEL: f32 = 170.0;
const DOT_LEVEL: f32 = 255.0;
/// How much the direction from a1 to b0 differs from that to a0 at most, and the angles under which paths leave.
const SWING: f32 = 1.2;
const LEAVE: f32 = 0.4;
/// How much the distances of the middles of both pairs to that of the picture differ at most.
const ALIKE: f32 = 2.0;

type Point = [f32; 2];

/// A picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// Grey values, row by row.
    pub pixels: Vec<u8>,
    /// Whether the dots are on one path.
    pub connected: bool,
    /// Where the dots are, x and y in pixels from the upper left corner.
    pub dots: [[f32; 2]; 2],
}

/// Picture number `index` of `seed`; the dots of even ones are connected.
pub fn example(seed: u64, index: u64) -> Example {
    let mut noise = Philox::named(seed, &format!("pathfinder/{index}"));
    let connected = index.is_multiple_of(2);
    // The numbers are settled before anything is placed, so that what is hard to place is not rarer in either class.
    let distance = noise.range(DISTANCE[0], DISTANCE[1]);
    let counts = [between(&mut noise, LONG), between(&mut noise, LONG)];
    let shorts: Vec<usize> = (0..between(&mut noise, SHORTS))
        .map(|_| between(&mut noise, SHORT))
        .collect();
    let scene = loop {
        let a = Dashes::spanning(&mut noise, counts[0], distance);
        let span = noise.range(DISTANCE[0], DISTANCE[1]);
        let b = Dashes::spanning(&mut noise, counts[1], span);
        if let Some(scene) = (0..PLACINGS).find_map(|_| Scene::place(&mut noise, &a, &b, &shorts)) {
            break scene;
        }
    };
    let other = scene.paths[usize::from(!connected)].start();
    let mut dots = [scene.paths[0].end(), other];
    if noise.chance(0.5) {
        dots.reverse();
    }
    Example {
        pixels: scene.picture(dots),
        connected,
        dots,
    }
}

fn between(noise: &mut Philox, [least, most]: [usize; 2]) -> usize {
    least + noise.below(most + 1 - least)
}

fn away(from: Point, length: f32, angle: f32) -> Point {
    let (sin, cos) = angle.sin_cos();
    [from[0] + length * cos, from[1] + length * sin]
}

fn apart(a: Point, b: Point) -> f32 {
    squared(a, b).sqrt()
}

fn squared(a: Point, b: Point) -> f32 {
    (a[0] - b[0]).powi(2) + (a[1] - b[1]).powi(2)
}

/// Whether a point keeps away from the border.
fn is_inside(point: Point) -> bool {
    let sides = MARGIN..=SIDE as f32 - MARGIN;
    point.iter().all(|at| sides.contains(at))
}

/// From the middle of two points to that of the picture.
fn off_centre(a: Point, b: Point) -> f32 {
    let middle = [0.5 * (a[0] + b[0]), 0.5 * (a[1] + b[1])];
    apart(middle, [0.5 * SIDE as f32; 2])
}

fn angle(from: Point, to: Point) -> f32 {
    (to[1] - from[1]).atan2(to[0] - from[0])
}

/// Dashes that follow each other, each from one point to another.
#[derive(Clone, Debug)]
struct Dashes(Vec<[Point; 2]>);

impl Dashes {
    /// From the origin to the right, with a bend of its own.
    fn draw(noise: &mut Philox, count: usize) -> Self {
        let bend = noise.range(-BEND, BEND);
        let (mut at, mut heading) = ([0.0; 2], 0.0);
        let mut dashes = Vec::with_capacity(count);
        for _ in 0..count {
            let end = away(at, DASH, heading);
            dashes.push([at, end]);
            let turn = bend + noise.range(-JITTER, JITTER);
            at = away(end, GAP, heading + 0.5 * turn);
            heading += turn;
        }
        Self(dashes)
    }

    /// As [`Self::draw`], about `distance` from end to end, without meeting itself.
    fn spanning(noise: &mut Philox, count: usize, distance: f32) -> Self {
        loop {
            let dashes = Self::draw(noise, count);
            if (apart(dashes.start(), dashes.end()) - distance).abs() < NEAR && dashes.is_simple() {
                return dashes;
            }
        }
    }

    fn start(&self) -> Point {
        self.0.first().map_or([0.0; 2], |dash| dash[0])
    }

    fn end(&self) -> Point {
        self.0.last().map_or([0.0; 2], |dash| dash[1])
    }

    /// The direction in which the path leaves its start, or its end.
    fn leaves_start(&self) -> f32 {
        self.0.first().map_or(0.0, |dash| angle(dash[0], dash[1]))
    }

    /// Turned by `turn` around its start, which moves to `start`.
    fn placed(&self, start: Point, turn: f32) -> Self {
        let (from, (sin, cos)) = (self.start(), turn.sin_cos());
        let moved = |[x, y]: Point| {
            let (x, y) = (x - from[0], y - from[1]);
            [start[0] + cos * x - sin * y, start[1] + sin * x + cos * y]
        };
        Self(self.0.iter().map(|dash| dash.map(moved)).collect())
    }

    /// Points along a dash.
    fn points(dash: &[Point; 2]) -> [Point; 3] {
        let [a, b] = *dash;
        [a, [0.5 * (a[0] + b[0]), 0.5 * (a[1] + b[1])], b]
    }

    fn is_inside(&self) -> bool {
        self.0.iter().flatten().all(|point| is_inside(*point))
    }

    fn is_apart_from(&self, other: &Self) -> bool {
        let far = |a: &[Point; 2], b: &[Point; 2]| {
            let b = Self::points(b);
            Self::points(a)
                .iter()
                .all(|a| b.iter().all(|b| squared(*a, *b) >= APART * APART))
        };
        self.0.iter().all(|a| other.0.iter().all(|b| far(a, b)))
    }

    /// Whether a dot there would stand by itself.
    fn is_clear_of(&self, dot: Point) -> bool {
        let points = self.0.iter().flat_map(Self::points);
        points
            .into_iter()
            .all(|point| squared(point, dot) >= CLEAR * CLEAR)
    }

    /// Whether dashes keep apart that do not follow each other.
    fn is_simple(&self) -> bool {
        (2..self.0.len()).all(|at| {
            let before = Self(self.0[..at - 1].to_vec());
            before.is_apart_from(&Self(vec![self.0[at]]))
        })
    }
}

/// Paths: A from a0 to a1, B from b0 to b1, and the short ones.
struct Scene {
    paths: Vec<Dashes>,
}

impl Scene {
    /// A and B somewhere, with b0 as far from a1 as a0 is, and short paths between them; none where they do not fit.
    fn place(noise: &mut Philox, a: &Dashes, b: &Dashes, shorts: &[usize]) -> Option<Self> {
        const TRIES: usize = 40;
        const TRIES_OF_SHORT: usize = 200;
        let side = SIDE as f32;
        let anywhere = |noise: &mut Philox| [noise.range(0.0, side), noise.range(0.0, side)];
        let a = (0..TRIES).find_map(|_| {
            let placed = a.placed(anywhere(noise), noise.range(-PI, PI));
            placed.is_inside().then_some(placed)
        })?;
        // Under which angle A leaves a0, seen from the line to a1: B leaves b0 under about the same, to either side.
        let leaving = a.leaves_start() - angle(a.start(), a.end());
        let length = apart(a.start(), a.end());
        let middle = off_centre(a.start(), a.end());
        let b = (0..TRIES).find_map(|_| {
            let direction = angle(a.end(), a.start()) + noise.range(-SWING, SWING);
            let start = away(a.end(), length, direction);
            if !is_inside(start) || (off_centre(a.end(), start) - middle).abs() > ALIKE {
                return None;
            }
            let side = if noise.chance(0.5) { 1.0 } else { -1.0 };
            let leave = angle(start, a.end()) + side * leaving + noise.range(-LEAVE, LEAVE);
            let placed = b.placed(start, (leave - b.leaves_start()).rem_euclid(TAU));
            let fits = placed.is_inside()
                && placed.is_apart_from(&a)
                && placed.is_clear_of(a.start())
                && placed.is_clear_of(a.end())
                && a.is_clear_of(placed.start());
            fits.then_some(placed)
        })?;
        let dots = [a.start(), a.end(), b.start()];
        let mut paths = vec![a, b];
        for &count in shorts {
            let short = (0..TRIES_OF_SHORT).find_map(|_| {
                let placed = Dashes::draw(noise, count).placed(anywhere(noise), noise.range(-PI, PI));
                let fits = placed.is_inside()
                    && dots.iter().all(|&dot| placed.is_clear_of(dot))
                    && paths.iter().all(|path| placed.is_apart_from(path));
                fits.then_some(placed)
            })?;
            paths.push(short);
        }
        Some(Self { paths })
    }

    fn picture(&self, dots: [Point; 2]) -> Vec<u8> {
        let mut levels = vec![0f32; SIDE * SIDE];
        let mut paint = |[a, b]: [Point; 2], radius: f32, level: f32| {
            let reach = radius + 1.0;
            let range = |axis: usize| {
                let low = (a[axis].min(b[axis]) - reach).floor().max(0.0) as usize;
                let high = (a[axis].max(b[axis]) + reach).ceil().max(0.0) as usize;
                low..high.min(SIDE)
            };
            for y in range(1) {
                for x in range(0) {
                    let far = to_segment([x as f32 + 0.5, y as f32 + 0.5], a, b);
                    let cover = (radius + 0.5 - far).clamp(0.0, 1.0);
                    let at = &mut levels[y * SIDE + x];
                    *at = at.max(level * cover);
                }
            }
        };
        for dash in self.paths.iter().flat_map(|path| &path.0) {
            paint(*dash, HALF_WIDTH, DASH_LEVEL);
        }
        for dot in dots {
            paint([dot; 2], DOT, DOT_LEVEL);
        }
        levels.into_iter().map(|level| level.round() as u8).collect()
    }
}

/// From a point to a segment.
fn to_segment(point: Point, a: Point, b: Point) -> f32 {
    let along = [b[0] - a[0], b[1] - a[1]];
    let square = along[0] * along[0] + along[1] * along[1];
    let share = if square > 0.0 {
        (((point[0] - a[0]) * along[0] + (point[1] - a[1]) * along[1]) / square).clamp(0.0, 1.0)
    } else {
        0.0
    };
    apart(point, [a[0] + share * along[0], a[1] + share * along[1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Grey levels above this belong to a path that a flood may follow over its gaps.
    const LIT: u8 = 60;
    /// Pixels that a flood jumps: more than a gap, less than the space between paths.
    const JUMP: f32 = 2.3;

    /// Whether a flood from one dot over lit pixels, jumping gaps, comes to the other.
    fn flood_connects(example: &Example) -> bool {
        let lit: Vec<Point> = (0..SIDE * SIDE)
            .filter(|&at| example.pixels[at] > LIT)
            .map(|at| [(at % SIDE) as f32 + 0.5, (at / SIDE) as f32 + 0.5])
            .collect();
        let mut reached = vec![false; lit.len()];
        let near = |point: Point, dot: Point| apart(point, dot) < DOT;
        let mut open: Vec<usize> = (0..lit.len())
            .filter(|&at| near(lit[at], example.dots[0]))
            .collect();
        while let Some(at) = open.pop() {
            if std::mem::replace(&mut reached[at], true) {
                continue;
            }
            if near(lit[at], example.dots[1]) {
                return true;
            }
            open.extend((0..lit.len()).filter(|&next| !reached[next] && apart(lit[at], lit[next]) < JUMP));
        }
        false
    }

    /// The label is what following the dashes finds, by a flood that knows nothing of paths.
    #[test]
    fn labels_are_what_following_the_dashes_finds() {
        let wrong: Vec<u64> = (0..1000)
            .filter(|&index| {
                let example = example(1, index);
                flood_connects(&example) != example.connected
            })
            .collect();
        // A flood can leap to a neighbour where pixels of two paths come close.
        assert!(wrong.len() < 30, "{} of 1000: {wrong:?}", wrong.len());
    }

    /// The share of right answers of the best threshold on a figure, between 0.5 and 1.
    fn best_threshold(of: &[(f64, bool)]) -> f64 {
        let mut of = of.to_vec();
        of.sort_by(|a, b| a.0.total_cmp(&b.0));
        let positives = of.iter().filter(|(_, label)| *label).count() as f64;
        let (mut right, mut best) = (positives, 0.5f64);
        let all = of.len() as f64;
        for (_, label) in of {
            right += if label { -1.0 } else { 1.0 };
            best = best.max(right / all).max(1.0 - right / all);
        }
        best
    }

    /// No figure that needs no path tells the classes apart, and both are equally many.
    #[test]
    fn simple_figures_do_not_tell_the_classes_apart() {
        const COUNT: u64 = 4000;
        type Figure = fn(&Example) -> f64;
        let bright: Figure = |example| example.pixels.iter().filter(|&&level| level > 127).count() as f64;
        let sum: Figure = |example| example.pixels.iter().map(|&level| f64::from(level)).sum();
        let distance: Figure = |example| f64::from(apart(example.dots[0], example.dots[1]));
        let middle: Figure = |example| {
            let [a, b] = example.dots;
            f64::from(apart([0.5 * (a[0] + b[0]), 0.5 * (a[1] + b[1])], [16.0; 2]))
        };
        let border: Figure = |example| {
            let sides = example.dots.iter().flatten().map(|&at| at.min(32.0 - at));
            f64::from(sides.fold(f32::MAX, f32::min))
        };
        let examples: Vec<Example> = (0..COUNT).map(|index| example(2, index)).collect();
        let connected = examples.iter().filter(|example| example.connected).count() as u64;
        assert_eq!(connected, COUNT / 2);
        for (name, figure, most) in [
            ("bright pixels", bright, 0.53),
            ("brightness", sum, 0.53),
            ("distance of dots", distance, 0.53),
            ("middle of dots", middle, 0.56),
            ("dots and border", border, 0.56),
        ] {
            let figures: Vec<(f64, bool)> = examples
                .iter()
                .map(|example| (figure(example), example.connected))
                .collect();
            let best = best_threshold(&figures);
            assert!(best < most, "{name}: {best}");
        }
    }

    #[test]
    fn the_best_threshold_finds_what_there_is() {
        let of = |pairs: &[(f64, bool)]| best_threshold(pairs);
        assert_eq!(of(&[(1.0, true), (2.0, true), (3.0, false), (4.0, false)]), 1.0);
        assert_eq!(of(&[(1.0, false), (2.0, true), (3.0, false), (4.0, true)]), 0.75);
    }

    #[test]
    fn examples_are_functions_of_seed_and_index() {
        let one = example(1, 5);
        assert_eq!(one.pixels.len(), SIDE * SIDE);
        assert_eq!(one, example(1, 5));
        assert_ne!(one.pixels, example(1, 7).pixels);
        assert_ne!(one.pixels, example(2, 5).pixels);
        assert!(!one.connected && example(1, 6).connected);
    }
}
