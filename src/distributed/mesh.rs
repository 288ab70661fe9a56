//! Ranks that send messages to each other, whatever carries them: operations of groups from messages between two.
//!
//! Every rank sends what is due to every other one directly. A sum goes in two steps: each rank gets its piece of everybody's
//! tensor, adds the pieces in the order of ranks, and sends the piece of the sum to all; through the link of a rank go
//! `2 (W - 1) / W` of the bytes, as in a ring. Sums are made where messages arrive, so that they go on while the rank computes.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::communicator::{Call, Communicator, Counter, Pending, Reduce, Traffic};
use super::error::CommError;
use super::threads::span;
use super::wire;

/// Carries messages to other ranks: in order between any two, and without waiting for the receiver.
pub(super) trait Carrier: std::fmt::Debug + Send + Sync {
    /// Sends to the rank `to` of the world. That it is gone is noticed elsewhere.
    fn carry(&self, to: usize, bytes: Vec<u8>);
}

/// A group: its members, and which of the groups of these members it is.
type Name = (Vec<usize>, u64);

/// What travels between two ranks.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Message {
    /// What a member brings to an operation: a whole tensor, or the receiver's piece of it. `words` say what was called.
    Post { group: Name, number: u64, words: String },
    /// A piece of a sum.
    Sum { group: Name, number: u64 },
    /// A tensor from one to another.
    Letter { group: Name },
    /// The rank ends.
    End { reason: String },
}

/// The ranks from the side of one of them.
#[derive(Debug)]
pub(super) struct Mesh {
    carrier: Box<dyn Carrier>,
    rank: usize,
    size: usize,
    timeout: Duration,
    state: Mutex<State>,
    changed: Condvar,
    counter: Counter,
}

#[derive(Debug, Default)]
struct State {
    rounds: HashMap<(Name, u64), Round>,
    mail: HashMap<(Name, usize), VecDeque<Tensor>>,
    ended: HashMap<usize, String>,
    groups: HashMap<Vec<usize>, u64>,
}

/// An operation, of which some members may have posted before this one.
#[derive(Debug, Default)]
struct Round {
    call: Option<Call>,
    shape: Vec<usize>,
    own: usize,
    posts: HashMap<usize, (String, Tensor)>,
    sums: HashMap<usize, Tensor>,
    result: Option<Result<Vec<Tensor>, CommError>>,
}

impl Mesh {
    /// Of rank `rank` of `size`, whose messages go by `carrier`.
    pub(super) fn new(carrier: Box<dyn Carrier>, rank: usize, size: usize, timeout: Duration) -> Arc<Self> {
        Arc::new(Self {
            carrier,
            rank,
            size,
            timeout,
            state: Mutex::default(),
            changed: Condvar::new(),
            counter: Counter::default(),
        })
    }

