//! `fulgur doctor`: what works on this machine and what to install.

use std::fmt;

use fulgur_datasets::fetch::DataDir;
use serde::Serialize;

use super::answer::{Answer, Report, Status};
use super::context::Context;
use crate::doctor::{Check, examine};

/// Show what works on this machine and what to install
///
/// The exit code is 1 where something is missing that the program needs for its ordinary work.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur doctor\n  fulgur doctor --json | jq '.checks[] | select(.ok | not)'"
)]
pub(super) struct Arguments {}

pub(super) fn run(_context: &Context, Arguments {}: Arguments) -> anyhow::Result<Answer> {
    Answer::new(&Examination {
        checks: examine(&DataDir::from_env()),
    })
}

#[derive(Serialize)]
struct Examination {
    checks: Vec<Check>,
}

impl Report for Examination {
    fn status(&self) -> Status {
        let needed = self.checks.iter().any(|check| check.required && !check.ok);
        if needed { Status::Partial } else { Status::Done }
    }
}

impl fmt::Display for Examination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self
            .checks
            .iter()
            .map(|check| check.name.len())
            .max()
            .unwrap_or(0);
        for check in &self.checks {
            let mark = match (check.ok, check.required) {
                (true, _) => "ok",
                (false, true) => "MISSING",
                (false, false) => "-",
            };
            writeln!(f, "{mark:<7}  {:<width$}  {}", check.name, check.detail)?;
            if let Some(advice) = &check.advice {
                writeln!(f, "{:<7}  {:<width$}    {advice}", "", "")?;
            }
        }
        Ok(())
    }
}
