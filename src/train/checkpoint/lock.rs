//! One run at a time in a folder: an advisory lock, which the system lets go when the process ends, however it ends.

use std::fs::{File, OpenOptions};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::super::error::TrainError;

/// The file stays when the run is over: removing it would let two runs lock two files of one name.
const FILE: &str = "lock";

/// The right to run in a folder, until it is dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    /// Locks the run folder `folder`, which exists.
    ///
    /// # Errors
    /// Another run is at work in it, it is not writable, or its file system knows no locks.
    pub(crate) fn take(folder: &Path) -> Result<Self, TrainError> {
        let path = folder.join(FILE);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(TrainError::io(&path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _file: file }),
            Err(Errno::WOULDBLOCK) => Err(TrainError::Run {
                path: folder.to_path_buf(),
                reason: "another run is at work in this folder".to_string(),
            }),
            Err(error) => Err(TrainError::io(&path)(error.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_one_is_refused_until_the_first_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let first = Lock::take(folder.path()).unwrap();
        let message = Lock::take(folder.path()).unwrap_err().to_string();
        assert_eq!(
            message,
            format!(
                "{}: another run is at work in this folder",
                folder.path().display()
            )
        );
        drop(first);
        Lock::take(folder.path()).unwrap();
        assert!(Lock::take(&folder.path().join("absent")).is_err());
    }
}
