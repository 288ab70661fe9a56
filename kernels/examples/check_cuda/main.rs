//! Compares every fused CUDA operator, forward and backward, with the f64 form on the processor, then times it.
//!
//! ```text
//! cargo run --release -p fulgur-kernels --features cuda --example check_cuda -- [NAME..] [small] [untimed] [record=FILE]
//! ```
//!
//! Names select operators by how they begin, and leave out the timings, as `untimed` does. `small` takes few short shapes of each case,
//! for runs under a sanitizer, which meet each kernel all the same. `record=FILE` writes how many checks passed.
//!
//! Results lie in memory that was full of NaN, with guard bytes behind it.
//!
//! Each row of the first table is one operator, element type and shape: the relative RMS error of the result and of
//! each gradient, and whether a second run gave the same bits. The exit code is 1 if anything failed.
//! The operators that parts of a sequence share are run by a thread for each part as well.

#![allow(clippy::print_stdout)]

mod decoding;
mod eos;
mod fused;
mod parts;
mod recurrence;
mod softmax_attention;
mod tape;
mod timings;
mod training;

use candle_core::{DType, Device, Result, Tensor, Var};
use fulgur_kernels::adamw::{AdamW, GradientScale, clip_scale, squared_norm, zero_moments};
use fulgur_kernels::additive::{self, NonCausal};
use fulgur_kernels::philox::Philox;
use fulgur_kernels::spectrum::{Mel, MelConfig, Stft};
use fulgur_kernels::{attention, device, ema, glu, linear, norm, probe, residual, rows, shift};
use std::process::ExitCode;

type Entry = fn(&[Tensor]) -> Result<Tensor>;

const EPS: f64 = 1e-6;
const BOTH: &[DType] = &[DType::F32, DType::BF16];
const SINGLE: &[DType] = &[DType::F32];
const HALF: &[DType] = &[DType::BF16];

/// Heads and key width of the fused mixer, and whether some tokens are padding.
fn projected(t: &[Tensor], heads: usize, key_width: usize, padded: bool) -> Result<Tensor> {
    let (batch, tokens, _) = t[0].dims3()?;
    let phase = t.get(1).map(master).transpose()?;
    let keep: Vec<f32> = (0..batch * tokens)
        .map(|i| f32::from(u8::from(i % tokens < 1 + i / tokens * 40)))
        .collect();
    let mask = Tensor::from_vec(keep, (batch, tokens), t[0].device())?;
    let options = NonCausal {
        phase: phase.as_ref(),
        mask: padded.then_some(&mask),
        exchange: None,
    };
    additive::projected(&t[0], heads, key_width, &options)
}

/// The scan along the second axis, with gammas and weights as masters.
fn ema(t: &[Tensor], two_sided: bool) -> Result<Tensor> {
    let options = ema::Options {
        two_sided,
        ..Default::default()
    };
    ema::scan(&t[0], &master(&t[1])?, &master(&t[2])?, &options)
}

/// bf16 operands as the f32 masters or the f32 stream that they stand for.
fn master(t: &Tensor) -> Result<Tensor> {
    if t.dtype() == DType::BF16 {
        t.to_dtype(DType::F32)
    } else {
        Ok(t.clone())
    }
}

/// An operator with its element types, and the shapes of its operands, one list a case.
struct Case {
    name: &'static str,
    entry: Entry,
    dtypes: &'static [DType],
    shapes: Vec<Vec<Vec<usize>>>,
}

fn stft(t: &Tensor, n_fft: usize) -> Result<Stft> {
    Stft::new(n_fft, 640, 160, t.dtype(), t.device())
}

fn log_mel(t: &[Tensor]) -> Result<Tensor> {
    let config = MelConfig {
        sample_rate: 16_000,
        n_fft: 1024,
        n_mels: 64,
        fmin: 40.0,
        fmax: 8000.0,
    };
    Mel::new(config, t[0].dtype(), t[0].device())?.log(&stft(&t[0], 1024)?.magnitude(&t[0])?, 3e-3)
}

