//! Parameters of which each rank has a run of rows or columns (tensor parallelism), and the whole that they make.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor};
use fulgur_lightnet::lm::Cut;

use super::communicator::Communicator;

/// What the names of moments begin with, whose first axis is not one of the weight.
const MOMENTS: &str = "moments.";

/// The parameters of a model, from the side of one rank.
#[derive(Debug)]
pub struct Slices {
    group: Arc<dyn Communicator>,
    cuts: BTreeMap<String, Cut>,
}

impl Slices {
    /// Of the ranks of `group`, which have the tensors of these names together.
    pub fn new(group: Arc<dyn Communicator>, cuts: BTreeMap<String, Cut>) -> Self {
        Self { group, cuts }
    }

    /// The ranks that have the model together.
    pub fn group(&self) -> &Arc<dyn Communicator> {
        &self.group
    }

    /// Whether other ranks have other parts of the parameter of this number, in the order of names.
    pub fn is_cut(&self, index: usize) -> bool {
        self.cuts
            .values()
            .nth(index)
            .is_some_and(|&cut| cut != Cut::Whole)
    }

    /// What this rank has of `whole`, weights or moments by name; what is neither stays as it is.
    ///
    /// # Errors
    /// A tensor that does not split.
    pub fn own(&self, whole: &BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
        let (part, parts) = (self.group.rank(), self.group.size());
        let own = |(name, tensor): (&String, &Tensor)| {
            let (cut, before) = self.cut(name);
            let fits = tensor.rank() > before + usize::from(cut == Cut::Columns) || cut == Cut::Whole;
            let own = match fits {
                true => cut.part(tensor, before, part, parts)?,
                // Of another model: that is told by whoever takes it up.
                false => tensor.clone(),
            };
            Ok((name.clone(), own))
        };
        whole.iter().map(own).collect()
    }

    /// The tensors that all ranks have together, on the host, from the `own` weights or moments by name; all ranks call it. What
    /// is on all of them comes from this one.
    ///
    /// # Errors
    /// A rank is missing.
    pub fn whole(&self, own: &BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
        let whole = |(name, tensor): (&String, &Tensor)| {
            let (cut, before) = self.cut(name);
            let host = tensor.detach().to_device(&Device::Cpu)?;
            let whole = match cut {
                Cut::Whole => host,
                cut => cut.whole(&self.group.all_gather(&host.contiguous()?)?, before)?,
            };
            Ok((name.clone(), whole))
        };
        own.iter().map(whole).collect()
    }

    fn cut(&self, name: &str) -> (Cut, usize) {
        let (weight, before) = match name.strip_prefix(MOMENTS) {
            Some(weight) => (weight, 1),
            None => (name, 0),
        };
        (self.cuts.get(weight).copied().unwrap_or(Cut::Whole), before)
    }
}
