//! How many requests may go out: at the same time, and in a minute.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longest time without a look at the flag that ends the run.
pub(super) const LOOK: Duration = Duration::from_millis(50);

/// Lets requests pass one by one.
#[derive(Debug)]
pub(super) struct Gate {
    most: u32,
    requests: u64,
    tokens: u64,
    /// The time that the limits speak of: a minute.
    window: Duration,
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Debug, Default)]
struct State {
    inside: u32,
    /// Requests of the last minute: when, which, and their tokens.
    recent: VecDeque<(Instant, u64, u64)>,
    next: u64,
    /// Nothing passes before this, on the server's wish.
    hold: Option<Instant>,
}

/// A request that is on its way, until it is dropped.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    gate: &'a Gate,
    number: u64,
}

impl Gate {
    /// At most `most` requests at once, `requests` and `tokens` within `window`; 0 for any number of them.
    pub(super) fn new(most: u32, requests: u32, tokens: u32, window: Duration) -> Self {
        let limit = |number: u32| if number == 0 { u64::MAX } else { u64::from(number) };
        Self {
            most: most.max(1),
            requests: limit(requests),
            tokens: limit(tokens),
            window,
            state: Mutex::new(State::default()),
            left: Condvar::new(),
        }
    }

    /// Waits until a request of so many tokens may go out; none when the run is to end. A request that alone is more than
    /// the limit passes when no other has been out for a while.
    pub(super) fn enter(&self, tokens: u64, stop: &AtomicBool) -> Option<Pass<'_>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if stop.load(Ordering::SeqCst) {
                return None;
            }
            let now = Instant::now();
            while state
                .recent
                .front()
                .is_some_and(|(at, ..)| now.duration_since(*at) >= self.window)
            {
                state.recent.pop_front();
            }
            let wait = self.wait(&state, tokens, now);
            if wait.is_none() && state.inside < self.most {
                let number = state.next;
                state.next += 1;
                state.inside += 1;
                state.recent.push_back((now, number, tokens));
                return Some(Pass { gate: self, number });
            }
            let wait = wait.unwrap_or(LOOK).min(LOOK);
            let (woken, _) = self
                .left
                .wait_timeout(state, wait)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
        }
    }

    /// How long the limits ask to wait; none where they do not.
    fn wait(&self, state: &State, tokens: u64, now: Instant) -> Option<Duration> {
        if let Some(hold) = state.hold.filter(|hold| *hold > now) {
            return Some(hold - now);
        }
        let used: u64 = state.recent.iter().map(|(.., tokens)| tokens).sum();
        let full = state.recent.len() as u64 >= self.requests
            || (used.saturating_add(tokens) > self.tokens && !state.recent.is_empty());
        let oldest = state.recent.front().filter(|_| full)?;
        Some(
            (oldest.0 + self.window)
                .saturating_duration_since(now)
                .max(Duration::from_millis(1)),
        )
    }

    /// Lets nothing pass for a while.
    pub(super) fn hold(&self, pause: Duration) {
        let until = Instant::now() + pause;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.hold = Some(state.hold.map_or(until, |hold| hold.max(until)));
    }
}

impl Pass<'_> {
    /// Corrects the number of tokens, which is guessed before the answer is there.
    pub(super) fn settle(&self, tokens: u64) {
        let mut state = self.gate.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = state
            .recent
            .iter_mut()
            .find(|(_, number, _)| *number == self.number)
        {
            entry.2 = tokens;
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.inside -= 1;
        drop(state);
        self.gate.left.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    const WINDOW: Duration = Duration::from_millis(400);

    #[test]
    fn no_more_than_so_many_are_inside_at_once() {
        let gate = Gate::new(3, 0, 0, WINDOW);
        let (inside, most) = (AtomicU32::new(0), AtomicU32::new(0));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..12 {
                scope.spawn(|| {
                    let pass = gate.enter(1, &stop).unwrap();
                    most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_millis(10));
                    inside.fetch_sub(1, Ordering::SeqCst);
                    drop(pass);
                });
            }
        });
        assert_eq!(most.into_inner(), 3);
    }

    #[test]
    fn a_minute_holds_so_many_requests_and_tokens() {
        let stop = AtomicBool::new(false);
        let times = |gate: &Gate, tokens: u64, count: usize| -> Vec<Duration> {
            let began = Instant::now();
            (0..count)
                .map(|_| {
                    drop(gate.enter(tokens, &stop).unwrap());
                    began.elapsed()
                })
                .collect()
        };
        let by_requests = times(&Gate::new(8, 2, 0, WINDOW), 1, 4);
        assert!(
            by_requests[1] < WINDOW / 2 && by_requests[2] >= WINDOW * 9 / 10,
            "{by_requests:?}"
        );
        let by_tokens = times(&Gate::new(8, 0, 100, WINDOW), 50, 3);
        assert!(
            by_tokens[1] < WINDOW / 2 && by_tokens[2] >= WINDOW * 9 / 10,
            "{by_tokens:?}"
        );
        // More than the limit at once still passes, alone.
        let large = times(&Gate::new(8, 0, 100, WINDOW), 500, 2);
        assert!(large[0] < WINDOW / 2 && large[1] >= WINDOW * 9 / 10, "{large:?}");
        let gate = Gate::new(8, 0, 100, WINDOW);
        gate.enter(90, &stop).unwrap().settle(10);
        assert!(times(&gate, 90, 1)[0] < WINDOW / 2);
    }

    #[test]
    fn waiting_ends_with_the_run() {
        let gate = Gate::new(1, 0, 0, WINDOW);
        let stop = AtomicBool::new(false);
        gate.hold(Duration::from_secs(3600));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| gate.enter(1, &stop).is_none());
            std::thread::sleep(Duration::from_millis(20));
            stop.store(true, Ordering::SeqCst);
            assert!(waiting.join().unwrap());
        });
    }
}
