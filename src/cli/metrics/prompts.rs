//! The texts that clips were made from.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context as _, bail};
use fulgur_lightnet::config;
use serde::Deserialize;

/// Longest file of prompts that is read.
const MOST_BYTES: u64 = 4 << 30;

/// One line of a file of prompts, as the manifests of TAVGBench name things too.
#[derive(Deserialize)]
struct Line {
    #[serde(alias = "id", alias = "video_path")]
    path: String,
    #[serde(alias = "caption")]
    prompt: String,
}

/// What `fulgur generate` writes beside a clip.
#[derive(Deserialize)]
struct Sidecar {
    prompt: Option<String>,
}

/// Prompts by path or name.
#[derive(Default)]
pub(super) struct Prompts {
    by_name: HashMap<String, String>,
}

impl Prompts {
    /// Reads a file of JSON lines.
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| format!("{}: cannot open", path.display()))?;
        let mut by_name = HashMap::new();
        for (number, line) in BufReader::new(file.take(MOST_BYTES)).lines().enumerate() {
            let place = || format!("{}: line {}", path.display(), number + 1);
            let line = line.with_context(place)?;
            if line.trim().is_empty() {
                continue;
            }
            match serde_json::from_str::<Line>(&line) {
                Ok(Line { path, prompt }) => by_name.insert(path, prompt),
                Err(error) => bail!("{}: {error}, expected {{\"path\": .., \"prompt\": ..}}", place()),
            };
        }
        Ok(Self { by_name })
    }

    /// The prompt of a clip: by its path, its file name or its name without extension; else that of the file beside it.
    pub(super) fn of(&self, path: &Path, name: &str) -> Option<String> {
        let whole = path.to_string_lossy();
        let file = path.file_name().map(|name| name.to_string_lossy());
        let named = [Some(whole.as_ref()), file.as_deref(), Some(name)];
        let found = named
            .into_iter()
            .flatten()
            .find_map(|name| self.by_name.get(name));
        found.cloned().or_else(|| {
            let beside = path.with_extension("json");
            let sidecar: Sidecar = beside.is_file().then(|| config::read(&beside).ok()).flatten()?;
            sidecar.prompt
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_found_by_path_name_and_beside_the_clip() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("prompts.jsonl");
        std::fs::write(
            &file,
            "{\"path\": \"a.mp4\", \"prompt\": \"a bell\"}\n\n{\"id\": \"sub/b\", \"caption\": \"an owl\", \"fps\": 12}\n",
        )
        .unwrap();
        std::fs::write(
            folder.path().join("c.json"),
            "{\"prompt\": \"rain\", \"seed\": 3}",
        )
        .unwrap();
        std::fs::write(folder.path().join("d.json"), "[]").unwrap();
        let prompts = Prompts::read(&file).unwrap();
        let of = |path: &str, name: &str| prompts.of(&folder.path().join(path), name);
        assert_eq!(of("a.mp4", "a").as_deref(), Some("a bell"));
        assert_eq!(of("sub/b.mp4", "sub/b").as_deref(), Some("an owl"));
        assert_eq!(of("c.mp4", "c").as_deref(), Some("rain"));
        assert_eq!((of("d.mp4", "d"), of("e.mp4", "e")), (None, None));
        std::fs::write(&file, "{\"path\": \"a.mp4\"}\n").unwrap();
        let line = Prompts::read(&file).err().unwrap().to_string();
        assert!(
            line.contains("prompts.jsonl: line 1: missing field `prompt`"),
            "{line}"
        );
        assert!(Prompts::read(folder.path()).is_err());
    }
}
