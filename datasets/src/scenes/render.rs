//! Rendering the picture of a scene: the backdrop once, then in every frame only the boxes of the things.
//!
//! A cut-out is first reduced to the size that it has at rest by area averaging, then sampled bilinearly at
//! sub-pixel positions from there, or from a further halved copy where it is drawn much smaller, so that edges stay
//! smooth and motion is even. A frame in which nothing has moved visibly is a copy of the one before.

use super::compose::Composer;
use super::sprite::{Row, Scratch, Sprite, Texel};
use super::{Actor, PixelBox, Scene};
use crate::things::{Cutout, SOUND_RATE, Thing};

/// Copies are halved until a thing is drawn at no less than this share of its copy's size.
const SMALLEST_SHARE: f64 = 0.7;
/// Number of copies, the first included.
const COPIES: usize = 3;
/// Half axes of a contact shadow relative to the width and height of its thing, and its darkness.
const SHADOW: (f64, f64, f32) = (0.46, 0.055, 0.42);
/// Height above the ground at which a shadow has gone, in pixels of a frame of 96.
const SHADOW_HEIGHT: f64 = 40.0;
/// What moves, turns or grows by less than this, in pixels, is not drawn anew: the sharpest edge would change by a
/// quarter of a level of 255.
const STILL: f64 = 1.0 / 1024.0;

/// Where a thing is drawn at one instant.
#[derive(Clone, Copy)]
struct Pose {
    /// Middle of the lower edge.
    x: f64,
    y: f64,
    width: f64,
    height: f64,
    angle: f64,
    visible: bool,
    copy: usize,
}

/// What is seen of a thing in one frame.
#[derive(Clone, Copy)]
struct Look {
    pose: Pose,
    area: Option<PixelBox>,
    /// Share of light that the middle of its shadow takes.
    darkness: f32,
}

impl Look {
    /// True where a frame with either look is the same picture.
    fn is_like(&self, other: &Self) -> bool {
        if self.area != other.area {
            return false;
        }
        if self.area.is_none() && self.darkness == 0.0 && other.darkness == 0.0 {
            return true;
        }
        let (a, b) = (&self.pose, &other.pose);
        let turned = (a.angle - b.angle) * a.width.max(a.height);
        let differences = [
            a.x - b.x,
            a.y - b.y,
            a.width - b.width,
            a.height - b.height,
            turned,
        ];
        let darkness = f64::from(self.darkness - other.darkness);
        a.copy == b.copy
            && darkness.abs() < STILL
            && differences.iter().all(|difference| difference.abs() < STILL)
    }
}

/// A cut-out at its size at rest and halved, as far as was asked for.
struct Copies {
    sizes: [(usize, usize); COPIES],
    sprites: Vec<Sprite>,
}

impl Copies {
    fn new(actor: &Actor, cutout: &Cutout) -> Self {
        let sizes: [_; COPIES] = std::array::from_fn(|copy| copy_size(actor, cutout, copy));
        let sprites = vec![Sprite::of_cutout(cutout, actor.mirrored, sizes[0])];
        Self { sizes, sprites }
    }

    fn get(&mut self, copy: usize) -> &Sprite {
        while self.sprites.len() <= copy {
            let have = self.sprites.len();
            self.sprites.push(self.sprites[have - 1].halved(self.sizes[have]));
        }
        &self.sprites[copy]
    }
}

/// Size of a cut-out at rest, width and height.
fn rest_size(actor: &Actor, cutout: &Cutout) -> (f64, f64) {
    let longer = f64::from(cutout.width.max(cutout.height));
    (
        actor.size * f64::from(cutout.width) / longer,
        actor.size * f64::from(cutout.height) / longer,
    )
}

/// Size of copy number `copy`, in pixels: the size at rest or the cut-out's own, whichever is smaller, halved.
fn copy_size(actor: &Actor, cutout: &Cutout, copy: usize) -> (usize, usize) {
    let (width, height) = rest_size(actor, cutout);
    let side = |rest: f64, own: u32| {
        let whole = (rest.ceil() as usize).clamp(1, own as usize);
        (0..copy).fold(whole, |side, _| side.div_ceil(2))
    };
    (side(width, cutout.width), side(height, cutout.height))
}

fn pose(actor: &Actor, thing: &Thing, composer: &Composer, time: f64) -> Pose {
    let scale = composer.scale();
    let sounds_s = thing.sound.len() as f64 / f64::from(SOUND_RATE) / actor.rate;
    let offset = actor.motion.offset(time - actor.contact_s, sounds_s);
    let (width, height) = rest_size(actor, &thing.cutout);
    let mut copy = 0;
    let mut share = offset.sx;
    while share < SMALLEST_SHARE && copy + 1 < COPIES {
        share *= 2.0;
        copy += 1;
    }
    Pose {
        x: actor.x + offset.dx * scale.x,
        y: actor.y + offset.dy * scale.y,
        width: width * offset.sx,
        height: height * offset.sy,
        angle: actor.tilt + offset.angle,
        visible: offset.visible,
        copy,
    }
}

