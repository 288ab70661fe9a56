//! The state of a run in shards of a limited size: for places that take no large files.
//!
//! A folder of `NAME.NNNNN` and `manifest.json`. The shards of a name, one after another, are the file NAME of a compact
//! checkpoint (`cat weights.safetensors.* > weights.safetensors`): weights in f32, moments in bf16, averages as bf16
//! differences from the weights, and the state. A run that starts from it does not go on bit for bit.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use fulgur_lightnet::params::file;
use serde::{Deserialize, Serialize};

use super::super::error::TrainError;
use super::manifest::{
    self, Entry, LARGEST_JSON, MANIFEST, Writer, read_manifest, sync_folder, to_json, unusable,
};
use super::{Checkpoint, STATE, UNFINISHED, check_names, load_newest};

const FORMAT: u32 = 1;
/// Five digits, and a manifest that is read again.
const MOST_SHARDS: usize = 50_000;
/// The largest shard where nothing else is asked for.
pub const DEFAULT_SHARD: u64 = 16 << 20;
/// Smaller shards would be too many.
pub const SMALLEST_SHARD: u64 = 64 << 10;

/// What [`export`] wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct Exported {
    /// Steps done.
    pub step: u64,
    /// Shards written.
    pub shards: usize,
    /// Their bytes together.
    pub bytes: u64,
}

#[derive(Debug, Deserialize, Serialize)]
struct PortableManifest {
    format: u32,
    writer: Writer,
    step: u64,
    /// By the name of the whole file.
    files: BTreeMap<String, Vec<Entry>>,
}

fn shard(name: &str, number: usize) -> String {
    format!("{name}.{number:05}")
}

/// Writes the newest usable checkpoint under `root` into `folder`, which is new or empty, in shards of at most `largest`
/// bytes. Each checkpoint that is passed over is reported to `skipped`. `folder` appears whole or not at all.
///
/// # Errors
/// There is no usable checkpoint, `largest` is below 64 KiB or makes too many shards, a value does not fit bf16, or
/// `folder` is not empty or cannot be written.
pub fn export(
    root: &Path,
    folder: &Path,
    largest: u64,
    skipped: impl FnMut(&TrainError),
) -> Result<Exported, TrainError> {
    let refuse = |path: &Path, reason: String| {
        Err(TrainError::Run {
            path: path.to_path_buf(),
            reason,
        })
    };
    if largest < SMALLEST_SHARD {
        let reason = format!("shards of at most {largest} bytes, expected {SMALLEST_SHARD} or more");
        return refuse(folder, reason);
    }
    let occupied = match fs::read_dir(folder) {
        Ok(mut items) => items.next().is_some(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) => return Err(TrainError::io(folder)(error)),
    };
    if occupied {
        return refuse(
            folder,
            "not empty; the state goes into a folder of its own".into(),
        );
    }
    let Some(checkpoint) = load_newest(root, skipped)? else {
        return refuse(root, "no checkpoint to export".into());
    };
    let temporary = beside(folder)?;
    let written = write_into(&temporary, root, &checkpoint, largest)
        .and_then(|exported| {
            fs::rename(&temporary, folder).map_err(TrainError::io(folder))?;
            Ok(exported)
        })
        .inspect_err(|_| {
            // What failed is reported; a folder that cannot be removed either adds nothing.
            let _ = fs::remove_dir_all(&temporary);
        })?;
    sync_folder(parent(folder))?;
    Ok(written)
}

fn parent(folder: &Path) -> &Path {
    match folder.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A new folder in the place where `folder` will be.
fn beside(folder: &Path) -> Result<PathBuf, TrainError> {
    let Some(name) = folder.file_name() else {
        return Err(TrainError::Run {
            path: folder.to_path_buf(),
            reason: "not the name of a new folder".into(),
        });
    };
    let name = format!(".{}.{}{UNFINISHED}", name.to_string_lossy(), std::process::id());
    let temporary = folder.with_file_name(name);
    fs::create_dir_all(parent(folder))
        .and_then(|()| fs::create_dir(&temporary))
        .map_err(TrainError::io(folder))?;
    Ok(temporary)
}

fn write_into(
    folder: &Path,
    root: &Path,
    checkpoint: &Checkpoint,
    largest: u64,
) -> Result<Exported, TrainError> {
    let mut exported = Exported {
        step: checkpoint.state.step,
        shards: 0,
        bytes: 0,
    };
    let mut files = BTreeMap::new();
    let mut write = |name: &str, bytes: &[u8]| {
        let mut entries = Vec::new();
        // A limit beyond the memory of this machine is none.
        for part in bytes.chunks(usize::try_from(largest).unwrap_or(usize::MAX)) {
            if exported.shards == MOST_SHARDS {
                let reason = format!("more than {MOST_SHARDS} shards of {largest} bytes; allow larger ones");
                return Err(TrainError::Run {
                    path: root.to_path_buf(),
                    reason,
                });
            }
            manifest::write(&folder.join(shard(name, entries.len())), part)?;
            entries.push(Entry::of(part));
            exported.shards += 1;
        }
        exported.bytes += bytes.len() as u64;
        files.insert(name.to_string(), entries);
        Ok(())
    };
    for (name, tensors, precision) in checkpoint.files(true)? {
        write(
            name,
            &file::encode(&folder.join(name), &tensors, &BTreeMap::new(), precision)?,
        )?;
    }
    write(STATE, &to_json(&folder.join(STATE), &checkpoint.state)?)?;
    let manifest = PortableManifest {
        format: FORMAT,
        writer: Writer::this(),
        step: checkpoint.state.step,
        files,
    };
    let path = folder.join(MANIFEST);
    manifest::write(&path, &to_json(&path, &manifest)?)?;
    Ok(exported)
}

/// Reads what [`export`] wrote, and verifies every byte of it.
///
/// # Errors
/// A shard is missing, changed or damaged, or the state is of another format.
pub fn import(folder: &Path) -> Result<Checkpoint, TrainError> {
    let manifest: PortableManifest = read_manifest(folder, FORMAT)?;
    check_names(folder, manifest.files.keys())?;
    for (name, entries) in &manifest.files {
        let whole = entries
            .iter()
            .try_fold(0u64, |sum, entry| sum.checked_add(entry.bytes));
        if name == STATE && whole.is_none_or(|whole| whole > LARGEST_JSON) {
            return Err(unusable(
                folder,
                format!("{name}: more than {LARGEST_JSON} bytes"),
            ));
        }
    }
    let mut checkpoint = Checkpoint::default();
    for (name, entries) in &manifest.files {
        let mut bytes = Vec::new();
        for (number, entry) in entries.iter().enumerate() {
            entry.read_into(&mut bytes, folder, &shard(name, number))?;
        }
        checkpoint.take_file(folder, name, &bytes)?;
    }
    checkpoint.widen_ema(folder)?;
    Ok(checkpoint)
}
