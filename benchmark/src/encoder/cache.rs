//! Vectors of clips that were encoded before: a clip that is scored again is neither decoded nor encoded.
//!
//! An entry is a safetensors file named after the hash of everything that its vectors depend on: the bytes of the clip, the weights, the
//! preprocessing and its version, and how many frames were asked for. What is damaged counts as absent. Entries may be removed at any time.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use candle_core::{Device, Tensor};
use fulgur_datasets::atomic::write_atomic;
use fulgur_lightnet::params::{Precision, file};
use sha2::{Digest, Sha256};

use super::Encoder;
use crate::avhscore::Encoded;

/// Name of the folder below the user's own.
const FOLDER: &str = "fulgur/embeddings";
/// What is read of a file at a time.
const BLOCK: usize = 1 << 20;
/// Where an entry says what its vectors do not.
const ENCODED: &str = "encoded";

/// A folder of entries for one encoder.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
    identity: String,
}

impl Cache {
    /// The cache of `encoder` in `folder`; `None` where the encoder has none.
    ///
    /// # Errors
    /// The weights cannot be read.
    pub fn of(encoder: &dyn Encoder, folder: &Path) -> io::Result<Option<Self>> {
        let identity = encoder.identity()?;
        Ok(identity.map(|identity| Self {
            folder: folder.to_owned(),
            identity,
        }))
    }

    /// The folder of the user's caches as the system has it: `XDG_CACHE_HOME`, else `~/.cache`.
    pub fn user_folder() -> Option<PathBuf> {
        let absolute = |name| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let caches = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
        caches.map(|caches| caches.join(FOLDER))
    }

    /// The entry of a clip of which at most `max_frames` frames are seen.
    ///
    /// # Errors
    /// The clip cannot be read.
    pub fn entry(&self, clip: &Path, max_frames: Option<usize>) -> io::Result<Entry> {
        let frames = max_frames.map_or("all".to_owned(), |n| n.to_string());
        let content = hash_of_file(clip)?;
        let key = Sha256::new_with_prefix(format!("{}\nframes {frames}\nclip {content}", self.identity));
        let key = hexadecimal(key);
        // One folder would become too large for some systems.
        let path = self
            .folder
            .join(&key[..2])
            .join(format!("{}.safetensors", &key[2..]));
        Ok(Entry { path })
    }
}

/// A place for the vectors of one clip.
#[derive(Clone, Debug)]
pub struct Entry {
    path: PathBuf,
}

impl Entry {
    /// What lies there; `None` where nothing does, or something that is damaged.
    pub fn get(&self) -> Option<Encoded> {
        let contents = file::read(&self.path, &Device::Cpu).ok()?;
        let mut encoded: Encoded = serde_json::from_str(contents.metadata.get(ENCODED)?).ok()?;
        encoded.seen = contents
            .tensors
            .get("frames")
            .map_or(Ok(Vec::new()), Tensor::to_vec2)
            .ok()?;
        encoded.heard = match contents.tensors.get("sound") {
            Some(sound) => Some(sound.to_vec1().ok()?),
            None => None,
        };
        let whole = match &encoded.heard {
            Some(heard) => {
                encoded.seen.len() == encoded.frames && encoded.seen.iter().all(|v| v.len() == heard.len())
            }
            None => encoded.seen.is_empty(),
        };
        whole.then_some(encoded)
    }

    /// Writes an entry, whole or not at all.
    ///
    /// # Errors
    /// The folder cannot be made or written to, as text.
    pub fn put(&self, encoded: &Encoded) -> Result<(), String> {
        let text = |error: &dyn std::fmt::Display| format!("{}: {error}", self.path.display());
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder).map_err(|e| text(&e))?;
        }
        let mut tensors = BTreeMap::new();
        let cpu = &Device::Cpu;
        if let (Some(heard), Some(first)) = (&encoded.heard, encoded.seen.first()) {
            let shape = (encoded.seen.len(), first.len());
            let frames = Tensor::from_vec(encoded.seen.concat(), shape, cpu).map_err(|e| text(&e))?;
            let sound = Tensor::new(heard.as_slice(), cpu).map_err(|e| text(&e))?;
            tensors.extend([("frames".to_owned(), frames), ("sound".to_owned(), sound)]);
        }
        let words = serde_json::to_string(encoded).map_err(|e| text(&e))?;
        let metadata = BTreeMap::from([(ENCODED.to_owned(), words)]);
        let bytes =
            file::encode(&self.path, &tensors, &metadata, Precision::F32).map_err(|e| e.to_string())?;
        // The same clip may be written twice at a time.
        write_atomic(&self.path, |file| io::Write::write_all(file, &bytes)).map_err(|e| text(&e))
    }
}

