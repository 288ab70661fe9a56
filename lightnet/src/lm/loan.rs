//! Weights that are not here all the time: each unit of a model borrows its own while it works.
//!
//! ```text
//! forward    bring unit 0, work, give it back;  unit 1; ..
//! backward   bring unit L, adjoints, give it back, its gradients are complete;  unit L - 1; ..
//! ```
//!
//! Who lends them, to save memory, is outside of the model: the ranks of a training run that keep a part of each unit.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::Result;
use fulgur_kernels::tape::{self, Gradients};

use super::config::Config;
use super::layer::Names;

/// Who has the weights of a model.
///
/// All calls come from the thread that runs the model, in an order that depends on nothing but the model.
pub trait Lender: Debug + Send + Sync {
    /// Sees to it that the weights of `unit` are here.
    ///
    /// # Errors
    /// They do not come.
    fn bring(&self, unit: usize) -> Result<()>;

    /// Takes them away, where they are here: nobody reads them before they are brought again.
    ///
    /// # Errors
    /// A device failed.
    fn take_back(&self, unit: usize) -> Result<()>;

    /// The `gradients` of the weights of `unit` are complete, and may be taken.
    ///
    /// # Errors
    /// Other ranks do not come for them.
    fn finished(&self, unit: usize, gradients: &mut Gradients<'_>) -> Result<()>;
}

impl Config {
    /// Units of a model that borrow their weights: the embedding, each layer, and the head where it has weights of its own.
    pub fn units(&self) -> usize {
        self.num_hidden_layers + 1 + usize::from(!self.tie_word_embeddings)
    }

    /// The unit that may borrow the weights called `name`, if they are a matrix; none if they are always there: those of norms
    /// and of positions, which are small.
    pub fn unit_of(&self, name: &str) -> Option<usize> {
        let names = Names::of(self.architecture);
        if name == "lm_head.weight" {
            return Some(self.head_unit());
        }
        let name = name.strip_prefix("model.")?;
        if name.strip_suffix(".weight") == Some(names.embedding) {
            return Some(0);
        }
        let (layer, rest) = name.strip_prefix("layers.")?.split_once('.')?;
        let branch = [names.mixer, names.glu]
            .into_iter()
            .any(|part| rest.starts_with(part));
        let layer: usize = layer.parse().ok()?;
        (branch && rest.ends_with(".weight")).then_some(layer + 1)
    }

    pub(super) fn head_unit(&self) -> usize {
        if self.tie_word_embeddings {
            0
        } else {
            self.num_hidden_layers + 1
        }
    }
}

/// What a layer borrows while it runs.
#[derive(Debug)]
pub(super) struct Loan {
    lender: Arc<dyn Lender>,
    unit: usize,
    runs: AtomicUsize,
}

impl Loan {
    pub(super) fn new(lender: Arc<dyn Lender>, unit: usize) -> Self {
        Self {
            lender,
            unit,
            runs: AtomicUsize::new(0),
        }
    }

    /// Has to be called where the work begins.
    pub(super) fn begin(&self) -> Result<()> {
        let (lender, unit) = (self.lender.clone(), self.unit);
        self.runs.fetch_add(1, Ordering::Relaxed);
        lender.bring(unit)?;
        tape::on_the_way_back(move |_| lender.take_back(unit))
    }

    /// Has to be called where it ends. A layer that runs again does so for its adjoints, which follow at once.
    pub(super) fn end(&self) -> Result<()> {
        let (lender, unit) = (self.lender.clone(), self.unit);
        if self.runs.load(Ordering::Relaxed) == 1 {
            lender.take_back(unit)?;
        }
        tape::on_the_way_back(move |_| lender.bring(unit))
    }
}

/// Notes that the gradients of `units` are complete once the backward pass comes to this place.
pub(super) fn finished(lender: Option<&Arc<dyn Lender>>, units: &[usize]) -> Result<()> {
    for &unit in units {
        if let Some(lender) = lender.cloned() {
            tape::on_the_way_back(move |gradients| lender.finished(unit, gradients))?;
        }
    }
    Ok(())
}

/// Does `work` with the weights of `unit`, whose adjoints do not read them.
pub(super) fn with<T>(
    lender: Option<&Arc<dyn Lender>>,
    unit: usize,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let Some(lender) = lender else {
        return work();
    };
    lender.bring(unit)?;
    let result = work();
    lender.take_back(unit)?;
    result
}
