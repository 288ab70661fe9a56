//! A toy task that proves the promises of the engine.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{Device, Tensor};
use candle_nn::{Linear, Module};
use fulgur_lightnet::params::{Frozen, Params, Precision};
use serde_json::Value;

use super::*;

/// Fits a small network to a smooth function of two numbers.
struct Toy {
    params: Params,
    layers: [Linear; 2],
    /// Batches from this number on hold an undefined value.
    spoiled: u64,
    validations: AtomicU64,
}

impl Toy {
    fn new() -> Self {
        let params = Params::random(9, &Device::Cpu);
        let vb = params.builder();
        let layers = [
            candle_nn::linear(2, 24, vb.pp("first")).unwrap(),
            candle_nn::linear(24, 1, vb.pp("second")).unwrap(),
        ];
        Self {
            params,
            layers,
            spoiled: u64::MAX,
            validations: AtomicU64::new(0),
        }
    }

    fn error(&self, x: &Tensor, y: &Tensor) -> candle_core::Result<Tensor> {
        let hidden = self.layers[0].forward(x)?.tanh()?;
        (self.layers[1].forward(&hidden)? - y)?.sqr()?.mean_all()
    }
}

impl Task for Toy {
    fn params(&self) -> &Params {
        &self.params
    }

    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        let mut noise = cursor.noise("points");
        let points: Vec<f32> = (0..32).map(|_| noise.range(-1.0, 1.0)).collect();
        let spoil = if cursor.index >= self.spoiled {
            f32::NAN
        } else {
            0.0
        };
        let targets: Vec<f32> = points
            .chunks(2)
            .map(|p| (3.0 * p[0]).sin() * p[1] + spoil)
            .collect();
        let batch = Batch::new(16).with("x", Tensor::from_vec(points, (16, 2), &Device::Cpu)?);
        Ok(batch.with("y", Tensor::from_vec(targets, (16, 1), &Device::Cpu)?))
    }

    fn loss(&self, batch: &Batch, _: &Step) -> TaskResult<Losses> {
        let error = self.error(batch.get("x")?, batch.get("y")?)?;
        let size = self.layers[1].weight().sqr()?.mean_all()?;
        let total = (&error + (&size * 1e-4)?)?;
        Ok(Losses {
            total,
            parts: vec![("error", error), ("size", size)],
        })
    }

    fn validate(&self) -> TaskResult<Vec<(String, f64)>> {
        self.validations.fetch_add(1, Ordering::SeqCst);
        let batch = self.batch(&Cursor {
            seed: 1 << 40,
            index: 0,
        })?;
        let error = self.error(batch.get("x")?, batch.get("y")?)?.to_scalar::<f32>()?;
        Ok(vec![("error".to_string(), f64::from(error))])
    }

    fn sample(&self, folder: &Path, step: u64) -> TaskResult<Vec<std::path::PathBuf>> {
        let path = folder.join("surface.png");
        image::GrayImage::from_fn(8, 4, |x, y| image::Luma([(x * y + step as u32) as u8])).save(&path)?;
        Ok(vec![path])
    }

    fn export(&self, folder: &Path) -> TaskResult<()> {
        self.params.save(
            &folder.join("model.safetensors"),
            &Default::default(),
            Precision::F32,
        )?;
        Ok(())
    }
}

fn recipe(run_dir: &Path, sets: &str) -> Recipe {
    let text = "task = 'toy'\nseed = 3\n[train]\nmax_steps = 60\nlog_every = 7\nvalidate_every = 20\nema = 0.98\n\
                [optimiser]\nlr = 0.02\n[schedule]\nwarmup = 5\n";
    let mut table: toml::Table = text.parse().unwrap();
    for set in sets.split_whitespace() {
        let (path, value) = set.split_once('=').unwrap();
        let (section, key) = path.split_once('.').unwrap();
        let value = format!("v = {value}")
            .parse::<toml::Table>()
            .unwrap()
            .remove("v")
            .unwrap();
        table[section]
            .as_table_mut()
            .unwrap()
            .insert(key.to_string(), value);
    }
    Recipe::check(table, "toy".to_string(), run_dir).unwrap()
}

/// Stops a run after a number of batches, as Ctrl-C would.
struct StopAfter<'a>(&'a Toy, u64, Arc<std::sync::atomic::AtomicBool>);

