//! `fulgur generate` and `fulgur score`: from a prompt to a clip and its score, and what they answer to bad input.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use fulgur::datasets::media::{ReadOptions, Sound, Video, WriteOptions, read_clip, read_picture, write_mp4};

use crate::support::{self, Ran, names, run};
use crate::tiny;

fn generate(model: &Path, clip: &Path, prompt: &str, more: &[&str]) -> Ran {
    let fixed: [&OsStr; 8] = [
        "generate".as_ref(),
        "--json".as_ref(),
        "--model".as_ref(),
        model.as_ref(),
        "-o".as_ref(),
        clip.as_ref(),
        "--device".as_ref(),
        "cpu".as_ref(),
    ];
    run(fixed
        .into_iter()
        .chain([prompt.as_ref()])
        .chain(more.iter().map(OsStr::new)))
}

#[test]
fn a_prompt_becomes_a_clip_with_sidecar_and_sheet() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny::generator(folder.path());
    let (clip, sheet) = (folder.path().join("clip.mp4"), folder.path().join("sheet.png"));
    let ran = generate(
        &model,
        &clip,
        "a dog barks",
        &["--seed", "7", "--report", sheet.to_str().unwrap()],
    );
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let report = ran.json();
    assert_eq!((&report["seed"], &report["frames"]), (&7.into(), &12.into()));
    assert_eq!(
        (&report["width"], &report["sample_rate"]),
        (&32.into(), &16_000.into())
    );
    assert_eq!(report["model"], "tiny");
    for key in [
        "path",
        "prompt",
        "duration_s",
        "fps",
        "height",
        "avhscore",
        "timings",
    ] {
        assert!(report.get(key).is_some(), "{key} is missing");
    }
    let sidecar: serde_json::Value =
        serde_json::from_slice(&fs::read(clip.with_extension("json")).unwrap()).unwrap();
    assert_eq!(sidecar["prompt"], "a dog barks");
    let read = read_clip(&clip, &ReadOptions::default()).unwrap();
    let (video, sound) = (read.video.unwrap(), read.sound.unwrap());
    assert_eq!((video.frame_count, video.width, video.height), (12, 32, 32));
    assert!((video.duration_s() - sound.duration_s()).abs() < 1e-3);
    assert!(read_picture(&sheet).unwrap().width > 200);
}

#[test]
fn a_seed_gives_the_same_clip_for_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny::generator(folder.path());
    let made: Vec<Vec<u8>> = [("1", "3"), ("2", "3"), ("2", "4")]
        .iter()
        .enumerate()
        .map(|(i, (threads, seed))| {
            let clip = folder.path().join(format!("{i}.mp4"));
            let mut command = support::fulgur();
            command
                .args(["generate", "a bell rings", "--seed", seed, "--model"])
                .arg(&model);
            command.arg("-o").arg(&clip).env("RAYON_NUM_THREADS", threads);
            let ran = Ran::of(command.output().unwrap());
            assert_eq!(ran.code, 0, "{}", ran.stderr);
            fs::read(&clip).unwrap()
        })
        .collect();
    assert!(made[0] == made[1], "threads change the clip");
    assert!(made[1] != made[2], "another seed gives the same clip");
}

#[test]
fn modes_make_one_stream() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny::generator(folder.path());
    let (silent, wave) = (folder.path().join("silent.mp4"), folder.path().join("sound.wav"));
    assert_eq!(
        generate(&model, &silent, "an owl hoots", &["--mode", "video-only"]).code,
        0
    );
    assert!(
        read_clip(&silent, &ReadOptions::default())
            .unwrap()
            .sound
            .is_none()
    );
    assert_eq!(
        generate(&model, &wave, "an owl hoots", &["--mode", "audio-only"]).code,
        0
    );
    assert_eq!(fulgur::datasets::media::read_wav(&wave).unwrap().len(), 16_000);
}

#[test]
fn bad_requests_are_one_line_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny::generator(folder.path());
    let out = folder.path().join("out");
    fs::create_dir(&out).unwrap();
    let clip = out.join("clip.mp4");
    let missing = folder.path().join("none");
    let cases: [(&Path, &str, &[&str], &str); 5] = [
        (&model, "", &[], "prompt: found an empty text"),
        (
            &model,
            "a dog",
            &["--size", "100x96"],
            "width: found 100, expected a multiple of 16",
        ),
        (&model, "a dog", &["--duration", "0"], "duration: found 0"),
        (&model, "a dog", &["--steps", "0"], "steps: found 0"),
        (&missing, "a dog", &[], "model_index.json"),
    ];
    for (model, prompt, more, words) in cases {
        let ran = generate(model, &clip, prompt, more);
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{words}");
        assert!(
            ran.stderr.contains(words) && ran.stderr.lines().count() == 1,
            "{}",
            ran.stderr
        );
        assert!(names(&out).is_empty(), "{words}: {:?}", names(&out));
    }
    let ran = generate(&model, &clip, &"word ".repeat(10_000), &[]);
    assert_eq!(ran.code, 0, "a long prompt is cut, not refused: {}", ran.stderr);
}

