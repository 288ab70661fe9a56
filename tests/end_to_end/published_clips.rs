//! `fulgur generate` with a published generator: a tiny one of random weights, from its making to its clips.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use fulgur::datasets::media::{Picture, ReadOptions, read_clip, read_wav, write_png};
use fulgur::lightnet::params::{Precision, file};
use serde_json::Value;

use crate::support::{Ran, fulgur, names};

/// The configuration that the repository has.
fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tavdiffusion-tiny.json")
}

fn init(root: &Path) -> PathBuf {
    let dir = root.join("model");
    let mut command = fulgur();
    command
        .args(["init", "--json", "--random", "1"])
        .arg(tiny())
        .arg("-o")
        .arg(&dir);
    let ran = Ran::of(command.output().unwrap());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.json()["parameters"].as_u64().unwrap() > 100_000);
    dir
}

fn generate(model: &Path, out: &Path, prompt: &str, more: &[&str]) -> Ran {
    let mut command = fulgur();
    command.args(["generate", "--json", "-q", "--device", "cpu", prompt, "--model"]);
    command.arg(model).arg("-o").arg(out).args(more);
    Ran::of(command.output().unwrap())
}

fn made(model: &Path, out: &Path, more: &[&str]) -> Value {
    let ran = generate(model, out, "a dog barks", more);
    assert_eq!(ran.code, 0, "{more:?}: {}", ran.stderr);
    ran.json()
}

/// The mean difference of two clips' pictures, of 255.
fn frames_apart(a: &Path, b: &Path) -> f64 {
    let pixels = |path: &Path| {
        let read = read_clip(path, &ReadOptions::default()).unwrap();
        read.video.unwrap().frames
    };
    let (a, b) = (pixels(a), pixels(b));
    assert_eq!(a.len(), b.len());
    let sum: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
    sum / a.len() as f64
}