    /// The group of all.
    pub(super) fn world(self: &Arc<Self>) -> Arc<dyn Communicator> {
        Arc::new(Group {
            mesh: self.clone(),
            own: self.rank,
            name: ((0..self.size).collect(), 0),
            calls: AtomicU64::new(0),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what has come from the rank `from`.
    pub(super) fn deliver(&self, from: usize, bytes: &[u8]) {
        let mut state = self.state();
        match wire::read::<Message>(&mut &*bytes) {
            Err(error) => {
                let reason = format!("it sent what is no message: {error}");
                state.ended.entry(from).or_insert(reason);
            }
            Ok((Message::End { reason }, _)) => {
                state.ended.entry(from).or_insert(reason);
            }
            Ok((Message::Post { group, number, words }, mut tensors)) => {
                if let (Some(member), Some(tensor)) = (place(&group, from), tensors.pop()) {
                    let key = (group, number);
                    let round = state.rounds.entry(key.clone()).or_default();
                    round.posts.insert(member, (words, tensor));
                    self.advance(&mut state, &key);
                }
            }
            Ok((Message::Sum { group, number }, mut tensors)) => {
                if let (Some(member), Some(tensor)) = (place(&group, from), tensors.pop()) {
                    let key = (group, number);
                    let round = state.rounds.entry(key.clone()).or_default();
                    round.sums.insert(member, tensor);
                    self.advance(&mut state, &key);
                }
            }
            Ok((Message::Letter { group }, mut tensors)) => {
                if let (Some(member), Some(tensor)) = (place(&group, from), tensors.pop()) {
                    state.mail.entry((group, member)).or_default().push_back(tensor);
                }
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    fn send(&self, to: usize, message: &Message, tensors: &[Tensor]) -> std::io::Result<()> {
        let mut bytes = Vec::new();
        wire::write(&mut bytes, message, tensors)?;
        self.carrier.carry(to, bytes);
        Ok(())
    }

    /// Does what can be done of an operation with what has come so far.
    fn advance(&self, state: &mut State, key: &(Name, u64)) {
        let Some(round) = state.rounds.get_mut(key) else {
            return;
        };
        let members = &key.0.0;
        let (Some(call), None, true) = (round.call, &round.result, round.posts.len() == members.len()) else {
            return;
        };
        let result = self.made(round, call, key);
        if let Some(round) = state.rounds.get_mut(key) {
            round.result = result;
        }
    }

    /// The result of an operation to which all have posted; none while pieces of a sum are missing.
    fn made(
        &self,
        round: &mut Round,
        call: Call,
        key: &(Name, u64),
    ) -> Option<Result<Vec<Tensor>, CommError>> {
        let members = &key.0.0;
        let operation = || describe(call, key);
        let words = |member: usize| round.posts[&member].0.clone();
        if let Some(other) = (0..members.len()).find(|&member| words(member) != words(0)) {
            return Some(Err(CommError::Mismatch {
                operation: operation(),
                one: members[0],
                first: words(0),
                other: members[other],
                second: words(other),
            }));
        }
        let failed = |error: &candle_core::Error| CommError::tensor(self.rank, &operation(), error);
        let of = |member: usize| round.posts[&member].1.clone();
        match call {
            Call::Barrier => Some(Ok(Vec::new())),
            Call::AllGather => Some(Ok((0..members.len()).map(of).collect())),
            Call::Broadcast { root } => Some(Ok(vec![of(root)])),
            Call::ReduceScatter => Some(
                summed((0..members.len()).map(of), Reduce::Sum)
                    .and_then(|row| row.reshape(&round.shape[1..]))
                    .map(|row| vec![row])
                    .map_err(|error| failed(&error)),
            ),
            Call::AllReduce(reduce) => {
                if !round.sums.contains_key(&round.own) {
                    let piece = match summed((0..members.len()).map(of), reduce) {
                        Ok(piece) => piece,
                        Err(error) => return Some(Err(failed(&error))),
                    };
                    let message = Message::Sum {
                        group: key.0.clone(),
                        number: key.1,
                    };
                    for (member, &rank) in members.iter().enumerate() {
                        if member != round.own
                            && self.send(rank, &message, std::slice::from_ref(&piece)).is_err()
                        {
                            return None;
                        }
                    }
                    round.sums.insert(round.own, piece);
                }
                if round.sums.len() < members.len() {
                    return None;
                }
                let pieces: Vec<&Tensor> = (0..members.len()).map(|member| &round.sums[&member]).collect();
                let count = round.shape.iter().product();
                let whole = Tensor::cat(&pieces, 0)
                    .and_then(|all| all.narrow(0, 0, count)?.reshape(round.shape.as_slice()));
                Some(whole.map(|tensor| vec![tensor]).map_err(|error| failed(&error)))
            }
        }
    }
}

/// The number of a rank in a group.
fn place(group: &Name, rank: usize) -> Option<usize> {
    group.0.iter().position(|&member| member == rank)
}

fn describe(call: Call, ((members, _), number): &(Name, u64)) -> String {
    format!("{} number {number} of ranks {}", call.name(), span(members))
}

/// The reduction in the order given.
fn summed(tensors: impl Iterator<Item = Tensor>, reduce: Reduce) -> candle_core::Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for tensor in tensors {
        sum = Some(match (sum, reduce) {
            (None, _) => tensor,
            (Some(sum), Reduce::Sum) => (sum + tensor)?,
            (Some(sum), Reduce::Max) => sum.maximum(&tensor)?,
        });
    }
    sum.ok_or_else(|| candle_core::Error::Msg("nothing to reduce".to_owned()))
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.tell_all("it left without a word");
    }
}

impl Mesh {
    fn tell_all(&self, reason: &str) {
        let message = Message::End {
            reason: reason.to_owned(),
        };
        for rank in (0..self.size).filter(|&rank| rank != self.rank) {
            // Nobody has to hear it.
            self.send(rank, &message, &[]).ok();
        }
    }
}

/// A group from the side of this rank.
#[derive(Debug)]
struct Group {
    mesh: Arc<Mesh>,
    own: usize,
    name: Name,
    calls: AtomicU64,
}

impl Group {
    fn refused(&self, operation: &str, reason: impl Into<String>) -> CommError {
        CommError::Refused {
            rank: self.mesh.rank,
            operation: operation.to_owned(),
            reason: reason.into(),
        }
    }

    fn host(&self, operation: &str, tensor: &Tensor) -> Result<Tensor, CommError> {
        let host = tensor
            .detach()
            .to_device(&Device::Cpu)
            .and_then(|host| match tensor.device() {
                Device::Cpu => host.force_contiguous(),
                _ => host.contiguous(),
            });
        host.map_err(|error| CommError::tensor(self.mesh.rank, operation, &error))
    }

    fn other(&self, operation: &str, member: usize) -> Result<usize, CommError> {
        let members = self.name.0.len();
        match self.name.0.get(member) {
            Some(&rank) if member != self.own => Ok(rank),
            _ => Err(self.refused(
                operation,
                format!("member {member}, expected another one of {members}"),
            )),
        }
    }
}

impl Communicator for Group {
    fn rank(&self) -> usize {
        self.own
    }

    fn members(&self) -> &[usize] {
        &self.name.0
    }

    fn start(&self, call: Call, tensor: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        let members = self.name.0.len();
        match call {
            Call::Broadcast { root } if root >= members => {
                let reason = format!("from member {root}, expected one of {members}");
                return Err(self.refused(call.name(), reason));
            }
            Call::ReduceScatter if tensor.dims().first() != Some(&members) => {
                let reason = format!("found {:?}, expected [{members}, ..]", tensor.dims());
                return Err(self.refused(call.name(), reason));
            }
            _ => {}
        }
        let failed = |error: candle_core::Error| CommError::tensor(self.mesh.rank, call.name(), &error);
        let host = self.host(call.name(), tensor)?;
        let words = match call {
            Call::Barrier => call.name().to_owned(),
            _ => format!("{call:?} of {:?} {:?}", host.dims(), host.dtype()),
        };
        let bytes = match call {
            Call::Barrier => 0,
            _ => host.elem_count() * host.dtype().size_in_bytes(),
        };
        self.mesh.counter.call(call, bytes, members);
        let key = (self.name.clone(), self.calls.fetch_add(1, Ordering::Relaxed));
        // What each member is to get of this rank's tensor.
        let pieces: Vec<Tensor> = match call {
            Call::AllReduce(_) => {
                let flat = host.flatten_all().map_err(failed)?;
                let each = flat.elem_count().div_ceil(members).max(1);
                let padded = flat
                    .pad_with_zeros(0, 0, each * members - flat.elem_count())
                    .map_err(failed)?;
                (0..members)
                    .map(|member| padded.narrow(0, member * each, each)?.force_contiguous())
                    .collect::<candle_core::Result<_>>()
                    .map_err(failed)?
            }
            Call::ReduceScatter => (0..members)
                .map(|member| host.get(member)?.flatten_all()?.force_contiguous())
                .collect::<candle_core::Result<_>>()
                .map_err(failed)?,
            _ => vec![host.clone(); members],
        };
        let message = Message::Post {
            group: self.name.clone(),
            number: key.1,
            words: words.clone(),
        };
        for (member, (&rank, piece)) in self.name.0.iter().zip(&pieces).enumerate() {
            if member != self.own {
                self.mesh
                    .send(rank, &message, std::slice::from_ref(piece))
                    .map_err(|error| self.refused(call.name(), error.to_string()))?;
            }
        }
        let mut state = self.mesh.state();
        let round = state.rounds.entry(key.clone()).or_default();
        (round.call, round.own) = (Some(call), self.own);
        round.shape = host.dims().to_vec();
        round.posts.insert(self.own, (words, pieces[self.own].clone()));
        self.mesh.advance(&mut state, &key);
        drop(state);
        self.mesh.changed.notify_all();
        Ok(Box::new(Started {
            mesh: self.mesh.clone(),
            key,
            call,
            device: tensor.device().clone(),
        }))
    }

    fn send(&self, to: usize, tensor: &Tensor) -> Result<(), CommError> {
        let rank = self.other("send", to)?;
        let host = self.host("send", tensor)?;
        self.mesh
            .counter
            .send(host.elem_count() * host.dtype().size_in_bytes());
        let message = Message::Letter {
            group: self.name.clone(),
        };
        self.mesh
            .send(rank, &message, &[host])
            .map_err(|error| self.refused("send", error.to_string()))
    }

    fn start_receive(&self, from: usize, like: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        let rank = self.other("receive", from)?;
        Ok(Box::new(Receiving {
            mesh: self.mesh.clone(),
            from: rank,
            place: (self.name.clone(), from),
            like: like.detach(),
        }))
    }

    fn group(&self, members: &[usize]) -> Result<Arc<dyn Communicator>, CommError> {
        let all = &self.name.0;
        let Some(own) = members.iter().position(|&member| member == self.own) else {
            return Err(self.refused("group", format!("{members:?}, expected {} among them", self.own)));
        };
        let rises = members.windows(2).all(|pair| pair[0] < pair[1]);
        if !rises || members.iter().any(|&member| member >= all.len()) {
            let reason = format!("{members:?}, expected numbers that rise, below {}", all.len());
            return Err(self.refused("group", reason));
        }
        let numbers: Vec<usize> = members.iter().map(|&member| all[member]).collect();
        let mut state = self.mesh.state();
        let which = state.groups.entry(numbers.clone()).or_insert(0);
        *which += 1;
        let name = (numbers, *which);
        drop(state);
        Ok(Arc::new(Self {
            mesh: self.mesh.clone(),
            own,
            name,
            calls: AtomicU64::new(0),
        }))
    }

    fn fail(&self, reason: &str) {
        self.mesh.tell_all(reason);
    }

    fn traffic(&self) -> Traffic {
        self.mesh.counter.read()
    }
}

/// An operation that waits for its result.
#[derive(Debug)]
struct Started {
    mesh: Arc<Mesh>,
    key: (Name, u64),
    call: Call,
    device: Device,
}

impl Drop for Started {
    fn drop(&mut self) {
        let mut state = self.mesh.state();
        let is_done = state
            .rounds
            .get(&self.key)
            .is_some_and(|round| round.result.is_some());
        if is_done {
            state.rounds.remove(&self.key);
        }
    }
}

impl Pending for Started {
    fn is_done(&self) -> bool {
        let state = self.mesh.state();
        state
            .rounds
            .get(&self.key)
            .is_some_and(|round| round.result.is_some())
    }

    fn wait(self: Box<Self>) -> Result<Vec<Tensor>, CommError> {
        let members = &self.key.0.0;
        let missing = |state: &State| -> Option<Vec<usize>> {
            let round = state.rounds.get(&self.key)?;
            if round.result.is_some() {
                return None;
            }
            let all_posted = round.posts.len() == members.len();
            let here = |member: usize| match all_posted {
                true => round.sums.contains_key(&member),
                false => round.posts.contains_key(&member),
            };
            Some(
                (0..members.len())
                    .filter(|&m| !here(m))
                    .map(|m| members[m])
                    .collect(),
            )
        };
        let mut state = self.mesh.wait_while(&describe(self.call, &self.key), missing)?;
        let result = state.rounds.remove(&self.key).and_then(|round| round.result);
        drop(state);
        let tensors = result.unwrap_or_else(|| {
            Err(CommError::Refused {
                rank: self.mesh.rank,
                operation: describe(self.call, &self.key),
                reason: "waited for twice".to_owned(),
            })
        })?;
        let moved = tensors.into_iter().map(|tensor| match self.device.is_cpu() {
            true => tensor.copy(),
            false => tensor.to_device(&self.device),
        });
        moved
            .collect::<candle_core::Result<_>>()
            .map_err(|error| CommError::tensor(self.mesh.rank, self.call.name(), &error))
    }
}

impl Mesh {
    /// Waits until nobody is `missing` any more.
    fn wait_while(
        &self,
        operation: &str,
        missing: impl Fn(&State) -> Option<Vec<usize>>,
    ) -> Result<MutexGuard<'_, State>, CommError> {
        let deadline = Instant::now() + self.timeout;
        let mut state = self.state();
        while let Some(missing) = missing(&state) {
            let ended = missing
                .iter()
                .find_map(|rank| Some((*rank, state.ended.get(rank)?.clone())));
            if let Some((gone, reason)) = ended {
                return Err(CommError::Gone {
                    rank: self.rank,
                    operation: operation.to_owned(),
                    gone,
                    reason,
                });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CommError::Missing {
                    rank: self.rank,
                    operation: operation.to_owned(),
                    missing,
                    waited: self.timeout,
                });
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(state)
    }
}

/// A message that is waited for.
#[derive(Debug)]
struct Receiving {
    mesh: Arc<Mesh>,
    from: usize,
    place: (Name, usize),
    like: Tensor,
}

impl Pending for Receiving {
    fn is_done(&self) -> bool {
        self.mesh
            .state()
            .mail
            .get(&self.place)
            .is_some_and(|mail| !mail.is_empty())
    }

    fn wait(self: Box<Self>) -> Result<Vec<Tensor>, CommError> {
        let operation = format!("receive from rank {}", self.from);
        let empty = |state: &State| {
            let is_there = state.mail.get(&self.place).is_some_and(|mail| !mail.is_empty());
            (!is_there).then(|| vec![self.from])
        };
        let mut state = self.mesh.wait_while(&operation, empty)?;
        let found = state.mail.get_mut(&self.place).and_then(VecDeque::pop_front);
        drop(state);
        let Some(tensor) = found else {
            return Ok(Vec::new());
        };
        let words = |tensor: &Tensor| format!("{:?} {:?}", tensor.dims(), tensor.dtype());
        if tensor.dims() != self.like.dims() || tensor.dtype() != self.like.dtype() {
            return Err(CommError::Mismatch {
                operation,
                one: self.from,
                first: format!("send of {}", words(&tensor)),
                other: self.mesh.rank,
                second: format!("receive of {}", words(&self.like)),
            });
        }
        let moved = tensor.to_device(self.like.device());
        let moved = moved.map_err(|error| CommError::tensor(self.mesh.rank, &operation, &error))?;
        Ok(vec![moved])
    }
}

#[cfg(test)]
mod tests;
