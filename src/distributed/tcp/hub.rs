//! The side of rank 0: it lets the others in, and acts for them.

use std::collections::HashMap;
use std::io::{BufReader, BufWriter};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle, sleep};
use std::time::{Duration, Instant};

use super::super::communicator::{Communicator, Pending};
use super::super::error::CommError;
use super::super::place::Place;
use super::super::threads::{Settings, world};
use super::super::wire::{Ask, Tell, read, write};
use super::{VERSION, launch};

/// How long a newcomer may take to say who it is.
const HELLO: Duration = Duration::from_secs(10);
/// How long the hub waits for the last words of the others when its own rank is done.
const FAREWELL: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(10);

/// What serves the other ranks. Dropping it waits a while for them to end.
#[derive(Debug)]
pub struct Hub {
    proxies: Vec<JoinHandle<()>>,
}

impl Hub {
    /// Listens until all ranks are there.
    pub(super) fn open(
        place: &Place,
        settings: Settings,
    ) -> Result<(Arc<dyn Communicator>, Self), CommError> {
        let at = format!("{}:{}", place.address, place.port);
        let listener = TcpListener::bind(&at)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .map_err(|error| {
                launch(
                    0,
                    format!("cannot listen at {at}: {error}; is another job there?"),
                )
            })?;
        let mut ranks: Vec<Option<Arc<dyn Communicator>>> =
            world(place.world, settings).into_iter().map(Some).collect();
        let Some(own) = ranks[0].take() else {
            return Err(launch(0, "a world without ranks"));
        };
        let deadline = Instant::now() + settings.timeout;
        let mut proxies = Vec::new();
        while ranks.iter().any(Option::is_some) {
            match listener.accept() {
                Ok((stream, _)) => {
                    if let Some((rank, line)) = greet(stream, place, settings, &ranks)? {
                        let Some(comm) = ranks[rank].take() else {
                            continue;
                        };
                        let proxy = Builder::new()
                            .name(format!("proxy of rank {rank}"))
                            .spawn(move || line.serve(&comm))
                            .map_err(|error| launch(0, format!("no thread for rank {rank}: {error}")))?;
                        proxies.push(proxy);
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    if Instant::now() >= deadline {
                        let missing = (0..place.world).filter(|&rank| ranks[rank].is_some()).collect();
                        return Err(CommError::Missing {
                            rank: 0,
                            operation: format!("start of {} ranks at {at}", place.world),
                            missing,
                            waited: settings.timeout,
                        });
                    }
                    sleep(POLL);
                }
                Err(error) => return Err(launch(0, format!("cannot listen at {at}: {error}"))),
            }
        }
        Ok((own, Self { proxies }))
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        let deadline = Instant::now() + FAREWELL;
        for proxy in self.proxies.drain(..) {
            while !proxy.is_finished() && Instant::now() < deadline {
                sleep(POLL);
            }
            if proxy.is_finished() {
                // A panic there was told to the ranks already: the proxy's communicator is gone.
                proxy.join().ok();
            }
        }
    }
}

/// A connection to a rank.
struct Line {
    reader: BufReader<TcpStream>,
    writer: Arc<Mutex<BufWriter<TcpStream>>>,
}

/// Asks a newcomer who it is. None where it is nobody, or turned away; an error where it is a rank that must not be.
fn greet(
    stream: TcpStream,
    place: &Place,
    settings: Settings,
    free: &[Option<Arc<dyn Communicator>>],
) -> Result<Option<(usize, Line)>, CommError> {
    let prepared = stream
        .set_nonblocking(false)
        .and_then(|()| stream.set_nodelay(true))
        .and_then(|()| stream.set_read_timeout(Some(HELLO)))
        .and_then(|()| stream.try_clone());
    let Ok(other) = prepared else {
        return Ok(None);
    };
    let mut line = Line {
        reader: BufReader::new(other),
        writer: Arc::new(Mutex::new(BufWriter::new(stream))),
    };
    let Ok((
        Ask::Hello {
            version,
            job,
            world,
            rank,
        },
        _,
    )) = read::<Ask>(&mut line.reader)
    else {
        return Ok(None);
    };
    if job != place.job {
        line.tell(Tell::Refused {
            reason: "rank 0 there is of another job".to_owned(),
        });
        return Ok(None);
    }
    let reason = if version != VERSION {
        Some(format!(
            "rank {rank} is version {version}, rank 0 version {VERSION}"
        ))
    } else if world != place.world {
        Some(format!(
            "rank {rank} was started as one of {world} ranks, rank 0 as one of {}",
            place.world
        ))
    } else if free.get(rank).is_none_or(Option::is_none) {
        Some(format!("rank {rank} was started twice"))
    } else {
        None
    };
    if let Some(reason) = reason {
        line.tell(Tell::Refused {
            reason: reason.clone(),
        });
        return Err(launch(0, reason));
    }
    line.tell(Tell::Welcome {
        timeout_s: settings.timeout.as_secs_f64(),
    });
    line.reader.get_ref().set_read_timeout(None).ok();
    Ok(Some((rank, line)))
}

impl Line {
    fn tell(&self, tell: Tell) {
        // A rank that does not listen any more is noticed where it is read from.
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        write(&mut *writer, tell, &[]).ok();
    }

