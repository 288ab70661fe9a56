//! Names of checkpoints: the SHA-256 of their files, which goes with every figure that was made with them.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use fulgur_datasets::atomic::write_atomic;
use sha2::{Digest, Sha256};

/// What is read of a file at a time.
const BLOCK: usize = 1 << 20;
/// Shorter files are read each time.
const WORTH_KEEPING: u64 = 64 << 20;
/// Digits of a short name.
const SHORT: usize = 16;
/// Name of the folder of our caches below the user's own.
const FOLDER: &str = "fulgur";

/// The digits of a hash.
pub(crate) fn hexadecimal(hash: Sha256) -> String {
    hash.finalize().iter().fold(String::new(), |mut text, byte| {
        // Writing to a text does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// SHA-256 of the bytes of a file.
///
/// # Errors
/// The file cannot be read.
pub fn of_file(path: &Path) -> io::Result<String> {
    let (mut file, mut hash, mut block) = (File::open(path)?, Sha256::new(), vec![0; BLOCK]);
    loop {
        match file.read(&mut block)? {
            0 => return Ok(hexadecimal(hash)),
            count => hash.update(&block[..count]),
        }
    }
}

/// The hash of a checkpoint: that of its file, or of the hashes of its shards. Gigabytes are read once: the hash of a file is kept in the
/// user's caches under its name, length and time of change.
///
/// # Errors
/// A file cannot be read.
pub fn of_files(files: &[PathBuf]) -> io::Result<String> {
    if let [only] = files {
        return known(only);
    }
    let mut all = Sha256::new();
    for path in files {
        all.update(known(path)?);
    }
    Ok(hexadecimal(all))
}

/// The first 16 digits of [`of_files`], which name a checkpoint in results.
///
/// # Errors
/// A file cannot be read.
pub fn short(files: &[PathBuf]) -> io::Result<String> {
    let mut hash = of_files(files)?;
    hash.truncate(SHORT);
    Ok(hash)
}

/// The folder of our caches as the system has it: below `XDG_CACHE_HOME`, else `~/.cache`.
pub fn user_folder() -> Option<PathBuf> {
    let absolute = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let caches = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    caches.map(|caches| caches.join(FOLDER))
}

fn known(path: &Path) -> io::Result<String> {
    let info = fs::metadata(path)?;
    let (Some(caches), true) = (user_folder(), info.len() >= WORTH_KEEPING) else {
        return of_file(path);
    };
    let changed = info
        .modified()?
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos();
    let name = format!("{} {} {changed}", fs::canonicalize(path)?.display(), info.len());
    let note = caches
        .join("embeddings/weights")
        .join(hexadecimal(Sha256::new_with_prefix(name)));
    if let Ok(known) = fs::read_to_string(&note)
        && known.len() == 64
    {
        return Ok(known);
    }
    let hash = of_file(path)?;
    if let Some(folder) = note.parent()
        && fs::create_dir_all(folder).is_ok()
    {
        // Without the note the file is read again next time.
        let _ = write_atomic(&note, |file| io::Write::write_all(file, hash.as_bytes()));
    }
    Ok(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_the_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("abc");
        fs::write(&path, "abc").unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(of_file(&path).unwrap(), expected);
        let one = std::slice::from_ref(&path);
        assert_eq!(of_files(one).unwrap(), expected);
        assert_eq!(short(one).unwrap(), expected[..16]);
        // Two files are not one of both.
        let twice = of_files(&[path.clone(), path.clone()]).unwrap();
        assert_ne!(twice, expected);
        fs::write(&path, "abd").unwrap();
        assert_ne!(of_files(one).unwrap(), expected);
        assert!(of_file(&folder.path().join("none")).is_err());
    }
}
