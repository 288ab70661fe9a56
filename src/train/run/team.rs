//! What a session does together with other ranks: sums of gradients, outer rounds, and the word of the rank that leads.
//!
//! Ranks do the same at the same time; only the one that leads looks at the clock, listens to people and writes files. Its word
//! travels with the gradients of a step, or, where workers take steps of their own, beside their averages and as late as these.

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::{DType, Device, Tensor, Var};

use super::super::checkpoint::State;
use super::super::error::TrainError;
use super::super::optimiser::{Gradients, Optimiser};
use super::Report;
use super::shards::{Kind, Shards};
use crate::distributed::outer::{Outer, OuterState, least_steps};
use crate::distributed::{Call, CommError, Communicator, Pending, Ranks, Reduce, Shard};

/// Where outer tensors are kept among those of a checkpoint.
const PREFIX: &str = "outer.";
/// Steps after which inner steps are timed, and steps that are timed: the first ones load what kernels need.
const BEFORE: usize = 1;
const TIMED: usize = 2;

/// What the rank that leads says.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Word {
    /// Seconds of training so far.
    pub(super) elapsed: f64,
    /// Whether the run is to pause.
    pub(super) stop: bool,
    /// Whether a checkpoint is due.
    pub(super) save: bool,
}

impl Word {
    fn numbers(self) -> [f64; 3] {
        [self.elapsed, f64::from(self.stop), f64::from(self.save)]
    }

    fn of(numbers: &[f64]) -> Self {
        Self {
            elapsed: numbers[0],
            stop: numbers[1] > 0.0,
            save: numbers[2] > 0.0,
        }
    }
}

/// The ranks of a run, from the side of a session.
pub(super) struct Team<'a> {
    ranks: &'a Ranks,
    /// The last word that was heard.
    pub(super) word: Word,
    rounds: Option<Rounds>,
    shards: Option<Shards>,
}

/// Local steps and outer updates.
struct Rounds {
    outer: Outer,
    vars: Vec<Var>,
    /// Inner steps of a round; 0 until it is known.
    inner_steps: usize,
    /// Inner steps of this round so far.
    taken: usize,
    /// Seconds of an average, where inner steps are chosen by it; and when the timed steps began.
    average_s: f64,
    timed: Option<Instant>,
    /// The word that is under way.
    word: Option<Box<dyn Pending>>,
}

impl<'a> Team<'a> {
    /// Of ranks whose parameters are `vars`, and whose tensors of moments, where they go on from a checkpoint, are `kept`.
    ///
    /// # Errors
    /// Ranks differ in their recipes, their weights or the step that they go on from, or some are missing.
    pub(super) fn new(
        ranks: &'a Ranks,
        vars: &BTreeMap<String, Var>,
        optimiser: &mut Optimiser,
        state: &State,
        kept: &BTreeMap<String, Tensor>,
    ) -> Result<Self, TrainError> {
        let world = ranks.world();
        world.agree("version of the program", env!("CARGO_PKG_VERSION"))?;
        world.agree("recipe", &state.recipe)?;
        world.agree("step of the checkpoint", &state.step.to_string())?;
        // Of a model that several ranks have together, those that have the same part.
        let alike = match ranks.tensor().size() {
            1 => world,
            _ => ranks.step(),
        };
        alike.agree("weights", &digest(vars)?)?;
        check_slices(ranks, optimiser)?;
        let mut team = Self {
            ranks,
            word: Word::default(),
            rounds: None,
            shards: None,
        };
        let kind = ranks.options().shard;
        if kind != Shard::None {
            let parameters = ranks.parameters().cloned();
            if kind == Shard::Parameters && ranks.step().size() > 1 && parameters.is_none() {
                return Err(CommError::Launch {
                    rank: world.own(),
                    reason: "distributed.shard: found parameters, expected none, moments or gradients: the model of this \
                             task keeps its parameters"
                        .to_owned(),
                }
                .into());
            }
            if let Some(parameters) = &parameters {
                parameters.begin()?;
            }
            team.shards = Some(Shards::new(ranks.step().clone(), kind, parameters, optimiser)?);
        }
        if let (Some(options), Some(workers)) = (&ranks.options().outer, ranks.workers()) {
            let rule = options.rule(workers.size());
            let vars: Vec<Var> = vars.values().cloned().collect();
            let start = flat(&vars)?;
            let state = restored(&start, kept)?;
            let sizes = vars.iter().map(|var| var.elem_count()).collect();
            let outer = Outer::new(rule, workers.clone(), Some(ranks.step().clone()), sizes, state);
            team.rounds = Some(Rounds {
                outer,
                vars,
                inner_steps: options.inner_steps,
                taken: 0,
                average_s: 0.0,
                timed: None,
                word: None,
            });
            if options.inner_steps == 0 {
                team.time_average(&start)?;
            }
        }
        Ok(team)
    }

