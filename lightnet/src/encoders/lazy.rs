//! Parts of a model that are loaded when they are first asked for, and shared from then on.

use std::sync::{Arc, Mutex, PoisonError};

/// A part that may be there already.
#[derive(Debug)]
pub(super) struct Lazy<T>(Mutex<Option<Arc<T>>>);

impl<T> Lazy<T> {
    /// A part that is not there yet.
    pub(super) const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// The part; who asks first loads it, and others wait for it. A part that could not be loaded is tried again.
    ///
    /// # Errors
    /// Those of `load`.
    pub(super) fn get<E>(&self, load: impl FnOnce() -> Result<T, E>) -> Result<Arc<T>, E> {
        let mut part = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(part) = &*part {
            return Ok(Arc::clone(part));
        }
        Ok(Arc::clone(part.insert(Arc::new(load()?))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_loaded_once() {
        let part = Lazy::new();
        assert_eq!(part.get(|| Err::<i32, _>("no")), Err("no"));
        let first = part.get(|| Ok::<_, &str>(3)).unwrap();
        let second = part.get(|| Err("asked again")).unwrap();
        assert!(Arc::ptr_eq(&first, &second) && *second == 3);
    }
}
