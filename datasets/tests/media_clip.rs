//! Clips that are written and read back: lengths, times, quality, tags, ranges, rates.
#![cfg(feature = "media")]

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use fulgur_datasets::media::{
    ReadOptions, Sound, Video, WavFormat, WriteOptions, for_each_frame, probe, read_clip, read_sound,
    write_mp4, write_wav,
};
use tempfile::TempDir;

const RATE: u32 = 16_000;

/// A soft pattern that moves: codecs keep it well, and every frame differs.
fn film(frames: usize, width: usize, height: usize, fps: f64) -> Video {
    let mut rgb = Vec::with_capacity(frames * width * height * 3);
    for k in 0..frames {
        for y in 0..height {
            for x in 0..width {
                let phase = |scale: f64, shift: f64| {
                    let wave = (x as f64 * 0.07 * scale + y as f64 * 0.05 + k as f64 * 0.2 + shift).sin();
                    (128.0 + 90.0 * wave) as u8
                };
                rgb.extend_from_slice(&[phase(1.0, 0.0), phase(0.6, 1.0), phase(0.3, 2.0)]);
            }
        }
    }
    Video::new(rgb, width, height, fps).unwrap()
}

fn tone(seconds: f64, channels: usize, rate: u32) -> Sound {
    let len = (seconds * f64::from(rate)).round() as usize;
    let sample = |i: usize, channel: usize| {
        (i as f32 * (220.0 + 110.0 * channel as f32) * std::f32::consts::TAU / rate as f32).sin() * 0.3
    };
    let samples = (0..len)
        .flat_map(|i| (0..channels).map(move |channel| sample(i, channel)))
        .collect();
    Sound::new(samples, channels, rate).unwrap()
}

fn place(name: &str) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    (folder, path)
}

fn write(path: &Path, video: &Video, sound: Option<&Sound>) {
    write_mp4(path, video, sound, &WriteOptions::default()).unwrap();
}

fn psnr(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len());
    let error: f64 = a
        .iter()
        .zip(b)
        .map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2))
        .sum();
    10.0 * (255.0 * 255.0 * a.len() as f64 / error.max(1e-9)).log10()
}

#[test]
fn four_seconds_come_back_whole_and_in_time() {
    let (folder, path) = place("clip.mp4");
    let (video, sound) = (film(48, 96, 96, 12.0), tone(4.0, 1, RATE));
    write(&path, &video, Some(&sound));
    let clip = read_clip(&path, &ReadOptions::default()).unwrap();
    let (found, heard) = (clip.video.unwrap(), clip.sound.unwrap());
    assert!(!clip.truncated);
    assert_eq!((found.frame_count, found.width, found.height), (48, 96, 96));
    assert_eq!(
        found.times_s,
        (0..48).map(|k| f64::from(k) / 12.0).collect::<Vec<_>>()
    );
    assert_eq!((found.fps, found.variable_rate), (12.0, false));
    assert_eq!(
        (heard.len(), heard.channels, heard.sample_rate),
        (64_000, 1, RATE)
    );
    assert!(
        psnr(&found.frames, &video.frames) > 30.0,
        "{}",
        psnr(&found.frames, &video.frames)
    );
    let error: f32 = heard
        .samples
        .iter()
        .zip(&sound.samples)
        .map(|(a, b)| (a - b).powi(2))
        .sum();
    let power: f32 = sound.samples.iter().map(|a| a * a).sum();
    assert!(error < 1e-3 * power, "{}", error / power);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);

    let info = probe(&path).unwrap();
    assert_eq!(info, clip.info);
    let (picture, sound) = (info.video.unwrap(), info.sound.unwrap());
    assert_eq!(
        (picture.codec.as_str(), picture.frame_count, picture.fps),
        ("h264", 48, 12.0)
    );
    assert_eq!(
        (sound.codec.as_str(), sound.channels, sound.sample_rate),
        ("aac", 1, RATE)
    );
    assert!((info.duration_s - 4.0).abs() < 0.002, "{}", info.duration_s);
}

