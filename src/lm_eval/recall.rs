//! Multi-query associative recall: how often the value of a key is the likeliest of all tokens. [`Recall`] says what examples are.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::ops::log_softmax;
use fulgur_datasets::text::Recall;
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::philox::Philox;
use fulgur_lightnet::lm::LanguageModel;

use super::figures::{Estimate, Ratio};

/// Target of tokens that do not count.
pub const IGNORED: u32 = u32::MAX;
/// Most logits at a time.
const MOST_LOGITS: usize = 1 << 26;

/// Ids and targets `[count, context]` of new examples; those that do not count are [`IGNORED`].
///
/// # Errors
/// A failing operation.
pub fn examples(shape: &Recall, count: usize, noise: &mut Philox) -> Result<[Tensor; 2]> {
    let (mut ids, mut targets) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let example = shape.example(noise);
        ids.extend(example.ids);
        targets.extend(
            example
                .targets
                .into_iter()
                .map(|target| target.unwrap_or(IGNORED)),
        );
    }
    let tensor = |values| Tensor::from_vec(values, (count, shape.context), &Device::Cpu);
    Ok([tensor(ids)?, tensor(targets)?])
}

/// How a model did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// Nats a query.
    pub loss: Estimate,
    /// Share of queries whose value is the likeliest of all tokens; its error is by examples.
    pub accuracy: Estimate,
    /// Examples.
    pub examples: usize,
    /// Queries in them.
    pub queries: usize,
}

/// Asks `model` about `count` new examples, `batch` at a time; `go_on` is told how many are done, and ends it by `false`. Nothing
/// comes of no examples.
///
/// # Errors
/// A vocabulary that is larger than the model's, a model in both directions, or a failing operation.
pub fn measure(
    model: &LanguageModel,
    shape: &Recall,
    count: usize,
    batch: usize,
    noise: &mut Philox,
    mut go_on: impl FnMut(usize) -> bool,
) -> Result<Option<Measured>> {
    let (mut loss, mut right, mut queries) = (Ratio::default(), Ratio::default(), 0);
    let batch = batch.max(1);
    for first in (0..count).step_by(batch) {
        let rows = batch.min(count - first);
        let [ids, targets] = examples(shape, rows, noise)?;
        for (losses, hits) in answers(model, &ids, &targets)? {
            loss.add(losses.iter().sum(), losses.len() as f64);
            right.add(hits as f64, losses.len() as f64);
            queries += losses.len();
        }
        if !go_on(first + rows) {
            break;
        }
    }
    let estimates = loss.estimate().zip(right.estimate());
    Ok(estimates.map(|(of_loss, accuracy)| Measured {
        loss: of_loss,
        accuracy,
        examples: loss.count(),
        queries,
    }))
}

/// Losses of the queries of each example, and how many are right.
fn answers(model: &LanguageModel, ids: &Tensor, targets: &Tensor) -> Result<Vec<(Vec<f64>, usize)>> {
    let (rows, context) = ids.dims2()?;
    let mut all = vec![(Vec::new(), 0); rows];
    let vocabulary = model.config().vocab_size;
    // All logits of a long context with a large vocabulary would not fit.
    let columns = (MOST_LOGITS / (rows * vocabulary).max(1)).clamp(1, context);
    let mut state = model.start();
    for from in (0..context).step_by(columns) {
        let columns = columns.min(context - from);
        let part = |of: &Tensor| of.narrow(1, from, columns)?.contiguous();
        let logits = model.extend(&Ids::of(&part(ids)?, vocabulary)?, &mut state)?;
        let asked = part(targets)?.flatten_all()?.to_vec1::<u32>()?;
        let (at, values): (Vec<u32>, Vec<u32>) = (0u32..)
            .zip(asked)
            .filter(|&(_, target)| target != IGNORED)
            .unzip();
        if at.is_empty() {
            continue;
        }
        let device = model.device();
        let places = Tensor::new(&at[..], device)?;
        let values = Tensor::new(values, device)?;
        let logits = logits.flatten_to(1)?.index_select(&places, 0)?;
        let logits = logits.to_dtype(DType::F32)?;
        let likelihood = log_softmax(&logits, D::Minus1)?.gather(&values.unsqueeze(1)?, 1)?;
        let likelihood = likelihood.squeeze(1)?.to_vec1::<f32>()?;
        let hits = logits.argmax(D::Minus1)?.eq(&values)?.to_vec1::<u8>()?;
        for ((at, likelihood), hit) in at.into_iter().zip(likelihood).zip(hits) {
            let (losses, right) = &mut all[at as usize / columns];
            losses.push(-f64::from(likelihood));
            *right += usize::from(hit);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_lightnet::lm::{Architecture, Config};
    use fulgur_lightnet::params::Params;

    const SHAPE: Recall = Recall {
        context: 40,
        pairs: 6,
        vocabulary: 24,
        power: 0.5,
    };

    fn model(vocabulary: usize) -> LanguageModel {
        let config = Config {
            hidden_size: 16,
            intermediate_size: 16,
            num_attention_heads: 2,
            num_hidden_layers: 1,
            vocab_size: vocabulary,
            initializer_range: 0.4,
            ..Config::of(Architecture::Hgrn2)
        };
        LanguageModel::new(&config, DType::F32, &Params::random(2, &Device::Cpu).builder()).unwrap()
    }

    /// The same by one example at a time, all logits and a softmax in f64.
    #[test]
    fn queries_alone_count_and_errors_are_by_examples() {
        let model = model(30);
        let found = measure(&model, &SHAPE, 7, 3, &mut Philox::named(4, "x"), |_| true);
        let found = found.unwrap().unwrap();
        assert_eq!((found.examples, found.queries), (7, 42));
        let (mut losses, mut shares) = (Vec::new(), Vec::new());
        let noise = &mut Philox::named(4, "x");
        for _ in 0..7 {
            let example = SHAPE.example(noise);
            let ids = Ids::new(&example.ids, &[1, 40], 30).unwrap();
            let logits: Vec<Vec<f32>> = model.logits(&ids).unwrap().squeeze(0).unwrap().to_vec2().unwrap();
            let mut right = 0.0;
            for (row, target) in logits.iter().zip(&example.targets) {
                let Some(target) = target.map(|target| target as usize) else {
                    continue;
                };
                let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
                losses.push(sum.ln() - f64::from(row[target]));
                right += f64::from(u8::from(
                    row.iter()
                        .enumerate()
                        .all(|(id, logit)| id == target || *logit < row[target]),
                ));
            }
            shares.push(right / 6.0);
        }
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        assert!((found.loss.mean - mean(&losses)).abs() < 1e-4);
        assert!((found.accuracy.mean - mean(&shares)).abs() < 1e-12);
        let square: f64 = shares.iter().map(|share| (share - mean(&shares)).powi(2)).sum();
        let stderr = (square / 6.0 / 7.0).sqrt();
        assert!((found.accuracy.stderr.unwrap() - stderr).abs() < 1e-9);
    }

    #[test]
    fn it_ends_when_told_and_refuses_other_vocabularies() {
        let noise = &mut Philox::named(1, "x");
        let first = measure(&model(24), &SHAPE, 50, 4, noise, |done| done < 8).unwrap();
        assert_eq!(first.unwrap().examples, 8);
        assert!(
            measure(&model(24), &SHAPE, 0, 4, noise, |_| true)
                .unwrap()
                .is_none()
        );
        assert!(measure(&model(23), &SHAPE, 4, 4, noise, |_| true).is_err());
    }
}
