//! Runs that end and go on.

use super::*;

#[test]
fn a_resumed_run_equals_the_uninterrupted_one() {
    for sets in [
        "",
        "train.accumulate=3 train.threads=5",
        "train.ema=0.0 schedule.shape='wsd'",
    ] {
        let (straight, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let whole = train(&Toy::new(), &recipe(straight.path(), sets), &Options::default()).unwrap();
        // Stopped in the middle of a log interval, and once more right after; each time with a new model.
        let mut options = Options::default();
        for stop in [25, 26] {
            options.interrupt = Arc::default();
            let toy = Toy::new();
            let stopping = StopAfter(&toy, stop, Arc::clone(&options.interrupt));
            let part = train(&stopping, &recipe(broken.path(), sets), &options).unwrap();
            assert_eq!((part.step, part.finished), (stop, false));
            options.resume = true;
        }
        let parts = train(&Toy::new(), &recipe(broken.path(), sets), &resume()).unwrap();
        let (one, other) = (newest(straight.path()), newest(broken.path()));
        assert_eq!(bits(&one.weights), bits(&other.weights));
        assert_eq!(bits(&one.optimiser), bits(&other.optimiser));
        assert_eq!(bits(&one.ema), bits(&other.ema));
        assert_eq!(metrics(straight.path()), metrics(broken.path()));
        assert_eq!(
            (whole.step, whole.loss, whole.best),
            (parts.step, parts.loss, parts.best)
        );
    }
}

/// What is written beside the steps is the state between two of them: each checkpoint leads to the same end.
#[test]
fn any_checkpoint_of_a_run_goes_on_to_the_same_end() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let sets = "train.checkpoint_seconds=1e-9 train.keep=1000 train.accumulate=2 train.max_steps=150";
    train(&Toy::new(), &recipe(&at("whole"), sets), &Options::default()).unwrap();
    let end = newest(&at("whole"));
    let all = checkpoint::list(&at("whole/checkpoints")).unwrap();
    assert!(all.len() > 1, "{all:?}");
    for (number, from) in all[1..].iter().enumerate() {
        let run_dir = at(&format!("again-{number}"));
        let name = from.file_name().unwrap();
        fs::create_dir_all(run_dir.join("checkpoints").join(name)).unwrap();
        for file in fs::read_dir(from).unwrap() {
            let file = file.unwrap();
            let to = run_dir.join("checkpoints").join(name).join(file.file_name());
            fs::copy(file.path(), to).unwrap();
        }
        train(&Toy::new(), &recipe(&run_dir, sets), &resume()).unwrap();
        let other = newest(&run_dir);
        assert_eq!(bits(&end.weights), bits(&other.weights), "{from:?}");
        assert_eq!(bits(&end.optimiser), bits(&other.optimiser), "{from:?}");
        assert_eq!(bits(&end.ema), bits(&other.ema), "{from:?}");
    }
}

#[test]
fn time_ends_a_run_and_counts_over_sessions() {
    let folder = tempfile::tempdir().unwrap();
    let timed = |seconds: f64| {
        let mut recipe = recipe(folder.path(), "");
        (recipe.train.max_steps, recipe.train.max_seconds) = (0, seconds);
        recipe
    };
    let pause = Options {
        pause_after: Some(std::time::Duration::ZERO),
        ..Options::default()
    };
    let paused = train(&Toy::new(), &timed(0.05), &pause).unwrap();
    assert_eq!((paused.step, paused.finished), (0, false));
    let options = resume();
    let toy = Toy::new();
    let stopping = StopAfter(&toy, 10, Arc::clone(&options.interrupt));
    let stopped = train(&stopping, &timed(1e6), &options).unwrap();
    assert_eq!((stopped.step, stopped.finished), (10, false));
    let read = || {
        checkpoint::load_newest(&folder.path().join("checkpoints"), |_| ())
            .unwrap()
            .unwrap()
            .state
    };
    let spent = read().elapsed_s;
    assert!(spent > 0.0);
    // As much time as was spent already: the next session has nothing left to do but to finish.
    let over = train(&Toy::new(), &timed(spent), &resume()).unwrap();
    assert_eq!((over.step, over.finished), (10, true));
    let longer = train(&Toy::new(), &timed(spent + 0.05), &resume()).unwrap();
    assert!(longer.finished && longer.step > 10 && read().elapsed_s >= spent + 0.05);
}

/// A new run starts from the weights that the recipe names, its averages too; a resumed one from its own checkpoint.
#[test]
fn a_run_starts_from_given_weights() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let taught = Toy::new();
    run(&taught, &recipe(&at("first"), ""), &Options::default(), |_| ()).unwrap();
    let weights = at("first").join("model/model.safetensors");
    // A rate that moves nothing: what is exported is what the run started from.
    let still = format!(
        "train.start='{}' train.max_steps=3 optimiser.lr=1e-30",
        weights.display()
    );
    run(
        &Toy::new(),
        &recipe(&at("second"), &still),
        &Options::default(),
        |_| (),
    )
    .unwrap();
    let read = |run: &str| {
        let file = Frozen::open(&at(run).join("model/model.safetensors"), &Device::Cpu).unwrap();
        let weight = file.tensors()["first.weight"].flatten_all().unwrap();
        weight.to_vec1::<f32>().unwrap()
    };
    assert_eq!(read("second"), read("first"));

    let longer = still
        .replace("max_steps=3", "max_steps=5")
        .replace("first/model", "absent");
    let resumed = Options {
        resume: true,
        ..Options::default()
    };
    run(&Toy::new(), &recipe(&at("second"), &longer), &resumed, |_| ()).unwrap();
    assert_eq!(read("second"), read("first"));

    let error = run(
        &Toy::new(),
        &recipe(&at("third"), &longer),
        &Options::default(),
        |_| (),
    )
    .unwrap_err();
    assert!(error.to_string().contains("absent/model.safetensors"), "{error}");
}
