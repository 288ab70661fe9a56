//! `english`: 85 MB of English out of Debian packages, for language models.
//!
//! Prepared files: `train.jsonl` and `held_out.jsonl`, one document `{"text": "..."}` a line; one document in a hundred, by its
//! hash, is held out.
//!
//! | documents | from |
//! |---|---|
//! | pages of 4 kB of a dictionary | GCIDE: Webster 1913 with quotations |
//! | pages of 4 kB of glosses | WordNet 3.0 |
//! | essays | An Anarchist FAQ |
//! | files of documentation | Linux 6.1 (without translations), Python 3.11 |
//! | chapters | Debian Reference |
//! | novels | the five of Jane Austen that set `austen` trains on |

use super::austen;
use super::wordnet;
use super::{Job, Set};
use crate::fetch::packages::{AUSTEN, DEBIAN_REFERENCE, ESSAYS, GCIDE, LINUX_DOC, PYTHON_DOC, WORDNET};
use crate::fetch::{FetchError, unpack};
use crate::text::Split;
use crate::text::markup::{html, joined, rst};

pub(super) const SET: Set = Set {
    name: "english",
    description: "85 MB of English: dictionary, glosses, essays, novels, manuals; JSONL, 1 in 100 documents held out",
    licence: "GPL-2+ (GCIDE, Debian Reference), GPL-2 (essays, Linux), PSF (Python), WordNet 3.0, public domain (novels)",
    packages: &[
        &GCIDE,
        &WORDNET,
        &ESSAYS,
        &LINUX_DOC,
        &PYTHON_DOC,
        &DEBIAN_REFERENCE,
        &AUSTEN,
    ],
    prepare,
};

/// The prepared file for training.
pub const TRAIN: &str = "train.jsonl";
/// The prepared file that is held out.
pub const HELD_OUT: &str = "held_out.jsonl";

const DICTIONARY: &str = "usr/share/dictd/gcide.dict.dz";
const REFERENCE: &str = "usr/share/debian-reference/debian-reference.en.txt.gz";
/// Bytes of a page of entries, which alone would be short documents.
const PAGE: usize = 4096;

fn prepare(job: &Job<'_>) -> Result<usize, FetchError> {
    let mut split = Split::create(job.out).map_err(FetchError::io(job.out, "write"))?;
    job.begin(SET.packages.len());
    for index in 0..SET.packages.len() {
        let entries = job.read(index, &wanted)?;
        let file = SET.packages[index].file;
        let texts = texts(index, &entries)?;
        if texts.is_empty() {
            return Err(FetchError::format(file, "content", "no text", "documents"));
        }
        for text in texts {
            split.push(&text).map_err(FetchError::io(job.out, "write"))?;
        }
        job.advance(index + 1)?;
    }
    let documents = split.documents();
    split.commit().map_err(FetchError::io(job.out, "write"))?;
    Ok(documents)
}

/// The files that hold text, of any of the packages.
fn wanted(path: &str) -> bool {
    let glosses = path.strip_prefix(wordnet::FOLDER);
    let source = path
        .split_once("/html/_sources/")
        .is_some_and(|(_, name)| name.ends_with(".rst.txt") && !name.starts_with("translations/"));
    let essay = path.starts_with("usr/share/doc/anarchism/html/") && path.ends_with(".html");
    [DICTIONARY, REFERENCE, austen::RDB].contains(&path)
        || glosses.is_some_and(|name| wordnet::PARTS.contains(&name))
        || source
        || essay
}

/// The documents of package number `index`.
fn texts(index: usize, entries: &unpack::Entries) -> Result<Vec<String>, FetchError> {
    let whole = |path: &str| {
        let packed = entries.get(path).map(Vec::as_slice);
        let packed = packed
            .ok_or_else(|| FetchError::format(SET.packages[index].file, path, "no such file", "a file"))?;
        let bytes = unpack::gunzip(packed, path)?;
        Ok::<_, FetchError>(String::from_utf8_lossy(&bytes).into_owned())
    };
    let each = |text: fn(&str) -> String| {
        let texts = entries
            .values()
            .map(|bytes| text(&String::from_utf8_lossy(bytes)));
        texts.filter(|text| !text.trim().is_empty()).collect()
    };
    Ok(match index {
        0 => pages(dictionary(&whole(DICTIONARY)?)),
        1 => pages(glosses(entries)),
        2 => each(html),
        3 | 4 => each(rst),
        5 => chapters(&whole(REFERENCE)?),
        _ => austen::training_texts(entries)?,
    })
}

fn glosses(entries: &unpack::Entries) -> Vec<String> {
    let mut lines = Vec::new();
    for bytes in entries.values() {
        let text = String::from_utf8_lossy(bytes);
        lines.extend(
            text.lines()
                .filter(|line| !line.starts_with(' '))
                .filter_map(wordnet::gloss),
        );
    }
    lines
}

