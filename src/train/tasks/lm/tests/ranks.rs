//! Runs over several ranks beside the run of one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::*;
use crate::distributed::threads::Settings;
use crate::train::{Outcome, Report, TrainError, checkpoint, run_threads};

/// Text, or documents, that a small model learns something of.
fn data(folder: &Path, documents: bool) -> PathBuf {
    let words = ["one ", "two ", "three ", "four ", "five "];
    let of = |i: usize| words[(i * i + i / 3) % words.len()];
    if documents {
        let path = folder.join("documents.jsonl");
        let line = |d: usize| {
            let text: String = (0..3 + d * 7 % 11).map(|i| of(d + i)).collect();
            format!("{{\"text\": \"{text}\"}}\n")
        };
        std::fs::write(&path, (0..90).map(line).collect::<String>()).unwrap();
        return path;
    }
    let path = folder.join("text.txt");
    std::fs::write(&path, (0..500).map(of).collect::<String>()).unwrap();
    path
}

pub(super) fn recipe(folder: &Path, run: &str, settings: &str, own: &str, model: &str) -> Recipe {
    let tokens = data(folder, own.contains("documents"));
    let text = format!(
        "task = 'lm'\nseed = 3\n[train]\nmax_steps = 12\nlog_every = 1\nema = 0.9\n{settings}\n\
         [lm]\ntokens = '{}'\nheld_out = 0.2\nbatch = 4\ncontext = 32\nvalidation = 4\n{own}\n\
         [lm.model]\nlayers = 2\nwidth = 32\nhidden = 48\nheads = 2\n{model}\n",
        tokens.display()
    );
    Recipe::check(text.parse().unwrap(), "test".into(), &folder.join(run)).unwrap()
}

/// The recipe with another number of steps.
pub(super) fn of_steps(max_steps: u64, recipe: Recipe) -> Recipe {
    let train = crate::train::recipe::Train {
        max_steps,
        ..recipe.train.clone()
    };
    Recipe { train, ..recipe }
}

pub(super) fn task(recipe: &Recipe) -> Result<Box<dyn Task>, TrainError> {
    let built = LmTask::open(recipe.own().unwrap(), recipe.seed, &Device::Cpu);
    Ok(Box::new(built.map_err(TrainError::task("test"))?))
}

pub(super) fn settings() -> Settings {
    Settings {
        timeout: Duration::from_secs(60),
        network: None,
    }
}

pub(super) fn over_ranks(recipe: &Recipe, size: usize, options: &RunOptions) -> Result<Outcome, TrainError> {
    run_threads(
        size,
        settings(),
        task(recipe)?,
        |_| task(recipe),
        recipe,
        options,
        |_| (),
    )
}

/// Losses, and the weights of the last checkpoint.
pub(super) fn left(recipe: &Recipe) -> (Vec<f64>, BTreeMap<String, Tensor>) {
    let lines = std::fs::read_to_string(recipe.run_dir.join("metrics.jsonl")).unwrap();
    let losses = lines
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64())
        .collect();
    let found = checkpoint::load_newest(&recipe.run_dir.join("checkpoints"), |_| ());
    (losses, found.unwrap().unwrap().weights)
}

pub(super) fn apart(found: &BTreeMap<String, Tensor>, expected: &BTreeMap<String, Tensor>) -> f64 {
    let square = |x: &Tensor| {
        let wide = x.to_dtype(DType::F64).unwrap();
        wide.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
    };
    let (mut off, mut all) = (0.0, 0.0);
    for (name, expected) in expected {
        off += square(&(&found[name] - expected).unwrap());
        all += square(expected);
    }
    (off / all).sqrt()
}

const SGD_LIKE: &str = "[optimiser]\nlr = 1e-3\neps = 1e-4\n";

