//! `fulgur data`: data sets, and what training text needs.

use super::answer::Answer;
use super::context::Context;

mod clean;
#[cfg(feature = "media")]
mod sets;

/// List and fetch data sets, and clean text
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = false,
    after_help = "Example:\n  fulgur data list\n  fulgur data fetch stamps"
)]
pub(super) struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    // Preparing most sets takes a decoder.
    #[cfg(feature = "media")]
    List(sets::ListArguments),
    #[cfg(feature = "media")]
    Fetch(sets::FetchArguments),
    Clean(clean::Arguments),
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    match arguments.action {
        #[cfg(feature = "media")]
        Action::List(arguments) => sets::list(arguments),
        #[cfg(feature = "media")]
        Action::Fetch(arguments) => sets::fetch(context, arguments),
        Action::Clean(arguments) => clean::run(context, arguments),
    }
}
