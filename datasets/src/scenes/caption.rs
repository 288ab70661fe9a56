//! Captions: what is seen, what is heard, where and how it moves, and when, in varied wording.
//!
//! A sentence frame puts the words of one or two things in order; it works for singular and plural noun phrases.
//! Reserved frames and phrases are never said in the training split.

use fulgur_kernels::philox::Philox;
use serde::Serialize;

use super::motion::{Motion, Place, Side};
use super::wording::{MotionPhrase, motion_phrases, place_phrases, time_phrases};
use super::{Actor, Timing};
use crate::things::{Verb, Words};

/// What a part of a caption tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The thing that is seen.
    Thing,
    /// Its sound.
    Sound,
    /// How it moves.
    Motion,
    /// Where it ends.
    Place,
    /// When it sounds.
    Time,
}

/// A run of words of a caption.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// What the words tell.
    pub role: Role,
    /// Position of the thing in `Scene::actors`.
    pub actor: usize,
    /// First byte in the text.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

/// A caption and what its words stand for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Caption {
    /// The caption, lower case, without a full stop.
    pub text: String,
    /// The same facts in the plainest words: "a dog barks and drops down on the left near the end".
    pub canonical: String,
    /// The parts of `text`, in order.
    pub parts: Vec<Part>,
    /// Number of the sentence frame.
    pub frame: usize,
}

impl Caption {
    /// The words of one part.
    pub fn words(&self, part: &Part) -> &str {
        &self.text[part.start..part.end]
    }
}

/// Which wordings may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wording {
    Familiar,
    Reserved,
}

/// Chance that a caption uses another noun or another verb than the first of a thing.
const OTHER_WORD: f32 = 0.2;
/// Chance that a stated time opens the sentence.
const TIME_FIRST: f32 = 0.4;
/// Chance that a phrase of a reserved sentence is reserved as well.
const RESERVED_PHRASE: f32 = 0.5;

/// A sentence in the making.
#[derive(Default)]
struct Line {
    text: String,
    parts: Vec<Part>,
}

impl Line {
    fn say(&mut self, words: &str) -> &mut Self {
        if words.is_empty() {
            return self;
        }
        if !self.text.is_empty() && !words.starts_with([',', ':']) {
            self.text.push(' ');
        }
        self.text.push_str(words);
        self
    }

    fn part(&mut self, role: Role, actor: usize, words: &str) -> &mut Self {
        let start = self.text.len() + usize::from(!self.text.is_empty());
        self.say(words);
        self.parts.push(Part {
            role,
            actor,
            start,
            end: self.text.len(),
        });
        self
    }
}

/// The chosen words for one thing.
struct Clause<'a> {
    actor: usize,
    noun: &'a str,
    verb: &'a Verb,
    plural: bool,
    motion: MotionPhrase,
    side: Option<Side>,
    place: Option<&'static str>,
    /// Said after the clause; empty where it opens the sentence or is unsaid.
    time: Option<&'static str>,
    /// Chooses among the orders of a clause within a sentence about two things.
    order: usize,
}

impl Clause<'_> {
    fn they(&self) -> &'static str {
        if self.plural { "they" } else { "it" }
    }
    fn them(&self) -> &'static str {
        if self.plural { "them" } else { "it" }
    }
    fn are(&self) -> &'static str {
        if self.plural { "are" } else { "is" }
    }
    fn start(&self) -> &'static str {
        if self.plural { "start" } else { "starts" }
    }
    fn noun(&self, line: &mut Line) {
        line.part(Role::Thing, self.actor, self.noun);
    }
    fn sounds(&self, line: &mut Line) {
        line.part(Role::Sound, self.actor, &self.verb.finite);
    }
    fn sounding(&self, line: &mut Line) {
        line.part(Role::Sound, self.actor, &self.verb.gerund);
    }
    fn moved(&self, line: &mut Line, verb: &str) {
        let rest = self.motion.rest(self.side);
        let words = if rest.is_empty() {
            verb.to_owned()
        } else {
            format!("{verb} {rest}")
        };
        line.part(Role::Motion, self.actor, &words);
        if let Some(place) = self.place {
            line.part(Role::Place, self.actor, place);
        }
    }
    fn moves(&self, line: &mut Line) {
        self.moved(line, self.motion.finite(self.plural));
    }
    fn moving(&self, line: &mut Line) {
        self.moved(line, self.motion.gerund);
    }
    fn time(&self, line: &mut Line) {
        if let Some(time) = self.time {
            line.part(Role::Time, self.actor, time);
        }
    }
    /// "a dog barks as it drops in from the left near the end", in one of three orders.
    fn whole(&self, line: &mut Line) {
        self.noun(line);
        match self.order {
            0 => {
                self.moves(line);
                line.say("and");
                self.sounds(line);
            }
            1 => {
                self.sounds(line);
                line.say("as").say(self.they());
                self.moves(line);
            }
            _ => {
                self.sounds(line);
                line.say("and");
                self.moves(line);
            }
        }
        self.time(line);
    }
    /// True where the gerund alone names a sound: "you hear barking".
    fn names_a_sound(&self) -> bool {
        let vague = ["playing", "running", "starting", "being", "sounding", "calling"];
        !self.verb.gerund.contains(' ') && !vague.contains(&self.verb.gerund.as_str())
    }
}

