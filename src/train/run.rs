//! The loop: batch, loss, gradients, update; and what happens between steps.
//!
//! A step asks the device for nothing, so that a GPU has work while the host prepares the next steps. What the host has to
//! know, above all whether gradients were finite, it reads every [`LOOK_EVERY`] steps, before it logs, and before anything
//! is done with the weights.

mod finish;
mod recorded;
mod shards;
mod team;
mod window;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use fulgur_kernels::adamw::Counts;
use fulgur_kernels::tape;
use fulgur_kernels::upload::Uploader;
use fulgur_lightnet::params::Frozen;
use fulgur_lightnet::params::file::write_atomically;

use super::checkpoint::{self, Checkpoint, Lock, Saver, State, portable};
use super::ema::Ema;
use super::error::{TrainError, one_line};
use super::heap;
use super::log::Log;
use super::optimiser::{Gradients, Optimiser};
use super::peak;
use super::prefetch::Prefetch;
use super::recipe::Recipe;
use super::task::{Batch, Cursor, Step, Task};
use crate::distributed::Ranks;
use recorded::{Found, Steps};
use team::{Summed, Team, Word};
use window::{Means, Window};

const LOSS: &str = "loss";
/// Steps after which the host asks the device how many of them were skipped.
const LOOK_EVERY: u64 = 16;

/// How a session of a run is started and ended.
#[derive(Clone, Default)]
pub struct Options {
    /// Go on from the newest checkpoint; without one the run starts anew.
    pub resume: bool,
    /// Start a run folder from the state that [`portable::export`] wrote into this one.
    pub import: Option<PathBuf>,
    /// Set from elsewhere to stop after the present step, with a checkpoint.
    pub interrupt: Arc<AtomicBool>,
    /// Stop this long after the start, with a checkpoint: for machines that are lent by the minute.
    pub pause_after: Option<Duration>,
    /// The rank that this is, where there are several. Only the one that leads writes to the run folder.
    pub ranks: Option<Arc<Ranks>>,
}

/// What a run tells its caller while it works.
#[derive(Clone, Debug)]
pub enum Report {
    /// One line about something unusual.
    Note(String),
    /// Sent after every log line.
    Progress {
        /// Steps done.
        step: u64,
        /// Part of the run that is done, 0 to 1.
        progress: f64,
        /// Mean loss since the last log line.
        loss: f64,
        /// Samples a second since the last log line.
        samples_per_s: f64,
        /// The share of the device's peak that this makes use of, where both are known.
        mfu: Option<f64>,
        /// Estimated seconds to the end of the run.
        remaining_s: f64,
    },
}

/// What came out of a session.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The folder of the run.
    pub run_dir: PathBuf,
    /// Steps done, over all sessions.
    pub step: u64,
    /// Mean loss of the last log interval.
    pub loss: Option<f64>,
    /// The lowest validation figure.
    pub best: Option<f64>,
    /// Samples a second of training, over this session.
    pub samples_per_s: f64,
    /// Whether the run reached its end, and the model is exported.
    pub finished: bool,
}

/// Trains `task` as `recipe` says.
///
/// # Errors
/// The run folder holds another run or is not writable, another run is at work in it, no checkpoint is usable, a
/// checkpoint cannot be written, the task fails, or gradients are not finite too often. Everything up to the last
/// checkpoint is kept, and where the task failed up to the last step.
pub fn run(
    task: &dyn Task,
    recipe: &Recipe,
    options: &Options,
    mut report: impl FnMut(Report),
) -> Result<Outcome, TrainError> {
    if task.params().device().is_cpu() {
        heap::keep();
    }
    for line in task.notes() {
        report(Report::Note(line));
    }
    let session = Session::open(task, recipe, options, &mut report);
    let mut session = session.inspect_err(|error| tell(options, error))?;
    let (seed, accumulate) = (recipe.seed, recipe.train.accumulate);
    let trained = std::thread::scope(|scope| {
        let first = session.state.step * accumulate;
        let mut batches = Prefetch::start(scope, recipe.train.threads, first, move |index| {
            task.batch(&Cursor { seed, index })
        });
        while !session.is_over() && !session.should_pause() {
            session.step(&mut batches, &mut report)?;
            session.between_steps(&mut report)?;
        }
        Ok::<_, TrainError>(())
    });
    match trained {
        Ok(()) => session.close().inspect_err(|error| tell(options, error)),
        Err(error) => {
            // The others wait for this rank: they come first.
            tell(options, &error);
            session.rescue(&error, &mut report);
            Err(error)
        }
    }
}

