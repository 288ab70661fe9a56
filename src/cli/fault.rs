//! Errors and panics as single lines.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, Write};
use std::panic;
use std::sync::Mutex;

/// Message and place of the first panic of the process.
static FIRST_PANIC: Mutex<Option<String>> = Mutex::new(None);

/// Keeps panics off standard error, so that a bug too ends in one line; `RUST_BACKTRACE=1` adds the stack.
pub(super) fn record_panics() {
    panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        let message = (payload.downcast_ref::<&str>().copied())
            .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("a panic without a message");
        let place = info
            .location()
            .map(|place| format!(" at {}:{}", place.file(), place.line()))
            .unwrap_or_default();
        let stack = Backtrace::capture();
        if stack.status() == BacktraceStatus::Captured {
            writeln!(io::stderr(), "{message}{place}\n{stack}").ok();
        }
        if let Ok(mut first) = FIRST_PANIC.lock() {
            first.get_or_insert_with(|| flatten(&format!("{message}{place}")));
        }
    }));
}

/// The line for a caught panic.
pub(super) fn bug_line() -> String {
    let first = FIRST_PANIC.lock().ok().and_then(|mut first| first.take());
    let what = first.unwrap_or_else(|| "unknown place".to_owned());
    format!("this is a bug in fulgur, please report it: {what}")
}

/// An error and its causes joined by ": ", without those that the message before already repeats.
pub(super) fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let words = flatten(&cause.to_string());
        if line.is_empty() {
            line = words;
        } else if !line.contains(&words) {
            line.push_str(": ");
            line.push_str(&words);
        }
    }
    line
}

/// Text of several lines as one.
fn flatten(text: &str) -> String {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[test]
    fn causes_are_joined_once() {
        let error = anyhow!("no such file")
            .context("clip.mp4: no such file")
            .context("scoring\nfailed");
        assert_eq!(one_line(&error), "scoring; failed: clip.mp4: no such file");
    }

    #[test]
    fn a_panic_becomes_one_line() {
        let hook_of_the_tests = panic::take_hook();
        record_panics();
        let caught = panic::catch_unwind(|| panic!("index out of\nreach"));
        let line = bug_line();
        panic::set_hook(hook_of_the_tests);
        assert!(caught.is_err());
        assert!(
            line.contains("bug in fulgur") && line.contains("index out of; reach at "),
            "{line}"
        );
        assert_eq!(line.lines().count(), 1);
    }
}
