//! Times the recurrences on one GPU through their public entries, and prints one line of JSON for each.
//!
//! ```text
//! cargo run --release -p fulgur-kernels --features cuda --example bench_cuda -- [FILTER]
//! ```
//!
//! `forward_ms` and `backward_ms` are medians over runs of calls between two looks at the clock; the backward pass is that
//! of a tape from a given adjoint of the output. `kernels_ms` are what the kernels alone take, between events. `bytes` are those that have to move at least: operands once and results
//! once. `copy` is the bandwidth of a device-to-device copy in the same run.

#![allow(clippy::print_stdout)]

use candle_core::{DType, Device, Result, Tensor, Var};
use fulgur_kernels::decay::{Causal, LogDecay, causal, step};
use fulgur_kernels::probe::time_launches;
use fulgur_kernels::{additive, philox::Philox, tape};
use std::time::Instant;

/// Sizes B, N, H, D of one row; E is D.
type Sizes = [usize; 4];

const MAIN: Sizes = [4, 8192, 32, 128];

fn main() -> Result<()> {
    let filter = std::env::args().nth(1).unwrap_or_default();
    let device = fulgur_kernels::device::open_cuda(0)?;
    let copy_gbps = copy(&device)?;
    println!("{{\"kind\":\"copy\",\"gbps\":{copy_gbps:.0}}}");
    let long: Vec<Sizes> = (11..=18)
        .map(|log| [(1 << 18) >> log, 1 << log, 8, 128])
        .collect();
    let few = [[1, 32_768, 32, 128], [1, 262_144, 16, 128]];
    let kinds = ["none", "head", "token", "channel", "additive"];
    for kind in kinds
        .iter()
        .filter(|kind| kind.contains(&filter) || filter.is_empty())
    {
        sweep(kind, MAIN, &device)?;
    }
    if filter.is_empty() || filter == "noncausal" {
        noncausal(&device)?;
    }
    if filter.is_empty() || filter == "head" {
        for sizes in few.iter().chain(&long) {
            sweep("head", *sizes, &device)?;
        }
        for batch in [1, 64] {
            decode(batch, &device)?;
        }
    }
    Ok(())
}