/// Entries behind each other until a page is full.
fn pages(entries: Vec<String>) -> Vec<String> {
    let mut pages = Vec::new();
    let mut page = String::new();
    for entry in entries {
        page.push_str(&entry);
        page.push('\n');
        if page.len() >= PAGE {
            pages.push(std::mem::take(&mut page));
        }
    }
    if !page.is_empty() {
        pages.push(page);
    }
    pages
}

/// Entries of a dictionary in the form of dictd: a headword at the margin, all else indented.
fn dictionary(text: &str) -> Vec<String> {
    let mut entries: Vec<String> = Vec::new();
    let mut blank = true;
    for line in text.lines() {
        let words = unmarked(line);
        if words.is_empty() {
            blank = true;
            continue;
        }
        let headword = !line.starts_with(' ');
        let numbered = words
            .split_once(". ")
            .is_some_and(|(number, _)| number.bytes().all(|c| c.is_ascii_digit()));
        match entries.last_mut() {
            _ if headword => entries.push(words),
            // The preface has no headword.
            None => {}
            Some(entry) => {
                entry.push(if blank || numbered || entry.ends_with(':') {
                    '\n'
                } else {
                    ' '
                });
                entry.push_str(&words);
            }
        }
        blank = headword;
    }
    for entry in &mut entries {
        entry.push('\n');
    }
    // The dictionary tells about itself under names of its own.
    entries.retain(|entry| !entry.starts_with("00-database"));
    entries
}

/// A line of the dictionary without pronunciation between backslashes, braces of references and the source in brackets.
fn unmarked(line: &str) -> String {
    let mut text = String::new();
    for (index, part) in line.split('\\').enumerate() {
        // Between two backslashes; a last one without its pair is text.
        if index % 2 == 0 || line.matches('\\').count() < index + 1 {
            text.push_str(part);
        }
    }
    let text = text.replace(['{', '}'], "");
    let source = |bracket: &str| {
        ["1913 Webster", "WordNet", "PJC", "Webster 1913"]
            .iter()
            .any(|name| bracket.contains(name))
    };
    let text = match text.rfind('[') {
        Some(at) if text.trim_end().ends_with(']') && source(&text[at..]) => &text[..at],
        _ => &text,
    };
    joined(text).replace(" ,", ",")
}

/// A book cut before lines that begin with `Chapter N.`; the table of contents, whose lines are indented, is left out.
fn chapters(text: &str) -> Vec<String> {
    let mut chapters: Vec<String> = Vec::new();
    for line in text.lines() {
        // The blank behind the word is one that does not break.
        if line.starts_with("Chapter") && line[7..].starts_with([' ', '\u{a0}']) {
            chapters.push(String::new());
        }
        if let Some(chapter) = chapters.last_mut() {
            chapter.push_str(line.trim_end());
            chapter.push('\n');
        }
    }
    chapters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_lose_what_is_no_text() {
        let text = "00-database-info\n   About\n\n   this.\nA \\A\\ (named [=a] in the English), n.\n   1. The first\n      letter of {Alphabet}.\n      \
                    [1913 Webster]\n   2. Music.\n\n   Syn: one\n        [WordNet 1.5 +PJC]\n\nAb- \\Ab-\\ [Latin.]\n   A prefix.\n";
        let entries = dictionary(text);
        assert_eq!(
            entries,
            [
                "A (named [=a] in the English), n.\n1. The first letter of Alphabet.\n2. Music.\nSyn: one\n",
                "Ab- [Latin.]\nA prefix.\n"
            ]
        );
        assert_eq!(unmarked("odd \\ one"), "odd one");
    }

    #[test]
    fn pages_are_full_and_nothing_is_lost() {
        let entries: Vec<String> = (0..1000).map(|i| format!("entry {i}")).collect();
        let found = pages(entries.clone());
        assert!(
            found[..found.len() - 1]
                .iter()
                .all(|page| (PAGE..PAGE + 20).contains(&page.len()))
        );
        let lines: Vec<String> = found.concat().lines().map(str::to_owned).collect();
        assert_eq!(lines, entries);
    }

    #[test]
    fn files_are_chosen_and_books_cut() {
        for path in [
            DICTIONARY,
            "usr/share/wordnet/data.noun",
            "usr/share/doc/linux-doc-6.1/html/_sources/PCI/pci.rst.txt",
            "usr/share/doc/anarchism/html/secA1.html",
        ] {
            assert!(wanted(path), "{path}");
        }
        for path in [
            "usr/share/wordnet/index.noun",
            "usr/share/doc/linux-doc-6.1/html/_sources/translations/zh_CN/index.rst.txt",
            "usr/share/doc/linux-doc-6.1/html/PCI/pci.html",
        ] {
            assert!(!wanted(path), "{path}");
        }
        assert_eq!(
            chapters("Preface\n    Chapter 1. x\nChapter 1. One\na\nChapter\u{a0}2. Two\n"),
            ["Chapter 1. One\na\n", "Chapter\u{a0}2. Two\n"]
        );
    }
}