    /// Whether this rank writes files and speaks to people.
    pub(super) fn leads(&self) -> bool {
        self.ranks.leads()
    }

    /// Number of ranks, or of those that have a model together.
    pub(super) fn size(&self) -> u64 {
        (self.ranks.world().size() / self.ranks.tensor().size()) as u64
    }

    /// Whether ranks have to come together for a checkpoint.
    pub(super) fn saves_together(&self) -> bool {
        self.rounds.is_some() || self.shards.is_some() || self.ranks.slices().is_some()
    }

    /// Whether all workers hold the same weights.
    pub(super) fn is_together(&self) -> bool {
        self.rounds.as_ref().is_none_or(|rounds| rounds.taken == 0)
    }

    /// Gradients and scalars of a step over all ranks that take it together, from this rank's own, which are of `share` of what
    /// the means are taken over; where gradients are kept in shards, those of the own parameters and the norm of all. Hears the
    /// word of the rank that leads, whose own is `word`.
    ///
    /// # Errors
    /// A rank is missing.
    pub(super) fn sum(
        &mut self,
        mut gradients: Gradients,
        mut scalars: Vec<(String, Tensor)>,
        share: f64,
        word: Word,
    ) -> Result<Summed, TrainError> {
        let step = self.ranks.step().clone();
        if step.size() == 1 {
            // Alone, it only has to make means of its shares.
            let factor = if share > 0.0 { 1.0 / share } else { 0.0 };
            let scale = |tensor: &Tensor| tensor * factor;
            gradients.replace(scale)?;
            for (_, value) in &mut scalars {
                *value = scale(value)?;
            }
            if self.rounds.is_none() {
                self.word = word;
            }
            let norm = self.norm_over_slices(&mut gradients)?;
            return Ok(Summed {
                gradients,
                scalars,
                norm,
            });
        }
        let own = if self.leads() { word } else { Word::default() };
        let mut said = vec![share];
        said.extend(own.numbers());
        let apart = self
            .shards
            .as_ref()
            .filter(|shards| shards.kind != Shard::Moments);
        let mut heard = None;
        let norm = match apart {
            None => {
                let all: Vec<&Tensor> = gradients
                    .tensors()
                    .chain(scalars.iter().map(|(_, value)| value))
                    .collect();
                let (mean, numbers) = mean_of(&*step, &all, &said)?;
                let mut means = mean.into_iter();
                let mut next = |_: &Tensor| match means.next() {
                    Some(mean) => Ok(mean),
                    None => candle_core::bail!("a sum over ranks brought too little"),
                };
                gradients.replace(&mut next)?;
                for (_, value) in &mut scalars {
                    *value = next(value)?;
                }
                heard = Some(numbers);
                None
            }
            Some(shards) => Some(shards.scatter(&mut gradients, || {
                let all: Vec<&Tensor> = scalars.iter().map(|(_, value)| value).collect();
                let (means, numbers) = mean_of(&*step, &all, &said)?;
                for ((_, value), mean) in scalars.iter_mut().zip(means) {
                    *value = mean;
                }
                let shares = Tensor::new(&[numbers[0] as f32], &Device::Cpu)?;
                heard = Some(numbers);
                Ok(shares)
            })?),
        };
        if let (None, Some(numbers)) = (&self.rounds, heard) {
            self.word = Word::of(&numbers[1..]);
        }
        let norm = match self.norm_over_slices(&mut gradients)? {
            Some(all) => Some(all),
            None => norm,
        };
        Ok(Summed {
            gradients,
            scalars,
            norm,
        })
    }

