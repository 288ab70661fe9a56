//! Checkpoints: everything that a run needs to go on as if it had never stopped.
//!
//! A checkpoint is a folder `step-NNNNNNNNNN` with `weights.safetensors`, `optimiser.safetensors` (moments and the
//! sums of the log interval that is under way), `ema.safetensors`, `state.json`, and last `manifest.json` with the size
//! and SHA-256 of every file. It is written under another name, synced and renamed, and older ones are removed only
//! afterwards: whenever the process dies, the newest complete checkpoint is still there.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use fulgur_lightnet::params::Precision;
use fulgur_lightnet::params::file::{self, write_atomically};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::TrainError;

const FORMAT: u32 = 1;
const MANIFEST: &str = "manifest.json";
const STATE: &str = "state.json";
const WEIGHTS: &str = "weights.safetensors";
const OPTIMISER: &str = "optimiser.safetensors";
const EMA: &str = "ema.safetensors";
const PREFIX: &str = "step-";
const UNFINISHED: &str = ".tmp";
/// Manifest and state are small; larger ones are not ours.
const LARGEST_JSON: u64 = 16 << 20;

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

#[derive(Debug, Deserialize, Serialize)]
struct Manifest {
    format: u32,
    /// Moments and averages in 16 bits: small, but the run does not go on bit for bit.
    compact: bool,
    files: BTreeMap<String, Entry>,
}

