//! Clips out of either kind of file.

use std::path::Path;

use super::counts::Counts;
use super::error::CaptionError;
use super::manifest::Manifest;
use super::parser::Captions;
use super::record::Record;

/// The clips of a caption file or of a manifest. A manifest's name ends in `.jsonl`.
#[derive(Debug)]
pub enum Clips {
    /// The release's text.
    Captions(Box<Captions>),
    /// Lines of JSON.
    Manifest(Box<Manifest>),
}

impl Clips {
    /// Opens a file.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn open(path: &Path) -> Result<Self, CaptionError> {
        let is_manifest = path
            .extension()
            .is_some_and(|ending| ending.eq_ignore_ascii_case("jsonl"));
        Ok(if is_manifest {
            Self::Manifest(Box::new(Manifest::open(path)?))
        } else {
            Self::Captions(Box::new(Captions::open(path)?))
        })
    }

    /// What the file is: `captions` or `manifest`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Captions(_) => "captions",
            Self::Manifest(_) => "manifest",
        }
    }

    /// The next clip; none at the end of the file.
    ///
    /// # Errors
    /// The file cannot be read, or a line of a manifest is no record.
    pub fn next_clip(&mut self) -> Result<Option<Record>, CaptionError> {
        match self {
            Self::Captions(captions) => captions.next_clip(),
            Self::Manifest(manifest) => manifest.next_clip(),
        }
    }

    /// What was counted so far.
    pub fn counts(&self) -> &Counts {
        match self {
            Self::Captions(captions) => captions.counts(),
            Self::Manifest(manifest) => manifest.counts(),
        }
    }

    /// Bytes that were read, and those of the file.
    pub fn position(&self) -> (u64, u64) {
        match self {
            Self::Captions(captions) => captions.position(),
            Self::Manifest(manifest) => manifest.position(),
        }
    }
}
