//! Times the causal recurrence with decay on the CPU, forward and with its backward pass (by candle's graph and by a
//! tape), against the same operator out of candle's own.
//!
//! ```text
//! cargo bench -p fulgur-kernels --bench decay -- [REPEATS]
//! ```
//!
//! Each row is the fastest of so many repeats (10 unless told) through the public entry, in f32. `composed` evaluates
//! chunks of 64 tokens as batched products, with a triangular product over the states of chunks: one decay a head.

#![allow(clippy::print_stdout)]

use std::time::Instant;

use candle_core::{Device, Result, Tensor, Var};
use fulgur_kernels::decay::{Causal, LogDecay, causal};
use fulgur_kernels::philox::Philox;
use fulgur_kernels::tape;

/// Repeats of every measurement.
const REPEATS: usize = 10;
/// Batch, tokens, heads and width of a head.
const SHAPES: [[usize; 4]; 3] = [[1, 4096, 4, 64], [4, 1024, 4, 64], [1, 2048, 4, 128]];
const KINDS: [&str; 5] = ["composed", "none", "head", "token", "channel"];
/// Tokens of a chunk of the composed form.
const CHUNK: usize = 64;

fn main() -> Result<()> {
    // Cargo adds `--bench` to the arguments of its own.
    let repeats = std::env::args()
        .skip(1)
        .find_map(|argument| argument.parse().ok());
    let repeats: usize = repeats.unwrap_or(REPEATS).max(1);
    println!(
        "{:>3} {:>6} {:>3} {:>4} {:<9} {:>11} {:>12} {:>12}",
        "B", "N", "H", "D", "decay", "forward ms", "and back ms", "on a tape ms"
    );
    for shape in SHAPES {
        for kind in KINDS {
            let [b, n, h, d] = shape;
            let times = time(shape, kind, repeats)?;
            let [forward, both, taped] = times.map(|seconds| seconds * 1e3);
            println!("{b:>3} {n:>6} {h:>3} {d:>4} {kind:<9} {forward:>11.2} {both:>12.2} {taped:>12.2}");
        }
    }
    Ok(())
}

/// Shortest times in seconds: without gradients, forward and backward by candle's graph, and by a tape.
fn time([b, n, h, d]: [usize; 4], kind: &str, repeats: usize) -> Result<[f64; 3]> {
    let normal = |name: &str, shape: &[usize]| {
        let count = shape.iter().product();
        Tensor::from_vec(Philox::named(1, name).normals(count), shape, &Device::Cpu)
    };
    let tokens = [b, n, h, d];
    let inputs = [
        normal("q", &tokens)?,
        normal("k", &tokens)?,
        normal("v", &tokens)?,
    ];
    let log = match kind {
        "token" => normal("decay", &[b, n, h])?,
        "channel" => normal("decay", &tokens)?,
        _ => normal("decay", &[h])?,
    };
    let log = (log.sqr()? * -0.1)?;
    let weights = normal("weights", &tokens)?;
    let run = |q: &Tensor, k: &Tensor, v: &Tensor, log: &Tensor| {
        let decay = match kind {
            "composed" => return composed(q, k, v, log),
            "none" => LogDecay::None,
            "head" => LogDecay::Head(log),
            "token" => LogDecay::Token(log),
            _ => LogDecay::Channel(log),
        };
        let options = Causal {
            decay,
            ..Default::default()
        };
        Ok(causal(q, k, v, &options)?.0)
    };
    if kind == "composed" {
        check(&inputs, &log)?;
    }
    let [q, k, v] = &inputs;
    let vars = [q, k, v, &log].map(Var::from_tensor);
    let [q_var, k_var, v_var, log_var] = vars;
    let (q_var, k_var, v_var, log_var) = (q_var?, k_var?, v_var?, log_var?);
    let loss = || {
        let o = run(&q_var, &k_var, &v_var, &log_var)?;
        (o * &weights)?.sum_all()
    };
    let mut times = [f64::INFINITY; 3];
    let mut take =
        |index: usize, began: Instant| times[index] = times[index].min(began.elapsed().as_secs_f64());
    for _ in 0..repeats {
        let began = Instant::now();
        run(q, k, v, &log)?;
        take(0, began);
        let began = Instant::now();
        loss()?.backward()?;
        take(1, began);
        let began = Instant::now();
        let (loss, tape) = tape::record(loss);
        tape.backward(&loss?)?;
        take(2, began);
    }
    Ok(times)
}

