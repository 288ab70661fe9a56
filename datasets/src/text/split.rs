//! Documents as JSONL, split into those for training and those held out.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::documents::line_of;

/// Of so many documents one is held out.
const ONE_IN: u64 = 100;

/// Writes `train.jsonl` and `held_out.jsonl`.
///
/// Where a document goes depends on its SHA-256 alone, so that equal documents go to the same side and more documents move none.
#[derive(Debug)]
pub struct Split {
    files: [BufWriter<File>; 2],
    documents: usize,
}

impl Split {
    /// Opens both files in `folder`.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn create(folder: &Path) -> io::Result<Self> {
        let open =
            |name: &str| File::create(folder.join(name)).map(|file| BufWriter::with_capacity(1 << 20, file));
        Ok(Self {
            files: [open("train.jsonl")?, open("held_out.jsonl")?],
            documents: 0,
        })
    }

    /// Adds a document on the side that its hash chooses.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn push(&mut self, text: &str) -> io::Result<()> {
        self.push_to(text, is_held_out(text))
    }

    /// Adds a document on the given side.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn push_to(&mut self, text: &str, held_out: bool) -> io::Result<()> {
        self.documents += 1;
        self.files[usize::from(held_out)].write_all(line_of(text).as_bytes())
    }

    /// How many documents there are on both sides.
    pub fn documents(&self) -> usize {
        self.documents
    }

    /// Writes what is buffered.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn commit(self) -> io::Result<()> {
        for file in self.files {
            file.into_inner()
                .map_err(io::IntoInnerError::into_error)?
                .sync_all()?;
        }
        Ok(())
    }
}

/// Whether the hash of a document puts it among those held out.
fn is_held_out(text: &str) -> bool {
    let hash = Sha256::digest(text.as_bytes());
    let first = hash
        .iter()
        .take(8)
        .fold(0u64, |sum, &byte| sum << 8 | u64::from(byte));
    first % ONE_IN == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_in_a_hundred_is_held_out_and_equal_documents_stay_together() {
        let folder = tempfile::tempdir().unwrap();
        let mut split = Split::create(folder.path()).unwrap();
        for number in 0..5000 {
            let text = format!("document \"{number}\"\n");
            split.push(&text).unwrap();
            split.push(&text).unwrap();
        }
        assert_eq!(split.documents(), 10_000);
        split.commit().unwrap();
        let lines = |name: &str| {
            let text = std::fs::read_to_string(folder.path().join(name)).unwrap();
            text.lines().map(str::to_owned).collect::<Vec<_>>()
        };
        let (train, held) = (lines("train.jsonl"), lines("held_out.jsonl"));
        assert_eq!(train.len() + held.len(), 10_000);
        assert!((60..140).contains(&held.len()), "{}", held.len());
        assert!(held.chunks(2).all(|pair| pair[0] == pair[1]));
        assert!(train[0].starts_with("{\"text\":\"document \\\""), "{}", train[0]);
    }
}
