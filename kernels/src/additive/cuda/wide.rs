//! For heads of any width: launches of `cuda/additive_wide.cu`, and matrix products between them.

use super::{NAME, Sizes, address, aligned};
use crate::autograd::{Gradient, attach1, attach2};
use crate::cuda_module::{Module, View, flat, launch, module, room};
use crate::gpu::{self, Locked};
use crate::rows::sum_rows;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{Result, Tensor};
use half::bf16;

const WIDE: Module = module!("additive_wide");

/// Tokens that a thread takes statistics of.
const LENGTH: usize = 64;
/// Elements that a thread moves at once.
const VECTOR: usize = 4;
/// Threads of the backward pass that keep a GPU busy: 2,048 for each of 132 processors.
const BUSY: usize = 270_336;

/// `Wide` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct WideArg {
    x: u64,
    trig: u64,
    keep: u64,
    max: u64,
    den: u64,
    b: i32,
    n: i32,
    h: i32,
    d: i32,
    e: i32,
    w: i32,
}

// SAFETY: plain numbers in the layout of C, as the kernels declare them.
unsafe impl DeviceRepr for WideArg {}

/// A call: sizes, sines and cosines, tokens that count, and the statistics of its logits, max and den `[B, H D]`.
struct Call {
    sizes: Sizes,
    trig: Option<Tensor>,
    keep: Option<Tensor>,
    max: Tensor,
    den: Tensor,
}

/// Turned queries and keys `[B, H, N, W]`, and values `[B, H, N, E]`.
struct Parts {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

/// What the backward pass needs besides x: the call and the state `[B, H, W, E]`.
struct Saved {
    call: Call,
    state: Tensor,
}

impl Sizes {
    fn row(&self) -> usize {
        self.heads * (2 * self.d + self.e)
    }

    fn channels(&self) -> usize {
        self.sequences() * self.d
    }
}

pub(super) fn projected(
    x: &Tensor,
    phase: Option<&Tensor>,
    sizes: Sizes,
    keep: Option<Tensor>,
) -> Result<Tensor> {
    let trig = phase.map(super::phases::trig).transpose()?;
    let call = Call::new(x, trig, sizes, keep)?;
    let parts = call.split(x)?;
    let state = parts.k.transpose(2, 3)?.matmul(&parts.v)?;
    let o = parts.q.matmul(&state)?;
    let device = x.device().as_cuda_device()?;
    let rows = room::<bf16>(device, o.elem_count())?;
    {
        let o = Locked::new(NAME, &o);
        call.heads(x, rows.as_view(), o.view::<bf16>()?, true)?;
    }
    let o = gpu::value(
        rows,
        device,
        &(sizes.batch, sizes.tokens, sizes.heads * sizes.e).into(),
    );
    let saved = Saved { call, state };
    match phase {
        None => attach1(o, x, saved),
        Some(phase) => attach2(o, [x, phase], saved),
    }
}

impl Call {
    /// Takes the statistics of the logits.
    fn new(x: &Tensor, trig: Option<Tensor>, sizes: Sizes, keep: Option<Tensor>) -> Result<Self> {
        let device = x.device().as_cuda_device()?;
        let (channels, parts) = (sizes.channels(), sizes.tokens.div_ceil(LENGTH));
        let [part_max, part_den] = [(); 2].map(|()| room::<f32>(device, parts * channels));
        let (part_max, part_den) = (part_max?, part_den?);
        let [max, den] = [(); 2].map(|()| room::<f32>(device, channels));
        let (max, den) = (max?, den?);
        let shape = (sizes.batch, sizes.heads * sizes.d).into();
        let locked = Locked::new(NAME, x);
        let job = arg(sizes, locked.start()?, 0, address(keep.as_ref())?, [0, 0]);
        launch!(device, WIDE, "wide_parts", flat(parts * channels / VECTOR);
            job, part_max.as_view(), part_den.as_view(), parts as i32, LENGTH as i32);
        launch!(device, WIDE, "wide_merge", flat(channels);
            part_max.as_view(), part_den.as_view(), max.as_view(), den.as_view(), channels as i64, parts as i32);
        Ok(Self {
            sizes,
            trig,
            keep,
            max: gpu::tensor(max, device, &shape),
            den: gpu::tensor(den, device, &shape),
        })
    }

    /// Rows of a state.
    fn width(&self) -> usize {
        self.sizes.d * if self.trig.is_some() { 2 } else { 1 }
    }

    /// The argument for projections that start at `x`.
    fn arg(&self, x: u64) -> Result<WideArg> {
        let [trig, keep, max, den] = [
            self.trig.as_ref(),
            self.keep.as_ref(),
            Some(&self.max),
            Some(&self.den),
        ]
        .map(address);
        Ok(arg(self.sizes, x, trig?, keep?, [max?, den?]))
    }

