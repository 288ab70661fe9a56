//! Loss and gradients of a step: as the task launches them, or on a GPU as a CUDA graph that was recorded once.
//!
//! A step of a small model is some hundred kernels of a few microseconds each, which is less than the host takes to launch them.
//! Where every step launches the same ([`Task::repeats`]), the host copies the batch to where the recorded step reads it, and
//! launches that as a whole. The kernels are the same, and so are all bits.

use candle_core::Tensor;

use super::{Batch, Gradients, Session, Step, TrainError};

#[cfg(feature = "cuda")]
use {super::one_line, fulgur_kernels::graph, fulgur_kernels::graph::Graph, std::time::Instant};

/// Steps that go before: they load what kernels need.
#[cfg(feature = "cuda")]
const BEFORE: usize = 2;
/// Most operations of a step that is recorded. Larger ones keep a GPU busy while the host launches them, and recording would only
/// cost memory.
#[cfg(feature = "cuda")]
const MOST_OPERATIONS: f64 = 4e12;
/// Most weights of a model whose operations nobody has counted.
#[cfg(feature = "cuda")]
const MOST_WEIGHTS: usize = 16 << 20;

/// What a step finds, on the device.
#[derive(Clone)]
pub(super) struct Found {
    pub(super) gradients: Gradients,
    pub(super) scalars: Vec<(String, Tensor)>,
}

/// How the steps of a session are taken.
#[derive(Default)]
pub(super) struct Steps {
    /// Why none is recorded.
    #[cfg(feature = "cuda")]
    refused: Option<String>,
    #[cfg(feature = "cuda")]
    taken: usize,
    #[cfg(feature = "cuda")]
    recorded: Option<Recorded>,
}

/// A recorded step and all that it reads and writes beside the weights.
#[cfg(feature = "cuda")]
struct Recorded {
    graph: Graph,
    /// Where it reads the batch.
    batch: Batch,
    /// What it writes anew each time.
    found: Found,
}

#[cfg(not(feature = "cuda"))]
impl Steps {
    #[expect(clippy::unused_self, reason = "only GPUs record steps")]
    pub(super) fn take(
        &mut self,
        session: &Session<'_>,
        batch: &Batch,
        step: &Step,
    ) -> Result<Found, TrainError> {
        session.found(batch, step)
    }
}

#[cfg(feature = "cuda")]
impl Steps {
    /// What `session` finds with `batch`, which lies on the device. What a recorded step found stays until the next one.
    ///
    /// # Errors
    /// Those of the task, or of the device.
    pub(super) fn take(
        &mut self,
        session: &Session<'_>,
        batch: &Batch,
        step: &Step,
    ) -> Result<Found, TrainError> {
        if self.refused.is_none() && self.recorded.is_none() && self.taken >= BEFORE {
            let began = Instant::now();
            match fits(session, batch).and_then(|()| Recorded::new(session, batch, step)) {
                Ok(recorded) => {
                    let seconds = began.elapsed().as_secs_f64();
                    tracing::debug!(seconds, "steps are recorded");
                    self.recorded = Some(recorded);
                }
                Err(error) => {
                    let reason = one_line(&error.to_string()).to_owned();
                    tracing::debug!(reason, "steps are not recorded");
                    self.refused = Some(reason);
                }
            }
        }
        self.taken += 1;
        match &mut self.recorded {
            Some(recorded) => Ok(recorded.take(batch)?),
            None => session.found(batch, step),
        }
    }
}

/// Errors with the reason unless steps with such a batch can be recorded, and are the faster for it.
#[cfg(feature = "cuda")]
fn fits(session: &Session<'_>, batch: &Batch) -> candle_core::Result<()> {
    use candle_core::bail;
    if !session.device().is_cuda() {
        bail!("the model is not on a GPU");
    }
    if !graph::is_allowed()? {
        bail!("{} is 0", graph::CHOICE);
    }
    if session.team.is_some() {
        bail!("there are other ranks");
    }
    if !session.task.repeats() {
        bail!("steps of this task differ");
    }
    if session.recipe.train.accumulate > 1 {
        bail!("gradients are accumulated");
    }
    match session.flops {
        Some(flops) => {
            let operations = flops * batch.samples as f64;
            if operations > MOST_OPERATIONS {
                bail!(
                    "{operations:.1e} operations a step keep the GPU busy, the most is {MOST_OPERATIONS:.0e}"
                );
            }
        }
        None => {
            let vars = session.task.params().vars();
            let weights: usize = vars.values().map(|var| var.elem_count()).sum();
            if weights > MOST_WEIGHTS {
                bail!("{weights} weights keep the GPU busy, the most is {MOST_WEIGHTS}");
            }
        }
    }
    Ok(())
}

#[cfg(feature = "cuda")]
impl Recorded {
    fn new(session: &Session<'_>, batch: &Batch, step: &Step) -> candle_core::Result<Self> {
        let batch = batch.own()?;
        // All of what the runs found is kept until the last of them is over: memory that was taken outside of a recording cannot be
        // given back within it.
        let mut found = Vec::new();
        let graph = Graph::record(session.device(), || {
            let next = session.found(&batch, step);
            found.push(next.map_err(|error| candle_core::Error::Msg(error.to_string()))?);
            Ok(())
        })?;
        match found.pop() {
            Some(found) => Ok(Self { graph, batch, found }),
            None => candle_core::bail!("nothing was recorded"),
        }
    }

    fn take(&mut self, batch: &Batch) -> candle_core::Result<Found> {
        batch.copy_to(&self.batch)?;
        self.graph.launch()?;
        Ok(self.found.clone())
    }
}
