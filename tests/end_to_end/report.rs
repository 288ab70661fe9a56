//! `fulgur report` and `fulgur estimate` on a run that was really made.

use std::fs;
use std::path::Path;

use crate::support::{names, run};
use crate::training;

/// Bytes of the tensor files in a folder.
fn weights_bytes(folder: &Path) -> u64 {
    let files = names(folder)
        .into_iter()
        .filter(|name| name.ends_with(".safetensors"));
    files
        .map(|name| fs::metadata(folder.join(name)).unwrap().len())
        .sum()
}

#[test]
fn a_run_is_estimated_made_resumed_and_reported() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = training::recipe(folder.path(), 10);
    let recipe = recipe.to_str().unwrap();
    let run_dir = folder.path().join("run");
    let run_path = run_dir.to_str().unwrap();

    let before = run(["report", run_path]);
    assert!(
        before.error().contains("there is no such folder"),
        "{}",
        before.stderr
    );
    let estimate = run(["estimate", recipe, "--json"]).json();
    assert!(!run_dir.exists(), "an estimate makes nothing");

    let train = |more: &[&str]| {
        let ran = run([&["train", recipe, "--device", "cpu", "--json"], more].concat());
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        ran.json()
    };
    train(&[]);
    let outcome = train(&["--resume", "--set", "train.max_steps=20"]);

    let page = folder.path().join("page.html");
    let report = run(["report", run_path, "-o", page.to_str().unwrap(), "--json"]).json();
    assert_eq!(report["path"], page.to_str().unwrap());
    assert_eq!(report["steps"], 20);
    assert_eq!(
        (&report["loss"], &report["best"]),
        (&outcome["loss"], &outcome["best"])
    );
    let text = fs::read_to_string(&page).unwrap();
    for words in [
        "Training of <b>text</b>, finished",
        "<small>after step 10</small>",
        "<figcaption>Loss<span>",
        "recall</li>",
        "<tr><th>distance</th>",
    ] {
        assert!(text.contains(words), "{words}");
    }
    // Without a name the page lies in the run's folder, and replaces an older one.
    for _ in 0..2 {
        let report = run(["report", run_path]);
        assert!(
            report.code == 0 && report.stdout.contains("report.html: 20 steps, loss "),
            "{}",
            report.stdout
        );
    }

    // What was foretold is what was written; headers come on top of the values.
    let checkpoints = run_dir.join("checkpoints");
    let newest = checkpoints.join(names(&checkpoints).pop().unwrap());
    let (found, foretold) = (
        weights_bytes(&newest),
        estimate["checkpoint_bytes"].as_u64().unwrap(),
    );
    assert!(
        (foretold..foretold + 65_536).contains(&found),
        "{found} and {foretold}"
    );
    let model = run(["estimate", run_dir.join("model").to_str().unwrap(), "--json"]).json();
    assert_eq!(model["parameters"], estimate["parameters"]);
    assert_eq!(model["stages"][0], estimate["stages"][0]);
    assert_eq!(model["kind"], "model");
    // The folder of a run stands for its recipe.
    let again = run(["estimate", run_path, "--json"]).json();
    assert_eq!(again["stages"], estimate["stages"]);
}

#[test]
fn mistakes_are_told_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_str().unwrap();
    for (arguments, words) in [
        (vec!["report", dir], "no training run: no metrics.jsonl in it"),
        (
            vec!["report", dir, "-o", "x.txt"],
            "expected a name that ends in .html",
        ),
        (vec!["estimate", dir], "no .safetensors file in it"),
        (vec!["estimate", dir, "--set", "a=1"], "expected a recipe"),
        (vec!["estimate", "nowhere.toml"], "nowhere.toml"),
    ] {
        let ran = run(&arguments);
        assert!(ran.error().contains(words), "{arguments:?}: {}", ran.stderr);
    }
    fs::write(folder.path().join("metrics.jsonl"), "{\"step\": 1}\n").unwrap();
    let target = folder.path().join("absent/page.html");
    let ran = run(["report", dir, "-o", target.to_str().unwrap()]);
    assert!(ran.error().contains("there is no folder"), "{}", ran.stderr);
}
