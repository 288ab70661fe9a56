//! A published generator of random weights: a folder for each part, and a vocabulary of single letters.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use fulgur_lightnet::params::file;
use fulgur_tavdiffusion::pipeline::FILE_NAME;
use fulgur_tavdiffusion::published::{PIPELINE, Piece, letters, random_parts, random_weights};
use serde_json::{Map, Value, json};

use super::super::answer::Answer;
use super::{Arguments, CONFIG, Made, WEIGHTS, note};

/// The file of a schedule.
const SCHEDULE: &str = "scheduler_config.json";
/// Settings of `model_index.json` that are passed on.
const DEFAULTS: [&str; 7] = [
    "frames",
    "fps",
    "width",
    "height",
    "steps",
    "guidance_video",
    "guidance_audio",
];
/// Merges of a vocabulary without any.
const NO_MERGES: &str = "#version: 0.2\n";

/// The configuration of a published generator, where `text` is one.
pub(super) fn config(text: &[u8]) -> Option<Map<String, Value>> {
    let Ok(Value::Object(config)) = serde_json::from_slice(text) else {
        return None;
    };
    let class = config.get("_class_name").and_then(Value::as_str)?;
    class.ends_with(PIPELINE).then_some(config)
}

pub(super) fn run(arguments: &Arguments, config: &Map<String, Value>) -> anyhow::Result<Answer> {
    let Arguments {
        config: from, output, ..
    } = arguments;
    let known = |name: &str| {
        let piece = Piece::ALL.iter().any(|piece| piece.folder() == name);
        piece || name.starts_with('_') || name == "name" || DEFAULTS.contains(&name)
    };
    if let Some(name) = config.keys().find(|name| !known(name)) {
        bail!(
            "{}: found {name}, expected parts and settings of a generator",
            from.display()
        );
    }
    let parts = random_parts(config).map_err(|error| anyhow!("{}: {error}", from.display()))?;
    let index = output.join(FILE_NAME);
    let held = |path: &PathBuf| path.exists();
    if let Some(path) = std::iter::once(index.clone())
        .chain(parts.iter().map(|part| output.join(part.piece.folder())))
        .find(held)
    {
        bail!(
            "{}: exists already, expected a folder that holds no model yet",
            path.display()
        );
    }
    let mut made = Made {
        paths: Vec::new(),
        tensors: 0,
        parameters: 0,
        bytes: 0,
    };
    for part in &parts {
        let dir = folder(output, part.piece)?;
        if part.piece == Piece::Scheduler {
            made.paths.push(write(&dir.join(SCHEDULE), &part.config)?);
            continue;
        }
        if part.piece == Piece::TextEncoder {
            let dir = folder(output, Piece::Tokenizer)?;
            let pieces = part.config["vocab_size"].as_u64().unwrap_or_default() as usize;
            made.paths.push(write(&dir.join("vocab.json"), &letters(pieces))?);
            let merges = dir.join("merges.txt");
            file::write_atomically(&merges, |out| out.write_all(NO_MERGES.as_bytes()))?;
            made.paths.push(merges);
        }
        let weights = random_weights(&part.shapes, arguments.random)?;
        let path = dir.join(WEIGHTS);
        file::write(&path, &weights, &note(arguments), arguments.precision.of_files())?;
        made.tensors += weights.len();
        made.parameters += weights.values().map(|tensor| tensor.elem_count()).sum::<usize>();
        made.bytes += fs::metadata(&path)
            .map_err(|error| anyhow!("{}: {error}", path.display()))?
            .len();
        made.paths.push(path);
        made.paths.push(write(&dir.join(CONFIG), &part.config)?);
    }
    // What makes the folder a generator comes last.
    made.paths
        .push(write(&index, &index_of(config, arguments.random))?);
    Answer::new(&made)
}

fn index_of(config: &Map<String, Value>, seed: u64) -> Value {
    let mut index = Map::new();
    index.insert("_class_name".into(), config["_class_name"].clone());
    let name = format!("untrained, seed {seed}");
    index.insert("name".into(), config.get("name").cloned().unwrap_or(json!(name)));
    for field in DEFAULTS {
        if let Some(value) = config.get(field) {
            index.insert(field.into(), value.clone());
        }
    }
    Value::Object(index)
}

fn folder(output: &Path, piece: Piece) -> anyhow::Result<PathBuf> {
    let dir = output.join(piece.folder());
    fs::create_dir_all(&dir).with_context(|| format!("{}: cannot write", dir.display()))?;
    Ok(dir)
}

fn write(path: &Path, value: &Value) -> anyhow::Result<PathBuf> {
    let text = serde_json::to_string_pretty(value)?;
    file::write_atomically(path, |out| out.write_all(text.as_bytes()))?;
    Ok(path.to_owned())
}
