//! `fulgur scaling`: a study of tiny models from its file to laws and plots, and what it answers to bad input.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::support::{Ran, names, run};

/// A study of two architectures in three sizes, on a text that lies beside it.
const STUDY: &str = "tokens = 'TEXT'\nheld_out = 0.1\ncontext = 16\nbatch = 4\nbudget = 1280\nwarmup = 2\npoints = 6\n\
                     first = 0.1\nvalidation = 8\narchitectures = ['llama', 'tnl']\n";
const SIZES: &str = "[[sizes]]\nname = 'a'\nlayers = 1\nwidth = 12\nheads = 1\nhidden = 32\nlr = 3e-3\n\
                     [[sizes]]\nname = 'b'\nlayers = 1\nwidth = 24\nheads = 2\nhidden = 64\nlr = 3e-3\n\
                     [[sizes]]\nname = 'c'\nlayers = 2\nwidth = 24\nheads = 2\nhidden = 64\nlr = 3e-3\n";

/// Writes the text and a study, whose first part `change` makes.
fn study(root: &Path, change: impl FnOnce(String) -> String) -> String {
    let text = root.join("text.txt");
    fs::write(&text, "one two three four five six ".repeat(60)).unwrap();
    let study = change(STUDY.replace("TEXT", text.to_str().unwrap()));
    let path = root.join("study.toml");
    fs::write(&path, study + SIZES).unwrap();
    path.to_str().unwrap().to_owned()
}

fn scaling(arguments: &[&str]) -> Ran {
    run([&["scaling"], arguments, &["--device", "cpu"]].concat())
}

