//! Norms of groups of channels of channels-last pictures (Wu and He, 2018), with the activation that often follows.
//!
//! ```text
//! m, v = mean and variance over all places of a set and the channels of a group
//! y    = (x - m) / sqrt(v + eps) gain_c + bias_c          then y sigmoid(y) with `silu`
//! ```
//!
//! Places come in chunks of fixed sizes whose spreads are joined in their order: the same bits each time and for any number of
//! threads. For networks that nobody trains: no gradient passes.

use crate::error::OpError;
use crate::scalar::Real;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Result, Storage, Tensor, bail};
use rayon::prelude::*;

const OP: &str = "group_norm";
/// Places of a chunk on the CPU.
const CHUNK: usize = 128;

/// What is normed together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Groups {
    /// Tensors one after the other, each with statistics of its own: pictures, or clips whose frames share them.
    pub sets: usize,
    /// Groups that the channels split into.
    pub groups: usize,
    /// Added to variances.
    pub eps: f64,
    /// Whether SiLU follows.
    pub silu: bool,
}

/// Sizes of a call.
#[derive(Clone, Copy, Debug)]
struct Plan {
    places: usize,
    channels: usize,
    of: Groups,
}

/// The group norm of `x` [.., C], whose other axes are `sets` equal parts, with `gain` and `bias` [C] in f32: the shape and type of `x`.
///
/// No gradient passes. f32 or f64 on the CPU, where statistics are f64; f32 or bf16 on CUDA, where they are f32.
///
/// # Errors
/// If a shape, an element type or a device does not fit, or `eps` is not a positive number.
pub fn group_norm(x: &Tensor, gain: &Tensor, bias: &Tensor, of: Groups) -> Result<Tensor> {
    let channels = x.dims().last().copied().unwrap_or(0);
    if of.groups == 0 || channels == 0 || !channels.is_multiple_of(of.groups) {
        return Err(OpError::value(
            OP,
            "groups",
            of.groups,
            format!("a divisor of {channels} channels"),
        )
        .into());
    }
    let all = x.elem_count() / channels;
    if of.sets == 0 || all == 0 || !all.is_multiple_of(of.sets) {
        return Err(OpError::value(OP, "sets", of.sets, format!("a divisor of {all} places")).into());
    }
    if !(of.eps > 0.0 && of.eps.is_finite()) {
        return Err(OpError::value(OP, "eps", of.eps, "a number above zero").into());
    }
    for (name, row) in [("gain", gain), ("bias", bias)] {
        if row.dims() != [channels] || row.dtype() != DType::F32 {
            return Err(OpError::shape(OP, name, row, format!("[{channels}] in f32")).into());
        }
    }
    let plan = Plan {
        places: all / of.sets,
        channels,
        of,
    };
    let (x, gain, bias) = (x.detach().contiguous()?, gain.detach(), bias.detach());
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::group_norm(&x, &gain.contiguous()?, &bias.contiguous()?, plan);
    }
    let (gain, bias) = (gain.to_vec1::<f32>()?, bias.to_vec1::<f32>()?);
    let (storage, layout) = x.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(candle_core::Error::RequiresContiguous { op: OP });
    };
    let storage = match &*storage {
        Storage::Cpu(CpuStorage::F32(x)) => CpuStorage::F32(on_cpu(&x[start..end], &gain, &bias, plan)),
        Storage::Cpu(CpuStorage::F64(x)) => CpuStorage::F64(on_cpu(&x[start..end], &gain, &bias, plan)),
        other => bail!(
            "{OP}: found {:?} on {:?}, expected f32 or f64 on the CPU, f32 or bf16 on CUDA",
            other.dtype(),
            x.device().location()
        ),
    };
    Ok(Tensor::from_storage(
        Storage::Cpu(storage),
        x.shape().clone(),
        BackpropOp::none(),
        false,
    ))
}

/// Sums of `f` over the places of a set and the channels of each group, chunk after chunk.
fn sums<T: Real>(set: &[T], plan: Plan, f: impl Fn(usize, f64) -> f64 + Sync) -> Vec<f64> {
    let (groups, width) = (plan.of.groups, plan.channels / plan.of.groups);
    let partials: Vec<Vec<f64>> = set
        .par_chunks(CHUNK * plan.channels)
        .map(|chunk| {
            let mut sums = vec![0.0; groups];
            for place in chunk.chunks_exact(plan.channels) {
                for (group, values) in place.chunks_exact(width).enumerate() {
                    sums[group] += values.iter().map(|x| f(group, x.to_f64())).sum::<f64>();
                }
            }
            sums
        })
        .collect();
    let mut total = vec![0.0; groups];
    for sums in partials {
        for (total, sum) in total.iter_mut().zip(sums) {
            *total += sum;
        }
    }
    total
}

