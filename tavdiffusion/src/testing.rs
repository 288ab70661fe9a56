//! What the tests of several files need: random tensors that a name decides, and how far tensors are apart.

use candle_core::{DType, Device, Result, Tensor};
use fulgur_kernels::philox::Philox;
use fulgur_lightnet::params::Params;

/// Standard normal values that depend on `name` alone.
pub(crate) fn normal(name: &str, shape: &[usize]) -> Result<Tensor> {
    let count = shape.iter().product();
    Tensor::from_vec(Philox::named(1, name).normals(count), shape, &Device::Cpu)
}

/// The largest absolute difference of two tensors of one shape; infinite where one is not a number.
pub(crate) fn apart(a: &Tensor, b: &Tensor) -> Result<f32> {
    assert_eq!(a.dims(), b.dims());
    let differences = (a - b)?.abs()?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    Ok(differences
        .into_iter()
        .map(|x: f32| if x.is_nan() { f32::INFINITY } else { x })
        .fold(0.0, f32::max))
}

/// Adds noise of this size to every parameter: fresh networks hide much behind zeros.
pub(crate) fn perturb(params: &Params, size: f64) -> Result<()> {
    for (name, var) in params.vars() {
        let noise = normal(&name, var.dims())?;
        var.set(&(var.as_tensor() + (noise * size)?)?)?;
    }
    Ok(())
}
