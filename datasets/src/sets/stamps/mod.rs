//! `stamps`: things with their real picture, their real sound and their words.
//!
//! Pictures and sounds come from Tux Paint's stamps, GCompris, Noto emoji and Sonic Pi's samples; the table
//! (`table.txt` beside this file) says which picture goes with which sound and how the thing is called. It leaves out
//! files whose sound is digital silence or belongs to another animal as well.

mod cutout;
mod sound;
mod table;

use std::collections::{BTreeMap, BTreeSet};

use super::{Job, Set};
use crate::fetch::FetchError;
use crate::fetch::copyright::Copyrights;
use crate::fetch::packages::{EMOJI, GCOMPRIS, Package, SONIC_PI, TUXPAINT};
use crate::fetch::rcc::Resources;
use crate::fetch::unpack::Entries;
use crate::things::{self, Origin, Source, Thing, Things, Words};
use table::{File, Row};

pub(super) const SET: Set = Set {
    name: "stamps",
    description: "159 things with picture, own sound and words, for composed audible scenes",
    licence: "GPL-2, GPL-3, CC-BY-SA, CC-BY, CC0, Free Art, Apache-2.0, per file in things.safetensors",
    packages: &[&TUXPAINT, &GCOMPRIS, &EMOJI, &SONIC_PI],
    prepare,
};

/// Names of all things of the table and the words for them, in the order of the names.
pub(crate) fn words() -> Result<BTreeMap<String, Words>, FetchError> {
    Ok(table::rows()?
        .into_iter()
        .map(|row| (row.id, row.words))
        .collect())
}

const STAMPS_FOLDER: &str = "usr/share/tuxpaint/stamps/";
const RCC_FOLDER: &str = "usr/share/gcompris-qt/rcc/";
const EMOJI_FOLDER: &str = "package/img/google/64/";
const SAMPLES_FOLDER: &str = "usr/share/sonic-pi/samples/";
/// The pictures of emoji-datasource-google are Noto Emoji.
const EMOJI_TERMS: (&str, &str) = ("Apache-2.0", "Google (Noto Emoji)");

/// One file of a package and where it comes from.
pub(super) struct Asset {
    pub(super) bytes: Vec<u8>,
    pub(super) origin: Origin,
}

/// A package in memory, with its copyright file.
pub(super) struct Shelf {
    package: &'static Package,
    entries: Entries,
    terms: Copyrights,
}

impl Shelf {
    fn new(package: &'static Package, entries: Entries) -> Self {
        let text = entries.iter().find(|(path, _)| path.ends_with("/copyright"));
        let terms = text.map(|(_, bytes)| Copyrights::parse(&String::from_utf8_lossy(bytes)));
        Self {
            package,
            entries,
            terms: terms.unwrap_or_default(),
        }
    }

    /// `bytes` at `path` in the package; `source` is its path in the source package, which the terms speak of.
    fn asset(&self, bytes: Vec<u8>, path: String, source: &str) -> Result<Asset, FetchError> {
        // Photographs were converted; the copyright file still speaks of the originals.
        let original = |ending| source.replace(".webp", ending);
        let (jpg, jpeg, png) = (original(".jpg"), original(".jpeg"), original(".png"));
        let terms = self.terms.of(&[source, &jpg, &jpeg, &png]);
        let terms = terms.ok_or_else(|| missing(self.package, source, "terms in its copyright file"))?;
        let origin = Origin {
            package: self.package.citation(),
            path,
            licence: terms.licence.clone(),
            holders: terms.holders.clone(),
        };
        Ok(Asset { bytes, origin })
    }

    /// The first of `names` under `folder`.
    fn find(&self, folder: &str, names: &[String]) -> Result<(String, Vec<u8>), FetchError> {
        let paths = names.iter().map(|name| format!("{folder}{name}"));
        for path in paths {
            if let Some(bytes) = self.entries.get(&path) {
                return Ok((path, bytes.clone()));
            }
        }
        Err(missing(self.package, &names.join(", "), "the file"))
    }
}

