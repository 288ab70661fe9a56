//! `fulgur eval tav`: figures of a generator on tiny random models, and what it answers to bad input.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Device;
use fulgur::benchmark::encoder::BuiltinEncoder;
use fulgur::benchmark::judge::Judges;
use fulgur::datasets::media::read_picture;
use fulgur::eval::{EvalError, Jury, Options, Parts, Stage, Training, clip_spec, evaluate, open_clips};
use fulgur::tavdiffusion::pipeline::{Generator, Mode, Request};
use serde_json::Value;

use crate::support::{Ran, names, run};
use crate::tiny;

const THINGS: usize = 5;

/// Folders of everything that an evaluation needs.
struct Setup {
    root: tempfile::TempDir,
    model: PathBuf,
    judges: PathBuf,
    encoder: PathBuf,
    data: PathBuf,
}

impl Setup {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let path = root.path();
        Self {
            model: tiny::generator(path),
            judges: tiny::judges(path, THINGS),
            encoder: tiny::encoder(path),
            data: tiny::data(path, THINGS),
            root,
        }
    }

    fn eval(&self, more: &[&str]) -> Ran {
        let folders = [
            ("--model", &self.model),
            ("--judges", &self.judges),
            ("--encoder", &self.encoder),
            ("--data", &self.data),
        ];
        let fixed = ["eval", "tav", "--json", "--device", "cpu"].map(OsString::from);
        let folders = folders
            .into_iter()
            .flat_map(|(flag, path)| [OsString::from(flag), path.clone().into_os_string()]);
        run(fixed
            .into_iter()
            .chain(folders)
            .chain(more.iter().map(OsString::from)))
    }
}

/// The keys of an object, in order.
fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn figures_sheets_and_neighbours_of_a_generator() {
    let setup = Setup::new();
    tiny::mel_codec(&setup.model, true);
    let out = setup.root.path().join("out");
    fs::create_dir(&out).unwrap();
    let (sheet, near) = (out.join("sheet.png"), out.join("near.png"));
    let arguments = [
        "--prompts",
        "5",
        "--batch",
        "2",
        "--steps",
        "1",
        "--guidance-video",
        "2.5",
        "--decoded",
        "--sheet",
        sheet.to_str().unwrap(),
        "--neighbours",
        near.to_str().unwrap(),
        "--training-clips",
        "70",
    ];
    let ran = setup.eval(&arguments);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let report = ran.json();
    assert_eq!((&report["n"], &report["steps"]), (&5.into(), &1.into()));
    assert_eq!(
        (&report["model"], &report["encoder"]),
        (&"tiny".into(), &"builtin".into())
    );
    assert_eq!(
        (&report["guidance_video"], &report["guidance_audio"]),
        (&2.5.into(), &5.0.into())
    );
    for clips in ["generated", "real", "decoded"] {
        let figures = &report[clips];
        assert_eq!(
            keys(figures),
            [
                "picture",
                "picture_top5",
                "sound",
                "motion",
                "onset_error_ms_median",
                "onset_missing",
                "contact_missing",
                "onset_in_time",
                "contact_in_time",
                "avhscore"
            ]
        );
        // Five things: the right one is always among five.
        assert_eq!(figures["picture_top5"], 1.0, "{clips}");
        for share in ["picture", "sound", "motion", "onset_missing", "contact_missing"] {
            let value = figures[share].as_f64().unwrap();
            assert!((0.0..=1.0).contains(&value), "{clips}.{share}: {value}");
        }
        assert!(
            (-1.0..=1.0).contains(&figures["avhscore"].as_f64().unwrap()),
            "{clips}"
        );
    }
    // The onset of real sounds is always heard, and in the part of the clip that the caption names.
    assert_eq!(report["real"]["onset_missing"], 0.0);
    assert_eq!(report["real"]["onset_in_time"], 1.0);
    assert!(report["shuffled"]["avhscore"].is_f64());
    let ratio = report["avhscore_ratio"].as_f64();
    let (made, real) = (&report["generated"]["avhscore"], &report["real"]["avhscore"]);
    let expected =
        Some(made.as_f64().unwrap() / real.as_f64().unwrap()).filter(|_| real.as_f64() > Some(0.0));
    assert_eq!(ratio.is_some(), expected.is_some());
    assert!((ratio.unwrap_or(0.0) - expected.unwrap_or(0.0)).abs() < 1e-9);
    let distances = &report["neighbours"];
    assert_eq!(distances["training_clips"], 70);
    for of in ["generated", "real"] {
        let [median, least] =
            ["median", "least"].map(|name| distances[format!("{of}_{name}")].as_f64().unwrap());
        assert!(0.0 < least && least <= median && median < 1.0, "{distances}");
    }
    assert!(report["seconds"].as_f64() >= report["generate_seconds"].as_f64());
    assert_eq!(names(&out), ["near.png", "sheet.png"]);
    for (path, field) in [(&sheet, "sheet"), (&near, "neighbour_sheet")] {
        assert_eq!(report[field], path.to_str().unwrap());
        assert!(read_picture(path).unwrap().width > 500);
    }

    // The same seed gives the same figures, whatever the number of threads; people get a table.
    let mut again = crate::support::fulgur();
    again.args([
        "eval",
        "tav",
        "--device",
        "cpu",
        "--prompts",
        "5",
        "--batch",
        "2",
        "--steps",
        "1",
    ]);
    again
        .args(["--guidance-video", "2.5", "--json", "-q"])
        .env("RAYON_NUM_THREADS", "1");
    for (flag, path) in [
        ("--model", &setup.model),
        ("--judges", &setup.judges),
        ("--encoder", &setup.encoder),
        ("--data", &setup.data),
    ] {
        again.arg(flag).arg(path);
    }
    let repeated = Ran::of(again.output().unwrap()).json();
    for part in [
        "generated",
        "real",
        "shuffled",
        "avhscore_ratio",
        "shuffled_ratio",
    ] {
        assert_eq!(repeated[part], report[part], "{part}");
    }
    assert!(repeated["decoded"].is_null() && repeated["neighbours"].is_null() && repeated["sheet"].is_null());
}

