//! The recurrence on a GPU: sweeps over all tokens, with a scan over segments where a sequence is cut into several.
//!
//! | sweep | reads, writes, values | from the |
//! |---|---|---|
//! | output | q, k, v | first token |
//! | dq | do, v, k | first token |
//! | dk | v, do, q | last token |
//! | dv | k, q, do | last token |
//!
//! | form | takes |
//! |---|---|
//! | tensor cores, `cuda/decay_uniform.cu` | bf16 and f16, one decay for all channels of a head, which is not learnt, widths of 8, 16 .. 128 |
//! | tensor cores, `cuda/decay_channel_*.cu` | bf16 and f16, a decay for each channel, learnt or not, or a learnt one for each token, widths of 8, 16 .. 128 |
//! | plain, `cuda/decay_plain.cu` | everything else with widths up to 256, in f32 |
//!
//! Kept for the backward pass: the inputs, and the states that enter segments, one f32 state for each segment where there
//! are several. During the backward pass of learnt decays of channels, one bf16 state for 64 tokens and head as well.

mod additive;
pub(crate) mod cut;
mod step;
pub(crate) mod sweep;

pub(crate) use additive::additive;
pub(super) use step::{step, step_fused};

use super::{Causal, Dims, Kind, LogDecay, NAME, Passed, StateGradient};
use crate::autograd::{GradientOfMany, Value, attach_many, attach1};
use crate::cuda_module::{THREADS, launch, room};
use crate::error::OpError;
use crate::exchange::{Direction, StateExchange, arriving};
use crate::gpu::{self, Locked};
use crate::log_sum::cuda::Terms;
use crate::log_sum::{self, Scan};
use crate::tape::{Needs, Set};
use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{DType, Result, Tensor, bail};
use cut::Cut;
use std::sync::{Arc, Mutex};
use sweep::{Form, Gate, GateWork, LogDecays, Made, PLAIN, Side, Sweep, Sweeper};

/// Rows of terms that a block of `decay_terms` takes, and columns of one of `decay_sums`.
const TERM_ROWS: usize = THREADS as usize / 32;
const SUM_COLUMNS: usize = 32;

/// [`super::causal`] for checked inputs on a GPU.
pub(super) fn causal(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &Causal<'_>,
    dims: Dims,
) -> Result<(Tensor, Tensor)> {
    let form = form([q, k, v], options, dims)?;
    if let (LogDecay::Token(log), Form::Channel(_)) = (options.decay, form) {
        let Dims { b, n, h, d, .. } = dims;
        let wide = log.to_dtype(DType::F32)?.unsqueeze(3)?;
        let wide = wide.broadcast_as((b, n, h, d))?.contiguous()?;
        let options = Causal {
            decay: LogDecay::Channel(&wide),
            initial: options.initial,
            exchange: options.exchange.clone(),
            sequences: options.sequences,
        };
        return causal(q, k, v, &options, dims);
    }
    let device = q.device().as_cuda_device()?;
    let [q, k, v] = [
        q.to_dtype(form.dtype())?,
        k.to_dtype(form.dtype())?,
        v.to_dtype(form.dtype())?,
    ];
    let decay = options
        .decay
        .tensor()
        .map(|log| log.to_dtype(DType::F32))
        .transpose()?;
    let initial = options
        .initial
        .map(|state| state.to_dtype(DType::F32)?.contiguous())
        .transpose()?;
    let blocks = form.tiles(dims.e) * dims.h;
    let recurrence = Recurrence {
        sweeper: Sweeper {
            form,
            cut: Arc::new(Cut::new(device, (dims.b, dims.n), options.sequences, blocks)?),
            decays: LogDecays::new(options.decay.kind(), decay.as_ref().map(Tensor::detach), form)?,
            device: device.clone(),
        },
        dims,
        exchange: options.exchange.clone().filter(|exchange| exchange.parts() > 1),
        packed: options.sequences.is_some(),
    };
    let (enter, finals, o) = recurrence.forward(&q.detach(), &k.detach(), &v.detach(), initial.as_ref())?;
    let mut args = vec![&q, &k, &v];
    args.extend(decay.as_ref());
    args.extend(initial.as_ref());
    let d_state: Passed = Arc::new(Mutex::new(None));
    let learnt = decay.as_ref().is_some_and(Tensor::track_op);
    let gradient = OutputGradient {
        learnt,
        finals: (learnt && form == Form::Plain).then(|| finals.clone()),
        recurrence: recurrence.with(recurrence.sweeper.decays.forgotten()),
        enter,
        d_state: d_state.clone(),
    };
    let o = attach_many(o, &args, gradient)?;
    let state = attach1(Value::Tensor(finals), &o, StateGradient { d_state })?;
    Ok((o, state))
}

