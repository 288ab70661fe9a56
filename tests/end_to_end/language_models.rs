//! `fulgur forward` on language models in the folders that other libraries write.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use fulgur::lightnet::params::{Precision, file};
use fulgur::lightnet::testing;
use serde_json::{Value, json};

use crate::support::{Ran, fulgur};

const CPU: &Device = &Device::Cpu;

fn forward(folder: &Path, model: &Path, ids: &Tensor) -> Ran {
    let inputs = folder.join("in.safetensors");
    let tensors = BTreeMap::from([("input_ids".to_owned(), ids.clone())]);
    file::write(&inputs, &tensors, &BTreeMap::new(), Precision::F32).unwrap();
    let mut command = fulgur();
    command.args(["forward", "--json", "-q", "--device", "cpu", "--model"]);
    command.arg(model).arg("--inputs").arg(inputs);
    command.arg("--out").arg(folder.join("out.safetensors"));
    Ran::of(command.output().unwrap())
}

/// A copy of a folder of the goldens, whose `config.json` is changed.
fn copy(of: &str, to: &Path, change: impl FnOnce(&mut Value)) -> PathBuf {
    let _ = fs::remove_dir_all(to);
    fs::rename(testing::model(of, to.parent().unwrap()), to).unwrap();
    let path = to.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(&path, config.to_string()).unwrap();
    to.to_owned()
}

fn relative(found: &Tensor, wanted: &Tensor) -> f32 {
    let square = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
    (square(&(found - wanted).unwrap()) / square(wanted)).sqrt()
}

/// The values that a golden file holds: all, or every third where it is flat.
fn kept(logits: &Tensor, wanted: &Tensor) -> Tensor {
    match wanted.rank() {
        1 => testing::thinned(logits, 3),
        _ => logits.clone(),
    }
}

#[test]
fn logits_are_those_of_the_libraries() {
    let root = tempfile::tempdir().unwrap();
    for (model, logits, name) in [
        ("llama_untied", "llama_logits", "untied"),
        ("llama_tied", "llama_logits", "tied"),
        ("llama_scaled", "llama_variants", "llama3"),
        ("hgrn2_bounded", "hgrn2_logits", "bounded"),
        ("hgrn2_plain", "hgrn2_logits", "plain"),
        ("lightnet_narrow", "lightnet_logits", "narrow"),
        ("transnormer_mixed", "transnormer_logits", "mixed"),
    ] {
        let wanted = testing::tensors(logits);
        let folder = testing::model(model, root.path());
        let ran = forward(root.path(), &folder, &wanted["input_ids"]);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{model}");
        let ids = wanted["input_ids"].dims2().unwrap();
        let wanted = &wanted[&format!("logits.{name}")];
        let found = file::read(&root.path().join("out.safetensors"), CPU)
            .unwrap()
            .tensors;
        let found = &found["logits"];
        assert_eq!(ran.json()["outputs"], json!({"logits": found.dims()}));
        assert_eq!(found.dims3().map(|(b, n, _)| (b, n)).unwrap(), ids);
        let error = relative(&kept(found, wanted), wanted);
        assert!(error < 2e-5, "{model}: {error:e}");
    }
}