/// Several at once, and of a height that is no multiple of 16: an encoder that looks into memory that nobody has
/// written finds something else there each time.
#[test]
fn equal_clips_give_equal_files() {
    const THREADS: usize = 6;
    const ROUNDS: usize = 5;
    let folder = tempfile::tempdir().unwrap();
    for (frames, width, height) in [(12, 64, 48), (7, 34, 50)] {
        let video = film(frames, width, height, 12.0);
        let sound = tone(frames as f64 / 12.0, 2, RATE);
        let round = |thread: usize| {
            let path = folder.path().join(format!("{thread}.mp4"));
            let encode = |_| {
                write(&path, &video, Some(&sound));
                std::fs::read(&path).unwrap()
            };
            (0..ROUNDS).map(encode).collect::<Vec<_>>()
        };
        let files = std::thread::scope(|scope| {
            let round = &round;
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| scope.spawn(move || round(thread)))
                .collect();
            let files = threads.into_iter().flat_map(|thread| thread.join().unwrap());
            files.collect::<HashSet<_>>()
        });
        assert_eq!(files.len(), 1, "different files of {width}x{height}");
    }
}

#[test]
fn the_index_comes_first() {
    let (_folder, path) = place("clip.mp4");
    write(&path, &film(12, 64, 48, 12.0), Some(&tone(1.0, 1, RATE)));
    let bytes = std::fs::read(&path).unwrap();
    let find = |name: &[u8]| bytes.windows(4).position(|window| window == name).unwrap();
    assert!(find(b"moov") < find(b"mdat"));
}

#[test]
fn lengths_are_exact_for_odd_rates_and_channels() {
    for (fps, frames, rate, channels) in [
        (30_000.0 / 1001.0, 31, 44_100, 2),
        (25.0, 7, 48_000, 6),
        (12.5, 13, 22_050, 1),
        (8.0, 1, RATE, 1),
        (60.0, 61, 8000, 2),
        (0.5, 2, RATE, 1),
    ] {
        let (_folder, path) = place("clip.mp4");
        let video = film(frames, 32, 48, fps);
        let seconds = frames as f64 / fps;
        write(&path, &video, Some(&tone(seconds, channels, rate)));
        let clip = read_clip(&path, &ReadOptions::default()).unwrap();
        let (found, heard) = (clip.video.unwrap(), clip.sound.unwrap());
        assert_eq!(found.frame_count, frames, "{fps}");
        assert!(
            found
                .times_s
                .iter()
                .zip(&video.times_s)
                .all(|(a, b)| (a - b).abs() < 1e-9),
            "{fps}"
        );
        assert!((found.fps - fps).abs() < 1e-6 * fps, "{fps}: {}", found.fps);
        assert_eq!((heard.channels, heard.sample_rate), (channels, rate));
        assert_eq!(heard.len(), (seconds * f64::from(rate)).round() as usize, "{fps}");
        assert!(!clip.truncated, "{fps}");
    }
}

#[test]
fn sound_is_fitted_to_the_picture() {
    let video = film(12, 32, 32, 12.0);
    for seconds in [0.2, 1.7] {
        let (_folder, path) = place("clip.mp4");
        write(&path, &video, Some(&tone(seconds, 1, RATE)));
        assert_eq!(read_sound(&path, None).unwrap().len(), 16_000);
        let keep = WriteOptions {
            fit_sound: false,
            ..WriteOptions::default()
        };
        write_mp4(&path, &video, Some(&tone(seconds, 1, RATE)), &keep).unwrap();
        assert_eq!(
            read_sound(&path, None).unwrap().len(),
            (seconds * 16_000.0) as usize
        );
    }
}

#[test]
fn a_click_keeps_its_time() {
    for (rate, at_s) in [(RATE, 0.5), (44_100, 1.2345), (48_000, 0.031)] {
        let (_folder, path) = place("clip.mp4");
        let mut sound = Sound::new(vec![0.0; 2 * rate as usize], 1, rate).unwrap();
        let at = (at_s * f64::from(rate)) as usize;
        for (k, sample) in sound.samples[at..at + 80].iter_mut().enumerate() {
            *sample = if k % 2 == 0 { 0.9 } else { -0.9 } * (1.0 - k as f32 / 80.0);
        }
        write(&path, &film(24, 32, 32, 12.0), Some(&sound));
        for wanted in [rate, RATE] {
            let heard = read_sound(&path, Some(wanted)).unwrap();
            let peak = heard
                .samples
                .iter()
                .fold(0.0_f32, |peak, sample| peak.max(sample.abs()));
            let onset = heard
                .samples
                .iter()
                .position(|sample| sample.abs() > 0.4 * peak)
                .unwrap();
            let error_s = onset as f64 / f64::from(wanted) - at_s;
            assert!(error_s.abs() < 0.002, "{rate} Hz, {at_s} s: off by {error_s} s");
        }
    }
}