fn on_cpu<T: Real>(x: &[T], gain: &[f32], bias: &[f32], plan: Plan) -> Vec<T> {
    let mut y = vec![T::zero(); x.len()];
    let (channels, width) = (plan.channels, plan.channels / plan.of.groups);
    let size = plan.places * channels;
    let count = (plan.places * width) as f64;
    y.par_chunks_mut(size).zip(x.par_chunks(size)).for_each(|(y, x)| {
        let mean: Vec<f64> = sums(x, plan, |_, x| x).iter().map(|sum| sum / count).collect();
        let squares = sums(x, plan, |group, x| (x - mean[group]).powi(2));
        let scale: Vec<f64> = squares
            .iter()
            .map(|sum| (sum / count + plan.of.eps).sqrt().recip())
            .collect();
        let of = |values: Vec<f64>| -> Vec<T> { values.into_iter().map(T::from_f64).collect() };
        let slope = of((0..channels)
            .map(|c| scale[c / width] * f64::from(gain[c]))
            .collect());
        let bias = of(bias.iter().copied().map(f64::from).collect());
        let mean = of((0..channels).map(|c| mean[c / width]).collect());
        y.par_chunks_mut(CHUNK * channels)
            .zip(x.par_chunks(CHUNK * channels))
            .for_each(|(y, x)| {
                for (y, x) in y.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
                    for (c, (y, &x)) in y.iter_mut().zip(x).enumerate() {
                        *y = (x - mean[c]) * slope[c] + bias[c];
                    }
                    if plan.of.silu {
                        for y in y {
                            *y *= y.sigmoid();
                        }
                    }
                }
            });
    });
    y
}

#[cfg(feature = "cuda")]
mod cuda {
    //! Launches of `cuda/group_norm.cu`.

