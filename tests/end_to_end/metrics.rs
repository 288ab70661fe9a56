//! `fulgur metrics`, `fulgur preprocess audioldm-mel` and the networks behind them, beside numbers of other implementations.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use fulgur::benchmark::features;
use fulgur::datasets::media::{Sound, Video, WavFormat, WriteOptions, write_mp4, write_wav};
use fulgur::lightnet::testing::tensors as golden;
use fulgur::tensors;
use serde_json::Value;

use crate::support::{Ran, names, run};
use crate::tiny;

fn save(path: &Path, entries: impl IntoIterator<Item = (String, Tensor)>) {
    let tensors: HashMap<String, Tensor> = entries.into_iter().collect();
    candle_core::safetensors::save(&tensors, path).unwrap();
}

/// A folder with the weights of a golden file.
fn network(root: &Path, name: &str) -> PathBuf {
    let dir = root.join(name);
    fs::create_dir_all(&dir).unwrap();
    let weights = golden(name)
        .into_iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix("weights.")?.to_owned(), tensor)));
    save(&dir.join("model.safetensors"), weights);
    dir
}

fn values(tensor: &Tensor) -> Vec<f64> {
    let wide = tensor.to_dtype(DType::F64).and_then(|t| t.flatten_all());
    wide.and_then(|t| t.to_vec1()).unwrap()
}

fn relative_rms(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.dims(), expected.dims());
    let (found, expected) = (values(found), values(expected));
    let apart: f64 = found.iter().zip(&expected).map(|(a, b)| (a - b) * (a - b)).sum();
    let size: f64 = expected.iter().map(|b| b * b).sum();
    (apart / size).sqrt()
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

#[test]
fn distances_of_features_are_those_of_scipy() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("features.safetensors");
    let tensors = golden("distances");
    for case in ["tall", "narrow", "flat", "mixed", "square"] {
        let side = |name: &str| (name.to_owned(), tensors[&format!("case.{case}.{name}")].clone());
        save(&path, [side("generated"), side("reference")]);
        let ran = run(["metrics", "--features", &text(&path), "--json"]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let answer = values(&tensors[&format!("case.{case}.answer")]);
        let json = ran.json();
        for (name, expected) in ["frechet", "kvd"].into_iter().zip(answer) {
            let metric = &json["metrics"][name];
            let value = metric["value"].as_f64().unwrap();
            assert!(
                (value - expected).abs() < 1e-6 * expected.abs(),
                "{case}.{name}: {value} {expected}"
            );
            assert!(metric["n"].is_u64() && metric["feature"].is_string() && metric["skipped"].is_array());
        }
    }
    let side = |name: &str| (name.to_owned(), tensors["case.tall.generated"].clone());
    save(&path, [side("generated")]);
    let line = run(["metrics", "--features", &text(&path)]).error().to_owned();
    assert!(
        line.contains("reference is missing, expected features [n, d]"),
        "{line}"
    );
    let narrow = side("reference").1.narrow(1, 0, 3).unwrap().contiguous().unwrap();
    save(&path, [side("generated"), ("reference".to_owned(), narrow)]);
    let line = run(["metrics", "--features", &text(&path)]).error().to_owned();
    assert!(line.contains("found a width of 3, expected 12"), "{line}");
}

