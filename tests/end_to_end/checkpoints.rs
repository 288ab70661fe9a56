//! Training never loses what it has saved: killed while it saves, on a full disk, beside damaged files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fulgur::kernels::philox::Philox;
use fulgur::train::checkpoint::{self, Checkpoint};
use serde_json::Value;

use crate::signals::{PATIENCE, Running, logged, train, unfinished};
use crate::support::{names, on_a_small_disk};
use crate::training;

/// Saves as often as the disk allows.
const ALWAYS: [&str; 2] = ["--set", "train.checkpoint_seconds=1e-6"];

/// The newest checkpoint of a run, and how many were passed over.
fn newest(run_dir: &Path) -> (Option<Checkpoint>, usize) {
    let mut skipped = 0;
    let found = checkpoint::load_newest(&run_dir.join("checkpoints"), |_| skipped += 1).unwrap();
    (found, skipped)
}

fn step(run_dir: &Path) -> u64 {
    newest(run_dir).0.map_or(0, |found| found.state.step)
}

fn bits(checkpoint: &Checkpoint) -> BTreeMap<String, Vec<u32>> {
    let parts = [
        ("weight", &checkpoint.weights),
        ("optimiser", &checkpoint.optimiser),
        ("average", &checkpoint.ema),
    ];
    let mut all = BTreeMap::new();
    for (part, tensors) in parts {
        for (name, tensor) in tensors {
            let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let bits = values.into_iter().map(f32::to_bits).collect();
            all.insert(format!("{part} {name}"), bits);
        }
    }
    all
}

/// The metrics without what depends on the clock.
fn metrics(run_dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap();
    let timeless = |line: &str| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        let object = line.as_object_mut().unwrap();
        object.remove("elapsed_s").unwrap();
        object.remove("samples_per_s");
        line
    };
    text.lines().map(timeless).collect()
}

fn start(recipe: &Path, more: &[&str]) -> Running {
    let arguments = ["train", recipe.to_str().unwrap(), "--device", "cpu"];
    Running::start(arguments.iter().chain(more))
}

/// Names below `checkpoints` of a run that is at work, without the first five letters.
fn steps(run_dir: &Path) -> Vec<String> {
    let items = fs::read_dir(run_dir.join("checkpoints")).into_iter().flatten();
    let names = items
        .flatten()
        .map(|item| item.file_name().into_string().unwrap());
    names
        .filter_map(|name| Some(name.strip_prefix("step-")?.to_owned()))
        .collect()
}

/// Whether a checkpoint is being written.
fn saves(run_dir: &Path) -> bool {
    steps(run_dir).iter().any(|name| name.ends_with(".tmp"))
}

/// The newest finished checkpoint by name.
fn newest_name(run_dir: &Path) -> u64 {
    let steps = steps(run_dir).into_iter();
    steps.filter_map(|name| name.parse().ok()).max().unwrap_or(0)
}

