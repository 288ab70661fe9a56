//! Training beyond one device: ranks that share sequences, data and parameters.
//!
//! | what | file |
//! |---|---|
//! | operations between ranks, asynchronous too | `communicator.rs` |
//! | ranks as threads of one process | `threads.rs` |
//! | ranks as processes, started by a launcher | `tcp.rs`, `place.rs` |
//! | ranks that send messages to each other; by MPI (feature `mpi`) | `mesh.rs`, `mpi.rs` |
//! | ranks on GPUs of their own, joined by NCCL (feature `nccl`) | `nccl.rs` |
//! | a network that is imagined between them | `network.rs` |
//! | states of split sequences, LASP-1 and LASP-2 | `lasp.rs` |
//! | which ranks share what | `ranks.rs`, `options.rs` |
//! | parameters in shards (ZeRO stage 3) | `parameters.rs` |
//! | layers over ranks (tensor parallelism) | `slices.rs` |
//! | how long steps would take on more ranks | `forecast.rs` |
//! | local steps and outer updates: CO2, SlowMo, Local SGD, DiLoCo | `outer.rs` |
//!
//! Models know nothing of ranks: they take a [`StateExchange`](fulgur_kernels::exchange::StateExchange) where sequences are split.

mod communicator;
mod error;
pub mod forecast;
pub mod lasp;
#[cfg(any(feature = "mpi", test))]
mod mesh;
#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(feature = "nccl")]
pub mod nccl;
mod network;
mod options;
pub mod outer;
mod parameters;
mod place;
mod ranks;
mod slices;
pub mod tcp;
pub mod threads;
mod wire;

pub use communicator::{Call, Communicator, Moved, Pending, Reduce, SEND, Traffic};
pub use error::CommError;
pub use lasp::Lasp;
pub use network::Network;
pub use options::{Distributed, Shard};
pub use parameters::Parameters;
pub use place::Place;
pub use ranks::{Ranks, Share};
pub use slices::Slices;