fn cases() -> Vec<Case> {
    // Not [1, 1, 1]: the gradient of a norm of one number is all cancellation.
    let rows = [
        [1, 1, 3],
        [2, 3, 5],
        [3, 63, 60],
        [2, 500, 384],
        [5, 129, 513],
        [1, 3, 4096],
    ];
    let grids: [&[usize]; 5] = [
        &[2, 5, 4],
        &[3, 63, 61],
        &[2, 7, 5, 16],
        &[2, 12, 6, 6, 384],
        &[1, 3, 4, 5, 29],
    ];
    let list = |make: fn([usize; 3]) -> Vec<Vec<usize>>| rows.iter().map(|&shape| make(shape)).collect();
    vec![
        Case {
            name: "rms_norm",
            entry: |t| norm::rms_norm(&t[0], None, EPS),
            dtypes: BOTH,
            shapes: list(|[b, n, d]| vec![vec![b, n, d]]),
        },
        Case {
            name: "rms_norm gain",
            entry: |t| norm::rms_norm(&t[0], Some(&t[1]), EPS),
            dtypes: BOTH,
            shapes: list(|[b, n, d]| vec![vec![b, n, d], vec![d]]),
        },
        Case {
            name: "rms_norm_modulated",
            entry: |t| norm::rms_norm_modulated(&t[0], &t[1], &t[2], EPS),
            dtypes: BOTH,
            shapes: list(|[b, n, d]| vec![vec![b, n, d], vec![b, d], vec![b, d]]),
        },
        Case {
            name: "rms_norm f32 to bf16",
            entry: |t| norm::rms_norm_to(&master(&t[0])?, Some(&master(&t[1])?), 3, EPS, t[0].dtype()),
            dtypes: BOTH,
            shapes: [[1, 1, 12], [3, 63, 60], [5, 129, 513], [2, 432, 384]]
                .map(|[b, n, d]| vec![vec![b, n, d], vec![d]])
                .to_vec(),
        },
        Case {
            name: "modulated f32 to bf16",
            entry: |t| {
                let [x, scale, shift] = [master(&t[0])?, master(&t[1])?, master(&t[2])?];
                norm::rms_norm_modulated_to(&x, &scale, &shift, EPS, t[0].dtype())
            },
            dtypes: BOTH,
            shapes: list(|[b, n, d]| vec![vec![b, n, d], vec![b, d], vec![b, d]]),
        },
        Case {
            name: "add_row",
            entry: |t| rows::add_row(&t[0], &master(&t[1])?),
            dtypes: BOTH,
            shapes: list(|[b, n, d]| vec![vec![b, n, d], vec![n, d]]),
        },
        Case {
            name: "linear",
            entry: |t| linear::linear(&t[0], &master(&t[1])?, Some(&master(&t[2])?)),
            dtypes: BOTH,
            shapes: list(|[b, n, d]| vec![vec![b, n, d], vec![36, d], vec![36]]),
        },
        Case {
            name: "residual",
            entry: |t| residual::add_branch(&t[0], &t[1], None),
            dtypes: BOTH,
            shapes: list(|[b, n, d]| vec![vec![b, n, d]; 2]),
        },
        Case {
            name: "residual f32 + bf16",
            entry: |t| {
                residual::add_branch(&master(&t[0])?, &t[1], Some(&master(&t[2])?))?.to_dtype(t[0].dtype())
            },
            dtypes: BOTH,
            shapes: list(|[b, n, d]| vec![vec![b, n, d], vec![b, n, d], vec![b, d]]),
        },
        Case {
            name: "attention",
            entry: |t| attention::attention(&t[0], &t[1], &t[2], None),
            dtypes: BOTH,
            shapes: [
                [2, 63, 5, 3, 16, 24],
                [1, 1, 1, 1, 8, 8],
                [2, 257, 131, 2, 64, 64],
                [1, 7, 9, 2, 5, 3],
            ]
            .map(|[b, n, l, h, d, e]| vec![vec![b, n, h, d], vec![b, l, h, d], vec![b, l, h, e]])
            .to_vec(),
        },
        Case {
            name: "attention, padded",
            entry: |t| {
                let (b, l) = (t[1].dim(0)?, t[1].dim(1)?);
                let keep: Vec<f32> = (0..b * l).map(|i| f32::from(u8::from(i % l <= i / l))).collect();
                let mask = Tensor::from_vec(keep, (b, l), t[0].device())?;
                attention::attention(&t[0], &t[1], &t[2], Some(&mask))
            },
            dtypes: BOTH,
            shapes: vec![vec![vec![3, 63, 2, 64], vec![3, 24, 2, 64], vec![3, 24, 2, 64]]],
        },
        Case {
            name: "ema, two-sided",
            entry: |t| ema(t, true),
            dtypes: BOTH,
            shapes: [
                [1, 1, 1, 3, 5],
                [2, 12, 36, 5, 64],
                [3, 100, 4, 3, 64],
                [2, 7, 1, 2, 3],
                [2, 65, 1, 3, 8],
                [1, 1000, 2, 2, 40],
            ]
            .map(|[o, n, r, h, c]| vec![vec![o, n, r, h, c], vec![h], vec![h]])
            .to_vec(),
        },
        Case {
            name: "ema, one-sided",
            entry: |t| ema(t, false),
            dtypes: BOTH,
            shapes: [[2, 63, 2, 3, 8], [1, 500, 1, 2, 33], [2, 4097, 1, 2, 16]]
                .map(|[o, n, r, h, c]| vec![vec![o, n, r, h, c], vec![h], vec![h]])
                .to_vec(),
        },
        Case {
            name: "projected 64 64",
            entry: |t| projected(t, 3, 64, false),
            dtypes: BOTH,
            shapes: [63, 64, 257, 432]
                .map(|n| vec![vec![2, n, 576], vec![n, 64]])
                .to_vec(),
        },
        Case {
            name: "projected 32 64",
            entry: |t| projected(t, 2, 32, false),
            dtypes: BOTH,
            shapes: [15, 500].map(|n| vec![vec![3, n, 256], vec![n, 32]]).to_vec(),
        },
        Case {
            name: "projected 64 32",
            entry: |t| projected(t, 2, 64, false),
            dtypes: BOTH,
            shapes: [65].map(|n| vec![vec![3, n, 320], vec![n, 64]]).to_vec(),
        },
        Case {
            // One token alone only without phases: their gradient is all cancellation there.
            name: "projected plain",
            entry: |t| projected(t, 5, 32, false),
            dtypes: BOTH,
            shapes: [1, 144, 333].map(|n| vec![vec![2, n, 480]]).to_vec(),
        },
        Case {
            name: "projected 128 128",
            entry: |t| projected(t, 3, 128, false),
            dtypes: BOTH,
            shapes: [63, 64, 257, 432]
                .map(|n| vec![vec![2, n, 1152], vec![n, 128]])
                .to_vec(),
        },
        Case {
            name: "projected 40 24",
            entry: |t| projected(t, 2, 40, false),
            dtypes: BOTH,
            shapes: [15, 500].map(|n| vec![vec![3, n, 208], vec![n, 40]]).to_vec(),
        },
        Case {
            name: "projected 384 384, plain",
            entry: |t| projected(t, 1, 384, false),
            dtypes: BOTH,
            shapes: [1, 144, 333].map(|n| vec![vec![2, n, 1152]]).to_vec(),
        },
        Case {
            name: "projected 96 96, padded",
            entry: |t| projected(t, 2, 96, true),
            dtypes: BOTH,
            shapes: [24, 130].map(|n| vec![vec![3, n, 576], vec![n, 96]]).to_vec(),
        },
        Case {
            name: "projected, padded",
            entry: |t| projected(t, 2, 64, true),
            dtypes: BOTH,
            shapes: [24, 130].map(|n| vec![vec![3, n, 384], vec![n, 64]]).to_vec(),
        },
        Case {
            name: "swiglu",
            entry: |t| glu::swiglu(&t[0]),
            dtypes: BOTH,
            shapes: list(|[b, n, d]| vec![vec![b, n, 2 * d]]),
        },
        Case {
            name: "gated",
            entry: |t| glu::gated(&t[0], &t[1]),
            dtypes: BOTH,
            shapes: list(|[b, n, d]| vec![vec![b, n, d]; 2]),
        },
        Case {
            // A view that starts off the grid of vectors must not be read as vectors.
            name: "swiglu offset view",
            entry: |t| glu::swiglu(&t[0].flatten_all()?.narrow(0, 1, 1200)?.reshape((3, 400))?),
            dtypes: BOTH,
            shapes: vec![vec![vec![1201]]],
        },
        Case {
            name: "token_shift",
            entry: |t| shift::token_shift(&t[0]),
            dtypes: BOTH,
            shapes: grids.iter().map(|grid| vec![grid.to_vec()]).collect(),
        },
        Case {
            name: "stft",
            entry: |t| stft(&t[0], 1024)?.packed(&t[0]),
            dtypes: SINGLE,
            shapes: vec![vec![vec![2, 3333]], vec![vec![1, 321]]],
        },
        Case {
            name: "inverse stft",
            entry: |t| stft(&t[0], 640)?.inverse_packed(&t[0]),
            dtypes: SINGLE,
            shapes: vec![vec![vec![2, 25, 642]], vec![vec![1, 1, 642]]],
        },
        Case {
            name: "log-mel",
            entry: log_mel,
            dtypes: SINGLE,
            shapes: vec![vec![vec![2, 3333]]],
        },
    ]
}