impl Task for StopAfter<'_> {
    fn params(&self) -> &Params {
        self.0.params()
    }
    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        self.0.batch(cursor)
    }
    fn loss(&self, batch: &Batch, step: &Step) -> TaskResult<Losses> {
        if step.number + 1 == self.1 {
            self.2.store(true, Ordering::SeqCst);
        }
        self.0.loss(batch, step)
    }
    fn validate(&self) -> TaskResult<Vec<(String, f64)>> {
        self.0.validate()
    }
    fn export(&self, folder: &Path) -> TaskResult<()> {
        self.0.export(folder)
    }
}

fn train(toy: &dyn Task, recipe: &Recipe, options: &Options) -> Result<Outcome, TrainError> {
    run(toy, recipe, options, |_| ())
}

fn newest(run_dir: &Path) -> checkpoint::Checkpoint {
    checkpoint::load_newest(&run_dir.join("checkpoints"), |_| ())
        .unwrap()
        .unwrap()
}

fn resume() -> Options {
    Options {
        resume: true,
        ..Options::default()
    }
}

/// The metrics without what depends on the clock.
fn metrics(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let timeless = |line: &str| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        let object = line.as_object_mut().unwrap();
        object.remove("elapsed_s").unwrap();
        object.remove("samples_per_s");
        line
    };
    text.lines().map(timeless).collect()
}

fn bits(tensors: &std::collections::BTreeMap<String, Tensor>) -> Vec<(String, Vec<u32>)> {
    let bits = |t: &Tensor| {
        t.flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
            .into_iter()
            .map(f32::to_bits)
            .collect()
    };
    tensors
        .iter()
        .map(|(name, tensor)| (name.clone(), bits(tensor)))
        .collect()
}

#[test]
fn learns_logs_and_exports() {
    let folder = tempfile::tempdir().unwrap();
    let (toy, recipe) = (
        Toy::new(),
        recipe(folder.path(), "train.max_steps=300 train.sample_every=100"),
    );
    let mut reports = Vec::new();
    let outcome = run(&toy, &recipe, &Options::default(), |report| reports.push(report)).unwrap();
    assert!(outcome.finished && outcome.step == 300 && outcome.samples_per_s > 0.0);
    let lines = metrics(folder.path());
    let loss = |line: &Value| line["loss"].as_f64().unwrap();
    let losses: Vec<f64> = lines
        .iter()
        .filter(|line| line.get("loss").is_some())
        .map(loss)
        .collect();
    assert_eq!(losses.len(), 300 / 7);
    assert!(losses[losses.len() - 1] < 0.25 * losses[0], "{losses:?}");
    assert_eq!(reports.len(), losses.len());
    let line = &lines[0];
    assert_eq!(line["step"], 7);
    let sum = line["error"].as_f64().unwrap() + 1e-4 * line["size"].as_f64().unwrap();
    assert!((sum - loss(line)).abs() < 1e-6);
    assert!(line["lr"].as_f64().unwrap() > 0.0199 && line["grad_norm"].as_f64().unwrap() > 0.0);
    let figures: Vec<f64> = lines
        .iter()
        .filter_map(|line| line.get("validation/error")?.as_f64())
        .collect();
    assert_eq!(figures.len(), 15);
    assert_eq!(outcome.best, figures.iter().copied().reduce(f64::min));
    for step in [100, 200, 300] {
        assert!(
            folder
                .path()
                .join(format!("samples/step-{step:010}/surface.png"))
                .exists()
        );
    }
    // The export is the averaged model, which is not the model of the last step.
    let model = Frozen::open(&folder.path().join("model/model.safetensors"), &Device::Cpu).unwrap();
    let last = checkpoint::load_newest(&folder.path().join("checkpoints"), |_| ())
        .unwrap()
        .unwrap();
    assert_eq!(bits(model.tensors()), bits(&last.ema));
    assert_ne!(bits(model.tensors()), bits(&last.weights));
    assert!(folder.path().join("best.safetensors").exists());
    assert!(!folder.path().join("model.tmp").exists());
}

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

#[test]
fn undefined_gradients_are_skipped_then_stop_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let toy = Toy {
        spoiled: 30,
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
        spoiled: 59,
        ..Toy::new()
    };
    let outcome = train(&toy, &recipe(folder.path(), ""), &Options::default()).unwrap();
    assert!(outcome.finished && outcome.loss.is_some_and(f64::is_finite));
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

