//! Affine maps with weights `[out, in]`, as every checkpoint of the field stores them.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use fulgur_kernels::linear::{joined, linear};

/// How a map starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Start {
    /// Normal with standard deviation `in^-1/2`: keeps the variance of its input.
    FanIn,
    /// Normal with the given standard deviation.
    Normal(f64),
    /// All zero: the branch behind it starts silent.
    Zero,
}

/// `y = x W^T + b` over the last dimension.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// Takes `weight` `[output, input]` from `vb`, and `bias` `[output]` when asked for.
    pub fn new(input: usize, output: usize, bias: bool, start: Start, vb: &VarBuilder) -> Result<Self> {
        let init = match start {
            Start::FanIn => Init::Randn {
                mean: 0.0,
                stdev: (input as f64).powf(-0.5),
            },
            Start::Normal(stdev) => Init::Randn { mean: 0.0, stdev },
            Start::Zero => Init::Const(0.0),
        };
        let weight = vb.get_with_hints((output, input), "weight", init)?;
        let bias = bias
            .then(|| vb.get_with_hints(output, "bias", Init::Const(0.0)))
            .transpose()?;
        Ok(Self { weight, bias })
    }

    /// The weight, `[output, input]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias, where there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Width of the result.
    pub fn output(&self) -> usize {
        self.weight.dims()[0]
    }

    /// Holds the weight in `dtype`, for a model that nobody trains: it is read as it is, not rounded at each call.
    ///
    /// # Errors
    /// A failing operation.
    pub fn round(&mut self, dtype: DType) -> Result<()> {
        self.weight = self.weight.detach().to_dtype(dtype)?;
        Ok(())
    }

    /// Maps `x` `[.., input]` to `[.., output]` in the dtype of `x`; master weights are rounded on the way.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, &self.weight, self.bias.as_ref())
    }
}

/// Most maps of one product whose weights are put side by side at each call.
const MOST_JOINED: usize = 4;

/// Several maps of one input as one product; with their biases, where all of them have one.
///
/// Trained weights are put side by side at each call. Weights that nobody trains lie side by side from the start: decoding reads
/// them once a token.
#[derive(Clone, Debug)]
pub struct Joined {
    maps: Vec<Linear>,
    frozen: Option<Linear>,
}

impl Joined {
    /// Of one map or more.
    ///
    /// # Errors
    /// Weights of different inputs.
    pub fn new(mut maps: Vec<Linear>) -> Result<Self> {
        // Weights without values, of an outline, are one zero seen at every place, and must not come to take memory.
        let frozen = |map: &Linear| !map.weight.track_op() && map.weight.is_contiguous();
        let whole = match maps.iter().all(frozen) && !maps.is_empty() {
            false => None,
            true => Some(side_by_side(&mut maps)?),
        };
        Ok(Self { maps, frozen: whole })
    }

    /// As [`Linear::round`]; the weights lie side by side from now on.
    ///
    /// # Errors
    /// A failing operation.
    pub fn round(&mut self, dtype: DType) -> Result<()> {
        // The wide weight goes first, or there would be three of it for a while.
        self.frozen = None;
        for map in &mut self.maps {
            map.round(dtype)?;
        }
        self.frozen = Some(side_by_side(&mut self.maps)?);
        Ok(())
    }

    /// Takes up one more map of the same input, behind the others: for weights that nobody trains.
    ///
    /// # Errors
    /// A weight of another input.
    pub fn push(&mut self, map: Linear) -> Result<()> {
        self.frozen = None;
        self.maps.push(map);
        self.frozen = Some(side_by_side(&mut self.maps)?);
        Ok(())
    }

    /// The maps.
    pub fn maps(&self) -> &[Linear] {
        &self.maps
    }

    /// The weights side by side, where nobody trains them and there are no biases.
    pub fn frozen_weight(&self) -> Option<&Tensor> {
        let whole = self.frozen.as_ref();
        whole.filter(|map| map.bias.is_none()).map(|map| &map.weight)
    }

    /// Maps `x` `[.., input]` to the results side by side, in the dtype of `x`.
    ///
    /// # Errors
    /// As [`joined`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(whole) = &self.frozen {
            return whole.forward(x);
        }
        let products = self.maps.chunks(MOST_JOINED).map(|maps| {
            let weights: Vec<&Tensor> = maps.iter().map(Linear::weight).collect();
            joined(x, &weights)
        });
        let products: Vec<Tensor> = products.collect::<Result<_>>()?;
        let y = match products.as_slice() {
            [y] => y.clone(),
            _ => Tensor::cat(&products, D::Minus1)?,
        };
        match biases(&self.maps) {
            Some(biases) => y.broadcast_add(&Tensor::cat(&biases, 0)?.to_dtype(y.dtype())?),
            None => Ok(y),
        }
    }
}

/// The maps as one, of whose weight theirs become views.
fn side_by_side(maps: &mut [Linear]) -> Result<Linear> {
    let weights: Vec<&Tensor> = maps.iter().map(Linear::weight).collect();
    let weight = Tensor::cat(&weights, 0)?;
    let bias = match biases(maps) {
        Some(biases) => Some(Tensor::cat(&biases, 0)?),
        None => None,
    };
    let mut first = 0;
    for map in maps {
        let count = map.output();
        map.weight = weight.narrow(0, first, count)?;
        first += count;
    }
    Ok(Linear { weight, bias })
}

fn biases(maps: &[Linear]) -> Option<Vec<&Tensor>> {
    maps.iter().map(Linear::bias).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn frozen_maps_lie_side_by_side_and_are_the_same() -> Result<()> {
        let cpu = &Device::Cpu;
        let map = |output: usize| {
            Ok::<_, candle_core::Error>(Linear {
                weight: Tensor::randn(0f32, 1.0, (output, 6), cpu)?,
                bias: Some(Tensor::randn(0f32, 1.0, output, cpu)?),
            })
        };
        let maps = vec![map(3)?, map(5)?];
        let frozen = Joined::new(maps.clone())?;
        let trained = Joined {
            maps: maps.clone(),
            frozen: None,
        };
        let x = Tensor::randn(0f32, 1.0, (2, 7, 6), cpu)?;
        let far = (frozen.forward(&x)? - trained.forward(&x)?)?.abs()?.max_all()?;
        assert!(frozen.frozen.is_some() && far.to_scalar::<f32>()? < 1e-6);
        for (old, new) in maps.iter().zip(frozen.maps()) {
            assert_eq!(old.weight.to_vec2::<f32>()?, new.weight.to_vec2::<f32>()?);
        }
        let outlined = Linear {
            weight: Tensor::zeros((), DType::F32, cpu)?.broadcast_as((1 << 30, 1 << 30))?,
            bias: None,
        };
        assert!(Joined::new(vec![outlined])?.frozen.is_none());
        Ok(())
    }
}
