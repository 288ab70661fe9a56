//! Checkpoints: everything that a run needs to go on as if it had never stopped.
//!
//! A checkpoint is a folder `step-NNNNNNNNNN` with `weights.safetensors`, `optimiser.safetensors` (moments and the
//! sums of the log interval that is under way), `ema.safetensors`, `state.json`, and last `manifest.json` with the size
//! and SHA-256 of every file. Generators and the place in the data need no file: both follow from the seed and the step.
//!
//! It is written under another name, every file synced, renamed, and the folder of checkpoints synced; older ones are
//! removed only afterwards: whenever the process dies, the newest complete checkpoint is still there. The run does not
//! wait for any of this: it makes a copy on the host (`snapshot.rs`) and leaves the rest to the thread of a [`Saver`].

mod lock;
mod manifest;
pub mod portable;
mod saver;
mod snapshot;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use fulgur_lightnet::params::Precision;
use fulgur_lightnet::params::file;
use serde::{Deserialize, Serialize};

use super::error::{TrainError, one_line};
use manifest::{
    Entry, LARGEST_JSON, MANIFEST, Manifest, Writer, parse, read_manifest, sync_folder, to_json, unusable,
};

pub(crate) use lock::Lock;
pub use saver::Saver;

const FORMAT: u32 = 1;
const STATE: &str = "state.json";
const WEIGHTS: &str = "weights.safetensors";
const OPTIMISER: &str = "optimiser.safetensors";
const EMA: &str = "ema.safetensors";
const PREFIX: &str = "step-";
const UNFINISHED: &str = ".tmp";

/// The numbers of a run between two steps.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Steps done, skipped ones included.
    pub step: u64,
    /// Seconds of training, over all sessions.
    pub elapsed_s: f64,
    /// Updates made by the optimiser.
    pub updates: u64,
    /// Steps skipped because gradients were not finite.
    pub skipped: u64,
    /// Of those, how many in a row at the end.
    pub skipped_in_a_row: u64,
    /// Seed of the run.
    pub seed: u64,
    /// The lowest validation figure so far.
    #[serde(with = "exact")]
    pub best: Option<f64>,
    /// Mean loss of the last log interval.
    #[serde(with = "exact")]
    pub loss: Option<f64>,
    /// Steps in the log interval that is under way.
    pub window_steps: u64,
    /// Samples seen.
    pub samples: u64,
    /// The recipe, as text, to tell another run's checkpoint.
    pub recipe: String,
}

/// A whole checkpoint in memory.
#[derive(Debug, Default)]
pub struct Checkpoint {
    /// The numbers.
    pub state: State,
    /// Weights by name, f32.
    pub weights: BTreeMap<String, Tensor>,
    /// Moments and window sums by name, f32.
    pub optimiser: BTreeMap<String, Tensor>,
    /// Averaged weights by name, f32; empty where the run keeps none.
    pub ema: BTreeMap<String, Tensor>,
}

impl Checkpoint {
    /// Makes this a copy of the present tensors, on the host, in the memory that it has already.
    ///
    /// # Errors
    /// The host is out of memory, or the device failed.
    pub fn copy(
        &mut self,
        state: State,
        weights: &BTreeMap<String, Tensor>,
        optimiser: &BTreeMap<String, Tensor>,
        ema: &BTreeMap<String, Tensor>,
    ) -> candle_core::Result<()> {
        self.state = state;
        snapshot::take(&mut self.weights, weights)?;
        snapshot::take(&mut self.optimiser, optimiser)?;
        snapshot::take(&mut self.ema, ema)
    }

