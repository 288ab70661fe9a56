//! Tests of the task.

mod parameters;
mod ranks;
mod tensor;

use super::*;
use crate::train::{Options as RunOptions, Recipe, run};
use fulgur_lightnet::lm::{Architecture, Config};
use fulgur_lightnet::testing;
use serde_json::Value;

/// What is estimated beforehand is what is built.
#[test]
fn its_outline_has_its_parameters() {
    for architecture in Architecture::ALL.map(Architecture::name) {
        let folder = tempfile::tempdir().unwrap();
        let tokens = folder.path().join("text.txt");
        std::fs::write(&tokens, "words and words ".repeat(40)).unwrap();
        let recipe = format!(
            "task = 'lm'\n[train]\nmax_steps = 1\n[lm]\ntokens = '{}'\ncontext = 5\n[lm.model]\narchitecture = '{architecture}'\nlayers = 2\n\
             width = 32\nhidden = 48\n",
            tokens.display()
        );
        let recipe = Recipe::check(recipe.parse().unwrap(), "test".into(), folder.path()).unwrap();
        let task = LmTask::open(recipe.own().unwrap(), 1, &Device::Cpu).unwrap();
        let needs = crate::train::tasks::outline::needs(&recipe).unwrap();
        let shapes: Vec<_> = task
            .params
            .vars()
            .into_iter()
            .map(|(name, var)| (name, var.dims().to_vec()))
            .collect();
        let outlined: Vec<_> = needs.params.shapes().into_iter().collect();
        assert_eq!(outlined, shapes, "{architecture}");
        let tokens = task.batch(&Cursor { seed: 1, index: 0 }).unwrap().samples as f64;
        let flops = task.flops_per_sample().map(|flops| flops * tokens);
        assert_eq!(needs.flops, flops, "{architecture}");
    }
}

fn trained(folder: &Path, text: &str, model: &str) -> (LmTask, Vec<f64>) {
    let tokens = folder.join("text.txt");
    std::fs::write(&tokens, text).unwrap();
    let recipe = format!(
        "task = 'lm'\n[train]\nmax_steps = 60\nlog_every = 1\nema = 0.0\ncheckpoint_seconds = 1e9\n[optimiser]\n\
         lr = 3e-3\n[schedule]\nwarmup = 5\n[lm]\ntokens = '{}'\nheld_out = 0.2\nbatch = 4\ncontext = 24\n\
         [lm.model]\nlayers = 2\nwidth = 32\nhidden = 48\nheads = 2\n{model}\n",
        tokens.display()
    );
    let run_dir = folder.join("run");
    let recipe = Recipe::check(recipe.parse().unwrap(), "test".into(), &run_dir).unwrap();
    let task = LmTask::open(recipe.own().unwrap(), 1, &Device::Cpu).unwrap();
    run(&task, &recipe, &RunOptions::default(), |_| {}).unwrap();
    let lines = std::fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap();
    let losses = lines
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64());
    (task, losses.collect())
}

/// Every architecture learns a text that repeats itself, and what it exports is the model that it was.
#[test]
fn all_architectures_train_and_load_again() {
    let text: String = (0..400)
        .map(|i| ["one ", "two ", "three ", "four "][i % 4])
        .collect();
    let hybrid = "architecture = 'tnl'\nsoftmax_every = 2";
    let both = "architecture = 'lightnet'\n[lm.model.variant]\nbidirectional = true\nuse_tpe = true\nuse_lrpe = true";
    let mut models: Vec<String> = Architecture::ALL
        .iter()
        .map(|kind| format!("architecture = '{}'", kind.name()))
        .collect();
    models.extend([hybrid, both].map(str::to_owned));
    for model in models {
        let folder = tempfile::tempdir().unwrap();
        let (task, losses) = trained(folder.path(), &text, &model);
        let (first, last) = (losses[0], losses[losses.len() - 1]);
        assert!(last < 0.6 * first, "{model}: loss {first} to {last}");
        let validation = task.validate().unwrap()[0].1;
        assert!(validation < 0.6 * first, "{model}: validation {validation}");
        let exported = folder.path().join("model");
        std::fs::create_dir(&exported).unwrap();
        task.export(&exported).unwrap();
        let again = LanguageModel::load(&exported, None, DType::F32, &Device::Cpu).unwrap();
        let ids = Ids::new(&[1, 2, 3, 4], &[1, 4], again.config().vocab_size).unwrap();
        let far = (again.logits(&ids).unwrap() - task.model.logits(&ids).unwrap()).unwrap();
        assert_eq!(
            far.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap(),
            0.0,
            "{model}"
        );
        assert_eq!(again.config().architecture, task.model.config().architecture);
    }
}

