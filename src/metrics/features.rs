//! Distances of features that lie in a file: `generated` and `reference`, a row for each clip.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use fulgur_benchmark::metrics::points::{Points, PointsError};
use fulgur_benchmark::metrics::{frechet, kvd};
use fulgur_lightnet::params::ParamsError;

use crate::tensors;

/// Why there are no distances.
#[derive(Debug, thiserror::Error)]
pub enum FeaturesError {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] ParamsError),
    /// A tensor that is missing or is no table of features.
    #[error("{}: {name} {found}, expected features [n, d] in f64 or f32", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: &'static str,
        /// What it is.
        found: String,
    },
    /// Features that cannot be compared.
    #[error("{}: {name}{source}", path.display())]
    Points {
        /// The file.
        path: PathBuf,
        /// The tensor and a blank, or nothing where it is about both.
        name: &'static str,
        /// Why.
        source: PointsError,
    },
}

/// Distances of two sets of features.
#[derive(Clone, Debug, PartialEq)]
pub struct Distances {
    /// Of their Gaussians.
    pub frechet: f64,
    /// With the cubic kernel.
    pub kvd: f64,
    /// Generated rows.
    pub n: usize,
    /// Reference rows.
    pub n_reference: usize,
    /// Columns.
    pub width: usize,
}

/// Distances of `generated` and `reference` in a safetensors file.
///
/// # Errors
/// A file that cannot be read; tensors that are missing, no tables of numbers, of two widths, of less than two rows, or hold
/// what is no number.
pub fn distances(path: &Path) -> Result<Distances, FeaturesError> {
    let tensors = tensors::read(path, &Device::Cpu)?;
    let points = |name: &'static str, label: &'static str| -> Result<Points, FeaturesError> {
        let wrong = |found: String| FeaturesError::Tensor {
            path: path.to_owned(),
            name,
            found,
        };
        let tensor = tensors.get(name).ok_or_else(|| wrong("is missing".to_owned()))?;
        let values = table(tensor).map_err(wrong)?;
        let at = |source| FeaturesError::Points {
            path: path.to_owned(),
            name: label,
            source,
        };
        let points = Points::new(tensor.dims()[1], values).map_err(at)?;
        match points.len() {
            found @ 0..2 => Err(at(PointsError::Few { found, expected: 2 })),
            _ => Ok(points),
        }
    };
    let generated = points("generated", "generated ")?;
    let reference = points("reference", "reference ")?;
    let both = |source| FeaturesError::Points {
        path: path.to_owned(),
        name: "",
        source,
    };
    Ok(Distances {
        frechet: frechet::between(&generated, &reference).map_err(both)?,
        kvd: kvd::kvd(&generated, &reference).map_err(both)?,
        n: generated.len(),
        n_reference: reference.len(),
        width: generated.width(),
    })
}

/// Values of a table, row after row; else what the tensor is.
fn table(tensor: &Tensor) -> Result<Vec<f64>, String> {
    let dims = tensor.dims();
    let float = matches!(tensor.dtype(), DType::F64 | DType::F32 | DType::F16 | DType::BF16);
    if dims.len() != 2 || dims[1] == 0 || !float {
        return Err(format!(
            "is {dims:?} in {}",
            format!("{:?}", tensor.dtype()).to_lowercase()
        ));
    }
    let values = tensor.to_dtype(DType::F64).and_then(|t| t.flatten_all());
    values
        .and_then(|t| t.to_vec1())
        .map_err(|error| format!("cannot be read: {error}"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use fulgur_lightnet::params::{Precision, file};

    use super::*;

    fn write(entries: &[(&str, Tensor)]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f.safetensors");
        let tensors: BTreeMap<String, Tensor> = entries
            .iter()
            .map(|(name, tensor)| ((*name).to_owned(), tensor.clone()))
            .collect();
        file::write(&path, &tensors, &BTreeMap::new(), Precision::F32).unwrap();
        (folder, path)
    }

    fn features(values: &[f64], rows: usize) -> Tensor {
        Tensor::from_vec(values.to_vec(), (rows, values.len() / rows), &Device::Cpu).unwrap()
    }

    #[test]
    fn distances_are_as_by_hand() {
        let (_folder, path) = write(&[
            ("generated", features(&[-1.0, 1.0], 2)),
            ("reference", features(&[1.0, 5.0, 3.0], 3)),
        ]);
        let found = distances(&path).unwrap();
        // Means 0 and 3, deviations sqrt(2) and 2.
        assert!((found.frechet - (9.0 + (2.0 - 2f64.sqrt()).powi(2))).abs() < 1e-12);
        assert_eq!((found.n, found.n_reference, found.width), (2, 3, 1));
    }

    #[test]
    fn what_cannot_be_compared_is_one_line() {
        let good = features(&[0.0, 1.0, 2.0, 4.0], 2);
        let cases = [
            (
                vec![("generated", good.clone())],
                "reference is missing, expected features [n, d]",
            ),
            (
                vec![
                    ("generated", features(&[1.0, 2.0], 1)),
                    ("reference", good.clone()),
                ],
                "generated features: found 1 rows, expected at least 2",
            ),
            (
                vec![
                    ("generated", good.clone()),
                    ("reference", features(&[1.0, 2.0, 3.0], 3)),
                ],
                ": features: found a width of 1, expected 2",
            ),
            (
                vec![
                    ("generated", good.clone()),
                    ("reference", features(&[1.0, f64::NAN, 0.0, 0.0], 2)),
                ],
                "reference features: found NaN in row 0, expected finite numbers",
            ),
            (
                vec![
                    ("generated", features(&[f64::INFINITY, 1.0, 0.0, 0.0], 2)),
                    ("reference", good.clone()),
                ],
                "generated features: found inf in row 0",
            ),
            (
                vec![
                    ("generated", good.flatten_all().unwrap()),
                    ("reference", good.clone()),
                ],
                "generated is [4] in f64, expected features [n, d]",
            ),
            (
                vec![
                    ("generated", good.to_dtype(DType::I64).unwrap()),
                    ("reference", good.clone()),
                ],
                "generated is [2, 2] in i64",
            ),
        ];
        for (entries, words) in cases {
            let (_folder, path) = write(&entries);
            let line = distances(&path).unwrap_err().to_string();
            assert!(
                line.contains(words) && line.contains("f.safetensors: "),
                "{words}: {line}"
            );
            assert!(!line.contains('\n'));
        }
        assert!(distances(Path::new("/nowhere/f.safetensors")).is_err());
    }
}
