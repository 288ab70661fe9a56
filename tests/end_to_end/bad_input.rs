//! What the program was never meant to be given: one line, exit code 2, nothing half-written, no panic.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
#[cfg(target_os = "linux")]
use std::process::Command;

use candle_core::{Device, safetensors};
use fulgur::datasets::media::{Sound, Video, WavFormat, WriteOptions, write_mp4, write_wav};
use fulgur::tavdiffusion::pipeline::Part;

#[cfg(unix)]
use crate::support::on_a_small_disk;
use crate::support::{Ran, names, run};
use crate::{tiny, training};

fn generate(model: &Path, clip: &Path, more: &[&str]) -> Ran {
    let mut arguments = vec!["generate".as_ref(), "a dog barks".as_ref(), "--json".as_ref()];
    arguments.extend::<[&OsStr; 4]>(["--model".as_ref(), model.as_ref(), "-o".as_ref(), clip.as_ref()]);
    run(arguments.into_iter().chain(more.iter().map(OsStr::new)))
}

fn score(encoder: &Path, clips: &[&Path]) -> Ran {
    let arguments: [&OsStr; 4] = [
        "score".as_ref(),
        "--json".as_ref(),
        "--encoder".as_ref(),
        encoder.as_ref(),
    ];
    run(arguments
        .into_iter()
        .chain(clips.iter().map(|clip| clip.as_os_str())))
}

fn video() -> Video {
    let frames = (0..12u8).flat_map(|i| vec![20 * i; 32 * 32 * 3]).collect();
    Video::new(frames, 32, 32, 12.0).unwrap()
}

fn tone() -> Sound {
    Sound::new((0..16_000).map(|i| (i as f32 * 0.1).sin()).collect(), 1, 16_000).unwrap()
}

/// Kinds of damage to a part of a model.
const DAMAGES: usize = 6;

/// Damages the files of one part; the name of the file that is to be complained about.
fn damage(part: &Path, kind: usize) -> &'static str {
    let weights = part.join("model.safetensors");
    match kind {
        0 => cut(&weights, |length| length - 1),
        1 => fs::write(&weights, "a text that is no model").unwrap(),
        2 => cut(&weights, |_| 0),
        3 => fs::rename(&weights, part.join("weights.safetensors")).unwrap(),
        4 => {
            let tensors = safetensors::load(&weights, &Device::Cpu).unwrap();
            let other = tensors.into_iter();
            let other = other.map(|(name, tensor)| (format!("x.{name}"), tensor));
            safetensors::save(&other.collect(), &weights).unwrap();
        }
        _ => {
            cut(&part.join("config.json"), |length| length / 2);
            return "config.json";
        }
    }
    "model.safetensors"
}

/// Shortens a file.
fn cut(path: &Path, to: impl Fn(usize) -> usize) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..to(bytes.len())]).unwrap();
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for name in names(from) {
        let (from, to) = (from.join(&name), to.join(&name));
        if from.is_dir() {
            copy(&from, &to);
        } else {
            fs::copy(&from, &to).unwrap();
        }
    }
}

#[test]
fn every_damage_to_every_part_of_a_generator_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let whole = tiny::generator(folder.path());
    let out = folder.path().join("out");
    fs::create_dir(&out).unwrap();
    for part in Part::ALL.map(Part::folder) {
        for number in 0..DAMAGES {
            let model = folder.path().join(format!("{part}-{number}"));
            copy(&whole, &model);
            let words = damage(&model.join(part), number);
            let ran = generate(&model, &out.join("clip.mp4"), &[]);
            let line = ran.error();
            assert!(
                line.contains(part) && line.contains(words),
                "{part} {number}: {line}"
            );
            assert_eq!(names(&out), [""; 0], "{part} {number}");
        }
    }
    for (name, content) in [("model_index.json", "{"), ("text_encoder/tokenizer.json", "{}")] {
        let model = folder.path().join("index");
        copy(&whole, &model);
        fs::write(model.join(name), content).unwrap();
        let ran = generate(&model, &out.join("clip.mp4"), &[]);
        assert!(ran.error().contains(name), "{}", ran.stderr);
    }
    // A folder that is no model, and a file in the place of the folder.
    for model in [&out, &whole.join("model_index.json")] {
        let ran = generate(model, &out.join("clip.mp4"), &[]);
        assert!(ran.error().contains(model.to_str().unwrap()), "{}", ran.stderr);
    }
}

