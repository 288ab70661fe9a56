//! Phases of MD-LRPE, the linearised relative position encoding along several axes (LightNet, arXiv 2405.21022).
//!
//! ```text
//!   Theta_s = first D entries of [s_1 theta, s_2 theta, ..., s_k theta],   theta in R^e,  e = ceil(D / k)
//!   LRPE(x)_s = [x_s cos Theta_s, x_s sin Theta_s]
//!   LRPE(q)_s . LRPE(k)_t = sum_c q_sc k_tc cos(Theta_sc - Theta_tc)
//! ```
//!
//! Channel c of a head belongs to axis c / e and sees the offset along that axis alone. A token without a place, such
//! as a condition token, has position zero on every axis and so phase zero.
//!
//! Phases are small tensors that all layers and queries and keys may share; [`double`] and [`rotate`] apply them to rows in
//! one pass. The latter is rotary positions, the other way to scores that depend on offsets.

mod tokens;
mod turn;

pub use tokens::{rotary_frequencies, token_phases, token_phases_at};
pub use turn::{Pairing, copy, double, rotate};

use crate::error::OpError;
use candle_core::{D, DType, Device, Result, Tensor};

const NAME: &str = "lrpe::phases";

/// Phases `[N, D]` of tokens at `positions` `[N, k]` with frequencies `theta` `[e]`, or `[N, H, D]` with `[H, e]`.
///
/// `width` is D and `e` must be `ceil(D / k)`. Positions are numbers of any type, in steps; frequencies are f32 or f64
/// radians a step. The result has the type of `theta` and is differentiable in it.
///
/// Fails on shapes that do not fit.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use fulgur_kernels::lrpe::phases;
/// let positions = Tensor::new(&[[0u32, 0], [1, 10]], &Device::Cpu)?;
/// let theta = Tensor::new(&[1.0f64, 0.5], &Device::Cpu)?;
/// let phase = phases(&positions, &theta, 3)?;
/// assert_eq!(phase.to_vec2::<f64>()?, [[0.0, 0.0, 0.0], [1.0, 0.5, 10.0]]);
/// # candle_core::Result::Ok(())
/// ```
pub fn phases(positions: &Tensor, theta: &Tensor, width: usize) -> Result<Tensor> {
    Steps::new(positions, width, theta.dtype(), theta.device())?.phases(theta)
}

/// What phases need of positions: how far each token is along the axis of each channel. The same for all layers of a
/// model that see one grid, so that it pays to keep it.
#[derive(Clone, Debug)]
pub struct Steps {
    /// `[N, D]`.
    steps_nd: Tensor,
    /// Which frequency turns each channel, `[D]`.
    frequency_d: Tensor,
    axes: usize,
    count: usize,
}

impl Steps {
    /// Of tokens at `positions` `[N, k]`, for keys of `width` D, in `dtype` on `device`.
    ///
    /// Fails on shapes that do not fit.
    pub fn new(positions: &Tensor, width: usize, dtype: DType, device: &Device) -> Result<Self> {
        let axes = match positions.dims() {
            &[_, axes] if axes > 0 => axes,
            _ => return Err(OpError::shape(NAME, "positions", positions, "[N, axes]").into()),
        };
        if width == 0 {
            return Err(OpError::value(NAME, "width", width, "at least 1").into());
        }
        let count = width.div_ceil(axes);
        let channels = |of: fn(u32, u32) -> u32| {
            let count = count as u32;
            let channels: Vec<u32> = (0..width as u32).map(|c| of(c, count)).collect();
            Tensor::from_vec(channels, width, device)
        };
        let axis_d = channels(|c, count| c / count)?;
        Ok(Self {
            steps_nd: positions
                .to_device(device)?
                .detach()
                .to_dtype(dtype)?
                .index_select(&axis_d, 1)?,
            frequency_d: channels(|c, count| c % count)?,
            axes,
            count,
        })
    }

    /// Phases `[N, D]` with frequencies `theta` `[e]`, or `[N, H, D]` with `[H, e]`; differentiable in `theta`.
    ///
    /// Fails on shapes and types that do not fit.
    pub fn phases(&self, theta: &Tensor) -> Result<Tensor> {
        let (axes, count, width) = (self.axes, self.count, self.frequency_d.dim(0)?);
        if !matches!(theta.rank(), 1 | 2) || theta.dim(D::Minus1)? != count {
            let expected = format!("[{count}] or [H, {count}] for width {width} and {axes} axes");
            return Err(OpError::shape(NAME, "theta", theta, expected).into());
        }
        if !matches!(theta.dtype(), DType::F32 | DType::F64) {
            return Err(OpError::value(NAME, "theta", format!("{:?}", theta.dtype()), "f32 or f64").into());
        }
        let theta = theta.index_select(&self.frequency_d, theta.rank() - 1)?;
        if theta.rank() == 2 {
            self.steps_nd.unsqueeze(1)?.broadcast_mul(&theta)
        } else {
            self.steps_nd.broadcast_mul(&theta)
        }
    }
}