type One = fn(&mut Line, &Clause<'_>);
type Two = fn(&mut Line, &Clause<'_>, &Clause<'_>);

/// Sentence frames about one thing; its time is said before or after the whole.
const ONE: &[One] = &[
    |l, c| {
        c.noun(l);
        c.sounds(l);
        l.say("as").say(c.they());
        c.moves(l);
    },
    |l, c| {
        c.noun(l);
        c.moves(l);
        l.say("and");
        c.sounds(l);
    },
    |l, c| {
        c.noun(l);
        c.sounds(l);
        l.say("and");
        c.moves(l);
    },
    |l, c| {
        l.say("you hear");
        if c.names_a_sound() {
            c.sounding(l);
            l.say(":");
            c.noun(l);
        } else {
            c.noun(l);
            c.sounding(l);
            l.say(":").say(c.they());
        }
        c.moves(l);
    },
    |l, c| {
        c.noun(l);
        c.moving(l);
        l.say("and");
        c.sounding(l);
    },
    |l, c| {
        c.noun(l);
        c.moves(l);
        l.say(",");
        c.sounding(l);
    },
    |l, c| {
        c.sounding(l);
        l.say(",");
        c.noun(l);
        c.moves(l);
    },
    |l, c| {
        l.say("there").say(c.are());
        c.noun(l);
        l.say("that");
        c.moves(l);
        l.say("and");
        c.sounds(l);
    },
    |l, c| {
        l.say("we hear");
        c.noun(l);
        c.sounding(l);
        l.say("as").say(c.they());
        c.moves(l);
    },
    |l, c| {
        l.say("the sound of");
        c.noun(l);
        c.sounding(l);
        l.say("as").say(c.they());
        c.moves(l);
    },
    |l, c| {
        l.say("watch");
        c.noun(l);
        c.moved(l, c.motion.bare());
        l.say("and hear").say(c.them());
        c.sounding(l);
    },
    |l, c| {
        c.noun(l);
        l.say(c.are()).say("seen");
        c.moving(l);
        l.say("and heard");
        c.sounding(l);
    },
    |l, c| {
        c.noun(l);
        l.say("can be heard");
        c.sounding(l);
        l.say("as").say(c.they());
        c.moves(l);
    },
    |l, c| {
        c.noun(l);
        l.say("that");
        c.moves(l);
        l.say("and");
        c.sounds(l);
    },
    |l, c| {
        c.noun(l);
        l.say(",");
        c.sounding(l);
        l.say(",");
        c.moves(l);
    },
];

/// Reserved sentence frames about one thing.
const ONE_RESERVED: &[One] = &[
    |l, c| {
        l.say("as");
        c.noun(l);
        c.moves(l);
        l.say(",").say(c.they());
        c.sounds(l);
    },
    |l, c| {
        c.noun(l);
        l.say(c.start());
        c.sounding(l);
        l.say("when").say(c.they());
        c.moves(l);
    },
    |l, c| {
        l.say("listen to");
        c.noun(l);
        c.sounding(l);
        l.say("while").say(c.they());
        c.moves(l);
    },
    |l, c| {
        l.say("in this clip");
        c.noun(l);
        c.moves(l);
        l.say("while").say(c.they());
        c.sounds(l);
    },
];

/// Sentence frames about two things, the one that sounds first coming first.
const TWO: &[Two] = &[
    |l, a, b| {
        a.whole(l);
        l.say(", and");
        b.whole(l);
    },
    |l, a, b| {
        l.say("first");
        a.whole(l);
        l.say(", then");
        b.whole(l);
    },
    |l, a, b| {
        a.whole(l);
        l.say(", and then");
        b.whole(l);
    },
    |l, a, b| {
        a.whole(l);
        l.say(", followed by");
        b.noun(l);
        l.say("that");
        b.moves(l);
        l.say("and");
        b.sounds(l);
        b.time(l);
    },
    |l, a, b| {
        l.say("you hear");
        a.noun(l);
        a.sounding(l);
        l.say("as").say(a.they());
        a.moves(l);
        a.time(l);
        l.say(", and");
        b.noun(l);
        b.sounding(l);
        l.say("as").say(b.they());
        b.moves(l);
        b.time(l);
    },
    |l, a, b| {
        a.noun(l);
        a.moving(l);
        l.say("and");
        a.sounding(l);
        a.time(l);
        l.say(", and");
        b.noun(l);
        b.moving(l);
        l.say("and");
        b.sounding(l);
        b.time(l);
    },
];

/// Reserved sentence frames about two things.
const TWO_RESERVED: &[Two] = &[
    |l, a, b| {
        l.say("after");
        a.whole(l);
        l.say(",");
        b.whole(l);
    },
    |l, a, b| {
        a.whole(l);
        l.say("before");
        b.whole(l);
    },
    |l, a, b| {
        l.say("two things:");
        a.whole(l);
        l.say(", and later");
        b.whole(l);
    },
];

/// The facts of one actor that a caption tells.
pub(super) struct Told<'a> {
    pub(super) words: &'a Words,
    pub(super) actor: usize,
    pub(super) motion: Motion,
    pub(super) place: Option<Place>,
    pub(super) timing: Timing,
}