/// Which kernels take such a call.
fn form(rows: [&Tensor; 3], options: &Causal<'_>, dims: Dims) -> Result<Form> {
    let Dims { b, n, h, d, e } = dims;
    let wide = [
        Some(rows[0]),
        Some(rows[1]),
        Some(rows[2]),
        options.decay.tensor(),
        options.initial,
    ];
    if super::wide_type(wide) == DType::F64 {
        let expected = "f32, f16 or bf16 on a GPU".to_owned();
        return Err(OpError::value(NAME, "an operand", "f64".to_owned(), expected).into());
    }
    let halves = rows.iter().all(|t| matches!(t.dtype(), DType::BF16 | DType::F16));
    let learnt = options.decay.tensor().is_some_and(Tensor::track_op);
    let fits = |form: Form| d.max(e) <= form.widest();
    let form = if !halves || d % 8 != 0 || e % 8 != 0 || !fits(Form::Uniform) {
        Form::Plain
    } else {
        match options.decay {
            LogDecay::Channel(_) => Form::Channel(Gate::Decay),
            // The same decay for each channel: the sum over their adjoints is its own.
            LogDecay::Token(_) if learnt => Form::Channel(Gate::Decay),
            LogDecay::Head(_) if learnt => Form::Plain,
            _ => Form::Uniform,
        }
    };
    if !fits(form) {
        let (found, expected) = (
            format!("D {d}, E {e}"),
            "widths of heads up to 256 on a GPU".to_owned(),
        );
        return Err(OpError::value(NAME, "width", found, expected).into());
    }
    check_size(dims)?;
    tracing::debug!(?form, b, n, h, d, e, decay = ?options.decay.kind(), learnt, "decay::causal");
    Ok(form)
}

/// Kernels count with 32 bits in places.
fn check_size(Dims { b, n, h, d, e }: Dims) -> Result<()> {
    let elements = b * n * h * d.max(e);
    if elements > i32::MAX as usize {
        let expected = format!("at most {} elements of a tensor on a GPU", i32::MAX);
        return Err(OpError::value(NAME, "size", elements.to_string(), expected).into());
    }
    Ok(())
}

/// What the sweeps of a backward pass make of the gates of channels.
enum Gates<'a> {
    None,
    /// The adjoint of log-decays.
    Decays,
    /// The adjoint of logits, instead of that of keys; `last` pulls behind the last tokens.
    Logits {
        scan: &'a Scan,
        last: Option<&'a Tensor>,
    },
}

/// Adjoints that a backward pass made.
struct Adjoints {
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    d_initial: Tensor,
    d_log: Option<Tensor>,
    /// Sums for the adjoint of logits.
    sums: Option<Tensor>,
    /// Adjoints of the states at the ends of segments; zeros if absent.
    arriving: Option<Tensor>,
}

/// One call of the operator.
struct Recurrence {
    sweeper: Sweeper,
    dims: Dims,
    exchange: Option<Arc<dyn StateExchange>>,
    packed: bool,
}

impl Recurrence {
    /// The same call with other decays.
    fn with(&self, decays: LogDecays) -> Self {
        Self {
            sweeper: Sweeper {
                form: self.sweeper.form,
                cut: self.sweeper.cut.clone(),
                decays,
                device: self.sweeper.device.clone(),
            },
            dims: self.dims,
            exchange: self.exchange.clone(),
            packed: self.packed,
        }
    }

