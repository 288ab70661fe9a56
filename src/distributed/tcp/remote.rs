//! The side of the other ranks: what they want to do is done for them at rank 0.

use std::collections::HashMap;
use std::io::{self, BufReader, BufWriter};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};

use super::super::communicator::{Call, Communicator, Counter, Pending, Traffic};
use super::super::error::CommError;
use super::super::place::Place;
use super::super::threads::Settings;
use super::super::wire::{Ask, Shape, Tell, read, write};
use super::{VERSION, launch};

/// Between two tries to reach rank 0.
const RETRY: Duration = Duration::from_millis(50);
/// Rank 0 notices what is missing before others lose patience with rank 0.
const GRACE: Duration = Duration::from_secs(5);

/// Reaches rank 0, which may start later.
pub(super) fn join(place: &Place, settings: Settings) -> Result<Arc<dyn Communicator>, CommError> {
    let Place {
        rank,
        world,
        ref address,
        port,
        ref job,
        ..
    } = *place;
    let failed = |error: io::Error| launch(rank, format!("rank 0 at {address}:{port}: {error}"));
    let deadline = Instant::now() + settings.timeout;
    let stream = loop {
        match TcpStream::connect((address.as_str(), port)) {
            Ok(stream) => break stream,
            Err(_) if Instant::now() < deadline => sleep(RETRY),
            Err(error) => return Err(failed(error)),
        }
    };
    stream.set_nodelay(true).map_err(failed)?;
    stream.set_read_timeout(Some(settings.timeout)).map_err(failed)?;
    let mut reader = BufReader::new(stream.try_clone().map_err(failed)?);
    let mut writer = BufWriter::new(stream);
    let hello = Ask::Hello {
        version: VERSION.to_owned(),
        job: job.clone(),
        world,
        rank,
    };
    write(&mut writer, hello, &[]).map_err(failed)?;
    let timeout = match read::<Tell>(&mut reader).map_err(failed)?.0 {
        Tell::Welcome { timeout_s } => Duration::try_from_secs_f64(timeout_s).unwrap_or(settings.timeout),
        Tell::Refused { reason } => return Err(launch(rank, reason)),
        _ => return Err(launch(rank, format!("{address}:{port} does not speak as rank 0"))),
    };
    reader.get_ref().set_read_timeout(None).map_err(failed)?;
    let link = Arc::new(Link {
        rank,
        writer: Mutex::new(writer),
        slots: Arc::new(Slots::default()),
        asked: AtomicU64::new(0),
        groups: AtomicU32::new(0),
        counter: Counter::default(),
        timeout: timeout + GRACE,
    });
    let slots = link.slots.clone();
    std::thread::Builder::new()
        .name("answers of rank 0".to_owned())
        .spawn(move || slots.listen(reader))
        .map_err(failed)?;
    Ok(Arc::new(Group {
        link,
        number: 0,
        own: rank,
        members: (0..world).collect(),
    }))
}

/// The connection of this process, shared by its groups and what they have under way.
#[derive(Debug)]
struct Link {
    rank: usize,
    writer: Mutex<BufWriter<TcpStream>>,
    slots: Arc<Slots>,
    asked: AtomicU64,
    groups: AtomicU32,
    counter: Counter,
    timeout: Duration,
}

impl Link {
    fn ask(&self, operation: &str, ask: Ask, tensors: &[Tensor]) -> Result<(), CommError> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        write(&mut *writer, ask, tensors).map_err(|_| self.lost(operation))
    }

    fn lost(&self, operation: &str) -> CommError {
        lost(self.rank, operation)
    }
}

fn lost(rank: usize, operation: &str) -> CommError {
    CommError::Gone {
        rank,
        operation: operation.to_owned(),
        gone: 0,
        reason: "its process has ended".to_owned(),
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let writer = self.writer.get_mut().unwrap_or_else(PoisonError::into_inner);
        write(writer, Ask::Bye, &[]).ok();
        writer.get_ref().shutdown(Shutdown::Both).ok();
    }
}

type Answer = Result<Vec<Tensor>, CommError>;

/// Answers that have come, by the number of what was asked.
#[derive(Debug, Default)]
struct Slots {
    state: Mutex<Answers>,
    came: Condvar,
}

#[derive(Debug, Default)]
struct Answers {
    come: HashMap<u64, Answer>,
    /// Nothing comes any more.
    closed: bool,
}

impl Slots {
    fn state(&self) -> MutexGuard<'_, Answers> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listen(&self, mut reader: BufReader<TcpStream>) {
        while let Ok((tell, tensors)) = read::<Tell>(&mut reader) {
            let (id, answer) = match tell {
                Tell::Done { id } => (id, Ok(tensors)),
                Tell::Failed { id, error } => (id, Err(error)),
                Tell::Welcome { .. } | Tell::Refused { .. } => continue,
            };
            self.state().come.insert(id, answer);
            self.came.notify_all();
        }
        self.state().closed = true;
        self.came.notify_all();
    }
}

