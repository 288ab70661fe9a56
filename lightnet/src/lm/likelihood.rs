//! How likely a model finds texts: logarithms of the probabilities of tokens, given those before them, in nats.

use candle_core::{DType, Device, Result, Tensor, bail};
use fulgur_kernels::cross_entropy::Options;
use fulgur_kernels::embedding::Ids;

use super::model::LanguageModel;
use super::session::MOST_TOGETHER;
use super::state::State;

/// Target of tokens that do not count.
const IGNORED: u32 = u32::MAX;

/// A text that is read token by token, each of which has a loss, given all before it. What is kept of it is a [`State`], whose size
/// does not depend on its length, except for softmax attention.
#[derive(Clone, Debug)]
pub struct Reading<'a> {
    model: &'a LanguageModel,
    state: State,
    /// The last token, which the model has not seen.
    last: Option<u32>,
}

impl<'a> Reading<'a> {
    /// Before the first token.
    pub fn new(model: &'a LanguageModel) -> Self {
        Self {
            model,
            state: model.start(),
            last: None,
        }
    }

    /// Reads `ids`, at most `chunk` at a time, and gives the losses `-log p` of each, given all before it. The very first token of a
    /// text has none.
    ///
    /// # Errors
    /// Ids beyond the vocabulary, a model in both directions, or a failing operation.
    pub fn push(&mut self, ids: &[u32], chunk: usize) -> Result<Vec<f32>> {
        let mut losses = Vec::with_capacity(ids.len());
        let mut targets = ids;
        if self.last.is_none() {
            let Some((first, rest)) = ids.split_first() else {
                return Ok(losses);
            };
            (self.last, targets) = (Some(*first), rest);
        }
        for targets in targets.chunks(chunk.max(1)) {
            let inputs: Vec<u32> = (self.last.into_iter())
                .chain(targets[..targets.len() - 1].iter().copied())
                .collect();
            let shape = [1, targets.len()];
            let inputs = Ids::new(&inputs, &shape, self.model.config().vocab_size)?;
            let wanted = Tensor::from_vec(targets.to_vec(), &shape[..], &Device::Cpu)?;
            let found = (self.model).extend_losses(&inputs, &wanted, &mut self.state, &Options::default())?;
            losses.extend(found.to_dtype(DType::F32)?.to_vec1::<f32>()?);
            self.last = targets.last().copied();
        }
        Ok(losses)
    }
}

/// A continuation and what it stands behind, in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continuation {
    /// What is given; at least one token.
    pub context: Vec<u32>,
    /// What is asked about; at least one token.
    pub continuation: Vec<u32>,
}

impl Continuation {
    /// All tokens but the last, which no other has to be foretold from.
    fn inputs(&self) -> impl Iterator<Item = u32> {
        let all = self.context.iter().chain(&self.continuation).copied();
        all.take(self.len())
    }

    /// How many inputs there are.
    fn len(&self) -> usize {
        self.context.len() + self.continuation.len() - 1
    }

    /// Inputs with the tokens that are to follow them; those of the context do not count.
    fn pairs(&self) -> impl Iterator<Item = (u32, u32)> {
        let unasked = std::iter::repeat_n(IGNORED, self.context.len() - 1);
        self.inputs()
            .zip(unasked.chain(self.continuation.iter().copied()))
    }
}

