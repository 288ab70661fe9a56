//! One rank of a training job: who it shares sequences, batches and steps with.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor, Var};
use fulgur_kernels::exchange::StateExchange;
use fulgur_lightnet::lm::Cut;

use super::communicator::{Communicator, Reduce};
use super::error::CommError;
use super::lasp::Lasp;
use super::options::{Distributed, Shard};
use super::parameters::Parameters;
use super::slices::Slices;

/// The part of every batch that a rank works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Number of the group that takes these rows of a batch.
    pub group: usize,
    /// Groups.
    pub groups: usize,
    /// Number of the rank among those that share sequences.
    pub part: usize,
    /// Ranks that share a sequence.
    pub parts: usize,
}

impl Share {
    /// All of it.
    pub const WHOLE: Self = Self {
        group: 0,
        groups: 1,
        part: 0,
        parts: 1,
    };

    /// The rows of a batch of `rows` that its group takes.
    ///
    /// # Errors
    /// Rows do not split, in words: what was found and what was expected.
    pub fn rows(&self, rows: usize) -> Result<std::ops::Range<usize>, String> {
        let each = split("batch", rows, self.groups, "groups of ranks")?;
        Ok(self.group * each..(self.group + 1) * each)
    }

    /// The tokens of a sequence of `tokens` that the rank takes.
    ///
    /// # Errors
    /// As [`Self::rows`].
    pub fn tokens(&self, tokens: usize) -> Result<std::ops::Range<usize>, String> {
        let each = split("context", tokens, self.parts, "ranks that share a sequence")?;
        Ok(self.part * each..(self.part + 1) * each)
    }
}

fn split(what: &str, all: usize, parts: usize, of: &str) -> Result<usize, String> {
    match all.is_multiple_of(parts) {
        true => Ok(all / parts),
        false => Err(format!(
            "{what} is {all}, expected a multiple of {parts}, the {of}"
        )),
    }
}

/// A rank and its groups.
#[derive(Debug)]
pub struct Ranks {
    world: Arc<dyn Communicator>,
    sequence: Arc<dyn Communicator>,
    step: Arc<dyn Communicator>,
    workers: Option<Arc<dyn Communicator>>,
    tensor: Arc<dyn Communicator>,
    /// Once a task has said what its parameters are for.
    parameters: OnceLock<Arc<Parameters>>,
    slices: OnceLock<Arc<Slices>>,
    options: Distributed,
}

impl Ranks {
    /// The groups of a rank of `world`. All ranks have to have the same options, and call this together.
    ///
    /// # Errors
    /// Options that do not fit the number of ranks, or ranks that are missing.
    pub fn new(world: Arc<dyn Communicator>, options: Distributed) -> Result<Self, CommError> {
        let (size, own) = (world.size(), world.rank());
        let refuse = |field: &str, found: usize, expected: String| {
            Err(CommError::Launch {
                rank: own,
                reason: format!("{field}: found {found}, expected {expected}"),
            })
        };
        if let Some((field, found, expected)) = options.wrong() {
            let reason = format!("{field}: found {found}, expected {expected}");
            return Err(CommError::Launch { rank: own, reason });
        }
        if options.world != 0 && options.world != size {
            let expected = format!("{size}, the number of ranks that were started");
            return refuse("distributed.world", options.world, expected);
        }
        let (parts, tensor) = (options.sequence, options.tensor);
        if !size.is_multiple_of(tensor) {
            return refuse(
                "distributed.tensor",
                tensor,
                format!("a number that divides {size}"),
            );
        }
        if !(size / tensor).is_multiple_of(parts) {
            let all = size / tensor;
            return refuse(
                "distributed.sequence",
                parts,
                format!("a number that divides {all}"),
            );
        }
        let step = match &options.outer {
            None => size,
            Some(outer) if outer.node == 0 => parts,
            Some(outer) => outer.node,
        };
        if !size.is_multiple_of(step) || !step.is_multiple_of(parts) {
            let expected = format!("a multiple of {parts} that divides {size}");
            return refuse("distributed.outer.node", step, expected);
        }
        let line = |first: usize, count: usize, stride: usize| -> Vec<usize> {
            (0..count).map(|i| first + i * stride).collect()
        };
        let workers = options
            .outer
            .is_some()
            .then(|| world.group(&line(own % step, size / step, step)));
        // Without workers of their own, those take a step together that have the same part of the model.
        let together = match tensor {
            1 => line(own / step * step, step, 1),
            _ => line(own % tensor, size / tensor, tensor),
        };
        let shared = parts * tensor;
        Ok(Self {
            sequence: world.group(&line(own / shared * shared + own % tensor, parts, tensor))?,
            step: world.group(&together)?,
            workers: workers.transpose()?,
            tensor: world.group(&line(own / tensor * tensor, tensor, 1))?,
            parameters: OnceLock::new(),
            slices: OnceLock::new(),
            options,
            world,
        })
    }

    /// All ranks.
    pub fn world(&self) -> &Arc<dyn Communicator> {
        &self.world
    }

    /// The ranks that sum their gradients at each step.
    pub fn step(&self) -> &Arc<dyn Communicator> {
        &self.step
    }

    /// One rank of each worker, where workers take steps of their own.
    pub fn workers(&self) -> Option<&Arc<dyn Communicator>> {
        self.workers.as_ref()
    }

    /// How the ranks share the work.
    pub fn options(&self) -> &Distributed {
        &self.options
    }

    /// Whether it is this rank that writes files and speaks to people.
    pub fn leads(&self) -> bool {
        self.world.rank() == 0
    }

