//! `fulgur pack`: trained parts become a small folder that the other commands take.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::{Ran, names, run};
use crate::tiny;

/// The parts of the tiny generator as the folders of five runs.
fn runs(root: &Path) -> PathBuf {
    let built = tiny::generator(root);
    let runs = root.join("runs");
    for (run, part) in [
        ("text", "text_encoder"),
        ("tav", "denoiser"),
        ("video-codec", "video_codec"),
        ("mel-codec", "mel_codec"),
        ("vocoder", "vocoder"),
    ] {
        fs::create_dir_all(runs.join(run)).unwrap();
        fs::rename(built.join(part), runs.join(run).join("model")).unwrap();
    }
    runs
}

fn pack(runs: &Path, output: &Path, more: &[&str]) -> Ran {
    let fixed: [&OsStr; 7] = [
        "pack".as_ref(),
        "--json".as_ref(),
        "-q".as_ref(),
        "--runs".as_ref(),
        runs.as_ref(),
        "-o".as_ref(),
        output.as_ref(),
    ];
    let size = ["--size", "32x32", "--duration", "1", "--steps", "2"];
    let more = size.iter().chain(more).map(OsStr::new);
    run(fixed.into_iter().chain(more))
}

fn part<'a>(report: &'a Value, name: &str) -> &'a Value {
    let parts = report["parts"].as_array().unwrap();
    parts.iter().find(|part| part["name"] == name).unwrap()
}

fn size(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|path| {
            if path.is_dir() {
                size(&path)
            } else {
                path.metadata().unwrap().len()
            }
        })
        .sum()
}

/// Names of the tensors of a part.
fn tensors(dir: &Path) -> Vec<String> {
    let shapes = fulgur::lightnet::params::file::shapes(&dir.join("model.safetensors")).unwrap();
    shapes.into_keys().collect()
}

#[test]
fn five_runs_become_a_folder_in_each_precision() {
    let folder = tempfile::tempdir().unwrap();
    let runs = runs(folder.path());
    let output = |precision: &str| folder.path().join("models").join(precision);
    let report = |precision: &str, more: &[&str]| {
        let ran = pack(
            &runs,
            &output(precision),
            &[&["--precision", precision], more].concat(),
        );
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{precision}");
        ran.json()
    };
    let eight = report(
        "8bit",
        &["--shift", "2.5", "--guidance-audio", "3", "--name", "small"],
    );
    let dir = output("8bit");
    assert_eq!(
        names(&dir),
        [
            "denoiser",
            "mel_codec",
            "model_index.json",
            "text_encoder",
            "video_codec",
            "vocoder"
        ]
    );
    assert_eq!(
        names(&folder.path().join("models")),
        ["8bit"],
        "nothing temporary is left"
    );
    assert_eq!(
        (&eight["kind"], &eight["precision"]),
        (&"generator".into(), &"8bit".into())
    );
    assert_eq!(eight["bytes"], size(&dir));
    for row in eight["parts"].as_array().unwrap() {
        let error = row["error"].as_f64().unwrap();
        assert!(error > 1e-4 && error < 0.012, "{row}");
        assert!(row["worst_error"].as_f64().unwrap() >= error, "{row}");
        assert_eq!(row["bytes"], size(&dir.join(row["name"].as_str().unwrap())));
    }
    assert!(part(&eight, "denoiser")["dropped"].as_u64().unwrap() > 0);
    assert!(part(&eight, "video_codec")["dropped"].as_u64().unwrap() > 0);
    assert_eq!(part(&eight, "vocoder")["dropped"], 0);
    assert!(
        tensors(&dir.join("denoiser"))
            .iter()
            .all(|name| !name.starts_with("contrast."))
    );
    assert!(
        tensors(&dir.join("video_codec"))
            .iter()
            .all(|name| !name.starts_with("encoder."))
    );

    let index: Value = serde_json::from_slice(&fs::read(dir.join("model_index.json")).unwrap()).unwrap();
    for (key, value) in [
        ("_class_name", Value::from("FulgurTwoStream")),
        ("name", "small".into()),
        ("fps", 12.0.into()),
        ("width", 32.into()),
        ("duration_s", 1.0.into()),
        ("size_multiple", 16.into()),
        ("steps", 2.into()),
        ("shift", 2.5.into()),
        ("guidance_video", 5.0.into()),
        ("guidance_audio", 3.0.into()),
    ] {
        assert_eq!(index[key], value, "{key}");
    }

    let listed = run::<&OsStr>([
        "forward".as_ref(),
        "--list".as_ref(),
        "--model".as_ref(),
        dir.as_ref(),
    ])
    .stdout;
    assert!(
        listed.contains("--part video_codec.decoder") && !listed.contains("video_codec.encoder"),
        "{listed}"
    );

    // The runs hold 16-bit weights, so that 16 bits and more lose nothing.
    for precision in ["f16", "f32"] {
        let exact = report(precision, &[]);
        assert!(
            exact["parts"]
                .as_array()
                .unwrap()
                .iter()
                .all(|row| row["error"] == 0.0),
            "{exact}"
        );
        assert!(exact["bytes"].as_u64() > eight["bytes"].as_u64());
    }
    let whole = pack(&runs, &output("whole"), &["--with-encoders"]).json();
    assert_eq!(part(&whole, "video_codec")["dropped"], 0);
    assert!(
        tensors(&output("whole").join("video_codec"))
            .iter()
            .any(|name| name.starts_with("encoder."))
    );
}