#[test]
fn networks_run_through_forward_as_their_references() {
    let root = tempfile::tempdir().unwrap();
    let (inputs, out) = (
        root.path().join("in.safetensors"),
        root.path().join("out.safetensors"),
    );
    let run_on = |dir: &Path, entries: Vec<(String, Tensor)>| {
        save(&inputs, entries);
        let ran = run([
            "forward",
            "--model",
            &text(dir),
            "--inputs",
            &text(&inputs),
            "--out",
            &text(&out),
            "--json",
        ]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        tensors::read(&out, &Device::Cpu).unwrap()
    };
    let samples = |tensors: &BTreeMap<String, Tensor>| tensors["wave"].to_vec1::<f32>().unwrap();
    let vggish = golden("vggish");
    let found = run_on(
        &network(root.path(), "vggish"),
        vec![(
            "patches".to_owned(),
            features::vggish::patches(&samples(&vggish)).unwrap(),
        )],
    );
    assert!(relative_rms(&found["embedding"], &vggish["vectors"]) < 2e-5);
    let panns = golden("panns");
    let mel = features::panns::log_mel(&samples(&panns)).unwrap();
    let found = run_on(
        &network(root.path(), "panns"),
        vec![("mel".to_owned(), mel.unsqueeze(0).unwrap())],
    );
    for name in ["embedding", "logits"] {
        assert!(relative_rms(&found[name], &panns[name]) < 2e-5, "{name}");
    }
    let clap = golden("clap");
    let dir = clap_folder(root.path());
    let entries = [
        ("input_ids", "input_ids"),
        ("attention_mask", "attention_mask"),
        ("input_features", "input_features.short"),
    ];
    let found = run_on(
        &dir,
        entries
            .map(|(name, from)| (name.to_owned(), clap[from].clone()))
            .to_vec(),
    );
    assert!(relative_rms(&found["text_embeds"], &clap["text_embeds"]) < 2e-5);
    assert!(relative_rms(&found["audio_embeds"], &clap["audio_embeds.short"]) < 2e-5);
    let listed = run([
        "forward",
        "--list",
        "--json",
        "--model",
        &text(&network(root.path(), "i3d")),
    ])
    .json();
    assert_eq!(listed["models"][0]["kind"], "i3d");
    assert_eq!(
        listed["models"][0]["parts"][0]["inputs"][0]["shape"],
        serde_json::json!(["B", 3, "F", 224, 224])
    );
}

/// A CLAP with its configuration and a tokenizer of a few words.
fn clap_folder(root: &Path) -> PathBuf {
    let dir = network(root, "clap");
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/clap.json");
    fs::copy(config, dir.join("config.json")).unwrap();
    let vocabulary: serde_json::Map<String, Value> = ["<pad>", "[UNK]", "a", "bell", "rings"]
        .into_iter()
        .zip(1..)
        .map(|(word, id)| (word.to_owned(), Value::from(id)))
        .collect();
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    });
    fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    // The tiny tower has 8 bands and takes 128 frames.
    let front_end = serde_json::json!({"feature_size": 8, "sampling_rate": 16000, "hop_length": 160, "fft_window_size": 512,
        "max_length_s": 1, "frequency_min": 50, "frequency_max": 8000});
    fs::write(dir.join("preprocessor_config.json"), front_end.to_string()).unwrap();
    dir
}

/// A clip of a square that jumps at a third of it, where a tone of this pitch starts.
fn clip(path: &Path, pitch: f32, sound: bool) {
    let (size, fps, count) = (64, 12.0, 24);
    let mut frames = Vec::new();
    for frame in 0..count {
        let left = if frame < 8 { 10 } else { 24 };
        for y in 0..size {
            for x in 0..size {
                let inside = (left..left + 26).contains(&x) && (20..46).contains(&y);
                let value = if inside {
                    180 + ((x - left) * 3 + y) % 50
                } else {
                    40 + (x * 5 + y * 3 + pitch as usize) % 40
                };
                frames.extend([value as u8; 3]);
            }
        }
    }
    let video = Video::new(frames, size, size, fps).unwrap();
    let tone = (0..32_000).map(|i| {
        let t = (i as f32 - 10_667.0) / 16_000.0;
        if t < 0.0 {
            0.0
        } else {
            0.4 * (-3.0 * t).exp() * (std::f32::consts::TAU * pitch * t).sin()
        }
    });
    let tone = Sound::new(tone.collect(), 1, 16_000).unwrap();
    write_mp4(path, &video, sound.then_some(&tone), &WriteOptions::default()).unwrap();
}

/// Folders `made` and `real` with clips of the same names.
fn folders(root: &Path) -> (PathBuf, PathBuf) {
    let (made, real) = (root.join("made"), root.join("real"));
    for (dir, shift) in [(&made, 0.0), (&real, 40.0)] {
        fs::create_dir_all(dir).unwrap();
        for (name, pitch) in [("a", 300.0), ("b", 500.0), ("c", 900.0)] {
            clip(&dir.join(format!("{name}.mp4")), pitch + shift, true);
        }
    }
    (made, real)
}

fn metrics(made: &Path, names: &str, more: &[&str]) -> Ran {
    let fixed = [
        "metrics",
        "--json",
        "--device",
        "cpu",
        "--generated",
        made.to_str().unwrap(),
        "--metric",
        names,
    ];
    run(fixed.into_iter().chain(more.iter().copied()))
}