    /// The files of tensors: name, tensors and how they are stored. `compact` ones hold moments in 16 bits, and averages
    /// as differences from the weights in 16 bits.
    fn files(&self, compact: bool) -> candle_core::Result<Vec<TensorFile<'_>>> {
        let precision = if compact { Precision::BF16 } else { Precision::F32 };
        let mut files = vec![
            (WEIGHTS, Cow::Borrowed(&self.weights), Precision::F32),
            (OPTIMISER, Cow::Borrowed(&self.optimiser), precision),
        ];
        if !self.ema.is_empty() {
            let ema = if compact {
                Cow::Owned(combine(&self.ema, &self.weights, Tensor::sub)?)
            } else {
                Cow::Borrowed(&self.ema)
            };
            files.push((EMA, ema, precision));
        }
        Ok(files)
    }

    /// Takes up what the file `name` of `folder` holds, whose bytes have been verified.
    fn take_file(&mut self, folder: &Path, name: &str, bytes: &[u8]) -> Result<(), TrainError> {
        let slot = match name {
            WEIGHTS => &mut self.weights,
            OPTIMISER => &mut self.optimiser,
            EMA => &mut self.ema,
            STATE => {
                self.state = parse(folder, name, bytes)?;
                return Ok(());
            }
            _ => {
                return Err(unusable(
                    folder,
                    format!("the manifest names `{name}`, which is unknown"),
                ));
            }
        };
        *slot = file::decode(&folder.join(name), bytes, &Device::Cpu)?.tensors;
        for tensor in slot.values_mut() {
            *tensor = tensor.to_dtype(DType::F32)?;
        }
        Ok(())
    }

    /// Widens averages that were stored as differences.
    fn widen_ema(&mut self, folder: &Path) -> Result<(), TrainError> {
        self.ema = combine(&self.ema, &self.weights, Tensor::add)
            .map_err(|error| unusable(folder, format!("{EMA}: {}", one_line(&error.to_string()))))?;
        Ok(())
    }
}

type TensorFile<'a> = (&'static str, Cow<'a, BTreeMap<String, Tensor>>, Precision);

/// Refuses a manifest that names other files than `names`, or lacks one that every checkpoint has.
fn check_names<'a>(folder: &Path, names: impl Iterator<Item = &'a String>) -> Result<(), TrainError> {
    let names: Vec<&str> = names.map(String::as_str).collect();
    let known = [WEIGHTS, OPTIMISER, EMA, STATE];
    if let Some(name) = names.iter().find(|name| !known.contains(name)) {
        return Err(unusable(
            folder,
            format!("the manifest names `{name}`, which is unknown"),
        ));
    }
    match [WEIGHTS, OPTIMISER, STATE]
        .iter()
        .find(|name| !names.contains(name))
    {
        Some(name) => Err(unusable(folder, format!("the manifest does not list {name}"))),
        None => Ok(()),
    }
}

/// Numbers as the shortest text that reads back as the same bits: JSON numbers may lose the last one.
mod exact {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(value: &Option<f64>, out: S) -> Result<S::Ok, S::Error> {
        value.map(|value| value.to_string()).serialize(out)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<f64>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        text.map(|text| text.parse().map_err(D::Error::custom))
            .transpose()
    }
}

/// Writes `checkpoint` into the folder of checkpoints `root`, then removes older ones, all but the newest `keep`. Where a
/// whole checkpoint of its step is there already, that one stays.
///
/// With `compact` moments are stored as bf16, and averages as bf16 differences from the weights.
///
/// # Errors
/// The folder is not writable or the disk is full: then nothing that was there before is lost.
pub fn save(root: &Path, checkpoint: &Checkpoint, compact: bool, keep: usize) -> Result<PathBuf, TrainError> {
    let name = format!("{PREFIX}{:010}", checkpoint.state.step);
    let (temporary, target) = (root.join(format!("{name}{UNFINISHED}")), root.join(name));
    if !root.is_dir() {
        fs::create_dir_all(root).map_err(TrainError::io(root))?;
        if let Some(run) = root.parent().filter(|run| !run.as_os_str().is_empty()) {
            sync_folder(run)?;
        }
    }
    remove_unfinished(root)?;
    if target.exists() && verify(&target).is_ok() {
        // A run that was resumed and stopped at once; replacing a folder would leave a moment without either.
        return Ok(target);
    }
    let written = write_into(&temporary, checkpoint, compact);
    if let Err(error) = written {
        // What failed is reported; leftovers are removed by the next attempt too.
        let _ = fs::remove_dir_all(&temporary);
        return Err(error);
    }
    if target.exists() {
        fs::remove_dir_all(&target).map_err(TrainError::io(&target))?;
    }
    fs::rename(&temporary, &target).map_err(TrainError::io(&target))?;
    sync_folder(root)?;
    remove_old(root, checkpoint.state.step, keep.max(1))?;
    Ok(target)
}

