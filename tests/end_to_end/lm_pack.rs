//! `fulgur lm pack`: a language model, its tokenizer and its card in one small folder, which every command reads.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use fulgur::kernels::embedding::Ids;
use fulgur::kernels::philox::Philox;
use fulgur::lightnet::lm::{Architecture, LanguageModel};
use fulgur::lightnet::params::Frozen;
use serde_json::{Value, json};

use crate::lm::model;
use crate::support::{Ran, names, run};

/// Rows of the embeddings.
const VOCABULARY: usize = 300;
const TEXT: &str =
    "A bell rings as the rain falls \u{2014} na\u{ef}vely.\nBells ring, \u{1f514}, and an owl hoots.\n";

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    /// With a run of one model, a tokenizer in lines, and token ids.
    fn new(architecture: Architecture) -> Self {
        let place = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        model(&place.at("run/model"), architecture, |config| {
            config.hidden_size = 48;
            config.intermediate_size = 64;
            config.vocab_size = VOCABULARY;
            config.tie_word_embeddings = true;
        });
        fs::write(place.at("text.txt"), TEXT.repeat(30)).unwrap();
        let (text, json, ids) = (
            place.name("text.txt"),
            place.name("compact.json"),
            place.name("held.u16"),
        );
        let ran = run([
            "lm",
            "tokenizer",
            "train",
            &text,
            "--vocab",
            "290",
            "-o",
            &json,
            "--tokens",
            &ids,
            "-q",
        ]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let value: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
        fs::write(
            place.at("tokenizer.json"),
            serde_json::to_string_pretty(&value).unwrap(),
        )
        .unwrap();
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn name(&self, name: &str) -> String {
        self.at(name).to_str().unwrap().to_owned()
    }

    fn pack(&self, source: &str, output: &str, more: &[&str]) -> Ran {
        let (source, output) = (self.name(source), self.name(output));
        let fixed = [
            "lm", "pack", &source, "-o", &output, "--device", "cpu", "--json", "-q",
        ];
        run(fixed.iter().chain(more))
    }

    fn packed(&self, output: &str, more: &[&str]) -> Value {
        let tokenizer = self.name("tokenizer.json");
        let ran = self.pack("run", output, &[&["--tokenizer", &tokenizer], more].concat());
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
        ran.json()
    }
}

fn logits(dir: &Path) -> Vec<f32> {
    let model = LanguageModel::load(dir, None, DType::F32, &Device::Cpu).unwrap();
    let ids: Vec<u32> = (0..40).map(|at| at * at * 7 % VOCABULARY as u32).collect();
    let logits = model
        .logits(&Ids::new(&ids, &[1, 40], VOCABULARY).unwrap())
        .unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

fn rms(values: impl Iterator<Item = f64>) -> f64 {
    let squares: Vec<f64> = values.map(|value| value * value).collect();
    (squares.iter().sum::<f64>() / squares.len() as f64).sqrt()
}

#[test]
fn a_packed_model_is_a_quarter_of_the_bytes_and_nearly_the_same() {
    for architecture in [Architecture::Hgrn2, Architecture::Llama] {
        let place = Place::new(architecture);
        let held_out = place.name("held.u16");
        let report = place.packed("models/small", &["--held-out", &held_out, "--context", "64"]);
        let dir = place.at("models/small");
        assert_eq!(
            names(&dir),
            ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
        );
        assert_eq!(names(&place.at("models")), ["small"], "nothing temporary is left");
        let bytes: u64 = names(&dir)
            .iter()
            .map(|name| dir.join(name).metadata().unwrap().len())
            .sum();
        assert_eq!(
            (&report["bytes"], &report["card"]),
            (&json!(bytes), &json!("written"))
        );
        assert_eq!(
            fs::read(dir.join("tokenizer.json")).unwrap(),
            fs::read(place.at("compact.json")).unwrap()
        );
        let weights = |dir: &Path| dir.join("model.safetensors");
        let size = |dir: &Path| weights(dir).metadata().unwrap().len();
        assert!(
            size(&dir) * 3 < size(&place.at("run/model")),
            "gains and headers are small"
        );

        // Half a step a weight: a 254th of the largest of its group, a bit more for a scale in 16 bits.
        let before = Frozen::open(&weights(&place.at("run/model")), &Device::Cpu).unwrap();
        let after = Frozen::open(&weights(&dir), &Device::Cpu).unwrap();
        assert!(before.tensors().keys().eq(after.tensors().keys()));
        let mut changed = 0;
        for (name, before) in before.tensors() {
            let most = |tensor: &Tensor| {
                tensor
                    .abs()
                    .unwrap()
                    .flatten_all()
                    .unwrap()
                    .max(0)
                    .unwrap()
                    .to_scalar::<f32>()
                    .unwrap()
            };
            let error = most(&(before - &after.tensors()[name]).unwrap());
            assert!(error <= most(before) / 252.0, "{name}: {error}");
            changed += usize::from(error > 0.0);
        }
        assert!(changed > 10, "{changed}");
        // Logits change no more than by noise of up to half a step of its row on each weight, which is what the format allows.
        let mut noise = Philox::new(8, 0);
        let noisy: HashMap<String, Tensor> = (before.tensors().iter())
            .map(|(name, before)| {
                let rows = before.dims()[0];
                let values: Vec<f32> = before.flatten_all().unwrap().to_vec1().unwrap();
                let length = values.len() / rows;
                let is_rounded = before.rank() >= 2 && values.len() >= 1024;
                let rows = values.chunks(length).flat_map(|row| {
                    let most = row.iter().fold(0f32, |most, value| most.max(value.abs()));
                    let half = if is_rounded { most / 254.0 } else { 0.0 };
                    let near = |value: &f32| value + half * (2.0 * noise.uniform() - 1.0);
                    row.iter().map(near).collect::<Vec<f32>>()
                });
                let values = rows.collect::<Vec<f32>>();
                (
                    name.clone(),
                    Tensor::from_vec(values, before.shape(), &Device::Cpu).unwrap(),
                )
            })
            .collect();
        fs::create_dir(place.at("noisy")).unwrap();
        fs::copy(dir.join("config.json"), place.at("noisy/config.json")).unwrap();
        candle_core::safetensors::save(&noisy, weights(&place.at("noisy"))).unwrap();
        let exact = logits(&place.at("run/model"));
        let far = |other: &[f32]| rms(exact.iter().zip(other).map(|(a, b)| f64::from(a - b)));
        let (rounded, noisy) = (logits(&dir), logits(&place.at("noisy")));
        assert!(
            far(&rounded) > 0.0 && far(&rounded) < far(&noisy),
            "{architecture:?}: {}, with noise {}",
            far(&rounded),
            far(&noisy)
        );

        // The card and the report state the losses that the evaluation finds.
        let card = fs::read_to_string(dir.join("README.md")).unwrap();
        for (which, model) in [
            ("before", place.name("run/model")),
            ("after", place.name("models/small")),
        ] {
            let tokenizer = place.name("tokenizer.json");
            let ran = run([
                "lm",
                "eval",
                "perplexity",
                "--model",
                &model,
                "--tokenizer",
                &tokenizer,
                "--context",
                "64",
                &held_out,
                "--json",
                "-q",
                "--device",
                "cpu",
            ]);
            let nats = ran.json()["nats_per_token"].as_f64().unwrap();
            let told = report["held_out"]["nats_per_token"][which].as_f64().unwrap();
            assert!((nats - told).abs() < 1e-9, "{which}: {told}, expected {nats}");
            assert!(card.contains(&format!("{nats:.4}")), "{card}");
        }
        let parameters = report["parameters"].as_u64().unwrap();
        assert_eq!(
            parameters as usize,
            before.tensors().values().map(Tensor::elem_count).sum::<usize>()
        );
        for words in [
            "# small\n".to_owned(),
            format!("| architecture | {} |", architecture.name()),
            format!("| vocabulary | {VOCABULARY} |"),
            "| head | the embedding |".to_owned(),
            format!("--model {}", dir.display()),
        ] {
            assert!(card.contains(&words), "{words}: {card}");
        }

        // Every command reads it.
        let small = place.name("models/small");
        let ran = run([
            "lm", "generate", "--model", &small, "--prompt", "A bell", "-n", "5", "--json", "-q",
        ]);
        assert_eq!(ran.json()["samples"][0]["ids"].as_array().unwrap().len(), 5);
        let ran = run([
            "lm",
            "bench",
            "--model",
            &small,
            "--lengths",
            "16",
            "-n",
            "2",
            "--json",
            "-q",
        ]);
        assert_eq!(ran.json()["models"][0]["parameters"], json!(parameters));
        let ran = run(["forward", "--list", "--model", &small]);
        assert!(ran.stdout.contains("--part language_model"), "{}", ran.stdout);

        // Packed again, nothing changes; back in 32 bits, the same logits.
        let again = place.pack("models/small", "again", &[]).json();
        assert_eq!(again["error"], json!(0.0));
        assert_eq!(
            fs::read(weights(&dir)).unwrap(),
            fs::read(weights(&place.at("again"))).unwrap()
        );
        assert_eq!(
            place.pack("models/small", "wide", &["--precision", "f32"]).code,
            0
        );
        assert_eq!(logits(&place.at("wide")), rounded);
        assert!(size(&place.at("wide")) > 3 * size(&dir));
    }
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_is_written() {
    let place = Place::new(Architecture::Tnl);
    let (tokenizer, text) = (place.name("tokenizer.json"), place.name("text.txt"));
    let with = ["--tokenizer", tokenizer.as_str()];
    model(&place.at("other"), Architecture::Tnl, |config| {
        config.vocab_size = 289;
    });
    model(&place.at("both"), Architecture::Lightnet, |config| {
        config.bidirectional = true;
    });
    model(&place.at("damaged"), Architecture::Tnl, |config| {
        config.vocab_size = VOCABULARY;
    });
    fs::write(place.at("damaged/model.safetensors"), "no weights").unwrap();
    fs::write(place.at("far.u16"), [0xff, 0xff, 0, 0]).unwrap();
    fs::write(place.at("file"), "x").unwrap();
    let far = place.name("far.u16");
    for (source, more, words) in [
        (
            "run",
            &[][..],
            "run/model: found no tokenizer.json and a vocabulary of 300, expected --tokenizer",
        ),
        (
            "other",
            &with,
            "tokenizer.json: 290 tokens, expected those of the model's vocabulary, 289",
        ),
        ("run", &["--tokenizer", &text], "text.txt: no tokenizer"),
        ("both", &with, "both: a model in both directions"),
        (
            "damaged",
            &with,
            "damaged/model.safetensors: not a usable safetensors file",
        ),
        ("absent", &with, "absent/config.json"),
        (
            "run",
            &[&with[..], &["--max-bytes", "9000"]].concat(),
            "expected at most 9000; nothing was written",
        ),
        (
            "run",
            &[&with[..], &["--context", "0"]].concat(),
            "context is 0, expected 1 to",
        ),
        (
            "run",
            &[&with[..], &["--held-out", &far]].concat(),
            "far.u16: token 0 is 65535, expected less than 300",
        ),
        (
            "run",
            &[&with[..], &["--held-out", "none.u16"]].concat(),
            "none.u16",
        ),
    ] {
        let ran = place.pack(source, "model", more);
        assert!(ran.error().contains(words), "{words}: {}", ran.stderr);
        assert!(!place.at("model").exists());
    }
    assert!(place.pack("run", "file", &with).error().contains("not a folder"));

    // A card that is there stays; an older model is replaced only by --force, and notes are kept.
    fs::create_dir(place.at("model")).unwrap();
    fs::write(place.at("model/README.md"), "a card").unwrap();
    assert_eq!(place.packed("model", &[])["card"], json!("kept"));
    fs::write(place.at("model/LICENCE.md"), "terms").unwrap();
    assert!(
        place
            .pack("run", "model", &with)
            .error()
            .contains("holds a language model already; --force")
    );
    let before = fs::read(place.at("model/model.safetensors")).unwrap();
    // One byte too few for what is to be written: the card counts too.
    let report = place.packed("model", &["--force", "--precision", "f16"]);
    let most = (report["bytes"].as_u64().unwrap() - 1).to_string();
    let half = fs::read(place.at("model/model.safetensors")).unwrap();
    assert_ne!(half, before);
    let ran = place.pack(
        "run",
        "model",
        &[
            &with[..],
            &["--force", "--precision", "f16", "--max-bytes", &most],
        ]
        .concat(),
    );
    assert!(ran.error().contains("README.md 6"), "{}", ran.stderr);
    assert_eq!(fs::read(place.at("model/model.safetensors")).unwrap(), half);
    assert_eq!(
        names(&place.at("model")),
        [
            "LICENCE.md",
            "README.md",
            "config.json",
            "model.safetensors",
            "tokenizer.json"
        ]
    );
    assert_eq!(fs::read(place.at("model/README.md")).unwrap(), b"a card");
}
