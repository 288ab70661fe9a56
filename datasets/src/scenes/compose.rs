//! Composing scenes: every choice is drawn from the generator of (seed, split, index), in a fixed order.

use fulgur_kernels::philox::{Philox, stream_of};

use super::backdrop::{Backdrop, Pictures};
use super::caption::{self, Told, Wording};
use super::motion::{Motion, Place, Side};
use super::render;
use super::sound;
use super::splits::{Split, is_held_out};
use super::{Actor, Options, Scene, SceneError, Timing};
use crate::media::Picture;
use crate::things::{MAX_SOUND, Thing, Things};

/// Size of the longer side, in pixels of a frame of 96: of one thing, of each of two.
const SIZES: [(f64, f64); 2] = [(38.0, 54.0), (28.0, 38.0)];
/// Middle of the places left, middle and right, in pixels of a frame of 96.
const PLACES: [f64; 3] = [26.0, 48.0, 70.0];
/// How far from the middle of its place a thing ends: one thing, each of two.
const SCATTER: [f64; 2] = [4.0, 2.0];
/// Where a thing ends that may end anywhere, in pixels of a frame of 96.
const ANYWHERE: (f64, f64) = (32.0, 64.0);
/// Lower edge at rest, in pixels of a frame of 96: on the ground, and for what appears, rises or comes closer.
const GROUND: (f64, f64) = (82.0, 92.0);
const AIR: (f64, f64) = (62.0, 90.0);
/// How far the floor begins above the lower edge of the things.
const FLOOR_RISE: f64 = 3.0;
/// Share of grounded scenes with a floor.
const FLOOR_SHARE: f32 = 0.6;
/// Share of scenes with one thing that say no time, and that say the place where the motion does not.
const TIME_UNSAID: f32 = 0.3;
const PLACE_SAID: f32 = 0.5;
/// Share of scenes with two things that say both times.
const BOTH_TIMES_SAID: f32 = 0.5;
/// Level of a sound in dB relative to its recording; the judge's two ranges lie outside the others'.
const LEVELS: (f32, f32) = (-5.0, 3.0);
const JUDGE_LEVELS: [(f32, f32); 2] = [(-10.0, -5.5), (3.2, 4.5)];
/// How much quieter each of two sounds is, in dB.
const TWO_SOUNDS: f32 = -3.0;
/// Speed of a sound; the judge's two ranges lie outside the others'.
const RATES: (f32, f32) = (0.97, 1.03);
const JUDGE_RATES: [(f32, f32); 2] = [(0.95, 0.968), (1.032, 1.05)];
/// Tilt of a thing in the judge's scenes, in radians, to either side; upright elsewhere.
const JUDGE_TILT: (f32, f32) = (0.05, 0.17);
/// Level of the background noise, in dB of full scale.
const NOISE: (f32, f32) = (-66.0, -58.0);
/// Tries to find a second thing that differs from the first.
const SECOND_TRIES: usize = 64;
/// Index of the first held-out prompt, beyond every index that training counts to.
const FIRST_PROMPT: u64 = 1 << 48;

/// A thing and a motion, as positions.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Combination {
    thing: usize,
    motion: Motion,
}

/// The combinations that a split may use: of one thing, and of one that stays left or right.
#[derive(Default)]
struct Combinations {
    all: Vec<Combination>,
    sides: [Vec<Combination>; 2],
}

/// Draws scenes and renders them.
pub struct Composer {
    pub(super) things: Things,
    pub(super) options: Options,
    pub(super) pictures: Pictures,
    familiar: Combinations,
    held_out: Combinations,
}

/// Pixels of the clip for one pixel of a frame of 96 by 96: across, down, and in size.
#[derive(Clone, Copy)]
pub(super) struct Scale {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) size: f64,
}

impl Composer {
    /// A composer of scenes of `things` before `pictures` (RGB; every fourth is for [`Split::Judge`] alone).
    ///
    /// # Errors
    /// No things, a thing without sound or with a cut-out of the wrong length, options outside their range, or
    /// motions that leave one of the splits empty.
    pub fn new(mut things: Things, pictures: &[Picture], options: Options) -> Result<Self, SceneError> {
        options.clip.check()?;
        let wrong = |field, found: String, expected: &str| SceneError::Option {
            field,
            found,
            expected: expected.to_owned(),
        };
        for (field, share) in [("two_things", options.two_things), ("pictures", options.pictures)] {
            if !(0.0..=1.0).contains(&share) {
                return Err(wrong(field, share.to_string(), "0 to 1"));
            }
        }
        things.iter().try_for_each(check_thing)?;
        for thing in &mut things.0 {
            sound::start_at_onset(&mut thing.sound);
        }
        let (mut familiar, mut held_out) = (Combinations::default(), Combinations::default());
        for (position, thing) in things.iter().enumerate() {
            for &motion in &options.motions {
                let held = is_held_out(&thing.id, motion);
                let lists = if held { &mut held_out } else { &mut familiar };
                lists.add(Combination {
                    thing: position,
                    motion,
                });
            }
        }
        for (field, lists) in [("things", &familiar), ("motions", &held_out)] {
            if lists.all.is_empty() {
                let found = format!("{} things, {} motions", things.len(), options.motions.len());
                return Err(wrong(field, found, "combinations for every split"));
            }
        }
        let pictures = Pictures::new(pictures, &options.clip)?;
        Ok(Self {
            things,
            options,
            pictures,
            familiar,
            held_out,
        })
    }

