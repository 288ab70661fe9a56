//! `manifest.json` of a prepared set; its presence says that the set is whole.

use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Set;
use crate::atomic::write_atomic;
use crate::fetch::{FetchError, FetchOptions, sha256_of};

const FILE: &str = "manifest.json";
/// Raised whenever a prepared file changes its layout or content, so that older ones are prepared again.
const VERSION: u32 = 2;

/// What a prepared set holds and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Name of the set.
    pub name: String,
    /// Version of the layout.
    pub version: u32,
    /// Number of items.
    pub items: usize,
    /// Terms of the content.
    pub licence: String,
    /// The packages it was made from.
    pub sources: Vec<ManifestSource>,
    /// The other files of the folder.
    pub files: Vec<ManifestFile>,
}

/// A package that a set was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestSource {
    /// Name of the package.
    pub package: String,
    /// Its version.
    pub version: String,
    /// Its file.
    pub file: String,
    /// SHA-256 of that file.
    pub sha256: String,
}

/// A file of a prepared set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Name in the folder.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Its SHA-256.
    pub sha256: String,
}

impl Manifest {
    /// Reads the manifest in the folder `dir` and checks that its files are there with their lengths.
    ///
    /// # Errors
    /// There is none, it is of another version or no manifest, or a file is missing or of another length.
    pub fn read(dir: &Path) -> Result<Self, FetchError> {
        let path = dir.join(FILE);
        let bytes = std::fs::read(&path).map_err(FetchError::io(&path, "read"))?;
        let label = path.display().to_string();
        let manifest: Self = serde_json::from_slice(&bytes)
            .map_err(|e| FetchError::format(&label, "manifest", e.to_string(), "JSON of a prepared set"))?;
        if manifest.version != VERSION {
            let found = manifest.version.to_string();
            return Err(FetchError::format(&label, "version", found, VERSION.to_string()));
        }
        for file in &manifest.files {
            let path = dir.join(&file.name);
            let found = std::fs::metadata(&path)
                .map_err(FetchError::io(&path, "read"))?
                .len();
            if found != file.bytes {
                let expected = format!("{} bytes", file.bytes);
                return Err(FetchError::format(
                    path.display().to_string(),
                    "length",
                    found.to_string(),
                    expected,
                ));
            }
        }
        Ok(manifest)
    }

    pub(super) fn write(
        set: &Set,
        dir: &Path,
        items: usize,
        options: &FetchOptions<'_>,
    ) -> Result<(), FetchError> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(FetchError::io(dir, "read"))? {
            let path = entry.map_err(FetchError::io(dir, "read"))?.path();
            let length = std::fs::metadata(&path)
                .map_err(FetchError::io(&path, "read"))?
                .len();
            files.push(ManifestFile {
                name: path
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned(),
                bytes: length,
                sha256: sha256_of(&path, &options.cancel)?,
            });
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        let source = |package: &&crate::fetch::packages::Package| ManifestSource {
            package: package.name.to_owned(),
            version: package.version.to_owned(),
            file: package.file.to_owned(),
            sha256: package.sha256.to_owned(),
        };
        let manifest = Self {
            name: set.name.to_owned(),
            version: VERSION,
            items,
            licence: set.licence.to_owned(),
            sources: set.packages.iter().map(source).collect(),
            files,
        };
        let path = dir.join(FILE);
        let text = serde_json::to_string_pretty(&manifest)
            .map_err(|e| FetchError::format(FILE, "manifest", e.to_string(), "fields that JSON can hold"))?;
        write_atomic(&path, |file| file.write_all(text.as_bytes())).map_err(FetchError::io(&path, "write"))
    }
}
