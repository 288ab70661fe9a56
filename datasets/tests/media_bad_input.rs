//! Files that are not what their name says, broken, hostile or too large; disks that refuse.
#![cfg(feature = "media")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fulgur_datasets::media::{
    MediaError, ReadOptions, Sound, Video, WriteOptions, for_each_frame, probe, read_clip, read_picture,
    read_sound, read_wav, write_mp4,
};
use fulgur_kernels::philox::Philox;
use tempfile::TempDir;

fn film(frames: usize) -> (Video, Sound) {
    let (width, height) = (48, 32);
    let noise = |k: usize| (k.wrapping_mul(2_654_435_761) >> 13) as u8;
    let rgb = (0..frames * width * height * 3)
        .map(|k| noise(k / 24) / 2 + 60)
        .collect();
    let video = Video::new(rgb, width, height, 12.0).unwrap();
    let len = frames * 16_000 / 12;
    (
        video,
        Sound::new(
            (0..len).map(|i| (i as f32 * 0.1).sin() * 0.4).collect(),
            1,
            16_000,
        )
        .unwrap(),
    )
}

fn written(frames: usize) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("clip.mp4");
    let (video, sound) = film(frames);
    write_mp4(&path, &video, Some(&sound), &WriteOptions::default()).unwrap();
    (folder, path)
}

/// The message is one line that names the file.
fn message<T: std::fmt::Debug>(outcome: Result<T, MediaError>, path: &Path) -> String {
    let text = outcome.unwrap_err().to_string();
    assert!(!text.contains('\n'), "{text}");
    assert!(text.starts_with(&path.display().to_string()), "{text}");
    text
}

#[test]
fn what_is_no_media_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("clip.mp4");
    let absent = message(read_clip(&path, &ReadOptions::default()), &path);
    assert!(absent.contains("cannot open"), "{absent}");
    assert!(
        message(read_clip(folder.path(), &ReadOptions::default()), folder.path())
            .contains("not a regular file")
    );
    for content in [
        "",
        "a text file\nnamed .mp4\n",
        "#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        "ffconcat version 1.0\n",
    ] {
        std::fs::write(&path, content).unwrap();
        for text in [
            message(read_clip(&path, &ReadOptions::default()), &path),
            message(probe(&path), &path),
            message(read_sound(&path, None), &path),
            message(
                for_each_frame(&path, &ReadOptions::default(), |_| ControlFlow::Continue(())),
                &path,
            ),
        ] {
            assert!(text.contains("not a media file"), "{content:?}: {text}");
        }
        message(read_wav(&path), &path);
        message(read_picture(&path), &path);
    }
}

#[test]
fn half_a_file_gives_half_a_clip() {
    let (_folder, path) = written(48);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let clip = read_clip(&path, &ReadOptions::default()).unwrap();
    assert!(clip.truncated);
    let (video, sound) = (clip.video.unwrap(), clip.sound.unwrap());
    assert!((4..44).contains(&video.frame_count), "{}", video.frame_count);
    assert!((4000..60_000).contains(&sound.len()), "{}", sound.len());
    let streamed = for_each_frame(&path, &ReadOptions::default(), |_| ControlFlow::Continue(())).unwrap();
    assert!(streamed.truncated);
    // The index is gone with the first bytes.
    std::fs::write(&path, &bytes[..200]).unwrap();
    message(read_clip(&path, &ReadOptions::default()), &path);
}

#[test]
fn limits_hold_before_anything_large_is_allocated() {
    let (_folder, path) = written(24);
    let few_pixels = ReadOptions {
        max_pixels: 1000,
        ..ReadOptions::default()
    };
    message(read_clip(&path, &few_pixels), &path);
    let few_bytes = ReadOptions {
        max_bytes: 10_000,
        sound: false,
        ..ReadOptions::default()
    };
    let text = message(read_clip(&path, &few_bytes), &path);
    assert!(text.contains("exceeds the limit of 10000"), "{text}");
    let few_samples = ReadOptions {
        max_bytes: 10_000,
        video: false,
        ..ReadOptions::default()
    };
    assert!(message(read_clip(&path, &few_samples), &path).contains("bytes of samples"));
    for size in [(0, 4), (1 << 20, 1 << 20), (usize::MAX, 2)] {
        let options = ReadOptions {
            size: Some(size),
            ..ReadOptions::default()
        };
        assert!(read_clip(&path, &options).is_err());
    }
    for wrong in [f64::NAN, -1.0, f64::INFINITY] {
        assert!(
            read_clip(
                &path,
                &ReadOptions {
                    start_s: wrong,
                    ..ReadOptions::default()
                }
            )
            .is_err()
        );
        assert!(
            read_clip(
                &path,
                &ReadOptions {
                    fps: Some(wrong),
                    ..ReadOptions::default()
                }
            )
            .is_err()
        );
        assert!(
            read_clip(
                &path,
                &ReadOptions {
                    duration_s: Some(wrong),
                    ..ReadOptions::default()
                }
            )
            .is_err()
        );
    }
}

#[test]
fn reading_can_be_cancelled_and_has_a_time_limit() {
    let (_folder, path) = written(24);
    let flag = Arc::new(AtomicBool::new(true));
    let options = ReadOptions {
        cancel: Some(Arc::clone(&flag)),
        ..ReadOptions::default()
    };
    assert!(matches!(
        read_clip(&path, &options),
        Err(MediaError::Cancelled { .. })
    ));
    flag.store(false, Ordering::Relaxed);
    let mut seen = 0;
    let stopped = for_each_frame(&path, &options, |_| {
        seen += 1;
        flag.store(true, Ordering::Relaxed);
        ControlFlow::Continue(())
    });
    assert!(matches!(stopped, Err(MediaError::Cancelled { .. })));
    assert!(seen > 0);
    let hasty = ReadOptions {
        stall_limit: Duration::ZERO,
        ..ReadOptions::default()
    };
    assert!(matches!(
        read_clip(&path, &hasty),
        Err(MediaError::TimedOut { .. })
    ));
}

