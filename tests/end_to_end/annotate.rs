//! Annotation: killed and gone on with, with servers that fail, with our own language model, and on media.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use fulgur::benchmark::captions::synthetic::write_manifest;
use fulgur::kernels::philox::Philox;
use serde_json::{Value, json};

use crate::support::{Ran, fulgur, names, run};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn annotate(input: &Path, output: &Path, more: &[&str]) -> Ran {
    run(["annotate", text(input), "-o", text(output), "--json", "-q"]
        .iter()
        .chain(more))
}

fn manifest(folder: &Path, clips: u64) -> PathBuf {
    let path = folder.join("clips.jsonl");
    write_manifest(
        &mut std::io::BufWriter::new(fs::File::create(&path).unwrap()),
        clips,
        3,
    )
    .unwrap();
    path
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Annotates a manifest of `clips` clips once in one go, and once killed `kills` times at random moments; both give the same
/// files.
fn kill(clips: u64, kills: usize) {
    let folder = tempfile::tempdir().unwrap();
    let input = manifest(folder.path(), clips);
    let whole = folder.path().join("whole.jsonl");
    let began = Instant::now();
    let ran = annotate(&input, &whole, &["--rewrite", "template"]);
    let took = began.elapsed();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let answer = ran.json();
    let dropped: u64 = answer["dropped"]
        .as_object()
        .unwrap()
        .values()
        .map(|n| n.as_u64().unwrap())
        .sum();
    assert_eq!(answer["clips"], clips);
    assert_eq!(answer["annotated"].as_u64().unwrap() + dropped, clips);
    for reason in ["refusal", "address", "language", "no_audio_caption"] {
        assert!(
            answer["dropped"][reason].as_u64().unwrap_or(0) > 0,
            "{reason}: {answer}"
        );
    }

    let torn = folder.path().join("torn.jsonl");
    let mut draw = Philox::named(clips, "kills");
    let mut killed = 0;
    for _ in 0..kills {
        let mut program = fulgur();
        program.args([
            "annotate",
            text(&input),
            "-o",
            text(&torn),
            "--json",
            "-q",
            "--rewrite",
            "template",
        ]);
        let mut process = program
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Each life sees a part of what is left.
        std::thread::sleep(took.mul_f32(draw.range(0.5, 2.0) / kills as f32));
        killed += usize::from(process.try_wait().unwrap().is_none());
        process.kill().ok();
        process.wait().unwrap();
    }
    assert!(killed > 0, "every run was over before it was killed");
    let ran = annotate(&input, &torn, &["--rewrite", "template"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let resumed = ran.json();
    assert!(resumed["resumed"].as_u64().unwrap() > 0, "{resumed}");
    for key in ["clips", "annotated", "dropped", "failed", "flags"] {
        assert_eq!(resumed[key], answer[key], "{key}");
    }
    for name in ["jsonl", "left-out.jsonl"] {
        let same =
            fs::read(whole.with_extension(name)).unwrap() == fs::read(torn.with_extension(name)).unwrap();
        assert!(same, "{name} differs");
    }
    eprintln!(
        "{clips} clips in {:.1} s, {killed} of {kills} runs killed, {} clips resumed",
        took.as_secs_f64(),
        resumed["resumed"]
    );
}

#[test]
fn a_run_that_is_killed_gives_the_same_manifest() {
    kill(4000, 5);
}

/// 100,000 clips and ten kills: `make soak-annotate`.
#[test]
#[ignore = "takes a minute: make soak-annotate"]
fn kills_of_a_hundred_thousand_clips() {
    kill(100_000, 10);
}

#[test]
fn unknown_fields_survive_and_provenance_tells_the_stages() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("m.jsonl");
    let line = r#"{"id":"aaaaaaaaaaa_0_10000","caption_video":"a brown dog runs on the grass","mine":{"x":1.50},"caption_audio":"a dog barks in the distance"}"#;
    fs::write(&input, format!("{line}\n")).unwrap();
    let heard = folder.path().join("heard.csv");
    fs::write(
        &heard,
        "id,caption_audio\naaaaaaaaaaa_0_10000.mp4,the dog barks twice\n",
    )
    .unwrap();
    let output = folder.path().join("out.jsonl");
    let table = format!("precomputed:{}", text(&heard));
    let ran = annotate(&input, &output, &["--audio", &table]);
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    let written = fs::read_to_string(&output).unwrap();
    assert!(written.contains(r#""mine":{"x":1.50}"#), "{written}");
    let record = &lines(&output)[0];
    assert_eq!(
        record["caption"],
        "A brown dog runs on the grass. The dog barks twice."
    );
    assert_eq!(record["caption_audio"], "the dog barks twice");
    let from = &record["provenance"];
    assert_eq!(
        from["caption"],
        json!({ "stage": "merge", "backend": "template", "prompt_version": "template-v1" })
    );
    assert_eq!(
        from["caption_audio"],
        json!({ "stage": "audio", "backend": "precomputed" })
    );
    assert!(from["caption_video"].is_null());
    // Other settings need another folder.
    let error = annotate(
        &input,
        &output,
        &["--set", "filters.min_words=6", "--audio", &table],
    )
    .error()
    .to_owned();
    assert!(
        error.contains("filters.min_words: found 5, expected 6") && error.contains("--restart"),
        "{error}"
    );
    let again = annotate(
        &input,
        &output,
        &["--set", "filters.min_words=60", "--audio", &table, "--restart"],
    );
    assert_eq!(again.json()["dropped"], json!({ "few_words": 1 }));
    assert_eq!(fs::read_to_string(&output).unwrap(), "");
    let left_out = &lines(&output.with_extension("left-out.jsonl"))[0];
    assert_eq!(
        (&left_out["dropped"], &left_out["mine"]["x"]),
        (&"few_words".into(), &1.5.into())
    );
}

#[test]
fn clips_are_compared_in_their_order() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("m.jsonl");
    let clip = |video: &str, i: usize, seen: &str| json!({ "id": format!("{video}_{}_{}", i * 1000, i * 1000 + 500), "caption_video": seen, "caption_audio": "a bell rings in the tower" });
    let rows = [
        clip("aaaaaaaaaaa", 0, "a dog runs on the grass"),
        clip("aaaaaaaaaaa", 1, "a cat sits on the wall"),
        clip("aaaaaaaaaaa", 2, "a cow stands on the road"),
        clip("bbbbbbbbbbb", 0, "A dog runs on the grass"),
        clip("bbbbbbbbbbb", 1, "the dog sleeps in the sun"),
    ];
    fs::write(&input, rows.map(|row| format!("{row}\n")).concat()).unwrap();
    let output = folder.path().join("out.jsonl");
    let ran = annotate(
        &input,
        &output,
        &["--set", "filters.clips_per_video=2", "--jobs", "4"],
    );
    assert_eq!(
        ran.json()["dropped"],
        json!({ "duplicate_caption": 1, "video_cap": 1 })
    );
    let left: Vec<Value> = lines(&output.with_extension("left-out.jsonl"));
    let ids: Vec<&str> = left.iter().map(|record| record["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["aaaaaaaaaaa_2000_2500", "bbbbbbbbbbb_0_500"]);
}

#[test]
fn settings_that_are_none_are_told_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let input = manifest(folder.path(), 3);
    let output = folder.path().join("out.jsonl");
    let toml = folder.path().join("a.toml");
    fs::write(&toml, "frames = \"precomputed\"\n[filters]\nmin_word = 3\n").unwrap();
    for (more, words) in [
        (vec!["--set", "filters.min_fps=nan"], "filters.min_fps: found NaN"),
        (vec!["--set", "filters.no=1"], "unknown field `no`"),
        (vec!["--set", "frames=7"], "invalid type: integer `7`"),
        (vec!["--config", text(&toml)], "unknown field `min_word`"),
        (vec!["--config", "absent.toml"], "absent.toml: "),
        (vec!["--frames", "gpt"], "expected none, precomputed"),
        (vec!["--merge", "openai-http"], "without a model"),
        (
            vec!["--merge", "openai-http:m", "--set", "http.base=nowhere"],
            "http.base: found \"nowhere\"",
        ),
        (vec!["--merge", "lm:absent"], "absent"),
        (
            vec!["--frames", "precomputed:absent.csv"],
            "absent.csv: cannot open",
        ),
        (vec!["--left-out", text(&output)], "the same name twice"),
        (vec!["--media", "absent"], "absent: no such folder"),
    ] {
        let ran = annotate(&input, &output, &more);
        let line = ran.error();
        assert!(line.contains(words), "{line}");
    }
    assert!(annotate(&input, &input, &[]).error().contains("found the input"));
    assert_eq!(names(folder.path()), ["a.toml", "clips.jsonl"]);
}

/// A server that answers each question by what it says: 200, or a status that the question names.
fn serve() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || reply(stream.unwrap()));
        }
    });
    base
}