#[test]
fn a_random_generator_makes_clips_in_every_mode() {
    let root = tempfile::tempdir().unwrap();
    let model = init(root.path());
    let again = Ran::of(
        fulgur()
            .args(["init", "--random", "1"])
            .arg(tiny())
            .arg("-o")
            .arg(&model)
            .output()
            .unwrap(),
    );
    assert!(
        again
            .error()
            .contains("exists already, expected a folder that holds no model yet")
    );
    let clip = |name: &str| root.path().join(name);

    let report = made(&model, &clip("joint.mp4"), &["--seed", "3"]);
    assert_eq!((&report["frames"], &report["fps"]), (&6.into(), &4.0.into()));
    assert_eq!((&report["width"], &report["height"]), (&32.into(), &24.into()));
    assert_eq!(
        (&report["duration_s"], &report["sample_rate"]),
        (&1.5.into(), &16_000.into())
    );
    assert_eq!(
        (&report["model"], &report["solver"]),
        (&"untrained, seed 1".into(), &"ddim".into())
    );
    for stage in ["text", "denoise", "picture", "sound"] {
        assert!(report["stages"][stage].as_f64().unwrap() >= 0.0, "{stage}");
    }
    let sidecar: Value = serde_json::from_slice(&fs::read(clip("joint.json")).unwrap()).unwrap();
    assert_eq!(sidecar["mode"], "joint");
    let read = read_clip(&clip("joint.mp4"), &ReadOptions::default()).unwrap();
    let (video, sound) = (read.video.unwrap(), read.sound.unwrap());
    assert_eq!((video.frame_count, video.width, video.height), (6, 32, 24));
    assert!((video.duration_s() - sound.duration_s()).abs() < 1e-3);
    assert!(!sound.is_silent());

    let report = made(&model, &clip("seen.mp4"), &["--mode", "video-only"]);
    assert!(report["sample_rate"].as_u64().is_some());
    assert!(
        read_clip(&clip("seen.mp4"), &ReadOptions::default())
            .unwrap()
            .sound
            .is_none()
    );
    made(
        &model,
        &clip("heard.wav"),
        &["--mode", "audio-only", "--duration", "0.7"],
    );
    assert_eq!(read_wav(&clip("heard.wav")).unwrap().len(), 11_200);
    made(
        &model,
        &clip("reference.mp4"),
        &["--mode", "reference", "--seed", "3"],
    );
    let bytes = |name: &str| fs::read(clip(name)).unwrap();
    assert!(
        bytes("reference.mp4") != bytes("joint.mp4"),
        "the clip reads noise there"
    );

    // Longer than the network sees at once, out of tiles, from a picture.
    let long = [
        "--duration",
        "3",
        "--window",
        "8",
        "--overlap",
        "3",
        "--vae-tile",
        "32",
        "--size",
        "40x48",
    ];
    assert_eq!(made(&model, &clip("long.mp4"), &long)["frames"], 12);
    let pixels = (0..48 * 20 * 3).map(|i| (i % 251) as u8).collect();
    write_png(&clip("start.png"), &Picture::new(pixels, 48, 20, 3).unwrap()).unwrap();
    let start = clip("start.png");
    let start = ["--init-image", start.to_str().unwrap(), "--strength", "0.5"];
    let report = made(&model, &clip("started.mp4"), &start);
    assert_eq!((&report["strength"], &report["steps"]), (&0.5.into(), &4.into()));
    assert!(report["stages"]["start"].is_number());
    for solver in ["dpm", "euler"] {
        let name = format!("{solver}.mp4");
        made(&model, &clip(&name), &["--solver", solver, "--seed", "3"]);
        // On steps at equal distances, Euler's are those of DDIM but for rounding.
        let far = frames_apart(&clip(&name), &clip("joint.mp4"));
        assert_eq!(far > 0.5, solver == "dpm", "{solver} {far}");
    }
    let texts = [
        "--negative-prompt",
        "x",
        "--audio-negative-prompt",
        "yz",
        "--guidance-audio",
        "2",
        "--seed",
        "3",
    ];
    made(&model, &clip("away.mp4"), &texts);
    assert!(bytes("away.mp4") != bytes("joint.mp4"));

    // What is needed is told before anything is loaded: the largest stage, not all of them.
    let estimate = Ran::of(
        fulgur()
            .args(["estimate", "--json"])
            .arg(&model)
            .output()
            .unwrap(),
    )
    .json();
    let stages: Vec<u64> = estimate["stages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|stage| stage["bytes"].as_u64().unwrap())
        .collect();
    assert_eq!(stages.len(), 4);
    assert_eq!(estimate["memory_bytes"].as_u64(), stages.iter().copied().max());
}

#[test]
fn a_seed_gives_the_same_clip_for_any_number_of_threads() {
    let root = tempfile::tempdir().unwrap();
    let model = init(root.path());
    let made: Vec<Vec<u8>> = [("1", "3"), ("2", "3"), ("2", "4")]
        .iter()
        .enumerate()
        .map(|(i, (threads, seed))| {
            let clip = root.path().join(format!("{i}.mp4"));
            let mut command = fulgur();
            command.args([
                "generate",
                "a bell rings",
                "-q",
                "--steps",
                "2",
                "--seed",
                seed,
                "--model",
            ]);
            command.arg(&model).arg("-o").arg(&clip);
            command.env("RAYON_NUM_THREADS", threads);
            let ran = Ran::of(command.output().unwrap());
            assert_eq!(ran.code, 0, "{}", ran.stderr);
            fs::read(&clip).unwrap()
        })
        .collect();
    assert!(made[0] == made[1], "threads change the clip");
    assert!(made[1] != made[2], "another seed gives the same clip");
}

/// Weights in one file, as the first releases of latent diffusion are, are the parts that they hold, without a configuration.
#[test]
fn a_file_of_a_whole_pipeline_is_its_parts() {
    let root = tempfile::tempdir().unwrap();
    let model = init(root.path());
    let text = file::read(&model.join("text_encoder/model.safetensors"), &Device::Cpu)
        .unwrap()
        .tensors;
    // Heads have 64 channels where no configuration says otherwise.
    let mut config: Value =
        serde_json::from_slice(&fs::read(model.join("text_encoder/config.json")).unwrap()).unwrap();
    config["num_attention_heads"] = 1.into();
    fs::write(model.join("text_encoder/config.json"), config.to_string()).unwrap();
    let whole: BTreeMap<String, Tensor> = text
        .into_iter()
        .map(|(name, tensor)| (format!("cond_stage_model.transformer.{name}"), tensor))
        .collect();
    let single = root.path().join("whole.safetensors");
    file::write(&single, &whole, &BTreeMap::new(), Precision::F32).unwrap();
    let ids = Tensor::from_vec(vec![512i64, 7, 300, 513], (1, 4), &Device::Cpu).unwrap();
    let inputs = root.path().join("in.safetensors");
    file::write(
        &inputs,
        &BTreeMap::from([("input_ids".to_owned(), ids)]),
        &BTreeMap::new(),
        Precision::F32,
    )
    .unwrap();
    let states = |model: &Path| {
        let out = root.path().join("out.safetensors");
        let mut command = fulgur();
        command
            .args(["forward", "-q", "--part", "text_encoder", "--model"])
            .arg(model);
        command.arg("--inputs").arg(&inputs).arg("--out").arg(&out);
        let ran = Ran::of(command.output().unwrap());
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let found = file::read(&out, &Device::Cpu).unwrap().tensors;
        found["last_hidden_state"]
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
    };
    assert_eq!(states(&single), states(&model));
}

/// Both networks apart, with attention between them in a folder of its own, are those of one file.
#[test]
fn parts_that_lie_apart_are_one_generator() {
    let root = tempfile::tempdir().unwrap();
    let model = init(root.path());
    let joint = root.path().join("joint.mp4");
    made(&model, &joint, &["--steps", "2"]);
    let whole = file::read(&model.join("unet/model.safetensors"), &Device::Cpu)
        .unwrap()
        .tensors;
    let config: Value = serde_json::from_slice(&fs::read(model.join("unet/config.json")).unwrap()).unwrap();
    let apart = root.path().join("apart");
    let mut parts: BTreeMap<&str, BTreeMap<String, Tensor>> = BTreeMap::new();
    for (name, tensor) in whole {
        let (part, name) = match name.strip_prefix("audio_unet.") {
            Some(own) => ("audio_unet", own.to_owned()),
            None if name.starts_with("cross_attn.") => ("fusion", name),
            None if name.contains(".motion_modules.") => ("motion_adapter", name),
            None => ("unet", name),
        };
        parts.entry(part).or_default().insert(name, tensor);
    }
    for (part, key) in [
        ("unet", "video"),
        ("motion_adapter", "motion"),
        ("audio_unet", "audio"),
        ("fusion", "none"),
    ] {
        let dir = apart.join(part);
        fs::create_dir_all(&dir).unwrap();
        file::write(
            &dir.join("model.safetensors"),
            &parts[part],
            &BTreeMap::new(),
            Precision::F32,
        )
        .unwrap();
        fs::write(dir.join("config.json"), config[key].to_string()).unwrap();
    }
    // The others stay where they are.
    let elsewhere: serde_json::Map<String, Value> =
        ["vae", "audio_vae", "vocoder", "text_encoder", "tokenizer"]
            .iter()
            .map(|name| ((*name).to_owned(), format!("../model/{name}").into()))
            .collect();
    let mut index: Value =
        serde_json::from_slice(&fs::read(model.join("model_index.json")).unwrap()).unwrap();
    index["folders"] = elsewhere.into();
    fs::write(apart.join("model_index.json"), index.to_string()).unwrap();
    let clip = root.path().join("apart.mp4");
    made(&apart, &clip, &["--steps", "2"]);
    assert!(
        fs::read(&clip).unwrap() == fs::read(&joint).unwrap(),
        "another clip"
    );

    // One stream alone needs its own parts, and no others.
    fs::remove_dir_all(apart.join("unet")).unwrap();
    fs::remove_dir_all(apart.join("motion_adapter")).unwrap();
    let sound = root.path().join("sound.wav");
    made(&apart, &sound, &["--steps", "2", "--mode", "audio-only"]);
    let ran = generate(&apart, &clip, "a dog", &[]);
    assert!(
        ran.error()
            .contains("expected networks for the pictures in the folder, or --mode audio-only"),
        "{}",
        ran.stderr
    );
}

#[test]
fn bad_requests_and_folders_are_one_line() {
    let root = tempfile::tempdir().unwrap();
    let model = init(root.path());
    let out = root.path().join("out");
    fs::create_dir(&out).unwrap();
    let clip = out.join("clip.mp4");
    let long = "x".repeat(76);
    let cases: [(&str, &[&str], &str); 14] = [
        ("", &[], "prompt: found an empty text"),
        (&long, &[], "prompt: found 78 tokens, expected at most 77"),
        (
            "a dog",
            &["--negative-prompt", &long],
            "negative-prompt: found 78 tokens",
        ),
        (
            "a dog",
            &["--audio-negative-prompt", &long],
            "audio-negative-prompt: found 78 tokens",
        ),
        (
            "a dog",
            &["--size", "36x24"],
            "width: found 36, expected a multiple of 8",
        ),
        (
            "a dog",
            &["--duration", "3"],
            "frames: found 12 (3 s at 4 fps), expected at most 8, or --window 8",
        ),
        ("a dog", &["--window", "9"], "window: found 9, expected 1 to 8"),
        ("a dog", &["--steps", "0"], "steps: found 0"),
        ("a dog", &["--guidance-video", "NaN"], "guidance-video: found NaN"),
        ("a dog", &["--duration", "NaN"], "duration: found NaN"),
        ("a dog", &["--vae-tile", "9"], "vae-tile: found 9"),
        (
            "a dog",
            &["--precision", "bf16"],
            "--precision: found bf16, expected f32 on the CPU",
        ),
        ("a dog", &["--init-image", "absent.png"], "absent.png"),
        ("a dog", &["--strength", "0.5"], "--init-image"),
    ];
    for (prompt, more, words) in cases {
        let ran = generate(&model, &clip, prompt, more);
        assert!(ran.error().contains(words), "{words}: {}", ran.stderr);
        assert!(names(&out).is_empty(), "{words}: {:?}", names(&out));
    }

    // Weights that overflow, half a checkpoint, another network, another vocabulary, no network.
    let weights = model.join("unet/model.safetensors");
    let whole = fs::read(&weights).unwrap();
    let read = || file::read(&weights, &Device::Cpu).unwrap().tensors;
    let write = |tensors: &BTreeMap<String, Tensor>| {
        file::write(&weights, tensors, &BTreeMap::new(), Precision::F32).unwrap();
    };
    let mut huge = read();
    let last = Tensor::full(f32::INFINITY, 4, &Device::Cpu).unwrap();
    huge.insert("conv_out.bias".into(), last);
    write(&huge);
    let refused = |words: &str| {
        let ran = generate(&model, &clip, "a dog", &[]);
        assert!(ran.error().contains(words), "{words}: {}", ran.stderr);
        assert!(names(&out).is_empty());
    };
    refused("step 1 of the clip: values that are not finite");
    fs::write(&weights, &whole).unwrap();
    let mut half = read();
    half.retain(|name, _| !name.starts_with("audio_unet."));
    write(&half);
    refused("missing: audio_unet.conv_in.bias [16], audio_unet.conv_in.weight");
    fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    refused("model.safetensors");
    fs::write(&weights, &whole).unwrap();
    let vocabulary = model.join("tokenizer/vocab.json");
    let letters = fs::read(&vocabulary).unwrap();
    fs::write(&vocabulary, "[]").unwrap();
    refused("vocab.json: no vocabulary");
    fs::write(&vocabulary, letters).unwrap();
    let config = model.join("vae/config.json");
    let kept = fs::read(&config).unwrap();
    fs::write(
        &config,
        String::from_utf8_lossy(&kept).replace("\"norm_num_groups\": 4", "\"latent_channels\": 5"),
    )
    .unwrap();
    let ran = generate(&model, &clip, "a dog", &[]);
    assert!(ran.error().contains("config.json"), "{}", ran.stderr);
    fs::write(&config, kept).unwrap();
    fs::remove_dir_all(model.join("vocoder")).unwrap();
    refused("vocoder: there is no such folder, expected one for sounds");
    fs::remove_dir_all(model.join("unet")).unwrap();
    refused("found no networks that denoise, expected unet, audio_unet or both");
}
