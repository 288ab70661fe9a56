//! What composed scenes have words for, as a page of the documentation: things and their sounds, motions, places and
//! times. A generator that learnt from their captions knows these words and no others.

use crate::fetch::FetchError;
use crate::scenes::wording::{place_phrases, spoken, time_phrases};
use crate::scenes::{Motion, Place, Timing};
use crate::sets::stamps;
use crate::things::Words;

/// What stands above the tables.
const HEAD: &str = "\
# Vocabulary

Written from the tables that the training captions are made of (`fulgur_datasets::vocabulary`); a test compares this
page with them. [generate.md](generate.md) says how to put the words together.

In the lists of motions, places and times the phrase in *italics* is kept out of training: it tells how a generator
takes words that it has not learnt from. The first phrase of a list is the plainest.
";

/// The page, in Markdown.
///
/// # Errors
/// A line of the table of things is not well formed.
pub fn page() -> Result<String, FetchError> {
    let mut page = HEAD.to_owned();
    let motions = Motion::ALL.map(|motion| {
        let place = motion
            .place()
            .map(|place| format!(" {}", place_phrases(place)[0]));
        let phrases = spoken(motion).into_iter();
        let phrases: Vec<String> = phrases
            .map(|phrase| phrase + place.as_deref().unwrap_or(""))
            .collect();
        vec![format!("`{}`", motion.name()), list(&phrases)]
    });
    table(&mut page, "Motions", &["motion", "it ..."], motions);
    let places = [Place::Left, Place::Middle, Place::Right].map(|place| {
        let phrases = place_phrases(place);
        vec![phrases[0].to_owned(), list(phrases)]
    });
    table(&mut page, "Places", &["place", "said as"], places);
    let times = [Timing::Start, Timing::Halfway, Timing::End].map(|timing| {
        let (phrases, (from_s, to_s)) = (time_phrases(timing), timing.range(4.0));
        vec![list(phrases), format!("{from_s} to {to_s} s")]
    });
    let columns = ["time", "first sound in a clip of 4 s"];
    table(&mut page, "Times", &columns, times);
    let things = stamps::words()?;
    let title = format!("Things ({})", things.len());
    let rows = things.into_iter().map(|(id, words)| {
        let Words {
            noun,
            verb,
            other_nouns,
            other_verbs,
            ..
        } = words;
        let nouns = std::iter::once(noun).chain(other_nouns);
        let verbs = std::iter::once(verb).chain(other_verbs).map(|verb| verb.finite);
        vec![format!("`{id}`"), joined(nouns), joined(verbs)]
    });
    table(&mut page, &title, &["thing", "called", "sound"], rows);
    Ok(page)
}

fn joined(words: impl Iterator<Item = String>) -> String {
    words.collect::<Vec<_>>().join(", ")
}

/// Phrases in a row, the last one reserved.
fn list(phrases: &[impl AsRef<str>]) -> String {
    let last = phrases.len().saturating_sub(1);
    joined(phrases.iter().enumerate().map(|(i, phrase)| {
        let phrase = phrase.as_ref();
        if i == last {
            format!("*{phrase}*")
        } else {
            phrase.to_owned()
        }
    }))
}

fn table(page: &mut String, title: &str, columns: &[&str], rows: impl IntoIterator<Item = Vec<String>>) {
    let rule = vec!["---"; columns.len()].join("|");
    *page += &format!("\n## {title}\n\n| {} |\n|{rule}|\n", columns.join(" | "));
    for row in rows {
        *page += &format!("| {} |\n", row.join(" | "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_names_every_thing_motion_place_and_time() {
        let page = page().unwrap();
        for (id, words) in stamps::words().unwrap() {
            assert!(page.contains(&format!("| `{id}` | {}", words.noun)), "{id}");
        }
        for motion in Motion::ALL {
            assert!(page.contains(&format!("| `{}` |", motion.name())), "{motion:?}");
        }
        assert!(page.contains("| `in_left` | drops in from the left, falls in from the left,"));
        assert!(page.contains("drops down on the right, falls down on the right,"));
        assert!(page.contains("*plunges in from the right* |"));
        assert!(page.contains("| at the start, at the beginning,"));
        assert!(page.is_ascii() && page.lines().all(|line| line.trim_end() == line));
    }
}
