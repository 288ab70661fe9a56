//! `fulgur data`: what can be tried without a network.

use std::collections::HashSet;

use crate::support::{names, run};
#[cfg(all(unix, feature = "media"))]
use crate::training;

#[test]
fn every_set_is_listed_with_its_terms() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let ran = run(["data", "list", "--json", "--data", data.to_str().unwrap()]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let report = ran.json();
    let sets = report["sets"].as_array().unwrap();
    let listed: HashSet<&str> = sets.iter().map(|set| set["name"].as_str().unwrap()).collect();
    assert_eq!(listed.len(), sets.len(), "a name is listed twice: {report}");
    assert!(listed.contains("stamps"), "{report}");
    for set in sets {
        assert!(
            !set["licence"].as_str().unwrap().is_empty() && set["download_bytes"].as_u64().unwrap() > 0,
            "{set}"
        );
        assert_eq!(
            (&set["prepared"], set["items"].is_null()),
            (&false.into(), true),
            "{set}"
        );
    }
    assert!(names(folder.path()).is_empty(), "listing writes nothing");
}

#[test]
fn the_environment_names_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let list = crate::support::fulgur()
        .args(["data", "list"])
        .env("FULGUR_DATA", folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8(list.stdout).unwrap();
    assert!(
        text.trim_end().ends_with(folder.path().to_str().unwrap()),
        "{text}"
    );
}

#[test]
fn an_unknown_set_is_refused_before_anything_is_fetched() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let ran = run([
        "data",
        "fetch",
        "stamps",
        "stamp",
        "--data",
        data.to_str().unwrap(),
        "--json",
    ]);
    let line = ran.error();
    assert!(
        line.contains("unknown data set stamp,") && line.contains("stamps"),
        "{line}"
    );
    assert!(names(folder.path()).is_empty());
    assert!(run(["data", "fetch"]).error().contains("<NAME>"));
    assert!(run(["data"]).error().contains("requires a subcommand"));
}

#[test]
fn a_missing_client_is_an_error_that_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let mut command = crate::support::fulgur();
    command
        .args(["data", "fetch", "stamps", "--json", "--data"])
        .arg(&data)
        .env("PATH", folder.path());
    let ran = crate::support::Ran::of(command.output().unwrap());
    assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{}", ran.stderr);
    let last = ran.stderr.lines().last().unwrap();
    assert!(last.starts_with("error: ") && last.contains("apt-get"), "{last}");
    assert!(!data.join("stamps").exists());
}

#[cfg(all(unix, feature = "media"))]
#[test]
fn the_text_recipe_finds_all_it_needs_in_the_fetched_sets() {
    let folder = tempfile::tempdir().unwrap();
    let Some(arguments) = training::real_recipe(folder.path()) else {
        return;
    };
    let mut command = crate::support::fulgur();
    command.current_dir(folder.path()).args(arguments);
    command.args(["--set", "text.sentences=120", "--set", "train.max_steps=2"]);
    let ran = crate::support::Ran::of(command.output().unwrap());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(ran.json()["finished"], true);
    assert_eq!(
        names(&folder.path().join("lessons")),
        ["lessons.safetensors", "tokenizer.json"]
    );
    assert!(folder.path().join("run/model/tokenizer.json").exists());
}

/// Cleaning keeps what is prose, counts the rest, and is the same each time; bad input is one line and leaves nothing.
#[cfg(feature = "media")]
#[test]
fn text_is_cleaned_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let prose = |seed: usize| -> String {
        (0..30)
            .map(|i| format!("the word{0} of page{0} ", seed * 100 + i))
            .collect()
    };
    let line = |text: &str| format!("{}\n", serde_json::json!({ "text": text }));
    let lines = [line(&prose(1)), line("short"), line(&prose(2)), line(&prose(1))].concat();
    std::fs::write(at("in.jsonl"), &lines).unwrap();
    std::fs::write(at("more.txt"), prose(3)).unwrap();
    let ran = run([
        "data",
        "clean",
        &at("in.jsonl"),
        &at("more.txt"),
        "-o",
        &at("out.jsonl"),
        "--json",
        "-q",
    ]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let report = ran.json();
    assert_eq!((&report["documents"], &report["kept"]), (&5.into(), &3.into()));
    assert_eq!(
        report["dropped"],
        serde_json::json!({ "too_short": 1, "duplicate": 1 })
    );
    let kept = std::fs::read_to_string(at("out.jsonl")).unwrap();
    assert_eq!(kept, [1, 2, 3].map(|seed| line(&prose(seed))).concat());

    std::fs::write(at("bad.jsonl"), "{\"text\": \"a\", \"url\": \"b\"}\n").unwrap();
    std::fs::write(at("bad.txt"), b"ab\xff").unwrap();
    for (arguments, words) in [
        (
            vec!["bad.jsonl", "-o", "new.jsonl"],
            "line 1: found unknown field `url`",
        ),
        (
            vec!["bad.txt", "-o", "new.jsonl"],
            "found no UTF-8 at byte 2, expected UTF-8",
        ),
        (vec!["none.txt", "-o", "new.jsonl"], "none.txt: No such file"),
        (
            vec!["in.jsonl", "-o", "new.txt"],
            "expected a name that ends in .jsonl",
        ),
        (
            vec![
                "in.jsonl",
                "-o",
                "new.jsonl",
                "--score-with",
                "none",
                "--drop",
                "1.5",
            ],
            "--drop: found 1.5",
        ),
    ] {
        let arguments = arguments
            .iter()
            .map(|word| match word.contains('.') && !word.starts_with('1') {
                true => at(word),
                false => (*word).to_owned(),
            });
        let ran = run(["data".to_owned(), "clean".to_owned(), "-q".to_owned()]
            .into_iter()
            .chain(arguments));
        assert!(ran.error().contains(words), "{}", ran.stderr);
    }
    assert_eq!(
        names(folder.path()),
        ["bad.jsonl", "bad.txt", "in.jsonl", "more.txt", "out.jsonl"]
    );
}

