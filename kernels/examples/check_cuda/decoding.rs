//! What single tokens go through, against the processor.

use crate::training::Check;
use crate::{host, relative_rms, values};
use candle_core::{DType, Device, Error, Result, Tensor};
use fulgur_kernels::likeliest::likeliest;
use fulgur_kernels::linear::{linear, linear_swiglu};

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
                return Err(Error::Msg(format!("{:?} instead of {:?}", found.dims(), wanted.dims())));
            }
            let error = relative_rms(&values(&found)?, &values(&wanted)?);
            if error.is_nan() || error > TOLERANCE {
                return Err(Error::Msg(format!("{rows} rows of {output} by {input}: {error:.1e}")));
            }
            worst = worst.max(error);
            // A row does not see the others, as far as the kernel goes.
            if rows <= 8 && input % 8 == 0 {
                let alone = apply(&there(&x.narrow(0, rows - 1, 1)?)?, &there(&weight)?)?;
                if values(&alone)? != values(&found.narrow(0, rows - 1, 1)?)? {
                    return Err(Error::Msg(format!("row {rows} of {output} by {input} is another alone")));
                }
            }
        }
    }
    Ok(format!("{worst:.1e}"))
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
            name: "decoding, choices",
            run: choices,
        },
    ]
}
