//! Trains the runs of a study, keeps their results by name, and goes on where it was stopped.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use super::account::Account;
use super::curve::{self, Logged};
use super::plan::{Planned, Settings};
use super::study::{Size, Study};
use crate::sweep::{Place, Results, Told, cell, markdown, read_json, write_json, write_tables};
use crate::train::checkpoint::Lock;
use crate::train::{Recipe, Report, TrainError};

/// Where runs are trained, below the folder of the study.
const RUNS: &str = "runs";
/// Parts of a study that progress counts.
const PARTS: u64 = 10_000;

/// What came out of a run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Row {
    /// Name of its files.
    pub name: String,
    /// The architecture's name.
    pub architecture: String,
    /// Its size.
    pub size: Size,
    /// Seed of weights and data.
    pub seed: u64,
    /// What the model counts.
    pub account: Account,
    /// Steps done.
    pub steps: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Passes over the tokens.
    pub epochs: f64,
    /// Floating-point operations of training, by section 4.1.
    pub flops: f64,
    /// The learning rate.
    pub lr: f64,
    /// What was tried to find it.
    pub trials: Vec<Trial>,
    /// Whether the best of several rates was the lowest or the highest, so that a better one may lie outside.
    pub edge: bool,
    /// Held-out loss at the end, nats a token.
    pub loss: Option<f64>,
    /// Median of tokens a second.
    pub tokens_per_s: Option<f64>,
    /// Seconds of training, without trials and validations.
    pub seconds: f64,
    /// Why there is no loss.
    pub stopped: Option<String>,
}

/// A learning rate on a part of the budget.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Trial {
    /// The rate.
    pub lr: f64,
    /// Held-out loss at the end; none where gradients were not finite.
    pub loss: Option<f64>,
}

/// A row with what it was made by, as it is kept.
#[derive(Deserialize, Serialize)]
struct Kept {
    /// The study without its other runs, in TOML.
    study: String,
    /// Tokens that there were to train on: a file may change.
    corpus: u64,
    row: Row,
}

/// A run that ended by an error; the next start tries it again.
#[derive(Clone, Debug, Serialize)]
pub struct Failed {
    /// Its name.
    pub name: String,
    /// The error.
    pub reason: String,
}

/// The whole table.
#[derive(Clone, Debug, Serialize)]
pub struct Sweep {
    /// One row a run that is done, in the order of the study.
    pub runs: Vec<Row>,
    /// Runs that other processes are at work on.
    pub elsewhere: Vec<String>,
    /// Runs that ended by an error.
    pub failed: Vec<Failed>,
    /// Whether all that was asked for is done.
    pub finished: bool,
}

/// What a run tells: a line, or how much of it is done.
enum Heard {
    Note(String),
    Part(f64, String),
}

/// How a run ended.
enum Ended {
    Done(Box<Row>),
    /// It was interrupted.
    Paused,
}