/// Tells the other ranks, where there are some, that this one ends by `error`.
fn tell(options: &Options, error: &TrainError) {
    if let Some(ranks) = &options.ranks {
        Team::fail(ranks, error);
    }
}

/// A run between two pauses.
struct Session<'a> {
    task: &'a dyn Task,
    recipe: &'a Recipe,
    options: &'a Options,
    optimiser: Optimiser,
    steps: Steps,
    ema: Option<Ema>,
    /// Only of the rank that leads.
    log: Option<Log>,
    team: Option<Team<'a>>,
    state: State,
    window: Window,
    uploader: Uploader,
    /// Operations of a sample, where the task knows.
    flops: Option<f64>,
    /// Operations a second of which the device is capable, where that is known.
    peak: Option<f64>,
    began: Began,
    saver: Saver,
    /// When the last checkpoint was begun.
    saved: Instant,
    /// Whether it was said that saving takes longer than the time between checkpoints.
    said_late: bool,
    /// Weights, moments and averages are those of `state`: not while an update is made.
    intact: bool,
    /// Held until the session is over, by the rank that leads.
    _lock: Option<Lock>,
}

/// The counts with which a session began.
struct Began {
    at: Instant,
    elapsed: f64,
    samples: u64,
    /// Seconds of this session spent on something else than training.
    aside: f64,
}

impl<'a> Session<'a> {
    fn open(
        task: &'a dyn Task,
        recipe: &'a Recipe,
        options: &'a Options,
        report: &mut impl FnMut(Report),
    ) -> Result<Self, TrainError> {
        let folder = &recipe.run_dir;
        let leads = options.ranks.as_ref().is_none_or(|ranks| ranks.leads());
        let lock = match leads {
            true => {
                fs::create_dir_all(folder).map_err(TrainError::io(folder))?;
                Some(Lock::take(folder)?)
            }
            false => None,
        };
        let root = folder.join("checkpoints");
        let note = |error: &TrainError| report(Report::Note(format!("passed over: {error}")));
        if !options.resume && !checkpoint::list(&root)?.is_empty() {
            let reason = "holds a run already; go on with --resume, or choose another run_dir".to_string();
            return Err(TrainError::Run {
                path: folder.clone(),
                reason,
            });
        }
        let found = match &options.import {
            Some(state) => Some(portable::import(state)?),
            None if options.resume => checkpoint::load_newest(&root, note)?,
            None => None,
        };
        let slices = options.ranks.as_ref().and_then(|ranks| ranks.slices());
        let found = match (found, slices) {
            (Some(found), Some(slices)) => Some(Checkpoint {
                weights: slices.own(&found.weights)?,
                optimiser: slices.own(&found.optimiser)?,
                ema: slices.own(&found.ema)?,
                ..found
            }),
            (found, _) => found,
        };
        // What was imported has yet to be written into this folder.
        let resumed = found.as_ref().filter(|_| options.import.is_none());
        let resumed = resumed.map(|found| found.state.step);
        if let (None, Some(start)) = (&found, &recipe.train.start) {
            let weights = Frozen::open(start, &Device::Cpu)?;
            match slices {
                Some(slices) => task.params().assign(start, &slices.own(weights.tensors())?)?,
                None => task.params().assign(start, weights.tensors())?,
            }
        }
        // Where ranks have parts of the weights, each follows the averages of its own.
        let shares = |ranks: &Arc<Ranks>| ranks.parameters().is_some() || ranks.slices().is_some();
        let follows = leads || options.ranks.as_ref().is_some_and(shares);
        let mut session = Self {
            task,
            recipe,
            options,
            optimiser: Optimiser::new(task.params(), recipe.optimiser.clone())?,
            steps: Steps::default(),
            ema: (follows && recipe.train.ema > 0.0)
                .then(|| Ema::new(task.params(), recipe.train.ema))
                .transpose()?,
            log: leads
                .then(|| Log::open(folder, found.as_ref().map_or(0, |found| found.state.step)))
                .transpose()?,
            team: None,
            state: State {
                seed: recipe.seed,
                recipe: recipe.resolved(),
                ..State::default()
            },
            window: Window::new(),
            uploader: Uploader::new(task.params().device()),
            flops: task.flops_per_sample(),
            peak: peak::of(task.params().device()),
            began: Began {
                at: Instant::now(),
                elapsed: 0.0,
                samples: 0,
                aside: 0.0,
            },
            saver: Saver::new(root.clone(), recipe.train.compact, recipe.train.keep, resumed),
            saved: Instant::now(),
            said_late: false,
            intact: true,
            _lock: lock,
        };
        if let Some(found) = &found {
            session.restore(found, options.import.as_ref().unwrap_or(&root))?;
            report(Report::Note(format!("goes on from step {}", found.state.step)));
        }
        if let Some(ranks) = &options.ranks {
            let kept = found.map(|found| found.optimiser).unwrap_or_default();
            let (vars, state) = (task.params().vars(), &session.state);
            let team = Team::new(ranks, &vars, &mut session.optimiser, state, &kept)?;
            if let Some(ema) = &mut session.ema {
                ema.keep(|index| team.averages(index));
            }
            session.team = Some(team);
            session.saved = Instant::now();
        }
        if options.import.is_some() {
            session.save()?;
        }
        if leads {
            let text = session.state.recipe.clone();
            write_atomically(&folder.join("recipe.toml"), |out| out.write_all(text.as_bytes()))?;
        }
        Ok(session)
    }