    /// The sweep of the output.
    fn output<'a>(
        &self,
        read: Option<&'a Tensor>,
        k: &'a Tensor,
        v: &'a Tensor,
        enter: Option<&'a Tensor>,
        leave: bool,
    ) -> Sweep<'a> {
        Sweep {
            read,
            write: k,
            value: v,
            side: Side::Keys,
            direction: Direction::Forward,
            enter,
            leave,
            gates: GateWork::None,
        }
    }

    /// The states that enter segments, if not all are zero, the final states, and the output.
    fn forward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        initial: Option<&Tensor>,
    ) -> Result<(Option<Tensor>, Tensor, Value)> {
        let sweep = |read, enter, leave| self.output(read, k, v, enter, leave);
        let whole = self.sweeper.cut.parts() == 1 && self.exchange.is_none();
        let (enter, finals) = if whole {
            (initial.cloned(), None)
        } else {
            let locals = made(self.sweeper.run(&sweep(None, None, true))?.leave)?;
            let (enter, finals) = self.scan(locals.tensor(), initial, Direction::Forward)?;
            (Some(enter), Some(finals))
        };
        let swept = self.sweeper.run(&sweep(Some(q), enter.as_ref(), whole))?;
        let finals = match finals {
            Some(finals) => finals,
            None => made(swept.leave)?.tensor(),
        };
        Ok((enter, finals, made(swept.out)?.value()))
    }

    /// From what segments add to the state to what enters them and what leaves each sequence.
    fn scan(&self, locals: Tensor, own: Option<&Tensor>, direction: Direction) -> Result<(Tensor, Tensor)> {
        let totals = self.totals()?;
        let Some(exchange) = &self.exchange else {
            return self.scan_segments(locals, totals.as_ref(), own, direction);
        };
        let (_, leaving) = self.scan_segments(locals.copy()?, totals.as_ref(), own, direction)?;
        let (sequences, width) = (self.sweeper.cut.sequences(), self.sweeper.decays.width());
        let shape = (sequences, self.sweeper.cut.parts(), self.dims.h, width);
        let log = match &totals {
            Some(totals) => totals.reshape(shape)?.sum(1)?.unsqueeze(3)?,
            None => Tensor::zeros((sequences, self.dims.h, 1, 1), DType::F32, leaving.device())?,
        };
        let others = arriving(exchange, &leaving, &log, direction, self.packed)?;
        let others = others.to_device(leaving.device())?.to_dtype(DType::F32)?;
        let entering = match own {
            Some(own) => (others + own)?,
            None => others,
        };
        self.scan_segments(locals, totals.as_ref(), Some(&entering.contiguous()?), direction)
    }

    /// Sums of log-decays of each segment, head and channel; none without decay.
    fn totals(&self) -> Result<Option<Tensor>> {
        let Sweeper {
            form,
            cut,
            decays,
            device,
        } = &self.sweeper;
        let Some(log) = &decays.tensor else {
            return Ok(None);
        };
        if *form == Form::Channel(Gate::Additive) {
            return self.gate_totals(log).map(Some);
        }
        let (rows, width) = (cut.segments() * self.dims.h, decays.width());
        let totals = room::<f32>(device, rows * width)?;
        launch!(device, PLAIN, "decay_totals", blocks(rows, 1);
            decays.argument()?, cut.argument()?, totals.as_view(), self.dims.h as i32, width as i32);
        Ok(Some(gpu::tensor(totals, device, &(rows, width).into())))
    }

    /// [`Self::totals`] where the decay is the difference of gates `z`.
    fn gate_totals(&self, z: &Tensor) -> Result<Tensor> {
        let Sweeper { cut, decays, .. } = &self.sweeper;
        let Dims { b, n, h, d, .. } = self.dims;
        let rows = |tokens: Vec<u32>| {
            let count = tokens.len();
            z.index_select(&Tensor::from_vec(tokens, count, z.device())?, 1)
        };
        let ends: Vec<u32> = (1..=cut.parts())
            .map(|part| (part * cut.longest()).min(n) as u32 - 1)
            .collect();
        let first = match &decays.before {
            Some(before) => before.unsqueeze(1)?,
            None => rows(vec![0])?,
        };
        let last = rows(ends)?;
        let starts = Tensor::cat(&[&first, &last.narrow(1, 0, cut.parts() - 1)?], 1)?;
        (starts - last)?.reshape((b * cut.parts() * h, d))
    }

    /// [`Self::scan`] within this part; works in the memory of `locals`.
    fn scan_segments(
        &self,
        locals: Tensor,
        totals: Option<&Tensor>,
        own: Option<&Tensor>,
        direction: Direction,
    ) -> Result<(Tensor, Tensor)> {
        let Sweeper {
            cut, decays, device, ..
        } = &self.sweeper;
        let Dims { h, d, e, .. } = self.dims;
        let last = room::<f32>(device, cut.sequences() * h * d * e)?;
        {
            let locked = [Some(&locals), totals, own].map(|t| t.map(|t| Locked::new(NAME, t)));
            let mut address = [0; 3];
            for (address, locked) in address.iter_mut().zip(&locked) {
                *address = locked.as_ref().map_or(Ok(0), Locked::start)?;
            }
            let [states, totals, initial] = address;
            launch!(device, PLAIN, "decay_scan", blocks((d * e).div_ceil(THREADS as usize), cut.sequences() * h);
                states, totals, initial, last.as_view(), cut.parts() as i32, h as i32, d as i32, e as i32,
                decays.width() as i32, i32::from(direction == Direction::Backward));
        }
        let last = gpu::tensor(last, device, &(cut.sequences(), h, d, e).into());
        Ok((locals, last))
    }

    /// Adjoints of q, k, v and of the initial state, and of learnt decays of channels where the sweeps make it.
    fn backward(
        &self,
        [q, k, v]: [&Tensor; 3],
        enter: Option<&Tensor>,
        d_o: &Tensor,
        d_state: Option<&Tensor>,
        gates: &Gates<'_>,
    ) -> Result<Adjoints> {
        let forward = self.sweeper.run(&Sweep {
            read: Some(d_o),
            write: v,
            value: k,
            side: Side::Values,
            direction: Direction::Forward,
            enter,
            leave: false,
            gates: match gates {
                Gates::Decays => GateWork::States,
                _ => GateWork::None,
            },
        })?;
        let dq = made(forward.out)?.tensor();
        let states = forward.gates.map(Made::tensor);
        let sums = match (gates, &self.sweeper.decays.tensor) {
            (Gates::Logits { scan, last }, Some(z)) => {
                let dense = if q.stride()[3] == 1 {
                    q.clone()
                } else {
                    q.contiguous()?
                };
                Some(log_sum::cuda::pull(scan, Terms::Products(&dense, &dq), z, *last)?)
            }
            _ => None,
        };
        let adjoint = |read, enter, leave| Sweep {
            read,
            write: q,
            value: d_o,
            side: Side::Keys,
            direction: Direction::Backward,
            enter,
            leave,
            gates: GateWork::None,
        };
        let whole = self.sweeper.cut.parts() == 1 && self.exchange.is_none();
        let (enter, d_initial) = if whole {
            (d_state.cloned(), None)
        } else {
            let locals = made(self.sweeper.run(&adjoint(None, None, true))?.leave)?;
            let (enter, first) = self.scan(locals.tensor(), d_state, Direction::Backward)?;
            (Some(enter), Some(first))
        };
        let swept = self.sweeper.run(&adjoint(Some(k), enter.as_ref(), whole))?;
        let dv = made(swept.out)?.tensor();
        let d_initial = match d_initial {
            Some(d_initial) => d_initial,
            None => made(swept.leave)?.tensor(),
        };
        let reverse = self.sweeper.run(&Sweep {
            read: Some(v),
            write: d_o,
            value: q,
            side: Side::Values,
            direction: Direction::Backward,
            enter: enter.as_ref(),
            leave: false,
            gates: match (&states, &sums) {
                (Some(states), _) => GateWork::Decays {
                    key: k,
                    d_query: &dq,
                    states,
                },
                (None, Some(sums)) => GateWork::Logits { key: k, sums },
                (None, None) => GateWork::None,
            },
        })?;
        Ok(Adjoints {
            dk: made(reverse.out)?.tensor(),
            d_log: reverse.gates.map(Made::tensor),
            dq,
            dv,
            d_initial,
            sums,
            arriving: enter,
        })
    }

    /// The adjoint of the log-decays from those of q and k, all in f32, and from those of the states at the ends of segments:
    /// `d log a_t = sum_{s >= t} (q dq - k dk)_s + rowsum(S_N (*) dS_N)`.
    fn decay_adjoint(
        &self,
        [q, dq, k, dk]: [&Tensor; 4],
        finals: &Tensor,
        arriving: Option<&Tensor>,
    ) -> Result<Tensor> {
        let Sweeper {
            cut, decays, device, ..
        } = &self.sweeper;
        let Dims { b, n, h, d, e } = self.dims;
        let (width, rows) = (decays.width(), b * n * h);
        let last = match arriving {
            Some(arriving) => {
                let arriving = arriving.reshape((cut.sequences(), cut.parts(), h, d, e))?;
                let channels = (finals * arriving.get_on_dim(1, cut.parts() - 1)?)?.sum(3)?;
                Some(if width == 1 { channels.sum(2)? } else { channels }.contiguous()?)
            }
            None => None,
        };
        let terms = room::<f32>(device, rows * width)?;
        {
            let dense = [
                q.contiguous()?,
                dq.contiguous()?,
                k.contiguous()?,
                dk.contiguous()?,
            ];
            let locked = dense.each_ref().map(|t| Locked::new(NAME, t));
            launch!(device, PLAIN, "decay_terms", blocks(rows.div_ceil(TERM_ROWS), 1);
                locked[0].view::<f32>()?, locked[1].view::<f32>()?, locked[2].view::<f32>()?, locked[3].view::<f32>()?,
                terms.as_view(), rows as i64, d as i32, width as i32);
            let last = last.as_ref().map(|t| Locked::new(NAME, t));
            let last = last.as_ref().map_or(Ok(0), Locked::start)?;
            let columns = h * width;
            launch!(device, PLAIN, "decay_sums", blocks(columns.div_ceil(SUM_COLUMNS), cut.sequences());
                terms.as_view(), last, cut.borders(), n as i32, columns as i32);
        }
        let terms = |shape: candle_core::Shape| gpu::tensor(terms, device, &shape);
        match decays.kind {
            Kind::Channel => Ok(terms((b, n, h, d).into())),
            Kind::Token => Ok(terms((b, n, h).into())),
            Kind::Head | Kind::None => bail!("{NAME}: the adjoint of a decay of heads is a tangent"),
        }
    }
}

