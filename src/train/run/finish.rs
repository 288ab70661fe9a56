//! What is done with the weights between steps and at the end: figures, samples, checkpoints, the finished model.

use std::collections::BTreeMap;
use std::fs;
use std::time::Instant;

use candle_core::Tensor;
use fulgur_lightnet::params::Precision;

use super::shards::Kind;
use super::{Ema, Outcome, Report, Session, Team, TrainError};

impl Session<'_> {
    /// Runs `work` with the averaged weights; its time does not count as training.
    fn with_averages<T>(
        &mut self,
        work: impl FnOnce(&Self) -> Result<T, TrainError>,
    ) -> Result<T, TrainError> {
        self.look()?;
        let began = Instant::now();
        let result = match &self.ema {
            Some(ema) => ema.during(|| work(self))?,
            None => work(self),
        };
        self.set_aside(began);
        result
    }

    fn set_aside(&mut self, began: Instant) {
        let spent = began.elapsed();
        self.began.aside += spent.as_secs_f64();
        self.window.since += spent;
    }

    /// Whether work with the model is the work of all ranks.
    fn has_parts(&self) -> bool {
        self.team.as_ref().is_some_and(Team::has_parts)
    }

    /// The weights that are judged and exported, averaged where the run averages them, where this rank has no more than a part
    /// of them: on the rank that leads; all ranks call it together.
    fn whole_weights(&self) -> Result<Option<BTreeMap<String, Tensor>>, TrainError> {
        let Some(team) = self.team.as_ref().filter(|team| team.has_parts()) else {
            return Ok(None);
        };
        let own = match &self.ema {
            Some(ema) => ema.tensors(),
            None => self.task.params().values(),
        };
        team.whole(Kind::Weights, own).map(Some)
    }

    pub(super) fn validate(&mut self) -> Result<(), TrainError> {
        if !self.leads() && !self.has_parts() {
            return Ok(());
        }
        let doing = format!("step {}: validation", self.state.step);
        let mut figures =
            self.with_averages(|session| session.task.validate().map_err(TrainError::task(doing)))?;
        let Some(&(_, first)) = figures.first() else {
            return Ok(());
        };
        let whole = match self.recipe.train.keep_best {
            true => self.whole_weights()?,
            false => None,
        };
        if !self.leads() {
            return Ok(());
        }
        for (name, _) in &mut figures {
            name.insert_str(0, "validation/");
        }
        let (step, elapsed) = (self.state.step, self.elapsed());
        if let Some(log) = &mut self.log {
            log.scalars(step, elapsed, &figures)?;
        }
        if first.is_finite() && self.state.best.is_none_or(|best| first < best) {
            self.state.best = Some(first);
            if !self.recipe.train.keep_best {
                return Ok(());
            }
            let path = self.recipe.run_dir.join("best.safetensors");
            let metadata = BTreeMap::from([
                ("step".to_string(), self.state.step.to_string()),
                (figures[0].0.clone(), first.to_string()),
            ]);
            let params = self.task.params();
            let save = || Ok(params.save(&path, &metadata, Precision::F32)?);
            match whole {
                Some(whole) => params.with_values(whole, save),
                None => self.with_averages(|_| save()),
            }?;
        }
        Ok(())
    }

    pub(super) fn sample(&mut self) -> Result<(), TrainError> {
        // A rank that has a part of the weights cannot show anything alone.
        if !self.leads() || self.has_parts() {
            return Ok(());
        }
        let step = self.state.step;
        let folder = self
            .recipe
            .run_dir
            .join("samples")
            .join(format!("step-{step:010}"));
        fs::create_dir_all(&folder).map_err(TrainError::io(&folder))?;
        let doing = format!("step {step}: samples");
        let files = self.with_averages(|session| {
            session
                .task
                .sample(&folder, step)
                .map_err(TrainError::task(doing))
        })?;
        if files.is_empty() {
            // A task without samples leaves no empty folders.
            let _ = fs::remove_dir(&folder);
        }
        match &mut self.log {
            Some(log) => log.pictures(step, &files),
            None => Ok(()),
        }
    }

    /// Begins a checkpoint, unless the last one is still being written: then it waits for its turn, and training does not
    /// wait for it.
    pub(super) fn save_when_free(&mut self, report: &mut impl FnMut(Report)) -> Result<(), TrainError> {
        let Some(before) = self.saver.at_work() else {
            return self.save();
        };
        if self.team.as_ref().is_some_and(|team| team.saves_together()) {
            // The other ranks have stopped for it.
            return self.save();
        }
        if !self.said_late {
            self.said_late = true;
            let (step, seconds) = (self.state.step, self.recipe.train.checkpoint_seconds);
            report(Report::Note(format!(
                "step {step}: the checkpoint that is due waits for that of step {before}, which is still being written; \
                 saving takes longer than train.checkpoint_seconds = {seconds}"
            )));
        }
        Ok(())
    }

    /// Begins a checkpoint of the present step, on the rank that leads; where workers take steps of their own, all ranks come
    /// together for it.
    pub(super) fn save(&mut self) -> Result<(), TrainError> {
        let mut moments = BTreeMap::new();
        let mut outer = BTreeMap::new();
        let mut weights = self.task.params().values();
        let mut ema = self.ema.as_ref().map(Ema::tensors).unwrap_or_default();
        if let Some(team) = self.team.as_mut().filter(|team| team.saves_together()) {
            moments = team.whole(Kind::Moments, self.optimiser.moments())?;
            weights = team.whole(Kind::Weights, weights)?;
            if self.recipe.train.ema > 0.0 && team.has_parts() {
                ema = team.whole(Kind::Weights, ema)?;
            }
            outer = team.settle()?;
        }
        if !self.leads() {
            self.saved = Instant::now();
            return Ok(());
        }
        // Steps that are still under way are training, not saving.
        self.look()?;
        let began = Instant::now();
        self.saver.wait()?;
        if self.saver.newest() == Some(self.state.step) {
            return Ok(());
        }
        let mut checkpoint = self.saver.buffers()?;
        self.state.elapsed_s = self.elapsed();
        let mut optimiser = match moments.is_empty() {
            true => self.optimiser.moments(),
            false => moments,
        };
        optimiser.extend(self.window.tensors());
        optimiser.extend(outer);
        checkpoint.copy(self.state.clone(), &weights, &optimiser, &ema)?;
        self.saver.start(checkpoint)?;
        self.set_aside(began);
        self.saved = Instant::now();
        Ok(())
    }

    /// Keeps the steps since the last checkpoint of a run that ends by `error`, where that leaves them usable.
    pub(super) fn rescue(&mut self, error: &TrainError, report: &mut impl FnMut(Report)) {
        // Without the other ranks there is no outer state to keep.
        let alone = self.team.as_ref().is_none_or(|team| !team.saves_together());
        let worth = self.intact
            && self.state.step > 0
            && alone
            && self.leads()
            && matches!(
                error,
                TrainError::Task { .. } | TrainError::Candle(_) | TrainError::Ranks(_)
            );
        let saved = if worth {
            self.save().and_then(|()| self.saver.wait())
        } else {
            self.saver.wait()
        };
        if let Err(error) = saved {
            report(Report::Note(format!(
                "the steps since the last checkpoint are lost: {error}"
            )));
        }
    }

    /// Writes the finished model under another name first, so that `model` is always whole.
    fn export(&mut self) -> Result<(), TrainError> {
        let whole = self.whole_weights()?;
        if !self.leads() {
            return Ok(());
        }
        let at = |name: &str| self.recipe.run_dir.join(name);
        let (target, fresh, old) = (at("model"), at("model.tmp"), at("model.old"));
        for leftover in [&fresh, &old] {
            if leftover.exists() {
                fs::remove_dir_all(leftover).map_err(TrainError::io(leftover))?;
            }
        }
        fs::create_dir(&fresh).map_err(TrainError::io(&fresh))?;
        let task = self.task;
        let export = || task.export(&fresh).map_err(TrainError::task("export"));
        match whole {
            Some(whole) => task.params().with_values(whole, export),
            None => self.with_averages(|_| export()),
        }?;
        if target.exists() {
            fs::rename(&target, &old).map_err(TrainError::io(&target))?;
        }
        fs::rename(&fresh, &target).map_err(TrainError::io(&target))?;
        if old.exists() {
            fs::remove_dir_all(&old).map_err(TrainError::io(&old))?;
        }
        Ok(())
    }

    /// The last checkpoint, and at the end of the run its result.
    pub(super) fn close(mut self) -> Result<Outcome, TrainError> {
        let finished = self.is_over();
        self.look()?;
        let trained = self.elapsed() - self.began.elapsed;
        let word = self.word();
        if let (true, Some(team)) = (finished, &mut self.team) {
            team.finish(word)?;
        }
        self.save()?;
        self.saver.wait()?;
        if finished {
            self.validate()?;
            self.sample()?;
            self.export()?;
        }
        Ok(Outcome {
            run_dir: self.recipe.run_dir.clone(),
            step: self.state.step,
            loss: self.state.loss,
            best: self.state.best,
            samples_per_s: (self.state.samples - self.began.samples) as f64 / trained.max(1e-9),
            finished,
        })
    }
}
