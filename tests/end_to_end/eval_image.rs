//! `fulgur eval image`, on small sets, classifiers and denoisers with random weights.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use fulgur::datasets::media::{Picture, read_picture, write_png};
use fulgur::kernels::philox::Philox;
use fulgur::lightnet::params::{Params, Precision};
use fulgur::lightnet::vision::{Classifier, Config, Dit, DitConfig, DitSize, Size};
use serde_json::Value;

use crate::support::{Ran, run};

const LABELS: [&str; 3] = ["bright", "dark", "red"];

/// A set of three classes, in folders for training and for judging, with a caption a picture.
fn set(root: &Path) -> PathBuf {
    let folder = root.join("set");
    fs::create_dir_all(&folder).unwrap();
    let mut lines = String::new();
    let mut noise = Philox::new(3, 0);
    for number in 0..60 {
        let class = number % 3;
        let colour = [[200, 200, 200], [40, 40, 40], [220, 30, 30]][class];
        let pixels = (0..12 * 8).flat_map(|_| colour.map(|level: u8| level + noise.below(30) as u8));
        let picture = Picture::new(pixels.collect(), 12, 8, 3).unwrap();
        write_png(&folder.join(format!("{number}.png")), &picture).unwrap();
        let split = if number < 42 { "train" } else { "held_out" };
        // Pictures 42 and 45 share their caption with each other, 48 with one of training.
        let caption = match number {
            45 => "thing 42".to_owned(),
            48 => "thing 0".to_owned(),
            _ => format!("thing {number}"),
        };
        lines += &format!(
            "{{\"image\": \"{number}.png\", \"caption\": \"{caption}\", \"label\": \"{}\", \"split\": \"{split}\"}}\n",
            LABELS[class]
        );
    }
    fs::write(folder.join("set.jsonl"), lines).unwrap();
    folder.join("set.jsonl")
}

fn save(dir: &Path, params: &Params, config: &impl serde::Serialize) -> PathBuf {
    fs::create_dir_all(dir).unwrap();
    for (name, var) in params.vars() {
        let noise = Philox::named(2, &name).normals(var.elem_count());
        let noise = Tensor::from_vec(noise, var.dims(), &Device::Cpu).unwrap();
        var.set(&(var.as_tensor() + (noise * 0.1).unwrap()).unwrap())
            .unwrap();
    }
    fs::write(dir.join("config.json"), serde_json::to_string(config).unwrap()).unwrap();
    let weights = dir.join("model.safetensors");
    params.save(&weights, &BTreeMap::new(), Precision::F32).unwrap();
    dir.to_owned()
}

fn names(labels: &[&str]) -> Vec<String> {
    labels.iter().map(|&label| label.to_owned()).collect()
}

/// A classifier that looks at grey pictures of another size than those that are drawn.
pub(crate) fn judge(dir: &Path, labels: &[&str]) -> PathBuf {
    let config = Config {
        image_size: [16, 16],
        num_channels: 1,
        patch_size: 4,
        image_mean: vec![0.5],
        image_std: vec![0.5],
        hidden_size: 8,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        intermediate_size: 8,
        ..Config::of(Size::Tiny, names(labels))
    };
    let params = Params::random(5, &Device::Cpu);
    Classifier::new(&config, DType::F32, &params.builder()).unwrap();
    save(dir, &params, &config)
}

fn denoiser(dir: &Path, labels: &[&str], text: Option<usize>) -> PathBuf {
    let config = DitConfig {
        image_size: [8, 12],
        num_channels: 3,
        patch_size: 4,
        hidden_size: 16,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        intermediate_size: 16,
        text_dim: text,
        ..DitConfig::of(DitSize::Small, names(labels))
    };
    let params = Params::random(1, &Device::Cpu);
    Dit::new(&config, DType::F32, &params.builder()).unwrap();
    save(dir, &params, &config)
}

fn eval(set: &Path, model: &Path, judge: &Path, more: &[&str]) -> Ran {
    let [set, model, judge] = [set, model, judge].map(|path| path.to_str().unwrap());
    let own = [
        "eval", "image", "-q", "--device", "cpu", "--steps", "3", "--set", set, "--model", model, "--judge",
        judge,
    ];
    run([&own[..], more].concat())
}

fn count(value: &Value) -> u64 {
    value.as_u64().unwrap()
}

/// The folder of the text encoder that the repository has, and the width of its states.
fn text_encoder() -> (PathBuf, usize) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/builtin/text_encoder");
    let config: Value =
        serde_json::from_str(&fs::read_to_string(folder.join("config.json")).unwrap()).unwrap();
    (folder, count(&config["hidden_size"]) as usize)
}