#[test]
fn every_damage_to_an_encoder_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let whole = tiny::encoder(folder.path());
    let clip = folder.path().join("clip.mp4");
    write_mp4(&clip, &video(), Some(&tone()), &WriteOptions::default()).unwrap();
    for number in 0..DAMAGES {
        let encoder = folder.path().join(format!("encoder-{number}"));
        copy(&whole, &encoder);
        let words = damage(&encoder, number);
        let ran = score(&encoder, &[&clip]);
        let line = ran.error();
        assert!(line.contains(words), "{number}: {line}");
    }
    let ran = score(&folder.path().join("none"), &[&clip]);
    assert!(ran.error().contains("none"), "{}", ran.stderr);
}

#[test]
fn sizes_that_cannot_be_made_are_refused_before_the_work() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny::generator(folder.path());
    let out = folder.path().join("out");
    fs::create_dir(&out).unwrap();
    for (more, words) in [
        (["--size", "0x32"], "width: found 0"),
        (["--size", "32x40"], "height: found 40"),
        (["--size", "1000000x32"], "width: found 1000000"),
        (["--size", "32"], "expected WIDTHxHEIGHT"),
        (["--size", "-32x32"], "expected WIDTHxHEIGHT"),
        (["--size", "99999999999999999999x32"], "expected WIDTHxHEIGHT"),
        (["--duration", "1e12"], "duration: found 1000000000000"),
        (["--duration", "NaN"], "duration: found NaN"),
        (["--duration", "-1"], "duration: found -1"),
        (["--fps", "0"], "fps: found 0"),
        (["--fps", "inf"], "fps: found inf"),
        (["--steps", "1001"], "steps: found 1001"),
        (["--guidance-video", "NaN"], "guidance-video: found NaN"),
    ] {
        let joined = format!("{}={}", more[0], more[1]);
        let ran = generate(&model, &out.join("clip.mp4"), &[&joined]);
        let line = ran.error();
        assert!(line.contains(words), "{joined}: {line}");
        assert_eq!(names(&out), [""; 0], "{joined}");
    }
}

#[test]
fn places_that_take_no_file_are_refused_before_the_work() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny::generator(folder.path());
    let file = folder.path().join("file");
    fs::write(&file, "no folder").unwrap();
    let mut places = vec![
        (file.join("clip.mp4"), "there is no folder"),
        (folder.path().join("none/clip.mp4"), "there is no folder"),
    ];
    #[cfg(target_os = "linux")]
    {
        // Nobody can make a file there, not even an administrator.
        places.push((PathBuf::from("/proc/clip.mp4"), "cannot write"));
        let device = folder.path().join("full.mp4");
        std::os::unix::fs::symlink("/dev/full", &device).unwrap();
        places.push((device, "not a regular file"));
    }
    for (clip, words) in &places {
        let ran = generate(&model, clip, &[]);
        let line = ran.error();
        assert!(
            line.contains(words) && line.contains(clip.to_str().unwrap()),
            "{line}"
        );
    }
    let recipe = training::recipe(folder.path(), 3);
    let mut runs = vec![file.join("run")];
    if cfg!(target_os = "linux") {
        runs.push(PathBuf::from("/proc/run"));
    }
    for run_dir in &runs {
        let set = format!("run_dir={:?}", run_dir.to_str().unwrap());
        let ran = run([
            "train",
            recipe.to_str().unwrap(),
            "--device",
            "cpu",
            "--set",
            &set,
        ]);
        assert!(ran.error().contains(run_dir.to_str().unwrap()), "{}", ran.stderr);
    }
}