fn hexadecimal(hash: Sha256) -> String {
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
pub fn hash_of_file(path: &Path) -> io::Result<String> {
    let (mut file, mut hash, mut block) = (File::open(path)?, Sha256::new(), vec![0; BLOCK]);
    loop {
        match file.read(&mut block)? {
            0 => return Ok(hexadecimal(hash)),
            count => hash.update(&block[..count]),
        }
    }
}

/// One hash of the contents of several files. Gigabytes are read once: the hash of a file is kept beside the entries under its name, length
/// and time of change.
///
/// # Errors
/// A file cannot be read.
pub fn weights_hash(files: &[PathBuf]) -> io::Result<String> {
    let mut all = Sha256::new();
    for path in files {
        all.update(known_hash(path)?);
    }
    Ok(hexadecimal(all))
}

/// Shorter files are read each time.
const WORTH_KEEPING: u64 = 64 << 20;

fn known_hash(path: &Path) -> io::Result<String> {
    let info = fs::metadata(path)?;
    let (Some(caches), true) = (Cache::user_folder(), info.len() >= WORTH_KEEPING) else {
        return hash_of_file(path);
    };
    let changed = info
        .modified()?
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos();
    let name = format!("{} {} {changed}", fs::canonicalize(path)?.display(), info.len());
    let note = caches
        .join("weights")
        .join(hexadecimal(Sha256::new_with_prefix(name)));
    if let Ok(known) = fs::read_to_string(&note)
        && known.len() == 64
    {
        return Ok(known);
    }
    let hash = hash_of_file(path)?;
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
    use crate::avhscore::Flag;

    fn cache(folder: &Path, identity: &str) -> Cache {
        Cache {
            folder: folder.to_owned(),
            identity: identity.to_owned(),
        }
    }

    #[test]
    fn entries_come_back_for_the_same_clip_and_settings_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (clip, same, other) = (
            folder.path().join("a.mp4"),
            folder.path().join("b.mp4"),
            folder.path().join("c.mp4"),
        );
        fs::write(&clip, "clip").unwrap();
        fs::write(&same, "clip").unwrap();
        fs::write(&other, "other").unwrap();
        let encoded = Encoded {
            frames: 2,
            flags: vec![Flag::SilentAudio],
            seen: vec![vec![1.0, -2.5], vec![0.1, 3.0]],
            heard: Some(vec![0.25, 1e-9]),
            reason: None,
        };
        let caches = folder.path().join("caches");
        let cache = cache(&caches, "encoder 1");
        assert!(cache.entry(&clip, None).unwrap().get().is_none());
        cache.entry(&clip, None).unwrap().put(&encoded).unwrap();
        assert_eq!(cache.entry(&same, None).unwrap().get().unwrap(), encoded);
        assert!(cache.entry(&other, None).unwrap().get().is_none());
        assert!(cache.entry(&clip, Some(2)).unwrap().get().is_none());
        assert!(
            self::cache(&caches, "encoder 2")
                .entry(&clip, None)
                .unwrap()
                .get()
                .is_none()
        );
        assert!(cache.entry(&folder.path().join("absent"), None).is_err());

        let mute = Encoded {
            seen: Vec::new(),
            heard: None,
            reason: Some("no audio stream".to_owned()),
            ..encoded
        };
        let entry = cache.entry(&clip, None).unwrap();
        entry.put(&mute).unwrap();
        assert_eq!(entry.get().unwrap(), mute);
        let bytes = fs::read(&entry.path).unwrap();
        fs::write(&entry.path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(entry.get().is_none());
        fs::write(&entry.path, "").unwrap();
        assert!(entry.get().is_none());
    }

    #[test]
    fn hashes_are_those_of_the_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("abc");
        fs::write(&path, "abc").unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(hash_of_file(&path).unwrap(), expected);
        let one = weights_hash(std::slice::from_ref(&path)).unwrap();
        fs::write(&path, "abd").unwrap();
        assert_ne!(weights_hash(&[path]).unwrap(), one);
    }
}
