//! Where the models that come with the program lie.

use std::path::{Path, PathBuf};

/// Folder of the builtin generator, inside the folder of models.
const GENERATOR: &str = "builtin";
/// Folder of the builtin AVHScore encoder, inside the folder of models.
const ENCODER: &str = "encoder";
/// Environment variable that names another folder of models.
const VARIABLE: &str = "FULGUR_MODELS";

/// A builtin model that is not where it should be.
#[derive(Debug, thiserror::Error)]
#[error("{}: no builtin {name} here; set {VARIABLE} to the folder `models` of the repository, or name a folder with {flag}", path.display())]
pub struct NotFound {
    name: &'static str,
    flag: &'static str,
    path: PathBuf,
}

/// Folder of the builtin generator.
///
/// # Errors
/// If there is none.
pub fn generator() -> Result<PathBuf, NotFound> {
    find(GENERATOR, "model_index.json", "--model")
}

/// Folder of the builtin AVHScore encoder.
///
/// # Errors
/// If there is none.
pub fn encoder() -> Result<PathBuf, NotFound> {
    find(ENCODER, "config.json", "--encoder")
}

/// Looks in `$FULGUR_MODELS`, beside the program (installed, or in its target folder), in the current folder and where
/// the program was built.
fn find(name: &'static str, file: &str, flag: &'static str) -> Result<PathBuf, NotFound> {
    let roots = roots();
    let found = roots
        .iter()
        .map(|root| root.join(name))
        .find(|dir| dir.join(file).is_file());
    found.ok_or_else(|| NotFound {
        name: if name == GENERATOR { "generator" } else { "encoder" },
        flag,
        path: roots.first().cloned().unwrap_or_default().join(name),
    })
}

fn roots() -> Vec<PathBuf> {
    if let Some(named) = std::env::var_os(VARIABLE) {
        return vec![named.into()];
    }
    let program = std::env::current_exe().ok();
    let beside = program
        .iter()
        .flat_map(|p| p.ancestors().skip(1).take(3))
        .map(|dir| dir.join("models"));
    let fixed = [
        Path::new("models").to_owned(),
        Path::new(env!("CARGO_MANIFEST_DIR")).join("models"),
    ];
    beside.chain(fixed).collect()
}
