//! Where the models that come with the program lie.

use std::path::{Path, PathBuf};

/// Environment variable that names another folder of models.
const VARIABLE: &str = "FULGUR_MODELS";

/// A kind of builtin model.
struct Builtin {
    /// What it is, in words.
    name: &'static str,
    /// Its folder, inside the folder of models.
    folder: &'static str,
    /// A file that the folder has.
    file: &'static str,
    /// The option that names another one.
    flag: &'static str,
}

const GENERATOR: Builtin = Builtin {
    name: "generator",
    folder: "builtin",
    file: "model_index.json",
    flag: "--model",
};
const ENCODER: Builtin = Builtin {
    name: "encoder",
    folder: "encoder",
    file: "config.json",
    flag: "--encoder",
};
const JUDGES: Builtin = Builtin {
    name: "judges",
    folder: "judges",
    file: "config.json",
    flag: "--judges",
};

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
    find(&GENERATOR)
}

/// Folder of the builtin AVHScore encoder.
///
/// # Errors
/// If there is none.
pub fn encoder() -> Result<PathBuf, NotFound> {
    find(&ENCODER)
}

/// The folder of an encoder by its name: that of the builtin one, or what is named.
///
/// # Errors
/// If `builtin` is asked for and there is none.
pub fn encoder_named(name: &Path) -> Result<PathBuf, NotFound> {
    match name == Path::new("builtin") {
        true => encoder(),
        false => Ok(name.to_owned()),
    }
}

/// Folder of the builtin judges of generated clips.
///
/// # Errors
/// If there is none.
pub fn judges() -> Result<PathBuf, NotFound> {
    find(&JUDGES)
}

/// Looks in `$FULGUR_MODELS`, beside the program (installed, or in its target folder), in the current folder and where
/// the program was built.
fn find(wanted: &Builtin) -> Result<PathBuf, NotFound> {
    let roots = roots();
    let found = roots
        .iter()
        .map(|root| root.join(wanted.folder))
        .find(|dir| dir.join(wanted.file).is_file());
    found.ok_or_else(|| NotFound {
        name: wanted.name,
        flag: wanted.flag,
        path: roots.first().cloned().unwrap_or_default().join(wanted.folder),
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
