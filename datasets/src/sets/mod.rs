//! The data sets: what they are, fetching and preparing them once, and readers of the prepared files.
//!
//! A set is prepared into `<data>/<name>/`: safetensors files and, written last, `manifest.json` with the number of
//! items, the sources and the hashes of the files. [`fetch`] does nothing for a set that has a manifest.

pub mod austen;
pub mod backgrounds;
pub mod bbb;
pub mod emoji;
pub mod english;
pub mod fashion_mnist;
pub mod gcompris;
mod manifest;
pub mod minilm;
pub mod mnist_5k;
pub mod openclipart;
pub mod stamps;
mod svg;
pub mod wordnet;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::fetch::packages::Package;
use crate::fetch::{DataDir, FetchError, FetchOptions, unpack};

pub use manifest::{Manifest, ManifestFile, ManifestSource};

/// What [`list`] tells about a set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SetInfo {
    /// The name that [`fetch`] takes.
    pub name: &'static str,
    /// One line about the content.
    pub description: &'static str,
    /// Terms of the content.
    pub licence: &'static str,
    /// Length of all downloads in bytes.
    pub download_bytes: u64,
    /// True when the set is prepared.
    pub prepared: bool,
    /// Number of items once it is prepared.
    pub items: Option<usize>,
    /// The folder of the prepared set.
    pub path: PathBuf,
}

/// A set that is ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Prepared {
    /// Its name.
    pub name: &'static str,
    /// Its folder.
    pub path: PathBuf,
    /// Number of items: things, frames, pictures, texts or files.
    pub items: usize,
}

/// One set: how it is called and how it is made.
struct Set {
    name: &'static str,
    description: &'static str,
    licence: &'static str,
    packages: &'static [&'static Package],
    prepare: fn(&Job<'_>) -> Result<usize, FetchError>,
}

/// What the preparation of a set works with.
struct Job<'a> {
    set: &'a Set,
    /// The package files, in the order of `set.packages`.
    files: Vec<PathBuf>,
    /// The folder to write into.
    out: &'a Path,
    options: &'a FetchOptions<'a>,
}

impl Job<'_> {
    /// The files of package number `index` whose paths `wanted` accepts.
    fn read(&self, index: usize, wanted: &dyn Fn(&str) -> bool) -> Result<unpack::Entries, FetchError> {
        let package = self.set.packages[index];
        unpack::read(package, &self.files[index], wanted, &self.options.cancel)
    }

    /// The content of `path` among `entries`.
    fn entry<'e>(&self, entries: &'e unpack::Entries, path: &str) -> Result<&'e [u8], FetchError> {
        let bytes = entries.get(path).map(Vec::as_slice);
        bytes.ok_or_else(|| FetchError::format(self.set.packages[0].file, path, "no such file", "a file"))
    }

    /// Begins to count items; the total is told where it is known.
    fn begin(&self, total: usize) {
        let step = format!("preparing {}", self.set.name);
        self.options
            .progress
            .begin(&step, Some(total as u64), crate::fetch::Unit::Items);
    }

    /// So many items are done; stops where the fetch was cancelled.
    fn advance(&self, done: usize) -> Result<(), FetchError> {
        self.options.progress.advance(done as u64);
        self.options.cancel.check()
    }
}

const SETS: &[&Set] = &[
    &stamps::SET,
    &bbb::SET,
    &backgrounds::SET,
    &fashion_mnist::SET,
    &mnist_5k::SET,
    &emoji::SET,
    &gcompris::SET,
    &openclipart::SET,
    &austen::SET,
    &english::SET,
    &minilm::SET,
    &wordnet::SET,
];

/// All sets, prepared or not, in the order of the documentation.
pub fn list(data: &DataDir) -> Vec<SetInfo> {
    let info = |set: &&Set| {
        let path = data.set(set.name);
        let manifest = Manifest::read(&path).ok();
        SetInfo {
            name: set.name,
            description: set.description,
            licence: set.licence,
            download_bytes: set.packages.iter().map(|package| package.bytes).sum(),
            prepared: manifest.is_some(),
            items: manifest.map(|manifest| manifest.items),
            path,
        }
    };
    SETS.iter().map(info).collect()
}

/// Downloads and prepares the set `name`, or finds it prepared.
///
/// Finished downloads are kept when it is interrupted; the folder of the set appears only when the set is whole.
///
/// # Errors
/// There is no such set, a client is missing or fails, a hash differs, a package holds something unexpected, the disk
/// refuses, or `options.cancel` was used.
pub fn fetch(name: &str, options: &FetchOptions<'_>) -> Result<Prepared, FetchError> {
    let Some(set) = SETS.iter().find(|set| set.name == name) else {
        let known: Vec<_> = SETS.iter().map(|set| set.name).collect();
        return Err(FetchError::UnknownSet {
            name: name.to_owned(),
            known: known.join(", "),
        });
    };
    let path = options.data.set(set.name);
    if let Ok(manifest) = Manifest::read(&path) {
        return Ok(Prepared {
            name: set.name,
            path,
            items: manifest.items,
        });
    }
    let files = set
        .packages
        .iter()
        .map(|package| crate::fetch::download(package, options));
    let files = files.collect::<Result<Vec<_>, _>>()?;
    let root = options.data.path();
    let part = tempfile::Builder::new()
        .prefix(&format!(".{}.", set.name))
        .suffix(".part")
        .tempdir_in(root)
        .map_err(FetchError::io(root, "create a folder in"))?;
    // The folder keeps its mode when it is renamed: the usual one of new folders, not owner only.
    let out = part.path().join(set.name);
    std::fs::create_dir(&out).map_err(FetchError::io(&out, "create"))?;
    let job = Job {
        set,
        files,
        out: &out,
        options,
    };
    let items = (set.prepare)(&job)?;
    Manifest::write(set, &out, items, options)?;
    // What stands there has no manifest: an unfinished set, or something that is none.
    match std::fs::remove_dir_all(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(FetchError::io(&path, "replace")(e));
        }
        _ => {}
    }
    std::fs::rename(&out, &path).map_err(FetchError::io(&path, "write"))?;
    Ok(Prepared {
        name: set.name,
        path,
        items,
    })
}
