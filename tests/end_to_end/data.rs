//! `fulgur data`: what can be tried without a network.

use std::collections::HashSet;

use crate::support::{names, run};
#[cfg(all(unix, feature = "media"))]
use crate::training;

#[test]
fn every_set_is_listed_with_its_terms() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let ran = run(["data", "list", "--json", "--data", data.to_str().unwrap()]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let report = ran.json();
    let sets = report["sets"].as_array().unwrap();
    let listed: HashSet<&str> = sets.iter().map(|set| set["name"].as_str().unwrap()).collect();
    assert_eq!(listed.len(), sets.len(), "a name is listed twice: {report}");
    assert!(listed.contains("stamps"), "{report}");
    for set in sets {
        assert!(
            !set["licence"].as_str().unwrap().is_empty() && set["download_bytes"].as_u64().unwrap() > 0,
            "{set}"
        );
        assert_eq!(
            (&set["prepared"], set["items"].is_null()),
            (&false.into(), true),
            "{set}"
        );
    }
    assert!(names(folder.path()).is_empty(), "listing writes nothing");
}

#[test]
fn the_environment_names_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let list = crate::support::fulgur()
        .args(["data", "list"])
        .env("FULGUR_DATA", folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8(list.stdout).unwrap();
    assert!(
        text.trim_end().ends_with(folder.path().to_str().unwrap()),
        "{text}"
    );
}

#[test]
fn an_unknown_set_is_refused_before_anything_is_fetched() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let ran = run([
        "data",
        "fetch",
        "stamps",
        "stamp",
        "--data",
        data.to_str().unwrap(),
        "--json",
    ]);
    let line = ran.error();
    assert!(
        line.contains("unknown data set stamp,") && line.contains("stamps"),
        "{line}"
    );
    assert!(names(folder.path()).is_empty());
    assert!(run(["data", "fetch"]).error().contains("<NAME>"));
    assert!(run(["data"]).error().contains("requires a subcommand"));
}

#[test]
fn a_missing_client_is_an_error_that_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let mut command = crate::support::fulgur();
    command
        .args(["data", "fetch", "stamps", "--json", "--data"])
        .arg(&data)
        .env("PATH", folder.path());
    let ran = crate::support::Ran::of(command.output().unwrap());
    assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{}", ran.stderr);
    let last = ran.stderr.lines().last().unwrap();
    assert!(last.starts_with("error: ") && last.contains("apt-get"), "{last}");
    assert!(!data.join("stamps").exists());
}

#[cfg(all(unix, feature = "media"))]
#[test]
fn the_text_recipe_finds_all_it_needs_in_the_fetched_sets() {
    let folder = tempfile::tempdir().unwrap();
    let Some(arguments) = training::real_recipe(folder.path()) else {
        return;
    };
    let mut command = crate::support::fulgur();
    command.current_dir(folder.path()).args(arguments);
    command.args(["--set", "text.sentences=120", "--set", "train.max_steps=2"]);
    let ran = crate::support::Ran::of(command.output().unwrap());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(ran.json()["finished"], true);
    assert_eq!(
        names(&folder.path().join("lessons")),
        ["lessons.safetensors", "tokenizer.json"]
    );
    assert!(folder.path().join("run/model/tokenizer.json").exists());
}
