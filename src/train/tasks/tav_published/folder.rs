//! The folder that the task writes: a generator that `fulgur generate` takes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use fulgur_lightnet::params::{Params, Precision, file};
use fulgur_tavdiffusion::pipeline::FILE_NAME;
use fulgur_tavdiffusion::published::{Piece, Places, TrainedTav};
use serde_json::{Map, Value, json};

use super::super::export::write_json;
use super::{Options, defaults};
use crate::train::TaskResult;

/// Parts that stay as they are.
const TAKEN: [Piece; 5] = [
    Piece::Tokenizer,
    Piece::TextEncoder,
    Piece::Vae,
    Piece::AudioVae,
    Piece::Vocoder,
];

/// What goes with the networks.
pub(super) struct Folder {
    /// `config.json` of the networks.
    pub(super) unet: Value,
    pub(super) codecs: Places,
    /// The schedule, where it is not the published one.
    pub(super) scheduler: Option<PathBuf>,
}

impl Folder {
    /// Writes networks, and copies of the other parts or their places, into `to`, which exists. What makes it a generator comes last.
    ///
    /// # Errors
    /// A file that cannot be read or written.
    pub(super) fn write(
        &self,
        to: &Path,
        options: &Options,
        trained: &TrainedTav,
        params: &Params,
        copies: bool,
    ) -> TaskResult<()> {
        let unet = to.join(Piece::Unet.folder());
        create(&unet)?;
        let tensors = trained.tensors(params)?;
        file::write(
            &unet.join("model.safetensors"),
            &tensors,
            &BTreeMap::new(),
            Precision::F32,
        )?;
        write_json(&unet.join("config.json"), &self.unet)?;
        let mut places = Map::new();
        let taken = TAKEN
            .into_iter()
            .filter_map(|piece| Some((piece, self.codecs.find(piece)?)));
        let scheduler = self.scheduler.as_deref().map(|place| (Piece::Scheduler, place));
        for (piece, place) in taken.chain(scheduler) {
            let name = piece.folder();
            if copies {
                copy(place, &to.join(name))?;
                continue;
            }
            let place = fs::canonicalize(place).map_err(|error| format!("{}: {error}", place.display()))?;
            places.insert(name.to_owned(), json!(place));
        }
        let mut index = defaults(options);
        if !places.is_empty() {
            index["folders"] = Value::Object(places);
        }
        write_json(&to.join(FILE_NAME), &index)
    }
}

fn create(dir: &Path) -> TaskResult<()> {
    fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()).into())
}

/// Copies a file into the folder `to`, or the files of a folder.
fn copy(from: &Path, to: &Path) -> TaskResult<()> {
    create(to)?;
    let failed = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
    let files = match from.is_file() {
        true => vec![from.to_owned()],
        false => {
            let entries = fs::read_dir(from).map_err(|error| failed(from, error))?;
            let paths = entries.map(|entry| entry.map(|entry| entry.path()));
            let mut paths = paths
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| failed(from, error))?;
            paths.retain(|path| path.is_file());
            paths.sort();
            paths
        }
    };
    for path in files {
        if let Some(name) = path.file_name() {
            fs::copy(&path, to.join(name)).map_err(|error| failed(&path, error))?;
        }
    }
    Ok(())
}