#[test]
fn uneven_times_come_back() {
    let (_folder, path) = place("clip.mp4");
    let mut video = film(6, 32, 32, 6.0);
    video.times_s = vec![0.0, 0.1, 0.15, 0.5, 0.8, 0.95];
    video.variable_rate = true;
    write(&path, &video, Some(&tone(1.0, 1, RATE)));
    let clip = read_clip(&path, &ReadOptions::default()).unwrap();
    let found = clip.video.unwrap();
    assert!(found.variable_rate);
    assert_eq!(found.frame_count, 6);
    for (found, expected) in found.times_s.iter().zip(&video.times_s) {
        assert!((found - expected).abs() < 1e-4, "{found} {expected}");
    }
    assert!((found.fps - 6.0).abs() < 1e-3, "{}", found.fps);
    assert_eq!(clip.sound.unwrap().len(), 16_000);
    assert!(!clip.truncated);

    // Nearest in time: 0 -> 0, 0.125 -> 0.1 (a tie goes to the earlier), 0.25 -> 0.15, 0.375 -> 0.5, 0.5,
    // 0.625 -> 0.5, 0.75 -> 0.8, 0.875 -> 0.8 (0.075 s either way, rounded).
    let steady = read_clip(
        &path,
        &ReadOptions {
            fps: Some(8.0),
            ..ReadOptions::default()
        },
    )
    .unwrap()
    .video
    .unwrap();
    assert_eq!(
        (steady.frame_count, steady.fps, steady.variable_rate),
        (8, 8.0, false)
    );
    assert_eq!(steady.times_s[3], 0.375);
    for (k, source) in [(0, 0), (2, 2), (3, 3), (4, 3), (5, 3), (6, 4)] {
        assert_eq!(steady.frame(k), found.frame(source), "{k}");
    }
}

#[test]
fn a_film_without_sound_and_a_silent_one() {
    let (_folder, path) = place("clip.mp4");
    write(&path, &film(5, 32, 32, 12.0), None);
    let clip = read_clip(&path, &ReadOptions::default()).unwrap();
    assert!(clip.sound.is_none() && clip.info.sound.is_none() && !clip.truncated);
    assert_eq!(clip.video.unwrap().frame_count, 5);
    let error = read_sound(&path, None).unwrap_err().to_string();
    assert!(error.ends_with("clip.mp4: has no audio stream"), "{error}");

    write(
        &path,
        &film(6, 32, 32, 12.0),
        Some(&Sound::new(vec![0.0; 8000], 1, RATE).unwrap()),
    );
    assert!(read_sound(&path, None).unwrap().is_silent());
}

#[test]
fn tags_survive() {
    let (_folder, path) = place("clip.mp4");
    let tags = [
        ("title", "A dog barks"),
        ("comment", "seed 7; \u{e9}\u{4e16}"),
        ("description", "line\nof \"text\""),
    ];
    let metadata = tags
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect();
    let options = WriteOptions {
        metadata,
        ..WriteOptions::default()
    };
    write_mp4(&path, &film(3, 32, 32, 12.0), None, &options).unwrap();
    let info = probe(&path).unwrap();
    for (key, value) in tags {
        assert_eq!(info.metadata.get(key).map(String::as_str), Some(value));
    }
}