/// A group from the side of this rank.
#[derive(Debug)]
struct Group {
    link: Arc<Link>,
    number: u32,
    own: usize,
    members: Vec<usize>,
}

impl Group {
    fn host(&self, operation: &str, tensor: &Tensor) -> Result<Tensor, CommError> {
        let host = tensor
            .detach()
            .to_device(&Device::Cpu)
            .and_then(|host| host.contiguous());
        host.map_err(|error| CommError::tensor(self.link.rank, operation, &error))
    }

    fn pending(&self, id: u64, operation: &'static str, device: &Device) -> Box<dyn Pending> {
        Box::new(Asked {
            link: self.link.clone(),
            id,
            operation,
            device: device.clone(),
        })
    }

    fn next(&self) -> u64 {
        self.link.asked.fetch_add(1, Ordering::Relaxed)
    }
}

fn bytes_of(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}

impl Communicator for Group {
    fn rank(&self) -> usize {
        self.own
    }

    fn members(&self) -> &[usize] {
        &self.members
    }

    fn start(&self, call: Call, tensor: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        let host = self.host(call.name(), tensor)?;
        let bytes = if call == Call::Barrier { 0 } else { bytes_of(&host) };
        self.link.counter.call(call, bytes, self.members.len());
        let id = self.next();
        let ask = Ask::Start {
            id,
            group: self.number,
            call,
        };
        self.link.ask(call.name(), ask, &[host])?;
        Ok(self.pending(id, call.name(), tensor.device()))
    }

    fn send(&self, to: usize, tensor: &Tensor) -> Result<(), CommError> {
        let host = self.host("send", tensor)?;
        self.link.counter.send(bytes_of(&host));
        let ask = Ask::Send {
            group: self.number,
            to,
        };
        self.link.ask("send", ask, &[host])
    }

    fn start_receive(&self, from: usize, like: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        let id = self.next();
        let ask = Ask::Receive {
            id,
            group: self.number,
            from,
            like: Shape::of(like),
        };
        self.link.ask("receive", ask, &[])?;
        Ok(self.pending(id, "receive", like.device()))
    }

    fn group(&self, members: &[usize]) -> Result<Arc<dyn Communicator>, CommError> {
        let refused = |reason: String| CommError::Refused {
            rank: self.link.rank,
            operation: "group".to_owned(),
            reason,
        };
        let Some(own) = members.iter().position(|&member| member == self.own) else {
            return Err(refused(format!("{members:?}, expected {} among them", self.own)));
        };
        let rises = members.windows(2).all(|pair| pair[0] < pair[1]);
        if !rises || members.iter().any(|&member| member >= self.members.len()) {
            let all = self.members.len();
            return Err(refused(format!(
                "{members:?}, expected numbers that rise, below {all}"
            )));
        }
        let number = self.link.groups.fetch_add(1, Ordering::Relaxed) + 1;
        let ask = Ask::Group {
            group: number,
            of: self.number,
            members: members.to_vec(),
        };
        self.link.ask("group", ask, &[])?;
        Ok(Arc::new(Self {
            link: self.link.clone(),
            number,
            own,
            members: members.iter().map(|&member| self.members[member]).collect(),
        }))
    }

    fn fail(&self, reason: &str) {
        let ask = Ask::Fail {
            reason: reason.to_owned(),
        };
        // Where rank 0 is gone nobody is left to be told.
        self.link.ask("fail", ask, &[]).ok();
    }

    fn traffic(&self) -> Traffic {
        self.link.counter.read()
    }
}

/// An operation whose answer is under way.
#[derive(Debug)]
struct Asked {
    link: Arc<Link>,
    id: u64,
    operation: &'static str,
    device: Device,
}

impl Pending for Asked {
    fn is_done(&self) -> bool {
        let state = self.link.slots.state();
        state.closed || state.come.contains_key(&self.id)
    }

    fn wait(self: Box<Self>) -> Answer {
        let deadline = Instant::now() + self.link.timeout;
        let mut state = self.link.slots.state();
        let answer = loop {
            if let Some(answer) = state.come.remove(&self.id) {
                break answer;
            }
            if state.closed {
                return Err(self.link.lost(self.operation));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CommError::Missing {
                    rank: self.link.rank,
                    operation: self.operation.to_owned(),
                    missing: vec![0],
                    waited: self.link.timeout,
                });
            }
            let slots = &self.link.slots;
            state = slots
                .came
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        };
        drop(state);
        let moved = answer?.into_iter().map(|tensor| tensor.to_device(&self.device));
        moved
            .collect::<candle_core::Result<_>>()
            .map_err(|error| CommError::tensor(self.link.rank, self.operation, &error))
    }
}
