//! A moving average of the weights: what is validated, sampled and exported.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor, Var};
use fulgur_kernels::adamw::Clip;
use fulgur_kernels::average::follow;
use fulgur_lightnet::params::Params;

/// The average early in a run has the memory of a tenth of the steps so far, so that it forgets the initial weights.
const EARLY: f64 = 10.0;

/// `shadow += (1 - d) (weight - shadow)` with `d = min(decay, (1 + n) / (10 + n))`, `n` updates before this one.
pub struct Ema {
    decay: f64,
    pairs: BTreeMap<String, (Var, Var)>,
}

impl Ema {
    /// Starts at the present weights.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn new(params: &Params, decay: f64) -> Result<Self> {
        let pair = |(name, var): (String, Var)| -> Result<_> {
            let shadow = Var::from_tensor(&var.as_tensor().copy()?)?;
            Ok((name, (var, shadow)))
        };
        Ok(Self {
            decay,
            pairs: params.vars().into_iter().map(pair).collect::<Result<_>>()?,
        })
    }

    /// Follows only the weights whose number, in the order of names, is one that `which` says; other ranks follow the others.
    pub(super) fn keep(&mut self, which: impl Fn(usize) -> bool) {
        let mut index = 0;
        self.pairs.retain(|_, _| {
            index += 1;
            which(index - 1)
        });
    }

    /// Moves the average towards the weights after the update of `clip`, unless that was skipped. Waits for nothing.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn update(&mut self, clip: &Clip) -> Result<()> {
        let pairs: Vec<_> = self
            .pairs
            .values()
            .map(|(weight, shadow)| (shadow.as_tensor(), weight.as_tensor()))
            .collect();
        follow(&pairs, self.decay, EARLY, clip)
    }

    /// The averaged weights by name.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        self.pairs
            .iter()
            .map(|(name, (_, shadow))| (name.clone(), shadow.as_detached_tensor()))
            .collect()
    }

    /// Replaces the averages by `tensors`, which have the names and shapes of the weights.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn restore(&mut self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        for (name, (_, shadow)) in &self.pairs {
            let Some(tensor) = tensors.get(name) else {
                candle_core::bail!("no average of `{name}`")
            };
            shadow.set(&tensor.to_device(shadow.device())?.copy()?)?;
        }
        Ok(())
    }

    /// Runs `work` while the model holds the averaged weights; afterwards it holds its own again, whatever `work` did.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn during<T>(&self, work: impl FnOnce() -> T) -> Result<T> {
        let mut own = Vec::with_capacity(self.pairs.len());
        for (weight, shadow) in self.pairs.values() {
            own.push(weight.as_tensor().copy()?);
            weight.set(shadow.as_tensor())?;
        }
        let result = work();
        for ((weight, _), own) in self.pairs.values().zip(own) {
            weight.set(&own)?;
        }
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use fulgur_kernels::adamw::{Clipper, Counts};

    #[test]
    fn follows_the_weights_and_gives_them_back() {
        let params = Params::random(1, &Device::Cpu);
        params.builder().get(1, "w").unwrap();
        let weight = &params.vars()["w"];
        let read = |t: &Tensor| t.to_vec1::<f32>().unwrap()[0];
        let mut ema = Ema::new(&params, 0.5).unwrap();
        weight.set(&Tensor::new(&[8f32], &Device::Cpu).unwrap()).unwrap();
        let mut clipper = Clipper::new(None, &Device::Cpu).unwrap();
        let mut after = |gradient: f32, updates: u32| {
            let counts = Counts {
                made: updates,
                ..Counts::default()
            };
            clipper.restore(counts).unwrap();
            let gradient = Tensor::new(&[gradient], &Device::Cpu).unwrap();
            clipper.measure(&[&gradient]).unwrap()
        };
        ema.update(&after(1.0, 0)).unwrap();
        assert_eq!(read(&ema.tensors()["w"]), 8.0 * 0.9);
        ema.update(&after(1.0, 1000)).unwrap();
        assert!((read(&ema.tensors()["w"]) - 7.6).abs() < 1e-6);
        let before = read(&ema.tensors()["w"]);
        ema.update(&after(f32::NAN, 1001)).unwrap();
        assert_eq!(read(&ema.tensors()["w"]), before);
        let inside = ema.during(|| read(&params.vars()["w"])).unwrap();
        assert!((inside - 7.6).abs() < 1e-6);
        assert_eq!(read(weight), 8.0);
    }
}
