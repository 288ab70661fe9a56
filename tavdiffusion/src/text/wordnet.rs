//! WordNet 3.0 data files (`data.noun`, ...; format `wndb(5)`): words, what they mean, and how common they are.

use std::collections::HashMap;
use std::path::Path;

use super::{Result, TextError};

/// File that says how often words are met with which meaning.
const COUNTS: &str = "cntlist.rev";

/// Part of speech.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// `data.noun`
    Noun,
    /// `data.verb`
    Verb,
    /// `data.adj`
    Adjective,
    /// `data.adv`
    Adverb,
}

impl Part {
    const ALL: [(Self, &'static str, u8); 4] = [
        (Self::Noun, "data.noun", 1),
        (Self::Verb, "data.verb", 2),
        (Self::Adjective, "data.adj", 3),
        (Self::Adverb, "data.adv", 4),
    ];
}

/// One meaning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Synset {
    /// Part of speech.
    pub part: Part,
    /// Number of the lexicographer file: 5 animals, 6 artifacts, 29 to 43 verbs by kind, ...
    pub file: u8,
    /// Words with this meaning, spaces between the parts of compound ones.
    pub words: Vec<String>,
    /// Definition.
    pub gloss: String,
    /// Sentences that use one of the words.
    pub examples: Vec<String>,
    /// Times that the words were met with this meaning in a tagged text.
    pub count: u32,
}

/// All meanings, in file order.
#[derive(Clone, Debug, Default)]
pub struct WordNet {
    /// The meanings.
    pub synsets: Vec<Synset>,
}

impl WordNet {
    /// The files that [`WordNet::load`] reads.
    pub const FILES: [&str; 5] = [
        Part::ALL[0].1,
        Part::ALL[1].1,
        Part::ALL[2].1,
        Part::ALL[3].1,
        COUNTS,
    ];

    /// Reads `data.noun`, `data.verb`, `data.adj`, `data.adv` and, where it is there, `cntlist.rev` of `folder`.
    ///
    /// # Errors
    /// A file is missing or holds no meanings.
    pub fn load(folder: &Path) -> Result<Self> {
        let counts = super::read(folder.join(COUNTS)).map_or_else(
            |_| HashMap::new(),
            |(_, bytes)| parse_counts(&String::from_utf8_lossy(&bytes)),
        );
        let mut synsets = Vec::new();
        for (part, name, code) in Part::ALL {
            let (path, bytes) = super::read(folder.join(name))?;
            let before = synsets.len();
            let text = String::from_utf8_lossy(&bytes);
            synsets.extend(
                text.lines()
                    .filter_map(|line| parse_synset(line, part, code, &counts)),
            );
            if synsets.len() == before {
                return Err(TextError::Field {
                    path,
                    field: "synsets".into(),
                    found: "none".into(),
                    expected: "lines as wndb(5) describes them".into(),
                });
            }
        }
        Ok(Self { synsets })
    }
}

/// (word, part of speech, lexicographer file) -> times met; lines are `word%part:file:id:head:id number times`.
fn parse_counts(text: &str) -> HashMap<(String, u8, u8), u32> {
    let mut counts = HashMap::new();
    for line in text.lines() {
        let mut fields = line.split_whitespace();
        let (Some(key), Some(times)) = (fields.next(), fields.nth(1)) else {
            continue;
        };
        let Some((word, place)) = key.split_once('%') else {
            continue;
        };
        let mut place = place.split(':').map(|field| field.parse::<u8>().ok());
        let (Some(Some(part)), Some(Some(file))) = (place.next(), place.next()) else {
            continue;
        };
        *counts.entry((word.to_owned(), part, file)).or_insert(0) += times.parse().unwrap_or(0);
    }
    counts
}

/// `offset file type words(hex) [word id]... pointers ... | gloss; "example"; ...`; None for the licence and for damage.
fn parse_synset(line: &str, part: Part, code: u8, counts: &HashMap<(String, u8, u8), u32>) -> Option<Synset> {
    if line.starts_with(' ') {
        return None;
    }
    let (head, told) = line.split_once(" | ")?;
    let mut fields = head.split(' ');
    let file: u8 = fields.nth(1)?.parse().ok()?;
    let size = usize::from_str_radix(fields.nth(1)?, 16).ok()?;
    let mut words = Vec::new();
    let mut count = 0;
    for _ in 0..size {
        // Adjectives carry a marker of their place: "galore(ip)".
        let word = fields.next()?.split('(').next()?.to_owned();
        fields.next()?;
        count += counts
            .get(&(word.to_lowercase(), code, file))
            .copied()
            .unwrap_or(0);
        words.push(word.replace('_', " "));
    }
    let mut quoted = told.split('"');
    let gloss = quoted.next()?.trim().trim_end_matches(';').trim().to_owned();
    let examples = quoted
        .step_by(2)
        .map(|text| text.trim().to_owned())
        .filter(|text| !text.is_empty());
    Some(Synset {
        part,
        file,
        words,
        gloss,
        examples: examples.collect(),
        count,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_words_gloss_examples_and_counts() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let noun = "  1 licence text | not a meaning\n\
            02084071 05 n 02 dog 0 domestic_dog 0 001 @ 02083346 n 0000 | a member of the genus Canis; \
            \"the dog barked all night\"; \"good dog\"\nbroken line\n00000000 05 n zz dog 0 | x\n";
        std::fs::write(at("data.noun"), noun).unwrap();
        for name in ["data.verb", "data.adv"] {
            std::fs::write(at(name), "00000001 39 v 01 bark 0 000 | make barking sounds  \n").unwrap();
        }
        std::fs::write(
            at("data.adj"),
            "00000002 00 a 01 galore(ip) 0 000 | in great numbers; \"x\"\n",
        )
        .unwrap();
        std::fs::write(at("cntlist.rev"), "dog%1:05:00:: 1 42\ndog%1:18:00:: 2 2\nodd\n").unwrap();
        let wordnet = WordNet::load(folder.path())?;
        assert_eq!(wordnet.synsets.len(), 4);
        let dog = &wordnet.synsets[0];
        assert_eq!(
            (dog.words.as_slice(), dog.file, dog.count),
            (&["dog".into(), "domestic dog".into()][..], 5, 42)
        );
        assert_eq!(dog.gloss, "a member of the genus Canis");
        assert_eq!(dog.examples, ["the dog barked all night", "good dog"]);
        assert_eq!(wordnet.synsets[1].gloss, "make barking sounds");
        assert_eq!(wordnet.synsets[2].words, ["galore"]);

        std::fs::write(at("data.verb"), "").unwrap();
        let message = WordNet::load(folder.path()).unwrap_err().to_string();
        assert!(message.contains("data.verb"), "{message}");
        Ok(())
    }
}
