//! Prints the tables of models/LICENCE.md: every file that the builtin models were trained on, with its terms, as the
//! prepared sets state them.
//!
//! ```text
//! fulgur data fetch stamps backgrounds bbb wordnet minilm
//! cargo run -p fulgur-datasets --example licences -- data > tables.md
//! ```
//!
//! Everything from the line that begins with `<!-- ` to the end of models/LICENCE.md is this output.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use fulgur_datasets::pictures;
use fulgur_datasets::sets::Manifest;
use fulgur_datasets::things::{Origin, Thing, Things};

/// Sets that some part of the builtin models learns from.
const SETS: [&str; 5] = ["stamps", "backgrounds", "bbb", "wordnet", "minilm"];
/// What separates the file of a still from its moment in the film.
const MOMENT: &str = " at ";
/// Longer lists of authors stand below the tables, under a number.
const LONG: usize = 90;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Some(data) = std::env::args().nth(1) else {
        return Err("usage: licences FOLDER_OF_PREPARED_SETS".into());
    };
    let data = Path::new(&data);
    let things = Things::load(&data.join("stamps"))?;
    let pictures = pictures::load(&data.join("backgrounds"))?;
    let mut page = Page::default();
    page.text += "<!-- made by datasets/examples/licences.rs: change that, not this -->\n";
    page.packages(data)?;
    page.summary(&things);
    page.things(&things);
    page.backgrounds(pictures.into_iter().map(|(_, origin)| origin));
    page.long_lists();
    std::io::stdout().write_all(page.text.as_bytes())?;
    Ok(())
}

#[derive(Default)]
struct Page {
    text: String,
    /// Long lists of authors in the order of their numbers.
    long: Vec<String>,
}

impl Page {
    fn line(&mut self, line: &str) {
        self.text += line;
        self.text.push('\n');
    }

    fn table(&mut self, title: &str, columns: &[&str]) {
        let rule = vec!["---"; columns.len()];
        for line in [
            "",
            title,
            "",
            &format!("| {} |", columns.join(" | ")),
            &format!("|{}|", rule.join("|")),
        ] {
            self.line(line);
        }
    }

    fn row(&mut self, cells: &[&str]) {
        let cells: Vec<String> = cells.iter().map(|cell| ascii(cell)).collect();
        self.line(&format!("| {} |", cells.join(" | ")));
    }

    /// The packages that the sets were made from, each with the sets.
    fn packages(&mut self, data: &Path) -> Result<(), Box<dyn std::error::Error>> {
        let mut packages: BTreeMap<String, (String, BTreeSet<&str>)> = BTreeMap::new();
        let mut terms = Vec::new();
        for set in SETS {
            let manifest = Manifest::read(&data.join(set))?;
            for source in manifest.sources {
                let name = format!("{} {}", source.package, source.version);
                let entry = packages.entry(name).or_insert((source.sha256, BTreeSet::new()));
                entry.1.insert(set);
            }
            terms.push((set, manifest.licence));
        }
        self.table("## Sets", &["set", "terms"]);
        for (set, licence) in terms {
            self.row(&[set, &licence]);
        }
        self.table("## Packages", &["package", "sets", "SHA-256 of the package file"]);
        for (package, (hash, sets)) in packages {
            let sets: Vec<&str> = sets.into_iter().collect();
            self.row(&[&package, &sets.join(", "), &hash]);
        }
        Ok(())
    }

