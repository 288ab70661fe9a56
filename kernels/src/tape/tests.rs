//! Gradients by a tape against those of the graph, and what a tape keeps.

use super::*;
use crate::glu::swiglu;
use crate::linear::linear;
use crate::norm::rms_norm;
use crate::residual::add_branch;
use crate::testing::{normal, relative_rms, values};
use candle_core::Var;

/// Two residual branches with shared weights, views, a result that is used twice, and plain operations between.
fn network(x: &Tensor, weights: &[Tensor]) -> Result<Tensor> {
    let mut x = x.clone();
    for _ in 0..2 {
        let normed = rms_norm(&x, Some(&weights[2]), 1e-6)?;
        let folded = normed.reshape((2, 6, 8))?;
        let hidden = swiglu(&linear(&folded, &weights[0], None)?)?;
        let turned = hidden.transpose(0, 1)?.contiguous()?.tanh()?.transpose(0, 1)?;
        let branch = linear(&turned, &weights[1], Some(&weights[2]))?.reshape(x.shape())?;
        x = add_branch(&x, &(branch + &normed)?, None)?;
    }
    x.sqr()?.mean_all()
}

fn inputs() -> (Tensor, Vec<Var>) {
    let var = |seed: u64, shape: &[usize]| Var::from_tensor(&normal(seed, shape)).unwrap();
    (
        normal(1, &[3, 4, 8]),
        vec![var(2, &[10, 8]), var(3, &[8, 5]), var(4, &[8]), var(5, &[3, 3])],
    )
}

#[test]
fn a_given_adjoint_is_that_of_a_weighted_sum() -> Result<()> {
    let (x, vars) = inputs();
    let weights = normal(9, &[3, 4, 8]);
    for turned in [false, true] {
        // The result of an operator, and one that candle's graph lies behind.
        let run = || -> Result<Tensor> {
            let y = rms_norm(&x, Some(&vars[2]), 1e-6)?;
            if turned { y.neg() } else { Ok(y) }
        };
        let expected = (run()? * &weights)?.sum_all()?.backward()?;
        let (y, tape) = record(run);
        let y = y?;
        let found = tape.backward_from(&y, &weights)?;
        let [found, expected] = [&found, &expected].map(|store| values(store.get(&vars[2]).unwrap()));
        assert!(relative_rms(&found, &expected) < 1e-13);
        let (_, tape) = record(run);
        let refused = tape.backward_from(&y, &x.t()?).unwrap_err().to_string();
        assert!(refused.contains("expected [3, 4, 8]"), "{refused}");
    }
    Ok(())
}

#[test]
fn gradients_are_those_of_the_graph() {
    let (x, vars) = inputs();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let expected = network(&x, &tensors).unwrap().backward().unwrap();
    let (loss, tape) = record(|| network(&x, &tensors));
    assert!(tape.entries.len() >= 10);
    let found = tape.backward(&loss.unwrap()).unwrap();
    for var in &vars[..3] {
        let (found, expected) = (
            values(found.get(var).unwrap()),
            values(expected.get(var).unwrap()),
        );
        assert!(relative_rms(&found, &expected) < 1e-14);
    }
    assert!(found.get(&vars[3]).is_none());
    // Nothing is left but the gradients of the weights.
    assert_eq!(found.get_ids().count(), 3);
}

/// A block of the network twice, as it is and forgotten; both of its results go on.
#[test]
fn what_is_recomputed_has_the_same_gradients() -> Result<()> {
    let (x, vars) = inputs();
    let weights: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let block = |x: &Tensor, scale: &Tensor, weights: &[Tensor]| -> Result<Vec<Tensor>> {
        let normed = rms_norm(x, Some(&weights[2]), 1e-6)?;
        let branch = linear(&swiglu(&linear(&normed, &weights[0], None)?)?, &weights[1], None)?;
        // One result of an operator, one of candle's graph, from a scale that lies outside.
        Ok(vec![add_branch(x, &branch, None)?, branch.broadcast_mul(scale)?])
    };
    let run = |forget: bool| -> Result<Vec<Vec<f64>>> {
        let (loss, tape) = record(|| -> Result<Tensor> {
            let mut x = linear(
                &x,
                &weights[3].repeat((3, 3))?.narrow(0, 0, 8)?.narrow(1, 0, 8)?,
                None,
            )?;
            let scale = weights[2].tanh()?;
            for _ in 0..2 {
                let (inner, outer) = ((x.clone(), scale.clone()), weights.clone());
                let results = if forget {
                    recompute(move || block(&inner.0, &inner.1, &outer))?
                } else {
                    block(&x, &scale, &weights)?
                };
                x = (&results[0] + &results[1])?;
            }
            x.sqr()?.mean_all()
        });
        if forget {
            assert_eq!(tape.entries.len(), 3);
        }
        let loss = loss?;
        let found = tape.backward(&loss)?;
        let gradients = vars.iter().map(|var| values(found.get(var).unwrap()));
        Ok([values(&loss)].into_iter().chain(gradients).collect())
    };
    for (forgotten, kept) in run(true)?.iter().zip(&run(false)?) {
        assert!(relative_rms(forgotten, kept) < 1e-14);
    }
    Ok(())
}

#[test]
fn records_nest_and_end_with_their_work() {
    let (x, vars) = inputs();
    let map = |x: &Tensor| linear(x, vars[0].as_tensor(), None);
    let (inner, outer) = record(|| {
        map(&x).unwrap();
        record(|| map(&x).unwrap()).1
    });
    assert_eq!((inner.entries.len(), outer.entries.len()), (1, 1));
    let caught = std::panic::catch_unwind(|| record(|| panic!("on purpose")));
    assert!(caught.is_err() && !is_recording());
    // Without gradients there is nothing to note down.
    let weight = vars[0].as_detached_tensor();
    let (y, tape) = record(|| linear(&x, &weight, None).unwrap());
    assert!(tape.entries.is_empty() && !y.track_op());
}