#[test]
fn a_generator_by_class_is_judged() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let set = set(root);
    let model = denoiser(&root.join("model"), &LABELS, None);
    let judge = judge(&root.join("judge"), &LABELS);
    let (grid, near) = (root.join("grid.png"), root.join("near.png"));
    let files = [
        "--grid",
        grid.to_str().unwrap(),
        "--neighbours",
        near.to_str().unwrap(),
    ];
    let asked = [&["--samples", "4", "--batch", "5", "--json"], &files[..]].concat();
    let ran = eval(&set, &model, &judge, &asked);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let json = ran.json();
    assert_eq!((count(&json["training"]), count(&json["held_out"])), (42, 18));
    assert_eq!(json["finished"], true);
    // 4 of each class; 18 in the proportions of training, some of them beyond the fourth.
    let drawn = &json["drawn"]["class"];
    assert_eq!((count(&drawn["judged"]), count(&drawn["matched"])), (12, 18));
    assert!(count(&drawn["drawn"]) >= 18);
    assert!(json["drawn"].get("text").is_none());
    let said = &json["judges"][0];
    assert_eq!(count(&said["real"]["n"]), 18);
    let by = &said["by"]["class"];
    let confusion: Vec<Vec<u64>> = serde_json::from_value(by["accuracy"]["confusion"].clone()).unwrap();
    assert!(confusion.iter().all(|row| row.iter().sum::<u64>() == 4));
    let right: u64 = (0..3).map(|class| confusion[class][class]).sum();
    let top1 = by["accuracy"]["top1"]["mean"].as_f64().unwrap();
    assert!((top1 - right as f64 / 12.0).abs() < 1e-12);
    assert_eq!(by["accuracy"]["macro_top1"]["mean"].as_f64().unwrap(), top1);
    // Five of three classes are always enough.
    assert_eq!(by["accuracy"]["top5"]["mean"], 1.0);
    let distances = &by["distances"];
    assert_eq!(
        (count(&distances["n"]), count(&said["features"]["width"])),
        (18, 8)
    );
    assert_eq!(distances["rank_deficient"], false);
    let frechet = |which: &str| distances[which]["frechet"].as_f64().unwrap();
    assert!(frechet("to_training") > frechet("reference"), "{distances}");
    assert_eq!(json["cells"].as_array().unwrap().len(), 12);
    let picture = read_picture(&grid).unwrap();
    assert_eq!((picture.width, picture.height), (10 * 14 - 2, 2 * 10 - 2));
    assert_eq!(json["nearest"][0]["features"].as_array().unwrap().len(), 3);
    let pixels = &json["neighbours"]["pixels"];
    assert_eq!(count(&pixels["held_out"]["n"]), 18);
    assert_eq!(count(&pixels["drawn"][0]["n"]), 18);
    assert!(read_picture(&near).unwrap().width > 7 * 64);

    // The same again, whatever the batch; another seed draws something else.
    let again = |more: &[&str]| {
        let ran = eval(
            &set,
            &model,
            &judge,
            &[&["--samples", "4", "--json"], more].concat(),
        );
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        ran.json()["judges"][0]["by"]["class"].clone()
    };
    assert_eq!(again(&[])["accuracy"]["loss"], by["accuracy"]["loss"]);
    assert_ne!(
        again(&["--seed", "1"])["accuracy"]["loss"],
        by["accuracy"]["loss"]
    );
    let without = again(&["--distances", "0"]);
    assert!(without["distances"].is_null());
    assert_eq!(without["accuracy"]["loss"], by["accuracy"]["loss"]);
    let many = again(&["--distances", "40"]);
    assert_eq!(count(&many["distances"]["at_more"]["n"]), 40);

    // A cell of the grid is the picture that the program draws by itself.
    let own = root.join("own.png");
    let out = own.to_str().unwrap();
    let model_path = model.to_str().unwrap();
    let ran = run([
        "image", "generate", "-q", "--device", "cpu", "--steps", "3", "--model", model_path, "--class",
        "bright", "--class", "dark", "--class", "red", "--grid", "1x12", "-o", out,
    ]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let row = read_picture(&own).unwrap();
    let at = |picture: &Picture, column: usize, row: usize, x: usize, y: usize| {
        let place = (row * 10 + y) * picture.width + column * 14 + x;
        picture.pixels[3 * place..3 * place + 3].to_vec()
    };
    for cell in json["cells"].as_array().unwrap() {
        let [number, line, column] = ["number", "row", "column"].map(|key| count(&cell[key]) as usize);
        assert_eq!(
            at(&row, number, 0, 5, 4),
            at(&picture, column, line, 5, 4),
            "{cell}"
        );
        assert_eq!(cell["label"], LABELS[number % 3]);
    }

    let text = eval(&set, &model, &judge, &["--samples", "2"]);
    for words in [
        "real held-out",
        "macro top-1",
        "Frechet",
        "nearest of 42",
        "norm of the mean",
    ] {
        assert!(text.stdout.contains(words), "{words}: {}", text.stdout);
    }
}