#[test]
fn a_run_is_not_overwritten_or_mixed() {
    let folder = tempfile::tempdir().unwrap();
    train(&Toy::new(), &recipe(folder.path(), ""), &Options::default()).unwrap();
    let message =
        |recipe: &Recipe, toy: &Toy, options: &Options| train(toy, recipe, options).unwrap_err().to_string();
    let again = message(&recipe(folder.path(), ""), &Toy::new(), &Options::default());
    assert!(again.contains("holds a run already"), "{again}");
    let mut other = recipe(folder.path(), "");
    other.seed = 4;
    assert!(message(&other, &Toy::new(), &resume()).contains("its seed is 3, the recipe's 4"));
    let toy = Toy::new();
    candle_nn::linear(2, 2, toy.params.builder().pp("third")).unwrap();
    let message = message(&recipe(folder.path(), ""), &toy, &resume());
    assert!(
        message.contains("2 missing: third.bias, third.weight"),
        "{message}"
    );
}

#[test]
fn a_failing_task_is_one_line_and_keeps_its_checkpoint() {
    struct Failing(Toy);
    impl Task for Failing {
        fn params(&self) -> &Params {
            self.0.params()
        }
        fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
            if cursor.index == 12 {
                Err("clip 12 is unreadable\nwith details".into())
            } else {
                self.0.batch(cursor)
            }
        }
        fn loss(&self, batch: &Batch, step: &Step) -> TaskResult<Losses> {
            self.0.loss(batch, step)
        }
        fn export(&self, _: &Path) -> TaskResult<()> {
            Ok(())
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let sets = "train.checkpoint_seconds=0.000001";
    let error = train(
        &Failing(Toy::new()),
        &recipe(folder.path(), sets),
        &Options::default(),
    )
    .unwrap_err();
    assert_eq!(error.to_string(), "step 12: batch: clip 12 is unreadable");
    // The steps since the last checkpoint are kept too, without the part of the batch that failed.
    let last = newest(folder.path()).state;
    assert_eq!((last.step, last.samples), (12, 12 * 16));
}

#[test]
fn weights_are_the_same_for_any_number_of_threads() {
    let weights = |threads: usize| {
        let folder = tempfile::tempdir().unwrap();
        let toy = Toy::new();
        let sets = format!("train.threads={threads} train.max_steps=20");
        train(&toy, &recipe(folder.path(), &sets), &Options::default()).unwrap();
        let vars = toy
            .params
            .vars()
            .into_iter()
            .map(|(name, var)| (name, var.as_detached_tensor()));
        bits(&vars.collect())
    };
    assert_eq!(weights(1), weights(4));
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

/// A step takes far less time than a checkpoint: the run does not wait, and says once that it is late.
#[test]
fn saving_does_not_hold_up_training() {
    let folder = tempfile::tempdir().unwrap();
    let mut notes = Vec::new();
    let outcome = run(
        &Toy::new(),
        &recipe(folder.path(), "train.checkpoint_seconds=1e-9 train.keep=1000"),
        &Options::default(),
        |report| {
            if let Report::Note(line) = report {
                notes.push(line);
            }
        },
    )
    .unwrap();
    assert!(outcome.finished);
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert!(notes[0].contains("which is still being written"), "{notes:?}");
    let kept = checkpoint::list(&folder.path().join("checkpoints")).unwrap();
    assert!(kept.len() < 60, "every step was waited for: {}", kept.len());
    assert_eq!(newest(folder.path()).state.step, 60);
}

/// What is written beside the steps is the state between two of them: each checkpoint leads to the same end.
#[test]
fn any_checkpoint_of_a_run_goes_on_to_the_same_end() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let sets = "train.checkpoint_seconds=1e-9 train.keep=1000 train.accumulate=2";
    train(&Toy::new(), &recipe(&at("whole"), sets), &Options::default()).unwrap();
    let end = newest(&at("whole"));
    let all = checkpoint::list(&at("whole/checkpoints")).unwrap();
    assert!(all.len() > 3, "{all:?}");
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

/// A task that puts a file where checkpoints go, in its tenth step.
struct Spoiler {
    toy: Toy,
    root: std::path::PathBuf,
}

impl Task for Spoiler {
    fn params(&self) -> &Params {
        self.toy.params()
    }
    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        self.toy.batch(cursor)
    }
    fn loss(&self, batch: &Batch, step: &Step) -> TaskResult<Losses> {
        if step.number == 9 {
            fs::rename(&self.root, self.root.with_file_name("aside"))?;
            fs::write(&self.root, "no folder")?;
        }
        self.toy.loss(batch, step)
    }
    fn export(&self, folder: &Path) -> TaskResult<()> {
        self.toy.export(folder)
    }
}

#[test]
fn a_checkpoint_that_cannot_be_written_ends_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("checkpoints");
    let task = Spoiler {
        toy: Toy::new(),
        root: root.clone(),
    };
    let few = recipe(folder.path(), "train.max_steps=9");
    train(&Toy::new(), &few, &Options::default()).unwrap();
    fs::remove_dir_all(folder.path().join("model")).unwrap();
    // More steps than the error needs to arrive.
    let sets = "train.checkpoint_seconds=1e-9 train.max_steps=1000000";
    let error = train(&task, &recipe(folder.path(), sets), &resume()).unwrap_err();
    let message = error.to_string();
    assert!(
        matches!(error, TrainError::Io { .. } | TrainError::Params(_)) && message.contains("checkpoints"),
        "{message}"
    );
    assert!(!folder.path().join("model").exists());
    fs::remove_file(&root).unwrap();
    fs::rename(folder.path().join("aside"), &root).unwrap();
    assert_eq!(newest(folder.path()).state.step, 9);
    let sets = "train.max_steps=20";
    let outcome = train(&Toy::new(), &recipe(folder.path(), sets), &resume()).unwrap();
    assert_eq!((outcome.step, outcome.finished), (20, true));
}