fn host(seed: u64, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let draws = Philox::named(seed, "check_cuda").normals(shape.iter().product());
    Tensor::from_vec(draws, shape, &Device::Cpu)?
        .to_dtype(dtype)?
        .to_dtype(DType::F64)
}

fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .flatten_all()?
        .to_vec1()
}

/// Result and gradients of `sum(result * weights)` as f64.
fn evaluate(entry: Entry, inputs: &[Tensor], dtype: DType, device: &Device) -> Result<Vec<Vec<f64>>> {
    let vars: Vec<Var> = inputs
        .iter()
        .map(|input| Var::from_tensor(&input.to_dtype(dtype)?.to_device(device)?))
        .collect::<Result<_>>()?;
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let y = entry(&tensors)?;
    // bf16 weights, so that both sides multiply by the same numbers.
    let weights = host(99, y.dims(), DType::BF16)?
        .to_dtype(dtype)?
        .to_device(device)?;
    let grads = (&y * weights)?.sum_all()?.backward()?;
    let mut results = vec![values(&y)?];
    for tensor in &tensors {
        let grad = grads
            .get(tensor)
            .ok_or_else(|| candle_core::Error::Msg("no gradient".into()))?;
        results.push(values(grad)?);
    }
    Ok(results)
}

fn relative_rms(found: &[f64], wanted: &[f64]) -> f64 {
    let square = |sum: f64, x: f64| sum + x * x;
    let error = found.iter().zip(wanted).map(|(a, b)| a - b).fold(0.0, square);
    (error / wanted.iter().copied().fold(1e-300, square)).sqrt()
}

