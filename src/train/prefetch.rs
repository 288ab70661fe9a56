//! Batches prepared ahead by several threads and handed out in order.
//!
//! A batch is a pure function of its number, so that neither the number of threads nor their speed changes the run.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;

use super::error::TaskResult;

/// Hands out the results of a function of 0, 1, 2, ... that threads compute ahead.
pub struct Prefetch<T> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    queue: Mutex<Queue<T>>,
    changed: Condvar,
    depth: u64,
}

struct Queue<T> {
    /// Number of the next result that the consumer takes.
    wanted: u64,
    /// Number of the next result that no thread has begun.
    unclaimed: u64,
    ready: BTreeMap<u64, TaskResult<T>>,
    stopped: bool,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Queue<T>> {
        // Nothing panics while the lock is held, and every change leaves the queue whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, Queue<T>>) -> MutexGuard<'a, Queue<T>> {
        self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner)
    }

    /// The next number to compute; none when the consumer is gone.
    fn claim(&self) -> Option<u64> {
        let mut queue = self.lock();
        loop {
            if queue.stopped {
                return None;
            }
            if queue.unclaimed < queue.wanted + self.depth {
                queue.unclaimed += 1;
                return Some(queue.unclaimed - 1);
            }
            queue = self.wait(queue);
        }
    }
}

impl<T: Send> Prefetch<T> {
    /// Starts `threads` threads that compute `make(first)`, `make(first + 1)`, ...; at most `threads + 2` results are
    /// begun ahead of the one that is handed out next.
    pub fn start<'scope, 'env>(
        scope: &'scope Scope<'scope, 'env>,
        threads: usize,
        first: u64,
        make: impl Fn(u64) -> TaskResult<T> + Clone + Send + 'scope,
    ) -> Self
    where
        T: 'scope,
    {
        let threads = threads.max(1);
        let queue = Queue {
            wanted: first,
            unclaimed: first,
            ready: BTreeMap::new(),
            stopped: false,
        };
        let shared = Arc::new(Shared {
            queue: Mutex::new(queue),
            changed: Condvar::new(),
            depth: threads as u64 + 2,
        });
        for _ in 0..threads {
            let (shared, make) = (Arc::clone(&shared), make.clone());
            scope.spawn(move || {
                while let Some(number) = shared.claim() {
                    let result = catch_unwind(AssertUnwindSafe(|| make(number)))
                        .unwrap_or_else(|_| Err(format!("batch {number}: preparing it panicked").into()));
                    shared.lock().ready.insert(number, result);
                    shared.changed.notify_all();
                }
            });
        }
        Self { shared }
    }

    /// The next result; waits for it.
    ///
    /// # Errors
    /// What `make` answered, or that it panicked.
    pub fn receive(&mut self) -> TaskResult<T> {
        let mut queue = self.shared.lock();
        loop {
            let wanted = queue.wanted;
            if let Some(result) = queue.ready.remove(&wanted) {
                queue.wanted += 1;
                self.shared.changed.notify_all();
                return result;
            }
            queue = self.shared.wait(queue);
        }
    }
}

impl<T> Drop for Prefetch<T> {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    #[test]
    fn order_is_kept_and_little_is_done_ahead() {
        for threads in [1, 3, 8] {
            let highest = AtomicU64::new(0);
            std::thread::scope(|scope| {
                let highest = &highest;
                let mut batches = Prefetch::start(scope, threads, 7, move |number| {
                    highest.fetch_max(number, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_micros(number * 7919 % 500));
                    Ok(number * number)
                });
                for number in 7..200 {
                    assert_eq!(batches.receive().unwrap(), number * number);
                    assert!(highest.load(Ordering::SeqCst) <= number + 1 + threads as u64 + 2);
                }
            });
        }
    }

    #[test]
    fn errors_and_panics_arrive_in_their_place() {
        std::thread::scope(|scope| {
            let mut batches = Prefetch::start(scope, 2, 0, |number| match number {
                3 => Err("no such file".into()),
                4 => panic!("broken"),
                _ => Ok(number),
            });
            let results: Vec<_> = (0..6)
                .map(|_| batches.receive().map_err(|e| e.to_string()))
                .collect();
            assert_eq!(results[..3], [Ok(0), Ok(1), Ok(2)]);
            assert_eq!(results[3], Err("no such file".to_string()));
            assert_eq!(results[4], Err("batch 4: preparing it panicked".to_string()));
            assert_eq!(results[5], Ok(5));
        });
    }
}
