//! Ctrl-C: the first one asks the command to finish what it has in hand, the second one ends the program.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

/// Exit code of a program ended by an interrupt, as shells count it.
const INTERRUPTED: i32 = 130;

/// Tells whether the user asked to stop.
#[derive(Debug, Clone)]
pub(super) struct Interrupt {
    flag: Arc<AtomicBool>,
}

impl Interrupt {
    /// Installs the handler; once per process.
    pub(super) fn install() -> anyhow::Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&flag);
        ctrlc::set_handler(move || {
            if seen.swap(true, Ordering::SeqCst) {
                std::process::exit(INTERRUPTED);
            }
            writeln!(io::stderr(), "stopping; press Ctrl-C again to leave at once").ok();
        })
        .context("cannot install the Ctrl-C handler")?;
        Ok(Self { flag })
    }

    /// The flag, for library calls that look at it while they work.
    pub(super) fn flag(&self) -> &Arc<AtomicBool> {
        &self.flag
    }
}
