//! What the tests of all operators share: inputs, gradient checks and the error rule.

use crate::exchange::{StateExchange, part_borders, threads};
use crate::philox::Philox;
use crate::tape;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use std::sync::Arc;

/// Standard normal `f64` tensor, a function of `seed` and shape.
pub(crate) fn normal(seed: u64, shape: &[usize]) -> Tensor {
    let draws = Philox::named(seed, "operator tests").normals(shape.iter().product());
    Tensor::from_vec(draws, shape, &Device::Cpu)
        .and_then(|t| t.to_dtype(DType::F64))
        .expect("shape fits")
}

/// All elements, as `f64`.
pub(crate) fn values(tensor: &Tensor) -> Vec<f64> {
    tensor
        .to_dtype(DType::F64)
        .and_then(|t| t.flatten_all())
        .and_then(|t| t.to_vec1())
        .expect("tensor on the CPU")
}

/// Root of the mean square of the difference over that of `wanted`; NaN if there is one.
pub(crate) fn relative_rms(found: &[f64], wanted: &[f64]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    let square = |sum: f64, x: f64| sum + x * x;
    let error = found.iter().zip(wanted).map(|(a, b)| a - b).fold(0.0, square);
    (error / wanted.iter().copied().fold(1e-300, square)).sqrt()
}

/// Result of `f` and the gradient of `sum(f * weights)` for each input, all as vectors.
fn forward_backward(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<Vec<Vec<f64>>> {
    derive(inputs, f, |f| f().and_then(|(y, loss)| Ok((y, loss.backward()?))))
}

/// [`forward_backward`] by a tape instead of candle's graph.
fn forward_backward_on_tape(
    inputs: &[Tensor],
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<Vec<Vec<f64>>> {
    derive(inputs, f, |f| {
        let (made, tape) = tape::record(f);
        let (y, loss) = made?;
        Ok((y, tape.backward(&loss)?))
    })
}

fn derive(
    inputs: &[Tensor],
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
    gradients: impl Fn(&dyn Fn() -> Result<(Tensor, Tensor)>) -> Result<(Tensor, GradStore)>,
) -> Result<Vec<Vec<f64>>> {
    let vars: Vec<Var> = inputs.iter().map(Var::from_tensor).collect::<Result<_>>()?;
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let (y, grads) = gradients(&|| {
        let y = f(&tensors)?;
        let weights = normal(99, y.dims()).to_dtype(y.dtype())?;
        let loss = (&y * weights)?.sum_all()?;
        Ok((y, loss))
    })?;
    let mut results = vec![values(&y)];
    for tensor in &tensors {
        results.push(values(grads.get(tensor).expect("every input has a gradient")));
    }
    Ok(results)
}

/// Gradients of `f` in f64 against central differences, and those of a tape against candle's.
pub(crate) fn check_gradients(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<()> {
    const STEP: f64 = 1e-5;
    let found = forward_backward(inputs, &f)?;
    for (found, taped) in found.iter().zip(forward_backward_on_tape(inputs, &f)?) {
        assert!(relative_rms(&taped, found) < 1e-13, "the tape differs");
    }
    let loss = |inputs: &[Tensor]| -> Result<f64> {
        let y = f(inputs)?;
        (&y * normal(99, y.dims()))?.sum_all()?.to_scalar()
    };
    for (i, input) in inputs.iter().enumerate() {
        let base = values(input);
        let mut numeric = Vec::with_capacity(base.len());
        for j in 0..base.len() {
            let moved = |delta: f64| -> Result<f64> {
                let mut point = base.clone();
                point[j] += delta;
                let mut inputs = inputs.to_vec();
                inputs[i] = Tensor::from_vec(point, input.dims(), &Device::Cpu)?;
                loss(&inputs)
            };
            numeric.push((moved(STEP)? - moved(-STEP)?) / (2.0 * STEP));
        }
        // Central differences lose digits where a gradient is small beside the loss: hence the absolute term.
        let error = relative_rms(&found[i + 1], &numeric);
        let largest = found[i + 1]
            .iter()
            .zip(&numeric)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f64::max);
        assert!(
            error < 1e-7 || largest < 1e-8,
            "input {i} of shape {:?}: relative {error:e}, largest {largest:e}",
            input.dims()
        );
    }
    Ok(())
}

/// Result and gradients in f32 against f64, by relative RMS.
pub(crate) fn check_precision(
    inputs: &[Tensor],
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
    tolerance: f64,
) -> Result<()> {
    let single: Vec<Tensor> = inputs
        .iter()
        .map(|t| t.to_dtype(DType::F32))
        .collect::<Result<_>>()?;
    let (found, wanted) = (forward_backward(&single, &f)?, forward_backward(inputs, &f)?);
    for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
        let error = relative_rms(found, wanted);
        assert!(
            error < tolerance,
            "result {i} of shape {:?}: {error:e}",
            inputs[0].dims()
        );
    }
    Ok(())
}

/// Result and gradients in f32 have the same bits on one and on three threads.
pub(crate) fn check_threads(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor> + Sync) -> Result<()> {
    let single: Vec<Tensor> = inputs
        .iter()
        .map(|t| t.to_dtype(DType::F32))
        .collect::<Result<_>>()?;
    let mut bits: Option<Vec<Vec<f64>>> = None;
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .expect("a thread pool");
        let found = pool.install(|| forward_backward(&single, &f))?;
        match &bits {
            Some(first) => assert_eq!(first, &found, "{threads} threads"),
            None => bits = Some(found),
        }
    }
    Ok(())
}

