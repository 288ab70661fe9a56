//! `openclipart`: some 4,000 drawings with names, in folders by subject, public domain.
//!
//! Icons and stars, which are many and alike, are left out. File names end in a cut-off name of the artist, which is no caption: the words
//! behind which one begins are listed here. The pictures lie in `pictures.safetensors` as they were packed.

use super::{Job, Set};
use crate::fetch::FetchError;
use crate::fetch::packages::OPENCLIPART;
use crate::labelled::packed::{self, Card};
use crate::media::decode_upright;
use crate::things::Origin;

pub(super) const SET: Set = Set {
    name: "openclipart",
    description: "drawings with names, in folders by subject, of all sizes",
    licence: "public domain",
    packages: &[&OPENCLIPART],
    prepare,
};

const FOLDER: &str = "usr/share/openclipart/png/";
const LEFT_OUT: [&str; 2] = ["computer/icons/", "shapes/stars/"];
/// File names were cut to so many letters, not counting the number behind.
const CUT: usize = 24;
/// First words of the names of artists.
const ARTISTS: &[&str] = &[
    "andreas",
    "andy",
    "angelo",
    "anthony",
    "architetto",
    "aurium",
    "benji",
    "brice",
    "charles",
    "costea",
    "dan",
    "daniel",
    "dave",
    "dennis",
    "dirk",
    "enrique",
    "francesco",
    "frouke",
    "fudriot",
    "gabrielle",
    "ganson",
    "gerald",
    "gino",
    "guillaume",
    "jakob",
    "jarno",
    "jean",
    "jean-victor",
    "joel",
    "jon",
    "jonadab",
    "jonathan",
    "juliane",
    "kurt",
    "leif",
    "linda",
    "lumen",
    "marcelo",
    "mateya",
    "matthew",
    "mauro",
    "michae",
    "mimooh",
    "nathan",
    "nicolas",
    "nicu",
    "peterm",
    "petri",
    "rollandin",
    "romus",
    "sergio",
    "stefan",
    "tanguy",
    "tess",
    "teudimundo",
    "toh",
    "valessio",
    "vladimir",
    "yves",
    "zazou",
];

fn prepare(job: &Job<'_>) -> Result<usize, FetchError> {
    let wanted = |path: &str| {
        let within = path.strip_prefix(FOLDER).filter(|name| name.ends_with(".png"));
        within.is_some_and(|name| !LEFT_OUT.iter().any(|folder| name.starts_with(folder)))
    };
    let entries = job.read(0, &wanted)?;
    job.begin(entries.len());
    let mut pictures = Vec::new();
    for (index, (path, bytes)) in entries.into_iter().enumerate() {
        job.advance(index)?;
        let name = &path[FOLDER.len()..];
        let (class, file) = (
            name.split('/').next().unwrap_or_default(),
            name.rsplit('/').next().unwrap_or_default(),
        );
        let caption = words(file.trim_end_matches(".png"));
        // A few files of the package are no pictures.
        if caption.is_empty() || decode_upright(&bytes, path.as_ref()).is_err() {
            continue;
        }
        let card = Card {
            class: class.to_owned(),
            key: format!("{class}/{caption}"),
            caption,
            origin: Origin {
                package: OPENCLIPART.citation(),
                path,
                licence: "public domain".to_owned(),
                holders: String::new(),
            },
        };
        pictures.push((card, bytes));
    }
    let count = pictures.len();
    packed::write(job.out, pictures)?;
    job.advance(count)?;
    Ok(count)
}

/// The words of a file name without number and artist: `ladybug_architetto_franc_01`.
fn words(name: &str) -> String {
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let stem = match name.rsplit_once('_') {
        Some((stem, number)) if is_number(number) => stem,
        _ => name,
    };
    let is_cut = stem.len() >= CUT - 1;
    let all: Vec<&str> = stem.split('_').filter(|word| !word.is_empty()).collect();
    let is_artist = |place: usize| {
        let word = all[place];
        let cut_off = is_cut && place + 1 == all.len() && word.len() >= 3;
        place > 0
            && ARTISTS
                .iter()
                .any(|artist| *artist == word || (cut_off && artist.starts_with(word)))
    };
    let end = (0..all.len())
        .find(|&place| is_artist(place))
        .unwrap_or(all.len());
    let mut words: Vec<&str> = all[..end].to_vec();
    // Initials of an artist, and "bw" for black and white.
    while words.len() > 1 && words.last().is_some_and(|word| word.len() == 1 || *word == "bw") {
        words.pop();
    }
    let text = words.join(" ").to_lowercase();
    let text = text.trim_end_matches(|c: char| c.is_ascii_digit() || c == ' ');
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_artists_are_cut_off() {
        for (name, expected) in [
            ("insetto_architetto_franc_01", "insetto"),
            ("grass_hopper_02", "grass hopper"),
            ("crawfish1_bw_ganson", "crawfish"),
            ("cymru_flag_wales_michae_", "cymru flag wales"),
            ("quattro_farfalle_archite_01", "quattro farfalle"),
            ("dan_gerhards", "dan gerhards"),
            ("ladybug", "ladybug"),
        ] {
            assert_eq!(words(name), expected, "{name}");
        }
    }
}
