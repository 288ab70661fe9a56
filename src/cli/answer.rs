//! What a command answers, as JSON or as text.

use std::fmt::Display;

use serde::Serialize;

/// How a command ended; the number is the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    /// All done.
    Done = 0,
    /// Done in part, or a negative answer.
    Partial = 1,
    /// Nothing done.
    Error = 2,
}

/// The result of a command: its fields are the keys of `--json`, its display is what people read.
pub(super) trait Report: Serialize + Display {
    /// How the command ended.
    fn status(&self) -> Status {
        Status::Done
    }
}

/// A report in both forms.
pub(super) struct Answer {
    /// One JSON object on one line.
    pub(super) json: String,
    /// Lines of text.
    pub(super) text: String,
    /// How the command ended.
    pub(super) status: Status,
}

impl Answer {
    /// Nothing to print: another process has the word.
    pub(super) fn silent(status: Status) -> Self {
        Self {
            json: String::new(),
            text: String::new(),
            status,
        }
    }

    /// What another process has printed, in whichever form it was asked for.
    pub(super) fn printed(text: String, status: Status) -> Self {
        Self {
            json: text.clone(),
            text,
            status,
        }
    }

    /// Renders a report.
    pub(super) fn new(report: &impl Report) -> anyhow::Result<Self> {
        let mut json = serde_json::to_string(report)?;
        json.push('\n');
        let mut text = report.to_string();
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        Ok(Self {
            json,
            text,
            status: report.status(),
        })
    }
}
