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

mod portable;
mod resume;
mod saving;
mod skipping;

/// Fits a small network to a smooth function of two numbers.
struct Toy {
    params: Params,
    layers: [Linear; 2],
    /// Batches with these numbers hold an undefined value.
    spoiled: std::ops::Range<u64>,
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
            spoiled: 0..0,
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
        let spoil = if self.spoiled.contains(&cursor.index) {
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

/// Steps of a list are validated, the last one once, and the best weights are kept only where that is wanted.
#[test]
fn listed_steps_are_validated() {
    let folder = tempfile::tempdir().unwrap();
    let sets = "train.validate_every=0 train.validate_at=[3,4,17,60,90] train.keep_best=false";
    let outcome = train(&Toy::new(), &recipe(folder.path(), sets), &Options::default()).unwrap();
    let lines = metrics(folder.path());
    let validated = lines.iter().filter(|line| line.get("validation/error").is_some());
    let steps: Vec<u64> = validated.map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [3, 4, 17, 60]);
    assert!(outcome.best.is_some());
    assert!(!folder.path().join("best.safetensors").exists());
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