#[cfg(feature = "media")]
#[test]
fn a_packed_generator_makes_nearly_the_clip_of_its_runs() {
    use fulgur::datasets::media::{ReadOptions, read_clip};
    let folder = tempfile::tempdir().unwrap();
    let runs = runs(folder.path());
    let frames: Vec<Vec<u8>> = ["f32", "8bit"]
        .iter()
        .map(|precision| {
            let (dir, clip) = (folder.path().join(precision), folder.path().join("clip.mp4"));
            assert_eq!(pack(&runs, &dir, &["--precision", precision]).code, 0);
            let ran = run::<&OsStr>([
                "generate".as_ref(),
                "a dog barks".as_ref(),
                "--json".as_ref(),
                "--model".as_ref(),
                dir.as_ref(),
                "-o".as_ref(),
                clip.as_ref(),
            ]);
            assert_eq!(ran.code, 0, "{}", ran.stderr);
            assert_eq!(
                ran.json()["model"],
                *precision,
                "the folder's name is the model's"
            );
            let video = read_clip(&clip, &ReadOptions::default()).unwrap().video.unwrap();
            assert_eq!((video.frame_count, video.width, video.height), (12, 32, 32));
            video.frames
        })
        .collect();
    let difference: f64 = frames[0]
        .iter()
        .zip(&frames[1])
        .map(|(a, b)| f64::from(a.abs_diff(*b)))
        .sum();
    let mean = difference / frames[0].len() as f64;
    assert!(mean < 4.0, "8-bit weights change pixels by {mean} of 255");
}

#[test]
fn a_folder_is_replaced_only_where_that_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let runs = runs(folder.path());
    let dir = folder.path().join("model");
    let refused = |more: &[&str], words: &str| {
        let ran = pack(&runs, &dir, more);
        assert!(ran.error().contains(words), "{words}: {}", ran.stderr);
    };
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("notes.txt"), "mine").unwrap();
    refused(&["--force"], "holds no generator");
    assert_eq!(names(&dir), ["notes.txt"]);
    fs::remove_file(dir.join("notes.txt")).unwrap();

    refused(&["--max-bytes", "1000"], "expected at most 1000");
    assert!(
        names(&dir).is_empty(),
        "an empty folder may be filled, but not beyond the limit"
    );
    fs::write(dir.join("README.md"), "a model card").unwrap();
    assert_eq!(
        pack(&runs, &dir, &[]).code,
        0,
        "a card may be there before the model"
    );
    assert_eq!(fs::read(dir.join("README.md")).unwrap(), b"a model card");
    refused(&[], "--force replaces it");
    let before = fs::read(dir.join("denoiser/model.safetensors")).unwrap();

    fs::create_dir(dir.join("samples")).unwrap();
    refused(&["--force"], "samples: found in the generator to replace");
    fs::remove_dir(dir.join("samples")).unwrap();
    fs::write(dir.join("vocoder/notes.txt"), "mine").unwrap();
    refused(&["--force"], "notes.txt");
    fs::remove_file(dir.join("vocoder/notes.txt")).unwrap();
    assert_eq!(fs::read(dir.join("denoiser/model.safetensors")).unwrap(), before);

    assert_eq!(pack(&runs, &dir, &["--force", "--precision", "f16"]).code, 0);
    assert_ne!(fs::read(dir.join("denoiser/model.safetensors")).unwrap(), before);
    assert_eq!(fs::read(dir.join("README.md")).unwrap(), b"a model card");
    assert_eq!(
        names(folder.path()),
        ["builtin", "model", "runs"],
        "nothing temporary is left"
    );

    let file = folder.path().join("file");
    fs::write(&file, "x").unwrap();
    assert!(pack(&runs, &file, &["--force"]).error().contains("not a folder"));
}