/// Whether a sanitizer gets through these shapes soon. Kernels in f32 are few; those in bf16 differ by widths.
fn is_small(shapes: &[Vec<usize>], dtype: DType) -> bool {
    let tokens = shapes[0].get(1).copied().unwrap_or(1);
    let elements: usize = shapes[0].iter().product();
    elements <= 30_000
        && tokens > 1
        && if dtype == DType::BF16 {
            tokens > 40
        } else {
            tokens < 40
        }
}

/// Operators with products round what lies between two of them to bf16 once more.
fn tolerance(case: &Case, dtype: DType) -> f64 {
    tolerance_of(case.name, dtype)
}

fn tolerance_of(operator: &str, dtype: DType) -> f64 {
    let products = [
        "attention",
        "projected",
        "linear",
        "decay",
        "additive",
        "cross_entropy",
    ];
    match dtype {
        DType::BF16 if products.iter().any(|name| operator.starts_with(name)) => 1.5e-2,
        DType::BF16 => 6e-3,
        _ => 1e-5,
    }
}

/// Runs one case and prints its row; true if it passed.
fn check(case: &Case, shapes: &[Vec<usize>], dtype: DType, device: &Device) -> bool {
    let run = || -> Result<(Vec<f64>, bool)> {
        let inputs: Vec<Tensor> = shapes
            .iter()
            .enumerate()
            .map(|(i, shape)| host(i as u64, shape, dtype))
            .collect::<Result<_>>()?;
        let wanted = evaluate(case.entry, &inputs, DType::F64, &Device::Cpu)?;
        let found = evaluate(case.entry, &inputs, dtype, device)?;
        let again = evaluate(case.entry, &inputs, dtype, device)?;
        let same = found == again;
        Ok((
            found
                .iter()
                .zip(&wanted)
                .map(|(found, wanted)| relative_rms(found, wanted))
                .collect(),
            same,
        ))
    };
    let (passed, detail) = match run() {
        Ok((errors, same)) => {
            // A NaN must fail: hence not `any(error >= tolerance)`.
            let passed = same && errors.iter().all(|&error| error < tolerance(case, dtype));
            let errors: Vec<String> = errors.iter().map(|error| format!("{error:.1e}")).collect();
            (
                passed,
                format!(
                    "{}{}",
                    errors.join(" "),
                    if same { "" } else { "  second run differs" }
                ),
            )
        }
        Err(error) => (
            false,
            error.to_string().lines().next().unwrap_or_default().to_owned(),
        ),
    };
    let shapes = format!("{:?}", shapes[0]);
    let verdict = if passed { "ok  " } else { "FAIL" };
    println!(
        "{verdict} {:<20} {:<5} {shapes:<22} {detail}",
        case.name,
        format!("{dtype:?}")
    );
    passed
}