fn reply(mut stream: TcpStream) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let question: Value = serde_json::from_slice(&body).unwrap();
    let asked = question["messages"][0]["content"]
        .as_str()
        .unwrap_or("pictures")
        .to_owned();
    let status = ["401", "500", "html"]
        .into_iter()
        .find(|word| asked.contains(&format!("status {word}")));
    let (status, body) = match status {
        Some("html") => ("200", "<html></html>".to_owned()),
        Some(status) => (
            status,
            json!({ "error": { "message": "Bearer sk-secret is no good" } }).to_string(),
        ),
        None => {
            let number = asked.len();
            let text = format!("\"The dog of the server barks at {number} letters in the sun.\"");
            (
                "200",
                json!({ "choices": [{ "message": { "content": text } }], "usage": { "total_tokens": 50 } })
                    .to_string(),
            )
        }
    };
    let head = format!(
        "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes()).ok();
}

#[test]
fn a_server_that_fails_for_one_clip_does_not_harm_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("m.jsonl");
    let seen = [
        "a dog runs",
        "status 401",
        "a cat sits there",
        "status 500",
        "status html",
        "a cow stands up",
    ];
    let rows: Vec<String> = seen
        .iter()
        .enumerate()
        .map(|(i, seen)| {
            json!({ "id": format!("clip{i}"), "caption_video": seen, "caption_audio": "a bell" }).to_string()
        })
        .collect();
    fs::write(&input, rows.join("\n")).unwrap();
    let output = folder.path().join("out.jsonl");
    let base = format!("http.base={}", serve());
    let more = [
        "--merge",
        "openai-http:tiny",
        "--set",
        &base,
        "--set",
        "http.tries=2",
        "--set",
        "http.backoff_s=0.01",
    ];
    let key = [&more[..], &["--set", "http.key_env=FULGUR_TEST_KEY"]].concat();
    let with_key = |more: &[&str]| {
        let mut program = fulgur();
        program
            .args(["annotate", text(&input), "-o", text(&output), "--json"])
            .args(more);
        program
            .env("FULGUR_TEST_KEY", "sk-secret")
            .env("FULGUR_LOG", "debug");
        Ran::of(program.output().unwrap())
    };
    let dry = with_key(&[&key[..], &["--dry-run"]].concat());
    assert_eq!(dry.code, 0, "{}", dry.stderr);
    assert_eq!(dry.json()["server"]["requests"], 6);
    assert_eq!(names(folder.path()), ["m.jsonl"]);
    let ran = with_key(&key);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    let answer = ran.json();
    assert_eq!(
        (&answer["annotated"], &answer["failed"], &answer["dropped"]),
        (&3.into(), &3.into(), &json!({}))
    );
    let errors: Vec<Value> = lines(&output.with_extension("left-out.jsonl"));
    let error = |i: usize| errors[i]["error"].as_str().unwrap();
    assert!(
        error(0).starts_with("merge: status 401: Bearer *** is no good"),
        "{}",
        error(0)
    );
    assert!(error(1).ends_with(", after 2 tries") && error(2).contains("no JSON in the answer"));
    // The key is nowhere.
    assert!(!ran.stdout.contains("sk-secret") && !ran.stderr.contains("sk-secret"));
    let mut folders = vec![folder.path().to_path_buf()];
    while let Some(folder) = folders.pop() {
        for name in names(&folder) {
            let path = folder.join(name);
            if path.is_dir() {
                folders.push(path);
            } else {
                assert!(
                    !String::from_utf8_lossy(&fs::read(&path).unwrap()).contains("sk-secret"),
                    "{}",
                    path.display()
                );
            }
        }
    }
    let record = &lines(&output)[0];
    assert!(
        record["caption"]
            .as_str()
            .unwrap()
            .starts_with("The dog of the server barks")
    );
    assert_eq!(record["provenance"]["caption"]["model"], "tiny");
    assert_eq!(record["provenance"]["caption"]["prompt_version"], "merge-v1");
    // Once more: what was answered is not asked again, what failed is.
    let again = with_key(&key).json();
    assert_eq!((&again["resumed"], &again["failed"]), (&3.into(), &3.into()));
    assert_eq!(again["server"]["requests"], 4);
    // And anew: the answers are on the disk.
    let anew = with_key(&[&key[..], &["--restart"]].concat()).json();
    assert_eq!(
        (&anew["server"]["cached"], &anew["annotated"]),
        (&3.into(), &3.into())
    );
}

