//! Ranks as threads of one process, which meet in memory: for tests, and for one machine. A [`Network`] may delay them.
//!
//! Tensors lie on the host in between: threads on GPUs have streams of their own.

mod round;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};

use super::communicator::{Call, Communicator, Counter, Pending, Traffic};
use super::error::CommError;
use super::network::Network;
use round::{Post, Round};

/// How ranks wait, and what is between them.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How long a rank waits for others.
    pub timeout: Duration,
    /// What delays them; nothing by default.
    pub network: Option<Network>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(60),
            network: None,
        }
    }
}

/// The ranks of a world of `size`, one for each thread, in order.
pub fn world(size: usize, settings: Settings) -> Vec<Arc<dyn Communicator>> {
    let world = Arc::new(World {
        settings,
        state: Mutex::new(State {
            ended: vec![None; size],
            failed: None,
            rounds: HashMap::new(),
            mail: HashMap::new(),
        }),
        changed: Condvar::new(),
    });
    let members: Arc<[usize]> = (0..size).collect();
    (0..size)
        .map(|number| {
            let rank = Arc::new(Rank {
                world: world.clone(),
                number,
                counter: Counter::default(),
                groups: Mutex::new(HashMap::new()),
            });
            Arc::new(Group::new(rank, number, members.clone(), 0)) as Arc<dyn Communicator>
        })
        .collect()
}

/// Where ranks meet.
#[derive(Debug)]
struct World {
    settings: Settings,
    state: Mutex<State>,
    changed: Condvar,
}

/// A group: its members, and which of the groups of these members it is.
type GroupName = (Arc<[usize]>, u64);

#[derive(Debug)]
struct State {
    /// Why ranks have ended, by rank.
    ended: Vec<Option<String>>,
    /// The first rank that said so itself.
    failed: Option<usize>,
    /// Operations that not all members have taken the result of, by group and number.
    rounds: HashMap<(GroupName, u64), Arc<Round>>,
    /// Messages by group, sender and receiver, as numbers in the group.
    mail: HashMap<(GroupName, usize, usize), VecDeque<Letter>>,
}

#[derive(Debug)]
struct Letter {
    tensor: Tensor,
    arrives: Instant,
}

impl World {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, rank: usize, reason: &str) {
        let mut state = self.state();
        if state.ended[rank].is_none() {
            state.ended[rank] = Some(reason.to_owned());
        }
        drop(state);
        self.changed.notify_all();
    }
}

/// One rank, shared by its groups and by what they have under way.
#[derive(Debug)]
struct Rank {
    world: Arc<World>,
    number: usize,
    counter: Counter,
    /// How many groups it has made of the same members.
    groups: Mutex<HashMap<Arc<[usize]>, u64>>,
}

impl Drop for Rank {
    fn drop(&mut self) {
        self.world.end(self.number, "it left without a word");
    }
}

/// A group from the side of one rank.
#[derive(Debug)]
struct Group {
    rank: Arc<Rank>,
    /// Number in the group.
    own: usize,
    name: GroupName,
    /// Operations so far.
    calls: AtomicU64,
}

impl Group {
    fn new(rank: Arc<Rank>, own: usize, members: Arc<[usize]>, which: u64) -> Self {
        Self {
            rank,
            own,
            name: (members, which),
            calls: AtomicU64::new(0),
        }
    }

    fn refused(&self, operation: &str, reason: impl Into<String>) -> CommError {
        CommError::Refused {
            rank: self.rank.number,
            operation: operation.to_owned(),
            reason: reason.into(),
        }
    }

    /// A copy on the host that nobody else writes to.
    fn private(&self, operation: &str, tensor: &Tensor) -> Result<Tensor, CommError> {
        let copied = tensor.detach().to_device(&Device::Cpu).and_then(|host| {
            if tensor.device().is_cpu() {
                host.force_contiguous()
            } else {
                host.contiguous()
            }
        });
        copied.map_err(|error| CommError::tensor(self.rank.number, operation, &error))
    }