fn write_into(folder: &Path, checkpoint: &Checkpoint, compact: bool) -> Result<(), TrainError> {
    fs::create_dir(folder).map_err(TrainError::io(folder))?;
    let mut files = BTreeMap::new();
    for (name, tensors, precision) in checkpoint.files(compact)? {
        let path = folder.join(name);
        file::write(&path, &tensors, &BTreeMap::new(), precision)?;
        files.insert(name.to_string(), Entry::of_file(&path)?);
    }
    let state = to_json(&folder.join(STATE), &checkpoint.state)?;
    manifest::write(&folder.join(STATE), &state)?;
    files.insert(STATE.to_string(), Entry::of(&state));
    let manifest = Manifest {
        format: FORMAT,
        compact,
        writer: Some(Writer::this()),
        files,
    };
    let path = folder.join(MANIFEST);
    manifest::write(&path, &to_json(&path, &manifest)?)
}

/// Removes checkpoints before `step` that have `keep` complete ones after them, that of `step` included. Later ones
/// are those that a resumed run passed over: they neither count nor go before the run has overtaken them.
fn remove_old(root: &Path, step: u64, keep: usize) -> Result<(), TrainError> {
    let mut kept = 0;
    for (number, folder) in numbered(root)? {
        if kept >= keep {
            // Under another name first: a removal that is cut short leaves nothing that looks like a checkpoint.
            let leaving = root.join(format!("{PREFIX}{number:010}{UNFINISHED}"));
            fs::rename(&folder, &leaving).map_err(TrainError::io(&folder))?;
            fs::remove_dir_all(&leaving).map_err(TrainError::io(&leaving))?;
        } else if number <= step && is_complete(&folder) {
            kept += 1;
        }
    }
    Ok(())
}

/// Whether all files are there in their full length; their content is not read.
fn is_complete(folder: &Path) -> bool {
    let manifest: Result<Manifest, _> = read_manifest(folder, FORMAT);
    manifest.is_ok_and(|manifest| {
        manifest
            .files
            .iter()
            .all(|(name, entry)| entry.fits(&folder.join(name)))
    })
}

/// Reads the newest checkpoint under `root` that is whole; none where there is no checkpoint at all. Each one that is
/// passed over for an older one is reported to `skipped`.
///
/// # Errors
/// There are checkpoints and none is usable, or `root` is unreadable.
pub fn load_newest(
    root: &Path,
    mut skipped: impl FnMut(&TrainError),
) -> Result<Option<Checkpoint>, TrainError> {
    let mut last = None;
    for folder in list(root)? {
        if let Some(error) = last.take() {
            skipped(&error);
        }
        match load(&folder) {
            Ok(checkpoint) => return Ok(Some(checkpoint)),
            Err(error) => last = Some(error),
        }
    }
    last.map_or(Ok(None), Err)
}

/// Reads one checkpoint and verifies every byte of it.
///
/// # Errors
/// A file is missing, changed or damaged, or the checkpoint is of another format.
pub fn load(folder: &Path) -> Result<Checkpoint, TrainError> {
    let mut checkpoint = Checkpoint::default();
    let compact = read_files(folder, |name, bytes| checkpoint.take_file(folder, name, bytes))?;
    if compact {
        checkpoint.widen_ema(folder)?;
    }
    Ok(checkpoint)
}