    /// Files by licence, and which things are under the GPL in a part.
    fn summary(&mut self, things: &Things) {
        let mut files: BTreeMap<&str, [usize; 2]> = BTreeMap::new();
        for thing in things.iter() {
            for (part, (_, origin)) in parts(thing).into_iter().enumerate() {
                files.entry(&origin.licence).or_default()[part] += 1;
            }
        }
        self.table(
            "## Licences of the things' files",
            &["licence", "pictures", "sounds"],
        );
        for (licence, [pictures, sounds]) in files {
            self.row(&[licence, &pictures.to_string(), &sounds.to_string()]);
        }
        let is_gpl = |thing: &&Thing| {
            parts(thing)
                .iter()
                .any(|(_, origin)| origin.licence.contains("GPL"))
        };
        let (gpl, free): (Vec<&Thing>, Vec<&Thing>) = things.iter().partition(is_gpl);
        for (title, list) in [
            ("Things with a picture or a sound under the GPL", gpl),
            (
                "Things without, which are what `clips.without_gpl = true` trains on",
                free,
            ),
        ] {
            let names: Vec<&str> = list.iter().map(|thing| thing.id.as_str()).collect();
            let _ = write!(self.text, "\n{title} ({}): {}.\n", names.len(), names.join(", "));
        }
    }

    fn things(&mut self, things: &Things) {
        let columns = ["thing", "part", "package", "file", "authors", "licence"];
        self.table("## Things", &columns);
        for thing in things.iter() {
            for (part, origin) in parts(thing) {
                let authors = self.authors(origin);
                let file = format!("`{}`", origin.path);
                self.row(&[&thing.id, part, &origin.package, &file, &authors, &origin.licence]);
            }
        }
    }

    /// Pictures to put things in front of; stills of one film share a row.
    fn backgrounds(&mut self, origins: impl Iterator<Item = Origin>) {
        self.table("## Backgrounds", &["package", "file", "authors", "licence"]);
        let mut rows: Vec<(Origin, Vec<String>)> = Vec::new();
        for mut origin in origins {
            let mut moments = Vec::new();
            if let Some((file, moment)) = origin.path.split_once(MOMENT) {
                moments.push(moment.trim_end_matches(" s").to_owned());
                origin.path = file.to_owned();
            }
            match rows.iter_mut().find(|(known, _)| *known == origin) {
                Some((_, known)) => known.extend(moments),
                None => rows.push((origin, moments)),
            }
        }
        for (origin, moments) in rows {
            let authors = self.authors(&origin);
            let mut file = format!("`{}`", origin.path);
            if !moments.is_empty() {
                let _ = write!(file, " at {} s", moments.join(", "));
            }
            self.row(&[&origin.package, &file, &authors, &origin.licence]);
        }
    }

    /// Holders of the copyright, or the number of their list.
    fn authors(&mut self, origin: &Origin) -> String {
        let holders = without_addresses(&origin.holders);
        if holders.len() <= LONG {
            return holders;
        }
        let known = self.long.iter().position(|list| *list == holders);
        let number = known.unwrap_or_else(|| {
            self.long.push(holders);
            self.long.len() - 1
        });
        format!("list {} below", number + 1)
    }

    fn long_lists(&mut self) {
        self.line("\n## Long lists of authors\n");
        for (number, list) in std::mem::take(&mut self.long).into_iter().enumerate() {
            self.line(&format!("{}. {}", number + 1, ascii(&list)));
        }
    }
}

fn parts(thing: &Thing) -> [(&'static str, &Origin); 2] {
    [("picture", &thing.source.picture), ("sound", &thing.source.sound)]
}

/// Names without the mail addresses behind them.
fn without_addresses(holders: &str) -> String {
    let pieces = holders.split(" <").enumerate();
    pieces
        .map(|(i, piece)| match piece.split_once('>') {
            Some((_, rest)) if i > 0 => rest,
            _ => piece,
        })
        .collect()
}

/// The text in ASCII as Markdown shows it: letters with accents as references, no bar that would end a cell.
fn ascii(text: &str) -> String {
    let letter = |c: char| match c {
        '|' => "&#124;".to_owned(),
        '<' => "&lt;".to_owned(),
        c if c.is_ascii() => c.to_string(),
        c => format!("&#{};", u32::from(c)),
    };
    text.chars().map(letter).collect()
}
