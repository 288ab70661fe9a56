//! One operation of a group of threads: what its members brought, and what comes out of it.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use candle_core::Tensor;

use super::super::communicator::{Call, Reduce};

/// What a rank brought to an operation.
#[derive(Clone, Debug)]
pub(super) struct Post {
    pub(super) call: Call,
    pub(super) tensor: Tensor,
}

impl Post {
    fn words(&self) -> String {
        match self.call {
            Call::Barrier => self.call.name().to_owned(),
            call => format!(
                "{}{} of {:?} {:?}",
                call.name(),
                match call {
                    Call::Broadcast { root } => format!(" from member {root}"),
                    Call::AllReduce(Reduce::Max) => " (largest)".to_owned(),
                    _ => String::new(),
                },
                self.tensor.dims(),
                self.tensor.dtype()
            ),
        }
    }
}

/// One operation of a group.
#[derive(Debug)]
pub(super) struct Round {
    posts: Mutex<Posts>,
    /// Of all members, made by the first that asks; reductions only.
    reduced: OnceLock<Result<Tensor, String>>,
}

#[derive(Debug)]
pub(super) struct Posts {
    pub(super) by_member: Vec<Option<Post>>,
    /// When the network has brought the result, once all have posted.
    pub(super) ready: Option<Instant>,
    /// Members that have yet to take the result.
    pub(super) left: usize,
}

impl Round {
    /// One that nobody of so many members has come to.
    pub(super) fn of(members: usize) -> Self {
        Self {
            posts: Mutex::new(Posts {
                by_member: vec![None; members],
                ready: None,
                left: members,
            }),
            reduced: OnceLock::new(),
        }
    }

    pub(super) fn posts(&self) -> MutexGuard<'_, Posts> {
        self.posts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The posts of all members; the first of them that differ, where they do.
    pub(super) fn all(&self) -> Result<Vec<Post>, [(usize, String); 2]> {
        let posts: Vec<Post> = self.posts().by_member.iter().flatten().cloned().collect();
        let first = &posts[0];
        let differs = |post: &Post| {
            let shape = post.call != Call::Barrier
                && (post.tensor.dims() != first.tensor.dims() || post.tensor.dtype() != first.tensor.dtype());
            post.call != first.call || shape
        };
        match posts.iter().position(differs) {
            None => Ok(posts),
            Some(other) => Err([(0, first.words()), (other, posts[other].words())]),
        }
    }

    /// What the member `own` gets out of it, on the host.
    pub(super) fn result(&self, call: Call, posts: &[Post], own: usize) -> Result<Vec<Tensor>, String> {
        let line =
            |error: candle_core::Error| error.to_string().lines().next().unwrap_or_default().to_owned();
        match call {
            Call::Barrier => Ok(Vec::new()),
            Call::AllGather => Ok(posts.iter().map(|post| post.tensor.clone()).collect()),
            Call::Broadcast { root } => Ok(vec![posts[root].tensor.clone()]),
            Call::AllReduce(reduce) => self.reduced(posts, reduce).map(|tensor| vec![tensor]),
            Call::ReduceScatter => {
                let sum = self.reduced(posts, Reduce::Sum)?;
                Ok(vec![
                    sum.get(own)
                        .and_then(|row| row.force_contiguous())
                        .map_err(line)?,
                ])
            }
        }
    }

    /// The reduction in the order of members, made once for all of them.
    fn reduced(&self, posts: &[Post], reduce: Reduce) -> Result<Tensor, String> {
        let make = || {
            let mut sum = posts[0].tensor.clone();
            for post in &posts[1..] {
                sum = match reduce {
                    Reduce::Sum => sum + &post.tensor,
                    Reduce::Max => sum.maximum(&post.tensor),
                }
                .map_err(|error| error.to_string().lines().next().unwrap_or_default().to_owned())?;
            }
            Ok(sum)
        };
        self.reduced.get_or_init(make).clone()
    }
}
