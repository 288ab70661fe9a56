//! Softmax attention of one sequence over another, or over itself.
//!
//! | entry | form | file | memory | for |
//! |---|---|---|---|---|
//! | [`softmax`] | tiles | `tiled/` | grows with N + L | long sequences, causal or not, packed ones, shared keys |
//! | [`attention`] | composed | `composed.rs` | the weights `[B, H, N, L]` | short contexts: a text, the other stream of a clip |
//!
//! Both are exact. They differ where a query meets no key that counts: [`softmax`] gives zeros, [`attention`] the mean of the
//! values.

mod composed;
#[cfg(test)]
mod reference;
mod tiled;

pub use composed::attention;

use crate::error::OpError;
use crate::{pass, sequences};
use candle_core::{Result, Tensor};
use std::ops::Range;

const OP: &str = "attention::softmax";

/// What [`softmax`] takes besides queries, keys and values.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// Whether queries meet only keys up to their own place. The last query has the place of the last key, so that N new tokens
    /// may follow what is in a cache; of more queries than keys the first ones meet none.
    pub causal: bool,
    /// What scores are multiplied by; D^-1/2 if absent.
    pub scale: Option<f64>,
    /// Borders of packed sequences in a batch of one, where N = L: starts with 0, ends with N, never falls. Queries meet only
    /// keys of their own sequence.
    pub sequences: Option<&'a [usize]>,
    /// `[B, L]` of any type, zero where a key is padding. Not differentiable.
    pub mask: Option<&'a Tensor>,
}

/// Attention of `q` [B, N, H, D] over `k` [B, L, G, D] and `v` [B, L, G, E], of any strides: [B, N, H, E].
///
/// H is a multiple of G: H / G heads next to each other share keys and values (grouped queries). A query that meets no key that
/// counts gives zeros, and zero gradients.
///
/// Differentiable in `q`, `k` and `v`, which are of one type: f32 or f64 on the CPU, f32 or bf16 on CUDA. There bf16 is
/// multiplied on tensor cores and summed in f32 where D and E are multiples of 8 up to 128; everything else is computed in
/// f32, many times slower, for widths up to 256. What was chosen is a debug event of `tracing`. Kept for the backward pass: the
/// inputs, the output and one number a query and head.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use fulgur_kernels::attention::{Options, softmax};
/// let x = Tensor::new(&[1f32, 3.0], &Device::Cpu)?.reshape((1, 2, 1, 1))?;
/// let options = Options { causal: true, ..Default::default() };
/// let o = softmax(&x.zeros_like()?, &x, &x, &options)?;
/// assert_eq!(o.flatten_all()?.to_vec1::<f32>()?, [1.0, 2.0]);
/// # candle_core::Result::Ok(())
/// ```
///
/// # Errors
/// Shapes, element types or devices that do not fit, a scale that is not a number above zero, borders that fall or do not cover
/// the tokens; on a GPU, widths above 256, and batches or heads above 65535.
pub fn softmax(q: &Tensor, k: &Tensor, v: &Tensor, options: &Options<'_>) -> Result<Tensor> {
    let problem = Problem::new(q, k, v, options)?;
    tiled::softmax(problem, q, k, v, options.mask)
}

/// Sizes and options of a call.
#[derive(Clone, Debug)]
struct Problem {
    b: usize,
    n: usize,
    l: usize,
    h: usize,
    g: usize,
    d: usize,
    e: usize,
    causal: bool,
    scale: f64,
    borders: Option<Vec<usize>>,
}

/// Queries and keys that meet: places in a batch.
#[derive(Clone, Debug)]
struct Span {
    batch: usize,
    queries: Range<usize>,
    keys: Range<usize>,
}

impl Problem {
    fn new(q: &Tensor, k: &Tensor, v: &Tensor, options: &Options<'_>) -> Result<Self> {
        let &[b, n, h, d] = q.dims() else {
            return Err(OpError::shape(OP, "q", q, "[B, N, H, D]").into());
        };
        let (l, g) = match *k.dims() {
            [kb, l, g, kd] if kb == b && kd == d && g > 0 && h % g == 0 => (l, g),
            _ => {
                let expected = format!("[{b}, L, G, {d}] to go with q, where G divides {h}");
                return Err(OpError::shape(OP, "k", k, expected).into());
            }
        };
        if v.rank() != 4 || v.dims()[..3] != [b, l, g] {
            return Err(OpError::shape(OP, "v", v, format!("[{b}, {l}, {g}, E] to go with k")).into());
        }
        pass::same_kind(OP, &[("q", q), ("k", k), ("v", v)])?;
        if let Some(mask) = options.mask {
            if mask.dims() != [b, l] {
                return Err(OpError::shape(OP, "mask", mask, format!("[{b}, {l}]")).into());
            }
            if !mask.device().same_device(q.device()) {
                let found = format!("on {:?}", mask.device().location());
                let expected = format!("a tensor on {:?} like q", q.device().location());
                return Err(OpError::value(OP, "mask", found, expected).into());
            }
        }
        let scale = options.scale.unwrap_or((d as f64).powf(-0.5));
        if !(scale > 0.0 && scale.is_finite()) {
            return Err(OpError::value(OP, "scale", scale, "a number above zero").into());
        }
        if let Some(borders) = options.sequences {
            if n != l {
                let found = format!("{borders:?}");
                let expected = format!("none, as there are {n} queries and {l} keys");
                return Err(OpError::value(OP, "sequences", found, expected).into());
            }
            sequences::count(OP, (b, n), Some(borders))?;
        }
        Ok(Self {
            b,
            n,
            l,
            h,
            g,
            d,
            e: v.dims()[3],
            causal: options.causal,
            scale,
            borders: options.sequences.map(<[usize]>::to_vec),
        })
    }

    /// Heads that share keys.
    fn share(&self) -> usize {
        self.h / self.g
    }

    /// Of all batches, or all packed sequences, in the order of memory.
    fn spans(&self) -> Vec<Span> {
        match &self.borders {
            None => (0..self.b)
                .map(|batch| Span {
                    batch,
                    queries: 0..self.n,
                    keys: 0..self.l,
                })
                .collect(),
            Some(borders) => borders
                .windows(2)
                .map(|pair| Span {
                    batch: 0,
                    queries: pair[0]..pair[1],
                    keys: pair[0]..pair[1],
                })
                .collect(),
        }
    }
}

impl Span {
    /// Of a causal span, the keys that the query `query` of the span meets: so many from the first on.
    fn keys_of(&self, query: usize) -> usize {
        (query + 1 + self.keys.len()).saturating_sub(self.queries.len())
    }
}
