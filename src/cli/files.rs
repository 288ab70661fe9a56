//! Names of files that a command was given.

use std::path::Path;

use anyhow::anyhow;
use fulgur_datasets::atomic::AtomicFile;

/// Checks, before any long work, that a file can be written under this name.
pub(super) fn check_output(path: &Path) -> anyhow::Result<()> {
    let refuse = |words: &str| anyhow!("{}: cannot write: {words}", path.display());
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty())
        && !folder.is_dir()
    {
        return Err(refuse(&format!("there is no folder {}", folder.display())));
    }
    AtomicFile::create(path).map(drop).map_err(|error| {
        let words = error.to_string();
        // The name of the temporary file would only puzzle the user.
        refuse(words.split(" at path ").next().unwrap_or(&words))
    })
}

/// As [`check_output`], of a page that `--report` asks for.
#[cfg(feature = "media")]
pub(super) fn check_page(path: &Path) -> anyhow::Result<()> {
    let html = path
        .extension()
        .is_some_and(|end| end.eq_ignore_ascii_case("html"));
    if !html {
        anyhow::bail!(
            "--report: found {}, expected a name that ends in .html",
            path.display()
        );
    }
    check_output(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_cannot_be_written_is_refused_in_one_line() {
        let folder = tempfile::tempdir().unwrap();
        check_output(&folder.path().join("new.png")).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let missing = check_output(&folder.path().join("none/new.png"))
            .unwrap_err()
            .to_string();
        assert!(
            missing.contains("there is no folder") && missing.ends_with("none"),
            "{missing}"
        );
        let taken = check_output(folder.path()).unwrap_err().to_string();
        assert!(taken.contains("not a regular file"), "{taken}");
    }
}