/// Groups and sequence groups (4, 1), (2, 2), (1, 4) and (2, 4) make the run of one rank: causal, packed and masked models.
#[test]
fn runs_over_ranks_are_the_run_of_one() {
    let cases = [
        ("", "architecture = 'tnl'\nsoftmax_every = 2"),
        (
            "",
            "architecture = 'lightnet'\n[lm.model.variant]\nuse_tpe = true\nconv_size = 3",
        ),
        ("", "architecture = 'cosformer2'"),
        ("packing = 'documents'", "architecture = 'hgrn2'"),
        (
            "packing = 'documents'\nrecompute = true",
            "architecture = 'llama'",
        ),
        (
            "",
            "architecture = 'lightnet'\n[lm.model.variant]\nbidirectional = true\nuse_tpe = true",
        ),
    ];
    for (own, model) in cases {
        let folder = tempfile::tempdir().unwrap();
        let one = recipe(folder.path(), "one", SGD_LIKE, own, model);
        run(&*task(&one).unwrap(), &one, &RunOptions::default(), |_| ()).unwrap();
        let (expected, weights) = left(&one);
        for (world, sequence) in [(4, 1), (4, 2), (4, 4), (8, 4)] {
            for method in ["lasp1", "lasp2"] {
                let distributed = format!("[distributed]\nsequence = {sequence}\nmethod = '{method}'");
                let name = format!("{world}-{sequence}-{method}");
                let many = recipe(
                    folder.path(),
                    &name,
                    &format!("{SGD_LIKE}{distributed}"),
                    own,
                    model,
                );
                over_ranks(&many, world, &RunOptions::default()).unwrap();
                let (losses, found) = left(&many);
                assert_eq!(losses.len(), expected.len());
                for (found, expected) in losses.iter().zip(&expected) {
                    assert!(
                        (found - expected).abs() < 1e-4,
                        "{model}, {name}: {losses:?}, {expected:?}"
                    );
                }
                let error = apart(&found, &weights);
                assert!(error < 1e-5, "{model}, {name}: weights are {error:e} apart");
                if sequence == 1 {
                    break;
                }
            }
        }
    }
}

/// Moments, or moments and gradients, in shards: the run of ranks that keep all, for more than 100 steps; checkpoints are whole.
#[test]
fn shards_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let model = "architecture = 'hgrn2'";
    let of = |shard: &str, sequence: usize| {
        let settings = format!(
            "[optimiser]\nlr = 1e-3\nmuon = ['mlp']\nclip = 0.5\n[distributed]\nshard = '{shard}'\nsequence = {sequence}"
        );
        of_steps(110, recipe(folder.path(), shard, &settings, "", model))
    };
    let whole = of("none", 1);
    over_ranks(&whole, 4, &RunOptions::default()).unwrap();
    let (expected, weights) = left(&whole);
    let moments = |recipe: &Recipe| {
        let found = checkpoint::load_newest(&recipe.run_dir.join("checkpoints"), |_| ());
        found.unwrap().unwrap().optimiser
    };
    for (shard, sequence, most) in [
        ("moments", 1, 0.0),
        ("gradients", 1, 1e-5),
        ("gradients", 2, 1e-4),
        ("parameters", 1, 1e-5),
        ("parameters", 2, 1e-4),
    ] {
        let sharded = of(shard, sequence);
        over_ranks(&sharded, 4, &RunOptions::default()).unwrap();
        let (losses, found) = left(&sharded);
        assert_eq!(losses.len(), 110);
        for (found, expected) in losses.iter().zip(&expected) {
            assert!(
                (found - expected).abs() <= f64::max(most, 1e-7),
                "{shard}: {found} {expected}"
            );
        }
        assert!(
            apart(&found, &weights) <= most,
            "{shard}: {}",
            apart(&found, &weights)
        );
        let (found, expected) = (moments(&sharded), moments(&whole));
        assert!(found.keys().eq(expected.keys()), "{shard}");
        assert!(
            apart(&found, &expected) <= 10.0 * most,
            "{shard}: {}",
            apart(&found, &expected)
        );
        // One rank goes on from the shards of four.
        let options = RunOptions {
            resume: true,
            ..RunOptions::default()
        };
        let longer = of_steps(112, sharded);
        let outcome = run(&*task(&longer).unwrap(), &longer, &options, |_| ()).unwrap();
        assert!(outcome.finished && outcome.step == 112);
        std::fs::remove_dir_all(&longer.run_dir).unwrap();
    }
}

