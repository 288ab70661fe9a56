//! Times training steps of the builtin denoiser on random latents: forward and backward, without the optimiser.
//!
//! ```text
//! cargo run --release -p fulgur-tavdiffusion --features cuda --example time_denoiser -- [BATCH] [STEPS] [graph]
//! ```
//!
//! With `graph` the backward pass is candle's own instead of that of a tape.

#![allow(clippy::print_stdout)]

use std::time::Instant;

#[cfg(not(feature = "cuda"))]
use candle_core::Device;
use candle_core::{DType, Result, Tensor};
use fulgur_kernels::philox::Philox;
use fulgur_kernels::tape;
use fulgur_lightnet::params::Params;
use fulgur_tavdiffusion::denoiser::{LatentShape, TextCondition, noise};
use fulgur_tavdiffusion::streams::{TwoStream, TwoStreamConfig};

/// Words of a prompt.
const WORDS: usize = 24;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).filter_map(|a| a.parse::<usize>().ok());
    let graph = std::env::args().any(|a| a == "graph");
    let (batch, steps) = (arguments.next().unwrap_or(128), arguments.next().unwrap_or(10));
    #[cfg(feature = "cuda")]
    let device = fulgur_kernels::device::open_cuda(0)?;
    #[cfg(not(feature = "cuda"))]
    let device = Device::Cpu;
    let compute = if device.is_cuda() { DType::BF16 } else { DType::F32 };
    let config = TwoStreamConfig::default();
    let params = Params::random(1, &device);
    let denoiser = TwoStream::new(&config, true, compute, &params.builder())?;
    let shape = LatentShape {
        video: [12, 12, 12, config.video.channels],
        audio: [100, 4, config.audio.channels],
    };
    let seeds: Vec<u64> = (0..batch as u64).collect();
    let latents = noise(&shape, &seeds, &device)?;
    let target = noise(
        &shape,
        &seeds.iter().map(|s| s + 1_000_000).collect::<Vec<_>>(),
        &device,
    )?;
    let random = |name: &str, dims: &[usize]| {
        let count = dims.iter().product();
        Tensor::from_vec(Philox::named(3, name).normals(count), dims, &device)
    };
    let text = TextCondition {
        states: random("text", &[batch, WORDS, config.text_dim])?,
        mask: Tensor::ones((batch, WORDS), DType::F32, &device)?,
    };
    let times: Vec<f32> = (0..batch).map(|i| (i as f32 + 0.5) / batch as f32).collect();
    let time = Tensor::from_vec(times, batch, &device)?;
    let weights: usize = params.vars().values().map(|v| v.elem_count()).sum();
    println!("{:.1} M parameters, batch {batch}", weights as f64 / 1e6);
    let (mut forward_s, mut backward_s) = (Vec::new(), Vec::new());
    for _ in 0..steps {
        device.synchronize()?;
        let began = Instant::now();
        let forward = || denoiser.forward(&latents, &time, &text);
        let (made, tape) = if graph {
            (forward(), None)
        } else {
            let (made, tape) = tape::record(forward);
            (made, Some(tape))
        };
        let (made, features) = made?;
        let mut loss = ((made.video - &target.video)?.sqr()?.mean_all()?
            + (made.audio - &target.audio)?.sqr()?.mean_all()?)?;
        if let Some((seen, heard)) = features {
            loss = (loss + (seen * heard)?.mean_all()?)?;
        }
        device.synchronize()?;
        forward_s.push(began.elapsed().as_secs_f64());
        let began = Instant::now();
        let gradients = match tape {
            Some(tape) => tape.backward(&loss)?,
            None => loss.backward()?,
        };
        device.synchronize()?;
        backward_s.push(began.elapsed().as_secs_f64());
        drop(gradients);
    }
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2] * 1e3
    };
    let (forward, backward) = (median(&mut forward_s), median(&mut backward_s));
    println!(
        "forward {forward:.1} ms, backward {backward:.1} ms, {:.0} clips/s",
        batch as f64 * 1e3 / (forward + backward)
    );
    Ok(())
}
