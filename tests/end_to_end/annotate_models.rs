//! Annotation with networks of our own: captions of frames, tags of sounds, filters that compare, and a server that refuses the key.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::json;

use crate::support::{Ran, run};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn annotate(input: &Path, output: &Path, more: &[&str]) -> Ran {
    let start = [
        "annotate",
        text(input),
        "-o",
        text(output),
        "--json",
        "-q",
        "--device",
        "cpu",
    ];
    run(start.iter().chain(more))
}

/// Answers the first questions, then refuses the key until it is told that it is a good one.
fn serve(first: usize, good: &Arc<AtomicBool>) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let base = format!("http.base=http://{}", listener.local_addr().unwrap());
    let asked: Arc<AtomicUsize> = Arc::default();
    let (counter, good) = (Arc::clone(&asked), Arc::clone(good));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut length = 0;
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap_or(0) == 0 || line == "\r\n" {
                    break;
                }
                if let Some((name, value)) = line.split_once(':')
                    && name.eq_ignore_ascii_case("content-length")
                {
                    length = value.trim().parse().unwrap();
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).ok();
            let number = counter.fetch_add(1, Ordering::SeqCst);
            let (status, body) = if number < first || good.load(Ordering::SeqCst) {
                let text = format!("The dog number {number} barks at the ball in the sun.");
                (200, json!({ "choices": [{ "message": { "content": text } }] }))
            } else {
                (401, json!({ "error": { "message": "the key ran out" } }))
            };
            let body = body.to_string();
            let head = format!(
                "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            stream.write_all(format!("{head}{body}").as_bytes()).ok();
        }
    });
    (base, asked)
}

#[test]
fn a_server_that_refuses_the_key_ends_the_run_and_what_is_done_stays() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("m.jsonl");
    let rows = (0..40).map(|i| {
        let seen = format!("the dog number {i} runs on the grass");
        format!(
            "{}\n",
            json!({ "id": format!("clip{i}"), "caption_video": seen, "caption_audio": "a bell" })
        )
    });
    fs::write(&input, rows.collect::<String>()).unwrap();
    let output = folder.path().join("out.jsonl");
    let good: Arc<AtomicBool> = Arc::default();
    let (base, asked) = serve(10, &good);
    let more = [
        "--merge",
        "openai-http:m",
        "--jobs",
        "2",
        "--set",
        &base,
        "--set",
        "filters.duplicates=false",
    ];
    let ran = annotate(&input, &output, &more);
    let line = ran.error();
    assert!(
        line.contains("found 3 refusals (401 or 403) in a row, expected a key")
            && line.contains("10 clips are done and kept"),
        "{line}"
    );
    // Two at a time: those under way when the third refusal came are the last ones.
    let refused = asked.load(Ordering::SeqCst);
    assert!((13..=14).contains(&refused), "{refused}");
    assert!(!output.exists());
    good.store(true, Ordering::SeqCst);
    let ran = annotate(&input, &output, &more);
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    assert_eq!(
        (&ran.json()["annotated"], &ran.json()["resumed"]),
        (&json!(40), &json!(10))
    );
    assert_eq!(asked.load(Ordering::SeqCst), refused + 30);
}

#[cfg(feature = "media")]
mod media {
    use std::path::PathBuf;

    use fulgur::datasets::media::{Sound, Video, WavFormat, WriteOptions, write_mp4, write_wav};
    use fulgur::lightnet::testing;
    use serde_json::Value;

    use super::*;