/// Five clipped steps on two tensors, on `device`: parameters and moments.
fn optimise(device: &Device) -> Result<Vec<Vec<f64>>> {
    let shapes: [&[usize]; 2] = [&[63, 61], &[50_001]];
    let mut state = vec![];
    for (i, shape) in shapes.iter().enumerate() {
        let start = host(i as u64, shape, DType::F32)?
            .to_dtype(DType::F32)?
            .to_device(device)?;
        let parameter = Var::from_tensor(&start)?;
        state.push((zero_moments(&parameter)?, parameter));
    }
    for step in 1..=5 {
        let mut gradients = vec![];
        for (i, shape) in shapes.iter().enumerate() {
            let gradient = host(10 * step + i as u64, shape, DType::F32)?;
            gradients.push(gradient.to_dtype(DType::F32)?.to_device(device)?);
        }
        let scale = clip_scale(&squared_norm(&gradients.iter().collect::<Vec<_>>())?, 3.0)?;
        for ((moments, parameter), gradient) in state.iter().zip(&gradients) {
            AdamW::default().step(parameter, moments, gradient, step, GradientScale::Device(&scale))?;
        }
    }
    let mut results = vec![];
    for (moments, parameter) in &state {
        results.extend([values(parameter)?, values(moments)?]);
    }
    Ok(results)
}

fn check_adamw(device: &Device) -> Result<bool> {
    let (wanted, found, again) = (optimise(&Device::Cpu)?, optimise(device)?, optimise(device)?);
    let errors: Vec<f64> = found
        .iter()
        .zip(&wanted)
        .map(|(a, b)| relative_rms(a, b))
        .collect();
    let passed = found == again && errors.iter().all(|&error| error < 1e-6);
    let verdict = if passed { "ok  " } else { "FAIL" };
    let errors: Vec<String> = errors.iter().map(|error| format!("{error:.1e}")).collect();
    println!(
        "{verdict} {:<20} F32   {:<22} {}",
        "adamw, clipped",
        "[63, 61], [50001]",
        errors.join(" ")
    );
    Ok(passed)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| arguments.iter().any(|a| a == word);
    let (small, untimed) = (has("small"), has("untimed"));
    let record = arguments.iter().find_map(|a| a.strip_prefix("record="));
    let names: Vec<&String> = arguments
        .iter()
        .filter(|a| !["small", "untimed"].contains(&a.as_str()) && !a.starts_with("record="))
        .collect();
    let chosen = |name: &str| names.is_empty() || names.iter().any(|n| name.starts_with(n.as_str()));
    let device = match device::open_cuda(0) {
        Ok(device) => device,
        Err(error) => {
            println!("FAIL no CUDA device: {error}");
            return ExitCode::from(2);
        }
    };
    probe::poison(true);
    println!(
        "     operator             type  shape                  relative RMS error of the result and gradients"
    );
    let (mut failed, mut count) = (0usize, 0usize);
    for case in cases()
        .iter()
        .chain(&recurrence::cases())
        .chain(&fused::cases())
        .chain(&training::cases())
        .chain(&softmax_attention::cases())
        .chain(&eos::cases())
        .filter(|case| chosen(case.name))
    {
        for &dtype in case.dtypes {
            for shapes in case
                .shapes
                .iter()
                .filter(|shapes| !small || is_small(shapes, dtype))
            {
                count += 1;
                failed += usize::from(!check(case, shapes, dtype, &device));
            }
        }
    }
    if chosen("adamw") {
        count += 1;
        failed += usize::from(!check_adamw(&device).unwrap_or_else(|error| {
            println!("FAIL adamw: {error}");
            false
        }));
    }
    for check in training::checks()
        .iter()
        .chain(&tape::checks())
        .chain(&decoding::checks())
        .filter(|check| chosen(check.name))
    {
        count += 1;
        failed += usize::from(!check.passes(&device));
    }
    if chosen("parts") {
        for (passed, row) in parts::check(&device, small) {
            count += 1;
            failed += usize::from(!passed);
            println!("{row}");
        }
    }
    count += 1;
    if probe::trespasses() > 0 {
        println!(
            "FAIL something was written behind {} results",
            probe::trespasses()
        );
        failed += 1;
    }
    if count == 1 {
        println!("FAIL no operator begins with {names:?}");
        failed += 1;
    }
    println!("{} of {count} checks passed", count.saturating_sub(failed));
    probe::poison(false);
    if names.is_empty()
        && !untimed
        && let Err(error) = timings::timings(&device)
    {
        println!("FAIL timing: {error}");
        failed += 1;
    }
    if let Some(file) = record
        && let Err(error) = std::fs::write(
            file,
            format!(
                "{{\"checks\": {count}, \"passed\": {}}}\n",
                count.saturating_sub(failed)
            ),
        )
    {
        println!("FAIL {file}: {error}");
        failed += 1;
    }
    ExitCode::from(u8::from(failed > 0))
}