    /// Does what the rank of `comm` asks for, until it leaves.
    fn serve(mut self, comm: &Arc<dyn Communicator>) {
        let mut groups: HashMap<u32, Arc<dyn Communicator>> = HashMap::from([(0, comm.clone())]);
        loop {
            let (ask, tensors) = match read::<Ask>(&mut self.reader) {
                Ok(found) => found,
                Err(_) => return comm.fail("its process has ended"),
            };
            match ask {
                Ask::Start { id, group, call } => {
                    let started = match (groups.get(&group), tensors.first()) {
                        (Some(group), Some(tensor)) => group.start(call, tensor),
                        _ => Err(unknown(comm, call.name())),
                    };
                    self.answer(id, started);
                }
                Ask::Receive {
                    id,
                    group,
                    from,
                    like,
                } => {
                    let started = match (groups.get(&group), like.zeros()) {
                        (Some(group), Ok(like)) => group.start_receive(from, &like),
                        _ => Err(unknown(comm, "receive")),
                    };
                    self.answer(id, started);
                }
                Ask::Send { group, to } => {
                    if let (Some(group), Some(tensor)) = (groups.get(&group), tensors.first()) {
                        // Whoever waits for a rank that has ended is told so there.
                        group.send(to, tensor).ok();
                    }
                }
                Ask::Group { group, of, members } => {
                    let made = groups.get(&of).map(|of| of.group(&members));
                    if let Some(Ok(made)) = made {
                        groups.insert(group, made);
                    }
                }
                Ask::Fail { reason } => comm.fail(&reason),
                Ask::Bye => return,
                Ask::Hello { .. } => return comm.fail("it said hello twice"),
            }
        }
    }

    /// Answers when the operation is done, while others are asked for.
    fn answer(&self, id: u64, started: Result<Box<dyn Pending>, CommError>) {
        let writer = self.writer.clone();
        let tell = move |found: Result<Vec<candle_core::Tensor>, CommError>| {
            let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
            let written = match found {
                Ok(tensors) => write(&mut *writer, Tell::Done { id }, &tensors),
                Err(error) => write(&mut *writer, Tell::Failed { id, error }, &[]),
            };
            // As in `tell`.
            written.ok();
        };
        match started {
            Err(error) => tell(Err(error)),
            Ok(pending) => {
                std::thread::spawn(move || tell(pending.wait()));
            }
        }
    }
}

fn unknown(comm: &Arc<dyn Communicator>, operation: &str) -> CommError {
    CommError::Refused {
        rank: comm.own(),
        operation: operation.to_owned(),
        reason: "a group that is none, or no tensor".to_owned(),
    }
}
