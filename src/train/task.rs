//! What the engine asks of a task: batches, a loss, and what to do with the trained weights.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Tensor};
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::philox::Philox;
use fulgur_kernels::upload::Uploader;
use fulgur_lightnet::params::Params;

use super::error::TaskResult;
use crate::distributed::{Ranks, Share};

/// Something that can be trained. One file a task in `train/tasks`, one line in its table.
///
/// A task is shared by the threads that prepare batches; everything that a run changes lives in [`Task::params`] and in
/// the engine, so that a checkpoint is complete without the task's help.
pub trait Task: Send + Sync {
    /// All trainable parameters. The model must be built before the run starts: names are fixed from then on.
    fn params(&self) -> &Params;

    /// What [`Batch::samples`] counts, for the throughput that is logged.
    fn unit(&self) -> &'static str {
        "samples"
    }

    /// Floating-point operations that training on one sample (as [`Batch::samples`] counts) takes by the formulas of the
    /// model, forward and backward, whatever the kernels do beyond that: for the share of the hardware's peak that is
    /// logged. None where nobody has counted them.
    fn flops_per_sample(&self) -> Option<f64> {
        None
    }

    /// Whether [`Task::loss`] has the device do the same at every step, but for what the tensors and the ids of the batch hold. It
    /// takes nothing from the step or from tensors on the host then, batches have the same shapes, and a GPU may record the work
    /// once and repeat it.
    fn repeats(&self) -> bool {
        false
    }

    /// What is said about the data when a run begins, a line each: what was left out of it.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }

    /// Makes it the task of one rank of several, before the run starts: batches become its share of those of the whole, and the
    /// loss is joined to those of the ranks that share its sequences.
    ///
    /// # Errors
    /// Batches or sequences do not split among so many ranks, or the task is not for several.
    fn distribute(&mut self, ranks: &Ranks) -> TaskResult<()> {
        match ranks.share() {
            Share::WHOLE => Ok(()),
            Share { groups, parts, .. } => Err(format!(
                "{} ranks, expected 1: this task does not split its batches",
                groups * parts
            )
            .into()),
        }
    }

    /// Prepares the batch at `cursor`, on the host, in any thread: a pure function of the cursor. Draw every random
    /// number of the step here ([`Cursor::noise`]), those of the loss included.
    ///
    /// # Errors
    /// Whatever stops the run: data that cannot be read.
    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch>;

    /// The loss of a batch that lies on the device of the parameters.
    ///
    /// # Errors
    /// Whatever stops the run.
    fn loss(&self, batch: &Batch, step: &Step) -> TaskResult<Losses>;

    /// Figures on held-out data with the averaged weights; the first one is the one to make small, and decides which
    /// weights are kept as the best. Nothing by default.
    ///
    /// # Errors
    /// Whatever stops the run.
    fn validate(&self) -> TaskResult<Vec<(String, f64)>> {
        Ok(Vec::new())
    }

    /// Writes pictures (`.png`) and sounds (`.wav`) that show the state of the model into `folder`, which exists, and
    /// returns their paths. Runs with the averaged weights. Nothing by default.
    ///
    /// # Errors
    /// Whatever stops the run.
    fn sample(&self, folder: &Path, step: u64) -> TaskResult<Vec<PathBuf>> {
        let _ = (folder, step);
        Ok(Vec::new())
    }

    /// Writes the finished model into `folder`, which exists and is empty. Runs with the averaged weights.
    ///
    /// # Errors
    /// Whatever stops the run.
    fn export(&self, folder: &Path) -> TaskResult<()>;
}

/// Where a run stands in its data: the seed of the run and the number of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Seed of the run.
    pub seed: u64,
    /// Number of the batch since the beginning of the run; with gradient accumulation several make a step.
    pub index: u64,
}

impl Cursor {
    /// The random numbers of this batch for one purpose; different purposes are independent.
    pub fn noise(&self, purpose: &str) -> Philox {
        Philox::named(self.seed, &format!("batch/{purpose}/{}", self.index))
    }

    /// Which of `items` things make up this batch of `size`: every epoch visits each thing once, in an order of its
    /// own, and epochs follow one another without a gap. `items` must be at least one.
    pub fn shuffled(&self, items: usize, size: usize) -> Vec<usize> {
        Orders::default().batch(self, items, size)
    }
}

/// The order of an epoch, kept for the next batches of it: to draw that of some ten thousand things takes longer than to prepare a small
/// batch.
#[derive(Debug, Default)]
pub struct Orders(Mutex<Option<(Epoch, Arc<[usize]>)>>);

