//! Vectors of clips that were encoded before: a clip that is scored again is neither decoded nor encoded.
//!
//! An entry is a safetensors file named after the hash of everything that its vectors depend on: the bytes of the clip, the weights, the
//! preprocessing and its version, and how many frames were asked for. What is damaged counts as absent. Entries may be removed at any time.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use fulgur_datasets::atomic::write_atomic;
use fulgur_lightnet::params::{Precision, file};
use sha2::{Digest, Sha256};

use super::Encoder;
use crate::avhscore::Encoded;
use crate::checkpoint::{self, hexadecimal};

/// Name of the folder of entries among our caches.
const FOLDER: &str = "embeddings";
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

    /// The folder of entries in the user's caches.
    pub fn user_folder() -> Option<PathBuf> {
        checkpoint::user_folder().map(|caches| caches.join(FOLDER))
    }

    /// The entry of a clip of which at most `max_frames` frames are seen.
    ///
    /// # Errors
    /// The clip cannot be read.
    pub fn entry(&self, clip: &Path, max_frames: Option<usize>) -> io::Result<Entry> {
        let frames = max_frames.map_or("all".to_owned(), |n| n.to_string());
        let content = checkpoint::of_file(clip)?;
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
}
