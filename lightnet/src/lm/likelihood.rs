//! How likely a model finds texts: logarithms of the probabilities of tokens, given those before them, in nats.

use candle_core::{DType, Device, Result, Tensor, bail};
use fulgur_kernels::cross_entropy::Options;
use fulgur_kernels::embedding::Ids;

use super::model::LanguageModel;
use super::session::MOST_TOGETHER;
use super::state::State;

/// Target of tokens that do not count.
const IGNORED: u32 = u32::MAX;
/// Most continuations that are read at once.
const MOST_ROWS: usize = 64;
/// Most tokens of theirs, padding and what stands before them included: forks keep keys and values of all of them.
const MOST_PADDED: usize = 1 << 14;
/// Tokens that could be read in the time that a question takes besides: next to none on a CPU, where reading is arithmetic; on a
/// GPU the launches of a few hundred kernels.
const CALLS_ON_CPU: usize = 16;
const CALLS_ON_GPU: usize = 4096;

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
/// What all of them begin with is read once; they go on from forks of its state, several at a time, the shorter ones with padding
/// behind them. At most `chunk` tokens of each are read at once.
///
/// # Errors
/// A context or continuation without tokens, ids beyond the vocabulary, a model in both directions, or a failing operation.
pub fn log_likelihoods(
    model: &LanguageModel,
    state: &State,
    asked: &[Continuation],
    chunk: usize,
) -> Result<Vec<f64>> {
    let found = log_likelihoods_together(model, state, &[asked], chunk)?;
    Ok(found.into_iter().next().unwrap_or_default())
}

/// As [`log_likelihoods`], of several questions at once, best of those that [`together`] puts beside each other.
///
/// Of each question as much is read once as the shortest beginning of all of them has tokens: states have one length. What is left
/// of a beginning is read with each of its continuations.
///
/// # Errors
/// As [`log_likelihoods`].
pub fn log_likelihoods_together(
    model: &LanguageModel,
    state: &State,
    questions: &[&[Continuation]],
    chunk: usize,
) -> Result<Vec<Vec<f64>>> {
    let all = || questions.iter().flat_map(|asked| asked.iter());
    if let Some(empty) = all().find(|one| one.context.is_empty() || one.continuation.is_empty()) {
        let (context, continuation) = (empty.context.len(), empty.continuation.len());
        bail!(
            "a context of {context} tokens, a continuation of {continuation}: expected at least one of each"
        );
    }
    let mut sums: Vec<Vec<f64>> = questions.iter().map(|asked| vec![0.0; asked.len()]).collect();
    // A question without continuations has nothing to read.
    let live: Vec<usize> = (0..questions.len())
        .filter(|&question| !questions[question].is_empty())
        .collect();
    let Some(read) = live.iter().map(|&question| shared(questions[question])).min() else {
        return Ok(sums);
    };
    let chunk = chunk.max(1);
    let vocabulary = model.config().vocab_size;
    let mut state = state.select(&vec![0; live.len()])?;
    for from in (0..read).step_by(chunk) {
        let columns = chunk.min(read - from);
        let beginnings = live
            .iter()
            .map(|&question| &questions[question][0].context[from..][..columns]);
        let ids: Vec<u32> = beginnings.flatten().copied().collect();
        model.prefill(&Ids::new(&ids, &[live.len(), columns], vocabulary)?, &mut state)?;
    }
    let options = Options {
        ignore: Some(IGNORED),
        ..Options::default()
    };
    // Each with the place of its beginning, and of its sum.
    let rows: Vec<(u32, usize, usize)> = (live.iter().zip(0..))
        .flat_map(|(&question, place)| (0..questions[question].len()).map(move |at| (place, question, at)))
        .collect();
    let longest = all().map(Continuation::len).max().unwrap_or(0);
    let at_once = (MOST_PADDED / longest.max(1)).clamp(MOST_TOGETHER, MOST_ROWS);
    for rows in rows.chunks(at_once) {
        let places: Vec<u32> = rows.iter().map(|&(place, _, _)| place).collect();
        let one = |&(_, question, at): &(u32, usize, usize)| &questions[question][at];
        let width = rows.iter().map(|row| one(row).len()).max().unwrap_or(0) - read;
        let mut state = state.select(&places)?;
        let mut rests: Vec<_> = rows.iter().map(|row| one(row).pairs().skip(read)).collect();
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
            let shape = [rows.len(), columns];
            let ids = Ids::new(&ids, &shape, vocabulary)?;
            let targets = Tensor::from_vec(targets, &shape[..], &Device::Cpu)?;
            let losses = model.extend_losses(&ids, &targets, &mut state, &options)?;
            let losses: Vec<f32> = losses.to_dtype(DType::F32)?.to_vec1()?;
            for (&(_, question, at), losses) in rows.iter().zip(losses.chunks(columns)) {
                sums[question][at] -= losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
            }
        }
    }
    Ok(sums)
}

/// Puts questions beside each other that are worth being asked of `model` at once: places of `questions`, each of which is in one
/// group.
///
/// Questions of like lengths are neighbours, and one joins the group before it where padding costs less than asking it apart.
pub fn together(model: &LanguageModel, questions: &[&[Continuation]]) -> Vec<Vec<usize>> {
    let calls = match model.device().is_cpu() {
        true => CALLS_ON_CPU,
        false => CALLS_ON_GPU,
    };
    grouped(questions, calls)
}

