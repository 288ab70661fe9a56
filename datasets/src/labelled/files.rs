//! Pictures in files of their own: which files are some, told by their content.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::{Entry, Reason, Skipped};
use crate::media::{MediaError, probe_picture};

/// A file that may be a picture, and what is known about it.
pub(super) struct Candidate {
    pub(super) path: PathBuf,
    pub(super) label: Option<usize>,
    pub(super) caption: Option<String>,
    pub(super) key: String,
    /// The part that the set puts it in; none where the hash of the key decides.
    pub(super) held_out: Option<bool>,
}

/// Looks at the beginnings of all files; keeps those that are pictures of a size that may be read.
pub(super) fn keep_pictures(candidates: Vec<Candidate>, skipped: &mut Skipped) -> (Vec<Entry>, Vec<PathBuf>) {
    let verdicts: Vec<_> = candidates
        .par_iter()
        .map(|candidate| verdict(&candidate.path))
        .collect();
    let (mut entries, mut paths) = (Vec::new(), Vec::new());
    for (candidate, verdict) in candidates.into_iter().zip(verdicts) {
        if let Err((reason, message)) = verdict {
            skipped.add(reason, message);
            continue;
        }
        let Candidate {
            path,
            label,
            caption,
            key,
            held_out,
        } = candidate;
        let mut entry = Entry::hashed(paths.len(), label, caption, key);
        entry.held_out = held_out.unwrap_or(entry.held_out);
        entries.push(entry);
        paths.push(path);
    }
    (entries, paths)
}

fn verdict(path: &Path) -> Result<(), (Reason, String)> {
    match probe_picture(path) {
        Ok(_) => Ok(()),
        Err(error @ MediaError::NotMedia { .. }) => Err((Reason::NoPicture, error.to_string())),
        Err(error) => Err((Reason::Broken, error.to_string())),
    }
}