    /// The norm `[1]` of all gradients where ranks have parts of the parameters; `None` where each has the whole of them. Hears the
    /// word from the rank that is among those of the one that leads.
    fn norm_over_slices(&mut self, gradients: &mut Gradients) -> Result<Option<Tensor>, TrainError> {
        let Some(slices) = self.ranks.slices() else {
            return Ok(None);
        };
        let device = gradients
            .tensors()
            .next()
            .map_or(Device::Cpu, |tensor| tensor.device().clone());
        let nothing = Tensor::zeros(1, DType::F32, &device)?;
        let mut squares = [nothing.clone(), nothing];
        for (index, gradient) in gradients.slots().iter().enumerate() {
            if let Some(gradient) = gradient {
                let square = gradient.to_dtype(DType::F32)?.sqr()?.sum_all()?.reshape(1)?;
                let sum = &mut squares[usize::from(slices.is_cut(index))];
                *sum = (&*sum + square)?;
            }
        }
        let [whole, cut] = squares;
        // The first of them has heard the rank that leads, or is that rank.
        let heard = match slices.group().rank() {
            0 => self.word,
            _ => Word::default(),
        };
        let heard = Tensor::new(&heard.numbers(), &Device::Cpu)?.to_dtype(DType::F32)?;
        let message = Tensor::cat(&[cut, heard.to_device(&device)?], 0)?;
        let sums = slices.group().all_reduce(&message, Reduce::Sum)?;
        let norm = (whole + sums.narrow(0, 0, 1)?)?.sqrt()?;
        let numbers = sums.narrow(0, 1, 3)?.to_vec1::<f32>()?;
        let numbers: Vec<f64> = numbers.into_iter().map(f64::from).collect();
        self.word = Word::of(&numbers);
        Ok(Some(norm))
    }

    /// Takes the parameters that other ranks have updated, where each has its own.
    ///
    /// # Errors
    /// A rank is missing.
    pub(super) fn share_weights(&self) -> Result<(), TrainError> {
        match &self.shards {
            Some(shards) => shards.share_weights(),
            None => Ok(()),
        }
    }

    /// Whether a rank has no more than its part of the weights: then work with the model is the work of all ranks.
    pub(super) fn has_parts(&self) -> bool {
        let shares = |shards: &Shards| shards.parameters.is_some();
        self.shards.as_ref().is_some_and(shares) || self.ranks.slices().is_some()
    }

    /// Whether this rank follows the average of the parameter of this number, in the order of names.
    pub(super) fn averages(&self, index: usize) -> bool {
        let lent = |shards: &Shards| {
            let parameters = shards.parameters.as_ref();
            parameters.is_some_and(|parameters| parameters.is_lent(index))
        };
        self.shards
            .as_ref()
            .is_none_or(|shards| shards.owns(index) || !lent(shards))
    }

    /// The tensors of all parameters on the host of the rank that leads, from those that this one has; all ranks call it
    /// together. `own` itself where this rank has all.
    ///
    /// # Errors
    /// A rank is missing.
    pub(super) fn whole(
        &self,
        kind: Kind,
        own: BTreeMap<String, Tensor>,
    ) -> Result<BTreeMap<String, Tensor>, TrainError> {
        if let Some(slices) = self.ranks.slices() {
            let whole = slices.whole(&own)?;
            return Ok(if self.leads() { whole } else { BTreeMap::new() });
        }
        match &self.shards {
            Some(shards) if kind == Kind::Moments || shards.parameters.is_some() => {
                shards.whole(kind, &own, self.leads())
            }
            _ => Ok(own),
        }
    }

    /// Counts an inner step, and ends the round where it is the last one.
    ///
    /// # Errors
    /// A rank is missing.
    pub(super) fn after_step(
        &mut self,
        word: Word,
        report: &mut impl FnMut(Report),
    ) -> Result<(), TrainError> {
        let Some(rounds) = &mut self.rounds else {
            return Ok(());
        };
        rounds.taken += 1;
        if rounds.inner_steps == 0 {
            let device = rounds.vars[0].device();
            if rounds.taken == BEFORE {
                device.synchronize()?;
                rounds.timed = Some(Instant::now());
            }
            let due = rounds.taken == BEFORE + TIMED;
            if let Some(began) = rounds.timed.filter(|_| due) {
                device.synchronize()?;
                let step_s = self.ranks.largest(began.elapsed().as_secs_f64() / TIMED as f64)?;
                rounds.inner_steps = least_steps(step_s, rounds.average_s);
                report(Report::Note(format!(
                    "{} inner steps a round: a step takes {step_s:.3} s, an average {:.3} s",
                    rounds.inner_steps, rounds.average_s
                )));
            }
        }
        if rounds.inner_steps > 0 && rounds.taken >= rounds.inner_steps {
            self.end_round(word)?;
        }
        Ok(())
    }