    /// The things, their sounds cut to begin at the audible onset.
    pub fn things(&self) -> &Things {
        &self.things
    }

    /// The options.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Scene `index` of `split`.
    pub fn scene(&self, split: Split, index: u64) -> Scene {
        let mut random = self.random(split, index);
        let lists = match split {
            Split::HeldOutCombination => &self.held_out,
            _ => &self.familiar,
        };
        let both = random.chance(self.options.two_things);
        let pair = if both { lists.pair(&mut random) } else { None };
        match pair {
            Some(pair) => self.compose(split, index, &pair, random),
            None => {
                let one = lists.all[random.below(lists.all.len())];
                self.compose(split, index, &[one], random)
            }
        }
    }

    /// `n` prompts for judging, as scenes of [`Split::HeldOutCombination`] with one thing each: the prompt is
    /// `caption.text`, the facts are in `actors`, and rendering a scene gives the real clip of its prompt.
    ///
    /// All held-out pairs of thing and motion take turns, in an order drawn from the seed; prompt `i` is the same
    /// for every `n`.
    pub fn held_out_prompts(&self, n: usize) -> Vec<Scene> {
        let lists = &self.held_out.all;
        let order = Philox::named(self.options.seed, "held-out prompts").permutation(lists.len());
        (0..n)
            .map(|i| {
                let (split, index) = (Split::HeldOutCombination, FIRST_PROMPT + i as u64);
                let one = lists[order[i % order.len()]];
                self.compose(split, index, &[one], self.random(split, index))
            })
            .collect()
    }

    pub(super) fn scale(&self) -> Scale {
        let (x, y) = (
            self.options.clip.width as f64 / 96.0,
            self.options.clip.height as f64 / 96.0,
        );
        Scale { x, y, size: x.min(y) }
    }

    fn random(&self, split: Split, index: u64) -> Philox {
        Philox::new(self.options.seed ^ stream_of(split.name()), index)
    }

    fn compose(&self, split: Split, index: u64, chosen: &[Combination], mut random: Philox) -> Scene {
        let random = &mut random;
        let grounded = chosen.iter().all(|one| one.motion.is_grounded());
        let landing = chosen.iter().any(|one| one.motion.is_grounded());
        let (low, high) = if landing { GROUND } else { AIR };
        let ground = between(random, low, high);
        let timings = self.timings(chosen.len(), random);
        let mut actors: Vec<Actor> = chosen
            .iter()
            .zip(timings)
            .enumerate()
            .map(|(slot, (&one, timing))| {
                let side = (chosen.len() == 2).then_some([Place::Left, Place::Right][slot]);
                self.actor(split, one, side, timing, ground, random)
            })
            .collect();
        actors.sort_by(|a, b| a.contact_s.total_cmp(&b.contact_s));
        let floor = (random.chance(FLOOR_SHARE) && grounded).then(|| {
            let nearest = actors.iter().map(|actor| actor.y).fold(f64::INFINITY, f64::min);
            nearest - FLOOR_RISE * self.scale().y
        });
        let backdrop = Backdrop::draw(split, &self.pictures, self.options.pictures, floor, random);
        let noise = decibels(random.range(NOISE.0, NOISE.1));
        let noise_seed = random.next_u64();
        let wording = match split {
            Split::HeldOutWording => Wording::Reserved,
            _ => Wording::Familiar,
        };
        let told: Vec<Told<'_>> = actors
            .iter()
            .enumerate()
            .map(|(position, actor)| Told::of(actor, position, &self.things[actor.thing].words))
            .collect();
        let caption = caption::write(&told, wording, random);
        Scene {
            seed: self.options.seed,
            split,
            index,
            actors,
            backdrop,
            noise,
            noise_seed,
            caption,
        }
    }

    /// What is said about the time of each thing, and the instant of its first sound in seconds.
    fn timings(&self, things: usize, random: &mut Philox) -> Vec<(Timing, f64)> {
        let duration_s = self.options.clip.duration_s;
        let instant = |timing: Timing, random: &mut Philox| {
            let (low, high) = timing.range(duration_s);
            between(random, low, high)
        };
        let said = [Timing::Start, Timing::Halfway, Timing::End];
        if things == 1 {
            let unsaid = random.chance(TIME_UNSAID);
            let part = said[random.below(said.len())];
            let timing = if unsaid { Timing::Unsaid } else { part };
            return vec![(timing, instant(timing, random))];
        }
        // Two different parts of the clip, so that the two sounds can be told apart.
        let left_out = random.below(said.len());
        let mut parts: Vec<Timing> = said.into_iter().filter(|&part| part != said[left_out]).collect();
        if random.chance(0.5) {
            parts.reverse();
        }
        let both_said = random.chance(BOTH_TIMES_SAID);
        parts
            .into_iter()
            .map(|part| {
                (
                    if both_said { part } else { Timing::Unsaid },
                    instant(part, random),
                )
            })
            .collect()
    }

