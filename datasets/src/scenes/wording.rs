//! The words of captions: how each motion, place and time can be said.
//!
//! The last phrase of each table is reserved: it is never said in the training split.

use super::Timing;
use super::motion::{Motion, Place, Side};

/// A verb in the forms that captions need.
#[derive(Clone, Copy, Debug)]
pub(super) struct MotionPhrase {
    third: &'static str,
    bare: &'static str,
    pub(super) gerund: &'static str,
    /// What follows the verb; `{side}` stands for the side from which the thing comes.
    rest: &'static str,
}

impl MotionPhrase {
    /// The form that agrees with a noun phrase.
    pub(super) fn finite(&self, plural: bool) -> &'static str {
        if plural { self.bare } else { self.third }
    }

    pub(super) fn bare(&self) -> &'static str {
        self.bare
    }

    /// The words after the verb.
    pub(super) fn rest(&self, side: Option<Side>) -> String {
        let side = match side {
            Some(Side::Left) => "left",
            Some(Side::Right) => "right",
            None => "",
        };
        self.rest.replace("{side}", side)
    }
}

const fn say(
    third: &'static str,
    bare: &'static str,
    gerund: &'static str,
    rest: &'static str,
) -> MotionPhrase {
    MotionPhrase {
        third,
        bare,
        gerund,
        rest,
    }
}

const DROP: &[MotionPhrase] = &[
    say("drops", "drop", "dropping", "down"),
    say("falls", "fall", "falling", "down"),
    say("drops", "drop", "dropping", "straight down"),
    say("falls", "fall", "falling", "from above"),
    say("drops", "drop", "dropping", "from the top"),
    say("plunges", "plunge", "plunging", "down"),
];
const IN: &[MotionPhrase] = &[
    say("drops", "drop", "dropping", "in from the {side}"),
    say("falls", "fall", "falling", "in from the {side}"),
    say("flies", "fly", "flying", "in from the upper {side}"),
    say("drops", "drop", "dropping", "in from the {side} side"),
    say("swoops", "swoop", "swooping", "in from the top {side}"),
    say("plunges", "plunge", "plunging", "in from the {side}"),
];
const BOUNCE: &[MotionPhrase] = &[
    say("bounces", "bounce", "bouncing", "on the ground"),
    say("bounces", "bounce", "bouncing", "on the floor"),
    say("bounces", "bounce", "bouncing", "up and down"),
    say("bounces", "bounce", "bouncing", "off the floor"),
];
const SLIDE: &[MotionPhrase] = &[
    say("slides", "slide", "sliding", "in from the {side}"),
    say("glides", "glide", "gliding", "in from the {side}"),
    say("moves", "move", "moving", "in along the ground from the {side}"),
    say("slides", "slide", "sliding", "into view from the {side} side"),
    say("skids", "skid", "skidding", "in from the {side}"),
];
const APPEAR: &[MotionPhrase] = &[
    say("appears", "appear", "appearing", ""),
    say("shows", "show", "showing", "up"),
    say("pops", "pop", "popping", "into view"),
    say("appears", "appear", "appearing", "out of nowhere"),
    say("turns", "turn", "turning", "up"),
];
const JUMP_ONCE: &[MotionPhrase] = &[
    say("jumps", "jump", "jumping", "once"),
    say("hops", "hop", "hopping", "once"),
    say("makes", "make", "making", "one jump"),
    say("jumps", "jump", "jumping", "up once"),
    say("leaps", "leap", "leaping", "once"),
];
const JUMP_TWICE: &[MotionPhrase] = &[
    say("jumps", "jump", "jumping", "twice"),
    say("hops", "hop", "hopping", "twice"),
    say("makes", "make", "making", "two jumps"),
    say("jumps", "jump", "jumping", "up two times"),
    say("leaps", "leap", "leaping", "twice"),
];
const RISE: &[MotionPhrase] = &[
    say("rises", "rise", "rising", "from below"),
    say("comes", "come", "coming", "up from below"),
    say("rises", "rise", "rising", "up from the bottom"),
    say("emerges", "emerge", "emerging", "from below"),
];
const CLOSER: &[MotionPhrase] = &[
    say("comes", "come", "coming", "closer"),
    say("moves", "move", "moving", "closer"),
    say("approaches", "approach", "approaching", "from far away"),
    say("draws", "draw", "drawing", "near"),
];
const SHAKE: &[MotionPhrase] = &[
    say("shakes", "shake", "shaking", "from side to side"),
    say("shakes", "shake", "shaking", "back and forth"),
    say("wobbles", "wobble", "wobbling", "from side to side"),
    say("rocks", "rock", "rocking", "back and forth"),
];

/// How `motion` can be said, the reserved phrase last; the first is the canonical one.
pub(super) fn motion_phrases(motion: Motion) -> &'static [MotionPhrase] {
    match motion {
        Motion::DropMiddle | Motion::DropLeft | Motion::DropRight => DROP,
        Motion::InLeft | Motion::InRight => IN,
        Motion::Bounce => BOUNCE,
        Motion::SlideLeft | Motion::SlideRight => SLIDE,
        Motion::AppearLeft | Motion::AppearMiddle | Motion::AppearRight => APPEAR,
        Motion::JumpOnce => JUMP_ONCE,
        Motion::JumpTwice => JUMP_TWICE,
        Motion::Rise => RISE,
        Motion::Closer => CLOSER,
        Motion::Shake => SHAKE,
    }
}

/// How `motion` can be said after "it", the reserved phrase last: "slides in from the left".
#[cfg(feature = "media")]
pub(crate) fn spoken(motion: Motion) -> Vec<String> {
    let whole = |phrase: &MotionPhrase| {
        let rest = phrase.rest(motion.side());
        format!("{} {rest}", phrase.finite(false)).trim_end().to_owned()
    };
    motion_phrases(motion).iter().map(whole).collect()
}

/// How `place` can be said, the reserved phrase last.
pub(crate) fn place_phrases(place: Place) -> &'static [&'static str] {
    match place {
        Place::Left => &[
            "on the left",
            "on the left side",
            "at the left",
            "on the left-hand side",
        ],
        Place::Middle => &[
            "in the middle",
            "in the center",
            "at the center",
            "in the very middle",
        ],
        Place::Right => &[
            "on the right",
            "on the right side",
            "at the right",
            "on the right-hand side",
        ],
    }
}

/// How `timing` can be said, the reserved phrase last; empty for unsaid.
pub(crate) fn time_phrases(timing: Timing) -> &'static [&'static str] {
    match timing {
        Timing::Unsaid => &[],
        Timing::Start => &[
            "at the start",
            "at the beginning",
            "at the very start",
            "early on",
            "in the first moments",
        ],
        Timing::Halfway => &[
            "halfway",
            "halfway through",
            "midway",
            "about halfway through",
            "at the midpoint",
        ],
        Timing::End => &[
            "near the end",
            "towards the end",
            "close to the end",
            "late in the clip",
            "in the last moments",
        ],
    }
}