/// Gradients are accumulated over parts of a batch, and a run goes on with another number of ranks from where it was left.
#[test]
fn runs_go_on_with_other_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let model = "architecture = 'tnl'";
    let set = |more: &str| format!("accumulate = 2\n{SGD_LIKE}[distributed]\n{more}");
    let one = recipe(folder.path(), "one", &set("world = 0"), "", model);
    run(&*task(&one).unwrap(), &one, &RunOptions::default(), |_| ()).unwrap();
    let (expected, weights) = left(&one);
    let stages: [(usize, usize, u64); 3] = [(2, 2, 4), (4, 1, 8), (1, 1, 12)];
    for (world, sequence, stop) in stages {
        let many = recipe(
            folder.path(),
            "many",
            &set(&format!("sequence = {sequence}")),
            "",
            model,
        );
        let interrupt = Arc::new(AtomicBool::new(false));
        let options = RunOptions {
            resume: true,
            interrupt: interrupt.clone(),
            ..RunOptions::default()
        };
        let watch = |report: Report| {
            if let Report::Progress { step, .. } = report
                && step >= stop
            {
                interrupt.store(true, Ordering::SeqCst);
            }
        };
        let first = task(&many).unwrap();
        let outcome = match world {
            1 => run(&*first, &many, &options, watch),
            _ => run_threads(world, settings(), first, |_| task(&many), &many, &options, watch),
        };
        let outcome = outcome.unwrap();
        assert_eq!(outcome.finished, stop == 12, "{outcome:?}");
        assert!(outcome.step >= stop && outcome.step <= stop + 1, "{outcome:?}");
    }
    let many = recipe(folder.path(), "many", &set("world = 0"), "", model);
    let (losses, found) = left(&many);
    for (found, expected) in losses.iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-4, "{losses:?}, {expected:?}");
    }
    assert_eq!(losses.len(), 12);
    assert!(apart(&found, &weights) < 1e-5);
}

/// Every outer method learns, with measured rounds and with nodes of two ranks too.
#[test]
fn workers_take_steps_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let model = "architecture = 'tnl'";
    let outer = |name: &str, more: &str| {
        let settings =
            format!("[optimiser]\nlr = 3e-3\n[distributed]\nworld = 4\n[distributed.outer]\n{more}");
        let recipe = of_steps(120, recipe(folder.path(), name, &settings, "", model));
        let outcome = over_ranks(&recipe, 4, &RunOptions::default()).unwrap();
        assert!(outcome.finished && outcome.step == 120);
        (outcome, left(&recipe))
    };
    for (name, more) in [
        ("co2", "inner_steps = 4"),
        ("co2 measured", "inner_steps = 0\ngap = 'tensor'\nclip = 0.5"),
        ("co2 nodes", "inner_steps = 4\nnode = 2"),
        ("slowmo", "method = 'slowmo'\ninner_steps = 7\nmomentum = 0.2"),
        ("local", "method = 'local'\ninner_steps = 4"),
        ("diloco", "method = 'diloco'\ninner_steps = 4"),
    ] {
        let (outcome, (losses, _)) = outer(name, more);
        let (first, last) = (losses[0], losses[losses.len() - 1]);
        assert!(last < 0.8 * first, "{name}: {first} to {last}");
        let best = outcome.best.unwrap();
        assert!(best < 0.8 * first, "{name}: validation {best}");
    }
}

/// A run of CO2 that pauses between rounds goes on, with as many workers or fewer.
#[test]
fn outer_runs_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let settings_of = "[optimiser]\nlr = 3e-3\n[distributed.outer]\ninner_steps = 3\nmomentum = 0.3";
    let model = "architecture = 'tnl'";
    let recipe = of_steps(60, recipe(folder.path(), "run", settings_of, "", model));
    for (world, stop) in [(4, 3), (4, 20), (2, 100)] {
        let interrupt = Arc::new(AtomicBool::new(false));
        let options = RunOptions {
            resume: true,
            interrupt: interrupt.clone(),
            ..RunOptions::default()
        };
        let watch = |report: Report| {
            if let Report::Progress { step, .. } = report
                && step >= stop
            {
                interrupt.store(true, Ordering::SeqCst);
            }
        };
        let first = task(&recipe).unwrap();
        let outcome = run_threads(
            world,
            settings(),
            first,
            |_| task(&recipe),
            &recipe,
            &options,
            watch,
        )
        .unwrap();
        if stop < 100 {
            assert!(
                !outcome.finished && outcome.step % 3 == 0 && outcome.step < 50,
                "{outcome:?}"
            );
            let found = checkpoint::load_newest(&recipe.run_dir.join("checkpoints"), |_| ());
            let kept = found.unwrap().unwrap().optimiser;
            for name in ["outer.previous", "outer.momentum", "outer.arrived", "outer.moved"] {
                assert!(kept.contains_key(name), "{name}");
            }
        } else {
            assert!(outcome.finished, "{outcome:?}");
        }
    }
}