    fn other(&self, operation: &str, member: usize) -> Result<(), CommError> {
        let members = self.name.0.len();
        if member >= members || member == self.own {
            return Err(self.refused(
                operation,
                format!("member {member}, expected another one of {members}"),
            ));
        }
        Ok(())
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
        let post = Post {
            call,
            tensor: self.private(call.name(), tensor)?,
        };
        let bytes = match call {
            Call::Barrier => 0,
            _ => bytes_of(&post.tensor),
        };
        self.rank.counter.call(call, bytes, members);
        let world = &self.rank.world;
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        let key = (self.name.clone(), number);
        let mut state = world.state();
        let round = state.rounds.entry(key.clone());
        let round = round.or_insert_with(|| Arc::new(Round::of(members))).clone();
        {
            let mut posts = round.posts();
            posts.by_member[self.own] = Some(post);
            if posts.by_member.iter().all(Option::is_some) {
                let delay = world
                    .settings
                    .network
                    .map(|network| network.time(call, bytes, members));
                posts.ready = Some(Instant::now() + delay.unwrap_or_default());
            }
        }
        drop(state);
        world.changed.notify_all();
        Ok(Box::new(Started {
            rank: self.rank.clone(),
            own: self.own,
            key,
            round,
            call,
            device: tensor.device().clone(),
            taken: false,
        }))
    }

    fn send(&self, to: usize, tensor: &Tensor) -> Result<(), CommError> {
        self.other("send", to)?;
        let tensor = self.private("send", tensor)?;
        let bytes = bytes_of(&tensor);
        self.rank.counter.send(bytes);
        let world = &self.rank.world;
        let delay = world.settings.network.map(|network| network.send_time(bytes));
        let mut state = world.state();
        let gone = self.name.0[to];
        if let Some(reason) = &state.ended[gone] {
            return Err(CommError::Gone {
                rank: self.rank.number,
                operation: format!("send to rank {gone}"),
                gone,
                reason: reason.clone(),
            });
        }
        let letter = Letter {
            tensor,
            arrives: Instant::now() + delay.unwrap_or_default(),
        };
        let box_of = (self.name.clone(), self.own, to);
        state.mail.entry(box_of).or_default().push_back(letter);
        drop(state);
        world.changed.notify_all();
        Ok(())
    }

    fn start_receive(&self, from: usize, like: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        self.other("receive", from)?;
        Ok(Box::new(Receiving {
            rank: self.rank.clone(),
            from: self.name.0[from],
            place: (self.name.clone(), from, self.own),
            like: like.detach(),
        }))
    }

    fn group(&self, members: &[usize]) -> Result<Arc<dyn Communicator>, CommError> {
        let all = &self.name.0;
        let rises = members.windows(2).all(|pair| pair[0] < pair[1]);
        let Some(own) = members.iter().position(|&member| member == self.own) else {
            return Err(self.refused("group", format!("{members:?}, expected {} among them", self.own)));
        };
        if !rises || members.iter().any(|&member| member >= all.len()) {
            let reason = format!("{members:?}, expected numbers that rise, below {}", all.len());
            return Err(self.refused("group", reason));
        }
        let numbers: Arc<[usize]> = members.iter().map(|&member| all[member]).collect();
        let mut groups = self.rank.groups.lock().unwrap_or_else(PoisonError::into_inner);
        // The world itself is the first group of all ranks.
        let which = groups.entry(numbers.clone()).or_insert(0);
        *which += 1;
        Ok(Arc::new(Self::new(self.rank.clone(), own, numbers, *which)))
    }

    fn fail(&self, reason: &str) {
        let (world, number) = (&self.rank.world, self.rank.number);
        world.state().failed.get_or_insert(number);
        world.end(number, reason);
    }

    fn first_to_fail(&self) -> Option<usize> {
        self.rank.world.state().failed
    }

    fn traffic(&self) -> Traffic {
        self.rank.counter.read()
    }
}

/// An operation that waits for its result.
#[derive(Debug)]
struct Started {
    rank: Arc<Rank>,
    own: usize,
    key: (GroupName, u64),
    round: Arc<Round>,
    call: Call,
    device: Device,
    taken: bool,
}

impl Started {
    fn operation(&self) -> String {
        let ((members, _), number) = &self.key;
        format!("{} number {number} of ranks {}", self.call.name(), span(members))
    }