/// `sum log p(continuation | context)` of each of `asked`, which stand behind the one sequence of `state`.
///
/// What all of them begin with is read once; they go on from forks of its state, up to [`MOST_TOGETHER`] at a time, the shorter
/// ones with padding behind them. At most `chunk` tokens of each are read at once.
///
/// # Errors
/// A context or continuation without tokens, ids beyond the vocabulary, a model in both directions, or a failing operation.
pub fn log_likelihoods(
    model: &LanguageModel,
    state: &State,
    asked: &[Continuation],
    chunk: usize,
) -> Result<Vec<f64>> {
    if let Some(empty) = asked
        .iter()
        .find(|one| one.context.is_empty() || one.continuation.is_empty())
    {
        let (context, continuation) = (empty.context.len(), empty.continuation.len());
        bail!(
            "a context of {context} tokens, a continuation of {continuation}: expected at least one of each"
        );
    }
    let Some(first) = asked.first() else {
        return Ok(Vec::new());
    };
    let chunk = chunk.max(1);
    let vocabulary = model.config().vocab_size;
    let mut state = state.clone();
    let shared = shared(asked);
    for ids in first.context[..shared].chunks(chunk) {
        model.prefill(&Ids::new(ids, &[1, ids.len()], vocabulary)?, &mut state)?;
    }
    let options = Options {
        ignore: Some(IGNORED),
        ..Options::default()
    };
    let mut sums = Vec::with_capacity(asked.len());
    for together in asked.chunks(MOST_TOGETHER) {
        let rows = together.len();
        let width = together.iter().map(Continuation::len).max().unwrap_or(0) - shared;
        let mut state = state.select(&vec![0; rows])?;
        let mut rests: Vec<_> = together.iter().map(|one| one.pairs().skip(shared)).collect();
        let mut sum = vec![0.0; rows];
        for from in (0..width).step_by(chunk) {
            let columns = chunk.min(width - from);
            let (mut ids, mut targets) = (Vec::new(), Vec::new());
            for rest in &mut rests {
                // Causal models do not see what is behind a token, so that it may be anything.
                for _ in 0..columns {
                    let (id, target) = rest.next().unwrap_or((0, IGNORED));
                    ids.push(id);
                    targets.push(target);
                }
            }
            let shape = [rows, columns];
            let ids = Ids::new(&ids, &shape, vocabulary)?;
            let targets = Tensor::from_vec(targets, &shape[..], &Device::Cpu)?;
            let losses = model.extend_losses(&ids, &targets, &mut state, &options)?;
            let losses: Vec<f32> = losses.to_dtype(DType::F32)?.to_vec1()?;
            for (sum, losses) in sum.iter_mut().zip(losses.chunks(columns)) {
                *sum -= losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
            }
        }
        sums.append(&mut sum);
    }
    Ok(sums)
}

