//! The command line: one file a subcommand, raw arguments -> validated options -> library call -> report.
//!
//! Every command keeps the same promises: `--json` puts exactly one object on standard output, everything else
//! goes to standard error, an error is one line, and the exit code is 0 (done), 1 (done in part, or a negative
//! answer) or 2 (error).

use std::ffi::OsString;
use std::io::{self, Write};
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::device::DeviceChoice;
use answer::{Answer, Status};
use context::Context;

mod annotate;
mod answer;
mod classify;
#[cfg(feature = "media")]
mod clips;
mod commands;
mod context;
mod convert;
mod data;
mod doctor;
mod encoder;
mod eos;
mod estimate;
mod eval;
mod fault;
mod files;
mod forward;
#[cfg(feature = "media")]
mod generate;
mod image;
mod init;
#[cfg(feature = "media")]
mod inspect;
mod interrupt;
mod launch;
mod lm;
mod log;
mod lra;
mod metrics;
mod pack;
mod packing;
#[cfg(feature = "media")]
mod preprocess;
mod progress;
mod report;
mod scaling;
#[cfg(feature = "media")]
mod score;
mod size;
mod sweep;
mod tavgbench;
mod train;

/// Linear-complexity models that see, hear and write.
#[derive(Debug, Parser)]
#[command(
    name = "fulgur",
    version,
    arg_required_else_help = false,
    max_term_width = 100
)]
#[command(
    after_help = "Example:\n  fulgur doctor\n\nfulgur COMMAND --help explains a command.\nWith FULGUR_LOG=debug the program says on standard error which kernels it chose."
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Flags that every command understands.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
struct Global {
    /// Print one JSON object instead of text
    #[arg(long, global = true)]
    json: bool,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, global = true, value_name = "DEVICE", default_value = "auto")]
    device: DeviceChoice,
    /// No progress and no notes
    #[arg(short, long, global = true)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[cfg(feature = "media")]
    Generate(generate::Arguments),
    #[cfg(feature = "media")]
    Score(score::Arguments),
    Metrics(metrics::Arguments),
    #[cfg(feature = "media")]
    Inspect(inspect::Arguments),
    Classify(classify::Arguments),
    Image(image::Arguments),
    Eval(eval::Arguments),
    Forward(forward::Arguments),
    #[cfg(feature = "media")]
    Preprocess(preprocess::Arguments),
    Convert(convert::Arguments),
    Init(init::Arguments),
    Lm(lm::Arguments),
    Estimate(estimate::Arguments),
    Train(train::Arguments),
    Launch(launch::Arguments),
    Report(report::Arguments),
    Eos(eos::Arguments),
    Scaling(scaling::Arguments),
    Lra(lra::Arguments),
    Pack(pack::Arguments),
    Tavgbench(tavgbench::Arguments),
    Annotate(annotate::Arguments),
    Data(data::Arguments),
    Doctor(doctor::Arguments),
    Commands(commands::Arguments),
}

impl Command {
    fn run(self, context: &Context) -> anyhow::Result<Answer> {
        match self {
            #[cfg(feature = "media")]
            Self::Generate(arguments) => generate::run(context, arguments),
            #[cfg(feature = "media")]
            Self::Score(arguments) => score::run(context, arguments),
            Self::Metrics(arguments) => metrics::run(context, arguments),
            #[cfg(feature = "media")]
            Self::Inspect(arguments) => inspect::run(context, arguments),
            Self::Classify(arguments) => classify::run(context, &arguments),
            Self::Image(arguments) => image::run(context, &arguments),
            Self::Eval(arguments) => eval::run(context, arguments),
            Self::Forward(arguments) => forward::run(context, arguments),
            #[cfg(feature = "media")]
            Self::Preprocess(arguments) => preprocess::run(arguments),
            Self::Convert(arguments) => convert::run(&arguments),
            Self::Init(arguments) => init::run(&arguments),
            Self::Lm(arguments) => lm::run(context, arguments),
            Self::Estimate(arguments) => estimate::run(context, arguments),
            Self::Train(arguments) => train::run(context, arguments),
            Self::Launch(arguments) => launch::run(context, &arguments),
            Self::Report(arguments) => report::run(context, arguments),
            Self::Eos(arguments) => eos::run(context, arguments),
            Self::Scaling(arguments) => scaling::run(context, arguments),
            Self::Lra(arguments) => lra::run(context, arguments),
            Self::Pack(arguments) => pack::run(context, arguments),
            Self::Tavgbench(arguments) => tavgbench::run(context, arguments),
            Self::Annotate(arguments) => annotate::run(context, &arguments),
            Self::Data(arguments) => data::run(context, arguments),
            Self::Doctor(arguments) => doctor::run(context, arguments),
            Self::Commands(arguments) => commands::run(arguments),
        }
    }
}