/// What decides an order: the seed, the number of the epoch, and how many things there are.
type Epoch = (u64, u64, usize);

impl Orders {
    /// As [`Cursor::shuffled`].
    pub fn batch(&self, cursor: &Cursor, items: usize, size: usize) -> Vec<usize> {
        let first = u128::from(cursor.index) * size as u128;
        let mut current: Option<(u64, Arc<[usize]>)> = None;
        let mut chosen = Vec::with_capacity(size);
        for position in (0..size).map(|k| first + k as u128) {
            let epoch = (position / items as u128) as u64;
            let order = match current.take() {
                Some((of, order)) if of == epoch => order,
                _ => self.of((cursor.seed, epoch, items)),
            };
            chosen.push(order[(position % items as u128) as usize]);
            current = Some((epoch, order));
        }
        chosen
    }

    fn of(&self, wanted: Epoch) -> Arc<[usize]> {
        let (seed, epoch, items) = wanted;
        // A panic elsewhere cannot leave a half-written entry.
        let kept = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, order)) = &*kept()
            && *of == wanted
        {
            return Arc::clone(order);
        }
        // Drawn without the lock: another thread may want the epoch before.
        let noise = &mut Philox::named(seed, &format!("epoch/{epoch}"));
        let order: Arc<[usize]> = noise.permutation(items).into();
        *kept() = Some((wanted, Arc::clone(&order)));
        order
    }
}

/// What a loss may know about the run beside its batch.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Number of the step, from 0.
    pub number: u64,
    /// Part of the run that is done, in [0, 1).
    pub progress: f64,
    /// Where the batch came from.
    pub cursor: Cursor,
}

/// Named tensors: on the host when a task prepares them, on the device of the parameters when it gets them back.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The tensors.
    pub tensors: BTreeMap<&'static str, Tensor>,
    /// Ids, which are checked and ordered on the host.
    pub ids: BTreeMap<&'static str, Ids>,
    /// Tensors that stay on the host.
    pub host: BTreeMap<&'static str, Tensor>,
    /// How many samples they hold, for the throughput that is logged.
    pub samples: usize,
    /// Of the rank's share of a batch, the share of what its loss is a mean over: 1 where it is whole.
    pub share: f64,
}

impl Batch {
    /// A batch of `samples` things, without tensors.
    pub fn new(samples: usize) -> Self {
        Self {
            tensors: BTreeMap::new(),
            ids: BTreeMap::new(),
            host: BTreeMap::new(),
            samples,
            share: 1.0,
        }
    }

    /// The rows `rows` of all tensors, whose axis `axis(name)` is that of the samples.
    ///
    /// # Errors
    /// Ids, which only their task can split, or tensors with too few rows.
    pub fn rows(
        mut self,
        rows: std::ops::Range<usize>,
        axis: impl Fn(&str) -> usize,
    ) -> candle_core::Result<Self> {
        if !self.ids.is_empty() {
            candle_core::bail!("ids do not split into rows");
        }
        for (name, tensor) in self.tensors.iter_mut().chain(&mut self.host) {
            *tensor = tensor.narrow(axis(name), rows.start, rows.len())?.contiguous()?;
        }
        self.share = rows.len() as f64 / self.samples as f64;
        self.samples = rows.len();
        Ok(self)
    }

    /// Adds a tensor.
    #[must_use]
    pub fn with(mut self, name: &'static str, tensor: Tensor) -> Self {
        self.tensors.insert(name, tensor);
        self
    }

    /// Adds ids, and finds their order here: this thread need not hurry.
    #[must_use]
    pub fn with_ids(mut self, name: &'static str, ids: Ids) -> Self {
        self.ids.insert(name, ids.ordered());
        self
    }

    /// Adds a tensor that stays on the host, to be looked at there.
    #[must_use]
    pub fn on_host(mut self, name: &'static str, tensor: Tensor) -> Self {
        self.host.insert(name, tensor);
        self
    }

    /// The tensor called `name`.
    ///
    /// # Errors
    /// The batch has none of this name.
    pub fn get(&self, name: &str) -> candle_core::Result<&Tensor> {
        match self.tensors.get(name).or_else(|| self.host.get(name)) {
            Some(tensor) => Ok(tensor),
            None => candle_core::bail!(
                "the batch has no tensor `{name}`, it has {:?}",
                self.tensors.keys()
            ),
        }
    }

    /// The ids called `name`.
    ///
    /// # Errors
    /// The batch has none of this name.
    pub fn ids(&self, name: &str) -> candle_core::Result<&Ids> {
        match self.ids.get(name) {
            Some(ids) => Ok(ids),
            None => candle_core::bail!("the batch has no ids `{name}`, it has {:?}", self.ids.keys()),
        }
    }

