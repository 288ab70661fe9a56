//! A layer with its residual sums and norms, as the model runs it, once or again in the backward pass.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use fulgur_kernels::exchange::{Kept, StateExchange};
use fulgur_kernels::norm::add_norm;

use super::layer::Layer;
use super::loan::Loan;
use crate::mixer::causal::{CausalContext, Memory};

/// A layer with all that it needs beside the stream.
pub(super) struct Block {
    pub(super) layer: Arc<Layer>,
    /// Where its weights are lent.
    pub(super) loan: Option<Arc<Loan>>,
    pub(super) phase: Option<Tensor>,
    pub(super) lower_bound: Option<Tensor>,
    pub(super) mask: Option<Tensor>,
    /// Borders of packed sequences.
    pub(super) packed: Option<Arc<[usize]>>,
    pub(super) position: usize,
    /// The same where the device knows it.
    pub(super) clock: Option<Tensor>,
    /// Of the norm before the gated linear unit, and of the one after it.
    pub(super) gains: [Option<Tensor>; 2],
    pub(super) eps: f64,
    /// Other parts of split sequences; what they gave is kept for a layer that is recomputed.
    pub(super) parts: Option<Arc<Kept>>,
}

impl Block {
    /// The stream and its norm behind the layer, from those before it.
    pub(super) fn run(
        &self,
        x: &Tensor,
        normed: &Tensor,
        memory: Option<&mut Memory>,
    ) -> Result<[Tensor; 2]> {
        if let Some(loan) = &self.loan {
            loan.begin()?;
        }
        let context = CausalContext {
            phase: self.phase.as_ref(),
            lower_bound: self.lower_bound.as_ref(),
            position: self.position,
            clock: self.clock.as_ref(),
            ..CausalContext::default()
        };
        let exchange = self.parts.clone().map(|parts| {
            parts.begin();
            parts as Arc<dyn StateExchange>
        });
        let mut passing = match (&exchange, self.packed.clone()) {
            (Some(exchange), borders) => Some(Memory::split(exchange.clone(), borders)),
            (None, borders) => borders.map(Memory::packed),
        };
        let memory = memory.or(passing.as_mut());
        let branch = self.layer.mix(normed, &context, self.mask.as_ref(), memory)?;
        let (x, normed) = add_norm(x, &branch, self.gains[0].as_ref(), self.eps)?;
        let branch = self
            .layer
            .expand(&normed, self.mask.as_ref(), exchange.as_ref())?;
        let (x, normed) = add_norm(&x, &branch, self.gains[1].as_ref(), self.eps)?;
        if let Some(loan) = &self.loan {
            loan.end()?;
        }
        Ok([x, normed])
    }
}