impl<'a> Told<'a> {
    pub(super) fn of(actor: &Actor, position: usize, words: &'a Words) -> Self {
        Self {
            words,
            actor: position,
            motion: actor.motion,
            place: actor.place_said.then_some(actor.place),
            timing: actor.timing,
        }
    }
}

/// A phrase of a table whose last entry is reserved.
fn choose<T: Copy>(table: &[T], wording: Wording, random: &mut Philox) -> Option<T> {
    let reserved = wording == Wording::Reserved && random.chance(RESERVED_PHRASE);
    let familiar = table.len().checked_sub(1)?;
    let at = random.below(familiar.max(1));
    Some(table[if reserved { familiar } else { at }])
}

fn other<'a, T>(first: &'a T, others: &'a [T], random: &mut Philox) -> &'a T {
    if random.chance(OTHER_WORD) && !others.is_empty() {
        &others[random.below(others.len())]
    } else {
        first
    }
}

fn clause<'a>(told: &Told<'a>, wording: Wording, random: &mut Philox) -> Clause<'a> {
    let noun = other(&told.words.noun, &told.words.other_nouns, random);
    let verb = other(&told.words.verb, &told.words.other_verbs, random);
    let phrases = motion_phrases(told.motion);
    Clause {
        actor: told.actor,
        noun,
        verb,
        plural: told.words.plural,
        motion: choose(phrases, wording, random).unwrap_or(phrases[0]),
        side: told.motion.side(),
        place: told
            .place
            .and_then(|place| choose(place_phrases(place), wording, random)),
        time: choose(time_phrases(told.timing), wording, random),
        order: random.below(3),
    }
}

fn plain<'a>(told: &Told<'a>) -> Clause<'a> {
    Clause {
        actor: told.actor,
        noun: &told.words.noun,
        verb: &told.words.verb,
        plural: told.words.plural,
        motion: motion_phrases(told.motion)[0],
        side: told.motion.side(),
        place: told.place.map(|place| place_phrases(place)[0]),
        time: time_phrases(told.timing).first().copied(),
        order: 2,
    }
}

