//! With phases: launches of `cuda/additive.cu`.

use super::{NAME, Sizes, address, aligned};
use crate::autograd::{Gradient, attach2};
use crate::cuda_module::{Module, THREADS, flat, launch, module, room};
use crate::gpu::{self, Locked};
use crate::rows::sum_rows;
use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{DType, Result, Tensor};
use half::bf16;

const ADDITIVE: Module = module!("additive");
/// Tokens of a tile, and elements that pad its rows in shared memory: as in the kernels.
const TOKENS: usize = 64;
const PAD: usize = 8;
const PAD_F32: usize = 4;
/// Blocks of the backward pass that keep the GPU busy.
const BLOCKS: usize = 528;

impl Sizes {
    /// Rows of a state.
    fn width(&self) -> usize {
        2 * self.d
    }

    fn tiles(&self) -> usize {
        self.tokens.div_ceil(TOKENS)
    }

    fn launch(&self, grid: (usize, usize), shared: usize) -> LaunchConfig {
        LaunchConfig {
            grid_dim: (grid.0 as u32, grid.1 as u32, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: shared as u32,
        }
    }

    /// Elements of a tile of keys, and of a tile of values.
    fn tile_elements(&self) -> (usize, usize) {
        (TOKENS * (self.width() + PAD), TOKENS * (self.e + PAD))
    }

    fn state_elements(&self) -> usize {
        self.width() * (self.e + PAD)
    }

    fn state_config(&self) -> LaunchConfig {
        let (keys, values) = self.tile_elements();
        let shared = (2 * (keys + values)).max(4 * self.width() * (self.e + PAD_F32));
        self.launch((self.sequences(), 1), shared)
    }

    fn read_config(&self) -> LaunchConfig {
        let shared = 2 * (self.tile_elements().0 + self.state_elements()) + 4 * TOKENS * (self.e + PAD_F32);
        self.launch((self.tiles(), self.sequences()), shared)
    }

    fn backward_config(&self, runs: usize) -> LaunchConfig {
        let (keys, values) = self.tile_elements();
        let sums = 4 * TOKENS * (self.width().max(self.e) + PAD_F32);
        self.launch(
            (self.tiles(), runs),
            2 * (2 * self.state_elements() + 2 * values + keys) + sums,
        )
    }
}

/// What the backward pass needs besides the operands.
struct Saved {
    sizes: Sizes,
    trig: Tensor,
    keep: Option<Tensor>,
    state: Tensor,
    max: Tensor,
    den: Tensor,
}

pub(super) fn projected(x: &Tensor, phase: &Tensor, sizes: Sizes, keep: Option<Tensor>) -> Result<Tensor> {
    let device = x.device().as_cuda_device()?;
    let Sizes {
        batch,
        tokens,
        heads,
        d,
        e,
    } = sizes;
    let trig = trig(phase)?;
    let sequences = sizes.sequences();
    let state = room::<f32>(device, sequences * sizes.width() * e)?;
    let (max, den) = (
        room::<f32>(device, sequences * d)?,
        room::<f32>(device, sequences * d)?,
    );
    let o = room::<bf16>(device, batch * tokens * heads * e)?;
    {
        let x = Locked::new(NAME, x);
        let x = x.view::<bf16>()?;
        let (trig, keep) = (address(Some(&trig))?, address(keep.as_ref())?);
        launch!(device, ADDITIVE, sizes.kernel("additive_state"), sizes.state_config();
            x.slice(..), trig, keep, state.as_view(), max.as_view(), den.as_view(), tokens as u32, heads as u32);
        launch!(device, ADDITIVE, sizes.kernel("additive_read"), sizes.read_config();
            x.slice(..), state.as_view(), trig, o.as_view(), tokens as u32, heads as u32);
    }
    let channels = (batch, heads, d).into();
    let saved = Saved {
        sizes,
        trig,
        keep,
        state: gpu::tensor(state, device, &(batch, heads, sizes.width(), e).into()),
        max: gpu::tensor(max, device, &channels),
        den: gpu::tensor(den, device, &channels),
    };
    let o = gpu::value(o, device, &(batch, tokens, heads * e).into());
    attach2(o, [x, phase], saved)
}

/// Cosines and sines of the phases, `[N, D, 2]`.
pub(super) fn trig(phase: &Tensor) -> Result<Tensor> {
    let phase = phase.detach().to_dtype(DType::F32)?.contiguous()?;
    let (tokens, d) = phase.dims2()?;
    let device = phase.device().as_cuda_device()?;
    let trig = room::<f32>(device, 2 * tokens * d)?;
    let locked = Locked::new(NAME, &phase);
    launch!(device, ADDITIVE, "additive_trig", flat(tokens * d);
        locked.view::<f32>()?, trig.as_view(), tokens * d);
    Ok(gpu::tensor(trig, device, &(tokens, d, 2).into()))
}

impl Gradient<2> for Saved {
    fn name(&self) -> &'static str {
        NAME
    }

    fn backward(&self, [x, phase]: [&Tensor; 2], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let device = x.device().as_cuda_device()?;
        let sizes = self.sizes;
        let Sizes {
            tokens, heads, d, e, ..
        } = sizes;
        let (x, grad) = (aligned(x)?, aligned(grad)?);
        let sequences = sizes.sequences();
        let runs = BLOCKS.div_ceil(sizes.tiles()).min(sequences);
        let per_run = sequences.div_ceil(runs);
        let runs = sequences.div_ceil(per_run);
        let dstate = room::<f32>(device, sequences * sizes.width() * e)?;
        let dx = room::<bf16>(device, x.elem_count())?;
        let partials = room::<f32>(device, runs * tokens * d)?;
        {
            let (x, grad) = (Locked::new(NAME, &x), Locked::new(NAME, &grad));
            let (x, grad) = (x.view::<bf16>()?, grad.view::<bf16>()?);
            let (trig, keep) = (address(Some(&self.trig))?, address(self.keep.as_ref())?);
            let saved = [&self.state, &self.max, &self.den].map(|t| address(Some(t)));
            let [state, max, den] = saved;
            launch!(device, ADDITIVE, sizes.kernel("additive_dstate"), sizes.state_config();
                x.slice(..), grad.slice(..), trig, dstate.as_view(), tokens as u32, heads as u32);
            launch!(device, ADDITIVE, sizes.kernel("additive_backward"), sizes.backward_config(runs);
                x.slice(..), grad.slice(..), state?, dstate.as_view(), max?, den?, trig, keep,
                dx.as_view(), partials.as_view(), tokens as u32, heads as u32,
                sequences as u32, per_run as u32);
        }
        let partials = gpu::tensor(partials, device, &(runs, tokens * d).into());
        let dphase = sum_rows(&partials)?
            .reshape((tokens, d))?
            .to_dtype(phase.dtype())?;
        Ok([Some(gpu::tensor(dx, device, x.shape())), Some(dphase)])
    }
}
