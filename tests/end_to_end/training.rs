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

/// The sets of this checkout, where all of `wanted` are fetched; else a line that says that the test is skipped.
#[cfg(all(unix, feature = "media"))]
fn fetched(wanted: &[&str]) -> Option<PathBuf> {
    use fulgur::datasets::fetch::DataDir;
    let data = match std::env::var_os("FULGUR_DATA") {
        Some(_) => DataDir::from_env(),
        None => DataDir::new(concat!(env!("CARGO_MANIFEST_DIR"), "/data")),
    };
    let sets = fulgur::datasets::sets::list(&data);
    let absent = sets
        .iter()
        .find(|set| wanted.contains(&set.name) && !set.prepared);
    if let Some(set) = absent {
        eprintln!("skipped: {} is not fetched", set.name);
    }
    absent.is_none().then(|| data.path().canonicalize().unwrap())
}

/// Arguments that train the text encoder by its own recipe in `folder`, which gets the data sets of this checkout under
/// the name that the recipe gives them; none where they are not fetched.
#[cfg(all(unix, feature = "media"))]
pub(crate) fn real_recipe(folder: &Path) -> Option<Vec<String>> {
    let data = fetched(&["stamps", "wordnet", "minilm"])?;
    std::os::unix::fs::symlink(&data, folder.join("data")).unwrap();
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/recipes/text.toml");
    let mut arguments = vec!["train", recipe, "--json", "--device", "cpu"];
    for set in ["text.lessons='lessons'", "text.batch=4", "run_dir='run'"] {
        arguments.extend(["--set", set]);
    }
    Some(arguments.into_iter().map(str::to_owned).collect())
}
