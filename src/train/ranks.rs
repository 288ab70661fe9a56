//! A run of several ranks: as threads of this process, or as one of several processes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::error::TrainError;
use super::recipe::Recipe;
use super::run::{Options, Outcome, Report, run};
use super::task::Task;
use crate::distributed::threads::{Settings, world};
use crate::distributed::{Communicator, Ranks};

/// Trains with `size` ranks as threads. `task` is that of the rank that leads, on the calling thread; `build` makes those of the
/// others, on devices or streams of their own.
///
/// # Errors
/// As [`run`]: those of the rank that failed first. The others end by it.
pub fn run_threads(
    size: usize,
    settings: Settings,
    mut task: Box<dyn Task>,
    build: impl Fn(usize) -> Result<Box<dyn Task>, TrainError> + Sync,
    recipe: &Recipe,
    options: &Options,
    report: impl FnMut(Report),
) -> Result<Outcome, TrainError> {
    let mut ranks = world(size, settings).into_iter();
    let errors: Mutex<BTreeMap<usize, TrainError>> = Mutex::new(BTreeMap::new());
    let keep = |number: usize, error: TrainError| {
        let mut errors = errors.lock().unwrap_or_else(PoisonError::into_inner);
        errors.insert(number, error);
    };
    let Some(leader) = ranks.next() else {
        return run(&*task, recipe, options, report);
    };
    let meeting = leader.clone();
    let outcome = std::thread::scope(|scope| {
        for (number, comm) in ranks.enumerate() {
            let (build, keep) = (&build, &keep);
            let work = move || {
                let built = build(number + 1).inspect_err(|error| comm.fail(&error.to_string()));
                let trained = built.and_then(|mut task| run_rank(&mut task, comm, recipe, options, |_| ()));
                if let Err(error) = trained {
                    keep(number + 1, error);
                }
            };
            std::thread::Builder::new()
                .name(format!("rank {}", number + 1))
                .spawn_scoped(scope, work)
                .map_err(TrainError::io(&recipe.run_dir))?;
        }
        let outcome = run_rank(&mut task, leader, recipe, options, report);
        Ok::<_, TrainError>(outcome.map_err(|error| keep(0, error)))
    });
    let mut errors = errors.into_inner().unwrap_or_else(PoisonError::into_inner);
    // The others only say that it has ended.
    let first = meeting.first_to_fail().and_then(|number| errors.remove(&number));
    match (
        outcome?,
        first.or_else(|| errors.pop_first().map(|(_, error)| error)),
    ) {
        (Ok(outcome), None) => Ok(outcome),
        (_, Some(error)) => Err(error),
        (Err(()), None) => Err(TrainError::Run {
            path: recipe.run_dir.clone(),
            reason: "a rank ended without a word".to_owned(),
        }),
    }
}

/// Trains as the rank of `comm`.
///
/// # Errors
/// As [`run`], and a task or options that are not for so many ranks. The other ranks are told.
pub fn run_rank(
    task: &mut Box<dyn Task>,
    comm: Arc<dyn Communicator>,
    recipe: &Recipe,
    options: &Options,
    report: impl FnMut(Report),
) -> Result<Outcome, TrainError> {
    let refused = |error: TrainError| {
        comm.fail(&error.to_string());
        error
    };
    let ranks =
        Ranks::new(comm.clone(), recipe.distributed.clone()).map_err(|error| refused(error.into()))?;
    let doing = format!("{}: task {}", recipe.origin, recipe.task);
    task.distribute(&ranks)
        .map_err(|error| refused(TrainError::task(doing)(error)))?;
    let options = Options {
        ranks: Some(Arc::new(ranks)),
        ..options.clone()
    };
    run(&**task, recipe, &options, report)
}