#[test]
fn damaged_weights_are_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny::generator(folder.path());
    let weights = model.join("vocoder/model.safetensors");
    let whole = fs::read(&weights).unwrap();
    let clip = folder.path().join("clip.mp4");
    fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    let truncated = generate(&model, &clip, "a dog", &[]);
    fs::copy(model.join("mel_codec/model.safetensors"), &weights).unwrap();
    let foreign = generate(&model, &clip, "a dog", &[]);
    for ran in [truncated, foreign] {
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""));
        assert!(
            ran.stderr.contains("vocoder") && ran.stderr.lines().count() == 1,
            "{}",
            ran.stderr
        );
    }
    assert!(!clip.exists());
}

#[test]
fn clips_are_scored_in_order_and_what_cannot_be_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let encoder = tiny::encoder(folder.path());
    let clips = folder.path().join("clips");
    fs::create_dir(&clips).unwrap();
    let frames = (0..12u8).flat_map(|i| vec![20 * i; 32 * 32 * 3]).collect();
    let video = Video::new(frames, 32, 32, 12.0).unwrap();
    let tone = |channels: usize, level: f32| {
        let samples = (0..16_000 * channels)
            .map(|i| level * (i as f32 * 0.1).sin())
            .collect();
        Sound::new(samples, channels, 16_000).unwrap()
    };
    let options = WriteOptions::default();
    write_mp4(&clips.join("a.mp4"), &video, Some(&tone(1, 0.5)), &options).unwrap();
    write_mp4(&clips.join("b.mp4"), &video, None, &options).unwrap();
    write_mp4(&clips.join("c.mp4"), &video, Some(&tone(6, 0.0)), &options).unwrap();
    fs::write(clips.join("d.mp4"), "this is no film").unwrap();
    let ran = run::<&OsStr>([
        "score".as_ref(),
        "--json".as_ref(),
        "--encoder".as_ref(),
        encoder.as_ref(),
        clips.as_ref(),
    ]);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    let report = ran.json();
    let results = report["results"].as_array().unwrap();
    let row = |i: usize| {
        (
            &results[i]["avhscore"],
            results[i]["reason"].as_str().unwrap_or_default(),
        )
    };
    assert_eq!(results.len(), 4);
    assert!(row(0).0.is_f64() && row(0).1.is_empty());
    assert!(row(1).0.is_null() && row(1).1 == "no audio stream");
    assert!(row(2).0.is_f64());
    let flags = results[2]["flags"].as_array().unwrap();
    assert!(flags.contains(&"silent_audio".into()) && flags.contains(&"unusual_channels".into()));
    assert!(row(3).0.is_null() && row(3).1.contains("d.mp4"));
    assert_eq!((&report["n"], &report["encoder"]), (&2.into(), &"builtin".into()));
    // Nothing in the list can be read: an error, but one that says why of each.
    let unreadable = [clips.join("d.mp4"), folder.path().join("absent.mp4")];
    let alone = run::<&OsStr>([
        "score".as_ref(),
        "--json".as_ref(),
        "-q".as_ref(),
        "--encoder".as_ref(),
        encoder.as_ref(),
        unreadable[0].as_ref(),
        unreadable[1].as_ref(),
    ]);
    assert_eq!((alone.code, alone.stderr.as_str()), (2, ""));
    let report = alone.json();
    assert_eq!(
        (&report["n"], &report["mean"]),
        (&0.into(), &serde_json::Value::Null)
    );
    for (row, path) in report["results"].as_array().unwrap().iter().zip(&unreadable) {
        let reason = row["reason"].as_str().unwrap();
        assert!(
            row["avhscore"].is_null() && reason.contains(path.to_str().unwrap()),
            "{row}"
        );
    }
    assert_eq!(report["results"].as_array().unwrap().len(), 2);
}

/// Words of a line of a Makefile, as a shell takes them that knows no more than double quotes.
fn words(line: &str) -> Vec<&str> {
    let mut words = Vec::new();
    for (number, piece) in line.split('"').enumerate() {
        if number % 2 == 1 {
            words.push(piece);
        } else {
            words.extend(piece.split_whitespace());
        }
    }
    words
}

#[test]
fn the_demo_of_the_makefile_makes_what_it_promises() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let makefile = fs::read_to_string(root.join("Makefile")).unwrap();
    let recipe = makefile
        .lines()
        .find_map(|line| line.strip_prefix("\t$(PROGRAM) "));
    let recipe = recipe.expect("a line that runs the program");
    let folder = tempfile::tempdir().unwrap();
    let models = tempfile::tempdir().unwrap();
    tiny::generator(models.path());
    tiny::encoder(models.path());
    let output = support::fulgur()
        .args(words(recipe))
        .args(["--device", "cpu"])
        .env("FULGUR_MODELS", models.path())
        .current_dir(folder.path())
        .output();
    let ran = Ran::of(output.unwrap());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(names(folder.path()), ["demo.json", "demo.mp4", "demo.png"]);
    for name in names(folder.path()) {
        let explained = makefile
            .lines()
            .any(|line| line.contains("@echo") && line.contains(&name));
        assert!(explained, "{name} is not explained");
    }
    assert!(ran.stdout.contains("AVHScore"), "{}", ran.stdout);
    let ignored = fs::read_to_string(root.join(".gitignore")).unwrap();
    assert!(ignored.lines().any(|line| line == "/demo.*"));
}
