//! Checkpoints whose tensors have other names, or other forms, than those that the networks ask for.

use std::sync::Arc;

use candle_core::{D, DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

/// How a tensor lies in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    /// Under this name.
    As(String),
    /// A matrix [O, I] as a convolution [O, I, 1, 1] under this name.
    Pointwise(String),
    /// A kernel as its direction and its length a slice of the first axis: `length direction / |direction|` (weight normalisation).
    Normed {
        /// Of the lengths, [O, 1, ..].
        length: String,
        /// Of the directions, as large as the kernel.
        direction: String,
    },
}

/// From names that networks ask for to what lies in the file.
pub(super) type Translation = Arc<dyn Fn(&str) -> Stored + Send + Sync>;

/// A builder that finds tensors of `inner` by other names.
pub(super) fn translated<'a>(inner: &VarBuilder<'a>, names: Translation) -> VarBuilder<'a> {
    let (dtype, device) = (inner.dtype(), inner.device().clone());
    let backend = Translated {
        inner: inner.clone(),
        names,
    };
    VarBuilder::from_backend(Box::new(backend), dtype, device)
}

struct Translated<'a> {
    inner: VarBuilder<'a>,
    names: Translation,
}

impl SimpleBackend for Translated<'_> {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let get = |shape: &[usize], name: &str, init| {
            self.inner
                .get_with_hints_dtype(shape, name, init, dtype)?
                .to_device(device)
        };
        match (self.names)(name) {
            Stored::As(name) => get(shape.dims(), &name, init),
            Stored::Pointwise(name) => {
                let stored = [shape.dims(), &[1, 1]].concat();
                // Not a reshape, which would give an outline memory.
                get(&stored, &name, init)?.squeeze(D::Minus1)?.squeeze(D::Minus1)
            }
            Stored::Normed { length, direction } => {
                let mut lengths = vec![1; shape.rank()];
                if let Some((first, size)) = lengths.first_mut().zip(shape.dims().first()) {
                    *first = *size;
                }
                let length = get(&lengths, &length, Init::Const(1.0))?;
                let direction = get(shape.dims(), &direction, init)?;
                // Weights without values, of an outline, are one zero seen at every place, and must not come to take memory.
                match direction.is_contiguous() {
                    true => with_length(&direction, &length),
                    false => Ok(direction),
                }
            }
        }
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        match (self.names)(name) {
            Stored::As(name) => self.inner.get_unchecked_dtype(&name, dtype)?.to_device(device),
            other => {
                candle_core::bail!("parameter `{name}`: lies in the file as {other:?}, its shape is needed")
            }
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        match (self.names)(name) {
            Stored::As(name) | Stored::Pointwise(name) => self.inner.contains_tensor(&name),
            Stored::Normed { length, direction } => {
                self.inner.contains_tensor(&length) && self.inner.contains_tensor(&direction)
            }
        }
    }
}

/// `length direction / |direction|`, slice by slice of the first axis.
fn with_length(direction: &Tensor, length: &Tensor) -> Result<Tensor> {
    let rows = direction.flatten_from(1)?.to_dtype(DType::F32)?;
    let norm = rows.sqr()?.sum_keepdim(1)?.sqrt()?.reshape(length.shape())?;
    let factor = (length.to_dtype(DType::F32)? / norm)?;
    let scaled = direction.to_dtype(DType::F32)?.broadcast_mul(&factor)?;
    scaled.to_dtype(direction.dtype())
}

/// `name` with `from` replaced by `to` where it begins with it, at a dot or as a whole.
pub(super) fn below<'a>(name: &'a str, prefix: &str) -> Option<&'a str> {
    name.strip_prefix(prefix)?.strip_prefix('.')
}

/// The number before the first dot, and what follows it.
pub(super) fn indexed(name: &str) -> Option<(usize, &str)> {
    let (index, rest) = name.split_once('.')?;
    Some((index.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_lightnet::params::{Outline, Params};

    fn translation(name: &str) -> Stored {
        match below(name, "a") {
            Some("weight") => Stored::Pointwise("square.weight".into()),
            Some("normed") => Stored::Normed {
                length: "g".into(),
                direction: "v".into(),
            },
            Some(rest) => Stored::As(format!("b.{rest}")),
            None => Stored::As(name.to_owned()),
        }
    }

    #[test]
    fn tensors_are_found_by_the_names_of_the_file() -> Result<()> {
        let outline = Outline::new();
        let vb = translated(&outline.builder(), Arc::new(translation));
        assert_eq!(vb.pp("a").get((3, 2), "weight")?.dims(), [3, 2]);
        vb.pp("a").get(3, "bias")?;
        vb.pp("a").get((3, 2, 5), "normed")?;
        vb.get(1, "ab")?;
        let shapes = outline.shapes();
        let found: Vec<(&str, &[usize])> = shapes.iter().map(|(n, s)| (n.as_str(), s.as_slice())).collect();
        let expected: [(&str, &[usize]); 5] = [
            ("ab", &[1]),
            ("b.bias", &[3]),
            ("g", &[3, 1, 1]),
            ("square.weight", &[3, 2, 1, 1]),
            ("v", &[3, 2, 5]),
        ];
        assert_eq!(found, expected);
        Ok(())
    }

    #[test]
    fn lengths_and_directions_make_kernels() -> Result<()> {
        let params = Params::random(1, &Device::Cpu);
        let vb = translated(&params.builder(), Arc::new(translation));
        let init = Init::Randn {
            mean: 0.0,
            stdev: 1.0,
        };
        let kernel = vb
            .get_with_hints((3, 2, 5), "a.normed", init)?
            .flatten_from(1)?
            .to_vec2::<f32>()?;
        let vars = params.vars();
        vars["g"].set(&Tensor::new(&[1f32, 2.0, 0.5], &Device::Cpu)?.reshape((3, 1, 1))?)?;
        let scaled = vb.get((3, 2, 5), "a.normed")?.flatten_from(1)?.to_vec2::<f32>()?;
        for (row, (plain, length)) in scaled.iter().zip(kernel.iter().zip([1f32, 2.0, 0.5])) {
            let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
            assert!((norm - length).abs() < 1e-6, "{norm}");
            assert!((row[3] - plain[3] * length).abs() < 1e-6);
        }
        Ok(())
    }
}