/// Writes the caption of one thing, or of two in the order of their sounds.
pub(super) fn write(told: &[Told<'_>], wording: Wording, random: &mut Philox) -> Caption {
    let mut line = Line::default();
    let mut canonical = Line::default();
    let frame = match told {
        [one] => {
            let mut clause = clause(one, wording, random);
            let (frames, base) = match wording {
                Wording::Familiar => (ONE, 0),
                Wording::Reserved => (ONE_RESERVED, ONE.len()),
            };
            let chosen = random.below(frames.len());
            if random.chance(TIME_FIRST)
                && let Some(time) = clause.time.take()
            {
                line.part(Role::Time, clause.actor, time).say(",");
            }
            frames[chosen](&mut line, &clause);
            clause.time(&mut line);
            plain(one).whole(&mut canonical);
            base + chosen
        }
        [first, second] => {
            let (a, b) = (clause(first, wording, random), clause(second, wording, random));
            let (frames, base) = match wording {
                Wording::Familiar => (TWO, 0),
                Wording::Reserved => (TWO_RESERVED, TWO.len()),
            };
            let chosen = random.below(frames.len());
            frames[chosen](&mut line, &a, &b);
            plain(first).whole(&mut canonical);
            canonical.say(", then");
            plain(second).whole(&mut canonical);
            ONE.len() + ONE_RESERVED.len() + base + chosen
        }
        _ => unreachable!("a scene has one or two things"),
    };
    Caption {
        text: line.text,
        canonical: canonical.text,
        parts: line.parts,
        frame,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(noun: &str, finite: &str, gerund: &str, plural: bool) -> Words {
        Words {
            noun: noun.to_owned(),
            verb: Verb {
                finite: finite.to_owned(),
                gerund: gerund.to_owned(),
            },
            plural,
            other_nouns: Vec::new(),
            other_verbs: Vec::new(),
        }
    }

    fn told(words: &Words, motion: Motion, timing: Timing) -> Told<'_> {
        Told {
            words,
            actor: 0,
            motion,
            place: motion.place(),
            timing,
        }
    }

    fn said(frame: One, told: &Told<'_>) -> String {
        let mut line = Line::default();
        frame(&mut line, &plain(told));
        line.text
    }

    #[test]
    fn every_sentence_about_one_thing_reads_well() {
        let dog = words("a dog", "barks", "barking", false);
        let told = told(&dog, Motion::SlideLeft, Timing::Unsaid);
        let sentences: Vec<String> = ONE
            .iter()
            .chain(ONE_RESERVED)
            .map(|&frame| said(frame, &told))
            .collect();
        let expected = [
            "a dog barks as it slides in from the left",
            "a dog slides in from the left and barks",
            "a dog barks and slides in from the left",
            "you hear barking: a dog slides in from the left",
            "a dog sliding in from the left and barking",
            "a dog slides in from the left, barking",
            "barking, a dog slides in from the left",
            "there is a dog that slides in from the left and barks",
            "we hear a dog barking as it slides in from the left",
            "the sound of a dog barking as it slides in from the left",
            "watch a dog slide in from the left and hear it barking",
            "a dog is seen sliding in from the left and heard barking",
            "a dog can be heard barking as it slides in from the left",
            "a dog that slides in from the left and barks",
            "a dog, barking, slides in from the left",
            "as a dog slides in from the left, it barks",
            "a dog starts barking when it slides in from the left",
            "listen to a dog barking while it slides in from the left",
            "in this clip a dog slides in from the left while it barks",
        ];
        assert_eq!(sentences, expected);
    }

    #[test]
    fn sentences_agree_with_plural_things() {
        let hands = words("hands", "clap", "clapping", true);
        let told = told(&hands, Motion::AppearMiddle, Timing::Unsaid);
        let expected = [
            (ONE[0], "hands clap as they appear in the middle"),
            (ONE[3], "you hear clapping: hands appear in the middle"),
            (ONE[7], "there are hands that appear in the middle and clap"),
            (ONE[10], "watch hands appear in the middle and hear them clapping"),
            (
                ONE[11],
                "hands are seen appearing in the middle and heard clapping",
            ),
            (ONE_RESERVED[0], "as hands appear in the middle, they clap"),
            (
                ONE_RESERVED[1],
                "hands start clapping when they appear in the middle",
            ),
        ];
        for (frame, sentence) in expected {
            assert_eq!(said(frame, &told), sentence);
        }
    }

    #[test]
    fn every_sentence_about_two_things_reads_well() {
        let (dog, bell) = (
            words("a dog", "barks", "barking", false),
            words("bells", "ring", "ringing", true),
        );
        let first = told(&dog, Motion::JumpOnce, Timing::Start);
        let second = told(&bell, Motion::DropRight, Timing::End);
        let sentences: Vec<String> = TWO
            .iter()
            .chain(TWO_RESERVED)
            .map(|frame| {
                let mut line = Line::default();
                frame(&mut line, &plain(&first), &plain(&second));
                line.text
            })
            .collect();
        let (a, b) = (
            "a dog barks and jumps once at the start",
            "bells ring and drop down on the right near the end",
        );
        let expected = [
            format!("{a}, and {b}"),
            format!("first {a}, then {b}"),
            format!("{a}, and then {b}"),
            format!("{a}, followed by bells that drop down on the right and ring near the end"),
            "you hear a dog barking as it jumps once at the start, \
             and bells ringing as they drop down on the right near the end"
                .to_owned(),
            "a dog jumping once and barking at the start, \
             and bells dropping down on the right and ringing near the end"
                .to_owned(),
            format!("after {a}, {b}"),
            format!("{a} before {b}"),
            format!("two things: {a}, and later {b}"),
        ];
        assert_eq!(sentences, expected);
    }

    #[test]
    fn a_vague_sound_is_said_with_its_thing() {
        let violin = words("a violin", "plays", "playing", false);
        let sentence = said(ONE[3], &told(&violin, Motion::DropRight, Timing::Unsaid));
        assert_eq!(sentence, "you hear a violin playing: it drops down on the right");
    }
}