fn missing(package: &Package, path: &str, expected: &str) -> FetchError {
    FetchError::format(package.file, path, "nothing", expected)
}

/// The four packages, read as far as the table needs them.
struct Shelves {
    tux: Shelf,
    gcompris: Shelf,
    emoji: Shelf,
    sonic: Shelf,
}

impl Shelves {
    fn read(job: &Job<'_>, rows: &[Row]) -> Result<Self, FetchError> {
        let files: Vec<&File> = rows.iter().flat_map(|row| [&row.picture, &row.sound]).collect();
        let stems = |pick: fn(&File) -> Option<&str>| {
            files
                .iter()
                .filter_map(|file| pick(file))
                .collect::<BTreeSet<_>>()
        };
        let tux = stems(|file| {
            if let File::Tux(path) = file {
                Some(path)
            } else {
                None
            }
        });
        let archives = stems(|file| {
            if let File::GCompris(path) = file {
                path.split('/').next()
            } else {
                None
            }
        });
        let codes = stems(|file| {
            if let File::Emoji(code) = file {
                Some(code)
            } else {
                None
            }
        });
        let samples = stems(|file| {
            if let File::SonicPi(name) = file {
                Some(name)
            } else {
                None
            }
        });
        let stem = |path: &str, folder: &str| {
            let name = path.strip_prefix(folder)?;
            Some(name.rsplit_once('.')?.0.to_owned())
        };
        let wants = |path: &str, folder: &str, stems: &BTreeSet<&str>| {
            path.ends_with("/copyright")
                || stem(path, folder).is_some_and(|stem| stems.contains(stem.as_str()))
        };
        let read = |index: usize, folder: &'static str, stems: &BTreeSet<&str>| {
            let entries = job.read(index, &|path| wants(path, folder, stems))?;
            Ok::<_, FetchError>(Shelf::new(SET.packages[index], entries))
        };
        Ok(Self {
            tux: read(0, STAMPS_FOLDER, &tux)?,
            gcompris: gcompris_shelf(job, 1, &archives.iter().copied().collect::<Vec<_>>())?,
            emoji: read(2, EMOJI_FOLDER, &codes)?,
            sonic: read(3, SAMPLES_FOLDER, &samples)?,
        })
    }

    fn asset(&self, file: &File, endings: &[&str]) -> Result<Asset, FetchError> {
        match file {
            File::Tux(stem) => {
                let names: Vec<_> = endings.iter().map(|ending| format!("{stem}.{ending}")).collect();
                let (path, bytes) = self.tux.find(STAMPS_FOLDER, &names)?;
                let source = format!("stamps/{}", &path[STAMPS_FOLDER.len()..]);
                self.tux.asset(bytes, path, &source)
            }
            File::GCompris(path) => {
                let (archive, rest) = path.split_once('/').unwrap_or((path, ""));
                self.gcompris.gcompris_asset(archive, rest)
            }
            File::Emoji(code) => {
                let (path, bytes) = self.emoji.find(EMOJI_FOLDER, &[format!("{code}.png")])?;
                let origin = Origin {
                    package: EMOJI.citation(),
                    path,
                    licence: EMOJI_TERMS.0.to_owned(),
                    holders: EMOJI_TERMS.1.to_owned(),
                };
                Ok(Asset { bytes, origin })
            }
            File::SonicPi(name) => {
                let name = format!("{name}.flac");
                let (path, bytes) = self.sonic.find(SAMPLES_FOLDER, std::slice::from_ref(&name))?;
                self.sonic.asset(bytes, path, &format!("etc/samples/{name}"))
            }
        }
    }
}

/// The named resource archives of GCompris, which is package number `index` of the job's set.
pub(super) fn gcompris_shelf(job: &Job<'_>, index: usize, archives: &[&str]) -> Result<Shelf, FetchError> {
    let wanted = |path: &str| {
        let name = path
            .strip_prefix(RCC_FOLDER)
            .and_then(|name| name.strip_suffix(".rcc"));
        path.ends_with("/copyright") || name.is_some_and(|name| archives.contains(&name))
    };
    Shelf::unpack(Shelf::new(&GCOMPRIS, job.read(index, &wanted)?))
}

