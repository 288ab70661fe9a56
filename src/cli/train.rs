//! `fulgur train`: trains what a recipe describes.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use candle_core::Device;
use serde::Serialize;

use super::answer::{Answer, Report as _, Status};
use super::context::Context;
use super::progress::Unit;
use crate::distributed::threads::Settings;
use crate::distributed::{CommError, Communicator, Distributed, Network, Place, tcp};
use crate::train::checkpoint::portable;
use crate::train::{self, Options, Outcome, Recipe, Report, TrainError, tasks};

/// Train a model as a recipe describes
///
/// The run folder gets checkpoints, metrics.jsonl, TensorBoard files and samples, and at the end the finished model.
/// Ctrl-C stops after the present step with a checkpoint; --resume goes on from the newest one. The exit code is 1 where
/// the run has not reached its end yet.
///
/// Where the recipe has several ranks, they are threads of this program; processes that a launcher has started (fulgur launch,
/// mpirun, Slurm, or anything that sets RANK and WORLD_SIZE) are one rank each.
///
/// --export-state trains nothing: it writes the newest checkpoint of the run as files of a limited size, from which
/// --import-state starts a run elsewhere. Moments and averages are rounded to 16 bits on the way.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur train recipes/codec.toml --set train.max_steps=2000 --set run_dir=runs/try\n  \
                  fulgur train recipes/codec.toml --resume\n  \
                  fulgur train recipes/codec.toml --export-state codec-state\n  \
                  fulgur train recipes/english.toml --set distributed.world=4 --set distributed.sequence=2"
)]
pub(super) struct Arguments {
    /// The recipe, a TOML file
    recipe: PathBuf,
    /// Replace or add one value of the recipe; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Go on from the newest checkpoint of the run folder
    #[arg(long)]
    resume: bool,
    /// Stop with a checkpoint after this many seconds
    #[arg(long, value_name = "SECONDS")]
    pause_after: Option<u64>,
    /// Write the newest checkpoint of the run into this new folder, in small files
    #[arg(long, value_name = "DIR", conflicts_with_all = ["resume", "import_state", "pause_after"])]
    export_state: Option<PathBuf>,
    /// Largest file that --export-state writes
    #[arg(long, value_name = "BYTES", requires = "export_state", default_value_t = portable::DEFAULT_SHARD)]
    max_bytes: u64,
    /// Start the run folder from what --export-state wrote
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    import_state: Option<PathBuf>,
    /// Delay what ranks exchange as a network would, such as 50us,10Gbit/s
    #[arg(long, value_name = "LATENCY,BANDWIDTH")]
    simulate_network: Option<Network>,
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    let recipe = Recipe::load(&arguments.recipe, &arguments.sets)?;
    if let Some(folder) = arguments.export_state {
        return export(context, &recipe, folder, arguments.max_bytes);
    }
    let place = Place::of_process().map_err(anyhow::Error::msg)?;
    let settings = Settings {
        timeout: Duration::try_from_secs_f64(recipe.distributed.timeout_s)?,
        network: arguments.simulate_network,
    };
    #[cfg(feature = "mpi")]
    if crate::distributed::mpi::is_launched() {
        return run_by_mpi(context, &arguments, &recipe, settings);
    }
    let ranks = match &place {
        Some(place) if place.world > 1 => Ranks::Processes(place),
        _ if recipe.distributed == Distributed::default() => Ranks::One,
        _ => Ranks::Threads(recipe.distributed.world.max(1)),
    };
    // Before anything is loaded: ranks that cannot meet need not read data.
    let joined = match ranks {
        Ranks::Processes(place) => Some(tcp::join(place, settings)?),
        _ => None,
    };
    let local = place.as_ref().map_or(0, |place| place.local);
    let device = context.open_local_device(local)?;
    let joined = match joined {
        Some((comm, hub)) => Some((over_gpus(comm, &device, settings)?, hub)),
        None => None,
    };
    let build = |device: &Device| tasks::build(tasks::TASKS, &recipe, device, context.interrupt.flag());
    let mut task = build(&device).inspect_err(|error| {
        if let Some((comm, _)) = &joined {
            comm.fail(&error.to_string());
        }
    })?;
    let options = Options {
        resume: arguments.resume,
        import: arguments.import_state,
        interrupt: Arc::clone(context.interrupt.flag()),
        pause_after: arguments.pause_after.map(Duration::from_secs),
        ranks: None,
    };
    let mut progress = context.progress(&recipe.task, Unit::Items("steps"));
    let unit = task.unit();
    let tell = |report: Report| match report {
        Report::Note(line) => context.note(&line),
        Report::Progress {
            step,
            progress: part,
            loss,
            samples_per_s,
            mfu,
            ..
        } => {
            let mfu = mfu.map_or(String::new(), |mfu| format!(", MFU {:.1} %", 100.0 * mfu));
            progress.relabel(format!(
                "{}, loss {loss:.4}, {samples_per_s:.0} {unit}/s{mfu}",
                recipe.task,
            ));
            // A run that ends by time has as many steps as its speed so far foretells.
            let all = if part > 0.0 {
                (step as f64 / part).round() as u64
            } else {
                0
            };
            progress.set(step, Some(all.max(step)));
        }
    };
    let outcome = match (ranks, joined) {
        (Ranks::Processes(place), Some((comm, hub))) => {
            if place.rank == 0 {
                let outcome = train::run_rank(&mut task, comm, &recipe, &options, tell);
                // The others may still ask for what the last operations brought.
                drop(hub);
                outcome?
            } else {
                let outcome = train::run_rank(&mut task, comm, &recipe, &options, |_| ())?;
                return Ok(Answer::silent(Trained::from(outcome).status()));
            }
        }
        (Ranks::Threads(size), _) => {
            let of_rank = |_| {
                let device = context
                    .open_local_device(local)
                    .map_err(|error| TrainError::Run {
                        path: recipe.run_dir.clone(),
                        reason: error.to_string(),
                    })?;
                build(&device)
            };
            train::run_threads(size, settings, task, of_rank, &recipe, &options, tell)?
        }
        _ => train::run(&*task, &recipe, &options, tell)?,
    };
    drop(progress);
    Answer::new(&Trained::from(outcome))
}