#[test]
fn a_model_without_encoders_skips_the_codecs_and_people_get_a_table() {
    let setup = Setup::new();
    let arguments = [
        "--prompts",
        "2",
        "--steps",
        "1",
        "--decoded",
        "--wording",
        "canonical",
        "--seed",
        "18446744073709551615",
    ];
    let ran = setup.eval(&arguments);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let note = "decoded: skipped, for the model folder has no encoders";
    assert!(ran.stderr.contains(note), "{}", ran.stderr);
    let report = ran.json();
    assert!(report["decoded"].is_null());
    assert_eq!(report["wording"], "canonical");
    assert!(report["shuffled"]["avhscore"].is_f64());

    let mut command = crate::support::fulgur();
    command
        .args(["eval", "tav", "-q", "--prompts", "1", "--steps", "1", "--data"])
        .arg(&setup.data);
    command
        .arg("--model")
        .arg(&setup.model)
        .arg("--judges")
        .arg(&setup.judges);
    command.arg("--encoder").arg(&setup.encoder);
    let ran = Ran::of(command.output().unwrap());
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    // One clip has no other one to be shuffled with.
    for words in [
        "tiny: 1 held-out prompts",
        "generated",
        "picture named",
        "AVHScore",
        "shuffled pairs -",
    ] {
        assert!(ran.stdout.contains(words), "{words}: {}", ran.stdout);
    }
}

#[test]
fn bad_input_is_one_line_and_leaves_nothing() {
    let setup = Setup::new();
    let root = setup.root.path();
    let none = root.join("none");
    let none = none.to_str().unwrap();
    let few = tiny::judges(root, THINGS - 1);
    let sheet = root.join("none/sheet.png");
    let cases: [(&[&str], &str); 10] = [
        (&["--judges", none], "none/config.json"),
        (&["--model", none], "none/model_index.json"),
        (&["--encoder", none], "none/config.json"),
        (&["--data", none], "run `fulgur data fetch stamps`"),
        (
            &["--judges", few.to_str().unwrap()],
            "judges-4/config.json: things: found no `thing_004` among 4 names",
        ),
        (
            &["--judges", setup.encoder.to_str().unwrap()],
            "encoder/config.json",
        ),
        (&["--prompts", "0"], "--prompts"),
        (&["--steps", "0"], "steps: found 0, expected 1 to 1000"),
        (&["--guidance-audio", "1e9"], "guidance-audio: found 1000000000"),
        (&["--sheet", sheet.to_str().unwrap()], "there is no folder"),
    ];
    for (arguments, words) in cases {
        // An option given twice is a usage error, so the wrong folder takes the right one's place.
        let ran = match arguments {
            ["--judges", dir] => with(&setup, |s| s.judges = dir.into()),
            ["--model", dir] => with(&setup, |s| s.model = dir.into()),
            ["--encoder", dir] => with(&setup, |s| s.encoder = dir.into()),
            ["--data", dir] => with(&setup, |s| s.data = dir.into()),
            others => setup.eval(others),
        };
        assert!(ran.error().contains(words), "{words}: {}", ran.stderr);
    }

    // Backgrounds belong to the prompts' real clips as to training.
    fs::remove_dir_all(setup.data.join("backgrounds")).unwrap();
    let ran = setup.eval(&["--prompts", "1"]);
    assert!(
        ran.error().contains("run `fulgur data fetch backgrounds`"),
        "{}",
        ran.stderr
    );

    // A generator of another rate cannot be judged.
    let index = setup.model.join("model_index.json");
    let text = fs::read_to_string(&index).unwrap().replace("16000", "22050");
    fs::write(&index, text).unwrap();
    let other = Setup {
        data: tiny::data(root, THINGS),
        ..setup
    };
    let ran = other.eval(&["--prompts", "1"]);
    let words = "sample_rate of the model: found 22050, expected 16000";
    assert!(ran.error().contains(words), "{}", ran.stderr);
}

