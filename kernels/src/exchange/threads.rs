//! Parts as threads that meet in memory: for tests of operators, without a network.

use super::{AdditiveState, StateExchange};
use candle_core::{Result, Tensor, bail};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// Parts as threads of one process: one exchange for each part, `tokens` long, in order.
///
/// Serves tests and small machines. A part that waits longer than a minute for the others gets an error that
/// names the missing ones.
pub fn threads(tokens: &[usize]) -> Vec<Arc<dyn StateExchange>> {
    threads_that_wait(tokens, PATIENCE)
}

pub(super) fn threads_that_wait(tokens: &[usize], patience: Duration) -> Vec<Arc<dyn StateExchange>> {
    let meeting = Arc::new(Meeting {
        round: Mutex::new(Round {
            number: 0,
            posted: vec![None; tokens.len()],
            last: Arc::new(Vec::new()),
        }),
        complete: Condvar::new(),
        patience,
    });
    (0..tokens.len())
        .map(|part| {
            Arc::new(Threads {
                part,
                offset: tokens[..part].iter().sum(),
                parts: tokens.len(),
                meeting: meeting.clone(),
            }) as Arc<dyn StateExchange>
        })
        .collect()
}

const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Threads {
    part: usize,
    parts: usize,
    offset: usize,
    meeting: Arc<Meeting>,
}

#[derive(Debug)]
struct Meeting {
    round: Mutex<Round>,
    complete: Condvar,
    patience: Duration,
}

#[derive(Debug)]
struct Round {
    number: u64,
    posted: Vec<Option<Vec<Tensor>>>,
    last: Arc<Vec<Vec<Tensor>>>,
}

impl Threads {
    /// What every part posted, in the order of parts.
    fn meet(&self, tensors: Vec<Tensor>) -> Result<Arc<Vec<Vec<Tensor>>>> {
        let Ok(mut round) = self.meeting.round.lock() else {
            bail!("part {}: another part panicked during an exchange", self.part);
        };
        round.posted[self.part] = Some(tensors);
        if round.posted.iter().all(Option::is_some) {
            round.last = Arc::new(round.posted.iter_mut().filter_map(Option::take).collect());
            round.number += 1;
            self.meeting.complete.notify_all();
            return Ok(round.last.clone());
        }
        let number = round.number;
        let waited = self
            .meeting
            .complete
            .wait_timeout_while(round, self.meeting.patience, |r| r.number == number);
        let Ok((round, timeout)) = waited else {
            bail!("part {}: another part panicked during an exchange", self.part);
        };
        if timeout.timed_out() {
            let missing: Vec<usize> = (0..self.parts).filter(|&p| round.posted[p].is_none()).collect();
            bail!(
                "part {}: waited {:?} for parts {missing:?}",
                self.part,
                self.meeting.patience
            );
        }
        Ok(round.last.clone())
    }

    /// Decayed sum of the states of `parts`, the farthest first.
    fn chain(
        &self,
        state: &Tensor,
        log_decay: &Tensor,
        order: impl Fn(usize) -> Vec<usize>,
    ) -> Result<Tensor> {
        let all = self.meet(vec![state.clone(), log_decay.clone()])?;
        let mut sum = state.zeros_like()?;
        for part in order(self.parts) {
            sum = (sum.broadcast_mul(&all[part][1].exp()?)? + &all[part][0])?;
        }
        Ok(sum)
    }
}

impl StateExchange for Threads {
    fn parts(&self) -> usize {
        self.parts
    }

    fn part(&self) -> usize {
        self.part
    }

    fn position_offset(&self) -> usize {
        self.offset
    }

    fn prefix(&self, state: &Tensor, log_decay: &Tensor) -> Result<Tensor> {
        self.chain(state, log_decay, |_| (0..self.part).collect())
    }

    fn suffix(&self, state: &Tensor, log_decay: &Tensor) -> Result<Tensor> {
        self.chain(state, log_decay, |parts| (self.part + 1..parts).rev().collect())
    }

    fn reduce(&self, part: AdditiveState) -> Result<AdditiveState> {
        let all = self.meet(vec![part.max, part.den, part.num])?;
        let parts: Vec<AdditiveState> = all
            .iter()
            .map(|tensors| AdditiveState {
                max: tensors[0].clone(),
                den: tensors[1].clone(),
                num: tensors[2].clone(),
            })
            .collect();
        AdditiveState::merge(&parts)
    }

    fn sum(&self, tensor: &Tensor) -> Result<Tensor> {
        let all = self.meet(vec![tensor.clone()])?;
        let mut sum = all[0][0].clone();
        for part in &all[1..] {
            sum = (sum + &part[0])?;
        }
        Ok(sum)
    }

    fn gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>> {
        let all = self.meet(vec![tensor.clone()])?;
        Ok(all.iter().map(|tensors| tensors[0].clone()).collect())
    }

    fn scatter_sum(&self, rows: &Tensor) -> Result<Tensor> {
        self.sum(rows)?.get(self.part)
    }
}