#[test]
fn a_part_of_a_film_is_that_part() {
    let (_folder, path) = place("film.mp4");
    let video = film(300, 32, 32, 25.0);
    let mut sound = Sound::new(vec![0.0; 12 * RATE as usize], 1, RATE).unwrap();
    sound.samples[(7.25 * 16_000.0) as usize..][..64].fill(0.9);
    write(&path, &video, Some(&sound));
    let options = ReadOptions {
        start_s: 7.0,
        duration_s: Some(1.0),
        ..ReadOptions::default()
    };
    let clip = read_clip(&path, &options).unwrap();
    let whole = read_clip(
        &path,
        &ReadOptions {
            sound: false,
            ..ReadOptions::default()
        },
    )
    .unwrap()
    .video
    .unwrap();
    let (part, heard) = (clip.video.unwrap(), clip.sound.unwrap());
    assert_eq!((part.frame_count, heard.len()), (25, 16_000));
    assert!(!clip.truncated);
    assert!(
        part.times_s
            .iter()
            .enumerate()
            .all(|(k, time_s)| (time_s - k as f64 / 25.0).abs() < 1e-9)
    );
    for k in [0, 12, 24] {
        assert_eq!(part.frame(k), whole.frame(175 + k), "{k}");
    }
    let onset = heard
        .samples
        .iter()
        .position(|sample| sample.abs() > 0.3)
        .unwrap();
    assert!(onset.abs_diff(4000) < 32, "{onset}");
    assert!((part.fps - 25.0).abs() < 1e-6);

    let few = ReadOptions {
        max_frames: Some(3),
        mono: true,
        sample_rate: Some(8000),
        ..options
    };
    let clip = read_clip(&path, &few).unwrap();
    assert_eq!(
        (clip.video.unwrap().frame_count, clip.sound.unwrap().len()),
        (3, 8000)
    );
    let behind = ReadOptions {
        start_s: 50.0,
        ..ReadOptions::default()
    };
    let clip = read_clip(&path, &behind).unwrap();
    assert!(clip.video.is_none() && clip.sound.is_none() && !clip.truncated);
}

#[test]
fn frames_stream_one_by_one_at_any_size() {
    let (_folder, path) = place("film.mp4");
    write(&path, &film(50, 64, 48, 25.0), Some(&tone(2.0, 1, RATE)));
    let options = ReadOptions {
        fps: Some(10.0),
        size: Some((31, 17)),
        ..ReadOptions::default()
    };
    let mut times = Vec::new();
    let streamed = for_each_frame(&path, &options, |frame| {
        assert_eq!(
            (frame.width, frame.height, frame.rgb.len()),
            (31, 17, 31 * 17 * 3)
        );
        assert_eq!(frame.index, times.len());
        times.push(frame.time_s);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(times, (0..20).map(|k| f64::from(k) / 10.0).collect::<Vec<_>>());
    assert_eq!((streamed.frames, streamed.truncated), (20, false));
    let some = for_each_frame(&path, &ReadOptions::default(), |frame| {
        if frame.index == 4 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    assert_eq!(some.unwrap().frames, 5);
}

#[test]
fn scaling_keeps_the_picture() {
    let (_folder, path) = place("film.mp4");
    write(&path, &film(3, 96, 96, 12.0), None);
    let small = ReadOptions {
        size: Some((48, 48)),
        ..ReadOptions::default()
    };
    let found = read_clip(&path, &small).unwrap().video.unwrap();
    let full = read_clip(&path, &ReadOptions::default()).unwrap().video.unwrap();
    // The mean of each 2x2 block.
    let at = |x: usize, y: usize, c: usize| u32::from(full.frame(1)[3 * (y * 96 + x) + c]);
    let mut mean = Vec::new();
    for y in 0..48 {
        for x in 0..48 {
            for c in 0..3 {
                let (x, y) = (2 * x, 2 * y);
                mean.push(
                    ((at(x, y, c) + at(x + 1, y, c) + at(x, y + 1, c) + at(x + 1, y + 1, c) + 2) / 4) as u8,
                );
            }
        }
    }
    assert!(
        psnr(found.frame(1), &mean) > 38.0,
        "{}",
        psnr(found.frame(1), &mean)
    );
}

#[test]
fn wav_through_both_readers_is_the_same() {
    let (_folder, path) = place("tone.wav");
    let sound = tone(0.3, 2, 22_050);
    write_wav(&path, &sound, WavFormat::Float).unwrap();
    assert_eq!(read_sound(&path, None).unwrap(), sound);
    assert_eq!(fulgur_datasets::media::read_wav(&path).unwrap(), sound);
    write_wav(&path, &sound, WavFormat::Int16).unwrap();
    let found = read_sound(&path, None).unwrap();
    assert_eq!(found, fulgur_datasets::media::read_wav(&path).unwrap());
    assert!(
        found
            .samples
            .iter()
            .zip(&sound.samples)
            .all(|(a, b)| (a - b).abs() <= 0.5 / 32768.0)
    );
}