    /// The same batch on `device`.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn to_device(&self, device: &Device) -> candle_core::Result<Self> {
        self.upload(&mut Uploader::new(device))
    }

    /// The same batch on the device of `uploader`, without waiting for it.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn upload(&self, uploader: &mut Uploader) -> candle_core::Result<Self> {
        let moved = self
            .tensors
            .iter()
            .map(|(name, tensor)| Ok((*name, uploader.upload(tensor)?)));
        let tensors = moved.collect::<candle_core::Result<_>>()?;
        let ids = self.ids.iter();
        Ok(Self {
            tensors,
            ids: ids
                .map(|(name, ids)| Ok((*name, ids.upload(uploader)?)))
                .collect::<candle_core::Result<_>>()?,
            host: self.host.clone(),
            samples: self.samples,
            share: self.share,
        })
    }

    /// The same batch in memory of its own on the device where it lies: places for [`Self::copy_to`].
    ///
    /// # Errors
    /// It was not uploaded, or the device is out of memory.
    #[cfg(feature = "cuda")]
    pub fn own(&self) -> candle_core::Result<Self> {
        let (tensors, ids) = (self.tensors.iter(), self.ids.iter());
        Ok(Self {
            tensors: tensors
                .map(|(name, tensor)| Ok((*name, tensor.copy()?)))
                .collect::<candle_core::Result<_>>()?,
            ids: ids
                .map(|(name, ids)| Ok((*name, ids.own()?)))
                .collect::<candle_core::Result<_>>()?,
            host: self.host.clone(),
            samples: self.samples,
            share: self.share,
        })
    }

    /// Writes tensors and ids over those of `to`, which lie on the same device.
    ///
    /// # Errors
    /// They have other names or shapes, or the driver refuses.
    #[cfg(feature = "cuda")]
    pub fn copy_to(&self, to: &Self) -> candle_core::Result<()> {
        let places = to.tensors.len() + to.ids.len();
        if self.tensors.len() + self.ids.len() != places || self.samples != to.samples {
            candle_core::bail!("batches differ in their tensors, though the task says that steps repeat");
        }
        for (name, tensor) in &self.tensors {
            fulgur_kernels::graph::copy(&tensor.contiguous()?, to.get(name)?)?;
        }
        for (name, ids) in &self.ids {
            ids.copy_to(to.ids(name)?)?;
        }
        Ok(())
    }
}

/// The loss of a batch.
#[derive(Clone, Debug)]
pub struct Losses {
    /// What is made small: a scalar, f32.
    pub total: Tensor,
    /// What it consists of, or other scalars worth watching; logged, never differentiated. Every step must give the
    /// same names.
    pub parts: Vec<(&'static str, Tensor)>,
}

impl From<Tensor> for Losses {
    fn from(total: Tensor) -> Self {
        Self {
            total,
            parts: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_visit_each_item_once() {
        // 3 epochs of 10 items in batches of 6: batches cross the borders of epochs.
        let all: Vec<usize> = (0..5)
            .flat_map(|index| Cursor { seed: 3, index }.shuffled(10, 6))
            .collect();
        let epochs: Vec<_> = all.chunks(10).map(<[usize]>::to_vec).collect();
        assert_ne!(epochs[0], epochs[1]);
        for mut epoch in epochs {
            epoch.sort_unstable();
            assert!(epoch.into_iter().eq(0..10));
        }
        assert_ne!(
            Cursor { seed: 3, index: 0 }.shuffled(10, 6),
            Cursor { seed: 4, index: 0 }.shuffled(10, 6)
        );
        assert_eq!(Cursor { seed: 3, index: 0 }.shuffled(1, 4), [0; 4]);
    }

    #[test]
    fn kept_orders_are_those_that_are_drawn() {
        let orders = Orders::default();
        for (seed, index, items) in [
            (3, 0, 10),
            (3, 1, 10),
            (3, 0, 10),
            (4, 0, 10),
            (4, 0, 11),
            (4, 7, 11),
            (3, 1, 10),
        ] {
            let cursor = Cursor { seed, index };
            assert_eq!(orders.batch(&cursor, items, 6), cursor.shuffled(items, 6));
        }
    }

    #[test]
    fn noise_differs_by_purpose_and_batch() {
        let draw = |index, purpose: &str| Cursor { seed: 1, index }.noise(purpose).next_u64();
        assert_eq!(draw(5, "time"), draw(5, "time"));
        assert_ne!(draw(5, "time"), draw(5, "crop"));
        assert_ne!(draw(5, "time"), draw(6, "time"));
    }
}