/// Kills a run of `steps` steps `kills` times at random moments of saving; it goes on from the last finished checkpoint
/// each time, and comes to the model of a run that was left alone.
fn kill_while_saving(kills: usize, steps: u64) {
    let (straight, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ran = train(&training::recipe(straight.path(), steps), &[]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);

    let recipe = training::recipe(killed.path(), steps);
    let run_dir = killed.path().join("run");
    let mut moments = Philox::named(1, "moments to kill at");
    let mut kept = 0;
    for kill in 0..kills {
        let mut more = ALWAYS.to_vec();
        if kill > 0 {
            more.push("--resume");
        }
        let mut running = start(&recipe, &more);
        let began = Instant::now();
        // What a kill before this one left unfinished must not be taken for a save of this session.
        while newest_name(&run_dir) <= kept || !saves(&run_dir) {
            let ended = running.child.try_wait().unwrap();
            assert!(ended.is_none() && began.elapsed() < PATIENCE, "{ended:?}");
            std::thread::sleep(Duration::from_micros(50));
        }
        std::thread::sleep(Duration::from_micros(moments.range(0.0, 6000.0) as u64));
        running.child.kill().unwrap();
        let (code, ran) = running.finish();
        assert_eq!(code, None, "ended by the signal: {}", ran.stderr);
        if kept > 0 {
            let line = format!("goes on from step {kept}\n");
            assert!(ran.stderr.contains(&line), "{line}{}", ran.stderr);
        }
        assert!(!ran.stderr.contains("passed over"), "{}", ran.stderr);
        // No kill leaves a checkpoint that is damaged, and none takes one back.
        let (found, damaged) = newest(&run_dir);
        let found = found.unwrap().state.step;
        assert!(
            damaged == 0 && found > kept,
            "{damaged} damaged, {found} after {kept}"
        );
        kept = found;
    }
    let ran = train(&recipe, &["--resume"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stderr.contains(&format!("goes on from step {kept}\n")));
    let model = |folder: &Path| fs::read(folder.join("run/model/model.safetensors")).unwrap();
    assert!(model(straight.path()) == model(killed.path()), "another model");
    assert_eq!(metrics(&run_dir), metrics(&straight.path().join("run")));
    assert_eq!(unfinished(killed.path()), [""; 0]);
}

#[test]
fn a_kill_while_saving_costs_only_what_was_not_saved() {
    kill_while_saving(3, 600);
}

#[test]
#[ignore = "takes a minute: make soak"]
fn soak_many_kills_while_saving() {
    kill_while_saving(20, 4000);
}

/// In the middle of an epoch (60 lessons, 24 a step) and of a log interval, with gradients of several batches a step.
#[test]
fn a_hundred_steps_equal_fifty_a_kill_and_fifty() {
    /// On a busy machine a kill may come when all steps are done.
    const ATTEMPTS: usize = 8;
    let straight = tempfile::tempdir().unwrap();
    let mut more = ALWAYS.to_vec();
    more.extend(["--set", "train.accumulate=3", "--set", "train.log_every=7"]);
    let ran = train(&training::recipe(straight.path(), 100), &more);
    assert_eq!(ran.code, 0, "{}", ran.stderr);

    let killed = || {
        let broken = tempfile::tempdir().unwrap();
        let run_dir = broken.path().join("run");
        let mut running = start(&training::recipe(broken.path(), 100), &more);
        running.wait_until(|| newest_name(&run_dir) >= 50);
        running.child.kill().unwrap();
        running.finish();
        (step(&run_dir) < 100).then_some(broken)
    };
    let broken = (0..ATTEMPTS)
        .find_map(|_| killed())
        .expect("a run that was killed in time");
    let recipe = broken.path().join("recipe.toml");
    let (first, second) = (straight.path().join("run"), broken.path().join("run"));
    assert!(step(&second) >= 50);
    more.push("--resume");
    let ran = train(&recipe, &more);
    assert_eq!(ran.code, 0, "{}", ran.stderr);

    let (one, other) = (newest(&first).0.unwrap(), newest(&second).0.unwrap());
    assert_eq!((one.state.step, other.state.step), (100, 100));
    assert_eq!(one.state.samples, other.state.samples);
    assert!(bits(&one) == bits(&other), "other tensors");
    assert_eq!(metrics(&first), metrics(&second));
}

/// A finished run of six steps with one checkpoint.
fn small_run(folder: &Path) -> PathBuf {
    let recipe = training::recipe(folder, 6);
    let ran = train(&recipe, &["--set", "train.checkpoint_seconds=1000"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    recipe
}

/// Everything in the checkpoint of [`small_run`].
fn files(run_dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let folder = run_dir.join("checkpoints/step-0000000006");
    let read = |name: String| (name.clone(), fs::read(folder.join(name)).unwrap());
    names(&folder).into_iter().map(read).collect()
}

#[test]
fn a_checkpoint_that_is_not_what_was_written_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = small_run(folder.path());
    let run_dir = folder.path().join("run");
    let at = run_dir.join("checkpoints/step-0000000006");
    let whole = files(&run_dir);
    let cut = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() / 2);
    let flip = |bytes: &mut Vec<u8>| *bytes.last_mut().unwrap() ^= 1;
    fn replace(bytes: &mut Vec<u8>, from: &str, to: &str) {
        let text = String::from_utf8_lossy(bytes);
        assert!(text.contains(from), "{text}");
        *bytes = text.replace(from, to).into_bytes();
    }
    type Spoil<'a> = &'a dyn Fn(&mut Vec<u8>);
    let damage: [(&str, Spoil, &str); 5] = [
        (
            "weights.safetensors",
            &flip,
            "weights.safetensors: its content changed",
        ),
        ("optimiser.safetensors", &cut, "optimiser.safetensors: "),
        (
            "state.json",
            &|bytes| replace(bytes, "\"step\": 6", "\"step\": 9"),
            "state.json: its content changed",
        ),
        (
            "manifest.json",
            &|bytes| replace(bytes, "\"format\": 1", "\"format\": 2"),
            "format 2 is newer than this program, which reads 1",
        ),
        ("manifest.json", &cut, "manifest.json: EOF"),
    ];
    let more = ["--resume", "--set", "train.max_steps=9"];
    for (name, spoil, words) in damage {
        let mut bytes = whole[name].clone();
        spoil(&mut bytes);
        fs::write(at.join(name), &bytes).unwrap();
        let ran = train(&recipe, &more);
        let line = ran.error();
        assert!(
            line.contains(at.to_str().unwrap()) && line.contains(words),
            "{words}: {line}"
        );
        // What was there is still there, as it was.
        assert_eq!(fs::read(at.join(name)).unwrap(), bytes);
        fs::write(at.join(name), &whole[name]).unwrap();
        assert_eq!(files(&run_dir), whole, "{name}");
    }
    let ran = train(&recipe, &more);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(ran.json()["step"], 9);
}

#[test]
fn a_run_that_cannot_go_on_is_one_line_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = small_run(folder.path());
    let run_dir = folder.path().join("run");
    let (whole, model) = (
        files(&run_dir),
        fs::read(run_dir.join("model/model.safetensors")).unwrap(),
    );
    let log = fs::read(run_dir.join("metrics.jsonl")).unwrap();
    for (sets, words) in [
        (
            &["text.model.intermediate_size=24", "train.max_steps=9"][..],
            "checkpoints: not the weights of this model: ",
        ),
        (&["train.max_steps=0"], "expected max_steps or max_seconds"),
        (
            &["optimiser.lr=nan"],
            "optimiser.lr: found NaN, expected more than 0",
        ),
        (&["seed=4", "train.max_steps=9"], "its seed is 3, the recipe's 4"),
    ] {
        let mut more = vec!["--resume"];
        for set in sets {
            more.extend(["--set", set]);
        }
        let ran = train(&recipe, &more);
        assert!(ran.error().contains(words), "{sets:?}: {}", ran.stderr);
        assert_eq!(files(&run_dir), whole, "{sets:?}");
        assert_eq!(fs::read(run_dir.join("metrics.jsonl")).unwrap(), log, "{sets:?}");
    }
    // Checkpoints have no place: a file stands there.
    let root = run_dir.join("checkpoints");
    let aside = folder.path().join("aside");
    fs::rename(&root, &aside).unwrap();
    fs::write(&root, "no folder").unwrap();
    let ran = train(&recipe, &["--resume", "-q"]);
    assert!(ran.error().contains(root.to_str().unwrap()), "{}", ran.stderr);
    fs::remove_file(&root).unwrap();
    fs::rename(&aside, &root).unwrap();
    assert_eq!(files(&run_dir), whole);
    assert_eq!(fs::read(run_dir.join("model/model.safetensors")).unwrap(), model);
}

#[test]
fn a_disk_that_fills_up_while_saving_keeps_the_last_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = small_run(folder.path());
    let run_dir = folder.path().join("run");
    let whole = files(&run_dir);
    let path = recipe.to_str().unwrap();
    let mut arguments = vec!["train", path, "--device", "cpu", "-q", "--resume"];
    arguments.extend(["--set", "train.max_steps=1000000", ALWAYS[0], ALWAYS[1]]);
    // Room for what is small, such as the log, and not for the weights.
    let ran = on_a_small_disk(8, &arguments);
    let line = ran.error();
    assert!(line.contains("checkpoints/step-"), "{line}");
    assert_eq!(names(&run_dir.join("checkpoints")), ["step-0000000006"]);
    assert_eq!(files(&run_dir), whole);
    let ran = train(&recipe, &["--resume", "--set", "train.max_steps=9"]);
    assert_eq!((ran.code, &ran.json()["step"]), (0, &9.into()), "{}", ran.stderr);
    assert!(ran.stderr.contains("goes on from step 6\n"), "{}", ran.stderr);
}