/// Packed sequences of 12 tokens whose borders lie within the parts of [`PARTS`], between them, on both sides of one, and nowhere.
pub(crate) const PACKED: [&[usize]; 4] = [&[0, 3, 12], &[0, 5, 12], &[0, 2, 5, 5, 6, 9, 12], &[0, 12]];

/// Tokens of parts, for [`check_parts`].
pub(crate) const PARTS: [usize; 3] = [5, 1, 6];

/// Borders of packed sequences as a part of `n` tokens sees them; all of them where there are no parts.
pub(crate) fn own_borders(
    borders: &[usize],
    n: usize,
    exchange: Option<&Arc<dyn StateExchange>>,
) -> Vec<usize> {
    let start = exchange.map_or(0, |exchange| exchange.position_offset());
    match exchange {
        None => borders.to_vec(),
        Some(_) => part_borders(borders, &(start..start + n)),
    }
}

/// Output and gradients of `run` over parts of the second axis, of `tokens` each and joined by an exchange between threads,
/// against those of the whole.
pub(crate) fn check_parts(
    inputs: &[Tensor],
    tokens: &[usize],
    run: impl Fn(&[Tensor], Option<Arc<dyn StateExchange>>) -> Result<Tensor> + Sync,
) -> Result<()> {
    let weights = {
        let shape = run(inputs, None)?;
        normal(99, shape.dims())
    };
    let results = |inputs: &[Tensor], weights: &Tensor, exchange| -> Result<Vec<Tensor>> {
        let vars: Vec<Var> = inputs.iter().map(Var::from_tensor).collect::<Result<_>>()?;
        let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let y = run(&tensors, exchange)?;
        let grads = (&y * weights)?.sum_all()?.backward()?;
        let mut all = vec![y.detach()];
        all.extend(vars.iter().map(|var| grads.get(var).expect("a gradient").clone()));
        Ok(all)
    };
    let whole = results(inputs, &weights, None)?;
    let start = |part: usize| tokens[..part].iter().sum();
    let cut = |t: &Tensor, part: usize| t.narrow(1, start(part), tokens[part]);
    let found: Vec<Vec<Tensor>> = std::thread::scope(|scope| {
        let handles: Vec<_> = threads(tokens)
            .into_iter()
            .enumerate()
            .map(|(part, exchange)| {
                let (weights, results, cut) = (&weights, &results, &cut);
                scope.spawn(move || {
                    let own: Vec<Tensor> = inputs.iter().map(|t| cut(t, part)).collect::<Result<_>>()?;
                    results(&own, &cut(weights, part)?, Some(exchange))
                })
            })
            .collect();
        handles
            .into_iter()
            .map(|handle| handle.join().expect("no panic"))
            .collect::<Result<_>>()
    })?;
    for (index, whole) in whole.iter().enumerate() {
        let parts: Vec<&Tensor> = found.iter().map(|part| &part[index]).collect();
        let error = relative_rms(&values(&Tensor::cat(&parts, 1)?), &values(whole));
        assert!(error < 1e-12, "result {index} in parts: {error:e}");
    }
    Ok(())
}