#[test]
fn our_own_language_model_writes() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("m.jsonl");
    let row = json!({ "id": "a", "caption_video": "a dog runs", "caption_audio": "a dog barks" });
    fs::write(&input, format!("{row}\n")).unwrap();
    let output = folder.path().join("out.jsonl");
    let model = format!("lm:{}/models/english", env!("CARGO_MANIFEST_DIR"));
    let off = [
        "--set",
        "filters.quality=false",
        "--set",
        "filters.language=false",
        "--set",
        "lm.max_tokens=12",
    ];
    let ran = annotate(
        &input,
        &output,
        &[&["--merge", model.as_str()], &off[..]].concat(),
    );
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    let record = &lines(&output)[0];
    let caption = record["caption"].as_str().unwrap().to_owned();
    assert!(
        !caption.is_empty() && caption != "A dog runs. A dog barks.",
        "{caption}"
    );
    assert_eq!(record["provenance"]["caption"]["backend"], "lm");
    assert_eq!(record["provenance"]["caption"]["model"], "english");
    let again = annotate(
        &input,
        &output,
        &[&["--merge", model.as_str(), "--restart"], &off[..]].concat(),
    );
    assert_eq!(again.code, 0);
    assert_eq!(lines(&output)[0]["caption"], caption);
}

#[cfg(feature = "media")]
mod media {
    use fulgur::datasets::media::{Sound, Video, WriteOptions, write_mp4};

