//! What ranks can do together, whatever is between them.
//!
//! Every operation can be started and waited for later: [`Communicator::start`] takes a private copy of the tensor, so that the
//! original may change meanwhile, and what comes back lies on the device of what was given. Members of a group call the same
//! operations in the same order; results have the same bits on all of them, because reductions go in the order of ranks.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::error::CommError;

/// What a reduction does with the elements of all ranks.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduce {
    /// Adds them.
    Sum,
    /// Takes the largest.
    Max,
}

/// An operation of all members of a group.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Call {
    /// Everybody gets the reduction of what all have.
    AllReduce(Reduce),
    /// Everybody gets what each has, in the order of ranks.
    AllGather,
    /// Of rows `[members, ..]`, everybody gets its own row of the sum.
    ReduceScatter,
    /// Everybody gets what the member `root` has.
    Broadcast {
        /// Number in the group.
        root: usize,
    },
    /// Nobody goes on before all are there.
    Barrier,
}

impl Call {
    /// Its name in messages and counts.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce(_) => "all-reduce",
            Self::AllGather => "all-gather",
            Self::ReduceScatter => "reduce-scatter",
            Self::Broadcast { .. } => "broadcast",
            Self::Barrier => "barrier",
        }
    }

    /// Bytes that a rank sends for it in a ring of `members`, where each brings `bytes`.
    fn sent(self, bytes: usize, members: usize) -> u64 {
        let (bytes, others) = (bytes as u64, members.saturating_sub(1) as u64);
        match self {
            Self::AllReduce(_) => 2 * others * bytes / members.max(1) as u64,
            Self::AllGather => others * bytes,
            Self::ReduceScatter => others * bytes / members.max(1) as u64,
            Self::Broadcast { .. } if others > 0 => bytes,
            Self::Broadcast { .. } | Self::Barrier => 0,
        }
    }
}

/// Name of point-to-point messages in counts.
pub const SEND: &str = "send";

/// What an operation has moved so far, from the side of one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Moved {
    /// How often it was called.
    pub calls: u64,
    /// Bytes of the rank's own that it handed over: what published volume formulas count.
    pub payload: u64,
    /// Bytes that a ring sends through the rank's link for them.
    pub sent: u64,
}

/// Counts by the name of the operation.
pub type Traffic = BTreeMap<&'static str, Moved>;

/// Counts of one rank, shared by all of its groups.
#[derive(Debug, Default)]
pub(super) struct Counter(Mutex<Traffic>);

impl Counter {
    pub(super) fn call(&self, call: Call, bytes: usize, members: usize) {
        self.add(call.name(), bytes, call.sent(bytes, members));
    }

    pub(super) fn send(&self, bytes: usize) {
        self.add(SEND, bytes, bytes as u64);
    }

    fn add(&self, name: &'static str, bytes: usize, sent: u64) {
        let mut traffic = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let moved = traffic.entry(name).or_default();
        moved.calls += 1;
        moved.payload += bytes as u64;
        moved.sent += sent;
    }