#[test]
fn a_generator_by_text_is_judged_on_captions_that_training_never_saw() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let set = set(root);
    let (encoder, width) = text_encoder();
    let model = denoiser(&root.join("model"), &LABELS, Some(width));
    fs::create_dir(model.join("text_encoder")).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(encoder.join(name), model.join("text_encoder").join(name)).unwrap();
    }
    let judge = judge(&root.join("judge"), &LABELS);
    let ran = eval(
        &set,
        &model,
        &judge,
        &["--samples", "1", "--per-caption", "2", "--json"],
    );
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let json = ran.json();
    // Of 18 held-out captions two are one, and one is of training as well.
    let drawn = &json["drawn"]["text"];
    assert_eq!(
        (
            count(&drawn["wishes"]),
            count(&drawn["judged"]),
            count(&drawn["matched"])
        ),
        (16, 32, 17)
    );
    assert_eq!(count(&json["drawn"]["class"]["judged"]), 3);
    let by = &json["judges"][0]["by"];
    assert_eq!(count(&by["text"]["accuracy"]["n"]), 32);
    assert_eq!(count(&by["text"]["distances"]["n"]), 17);
    let both = eval(
        &set,
        &model,
        &judge,
        &["--by", "both", "--distances", "0", "--json"],
    )
    .json();
    assert_eq!(count(&both["judges"][0]["by"]["both"]["accuracy"]["n"]), 16);
    assert!(both["drawn"].get("class").is_none());
}

#[test]
fn what_does_not_go_together_is_refused_in_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let set = set(root);
    let model = denoiser(&root.join("model"), &LABELS, None);
    let good = judge(&root.join("judge"), &LABELS);
    let refused = |model: &Path, judge: &Path, more: &[&str], words: &str| {
        let ran = eval(&set, model, judge, more);
        assert!(ran.error().contains(words), "{words}: {}", ran.stderr);
    };
    let other = judge(&root.join("other"), &["bright", "dark", "green"]);
    refused(
        &model,
        &other,
        &[],
        "other: labels: found 3 classes (bright, dark, green), expected the 3 of ",
    );
    let unknown = denoiser(&root.join("unknown"), &["cat", "dog"], None);
    refused(
        &unknown,
        &good,
        &[],
        "unknown: labels: found 2 classes (cat, dog)",
    );
    let blank = denoiser(&root.join("blank"), &[], None);
    refused(
        &blank,
        &good,
        &[],
        "found a model without classes that reads no text",
    );
    refused(
        &model,
        &good,
        &["--by", "text"],
        "--by text: the model reads no text",
    );
    refused(&model, &good, &["--by", "colour"], "invalid value 'colour'");
    refused(&model, &good, &["--samples", "0"], "--samples");
    refused(
        &model,
        &good,
        &["--distances", "3"],
        "--distances: found 3 pictures to draw, expected at least 4",
    );
    refused(
        &model,
        &good,
        &["--training", "2"],
        "--distances: found 2 training pictures, expected at least 4",
    );
    refused(&model, &good, &["--guidance", "nan"], "guidance is NaN");
    refused(
        &model,
        &good,
        &["--grid", "none/grid.png"],
        "there is no folder none",
    );
    refused(&model, &model, &[], "config.json");
    refused(&model, &root.join("absent"), &[], "absent");
    let ran = run([
        "eval",
        "image",
        "--model",
        model.to_str().unwrap(),
        "--judge",
        good.to_str().unwrap(),
        "--data",
        root.to_str().unwrap(),
    ]);
    assert!(ran.error().contains("fulgur data fetch emoji"), "{}", ran.stderr);

    // Weights that are not finite draw nothing, and judge nothing.
    let broken = |dir: PathBuf, name: &str| {
        let path = dir.join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        let tensor = &tensors[name];
        let none = (tensor.ones_like().unwrap() * f64::NAN).unwrap();
        tensors.insert(name.to_owned(), none);
        candle_core::safetensors::save(&tensors, &path).unwrap();
        dir
    };
    let model_nan = broken(denoiser(&root.join("model_nan"), &LABELS, None), "head.bias");
    refused(
        &model_nan,
        &good,
        &[],
        "the model drew values that are not finite",
    );
    let judge_nan = broken(judge(&root.join("judge_nan"), &LABELS), "head.bias");
    refused(
        &model,
        &judge_nan,
        &[],
        "judge_nan: found shares of classes that are not finite",
    );
}
