//! 8-bit weights: a matrix `NAME` is stored as U8 of the same shape beside `NAME.scale`, one f32 a row, and stands for
//! `(u8 - 128) * scale[row]`. Rows run over the first dimension. A quarter of the size of f32; the error of a value is
//! at most half a step, 1/254 of the largest value of its row.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::{Params, ParamsError, file};

const ZERO_POINT: f32 = 128.0;
const STEPS: f32 = 127.0;
const SUFFIX: &str = ".scale";

/// What storing a model in 8 bits cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantised {
    /// Size of the file.
    pub bytes: u64,
    /// How many tensors were stored in 8 bits.
    pub tensors: usize,
    /// The largest relative error (root mean square of the error over that of the values) of a tensor.
    pub worst_error: f64,
}

/// Saves `params`: tensors of two or more dimensions and at least `min_size` values in 8 bits, the other ones of two or
/// more dimensions in 16, vectors in 32. The file loads with [`super::Frozen::open`] and [`Params::load`].
///
/// # Errors
/// The file cannot be written, or a value is not finite.
pub fn quantise(
    params: &Params,
    min_size: usize,
    path: &Path,
    metadata: &BTreeMap<String, String>,
) -> Result<Quantised, ParamsError> {
    let mut stored: Vec<(String, Tensor, DType)> = Vec::new();
    let mut report = Quantised {
        bytes: 0,
        tensors: 0,
        worst_error: 0.0,
    };
    for (name, var) in params.vars() {
        let tensor = var.as_detached_tensor().to_device(&Device::Cpu)?;
        if tensor.rank() < 2 {
            stored.push((name, tensor, DType::F32));
        } else if tensor.elem_count() < min_size {
            stored.push((name, tensor, DType::F16));
        } else {
            let values = tensor.flatten_all()?.to_vec1::<f32>()?;
            if let Some(value) = values.iter().find(|value| !value.is_finite()) {
                let reason = format!("{value} cannot be stored in 8 bits");
                return Err(ParamsError::Value {
                    path: path.to_path_buf(),
                    name,
                    reason,
                });
            }
            let (codes, scales, error) = quantise_rows(&values, tensor.dim(0)?);
            report.tensors += 1;
            report.worst_error = report.worst_error.max(error);
            let n = scales.len();
            stored.push((
                format!("{name}{SUFFIX}"),
                Tensor::from_vec(scales, n, &Device::Cpu)?,
                DType::F32,
            ));
            stored.push((
                name,
                Tensor::from_vec(codes, tensor.shape(), &Device::Cpu)?,
                DType::U8,
            ));
        }
    }
    let entries = stored
        .iter()
        .map(|(name, tensor, dtype)| (name.as_str(), tensor, *dtype))
        .collect();
    file::write_entries(path, entries, metadata)?;
    let info = std::fs::metadata(path).map_err(|source| ParamsError::Io {
        path: path.to_path_buf(),
        source,
    })?;
    report.bytes = info.len();
    Ok(report)
}

/// Codes, scales and the relative error.
fn quantise_rows(values: &[f32], rows: usize) -> (Vec<u8>, Vec<f32>, f64) {
    let mut codes = Vec::with_capacity(values.len());
    let mut scales = Vec::with_capacity(rows);
    let (mut error, mut power) = (0.0, 0.0);
    for row in values.chunks(values.len().div_ceil(rows.max(1)).max(1)) {
        let scale = row.iter().fold(0f32, |largest, value| largest.max(value.abs())) / STEPS;
        for &value in row {
            let step = if scale > 0.0 {
                (value / scale).round().clamp(-STEPS, STEPS)
            } else {
                0.0
            };
            codes.push((step + ZERO_POINT) as u8);
            error += f64::from(step * scale - value).powi(2);
            power += f64::from(value).powi(2);
        }
        scales.push(scale);
    }
    (
        codes,
        scales,
        if power > 0.0 { (error / power).sqrt() } else { 0.0 },
    )
}