    /// Waits until all have posted, and says when the network has brought the result.
    fn complete(&self) -> Result<Instant, CommError> {
        let world = &self.rank.world;
        let deadline = Instant::now() + world.settings.timeout;
        let mut state = world.state();
        loop {
            let missing: Vec<usize> = {
                let posts = self.round.posts();
                if let Some(ready) = posts.ready {
                    return Ok(ready);
                }
                let numbers = self.key.0.0.iter().zip(&posts.by_member);
                numbers
                    .filter(|(_, post)| post.is_none())
                    .map(|(&number, _)| number)
                    .collect()
            };
            let ended = missing
                .iter()
                .find_map(|&number| Some((number, state.ended[number].clone()?)));
            if let Some((gone, reason)) = ended {
                return Err(CommError::Gone {
                    rank: self.rank.number,
                    operation: self.operation(),
                    gone,
                    reason,
                });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CommError::Missing {
                    rank: self.rank.number,
                    operation: self.operation(),
                    missing,
                    waited: world.settings.timeout,
                });
            }
            state = world
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// The last member that needs it no more clears it away.
    fn take(&mut self) {
        if self.taken {
            return;
        }
        self.taken = true;
        let mut state = self.rank.world.state();
        let left = {
            let mut posts = self.round.posts();
            posts.left -= 1;
            posts.left
        };
        if left == 0 {
            state.rounds.remove(&self.key);
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        self.take();
    }
}

impl Pending for Started {
    fn is_done(&self) -> bool {
        self.round
            .posts()
            .ready
            .is_some_and(|ready| ready <= Instant::now())
    }

    fn wait(mut self: Box<Self>) -> Result<Vec<Tensor>, CommError> {
        let ready = self.complete()?;
        let members = &self.key.0.0;
        let posts = self
            .round
            .all()
            .map_err(|[(one, first), (other, second)]| CommError::Mismatch {
                operation: self.operation(),
                one: members[one],
                first,
                other: members[other],
                second,
            })?;
        let found = self.round.result(self.call, &posts, self.own);
        std::thread::sleep(ready.saturating_duration_since(Instant::now()));
        let operation = self.operation();
        let failed = |reason: String| CommError::Tensor {
            rank: self.rank.number,
            operation: operation.clone(),
            reason,
        };
        let found = found.map_err(failed)?;
        let beside = found.iter().map(|tensor| {
            let moved = match self.device.is_cpu() {
                // Members share what the host holds, and may write to what they are given.
                true => tensor.copy(),
                false => tensor.to_device(&self.device),
            };
            moved.map_err(|error| CommError::tensor(self.rank.number, &operation, &error))
        });
        let beside = beside.collect();
        self.take();
        beside
    }
}

/// A message that is waited for.
#[derive(Debug)]
struct Receiving {
    rank: Arc<Rank>,
    from: usize,
    place: (GroupName, usize, usize),
    like: Tensor,
}

impl Pending for Receiving {
    fn is_done(&self) -> bool {
        let state = self.rank.world.state();
        let first = state.mail.get(&self.place).and_then(VecDeque::front);
        first.is_some_and(|letter| letter.arrives <= Instant::now())
    }

    fn wait(self: Box<Self>) -> Result<Vec<Tensor>, CommError> {
        let world = &self.rank.world;
        let operation = || format!("receive from rank {}", self.from);
        let deadline = Instant::now() + world.settings.timeout;
        let mut state = world.state();
        let letter = loop {
            if let Some(letter) = state.mail.get_mut(&self.place).and_then(VecDeque::pop_front) {
                break letter;
            }
            if let Some(reason) = &state.ended[self.from] {
                return Err(CommError::Gone {
                    rank: self.rank.number,
                    operation: operation(),
                    gone: self.from,
                    reason: reason.clone(),
                });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CommError::Missing {
                    rank: self.rank.number,
                    operation: operation(),
                    missing: vec![self.from],
                    waited: world.settings.timeout,
                });
            }
            state = world
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        };
        drop(state);
        std::thread::sleep(letter.arrives.saturating_duration_since(Instant::now()));
        let words = |tensor: &Tensor| format!("{:?} {:?}", tensor.dims(), tensor.dtype());
        if letter.tensor.dims() != self.like.dims() || letter.tensor.dtype() != self.like.dtype() {
            return Err(CommError::Mismatch {
                operation: operation(),
                one: self.from,
                first: format!("send of {}", words(&letter.tensor)),
                other: self.rank.number,
                second: format!("receive of {}", words(&self.like)),
            });
        }
        let moved = letter.tensor.to_device(self.like.device());
        let moved = moved.map_err(|error| CommError::tensor(self.rank.number, &operation(), &error))?;
        Ok(vec![moved])
    }
}

fn bytes_of(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}

/// Ranks that follow one another as their ends, others as a list.
pub(super) fn span(ranks: &[usize]) -> String {
    match *ranks {
        [first, .., last] if last - first + 1 == ranks.len() => format!("{first} to {last}"),
        _ => ranks
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(", "),
    }
}

#[cfg(test)]
pub(super) mod tests;