    fn actor(
        &self,
        split: Split,
        one: Combination,
        side: Option<Place>,
        (timing, contact_s): (Timing, f64),
        ground: f64,
        random: &mut Philox,
    ) -> Actor {
        let scale = self.scale();
        let (alone, judge) = (usize::from(side.is_some()), split == Split::Judge);
        let spot = [Place::Left, Place::Middle, Place::Right][random.below(3)];
        let said = random.chance(PLACE_SAID);
        let (within, anywhere) = (random.range(-1.0, 1.0), between(random, ANYWHERE.0, ANYWHERE.1));
        let free = one.motion.is_free();
        let fixed = side.or(one.motion.place()).or((free && said).then_some(spot));
        let at = match fixed {
            None if free => anywhere,
            place => PLACES[place.map_or(1, |place| place as usize)] + SCATTER[alone] * f64::from(within),
        };
        let size = between(random, SIZES[alone].0, SIZES[alone].1) * scale.size;
        let lower = ground
            + if side.is_some() {
                between(random, -1.5, 1.5)
            } else {
                0.0
            };
        let mirrored = random.chance(0.5);
        let outside = random.below(2);
        let (level, rate, tilt) = if judge {
            let ((low, high), (slow, fast)) = (JUDGE_LEVELS[outside], JUDGE_RATES[random.below(2)]);
            let tilt = random.range(JUDGE_TILT.0, JUDGE_TILT.1);
            let tilt = if random.chance(0.5) { tilt } else { -tilt };
            (random.range(low, high), random.range(slow, fast), tilt)
        } else {
            (
                random.range(LEVELS.0, LEVELS.1),
                random.range(RATES.0, RATES.1),
                0.0,
            )
        };
        let level = level + if side.is_some() { TWO_SOUNDS } else { 0.0 };
        let mut actor = Actor {
            thing: one.thing,
            id: self.things[one.thing].id.clone(),
            motion: one.motion,
            place: fixed.unwrap_or(match at {
                x if x < 40.0 => Place::Left,
                x if x > 56.0 => Place::Right,
                _ => Place::Middle,
            }),
            place_said: one.motion.place().is_some() || (free && said),
            timing,
            contact_s,
            hits: one.motion.hits(contact_s, self.options.clip.duration_s),
            x: at * scale.x,
            y: lower * scale.y,
            size,
            mirrored,
            tilt: f64::from(tilt),
            rate: f64::from(rate),
            gain: decibels(level),
            boxes: Vec::new(),
        };
        actor.boxes = render::boxes(&actor, &self.things[one.thing], self);
        actor
    }
}

impl Combinations {
    fn add(&mut self, one: Combination) {
        self.all.push(one);
        let (place, side) = (one.motion.place(), one.motion.side());
        if one.motion.is_free() || place == Some(Place::Left) || side == Some(Side::Left) {
            self.sides[0].push(one);
        }
        if one.motion.is_free() || place == Some(Place::Right) || side == Some(Side::Right) {
            self.sides[1].push(one);
        }
    }

    /// One that stays left and another thing that stays right, if there are two.
    fn pair(&self, random: &mut Philox) -> Option<[Combination; 2]> {
        let [left, right] = &self.sides;
        if left.is_empty() || right.is_empty() {
            return None;
        }
        let first = left[random.below(left.len())];
        (0..SECOND_TRIES)
            .map(|_| right[random.below(right.len())])
            .find(|second| second.thing != first.thing)
            .map(|second| [first, second])
    }
}

fn between(random: &mut Philox, low: f64, high: f64) -> f64 {
    low + (high - low) * f64::from(random.uniform())
}

fn decibels(level: f32) -> f32 {
    10f32.powf(level / 20.0)
}

fn check_thing(thing: &Thing) -> Result<(), SceneError> {
    let wrong = |field, found: String, expected| {
        Err(SceneError::Thing {
            id: thing.id.clone(),
            field,
            found,
            expected,
        })
    };
    let cutout = &thing.cutout;
    let area = cutout.width as usize * cutout.height as usize;
    if area == 0 || cutout.rgba.len() != 4 * area {
        let found = format!(
            "{}x{} with {} bytes",
            cutout.width,
            cutout.height,
            cutout.rgba.len()
        );
        return wrong("cutout", found, "4 bytes a pixel, more than none");
    }
    if !(1..=MAX_SOUND).contains(&thing.sound.len()) {
        return wrong(
            "sound",
            format!("{} samples", thing.sound.len()),
            "1 to 32000 samples",
        );
    }
    if !thing.sound.iter().all(|x| x.is_finite()) {
        return wrong("sound", "a sample that is no number".to_owned(), "finite samples");
    }
    Ok(())
}