#[test]
fn wrong_parts_and_defaults_are_named_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let runs = runs(folder.path());
    let dir = folder.path().join("model");
    let refused = |more: &[&str], words: &[&str]| {
        let ran = pack(&runs, &dir, more);
        let line = ran.error();
        assert!(words.iter().all(|word| line.contains(word)), "{words:?}: {line}");
        assert!(!dir.exists());
    };
    let other = |run: &str| runs.join(run).display().to_string();
    refused(&["--vocoder", &other("mel-codec")], &["mel-codec", "config.json"]);
    refused(&["--tav", &other("absent")], &["absent", "config.json"]);
    refused(&["--guidance-video", "nan"], &["guidance-video: found NaN"]);
    refused(&["--shift", "0"], &["shift: found 0"]);
    refused(&["--guidance-audio=-1"], &["guidance-audio: found -1"]);
    refused(&["--precision", "4bit"], &["invalid value '4bit'"]);
    refused(&["--network", "x"], &["cannot be used with"]);

    // A denoiser whose audio latents last longer than this mel codec's.
    let config = runs.join("tav/model/config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"step_s\":0.04", "\"step_s\":0.05")).unwrap();
    refused(&[], &["tav", "audio.step_s: found 0.05, expected 0.04"]);
    fs::write(&config, text).unwrap();
    fs::write(runs.join("text/model/model.safetensors"), "no weights").unwrap();
    refused(&[], &["text", "model.safetensors"]);
}

#[cfg(feature = "media")]
#[test]
fn a_packed_encoder_scores_nearly_as_before() {
    use fulgur::datasets::media::{Sound, Video, WriteOptions, write_mp4};
    let folder = tempfile::tempdir().unwrap();
    let source = tiny::encoder(folder.path());
    let packed = folder.path().join("models/encoder");
    let encode = |precision: &str, more: &[&str]| {
        let fixed: [&OsStr; 8] = [
            "pack".as_ref(),
            "--json".as_ref(),
            "--network".as_ref(),
            source.as_ref(),
            "-o".as_ref(),
            packed.as_ref(),
            "--precision".as_ref(),
            precision.as_ref(),
        ];
        run(fixed.into_iter().chain(more.iter().map(OsStr::new)))
    };
    let report = encode("8bit", &[]).json();
    assert_eq!(
        (&report["kind"], &report["bytes"]),
        (&"network".into(), &size(&packed).into())
    );
    assert_eq!(names(&packed), ["config.json", "model.safetensors"]);
    assert!(encode("f16", &[]).error().contains("--force"));

    let clip = folder.path().join("clip.mp4");
    let frames = (0..6u8).flat_map(|i| vec![40 * i; 32 * 32 * 3]).collect();
    let samples = (0..8000).map(|i| (i as f32 * 0.2).sin() * 0.5).collect();
    write_mp4(
        &clip,
        &Video::new(frames, 32, 32, 12.0).unwrap(),
        Some(&Sound::new(samples, 1, 16_000).unwrap()),
        &WriteOptions::default(),
    )
    .unwrap();
    let score = |encoder: &Path| {
        let ran = run::<&OsStr>([
            "score".as_ref(),
            "--json".as_ref(),
            "--encoder".as_ref(),
            encoder.as_ref(),
            clip.as_ref(),
        ]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        ran.json()["mean"].as_f64().unwrap()
    };
    let (before, after) = (score(&source), score(&packed));
    assert!((before - after).abs() < 0.02, "{before} became {after}");
    assert!(before != after, "8-bit weights are other weights");
    assert_eq!(encode("f16", &["--force"]).code, 0);
    assert_eq!(score(&packed), before);
}
