//! A page about a training run: one HTML file with everything in it, which opens anywhere, offline, without scripts.
//!
//! ```no_run
//! let run = fulgur::report::Run::read("runs/codec".as_ref())?;
//! println!("{} steps, loss {:?}", run.metrics.step, run.loss());
//! std::fs::write("report.html", run.page())?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod clips;
pub mod curve;
pub mod heat;
pub mod histogram;
pub mod metrics;
mod page;
pub mod picture;
pub mod samples;
pub mod svg;

use std::fs;
use std::path::{Path, PathBuf};

use fulgur_lightnet::params::ParamsError;
use fulgur_lightnet::params::file::read_bounded;

use crate::train::log::tensorboard;
use metrics::Metrics;
pub(crate) use page::grouped;
use samples::Samples;

const METRICS: &str = "metrics.jsonl";
const RECIPE: &str = "recipe.toml";
const MODEL: &str = "model";
const EVENTS: &str = "events.out.tfevents.";
/// Larger recipes are none.
const LARGEST_RECIPE: u64 = 1 << 20;
const LOSS: &str = "loss";
const VALIDATION: &str = "validation/";

/// Why there is nothing to report about.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// A file or folder cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// This is not a run's folder, or nothing is logged in it.
    #[error("{}: no training run: {reason}", path.display())]
    NoRun {
        /// The folder or its log.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// The recipe of the run cannot be read.
    #[error(transparent)]
    Recipe(#[from] ParamsError),
}

/// What a run's folder tells.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// Name of the folder.
    pub name: String,
    /// The resolved recipe, where there is one.
    pub recipe: Option<String>,
    /// What was logged.
    pub metrics: Metrics,
    /// The newest samples.
    pub samples: Option<Samples>,
    /// Whether the run has reached its end and its model was written.
    pub finished: bool,
}

impl Run {
    /// Reads the folder of a run, which may be under way.
    ///
    /// # Errors
    /// The folder is none of a run, or a file in it cannot be read.
    pub fn read(dir: &Path) -> Result<Self, ReportError> {
        let refuse = |reason: &str| ReportError::NoRun {
            path: dir.to_owned(),
            reason: reason.to_owned(),
        };
        if !dir.is_dir() {
            return Err(refuse(if dir.exists() {
                "a file, expected the folder of a run"
            } else {
                "there is no such folder"
            }));
        }
        let log = dir.join(METRICS);
        if !log.is_file() {
            return Err(refuse("no metrics.jsonl in it"));
        }
        let mut metrics = Metrics::read(&log)?;
        for step in sessions(dir)? {
            metrics.resume(step);
        }
        let recipe = dir.join(RECIPE);
        let recipe = if recipe.is_file() {
            let text = read_bounded(&recipe, LARGEST_RECIPE)?;
            Some(String::from_utf8_lossy(&text).into_owned())
        } else {
            None
        };
        // `.` has no name of its own.
        let whole = fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
        let name = whole.file_name().unwrap_or(whole.as_os_str());
        Ok(Self {
            name: name.to_string_lossy().into_owned(),
            recipe,
            metrics,
            samples: samples::newest(dir)?,
            finished: dir.join(MODEL).is_dir(),
        })
    }

    /// The last loss.
    #[must_use]
    pub fn loss(&self) -> Option<f64> {
        Some(self.metrics.curve(LOSS)?.last()?.1)
    }

    /// The figure that decides which weights are the best: its name, the step and the value where it was lowest.
    #[must_use]
    pub fn best(&self) -> Option<(&str, u64, f64)> {
        let (name, curve) = self.validations().next()?;
        let (step, value) = curve.lowest()?;
        Some((name, step, value))
    }

    /// The page.
    #[must_use]
    pub fn page(&self) -> String {
        page::write(self)
    }

    /// Curves of the figures of validations, by name without `validation/`.
    fn validations(&self) -> impl Iterator<Item = (&str, &curve::Curve)> {
        let curves = self.metrics.curves.iter();
        let own = curves.filter_map(|(name, curve)| Some((name.strip_prefix(VALIDATION)?, curve)));
        own.filter(|(_, curve)| !curve.is_empty())
    }
}

/// After how many steps each session that went on with the run began, from its event file.
fn sessions(dir: &Path) -> Result<Vec<u64>, ReportError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| ReportError::Io { path, source }
    };
    let mut steps = Vec::new();
    for item in fs::read_dir(dir).map_err(io(dir))? {
        let item = item.map_err(io(dir))?;
        let path = item.path();
        if item.file_name().to_string_lossy().starts_with(EVENTS) && path.is_file() {
            steps.extend(tensorboard::resumed_after(&path).map_err(io(&path))?);
        }
    }
    Ok(steps)
}

#[cfg(test)]
mod tests;
