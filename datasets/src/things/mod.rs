//! Things: real cut-outs with their own real sound and the words that name both.
//!
//! A [`Thing`] is what a composed scene is made of: a picture without background, a sound that starts at its onset,
//! a noun phrase and the verbs of its sound. [`Things::load`] reads the prepared set `stamps`.

mod store;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use store::{THINGS_FILE, ThingsError, WORDS_KEY, save};

use serde::{Deserialize, Serialize};

/// Sampling rate of every [`Thing::sound`], in Hz.
pub const SOUND_RATE: u32 = 16_000;
/// Longest [`Thing::sound`], in samples (2 s).
pub const MAX_SOUND: usize = 2 * SOUND_RATE as usize;
/// Root mean square over the active part of a sound, unless its peak would pass [`SOUND_PEAK`].
pub const SOUND_RMS: f32 = 0.12;
/// Largest absolute sample of a sound.
pub const SOUND_PEAK: f32 = 0.9;
/// Longest side of a cut-out, in pixels.
pub const CUTOUT_SIDE: u32 = 96;

/// One thing that can be seen, heard and named.
#[derive(Clone, Debug, PartialEq)]
pub struct Thing {
    /// Unique name of letters, digits and underscores, such as `dog` or `electric_guitar`; the class of the thing.
    pub id: String,
    /// The words that name the thing and its sound.
    pub words: Words,
    /// The picture, cropped to what is visible.
    pub cutout: Cutout,
    /// Mono samples at [`SOUND_RATE`] in -1..1, starting at the onset, faded at the end, at most [`MAX_SOUND`].
    pub sound: Vec<f32>,
    /// Where picture and sound come from.
    pub source: Source,
}

/// The words for a thing: "a dog" that "barks".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Words {
    /// Noun phrase with its article: "a dog", "an owl", "hands".
    pub noun: String,
    /// What its sound is called: "barks", "barking".
    pub verb: Verb,
    /// True when the noun phrase is plural ("hands clap", not "claps").
    #[serde(default)]
    pub plural: bool,
    /// Other noun phrases of the same number for the same thing: "a puppy".
    #[serde(default)]
    pub other_nouns: Vec<String>,
    /// Other verbs for the same sound: "woofs", "woofing".
    #[serde(default)]
    pub other_verbs: Vec<Verb>,
}

/// A verb (phrase) in the two forms that captions need.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verb {
    /// The form that agrees with the noun phrase: "barks" after "a dog", "clap" after "hands".
    pub finite: String,
    /// The form after "is" or a comma: "barking".
    pub gerund: String,
}

/// A picture with transparency.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cutout {
    /// Width in pixels, 1..=[`CUTOUT_SIDE`].
    pub width: u32,
    /// Height in pixels, 1..=[`CUTOUT_SIDE`].
    pub height: u32,
    /// Row-major RGBA bytes, colour premultiplied by alpha, `height * width * 4` of them.
    pub rgba: Vec<u8>,
}

/// Where a thing comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// The file of the picture.
    pub picture: Origin,
    /// The file of the sound.
    pub sound: Origin,
}

/// One file inside a package, and its terms.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Package name and version, such as `tuxpaint-stamps-default 2022.06.04-1`.
    pub package: String,
    /// Path inside the package; inside an archive of the package after `!/`.
    pub path: String,
    /// Licence name as the package states it for this file, such as `CC0-1.0` or `GPL-2.0`.
    pub licence: String,
    /// Holders of the copyright as the package names them; empty when it names none.
    #[serde(default)]
    pub holders: String,
}

/// All things of a prepared set, in the order of their ids.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Things(pub Vec<Thing>);

impl Things {
    /// The position of `id`, if there is such a thing.
    pub fn position(&self, id: &str) -> Option<usize> {
        self.0.iter().position(|thing| thing.id == id)
    }

    /// Keeps the things whose picture and sound both have a licence that `keep` accepts.
    pub fn retain_licences(&mut self, keep: impl Fn(&str) -> bool) {
        self.0
            .retain(|thing| keep(&thing.source.picture.licence) && keep(&thing.source.sound.licence));
    }
}

impl std::ops::Deref for Things {
    type Target = [Thing];

    fn deref(&self) -> &[Thing] {
        &self.0
    }
}
