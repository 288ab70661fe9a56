//! Answers on the disk: `ab/abcdef....json` for the question whose hash begins so.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use fulgur_datasets::atomic::write_atomic;
use sha2::{Digest, Sha256};

/// Larger files are no answers.
const LARGEST: u64 = 1 << 20;

/// Answers that were given before.
#[derive(Debug)]
pub(super) struct Cache {
    folder: PathBuf,
}

impl Cache {
    pub(super) fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_path_buf(),
        }
    }

    /// The name of a question: a hash of model, version of the prompt, and everything that is sent.
    pub(super) fn key(model: &str, prompt_version: &str, body: &[u8]) -> String {
        let mut hash = Sha256::new();
        for part in [model.as_bytes(), prompt_version.as_bytes(), body] {
            // With its length, so that no two questions are the same bytes.
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.join(&key[..2]).join(format!("{key}.json"))
    }

    /// The answer to a question, if it was given before.
    pub(super) fn get(&self, key: &str) -> Option<String> {
        let path = self.path(key);
        if std::fs::metadata(&path).ok()?.len() > LARGEST {
            return None;
        }
        // A damaged file is no answer; it is replaced by the next one.
        let value: serde_json::Value = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        value
            .get("text")?
            .as_str()
            .map(str::to_owned)
            .filter(|text| !text.is_empty())
    }

    /// Keeps an answer.
    pub(super) fn put(&self, key: &str, model: &str, prompt_version: &str, text: &str) -> io::Result<()> {
        let path = self.path(key);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let value = serde_json::json!({ "model": model, "prompt_version": prompt_version, "text": text });
        write_atomic(&path, |file| file.write_all(value.to_string().as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_found_by_all_that_was_asked() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path());
        let key = Cache::key("model", "merge-v1", b"{}");
        assert_eq!(cache.get(&key), None);
        cache.put(&key, "model", "merge-v1", "A \"dog\".").unwrap();
        assert_eq!(cache.get(&key).as_deref(), Some("A \"dog\"."));
        let others = [
            Cache::key("model2", "merge-v1", b"{}"),
            Cache::key("model", "merge-v2", b"{}"),
            Cache::key("model", "merge-v1", b"{ }"),
            Cache::key("modelm", "erge-v1", b"{}"),
        ];
        for other in &others {
            assert_ne!(*other, key);
        }
        std::fs::write(cache.path(&key), "{\"te").unwrap();
        assert_eq!(cache.get(&key), None);
    }
}
