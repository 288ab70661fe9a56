//! Events of `tracing` on standard error, where the environment asks for them.

use std::env;
use std::io;

use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Names the events to show: `debug`, or targets with levels as `fulgur_kernels=debug`.
pub(super) const VARIABLE: &str = "FULGUR_LOG";

/// Starts to show events; does nothing where [`VARIABLE`] is not set.
pub(super) fn start() -> anyhow::Result<()> {
    let Some(wanted) = env::var_os(VARIABLE) else {
        return Ok(());
    };
    let wanted = wanted.to_string_lossy();
    let Ok(targets) = wanted.parse::<Targets>() else {
        anyhow::bail!(
            "{VARIABLE}: found {wanted:?}, expected off, error, warn, info, debug, trace or targets like \
             fulgur_kernels=debug"
        );
    };
    let events = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(false);
    // Something of the process has been listening already if this fails; then it goes on.
    tracing_subscriber::registry()
        .with(events)
        .with(targets)
        .try_init()
        .ok();
    Ok(())
}
