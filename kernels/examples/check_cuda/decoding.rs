//! What single tokens and networks that nobody trains go through, against the processor.

use crate::training::Check;
use crate::{host, relative_rms, values};
use candle_core::{DType, Device, Error, Result, Tensor};
use fulgur_kernels::decay::{Fused, LogDecay, step, step_fused};
use fulgur_kernels::gelu::{Form, geglu, gelu};
use fulgur_kernels::likeliest::likeliest;
use fulgur_kernels::linear::{linear, linear_swiglu};
use fulgur_kernels::norm::{Groups, group_norm};
use fulgur_kernels::residual::add_biased;
use fulgur_kernels::unfold::{Window, unfold};

/// Up to three roundings to 8 bits.
const TOLERANCE: f64 = 7e-3;

/// Products of a few rows, more of them than the kernel takes at last, for inputs that it reads in one piece, in several and not
/// at all.
fn few_rows(device: &Device, glu: bool) -> Result<String> {
    let mut worst = 0f64;
    for (output, input) in [(2, 8), (6, 1288), (130, 3456), (64, 1280), (10, 12)] {
        for rows in [1, 2, 3, 5, 8, 9] {
            let x = host(1, &[rows, 1, input], DType::BF16)?;
            let weight = host(2, &[output, input], DType::BF16)?;
            let apply = |x: &Tensor, weight: &Tensor| match glu {
                true => linear_swiglu(x, weight),
                false => linear(x, weight, None),
            };
            let there = |t: &Tensor| t.to_device(device)?.to_dtype(DType::BF16);
            let found = apply(&there(&x)?, &there(&weight)?)?;
            let wanted = apply(&x, &weight)?;
            if found.dims() != wanted.dims() {
                return Err(Error::Msg(format!(
                    "{:?} instead of {:?}",
                    found.dims(),
                    wanted.dims()
                )));
            }
            let error = relative_rms(&values(&found)?, &values(&wanted)?);
            if error.is_nan() || error > TOLERANCE {
                return Err(Error::Msg(format!(
                    "{rows} rows of {output} by {input}: {error:.1e}"
                )));
            }
            worst = worst.max(error);
            // A row does not see the others, as far as the kernel goes.
            if rows <= 8 && input % 8 == 0 {
                let alone = apply(&there(&x.narrow(0, rows - 1, 1)?)?, &there(&weight)?)?;
                if values(&alone)? != values(&found.narrow(0, rows - 1, 1)?)? {
                    return Err(Error::Msg(format!(
                        "row {rows} of {output} by {input} is another alone"
                    )));
                }
            }
        }
    }
    Ok(format!("{worst:.1e}"))
}

/// Steps of the recurrence, of rows of their own and of a wide projection.
fn steps(device: &Device) -> Result<String> {
    let mut worst = 0f64;
    for (batch, heads, d, e) in [(1, 1, 3, 5), (2, 3, 24, 40), (3, 2, 128, 128), (1, 10, 128, 130)] {
        let state = host(1, &[batch, heads, d, e], DType::F32)?;
        let log = (host(2, &[heads], DType::F32)?.sqr()? * -0.2)?;
        let channels = (host(3, &[batch, heads, d], DType::F32)?.sqr()? * -0.2)?;
        for dtype in [DType::F32, DType::BF16] {
            let rows = |seed, width| host(seed, &[batch, heads, width], dtype);
            let (q, k, v) = (rows(4, d)?, rows(5, d)?, rows(6, e)?);
            let wide = host(7, &[batch, heads * (2 * d + e) + 8], dtype)?;
            let there = |t: &Tensor, dtype: DType| t.to_dtype(dtype)?.to_device(device);
            let own = |t: &Tensor| there(t, dtype);
            let single = |t: &Tensor| there(t, DType::F32);
            let (there_log, there_channels) = (single(&log)?, single(&channels)?);
            let mut pairs = vec![];
            for (log, found) in [
                (LogDecay::None, LogDecay::None),
                (LogDecay::Head(&log), LogDecay::Head(&there_log)),
                (LogDecay::Channel(&channels), LogDecay::Channel(&there_channels)),
            ] {
                let wanted = step(&q, &k, &v, log, &state)?;
                pairs.push((
                    step(&own(&q)?, &own(&k)?, &own(&v)?, found, &single(&state)?)?,
                    wanted,
                ));
            }
            for silu in [[true, true, true], [false, true, false]] {
                let fused = Fused {
                    heads,
                    keys: d,
                    values: e,
                    silu,
                };
                let wanted = step_fused(&wide, fused, LogDecay::Head(&log), &state)?;
                let found = step_fused(&own(&wide)?, fused, LogDecay::Head(&there_log), &single(&state)?)?;
                pairs.push((found, wanted));
            }
            for (found, wanted) in pairs {
                for (found, wanted) in [(found.0, wanted.0), (found.1, wanted.1)] {
                    let error = relative_rms(&values(&found)?, &values(&wanted)?);
                    let most = if dtype == DType::F32 { 1e-5 } else { 1e-2 };
                    if error.is_nan() || error > most || found.dims() != wanted.dims() {
                        return Err(Error::Msg(format!("{:?} {dtype:?}: {error:.1e}", state.dims())));
                    }
                    worst = worst.max(error);
                }
            }
        }
    }
    Ok(format!("{worst:.1e}"))
}

