//! Runs whose parameters are in shards beside runs whose ranks keep all, and what a rank keeps.

use super::ranks::{apart, left, of_steps, over_ranks, recipe, settings, task};
use super::*;
use crate::distributed::threads::world;
use crate::distributed::{Distributed, Shard};
use crate::train::{TrainError, checkpoint, run_threads};
use fulgur_kernels::tape;

/// All kinds of models make the steps that they make without shards, layers that run again or not, with sequences over ranks or
/// not; checkpoints and averages are whole, and so is the model at the end.
#[test]
fn lent_parameters_change_nothing() {
    for (own, model, sequence) in [
        ("recompute = true", "architecture = 'tnl'\nsoftmax_every = 2", 1),
        ("", "architecture = 'transnormer'", 2),
        ("", "architecture = 'lightnet'\ntied = false", 1),
        ("recompute = true", "architecture = 'hgrn1'", 2),
        ("", "architecture = 'llama'", 1),
        ("", "architecture = 'eos'", 1),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let of = |shard: &str| {
            let settings = format!(
                "keep_best = true\nvalidate_every = 5\naccumulate = 2\n[optimiser]\nlr = 1e-3\neps = 1e-4\nclip = 0.5\n\
                 [distributed]\nshard = '{shard}'\nsequence = {sequence}"
            );
            recipe(folder.path(), shard, &settings, own, model)
        };
        let [whole, sharded] = [of("none"), of("parameters")];
        let outcomes =
            [&whole, &sharded].map(|recipe| over_ranks(recipe, 4, &RunOptions::default()).unwrap());
        let (expected, weights) = left(&whole);
        let (losses, found) = left(&sharded);
        assert_eq!(losses.len(), 12);
        for (found, expected) in losses.iter().zip(&expected) {
            assert!(
                (found - expected).abs() < 1e-5,
                "{model}: {losses:?}, {expected:?}"
            );
        }
        let error = apart(&found, &weights);
        assert!(error < 1e-5, "{model}: {error:e}");
        let [best, found] = outcomes.map(|outcome| outcome.best.unwrap());
        assert!((best - found).abs() < 1e-5, "{model}: validation {found}, {best}");
        for file in ["best.safetensors", "model/model.safetensors"] {
            let read = |recipe: &Recipe| {
                let path = recipe.run_dir.join(file);
                fulgur_lightnet::params::file::read(&path, &Device::Cpu)
                    .unwrap()
                    .tensors
            };
            let (found, expected) = (read(&sharded), read(&whole));
            assert!(found.keys().eq(expected.keys()), "{model}: {file}");
            let error = apart(&found, &expected);
            assert!(error < 1e-5, "{model}: {file}: {error:e}");
        }
        // The averages and moments of one rank go on alone.
        let of_run = |recipe: &Recipe| {
            let found = checkpoint::load_newest(&recipe.run_dir.join("checkpoints"), |_| ());
            found.unwrap().unwrap()
        };
        let (found, expected) = (of_run(&sharded), of_run(&whole));
        assert!(found.ema.keys().eq(expected.ema.keys()) && apart(&found.ema, &expected.ema) < 1e-5);
        assert!(found.optimiser.keys().eq(expected.optimiser.keys()));
        let options = RunOptions {
            resume: true,
            ..RunOptions::default()
        };
        let longer = of_steps(14, sharded);
        let outcome = run(&*task(&longer).unwrap(), &longer, &options, |_| ()).unwrap();
        assert!(outcome.finished && outcome.step == 14);
    }
}

/// A rank keeps its part of the matrices, and while it works those of one unit at a time beside it.
#[test]
fn a_rank_keeps_a_part_of_the_parameters() {
    const RANKS: usize = 4;
    let folder = tempfile::tempdir().unwrap();
    for own in ["", "recompute = true"] {
        let model = "architecture = 'tnl'\ntied = false";
        let recipe = recipe(folder.path(), "run", "", own, model);
        let options = Distributed {
            shard: Shard::Parameters,
            ..Distributed::default()
        };
        let bytes = |task: &dyn Task, which: &dyn Fn(&str) -> bool| -> usize {
            let vars = task.params().vars().into_iter();
            vars.filter(|(name, _)| which(name))
                .map(|(_, var)| 4 * var.elem_count())
                .sum()
        };
        let found: Vec<[usize; 5]> = std::thread::scope(|scope| {
            let handles: Vec<_> = world(RANKS, settings())
                .into_iter()
                .map(|comm| {
                    let (recipe, options) = (&recipe, options.clone());
                    scope.spawn(move || {
                        let mut task = task(recipe).unwrap();
                        let all = bytes(&*task, &|_| true);
                        let unit = |part: &str| bytes(&*task, &|name| name.contains(part));
                        let largest = unit("layers.0.").max(unit("embeddings")).max(unit("lm_head"));
                        let ranks = Ranks::new(comm, options).unwrap();
                        task.distribute(&ranks).unwrap();
                        let parameters = ranks.parameters().unwrap();
                        parameters.begin().unwrap();
                        let kept = parameters.held();
                        let cursor = Cursor { seed: 1, index: 0 };
                        let batch = task.batch(&cursor).unwrap();
                        let step = Step {
                            number: 0,
                            progress: 0.0,
                            cursor,
                        };
                        let (losses, tape) = tape::record(|| task.loss(&batch, &step));
                        tape.backward(&losses.unwrap().total).unwrap();
                        let own: usize = parameters
                            .gradients()
                            .unwrap()
                            .iter()
                            .flatten()
                            .map(|gradient| 4 * gradient.elem_count())
                            .sum();
                        assert_eq!(parameters.held(), kept);
                        [all, largest, kept, parameters.most_held(), own]
                    })
                })
                .collect();
            handles.into_iter().map(|handle| handle.join().unwrap()).collect()
        });
        let kept: usize = found.iter().map(|[_, _, kept, ..]| kept).sum();
        let [all, largest, ..] = found[0];
        // Only gains are kept more than once.
        assert!(kept >= all && kept < all + all / 20, "{found:?}");
        for [_, _, kept, most, own] in found {
            // The embedding, and the head, are one matrix each.
            assert!(5 * kept < 2 * all, "{kept} of {all}");
            assert!(most <= kept + largest, "{most}, {kept} and {largest}");
            assert!(own > 0 && own <= kept, "gradients of {own}, parameters of {kept}");
        }
    }
}

#[test]
fn other_tasks_keep_their_parameters() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(
        folder.path(),
        "run",
        "[distributed]\nshard = 'parameters'",
        "",
        "architecture = 'tnl'",
    );
    /// As a task that knows nothing of lenders.
    struct Plain(Box<dyn Task>);
    impl Task for Plain {
        fn params(&self) -> &Params {
            self.0.params()
        }
        fn distribute(&mut self, _: &Ranks) -> TaskResult<()> {
            Ok(())
        }
        fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
            self.0.batch(cursor)
        }
        fn loss(&self, batch: &Batch, step: &Step) -> TaskResult<Losses> {
            self.0.loss(batch, step)
        }
        fn export(&self, folder: &Path) -> TaskResult<()> {
            self.0.export(folder)
        }
    }
    let build = |_| -> Result<Box<dyn Task>, TrainError> { Ok(Box::new(Plain(task(&recipe)?))) };
    let first = build(0).unwrap();
    let options = RunOptions::default();
    let error = run_threads(2, settings(), first, build, &recipe, &options, |_| ()).unwrap_err();
    let line = error.to_string();
    assert!(
        line.contains("distributed.shard: found parameters, expected none, moments or gradients"),
        "{line}"
    );
}
