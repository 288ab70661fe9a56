//! AdamW (Loshchilov and Hutter, 2019) over the parameters of a model, or Muon for those of its matrices that the recipe
//! names, with moments that can be saved.
//!
//! ```text
//! m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
//! w <- (1 - lr wd) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
//! ```
//!
//! The update of Muon is in `muon.rs`. `g` is the gradient scaled so that the norm over all parameters is at most `clip`;
//! vectors (biases, gains) do not decay. `t` counts the updates made: where the norm is not finite, none is, and nothing
//! changes. Norm, scale, that decision and the counts stay on the device: an update waits for nothing.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use fulgur_kernels::adamw::{self as fused, Clip, Clipper, Counts, zero_moments};
use fulgur_kernels::average::follow;
use fulgur_lightnet::params::Params;
use serde::{Deserialize, Serialize};

use super::muon;

/// What the names of moments begin with.
pub(super) const MOMENTS: &str = "moments.";

/// The constants of the optimiser.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimiserConfig {
    /// The full learning rate.
    pub lr: f64,
    /// Memory of the first moment.
    pub beta1: f64,
    /// Memory of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay of tensors with two or more dimensions.
    pub weight_decay: f64,
    /// Largest norm of all gradients together; 0 does not limit it.
    pub clip: f64,
    /// Muon instead of AdamW for matrices whose name contains one of these, such as `blocks.`; both sides are 32 or more.
    pub muon: Vec<String>,
    /// Root mean square of Muon's updates over the learning rate.
    pub muon_size: f64,
}

impl Default for OptimiserConfig {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.01,
            clip: 1.0,
            muon: Vec::new(),
            muon_size: 1.0,
        }
    }
}

impl OptimiserConfig {
    /// How many moments are kept of a parameter of this name and shape: two under AdamW, one under Muon.
    pub fn moments(&self, name: &str, shape: &[usize]) -> usize {
        if self.takes_muon(name, shape) { 1 } else { 2 }
    }

    fn takes_muon(&self, name: &str, shape: &[usize]) -> bool {
        let matrix = matches!(*shape, [rows, columns] if rows.min(columns) >= muon::SMALLEST_SIDE);
        matrix && self.muon.iter().any(|part| name.contains(part))
    }
}

/// The optimiser of a run.
pub struct Optimiser {
    config: OptimiserConfig,
    slots: Vec<Slot>,
    /// Slots of matrices that Muon updates together, by their shorter and longer side.
    groups: BTreeMap<(usize, usize), Vec<usize>>,
    clipper: Clipper,
    device: Device,
}

struct Slot {
    name: String,
    weight: Var,
    /// Both moments of AdamW, `[2, ..shape of the weight]`; the momentum of Muon, `[1, rows, columns]`.
    moments: Tensor,
    rule: Rule,
    /// Whether it is updated here; of several ranks each may have its own.
    owned: bool,
}

#[derive(Clone, Copy)]
enum Rule {
    AdamW { decays: bool },
    Muon,
}

/// The gradients of one step, one per parameter in the order of their names; none where the loss does not depend on it.
#[derive(Clone)]
pub struct Gradients(Vec<Option<Tensor>>);