fn opened(folder: &Path, name: &str, bytes: &[u8], options: &str) -> TaskResult<LmTask> {
    let tokens = folder.join(name);
    std::fs::write(&tokens, bytes).unwrap();
    let recipe = format!(
        "task = 'lm'\n[train]\nmax_steps = 1\n[lm]\ntokens = '{}'\nbatch = 2\ncontext = 8\nheld_out = 0.3\n{options}\n\
         [lm.model]\nlayers = 1\nwidth = 16\nhidden = 16\nheads = 2\n",
        tokens.display()
    );
    let recipe = Recipe::check(recipe.parse().unwrap(), "test".into(), folder).unwrap();
    LmTask::open(recipe.own().unwrap(), 1, &Device::Cpu)
}

#[test]
fn documents_are_packed_with_their_ends() {
    let folder = tempfile::tempdir().unwrap();
    let lines: String = (10..40).map(|i| format!("{{\"text\": \"no {i}\"}}\n")).collect();
    let documents = "packing = 'documents'\norder = 'sequential'";
    let task = opened(folder.path(), "x.jsonl", lines.as_bytes(), documents).unwrap();
    assert_eq!(&task.tokens[..7], [110, 111, 32, 49, 48, 0, 110]);
    let batch = task.batch(&Cursor { seed: 1, index: 0 }).unwrap();
    let borders: Vec<u32> = batch.get("borders").unwrap().to_vec1().unwrap();
    assert_eq!(borders, [0, 6, 8, 12, 16]);
    let targets: Vec<u32> = batch
        .get("targets")
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap();
    assert_eq!(targets[4..7], [0, IGNORED, 111]);
    let loss = task.validate().unwrap()[0].1;
    assert!(loss.is_finite() && loss > 1.0, "{loss}");
    // Prepared tokens say which of them ends documents.
    let ids: Vec<u8> = task.tokens.iter().flat_map(|id| id.to_le_bytes()).collect();
    let prepared = opened(
        folder.path(),
        "x.u16",
        &ids,
        &format!("{documents}\nend_of_document = 0"),
    )
    .unwrap();
    assert_eq!(prepared.validate().unwrap()[0].1, loss);
}

/// A file of its own is held out whole, and nothing of the other.
#[test]
fn a_file_may_be_held_out() {
    let folder = tempfile::tempdir().unwrap();
    let held = folder.path().join("held.txt");
    std::fs::write(&held, "other words ".repeat(5)).unwrap();
    let options = format!("held_out_tokens = '{}'\nvalidation = 3", held.display());
    let task = opened(folder.path(), "x.txt", &[b'a'; 100], &options).unwrap();
    assert_eq!((task.trained, task.tokens.len()), (100, 160));
    assert_eq!(task.tokens[99..102], [97, 111, 116]);
    assert!(
        task.starts(&Cursor { seed: 1, index: 0 })
            .iter()
            .all(|start| start + 9 <= 100)
    );
    assert!(task.validate().unwrap()[0].1 > 1.0);
    std::fs::write(&held, "short").unwrap();
    let line = opened(folder.path(), "x.txt", &[b'a'; 100], &options)
        .err()
        .unwrap()
        .to_string();
    assert!(
        line.contains("100 tokens to train on and 5 held out, expected 9"),
        "{line}"
    );
    let missing = opened(
        folder.path(),
        "x.txt",
        &[b'a'; 100],
        "held_out_tokens = 'none.txt'",
    );
    assert!(missing.err().unwrap().to_string().starts_with("none.txt: "));
}

#[test]
fn documents_that_are_none_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let line = |name: &str, bytes: &[u8], options: &str| {
        let refused = opened(folder.path(), name, bytes, options)
            .err()
            .unwrap()
            .to_string();
        assert_eq!(refused.lines().count(), 1, "{refused}");
        refused
    };
    let good = "{\"text\": \"many words of one document\"}\n".repeat(4);
    let documents = "packing = 'documents'";
    for (name, bytes, options, words) in [
        (
            "x.jsonl",
            &b"{\"text\": \"a\", \"id\": 3}\n"[..],
            "",
            "line 1: found unknown field `id`",
        ),
        ("x.jsonl", b"{\"text\": \"\xff\"}\n", "", "no UTF-8 at byte 10"),
        (
            "x.jsonl",
            b"{\"text\": \"a\\u0000\"}\n",
            "",
            "document 0 has a character 0",
        ),
        (
            "x.txt",
            good.as_bytes(),
            documents,
            "packing is documents, expected JSONL",
        ),
        (
            "x.jsonl",
            good.as_bytes(),
            "end_of_document = 3",
            "end_of_document is for other files",
        ),
        ("x.u16", &[1; 200], "", "token 0 is 257, expected less than 256"),
        (
            "x.jsonl",
            good.as_bytes(),
            "packing = 'documents'\n[lm.model.variant]\nconv_size = 4",
            "packed sequences are not for short convolutions",
        ),
    ] {
        let found = line(name, bytes, options);
        assert!(found.contains(words), "{found}");
    }
}

