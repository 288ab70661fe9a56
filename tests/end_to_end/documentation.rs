//! Pages that the program writes about itself are the pages in docs/.

use std::path::Path;

use crate::support::run;

/// Set to write the generated pages instead of comparing them.
const WRITE: &str = "FULGUR_WRITE_DOCS";

/// Compares a page of docs/ with what it is made from, or writes it where that is asked for.
fn check(name: &str, generated: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(name);
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(&path, generated).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == generated,
        "docs/{name} is stale: {WRITE}=1 cargo test -p fulgur --test end_to_end documentation"
    );
}

#[test]
fn the_command_reference_is_up_to_date() {
    check("commands.md", &run(["commands"]).stdout);
}

#[cfg(feature = "media")]
#[test]
fn the_vocabulary_is_up_to_date() {
    check("vocabulary.md", &fulgur::datasets::vocabulary::page().unwrap());
}

#[test]
fn every_command_has_an_example_that_names_it() {
    let page = run(["commands"]).stdout;
    let sections: Vec<&str> = page.split("\n```text\n").skip(1).collect();
    assert!(sections.len() >= 3, "{page}");
    for section in sections {
        let usage = section
            .lines()
            .find_map(|line| line.strip_prefix("Usage: "))
            .unwrap();
        let words = usage
            .split_whitespace()
            .take_while(|word| !word.starts_with(['[', '<', '-']));
        let name = words.collect::<Vec<_>>().join(" ");
        let (_, example) = section
            .split_once("\nExample:\n")
            .unwrap_or_else(|| panic!("{name}: no example"));
        let first = example.lines().next().unwrap();
        assert!(first.starts_with(&format!("  {name}")), "{name}: {first}");
    }
}
