//! Motions: how a thing comes to where it sounds.
//!
//! A trajectory is a function of the time since the first contact alone. Lengths are in pixels of a frame of
//! 96 by 96, scaled by the renderer to any size; y points down.

use serde::Serialize;

/// Acceleration of a fall, in reference pixels per square second (halved: the drop is `FALL * t^2`).
const FALL: f64 = 500.0;
/// Sideways speed of what comes in from a side, in reference pixels per second.
const APPROACH: f64 = 115.0;
/// Speed of what rises from below, in reference pixels per second.
const RISE: f64 = 150.0;
/// Height and length of a jump, in reference pixels and seconds.
const JUMP: (f64, f64) = (28.0, 0.45);
/// Pause on the ground between two jumps, in seconds.
const PAUSE: f64 = 0.1;
/// Heights and lengths of the two hops after a fall, in reference pixels and seconds.
const HOPS: [(f64, f64); 2] = [(22.0, 0.5), (8.0, 0.3)];
/// Loudness of the second contact relative to the first.
const SECOND_GAIN: f32 = 0.8;
/// Part of its height that a thing loses as it lands, and the time in which it recovers, in seconds.
const SQUASH: (f64, f64) = (0.22, 0.09);
/// Size at which a thing appears, and the time until it has its full size, in seconds.
const POP: (f64, f64) = (0.6, 0.15);
/// Size from which a thing comes closer, the time that takes in seconds, and how far up it starts.
const FAR: (f64, f64, f64) = (0.25, 0.9, 16.0);
/// Amplitude in radians and frequency in Hz of shaking.
const SHAKE: (f64, f64) = (0.22, 5.0);
/// Shortest and longest shaking, in seconds.
const SHAKE_TIME: (f64, f64) = (0.6, 1.5);
/// Share of its size by which a sounding thing pulses, frequency in Hz, and shortest time in seconds.
const PULSE: (f64, f64, f64) = (0.06, 4.0, 0.4);

/// How a thing moves; the class that a motion classifier names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Motion {
    /// Drops down in the middle.
    DropMiddle,
    /// Drops down on the left.
    DropLeft,
    /// Drops down on the right.
    DropRight,
    /// Drops in from the left, falling and moving right.
    InLeft,
    /// Drops in from the right, falling and moving left.
    InRight,
    /// Drops and bounces twice.
    Bounce,
    /// Slides in along the ground from the left.
    SlideLeft,
    /// Slides in along the ground from the right.
    SlideRight,
    /// Appears on the left.
    AppearLeft,
    /// Appears in the middle.
    AppearMiddle,
    /// Appears on the right.
    AppearRight,
    /// Stands, then jumps once.
    JumpOnce,
    /// Stands, then jumps twice.
    JumpTwice,
    /// Rises from below the frame.
    Rise,
    /// Starts small and far, comes closer.
    Closer,
    /// Stands, then shakes from side to side.
    Shake,
}

/// A side of the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Left.
    Left,
    /// Right.
    Right,
}

/// Third of the frame in which a thing comes to rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Left third.
    Left,
    /// Middle third.
    Middle,
    /// Right third.
    Right,
}

/// A contact that makes a sound.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Hit {
    /// Time in seconds from the start of the clip.
    pub time_s: f64,
    /// Loudness relative to the first contact.
    pub gain: f32,
}

/// Where a thing is at one instant, relative to its place of rest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Offset {
    pub(super) dx: f64,
    pub(super) dy: f64,
    /// Scale of width and height.
    pub(super) sx: f64,
    pub(super) sy: f64,
    /// Rotation in radians, clockwise, about the middle of the lower edge.
    pub(super) angle: f64,
    pub(super) visible: bool,
}

fn hop(u: f64, height: f64) -> f64 {
    if u > 0.0 && u < 1.0 {
        4.0 * height * u * (1.0 - u)
    } else {
        0.0
    }
}