impl Shelf {
    /// The file `rest` in the resource folder of an activity; the archive `core` is the program itself.
    pub(super) fn gcompris_asset(&self, archive: &str, rest: &str) -> Result<Asset, FetchError> {
        let source = match archive {
            "core" => format!("src/core/resource/{rest}"),
            _ => format!("src/activities/{archive}/resource/{rest}"),
        };
        let (_, bytes) = self.find("", std::slice::from_ref(&source))?;
        let path = format!("{RCC_FOLDER}{archive}.rcc!/gcompris/{source}");
        self.asset(bytes, path, &source)
    }

    /// Paths of all files in the resource folder of an activity, in the order of their names.
    pub(super) fn gcompris_paths(&self, archive: &str) -> Vec<String> {
        let folder = format!("src/activities/{archive}/resource/");
        let paths = self.entries.keys();
        paths
            .filter_map(|path| path.strip_prefix(&folder).map(str::to_owned))
            .collect()
    }

    /// Replaces resource archives by the files in them, under their paths in the source tree.
    fn unpack(shelf: Self) -> Result<Self, FetchError> {
        let mut entries = BTreeMap::new();
        for (name, bytes) in &shelf.entries {
            if !name.ends_with(".rcc") {
                continue;
            }
            let damaged = |e: crate::fetch::rcc::RccError| {
                FetchError::format(name, "archive", e.to_string(), "a whole archive")
            };
            let resources = Resources::parse(bytes).map_err(damaged)?;
            for path in resources.paths() {
                let Some(source) = path.strip_prefix("gcompris/") else {
                    continue;
                };
                if let Some(content) = resources.file(path) {
                    entries.insert(source.to_owned(), content.map_err(damaged)?);
                }
            }
        }
        Ok(Self { entries, ..shelf })
    }
}

fn prepare(job: &Job<'_>) -> Result<usize, FetchError> {
    let rows = table::rows()?;
    let shelves = Shelves::read(job, &rows)?;
    job.begin(rows.len());
    let mut all = Vec::with_capacity(rows.len());
    for (index, row) in rows.iter().enumerate() {
        job.advance(index)?;
        let picture = shelves.asset(&row.picture, &["png", "svg"])?;
        let sound = shelves.asset(&row.sound, &["ogg", "wav"])?;
        all.push(Thing {
            id: row.id.clone(),
            words: row.words.clone(),
            cutout: cutout::cut(&picture.bytes, &picture.origin.path)?,
            sound: sound::trim(&sound.bytes, &sound.origin.path)?,
            source: Source {
                picture: picture.origin,
                sound: sound.origin,
            },
        });
    }
    all.sort_by(|a, b| a.id.cmp(&b.id));
    check_distinct(&all)?;
    job.advance(all.len())?;
    let count = all.len();
    things::save(&Things(all), job.out)?;
    Ok(count)
}

/// Refuses two things with one picture or one sound: no text could tell them apart.
fn check_distinct(all: &[Thing]) -> Result<(), FetchError> {
    let (mut pictures, mut sounds) = (BTreeMap::new(), BTreeMap::new());
    for thing in all {
        let samples: Vec<u32> = thing.sound.iter().map(|x| x.to_bits()).collect();
        let twins = [
            (
                "picture",
                pictures.insert(thing.cutout.rgba.as_slice(), &thing.id),
            ),
            ("sound", sounds.insert(samples, &thing.id)),
        ];
        for (what, twin) in twins {
            if let Some(twin) = twin {
                let found = format!("the {what} of {twin}");
                return Err(FetchError::format(
                    "table of stamps",
                    &thing.id,
                    found,
                    format!("a {what} of its own"),
                ));
            }
        }
    }
    Ok(())
}
