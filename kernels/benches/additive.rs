//! Times the non-causal LightNet recurrence on the CPU, forward and backward, on the shapes of the builtin generator.
//!
//! ```text
//! cargo bench -p fulgur-kernels --bench additive -- [REPEATS]
//! ```
//!
//! Each row is the fastest of so many repeats (50 unless told) through the public entry. The last column is there for
//! scale: the backward pass of three elementwise products over the same inputs, done by candle.

#![allow(clippy::print_stdout)]

use std::time::Instant;

use candle_core::{Device, Result, Tensor, Var};
use fulgur_kernels::additive::{NonCausal, noncausal};
use fulgur_kernels::philox::Philox;

/// Repeats of every measurement.
const REPEATS: usize = 50;
/// Clips at a time: a prompt and what it keeps away from.
const BATCH: usize = 2;
const HEADS: usize = 5;
const KEY_WIDTH: usize = 64;
/// Streams of the builtin generator at its default size and length: name, tokens, value width of a head.
const STREAMS: [(&str, usize, usize); 2] = [("picture", 432, 64), ("sound", 400, 32)];

fn main() -> Result<()> {
    // Cargo adds `--bench` to the arguments of its own.
    let repeats = std::env::args()
        .skip(1)
        .find_map(|argument| argument.parse().ok());
    let repeats: usize = repeats.unwrap_or(REPEATS).max(1);
    println!(
        "{:<8} {:>6} {:>7} {:>11} {:>12} {:>12}",
        "stream", "tokens", "phases", "forward ms", "backward ms", "products ms"
    );
    for (name, tokens, value_width) in STREAMS {
        for phases in [false, true] {
            let Times {
                forward,
                backward,
                products,
            } = time(tokens, value_width, phases, repeats)?;
            println!(
                "{name:<8} {tokens:>6} {phases:>7} {:>11.3} {:>12.3} {:>12.3}",
                forward * 1e3,
                backward * 1e3,
                products * 1e3
            );
        }
    }
    Ok(())
}

/// Shortest times in seconds.
struct Times {
    forward: f64,
    backward: f64,
    products: f64,
}

fn time(tokens: usize, value_width: usize, phases: bool, repeats: usize) -> Result<Times> {
    let normal = |name: &str, shape: &[usize]| {
        let count = shape.iter().product();
        Tensor::from_vec(Philox::named(1, name).normals(count), shape, &Device::Cpu)
    };
    let keys = [BATCH, tokens, HEADS, KEY_WIDTH];
    let values = [BATCH, tokens, HEADS, value_width];
    let variable = |name: &str, shape: &[usize]| Var::from_tensor(&normal(name, shape)?);
    let (q, logits, v) = (
        variable("q", &keys)?,
        variable("logits", &keys)?,
        variable("v", &values)?,
    );
    let weights = normal("weights", &values)?;
    let phase = normal("phase", &[tokens, KEY_WIDTH])?;
    let options = NonCausal {
        phase: phases.then_some(&phase),
        ..Default::default()
    };
    let mut times = Times {
        forward: f64::INFINITY,
        backward: f64::INFINITY,
        products: f64::INFINITY,
    };
    for _ in 0..repeats {
        let began = Instant::now();
        let (o, _) = noncausal(&q, &logits, &v, &options)?;
        times.forward = times.forward.min(began.elapsed().as_secs_f64());
        let loss = (o * &weights)?.sum_all()?;
        let began = Instant::now();
        loss.backward()?;
        times.backward = times.backward.min(began.elapsed().as_secs_f64());
    }
    let key_weights = normal("key weights", &keys)?;
    let loss = (((q.as_tensor() * &key_weights)? + (logits.as_tensor() * &key_weights)?)?.sum_all()?
        + (v.as_tensor() * &weights)?.sum_all()?)?;
    for _ in 0..repeats {
        let began = Instant::now();
        loss.backward()?;
        times.products = times.products.min(began.elapsed().as_secs_f64());
    }
    Ok(times)
}
