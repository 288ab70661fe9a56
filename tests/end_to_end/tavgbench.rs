//! The data set's tools, on files made by rule and on small clips.

use std::fs;
use std::path::Path;

use fulgur::benchmark::captions::synthetic::write_captions;
use serde_json::Value;

use crate::support::{Ran, names, run};

fn tavgbench(arguments: &[&str]) -> Ran {
    run(["tavgbench"].iter().chain(arguments))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn statistics_are_those_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("captions.txt");
    let mut file = fs::File::create(&path).unwrap();
    let made = write_captions(&mut file, 5000, 7).unwrap();
    let plots = folder.path().join("plots");
    let ran = tavgbench(&["stats", text(&path), "--json", "--pictures", text(&plots)]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let answer = ran.json();
    for (key, value) in [
        ("records", made.records),
        ("captions", made.captions),
        ("duplicates", made.duplicates),
        ("ignored_lines", made.ignored_lines),
        ("rejected", made.rejected),
        ("two_line", made.two_line),
        ("broken_utf8", made.broken_utf8),
    ] {
        assert_eq!(answer[key], value, "{key}");
    }
    let hours = answer["hours"].as_f64().unwrap();
    assert!((hours - made.length_ms as f64 / 3.6e6).abs() < 1e-9);
    let words = answer["words"]["mean"].as_f64().unwrap();
    assert!((words - made.words as f64 / made.captions as f64).abs() < 1e-9);
    let sentences = answer["sentences"]["mean"].as_f64().unwrap();
    assert!((sentences - made.sentences as f64 / made.captions as f64).abs() < 1e-9);
    assert_eq!(names(&plots), ["duration.svg", "sentences.svg", "words.svg"]);
    for name in names(&plots) {
        let svg = fs::read_to_string(plots.join(name)).unwrap();
        assert!(svg.starts_with("<svg") && !svg.contains("NaN"));
    }
    let told = tavgbench(&["stats", text(&path)]).stdout;
    assert!(
        told.contains("5000 clips") && told.contains("duplicate names"),
        "{told}"
    );
}

#[test]
fn parts_and_tables_are_written_and_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let captions = folder.path().join("captions.txt");
    let made = write_captions(&mut fs::File::create(&captions).unwrap(), 3000, 8).unwrap();
    let (manifest, table) = (folder.path().join("m.jsonl"), folder.path().join("m.csv"));
    let parts = ["split", text(&captions), "--json", "--test", "100", "--val", "50"];
    let files = ["-o", text(&manifest), "--csv", text(&table)];
    let ran = tavgbench(&[&parts[..], &files[..]].concat());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let answer = ran.json();
    let count = |key: &str| answer[key].as_u64().unwrap();
    assert_eq!(count("train") + count("val") + count("test"), made.records);
    assert!(
        (200..400).contains(&count("test")) && (80..220).contains(&count("val")),
        "{answer}"
    );
    let records = lines(&manifest);
    assert_eq!(records.len() as u64, made.records);
    let test = records.iter().filter(|record| record["split"] == "test").count() as u64;
    assert_eq!(test, count("test"));
    let rule = records[0]["provenance"]["split"]["rule"].as_str().unwrap();
    assert!(rule.contains("mod 1000 < 100 test, < 150 val"), "{rule}");
    let rows = fs::read_to_string(&table).unwrap();
    assert!(rows.starts_with(
        "path,id,relpath,num_frames,height,width,aspect_ratio,fps,resolution,audio_path,audio_fps,text\n"
    ));
    // The manifest has the figures of the captions, and what others added to it survives.
    let stats = |path: &Path| tavgbench(&["stats", text(path), "--json"]).json();
    let (a, b) = (stats(&captions), stats(&manifest));
    for key in ["records", "captions", "hours", "words", "sentences", "duration_s"] {
        assert_eq!(a[key], b[key], "{key}");
    }
    assert_eq!(b["splits"]["test"], count("test"));
    let more = fs::read_to_string(&manifest)
        .unwrap()
        .replacen("\"flags\"", "\"mine\":1.10,\"flags\"", 1);
    fs::write(&manifest, more).unwrap();
    let only = folder.path().join("all.jsonl");
    let ran = tavgbench(&["split", text(&manifest), "-o", text(&only), "--json"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(fs::read_to_string(&only).unwrap().contains("\"mine\":1.10"));
}

#[test]
fn files_that_are_none_are_told_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let absent = folder.path().join("none.txt");
    assert!(
        tavgbench(&["stats", text(&absent)])
            .error()
            .contains("none.txt: cannot open")
    );
    assert!(
        tavgbench(&["stats", text(folder.path())])
            .error()
            .contains("cannot read")
    );
    let manifest = folder.path().join("m.jsonl");
    fs::write(&manifest, "{\"id\":\"a\"}\n{\"id\":\"b\",\"frames\":\"many\"}\n").unwrap();
    let line = tavgbench(&["stats", text(&manifest)]).error().to_owned();
    assert!(
        line.contains("m.jsonl: line 2: frames: found \"many\", expected a whole number"),
        "{line}"
    );
    let out = folder.path().join("out.jsonl");
    tavgbench(&["split", text(&manifest), "-o", text(&out)]).error();
    assert!(
        tavgbench(&["split", text(&manifest), "--test", "900", "--val", "200"])
            .error()
            .contains("at most 1000")
    );
    assert_eq!(names(folder.path()), ["m.jsonl"]);
    // Bytes of any kind are lines of no clip.
    let noise = folder.path().join("noise.txt");
    fs::write(
        &noise,
        (0..50_000u32).map(|i| ((i * i) >> 7) as u8).collect::<Vec<u8>>(),
    )
    .unwrap();
    let ran = tavgbench(&["stats", text(&noise), "--json"]);
    assert_eq!(
        (ran.code, ran.json()["records"].as_u64()),
        (1, Some(0)),
        "{}",
        ran.stderr
    );
}

#[cfg(feature = "media")]
mod media {
    use fulgur::datasets::media::{Sound, Video, WriteOptions, probe, write_mp4};

    use super::*;

    /// A video whose frames get brighter, with a tone.
    fn video(path: &Path, seconds: usize, sound: bool) {
        let frames = (0..seconds * 10)
            .flat_map(|k| vec![(k * 4) as u8; 64 * 48 * 3])
            .collect();
        let video = Video::new(frames, 64, 48, 10.0).unwrap();
        let tone = (0..seconds * 16_000)
            .map(|i| 0.3 * (i as f32 * 0.1).sin())
            .collect();
        let tone = Sound::new(tone, 1, 16_000).unwrap();
        write_mp4(path, &video, sound.then_some(&tone), &WriteOptions::default()).unwrap();
    }

    #[test]
    fn clips_are_cut_and_verified() {
        let folder = tempfile::tempdir().unwrap();
        let videos = folder.path().join("videos");
        fs::create_dir(&videos).unwrap();
        video(&videos.join("aaaaaaaaaaa.mp4"), 6, true);
        video(&videos.join("bbbbbbbbbbb.mp4"), 4, false);
        let captions = folder.path().join("captions.txt");
        let text_of = "aaaaaaaaaaa_1000_3000.mp4 One.\naaaaaaaaaaa_3000_6000.mp4 Two.\nbbbbbbbbbbb_0_2000.mp4 Mute.\n\
                       ccccccccccc_0_2000.mp4 No video.\naaaaaaaaaaa_90000_92000.mp4 Beyond.\n";
        fs::write(&captions, text_of).unwrap();
        let (clips, manifest) = (folder.path().join("clips"), folder.path().join("m.jsonl"));
        let cut = [
            "cut",
            text(&captions),
            "--sources",
            text(&videos),
            "-o",
            text(&clips),
        ];
        let cut = [&cut[..], &["--manifest", text(&manifest), "--json"]].concat();
        let ran = tavgbench(&cut);
        assert_eq!(ran.code, 1, "{}", ran.stderr);
        let answer = ran.json();
        let count = |key: &str| answer[key].as_u64().unwrap();
        assert_eq!((count("cut"), count("missing"), count("failed")), (3, 1, 1));
        assert!(
            answer["problems"][0]["reason"]
                .as_str()
                .unwrap()
                .contains("ccccccccccc"),
            "{answer}"
        );
        let all = [
            "aaaaaaaaaaa_1000_3000.mp4",
            "aaaaaaaaaaa_3000_6000.mp4",
            "bbbbbbbbbbb_0_2000.mp4",
        ];
        assert_eq!(names(&clips), all);
        let info = probe(&clips.join(all[1])).unwrap();
        assert_eq!(info.video.unwrap().frame_count, 30);
        assert_eq!(lines(&manifest)[2]["flags"], serde_json::json!(["no_audio"]));
        // The same again cuts nothing.
        let again = tavgbench(&cut).json();
        assert_eq!((&again["cut"], &again["present"]), (&0.into(), &3.into()));

        fs::write(clips.join("aaaaaaaaaaa_3000_6000.mp4"), "no clip").unwrap();
        let verified = folder.path().join("v.jsonl");
        let verify = [
            "verify",
            text(&captions),
            "--media",
            text(&clips),
            "-o",
            text(&verified),
            "--json",
        ];
        let ran = tavgbench(&verify);
        assert_eq!(ran.code, 1, "{}", ran.stderr);
        let answer = ran.json();
        assert_eq!((&answer["ok"], &answer["checked"]), (&1.into(), &5.into()));
        let faults = &answer["faults"];
        assert_eq!(
            (&faults["missing"], &faults["unreadable"], &faults["no_audio"]),
            (&2.into(), &1.into(), &1.into())
        );
        let good = &lines(&verified)[0];
        assert_eq!(
            (&good["frames"], &good["width"], &good["sample_rate"]),
            (&20.into(), &64.into(), &16_000.into())
        );
        assert!(
            (good["fps"].as_f64().unwrap() - 10.0).abs() < 1e-6 && good["flags"] == serde_json::json!([])
        );
        assert_eq!(good["provenance"]["fps"]["stage"], "verify");
        // A clip of another length than its name says.
        fs::copy(
            videos.join("aaaaaaaaaaa.mp4"),
            clips.join("aaaaaaaaaaa_1000_3000.mp4"),
        )
        .unwrap();
        let answer = tavgbench(&verify).json();
        assert_eq!(answer["faults"]["duration_off"], 1);
        let quick = tavgbench(&[&verify[..], &["--quick"]].concat()).json();
        assert_eq!(quick["faults"]["duration_off"], 1);
    }

    #[test]
    fn nothing_there_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let captions = folder.path().join("captions.txt");
        fs::write(&captions, "aaaaaaaaaaa_1000_3000.mp4 One.\n").unwrap();
        let clips = folder.path().join("clips");
        let none = tavgbench(&["verify", text(&captions), "--media", text(&clips)]);
        assert!(none.error().contains("no such folder"));
        let ran = tavgbench(&[
            "cut",
            text(&captions),
            "--sources",
            text(folder.path()),
            "-o",
            text(&clips),
            "--json",
        ]);
        assert_eq!((ran.code, ran.json()["missing"].as_u64()), (2, Some(1)));
        let ran = tavgbench(&["verify", text(&captions), "--media", text(&clips), "--json"]);
        assert_eq!((ran.code, ran.json()["checked"].as_u64()), (2, Some(1)));
        let nan = tavgbench(&[
            "verify",
            text(&captions),
            "--media",
            text(&clips),
            "--tolerance",
            "NaN",
        ]);
        assert!(nan.error().contains("--tolerance: found NaN"));
    }
}
