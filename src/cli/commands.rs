//! `fulgur commands`: the reference of all commands as one page of Markdown, kept in docs/commands.md.

use std::fmt;

use clap::CommandFactory;
use serde::Serialize;

use super::Cli;
use super::answer::{Answer, Report};

/// Print the reference of all commands as Markdown
#[derive(Debug, clap::Args)]
#[command(hide = true, after_help = "Example:\n  fulgur commands > docs/commands.md")]
pub(super) struct Arguments {}

pub(super) fn run(Arguments {}: Arguments) -> anyhow::Result<Answer> {
    Answer::new(&Reference { markdown: markdown() })
}

#[derive(Serialize)]
struct Reference {
    markdown: String,
}

impl Report for Reference {}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.markdown)
    }
}

fn markdown() -> String {
    // The page must not depend on the width of anybody's terminal.
    let mut program = Cli::command().term_width(100);
    program.build();
    let mut page = String::from(
        "# Commands\n\nWritten by `fulgur commands`; a test compares this page with the program.\n\n\
         Exit codes: 0 done, 1 done in part or a negative answer, 2 error. With `--json` standard output holds\n\
         exactly one JSON object, and progress and notes go to standard error. An error is one line on standard\n\
         error.\n",
    );
    section(&mut page, &mut program, 2);
    page
}

/// The help of a command and of the commands below it.
fn section(page: &mut String, command: &mut clap::Command, depth: usize) {
    let name = command.get_bin_name().unwrap_or(command.get_name()).to_owned();
    let help = command.render_long_help().to_string();
    let help: Vec<&str> = help.lines().map(str::trim_end).collect();
    let heading = "#".repeat(depth);
    page.push_str(&format!(
        "\n{heading} `{name}`\n\n```text\n{}\n```\n",
        help.join("\n").trim_end()
    ));
    for below in command.get_subcommands_mut() {
        if !below.is_hide_set() && below.get_name() != "help" {
            section(page, below, depth + 1);
        }
    }
}