#[test]
fn figures_of_folders_say_what_they_are_of() {
    let root = tempfile::tempdir().unwrap();
    let (made, real) = folders(root.path());
    let weights: Vec<String> = [
        ("i3d", network(root.path(), "i3d")),
        ("vggish", network(root.path(), "vggish")),
        ("panns", network(root.path(), "panns")),
        ("clap", clap_folder(root.path())),
        ("encoder", tiny::encoder(root.path())),
    ]
    .into_iter()
    .flat_map(|(name, dir)| ["--weights".to_owned(), format!("{name}={}", dir.display())])
    .collect();
    let page = root.path().join("page.html");
    fs::write(made.join("a.json"), "{\"prompt\": \"a bell rings\"}").unwrap();
    let prompts = root.path().join("prompts.jsonl");
    fs::write(&prompts, "{\"path\": \"b\", \"prompt\": \"bell\"}\n").unwrap();
    let all = "fvd,kvd,fad,fd_panns,is,kl,clap,av_align,avhscore,javisscore,av_sync";
    let (real, page_name, prompts) = (text(&real), text(&page), text(&prompts));
    let mut more: Vec<&str> = weights.iter().map(String::as_str).collect();
    more.extend([
        "--reference",
        &real,
        "--report",
        &page_name,
        "--prompts",
        &prompts,
        "--frames",
        "9",
    ]);
    let ran = metrics(&made, all, &more);
    // One clip has no prompt: done in part.
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    let json = ran.json();
    let found: Vec<&str> = json["metrics"]
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(found, all.split(',').collect::<Vec<_>>());
    for (name, figure) in json["metrics"].as_object().unwrap() {
        let value = figure["value"].as_f64();
        assert!(value.is_some_and(f64::is_finite), "{name}: {figure}");
        let expected = if name == "clap" { 2 } else { 3 };
        assert_eq!(figure["n"], expected, "{name}");
        assert!(!figure["feature"].as_str().unwrap().is_empty(), "{name}");
        assert_eq!(
            figure["skipped"].as_array().unwrap().len(),
            3 - expected,
            "{name}"
        );
    }
    let metric = |name: &str| &json["metrics"][name];
    assert!(metric("fvd")["feature"].as_str().unwrap().contains("checkpoint "));
    assert!(metric("fad")["warnings"].is_array() && metric("fad")["n_reference"] == 3);
    assert_eq!(metric("clap")["skipped"][0]["reason"], "no prompt");
    assert_eq!(metric("kl")["samples"].as_array().unwrap().len(), 3);
    // One jump and one onset at its moment.
    assert!(
        metric("av_align")["value"].as_f64().unwrap() > 0.3,
        "{}",
        metric("av_align")
    );
    assert!(
        metric("av_sync")["value"].as_f64().unwrap() < 120.0,
        "{}",
        metric("av_sync")
    );
    let sure = metric("av_sync")["samples"][0]["confidence"].as_f64().unwrap();
    assert!((0.0..=1.0).contains(&sure), "{sure}");
    let html = fs::read_to_string(&page).unwrap();
    assert!(html.contains("data:image/jpeg") && html.contains("waveform") && html.contains("a bell rings"));
    // A set beside itself.
    let same = metrics(
        &made,
        "fd_panns,kl",
        &[&more[..10], &["--reference", made.to_str().unwrap()]].concat(),
    );
    assert_eq!(same.code, 0, "{}", same.stderr);
    for name in ["fd_panns", "kl"] {
        let value = same.json()["metrics"][name]["value"].as_f64().unwrap();
        assert!(value.abs() < 1e-9, "{name}: {value}");
    }
}

#[test]
fn clips_that_cannot_be_read_are_named_and_skipped() {
    let root = tempfile::tempdir().unwrap();
    let made = root.path().join("made");
    fs::create_dir(&made).unwrap();
    clip(&made.join("a.mp4"), 400.0, true);
    clip(&made.join("mute.mp4"), 400.0, false);
    fs::write(made.join("text.mp4"), "no clip at all").unwrap();
    fs::write(made.join("notes.txt"), "not looked at").unwrap();
    let tone = Sound::new(vec![0.1; 8000], 1, 16_000).unwrap();
    write_wav(&made.join("z.wav"), &tone, WavFormat::Int16).unwrap();
    let ran = metrics(&made, "av_align", &[]);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    let figure = ran.json()["metrics"]["av_align"].clone();
    assert_eq!(figure["n"], 1);
    let skipped: Vec<(String, String)> = figure["skipped"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| {
            let file = Path::new(entry["path"].as_str().unwrap()).file_name().unwrap();
            (
                file.to_str().unwrap().to_owned(),
                entry["reason"].as_str().unwrap().to_owned(),
            )
        })
        .collect();
    let named: Vec<&str> = skipped.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(named, ["mute.mp4", "text.mp4", "z.wav"]);
    assert_eq!(
        (skipped[0].1.as_str(), skipped[2].1.as_str()),
        ("no audio stream", "no video stream")
    );
    assert!(skipped[1].1.starts_with("not a media file"), "{}", skipped[1].1);
    fs::remove_file(made.join("a.mp4")).unwrap();
    let none = metrics(&made, "av_align", &[]);
    assert_eq!(none.code, 2);
    let figure = none.json()["metrics"]["av_align"].clone();
    assert!(figure["value"].is_null() && figure["reason"].as_str().unwrap().contains("0 clips"));
}

