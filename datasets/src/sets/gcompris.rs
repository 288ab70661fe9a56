//! `gcompris`: pictures of GCompris with their names: photographs and drawings sorted by category, pictured words, monuments, animals.
//!
//! The pictures lie in `pictures.safetensors` as they were packed, each with class, name and terms.

use super::stamps::{Asset, gcompris_shelf};
use super::{Job, Set};
use crate::fetch::FetchError;
use crate::fetch::packages::GCOMPRIS;
use crate::labelled::packed::{self, Card};
use crate::media::decode_upright;

pub(super) const SET: Set = Set {
    name: "gcompris",
    description: "real pictures with names, some in categories, of all sizes",
    licence: "GPL-3, CC-BY-SA, CC-BY, CC0, public domain, per picture in pictures.safetensors",
    packages: &[&GCOMPRIS],
    prepare,
};

/// Archives, the folder of their pictures, and the class; of the first one folders are the classes.
const SOURCES: [(&str, &str, Option<&str>); 4] = [
    ("categorization", "images/", None),
    ("lang", "words_sample/", Some("words")),
    ("explore_monuments", "", Some("monuments")),
    ("explore_world_animals", "animals/", Some("animals")),
];

fn prepare(job: &Job<'_>) -> Result<usize, FetchError> {
    let shelf = gcompris_shelf(job, 0, &SOURCES.map(|(archive, _, _)| archive))?;
    let mut pictures = Vec::new();
    for (archive, folder, class) in SOURCES {
        for rest in shelf.gcompris_paths(archive) {
            let Some(name) = rest.strip_prefix(folder).filter(|name| name.ends_with(".webp")) else {
                continue;
            };
            let (within, name) = name.rsplit_once('/').unwrap_or(("", name));
            let Asset { bytes, origin } = shelf.gcompris_asset(archive, &rest)?;
            let card = Card {
                class: class.unwrap_or(within).to_owned(),
                caption: words(name.trim_end_matches(".webp")),
                key: format!("{archive}/{rest}"),
                origin,
            };
            pictures.push((card, bytes));
        }
    }
    job.begin(pictures.len());
    for (index, (card, bytes)) in pictures.iter().enumerate() {
        job.advance(index)?;
        decode_upright(bytes, card.origin.path.as_ref())?;
    }
    let count = pictures.len();
    packed::write(job.out, pictures)?;
    job.advance(count)?;
    Ok(count)
}

/// The words of a file name: `greatWallofChina`, `polar_bear` and `hammer2`.
fn words(name: &str) -> String {
    let mut words = String::new();
    for c in name.trim_end_matches(|c: char| c.is_ascii_digit()).chars() {
        if c == '_' || c == '-' {
            words.push(' ');
            continue;
        }
        if c.is_uppercase() && !words.is_empty() && !words.ends_with(' ') {
            words.push(' ');
        }
        words.extend(c.to_lowercase());
    }
    words.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_words() {
        for (name, expected) in [
            ("machuPicchu", "machu picchu"),
            ("polar_bear", "polar bear"),
            ("hammer12", "hammer"),
            ("orange-color", "orange color"),
        ] {
            assert_eq!(words(name), expected);
        }
    }
}