/// As [`together`], where a question takes as long as reading so many tokens besides.
fn grouped(questions: &[&[Continuation]], calls: usize) -> Vec<Vec<usize>> {
    let sizes: Vec<Size> = questions.iter().map(|asked| Size::of(asked)).collect();
    let mut order: Vec<usize> = (0..questions.len()).collect();
    order.sort_by_key(|&question| (sizes[question].shared, sizes[question].longest));
    let mut groups: Vec<(Vec<usize>, Size)> = Vec::new();
    for question in order {
        let size = sizes[question];
        if let Some((places, group)) = groups.last_mut() {
            let both = group.with(size);
            let worth = both.cost() <= group.cost() + size.cost() + calls;
            let fits = both.rows <= MOST_ROWS && both.rows * both.longest <= MOST_PADDED;
            if worth && fits {
                places.push(question);
                *group = both;
                continue;
            }
        }
        groups.push((vec![question], size));
    }
    groups.into_iter().map(|(places, _)| places).collect()
}

/// What some questions take to be asked.
#[derive(Clone, Copy, Debug)]
struct Size {
    questions: usize,
    /// Tokens that are read once of each.
    shared: usize,
    /// Continuations.
    rows: usize,
    /// Tokens of the longest, with what stands before it.
    longest: usize,
}

impl Size {
    fn of(asked: &[Continuation]) -> Self {
        Self {
            questions: 1,
            shared: shared(asked),
            rows: asked.len(),
            longest: asked.iter().map(Continuation::len).max().unwrap_or(0),
        }
    }

    fn with(self, other: Self) -> Self {
        Self {
            questions: self.questions + other.questions,
            shared: self.shared.min(other.shared),
            rows: self.rows + other.rows,
            longest: self.longest.max(other.longest),
        }
    }

    /// Tokens that are read, padding included.
    fn cost(self) -> usize {
        self.questions * self.shared + self.rows * self.longest.saturating_sub(self.shared)
    }
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

    /// Questions of all lengths: beside each other, each continuation has what it has alone.
    #[test]
    fn questions_together_have_the_likelihoods_that_they_have_alone() {
        let question = |seed: usize, context: usize, choices: usize| -> Vec<Continuation> {
            let one = |at: usize| Continuation {
                context: ids(seed, context),
                continuation: ids(seed + at, 1 + (seed + 3 * at) % 9),
            };
            (0..choices).map(one).collect()
        };
        let mut questions: Vec<Vec<Continuation>> = (0..30)
            .map(|at| question(at, 1 + (at * at) % 37, 2 + at % 4))
            .collect();
        // Contexts that differ, more continuations than are read at once, and none.
        questions.push([question(3, 9, 1), question(4, 12, 1)].concat());
        questions.push(question(5, 20, MOST_ROWS + 9));
        questions.push(Vec::new());
        let asked: Vec<&[Continuation]> = questions.iter().map(Vec::as_slice).collect();
        let groups = grouped(&asked, 64);
        assert!(
            groups.len() < 12 && groups.iter().any(|group| group.len() > 3),
            "{groups:?}"
        );
        let mut places = groups.concat();
        places.sort_unstable();
        assert!(places.into_iter().eq(0..questions.len()));
        for architecture in Architecture::ALL {
            let model = model(architecture);
            let mut state = model.start();
            for start in [0, 5] {
                if start > 0 {
                    let start = Ids::new(&ids(9, start), &[1, start], V).unwrap();
                    model.prefill(&start, &mut state).unwrap();
                }
                let alone: Vec<Vec<f64>> = (asked.iter())
                    .map(|asked| log_likelihoods(&model, &state, asked, 4096).unwrap())
                    .collect();
                for (groups, chunk) in [
                    (groups.clone(), 4096),
                    (groups.clone(), 6),
                    (vec![(0..asked.len()).collect()], 4096),
                ] {
                    for group in groups {
                        let beside: Vec<&[Continuation]> = group.iter().map(|&place| asked[place]).collect();
                        let found = log_likelihoods_together(&model, &state, &beside, chunk).unwrap();
                        for (&place, found) in group.iter().zip(found) {
                            assert_eq!(found.len(), alone[place].len());
                            for (found, alone) in found.iter().zip(&alone[place]) {
                                assert!(
                                    (found - alone).abs() < 1e-5 * alone.abs().max(1.0),
                                    "{architecture:?}, question {place}: {found}, alone {alone}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    /// Long questions stay apart: padding and forks would cost more than is won.
    #[test]
    fn only_what_is_alike_is_asked_at_once() {
        let question = |context: usize, continuation: usize| {
            let one = Continuation {
                context: vec![1; context],
                continuation: vec![2; continuation],
            };
            vec![one.clone(), one]
        };
        let group = |sizes: &[(usize, usize)]| {
            let questions: Vec<_> = sizes.iter().map(|&(a, b)| question(a, b)).collect();
            let asked: Vec<&[Continuation]> = questions.iter().map(Vec::as_slice).collect();
            grouped(&asked, 64)
        };
        assert!(group(&[]).is_empty());
        assert_eq!(group(&[(20, 3), (600, 3), (21, 5)]), [vec![0, 2], vec![1]]);
        // Equal ones, but of more tokens than are kept.
        assert_eq!(group(&[(5000, 2), (5000, 2)]), [[0], [1]]);
        assert_eq!(group(&[(20, 3); 40]).len(), 2);
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
