//! Steps whose gradients are not finite.

use super::*;

#[test]
fn undefined_gradients_are_skipped_then_stop_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let toy = Toy {
        spoiled: 30..u64::MAX,
        ..Toy::new()
    };
    let sets = "train.max_skips=4 train.checkpoint_seconds=0.000001";
    let error = train(&toy, &recipe(folder.path(), sets), &Options::default()).unwrap_err();
    let TrainError::Diverged {
        step: 35,
        skips: 5,
        kept,
    } = error
    else {
        panic!("{error}")
    };
    // Checkpoints are written beside the steps: which is the last one, the disk decides.
    assert!((1..35).contains(&kept), "{kept}");
    let last = newest(folder.path()).state;
    let updates = kept.min(30);
    assert_eq!(
        (last.step, last.updates, last.skipped),
        (kept, updates, kept - updates)
    );
    for (name, var) in toy.params.vars() {
        let finite = var
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
            .iter()
            .all(|x| x.is_finite());
        assert!(finite, "{name}");
    }
    // A single bad batch costs one step.
    let folder = tempfile::tempdir().unwrap();
    let toy = Toy {
        spoiled: 59..60,
        ..Toy::new()
    };
    let outcome = train(&toy, &recipe(folder.path(), ""), &Options::default()).unwrap();
    assert!(outcome.finished && outcome.loss.is_some_and(f64::is_finite));
}

/// The host looks every 16 steps and before each log line: a run that skips too much ends there, whatever comes after.
#[test]
fn too_many_skips_are_noticed_at_the_next_look() {
    for (log_every, noticed) in [(1000, 32), (20, 20), (19, 19)] {
        let folder = tempfile::tempdir().unwrap();
        let toy = Toy {
            spoiled: 17..19,
            ..Toy::new()
        };
        let sets = format!("train.max_skips=1 train.validate_every=0 train.log_every={log_every}");
        let error = train(&toy, &recipe(folder.path(), &sets), &Options::default()).unwrap_err();
        let words = format!(
            "step {noticed}: gradients were not finite 2 times in a row; the last checkpoint is from step 0"
        );
        assert_eq!(error.to_string(), words);
        assert!(
            checkpoint::list(&folder.path().join("checkpoints"))
                .unwrap()
                .is_empty()
        );
    }
}

/// Nothing that was skipped is saved as the end of a run that should have stopped.
#[test]
fn a_checkpoint_and_the_end_look_first() {
    for (sets, last) in [("train.checkpoint_seconds=1e-9", 1), ("train.max_steps=3", 3)] {
        let folder = tempfile::tempdir().unwrap();
        let toy = Toy {
            spoiled: last - 1..last,
            ..Toy::new()
        };
        let sets = format!("train.max_skips=0 train.log_every=1000 {sets}");
        let error = train(&toy, &recipe(folder.path(), &sets), &Options::default()).unwrap_err();
        let TrainError::Diverged {
            step,
            skips: 1,
            kept: 0,
        } = error
        else {
            panic!("{sets}: {error}")
        };
        assert_eq!(step, last, "{sets}");
        assert!(
            checkpoint::list(&folder.path().join("checkpoints"))
                .unwrap()
                .is_empty()
        );
        assert!(!folder.path().join("model").exists());
    }
}

/// Skipped steps leave no trace in weights, moments, averages and means: also across a break within a row of them.
#[test]
fn skipped_steps_leave_no_trace() {
    /// Counts batches over the spoiled ones.
    struct Without(Toy);
    impl Task for Without {
        fn params(&self) -> &Params {
            self.0.params()
        }
        fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
            let index = cursor.index + if cursor.index < 23 { 0 } else { 4 };
            self.0.batch(&Cursor { index, ..*cursor })
        }
        fn loss(&self, batch: &Batch, step: &Step) -> TaskResult<Losses> {
            self.0.loss(batch, step)
        }
        fn export(&self, folder: &Path) -> TaskResult<()> {
            self.0.export(folder)
        }
    }
    let spoiled = || Toy {
        spoiled: 23..27,
        ..Toy::new()
    };
    let sets = "schedule.warmup=0 train.validate_every=0 train.log_every=50";
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    // A rate that does not depend on the number of the step.
    let steady = |name: &str, steps: u64| {
        let sets = format!("{sets} schedule.floor=1.0 train.max_steps={steps}");
        recipe(&at(name), &sets)
    };
    train(&Without(Toy::new()), &steady("without", 46), &Options::default()).unwrap();
    train(&spoiled(), &steady("whole", 50), &Options::default()).unwrap();
    let options = Options::default();
    let stopping = spoiled();
    let stopping = StopAfter(&stopping, 25, Arc::clone(&options.interrupt));
    train(&stopping, &steady("broken", 50), &options).unwrap();
    let state = newest(&at("broken")).state;
    assert_eq!(
        (
            state.updates,
            state.skipped,
            state.skipped_in_a_row,
            state.window_steps
        ),
        (23, 2, 2, 23)
    );
    train(&spoiled(), &steady("broken", 50), &resume()).unwrap();
    let [without, whole, broken] = ["without", "whole", "broken"].map(|name| newest(&at(name)));
    for other in [&whole, &broken] {
        assert_eq!(bits(&without.weights), bits(&other.weights));
        assert_eq!(bits(&without.ema), bits(&other.ema));
        let moments = |of: &checkpoint::Checkpoint| {
            let all = bits(&of.optimiser).into_iter();
            all.filter(|(name, _)| name.starts_with("moments."))
                .collect::<Vec<_>>()
        };
        assert_eq!(moments(&without), moments(other));
        assert_eq!((other.state.updates, other.state.skipped), (46, 4));
    }
    // The sums that "without" has after its last step became a log line in the others.
    let sum = without.optimiser["window.loss"].to_scalar::<f32>().unwrap();
    let mean = f64::from(sum) / 46.0;
    for name in ["whole", "broken"] {
        let line = &metrics(&at(name))[0];
        assert_eq!(line["loss"].as_f64(), Some(mean), "{name}");
        assert_eq!(line["skipped"], 4.0, "{name}");
    }
}

/// A log interval of nothing but skipped steps has no means.
#[test]
fn an_interval_without_a_finite_step_has_no_loss() {
    let folder = tempfile::tempdir().unwrap();
    let toy = Toy {
        spoiled: 6..15,
        ..Toy::new()
    };
    train(
        &toy,
        &recipe(folder.path(), "train.max_steps=21"),
        &Options::default(),
    )
    .unwrap();
    let lines = metrics(folder.path());
    let line = |step: u64| {
        lines
            .iter()
            .find(|line| line["step"] == step && line.get("lr").is_some())
    };
    assert!(line(14).unwrap().get("loss").is_none());
    assert!(line(14).unwrap()["grad_norm"].is_null());
    assert_eq!(line(14).unwrap()["skipped"], 8.0);
    assert!(line(21).unwrap()["loss"].is_f64());
}