/// How many tokens all begin with that foretell nothing that is asked about.
fn shared(asked: &[Continuation]) -> usize {
    let Some((first, others)) = asked.split_first() else {
        return 0;
    };
    let most = asked.iter().map(|one| one.context.len() - 1).min().unwrap_or(0);
    let same = |one: &Continuation| {
        let pairs = one.context[..most].iter().zip(&first.context);
        pairs.take_while(|(a, b)| a == b).count()
    };
    others.iter().map(same).min().unwrap_or(most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lm::{Architecture, Config};
    use crate::params::Params;

    const V: usize = 64;

    fn model(architecture: Architecture) -> LanguageModel {
        let config = Config {
            hidden_size: 24,
            intermediate_size: 32,
            num_attention_heads: match architecture {
                Architecture::Hgrn1 => 24,
                _ => 2,
            },
            num_hidden_layers: 2,
            vocab_size: V,
            initializer_range: 0.3,
            conv_size: (architecture == Architecture::Lightnet).then_some(3),
            ..Config::of(architecture)
        };
        LanguageModel::new(&config, DType::F32, &Params::random(5, &Device::Cpu).builder()).unwrap()
    }

    fn ids(seed: usize, count: usize) -> Vec<u32> {
        (0..count)
            .map(|at| ((at * at * 7 + at * 13 + seed * 29) % V) as u32)
            .collect()
    }

    /// `-log p` of every token but the first, by one pass over the whole and a softmax in f64.
    fn whole(model: &LanguageModel, ids: &[u32]) -> Vec<f64> {
        let logits = model.logits(&Ids::new(ids, &[1, ids.len()], V).unwrap()).unwrap();
        let rows: Vec<Vec<f32>> = logits.squeeze(0).unwrap().to_vec2().unwrap();
        let loss = |(row, &target): (&Vec<f32>, &u32)| {
            let most = row.iter().copied().fold(f32::MIN, f32::max);
            let sum: f64 = row.iter().map(|&logit| f64::from(logit - most).exp()).sum();
            sum.ln() - f64::from(row[target as usize] - most)
        };
        rows.iter().zip(&ids[1..]).map(loss).collect()
    }

    #[test]
    fn read_in_any_pieces_every_token_has_the_loss_of_the_whole() {
        for architecture in Architecture::ALL {
            let model = model(architecture);
            let ids = ids(1, 41);
            let wanted = whole(&model, &ids);
            for (pieces, chunk) in [(41, 100), (41, 7), (5, 3), (1, 1)] {
                let mut reading = Reading::new(&model);
                let mut losses = Vec::new();
                for piece in ids.chunks(pieces) {
                    losses.extend(reading.push(piece, chunk).unwrap());
                }
                assert_eq!(losses.len(), wanted.len());
                for (found, wanted) in losses.iter().zip(&wanted) {
                    let error = (f64::from(*found) - wanted).abs();
                    assert!(
                        error < 2e-4,
                        "{architecture:?} {pieces} {chunk}: {found} {wanted}"
                    );
                }
            }
        }
    }

    /// Forks, padding and pieces change nothing: whatever is shared and however long the others are.
    #[test]
    fn continuations_have_the_likelihood_of_the_whole() {
        for architecture in Architecture::ALL {
            let model = model(architecture);
            let start = ids(9, 6);
            let mut state = model.start();
            model
                .prefill(&Ids::new(&start, &[1, 6], V).unwrap(), &mut state)
                .unwrap();
            let context = ids(2, 12);
            let one = |context: Vec<u32>, seed: usize, count: usize| Continuation {
                context,
                continuation: ids(seed, count),
            };
            let same: Vec<_> = (0..19)
                .map(|at| one(context.clone(), at, 1 + (5 * at) % 11))
                .collect();
            let forked = vec![
                one([context.clone(), ids(3, 2)].concat(), 4, 5),
                one([context.clone(), ids(4, 7)].concat(), 4, 5),
                one(context.clone(), 4, 9),
            ];
            let apart = vec![one(vec![7], 1, 3), one(vec![8], 1, 1)];
            for asked in [same, forked, apart] {
                for chunk in [4096, 4] {
                    let found = log_likelihoods(&model, &state, &asked, chunk).unwrap();
                    for (one, found) in asked.iter().zip(found) {
                        let all = [&start[..], &one.context, &one.continuation].concat();
                        let losses = whole(&model, &all);
                        let from = losses.len() - one.continuation.len();
                        let wanted = -losses[from..].iter().sum::<f64>();
                        assert!(
                            (found - wanted).abs() < 1e-3,
                            "{architecture:?}: {found} {wanted}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_shared_foretells_nothing_that_is_asked_about() {
        let one = |context: &[u32], continuation: &[u32]| Continuation {
            context: context.to_vec(),
            continuation: continuation.to_vec(),
        };
        assert_eq!(shared(&[one(&[1, 2, 3], &[4])]), 2);
        assert_eq!(shared(&[one(&[1, 2, 3], &[4]), one(&[1, 2, 3], &[4, 5])]), 2);
        assert_eq!(shared(&[one(&[1, 2, 3], &[4]), one(&[1, 2], &[3, 4])]), 1);
        assert_eq!(shared(&[one(&[1, 2, 3], &[4]), one(&[1, 9, 3], &[4])]), 1);
        assert_eq!(shared(&[one(&[1], &[4]), one(&[2], &[4])]), 0);
    }

    #[test]
    fn what_cannot_be_asked_is_refused() {
        let model = model(Architecture::Tnl);
        let ask = |context: &[u32], continuation: &[u32]| {
            let asked = Continuation {
                context: context.to_vec(),
                continuation: continuation.to_vec(),
            };
            log_likelihoods(&model, &model.start(), &[asked], 8).map_err(|error| error.to_string())
        };
        assert!(ask(&[], &[1]).unwrap_err().contains("a context of 0 tokens"));
        assert!(ask(&[1], &[]).unwrap_err().contains("a continuation of 0"));
        assert!(ask(&[1, V as u32, 3], &[1]).unwrap_err().contains("less than 64"));
        assert!(ask(&[1], &[V as u32]).is_err());
        assert!(Reading::new(&model).push(&[1, V as u32, 2], 8).is_err());
        assert!(
            log_likelihoods(&model, &model.start(), &[], 8)
                .unwrap()
                .is_empty()
        );
        assert!(Reading::new(&model).push(&[], 8).unwrap().is_empty());
    }
}
