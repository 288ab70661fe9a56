//! AdamW (Loshchilov and Hutter, 2019) over the parameters of a model, with moments that can be saved.
//!
//! ```text
//! m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
//! w <- (1 - lr wd) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
//! ```
//!
//! `g` is the gradient scaled so that the norm over all parameters is at most `clip`; vectors (biases, gains) do not
//! decay.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use fulgur_kernels::adamw::{self as fused, GradientScale, squared_norm, zero_moments};
use fulgur_lightnet::params::Params;
use serde::{Deserialize, Serialize};

/// Guards the division by the norm.
const TINY: f64 = 1e-6;
const MOMENTS: &str = "moments.";

/// The constants of AdamW.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
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
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.01,
            clip: 1.0,
        }
    }
}

/// The optimiser of a run.
pub struct AdamW {
    config: AdamWConfig,
    slots: Vec<Slot>,
    updates: u64,
}

struct Slot {
    name: String,
    weight: Var,
    /// Both moments, `[2, ..shape of the weight]`.
    moments: Tensor,
    decays: bool,
}

/// The gradients of one step, one per parameter in the order of their names; none where the loss does not depend on it.
pub struct Gradients(Vec<Option<Tensor>>);

impl AdamW {
    /// An optimiser of all parameters that exist, with zero moments.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn new(params: &Params, config: AdamWConfig) -> Result<Self> {
        let slot = |(name, weight): (String, Var)| -> Result<Slot> {
            let moments = zero_moments(&weight)?;
            Ok(Slot {
                name,
                decays: weight.rank() >= 2,
                moments,
                weight,
            })
        };
        Ok(Self {
            config,
            slots: params.vars().into_iter().map(slot).collect::<Result<_>>()?,
            updates: 0,
        })
    }

    /// How many updates were made.
    pub fn updates(&self) -> u64 {
        self.updates
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

    /// Makes one update at learning rate `lr` with gradients of the given norm, and clips them.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn update(&mut self, gradients: &Gradients, norm: f64, lr: f64) -> Result<()> {
        self.updates += 1;
        let AdamWConfig {
            beta1,
            beta2,
            eps,
            weight_decay,
            clip,
            ..
        } = self.config;
        let scale = if clip > 0.0 {
            (clip / (norm + TINY)).min(1.0)
        } else {
            1.0
        };
        for (slot, gradient) in self.slots.iter().zip(&gradients.0) {
            if let Some(gradient) = gradient {
                let weight_decay = if slot.decays { weight_decay } else { 0.0 };
                let step = fused::AdamW {
                    lr,
                    beta1,
                    beta2,
                    eps,
                    weight_decay,
                };
                let scale = GradientScale::Host(scale);
                step.step(&slot.weight, &slot.moments, gradient, self.updates, scale)?;
            }
        }
        Ok(())
    }

    /// The moments by name: `moments.NAME`, `[2, ..shape of the weight]`.
    pub fn moments(&self) -> BTreeMap<String, Tensor> {
        self.slots
            .iter()
            .map(|slot| (format!("{MOMENTS}{}", slot.name), slot.moments.clone()))
            .collect()
    }

    /// Takes up the moments and the count of updates of another optimiser of the same parameters.
    ///
    /// # Errors
    /// A moment is missing or has another shape.
    pub fn restore(&mut self, moments: &BTreeMap<String, Tensor>, updates: u64) -> Result<()> {
        for slot in &mut self.slots {
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
        self.updates = updates;
        Ok(())
    }
}

impl Gradients {
    /// The norm over all gradients, a scalar on `device`.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn norm(&self, device: &Device) -> Result<Tensor> {
        let all: Vec<&Tensor> = self.0.iter().flatten().collect();
        if all.is_empty() {
            return Tensor::zeros((), DType::F32, device);
        }
        squared_norm(&all)?.sqrt()?.reshape(())
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
        let config = AdamWConfig {
            clip: 0.5,
            weight_decay: 0.1,
            ..AdamWConfig::default()
        };
        let mut optimiser = AdamW::new(&params, config).unwrap();
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
            let norm = f64::from(gradients.norm(&Device::Cpu).unwrap().to_scalar::<f32>().unwrap());
            let exact = expected
                .iter()
                .flat_map(|(_, _, w)| w)
                .map(|w| w * w)
                .sum::<f64>()
                .sqrt();
            assert!((norm - exact).abs() < 1e-5 * exact);
            optimiser.update(&gradients, norm, 0.01).unwrap();
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
        assert_eq!(optimiser.updates(), 5);
    }

    #[test]
    fn gradients_of_parts_add_up() {
        let params = model();
        let optimiser = AdamW::new(&params, AdamWConfig::default()).unwrap();
        let vars = params.vars();
        let of = |name: &str, factor: f64| {
            let loss = (vars[name].sum_all().unwrap() * factor).unwrap();
            optimiser.gradients(loss.backward().unwrap())
        };
        let mut sum = of("vector", 2.0);
        sum.add(of("vector", 3.0)).unwrap();
        sum.add(of("matrix", 1.0)).unwrap();
        let norm = sum.norm(&Device::Cpu).unwrap().to_scalar::<f32>().unwrap();
        assert!((norm - (4.0 * 25.0 + 12.0f32).sqrt()).abs() < 1e-4);
    }
}
