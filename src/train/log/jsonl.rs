//! A file of JSON lines that a resumed run cuts back to where it goes on.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use fulgur_lightnet::params::file::write_atomically;
use serde_json::Value;

use super::super::error::TrainError;

/// An open file of JSON lines.
pub(super) struct Lines {
    path: PathBuf,
    file: File,
}

impl Lines {
    /// Opens `path` for appending; lines of steps after `step`, and lines that were cut off, are dropped.
    pub(super) fn open(path: &Path, step: u64) -> Result<Self, TrainError> {
        let io = TrainError::io(path);
        if path.exists() {
            let mut kept = String::new();
            for line in BufReader::new(File::open(path).map_err(TrainError::io(path))?).lines() {
                let Ok(line) = line else { break };
                let at = serde_json::from_str::<Value>(&line)
                    .ok()
                    .and_then(|value| value.get("step")?.as_u64());
                if at.is_some_and(|at| at <= step) {
                    kept.push_str(&line);
                    kept.push('\n');
                }
            }
            write_atomically(path, |out| out.write_all(kept.as_bytes()))?;
        }
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(io)?;
        Ok(Self {
            path: path.to_path_buf(),
            file,
        })
    }

    /// Appends one line, in one write.
    pub(super) fn write(&mut self, value: &Value) -> Result<(), TrainError> {
        self.file
            .write_all(format!("{value}\n").as_bytes())
            .map_err(TrainError::io(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_log_has_each_step_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut lines = Lines::open(&path, 0).unwrap();
        for step in 1..=5 {
            lines.write(&serde_json::json!({"step": step})).unwrap();
        }
        lines.file.write_all(b"{\"step\": 6, \"lo").unwrap();
        let mut lines = Lines::open(&path, 3).unwrap();
        lines
            .write(&serde_json::json!({"step": 4, "again": true}))
            .unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"step\":4,\"again\":true}\n"
        );
    }
}