/// Runs the program with the arguments of the process.
#[must_use]
pub fn main() -> ExitCode {
    fault::record_panics();
    let outcome = panic::catch_unwind(AssertUnwindSafe(|| run(std::env::args_os())));
    let status = match outcome {
        Ok(Ok(answer)) => print(&answer),
        Ok(Err(Stop::Shown)) => Status::Done,
        Ok(Err(Stop::Error(line))) => complain(&line),
        Err(_) => complain(&fault::bug_line()),
    };
    ExitCode::from(status as u8)
}

/// Why there is no answer to print.
enum Stop {
    /// Help or the version was asked for and has been shown.
    Shown,
    /// One line that tells the user what went wrong.
    Error(String),
}

fn run(arguments: impl Iterator<Item = OsString>) -> Result<Output, Stop> {
    let cli = Cli::try_parse_from(arguments).map_err(|error| usage(&error))?;
    log::start().map_err(|error| Stop::error(&error))?;
    let context = Context::new(&cli.global).map_err(|error| Stop::error(&error))?;
    let answer = cli.command.run(&context).map_err(|error| Stop::error(&error))?;
    Ok(Output {
        text: if cli.global.json { answer.json } else { answer.text },
        status: answer.status,
    })
}

/// What goes to standard output, and the exit code.
struct Output {
    text: String,
    status: Status,
}

impl Stop {
    fn error(error: &anyhow::Error) -> Self {
        Self::Error(fault::one_line(error))
    }
}

/// Shows help where it was asked for; any other complaint of the parser becomes one line.
fn usage(error: &clap::Error) -> Stop {
    if !error.use_stderr() {
        // Help that goes to a closed pipe has been read as far as the reader cared.
        error.print().ok();
        return Stop::Shown;
    }
    let text = error.render().to_string();
    let mut lines = text.lines();
    let mut line = lines
        .next()
        .unwrap_or_default()
        .trim_start_matches("error: ")
        .to_owned();
    if line.ends_with(':') {
        // "the following required arguments were not provided:" names them in the lines below it.
        for name in lines.take_while(|line| line.starts_with("  ")) {
            line.push(' ');
            line.push_str(name.trim());
        }
    }
    Stop::Error(format!("{line}; see --help"))
}

fn print(output: &Output) -> Status {
    let mut stdout = io::stdout().lock();
    let written = stdout
        .write_all(output.text.as_bytes())
        .and_then(|()| stdout.flush());
    match written {
        // A reader that has seen enough is no error.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            complain(&format!("standard output: {error}"))
        }
        _ => output.status,
    }
}

fn complain(line: &str) -> Status {
    // Nothing can be said where standard error is closed too.
    writeln!(io::stderr(), "error: {line}").ok();
    Status::Error
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_parser_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_usage_error_is_one_line() {
        for (arguments, words) in [
            (vec!["fulgur"], "requires a subcommand"),
            (vec!["fulgur", "fly"], "unrecognized subcommand 'fly'"),
            (
                vec!["fulgur", "doctor", "--device", "tpu"],
                "expected auto, cpu, cuda or cuda:N",
            ),
        ] {
            let Err(Stop::Error(line)) = run(arguments.into_iter().map(OsString::from)) else {
                panic!("expected a usage error")
            };
            assert!(line.contains(words) && line.ends_with("; see --help"), "{line}");
            assert_eq!(line.lines().count(), 1, "{line}");
        }
    }
}