    /// Takes up `found`, which lay in `origin`.
    fn restore(&mut self, found: &Checkpoint, origin: &Path) -> Result<(), TrainError> {
        if found.state.seed != self.recipe.seed {
            let reason = format!(
                "its seed is {}, the recipe's {}",
                found.state.seed, self.recipe.seed
            );
            return Err(TrainError::Checkpoint {
                path: origin.to_path_buf(),
                reason,
            });
        }
        self.task.params().assign(origin, &found.weights)?;
        let misfit = |part: &'static str| {
            move |error: candle_core::Error| TrainError::Checkpoint {
                path: origin.to_path_buf(),
                reason: format!("{part}: {}", one_line(&error.to_string())),
            }
        };
        self.optimiser
            .restore(&found.optimiser, counts_of(&found.state, origin)?)
            .map_err(misfit("not the moments of this optimiser"))?;
        if let Some(ema) = &mut self.ema {
            // A run that kept no averages so far begins with its weights.
            let averages = if found.ema.is_empty() {
                &found.weights
            } else {
                &found.ema
            };
            ema.restore(averages)
                .map_err(misfit("not the averages of this model"))?;
        }
        self.window.restore(&found.optimiser, self.device())?;
        self.window.first_update = found.state.updates.saturating_sub(found.state.window_steps);
        // A changed recipe is taken up: longer runs and other rates are resumed on purpose.
        self.state = State {
            recipe: self.recipe.resolved(),
            ..found.state.clone()
        };
        self.began.elapsed = self.state.elapsed_s;
        self.began.samples = self.state.samples;
        Ok(())
    }

    fn device(&self) -> &'a Device {
        self.task.params().device()
    }

    /// Seconds of training so far.
    fn elapsed(&self) -> f64 {
        self.began.elapsed + self.began.at.elapsed().as_secs_f64() - self.began.aside
    }

    /// The part of the run that is done, by steps or by time, whichever is further.
    fn progress(&self) -> f64 {
        let train = &self.recipe.train;
        let part = |done: f64, all: f64| if all > 0.0 { done / all } else { 0.0 };
        let elapsed = match &self.team {
            Some(team) => team.word.elapsed,
            None => self.elapsed(),
        };
        part(self.state.step as f64, train.max_steps as f64).max(part(elapsed, train.max_seconds))
    }

    /// Whether this rank writes files and speaks to people.
    fn leads(&self) -> bool {
        self.team.as_ref().is_none_or(Team::leads)
    }

    /// What this rank says to the others, if it leads.
    fn word(&self) -> Word {
        Word {
            elapsed: self.elapsed(),
            stop: self.wants_to_pause(),
            save: self.saved.elapsed().as_secs_f64() >= self.recipe.train.checkpoint_seconds,
        }
    }

    fn is_over(&self) -> bool {
        self.progress() >= 1.0
    }

    fn should_pause(&self) -> bool {
        match &self.team {
            Some(team) => team.word.stop && team.is_together(),
            None => self.wants_to_pause(),
        }
    }

    fn wants_to_pause(&self) -> bool {
        let late = self
            .options
            .pause_after
            .is_some_and(|limit| self.began.at.elapsed() >= limit);
        late || self.options.interrupt.load(Ordering::SeqCst)
    }

    fn step(
        &mut self,
        batches: &mut Prefetch<Batch>,
        report: &mut impl FnMut(Report),
    ) -> Result<(), TrainError> {
        let number = self.state.step;
        let progress = self.progress();
        let accumulate = self.recipe.train.accumulate;
        let mut gradients: Option<Gradients> = None;
        let (mut samples, mut share) = (0, 0.0);
        let mut scalars: Vec<(String, Tensor)> = Vec::new();
        for part in 0..accumulate {
            let cursor = Cursor {
                seed: self.recipe.seed,
                index: number * accumulate + part,
            };
            let batch = batches
                .receive()
                .map_err(TrainError::task(format!("step {number}: batch")))?;
            let batch = batch.upload(&mut self.uploader)?;
            let step = Step {
                number,
                progress,
                cursor,
            };
            let mut steps = std::mem::take(&mut self.steps);
            let found = steps.take(self, &batch, &step);
            self.steps = steps;
            let found = found?;
            match &mut gradients {
                None => gradients = Some(found.gradients),
                Some(sum) => sum.add(found.gradients)?,
            }
            scalars.extend(found.scalars);
            samples += batch.samples as u64;
            share += batch.share / accumulate as f64;
        }
        let (word, mut norm) = (self.word(), None);
        if let Some(team) = &mut self.team
            && let Some(own) = gradients.take()
        {
            let summed: Summed = team.sum(own, scalars, share, word)?;
            (scalars, norm) = (summed.scalars, summed.norm);
            gradients = Some(summed.gradients);
        }
        // Every rank has had as many.
        samples *= self.team.as_ref().map_or(1, Team::size);
        self.state.step += 1;
        self.state.samples += samples;
        self.window.samples += samples;
        let Some(gradients) = gradients else { return Ok(()) };
        let lr = self.recipe.optimiser.lr * self.recipe.schedule.factor(number, progress);
        self.intact = false;
        let clip = self.optimiser.update_of_norm(&gradients, norm.as_ref(), lr)?;
        if let Some(team) = &self.team {
            team.share_weights()?;
        }
        if let Some(ema) = &mut self.ema {
            ema.update(&clip)?;
        }
        self.window.add(scalars, &clip)?;
        self.window.lr = lr;
        if let Some(team) = &mut self.team {
            team.after_step(word, report)?;
        }
        self.intact = true;
        Ok(())
    }

    /// Loss and gradients of a batch that lies on the device, as the task launches them.
    fn found(&self, batch: &Batch, step: &Step) -> Result<Found, TrainError> {
        let accumulate = self.recipe.train.accumulate as f64;
        let (losses, tape) = tape::record(|| self.task.loss(batch, step));
        let losses = losses.map_err(TrainError::task(format!("step {}: loss", step.number)))?;
        let mut total = (losses.total.to_dtype(DType::F32)?.reshape(())? / accumulate)?;
        let mut accumulate = accumulate;
        if self.team.is_some() {
            // A tensor, because a share of zero must not cut the graph: every rank has to join in the backward pass.
            total = (&total * Tensor::new(batch.share as f32, total.device())?)?;
            accumulate /= batch.share.max(f64::MIN_POSITIVE);
        }
        let gradients = self.optimiser.gradients(tape.backward(&total)?);
        let mut scalars = vec![(LOSS.to_string(), total.detach())];
        for (name, value) in losses.parts {
            let value = value.detach().to_dtype(DType::F32)?.reshape(())?;
            scalars.push((name.to_string(), (value / accumulate)?));
        }
        Ok(Found { gradients, scalars })
    }

    /// Waits for the device, and learns how many steps were skipped because gradients were not finite. Weights, moments
    /// and averages stayed as they were in those.
    fn look(&mut self) -> Result<(), TrainError> {
        let Counts {
            made,
            skipped,
            in_a_row,
            longest_row,
        } = self.optimiser.counts()?;
        self.state.updates = made.into();
        self.state.skipped = skipped.into();
        self.state.skipped_in_a_row = in_a_row.into();
        self.state.window_steps = self.state.updates - self.window.first_update;
        let skips = u64::from(longest_row);
        if skips > self.recipe.train.max_skips {
            self.saver.wait()?;
            let kept = self.saver.newest().unwrap_or(0);
            return Err(TrainError::Diverged {
                step: self.state.step,
                skips,
                kept,
            });
        }
        Ok(())
    }

    fn between_steps(&mut self, report: &mut impl FnMut(Report)) -> Result<(), TrainError> {
        self.saver.poll()?;
        let train = &self.recipe.train;
        let step = self.state.step;
        let due = |every: u64| every > 0 && step.is_multiple_of(every);
        if due(train.log_every) {
            self.write_log(report)?;
        } else if due(LOOK_EVERY) {
            self.look()?;
        }
        let listed = train.validate_at.contains(&step);
        if (due(train.validate_every) || listed) && !self.is_over() {
            self.validate()?;
        }
        if due(train.sample_every) && !self.is_over() {
            self.sample()?;
        }
        let due = match &self.team {
            Some(team) if team.saves_together() => team.word.save && team.is_together(),
            _ => self.saved.elapsed().as_secs_f64() >= train.checkpoint_seconds,
        };
        if due {
            self.save_when_free(report)?;
        }
        Ok(())
    }

    fn write_log(&mut self, report: &mut impl FnMut(Report)) -> Result<(), TrainError> {
        self.look()?;
        let (step, progress) = (self.state.step, self.progress().min(1.0));
        let Means { mut values, norm } = self.window.finish(self.state.window_steps)?;
        // The loss first: it is what people look for.
        values.sort_by_key(|(name, _)| name != LOSS);
        let loss = values.first().map(|(_, loss)| *loss);
        let rate = self.window.samples as f64 / self.window.since.elapsed().as_secs_f64().max(1e-9);
        values.push(("lr".into(), self.window.lr));
        values.push(("grad_norm".into(), norm));
        values.push((format!("{}_per_s", self.task.unit()), rate));
        // Ranks may share a device or have one each.
        let flops = self.flops.filter(|_| self.team.is_none());
        let mfu = peak::used(flops, self.peak, rate);
        values.extend(mfu.map(|mfu| ("mfu".into(), mfu)));
        if self.state.skipped > 0 {
            values.push(("skipped".into(), self.state.skipped as f64));
        }
        let elapsed = self.elapsed();
        if let Some(log) = &mut self.log {
            log.scalars(step, elapsed, &values)?;
        }
        self.state.loss = loss.or(self.state.loss);
        self.state.window_steps = 0;
        self.window.first_update = self.state.updates;
        (self.window.since, self.window.samples) = (Instant::now(), 0);
        if let Some(loss) = loss {
            let remaining_s = elapsed / progress.max(1e-9) * (1.0 - progress);
            report(Report::Progress {
                step,
                progress,
                loss,
                samples_per_s: rate,
                mfu,
                remaining_s,
            });
        }
        Ok(())
    }
}

/// The counts of a checkpoint that lay in `origin`, as the device keeps them.
fn counts_of(state: &State, origin: &Path) -> Result<Counts, TrainError> {
    let narrow = |name: &str, count: u64| {
        u32::try_from(count).map_err(|_| TrainError::Checkpoint {
            path: origin.to_path_buf(),
            reason: format!("{name} is {count}, expected at most {}", u32::MAX),
        })
    };
    let in_a_row = narrow("skipped_in_a_row", state.skipped_in_a_row)?;
    Ok(Counts {
        made: narrow("updates", state.updates)?,
        skipped: narrow("skipped", state.skipped)?,
        in_a_row,
        longest_row: in_a_row,
    })
}