impl Motion {
    /// Every motion, in the order of its class number.
    pub const ALL: [Self; 16] = [
        Self::DropMiddle,
        Self::DropLeft,
        Self::DropRight,
        Self::InLeft,
        Self::InRight,
        Self::Bounce,
        Self::SlideLeft,
        Self::SlideRight,
        Self::AppearLeft,
        Self::AppearMiddle,
        Self::AppearRight,
        Self::JumpOnce,
        Self::JumpTwice,
        Self::Rise,
        Self::Closer,
        Self::Shake,
    ];

    /// Class number, the position in [`Motion::ALL`].
    pub fn class(self) -> usize {
        self as usize
    }

    /// Name in lower case with underscores.
    pub fn name(self) -> &'static str {
        match self {
            Self::DropMiddle => "drop_middle",
            Self::DropLeft => "drop_left",
            Self::DropRight => "drop_right",
            Self::InLeft => "in_left",
            Self::InRight => "in_right",
            Self::Bounce => "bounce",
            Self::SlideLeft => "slide_left",
            Self::SlideRight => "slide_right",
            Self::AppearLeft => "appear_left",
            Self::AppearMiddle => "appear_middle",
            Self::AppearRight => "appear_right",
            Self::JumpOnce => "jump_once",
            Self::JumpTwice => "jump_twice",
            Self::Rise => "rise",
            Self::Closer => "closer",
            Self::Shake => "shake",
        }
    }

    /// The place that the motion itself names.
    pub fn place(self) -> Option<Place> {
        match self {
            Self::DropLeft | Self::AppearLeft => Some(Place::Left),
            Self::DropMiddle | Self::AppearMiddle => Some(Place::Middle),
            Self::DropRight | Self::AppearRight => Some(Place::Right),
            _ => None,
        }
    }

    /// The side from which the thing comes in.
    pub fn side(self) -> Option<Side> {
        match self {
            Self::InLeft | Self::SlideLeft => Some(Side::Left),
            Self::InRight | Self::SlideRight => Some(Side::Right),
            _ => None,
        }
    }

    /// True where the thing may end at any place.
    pub fn is_free(self) -> bool {
        self.place().is_none() && self.side().is_none()
    }

    /// True where the thing stands on the ground in the end, so that a floor looks right.
    pub fn is_grounded(self) -> bool {
        !matches!(
            self,
            Self::AppearLeft | Self::AppearMiddle | Self::AppearRight | Self::Rise | Self::Closer
        )
    }

    /// True where the thing falls on the ground.
    pub fn lands(self) -> bool {
        self.falls() || matches!(self, Self::JumpOnce | Self::JumpTwice)
    }

    fn falls(self) -> bool {
        matches!(
            self,
            Self::DropMiddle | Self::DropLeft | Self::DropRight | Self::InLeft | Self::InRight | Self::Bounce
        )
    }

    fn appears(self) -> bool {
        matches!(self, Self::AppearLeft | Self::AppearMiddle | Self::AppearRight)
    }

    /// Contacts that sound when the first is at `contact_s` seconds, those after `end_s` left out.
    pub(super) fn hits(self, contact_s: f64, end_s: f64) -> Vec<Hit> {
        let mut hits = vec![Hit {
            time_s: contact_s,
            gain: 1.0,
        }];
        let second = match self {
            Self::Bounce => Some(HOPS[0].1),
            Self::JumpTwice => Some(PAUSE + JUMP.1),
            _ => None,
        };
        if let Some(time_s) = second
            .map(|later| contact_s + later)
            .filter(|&time_s| time_s < end_s)
        {
            hits.push(Hit {
                time_s,
                gain: SECOND_GAIN,
            });
        }
        hits
    }

    /// The offset `dt` seconds after the first contact of a thing that sounds for `sounds_s` seconds.
    pub(super) fn offset(self, dt: f64, sounds_s: f64) -> Offset {
        let before = (-dt).max(0.0);
        let mut o = Offset {
            dx: 0.0,
            dy: 0.0,
            sx: 1.0,
            sy: 1.0,
            angle: 0.0,
            visible: true,
        };
        if self.falls() {
            o.dy = -FALL * before * before;
        }
        match self.side() {
            Some(Side::Left) => o.dx = -APPROACH * before,
            Some(Side::Right) => o.dx = APPROACH * before,
            None => {}
        }
        let mut landed = dt;
        match self {
            Self::Bounce => {
                o.dy -= hop(dt / HOPS[0].1, HOPS[0].0) + hop((dt - HOPS[0].1) / HOPS[1].1, HOPS[1].0);
                if dt >= HOPS[0].1 {
                    landed = dt - HOPS[0].1;
                }
            }
            Self::JumpOnce | Self::JumpTwice => {
                o.dy -= hop((dt + JUMP.1) / JUMP.1, JUMP.0);
                if self == Self::JumpTwice {
                    o.dy -= hop((dt - PAUSE) / JUMP.1, JUMP.0);
                    if dt >= PAUSE + JUMP.1 {
                        landed = dt - PAUSE - JUMP.1;
                    }
                }
            }
            Self::Rise => o.dy = RISE * before,
            Self::Closer => {
                let far = (before / FAR.1).min(1.0);
                let scale = 1.0 - (1.0 - FAR.0) * far;
                (o.sx, o.sy, o.dy) = (scale, scale, -FAR.2 * far);
            }
            Self::Shake if dt > 0.0 => {
                let left = sounds_s.clamp(SHAKE_TIME.0, SHAKE_TIME.1) - dt;
                let fade = (left / 0.2).clamp(0.0, 1.0);
                o.angle = SHAKE.0 * fade * (std::f64::consts::TAU * SHAKE.1 * dt).sin();
            }
            _ => {}
        }
        if self.appears() {
            let size = (POP.0 + (1.0 - POP.0) * dt / POP.1).clamp(POP.0, 1.0);
            (o.sx, o.sy, o.visible) = (size, size, dt >= 0.0);
        }
        if self != Self::Shake && dt > 0.0 && dt < sounds_s.max(PULSE.2) {
            let pulse = 1.0 + PULSE.0 * (std::f64::consts::TAU * PULSE.1 * dt).sin();
            (o.sx, o.sy) = (o.sx * pulse, o.sy * pulse);
        }
        if self.lands() && dt >= 0.0 {
            o.sy *= 1.0 - SQUASH.0 * (-landed / SQUASH.1).exp();
        }
        o
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_positions_and_names_are_unique() {
        for (class, motion) in Motion::ALL.into_iter().enumerate() {
            assert_eq!(motion.class(), class);
            assert_eq!(serde_json::to_value(motion).unwrap(), motion.name());
            assert!(
                Motion::ALL[..class]
                    .iter()
                    .all(|other| other.name() != motion.name())
            );
        }
    }

    #[test]
    fn every_hit_of_a_landing_thing_is_on_the_ground_and_follows_a_flight() {
        for motion in Motion::ALL.into_iter().filter(|motion| motion.lands()) {
            for hit in motion.hits(1.0, 4.0) {
                let at = |time: f64| motion.offset(time - 1.0, 0.5).dy;
                assert!(at(hit.time_s).abs() < 1e-9, "{motion:?}");
                assert!(
                    at(hit.time_s - 0.02) < -0.1,
                    "{motion:?} is in the air before {hit:?}"
                );
            }
        }
    }

    #[test]
    fn hits_after_the_end_are_left_out() {
        assert_eq!(Motion::Bounce.hits(3.4, 4.0).len(), 2);
        assert_eq!(Motion::Bounce.hits(3.6, 4.0).len(), 1);
        assert_eq!(Motion::SlideLeft.hits(1.0, 4.0).len(), 1);
    }

    #[test]
    fn what_comes_in_is_outside_before_and_at_rest_at_contact() {
        for motion in [
            Motion::SlideLeft,
            Motion::SlideRight,
            Motion::InLeft,
            Motion::Rise,
            Motion::DropLeft,
        ] {
            let early = motion.offset(-0.9, 0.5);
            assert!(early.dx.abs() > 90.0 || early.dy.abs() > 90.0, "{motion:?}");
            let contact = motion.offset(0.0, 0.5);
            assert_eq!((contact.dx, contact.dy.abs()), (0.0, 0.0), "{motion:?}");
        }
        assert!(
            !Motion::AppearLeft.offset(-1e-6, 0.5).visible && Motion::AppearLeft.offset(0.0, 0.5).visible
        );
    }
}
