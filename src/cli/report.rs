//! `fulgur report`: a page about a training run.

use std::fmt;
use std::io::Write;
use std::path::PathBuf;

use anyhow::bail;
use fulgur_datasets::atomic::write_atomic;
use serde::Serialize;

use super::answer::{Answer, Report};
use super::context::Context;
use super::files::check_output;
use crate::report::Run;

/// Name of the page where the user gives none, in the run's folder.
const NAME: &str = "report.html";

/// Write a page about a training run
///
/// One HTML file with everything in it: how far the run is, its last and best figures, plots of the loss and of all else
/// that was logged, the newest samples and the recipe. It opens in any browser, offline, and may be sent to others. A run
/// that is still under way is reported as far as it has come.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  fulgur report runs/video-codec\n  fulgur report runs/tav -o tav.html")]
pub(super) struct Arguments {
    /// The folder of the run
    #[arg(value_name = "RUN_DIR")]
    run: PathBuf,
    /// The page, instead of report.html in the folder of the run
    #[arg(short, long = "output", value_name = "REPORT.html")]
    output: Option<PathBuf>,
}

pub(super) fn run(_: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    let path = arguments.output.unwrap_or_else(|| arguments.run.join(NAME));
    let html = |ending: &std::ffi::OsStr| ending.eq_ignore_ascii_case("html");
    if !path.extension().is_some_and(html) {
        bail!(
            "--output: found {}, expected a name that ends in .html",
            path.display()
        );
    }
    // Reading comes first: whoever names no run should hear that.
    let run = Run::read(&arguments.run)?;
    check_output(&path)?;
    let page = run.page();
    write_atomic(&path, |file| file.write_all(page.as_bytes()))?;
    Answer::new(&Written {
        steps: run.metrics.step,
        loss: run.loss(),
        best: run.best().map(|(_, _, value)| value),
        path,
    })
}

#[derive(Serialize)]
struct Written {
    path: PathBuf,
    steps: u64,
    /// The last loss.
    loss: Option<f64>,
    /// The lowest value of the first validation figure.
    best: Option<f64>,
}

impl Report for Written {}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} steps", self.path.display(), self.steps)?;
        for (name, value) in [("loss", self.loss), ("best", self.best)] {
            if let Some(value) = value {
                write!(f, ", {name} {value:.5}")?;
            }
        }
        writeln!(f)
    }
}