/// Runs with one folder changed.
fn with(setup: &Setup, change: impl FnOnce(&mut Setup)) -> Ran {
    let mut changed = Setup {
        root: tempfile::tempdir().unwrap(),
        model: setup.model.clone(),
        judges: setup.judges.clone(),
        encoder: setup.encoder.clone(),
        data: setup.data.clone(),
    };
    change(&mut changed);
    changed.eval(&["--prompts", "1"])
}

#[test]
fn without_builtin_judges_the_option_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = crate::support::fulgur();
    command.args(["eval", "tav"]).env("FULGUR_MODELS", folder.path());
    let ran = Ran::of(command.output().unwrap());
    assert!(ran.error().contains("no builtin judges here"), "{}", ran.stderr);
    assert!(ran.error().ends_with("--judges"), "{}", ran.stderr);
    assert!(run(["eval"]).error().contains("requires a subcommand"));
}

#[test]
fn a_clip_is_the_same_alone_and_in_a_batch() {
    let folder = tempfile::tempdir().unwrap();
    let generator = Generator::load(&tiny::generator(folder.path()), &Device::Cpu).unwrap();
    let request = |prompt: &str, seed| Request {
        seed,
        ..Request::new(prompt, generator.index())
    };
    let requests = [
        request("a bell rings", 3),
        request("a dog barks as it drops in from the left", 4),
    ];
    let all = generator
        .generate_batch(&requests, &mut |_| true)
        .unwrap()
        .unwrap();
    assert_eq!(all.len(), 2);
    assert!(all[0].frames != all[1].frames && all[0].samples != all[1].samples);
    for (request, batched) in requests.iter().zip(&all) {
        let alone = generator.generate(request, &mut |_| true).unwrap().unwrap();
        assert_eq!((alone.frame_count, alone.samples.len()), (12, 16_000));
        let frames = alone.frames.iter().zip(&batched.frames);
        assert!(frames.map(|(a, b)| a.abs_diff(*b)).max() <= Some(1));
        let samples = alone.samples.iter().zip(&batched.samples);
        let apart = samples.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-3, "{apart}");
    }
    let odd = Request {
        mode: Mode::VideoOnly,
        ..requests[1].clone()
    };
    let refused = generator.generate_batch(&[requests[0].clone(), odd], &mut |_| true);
    let words = refused.map(|_| ()).unwrap_err().to_string();
    assert!(
        words.starts_with("batch: found requests of different settings"),
        "{words}"
    );
    assert_eq!(
        generator.generate_batch(&[], &mut |_| true).unwrap(),
        Some(Vec::new())
    );
    assert_eq!(generator.generate_batch(&requests, &mut |_| false).unwrap(), None);
}

/// Judges the tiny generator; `stop` says at which progress the user stops.
fn evaluate_until(
    setup: &Setup,
    stop: impl Fn(Stage, u64) -> bool,
) -> Result<fulgur::eval::Evaluation, EvalError> {
    let device = Device::Cpu;
    let judges = Judges::load(&setup.judges, &device).unwrap();
    let clips = open_clips(&setup.data, 0, clip_spec(judges.config())).unwrap();
    let jury = Jury::new(judges, clips.composer().things()).unwrap();
    let encoder = BuiltinEncoder::load(&setup.encoder, &device).unwrap();
    let parts = Parts {
        generator: &Generator::load(&setup.model, &device).unwrap(),
        jury: &jury,
        encoder: &encoder,
        clips: &clips,
        device: &device,
    };
    let options = Options {
        prompts: 6,
        seed: 0,
        batch: 2,
        canonical: false,
        steps: Some(2),
        guidance_video: None,
        guidance_audio: None,
        decoded: false,
        sheet: false,
        training: Some(Training {
            clips: &clips,
            count: 100,
        }),
    };
    let cancel = AtomicBool::new(false);
    evaluate(&parts, &options, &cancel, &mut |progress| {
        if stop(progress.stage, progress.done) {
            cancel.store(true, Ordering::Relaxed);
        }
    })
}

#[test]
fn what_was_finished_before_a_stop_is_told() {
    let setup = Setup::new();
    // Two clips of two steps make four; the fifth step is in the second batch.
    let stopped = evaluate_until(&setup, |stage, done| stage == Stage::Clips && done > 4).unwrap();
    assert_eq!((stopped.n, stopped.complete), (2, false));
    assert!(stopped.neighbours.is_none());
    let early = evaluate_until(&setup, |_, _| true).map(|_| ()).unwrap_err();
    assert!(matches!(early, EvalError::Stopped), "{early}");
    let late = evaluate_until(&setup, |stage, _| stage == Stage::Neighbours).unwrap();
    assert_eq!((late.n, late.complete), (6, false));
    assert_eq!(late.neighbours.map(|near| near.training_clips), Some(64));
    let whole = evaluate_until(&setup, |_, _| false).unwrap();
    assert_eq!((whole.n, whole.complete), (6, true));
}