    pub(super) fn read(&self) -> Traffic {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// An operation that was started. Dropping it leaves the operation to the others.
pub trait Pending: Debug + Send {
    /// Whether [`Self::wait`] would answer at once.
    fn is_done(&self) -> bool;

    /// What came out of it.
    ///
    /// # Errors
    /// A rank is missing or has ended, ranks called different things, or a device failed.
    fn wait(self: Box<Self>) -> Result<Vec<Tensor>, CommError>;
}

/// A group of ranks, from the side of one of them.
pub trait Communicator: Debug + Send + Sync {
    /// Number of this rank in the group.
    fn rank(&self) -> usize;

    /// Numbers of the members in the whole job, in the order of the group.
    fn members(&self) -> &[usize];

    /// Starts an operation of all members.
    ///
    /// # Errors
    /// A tensor that the operation is not for.
    fn start(&self, call: Call, tensor: &Tensor) -> Result<Box<dyn Pending>, CommError>;

    /// Sends a tensor to the member `to`, without waiting for it.
    ///
    /// # Errors
    /// There is no such other member, or it has ended.
    fn send(&self, to: usize, tensor: &Tensor) -> Result<(), CommError>;

    /// Starts to wait for the next tensor of the member `from`, which has the shape and the type of `like` and will lie beside it.
    ///
    /// # Errors
    /// There is no such other member.
    fn start_receive(&self, from: usize, like: &Tensor) -> Result<Box<dyn Pending>, CommError>;

    /// The group of some members of this one, by their numbers in it, which rise. All of them, and nobody else, call it.
    ///
    /// # Errors
    /// Numbers that are none, or this rank is not among them.
    fn group(&self, members: &[usize]) -> Result<Arc<dyn Communicator>, CommError>;

    /// Tells all others that this rank ends, and why, so that none waits for it in vain.
    fn fail(&self, reason: &str);

    /// The rank that was the first to say that it ends, where this is known here.
    fn first_to_fail(&self) -> Option<usize> {
        None
    }

    /// What this rank has moved so far, in all groups.
    fn traffic(&self) -> Traffic;
}

impl dyn Communicator + '_ {
    /// Number of members.
    pub fn size(&self) -> usize {
        self.members().len()
    }

    /// The reduction over all members.
    ///
    /// # Errors
    /// As [`Pending::wait`].
    pub fn all_reduce(&self, tensor: &Tensor, reduce: Reduce) -> Result<Tensor, CommError> {
        self.only(Call::AllReduce(reduce), tensor)
    }

    /// What each member has, in order.
    ///
    /// # Errors
    /// As [`Pending::wait`].
    pub fn all_gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>, CommError> {
        self.start(Call::AllGather, tensor)?.wait()
    }

    /// Of rows `[members, ..]` summed over all members, the own one.
    ///
    /// # Errors
    /// As [`Pending::wait`].
    pub fn reduce_scatter(&self, rows: &Tensor) -> Result<Tensor, CommError> {
        self.only(Call::ReduceScatter, rows)
    }

    /// What the member `root` has; all members give a tensor of its shape.
    ///
    /// # Errors
    /// As [`Pending::wait`].
    pub fn broadcast(&self, root: usize, tensor: &Tensor) -> Result<Tensor, CommError> {
        self.only(Call::Broadcast { root }, tensor)
    }

    /// Waits for all members.
    ///
    /// # Errors
    /// As [`Pending::wait`].
    pub fn barrier(&self) -> Result<(), CommError> {
        let nothing = Tensor::zeros(1, DType::U8, &candle_core::Device::Cpu);
        let nothing = nothing.map_err(|error| CommError::tensor(self.own(), Call::Barrier.name(), &error))?;
        self.start(Call::Barrier, &nothing)?.wait().map(drop)
    }

    /// The next tensor of the member `from`.
    ///
    /// # Errors
    /// As [`Pending::wait`].
    pub fn receive(&self, from: usize, like: &Tensor) -> Result<Tensor, CommError> {
        let found = self.start_receive(from, like)?.wait()?;
        self.one("receive", found)
    }

    /// Refuses members whose `text` is not that of the first: other recipes, other versions.
    ///
    /// # Errors
    /// They differ; both ranks are named.
    pub fn agree(&self, what: &str, text: &str) -> Result<(), CommError> {
        use sha2::{Digest, Sha256};
        let digest: [u8; 32] = Sha256::digest(text.as_bytes()).into();
        let own = Tensor::new(&digest[..], &candle_core::Device::Cpu)
            .map_err(|error| CommError::tensor(self.own(), what, &error))?;
        let all = self.all_gather(&own)?;
        let mut digests = Vec::with_capacity(all.len());
        for tensor in &all {
            digests.push(
                tensor
                    .to_vec1::<u8>()
                    .map_err(|error| CommError::tensor(self.own(), what, &error))?,
            );
        }
        let short = |digest: &[u8]| {
            digest[..6]
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>()
        };
        match digests.iter().position(|digest| *digest != digests[0]) {
            None => Ok(()),
            Some(other) => Err(CommError::Mismatch {
                operation: what.to_owned(),
                one: self.members()[0],
                first: short(&digests[0]),
                other: self.members()[other],
                second: short(&digests[other]),
            }),
        }
    }

    /// The number of this rank in the whole job.
    pub fn own(&self) -> usize {
        self.members()[self.rank()]
    }

    fn only(&self, call: Call, tensor: &Tensor) -> Result<Tensor, CommError> {
        let found = self.start(call, tensor)?.wait()?;
        self.one(call.name(), found)
    }

    fn one(&self, operation: &str, mut found: Vec<Tensor>) -> Result<Tensor, CommError> {
        found.pop().ok_or_else(|| CommError::Tensor {
            rank: self.own(),
            operation: operation.to_owned(),
            reason: "nothing came out of it".to_owned(),
        })
    }
}
