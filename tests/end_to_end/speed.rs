//! `fulgur eval speed`: figures of small classifiers on the CPU, and what it refuses.

use crate::support::run;

const SMALL: [&str; 10] = [
    "eval",
    "speed",
    "--size",
    "tiny",
    "--classes",
    "3",
    "--steps",
    "1",
    "--device",
    "cpu",
];

#[test]
fn speeds_are_told_by_mixer_and_size() {
    let folder = tempfile::tempdir().unwrap();
    let plot = folder.path().join("speed.svg");
    let own = [
        "--mixer",
        "lightnet,tnl",
        "--sides",
        "32,64",
        "--tokens",
        "8",
        "--plot",
    ];
    let found = run([&SMALL[..], &own, &[plot.to_str().unwrap(), "--json"]].concat()).json();
    assert_eq!(found["device"], "CPU");
    let models = found["models"].as_array().unwrap();
    let names: Vec<_> = models.iter().map(|model| &model["name"]).collect();
    assert_eq!(names, ["lightnet", "tnl"]);
    for model in models {
        let measures = model["measures"].as_array().unwrap();
        let shapes: Vec<_> = (measures.iter())
            .map(|m| ["side", "tokens", "batch"].map(|key| m[key].as_u64().unwrap()))
            .collect();
        assert_eq!(shapes, [[32, 4, 2], [64, 16, 1]]);
        for measure in measures {
            assert!(measure["train"]["images_per_s"].as_f64().unwrap() > 0.0);
            assert!(measure["answer"]["ms"]["median"].as_f64().unwrap() > 0.0);
        }
    }
    assert!(std::fs::read_to_string(plot).unwrap().contains("megapixels"));

    let one = [
        "--mixer",
        "tnl",
        "--form",
        "causal",
        "--sides",
        "32",
        "--tokens",
        "4",
        "--answers-only",
    ];
    let text = run([&SMALL[..], &one].concat()).stdout;
    assert!(
        text.contains("tnl causal") && text.contains("answers") && !text.contains("training"),
        "{text}"
    );
}

#[test]
fn what_cannot_be_measured_is_refused() {
    for (own, words) in [
        (
            ["--sides", "40"],
            "--sides: found 40, expected whole patches of 16",
        ),
        (["--sides", "0"], "--sides: found 0"),
        (["--sides", "16384000"], "--sides: found 16384000"),
        (
            ["--mixer", "mamba"],
            "--mixer: found \"mamba\", expected some of lightnet, hgrn2, tnl, softmax",
        ),
        (
            ["--form", "spiral"],
            "--form: found \"spiral\", expected one of causal",
        ),
        (["--form", "parallel"], "--mixer lightnet: "),
        (["--tokens", "0"], "--tokens: found 0"),
        (["--patch", "0"], "--patch: found 0"),
        (["--classes", "1000000"], "--classes: found 1000000"),
        (["--classes", "1"], "--mixer lightnet: "),
        (["--steps", "0"], "--steps"),
        (["--plot", "nowhere/speed.svg"], "nowhere"),
    ] {
        let arguments = [&["eval", "speed", "--size", "tiny", "--device", "cpu"][..], &own].concat();
        let ran = run(arguments);
        let line = ran.error();
        assert!(line.contains(words), "{own:?}: {line}");
    }
}