    use super::{OP, Plan};
    use crate::cuda_module::{Module, THREADS, launch, module, room};
    use crate::error::OpError;
    use crate::gpu::{self, Locked};
    use crate::pass::CudaReal;
    use crate::rows::cuda::suffix;
    use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchConfig};
    use candle_core::{DType, Result, Tensor};
    use half::bf16;

    const GROUP_NORM: Module = module!("group_norm");
    /// Fewest places of a chunk, and most chunks of a set.
    const PLACES: usize = 16;
    const CHUNKS: usize = 64;
    /// Blocks that keep the GPU busy.
    const BLOCKS: usize = 1024;
    /// Most channels, and most groups: what shared memory holds.
    const MOST: usize = 6144;

    /// As in the kernels.
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct GroupNorm {
        places: u32,
        channels: u32,
        groups: u32,
        per_chunk: u32,
        lanes: u32,
        eps: f32,
        silu: u32,
    }

    // SAFETY: seven words of 32 bits, in the order of the kernels' structure.
    unsafe impl DeviceRepr for GroupNorm {}

    pub(super) fn group_norm(x: &Tensor, gain: &Tensor, bias: &Tensor, plan: Plan) -> Result<Tensor> {
        suffix(OP, x)?;
        match x.dtype() {
            DType::BF16 => typed::<bf16>(x, gain, bias, plan),
            _ => typed::<f32>(x, gain, bias, plan),
        }
    }

    fn typed<T: CudaReal>(x: &Tensor, gain: &Tensor, bias: &Tensor, plan: Plan) -> Result<Tensor> {
        if plan.channels > MOST {
            return Err(OpError::value(OP, "channels", plan.channels, format!("at most {MOST}")).into());
        }
        let device = x.device().as_cuda_device()?;
        let (shape, sets, groups) = (x.shape().clone(), plan.of.sets, plan.of.groups);
        let (x, gain, bias) = (Locked::new(OP, x), Locked::new(OP, gain), Locked::new(OP, bias));
        let (x, gain, bias) = (x.address()?, gain.address()?, bias.address()?);
        let vectors = x.1 && gain.1 && bias.1 && plan.channels.is_multiple_of(4);
        let v = if vectors { 4 } else { 1 };
        let lanes = plan.channels.div_ceil(v).min(THREADS as usize);
        let chunks = BLOCKS.div_ceil(sets).clamp(1, CHUNKS);
        let per_chunk = plan.places.div_ceil(chunks).max(PLACES);
        let chunks = plan.places.div_ceil(per_chunk);
        let config = |floats: usize| LaunchConfig {
            grid_dim: (chunks as u32, sets as u32, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: (floats * size_of::<f32>()) as u32,
        };
        let arguments = GroupNorm {
            places: plan.places as u32,
            channels: plan.channels as u32,
            groups: groups as u32,
            per_chunk: per_chunk as u32,
            lanes: lanes as u32,
            eps: plan.of.eps as f32,
            silu: u32::from(plan.of.silu),
        };
        let partials = room::<f32>(device, sets * chunks * groups * 2)?;
        let down = THREADS as usize / lanes;
        launch!(device, GROUP_NORM, format!("group_norm_sums_{}_v{v}", T::SUFFIX), config(down * plan.channels * 2);
            x.0, partials.as_view(), arguments);
        let y = room::<T>(device, sets * plan.places * plan.channels)?;
        launch!(device, GROUP_NORM, format!("group_norm_apply_{}_v{v}", T::SUFFIX), config(groups * 2);
            x.0, partials.as_view(), gain.0, bias.0, y.as_view(), arguments);
        Ok(gpu::tensor(y, device, &shape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{normal, relative_rms, values};
    use candle_core::Device;

    /// By rows of one group each, out of plain operations in f64.
    fn expected(x: &Tensor, gain: &Tensor, bias: &Tensor, of: Groups) -> Result<Tensor> {
        let channels = x.dim(2)?;
        let rows = x
            .reshape((of.sets, (), of.groups, channels / of.groups))?
            .transpose(1, 2)?
            .contiguous()?
            .flatten_from(2)?;
        let mean = rows.mean_keepdim(2)?;
        let far = rows.broadcast_sub(&mean)?;
        let variance = far.sqr()?.mean_keepdim(2)?;
        let normed = far
            .broadcast_div(&(variance + of.eps)?.sqrt()?)?
            .reshape((of.sets, of.groups, (), channels / of.groups))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape(x.shape())?;
        let wide = |row: &Tensor| row.to_dtype(DType::F64);
        let y = normed.broadcast_mul(&wide(gain)?)?.broadcast_add(&wide(bias)?)?;
        if of.silu { silu(&y) } else { Ok(y) }
    }

    fn silu(y: &Tensor) -> Result<Tensor> {
        y / (y.neg()?.exp()? + 1.0)?
    }

    #[test]
    fn statistics_are_those_of_a_group() -> Result<()> {
        for (sets, places, channels, groups, silu) in [
            (1, 1, 4, 2, false),
            (3, 7, 6, 2, true),
            (2, 300, 12, 12, false),
            (2, 129, 10, 1, true),
        ] {
            let of = Groups {
                sets,
                groups,
                eps: 1e-5,
                silu,
            };
            let x = (normal(1, &[sets, places, channels]) + 3.0)?;
            let row = |seed| normal(seed, &[channels]).to_dtype(DType::F32);
            let (gain, bias) = (row(2)?, row(3)?);
            let wanted = values(&expected(&x, &gain, &bias, of)?);
            let found = group_norm(&x, &gain, &bias, of)?;
            assert!(relative_rms(&values(&found), &wanted) < 1e-13, "{of:?}");
            let narrow = group_norm(&x.to_dtype(DType::F32)?, &gain, &bias, of)?;
            assert!(relative_rms(&values(&narrow), &wanted) < 1e-6, "{of:?}");
            // Axes before the channels are one.
            let folded = x.reshape((sets * places, 1, channels))?;
            assert_eq!(values(&group_norm(&folded, &gain, &bias, of)?), values(&found));
        }
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let of = Groups {
            sets: 2,
            groups: 3,
            eps: 1e-5,
            silu: false,
        };
        let x = Tensor::zeros((2, 5, 6), DType::F32, &Device::Cpu).unwrap();
        let row = Tensor::zeros(6, DType::F32, &Device::Cpu).unwrap();
        let message = |of| group_norm(&x, &row, &row, of).unwrap_err().to_string();
        assert_eq!(
            message(Groups { groups: 4, ..of }),
            "group_norm: groups is 4, expected a divisor of 6 channels"
        );
        assert_eq!(
            message(Groups { sets: 3, ..of }),
            "group_norm: sets is 3, expected a divisor of 10 places"
        );
        assert_eq!(
            message(Groups { eps: f64::NAN, ..of }),
            "group_norm: eps is NaN, expected a number above zero"
        );
        let short = row.narrow(0, 0, 5).unwrap();
        assert_eq!(
            group_norm(&x, &short, &row, of).unwrap_err().to_string(),
            "group_norm: gain has shape [5], expected [6] in f32"
        );
    }
}
