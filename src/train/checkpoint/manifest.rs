//! The list of the files of a folder, with length and SHA-256 of each: written last, checked before anything is used.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use fulgur_lightnet::params::file::{read_bounded, write_atomically};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::super::error::TrainError;

/// Name of the list in its folder.
pub(super) const MANIFEST: &str = "manifest.json";
/// Manifests and states are small; larger ones are not ours.
pub(super) const LARGEST_JSON: u64 = 16 << 20;

/// Length and hash of a file.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Entry {
    /// Length in bytes.
    pub(super) bytes: u64,
    /// SHA-256 in hexadecimal.
    pub(super) sha256: String,
}

impl Entry {
    /// Of bytes in memory.
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.len() as u64,
            sha256: hexadecimal(Sha256::new_with_prefix(bytes)),
        }
    }

    /// Of a file, which is read once.
    pub(super) fn of_file(path: &Path) -> Result<Self, TrainError> {
        let mut file = File::open(path).map_err(TrainError::io(path))?;
        let (mut hash, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
        loop {
            let n = file.read(&mut buffer).map_err(TrainError::io(path))?;
            if n == 0 {
                let sha256 = hexadecimal(hash);
                return Ok(Self { bytes, sha256 });
            }
            hash.update(&buffer[..n]);
            bytes += n as u64;
        }
    }

    /// Whether the file has its length, without reading it.
    pub(super) fn fits(&self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|info| info.is_file() && info.len() == self.bytes)
    }

    /// Appends the bytes of a file of `folder` to `bytes`. The length is compared before memory is taken for it, the hash
    /// before the bytes are given out.
    pub(super) fn read_into(&self, bytes: &mut Vec<u8>, folder: &Path, name: &str) -> Result<(), TrainError> {
        let path = folder.join(name);
        let file = File::open(&path).map_err(TrainError::io(&path))?;
        let info = file.metadata().map_err(TrainError::io(&path))?;
        let length = |found: u64| unusable(folder, format!("{name}: {found} bytes, expected {}", self.bytes));
        if !info.is_file() {
            return Err(unusable(folder, format!("{name}: not a regular file")));
        }
        if info.len() != self.bytes {
            return Err(length(info.len()));
        }
        let room = usize::try_from(self.bytes).map(|room| bytes.try_reserve_exact(room));
        if !matches!(room, Ok(Ok(()))) {
            return Err(unusable(
                folder,
                format!("{name}: no memory for {} bytes", self.bytes),
            ));
        }
        let before = bytes.len();
        let found = file
            .take(self.bytes)
            .read_to_end(bytes)
            .map_err(TrainError::io(&path))?;
        if found as u64 != self.bytes {
            return Err(length(found as u64));
        }
        if Self::of(&bytes[before..]) != *self {
            return Err(unusable(folder, format!("{name}: its content changed")));
        }
        Ok(())
    }
}

/// The program that wrote a folder: its version, and where known the git revision that it was built from.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Writer {
    version: String,
    revision: Option<String>,
}

impl Writer {
    /// This program. `make build` tells the compiler the revision.
    pub(super) fn this() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            revision: option_env!("FULGUR_REVISION")
                .filter(|revision| !revision.is_empty())
                .map(str::to_owned),
        }
    }
}

/// The files of a checkpoint.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Manifest {
    /// Grows when older programs can no longer read the folder.
    pub(super) format: u32,
    /// Moments and averages in 16 bits: small, but the run does not go on bit for bit.
    pub(super) compact: bool,
    /// Absent from folders of older programs.
    #[serde(default)]
    pub(super) writer: Option<Writer>,
    /// By name.
    pub(super) files: BTreeMap<String, Entry>,
}

/// Reads the manifest of `folder`, unless it is of another format than `format`.
pub(super) fn read_manifest<T: serde::de::DeserializeOwned>(
    folder: &Path,
    format: u32,
) -> Result<T, TrainError> {
    /// All formats have this much in common.
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let bytes = read_bounded(&folder.join(MANIFEST), LARGEST_JSON)?;
    match parse::<Format>(folder, MANIFEST, &bytes)?.format {
        found if found == format => parse(folder, MANIFEST, &bytes),
        found if found > format => Err(unusable(
            folder,
            format!("format {found} is newer than this program, which reads {format}"),
        )),
        found => Err(unusable(
            folder,
            format!("format {found}, this program reads {format}"),
        )),
    }
}

/// Takes the JSON file `name` apart.
pub(super) fn parse<T: serde::de::DeserializeOwned>(
    folder: &Path,
    name: &str,
    bytes: &[u8],
) -> Result<T, TrainError> {
    serde_json::from_slice(bytes).map_err(|error| unusable(folder, format!("{name}: {error}")))
}

/// The JSON text of `value`.
pub(super) fn to_json(path: &Path, value: &impl Serialize) -> Result<Vec<u8>, TrainError> {
    serde_json::to_vec_pretty(value).map_err(|error| TrainError::io(path)(error.into()))
}

/// Writes a file and syncs it and its folder.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    Ok(write_atomically(path, |out| out.write_all(bytes))?)
}

/// Makes it durable that files of `folder` were made, renamed or removed.
pub(super) fn sync_folder(folder: &Path) -> Result<(), TrainError> {
    if cfg!(unix) {
        File::open(folder)
            .and_then(|file| file.sync_all())
            .map_err(TrainError::io(folder))?;
    }
    Ok(())
}

/// The error of a folder whose files cannot be used.
pub(super) fn unusable(folder: &Path, reason: String) -> TrainError {
    TrainError::Checkpoint {
        path: PathBuf::from(folder),
        reason,
    }
}

fn hexadecimal(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