#[test]
fn what_cannot_be_measured_is_one_line() {
    let root = tempfile::tempdir().unwrap();
    let made = root.path().join("made");
    fs::create_dir(&made).unwrap();
    fs::write(made.join("a.mp4"), "no clip").unwrap();
    let i3d = network(root.path(), "i3d");
    let swapped = format!("vggish={}", i3d.display());
    let missing = root.path().join("missing");
    let cases: [(&str, &[&str], &str); 11] = [
        ("fid", &[], "--metric: found \"fid\", expected some of fvd, kvd"),
        ("fvd", &[], "--metric fvd: expected --reference"),
        ("is", &[], "--metric is: expected --weights panns=DIR"),
        (
            "is",
            &["--weights", "panns"],
            "--weights: found \"panns\", expected NAME=DIR",
        ),
        (
            "is",
            &["--weights", "x=y"],
            "--weights: found \"x\", expected one of clap, clip, encoder, i3d",
        ),
        ("is", &["--weights", "panns=nowhere"], "nowhere: found no weights"),
        (
            "fad",
            &["--weights", &swapped, "--reference", made.to_str().unwrap()],
            "not the weights of this model",
        ),
        (
            "av_align",
            &["--seconds", "NaN"],
            "expected a finite number above 0",
        ),
        (
            "javisscore",
            &["--window", "1", "--overlap", "1"],
            "--overlap: found 1, expected less than the window",
        ),
        (
            "av_align",
            &["--report", "page.txt"],
            "expected a name that ends in .html",
        ),
        (
            "av_align",
            &["--prompts", missing.to_str().unwrap()],
            "missing: cannot open",
        ),
    ];
    for (names, more, words) in cases {
        let ran = metrics(&made, names, more);
        assert!(ran.error().contains(words), "{words}: {}", ran.stderr);
    }
    let line = metrics(&missing, "av_align", &[]).error().to_owned();
    assert!(line.contains("missing: found no folder"), "{line}");
    assert!(run(["metrics"]).error().contains("--generated"));
    assert_eq!(names(root.path()), ["i3d", "made"]);
    let listed = run(["metrics", "--list", "--json"]).json();
    assert!(listed["metrics"].as_array().unwrap().len() >= 10);
    assert!(
        listed["left_out"]
            .as_array()
            .unwrap()
            .iter()
            .any(|entry| entry["name"] == "desync")
    );
}

#[test]
fn mels_of_audioldm_are_those_of_librosa() {
    let root = tempfile::tempdir().unwrap();
    let (wav, out) = (root.path().join("in.wav"), root.path().join("out.safetensors"));
    let tensors = golden("audioldm_mel");
    let samples: Vec<f32> = tensors["wave"].to_vec1().unwrap();
    write_wav(&wav, &Sound::new(samples, 1, 16_000).unwrap(), WavFormat::Float).unwrap();
    let ran = run([
        "preprocess",
        "audioldm-mel",
        &text(&wav),
        "--out",
        &text(&out),
        "--json",
    ]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(ran.json()["features"], serde_json::json!([57, 64]));
    let found = tensors::read(&out, &Device::Cpu).unwrap();
    assert!(relative_rms(&found["features"], &tensors["mel"]) < 1e-5);
    write_wav(
        &wav,
        &Sound::new(vec![0.1; 500], 1, 16_000).unwrap(),
        WavFormat::Float,
    )
    .unwrap();
    let short = run(["preprocess", "audioldm-mel", &text(&wav), "--out", &text(&out)]);
    assert!(
        short
            .error()
            .contains("in.wav: found 500 samples at 16000 Hz, expected at least 513")
    );
}

#[test]
fn scores_have_a_page() {
    let root = tempfile::tempdir().unwrap();
    let (made, _) = folders(root.path());
    clip(&made.join("mute.mp4"), 400.0, false);
    let page = root.path().join("scores.html");
    let encoder = tiny::encoder(root.path());
    let ran = run([
        "score",
        "--json",
        "--device",
        "cpu",
        "--encoder",
        &text(&encoder),
        "--report",
        &text(&page),
        &text(&made),
    ]);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    let html = fs::read_to_string(&page).unwrap();
    assert_eq!(html.matches("<article").count(), 4);
    assert!(html.contains("no audio stream") && html.matches("waveform").count() == 3);
    assert!(html.contains("avhscore") && !html.contains("<script"));
    let refused = run(["score", &text(&made), "--report", "scores.pdf"]);
    assert!(refused.error().contains("expected a name that ends in .html"));
}
