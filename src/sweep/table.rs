//! Results of sweeps: rows, tables in Markdown and JSON, and what is left to do.

use std::fmt::Write as _;

use serde::de::DeserializeOwned;
use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

/// What a sweep has found so far.
pub trait Results: Serialize {
    /// Whether all that was asked for is done.
    fn finished(&self) -> bool;

    /// The table in Markdown.
    fn table(&self) -> String;

    /// Lines about what is not done.
    fn left(&self) -> Vec<String> {
        match self.finished() {
            true => Vec::new(),
            false => vec!["stopped before the end; the same command goes on".to_owned()],
        }
    }
}

/// What came out of a run.
pub trait Row: DeserializeOwned + Serialize {
    /// The key of all rows in JSON.
    const KEY: &'static str;
    /// Heads of the columns.
    const COLUMNS: &'static [&'static str];

    /// The row in Markdown, a cell a column.
    fn cells(&self) -> Vec<String>;
}

/// A sweep of plain runs: its plan and what has come out of it.
#[derive(Clone, Debug)]
pub struct Sweep<P, R> {
    /// What all runs have in common.
    pub plan: P,
    /// One row a run that is done, in the order asked for.
    pub rows: Vec<R>,
    /// Whether all of them are.
    pub finished: bool,
}

impl<P: Serialize, R: Row> Serialize for Sweep<P, R> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Sweep", 3)?;
        fields.serialize_field("plan", &self.plan)?;
        fields.serialize_field(R::KEY, &self.rows)?;
        fields.serialize_field("finished", &self.finished)?;
        fields.end()
    }
}

impl<P: Serialize, R: Row> Results for Sweep<P, R> {
    fn finished(&self) -> bool {
        self.finished
    }

    fn table(&self) -> String {
        markdown(R::COLUMNS, self.rows.iter().map(Row::cells))
    }
}

/// A table in Markdown, of rows with a cell a column.
pub(crate) fn markdown(columns: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut text = format!("| {} |\n|{}\n", columns.join(" | "), "---|".repeat(columns.len()));
    for row in rows {
        // Writing to a string does not fail.
        writeln!(text, "| {} |", row.join(" | ")).ok();
    }
    text
}

/// A cell with a value, or a dash without one.
pub(crate) fn cell<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), show)
}
