//! Whether decoding by a step that was recorded is decoding by ordinary steps, bit for bit, and both are what a pass over the whole
//! text says, as far as its type goes.

use anyhow::bail;
use candle_core::{DType, Tensor};
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::philox::Philox;
use fulgur_lightnet::lm::sampling::Sampling;
use fulgur_lightnet::lm::{LanguageModel, Session};
use serde::Serialize;

use super::{Plan, STREAM};

/// Both ways behind one text.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// Sequences.
    pub batch: usize,
    /// Tokens of the context.
    pub context: usize,
    /// Tokens that each sequence went on for.
    pub tokens: usize,
    /// Whether steps were recorded at all.
    pub recorded: bool,
    /// Why they were not.
    pub why_not: Option<String>,
    /// Whether the same tokens were chosen.
    pub equal_ids: bool,
    /// Whether all logits have the same bits.
    pub equal_logits: bool,
    /// Whether what the model keeps at the end has the same bits.
    pub equal_states: bool,
    /// Whether a clone half way, which shares what was recorded, went on to the same tokens.
    pub equal_clones: bool,
    /// Relative RMS difference between the logits of the first sequence and those of one pass over its whole text.
    pub whole: f64,
}

impl Check {
    /// Whether both ways are the same, and the whole pass is within `bound` of them.
    pub fn is_equal(&self, bound: f64) -> bool {
        let same = self.equal_ids && self.equal_logits && self.equal_states && self.equal_clones;
        same && self.whole <= bound
    }
}

/// Decodes `plan.tokens` tokens behind the shortest of its lengths in both ways, for each of its batches.
///
/// # Errors
/// A model in both directions, or a failing operation.
pub fn verify(model: &LanguageModel, plan: &Plan) -> anyhow::Result<Vec<Check>> {
    let config = model.config();
    if config.bidirectional {
        bail!("a model in both directions, expected a causal one");
    }
    let (ids, mut noise) = context(model, plan);
    let mut session = Session::new(model);
    session.read(model, &ids, plan.chunk, |_| true)?;
    let one = |&batch: &usize| {
        // Sequences of their own from their first token on.
        let first: Vec<u32> = (0..batch)
            .map(|_| noise.below(config.vocab_size) as u32)
            .collect();
        check(model, &session, &ids, &first, plan.tokens)
    };
    plan.batches.iter().map(one).collect()
}

/// Relative RMS difference between the logits of `model` and of `other`, which has the same weights, behind the tokens of the
/// shortest of the lengths of `plan`.
///
/// # Errors
/// A failing operation.
pub fn difference(model: &LanguageModel, other: &LanguageModel, plan: &Plan) -> anyhow::Result<f64> {
    let (ids, _) = context(model, plan);
    Ok(relative(&whole(model, &ids)?, &whole(other, &ids)?))
}

/// Random tokens of the shortest length, and the noise that goes on behind them.
fn context(model: &LanguageModel, plan: &Plan) -> (Vec<u32>, Philox) {
    let mut noise = Philox::new(plan.seed, STREAM);
    let length = plan.lengths.first().copied().unwrap_or(1);
    let ids = (0..length).map(|_| noise.below(model.config().vocab_size) as u32);
    (ids.collect(), noise)
}

/// Logits of all tokens after `ids`, in a row.
fn whole(model: &LanguageModel, ids: &[u32]) -> anyhow::Result<Vec<f32>> {
    let ids = Ids::new(ids, &[1, ids.len()], model.config().vocab_size)?;
    let logits = model.logits(&ids)?.to_dtype(DType::F32)?;
    Ok(logits.flatten_all()?.to_vec1()?)
}

/// RMS of the difference over that of `wanted`.
fn relative(found: &[f32], wanted: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let pairs = found.iter().zip(wanted);
    let error: f64 = pairs.map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let size: f64 = wanted.iter().map(|&b| square(f64::from(b))).sum();
    (error / size).sqrt()
}

fn check(
    model: &LanguageModel,
    session: &Session,
    context: &[u32],
    first: &[u32],
    tokens: usize,
) -> anyhow::Result<Check> {
    let numbers: Vec<u32> = (0..first.len() as u32).collect();
    let mut recorded = session.fork(&numbers)?;
    let mut plain = session.fork(&numbers)?.unrecorded()?;
    recorded.append(model, first)?;
    plain.append(model, first)?;
    let half = tokens / 2;
    let [mut found, mut wanted] = [Texts::default(), Texts::default()];
    found.go_on(model, &mut recorded, half)?;
    let was_recorded = recorded.is_recorded();
    let mut clone = recorded.clone();
    found.go_on(model, &mut recorded, tokens - half)?;
    wanted.go_on(model, &mut plain, tokens)?;
    let mut others = Texts::default();
    others.go_on(model, &mut clone, tokens - half)?;
    let states = [recorded.state()?, plain.state()?, clone.state()?];
    let [ours, theirs, cloned] = states.map(|state| state.tensors());
    let same = |other: &std::collections::BTreeMap<String, Tensor>| -> anyhow::Result<bool> {
        let mut same = other.len() == theirs.len();
        for (name, tensor) in &theirs {
            let other = other.get(name).map(bits).transpose()?;
            same &= other == Some(bits(tensor)?);
        }
        Ok(same)
    };
    let own = found.ids.iter().map(|row| row[0]);
    let text: Vec<u32> = context.iter().copied().chain([first[0]]).chain(own).collect();
    let vocabulary = model.config().vocab_size;
    let decoded = found.logits.iter().flat_map(|step| &step[..vocabulary]);
    let decoded: Vec<f32> = decoded.map(|&bits| f32::from_bits(bits)).collect();
    let whole = whole(model, &text)?;
    let whole = relative(&decoded, &whole[whole.len() - decoded.len()..]);
    Ok(Check {
        whole,
        batch: first.len(),
        context: session.tokens(),
        tokens,
        recorded: was_recorded && recorded.is_recorded(),
        why_not: recorded.why_not_recorded().map(str::to_owned),
        equal_ids: found.ids == wanted.ids,
        equal_logits: found.logits == wanted.logits,
        equal_states: same(&ours)? && same(&cloned)?,
        equal_clones: others.ids == wanted.ids[half..] && others.logits == wanted.logits[half..],
    })
}

/// Tokens that were chosen, and the logits after each.
#[derive(Default)]
struct Texts {
    ids: Vec<Vec<u32>>,
    logits: Vec<Vec<u32>>,
}

impl Texts {
    fn go_on(&mut self, model: &LanguageModel, session: &mut Session, tokens: usize) -> anyhow::Result<()> {
        let greedy = Sampling {
            temperature: 0.0,
            ..Sampling::default()
        };
        for _ in 0..tokens {
            self.ids
                .push(session.next(model, &greedy, model.config().vocab_size)?);
            session.settle(model)?;
            let Some(logits) = session.logits() else {
                bail!("no logits after a token")
            };
            self.logits.push(bits(logits)?);
        }
        Ok(())
    }
}

/// Of all elements, as f32 holds them.
fn bits(tensor: &Tensor) -> anyhow::Result<Vec<u32>> {
    let values: Vec<f32> = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    Ok(values.into_iter().map(f32::to_bits).collect())
}
