//! What a run tells: one JSON line per interval for programs, TensorBoard files for people.

mod jsonl;
pub mod tensorboard;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::error::TrainError;
use jsonl::Lines;
use tensorboard::EventFile;

/// Pictures larger than this stay out of the TensorBoard file.
const LARGEST_PICTURE: u64 = 8 << 20;

/// Both logs of a run.
pub struct Log {
    lines: Lines,
    events: EventFile,
}

impl Log {
    /// Opens the logs in `folder` for a run that goes on after `step` steps: what was logged past that is dropped.
    ///
    /// # Errors
    /// The files cannot be read or written.
    pub fn open(folder: &Path, step: u64) -> Result<Self, TrainError> {
        Ok(Self {
            lines: Lines::open(&folder.join("metrics.jsonl"), step)?,
            events: EventFile::create(folder, step)?,
        })
    }

    /// Writes scalars: one JSON line with `step`, `elapsed_s` and the names, and one TensorBoard curve a name. Values
    /// that are not finite become null and are left out of the curves.
    ///
    /// # Errors
    /// The disk is full.
    pub fn scalars(&mut self, step: u64, elapsed: f64, values: &[(String, f64)]) -> Result<(), TrainError> {
        let mut line = Map::new();
        line.insert("step".into(), step.into());
        line.insert("elapsed_s".into(), rounded(elapsed).into());
        line.extend(
            values
                .iter()
                .map(|(name, value)| (name.clone(), Value::from(*value))),
        );
        self.lines.write(&Value::Object(line))?;
        let finite: Vec<_> = values
            .iter()
            .filter(|(_, value)| value.is_finite())
            .cloned()
            .collect();
        self.events.scalars(step, &finite)
    }

    /// Shows the PNG files among `files` in TensorBoard, named by their file names without
    /// ending and number: `codec-000100.png` is the picture `codec` of its step.
    ///
    /// # Errors
    /// A file cannot be read, or the disk is full.
    pub fn pictures(&mut self, step: u64, files: &[PathBuf]) -> Result<(), TrainError> {
        for path in files
            .iter()
            .filter(|path| path.extension().is_some_and(|ending| ending == "png"))
        {
            let size = std::fs::metadata(path).map_err(TrainError::io(path))?.len();
            if size <= LARGEST_PICTURE {
                let png = std::fs::read(path).map_err(TrainError::io(path))?;
                let name = path.file_stem().unwrap_or_default().to_string_lossy();
                let tag = name
                    .trim_end_matches(|c: char| c.is_ascii_digit())
                    .trim_end_matches('-');
                self.events
                    .picture(step, if tag.is_empty() { &name } else { tag }, &png)?;
            }
        }
        Ok(())
    }
}

/// Milliseconds are enough for a log.
fn rounded(seconds: f64) -> f64 {
    (seconds * 1e3).round() / 1e3
}