/// Biases that are added on the way: before an activation, and where a branch joins.
fn biases(device: &Device) -> Result<String> {
    let mut worst = 0f64;
    for dtype in [DType::F32, DType::BF16] {
        let most = if dtype == DType::F32 { 1e-5 } else { 6e-3 };
        for shape in [&[1, 1][..], &[3, 37], &[2, 257, 1280], &[4097, 6]] {
            let width = shape[shape.len() - 1];
            let single = |seed, shape: &[usize], dtype| host(seed, shape, dtype)?.to_dtype(DType::F32);
            let (stream, branch) = (single(1, shape, DType::F32)?, single(2, shape, dtype)?);
            let bias = single(3, &[width], DType::F32)?;
            let (there_stream, there_bias) = (stream.to_device(device)?, bias.to_device(device)?);
            let there = branch.to_dtype(dtype)?.to_device(device)?;
            let mut pairs = vec![(
                add_biased(&there_stream, &there, &there_bias)?,
                add_biased(&stream, &branch, &bias)?,
            )];
            for form in [Form::Exact, Form::Quick] {
                pairs.push((
                    gelu(&there, Some(&there_bias), form)?,
                    gelu(&branch, Some(&bias), form)?,
                ));
                pairs.push((gelu(&there, None, form)?, gelu(&branch, None, form)?));
            }
            if width % 2 == 0 {
                pairs.push((geglu(&there, Some(&there_bias))?, geglu(&branch, Some(&bias))?));
                pairs.push((geglu(&there, None)?, geglu(&branch, None)?));
            }
            for (found, wanted) in pairs {
                let error = relative_rms(&values(&found)?, &values(&wanted)?);
                if error.is_nan() || error > most || found.dims() != wanted.dims() {
                    return Err(Error::Msg(format!("{shape:?} {dtype:?}: {error:.1e}")));
                }
                worst = worst.max(error);
            }
        }
    }
    Ok(format!("{worst:.1e}"))
}