/// The pixels of the clip whose middle lies in the turned rectangle of the pose, widened by half a texel.
fn bounds(pose: &Pose, texels: (usize, usize), composer: &Composer) -> Option<PixelBox> {
    if !pose.visible {
        return None;
    }
    let (sin, cos) = pose.angle.sin_cos();
    let across = 0.5 * pose.width * (1.0 + 1.0 / texels.0 as f64);
    let down = 0.5 * pose.height / texels.1 as f64;
    let corners = [
        (-across, -pose.height - down),
        (across, -pose.height - down),
        (-across, down),
        (across, down),
    ];
    let turned = corners.map(|(u, v)| (pose.x + u * cos - v * sin, pose.y + u * sin + v * cos));
    let span = |values: [f64; 4], size: usize| {
        let low = values.into_iter().fold(f64::INFINITY, f64::min);
        let high = values.into_iter().fold(f64::NEG_INFINITY, f64::max);
        let first = (low - 0.5).ceil().clamp(0.0, size as f64) as usize;
        let end = (high + 0.5).floor().clamp(0.0, size as f64) as usize;
        (first, end)
    };
    let clip = &composer.options.clip;
    let (x0, x1) = span(turned.map(|corner| corner.0), clip.width);
    let (y0, y1) = span(turned.map(|corner| corner.1), clip.height);
    (x0 < x1 && y0 < y1).then_some(PixelBox { x0, y0, x1, y1 })
}

/// The box of `actor` in every frame.
pub(super) fn boxes(actor: &Actor, thing: &Thing, composer: &Composer) -> Vec<Option<PixelBox>> {
    let clip = &composer.options.clip;
    let sizes: [_; COPIES] = std::array::from_fn(|copy| copy_size(actor, &thing.cutout, copy));
    (0..clip.frames())
        .map(|frame| {
            let pose = pose(actor, thing, composer, clip.frame_time(frame));
            bounds(&pose, sizes[pose.copy], composer)
        })
        .collect()
}

/// The rows of `area` in texels of a sprite in `pose`.
fn rows(sprite: &Sprite, pose: &Pose, area: &PixelBox) -> impl Iterator<Item = Row> {
    let (sin, cos) = pose.angle.sin_cos();
    let (width, height) = (sprite.width as f64, sprite.height as f64);
    let (across, down) = (width / pose.width, height / pose.height);
    let (x, y, left) = (pose.x, pose.y, area.x0 as f64);
    (area.y0..area.y1).map(move |row| {
        let (dx, dy) = (left + 0.5 - x, row as f64 + 0.5 - y);
        Row {
            first: [
                ((dx * cos + dy * sin) * across + 0.5 * width) as f32,
                ((dy * cos - dx * sin) * down + height) as f32,
            ],
            step: [(cos * across) as f32, (-sin * down) as f32],
        }
    })
}

/// A value of 0..255 as the nearest whole number.
#[inline]
fn byte(value: f32) -> u8 {
    // At 2^23 the last bit of the mantissa counts ones. Adding rounds to it, and four values go in one operation,
    // which conversions with their special cases do not.
    (value + 8_388_608.0).to_bits() as u8
}

/// Draws a line of premultiplied texels over RGB bytes.
fn draw_over(pixels: &mut [u8], line: &[Texel]) {
    let (pixels, _) = pixels.as_chunks_mut::<3>();
    for (pixel, &[r, g, b, coverage]) in pixels.iter_mut().zip(line) {
        if coverage > 0.0 {
            let behind = 1.0 - coverage * (1.0 / 255.0);
            let [old_r, old_g, old_b] = pixel.map(f32::from);
            *pixel = [
                byte(r + behind * old_r),
                byte(g + behind * old_g),
                byte(b + behind * old_b),
            ];
        }
    }
}

/// Adds the coverage of a line of texels to coverage in bytes.
fn cover(covered: &mut [u8], line: &[Texel]) {
    for (covered, [.., coverage]) in covered.iter_mut().zip(line) {
        *covered = byte(coverage + (1.0 - coverage * (1.0 / 255.0)) * f32::from(*covered));
    }
}

impl Composer {
    /// The picture of `scene`: RGB bytes [frames, height, width, 3].
    pub fn render_frames(&self, scene: &Scene) -> Vec<u8> {
        let backdrop = scene.backdrop.paint(&self.pictures, &self.options.clip);
        self.film(scene, &backdrop, scene.backdrop.floor.is_some(), draw_over)
    }

    /// How much of each pixel things cover: bytes [frames, height, width], 255 where covered wholly.
    pub fn render_mask(&self, scene: &Scene) -> Vec<u8> {
        let clip = &self.options.clip;
        self.film(scene, &vec![0; clip.width * clip.height], false, cover)
    }

