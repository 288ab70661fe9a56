//! The batches of a step side by side, on the CPU.
//!
//! Operators of a small model are over so soon that to share one out among threads takes about as long as to work it off. The batches of
//! a step (`train.accumulate`) have nothing to do with each other until their gradients are added. So each thread takes whole ones and
//! does all of their operators itself; gradients are added in the order of the batches, and all bits are those of one after the other.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Pools of one thread each; none where batches go one after the other.
pub(super) struct Lanes(Vec<ThreadPool>);

impl Lanes {
    /// For steps of so many batches, as many as there are threads.
    ///
    /// # Errors
    /// The system gives no threads.
    pub(super) fn new(batches: u64) -> std::io::Result<Self> {
        let most = rayon::current_num_threads();
        let count = usize::try_from(batches).map_or(most, |batches| batches.min(most));
        if count < 2 {
            return Ok(Self::single());
        }
        let pool = |_| ThreadPoolBuilder::new().num_threads(1).build();
        let pools = (0..count).map(pool).collect::<Result<_, _>>();
        pools.map(Self).map_err(std::io::Error::other)
    }

    /// One after the other.
    pub(super) fn single() -> Self {
        Self(Vec::new())
    }

    /// How many batches are worked on at once.
    pub(super) fn width(&self) -> usize {
        self.0.len().max(1)
    }

    /// The results of `work` on `items`, in their order.
    pub(super) fn each<I: Sync, T: Send>(&self, items: &[I], work: impl Fn(&I) -> T + Sync) -> Vec<T> {
        if self.0.is_empty() || items.len() < 2 {
            return items.iter().map(work).collect();
        }
        let next = AtomicUsize::new(0);
        let lane = || {
            let mut done = Vec::new();
            loop {
                let place = next.fetch_add(1, Ordering::Relaxed);
                let Some(item) = items.get(place) else {
                    return done;
                };
                done.push((place, work(item)));
            }
        };
        let mut all = thread::scope(|scope| {
            let lanes: Vec<_> = self
                .0
                .iter()
                .map(|pool| scope.spawn(|| pool.install(lane)))
                .collect();
            let done = lanes
                .into_iter()
                .map(|lane| lane.join().unwrap_or_else(|panic| resume_unwind(panic)));
            done.flatten().collect::<Vec<_>>()
        });
        all.sort_by_key(|(place, _)| *place);
        all.into_iter().map(|(_, result)| result).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_the_order_of_what_they_are_of() {
        let pool = ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let lanes = pool.install(|| Lanes::new(8)).unwrap();
        assert_eq!((lanes.width(), Lanes::single().width()), (3, 1));
        let items: Vec<u64> = (0..50).collect();
        let work = |&item: &u64| {
            assert_eq!(rayon::current_num_threads(), 1);
            thread::sleep(std::time::Duration::from_micros(item * 37 % 400));
            item * item
        };
        let expected: Vec<u64> = items.iter().map(|item| item * item).collect();
        assert_eq!(lanes.each(&items, work), expected);
        assert!(lanes.each(&items[..0], work).is_empty());
        let fails = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            lanes.each(&items, |&item| assert_ne!(item, 7));
        }));
        assert!(fails.is_err());
    }
}
