//! Rendering the picture of a scene: the backdrop once, then in every frame only the boxes of the things.
//!
//! A cut-out is first reduced to the size that it has at rest by area averaging, then sampled bilinearly at
//! sub-pixel positions from there, or from a further halved copy where it is drawn much smaller, so that edges stay
//! smooth and motion is even. Colours are premultiplied: outside a cut-out is transparent black.

use super::compose::Composer;
use super::{Actor, PixelBox, Scene};
use crate::things::{Cutout, SOUND_RATE, Thing};

/// Copies are halved until a thing is drawn at no less than this share of its copy's size.
const SMALLEST_SHARE: f64 = 0.7;
/// Number of copies, the first included.
const COPIES: usize = 3;
/// Transparent pixels around a sprite, before and after together.
const BORDER: usize = 3;
/// Half axes of a contact shadow relative to the width and height of its thing, and its darkness.
const SHADOW: (f64, f64, f32) = (0.46, 0.055, 0.42);
/// Height above the ground at which a shadow has gone, in pixels of a frame of 96.
const SHADOW_HEIGHT: f64 = 40.0;

/// A picture with a transparent border, one pixel before and two after: red, green, blue and coverage in 0..255,
/// premultiplied.
struct Sprite {
    width: usize,
    height: usize,
    /// Row-major texels, `(height + BORDER) * (width + BORDER)` of them.
    texels: Vec<[f32; 4]>,
}

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
    /// `source` [from_height, from_width] averaged to `width` by `height`, with a border.
    fn reduced(
        source: impl Fn(usize, usize) -> [f32; 4],
        (from_width, from_height): (usize, usize),
        (width, height): (usize, usize),
    ) -> Self {
        let columns = shares(from_width, width);
        let rows: Vec<Vec<[f32; 4]>> = (0..from_height)
            .map(|y| {
                let average = |(first, parts): &(usize, Vec<f32>)| {
                    weighted(
                        parts
                            .iter()
                            .enumerate()
                            .map(|(i, &part)| (part, source(first + i, y))),
                    )
                };
                columns.iter().map(average).collect()
            })
            .collect();
        let mut texels = vec![[0.0; 4]; (width + BORDER) * (height + BORDER)];
        for (y, (first, parts)) in shares(from_height, height).iter().enumerate() {
            for x in 0..width {
                texels[(y + 1) * (width + BORDER) + x + 1] = weighted(
                    parts
                        .iter()
                        .enumerate()
                        .map(|(i, &part)| (part, rows[first + i][x])),
                );
            }
        }
        Self {
            width,
            height,
            texels,
        }
    }

    fn of_cutout(cutout: &Cutout, mirrored: bool, size: (usize, usize)) -> Self {
        let (width, height) = (cutout.width as usize, cutout.height as usize);
        let texel = |x: usize, y: usize| {
            let x = if mirrored { width - 1 - x } else { x };
            let at = 4 * (y * width + x);
            std::array::from_fn(|c| f32::from(cutout.rgba[at + c]))
        };
        Self::reduced(texel, (width, height), size)
    }

    fn halved(&self, size: (usize, usize)) -> Self {
        let texel = |x: usize, y: usize| self.texels[(y + 1) * (self.width + BORDER) + x + 1];
        Self::reduced(texel, (self.width, self.height), size)
    }

    /// The bilinear value at (x, y), in texels from the upper left corner of the border's inside.
    #[inline]
    fn sample(&self, x: f32, y: f32) -> [f32; 4] {
        // Shifted by the border's width less half a texel; beyond the border everything is transparent.
        let x = (x + 0.5).clamp(0.0, (self.width + 1) as f32);
        let y = (y + 0.5).clamp(0.0, (self.height + 1) as f32);
        let (column, row) = (x as usize, y as usize);
        let (s, t) = (x - column as f32, y - row as f32);
        let at = row * (self.width + BORDER) + column;
        let (a, b) = (self.texels[at], self.texels[at + 1]);
        let (c, d) = (
            self.texels[at + self.width + BORDER],
            self.texels[at + self.width + BORDER + 1],
        );
        std::array::from_fn(|i| {
            let upper = a[i] + (b[i] - a[i]) * s;
            let lower = c[i] + (d[i] - c[i]) * s;
            upper + (lower - upper) * t
        })
    }
}

fn weighted(parts: impl Iterator<Item = (f32, [f32; 4])>) -> [f32; 4] {
    parts.fold([0.0; 4], |sum, (share, texel)| {
        std::array::from_fn(|c| sum[c] + share * texel[c])
    })
}