    /// `empty` once for every frame, with the things drawn in by `blend`, line by line and in drawing order.
    fn film(
        &self,
        scene: &Scene,
        empty: &[u8],
        shadows: bool,
        blend: impl Fn(&mut [u8], &[Texel]),
    ) -> Vec<u8> {
        let clip = &self.options.clip;
        let channels = empty.len() / (clip.width * clip.height);
        let copies = |actor| Copies::new(actor, &self.things[actor.thing].cutout);
        let mut things: Vec<Copies> = scene.actors.iter().map(copies).collect();
        let mut scratch = Scratch::default();
        let (mut drawn, mut looks) = (Vec::new(), Vec::new());
        let mut frames = Vec::with_capacity(clip.frames() * empty.len());
        for frame in 0..clip.frames() {
            looks.clear();
            looks.extend(scene.actors.iter().map(|actor| self.look(actor, frame, shadows)));
            // Compared with the last frame that was drawn, not copied: slow motion is not held back.
            let still = |(now, then): (&Look, &Look)| now.is_like(then);
            if frame > 0 && looks.iter().zip(&drawn).all(still) {
                frames.extend_from_within(frames.len() - empty.len()..);
                continue;
            }
            frames.extend_from_slice(empty);
            let pixels = &mut frames[frame * empty.len()..];
            for (actor, look) in scene.actors.iter().zip(&looks) {
                self.shade(actor, look, pixels);
            }
            for (copies, look) in things.iter_mut().zip(&looks) {
                let Some(area) = &look.area else { continue };
                let sprite = copies.get(look.pose.copy);
                let rows = rows(sprite, &look.pose, area);
                sprite.lines(rows, area.x1 - area.x0, &mut scratch, |row, line| {
                    let start = (area.y0 + row) * clip.width + area.x0;
                    blend(
                        &mut pixels[channels * start..channels * (start + line.len())],
                        line,
                    );
                });
            }
            std::mem::swap(&mut drawn, &mut looks);
        }
        frames
    }

    fn look(&self, actor: &Actor, frame: usize, shadows: bool) -> Look {
        let pose = pose(
            actor,
            &self.things[actor.thing],
            self,
            self.options.clip.frame_time(frame),
        );
        let nearness = 1.0 - (actor.y - pose.y) / (SHADOW_HEIGHT * self.scale().y);
        let darkness = if shadows && pose.visible {
            SHADOW.2 * nearness.max(0.0) as f32
        } else {
            0.0
        };
        Look {
            pose,
            area: actor.boxes[frame],
            darkness,
        }
    }

    /// Darkens the floor below a thing, the more the nearer it is.
    fn shade(&self, actor: &Actor, look: &Look, rgb: &mut [u8]) {
        if look.darkness == 0.0 {
            return;
        }
        let (clip, middle) = (&self.options.clip, look.pose.x);
        let (across, down) = shadow_axes(actor, &self.things[actor.thing].cutout);
        let range = |middle: f64, half: f64, size: usize| {
            let low = (middle - half).floor().clamp(0.0, size as f64);
            low as usize..(middle + half).ceil().clamp(low, size as f64) as usize
        };
        for y in range(actor.y, down, clip.height) {
            let v = (y as f64 + 0.5 - actor.y) / down;
            for x in range(middle, across, clip.width) {
                let u = (x as f64 + 0.5 - middle) / across;
                let inside = (1.0 - u * u - v * v).max(0.0) as f32;
                let light = 1.0 - look.darkness * inside;
                let at = 3 * (y * clip.width + x);
                for part in &mut rgb[at..at + 3] {
                    *part = byte(light * f32::from(*part));
                }
            }
        }
    }
}

/// Half axes of the shadow of a thing.
fn shadow_axes(actor: &Actor, cutout: &Cutout) -> (f64, f64) {
    let (width, height) = rest_size(actor, cutout);
    (SHADOW.0 * width, (SHADOW.1 * height).max(0.03 * actor.size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_copied_only_where_nothing_moves_visibly() {
        let look = Look {
            pose: Pose {
                x: 40.0,
                y: 80.0,
                width: 30.0,
                height: 50.0,
                angle: 0.0,
                visible: true,
                copy: 0,
            },
            area: Some(PixelBox {
                x0: 25,
                y0: 30,
                x1: 55,
                y1: 80,
            }),
            darkness: 0.2,
        };
        assert!(look.is_like(&look));
        let changes: [fn(&mut Look, f64); 6] = [
            |look, by| look.pose.x += by,
            |look, by| look.pose.y += by,
            |look, by| look.pose.width += by,
            |look, by| look.pose.height -= by,
            |look, by| look.pose.angle += by / 50.0,
            |look, by| look.darkness += by as f32,
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let (mut little, mut much) = (look, look);
            change(&mut little, 0.9 * STILL);
            change(&mut much, 1.1 * STILL);
            assert!(look.is_like(&little) && !look.is_like(&much), "change {number}");
        }
        // What is not seen may move; its box tells it from what is.
        let (mut unseen, mut elsewhere) = (look, look);
        (unseen.area, unseen.darkness) = (None, 0.0);
        (elsewhere.area, elsewhere.darkness, elsewhere.pose.x) = (None, 0.0, -90.0);
        assert!(unseen.is_like(&elsewhere) && !unseen.is_like(&look));
    }
}