#[test]
fn two_runs_do_not_share_a_folder() {
    /// Starts a second run in the folder of the first one.
    struct Twin<'a>(Toy, &'a Path);
    impl Task for Twin<'_> {
        fn params(&self) -> &Params {
            self.0.params()
        }
        fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
            self.0.batch(cursor)
        }
        fn loss(&self, batch: &Batch, step: &Step) -> TaskResult<Losses> {
            train(&Toy::new(), &recipe(self.1, ""), &resume())?;
            self.0.loss(batch, step)
        }
        fn export(&self, _: &Path) -> TaskResult<()> {
            Ok(())
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let twin = Twin(Toy::new(), folder.path());
    let error = train(&twin, &recipe(folder.path(), ""), &Options::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "step 0: loss: {}: another run is at work in this folder",
            folder.path().display()
        )
    );
    train(&Toy::new(), &recipe(folder.path(), ""), &resume()).unwrap();
}

/// Through shards of a limited size: weights come out exactly, the rest nearly.
#[test]
fn a_state_that_was_exported_starts_another_run() {
    use checkpoint::portable::{self, SMALLEST_SHARD};
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let root = at("first/checkpoints");
    let no_checkpoint = portable::export(&root, &at("state"), SMALLEST_SHARD, |_| ()).unwrap_err();
    assert!(
        no_checkpoint
            .to_string()
            .ends_with("checkpoints: no checkpoint to export")
    );

    train(&Toy::new(), &recipe(&at("first"), ""), &Options::default()).unwrap();
    let small = portable::export(&root, &at("state"), SMALLEST_SHARD - 1, |_| ()).unwrap_err();
    assert!(
        small.to_string().contains("65535 bytes, expected 65536 or more"),
        "{small}"
    );
    let exported = portable::export(&root, &at("state"), SMALLEST_SHARD, |_| ()).unwrap();
    assert_eq!((exported.step, exported.shards), (60, 4));
    let again = portable::export(&root, &at("state"), SMALLEST_SHARD, |_| ()).unwrap_err();
    assert!(again.to_string().contains("not empty"), "{again}");
    let file = portable::export(&root, &at("first/recipe.toml"), SMALLEST_SHARD, |_| ()).unwrap_err();
    assert!(file.to_string().contains("recipe.toml"), "{file}");

    let options = Options {
        import: Some(at("state")),
        ..Options::default()
    };
    // Nothing is left to do but to finish.
    let outcome = train(&Toy::new(), &recipe(&at("second"), ""), &options).unwrap();
    assert_eq!((outcome.step, outcome.finished), (60, true));
    let (first, second) = (newest(&at("first")), newest(&at("second")));
    assert_eq!(bits(&first.weights), bits(&second.weights));
    let apart = |a: &Tensor, b: &Tensor| {
        let most = |t: Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        (most((a - b).unwrap()), most(a.clone()))
    };
    for (name, tensor) in &first.ema {
        let (off, _) = apart(tensor, &second.ema[name]);
        let (gap, _) = apart(tensor, &first.weights[name]);
        assert!(off <= gap / 128.0, "{name}: {off} of {gap}");
    }
    for (name, tensor) in &first.optimiser {
        let (off, size) = apart(tensor, &second.optimiser[name]);
        assert!(off <= size / 128.0, "{name}: {off} of {size}");
    }
    assert_ne!(bits(&first.optimiser), bits(&second.optimiser));

    // It goes on, and not over another run.
    let longer = recipe(&at("third"), "train.max_steps=70");
    let outcome = train(&Toy::new(), &longer, &options).unwrap();
    assert_eq!((outcome.step, outcome.finished), (70, true));
    let error = train(&Toy::new(), &longer, &options).unwrap_err().to_string();
    assert!(error.contains("holds a run already"), "{error}");
    // Another model is refused, and nothing is written that looks like a run.
    let other = Toy::new();
    candle_nn::linear(2, 2, other.params.builder().pp("third")).unwrap();
    let error = train(&other, &recipe(&at("fourth"), ""), &options)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("state: not the weights of this model: 2 missing: third.bias, third.weight"),
        "{error}"
    );
    assert!(checkpoint::list(&at("fourth/checkpoints")).unwrap().is_empty());
}

