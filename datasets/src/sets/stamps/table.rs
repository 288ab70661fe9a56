//! The table of things: which files, which words.

use crate::fetch::FetchError;
use crate::things::{Verb, Words};

const TABLE: &str = include_str!("table.txt");

/// A file of one of the packages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum File {
    /// Path in the stamps folder, without extension.
    Tux(String),
    /// Activity, slash, path in its resource folder.
    GCompris(String),
    /// Code point in lower case.
    Emoji(String),
    /// Name of a sample, without extension.
    SonicPi(String),
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) id: String,
    pub(super) picture: File,
    pub(super) sound: File,
    pub(super) words: Words,
}

/// All lines of the table.
pub(super) fn rows() -> Result<Vec<Row>, FetchError> {
    let lines = TABLE
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(row).collect()
}

fn row(line: &str) -> Result<Row, FetchError> {
    let wrong = |expected: &str| FetchError::format("table of stamps", "line", line, expected);
    let fields: Vec<&str> = line.split('|').map(str::trim).collect();
    let [id, picture, sound, nouns, verbs] = fields[..] else {
        return Err(wrong("five fields"));
    };
    let (id, plural) = id.strip_prefix('+').map_or((id, false), |id| (id, true));
    let sound = if sound == "=" { picture } else { sound };
    let file = |text| file(text).ok_or_else(|| wrong("files as tux:, gc:, emoji: or sonic:"));
    let mut nouns = nouns.split(',').map(|noun| noun.trim().to_owned());
    let verb = |text: &str| {
        let (finite, gerund) = text.trim().split_once('/')?;
        Some(Verb {
            finite: finite.to_owned(),
            gerund: gerund.to_owned(),
        })
    };
    let verbs: Option<Vec<Verb>> = verbs.split(',').map(verb).collect();
    let mut verbs = verbs.ok_or_else(|| wrong("verbs as finite/gerund"))?.into_iter();
    Ok(Row {
        id: id.to_owned(),
        picture: file(picture)?,
        sound: file(sound)?,
        words: Words {
            noun: nouns.next().ok_or_else(|| wrong("a noun phrase"))?,
            verb: verbs.next().ok_or_else(|| wrong("a verb"))?,
            plural,
            other_nouns: nouns.collect(),
            other_verbs: verbs.collect(),
        },
    })
}

fn file(text: &str) -> Option<File> {
    let (source, path) = text.split_once(':')?;
    let path = path.to_owned();
    match source {
        "tux" => Some(File::Tux(path)),
        "gc" => Some(File::GCompris(path)),
        "emoji" => Some(File::Emoji(path)),
        "sonic" => Some(File::SonicPi(path)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_line_becomes_files_and_words() {
        let row =
            row("+bongos | gc:a/b.svg | sonic:x | bongos, drums | drum/drumming, beat/beating").unwrap();
        assert_eq!(row.id, "bongos");
        assert_eq!(row.picture, File::GCompris("a/b.svg".to_owned()));
        assert_eq!(row.sound, File::SonicPi("x".to_owned()));
        assert!(row.words.plural);
        assert_eq!(row.words.other_nouns, ["drums"]);
        assert_eq!(row.words.other_verbs[0].gerund, "beating");
        assert!(super::row("a | b | c").is_err());
        assert!(super::row("a | tux:b | = | a b | c").is_err());
        assert!(super::row("a | other:b | = | a b | c/d").is_err());
    }

    #[test]
    fn the_table_is_well_formed() {
        let rows = rows().unwrap();
        assert!(rows.len() >= 130, "{}", rows.len());
        let mut ids = BTreeSet::new();
        let mut nouns = BTreeSet::new();
        for Row { id, words, .. } in &rows {
            assert!(id.bytes().all(|c| c.is_ascii_lowercase() || c == b'_'), "{id}");
            assert!(ids.insert(id), "{id} twice");
            for noun in std::iter::once(&words.noun).chain(&words.other_nouns) {
                let mut start = noun.split(' ');
                let article = start.next().unwrap();
                let first = start.next().unwrap_or_default();
                let vowel = first.starts_with(['a', 'e', 'i', 'o']) || first.starts_with("ump");
                match article {
                    "a" => assert!(!words.plural && !vowel, "{id}: {noun}"),
                    "an" => assert!(!words.plural && vowel, "{id}: {noun}"),
                    _ => assert!(words.plural, "{id}: {noun}"),
                }
                assert!(nouns.insert(noun), "{noun} names two things");
            }
            for verb in std::iter::once(&words.verb).chain(&words.other_verbs) {
                let (finite, gerund) = (verb.finite.split(' ').next(), verb.gerund.split(' ').next());
                assert_eq!(
                    finite.unwrap().ends_with('s'),
                    !words.plural,
                    "{id}: {}",
                    verb.finite
                );
                assert!(gerund.unwrap().ends_with("ing"), "{id}: {}", verb.gerund);
            }
        }
    }
}
