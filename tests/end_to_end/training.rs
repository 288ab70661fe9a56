//! A recipe and its lessons, small enough that a step takes milliseconds.

use std::fs;
use std::path::{Path, PathBuf};

use fulgur::tavdiffusion::text::TextTokenizer;
use fulgur::tavdiffusion::text::teacher::Lessons;

/// Writes lessons for a text encoder and a recipe of `steps` steps that reads them and trains in `folder/run`.
pub(crate) fn recipe(folder: &Path, steps: u64) -> PathBuf {
    let sentences = [
        "a dog barks",
        "a violin plays",
        "rain falls",
        "a train rattles by",
    ];
    let tokenizer = TextTokenizer::train(&sentences, 300).unwrap();
    fs::write(folder.join("tokenizer.json"), tokenizer.to_json().unwrap()).unwrap();
    let mut lessons = Lessons::new(8);
    for (number, sentence) in sentences.iter().cycle().take(60).enumerate() {
        let mut vector = [0.0; 8];
        vector[number % 4] = 1.0;
        lessons.push(sentence, &vector);
    }
    let things = r#"[["dog", ["a dog"], [["barks", "barking"]]]]"#;
    lessons.notes.insert("things".to_owned(), things.to_owned());
    lessons.save(&folder.join("lessons.safetensors")).unwrap();

    let path = folder.join("recipe.toml");
    let text = format!(
        "task = 'text'\nseed = 3\nrun_dir = {run:?}\n\
         [train]\nmax_steps = {steps}\nlog_every = 5\ncheckpoint_seconds = 0.05\n\
         [optimiser]\nlr = 1e-3\n[schedule]\nwarmup = 5\n\
         [text]\nlessons = {folder:?}\nbatch = 8\n\
         [text.model]\nmodel_type = 'fulgur-text'\nvocab_size = 300\nembedding_size = 8\nhidden_size = 16\n\
         num_hidden_layers = 1\nnum_attention_heads = 2\nhead_dim = 4\nintermediate_size = 16\n\
         max_position_embeddings = 12\nsentence_size = 8\n",
        run = folder.join("run"),
    );
    fs::write(&path, text).unwrap();
    path
}