    fn end_round(&mut self, word: Word) -> Result<(), TrainError> {
        let leads = self.leads();
        let Some(rounds) = &mut self.rounds else {
            return Ok(());
        };
        if let Some(arrived) = rounds.word.take()
            && let Some(heard) = arrived.wait()?.first()
        {
            self.word = Word::of(&heard.to_vec1::<f64>()?);
        }
        let own = if leads { word } else { Word::default() };
        let own = Tensor::new(&own.numbers(), &Device::Cpu)?;
        rounds.word = Some(self.ranks.world().start(Call::AllReduce(Reduce::Sum), &own)?);
        let next = rounds.outer.round(&flat(&rounds.vars)?)?;
        rounds.taken = 0;
        set(&rounds.vars, &next)
    }

    /// Brings workers together at the end of a run: what is under way arrives, and all hold the same weights.
    ///
    /// # Errors
    /// A rank is missing.
    pub(super) fn finish(&mut self, word: Word) -> Result<(), TrainError> {
        if !self.is_together() {
            self.end_round(word)?;
        }
        match &mut self.rounds {
            None => Ok(()),
            Some(rounds) => {
                let last = rounds.outer.finish()?;
                set(&rounds.vars, &last)
            }
        }
    }

    /// What a checkpoint has to keep beside weights and moments; all ranks call it together, between two rounds.
    ///
    /// # Errors
    /// A rank is missing.
    pub(super) fn settle(&mut self) -> Result<BTreeMap<String, Tensor>, TrainError> {
        let Some(rounds) = &mut self.rounds else {
            return Ok(BTreeMap::new());
        };
        let OuterState {
            previous,
            momentum,
            moved: (sums, count),
            arrived,
            ..
        } = rounds.outer.settle()?.clone();
        let mut moved = sums;
        moved.push(count as f64);
        let moved = Tensor::new(moved, &Device::Cpu)?.to_dtype(DType::F32)?;
        let all = [
            ("previous", previous),
            ("momentum", Some(momentum)),
            ("moved", Some(moved)),
            ("arrived", arrived),
        ];
        Ok(all
            .into_iter()
            .filter_map(|(name, tensor)| Some((format!("{PREFIX}{name}"), tensor?)))
            .collect())
    }

    /// Times an average of all parameters, the second time that it is made.
    fn time_average(&mut self, like: &Tensor) -> Result<(), TrainError> {
        let Some(workers) = self.ranks.workers() else {
            return Ok(());
        };
        let mut seconds = 0.0;
        for _ in 0..2 {
            workers.barrier()?;
            let began = Instant::now();
            workers.all_reduce(like, Reduce::Sum)?;
            like.device().synchronize()?;
            seconds = began.elapsed().as_secs_f64();
        }
        let average_s = self.ranks.largest(seconds)?;
        if let Some(rounds) = &mut self.rounds {
            rounds.average_s = average_s;
        }
        Ok(())
    }

    /// Tells the others that this rank ends.
    pub(super) fn fail(ranks: &Ranks, error: &TrainError) {
        ranks.world().fail(&error.to_string());
    }
}

/// Refuses a model that several ranks are to have together, but its task does not split it, or its optimiser looks at whole matrices.
fn check_slices(ranks: &Ranks, optimiser: &Optimiser) -> Result<(), CommError> {
    let degree = ranks.tensor().size();
    let reason = match ranks.slices() {
        _ if degree == 1 => return Ok(()),
        None => "1: the model of this task does not split",
        Some(_) if optimiser.needs_whole_matrices() => "1 with optimiser.muon, which looks at whole matrices",
        Some(_) => return Ok(()),
    };
    Err(CommError::Launch {
        rank: ranks.world().own(),
        reason: format!("distributed.tensor: found {degree}, expected {reason}"),
    })
}