#[test]
fn damage_to_an_exported_state_is_named() {
    use checkpoint::portable::{self, SMALLEST_SHARD};
    /// A model whose files need several shards each.
    fn wide() -> Toy {
        let toy = Toy::new();
        candle_nn::linear(200, 200, toy.params.builder().pp("unused")).unwrap();
        toy
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let sets = "train.max_steps=2";
    train(&wide(), &recipe(&at("run"), sets), &Options::default()).unwrap();
    let export = || {
        let _ = fs::remove_dir_all(at("state"));
        portable::export(&at("run/checkpoints"), &at("state"), SMALLEST_SHARD, |_| ()).unwrap()
    };
    let exported = export();
    let sizes: Vec<u64> = fs::read_dir(at("state"))
        .unwrap()
        .map(|item| item.unwrap().metadata().unwrap().len())
        .collect();
    assert_eq!(sizes.len(), exported.shards + 1);
    assert!(
        exported.shards > 8 && sizes.iter().all(|size| *size <= SMALLEST_SHARD),
        "{sizes:?}"
    );
    // One after another the shards of a name are a file that other programs read.
    let mut whole = Vec::new();
    for number in 0..3 {
        whole.extend(fs::read(at(&format!("state/weights.safetensors.{number:05}"))).unwrap());
    }
    fs::write(at("whole.safetensors"), whole).unwrap();
    let weights = Frozen::open(&at("whole.safetensors"), &Device::Cpu).unwrap();
    assert_eq!(bits(weights.tensors()), bits(&newest(&at("run")).weights));

    fn edit(path: &Path, with: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(path).unwrap();
        with(&mut bytes);
        fs::write(path, bytes).unwrap();
    }
    type Spoil = fn(&Path);
    let damage: [(Spoil, &str); 6] = [
        (
            |state| fs::remove_file(state.join("optimiser.safetensors.00001")).unwrap(),
            "optimiser.safetensors.00001: No such file",
        ),
        (
            |state| edit(&state.join("weights.safetensors.00002"), |bytes| bytes[90] ^= 4),
            "weights.safetensors.00002: its content changed",
        ),
        (
            |state| edit(&state.join("ema.safetensors.00000"), |bytes| bytes.truncate(7)),
            "ema.safetensors.00000: 7 bytes, expected",
        ),
        (
            |state| fs::remove_file(state.join("manifest.json")).unwrap(),
            "manifest.json: No such file",
        ),
        (
            |state| {
                edit(&state.join("manifest.json"), |bytes| {
                    let text = String::from_utf8_lossy(bytes).replace("\"format\": 1", "\"format\": 7");
                    *bytes = text.into_bytes();
                });
            },
            "format 7 is newer than this program, which reads 1",
        ),
        (
            |state| {
                edit(&state.join("manifest.json"), |bytes| {
                    let text = String::from_utf8_lossy(bytes).replace("state.json", "../state.json");
                    *bytes = text.into_bytes();
                });
            },
            "the manifest names `../state.json`, which is unknown",
        ),
    ];
    for (spoil, words) in damage {
        export();
        spoil(&at("state"));
        let options = Options {
            import: Some(at("state")),
            ..Options::default()
        };
        let error = train(&wide(), &recipe(&at("new"), sets), &options)
            .unwrap_err()
            .to_string();
        assert!(error.contains(words) && !error.contains('\n'), "{words}: {error}");
        assert!(checkpoint::list(&at("new/checkpoints")).unwrap().is_empty());
    }
}
