//! Ranks on GPUs of their own, joined by NCCL.
//!
//! Ranks meet by another backend first, TCP or MPI, which hands out the id of each group. Tensors of the GPU then go through NCCL,
//! on a stream of its own; those of the host, words and digests, go on through the other backend. NCCL does not tell who is missing:
//! when an operation is not over in time, ranks ask each other by the other backend, and who does not answer is named.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use fulgur_kernels::nccl::{self, Comm, ID_BYTES, Running};

use super::communicator::{Call, Communicator, Counter, Moved, Pending, Reduce, Traffic};
use super::error::CommError;

/// Between two looks whether an operation is over.
const POLL: Duration = Duration::from_micros(20);

/// Joins the ranks of `meeting`, each with a GPU of its own; all of them call it. An operation is waited for as long as `timeout`.
///
/// # Errors
/// A rank is missing, the library cannot be loaded, `device` is no GPU, or two ranks have the same one.
pub fn join(
    meeting: Arc<dyn Communicator>,
    device: &Device,
    timeout: Duration,
) -> Result<Arc<dyn Communicator>, CommError> {
    let counter = Arc::new(Counter::default());
    Ok(Arc::new(Group::new(meeting, device, timeout, counter)?))
}

/// A group from the side of one rank.
#[derive(Debug)]
struct Group {
    /// By which its ranks met.
    meeting: Arc<dyn Communicator>,
    /// Of one call at a time.
    comm: Arc<Mutex<Comm>>,
    device: Device,
    timeout: Duration,
    counter: Arc<Counter>,
    /// Operations so far.
    calls: AtomicU64,
}

impl Group {
    fn new(
        meeting: Arc<dyn Communicator>,
        device: &Device,
        timeout: Duration,
        counter: Arc<Counter>,
    ) -> Result<Self, CommError> {
        let rank = meeting.own();
        let failed = |error: &candle_core::Error| CommError::Launch {
            rank,
            reason: error.to_string().lines().next().unwrap_or_default().to_owned(),
        };
        // A rank without an id must not leave the others waiting for one.
        let made = match meeting.rank() {
            0 => nccl::new_id(),
            _ => nccl::version().map(|_| [0; ID_BYTES]),
        };
        let made = made.map_err(|error| failed(&error)).inspect_err(|error| {
            meeting.fail(&error.to_string());
        })?;
        let own = Tensor::new(&made[..], &Device::Cpu).map_err(|error| failed(&error))?;
        let id = meeting.broadcast(0, &own)?;
        let id = id.to_vec1::<u8>().map_err(|error| failed(&error))?;
        let Ok(id) = id.try_into() else {
            return Err(failed(&candle_core::Error::Msg(
                "an id of another length".to_owned(),
            )));
        };
        let comm = Comm::join(device, &id, meeting.rank(), meeting.size()).map_err(|error| failed(&error))?;
        Ok(Self {
            meeting,
            comm: Arc::new(Mutex::new(comm)),
            device: device.clone(),
            timeout,
            counter,
            calls: AtomicU64::new(0),
        })
    }

    fn comm(&self) -> MutexGuard<'_, Comm> {
        self.comm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_elsewhere(&self, tensor: &Tensor) -> bool {
        !tensor.device().same_device(&self.device)
    }

    fn other(&self, operation: &str, member: usize) -> Result<(), CommError> {
        let members = self.meeting.size();
        match member < members && member != self.meeting.rank() {
            true => Ok(()),
            false => Err(CommError::Refused {
                rank: self.meeting.own(),
                operation: operation.to_owned(),
                reason: format!("member {member}, expected another one of {members}"),
            }),
        }
    }

    fn started(
        &self,
        operation: String,
        pieces: bool,
        running: candle_core::Result<Running>,
    ) -> Result<Box<Started>, CommError> {
        let running = running.map_err(|error| CommError::tensor(self.meeting.own(), &operation, &error))?;
        Ok(Box::new(Started {
            meeting: self.meeting.clone(),
            comm: self.comm.clone(),
            running: Some(running),
            operation,
            pieces,
            timeout: self.timeout,
            wanted: true,
        }))
    }

    fn words(&self, call: Call) -> String {
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        let members = self.meeting.members();
        let numbers: Vec<String> = members.iter().map(ToString::to_string).collect();
        format!(
            "{} number {number} of ranks {} by NCCL",
            call.name(),
            numbers.join(", ")
        )
    }
}

impl Communicator for Group {
    fn rank(&self) -> usize {
        self.meeting.rank()
    }

    fn members(&self) -> &[usize] {
        self.meeting.members()
    }