#[test]
fn writing_refuses_what_it_cannot_keep() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("clip.mp4");
    let options = WriteOptions::default();
    let odd = Video::new(vec![0; 33 * 32 * 3], 33, 32, 12.0).unwrap();
    let text = write_mp4(&path, &odd, None, &options).unwrap_err().to_string();
    assert_eq!(
        text,
        "video size: found 33x32, expected an even width and height (4:2:0 chroma)"
    );
    let empty = Video::new(Vec::new(), 32, 32, 12.0).unwrap();
    assert!(write_mp4(&path, &empty, None, &options).is_err());
    let (video, mut sound) = film(3);
    sound.samples[5] = f32::NAN;
    assert!(write_mp4(&path, &video, Some(&sound), &options).is_err());
    for (key, value) in [("mood", "x"), ("title", "a\0b")] {
        let metadata = [(key.to_owned(), value.to_owned())].into();
        assert!(
            write_mp4(
                &path,
                &video,
                None,
                &WriteOptions {
                    metadata,
                    ..WriteOptions::default()
                }
            )
            .is_err()
        );
    }
    let preset = WriteOptions {
        preset: "no such preset",
        ..WriteOptions::default()
    };
    let text = write_mp4(&path, &video, None, &preset).unwrap_err().to_string();
    assert!(
        text.starts_with("preset: found no such preset, expected one of ultrafast"),
        "{text}"
    );
    let lost = folder.path().join("absent/clip.mp4");
    assert!(message(write_mp4(&lost, &video, None, &options), &lost).contains("cannot write"));
    assert!(
        message(write_mp4(folder.path(), &video, None, &options), folder.path()).contains("cannot write")
    );
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// A folder in which nobody may create a file, not even an administrator.
#[cfg(target_os = "linux")]
#[test]
fn a_folder_that_takes_no_files_is_named() {
    let path = Path::new("/proc/clip.mp4");
    let text = message(write_mp4(path, &film(3).0, None, &WriteOptions::default()), path);
    assert!(text.contains("cannot write"), "{text}");
}

#[cfg(unix)]
#[test]
fn a_read_only_folder_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let mode = |mode| std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(mode)).unwrap();
    mode(0o555);
    if std::fs::write(folder.path().join("probe"), b"").is_ok() {
        eprintln!("skipped: this user may write everywhere");
        return;
    }
    let path = folder.path().join("clip.mp4");
    let text = message(
        write_mp4(&path, &film(3).0, None, &WriteOptions::default()),
        &path,
    );
    assert!(text.contains("cannot write"), "{text}");
    mode(0o755);
}

#[cfg(unix)]
#[test]
fn names_that_are_no_utf8_work() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(std::ffi::OsStr::from_bytes(b"caf\xe9.mp4"));
    let (video, sound) = film(6);
    write_mp4(&path, &video, Some(&sound), &WriteOptions::default()).unwrap();
    assert_eq!(
        read_clip(&path, &ReadOptions::default())
            .unwrap()
            .video
            .unwrap()
            .frame_count,
        6
    );
}

/// Damage of every kind at random places: nothing panics, hangs or grows.
#[test]
fn damaged_files_never_panic_or_hang() {
    let (folder, whole) = written(12);
    let bytes = std::fs::read(&whole).unwrap();
    let path = folder.path().join("damaged.mp4");
    let mut random = Philox::named(2, "damage");
    let started = Instant::now();
    let (mut read, mut refused) = (0, 0);
    let mut below = |limit| random.below(limit);
    for round in 0..200 {
        let mut damaged = bytes.clone();
        for _ in 0..1 + below(8) {
            // Half of the damage goes into the index at the front.
            let reach = if below(2) == 0 {
                damaged.len().min(3000)
            } else {
                damaged.len()
            };
            let at = below(reach);
            match below(4) {
                0 => damaged[at] ^= 1 << below(8),
                1 => damaged[at] = 0xff,
                2 => {
                    let end = (at + 1 + below(64)).min(damaged.len());
                    damaged.drain(at..end);
                }
                _ => {
                    let end = (at + 4).min(damaged.len());
                    damaged[at..end].fill(below(256) as u8);
                }
            }
            if damaged.is_empty() {
                break;
            }
        }
        std::fs::write(&path, &damaged).unwrap();
        let options = ReadOptions {
            max_bytes: 64 << 20,
            stall_limit: Duration::from_secs(2),
            ..ReadOptions::default()
        };
        let before = Instant::now();
        match read_clip(&path, &options) {
            Ok(clip) => {
                read += 1;
                if let Some(sound) = clip.sound {
                    assert!(sound.samples.iter().all(|sample| sample.is_finite()));
                }
                if let Some(video) = clip.video {
                    assert_eq!(
                        video.frames.len(),
                        video.frame_count * video.width * video.height * 3
                    );
                    assert!(video.fps > 0.0, "{round}: {} of {:?}", video.fps, video.times_s);
                }
            }
            Err(error) => {
                refused += 1;
                assert!(!error.to_string().contains('\n'));
            }
        }
        assert!(before.elapsed() < Duration::from_secs(5), "{round}");
    }
    assert!(read > 20 && refused > 0, "{read} read, {refused} refused");
    assert!(started.elapsed() < Duration::from_secs(60));
}