#[cfg(unix)]
#[test]
fn a_disk_that_refuses_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny::generator(folder.path());
    let out = folder.path().join("out");
    fs::create_dir(&out).unwrap();
    let (clip, wave) = (out.join("clip.mp4"), out.join("clip.wav"));
    for (mode, path) in [("joint", &clip), ("video-only", &clip), ("audio-only", &wave)] {
        let path = path.to_str().unwrap();
        let mut arguments = vec!["generate", "a dog barks", "--mode", mode, "--device", "cpu", "-q"];
        arguments.extend(["--model", model.to_str().unwrap(), "-o", path]);
        let ran = on_a_small_disk(2, &arguments);
        let line = ran.error();
        assert!(
            line.contains(path) && line.contains("cannot write"),
            "{mode}: {line}"
        );
        assert_eq!(names(&out), [""; 0], "{mode}");
    }

    let recipe = training::recipe(folder.path(), 3);
    let ran = on_a_small_disk(2, &["train", recipe.to_str().unwrap(), "--device", "cpu", "-q"]);
    let line = ran.error();
    assert!(line.contains("checkpoints"), "{line}");
    assert_eq!(names(&folder.path().join("run/checkpoints")), [""; 0]);
    assert!(!folder.path().join("run/model").exists());
}

/// A file system in memory with room for 64 kB.
#[cfg(target_os = "linux")]
struct SmallDisk(tempfile::TempDir);

#[cfg(target_os = "linux")]
impl SmallDisk {
    /// None where this user may not mount one.
    fn mount() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
            .arg(folder.path());
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        mounted.then_some(Self(folder))
    }
}

#[cfg(target_os = "linux")]
impl Drop for SmallDisk {
    fn drop(&mut self) {
        // The folder itself goes with `TempDir`, which cannot remove a mount point.
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_told_and_nothing_stays_on_it() {
    let Some(disk) = SmallDisk::mount() else {
        eprintln!("skipped: this user may not mount a small disk");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let model = tiny::generator(folder.path());
    fs::write(disk.0.path().join("ballast"), vec![1; 60 << 10]).unwrap();
    let clip = disk.0.path().join("clip.mp4");
    let ran = generate(&model, &clip, &["-q"]);
    let line = ran.error();
    assert!(
        line.contains("clip.mp4: cannot write") && line.contains("space"),
        "{line}"
    );
    assert_eq!(names(disk.0.path()), ["ballast"]);
}

#[test]
fn clips_of_every_kind_are_scored_or_say_why_not() {
    let folder = tempfile::tempdir().unwrap();
    let encoder = tiny::encoder(folder.path());
    let clips = folder.path().join("clips");
    fs::create_dir(&clips).unwrap();
    let at = |name: &str| clips.join(name);
    let options = WriteOptions::default();
    let mut uneven = video();
    uneven.times_s = (0..12).map(|k| f64::from(k * k) / 144.0).collect();
    uneven.variable_rate = true;
    write_mp4(&at("a-uneven.mp4"), &uneven, Some(&tone()), &options).unwrap();
    // The index without what it points to.
    write_mp4(&at("b-empty.mp4"), &video(), Some(&tone()), &options).unwrap();
    let whole = fs::read(at("b-empty.mp4")).unwrap();
    let data = whole.windows(4).position(|window| window == b"mdat").unwrap();
    fs::write(at("b-empty.mp4"), &whole[..data + 4]).unwrap();
    write_wav(&at("c-sound.wav"), &tone(), WavFormat::Int16).unwrap();
    fs::rename(at("c-sound.wav"), at("c-sound.mp4")).unwrap();
    fs::write(at("d-text.mp4"), "Sing, goddess, the anger of Achilles.\n").unwrap();
    fs::write(at("e-nothing.mp4"), "").unwrap();

    let ran = score(&encoder, &[&clips]);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    let report = ran.json();
    let results = report["results"].as_array().unwrap();
    assert_eq!(results.len(), 5);
    assert!(results[0]["avhscore"].is_f64(), "{report}");
    assert!(
        results[0]["flags"]
            .as_array()
            .unwrap()
            .contains(&"variable_frame_rate".into()),
        "{report}"
    );
    for (result, words) in results[1..].iter().zip([
        "neither a frame nor a sample",
        "no video stream",
        "not a media file",
        "not a media file",
    ]) {
        assert!(result["avhscore"].is_null(), "{result}");
        assert!(result["reason"].as_str().unwrap().contains(words), "{result}");
    }
    assert_eq!(report["n"], 1);

    let ran = score(
        &encoder,
        &[&at("b-empty.mp4"), &at("e-nothing.mp4"), &at("none.mp4")],
    );
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    assert!(!ran.stderr.contains("bug in fulgur"), "{}", ran.stderr);
}