    use super::*;

    fn clip(path: &Path, seconds: usize, size: (usize, usize), moves: bool, level: Option<f32>) {
        let (width, height) = size;
        let grey = |k: usize| if moves { (k * 9 % 200) as u8 } else { 90 };
        let frames = (0..seconds * 10)
            .flat_map(|k| vec![grey(k); width * height * 3])
            .collect();
        let video = Video::new(frames, width, height, 10.0).unwrap();
        let tone = level.map(|level| {
            let tone = (0..seconds * 16_000)
                .map(|i| level * (i as f32 * 0.1).sin())
                .collect();
            Sound::new(tone, 1, 16_000).unwrap()
        });
        write_mp4(path, &video, tone.as_ref(), &WriteOptions::default()).unwrap();
    }

    #[test]
    fn clips_are_judged_by_their_media() {
        let folder = tempfile::tempdir().unwrap();
        let clips = folder.path().join("clips");
        fs::create_dir(&clips).unwrap();
        let at = |name: &str| clips.join(format!("{name}.mp4"));
        clip(&at("good"), 3, (160, 128), true, Some(0.3));
        clip(&at("still"), 3, (160, 128), false, Some(0.3));
        clip(&at("silent"), 3, (160, 128), true, Some(1e-5));
        clip(&at("mute"), 3, (160, 128), true, None);
        clip(&at("short"), 1, (160, 128), true, Some(0.3));
        clip(&at("small"), 3, (160, 96), true, Some(0.3));
        fs::write(at("broken"), "no clip").unwrap();
        let names = [
            "good", "still", "silent", "mute", "short", "small", "broken", "absent",
        ];
        let row = |name: &str| {
            let (seen, heard) = (format!("a {name} dog on the grass"), "a bell in the tower");
            json!({ "id": name, "caption_video": seen, "caption_audio": heard }).to_string()
        };
        let input = folder.path().join("m.jsonl");
        fs::write(&input, names.map(row).join("\n")).unwrap();
        let output = folder.path().join("out.jsonl");
        let ran = annotate(&input, &output, &["--media", text(&clips)]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let answer = ran.json();
        let reasons = json!({
            "missing": 1, "no_audio": 1, "silent": 1, "too_short": 1, "too_small": 1, "unreadable": 1,
        });
        assert_eq!(answer["dropped"], reasons);
        assert_eq!(
            (&answer["annotated"], &answer["flags"]),
            (&2.into(), &json!({ "static": 1 }))
        );
        // Each filter can be switched off.
        let off = [
            "--set",
            "filters.media=false",
            "--set",
            "filters.silence=false",
            "--set",
            "filters.still=false",
        ];
        let ran = annotate(
            &input,
            &output,
            &[&["--media", text(&clips), "--restart"], &off[..]].concat(),
        );
        assert_eq!(ran.json()["dropped"], json!({ "missing": 1, "unreadable": 1 }));
    }

    #[test]
    fn frames_and_sounds_are_sent_to_a_server() {
        let folder = tempfile::tempdir().unwrap();
        let clips = folder.path().join("clips");
        fs::create_dir(&clips).unwrap();
        clip(&clips.join("a.mp4"), 3, (160, 128), true, Some(0.3));
        let input = folder.path().join("m.jsonl");
        fs::write(&input, "{\"id\":\"a\"}\n").unwrap();
        let output = folder.path().join("out.jsonl");
        let base = format!("http.base={}", serve());
        let more = [
            "--media",
            text(&clips),
            "--frames",
            "openai-http:eyes",
            "--audio",
            "openai-http:ears",
            "--set",
            &base,
        ];
        let ran = annotate(&input, &output, &more);
        assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
        let record = &lines(&output)[0];
        assert_eq!(record["provenance"]["caption_video"]["model"], "eyes");
        assert_eq!(
            record["provenance"]["caption_audio"]["prompt_version"],
            "audio-v1"
        );
        assert!(
            record["caption"]
                .as_str()
                .unwrap()
                .starts_with("The dog of the server"),
            "{record}"
        );
    }
}

#[test]
fn an_interrupt_keeps_what_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let input = manifest(folder.path(), 30);
    let output = folder.path().join("out.jsonl");
    let base = format!("http.base={}", serve());
    // One request a minute: the run waits, and is asked to stop.
    let more = [
        "--merge",
        "openai-http:m",
        "--set",
        &base,
        "--set",
        "http.requests_per_minute=1",
        "--json",
    ];
    let mut program = fulgur();
    program.args(
        ["annotate", text(&input), "-o", text(&output)]
            .iter()
            .chain(&more),
    );
    let process = program
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let id = process.id().to_string();
    assert!(
        std::process::Command::new("kill")
            .args(["-INT", &id])
            .status()
            .unwrap()
            .success()
    );
    let ran = Ran::of(process.wait_with_output().unwrap());
    assert_eq!(ran.code, 1, "{}{}", ran.stdout, ran.stderr);
    let answer = ran.json();
    assert_eq!(
        (&answer["complete"], &answer["annotated"]),
        (&false.into(), &1.into())
    );
    assert!(!output.exists() && folder.path().join("out.work").is_dir());
}