#[derive(Debug, Deserialize, PartialEq, Serialize)]
struct Entry {
    bytes: u64,
    sha256: String,
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

/// Writes `checkpoint` into the folder of checkpoints `root`, then removes all but the newest `keep`.
///
/// With `compact` moments are stored as bf16, and averages as bf16 differences from the weights.
///
/// # Errors
/// The folder is not writable or the disk is full: then nothing that was there before is lost.
pub fn save(root: &Path, checkpoint: &Checkpoint, compact: bool, keep: usize) -> Result<PathBuf, TrainError> {
    let name = format!("{PREFIX}{:010}", checkpoint.state.step);
    let (temporary, target) = (root.join(format!("{name}{UNFINISHED}")), root.join(name));
    fs::create_dir_all(root).map_err(TrainError::io(root))?;
    remove_unfinished(root)?;
    if target.exists() && load(&target).is_ok() {
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
    for old in list(root)?.into_iter().skip(keep.max(1)) {
        fs::remove_dir_all(&old).map_err(TrainError::io(&old))?;
    }
    Ok(target)
}

fn write_into(folder: &Path, checkpoint: &Checkpoint, compact: bool) -> Result<(), TrainError> {
    fs::create_dir(folder).map_err(TrainError::io(folder))?;
    let none = BTreeMap::new();
    let precision = if compact { Precision::BF16 } else { Precision::F32 };
    file::write(&folder.join(WEIGHTS), &checkpoint.weights, &none, Precision::F32)?;
    file::write(&folder.join(OPTIMISER), &checkpoint.optimiser, &none, precision)?;
    if !checkpoint.ema.is_empty() {
        let ema = if compact {
            combine(&checkpoint.ema, &checkpoint.weights, Tensor::sub)?
        } else {
            BTreeMap::new()
        };
        let ema = if compact { &ema } else { &checkpoint.ema };
        file::write(&folder.join(EMA), ema, &none, precision)?;
    }
    write_json(&folder.join(STATE), &checkpoint.state)?;
    let mut files = BTreeMap::new();
    for item in fs::read_dir(folder).map_err(TrainError::io(folder))? {
        let item = item.map_err(TrainError::io(folder))?;
        files.insert(
            item.file_name().to_string_lossy().into_owned(),
            digest(&item.path())?,
        );
    }
    write_json(
        &folder.join(MANIFEST),
        &Manifest {
            format: FORMAT,
            compact,
            files,
        },
    )
}

/// Reads the newest checkpoint under `root` that is whole; none where there is no checkpoint at all. Each one that is
/// passed over is reported to `skipped`.
///
/// # Errors
/// There are checkpoints and none is usable, or `root` is unreadable.
pub fn load_newest(
    root: &Path,
    mut skipped: impl FnMut(&TrainError),
) -> Result<Option<Checkpoint>, TrainError> {
    let mut last = None;
    for folder in list(root)? {
        match load(&folder) {
            Ok(checkpoint) => return Ok(Some(checkpoint)),
            Err(error) => {
                skipped(&error);
                last = Some(error);
            }
        }
    }
    last.map_or(Ok(None), Err)
}

/// Reads one checkpoint and verifies every byte of it.
///
/// # Errors
/// A file is missing, changed or damaged, or the checkpoint is of another format.
pub fn load(folder: &Path) -> Result<Checkpoint, TrainError> {
    let unusable = |reason: String| TrainError::Checkpoint {
        path: folder.to_path_buf(),
        reason,
    };
    let manifest: Manifest = read_json(folder, MANIFEST)?;
    if manifest.format != FORMAT {
        return Err(unusable(format!(
            "format {}, this program reads {FORMAT}",
            manifest.format
        )));
    }
    for (name, expected) in &manifest.files {
        if Path::new(name).file_name() != Some(name.as_ref()) {
            return Err(unusable(format!(
                "the manifest names `{name}`, which is no file name"
            )));
        }
        let found = digest(&folder.join(name))?;
        if found != *expected {
            let (found, expected) = (found.bytes, expected.bytes);
            let what = if found == expected {
                "its content changed".into()
            } else {
                format!("{found} bytes, expected {expected}")
            };
            return Err(unusable(format!("{name}: {what}")));
        }
    }
    let tensors = |name: &str| -> Result<BTreeMap<String, Tensor>, TrainError> {
        if !manifest.files.contains_key(name) {
            return Err(unusable(format!("the manifest does not list {name}")));
        }
        let mut tensors = file::read(&folder.join(name), &Device::Cpu)?.tensors;
        for tensor in tensors.values_mut() {
            *tensor = tensor.to_dtype(candle_core::DType::F32)?;
        }
        Ok(tensors)
    };
    let weights = tensors(WEIGHTS)?;
    let mut ema = if manifest.files.contains_key(EMA) {
        tensors(EMA)?
    } else {
        BTreeMap::new()
    };
    if manifest.compact {
        ema = combine(&ema, &weights, Tensor::add)?;
    }
    Ok(Checkpoint {
        state: read_json(folder, STATE)?,
        weights,
        optimiser: tensors(OPTIMISER)?,
        ema,
    })
}

/// Finished checkpoints under `root`, newest first.
pub(super) fn list(root: &Path) -> Result<Vec<PathBuf>, TrainError> {
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
    Ok(folders.into_iter().map(|(_, folder)| folder).collect())
}

/// The step of the newest checkpoint, 0 where there is none.
pub(super) fn newest_step(root: &Path) -> u64 {
    let newest = list(root).ok().and_then(|folders| folders.into_iter().next());
    newest
        .and_then(|f| f.file_name()?.to_str()?.strip_prefix(PREFIX)?.parse().ok())
        .unwrap_or(0)
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

fn digest(path: &Path) -> Result<Entry, TrainError> {
    let mut file = File::open(path).map_err(TrainError::io(path))?;
    let (mut hash, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
    loop {
        let n = file.read(&mut buffer).map_err(TrainError::io(path))?;
        if n == 0 {
            let sha256 = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            return Ok(Entry { bytes, sha256 });
        }
        hash.update(&buffer[..n]);
        bytes += n as u64;
    }
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), TrainError> {
    let text = serde_json::to_vec_pretty(value).map_err(|e| TrainError::io(path)(e.into()))?;
    Ok(write_atomically(path, |out| out.write_all(&text))?)
}

fn read_json<T: serde::de::DeserializeOwned>(folder: &Path, name: &str) -> Result<T, TrainError> {
    let bytes = file::read_bounded(&folder.join(name), LARGEST_JSON)?;
    serde_json::from_slice(&bytes).map_err(|e| TrainError::Checkpoint {
        path: folder.to_path_buf(),
        reason: format!("{name}: {e}"),
    })
}

fn sync_folder(folder: &Path) -> Result<(), TrainError> {
    if cfg!(unix) {
        File::open(folder)
            .and_then(|file| file.sync_all())
            .map_err(TrainError::io(folder))?;
    }
    Ok(())
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
        assert_eq!(newest_step(&root), 20000);
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
        let damage: [(&str, Spoil, &str); 5] = [
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
                "format 2, this program reads 1",
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
}
