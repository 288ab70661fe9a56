//! `fulgur train` on a small language model: what it answers to bad input, and that nothing is lost by it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::signals::train;
use crate::support::{names, run};

/// A text, and a recipe of six steps on it that trains in `folder/run`.
fn recipe(folder: &Path) -> PathBuf {
    let text = folder.join("text.txt");
    fs::write(&text, "a bell rings as the rain falls ".repeat(60)).unwrap();
    let path = folder.join("recipe.toml");
    let recipe = format!(
        "task = 'lm'\nseed = 3\nrun_dir = {:?}\n[train]\nmax_steps = 6\nlog_every = 3\n\
         [lm]\ntokens = {text:?}\nbatch = 2\ncontext = 8\n[lm.model]\nlayers = 1\nwidth = 32\nhidden = 32\nheads = 2\n",
        folder.join("run")
    );
    fs::write(&path, recipe).unwrap();
    path
}

/// Every file below a folder.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for name in names(folder) {
        let path = folder.join(name);
        if path.is_dir() {
            all.extend(files(&path));
        } else {
            all.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    all
}

#[test]
fn tokens_and_shapes_that_do_not_fit_are_one_line_before_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path());
    let at = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        format!("lm.tokens={:?}", path.to_str().unwrap())
    };
    let before = names(folder.path()).len() + 4;
    for (set, words) in [
        (at("empty.txt", b""), "empty.txt: 0 tokens to train on"),
        (at("short.txt", b"a bell"), "short.txt: 6 tokens to train on"),
        (at("odd.u16", b"abc"), "odd.u16: 3 bytes, expected two a token"),
        (
            at("far.u16", &[[7, 0], [0, 1]].concat().repeat(500)),
            "far.u16: token 1 is 256, expected less than 256, the vocabulary",
        ),
        ("lm.tokens=''".into(), "tokens is missing, expected a file"),
        (
            format!("lm.tokens={:?}", folder.path().to_str().unwrap()),
            "Is a directory",
        ),
        ("lm.tokens='none.txt'".into(), "none.txt: No such file"),
        ("lm.batch=0".into(), "batch 0, context 8: expected both above 0"),
        (
            "lm.batch=1000000000000".into(),
            "expected at most 268435456 tokens in a batch",
        ),
        (
            "lm.batch=9223372036854775807".into(),
            "expected at most 268435456 tokens in a batch",
        ),
        (
            "lm.context=5000".into(),
            "expected 5001 of each, a window of 5000 and its targets",
        ),
        ("lm.held_out=nan".into(), "held_out is NaN, expected 0 to 1"),
        (
            "lm.model.heads=3".into(),
            "hidden_size is 32, expected a multiple of num_attention_heads, 3",
        ),
        (
            "lm.model.vocabulary=97".into(),
            "expected less than 97, the vocabulary",
        ),
        ("lm.model.architecture='rnn'".into(), "`rnn`"),
        ("lm.pool=3".into(), "`pool`"),
        ("train.max_steps=0".into(), "expected max_steps or max_seconds"),
        (
            "optimiser.lr=nan".into(),
            "optimiser.lr: found NaN, expected more than 0",
        ),
        (
            "optimiser.clip=-1.0".into(),
            "optimiser.clip: found -1, expected 0 or more",
        ),
    ] {
        let ran = train(&recipe, &["--set", &set]);
        let line = ran.error();
        assert!(
            line.contains(words) && line.contains("recipe.toml"),
            "{set}: {line}"
        );
    }
    // Nothing but the inputs is there: no run was begun.
    assert_eq!(names(folder.path()).len(), before);
}

#[test]
fn another_model_or_optimiser_does_not_go_on_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path());
    let ran = train(&recipe, &[]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let run_dir = folder.path().join("run");
    let whole = files(&run_dir);
    for (set, words) in [
        (
            "lm.model.architecture='llama'",
            "checkpoints: not the weights of this model: 7 missing: model.embed_tokens.weight, ",
        ),
        ("lm.model.layers=2", "not the weights of this model: 12 missing"),
        (
            "lm.model.hidden=48",
            "3 of another shape: model.layers.0.mlp.down_proj.weight (found [32, 32], expected [32, 48])",
        ),
        (
            "optimiser.muon=['layers.']",
            "checkpoints: not a usable checkpoint: not the moments of this optimiser: \
             `moments.model.layers.0.attn.k_proj.weight`: found shape [2, 32, 32], expected [1, 32, 32]",
        ),
        ("seed=4", "its seed is 3, the recipe's 4"),
    ] {
        let ran = train(&recipe, &["--resume", "--set", "train.max_steps=9", "--set", set]);
        let line = ran.error();
        assert!(line.contains(words), "{set}: {line}");
        let found = files(&run_dir);
        // Each session has its own TensorBoard file.
        let kept = |(path, _): &(&PathBuf, &Vec<u8>)| !path.to_string_lossy().contains("tfevents");
        let [found, whole] = [&found, &whole].map(|all| all.iter().filter(kept).collect::<Vec<_>>());
        assert!(found == whole, "{set}: files of the run changed");
    }
    let ran = train(&recipe, &["--resume", "--set", "train.max_steps=9"]);
    assert_eq!((ran.code, &ran.json()["step"]), (0, &9.into()), "{}", ran.stderr);
}

/// The host looks every 16 steps, or when it logs.
#[test]
fn a_run_that_diverges_is_one_line_and_keeps_its_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path());
    assert_eq!(train(&recipe, &[]).code, 0);
    let run_dir = folder.path().join("run");
    let model = fs::read(run_dir.join("model/model.safetensors")).unwrap();
    let more = [
        "train.max_steps=1000",
        "train.max_skips=2",
        "optimiser.lr=1e300",
        "train.log_every=1000",
    ];
    let more = more.iter().flat_map(|set| ["--set", set]);
    let more: Vec<&str> = ["--resume", "-q"].into_iter().chain(more).collect();
    let ran = train(&recipe, &more);
    let line = ran.error();
    assert!(line.starts_with("step 16: gradients were not finite "), "{line}");
    assert!(
        line.ends_with(" times in a row; the last checkpoint is from step 6"),
        "{line}"
    );
    assert_eq!(names(&run_dir.join("checkpoints")), ["step-0000000006"]);
    assert_eq!(fs::read(run_dir.join("model/model.safetensors")).unwrap(), model);
    let ran = train(&recipe, &["--resume", "--set", "train.max_steps=9"]);
    assert_eq!((ran.code, &ran.json()["step"]), (0, &9.into()), "{}", ran.stderr);
}

/// What is foretold of a step follows from the shapes: no tokens are needed.
#[test]
fn an_estimate_counts_the_operations_of_a_step() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path());
    let path = recipe.to_str().unwrap();
    let of = |sets: &[&str]| -> Value {
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        run(["estimate", path, "--json"].into_iter().chain(sets)).json()["step_flops"].clone()
    };
    // Maps, low-rank gate, gated linear unit and head; states of two heads: 16 tokens.
    let products = 4 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 32 + 256 * 32;
    let step = 16 * (6 * products + 12 * 2 * 16 * 16);
    assert_eq!(of(&[]), f64::from(step));
    assert_eq!(of(&["train.accumulate=3", "lm.tokens=''"]), f64::from(3 * step));
    let shown = run(["estimate", path]).stdout;
    assert!(
        shown.contains("work\n  step") && shown.contains("1.67e6"),
        "{shown}"
    );
}