/// Verifies every byte of a checkpoint.
fn verify(folder: &Path) -> Result<(), TrainError> {
    read_files(folder, |_, _| Ok(())).map(drop)
}

/// Gives each file of a checkpoint to `take` after it was verified; answers whether the checkpoint is compact.
fn read_files(
    folder: &Path,
    mut take: impl FnMut(&str, &[u8]) -> Result<(), TrainError>,
) -> Result<bool, TrainError> {
    let manifest: Manifest = read_manifest(folder, FORMAT)?;
    check_names(folder, manifest.files.keys())?;
    for (name, entry) in &manifest.files {
        if name == STATE && entry.bytes > LARGEST_JSON {
            let reason = format!("{name}: {} bytes, at most {LARGEST_JSON} are read", entry.bytes);
            return Err(unusable(folder, reason));
        }
        let mut bytes = Vec::new();
        entry.read_into(&mut bytes, folder, name)?;
        take(name, &bytes)?;
    }
    Ok(manifest.compact)
}

/// Finished checkpoints under `root`, newest first.
pub(super) fn list(root: &Path) -> Result<Vec<PathBuf>, TrainError> {
    Ok(numbered(root)?.into_iter().map(|(_, folder)| folder).collect())
}

/// Finished checkpoints under `root` with their steps, newest first.
fn numbered(root: &Path) -> Result<Vec<(u64, PathBuf)>, TrainError> {
    let mut folders = Vec::new();
    if root.is_dir() {
        for item in fs::read_dir(root).map_err(TrainError::io(root))? {
            let name = item.map_err(TrainError::io(root))?.file_name();
            let number = name
                .to_str()
                .and_then(|name| name.strip_prefix(PREFIX)?.parse::<u64>().ok());
            folders.extend(number.map(|number| (number, root.join(name))));
        }
    }
    folders.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
    Ok(folders)
}

fn remove_unfinished(root: &Path) -> Result<(), TrainError> {
    for item in fs::read_dir(root).map_err(TrainError::io(root))? {
        let path = item.map_err(TrainError::io(root))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(PREFIX) && name.ends_with(UNFINISHED) {
            fs::remove_dir_all(&path).map_err(TrainError::io(&path))?;
        }
    }
    Ok(())
}