/// A task of a rank that fails at a step, or never comes to one.
struct Failing(Box<dyn Task>, u64);

impl Task for Failing {
    fn params(&self) -> &Params {
        self.0.params()
    }
    fn distribute(&mut self, ranks: &Ranks) -> TaskResult<()> {
        self.0.distribute(ranks)
    }
    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        self.0.batch(cursor)
    }
    fn loss(&self, batch: &Batch, step: &Step) -> TaskResult<Losses> {
        if step.number == self.1 {
            return Err("the disk is on fire".into());
        }
        self.0.loss(batch, step)
    }
    fn export(&self, folder: &Path) -> TaskResult<()> {
        self.0.export(folder)
    }
}

/// A rank that fails ends the run with its own words, and the steps before are kept; the run goes on without it.
#[test]
fn a_rank_that_fails_ends_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(
        folder.path(),
        "run",
        "[distributed]\nsequence = 2",
        "",
        "architecture = 'tnl'",
    );
    for bad in [0, 3] {
        let build = |rank: usize| -> Result<Box<dyn Task>, TrainError> {
            let task = task(&recipe)?;
            Ok(if rank == bad {
                Box::new(Failing(task, 5))
            } else {
                task
            })
        };
        let options = RunOptions::default();
        let first = build(0).unwrap();
        let began = std::time::Instant::now();
        let error = run_threads(4, settings(), first, build, &recipe, &options, |_| ()).unwrap_err();
        assert_eq!(error.to_string(), "step 5: loss: the disk is on fire");
        assert!(began.elapsed() < Duration::from_secs(30));
        let found = checkpoint::load_newest(&recipe.run_dir.join("checkpoints"), |_| ());
        assert_eq!(found.unwrap().unwrap().state.step, 5, "rank {bad}");
        let options = RunOptions {
            resume: true,
            ..RunOptions::default()
        };
        let outcome = over_ranks(&recipe, 2, &options).unwrap();
        assert!(outcome.finished);
        std::fs::remove_dir_all(&recipe.run_dir).unwrap();
    }
}

#[test]
fn what_does_not_split_is_refused_before_training() {
    let folder = tempfile::tempdir().unwrap();
    let model = "architecture = 'tnl'";
    let refused = |world: usize, distributed: &str, own: &str| {
        let recipe = recipe(folder.path(), "run", distributed, own, model);
        let error = over_ranks(&recipe, world, &RunOptions::default()).unwrap_err();
        assert!(!recipe.run_dir.join("checkpoints").exists());
        error.to_string()
    };
    let line = refused(3, "", "");
    assert!(
        line.contains("[lm]: batch is 4, expected a multiple of 3, the groups of ranks"),
        "{line}"
    );
    let line = refused(5, "[distributed]\nsequence = 5", "");
    assert!(
        line.contains("context is 32, expected a multiple of 5, the ranks that share"),
        "{line}"
    );
    let line = refused(4, "[distributed]\nsequence = 3", "");
    assert!(
        line.contains("distributed.sequence: found 3, expected a number that divides 4"),
        "{line}"
    );
    let line = refused(2, "[distributed]\nworld = 4", "");
    assert!(line.contains("distributed.world: found 4, expected 2"), "{line}");
    // Ranks with other recipes do not begin.
    let [one, other] = [1, 2].map(|seed| Recipe {
        seed,
        ..recipe(folder.path(), "run", "", "", model)
    });
    let found: Vec<String> = std::thread::scope(|scope| {
        let handles: Vec<_> = crate::distributed::threads::world(2, settings())
            .into_iter()
            .map(|comm| {
                let recipe = if comm.rank() == 0 { &one } else { &other };
                scope.spawn(move || {
                    let mut task = task(recipe).unwrap();
                    let options = RunOptions::default();
                    crate::train::run_rank(&mut task, comm, recipe, &options, |_| ())
                        .unwrap_err()
                        .to_string()
                })
            })
            .collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    });
    for line in found {
        assert!(
            line.starts_with("recipe: rank 0 called ") && line.contains("rank 1 called"),
            "{line}"
        );
    }
}