impl Optimiser {
    /// An optimiser of all parameters that exist, with zero moments.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn new(params: &Params, config: OptimiserConfig) -> Result<Self> {
        let mut groups: BTreeMap<_, Vec<usize>> = BTreeMap::new();
        let mut slots = Vec::new();
        for (index, (name, weight)) in params.vars().into_iter().enumerate() {
            let slot = match *weight.dims() {
                [rows, columns] if config.takes_muon(&name, weight.dims()) => {
                    groups
                        .entry((rows.min(columns), rows.max(columns)))
                        .or_default()
                        .push(index);
                    Slot {
                        moments: Tensor::zeros((1, rows, columns), DType::F32, weight.device())?,
                        rule: Rule::Muon,
                        name,
                        weight,
                        owned: true,
                    }
                }
                _ => Slot {
                    moments: zero_moments(&weight)?,
                    rule: Rule::AdamW {
                        decays: weight.rank() >= 2,
                    },
                    name,
                    weight,
                    owned: true,
                },
            };
            slots.push(slot);
        }
        let limit = (config.clip > 0.0).then_some(config.clip);
        Ok(Self {
            config,
            slots,
            groups,
            clipper: Clipper::new(limit, params.device())?,
            device: params.device().clone(),
        })
    }

    /// Whether the updates of some matrices are to be those of Muon, which looks at them as a whole.
    pub(super) fn needs_whole_matrices(&self) -> bool {
        !self.config.muon.is_empty()
    }

    /// Leaves the parameters `others` to other ranks: their moments are given up, and they are not updated here. By their number
    /// in the order of names.
    ///
    /// # Errors
    /// The device failed.
    pub(super) fn leave(&mut self, others: impl Fn(usize) -> bool) -> Result<()> {
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if others(index) {
                slot.owned = false;
                slot.moments = Tensor::zeros(0, DType::F32, &self.device)?;
            }
        }
        Ok(())
    }

    /// Name, weight and shape of the moments of each parameter, in the order of names.
    pub(super) fn layout(&self) -> Vec<(String, Var, Vec<usize>)> {
        let of = |slot: &Slot| {
            let first = match slot.rule {
                Rule::AdamW { .. } => 2,
                Rule::Muon => 1,
            };
            let shape = [&[first], slot.weight.dims()].concat();
            (format!("{MOMENTS}{}", slot.name), slot.weight.clone(), shape)
        };
        self.slots.iter().map(of).collect()
    }

    /// How many updates were made and skipped; waits for the device.
    ///
    /// # Errors
    /// The device failed.
    pub fn counts(&self) -> Result<Counts> {
        self.clipper.counts()
    }

    /// Picks the gradients of the parameters out of a backward pass.
    pub fn gradients(&self, mut store: GradStore) -> Gradients {
        // Detached, because a gradient may hold the graph of its own computation.
        Gradients(
            self.slots
                .iter()
                .map(|slot| store.remove(&slot.weight).map(|g| g.detach()))
                .collect(),
        )
    }

    /// Makes one update at learning rate `lr`, with the gradients clipped; none where their norm is not finite. Answers
    /// the norm and that decision, on the device.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn update(&mut self, gradients: &Gradients, lr: f64) -> Result<Clip> {
        self.update_of_norm(gradients, None, lr)
    }

    /// As [`Self::update`], where other ranks have some of the gradients and the norm of all of them is `norm` `[1]`.
    ///
    /// # Errors
    /// As [`Self::update`].
    pub(super) fn update_of_norm(
        &mut self,
        gradients: &Gradients,
        norm: Option<&Tensor>,
        lr: f64,
    ) -> Result<Clip> {
        let nothing = Tensor::zeros(1, DType::F32, &self.device)?;
        let mut all: Vec<&Tensor> = match norm {
            Some(norm) => vec![norm],
            None => gradients.0.iter().flatten().collect(),
        };
        if all.is_empty() {
            all.push(&nothing);
        }
        let clip = self.clipper.measure(&all)?;
        let OptimiserConfig {
            beta1,
            beta2,
            eps,
            weight_decay,
            ..
        } = self.config;
        for (decays, weight_decay) in [(true, weight_decay), (false, 0.0)] {
            let slots: Vec<fused::Slot> = self
                .slots
                .iter()
                .zip(&gradients.0)
                .filter_map(|(slot, gradient)| match slot.rule {
                    Rule::AdamW { decays: own } if own == decays && slot.owned => {
                        Some(fused::Slot::new(&slot.weight, &slot.moments, gradient.as_ref()?))
                    }
                    _ => None,
                })
                .collect();
            let step = fused::AdamW {
                lr,
                beta1,
                beta2,
                eps,
                weight_decay,
            };
            step.step_clipped(&slots, &clip)?;
        }
        for (&(_, longer), group) in &self.groups {
            let length = lr * self.config.muon_size * (longer as f64).sqrt();
            self.update_group(group, gradients, &clip, length, lr)?;
        }
        Ok(clip)
    }

    /// Muon's update, of length `length`, of matrices that have the same sides; tall ones are turned.
    fn update_group(
        &self,
        group: &[usize],
        gradients: &Gradients,
        clip: &Clip,
        length: f64,
        lr: f64,
    ) -> Result<()> {
        let (mut slots, mut directions) = (Vec::new(), Vec::new());
        for &index in group {
            let (slot, Some(gradient)) = (&self.slots[index], &gradients.0[index]) else {
                continue;
            };
            if !slot.owned {
                continue;
            }
            let gradient = gradient.broadcast_mul(clip.factor())?;
            let momentum = slot.moments.squeeze(0)?;
            follow(&[(&momentum, &gradient)], muon::MOMENTUM, 1.0, clip)?;
            let direction = ((momentum * muon::MOMENTUM)? + (gradient * (1.0 - muon::MOMENTUM))?)?;
            directions.push(if slot.is_tall() { direction.t()? } else { direction });
            slots.push(slot);
        }
        if slots.is_empty() {
            return Ok(());
        }
        let updates = (muon::orthogonal(&Tensor::stack(&directions, 0)?)? * length)?;
        let taken = clip.taken()?;
        for (i, slot) in slots.into_iter().enumerate() {
            let update = updates.get(i)?;
            let update = if slot.is_tall() { update.t()? } else { update };
            let weight = slot.weight.as_detached_tensor();
            let moved = ((&weight * (1.0 - lr * self.config.weight_decay))? - update)?;
            let taken = taken.broadcast_as(weight.shape())?;
            slot.weight.set(&taken.where_cond(&moved, &weight)?)?;
        }
        Ok(())
    }

    /// The moments by name: `moments.NAME`, `[2, ..shape of the weight]` or, under Muon, `[1, rows, columns]`.
    pub fn moments(&self) -> BTreeMap<String, Tensor> {
        self.slots
            .iter()
            .filter(|slot| slot.owned)
            .map(|slot| (format!("{MOMENTS}{}", slot.name), slot.moments.clone()))
            .collect()
    }

    /// Takes up the moments and the counts of another optimiser of the same parameters.
    ///
    /// # Errors
    /// A moment is missing or has another shape.
    pub fn restore(&mut self, moments: &BTreeMap<String, Tensor>, counts: Counts) -> Result<()> {
        for slot in self.slots.iter_mut().filter(|slot| slot.owned) {
            let name = format!("{MOMENTS}{}", slot.name);
            let Some(tensor) = moments.get(&name) else {
                candle_core::bail!("no tensor `{name}`")
            };
            if tensor.shape() != slot.moments.shape() {
                let (found, expected) = (tensor.dims(), slot.moments.dims());
                candle_core::bail!("`{name}`: found shape {found:?}, expected {expected:?}");
            }
            // A copy of its own, because updates happen in place.
            slot.moments = tensor
                .to_dtype(DType::F32)?
                .to_device(slot.weight.device())?
                .copy()?;
        }
        self.clipper.restore(counts)
    }
}