fn combine(
    left: &BTreeMap<String, Tensor>,
    right: &BTreeMap<String, Tensor>,
    with: impl Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>,
) -> candle_core::Result<BTreeMap<String, Tensor>> {
    let one = |(name, tensor): (&String, &Tensor)| {
        let Some(other) = right.get(name) else {
            candle_core::bail!("no weight `{name}` for its average")
        };
        Ok((name.clone(), with(tensor, other)?))
    };
    left.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(step: u64) -> Checkpoint {
        let tensor =
            |shift: f32| Tensor::new(&[0.1f32 + shift, -7.0, 1e-9 * step as f32], &Device::Cpu).unwrap();
        let one = |name: &str, shift| BTreeMap::from([(name.to_string(), tensor(shift))]);
        let state = State {
            step,
            elapsed_s: 12.5,
            best: Some(1.0 / 3.0),
            ..State::default()
        };
        Checkpoint {
            state,
            weights: one("w", 0.0),
            optimiser: one("first.w", 0.3),
            ema: one("w", 0.001),
        }
    }

    fn values(tensors: &BTreeMap<String, Tensor>, name: &str) -> Vec<f32> {
        tensors[name].to_vec1().unwrap()
    }

    fn newest(root: &Path) -> (u64, Vec<String>) {
        let mut skipped = Vec::new();
        let found = load_newest(root, |error| skipped.push(error.to_string()))
            .unwrap()
            .unwrap();
        (found.state.step, skipped)
    }

    #[test]
    fn returns_every_bit_and_keeps_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("checkpoints");
        assert!(load_newest(&root, |_| ()).unwrap().is_none());
        for step in [5, 90, 1000, 20000] {
            save(&root, &sample(step), false, 2).unwrap();
        }
        assert_eq!(list(&root).unwrap().len(), 2);
        let (read, expected) = (load_newest(&root, |_| ()).unwrap().unwrap(), sample(20000));
        assert_eq!(read.state, expected.state);
        assert_eq!(values(&read.weights, "w"), values(&expected.weights, "w"));
        assert_eq!(
            values(&read.optimiser, "first.w"),
            values(&expected.optimiser, "first.w")
        );
        assert_eq!(values(&read.ema, "w"), values(&expected.ema, "w"));
    }

    #[test]
    fn compact_is_smaller_and_close() {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), &sample(3), true, 2).unwrap();
        let (read, expected) = (load_newest(folder.path(), |_| ()).unwrap().unwrap(), sample(3));
        assert_eq!(values(&read.weights, "w"), values(&expected.weights, "w"));
        for (found, exact) in values(&read.ema, "w").iter().zip(values(&expected.ema, "w")) {
            assert!((found - exact).abs() < 1e-5);
        }
        let moment = values(&read.optimiser, "first.w")[0];
        assert!((moment - 0.4).abs() < 0.4 / 256.0 && moment != 0.4);
    }

    /// However a write ends early, the checkpoint before it is found.
    #[test]
    fn survives_a_kill_at_any_file_of_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        let (root, other) = (folder.path().join("run"), folder.path().join("other"));
        save(&root, &sample(10), false, 2).unwrap();
        let whole = save(&other, &sample(20), false, 2).unwrap();
        let files = [WEIGHTS, OPTIMISER, EMA, STATE, MANIFEST];
        for killed in 0..files.len() {
            // Files before the kill are whole, the one that was being written is cut short.
            let unfinished = root.join("step-0000000020.tmp");
            fs::create_dir_all(&unfinished).unwrap();
            for (number, name) in files.iter().enumerate().take(killed + 1) {
                let mut bytes = fs::read(whole.join(name)).unwrap();
                bytes.truncate(if number == killed {
                    bytes.len() / 2
                } else {
                    bytes.len()
                });
                fs::write(unfinished.join(name), bytes).unwrap();
            }
            assert_eq!(newest(&root), (10, vec![]));
            // The next write clears up and succeeds.
            save(&root, &sample(11 + killed as u64), false, 1).unwrap();
            assert!(!unfinished.exists());
            save(&root, &sample(10), false, 9).unwrap();
            for made in list(&root)
                .unwrap()
                .iter()
                .filter(|made| !made.ends_with("step-0000000010"))
            {
                fs::remove_dir_all(made).unwrap();
            }
        }
    }

    #[test]
    fn damage_is_named_and_the_one_before_is_used() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fn change(path: PathBuf, with: impl FnOnce(&mut Vec<u8>)) {
            let mut bytes = fs::read(&path).unwrap();
            with(&mut bytes);
            fs::write(path, bytes).unwrap();
        }
        type Spoil = fn(&Path);
        let damage: [(&str, Spoil, &str); 7] = [
            (
                "flipped",
                |folder| change(folder.join(WEIGHTS), |bytes| *bytes.last_mut().unwrap() ^= 1),
                "weights.safetensors: its content changed",
            ),
            (
                "cut",
                |folder| change(folder.join(EMA), |bytes| bytes.truncate(9)),
                "ema.safetensors: 9 bytes, expected",
            ),
            (
                "absent",
                |folder| fs::remove_file(folder.join(OPTIMISER)).unwrap(),
                "optimiser.safetensors: No such file",
            ),
            (
                "no manifest",
                |folder| fs::remove_file(folder.join(MANIFEST)).unwrap(),
                "manifest.json: No such file",
            ),
            (
                "newer",
                |folder| {
                    change(folder.join(MANIFEST), |bytes| {
                        let text = String::from_utf8_lossy(bytes).replace("\"format\": 1", "\"format\": 2");
                        *bytes = text.into_bytes();
                    });
                },
                "format 2 is newer than this program, which reads 1",
            ),
            (
                "edited",
                |folder| {
                    change(folder.join(STATE), |bytes| {
                        let text = String::from_utf8_lossy(bytes).replace("\"step\": 20", "\"step\": 90");
                        *bytes = text.into_bytes();
                    });
                },
                "state.json: its content changed",
            ),
            (
                "led elsewhere",
                |folder| {
                    change(folder.join(MANIFEST), |bytes| {
                        let text = String::from_utf8_lossy(bytes).replace("\"ema.", "\"../ema.");
                        *bytes = text.into_bytes();
                    });
                },
                "the manifest names `../ema.safetensors`, which is unknown",
            ),
        ];
        for (name, spoil, words) in damage {
            save(root, &sample(10), false, 2).unwrap();
            spoil(&save(root, &sample(20), false, 2).unwrap());
            let (step, skipped) = newest(root);
            assert_eq!(step, 10, "{name}");
            assert!(
                skipped.len() == 1 && skipped[0].contains(words),
                "{name}: {skipped:?}"
            );
            assert!(skipped[0].contains("step-0000000020") && !skipped[0].contains('\n'));
        }
        fs::remove_dir_all(root.join("step-0000000010")).unwrap();
        assert!(load_newest(root, |_| ()).is_err());
    }

    /// The manifest promises more than there is room for: refused before memory is taken, by the length of the file.
    #[test]
    fn lengths_are_compared_before_memory_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let made = save(folder.path(), &sample(10), false, 2).unwrap();
        let path = made.join(MANIFEST);
        let mut text: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        text["files"][WEIGHTS]["bytes"] = u64::MAX.into();
        fs::write(&path, text.to_string()).unwrap();
        let message = load(&made).unwrap_err().to_string();
        assert!(message.contains("expected 18446744073709551615"), "{message}");
    }

    #[test]
    fn the_manifest_says_who_wrote_it() {
        let folder = tempfile::tempdir().unwrap();
        let made = save(folder.path(), &sample(10), false, 2).unwrap();
        let text: serde_json::Value =
            serde_json::from_slice(&fs::read(made.join(MANIFEST)).unwrap()).unwrap();
        assert_eq!(text["writer"]["version"], env!("CARGO_PKG_VERSION"));
        let revision = option_env!("FULGUR_REVISION").filter(|revision| !revision.is_empty());
        assert_eq!(text["writer"]["revision"].as_str(), revision);
    }

    /// A run that went back to step 10, because the checkpoint of step 30 is damaged, keeps what it writes from there.
    #[test]
    fn damaged_checkpoints_do_not_displace_whole_ones() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let steps = || {
            let found = numbered(root).unwrap().into_iter();
            found.map(|(step, _)| step).collect::<Vec<_>>()
        };
        save(root, &sample(10), false, 1).unwrap();
        let damaged = save(root, &sample(30), false, 2).unwrap();
        fs::write(damaged.join(EMA), "short").unwrap();
        save(root, &sample(11), false, 1).unwrap();
        assert_eq!(steps(), [30, 11]);
        assert_eq!(newest(root).0, 11);
        // Overtaken, it does not count among those that are kept, and goes with the first one that is too old.
        save(root, &sample(31), false, 2).unwrap();
        assert_eq!(steps(), [31, 30, 11]);
        save(root, &sample(32), false, 2).unwrap();
        assert_eq!(steps(), [32, 31]);
        assert!(
            !fs::read_dir(root)
                .unwrap()
                .any(|item| { item.unwrap().file_name().to_string_lossy().ends_with(UNFINISHED) })
        );
    }
}