/// Positions `[condition + prod(axes), k]` in f32 of the cells of a grid in row-major order, last axis fastest, after
/// `condition` tokens at zero.
pub fn grid_positions(axes: &[usize], condition: usize, device: &Device) -> Result<Tensor> {
    let cells: usize = axes.iter().product();
    let mut positions = vec![0f32; condition * axes.len()];
    positions.reserve(cells * axes.len());
    for cell in 0..cells {
        let mut inner = cells;
        for &size in axes {
            inner /= size;
            positions.push((cell / inner % size) as f32);
        }
    }
    Tensor::from_vec(positions, (condition + cells, axes.len()), device)
}

/// Starting frequencies `[e]` in f64 radians a step, `10000^(-2 j / e)` for j = 0..e, e = `ceil(width / axes)`.
///
/// Fails when there is no axis.
pub fn frequencies(width: usize, axes: usize, device: &Device) -> Result<Tensor> {
    if axes == 0 {
        return Err(OpError::value("lrpe::frequencies", "axes", axes, "at least 1").into());
    }
    let count = width.div_ceil(axes);
    let theta = (0..count)
        .map(|j| 1e4f64.powf(-2.0 * j as f64 / count as f64))
        .collect::<Vec<_>>();
    Tensor::from_vec(theta, count, device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::additive::{NonCausal, noncausal};
    use crate::testing::{check_gradients, normal, relative_rms, values};

    /// Formula (5.7), entry by entry.
    fn literal(positions: &[Vec<f64>], theta: &[f64], width: usize) -> Vec<f64> {
        let mut all = Vec::new();
        for position in positions {
            let blocks: Vec<f64> = position
                .iter()
                .flat_map(|s| theta.iter().map(move |t| s * t))
                .collect();
            all.extend_from_slice(&blocks[..width]);
        }
        all
    }

    #[test]
    fn phases_equal_the_formula() -> Result<()> {
        for (axes, width) in [
            (vec![5], 4usize),
            (vec![3, 4], 7),
            (vec![2, 3, 4], 8),
            (vec![2, 1, 3], 2),
        ] {
            let positions = grid_positions(&axes, 2, &Device::Cpu)?;
            let theta = normal(1, &[width.div_ceil(axes.len())]);
            let phase = phases(&positions, &theta, width)?;
            let rows = positions.to_dtype(DType::F64)?.to_vec2::<f64>()?;
            assert_eq!(values(&phase), literal(&rows, &values(&theta), width));
            assert!(
                values(&phase.narrow(0, 0, 2)?).iter().all(|&p| p == 0.0),
                "condition tokens"
            );
            // A row of frequencies for each head: each head as if alone.
            let both = normal(2, &[2, width.div_ceil(axes.len())]);
            let by_head = phases(&positions, &both, width)?;
            for head in 0..2 {
                let alone = phases(&positions, &both.get(head)?, width)?;
                assert_eq!(values(&by_head.narrow(1, head, 1)?), values(&alone));
            }
        }
        Ok(())
    }

    #[test]
    fn grids_count_their_last_axis_first() -> Result<()> {
        let positions = grid_positions(&[2, 3], 1, &Device::Cpu)?;
        let expected = [
            [0f32, 0.0],
            [0.0, 0.0],
            [0.0, 1.0],
            [0.0, 2.0],
            [1.0, 0.0],
            [1.0, 1.0],
            [1.0, 2.0],
        ];
        assert_eq!(positions.to_vec2::<f32>()?, expected);
        Ok(())
    }

    #[test]
    fn gradients_reach_the_frequencies() -> Result<()> {
        let positions = grid_positions(&[3, 2], 1, &Device::Cpu)?;
        check_gradients(&[normal(1, &[2])], |t| phases(&positions, &t[0], 3)?.sin())?;
        check_gradients(&[normal(1, &[2, 2])], |t| phases(&positions, &t[0], 3)?.sin())
    }

    /// Scores depend on the offset along the axis of each channel alone.
    #[test]
    fn scores_are_relative() -> Result<()> {
        let (n, d) = (5, 6);
        let theta = normal(3, &[d / 2]);
        let (q, k) = (normal(1, &[1, n, 1, d]), normal(2, &[1, n, 1, d]));
        let places = [[0f64, 3.0], [1.0, 1.0], [4.0, 0.0], [2.0, 2.0], [9.0, 5.0]];
        let score = |shift: [f64; 2]| -> Result<Vec<f64>> {
            let moved = places.map(|p| [p[0] + shift[0], p[1] + shift[1]]);
            let phase = phases(&Tensor::new(&moved, &Device::Cpu)?, &theta, d)?;
            let flat = |t: Tensor| t.reshape((n, 2 * d));
            Ok(values(
                &flat(double(&q, &phase)?)?.matmul(&flat(double(&k, &phase)?)?.t()?)?,
            ))
        };
        let base = score([0.0, 0.0])?;
        assert!(relative_rms(&score([17.0, -40.0])?, &base) < 1e-12);
        let (q, k, theta) = (values(&q), values(&k), values(&theta));
        for s in 0..n {
            for t in 0..n {
                let sum: f64 = (0..d)
                    .map(|c| {
                        let offset = places[s][c / 3] - places[t][c / 3];
                        q[s * d + c] * k[t * d + c] * (offset * theta[c % 3]).cos()
                    })
                    .sum();
                assert!((sum - base[s * n + t]).abs() < 1e-12);
            }
        }
        Ok(())
    }

    /// The fused rotation of the additive recurrence is the plain doubling of queries and of normalised keys.
    #[test]
    fn the_recurrence_rotates_as_the_plain_form() -> Result<()> {
        let (b, h, d, e) = (2, 3, 5, 4);
        let positions = grid_positions(&[4, 3, 2], 3, &Device::Cpu)?;
        let n = positions.dim(0)?;
        let phase = phases(&positions, &frequencies(d, 3, &Device::Cpu)?, d)?;
        let (q, logits, v) = (
            normal(1, &[b, n, h, d]),
            normal(2, &[b, n, h, d]),
            normal(3, &[b, n, h, e]),
        );
        let k = logits.exp()?.broadcast_div(&logits.exp()?.sum_keepdim(1)?)?;
        let heads_first = |t: Tensor| t.transpose(1, 2)?.contiguous();
        let state = heads_first(double(&k, &phase)?)?
            .transpose(2, 3)?
            .contiguous()?
            .matmul(&heads_first(v.clone())?)?;
        let o = heads_first(double(&q, &phase)?)?
            .matmul(&state)?
            .transpose(1, 2)?;
        let options = NonCausal {
            phase: Some(&phase),
            ..Default::default()
        };
        let (found_o, found_state) = noncausal(&q, &logits, &v, &options)?;
        assert!(relative_rms(&values(&found_o), &values(&o)) < 1e-12);
        assert!(relative_rms(&values(&found_state), &values(&state)) < 1e-12);
        Ok(())
    }

    /// 5.8.7: transposing the grid together with the blocks of channels transposes the output.
    #[test]
    fn transposed_axes_transpose_the_output() -> Result<()> {
        let (rows, cols, d, e) = (3, 4, 6, 5);
        let half = d / 2;
        let n = rows * cols;
        let theta = normal(3, &[half]);
        let (q, logits, v) = (
            normal(4, &[1, n, 1, d]),
            normal(5, &[1, n, 1, d]),
            normal(6, &[1, n, 1, e]),
        );
        let run = |axes: [usize; 2], q: &Tensor, logits: &Tensor, v: &Tensor| -> Result<Tensor> {
            let phase = phases(&grid_positions(&axes, 0, &Device::Cpu)?, &theta, d)?;
            Ok(noncausal(
                q,
                logits,
                v,
                &NonCausal {
                    phase: Some(&phase),
                    ..Default::default()
                },
            )?
            .0)
        };
        let turn = |t: &Tensor, from: [usize; 2]| -> Result<Tensor> {
            let width = t.dim(3)?;
            t.reshape((from[0], from[1], width))?
                .transpose(0, 1)?
                .reshape((1, n, 1, width))
        };
        let swap = |t: &Tensor| Tensor::cat(&[t.narrow(3, half, half)?, t.narrow(3, 0, half)?], 3);
        let o = run([rows, cols], &q, &logits, &v)?;
        let (q_turned, logits_turned) = (
            swap(&turn(&q, [rows, cols])?)?,
            swap(&turn(&logits, [rows, cols])?)?,
        );
        let o_turned = run([cols, rows], &q_turned, &logits_turned, &turn(&v, [rows, cols])?)?;
        assert!(relative_rms(&values(&turn(&o_turned, [cols, rows])?), &values(&o)) < 1e-12);
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_named() {
        let positions = grid_positions(&[3, 2], 0, &Device::Cpu).unwrap();
        let text = phases(&positions, &normal(1, &[3]), 4).unwrap_err().to_string();
        assert!(
            text.contains("theta has shape [3], expected [2] or [H, 2]"),
            "{text}"
        );
        assert!(phases(&normal(1, &[3]), &normal(1, &[3]), 3).is_err());
        assert!(phases(&positions, &normal(1, &[2]), 0).is_err());
        assert!(frequencies(4, 0, &Device::Cpu).is_err());
    }
}