#[test]
fn a_second_run_in_a_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = training::recipe(folder.path(), 1_000_000);
    let run_dir = folder.path().join("run");
    let mut running = start(&recipe, &[]);
    running.wait_until(|| logged(&run_dir) >= 1);
    for more in [&["--resume"][..], &[]] {
        let ran = train(&recipe, more);
        let expected = format!("{}: another run is at work in this folder", run_dir.display());
        assert_eq!(ran.error(), expected);
    }
    running.send("INT");
    let (_, ran) = running.finish();
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    // The lock went with its owner.
    let all = format!("train.max_steps={}", step(&run_dir) + 1);
    let ran = train(&recipe, &["--resume", "--set", &all]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
}

#[test]
fn a_state_goes_through_small_files_into_another_run() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = small_run(folder.path());
    let state = folder.path().join("state");
    let path = state.to_str().unwrap();
    let ran = train(&recipe, &["--export-state", path, "--max-bytes", "65536"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let report = ran.json();
    assert_eq!(report["step"], 6);
    let sizes: Vec<u64> = names(&state)
        .iter()
        .filter(|name| *name != "manifest.json")
        .map(|name| fs::metadata(state.join(name)).unwrap().len())
        .collect();
    assert!(sizes.iter().all(|size| *size <= 65536), "{sizes:?}");
    assert_eq!(report["shards"], sizes.len());
    assert_eq!(report["bytes"], sizes.iter().sum::<u64>());

    let other = folder.path().join("other");
    let set = format!("run_dir={other:?}");
    let more = [
        "--import-state",
        path,
        "--set",
        &set,
        "--set",
        "train.max_steps=9",
    ];
    let shard = state.join("ema.safetensors.00000");
    let whole = fs::read(&shard).unwrap();
    for (bytes, words) in [
        (None, "ema.safetensors.00000: No such file"),
        (Some([whole.clone(), vec![0]].concat()), "bytes, expected"),
        (
            Some(whole.iter().map(|byte| !byte).collect()),
            "ema.safetensors.00000: its content changed",
        ),
    ] {
        match bytes {
            None => fs::remove_file(&shard).unwrap(),
            Some(bytes) => fs::write(&shard, bytes).unwrap(),
        }
        let ran = train(&recipe, &more);
        assert!(ran.error().contains(words), "{words}: {}", ran.stderr);
        assert!(!other.join("checkpoints").exists());
    }
    fs::write(&shard, whole).unwrap();
    let mut wider = more.to_vec();
    wider.extend(["--set", "text.model.intermediate_size=24"]);
    let ran = train(&recipe, &wider);
    assert!(
        ran.error().contains("not the weights of this model"),
        "{}",
        ran.stderr
    );
    let ran = train(&recipe, &more);
    assert_eq!((ran.code, &ran.json()["step"]), (0, &9.into()), "{}", ran.stderr);
    assert!(ran.stderr.contains("goes on from step 6\n"), "{}", ran.stderr);

    let below = recipe.join("state").to_str().unwrap().to_owned();
    for (more, words) in [
        (&["--export-state", path][..], "not empty"),
        (&["--max-bytes", "9"], "--export-state"),
        (&["--import-state", path, "--resume"], "cannot be used with"),
        (&["--import-state", path], "holds a run already"),
        // Below a file there is no folder.
        (&["--export-state", &below], below.as_str()),
    ] {
        let ran = train(&recipe, more);
        assert!(ran.error().contains(words), "{more:?}: {}", ran.stderr);
    }
}
