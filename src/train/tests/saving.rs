//! What runs keep, and what they refuse to write over.

use super::*;

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
