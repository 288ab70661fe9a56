//! The fused forms of [`super::projected`] on a GPU.
//!
//! | form | file | kernels |
//! |---|---|---|
//! | without phases | `plain.rs` | `cuda/additive_plain.cu` |
//! | with phases | `phases.rs` | `cuda/additive.cu` |
//! | heads of other widths, with phases and without | `wide.rs` | `cuda/additive_wide.cu`, and products of cuBLAS |

mod phases;
mod plain;
mod wide;

use super::NonCausal;
use crate::gpu::Locked;
use candle_core::{DType, Result, Tensor};

const NAME: &str = "additive::projected";
/// Widths of keys and values of a head that kernels do all of; others are multiples of [`STEP`].
const WIDTHS: [usize; 2] = [32, 64];
const STEP: usize = 4;

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
            && key_width.is_multiple_of(STEP)
            && e.is_multiple_of(STEP)
            && parts == 1
            && phase
            && mask
            // A dimension of a grid, and an offset into a row that kernels count in 32 bits.
            && batch * heads <= 65_535
            && i32::try_from(tokens.max(width)).is_ok();
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
    let narrow = WIDTHS.contains(&sizes.d) && WIDTHS.contains(&sizes.e);
    match options.phase {
        phase if !narrow => wide::projected(&x, phase, sizes, keep),
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
