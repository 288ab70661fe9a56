//! Pages that the program writes about itself are the pages in docs/.

use std::path::Path;

use crate::support::run;

/// Set to write the generated pages instead of comparing them.
const WRITE: &str = "FULGUR_WRITE_DOCS";

#[test]
fn the_command_reference_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/commands.md");
    let generated = run(["commands"]).stdout;
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == generated,
        "docs/commands.md is stale: {WRITE}=1 cargo test -p fulgur --test end_to_end"
    );
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