#[test]
fn a_study_goes_from_its_file_to_plots() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let path = study(root, |text| text + "rates = [0.5, 1.0, 2.0]\ntrial = 0.2\n");
    let (out, plots) = (root.join("out"), root.join("plots"));
    let out = out.to_str().unwrap();

    let listed = scaling(&["run", &path, "--estimate", "--json"]).json();
    let runs = listed["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 6);
    assert_eq!(
        (&runs[0]["name"], &runs[1]["name"]),
        (&json!("llama-a"), &json!("tnl-a"))
    );
    // 12 L d^2, and of TNL the gate.
    assert_eq!(
        (&runs[2]["weights"], &runs[3]["weights"]),
        (&json!(6912), &json!(6912 + 2 * 288))
    );
    assert_eq!(
        (&runs[0]["steps"], &runs[0]["tokens"]),
        (&json!(20), &json!(1280))
    );
    assert_eq!(runs[0]["tokens_with_trials"], 1280 + 3 * 4 * 64);
    assert!(!root.join("out").exists());

    let some = scaling(&[
        "run", &path, "--out", out, "--only", "tnl", "--sizes", "b", "--json",
    ]);
    assert_eq!(some.code, 0, "{}", some.stderr);
    assert_eq!(some.json()["runs"].as_array().unwrap().len(), 1);
    let ran = scaling(&["run", &path, "--out", out, "--json"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stderr.contains("tnl-b: there already"), "{}", ran.stderr);
    let table = ran.json();
    assert_eq!(
        (&table["finished"], table["runs"].as_array().unwrap().len()),
        (&json!(true), 6)
    );
    let row = &table["runs"][0];
    assert_eq!(
        (&row["name"], row["trials"].as_array().unwrap().len()),
        (&json!("llama-a"), 3)
    );
    let best = row["trials"].as_array().unwrap().iter();
    let best = best.min_by(|a, b| {
        a["loss"]
            .as_f64()
            .unwrap()
            .total_cmp(&b["loss"].as_f64().unwrap())
    });
    assert_eq!(row["lr"], best.unwrap()["lr"]);

    let curve = fs::read_to_string(root.join("out/llama-a.jsonl")).unwrap();
    let points: Vec<serde_json::Value> = curve
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(points.len(), 6);
    assert_eq!((&points[0]["step"], &points[5]["step"]), (&json!(2), &json!(20)));
    assert_eq!(
        (&points[5]["tokens"], &points[5]["loss"]),
        (&json!(1280), &row["loss"])
    );
    let flops = row["account"]["flops"].as_f64().unwrap();
    assert_eq!(points[5]["flops"].as_f64().unwrap(), 1280.0 * flops);
    assert!(points[5]["train_loss"].as_f64().unwrap() > 0.0);
    // The model stays, what only the way to it needs goes.
    let left = names(&root.join("out/runs/llama-a"));
    assert_eq!(left, ["full", "lock"]);
    assert!(
        root.join("out/runs/llama-a/full/model/model.safetensors")
            .is_file()
    );
    assert!(!root.join("out/runs/llama-a/full/checkpoints").exists());

    let again = scaling(&["run", &path, "--out", out]);
    assert_eq!((again.code, again.stdout.lines().count()), (0, 2 + 6 + 1));
    let kept = fs::read_to_string(root.join("out/table.md")).unwrap();
    assert!(
        again.stdout.starts_with(&kept) && kept.contains("| tnl-c |"),
        "{kept}"
    );

    let fitted = scaling(&["fit", out, "--json"]);
    assert!(fitted.code < 2, "{}", fitted.stderr);
    let fits = fitted.json();
    for name in ["llama", "tnl"] {
        let fit = &fits["fits"][name];
        let has_law = fit["alpha"].is_f64();
        assert!(has_law != fit["reason"].is_string(), "{fit}");
        assert!(fit["published"]["loss"]["alpha"].as_f64().unwrap() < 0.0);
    }
    assert!(root.join("out/fit.json").is_file() && root.join("out/fit.md").is_file());
    let drawn = scaling(&["plot", out, "-o", plots.to_str().unwrap(), "--json"]);
    assert_eq!(
        (drawn.code, drawn.json()["files"].as_array().unwrap().len()),
        (0, 5)
    );
    assert_eq!(
        names(&plots),
        [
            "d_opt.svg",
            "loss-llama.svg",
            "loss-tnl.svg",
            "loss.svg",
            "n_opt.svg"
        ]
    );
    let svg = fs::read_to_string(plots.join("loss-tnl.svg")).unwrap();
    assert!(svg.starts_with("<svg xmlns") && !svg.contains("NaN"), "{svg}");

    // Results are those of their study.
    let other = study(root, |text| {
        text.replace("warmup = 2", "warmup = 3") + "rates = [0.5, 1.0, 2.0]\ntrial = 0.2\n"
    });
    let refused = scaling(&["run", &other, "--out", out]);
    assert!(
        refused.error().contains("llama-a.json: made by another study"),
        "{}",
        refused.stderr
    );
}

/// Widths make up for what a mixer has more.
#[test]
fn equal_sizes_are_equal() {
    let folder = tempfile::tempdir().unwrap();
    let path = study(folder.path(), |text| {
        text.replace("'llama', 'tnl'", "'llama', 'transnormer', 'lightnet'") + "equal = true\n"
    });
    let listed = scaling(&["run", &path, "--estimate", "--json"]).json();
    let runs = listed["runs"].as_array().unwrap();
    for size in runs[3..].chunks(3) {
        let weights: Vec<f64> = size.iter().map(|run| run["weights"].as_f64().unwrap()).collect();
        for other in &weights[1..] {
            assert!((other / weights[0] - 1.0).abs() < 0.06, "{weights:?}");
        }
    }
}

/// Two processes share the runs: a run that another is at work on is passed over.
#[cfg(unix)]
#[test]
fn a_run_that_another_is_at_work_on_is_passed_over() {
    use std::process::Command;
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let path = study(root, |text| text.replace("'llama', 'tnl'", "'tnl'"));
    let claimed = root.join("out/runs/tnl-a");
    fs::create_dir_all(&claimed).unwrap();
    let lock = claimed.join("lock");
    let mut other = match Command::new("flock")
        .arg(&lock)
        .args(["sh", "-c", "echo held; read _"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
    {
        Ok(other) => other,
        Err(error) => {
            eprintln!("skipped: flock: {error}");
            return;
        }
    };
    let mut word = String::new();
    let mut held = std::io::BufReader::new(other.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut held, &mut word).unwrap();
    let out = root.join("out");
    let ran = scaling(&["run", &path, "--out", out.to_str().unwrap(), "--json"]);
    drop(other.stdin.take());
    other.wait().unwrap();
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    let table = ran.json();
    assert_eq!(table["elsewhere"], json!(["tnl-a"]));
    assert_eq!(table["runs"].as_array().unwrap().len(), 2);
    assert!(!out.join("tnl-a.json").exists());
    // Once it is free, it is done.
    let ran = scaling(&["run", &path, "--out", out.to_str().unwrap(), "--json"]);
    assert_eq!((ran.code, ran.json()["runs"].as_array().unwrap().len()), (0, 3));
}

#[test]
fn bad_studies_get_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let refused = |change: &dyn Fn(String) -> String, more: &[&str], words: &str| {
        let path = study(root, change);
        let ran = scaling(&[&["run", &path, "--out", root.join("out").to_str().unwrap()], more].concat());
        assert!(ran.error().contains(words), "{words}: {}", ran.stderr);
    };
    let with = |line: &'static str| move |text: String| text + line + "\n";
    let swap = |from: &'static str, to: &'static str| move |text: String| text.replace(from, to);
    refused(
        &with("colour = 3"),
        &[],
        "study.toml: line 11: unknown field `colour`",
    );
    refused(&swap("warmup = 2", "warmup = -2"), &[], "study.toml: line 6: ");
    refused(
        &with("rates = [1.0, nan]"),
        &[],
        "rates: found [1.0, NaN], expected factors above 0",
    );
    refused(
        &with("epochs = nan"),
        &[],
        "epochs, budget, seconds: found NaN, 1280 and 0, expected one of them",
    );
    refused(
        &with(
            "[[sizes]]\nname = 'd'\nlayers = 1\nwidth = 12\nheads = 1\nhidden = 32\nlr = 3e-3\nepochs = 2.0",
        ),
        &[],
        "sizes.d: found epochs 2, expected above 0, in a study with epochs",
    );
    refused(
        &swap("held_out = 0.1", "held_out = nan"),
        &[],
        "held_out: found NaN",
    );
    refused(
        &swap("budget = 1280", "budget = 100"),
        &[],
        "found 1 steps of 64 tokens, expected 2 to",
    );
    refused(
        &swap("'llama', 'tnl'", "'llama', 'lama'"),
        &[],
        "lama of size a: ",
    );
    refused(
        &swap("'llama', 'tnl'", "'llama', 'llama'"),
        &[],
        "expected at least one, each once",
    );
    refused(
        &swap("'llama', 'tnl'", "'../llama'"),
        &[],
        "name \"../llama\": expected letters",
    );
    refused(&swap("text.txt", "none.txt"), &[], "none.txt: ");
    refused(
        &with("[models.mamba]"),
        &[],
        "models.mamba: expected one of architectures",
    );
    refused(
        &|text| text,
        &["--only", "hgrn2"],
        "--only: found \"hgrn2\", expected some of llama, tnl",
    );
    refused(
        &|text| text,
        &["--sizes", "d"],
        "--sizes: found \"d\", expected some of a, b, c",
    );
    assert!(!root.join("out").join("table.md").exists());

    let empty = root.join("empty");
    fs::create_dir(&empty).unwrap();
    let fit = |dir: &Path| scaling(&["fit", dir.to_str().unwrap()]);
    assert!(fit(&empty).error().contains("found 0 curves"));
    assert!(fit(&root.join("none")).error().contains("none: "));
    fs::write(empty.join("x.jsonl"), "{}\n").unwrap();
    assert!(fit(&empty).error().contains("x.json: no such file"));
    fs::write(empty.join("x.json"), "{\"row\": 3}").unwrap();
    assert!(fit(&empty).error().contains("x.json: "));
}