/// Replaces every 8-bit tensor and its scales by f32 values; other tensors pass.
pub(super) fn widen(
    path: &Path,
    mut tensors: BTreeMap<String, Tensor>,
) -> Result<BTreeMap<String, Tensor>, ParamsError> {
    let malformed = |reason| ParamsError::Malformed {
        path: path.to_path_buf(),
        reason,
    };
    let names: Vec<String> = tensors
        .iter()
        .filter(|(name, tensor)| {
            tensor.dtype() == DType::U8 && tensors.contains_key(&format!("{name}{SUFFIX}"))
        })
        .map(|(name, _)| name.clone())
        .collect();
    for name in names {
        let Some(scale) = tensors.remove(&format!("{name}{SUFFIX}")) else {
            continue;
        };
        let codes = &tensors[&name];
        let rows = codes.dims().first().copied().unwrap_or(0);
        if scale.dims() != [rows] || scale.dtype() != DType::F32 {
            return Err(malformed(format!(
                "tensor `{name}{SUFFIX}`: found {:?} {:?}, expected F32 [{rows}]",
                scale.dtype(),
                scale.dims()
            )));
        }
        let mut shape = vec![1; codes.rank()];
        shape[0] = rows;
        let wide = codes.to_dtype(DType::F32)?.affine(1.0, f64::from(-ZERO_POINT))?;
        let wide = wide.broadcast_mul(&scale.reshape(shape)?)?;
        tensors.insert(name, wide);
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::super::{Frozen, Precision};
    use super::*;
    use candle_nn::Init;

    fn model(seed: u64) -> Params {
        let params = Params::random(seed, &Device::Cpu);
        let randn = Init::Randn {
            mean: 0.0,
            stdev: 0.3,
        };
        params.builder().get_with_hints((64, 32), "large", randn).unwrap();
        params.builder().get_with_hints((8, 4, 3), "conv", randn).unwrap();
        params.builder().get_with_hints((3, 2), "small", randn).unwrap();
        params.builder().get_with_hints(50, "gain", randn).unwrap();
        params.builder().get((40, 2), "zero").unwrap();
        params
    }

    #[test]
    fn values_return_within_half_a_step() {
        let folder = tempfile::tempdir().unwrap();
        let (path, full) = (
            folder.path().join("q.safetensors"),
            folder.path().join("f.safetensors"),
        );
        let params = model(4);
        let report = quantise(&params, 64, &path, &BTreeMap::new()).unwrap();
        assert_eq!(report.tensors, 3);
        assert!(
            report.worst_error > 1e-4 && report.worst_error < 0.01,
            "{report:?}"
        );
        params.save(&full, &BTreeMap::new(), Precision::F32).unwrap();
        assert_eq!(report.bytes, std::fs::metadata(&path).unwrap().len());

        let frozen = Frozen::open(&path, &Device::Cpu).unwrap();
        assert_eq!(frozen.tensors().len(), 5);
        let reloaded = model(5);
        reloaded.load(&path).unwrap();
        for (name, var) in params.vars() {
            let read = |t: &Tensor| {
                t.to_dtype(DType::F32)
                    .unwrap()
                    .flatten_all()
                    .unwrap()
                    .to_vec1::<f32>()
                    .unwrap()
            };
            let (x, y) = (read(&var), read(&frozen.tensors()[&name]));
            assert_eq!(y, read(&reloaded.vars()[&name]));
            let rows = var.dim(0).unwrap();
            for (x, y) in x.chunks(x.len() / rows).zip(y.chunks(x.len() / rows)) {
                let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
                let bound = match name.as_str() {
                    "gain" => 0.0,
                    "small" => largest / 2000.0,
                    _ => largest / 253.0,
                };
                assert!(x.iter().zip(y).all(|(x, y)| (x - y).abs() <= bound), "{name}");
            }
        }
    }

    #[test]
    fn wrong_scales_and_bad_values_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q.safetensors");
        let cpu = &Device::Cpu;
        let tensors = BTreeMap::from([
            ("m".to_string(), Tensor::zeros((4, 2), DType::U8, cpu).unwrap()),
            ("m.scale".to_string(), Tensor::zeros(3, DType::F32, cpu).unwrap()),
        ]);
        file::write(&path, &tensors, &BTreeMap::new(), Precision::F32).unwrap();
        let message = Frozen::open(&path, cpu).unwrap_err().to_string();
        assert!(
            message.contains("`m.scale`") && message.contains("expected F32 [4]"),
            "{message}"
        );

        let params = model(4);
        params.vars()["large"]
            .set(&Tensor::full(f32::NAN, (64, 32), cpu).unwrap())
            .unwrap();
        let message = quantise(&params, 64, &path, &BTreeMap::new())
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("`large`") && message.contains("NaN"),
            "{message}"
        );
    }
}
