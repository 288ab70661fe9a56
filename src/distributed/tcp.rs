//! Ranks as processes that meet over TCP: rank 0 keeps the meeting place of [`super::threads`], and each other rank has a thread
//! there that does what its process asks for.
//!
//! All that ranks exchange goes through rank 0, so that this is for processes on a CPU, and to start and test jobs; between GPUs
//! and hosts it is not the way to be fast.

mod hub;
mod remote;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use super::communicator::Communicator;
use super::error::CommError;
use super::place::Place;
use super::threads::Settings;

pub use hub::Hub;

/// Only programs of the same version understand each other.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Joins the job that `place` is of. On rank 0 there is a [`Hub`] too, which serves the others and has to outlive their work.
///
/// # Errors
/// The port is taken, ranks do not come in time, two have the same number, or they are of other versions or other jobs.
pub fn join(place: &Place, settings: Settings) -> Result<(Arc<dyn Communicator>, Option<Hub>), CommError> {
    match place.rank {
        0 => {
            let (comm, hub) = Hub::open(place, settings)?;
            Ok((comm, Some(hub)))
        }
        _ => Ok((remote::join(place, settings)?, None)),
    }
}

fn launch(rank: usize, reason: impl Into<String>) -> CommError {
    CommError::Launch {
        rank,
        reason: reason.into(),
    }
}