/// Norms of groups: of few and many channels and places, even and odd, with a mean that is large beside the spread.
fn groups(device: &Device) -> Result<String> {
    let mut worst = 0f64;
    let cases = [
        (1, 1, 4, 2),
        (3, 7, 6, 3),
        (40, 1280, 320, 32),
        (2, 20, 2560, 32),
        (1, 5000, 128, 32),
        (5, 33, 1300, 1),
    ];
    for (sets, places, channels, groups) in cases {
        for (dtype, most) in [(DType::F32, 1e-5), (DType::BF16, 6e-3)] {
            for (silu, middle) in [(false, 30.0), (true, 0.5)] {
                let x = (host(1, &[sets, places, channels], DType::F32)? + middle)?;
                let x = x.to_dtype(dtype)?.to_dtype(DType::F32)?;
                let row = |seed| host(seed, &[channels], DType::F32)?.to_dtype(DType::F32);
                let (gain, bias) = (row(2)?, row(3)?);
                let of = Groups {
                    sets,
                    groups,
                    eps: 1e-5,
                    silu,
                };
                let there = x.to_dtype(dtype)?.to_device(device)?;
                let found = group_norm(&there, &gain.to_device(device)?, &bias.to_device(device)?, of)?;
                let again = group_norm(&there, &gain.to_device(device)?, &bias.to_device(device)?, of)?;
                let wanted = group_norm(&x, &gain, &bias, of)?;
                let error = relative_rms(&values(&found)?, &values(&wanted)?);
                if error.is_nan() || error > most || found.dims() != wanted.dims() {
                    return Err(Error::Msg(format!(
                        "{of:?} {:?} {dtype:?}: {error:.1e}",
                        x.dims()
                    )));
                }
                if values(&again)? != values(&found)? {
                    return Err(Error::Msg(format!(
                        "{of:?} {:?} {dtype:?}: other bits again",
                        x.dims()
                    )));
                }
                worst = worst.max(error);
            }
        }
    }
    Ok(format!("{worst:.1e}"))
}

/// Neighbours, of which every value is a copy.
fn neighbours(device: &Device) -> Result<String> {
    for (shape, size, stride, padding) in [
        ([2, 5, 7, 3], 3, 1, [1, 1]),
        ([1, 8, 6, 8], 3, 2, [0, 1]),
        ([3, 33, 40, 320], 3, 1, [1, 1]),
        ([2, 9, 4, 4], 2, 3, [2, 0]),
        ([1, 6, 6, 12], 5, 1, [2, 2]),
    ] {
        let window = Window {
            size,
            stride,
            padding,
        };
        let all = shape[0] * window.results(shape[1]) * window.results(shape[2]);
        for dtype in [DType::F32, DType::BF16] {
            let x = host(1, &shape, dtype)?.to_dtype(dtype)?;
            for places in [0..all, 1..all - 1] {
                let found = unfold(&x.to_device(device)?, window, places.clone())?;
                if values(&found)? != values(&unfold(&x, window, places.clone())?)? {
                    return Err(Error::Msg(format!("{shape:?} {window:?} {places:?} {dtype:?}")));
                }
            }
        }
    }
    Ok("the same".to_owned())
}

fn choices(device: &Device) -> Result<String> {
    for (rows, width) in [(1, 1), (3, 31), (64, 50304), (2, 1025)] {
        // Few different values: many are the largest.
        let x = ((host(3, &[rows, width], DType::F32)? * 2.0)?.round()?).to_dtype(DType::F32)?;
        for among in [width, width.div_ceil(2)] {
            let wanted = likeliest(&x, among)?;
            for dtype in [DType::F32, DType::BF16] {
                let found = likeliest(&x.to_dtype(dtype)?.to_device(device)?, among)?;
                if found != wanted {
                    return Err(Error::Msg(format!("{found:?} instead of {wanted:?}")));
                }
            }
        }
    }
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut row = vec![0f32; 300];
        row[257] = bad;
        let x = Tensor::from_vec(row, (1, 300), &Device::Cpu)?.to_device(device)?;
        if likeliest(&x, 300)?[0].is_some() || likeliest(&x, 257)? != [Some(0)] {
            return Err(Error::Msg(format!("{bad} was not seen, or seen too early")));
        }
    }
    Ok("the same".to_owned())
}

pub(crate) fn checks() -> Vec<Check> {
    vec![
        Check {
            name: "decoding, few rows",
            run: |device| few_rows(device, false),
        },
        Check {
            name: "decoding, few rows and swiglu",
            run: |device| few_rows(device, true),
        },
        Check {
            name: "decoding, steps",
            run: steps,
        },
        Check {
            name: "frozen, biases",
            run: biases,
        },
        Check {
            name: "frozen, group norm",
            run: groups,
        },
        Check {
            name: "frozen, neighbours",
            run: neighbours,
        },
        Check {
            name: "decoding, choices",
            run: choices,
        },
    ]
}
