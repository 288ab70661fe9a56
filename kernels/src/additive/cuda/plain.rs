//! Without phases: launches of `cuda/additive_plain.cu`.

use super::{NAME, Sizes, address, aligned};
use crate::autograd::{Gradient, attach1};
use crate::cuda_module::{Module, THREADS, launch, module, room};
use crate::gpu::{self, Locked};
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchConfig};
use candle_core::{Result, Tensor};
use half::bf16;

const PLAIN: Module = module!("additive_plain");

/// Tokens of a chunk, chunks on their way to shared memory, and tokens of a warp at a time: as in the kernels.
const TOKENS: usize = 64;
const STAGES: usize = 3;
const OWN: usize = 16;
const WARPS: usize = 8;
/// Blocks that keep a GPU busy: 8 for each of 132 processors.
const BLOCKS: usize = 1056;
/// Tokens of a segment: fewer cost more in states than they bring, more bring nothing.
const SHORTEST: usize = 256;
const LONGEST: usize = 2048;

/// `Projections` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct ProjectionsArg {
    x: u64,
    d_o: u64,
    keep: u64,
    n: i32,
    heads: i32,
    length: i32,
}

// SAFETY: plain numbers in the layout of C, as the kernels declare them.
unsafe impl DeviceRepr for ProjectionsArg {}

/// How the tokens of a call are cut.
#[derive(Clone, Copy)]
struct Segments {
    sizes: Sizes,
    parts: usize,
    length: usize,
}

impl Segments {
    fn of(sizes: Sizes) -> Self {
        let wanted = BLOCKS.div_ceil(sizes.sequences());
        let length = sizes
            .tokens
            .div_ceil(wanted)
            .clamp(SHORTEST, LONGEST)
            .next_multiple_of(TOKENS);
        Self {
            sizes,
            parts: sizes.tokens.div_ceil(length),
            length,
        }
    }

    /// Bytes of the rows of `count` tokens in shared memory, of keys and of values.
    fn tiles(&self, count: usize) -> (usize, usize) {
        let bytes = |width: usize| 2 * count * width.next_multiple_of(64);
        (bytes(self.sizes.d), bytes(self.sizes.e))
    }

    /// Bytes of a state as right operand in shared memory.
    fn state_bytes(&self) -> usize {
        2 * self.sizes.d * self.sizes.e.next_multiple_of(64)
    }

    fn launch(&self, threads: usize, shared: usize) -> LaunchConfig {
        LaunchConfig {
            grid_dim: (self.parts as u32, self.sizes.sequences() as u32, 1),
            block_dim: (threads as u32, 1, 1),
            shared_mem_bytes: shared as u32,
        }
    }

    /// A warp for 16 channels.
    fn state_config(&self) -> LaunchConfig {
        let (keys, values) = self.tiles(TOKENS);
        self.launch(self.sizes.d / 16 * 32, STAGES * (keys + values))
    }

    /// A warp for a channel.
    fn merge_config(&self) -> LaunchConfig {
        let channels = self.sizes.sequences() * self.sizes.d;
        LaunchConfig {
            grid_dim: (channels.div_ceil(WARPS) as u32, 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        }
    }

    /// Two of its own tiles for each warp.
    fn read_config(&self) -> LaunchConfig {
        let (keys, values) = self.tiles(OWN);
        self.launch(WARPS * 32, self.state_bytes() + 2 * WARPS * keys.max(values))
    }

    fn backward_config(&self) -> LaunchConfig {
        let (keys, values) = self.tiles(OWN);
        self.launch(
            WARPS * 32,
            2 * self.state_bytes() + 2 * WARPS * 2 * (keys + values),
        )
    }

    fn arg(&self, x: u64, d_o: u64, keep: u64) -> ProjectionsArg {
        ProjectionsArg {
            x,
            d_o,
            keep,
            n: self.sizes.tokens as i32,
            heads: self.sizes.heads as i32,
            length: self.length as i32,
        }
    }
}

/// What the backward pass needs besides x: state `[B, H, D, E]`, max and den `[B, H, D]`.
struct Saved {
    segments: Segments,
    keep: Option<Tensor>,
    state: Tensor,
    max: Tensor,
    den: Tensor,
}

pub(super) fn projected(x: &Tensor, sizes: Sizes, keep: Option<Tensor>) -> Result<Tensor> {
    let device = x.device().as_cuda_device()?;
    let segments = Segments::of(sizes);
    let Sizes {
        batch,
        tokens,
        heads,
        d,
        e,
    } = sizes;
    let (channels, parts) = (sizes.sequences() * d, segments.parts);
    let (part_max, part_den) = (
        room::<f32>(device, parts * channels)?,
        room::<f32>(device, parts * channels)?,
    );
    let part_num = room::<f32>(device, parts * channels * e)?;
    let (max, den) = (room::<f32>(device, channels)?, room::<f32>(device, channels)?);
    let state = room::<f32>(device, channels * e)?;
    let o = room::<bf16>(device, batch * tokens * heads * e)?;
    let locked = Locked::new(NAME, x);
    let job = segments.arg(locked.start()?, 0, address(keep.as_ref())?);
    launch!(device, PLAIN, sizes.kernel("plain_state"), segments.state_config();
        job, part_max.as_view(), part_den.as_view(), part_num.as_view());
    launch!(device, PLAIN, sizes.kernel("plain_merge"), segments.merge_config();
        part_max.as_view(), part_den.as_view(), part_num.as_view(),
        state.as_view(), max.as_view(), den.as_view(), sizes.sequences() as i32, parts as i32);
    launch!(device, PLAIN, sizes.kernel("plain_read"), segments.read_config();
        job, state.as_view(), o.as_view());
    drop(locked);
    let saved = Saved {
        segments,
        keep,
        state: gpu::tensor(state, device, &(batch, heads, d, e).into()),
        max: gpu::tensor(max, device, &(batch, heads, d).into()),
        den: gpu::tensor(den, device, &(batch, heads, d).into()),
    };
    attach1(
        gpu::value(o, device, &(batch, tokens, heads * e).into()),
        x,
        saved,
    )
}

impl Gradient<1> for Saved {
    fn name(&self) -> &'static str {
        NAME
    }

    fn backward(&self, [x]: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let device = x.device().as_cuda_device()?;
        let (x, grad) = (aligned(x)?, aligned(grad)?);
        let segments = self.segments;
        let sizes = segments.sizes;
        let elements = sizes.sequences() * sizes.d * sizes.e;
        let partials = room::<f32>(device, segments.parts * elements)?;
        let dstate = room::<f32>(device, elements)?;
        let dx = room::<bf16>(device, x.elem_count())?;
        let (locked, d_o) = (Locked::new(NAME, &x), Locked::new(NAME, &grad));
        let job = segments.arg(locked.start()?, d_o.start()?, address(self.keep.as_ref())?);
        let [state, max, den] = [&self.state, &self.max, &self.den].map(|t| address(Some(t)));
        launch!(device, PLAIN, sizes.kernel("plain_dstate"), segments.state_config();
            job, partials.as_view());
        launch!(device, PLAIN, sizes.kernel("plain_dmerge"), segments.merge_config();
            partials.as_view(), dstate.as_view(), sizes.sequences() as i32, segments.parts as i32);
        launch!(device, PLAIN, sizes.kernel("plain_backward"), segments.backward_config();
            job, state?, dstate.as_view(), max?, den?, dx.as_view());
        Ok([Some(gpu::tensor(dx, device, x.shape()))])
    }
}
