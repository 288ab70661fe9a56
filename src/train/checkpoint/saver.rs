//! Saving beside training: a thread writes one checkpoint while the run goes on.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use super::super::error::TrainError;
use super::{Checkpoint, save};

type Write = dyn Fn(&Checkpoint) -> Result<(), TrainError> + Send + Sync;

/// Writes the checkpoints of a run, one at a time. Dropping it waits for the one that is being written.
pub struct Saver {
    root: PathBuf,
    write: Arc<Write>,
    at_work: Option<Work>,
    /// The memory of the last checkpoint that was written.
    spare: Option<Checkpoint>,
    newest: Option<u64>,
}

struct Work {
    step: u64,
    thread: JoinHandle<(Checkpoint, Result<(), TrainError>)>,
}

impl Saver {
    /// A saver into the folder of checkpoints `root`, by the rules of [`save`]. `newest` is the step of the checkpoint that
    /// the run goes on from.
    pub fn new(root: PathBuf, compact: bool, keep: usize, newest: Option<u64>) -> Self {
        let target = root.clone();
        Self::of(root, newest, move |checkpoint| {
            save(&target, checkpoint, compact, keep).map(drop)
        })
    }

    fn of(
        root: PathBuf,
        newest: Option<u64>,
        write: impl Fn(&Checkpoint) -> Result<(), TrainError> + Send + Sync + 'static,
    ) -> Self {
        Self {
            root,
            write: Arc::new(write),
            at_work: None,
            spare: None,
            newest,
        }
    }

    /// The step of the newest checkpoint that is known to be written.
    pub fn newest(&self) -> Option<u64> {
        self.newest
    }

    /// The step of the checkpoint that is being written.
    pub fn at_work(&self) -> Option<u64> {
        self.at_work.as_ref().map(|work| work.step)
    }

    /// Looks whether the checkpoint under way is finished; never waits.
    ///
    /// # Errors
    /// It could not be written.
    pub fn poll(&mut self) -> Result<(), TrainError> {
        match &self.at_work {
            Some(work) if work.thread.is_finished() => self.wait(),
            _ => Ok(()),
        }
    }

    /// Waits for the checkpoint under way.
    ///
    /// # Errors
    /// It could not be written.
    pub fn wait(&mut self) -> Result<(), TrainError> {
        let Some(Work { step, thread }) = self.at_work.take() else {
            return Ok(());
        };
        let Ok((checkpoint, written)) = thread.join() else {
            return Err(TrainError::Run {
                path: self.root.clone(),
                reason: format!("writing the checkpoint of step {step} panicked"),
            });
        };
        self.spare = Some(checkpoint);
        written?;
        self.newest = Some(step);
        Ok(())
    }

    /// Memory to fill with the next checkpoint; waits for the one under way.
    ///
    /// # Errors
    /// The one under way could not be written.
    pub fn buffers(&mut self) -> Result<Checkpoint, TrainError> {
        self.wait()?;
        Ok(self.spare.take().unwrap_or_default())
    }

    /// Begins to write `checkpoint`; waits for the one under way.
    ///
    /// # Errors
    /// The one under way could not be written, or there is no thread for this one.
    pub fn start(&mut self, checkpoint: Checkpoint) -> Result<(), TrainError> {
        self.wait()?;
        let (step, write) = (checkpoint.state.step, Arc::clone(&self.write));
        let thread = Builder::new()
            .name("checkpoint".into())
            .spawn(move || {
                let written = write(&checkpoint);
                (checkpoint, written)
            })
            .map_err(TrainError::io(&self.root))?;
        self.at_work = Some(Work { step, thread });
        Ok(())
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        // Only a run that ends by another error leaves a checkpoint under way; that error is the one to tell.
        let _ = self.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::checkpoint::State;
    use std::sync::mpsc;

    fn at(step: u64) -> Checkpoint {
        Checkpoint {
            state: State {
                step,
                ..State::default()
            },
            ..Checkpoint::default()
        }
    }

    #[test]
    fn one_at_a_time_and_its_memory_comes_back() {
        let (go, gate) = mpsc::channel::<()>();
        let gate = std::sync::Mutex::new(gate);
        let mut saver = Saver::of("run".into(), Some(3), move |_| {
            gate.lock().unwrap().recv().unwrap();
            Ok(())
        });
        saver.start(at(7)).unwrap();
        saver.poll().unwrap();
        assert_eq!((saver.at_work(), saver.newest()), (Some(7), Some(3)));
        go.send(()).unwrap();
        assert_eq!(saver.buffers().unwrap().state.step, 7);
        assert_eq!((saver.at_work(), saver.newest()), (None, Some(7)));
        // The memory was taken; there is no second one.
        assert_eq!(saver.buffers().unwrap().state.step, 0);
    }

    #[test]
    fn errors_and_panics_arrive_once() {
        let mut saver = Saver::of("run".into(), None, |checkpoint| match checkpoint.state.step {
            1 => Err(TrainError::io("run/step-1")(
                std::io::ErrorKind::StorageFull.into(),
            )),
            2 => panic!("broken"),
            _ => Ok(()),
        });
        for (step, words) in [
            (1, "run/step-1: no storage space"),
            (2, "run: writing the checkpoint of step 2 panicked"),
        ] {
            saver.start(at(step)).unwrap();
            while !saver.at_work.as_ref().unwrap().thread.is_finished() {
                std::thread::yield_now();
            }
            assert_eq!(saver.poll().unwrap_err().to_string(), words);
            assert_eq!((saver.at_work(), saver.newest()), (None, None));
        }
        saver.start(at(3)).unwrap();
        saver.wait().unwrap();
        assert_eq!(saver.newest(), Some(3));
    }
}
