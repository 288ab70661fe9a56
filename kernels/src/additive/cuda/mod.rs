//! The fused forms of [`super::projected`] on a GPU.
//!
//! | form | file | kernels |
//! |---|---|---|
//! | without phases | `plain.rs` | `cuda/additive_plain.cu` |
//! | with phases | `phases.rs` | `cuda/additive.cu` |

mod phases;
mod plain;

use super::NonCausal;
use crate::gpu::Locked;
use candle_core::{DType, Result, Tensor};

const NAME: &str = "additive::projected";
/// Widths of keys and values of a head that kernels exist for.
const WIDTHS: [usize; 2] = [32, 64];

/// Shape of a call that the kernels can do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    batch: usize,
    tokens: usize,
    heads: usize,
    d: usize,
    e: usize,
}

impl Sizes {
    /// The sizes of a call, or none where the composed form has to do.
    pub(super) fn of(
        x: &Tensor,
        heads: usize,
        key_width: usize,
        options: &NonCausal<'_>,
    ) -> Result<Option<Self>> {
        let (batch, tokens, width) = x.dims3()?;
        let e = (width - 2 * heads * key_width) / heads;
        let parts = options.exchange.as_ref().map_or(1, |exchange| exchange.parts());
        let phase = options
            .phase
            .is_none_or(|phase| phase.dims() == [tokens, key_width]);
        let mask = options.mask.is_none_or(|mask| mask.dims() == [batch, tokens]);
        let fits = x.device().is_cuda()
            && x.dtype() == DType::BF16
            && WIDTHS.contains(&key_width)
            && WIDTHS.contains(&e)
            && parts == 1
            && phase
            && mask
            && batch * heads <= 65_535;
        Ok(fits.then_some(Self {
            batch,
            tokens,
            heads,
            d: key_width,
            e,
        }))
    }

    fn sequences(&self) -> usize {
        self.batch * self.heads
    }

    /// Name of a kernel for these widths.
    fn kernel(&self, kind: &str) -> String {
        format!("{kind}_d{}_e{}", self.d, self.e)
    }
}

pub(super) fn projected(x: &Tensor, sizes: Sizes, options: &NonCausal<'_>) -> Result<Tensor> {
    let x = aligned(x)?;
    let keep = options
        .mask
        .map(|mask| mask.detach().ne(0f64)?.contiguous())
        .transpose()?;
    match options.phase {
        None => plain::projected(&x, sizes, keep),
        Some(phase) => phases::projected(&x, phase, sizes, keep),
    }
}

/// Itself, or a copy whose rows can be read 16 bytes at a time.
fn aligned(x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    let start = Locked::new(NAME, &x).start()?;
    if start % 16 == 0 {
        Ok(x)
    } else {
        x.force_contiguous()
    }
}

/// Address of a tensor that may be missing. The tensor outlives the launch because its owner does.
fn address(tensor: Option<&Tensor>) -> Result<u64> {
    tensor.map_or(Ok(0), |tensor| Ok(Locked::new(NAME, tensor).address()?.0))
}