/// A model whose configuration does not say what it is, is what its tensors are; old files hold more than is needed.
#[test]
fn folders_of_other_times_are_read() {
    let root = tempfile::tempdir().unwrap();
    let wanted = testing::tensors("llama_logits");
    let model = copy("llama_tied", &root.path().join("old"), |config| {
        let config = config.as_object_mut().unwrap();
        config.remove("model_type");
        config.remove("rope_parameters");
        config.insert("rope_theta".into(), json!(10000));
        config.insert("rope_scaling".into(), Value::Null);
    });
    let path = model.join("model.safetensors");
    let mut tensors = file::read(&path, CPU).unwrap().tensors;
    let head = tensors["model.embed_tokens.weight"].clone();
    tensors.insert("lm_head.weight".into(), head);
    let frequencies = Tensor::zeros(6, DType::F32, CPU).unwrap();
    tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), frequencies);
    file::write(&path, &tensors, &BTreeMap::new(), Precision::F32).unwrap();
    let ran = forward(root.path(), &model, &wanted["input_ids"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let found = file::read(&root.path().join("out.safetensors"), CPU)
        .unwrap()
        .tensors;
    let wanted = &wanted["logits.tied"];
    assert!(relative(&kept(&found["logits"], wanted), wanted) < 2e-5);
}

#[test]
fn what_cannot_be_a_model_is_one_line() {
    let root = tempfile::tempdir().unwrap();
    let ids = Tensor::new(&[[1i64, 2, 3]], CPU).unwrap();
    let dir = root.path().join("model");
    let refused = |words: &[&str]| {
        let ran = forward(root.path(), &dir, &ids);
        let line = ran.error();
        assert!(words.iter().all(|word| line.contains(word)), "{words:?}: {line}");
        assert!(!root.path().join("out.safetensors").exists());
    };
    let changes: [(&str, &str, Value, &[&str]); 12] = [
        (
            "llama_tied",
            "model_type",
            json!("gpt2"),
            &["\"gpt2\"", "llama, hgrn2, lightnet"],
        ),
        (
            "llama_tied",
            "num_hidden_layers",
            json!(1_000_000_000_000u64),
            &["num_hidden_layers is 1000000000000", "1 to 4096"],
        ),
        (
            "llama_tied",
            "hidden_size",
            json!(1u64 << 60),
            &["hidden_size is 1152921504606846976"],
        ),
        (
            "llama_tied",
            "vocab_size",
            json!(1 << 24),
            &["model.embed_tokens.weight (found [97, 32], expected [16777216, 32])"],
        ),
        (
            "llama_tied",
            "head_dim",
            json!(null),
            &["q_proj.weight (found [48, 32], expected [32, 32])", "o_proj"],
        ),
        (
            "llama_tied",
            "num_attention_heads",
            json!(0),
            &["num_attention_heads is 0"],
        ),
        (
            "llama_tied",
            "num_key_value_heads",
            json!(3),
            &["num_key_value_heads is 3", "divisor"],
        ),
        (
            "llama_tied",
            "attention_bias",
            json!(true),
            &["missing: model.layers.0.self_attn.k_proj.bias [12]"],
        ),
        (
            "llama_tied",
            "tie_word_embeddings",
            json!(false),
            &["1 missing: lm_head.weight [97, 32]"],
        ),
        (
            "llama_tied",
            "num_hidden_layers",
            json!(1),
            &["unexpected: model.layers.1.input_layernorm.weight [32]"],
        ),
        (
            "hgrn2_plain",
            "expand_ratio",
            json!(7),
            &["as many key channels as hidden_size, 24, found 21"],
        ),
        (
            "lightnet_narrow",
            "use_short_conv",
            json!(true),
            &["k_conv1d.weight [24, 1, 4]"],
        ),
    ];
    for (of, key, value, words) in changes {
        copy(of, &dir, |config| config[key] = value);
        refused(&[words, &["model"][..]].concat());
    }
    copy("llama_tied", &dir, |config| {
        config["hidden_size"] = json!(33);
        config["head_dim"] = Value::Null;
    });
    refused(&[
        "config.json",
        "hidden_size is 33, expected a multiple of num_attention_heads, 4",
    ]);
    copy("llama_tied", &dir, |_| ());
    fs::remove_file(dir.join("model.safetensors")).unwrap();
    refused(&["found no weights, expected model.safetensors"]);
    copy("llama_scaled", &dir, |_| ());
    fs::remove_file(dir.join("model-00002-of-00003.safetensors")).unwrap();
    refused(&["model-00002-of-00003.safetensors"]);
    fs::write(
        dir.join("model.safetensors.index.json"),
        r#"{"weight_map": {"a": "/etc/passwd"}}"#,
    )
    .unwrap();
    refused(&["model.safetensors.index.json", "a file beside the index"]);
    copy("llama_tied", &dir, |_| ());
    let ran = forward(root.path(), &dir, &Tensor::new(&[[97i64]], CPU).unwrap());
    assert!(
        ran.error()
            .contains("input_ids holds 97, expected ids from 0 to below 97"),
        "{}",
        ran.stderr
    );
}