/// What comes out of [`Team::sum`].
pub(super) struct Summed {
    pub(super) gradients: Gradients,
    pub(super) scalars: Vec<(String, Tensor)>,
    /// The norm of all gradients, `[1]`, where not all of them are here.
    pub(super) norm: Option<Tensor>,
}

/// Sums of `tensors` and of the numbers `said` over all ranks, in one message; the tensors divided by the first number.
fn mean_of(
    step: &dyn Communicator,
    tensors: &[&Tensor],
    said: &[f64],
) -> Result<(Vec<Tensor>, Vec<f64>), TrainError> {
    let device = tensors
        .first()
        .map_or(Device::Cpu, |tensor| tensor.device().clone());
    let mut pieces = Vec::with_capacity(tensors.len() + 1);
    for tensor in tensors {
        pieces.push(tensor.to_dtype(DType::F32)?.flatten_all()?);
    }
    pieces.push(
        Tensor::new(said, &Device::Cpu)?
            .to_dtype(DType::F32)?
            .to_device(&device)?,
    );
    let sum = step.all_reduce(&Tensor::cat(&pieces, 0)?, Reduce::Sum)?;
    let count = sum.elem_count() - said.len();
    let numbers = sum.narrow(0, count, said.len())?;
    let mean = sum
        .narrow(0, 0, count)?
        .broadcast_div(&numbers.narrow(0, 0, 1)?)?;
    let mut at = 0;
    let mut means = Vec::with_capacity(tensors.len());
    for like in tensors {
        let piece = mean.narrow(0, at, like.elem_count())?.reshape(like.shape())?;
        means.push(piece.to_dtype(like.dtype())?.contiguous()?);
        at += like.elem_count();
    }
    let numbers = numbers.to_vec1::<f32>()?.into_iter().map(f64::from).collect();
    Ok((means, numbers))
}

/// The parameters one behind the other, f32.
fn flat(vars: &[Var]) -> candle_core::Result<Tensor> {
    let pieces: Vec<Tensor> = vars
        .iter()
        .map(|var| var.as_detached_tensor().to_dtype(DType::F32)?.flatten_all())
        .collect::<candle_core::Result<_>>()?;
    Tensor::cat(&pieces, 0)
}

/// Writes what [`flat`] has read.
fn set(vars: &[Var], flat: &Tensor) -> Result<(), TrainError> {
    let mut at = 0;
    for var in vars {
        let piece = flat.narrow(0, at, var.elem_count())?.reshape(var.shape())?;
        var.set(&piece.to_dtype(var.dtype())?.contiguous()?)?;
        at += var.elem_count();
    }
    Ok(())
}

/// The outer state that a checkpoint keeps, or a fresh one at `start`.
fn restored(start: &Tensor, kept: &BTreeMap<String, Tensor>) -> Result<OuterState, TrainError> {
    let mut state = OuterState::new(start)?;
    let find = |name: &str| -> candle_core::Result<Option<Tensor>> {
        let Some(tensor) = kept.get(&format!("{PREFIX}{name}")) else {
            return Ok(None);
        };
        if tensor.shape() != start.shape() {
            let (found, expected) = (tensor.dims(), start.dims());
            candle_core::bail!("{PREFIX}{name}: found shape {found:?}, expected {expected:?}");
        }
        tensor.to_device(start.device())?.copy().map(Some)
    };
    if let Some(momentum) = find("momentum")? {
        state.momentum = momentum;
    }
    (state.previous, state.arrived) = (find("previous")?, find("arrived")?);
    if let Some(moved) = kept.get(&format!("{PREFIX}moved")) {
        let mut moved: Vec<f64> = moved.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
        let count = moved.pop().unwrap_or_default();
        state.moved = (moved, count as u64);
    }
    Ok(state)
}

/// A digest of all parameters.
fn digest(vars: &BTreeMap<String, Var>) -> Result<String, TrainError> {
    use sha2::{Digest, Sha256};
    let mut sha = Sha256::new();
    for (name, var) in vars {
        sha.update(name.as_bytes());
        let values = var.as_detached_tensor().to_dtype(DType::F32)?.flatten_all()?;
        for value in values.to_vec1::<f32>()? {
            sha.update(value.to_le_bytes());
        }
    }
    Ok(sha.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