/// Median milliseconds of a call, over runs of a few calls each.
fn milliseconds(device: &Device, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    for _ in 0..2 {
        call()?;
    }
    device.synchronize()?;
    let start = Instant::now();
    call()?;
    device.synchronize()?;
    // Runs of 20 ms, so that a look at the clock costs nothing.
    let calls = (0.02 / start.elapsed().as_secs_f64()).clamp(1.0, 50.0) as usize;
    let mut times = Vec::new();
    for _ in 0..9 {
        let start = Instant::now();
        for _ in 0..calls {
            call()?;
        }
        device.synchronize()?;
        times.push(start.elapsed().as_secs_f64() * 1e3 / calls as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn random(name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
    // A few thousand draws repeated: products do not care, and the host draws no gigabytes.
    let count: usize = shape.iter().product();
    let draws = Philox::named(1, name).normals(count.min(65_521));
    let draws = Tensor::from_vec(draws, count.min(65_521), device)?;
    let repeats = count.div_ceil(draws.elem_count());
    draws.repeat(repeats)?.narrow(0, 0, count)?.reshape(shape)
}

/// Bandwidth of a copy of one tensor of the main shape, counted read and written.
fn copy(device: &Device) -> Result<f64> {
    let x = random("copy", &MAIN, device)?.to_dtype(DType::BF16)?;
    let ms = milliseconds(device, || x.copy().map(drop))?;
    Ok(2.0 * 2.0 * x.elem_count() as f64 / ms / 1e6)
}

/// Times of one direction: through the public entry, and of its kernels alone.
#[derive(Clone, Copy)]
struct Times {
    entry: f64,
    kernels: f64,
}

/// Times of an entry forward, and of what a backward pass adds to it.
fn both_ways(device: &Device, run: impl Fn() -> Result<Tensor>, d_o: &Tensor) -> Result<[Option<Times>; 2]> {
    let forward = || run().map(drop);
    let both = || {
        let (result, tape) = tape::record(&run);
        tape.backward_from(&result?, d_o).map(drop)
    };
    let alone = Times {
        entry: milliseconds(device, forward)?,
        kernels: kernels(device, forward)?,
    };
    let joined = Times {
        entry: milliseconds(device, both)?,
        kernels: kernels(device, both)?,
    };
    let backward = Times {
        entry: joined.entry - alone.entry,
        kernels: joined.kernels - alone.kernels,
    };
    Ok([Some(alone), Some(backward)])
}

/// Median milliseconds of all kernels of a call.
fn kernels(device: &Device, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut sums = Vec::new();
    for _ in 0..9 {
        device.synchronize()?;
        let ((), launches) = time_launches(&mut call)?;
        sums.push(launches.iter().map(|(_, ms)| ms).sum::<f64>());
    }
    sums.sort_by(f64::total_cmp);
    Ok(sums[sums.len() / 2])
}

/// Prints a row.
fn row(kind: &str, shape: Sizes, times: [Option<Times>; 2], bytes: [usize; 2], flops: [usize; 2]) {
    let names = ["forward", "backward"];
    let parts: Vec<String> = (0..2)
        .filter_map(|i| {
            let (name, Times { entry, kernels }) = (names[i], times[i]?);
            let (bytes, flops) = (bytes[i], flops[i]);
            Some(format!(
                "\"{name}_ms\":{entry:.4},\"{name}_kernels_ms\":{kernels:.4},\"{name}_bytes\":{bytes},\"{name}_flops\":{flops}"
            ))
        })
        .collect();
    println!("{{\"kind\":\"{kind}\",\"shape\":{shape:?},{}}}", parts.join(","));
}

fn sweep(kind: &str, sizes: Sizes, device: &Device) -> Result<()> {
    let [b, n, h, d] = sizes;
    let operand = |name: &str| {
        random(name, &sizes, device)?
            .affine(0.3, 0.0)?
            .to_dtype(DType::BF16)
    };
    let vars = [
        Var::from_tensor(&operand("q")?)?,
        Var::from_tensor(&operand("k")?)?,
        Var::from_tensor(&operand("v")?)?,
    ];
    let d_o = operand("do")?;
    let log = match kind {
        "head" => Some(random("log", &[h], device)?),
        "token" => Some(random("log", &[b, n, h], device)?),
        "channel" => Some(random("log", &sizes, device)?),
        _ => None,
    };
    let log = log.map(|log| log.sqr()? * -0.1).transpose()?;
    // Gates of channels are learnt, as HGRN2 does.
    let log = match log {
        Some(log) if kind == "channel" => Some(Var::from_tensor(&log)?.into_inner()),
        other => other,
    };
    let decay = match (kind, &log) {
        ("head", Some(log)) => LogDecay::Head(log),
        ("token", Some(log)) => LogDecay::Token(log),
        ("channel", Some(log)) => LogDecay::Channel(log),
        _ => LogDecay::None,
    };
    let options = Causal {
        decay,
        ..Default::default()
    };
    let [q, k, v] = vars.each_ref().map(|var| var.as_tensor().clone());
    let run = || match kind {
        "additive" => additive::causal(&q, &k, &v, &Default::default()).map(|(o, _)| o),
        _ => causal(&q, &k, &v, &options).map(|(o, _)| o),
    };
    let times = both_ways(device, run, &d_o)?;
    let elements = b * n * h * d;
    // Gates of channels are f32, and so is their adjoint.
    let gates = if kind == "channel" { 4 * elements } else { 0 };
    row(
        kind,
        sizes,
        times,
        [8 * elements + gates, 14 * elements + 2 * gates],
        [4 * elements * d, 12 * elements * d],
    );
    Ok(())
}

fn decode(batch: usize, device: &Device) -> Result<()> {
    let (h, d) = (32, 128);
    let operand = |name: &str| random(name, &[batch, h, d], device)?.to_dtype(DType::BF16);
    let (q, k, v) = (operand("q")?, operand("k")?, operand("v")?);
    let state = random("state", &[batch, h, d, d], device)?;
    let log = (random("log", &[h], device)?.sqr()? * -0.1)?;
    let call = || step(&q, &k, &v, LogDecay::Head(&log), &state).map(drop);
    let times = Times {
        entry: milliseconds(device, call)?,
        kernels: kernels(device, call)?,
    };
    let state = batch * h * d * d;
    row(
        "step",
        [batch, 1, h, d],
        [Some(times), None],
        [8 * state, 0],
        [4 * state, 0],
    );
    Ok(())
}

/// The non-causal additive recurrence from fused projections.
fn noncausal(device: &Device) -> Result<()> {
    let [b, n, h, d] = [8, 16_384, 16, 64];
    let x = random("x", &[b, n, 3 * h * d], device)?.to_dtype(DType::BF16)?;
    let (x, d_o) = (
        Var::from_tensor(&x)?,
        random("do", &[b, n, h * d], device)?.to_dtype(DType::BF16)?,
    );
    let run = || additive::projected(&x, h, d, &Default::default());
    let times = both_ways(device, run, &d_o)?;
    let elements = b * n * h * d;
    row(
        "noncausal",
        [b, n, h, d],
        times,
        [8 * elements, 14 * elements],
        [4 * elements * d, 12 * elements * d],
    );
    Ok(())
}
