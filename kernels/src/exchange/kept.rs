//! An exchange for work that is done twice: what it brought the first time is there the second time.

use super::{AdditiveState, Coming, StateExchange};
use candle_core::{Result, Tensor, bail};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Keeps what an exchange brings while work is done for the first time, and hands it out when the same work is done again, as in
/// the backward pass of layers that are recomputed; what comes after that is exchanged as ever.
///
/// States have a fixed size: to keep them is cheap, and to exchange them twice would double what is on the wire.
#[derive(Debug)]
pub struct Kept {
    exchange: Arc<dyn StateExchange>,
    log: Mutex<Log>,
}

#[derive(Debug, Default)]
struct Log {
    runs: usize,
    brought: VecDeque<Vec<Tensor>>,
}

impl Kept {
    /// In front of `exchange`.
    pub fn new(exchange: Arc<dyn StateExchange>) -> Self {
        Self {
            exchange,
            log: Mutex::new(Log::default()),
        }
    }

    /// Has to be called where the work begins, each time.
    pub fn begin(&self) {
        self.log().runs += 1;
    }

    fn log(&self) -> std::sync::MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn once(&self, bring: impl FnOnce() -> Result<Vec<Tensor>>) -> Result<Vec<Tensor>> {
        let (again, kept) = self.again();
        if let Some(kept) = kept {
            return Ok(kept);
        }
        let brought = bring()?;
        if !again {
            self.log().brought.push_back(brought.clone());
        }
        Ok(brought)
    }

    /// What was brought the first time, if this is the second, and whether it is.
    fn again(&self) -> (bool, Option<Vec<Tensor>>) {
        let mut log = self.log();
        let again = log.runs > 1;
        (again, if again { log.brought.pop_front() } else { None })
    }

    fn start<'a>(&'a self, start: impl FnOnce() -> Result<Coming<'a>>) -> Result<Coming<'a>> {
        let (again, kept) = self.again();
        if let Some(state) = kept.and_then(|mut kept| kept.pop()) {
            return Ok(Coming::here(state));
        }
        let coming = start()?;
        Ok(Coming::later(move || {
            let state = coming.wait()?;
            if !again {
                self.log().brought.push_back(vec![state.clone()]);
            }
            Ok(state)
        }))
    }

    fn one(&self, bring: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        match self.once(|| Ok(vec![bring()?]))?.pop() {
            Some(tensor) => Ok(tensor),
            None => bail!("an exchange brought nothing"),
        }
    }
}

impl StateExchange for Kept {
    fn parts(&self) -> usize {
        self.exchange.parts()
    }

    fn part(&self) -> usize {
        self.exchange.part()
    }

    fn position_offset(&self) -> usize {
        self.exchange.position_offset()
    }

    fn prefix(&self, state: &Tensor, log_decay: &Tensor) -> Result<Tensor> {
        self.one(|| self.exchange.prefix(state, log_decay))
    }

    fn suffix(&self, state: &Tensor, log_decay: &Tensor) -> Result<Tensor> {
        self.one(|| self.exchange.suffix(state, log_decay))
    }

    fn start_prefix(&self, state: &Tensor, log_decay: &Tensor) -> Result<Coming<'_>> {
        self.start(|| self.exchange.start_prefix(state, log_decay))
    }

    fn start_suffix(&self, state: &Tensor, log_decay: &Tensor) -> Result<Coming<'_>> {
        self.start(|| self.exchange.start_suffix(state, log_decay))
    }

    fn reduce(&self, part: AdditiveState) -> Result<AdditiveState> {
        let brought = self.once(|| {
            let AdditiveState { max, den, num } = self.exchange.reduce(part)?;
            Ok(vec![max, den, num])
        })?;
        match <[Tensor; 3]>::try_from(brought) {
            Ok([max, den, num]) => Ok(AdditiveState { max, den, num }),
            Err(_) => bail!("work that is done again exchanges something else"),
        }
    }

    fn sum(&self, tensor: &Tensor) -> Result<Tensor> {
        self.one(|| self.exchange.sum(tensor))
    }

    fn gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>> {
        self.once(|| self.exchange.gather(tensor))
    }

    fn scatter_sum(&self, rows: &Tensor) -> Result<Tensor> {
        self.one(|| self.exchange.scatter_sum(rows))
    }
}
