//! `wordnet`: glosses of WordNet 3.0 with the words they explain, 117,659 of them.
//!
//! Prepared tensors: `text` u8, one UTF-8 line a gloss, `WORD, WORD: GLOSS`, without line ends, and `offsets` i64
//! [n + 1], the beginnings of the lines and the end of the last one. Beside them lie the data files themselves, for
//! readers that want more than words and glosses: kinds of meanings, examples, how often a word is met.

use std::io::Write;
use std::path::Path;

use safetensors::tensor::Dtype;

use super::{Job, Set};
use crate::atomic::write_atomic;
use crate::fetch::packages::WORDNET;
use crate::fetch::{FetchError, unpack};
use crate::store::{Mapped, Plain, StoreError, write_tensors};

pub(super) const SET: Set = Set {
    name: "wordnet",
    description: "117,659 glosses of WordNet 3.0 with their words",
    licence: "WordNet 3.0 licence (Princeton University)",
    packages: &[&WORDNET],
    prepare,
};

const FILE: &str = "wordnet.safetensors";
pub(super) const FOLDER: &str = "usr/share/wordnet/";
pub(super) const PARTS: [&str; 4] = ["data.adj", "data.adv", "data.noun", "data.verb"];

/// Files of WordNet that the set keeps as they are: the meanings (`wndb(5)`) and how often they are met (`cntlist(5)`).
pub const KEPT: [&str; 5] = ["cntlist.rev", "data.adj", "data.adv", "data.noun", "data.verb"];

/// The prepared glosses.
#[derive(Debug)]
pub struct Wordnet {
    file: Mapped,
    offsets: Vec<i64>,
}

impl Wordnet {
    /// Opens the prepared set in the folder `dir`.
    ///
    /// # Errors
    /// The file is missing or damaged.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let file = Mapped::open(&dir.join(FILE))?;
        let offsets = file.indices("offsets")?;
        file.expect("text", Dtype::U8, &[0])?;
        Ok(Self { file, offsets })
    }

    /// Number of glosses.
    pub fn len(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// True when there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Line `index`: words, separated by commas, a colon, the gloss; None beyond the end.
    pub fn line(&self, index: usize) -> Option<&str> {
        let (text, _) = self.file.expect("text", Dtype::U8, &[0]).ok()?;
        let from = usize::try_from(*self.offsets.get(index)?).ok()?;
        let to = usize::try_from(*self.offsets.get(index + 1)?).ok()?;
        std::str::from_utf8(text.get(from..to)?).ok()
    }
}

fn prepare(job: &Job<'_>) -> Result<usize, FetchError> {
    job.begin(KEPT.len());
    let entries = job.read(0, &|path| {
        path.strip_prefix(FOLDER).is_some_and(|name| KEPT.contains(&name))
    })?;
    for (index, name) in KEPT.iter().enumerate() {
        job.advance(index)?;
        let bytes = job.entry(&entries, &format!("{FOLDER}{name}"))?;
        let path = job.out.join(name);
        write_atomic(&path, |file| file.write_all(bytes)).map_err(FetchError::io(&path, "write"))?;
    }
    let count = write_glosses(&entries, job.out)?;
    job.advance(KEPT.len())?;
    Ok(count)
}

/// Writes the glosses of all [`PARTS`] among `entries`; how many there are.
fn write_glosses(entries: &unpack::Entries, out: &Path) -> Result<usize, FetchError> {
    let (mut text, mut offsets) = (Vec::new(), vec![0]);
    for part in PARTS {
        let path = format!("{FOLDER}{part}");
        let bytes = entries.get(&path).map_or(&[][..], Vec::as_slice);
        // The files begin with the licence, on lines that are indented.
        for line in String::from_utf8_lossy(bytes)
            .lines()
            .filter(|line| !line.starts_with(' '))
        {
            let gloss = gloss(line).ok_or_else(|| {
                FetchError::format(&path, "line", line, "offset, file, type, words and a gloss")
            })?;
            text.extend(gloss.into_bytes());
            offsets.push(text.len() as i64);
        }
    }
    let tensors = vec![
        ("text".to_owned(), Plain::u8(&[text.len()], text)),
        ("offsets".to_owned(), Plain::i64(&offsets)),
    ];
    write_tensors(&out.join(FILE), tensors, None)?;
    Ok(offsets.len() - 1)
}

/// Words and gloss of a line: offset, file number, type, count of words in hexadecimal, (word, number) ..., ` | `.
pub(super) fn gloss(line: &str) -> Option<String> {
    let (head, gloss) = line.split_once(" | ")?;
    let mut fields = head.split(' ').skip(3);
    let count = usize::from_str_radix(fields.next()?, 16).ok()?;
    let mut words = Vec::new();
    for _ in 0..count {
        let word = fields.next()?;
        fields.next()?;
        // Adjectives may end in a mark of their place, such as (a) or (ip).
        let word = word.split_once('(').map_or(word, |(word, _)| word);
        words.push(word.replace('_', " "));
    }
    Some(format!("{}: {}", words.join(", "), gloss.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_gloss_are_cut_out() {
        let line = "00001740 00 a 02 able(p) 0 quite_able 1 001 = 05200169 n 0000 | having the means; \"able to swim\"  ";
        assert_eq!(
            gloss(line).unwrap(),
            "able, quite able: having the means; \"able to swim\""
        );
        assert_eq!(gloss("00001740 00 a zz able 0 | x"), None);
        assert_eq!(gloss("00001740 00 a 03 able 0 | x"), None);
        assert_eq!(gloss("no gloss"), None);
    }

    #[test]
    fn glosses_of_all_files_are_written_in_order() {
        let files = PARTS.map(|part| {
            let (letter, word) = (&part[5..6], &part[5..]);
            let text = format!("  1 licence\n00000001 00 {letter} 01 {word} 0 000 | about {word}\n");
            (format!("{FOLDER}{part}"), text.into_bytes())
        });
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(write_glosses(&files.into(), dir.path()).unwrap(), 4);
        let set = Wordnet::open(dir.path()).unwrap();
        assert_eq!(set.line(0), Some("adj: about adj"));
        assert_eq!((set.line(3), set.line(4)), (Some("verb: about verb"), None));
        let odd = [(format!("{FOLDER}data.noun"), b"00000001 no meaning\n".to_vec())];
        let text = write_glosses(&odd.into(), dir.path()).unwrap_err().to_string();
        assert!(
            text.contains("data.noun") && text.contains("no meaning"),
            "{text}"
        );
    }
}
