//! Times of the operators that are limited by memory bandwidth.

use crate::{BOTH, EPS, Entry};
use candle_core::{DType, Device, Result, Tensor, Var};
use fulgur_kernels::adamw::{AdamW, GradientScale, squared_norm, zero_moments};
use fulgur_kernels::spectrum::Stft;
use fulgur_kernels::{glu, norm, shift};
use std::time::Instant;

/// Seconds of one call, the mean of 30 after 5.
pub(crate) fn seconds(device: &Device, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut start = Instant::now();
    for i in 0..35 {
        if i == 5 {
            device.synchronize()?;
            start = Instant::now();
        }
        call()?;
    }
    device.synchronize()?;
    Ok(start.elapsed().as_secs_f64() / 30.0)
}

/// Times forward, and forward with backward, over [32768 x 512] operands.
///
/// `passes` counts elements read and written forward, and backward, in units of 32768 x 512.
pub(crate) fn time(
    name: &str,
    entry: Entry,
    shapes: &[&[usize]],
    passes: [f64; 2],
    dtype: DType,
    device: &Device,
) -> Result<()> {
    let vars: Vec<Var> = shapes
        .iter()
        .map(|shape| Var::from_tensor(&Tensor::rand(-1f32, 1.0, *shape, device)?.to_dtype(dtype)?))
        .collect::<Result<_>>()?;
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let forward = seconds(device, || entry(&tensors).map(drop))?;
    let both = seconds(device, || entry(&tensors)?.backward().map(drop))?;
    let gigabytes = (32_768 * 512 * dtype.size_in_bytes()) as f64 / 1e9;
    println!(
        "{name:<20} {:<5} {:>9.1} {:>9.0} {:>12.1} {:>9.0}",
        format!("{dtype:?}"),
        forward * 1e6,
        passes[0] * gigabytes / forward,
        both * 1e6,
        (passes[0] + passes[1]) * gigabytes / both,
    );
    Ok(())
}

pub(crate) fn timings(device: &Device) -> Result<()> {
    println!();
    println!(
        "[32768 x 512] through the public entry; forward + backward includes candle's seed and sum of gradients"
    );
    println!(
        "{:<26} {:>9} {:>9} {:>12} {:>9}",
        "operator", "fwd us", "GB/s", "fwd+bwd us", "GB/s"
    );
    let x: &[usize] = &[32, 1024, 512];
    let wide: &[usize] = &[32, 1024, 1024];
    let condition: &[usize] = &[32, 512];
    for &dtype in BOTH {
        time(
            "rms_norm",
            |t| norm::rms_norm(&t[0], None, EPS),
            &[x],
            [2.0, 3.0],
            dtype,
            device,
        )?;
        time(
            "rms_norm gain",
            |t| norm::rms_norm(&t[0], Some(&t[1]), EPS),
            &[x, &[512]],
            [2.0, 5.0],
            dtype,
            device,
        )?;
        time(
            "rms_norm_modulated",
            |t| norm::rms_norm_modulated(&t[0], &t[1], &t[2], EPS),
            &[x, condition, condition],
            [2.0, 5.0],
            dtype,
            device,
        )?;
        time(
            "swiglu",
            |t| glu::swiglu(&t[0]),
            &[wide],
            [3.0, 5.0],
            dtype,
            device,
        )?;
        time(
            "gated",
            |t| glu::gated(&t[0], &t[1]),
            &[x, x],
            [3.0, 5.0],
            dtype,
            device,
        )?;
        time(
            "token_shift",
            |t| shift::token_shift(&t[0]),
            &[&[64, 8, 8, 8, 512]],
            [2.0, 2.0],
            dtype,
            device,
        )?;
    }
    for &dtype in BOTH {
        crate::fused::timings(dtype, device)?;
    }
    let parameter = Var::zeros((32_768, 512), DType::F32, device)?;
    let gradient = parameter.ones_like()?;
    let moments = zero_moments(&parameter)?;
    let elements = parameter.elem_count() as f64;
    let step = seconds(device, || {
        AdamW::default().step(&parameter, &moments, &gradient, 1, GradientScale::Host(1.0))
    })?;
    println!(
        "{:<26} {:>9.1} {:>9.0}",
        "adamw step",
        step * 1e6,
        28.0 * elements / step / 1e9
    );
    let norm = seconds(device, || squared_norm(&[&gradient]).map(drop))?;
    println!(
        "{:<26} {:>9.1} {:>9.0}",
        "squared_norm",
        norm * 1e6,
        4.0 * elements / norm / 1e9
    );
    crate::training::timings(device)?;
    let wave = Tensor::rand(-1f32, 1.0, (64, 64_000), device)?;
    let transform = Stft::new(1024, 640, 160, DType::F32, device)?;
    let magnitude = seconds(device, || transform.magnitude(&wave).map(drop))?;
    let spectrum = transform.packed(&wave)?;
    let inverse = seconds(device, || transform.inverse_packed(&spectrum).map(drop))?;
    println!(
        "64 clips of 4 s: stft magnitude {:.0} us, inverse {:.0} us",
        magnitude * 1e6,
        inverse * 1e6
    );
    Ok(())
}