    fn start(&self, call: Call, tensor: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        if call == Call::Barrier || self.is_elsewhere(tensor) {
            return self.meeting.start(call, tensor);
        }
        let members = self.meeting.size();
        let wrong = match call {
            Call::Broadcast { root } if root >= members => {
                Some(format!("from member {root}, expected one of {members}"))
            }
            Call::ReduceScatter if tensor.dims().first() != Some(&members) => {
                Some(format!("found {:?}, expected [{members}, ..]", tensor.dims()))
            }
            _ => None,
        };
        if let Some(reason) = wrong {
            return Err(CommError::Refused {
                rank: self.meeting.own(),
                operation: call.name().to_owned(),
                reason,
            });
        }
        self.counter.call(call, bytes_of(tensor), members);
        let comm = self.comm();
        let running = match call {
            Call::AllReduce(Reduce::Sum) => comm.all_reduce(tensor, nccl::Reduce::Sum),
            Call::AllReduce(Reduce::Max) => comm.all_reduce(tensor, nccl::Reduce::Max),
            Call::AllGather => comm.all_gather(tensor),
            Call::ReduceScatter => comm.reduce_scatter(tensor),
            Call::Broadcast { root } => comm.broadcast(root, tensor),
            Call::Barrier => Err(candle_core::Error::Msg("a barrier moves nothing".to_owned())),
        };
        drop(comm);
        let started = self.started(self.words(call), call == Call::AllGather, running)?;
        Ok(started)
    }

    fn send(&self, to: usize, tensor: &Tensor) -> Result<(), CommError> {
        if self.is_elsewhere(tensor) {
            return self.meeting.send(to, tensor);
        }
        self.other("send", to)?;
        self.counter.send(bytes_of(tensor));
        let running = self.comm().send(to, tensor);
        let mut started = self.started(format!("send to rank {}", self.members()[to]), false, running)?;
        // Nobody waits for it: who drops it sees to it that its memory lives until it is over.
        started.wanted = false;
        std::thread::spawn(move || started.wait());
        Ok(())
    }

    fn start_receive(&self, from: usize, like: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        if self.is_elsewhere(like) {
            return self.meeting.start_receive(from, like);
        }
        self.other("receive", from)?;
        let running = self.comm().receive(from, like);
        let started = self.started(
            format!("receive from rank {}", self.members()[from]),
            false,
            running,
        )?;
        Ok(started)
    }

    fn group(&self, members: &[usize]) -> Result<Arc<dyn Communicator>, CommError> {
        let meeting = self.meeting.group(members)?;
        let group = Self::new(meeting, &self.device, self.timeout, self.counter.clone())?;
        Ok(Arc::new(group))
    }

    fn fail(&self, reason: &str) {
        self.meeting.fail(reason);
    }

    fn first_to_fail(&self) -> Option<usize> {
        self.meeting.first_to_fail()
    }

    fn traffic(&self) -> Traffic {
        let mut all = self.counter.read();
        for (name, Moved { calls, payload, sent }) in self.meeting.traffic() {
            let moved = all.entry(name).or_default();
            moved.calls += calls;
            moved.payload += payload;
            moved.sent += sent;
        }
        all
    }
}

fn bytes_of(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}

/// An operation that waits for its result.
#[derive(Debug)]
struct Started {
    meeting: Arc<dyn Communicator>,
    comm: Arc<Mutex<Comm>>,
    running: Option<Running>,
    operation: String,
    /// Whether the result is one tensor for each member.
    pieces: bool,
    timeout: Duration,
    /// Whether anybody asks for the result.
    wanted: bool,
}

impl Started {
    /// Why it is not over in time: ranks ask each other who is there.
    fn missing(&self) -> CommError {
        let rank = self.meeting.own();
        let answered = Tensor::zeros(1, DType::U8, &Device::Cpu)
            .map_err(|error| CommError::tensor(rank, &self.operation, &error))
            .and_then(|nothing| self.meeting.start(Call::Barrier, &nothing)?.wait());
        match answered {
            Err(CommError::Missing { missing, waited, .. }) => CommError::Missing {
                rank,
                operation: self.operation.clone(),
                missing,
                waited: waited + self.timeout,
            },
            Err(CommError::Gone { gone, reason, .. }) => CommError::Gone {
                rank,
                operation: self.operation.clone(),
                gone,
                reason,
            },
            Err(error) => error,
            Ok(_) => CommError::Refused {
                rank,
                operation: self.operation.clone(),
                reason: format!("not over after {:?}, though all ranks wait for it", self.timeout),
            },
        }
    }
}

impl Pending for Started {
    fn is_done(&self) -> bool {
        self.running.as_ref().is_none_or(Running::is_over)
    }

    fn wait(mut self: Box<Self>) -> Result<Vec<Tensor>, CommError> {
        let Some(running) = self.running.take() else {
            return Ok(Vec::new());
        };
        let rank = self.meeting.own();
        let deadline = Instant::now() + self.timeout;
        while !running.is_over() {
            let failure = self.comm.lock().unwrap_or_else(PoisonError::into_inner).failure();
            let late = Instant::now() >= deadline;
            if failure.is_none() && !late {
                sleep(POLL);
                continue;
            }
            drop(running);
            return Err(match failure {
                Some(reason) => CommError::Refused {
                    rank,
                    operation: self.operation.clone(),
                    reason,
                },
                None if self.wanted => self.missing(),
                None => CommError::Refused {
                    rank,
                    operation: self.operation.clone(),
                    reason: format!("not over after {:?}", self.timeout),
                },
            });
        }
        let failed = |error: candle_core::Error| CommError::tensor(rank, &self.operation, &error);
        let tensor = running.result().map_err(failed)?;
        match self.pieces {
            false => Ok(vec![tensor]),
            true => (0..self.meeting.size())
                .map(|member| tensor.get(member)?.force_contiguous())
                .collect::<candle_core::Result<_>>()
                .map_err(failed),
        }
    }
}