impl Slot {
    fn is_tall(&self) -> bool {
        matches!(*self.weight.dims(), [rows, columns] if rows > columns)
    }
}

impl Gradients {
    /// Those that there are, in the order of the names of their parameters.
    pub(super) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.0.iter().flatten()
    }

    /// One for each parameter, in the order of their names.
    pub(super) fn slots(&mut self) -> &mut [Option<Tensor>] {
        &mut self.0
    }

    /// Puts what `make` makes of each in its place, in the same order.
    pub(super) fn replace(&mut self, mut make: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<()> {
        for gradient in self.0.iter_mut().flatten() {
            *gradient = make(gradient)?;
        }
        Ok(())
    }

    /// Adds the gradients of another part of the batch.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn add(&mut self, other: Self) -> Result<()> {
        for (sum, more) in self.0.iter_mut().zip(other.0) {
            *sum = match (sum.take(), more) {
                (Some(sum), Some(more)) => Some((sum + more)?),
                (sum, more) => sum.or(more),
            };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_nn::Init;

    fn model() -> Params {
        let params = Params::random(5, &Device::Cpu);
        let randn = Init::Randn {
            mean: 0.0,
            stdev: 1.0,
        };
        params.builder().get_with_hints((3, 4), "matrix", randn).unwrap();
        params.builder().get_with_hints(4, "vector", randn).unwrap();
        params.builder().get_with_hints((2, 2), "unused", randn).unwrap();
        params
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The formulas of the file's head, element by element in f64.
    #[test]
    fn equals_the_formulas() {
        let params = model();
        let config = OptimiserConfig {
            clip: 0.5,
            weight_decay: 0.1,
            ..OptimiserConfig::default()
        };
        let mut optimiser = Optimiser::new(&params, config).unwrap();
        let vars = params.vars();
        let unused = values(&vars["unused"]);
        let wide = |name: &str| values(&vars[name]).into_iter().map(f64::from).collect::<Vec<_>>();
        let mut expected: Vec<(&str, f64, Vec<f64>)> =
            vec![("matrix", 0.1, wide("matrix")), ("vector", 0.0, wide("vector"))];
        let mut moments = vec![vec![(0.0, 0.0); 12], vec![(0.0, 0.0); 4]];
        for t in 1..=5 {
            // Half the sum of squares: the gradient is the parameter itself.
            let loss = (vars["matrix"].sqr().unwrap().sum_all().unwrap()
                + vars["vector"].sqr().unwrap().sum_all().unwrap())
            .unwrap();
            let gradients = optimiser.gradients((loss * 0.5).unwrap().backward().unwrap());
            let clip = optimiser.update(&gradients, 0.01).unwrap();
            let norm = f64::from(clip.norm().to_vec1::<f32>().unwrap()[0]);
            let exact = expected
                .iter()
                .flat_map(|(_, _, w)| w)
                .map(|w| w * w)
                .sum::<f64>()
                .sqrt();
            assert!((norm - exact).abs() < 1e-5 * exact);
            for ((_, decay, weights), moments) in expected.iter_mut().zip(&mut moments) {
                for (w, (m, v)) in weights.iter_mut().zip(moments) {
                    let g = *w * (0.5 / exact).min(1.0);
                    *m = 0.9 * *m + 0.1 * g;
                    *v = 0.99 * *v + 0.01 * g * g;
                    let (m, v) = (*m / (1.0 - 0.9f64.powi(t)), *v / (1.0 - 0.99f64.powi(t)));
                    *w = *w * (1.0 - 0.01 * *decay) - 0.01 * m / (v.sqrt() + 1e-8);
                }
            }
        }
        for (name, _, weights) in &expected {
            for (found, expected) in values(&vars[*name]).iter().zip(weights) {
                assert!(
                    (f64::from(*found) - expected).abs() < 1e-5,
                    "{name}: {found} {expected}"
                );
            }
        }
        assert_eq!(unused, values(&vars["unused"]));
        assert_eq!(optimiser.counts().unwrap().made, 5);
    }

    /// Named matrices move along the orthogonal factor of their momentum, wide and tall alike; the rest as before.
    #[test]
    fn muon_takes_the_matrices_that_it_is_given() {
        let params = Params::random(6, &Device::Cpu);
        let randn = Init::Randn {
            mean: 0.0,
            stdev: 1.0,
        };
        let shapes = [
            ("blocks.wide", (32, 48)),
            ("blocks.tall", (48, 32)),
            ("blocks.thin", (6, 48)),
            ("head", (32, 48)),
        ];
        for (name, shape) in shapes {
            params.builder().get_with_hints(shape, name, randn).unwrap();
        }
        let vars = params.vars();
        let loss = || {
            let sums = shapes.map(|(name, _)| vars[name].sqr().unwrap().sum_all().unwrap());
            (Tensor::stack(&sums, 0).unwrap().sum_all().unwrap() * 0.5).unwrap()
        };
        let config = OptimiserConfig {
            muon: vec!["blocks.".into()],
            eps: 1e-12,
            weight_decay: 0.5,
            clip: 0.0,
            ..OptimiserConfig::default()
        };
        let (lr, mut optimiser) = (0.01, Optimiser::new(&params, config).unwrap());
        let before = |name: &str| vars[name].as_detached_tensor().copy().unwrap();
        let (wide, tall, thin, head) = (
            before("blocks.wide"),
            before("blocks.tall"),
            before("blocks.thin"),
            before("head"),
        );
        let gradients = optimiser.gradients(loss().backward().unwrap());
        optimiser.update(&gradients, lr).unwrap();
        let apart = |a: &Tensor, b: &Tensor| {
            let most = (a - b).unwrap().abs().unwrap().max_all().unwrap();
            most.to_scalar::<f32>().unwrap()
        };
        let moved = |w: &Tensor| {
            let direction = muon::orthogonal(&w.unsqueeze(0).unwrap())
                .unwrap()
                .squeeze(0)
                .unwrap();
            ((w * (1.0 - lr * 0.5)).unwrap() - (direction * (lr * 48f64.sqrt())).unwrap()).unwrap()
        };
        assert!(apart(&vars["blocks.wide"], &moved(&wide)) < 1e-5);
        let turned = moved(&tall.t().unwrap().contiguous().unwrap()).t().unwrap();
        assert!(apart(&vars["blocks.tall"], &turned) < 1e-5);
        // AdamW's first step has the length of the learning rate.
        for (name, w) in [("blocks.thin", thin), ("head", head)] {
            let step = ((w * (1.0 - lr * 0.5)).unwrap() - vars[name].as_tensor()).unwrap();
            let size = step.abs().unwrap();
            let far = apart(&size, &(size.ones_like().unwrap() * lr).unwrap());
            assert!(far < 1e-5, "{name}: {far}");
        }
        // A second optimiser goes on from the moments of the first.
        let mut other = Optimiser::new(&params, optimiser.config.clone()).unwrap();
        let counts = optimiser.counts().unwrap();
        other.restore(&optimiser.moments(), counts).unwrap();
        assert_eq!(other.counts().unwrap(), counts);
        let found = other.moments();
        for (name, moments) in optimiser.moments() {
            assert_eq!(values(&moments), values(&found[&name]), "{name}");
        }
        let plain = Optimiser::new(&params, OptimiserConfig::default())
            .unwrap()
            .moments();
        let message = other.restore(&plain, counts).unwrap_err().to_string();
        assert!(message.contains("moments.blocks.tall"), "{message}");
        // Gradients without a finite norm change neither weights nor moments, by either rule.
        let all = |optimiser: &Optimiser| {
            let weights = vars.iter().map(|(name, var)| (name.clone(), values(var)));
            let moments = optimiser.moments();
            let moments = moments
                .iter()
                .map(|(name, tensor)| (name.clone(), values(tensor)));
            weights.chain(moments).collect::<Vec<_>>()
        };
        let before = all(&optimiser);
        let endless = (loss() * f64::INFINITY).unwrap();
        let clip = optimiser
            .update(&optimiser.gradients(endless.backward().unwrap()), lr)
            .unwrap();
        assert_eq!(clip.taken().unwrap().to_vec1::<u8>().unwrap(), [0]);
        assert_eq!(all(&optimiser), before);
        let counts = optimiser.counts().unwrap();
        assert_eq!((counts.made, counts.skipped), (1, 1));
    }

    #[test]
    fn gradients_of_parts_add_up() {
        let params = model();
        let mut optimiser = Optimiser::new(&params, OptimiserConfig::default()).unwrap();
        let vars = params.vars();
        let of = |name: &str, factor: f64| {
            let loss = (vars[name].sum_all().unwrap() * factor).unwrap();
            optimiser.gradients(loss.backward().unwrap())
        };
        let mut sum = of("vector", 2.0);
        sum.add(of("vector", 3.0)).unwrap();
        sum.add(of("matrix", 1.0)).unwrap();
        let clip = optimiser.update(&sum, 0.0).unwrap();
        let norm = clip.norm().to_vec1::<f32>().unwrap()[0];
        assert!((norm - (4.0 * 25.0 + 12.0f32).sqrt()).abs() < 1e-4);
    }
}
