//! The names and shapes of a model's parameters without their values: what a model would need, before it is built.
//!
//! ```
//! # fn main() -> candle_core::Result<()> {
//! use fulgur_lightnet::params::Outline;
//! let outline = Outline::new();
//! // Four terabytes, if they were there.
//! candle_nn::linear(1 << 20, 1 << 20, outline.builder().pp("head"))?;
//! assert_eq!(outline.count(), (1 << 40) + (1 << 20));
//! assert_eq!(outline.shapes()["head.weight"], [1 << 20, 1 << 20]);
//! # Ok(()) }
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

/// A store like [`Params`](super::Params) that notes down what layers ask for and gives out zeros: one zero that is seen
/// at every place, so that no tensor takes memory. Layers can be built on it and looked at; running them means nothing.
/// Clones share what was noted.
#[derive(Clone, Debug, Default)]
pub struct Outline {
    shapes: Arc<Mutex<BTreeMap<String, Vec<usize>>>>,
}

impl Outline {
    /// An outline of nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A builder for layers, f32 on the CPU.
    pub fn builder(&self) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), DType::F32, Device::Cpu)
    }

    /// Shapes by full name, of all parameters that were asked for.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.lock().clone()
    }

    /// How many values all parameters hold together; the largest number there is where it would be larger.
    pub fn count(&self) -> u64 {
        let values = |shape: &Vec<usize>| values_of(shape);
        self.lock().values().map(values).fold(0, u64::saturating_add)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Vec<usize>>> {
        // The map is whole after any panic: entries are inserted complete.
        self.shapes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many values a tensor of this shape holds; the largest number there is where it would be larger.
pub fn values_of(shape: &[usize]) -> u64 {
    shape.iter().fold(1, |all, &n| all.saturating_mul(n as u64))
}

/// The scalar zero, seen at every place of `shape`.
fn zeros(shape: &[usize], device: &Device) -> candle_core::Result<Tensor> {
    Tensor::zeros((), DType::F32, device)?.broadcast_as(shape)
}

impl SimpleBackend for Outline {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        if dtype != DType::F32 {
            candle_core::bail!(
                "parameter `{name}`: asked for as {dtype:?}, outlines are those of f32 parameters"
            );
        }
        let mut shapes = self.lock();
        let known = shapes
            .entry(name.to_owned())
            .or_insert_with(|| shape.dims().to_vec());
        if known != shape.dims() {
            candle_core::bail!("parameter `{name}`: exists with shape {known:?}, asked for as {shape:?}");
        }
        zeros(known, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        match self.lock().get(name) {
            Some(shape) if dtype == DType::F32 => zeros(shape, device),
            Some(_) => {
                candle_core::bail!(
                    "parameter `{name}`: asked for as {dtype:?}, outlines are those of f32 parameters"
                )
            }
            None => candle_core::bail!("parameter `{name}`: asked for without a shape before it exists"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.lock().contains_key(name)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Params;
    use super::*;
    use crate::block::{Block, BlockConfig};

    fn block(width: usize) -> BlockConfig {
        BlockConfig {
            dim: width,
            heads: 4,
            head_dim: 6,
            hidden: 2 * width,
            lrpe: Some((2, 5)),
            token_shift: true,
            context: Some(10),
            modulated: true,
        }
    }

    #[test]
    fn names_and_shapes_are_those_of_the_real_parameters() {
        let (outline, params) = (Outline::new(), Params::random(1, &Device::Cpu));
        Block::new(block(32), &outline.builder().pp("blocks").pp(0)).unwrap();
        Block::new(block(32), &params.builder().pp("blocks").pp(0)).unwrap();
        let real: BTreeMap<_, _> = params
            .vars()
            .into_iter()
            .map(|(name, var)| (name, var.dims().to_vec()))
            .collect();
        assert!(real.len() > 10);
        assert_eq!(outline.shapes(), real);
        assert_eq!(outline.count(), params.count() as u64);
    }

    #[test]
    fn tensors_of_any_size_take_no_memory() {
        let outline = Outline::new();
        // 64 blocks of 10^5 channels are several terabytes.
        for i in 0..64 {
            Block::new(block(100_000), &outline.builder().pp(i)).unwrap();
        }
        assert!(outline.count() > 1 << 42, "{}", outline.count());
        let tensor = outline.builder().get((1 << 40, 3), "w").unwrap();
        assert_eq!((tensor.dims(), tensor.stride()), (&[1 << 40, 3][..], &[0, 0][..]));
        assert_eq!(values_of(&[usize::MAX, 3]), u64::MAX);
    }

    #[test]
    fn what_the_real_store_refuses_is_refused() {
        let outline = Outline::new();
        let vb = outline.builder();
        let words = |result: candle_core::Result<Tensor>| result.unwrap_err().to_string();
        assert!(words(vb.get_unchecked("w")).contains("before it exists"));
        vb.get(3, "w").unwrap();
        assert!(words(vb.get(4, "w")).contains("exists with shape [3]"));
        assert!(words(vb.to_dtype(DType::F16).get(3, "w")).contains("asked for as F16"));
        assert!(vb.contains_tensor("w") && !vb.contains_tensor("v"));
        assert_eq!(outline.shapes(), BTreeMap::from([("w".to_owned(), vec![3])]));
    }
}