/// One round of self-cleaning: a model of the text, trained here, finds what is none of it, by bytes and by tokens.
#[cfg(feature = "media")]
#[test]
fn a_model_of_the_text_finds_what_is_none_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let mut noise = fulgur::kernels::philox::Philox::new(5, 1);
    let mut pick = |words: &[&str]| words[noise.below(words.len())].to_owned();
    let mut prose = || -> String {
        let sentence = |_| {
            let mut who = || pick(&["owl", "bell", "dog", "river", "wind", "child"]);
            let (one, other) = (who(), who());
            let does = pick(&["sees", "hears", "follows", "finds"]);
            let mut what = || pick(&["house", "light", "road", "rain", "tower"]);
            let (near, far) = (what(), what());
            format!("the {one} {does} the {near} and the {other} {does} that {far} of old. ")
        };
        (0..12).map(sentence).collect()
    };
    let documents: Vec<String> = (0..48).map(|_| prose()).collect();
    // Words of no language, with enough of those that English has, so that no rule finds them.
    let mut letters = fulgur::kernels::philox::Philox::new(6, 1);
    let mut words = || -> String {
        let word = |_| -> String {
            let letter = |_| char::from(b'a' + letters.below(26) as u8);
            (0..6).map(letter).chain([' ']).collect()
        };
        (0..40).map(word).collect()
    };
    let mut garbage = || format!("the {}and of {}", words(), words());
    let odd: Vec<String> = (0..4).map(|_| garbage()).collect();
    let line = |text: &String| format!("{}\n", serde_json::json!({ "text": text }));
    let mixed: Vec<&String> = (documents.chunks(12).zip(&odd))
        .flat_map(|(some, odd)| some.iter().chain([odd]))
        .collect();
    std::fs::write(
        at("all.jsonl"),
        mixed.iter().map(|text| line(text)).collect::<String>(),
    )
    .unwrap();

    let (all, json, ids) = (at("all.jsonl"), at("tokenizer.json"), at("all.u16"));
    let ran = run([
        "lm",
        "tokenizer",
        "train",
        &all,
        "--vocab",
        "300",
        "-o",
        &json,
        "--tokens",
        &ids,
        "-q",
    ]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    for (name, tokens, vocabulary, more) in [
        ("bytes", "all.jsonl", 256, &[][..]),
        ("pieces", "all.u16", 300, &["--tokenizer", json.as_str()]),
    ] {
        let recipe = format!(
            "task = \"lm\"\nrun_dir = {:?}\n[train]\nmax_steps = 60\nema = 0.0\n[optimiser]\nlr = 1e-2\n[schedule]\nwarmup = 5\n\
             [lm]\ntokens = {:?}\nheld_out = 0.1\nvalidation = 2\nbatch = 8\ncontext = 64\n\
             [lm.model]\narchitecture = \"hgrn2\"\nvocabulary = {vocabulary}\nlayers = 1\nwidth = 32\nhidden = 48\nheads = 2\n",
            at(name),
            at(tokens),
        );
        std::fs::write(at("recipe.toml"), recipe).unwrap();
        let ran = run(["train", &at("recipe.toml"), "-q", "--device", "cpu"]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let model = at(&format!("{name}/model"));
        let clean = |model: &str, drop: &str, more: &[&str]| {
            let out = at("out.jsonl");
            let fixed = [
                "data",
                "clean",
                &all,
                "-o",
                &out,
                "--keep-near",
                "--json",
                "-q",
                "--device",
                "cpu",
            ];
            let with = ["--score-with", model, "--drop", drop];
            run(fixed.iter().chain(&with).chain(more))
        };
        // 4 of 52.
        let ran = clean(&model, "0.08", more);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
        let report = ran.json();
        assert_eq!(
            (&report["kept"], &report["dropped"]),
            (&48.into(), &serde_json::json!({ "hard_to_predict": 4 }))
        );
        let kept = std::fs::read_to_string(at("out.jsonl")).unwrap();
        assert!(kept == documents.iter().map(line).collect::<String>(), "{name}");
        let scores = |name: &str| report["scores"][name].as_f64().unwrap();
        assert!(scores("kept_bits_per_byte") < scores("bits_per_byte"));
        assert!(scores("highest_kept") < 4.0 && scores("highest_kept") >= scores("kept_bits_per_byte"));
        assert_eq!(clean(&model, "0", more).json()["kept"], 52);
    }
    std::fs::remove_file(at("out.jsonl")).unwrap();
    for (model, more, words) in [
        (
            "pieces/model",
            &[][..],
            "found no tokenizer.json and a vocabulary of 300, expected --tokenizer",
        ),
        (
            "bytes/model",
            &["--tokenizer", json.as_str()],
            "tokens, expected those of the model's vocabulary, 256",
        ),
        ("none", &[], "none"),
    ] {
        let (model, out) = (at(model), at("out.jsonl"));
        let fixed = ["data", "clean", &all, "-o", &out, "-q", "--score-with", &model];
        let ran = run(fixed.iter().chain(more));
        assert!(ran.error().contains(words), "{}", ran.stderr);
        assert!(!folder.path().join("out.jsonl").exists());
    }
}