/// The ranks of `comm`, joined by NCCL where the program has it and each has a GPU. A network that is imagined delays what goes
/// through the host alone.
#[cfg_attr(
    not(feature = "nccl"),
    expect(clippy::unnecessary_wraps, reason = "NCCL may refuse")
)]
fn over_gpus(
    comm: Arc<dyn Communicator>,
    device: &Device,
    settings: Settings,
) -> Result<Arc<dyn Communicator>, CommError> {
    #[cfg(feature = "nccl")]
    if device.is_cuda() && settings.network.is_none() {
        let told = comm.clone();
        return crate::distributed::nccl::join(comm, device, settings.timeout)
            .inspect_err(|error| told.fail(&error.to_string()));
    }
    let _ = (device, settings);
    Ok(comm)
}

/// Trains as one process of an MPI job.
#[cfg(feature = "mpi")]
fn run_by_mpi(
    context: &Context,
    arguments: &Arguments,
    recipe: &Recipe,
    settings: Settings,
) -> anyhow::Result<Answer> {
    let (comm, job) = crate::distributed::mpi::join(settings)?;
    let local = Place::of_process().ok().flatten().map_or(0, |place| place.local);
    let device = context
        .open_local_device(local)
        .inspect_err(|error| comm.fail(&error.to_string()))?;
    let comm = over_gpus(comm, &device, settings)?;
    let built = tasks::build(tasks::TASKS, recipe, &device, context.interrupt.flag());
    let mut task = built.inspect_err(|error| comm.fail(&error.to_string()))?;
    let options = Options {
        resume: arguments.resume,
        import: arguments.import_state.clone(),
        interrupt: Arc::clone(context.interrupt.flag()),
        pause_after: arguments.pause_after.map(Duration::from_secs),
        ranks: None,
    };
    let leads = comm.rank() == 0;
    let outcome = train::run_rank(&mut task, comm, recipe, &options, |report| {
        if let (Report::Note(line), true) = (report, leads) {
            context.note(&line);
        }
    });
    // The others may still wait for what was sent last.
    drop(job);
    let trained = Trained::from(outcome?);
    match leads {
        true => Answer::new(&trained),
        false => Ok(Answer::silent(trained.status())),
    }
}

/// What the ranks of a run are.
enum Ranks<'a> {
    /// There is but one.
    One,
    /// Threads of this process.
    Threads(usize),
    /// Processes, of which this is one.
    Processes(&'a Place),
}

fn export(context: &Context, recipe: &Recipe, state_dir: PathBuf, largest: u64) -> anyhow::Result<Answer> {
    let root = recipe.run_dir.join("checkpoints");
    let skipped = |error: &TrainError| context.note(&format!("passed over: {error}"));
    let portable::Exported { step, shards, bytes } = portable::export(&root, &state_dir, largest, skipped)?;
    Answer::new(&State {
        state_dir,
        step,
        shards,
        bytes,
    })
}

#[derive(Serialize)]
struct State {
    state_dir: PathBuf,
    step: u64,
    shards: usize,
    bytes: u64,
}

impl super::answer::Report for State {}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            step, shards, bytes, ..
        } = self;
        let files = if *shards == 1 { "file" } else { "files" };
        writeln!(f, "step {step}, {bytes} bytes in {shards} {files}")?;
        writeln!(f, "{}", self.state_dir.display())
    }
}

#[derive(Serialize)]
struct Trained {
    run_dir: PathBuf,
    step: u64,
    loss: Option<f64>,
    best: Option<f64>,
    samples_per_s: f64,
    finished: bool,
}

impl From<Outcome> for Trained {
    fn from(outcome: Outcome) -> Self {
        // JSON has no other numbers than finite ones.
        let finite = |value: Option<f64>| value.filter(|value| value.is_finite());
        let Outcome {
            run_dir,
            step,
            loss,
            best,
            samples_per_s,
            finished,
        } = outcome;
        Self {
            run_dir,
            step,
            loss: finite(loss),
            best: finite(best),
            samples_per_s,
            finished,
        }
    }
}

impl super::answer::Report for Trained {
    fn status(&self) -> Status {
        if self.finished {
            Status::Done
        } else {
            Status::Partial
        }
    }
}

impl fmt::Display for Trained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = if self.finished { "finished" } else { "paused" };
        write!(f, "{state} at step {}", self.step)?;
        for (name, value) in [("loss", self.loss), ("best", self.best)] {
            if let Some(value) = value {
                write!(f, ", {name} {value:.5}")?;
            }
        }
        writeln!(f, ", {:.1} samples/s", self.samples_per_s)?;
        if self.finished {
            writeln!(f, "{}", self.run_dir.join("model").display())
        } else {
            writeln!(f, "go on with --resume")
        }
    }
}