/// Panics unless both forms give the same.
fn check([q, k, v]: &[Tensor; 3], log: &Tensor) -> Result<()> {
    let options = Causal {
        decay: LogDecay::Head(log),
        ..Default::default()
    };
    let (o, _) = causal(q, k, v, &options)?;
    let square = |x: &Tensor| x.sqr()?.sum_all()?.to_scalar::<f32>();
    let error = square(&(&o - composed(q, k, v, log)?)?)? / square(&o)?;
    assert!(error < 1e-10, "the forms differ: {error}");
    Ok(())
}

/// The recurrence with one decay a head out of candle's operators.
fn composed(q: &Tensor, k: &Tensor, v: &Tensor, log: &Tensor) -> Result<Tensor> {
    let (b, n, h, d) = q.dims4()?;
    let chunks = n / CHUNK;
    // Products take batches of matrices, decays broadcast over `[B, H, chunks, ..]`.
    let flat = |x: &Tensor| x.flatten(0, 2);
    let wide = |x: Tensor| {
        let (_, rows, columns) = x.dims3()?;
        x.reshape((b, h, chunks, rows, columns))
    };
    let split = |x: &Tensor| {
        let x = x.transpose(1, 2)?.contiguous()?;
        x.reshape((b, h, chunks, CHUNK, d))
    };
    let (q, k, v) = (split(q)?, split(k)?, flat(&split(v)?)?);
    let line = |steps: Vec<f32>| {
        let steps = Tensor::from_vec(steps, (1, CHUNK), log.device())?;
        let powers = log.reshape((h, 1))?.broadcast_mul(&steps)?.exp()?;
        powers.reshape((1, h, 1, CHUNK, 1))
    };
    let start = line((1..=CHUNK).map(|i| i as f32).collect())?;
    let end = line((0..CHUNK).rev().map(|i| i as f32).collect())?;
    let inside = triangle(log, CHUNK, 0, 1)?.unsqueeze(2)?;
    let scores = wide(flat(&q)?.matmul(&flat(&k)?.t()?)?)?.broadcast_mul(&inside)?;
    let intra = flat(&scores)?.matmul(&v)?;
    let added = flat(&k.broadcast_mul(&end)?)?.t()?.matmul(&v)?;
    let across = triangle(log, chunks, 1, CHUNK)?.broadcast_as((b, h, chunks, chunks))?;
    let states = across
        .contiguous()?
        .matmul(&added.reshape((b, h, chunks, d * d))?)?;
    let states = states.reshape((b * h * chunks, d, d))?;
    let inter = flat(&q.broadcast_mul(&start)?)?.matmul(&states)?;
    let o = (intra + inter)?.reshape((b, h, n, d))?;
    o.transpose(1, 2)?.contiguous()
}

/// `exp(stride (i - j - delay) log)` on and below a diagonal and zero above it, `[1, H, size, size]`.
fn triangle(log: &Tensor, size: usize, delay: usize, stride: usize) -> Result<Tensor> {
    let (h, device) = (log.elem_count(), log.device());
    let square = |entries: Vec<f32>| Tensor::from_vec(entries, (1, size, size), device);
    let steps: Vec<f32> = (0..size * size)
        .map(|at| (at / size, at % size))
        .map(|(i, j)| {
            i.checked_sub(j + delay)
                .map_or(0.0, |steps| (stride * steps) as f32)
        })
        .collect();
    let mask: Vec<f32> = (0..size * size)
        .map(|at| if at / size >= at % size + delay { 1.0 } else { 0.0 })
        .collect();
    let powers = log.reshape((h, 1, 1))?.broadcast_mul(&square(steps)?)?.exp()?;
    powers.broadcast_mul(&square(mask)?)?.unsqueeze(0)
}