/// Calls `put` with the place in the frame and the texel of every pixel inside `area`.
#[inline]
fn draw(sprite: &Sprite, pose: &Pose, area: &PixelBox, width: usize, mut put: impl FnMut(usize, [f32; 4])) {
    let (sin, cos) = pose.angle.sin_cos();
    let (across, down) = (
        sprite.width as f64 / pose.width,
        sprite.height as f64 / pose.height,
    );
    let (step_x, step_y) = ((cos * across) as f32, (-sin * down) as f32);
    for y in area.y0..area.y1 {
        let (dx, dy) = (area.x0 as f64 + 0.5 - pose.x, y as f64 + 0.5 - pose.y);
        let first_x = ((dx * cos + dy * sin) * across) as f32 + 0.5 * sprite.width as f32;
        let first_y = ((dy * cos - dx * sin) * down) as f32 + sprite.height as f32;
        for (i, x) in (area.x0..area.x1).enumerate() {
            let (sx, sy) = (first_x + i as f32 * step_x, first_y + i as f32 * step_y);
            put(y * width + x, sprite.sample(sx, sy));
        }
    }
}

fn byte(value: f32) -> u8 {
    (value + 0.5) as u8
}

impl Composer {
    /// The picture of `scene`: RGB bytes [frames, height, width, 3].
    pub fn render_frames(&self, scene: &Scene) -> Vec<u8> {
        let clip = &self.options.clip;
        let backdrop = scene.backdrop.paint(&self.pictures, clip);
        let mut frames = backdrop.repeat(clip.frames());
        if scene.backdrop.floor.is_some() {
            for (frame, rgb) in frames.chunks_exact_mut(backdrop.len()).enumerate() {
                for actor in &scene.actors {
                    self.shade(actor, clip.frame_time(frame), rgb);
                }
            }
        }
        self.each_sprite(scene, |frame, sprite, pose, area| {
            let rgb = &mut frames[frame * backdrop.len()..(frame + 1) * backdrop.len()];
            draw(sprite, pose, area, clip.width, |at, [r, g, b, coverage]| {
                let behind = 1.0 - coverage / 255.0;
                let pixel = &mut rgb[3 * at..3 * at + 3];
                pixel[0] = byte(r + behind * f32::from(pixel[0]));
                pixel[1] = byte(g + behind * f32::from(pixel[1]));
                pixel[2] = byte(b + behind * f32::from(pixel[2]));
            });
        });
        frames
    }

    /// How much of each pixel things cover: bytes [frames, height, width], 255 where covered wholly.
    pub fn render_mask(&self, scene: &Scene) -> Vec<u8> {
        let clip = &self.options.clip;
        let area_of_frame = clip.width * clip.height;
        let mut mask = vec![0; clip.frames() * area_of_frame];
        self.each_sprite(scene, |frame, sprite, pose, area| {
            let covered = &mut mask[frame * area_of_frame..(frame + 1) * area_of_frame];
            draw(sprite, pose, area, clip.width, |at, [.., coverage]| {
                covered[at] = byte(coverage + (1.0 - coverage / 255.0) * f32::from(covered[at]));
            });
        });
        mask
    }

    /// Visits every thing in every frame where it is to be seen, in drawing order.
    fn each_sprite(&self, scene: &Scene, mut visit: impl FnMut(usize, &Sprite, &Pose, &PixelBox)) {
        for actor in &scene.actors {
            let thing = &self.things[actor.thing];
            let sizes: [_; COPIES] = std::array::from_fn(|copy| copy_size(actor, &thing.cutout, copy));
            let mut copies = vec![Sprite::of_cutout(&thing.cutout, actor.mirrored, sizes[0])];
            for (frame, area) in actor.boxes.iter().enumerate() {
                let Some(area) = area else { continue };
                let pose = pose(actor, thing, self, self.options.clip.frame_time(frame));
                while copies.len() <= pose.copy {
                    copies.push(copies[copies.len() - 1].halved(sizes[copies.len()]));
                }
                visit(frame, &copies[pose.copy], &pose, area);
            }
        }
    }

    /// Darkens the floor below a thing, the more the nearer it is.
    fn shade(&self, actor: &Actor, time: f64, rgb: &mut [u8]) {
        let clip = &self.options.clip;
        let pose = pose(actor, &self.things[actor.thing], self, time);
        let nearness = 1.0 - (actor.y - pose.y) / (SHADOW_HEIGHT * self.scale().y);
        if !pose.visible || nearness <= 0.0 {
            return;
        }
        let (across, down) = shadow_axes(actor, &self.things[actor.thing].cutout);
        let darkness = SHADOW.2 * nearness as f32;
        let range = |middle: f64, half: f64, size: usize| {
            let low = (middle - half).floor().clamp(0.0, size as f64);
            low as usize..(middle + half).ceil().clamp(low, size as f64) as usize
        };
        for y in range(actor.y, down, clip.height) {
            let v = (y as f64 + 0.5 - actor.y) / down;
            for x in range(pose.x, across, clip.width) {
                let u = (x as f64 + 0.5 - pose.x) / across;
                let inside = (1.0 - u * u - v * v).max(0.0) as f32;
                let light = 1.0 - darkness * inside;
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
