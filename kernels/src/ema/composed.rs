//! The moving average out of candle's own operators: the form that runs on a GPU.
//!
//! Inside a chunk of 128 tokens the scan is a product with a triangular Toeplitz matrix, between chunks another one
//! over the states at their ends. All exponents are at most zero. Differentiable by candle's graph.

use candle_core::{Device, Result, Tensor};

const CHUNK: usize = 128;

/// `x` `[outer, n, rest, H, C]` to `u` of the same shape; `reverse` scans from the last token.
pub(super) fn scan(x: &Tensor, rate: &Tensor, weight: &Tensor, reverse: bool) -> Result<Tensor> {
    let (outer, n, rest, heads, channels) = x.dims5()?;
    let device = x.device();
    let x = if reverse { flip(x)? } else { x.clone() };
    let chunk = n.min(CHUNK);
    let chunks = n.div_ceil(chunk);
    let width = outer * rest * channels;
    let lines = x
        .permute((3, 1, 0, 2, 4))?
        .contiguous()?
        .reshape((heads, n, width))?;
    let lines = if chunks * chunk > n {
        lines.pad_with_zeros(1, 0, chunks * chunk - n)?
    } else {
        lines
    };
    let lines = lines
        .reshape((heads, chunks, chunk, width))?
        .transpose(1, 2)?
        .contiguous()?
        .reshape((heads, chunk, chunks * width))?;
    let kernel = toeplitz(rate, chunk, 0, 1, device)?.broadcast_mul(&weight.reshape((heads, 1, 1))?)?;
    let mut u = kernel.matmul(&lines)?.reshape((heads, chunk, chunks, width))?;
    if chunks > 1 {
        let ends = u.narrow(1, chunk - 1, 1)?.reshape((heads, chunks, width))?;
        let entering = toeplitz(rate, chunks, 1, chunk, device)?.matmul(&ends)?;
        let steps: Vec<f64> = (1..=chunk).map(|i| -(i as f64)).collect();
        let steps = Tensor::from_vec(steps, (1, chunk), device)?.to_dtype(rate.dtype())?;
        let powers = rate.reshape((heads, 1))?.broadcast_mul(&steps)?.exp()?;
        let powers = powers.reshape((heads, chunk, 1, 1))?;
        u = (u + entering.unsqueeze(1)?.broadcast_mul(&powers)?)?;
    }
    let u = u
        .transpose(1, 2)?
        .reshape((heads, chunks * chunk, width))?
        .narrow(1, 0, n)?;
    let u = u
        .reshape((heads, n, outer, rest, channels))?
        .permute((2, 1, 3, 0, 4))?
        .contiguous()?;
    if reverse { flip(&u) } else { Ok(u) }
}

/// `[H, size, size]` with entries `exp(-rate stride (i - j - delay))` for i - j >= delay, zero elsewhere.
fn toeplitz(rate: &Tensor, size: usize, delay: usize, stride: usize, device: &Device) -> Result<Tensor> {
    let entries = || (0..size * size).map(|at| (at / size, at % size));
    let inside = |(i, j): (usize, usize)| i >= j + delay;
    let exponent = entries()
        .map(|(i, j)| {
            if inside((i, j)) {
                -((stride * (i - j - delay)) as f64)
            } else {
                0.0
            }
        })
        .collect::<Vec<f64>>();
    let mask = entries()
        .map(|at| if inside(at) { 1.0 } else { 0.0 })
        .collect::<Vec<f64>>();
    let square = |data: Vec<f64>| Tensor::from_vec(data, (1, size, size), device)?.to_dtype(rate.dtype());
    let powers = rate
        .reshape(((), 1, 1))?
        .broadcast_mul(&square(exponent)?)?
        .exp()?;
    powers.broadcast_mul(&square(mask)?)
}

/// Turns the order of tokens around.
fn flip(x: &Tensor) -> Result<Tensor> {
    let n = x.dim(1)?;
    let order: Vec<u32> = (0..n as u32).rev().collect();
    x.index_select(&Tensor::from_vec(order, n, x.device())?, 1)
}