/// Trains those of the study's runs that `chosen` picks, in order, and writes `table.md` and `table.json` of all results there
/// are after each. Runs that are done are passed over, those that another process is at work on too, and those that were
/// interrupted go on. A run that fails does not keep others from theirs.
///
/// # Errors
/// Results of another study lie in the folder, or it cannot be written.
pub fn sweep(
    study: &Study,
    chosen: impl Fn(&Planned) -> bool,
    place: &Place<'_>,
    tell: &mut dyn FnMut(Told),
) -> anyhow::Result<Sweep> {
    let all = study.runs()?;
    let corpus = study.corpus()?;
    // Results of another study should be heard of before the first run.
    for run in &all {
        kept_of(study, run, corpus, place.out)?;
    }
    let own: Vec<&Planned> = all.iter().filter(|run| chosen(run)).collect();
    let total: f64 = own.iter().map(|run| run.amount(study)).sum();
    let mut table = Sweep {
        runs: Vec::new(),
        elsewhere: Vec::new(),
        failed: Vec::new(),
        finished: false,
    };
    let (mut before, mut paused) = (0.0, false);
    for run in &own {
        let folder = place.out.join(RUNS).join(&run.name);
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let lock = match Lock::take(&folder) {
            Ok(lock) => Some(lock),
            Err(TrainError::Run { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        // Whether it is done is only known for sure under the lock.
        if kept_of(study, run, corpus, place.out)?.is_some() {
            tell(Told::Note(format!("{}: there already", run.name)));
        } else if lock.is_none() {
            tell(Told::Note(format!(
                "{}: another process is at work on it",
                run.name
            )));
            table.elsewhere.push(run.name.clone());
        } else {
            let ended = one(study, run, &folder, place, |told| {
                tell(match told {
                    Heard::Note(line) => Told::Note(line),
                    Heard::Part(done, label) => {
                        let part = (before + done) / total;
                        Told::Progress((part * PARTS as f64) as u64, PARTS, label)
                    }
                });
            });
            match ended {
                Ok(Ended::Done(row)) => keep(study, run, corpus, *row, place.out)?,
                Ok(Ended::Paused) => paused = true,
                Err(_) if place.interrupt.load(Ordering::SeqCst) => paused = true,
                Err(error) => {
                    let reason = one_line(&error);
                    tell(Told::Note(format!("{}: {reason}", run.name)));
                    table.failed.push(Failed {
                        name: run.name.clone(),
                        reason,
                    });
                }
            }
        }
        before += run.amount(study);
        if paused || place.interrupt.load(Ordering::SeqCst) {
            break;
        }
        write(study, &all, corpus, &mut table, place.out)?;
    }
    write(study, &all, corpus, &mut table, place.out)?;
    let done = |name: &String| table.runs.iter().any(|row| row.name == *name);
    table.elsewhere.retain(|name| !done(name));
    table.finished = own.iter().all(|run| done(&run.name));
    Ok(table)
}

/// An error and its causes in one line.
fn one_line(error: &anyhow::Error) -> String {
    let words: Vec<String> = error.chain().map(ToString::to_string).collect();
    words.join(": ").lines().next().unwrap_or_default().to_owned()
}

/// A run: trials of rates where there are several, then the whole of it with the best. Progress is told in its steps, or seconds.
fn one(
    study: &Study,
    run: &Planned,
    folder: &Path,
    place: &Place<'_>,
    mut tell: impl FnMut(Heard),
) -> anyhow::Result<Ended> {
    let rates = run.rates(study);
    let mut trials = Vec::new();
    let (mut lr, mut edge, mut before) = (rates.first().copied().unwrap_or(run.size.lr), false, 0.0);
    if rates.len() > 1 {
        for (index, &rate) in rates.iter().enumerate() {
            let dir = folder.join(format!("trial-{index}"));
            let recipe = study.recipe(&Settings::from(run), rate, run.trial, &[], &dir)?;
            let trained = train_one(&recipe, place, |part, loss| {
                let label = format!("{} at {rate}, loss {loss:.3}", run.name);
                tell(Heard::Part(before + part * run.trial.amount(), label));
            })?;
            let loss = match trained {
                Trained::Paused => return Ok(Ended::Paused),
                Trained::Finished(step) => final_loss(&recipe, step)?,
                Trained::Diverged(_) => None,
            };
            trials.push(Trial { lr: rate, loss });
            before += run.trial.amount();
        }
        let best = trials
            .iter()
            .filter_map(|trial| Some((trial.lr, trial.loss?)))
            .min_by(|a, b| a.1.total_cmp(&b.1));
        let Some((best, loss)) = best else {
            let reason = "every learning rate diverged".to_owned();
            return Ok(Ended::Done(Box::new(row(run, trials, Err(reason)))));
        };
        let lowest = rates.iter().copied().fold(f64::INFINITY, f64::min);
        let highest = rates.iter().copied().fold(0.0, f64::max);
        edge = best == lowest || best == highest;
        lr = best;
        let word = if edge { ", an end of the grid" } else { "" };
        tell(Heard::Note(format!(
            "{}: learning rate {lr}, trial's loss {loss:.4}{word}",
            run.name
        )));
    }
    let recipe = study.recipe(
        &Settings::from(run),
        lr,
        run.length,
        &run.validate_at,
        &folder.join("full"),
    )?;
    let trained = train_one(&recipe, place, |part, loss| {
        let label = format!("{}, loss {loss:.3}", run.name);
        tell(Heard::Part(before + part * run.length.amount(), label));
    })?;
    let ended = match trained {
        Trained::Paused => return Ok(Ended::Paused),
        Trained::Diverged(reason) => Err(reason),
        Trained::Finished(step) => {
            let tokens = (study.batch * study.context) as u64;
            let log = recipe.run_dir.join("metrics.jsonl");
            Ok((step, curve::logged(&log, tokens, run.account.flops)?))
        }
    };
    if let Ok((_, logged)) = &ended {
        // The result comes last: it says that the curve is whole.
        curve::write(&place.out.join(format!("{}.jsonl", run.name)), &logged.points)?;
    }
    let mut row = row(run, trials, ended);
    (row.lr, row.edge) = (lr, edge);
    tell(Heard::Note(match (&row.stopped, row.loss) {
        (Some(reason), _) => format!("{}: {reason}", row.name),
        (None, loss) => format!(
            "{}: loss {:.4}, {:.0} tokens/s",
            row.name,
            loss.unwrap_or(f64::NAN),
            row.tokens_per_s.unwrap_or(0.0)
        ),
    }));
    Ok(Ended::Done(Box::new(row)))
}

/// The result of a run that ended after so many steps with this log, or gave up.
fn row(run: &Planned, trials: Vec<Trial>, ended: Result<(u64, Logged), String>) -> Row {
    let (steps, logged, stopped) = match ended {
        Ok((steps, logged)) => (steps, logged, None),
        Err(reason) => (0, Logged::default(), Some(reason)),
    };
    let last = logged.points.last();
    let loss = last.filter(|point| point.step == steps).map(|point| point.loss);
    let tokens = last.map_or(0, |point| point.tokens);
    Row {
        name: run.name.clone(),
        architecture: run.architecture.clone(),
        size: run.size.clone(),
        seed: run.seed,
        account: run.account,
        steps,
        tokens,
        epochs: tokens as f64 / run.corpus as f64,
        flops: last.map_or(0.0, |point| point.flops),
        lr: run.size.lr,
        trials,
        edge: false,
        loss,
        tokens_per_s: logged.tokens_per_s,
        seconds: logged.seconds,
        stopped: stopped.or_else(|| loss.is_none().then(|| "the last loss is not finite".to_owned())),
    }
}

/// How the training of a recipe ended.
enum Trained {
    /// After so many steps.
    Finished(u64),
    Paused,
    /// Gradients were not finite.
    Diverged(String),
}

fn train_one(recipe: &Recipe, place: &Place<'_>, mut tell: impl FnMut(f64, f64)) -> anyhow::Result<Trained> {
    let trained = place.train(recipe, |report| {
        if let Report::Progress { progress, loss, .. } = report {
            tell(progress, loss);
        }
    });
    match trained {
        Ok((_, outcome)) if outcome.finished => Ok(Trained::Finished(outcome.step)),
        Ok(_) => Ok(Trained::Paused),
        Err(error @ TrainError::Diverged { .. }) => Ok(Trained::Diverged(error.to_string())),
        Err(error) => Err(error.into()),
    }
}

/// The held-out loss of a run that is finished after so many steps.
fn final_loss(recipe: &Recipe, steps: u64) -> anyhow::Result<Option<f64>> {
    let Logged { points, .. } = curve::logged(&recipe.run_dir.join("metrics.jsonl"), 1, 1.0)?;
    let last = points.last();
    Ok(last.filter(|point| point.step == steps).map(|point| point.loss))
}

fn result_path(out: &Path, name: &str) -> PathBuf {
    out.join(format!("{name}.json"))
}

/// Writes the result of a run, and removes what is of no use any more: trials and checkpoints. The model stays.
fn keep(study: &Study, run: &Planned, corpus: u64, row: Row, out: &Path) -> anyhow::Result<()> {
    let kept = Kept {
        study: toml::to_string(&study.of_run(run))?,
        corpus,
        row,
    };
    write_json(&result_path(out, &run.name), &kept)?;
    let folder = out.join(RUNS).join(&run.name);
    for index in 0..study.rates.len() {
        remove(&folder.join(format!("trial-{index}")))?;
    }
    remove(&folder.join("full").join("checkpoints"))
}

fn remove(dir: &Path) -> anyhow::Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    Ok(())
}

/// The result of this run, if it is there.
fn kept_of(study: &Study, run: &Planned, corpus: u64, out: &Path) -> anyhow::Result<Option<Row>> {
    let expected = toml::to_string(&study.of_run(run))?;
    kept(&result_path(out, &run.name), Some((&expected, corpus)))
}

/// The result that lies there, if any; of the study that is given.
pub(super) fn kept(path: &Path, expected: Option<(&str, u64)>) -> anyhow::Result<Option<Row>> {
    let Some(kept) = read_json::<Kept>(path)? else {
        return Ok(None);
    };
    if expected.is_some_and(|(study, corpus)| kept.study != study || kept.corpus != corpus) {
        bail!(
            "{}: made by another study or of other tokens than these; give those, or another --out",
            path.display()
        );
    }
    Ok(Some(kept.row))
}

/// Writes the table of all results that there are.
fn write(study: &Study, all: &[Planned], corpus: u64, table: &mut Sweep, out: &Path) -> anyhow::Result<()> {
    table.runs.clear();
    for run in all {
        table.runs.extend(kept_of(study, run, corpus, out)?);
    }
    write_tables(out, &table.runs, &table.table())
}

impl Results for Sweep {
    fn finished(&self) -> bool {
        self.finished
    }

    fn table(&self) -> String {
        let columns = [
            "run",
            "weights of layers",
            "parameters",
            "tokens",
            "FLOP",
            "learning rate",
            "held-out loss",
            "tokens/s",
            "seconds",
        ];
        let cells = |row: &Row| {
            let loss = match row.loss {
                Some(loss) => format!("{loss:.4}"),
                None => cell(row.stopped.clone(), |reason| reason),
            };
            let edge = if row.edge { " (end of the grid)" } else { "" };
            vec![
                row.name.clone(),
                row.account.weights.to_string(),
                row.account.parameters.to_string(),
                row.tokens.to_string(),
                format!("{:.3e}", row.flops),
                format!("{}{edge}", row.lr),
                loss,
                format!("{:.0}", row.tokens_per_s.unwrap_or(0.0)),
                format!("{:.1}", row.seconds),
            ]
        };
        markdown(&columns, self.runs.iter().map(cells))
    }

    fn left(&self) -> Vec<String> {
        let failed = self.failed.iter();
        let mut lines: Vec<String> = failed
            .map(|failed| format!("{}: {}", failed.name, failed.reason))
            .collect();
        if !self.finished {
            lines.push("not all runs are done; the same command goes on".to_owned());
        }
        lines
    }
}