fn blocks(x: usize, y: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (x as u32, y as u32, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    }
}

/// What a sweep was asked for.
fn made(made: Option<Made>) -> Result<Made> {
    match made {
        Some(made) => Ok(made),
        None => bail!("{NAME}: a sweep did not make what it was asked for"),
    }
}

/// Backward of the output, and of the final state behind it.
struct OutputGradient {
    /// Without the decays, which are an argument.
    recurrence: Recurrence,
    enter: Option<Tensor>,
    /// Whether the decays are.
    learnt: bool,
    /// Only where their adjoint is made outside of sweeps.
    finals: Option<Tensor>,
    d_state: Passed,
}

impl GradientOfMany for OutputGradient {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::ALL)
    }

    fn holds(&self) -> Vec<Tensor> {
        [&self.enter, &self.finals]
            .into_iter()
            .flatten()
            .cloned()
            .collect()
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let d_state = match self.d_state.lock() {
            Ok(mut d_state) => d_state.take(),
            Err(_) => bail!("{NAME}: the adjoint of the state was lost in a panic"),
        };
        let d_state = d_state.map(|d_state| d_state.contiguous()).transpose()?;
        let [q, k, v] = [args[0].detach(), args[1].detach(), args[2].detach()];
        let grad = grad.detach();
        let Sweeper { form, decays, .. } = &self.recurrence.sweeper;
        let (form, kind) = (*form, decays.kind);
        let has_decay = kind != Kind::None;
        let log = has_decay.then(|| args[3].detach());
        let recurrence = self.recurrence.with(LogDecays::new(kind, log, form)?);
        let gates = match form {
            Form::Channel(_) if self.learnt => Gates::Decays,
            _ => Gates::None,
        };
        let Adjoints {
            dq,
            dk,
            dv,
            d_initial,
            d_log,
            arriving,
            ..
        } = recurrence.backward([&q, &k, &v], self.enter.as_ref(), &grad, d_state.as_ref(), &gates)?;
        let d_log = match &self.finals {
            Some(_) if kind == Kind::Head => {
                let sweep = recurrence.output(Some(&q), &k, &v, self.enter.as_ref(), false);
                Some(recurrence.sweeper.tangent(&sweep, &grad, arriving.as_ref())?)
            }
            Some(finals) => {
                let around = [&q, &dq, &k, &dk];
                Some(recurrence.decay_adjoint(around, finals, arriving.as_ref())?)
            }
            None => d_log,
        };
        let mut all = vec![Some(dq), Some(dk), Some(dv)];
        if has_decay {
            all.push(d_log);
        }
        if args.len() > all.len() {
            all.push(Some(d_initial));
        }
        for (adjoint, arg) in all.iter_mut().zip(args) {
            if !arg.track_op() {
                *adjoint = None;
            }
        }
        Ok(all)
    }
}