    fn split(&self, x: &Tensor) -> Result<Parts> {
        let device = x.device().as_cuda_device()?;
        let Sizes {
            batch,
            tokens,
            heads,
            e,
            ..
        } = self.sizes;
        let sequences = tokens * self.sizes.sequences();
        let [q, k] = [(); 2].map(|()| room::<bf16>(device, sequences * self.width()));
        let (q, k, v) = (q?, k?, room::<bf16>(device, sequences * e)?);
        {
            let x = Locked::new(NAME, x);
            launch!(device, WIDE, "wide_split", flat(batch * tokens * self.sizes.row() / VECTOR);
                self.arg(x.start()?)?, q.as_view(), k.as_view(), v.as_view());
        }
        let keys = (batch, heads, tokens, self.width()).into();
        Ok(Parts {
            q: gpu::tensor(q, device, &keys),
            k: gpu::tensor(k, device, &keys),
            v: gpu::tensor(v, device, &(batch, heads, tokens, e).into()),
        })
    }

    /// Moves rows of all heads `[B, N, H E]` to heads `[B, H, N, E]`, or back.
    fn heads(&self, x: &Tensor, rows: View<'_, bf16>, heads: View<'_, bf16>, back: bool) -> Result<()> {
        let device = x.device().as_cuda_device()?;
        let Sizes {
            batch,
            tokens,
            heads: h,
            e,
            ..
        } = self.sizes;
        launch!(device, WIDE, "wide_heads", flat(batch * tokens * h * e / VECTOR);
            rows, heads, batch as i32, tokens as i32, h as i32, e as i32, (h * e) as i64, i32::from(back));
        Ok(())
    }

    /// Adjoints of x, and of the phases where there are any.
    fn backward(&self, x: &Tensor, state: &Tensor, grad: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let device = x.device().as_cuda_device()?;
        let Sizes {
            batch,
            tokens,
            heads,
            d,
            e,
        } = self.sizes;
        let (x, grad) = (aligned(x)?, aligned(grad)?);
        let parts = self.split(&x)?;
        let d_o = room::<bf16>(device, grad.elem_count())?;
        {
            let grad = Locked::new(NAME, &grad);
            self.heads(&x, grad.view::<bf16>()?, d_o.as_view(), false)?;
        }
        let d_o = gpu::tensor(d_o, device, &(batch, heads, tokens, e).into());
        let dstate = parts.q.transpose(2, 3)?.matmul(&d_o)?;
        let dq = d_o.matmul(&state.transpose(2, 3)?)?;
        let dk = parts.v.matmul(&dstate.transpose(2, 3)?)?;
        let dv = parts.k.matmul(&dstate)?;

        let (channels, sequences) = (self.sizes.channels(), self.sizes.sequences());
        let threads = tokens * d / VECTOR;
        let per_run = sequences.div_ceil(BUSY.div_ceil(threads).min(sequences));
        let runs = sequences.div_ceil(per_run);
        let through = room::<f32>(device, channels)?;
        let dx = room::<bf16>(device, x.elem_count())?;
        let phases = if self.trig.is_some() {
            runs * tokens * d
        } else {
            VECTOR
        };
        let partials = room::<f32>(device, phases)?;
        {
            let locked = [&x, state, &dstate, &dq, &dk, &dv].map(|tensor| Locked::new(NAME, tensor));
            let [x, state, dstate, dq, dk, dv] = &locked;
            let (state, dstate) = (state.view::<bf16>()?, dstate.view::<bf16>()?);
            launch!(device, WIDE, "wide_through", flat(channels);
                state, dstate, through.as_view(), channels as i64, d as i32, e as i32, self.width() as i32);
            launch!(device, WIDE, "wide_backward", flat(runs * threads);
                self.arg(x.start()?)?, dq.view::<bf16>()?, dk.view::<bf16>()?, through.as_view(), dx.as_view(),
                partials.as_view(), runs as i32, per_run as i32);
            let values = dx.slice(2 * heads * d..);
            launch!(device, WIDE, "wide_heads", flat(batch * tokens * heads * e / VECTOR);
                values, dv.view::<bf16>()?, batch as i32, tokens as i32, heads as i32, e as i32,
                self.sizes.row() as i64, 1i32);
        }
        let dphase = match &self.trig {
            None => None,
            Some(_) => {
                let partials = gpu::tensor(partials, device, &(runs, tokens * d).into());
                Some(sum_rows(&partials)?.reshape((tokens, d))?)
            }
        };
        Ok((gpu::tensor(dx, device, x.shape()), dphase))
    }
}

fn arg(sizes: Sizes, x: u64, trig: u64, keep: u64, [max, den]: [u64; 2]) -> WideArg {
    let width = if trig == 0 { sizes.d } else { 2 * sizes.d };
    WideArg {
        x,
        trig,
        keep,
        max,
        den,
        b: sizes.batch as i32,
        n: sizes.tokens as i32,
        h: sizes.heads as i32,
        d: sizes.d as i32,
        e: sizes.e as i32,
        w: width as i32,
    }
}

impl Gradient<1> for Saved {
    fn name(&self) -> &'static str {
        NAME
    }

    fn backward(&self, [x]: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let (dx, _) = self.call.backward(x, &self.state, grad)?;
        Ok([Some(dx)])
    }
}

impl Gradient<2> for Saved {
    fn name(&self) -> &'static str {
        NAME
    }

    fn backward(&self, [x, phase]: [&Tensor; 2], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let (dx, dphase) = self.call.backward(x, &self.state, grad)?;
        let dphase = dphase.map(|dphase| dphase.to_dtype(phase.dtype())).transpose()?;
        Ok([Some(dx), dphase])
    }
}
