//! Golden files of other implementations, for the tests of the networks.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
pub(crate) use fulgur_lightnet::testing::{tensors as golden, thinned};

/// Those below `weights.`, without the prefix, in f32 unless they are counters; and all others.
pub(crate) fn golden_weights(
    tensors: &BTreeMap<String, Tensor>,
) -> (BTreeMap<String, Tensor>, BTreeMap<String, Tensor>) {
    let (mut weights, mut others) = (BTreeMap::new(), BTreeMap::new());
    for (name, tensor) in tensors {
        match name.strip_prefix("weights.") {
            Some(name) => weights.insert(name.to_owned(), tensor.clone()),
            None => others.insert(name.clone(), tensor.clone()),
        };
    }
    (weights, others)
}

/// All values of a tensor.
pub(crate) fn values(tensor: &Tensor) -> Vec<f32> {
    tensor
        .to_dtype(DType::F32)
        .and_then(|t| t.flatten_all())
        .and_then(|t| t.to_vec1())
        .unwrap()
}

/// Root mean square of the difference over that of `expected`; the shapes have to agree.
#[track_caller]
pub(crate) fn relative_rms(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.dims(), expected.dims());
    let (found, expected) = (values(found), values(expected));
    let square = |x: f64| x * x;
    let apart: f64 = found
        .iter()
        .zip(&expected)
        .map(|(a, b)| square(f64::from(*a) - f64::from(*b)))
        .sum();
    let size: f64 = expected.iter().map(|b| square(f64::from(*b))).sum();
    (apart / size).sqrt()
}
