//! What may lie in the repository: no traces of a machine, nothing large but weights.

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
        let Ok(text) = String::from_utf8(std::fs::read(file).unwrap()) else {
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