    fn lines(path: &Path) -> Vec<Value> {
        let text = fs::read_to_string(path).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    fn tone(hertz: f32, seconds: usize) -> Sound {
        let wave =
            (0..seconds * 16_000).map(|i| 0.3 * (i as f32 / 16_000.0 * hertz * std::f32::consts::TAU).sin());
        Sound::new(wave.collect(), 1, 16_000).unwrap()
    }

    /// A folder with two clips, a low and a high one, their manifest, and a list of tags with examples.
    fn prepare(folder: &Path) -> (PathBuf, PathBuf, PathBuf) {
        let clips = folder.join("clips");
        fs::create_dir(&clips).unwrap();
        for (name, hertz) in [("low", 120.0), ("high", 2500.0)] {
            let frames = (0..30usize)
                .flat_map(|k| (0..160 * 128 * 3).map(move |i| ((i * (k + 3) / 97) % 200) as u8))
                .collect();
            let video = Video::new(frames, 160, 128, 10.0).unwrap();
            let path = clips.join(format!("{name}.mp4"));
            write_mp4(&path, &video, Some(&tone(hertz, 3)), &WriteOptions::default()).unwrap();
            write_wav(
                &folder.join(format!("{name}.wav")),
                &tone(hertz, 2),
                WavFormat::Int16,
            )
            .unwrap();
        }
        let input = folder.join("m.jsonl");
        fs::write(&input, "{\"id\":\"low\"}\n{\"id\":\"high\"}\n").unwrap();
        let list = folder.join("tags.txt");
        fs::write(
            &list,
            "# two tones\na low hum | low.wav\na high whistle | high.wav\n",
        )
        .unwrap();
        (clips, input, list)
    }

    const RANDOM_WORDS: [&str; 4] = [
        "--set",
        "filters.language=false",
        "--set",
        "filters.quality=false",
    ];

    #[test]
    fn frames_are_captioned_and_sounds_tagged_by_networks() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path();
        let (clips, input, list) = prepare(folder);
        let blip = testing::model("blip_tiny", folder);
        let frames = format!("candle-blip:{}", text(&blip));
        let tags = format!("tags.list={}", text(&list));
        let more = [
            &[
                "--media",
                text(&clips),
                "--frames",
                &frames,
                "--audio",
                "tags:builtin",
                "--set",
                &tags,
            ][..],
            &["--set", "tags.count=1"],
            &RANDOM_WORDS,
        ]
        .concat();
        let output = folder.join("out.jsonl");
        let ran = annotate(&input, &output, &more);
        assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
        let records = lines(&output);
        assert_eq!(records.len(), 2, "{}", ran.stdout);
        for (record, heard) in records.iter().zip(["a low hum", "a high whistle"]) {
            assert_eq!(
                record["caption_audio"],
                format!("The sound of {heard}"),
                "{record}"
            );
            let seen = record["caption_video"].as_str().unwrap();
            assert!(!seen.is_empty());
            let from = &record["provenance"];
            let model = |field: &str| from[field]["model"].as_str().unwrap().to_owned();
            assert_eq!(from["caption_video"]["backend"], "candle-blip");
            assert!(model("caption_video").starts_with("blip_tiny "));
            assert_eq!(from["caption_audio"]["backend"], "tags");
            assert_eq!(from["caption_audio"]["rule"], "zero-shot tags, no description");
            assert!(model("caption_audio").starts_with("builtin "));
        }
        // Another run gives the same; other beams and other weights are other settings.
        let again = folder.join("again.jsonl");
        assert_eq!(
            annotate(&input, &again, &[&more[..], &["--jobs", "1"]].concat()).code,
            0
        );
        assert_eq!(fs::read(&output).unwrap(), fs::read(&again).unwrap());
        let beams = annotate(&input, &output, &[&more[..], &["--set", "blip.beams=3"]].concat());
        assert!(
            beams.error().contains("blip.beams: found 1, expected 3"),
            "{}",
            beams.stderr
        );
        fs::write(&list, "a low hum | high.wav\n").unwrap();
        let other = annotate(&input, &output, &more);
        assert!(other.error().contains("tags.sha256: found"), "{}", other.stderr);
    }

    #[test]
    fn clips_whose_sound_and_picture_are_apart_go() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path();
        let (clips, input, _) = prepare(folder);
        let rows = ["low", "high"].map(|id| {
            json!({ "id": id, "caption_video": format!("a {id} dog on the grass"), "caption_audio": "the bell in the tower" })
                .to_string()
        });
        fs::write(&input, rows.join("\n")).unwrap();
        let output = folder.join("out.jsonl");
        let with = |least: &str| {
            let least = format!("filters.least_audio_video={least}");
            let more = [
                "--media",
                text(&clips),
                "--restart",
                "--set",
                "filters.agreement=builtin",
                "--set",
                &least,
            ];
            let ran = annotate(&input, &output, &more);
            assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
            ran.json()
        };
        assert_eq!(with("-1.0")["annotated"], 2);
        assert_eq!(with("0.999")["dropped"], json!({ "audio_video": 2 }));
        let speech = [
            "--media",
            text(&clips),
            "--restart",
            "--set",
            "filters.speech=true",
        ];
        let ran = annotate(&input, &output, &speech);
        // Tones are no voices.
        assert_eq!(
            (ran.code, &ran.json()["flags"]),
            (0, &json!({})),
            "{}",
            ran.stdout
        );
    }

    #[test]
    fn models_that_cannot_be_used_are_one_line() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path();
        let (clips, input, list) = prepare(folder);
        let output = folder.join("out.jsonl");
        let blip = testing::model("blip_tiny", folder);
        let named = format!("candle-blip:{}", text(&blip));
        fs::rename(blip.join("vocab.txt"), blip.join("words.txt")).unwrap();
        let absent = format!("tags.list={}", text(&folder.join("none.txt")));
        fs::write(&list, "a bell\n").unwrap();
        let bare = format!("tags.list={}", text(&list));
        let clip = testing::model("clip_text", folder);
        let clip = format!("tags:{}", text(&clip));
        for (more, words) in [
            (vec!["--frames", named.as_str()], "found no vocabulary"),
            (vec!["--frames", "candle-blip:none"], "none: found no vocabulary"),
            (
                vec!["--audio", "tags:builtin"],
                "without an example, which builtin needs",
            ),
            (
                vec!["--audio", "tags:builtin", "--set", &bare],
                "found the tag \"a bell\" without",
            ),
            (vec!["--audio", "tags:builtin", "--set", &absent], "none.txt"),
            (vec!["--audio", "tags:none"], "none"),
            (vec!["--audio", &clip], "clip_text"),
            (vec!["--set", "filters.agreement=builtin"], "beside 0 thresholds"),
            (
                vec![
                    "--set",
                    "filters.agreement=builtin",
                    "--set",
                    "filters.least_text_video=0.2",
                ],
                "filters.least_text_video: found builtin",
            ),
            (
                vec!["--set", "blip.beams=0"],
                "blip.beams: found 0, expected 1 to 64",
            ),
            (vec!["--set", "tags.least=nan"], "tags.least: found NaN"),
        ] {
            let ran = annotate(&input, &output, &[&["--media", text(&clips)], &more[..]].concat());
            let line = ran.error();
            assert!(line.contains(words), "{more:?}: {line}");
        }
        assert!(!output.exists());
    }
}