#[test]
fn variants_are_those_of_the_configuration() {
    let read = |text: &str| toml::from_str::<ModelOptions>(text).map(|options| options.config());
    let config = read(
        "architecture = 'tnl'\nlayers = 8\nsoftmax_every = 4\nkey_value_heads = 2\n[variant]\nnorm_per_head = true\n\
         conv_size = 4\ndecay_schedule = 'linear8'\nlrpe_layers = [0]",
    )
    .unwrap();
    let layers: Vec<usize> = (0..8)
        .filter(|&layer| config.softmax_layer(layer).is_some())
        .collect();
    assert_eq!((layers, config.attn[0].num_kv_heads), (vec![3, 7], Some(2)));
    assert!(config.norm_per_head && config.conv_size == Some(4) && config.lrpe_layers == [0]);
    let expected = Config {
        norm_per_head: false,
        conv_size: None,
        attn: Vec::new(),
        lrpe_layers: Vec::new(),
        ..config.clone()
    };
    assert_eq!(
        expected.decay_schedule,
        fulgur_lightnet::lm::DecaySchedule::Linear8
    );
    let line = read("[variant]\nnorm = 3").unwrap_err().to_string();
    assert!(line.contains("unknown field `norm`"), "{line}");
}

/// 200 steps of AdamW from a given start on given tokens, beside PyTorch and transformers (`tests/golden/llama_steps.py`).
#[test]
fn losses_are_those_of_pytorch() {
    let golden: Value =
        serde_json::from_slice(&std::fs::read(testing::golden("llama_steps.json")).unwrap()).unwrap();
    for name in ["untied", "tied"] {
        let folder = tempfile::tempdir().unwrap();
        let model = testing::model(&format!("llama_{name}"), folder.path());
        let shape = shape_of(&model);
        let start = model.join("model.safetensors");
        let tokens = folder.path().join("tokens.u16");
        std::fs::copy(testing::golden("llama_tokens.bin"), &tokens).unwrap();
        let recipe = format!(
            "task = 'lm'\n[train]\nstart = '{}'\nmax_steps = 200\nema = 0.0\nlog_every = 1\n\
             checkpoint_seconds = 1e9\n[optimiser]\nlr = 3e-3\nbeta1 = 0.9\nbeta2 = 0.95\nweight_decay = 0.1\n\
             [schedule]\nwarmup = 20\nfloor = 0.1\n[lm]\ntokens = '{}'\nheld_out = 0.0\nbatch = 8\ncontext = 64\n\
             order = 'sequential'\n[lm.model]\narchitecture = 'llama'\nvocabulary = 97\n{shape}\n",
            start.display(),
            tokens.display()
        );
        let run_dir = folder.path().join("run");
        let recipe = Recipe::check(recipe.parse().unwrap(), "test".into(), &run_dir).unwrap();
        let task = LmTask::open(recipe.own().unwrap(), 1, &Device::Cpu).unwrap();
        run(&task, &recipe, &RunOptions::default(), |_| {}).unwrap();
        let lines = std::fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap();
        let found: Vec<f64> = lines
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64())
            .collect();
        let wanted = golden[name]["loss"].as_array().unwrap();
        assert_eq!(found.len(), wanted.len());
        for (step, (found, wanted)) in found.iter().zip(wanted).enumerate() {
            let wanted = wanted.as_f64().unwrap();
            assert!(
                (found - wanted).abs() < 1e-4 * wanted,
                "{name}, step {step}: {found}, expected {wanted}"
            );
        }
    }
}

/// The shape of a model as its `config.json` says.
fn shape_of(model: &Path) -> String {
    let config: Value = serde_json::from_slice(&std::fs::read(model.join("config.json")).unwrap()).unwrap();
    let keys = [
        ("width", "hidden_size"),
        ("hidden", "intermediate_size"),
        ("layers", "num_hidden_layers"),
        ("heads", "num_attention_heads"),
        ("key_value_heads", "num_key_value_heads"),
        ("head_width", "head_dim"),
        ("tied", "tie_word_embeddings"),
        ("norm_eps", "rms_norm_eps"),
    ];
    keys.map(|(own, theirs)| format!("{own} = {}", config[theirs]))
        .join("\n")
}
