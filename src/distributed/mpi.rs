//! Ranks as processes of an MPI job: `mpirun -n 4 fulgur train RECIPE` with a program built with the feature `mpi`.
//!
//! MPI carries the messages of [`super::mesh`]. A thread sends, and another one receives whatever has come, so that a rank that
//! computes holds up nobody; MPI has to allow several threads (`MPI_THREAD_MULTIPLE`).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use mpi::Threading;
use mpi::environment::Universe;
use mpi::point_to_point::Status;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator as _, Destination, MatchedReceiveVec, Source};

use super::communicator::Communicator;
use super::error::CommError;
use super::mesh::{Carrier, Mesh};
use super::threads::Settings;

/// Between two looks whether something has come or is to be sent.
const POLL: Duration = Duration::from_micros(100);
/// MPI counts in 32 bits: longer messages go in pieces. The first bytes say how many follow.
const PIECE: usize = 1 << 29;
/// Variables by which launchers of MPI tell a process that it is one of a job.
const SIGNS: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"];

/// Whether this process was started by MPI.
pub fn is_launched() -> bool {
    SIGNS.iter().any(|sign| std::env::var_os(sign).is_some())
}

/// The job, from the side of one process. It has to outlive all work; dropping it waits for messages that are under way.
pub struct Job {
    /// Last, so that threads have ended before MPI does.
    threads: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    _universe: Universe,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").finish_non_exhaustive()
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            // A panic there was seen as ranks that are missing.
            thread.join().ok();
        }
    }
}

/// A receiver and what it is to receive.
type Parcel = (usize, Vec<u8>);

#[derive(Debug)]
struct Outbox(Mutex<Sender<Parcel>>);

impl Carrier for Outbox {
    fn carry(&self, to: usize, bytes: Vec<u8>) {
        let sender = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody sends after the job is over.
        sender.send((to, bytes)).ok();
    }
}

/// Joins the job of this process.
///
/// # Errors
/// MPI was initialised before, or allows one thread only.
pub fn join(settings: Settings) -> Result<(Arc<dyn Communicator>, Job), CommError> {
    let refused = |reason: String| CommError::Launch { rank: 0, reason };
    let Some((universe, threading)) = mpi::initialize_with_threading(Threading::Multiple) else {
        return Err(refused("MPI was initialised twice".to_owned()));
    };
    if threading < Threading::Multiple {
        return Err(refused(format!(
            "MPI allows {threading:?}, expected several threads (Multiple)"
        )));
    }
    let world = universe.world();
    let (rank, size) = (world.rank() as usize, world.size() as usize);
    let (sender, outbox) = channel();
    let mesh = Mesh::new(Box::new(Outbox(Mutex::new(sender))), rank, size, settings.timeout);
    let stop = Arc::new(AtomicBool::new(false));
    let (comm, weak, stopping) = (mesh.world(), Arc::downgrade(&mesh), stop.clone());
    drop(mesh);
    let threads = vec![
        std::thread::spawn({
            let stop = stop.clone();
            move || send(&outbox, &stop)
        }),
        std::thread::spawn(move || receive(&weak, &stopping)),
    ];
    let job = Job {
        threads,
        stop,
        _universe: universe,
    };
    Ok((comm, job))
}

/// Sends what is in the outbox until the job is over and it is empty.
fn send(outbox: &Receiver<Parcel>, stop: &AtomicBool) {
    let world = SimpleCommunicator::world();
    loop {
        match outbox.recv_timeout(Duration::from_millis(20)) {
            Ok((to, bytes)) => {
                let process = world.process_at_rank(to as i32);
                let pieces = bytes.len().div_ceil(PIECE);
                process.send(&(pieces as u64).to_le_bytes()[..]);
                for piece in bytes.chunks(PIECE) {
                    process.send(piece);
                }
            }
            Err(RecvTimeoutError::Timeout) if !stop.load(Ordering::SeqCst) => {}
            Err(_) => return,
        }
    }
}

/// Delivers what comes until the job is over. While no one works here any more, messages are taken and forgotten, so that their
/// senders do not wait.
fn receive(mesh: &Weak<Mesh>, stop: &AtomicBool) {
    let world = SimpleCommunicator::world();
    let mut quiet = 0;
    // After the end, as long as something may still come.
    while !stop.load(Ordering::SeqCst) || quiet < 1000 {
        let Some((message, status)) = world.any_process().immediate_matched_probe() else {
            quiet += 1;
            sleep(POLL);
            continue;
        };
        quiet = 0;
        let from = rank_of(&status);
        let (head, _) = (message, status).matched_receive_vec::<u8>();
        let pieces = head.try_into().map_or(0, u64::from_le_bytes);
        let mut bytes = Vec::new();
        for _ in 0..pieces {
            let probed = world.process_at_rank(from as i32).matched_probe();
            let (piece, _) = probed.matched_receive_vec::<u8>();
            bytes.extend(piece);
        }
        if let Some(mesh) = mesh.upgrade() {
            mesh.deliver(from, &bytes);
        }
    }
}

fn rank_of(status: &Status) -> usize {
    status.source_rank() as usize
}

#[cfg(test)]
mod tests;
