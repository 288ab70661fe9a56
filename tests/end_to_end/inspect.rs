//! `fulgur inspect`: clips written, read back and drawn.

use std::path::{Path, PathBuf};

use fulgur::datasets::media::{Sound, Video, WriteOptions, read_picture, write_mp4};

use crate::support::{Ran, names, run};

fn inspect(arguments: &[&Path]) -> Ran {
    let flags = [Path::new("inspect"), Path::new("--json")];
    run(flags.iter().chain(arguments).map(|argument| argument.as_os_str()))
}

/// One second of 12 frames that grow brighter.
fn video() -> Video {
    let frames = (0..12u8)
        .flat_map(|frame| vec![20 * frame; 32 * 24 * 3])
        .collect();
    Video::new(frames, 32, 24, 12.0).unwrap()
}

/// One second of a tone of 500 Hz at half of full scale.
fn tone(channels: usize) -> Sound {
    let sample = |k: usize| 0.5 * (std::f32::consts::TAU * 500.0 * k as f32 / 16_000.0).sin();
    let samples = (0..16_000).flat_map(|k| vec![sample(k); channels]).collect();
    Sound::new(samples, channels, 16_000).unwrap()
}

fn clip(folder: &Path, sound: Option<&Sound>) -> PathBuf {
    let path = folder.join("clip.mp4");
    let mut options = WriteOptions::default();
    options
        .metadata
        .insert("title".to_owned(), "a grey second".to_owned());
    write_mp4(&path, &video(), sound, &options).unwrap();
    path
}

#[test]
fn a_clip_is_described_and_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let path = clip(folder.path(), Some(&tone(1)));
    let sheet = folder.path().join("sheet.png");
    let ran = inspect(&[&path, Path::new("-o"), &sheet]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let report = ran.json();
    let (video, audio) = (&report["video"], &report["audio"]);
    assert_eq!(
        (&video["codec"], &audio["codec"]),
        (&"h264".into(), &"aac".into())
    );
    assert_eq!(
        (&video["width"], &video["height"], &video["frames"]),
        (&32.into(), &24.into(), &12.into())
    );
    assert_eq!(
        (&video["variable_rate"], &report["truncated"]),
        (&false.into(), &false.into())
    );
    assert_eq!(
        (&audio["channels"], &audio["sample_rate"]),
        (&1.into(), &16_000.into())
    );
    assert_eq!(report["metadata"]["title"], "a grey second");
    assert_eq!(report["sheet"], sheet.to_str().unwrap());
    for (found, expected, within) in [
        (&video["fps"], 12.0, 1e-6),
        (&video["duration_s"], 1.0, 1e-6),
        (&audio["duration_s"], 1.0, 1e-3),
        (&audio["peak"], 0.5, 0.05),
        // A sine of amplitude one half has a mean power of one eighth.
        (&audio["rms_db"], 10.0 * 0.125f64.log10(), 0.5),
    ] {
        assert!(
            (found.as_f64().unwrap() - expected).abs() <= within,
            "{found} is not {expected}: {report}"
        );
    }
    let drawn = read_picture(&sheet).unwrap();
    assert!(drawn.width > 1000 && drawn.pixels.iter().any(|value| *value != drawn.pixels[0]));
    assert_eq!(names(folder.path()), ["clip.mp4", "sheet.png"]);
}

#[test]
fn clips_without_sound_or_with_unusual_sound_are_ordinary() {
    let folder = tempfile::tempdir().unwrap();
    let mute = inspect(&[&clip(folder.path(), None)]).json();
    assert!(mute["audio"].is_null() && mute["sheet"].is_null(), "{mute}");
    assert_eq!(mute["video"]["frames"], 12);

    let silence = Sound::new(vec![0.0; 16_000], 1, 16_000).unwrap();
    let silent = inspect(&[&clip(folder.path(), Some(&silence))]).json();
    assert_eq!(silent["audio"]["silent"], true, "{silent}");

    let six = inspect(&[&clip(folder.path(), Some(&tone(6)))]).json();
    assert_eq!(
        (&six["audio"]["channels"], &six["audio"]["silent"]),
        (&6.into(), &false.into())
    );
}

#[test]
fn what_is_no_clip_is_refused_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    std::fs::write(
        file("text.mp4"),
        "Sing, goddess, the anger of Achilles.\n".repeat(200),
    )
    .unwrap();
    std::fs::write(file("empty.mp4"), "").unwrap();
    let whole = std::fs::read(clip(folder.path(), Some(&tone(1)))).unwrap();
    std::fs::write(file("head.mp4"), &whole[..40]).unwrap();
    let before = names(folder.path());
    for (name, words) in [
        ("text.mp4", "not a media file"),
        ("empty.mp4", "not a media file"),
        ("head.mp4", "not a media file"),
        ("absent.mp4", "No such file"),
    ] {
        let ran = inspect(&[&file(name), Path::new("-o"), &file("sheet.png")]);
        let line = ran.error();
        assert!(line.contains(name) && line.contains(words), "{line}");
    }
    let ran = inspect(&[folder.path()]);
    assert!(
        ran.error().contains(folder.path().to_str().unwrap()),
        "{}",
        ran.stderr
    );
    assert_eq!(names(folder.path()), before);
}

#[test]
fn a_sheet_that_cannot_be_written_is_refused_first() {
    let folder = tempfile::tempdir().unwrap();
    let path = clip(folder.path(), None);
    let refused = |sheet: &Path, words: &str| {
        let ran = inspect(&[&path, Path::new("-o"), sheet]);
        assert!(ran.error().contains(words), "{}", ran.stderr);
    };
    refused(&folder.path().join("none/sheet.png"), "there is no folder");
    refused(
        &folder.path().join("sheet.jpg"),
        "expected a name that ends in .png",
    );
    // Even the superuser cannot make a file there.
    #[cfg(target_os = "linux")]
    refused(
        Path::new("/sys/kernel/sheet.png"),
        "/sys/kernel/sheet.png: cannot write",
    );
    assert_eq!(names(folder.path()), ["clip.mp4"]);
}
