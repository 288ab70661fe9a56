//! `fulgur lra sweep` and the task `lra`: results, going on, and what they answer to bad input.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::support::{Ran, names, run};

/// Sizes that take no time.
const TINY: &str = "--steps 3 --layers 1 --width 16 --hidden 24 --heads 2 --batch 4 --validation 8 --min-length 4 \
                    --max-length 16 --max-depth 3";

/// A sweep of tiny models; `more` goes before those sizes.
fn sweep(out: &Path, more: &[&str]) -> Ran {
    let out = out.to_str().unwrap();
    let fixed = ["lra", "sweep", "--device", "cpu", "--json", "--out", out];
    let sizes: Vec<&str> = TINY.split_whitespace().collect();
    let sizes: Vec<&str> = sizes
        .chunks(2)
        .filter(|pair| !more.contains(&pair[0]))
        .flatten()
        .copied()
        .collect();
    run([&fixed[..], &sizes, more].concat())
}

#[test]
fn a_sweep_writes_one_table_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let settings = ["--settings", "hgrn2-series-2d,softmax-whole"];
    let lists = sweep(
        &out,
        &[&settings[..], &["--tasks", "listops,pathfinder"]].concat(),
    );
    assert_eq!(lists.code, 0, "{}", lists.stderr);
    let json = lists.json();
    assert_eq!(
        (&json["finished"], &json["plan"]["steps"]),
        (&Value::from(true), &Value::from(3))
    );
    let rows: Vec<(&str, &str)> = json["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| {
            let share = row["accuracy"].as_f64().unwrap();
            assert!((0.0..=1.0).contains(&share) && row["n"] == 8, "{row}");
            assert!(row["samples_per_s"].as_f64().unwrap() > 0.0, "{row}");
            (row["task"].as_str().unwrap(), row["setting"].as_str().unwrap())
        })
        .collect();
    // Lists have no rows and columns.
    let expected = [
        ("listops", "softmax-whole"),
        ("pathfinder", "hgrn2-series-2d"),
        ("pathfinder", "softmax-whole"),
    ];
    assert_eq!(rows, expected);
    assert_eq!(names(&out), ["listops", "pathfinder", "table.json", "table.md"]);
    let table = fs::read_to_string(out.join("table.md")).unwrap();
    assert_eq!(table.lines().count(), 2 + 3);
    let kept: Value = serde_json::from_slice(&fs::read(out.join("table.json")).unwrap()).unwrap();
    assert_eq!(kept["rows"], json["rows"]);

    let again = sweep(&out, &["--tasks", "pathfinder", "--settings", "softmax-whole"]);
    assert!(
        again.stderr.contains("pathfinder softmax-whole: there already"),
        "{}",
        again.stderr
    );
    assert_eq!(again.json()["rows"][0], json["rows"][2]);
    let other = sweep(
        &out,
        &[
            "--tasks",
            "pathfinder",
            "--settings",
            "softmax-whole",
            "--seed",
            "2",
        ],
    );
    assert!(
        other
            .error()
            .contains("result.json: made by other options than these")
    );
}

#[test]
fn what_a_sweep_cannot_do_is_said_in_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    for (more, words) in [
        (
            &["--tasks", "retrieval"][..],
            "--tasks: retrieval is not available: its papers (AAN) are in no package",
        ),
        (&["--tasks", "path-x"], "path-x is not available"),
        (
            &["--tasks", "weave"],
            "expected one of listops, pathfinder, fashion-mnist",
        ),
        (&["--settings", "weave"], "--settings: found \"weave\""),
        (
            &["--tasks", "listops", "--settings", "hgrn2-series-2d"],
            "--settings: hgrn2-series-2d goes through rows and columns",
        ),
        (&["--tasks", "listops", "--lr", "nan"], "optimiser.lr: found NaN"),
        (
            &["--tasks", "listops", "--heads", "3"],
            "hidden_size is 16, expected a multiple",
        ),
        (
            &["--tasks", "listops", "--min-length", "17"],
            "min_length is 17, expected 1 to 16",
        ),
        (
            &["--tasks", "listops", "--max-depth", "1"],
            "no expression of 4 to 16 tokens",
        ),
        (
            &["--tasks", "fashion-mnist", "--data", "nowhere"],
            "run `fulgur data fetch fashion-mnist`",
        ),
    ] {
        let ran = sweep(&out, more);
        let line = ran.error();
        assert!(line.contains(words), "{line}");
    }
    assert!(!out.join("table.md").exists());
}

#[test]
fn a_recipe_trains_a_classifier() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("lists.toml");
    let text = "task = 'lra'\n[train]\nmax_steps = 4\n[lra]\nform = 'series'\nbatch = 4\nvalidation = 8\n\
                listops = { min_length = 4, max_length = 16, max_depth = 3 }\n[lra.model]\narchitecture = 'lightnet'\n\
                layers = 1\nwidth = 16\nhidden = 24\nheads = 2\n";
    fs::write(&recipe, text).unwrap();
    let recipe = recipe.to_str().unwrap();
    let run_dir = format!("run_dir={}", folder.path().join("run").display());
    let ran = run(["train", recipe, "--device", "cpu", "--json", "--set", &run_dir]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(ran.json()["finished"], true);
    let model = folder.path().join("run/model");
    assert_eq!(names(&model), ["config.json", "model.safetensors"]);
    let config: Value = serde_json::from_slice(&fs::read(model.join("config.json")).unwrap()).unwrap();
    assert_eq!(
        (&config["model_type"], &config["layers"]["model_type"]),
        (&Value::from("sequence_classifier"), &Value::from("lightnet"))
    );
    let ran = run(["train", recipe, "--device", "cpu", "--set", "lra.task='imdb'"]);
    assert!(ran.error().contains("imdb is not available"), "{}", ran.stderr);
    let estimate = run(["estimate", recipe, "--json"]);
    assert_eq!(estimate.code, 0, "{}", estimate.stderr);
}
