//! Ctrl-C: the first one asks the command to finish what it has in hand, the second one ends the program.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;

/// Exit code of a program ended by an interrupt, as shells count it.
const INTERRUPTED: i32 = 130;

/// What is called at the first interrupt.
type Hook = Box<dyn Fn() + Send>;

/// Tells whether the user asked to stop.
#[derive(Clone, Default)]
pub(super) struct Interrupt {
    flag: Arc<AtomicBool>,
    hooks: Arc<Mutex<Vec<Hook>>>,
}

impl Interrupt {
    /// Installs the handler; once per process.
    pub(super) fn install() -> anyhow::Result<Self> {
        let interrupt = Self::default();
        let handler = interrupt.clone();
        ctrlc::set_handler(move || {
            if handler.raise() {
                std::process::exit(INTERRUPTED);
            }
            writeln!(io::stderr(), "stopping; press Ctrl-C again to leave at once").ok();
        })
        .context("cannot install the Ctrl-C handler")?;
        Ok(interrupt)
    }

    /// The flag, for library calls that look at it while they work.
    pub(super) fn flag(&self) -> &Arc<AtomicBool> {
        &self.flag
    }

    /// Whether the user asked to stop.
    pub(super) fn requested(&self) -> bool {
        self.flag.load(Ordering::SeqCst)
    }

    /// Calls `hook` when the user asks to stop, for library calls that have a way of their own to be cancelled.
    #[cfg_attr(
        not(feature = "media"),
        allow(dead_code, reason = "for commands that need media")
    )]
    pub(super) fn on_request(&self, hook: impl Fn() + Send + 'static) {
        let mut hooks = self.hooks.lock().unwrap_or_else(PoisonError::into_inner);
        if self.requested() {
            hook();
        }
        hooks.push(Box::new(hook));
    }

    /// Notes an interrupt; true if it is not the first one.
    fn raise(&self) -> bool {
        let again = self.flag.swap(true, Ordering::SeqCst);
        if !again {
            self.hooks
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
                .for_each(|hook| hook());
        }
        again
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn hooks_are_called_once_whenever_they_come() {
        let interrupt = Interrupt::default();
        let calls = Arc::new(AtomicUsize::new(0));
        let count = || {
            let calls = Arc::clone(&calls);
            move || {
                calls.fetch_add(1, Ordering::SeqCst);
            }
        };
        interrupt.on_request(count());
        assert_eq!((interrupt.requested(), calls.load(Ordering::SeqCst)), (false, 0));
        assert!(!interrupt.raise());
        interrupt.on_request(count());
        assert!(interrupt.raise());
        assert_eq!((interrupt.requested(), calls.load(Ordering::SeqCst)), (true, 2));
    }
}