    /// Its part of every batch.
    pub fn share(&self) -> Share {
        let parts = self.sequence.size();
        let shared = parts * self.tensor.size();
        Share {
            group: self.world.rank() / shared,
            groups: self.world.size() / shared,
            part: self.sequence.rank(),
            parts,
        }
    }

    /// What joins the parts of sequences, of `tokens` tokens each; none where sequences are whole.
    pub fn exchange(&self, tokens: usize) -> Option<Arc<dyn StateExchange>> {
        let lasp = || Lasp::new(self.sequence.clone(), self.options.method, tokens);
        (self.sequence.size() > 1).then(|| Arc::new(lasp()) as Arc<dyn StateExchange>)
    }

    /// Shares parameters, each with the unit of the model that borrows it, among the ranks that take steps together, where the
    /// recipe says so. All ranks call it.
    pub fn share_parameters(
        &self,
        vars: impl IntoIterator<Item = (Var, Option<usize>)>,
    ) -> Option<&Arc<Parameters>> {
        let is_due = self.options.shard == Shard::Parameters && self.step.size() > 1;
        is_due.then(|| {
            let make = || Arc::new(Parameters::new(self.step.clone(), vars.into_iter().collect()));
            self.parameters.get_or_init(make)
        })
    }

    /// The ranks that have the layers of the model together with this one.
    pub fn tensor(&self) -> &Arc<dyn Communicator> {
        &self.tensor
    }

    /// What joins the parts of layers; none where they are whole.
    pub fn tensor_exchange(&self) -> Option<Arc<dyn StateExchange>> {
        let join = || Lasp::new(self.tensor.clone(), self.options.method, 0);
        (self.tensor.size() > 1).then(|| Arc::new(join()) as Arc<dyn StateExchange>)
    }

    /// Notes which part of which parameters this rank has.
    pub fn set_slices(&self, cuts: BTreeMap<String, Cut>) {
        self.slices
            .get_or_init(|| Arc::new(Slices::new(self.tensor.clone(), cuts)));
    }

    /// The parts of parameters, where the model was split.
    pub fn slices(&self) -> Option<&Arc<Slices>> {
        self.slices.get()
    }

    /// The parameters that were shared.
    pub fn parameters(&self) -> Option<&Arc<Parameters>> {
        self.parameters.get()
    }

    /// The largest of what all ranks say.
    ///
    /// # Errors
    /// A rank is missing.
    pub fn largest(&self, value: f64) -> Result<f64, CommError> {
        let failed = |error: &candle_core::Error| CommError::tensor(self.world.own(), "largest", error);
        let own = Tensor::new(&[value], &Device::Cpu).map_err(|error| failed(&error))?;
        let most = self.world.all_reduce(&own, Reduce::Max)?;
        let values = most.to_dtype(DType::F64).and_then(|most| most.to_vec1::<f64>());
        Ok(values.map_err(|error| failed(&error))?[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::distributed::outer::OuterOptions;
    use crate::distributed::threads::Settings;
    use crate::distributed::threads::tests::each;

    /// The example of section 7.1: a world of 8, sequences over 4.
    #[test]
    fn groups_are_those_of_the_example() {
        let options = Distributed {
            sequence: 4,
            outer: Some(OuterOptions::default()),
            ..Distributed::default()
        };
        let found = each(8, Settings::default(), |world| {
            let ranks = Ranks::new(world, options.clone()).unwrap();
            (
                ranks.sequence.members().to_vec(),
                ranks.workers().unwrap().members().to_vec(),
                ranks.share(),
                ranks.exchange(16).unwrap().position_offset(),
            )
        });
        assert_eq!(found[5].0, [4, 5, 6, 7]);
        assert_eq!(found[5].1, [1, 5]);
        let share = Share {
            group: 1,
            groups: 2,
            part: 1,
            parts: 4,
        };
        assert_eq!((found[5].2, found[5].3), (share, 16));
        assert_eq!((share.rows(6), share.tokens(8)), (Ok(3..6), Ok(2..4)));
        assert_eq!(
            share.rows(7),
            Err("batch is 7, expected a multiple of 2, the groups of ranks".to_owned())
        );
        assert!(
            share
                .tokens(9)
                .unwrap_err()
                .contains("context is 9, expected a multiple of 4")
        );
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        type Change = fn(&mut Distributed);
        let cases: [(Change, &str); 6] = [
            (
                |o| o.sequence = 3,
                "distributed.sequence: found 3, expected a number that divides 4",
            ),
            (
                |o| o.world = 8,
                "distributed.world: found 8, expected 4, the number of ranks",
            ),
            (
                |o| (o.world, o.sequence) = (4, 3),
                "a number that divides the world of 4",
            ),
            (
                |o| o.sequence = 0,
                "distributed.sequence: found 0, expected 1 or more",
            ),
            (|o| o.timeout_s = f64::NAN, "distributed.timeout_s: found NaN"),
            (
                |o| {
                    o.sequence = 2;
                    o.outer = Some(OuterOptions {
                        node: 1,
                        ..OuterOptions::default()
                    });
                },
                "distributed.outer.node: found 1, expected a multiple of 2 that divides 4",
            ),
        ];
        for (change, words) in cases {
            let mut options = Distributed::default();
            change(&mut options);
            for line in each(4, Settings::default(), |world| {
                Ranks::new(world, options.clone()).unwrap_err().to_string()
            }) {
                assert!(line.contains(words), "{line}");
            }
        }
    }
}
