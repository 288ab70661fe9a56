//! `fulgur lm eval`: figures that are known beforehand, and what it answers to bad input.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use fulgur::kernels::embedding::Ids;
use fulgur::lightnet::lm::{Architecture, LanguageModel};
use serde_json::{Value, json};

use crate::lm::model;
use crate::support::{Ran, fulgur, names, run};

fn judge(what: &str, model: &Path, more: &[&str]) -> Ran {
    let mut command = fulgur();
    command.args(["lm", "eval", what, "-q", "--device", "cpu", "--model"]);
    Ran::of(command.arg(model).args(more).output().unwrap())
}

/// `-log p` of all bytes but the first, from the logits of the whole.
fn losses(model: &LanguageModel, text: &[u8]) -> Vec<f64> {
    let ids: Vec<u32> = text.iter().map(|&byte| byte.into()).collect();
    let logits = model
        .logits(&Ids::new(&ids, &[1, ids.len()], 256).unwrap())
        .unwrap();
    let rows: Vec<Vec<f32>> = logits.squeeze(0).unwrap().to_vec2().unwrap();
    let loss = |(row, &target): (&Vec<f32>, &u32)| {
        let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
        sum.ln() - f64::from(row[target as usize])
    };
    rows.iter().zip(&ids[1..]).map(loss).collect()
}

fn close(found: &Value, wanted: f64) {
    let found = found.as_f64().unwrap();
    assert!(
        (found - wanted).abs() < 1e-4 * wanted.abs(),
        "{found}, expected {wanted}"
    );
}

#[test]
fn perplexity_is_that_of_the_whole_text_or_of_its_windows() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let dir = model(&root.join("model"), Architecture::Lightnet, |_| ());
    let loaded = LanguageModel::load(&dir, None, DType::F32, &Device::Cpu).unwrap();
    let text = "A bell rings as the rain falls \u{2014} far away.\n".repeat(4);
    let path = root.join("text.txt");
    fs::write(&path, &text).unwrap();
    let path = path.to_str().unwrap();
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let nats = mean(&losses(&loaded, text.as_bytes()));
    for chunk in ["4096", "9"] {
        let ran = judge("perplexity", &dir, &[path, "--chunk", chunk, "--json"]);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
        let found = ran.json();
        let bytes = text.len() - 1;
        assert_eq!(
            (&found["tokens"], &found["bytes"]),
            (&json!(bytes), &json!(bytes))
        );
        assert_eq!(
            (&found["documents"], &found["finished"]),
            (&json!(1), &json!(true))
        );
        close(&found["nats_per_token"], nats);
        close(&found["perplexity"], nats.exp());
        close(&found["bits_per_byte"], nats / 2f64.ln());
        assert_eq!(found["nats_per_token_stderr"], Value::Null);
    }
    let mut windows = Vec::new();
    for from in (0..text.len() - 1).step_by(16) {
        let to = (from + 16).min(text.len() - 1);
        windows.extend(losses(&loaded, &text.as_bytes()[from..=to]));
    }
    let found = judge("perplexity", &dir, &[path, "--context", "16", "--json"]).json();
    close(&found["nats_per_token"], mean(&windows));
    let text = judge("perplexity", &dir, &[path]).stdout;
    assert!(text.contains(&format!("nats a token  {nats:.4}")), "{text}");
}

/// One question of each format, all with the same two sides: what the model finds likelier is known.
const QUESTIONS: [(&str, &str); 8] = [
    (
        "boolq",
        r#"{"passage": "p", "question": "q", "answer": false, "title": "t"}"#,
    ),
    (
        "piqa",
        r#"{"goal": "g", "sol1": "one", "sol2": "two", "label": 1}"#,
    ),
    (
        "siqa",
        r#"{"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "2"}"#,
    ),
    (
        "hellaswag",
        r#"{"ind": 1, "activity_label": "l", "ctx_a": "a", "ctx_b": "b", "ctx": "a b", "endings": ["x", "yy", "z", "w"],
        "source_id": "s", "split": "val", "split_type": "z", "label": "0"}"#,
    ),
    (
        "winogrande",
        r#"{"sentence": "a _ b", "option1": "x", "option2": "yy", "answer": "2"}"#,
    ),
    (
        "arc-easy",
        r#"{"id": "1", "question": "q", "choices": {"text": ["a", "bb", "c"], "label": ["A", "B", "C"]}, "answerKey": "C"}"#,
    ),
    (
        "arc-challenge",
        r#"{"id": "1", "question": "q", "choices": {"text": ["a", "bb"], "label": ["1", "2"]}, "answerKey": "1"}"#,
    ),
    (
        "openbookqa",
        r#"{"id": "1", "question_stem": "q", "choices": {"text": ["a", "bb"], "label": ["A", "B"]}, "answerKey": "B"}"#,
    ),
];

/// What each format asks: context and choice.
fn asked(format: &str) -> Vec<(&'static str, &'static str, usize)> {
    let same = |context, choices: &[&'static str]| {
        let choices = choices.iter();
        choices
            .map(|&choice| (context, choice, choice.len() - 1))
            .collect()
    };
    match format {
        "boolq" => same("p\nQuestion: q?\nAnswer:", &[" no", " yes"]),
        "piqa" => same("Question: g\nAnswer:", &[" one", " two"]),
        "siqa" => same("Q: c q\nA:", &[" a", " b", " c"]),
        "hellaswag" => same("l: a B", &[" x", " yy", " z", " w"]),
        "winogrande" => vec![("a x", " b", 1), ("a yy", " b", 1)],
        "arc-easy" => same("Question: q\nAnswer:", &[" a", " bb", " c"]),
        "arc-challenge" => same("Question: q\nAnswer:", &[" a", " bb"]),
        _ => same("q", &[" a", " bb"]),
    }
}

#[test]
fn choices_are_made_by_likelihood_in_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let rights = [0, 1, 1, 0, 1, 2, 0, 1];
    for architecture in [Architecture::Hgrn2, Architecture::Llama] {
        let dir = model(&root.join("model"), architecture, |_| ());
        let loaded = LanguageModel::load(&dir, None, DType::F32, &Device::Cpu).unwrap();
        let mut files = Vec::new();
        for (format, row) in QUESTIONS {
            let path = root.join(format!("{format}.jsonl"));
            fs::write(&path, row.replace('\n', " ")).unwrap();
            files.push(format!("{format}={}", path.display()));
        }
        let mut arguments: Vec<&str> = files.iter().map(String::as_str).collect();
        arguments.push("--json");
        let ran = judge("choice", &dir, &arguments);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
        let found = ran.json();
        let mut scores = Vec::new();
        for (at, (format, _)) in QUESTIONS.iter().enumerate() {
            let sums: Vec<(f64, f64)> = asked(format)
                .iter()
                .map(|(context, choice, bytes)| {
                    let losses = losses(&loaded, [*context, *choice].concat().as_bytes());
                    let sum = -losses[losses.len() - choice.len()..].iter().sum::<f64>();
                    (sum, sum / *bytes as f64)
                })
                .collect();
            let best = |of: &dyn Fn(&(f64, f64)) -> f64| {
                let all = sums.iter().map(of).enumerate();
                let best = all.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0;
                f64::from(u8::from(best == rights[at]))
            };
            let (acc, norm) = (best(&|sums| sums.0), best(&|sums| sums.1));
            let task = &found["tasks"][at];
            assert_eq!((&task["format"], &task["n"]), (&json!(format), &json!(1)));
            assert_eq!(
                (&task["acc"], &task["acc_norm"]),
                (&json!(acc), &json!(norm)),
                "{format}"
            );
            let normalised = ["hellaswag", "arc-challenge", "openbookqa"].contains(format);
            scores.push(if normalised { norm } else { acc });
        }
        close(
            &json!(found["mean"].as_f64().unwrap() + 1.0),
            1.0 + scores.iter().sum::<f64>() / 8.0,
        );
    }
}

#[test]
fn needles_give_a_grid_and_a_picture() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let dir = model(&root.join("model"), Architecture::Tnl, |_| ());
    let hay = root.join("hay.txt");
    fs::write(&hay, "The rain falls on the town. An owl hoots. ".repeat(20)).unwrap();
    let (hay, picture) = (hay.to_str().unwrap(), root.join("heat.svg"));
    let arguments = [
        "--haystack",
        hay,
        "--lengths",
        "300,600",
        "--depths",
        "3",
        "--samples",
        "4",
    ];
    let picture_name = picture.to_str().unwrap();
    let drawn = [&arguments[..], &["--picture", picture_name]].concat();
    for kind in ["easy", "standard"] {
        let arguments = [&arguments[..], &["--kind", kind, "--json"]].concat();
        let ran = judge("needle", &dir, &arguments);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
        let found = ran.json();
        let cells = found["cells"].as_array().unwrap();
        assert_eq!((cells.len(), &found["finished"]), (6, &json!(true)));
        assert_eq!(
            (&cells[4]["length"], &cells[4]["depth"]),
            (&json!(600), &json!(0.5))
        );
        assert!(cells.iter().all(|cell| cell["n"] == 4));
        close(&found["chance"], 0.1);
        assert!(found["likeliest"]["weighted"].is_number() && found["written"]["mean"].is_number());
        assert_eq!(judge("needle", &dir, &arguments).json(), found);
        let other = judge("needle", &dir, &[&arguments[..], &["--seed", "1"]].concat()).json();
        assert_ne!(other["cells"], found["cells"]);
    }
    let text = judge("needle", &dir, &drawn).stdout;
    assert!(
        text.contains("likeliest of 10") && text.contains("heat.svg"),
        "{text}"
    );
    let svg = fs::read_to_string(&picture).unwrap();
    assert!(svg.starts_with("<svg xmlns=") && svg.contains(">600</text>") && svg.contains("50 %"));
}

/// Trains by a recipe; the folder of the model.
fn trained(root: &Path, recipe: &str) -> PathBuf {
    let path = root.join("recipe.toml");
    let run_dir = root.join("run");
    fs::write(&path, format!("run_dir = {run_dir:?}\n{recipe}")).unwrap();
    let ran = run(["train", path.to_str().unwrap(), "-q", "--device", "cpu"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    run_dir.join("model")
}

/// What training says of a model is what is found of it afterwards.
#[test]
fn a_model_that_learnt_to_recall_does() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = "task = 'recall'\nseed = 1\n[train]\nmax_steps = 300\nema = 0.0\n[optimiser]\nlr = 1e-2\n[schedule]\nwarmup = 20\n\
                  [recall]\nbatch = 32\ncontext = 16\npairs = 2\nvocabulary = 16\nvalidation = 100\n[recall.model]\n\
                  architecture = 'eos'\nlayers = 2\nwidth = 32\nhidden = 32\nheads = 1\nhead_width = 16\nvariant = { conv_size = 3 }";
    let dir = trained(folder.path(), recipe);
    let ask = |more: &[&str]| judge("recall", &dir, &[&["--examples", "200", "--json"], more].concat());
    let found = ask(&["--context", "16", "--pairs", "2"]).json();
    let setting = &found["settings"][0];
    assert_eq!(
        (&setting["examples"], &setting["queries"], &found["vocabulary"]),
        (&json!(200), &json!(400), &json!(16))
    );
    let accuracy = setting["accuracy"].as_f64().unwrap();
    assert!(accuracy > 0.7, "{setting}");
    let stderr = setting["accuracy_stderr"].as_f64().unwrap();
    assert!((0.0..0.05).contains(&stderr), "{setting}");
    // Those that do not fit are left out of a grid.
    let grid = ask(&["--context", "8,32", "--pairs", "1,2,4"]).json();
    let shapes: Vec<_> = (grid["settings"].as_array().unwrap().iter())
        .map(|setting| {
            (
                setting["context"].as_u64().unwrap(),
                setting["pairs"].as_u64().unwrap(),
            )
        })
        .collect();
    assert_eq!(shapes, [(8, 1), (8, 2), (32, 1), (32, 2), (32, 4)]);
    for (more, words) in [
        (["--vocabulary", "17"], "vocabulary is 17, expected at most 16"),
        (
            ["--pairs", "9"],
            "vocabulary is 16, expected more than twice the pairs",
        ),
        (["--pairs", "50"], "pairs is 50, expected 1 to a quarter"),
        (["--power=NaN", "--pairs=2"], "power is NaN"),
    ] {
        let ran = ask(&more);
        assert!(ran.error().contains(words), "{}", ran.stderr);
    }
    let ran = judge("recall", &dir, &["--examples", "0"]);
    assert!(ran.error().contains("examples is 0"), "{}", ran.stderr);
}

/// A model that has read a text knows how it goes on: in choices, in its own words, and better than any other text.
#[test]
fn a_model_that_read_a_text_knows_it() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let at = |name: &str, text: &str| {
        let path = root.join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let line = "Question: who rings?\nAnswer: the bell.\nQuestion: who hoots?\nAnswer: an owl.\n";
    let text = at("text.txt", &line.repeat(60));
    let recipe = format!(
        "task = 'lm'\nseed = 3\n[train]\nmax_steps = 200\nema = 0.0\n[optimiser]\nlr = 3e-3\n[schedule]\nwarmup = 10\n[lm]\n\
         tokens = {text:?}\nheld_out = 0.05\nbatch = 4\ncontext = 64\n[lm.model]\narchitecture = 'hgrn2'\nlayers = 2\nwidth = 64\nhidden = 96\nheads = 2\n"
    );
    let dir = trained(root, &recipe);
    let seen = judge("perplexity", &dir, &[&text, "--json"]).json();
    let other = at("other.txt", "Nothing of the kind was ever written here before.");
    let unseen = judge("perplexity", &dir, &[&other, "--json"]).json();
    assert!(seen["bits_per_byte"].as_f64().unwrap() < 0.5, "{seen}");
    assert!(unseen["bits_per_byte"].as_f64().unwrap() > 3.0, "{unseen}");
    let questions = at(
        "piqa.jsonl",
        "{\"goal\": \"who rings?\", \"sol1\": \"an owl.\", \"sol2\": \"the bell.\", \"label\": 1}\n\
         {\"goal\": \"who hoots?\", \"sol1\": \"an owl.\", \"sol2\": \"the bell.\", \"label\": 0}\n",
    );
    let found = judge("choice", &dir, &["--format", "piqa", &questions, "--json"]).json();
    assert_eq!(
        (&found["tasks"][0]["acc"], &found["tasks"][0]["n"]),
        (&json!(1.0), &json!(2))
    );
    let inputs = at(
        "inputs.jsonl",
        "{\"input\": \"Question: who rings?\\nAnswer:\", \"outputs\": [\"A bell\", \"no one\"]}\n\
         {\"input\": \"Question: who hoots?\\nAnswer:\", \"output\": \"two owls\"}\n",
    );
    let written = root.join("answers.jsonl");
    let arguments = ["--stop", "\n", "--write", written.to_str().unwrap(), "--json"];
    let found = judge("answers", &dir, &[&[inputs.as_str()][..], &arguments].concat()).json();
    assert_eq!((&found["exact_match"], &found["f1"]), (&json!(0.5), &json!(0.5)));
    assert_eq!((&found["n"], &found["finished"]), (&json!(2), &json!(true)));
    let lines = fs::read_to_string(&written).unwrap();
    let answers: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        (&answers[0]["answer"], &answers[1]["answer"]),
        (&json!("the bell."), &json!("an owl."))
    );
}

#[test]
fn what_cannot_be_judged_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let at = |name: &str, bytes: &[u8]| {
        let path = root.join(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let dir = model(&root.join("model"), Architecture::Tnl, |_| ());
    let wide = model(&root.join("wide"), Architecture::Tnl, |config| {
        config.vocab_size = 300;
    });
    let both = model(&root.join("both"), Architecture::Lightnet, |config| {
        config.bidirectional = true;
    });
    let other = model(&root.join("other"), Architecture::Tnl, |config| {
        config.vocab_size = 5000;
    });
    let text = at("text.txt", "The rain falls on the town. ".repeat(20).as_bytes());
    let tokenizer = root.join("other/tokenizer.json");
    let ran = run([
        "lm",
        "tokenizer",
        "train",
        &text,
        "-q",
        "-o",
        tokenizer.to_str().unwrap(),
    ]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let broken = at("broken.txt", b"The rain \xff falls");
    let far = at("far.u16", b"\x05\x00\x00\x01");
    let columns = at("columns.jsonl", b"{\"text\": \"x\", \"url\": 1}\n");
    let piqa = at(
        "piqa.jsonl",
        b"{\"goal\": \"g\", \"sol1\": \"a\", \"sol2\": \"b\", \"label\": 0, \"url\": 1}\n",
    );
    let halves = at(
        "halves.jsonl",
        b"{\"goal\": \"g\", \"sol1\": \"a\", \"sol2\": \"\xff\", \"label\": 0}\n",
    );
    let empty = at("empty.jsonl", b"\n");
    let prompt = at(
        "prompt.jsonl",
        b"{\"question_stem\": \"\", \"choices\": {\"text\": [\"a\", \"b\"], \"label\": [\"A\", \"B\"]}, \"answerKey\": \"A\"}",
    );
    let input = at("input.jsonl", b"{\"input\": \"\", \"output\": \"x\"}");
    let before = names(root);
    let nowhere = root.join("none/heat.svg");
    let nowhere = nowhere.to_str().unwrap();
    let none = root.join("none");
    let none = none.to_str().unwrap();
    let cases: [(&str, &Path, &[&str], &str); 28] = [
        (
            "perplexity",
            &dir,
            &[&broken],
            "broken.txt: found no UTF-8 at byte 9",
        ),
        (
            "perplexity",
            &dir,
            &[&far],
            "far.u16: token 1 is 256, expected less than 256",
        ),
        (
            "perplexity",
            &dir,
            &[&columns],
            "columns.jsonl: line 1: found unknown field `url`",
        ),
        (
            "perplexity",
            &dir,
            &[&empty],
            "empty.jsonl: found no token to foretell",
        ),
        ("perplexity", &dir, &[none], "none: No such file"),
        ("perplexity", &dir, &[&text, "--context", "0"], "context is 0"),
        ("perplexity", &dir, &[&text, "--chunk", "0"], "chunk is 0"),
        (
            "perplexity",
            &dir,
            &[&text, "--before", "256"],
            "--before is 256, expected less than 256",
        ),
        (
            "perplexity",
            &wide,
            &[&text],
            "found no tokenizer.json and a vocabulary of 300",
        ),
        ("perplexity", &both, &[&text], "a model in both directions"),
        (
            "perplexity",
            &other,
            &[&text],
            "tokens, expected those of the model's vocabulary, 5000",
        ),
        ("perplexity", &dir, &[], "<FILE>"),
        (
            "choice",
            &dir,
            &["--format", "piqa", &piqa],
            "piqa.jsonl: line 1: found unknown field `url`",
        ),
        (
            "choice",
            &dir,
            &["--format", "boolq", &piqa],
            "expected BoolQ's columns",
        ),
        (
            "choice",
            &dir,
            &["--format", "piqa", &halves],
            "halves.jsonl: line 1: found no UTF-8",
        ),
        (
            "choice",
            &dir,
            &["--format", "openbookqa", &prompt],
            "prompt.jsonl: line 1: found an empty prompt",
        ),
        (
            "choice",
            &dir,
            &["--format", "piqa", &empty],
            "empty.jsonl: found no question",
        ),
        ("choice", &dir, &["--format", "piqa", none], "none: No such file"),
        ("choice", &dir, &[&piqa], "piqa.jsonl: found no format"),
        ("choice", &dir, &["--format", "weave", &piqa], "weave"),
        (
            "choice",
            &dir,
            &["--format", "piqa", &piqa, "--limit", "0"],
            "limit is 0",
        ),
        (
            "choice",
            &wide,
            &["--format", "piqa", &piqa],
            "found no tokenizer.json",
        ),
        (
            "needle",
            &dir,
            &["--haystack", &text],
            "text.txt: the haystack has 560 tokens, expected 2048",
        ),
        (
            "needle",
            &dir,
            &["--haystack", &text, "--lengths", "40"],
            "length is 40, expected more than",
        ),
        (
            "needle",
            &dir,
            &["--haystack", &broken],
            "broken.txt: byte 9 is no UTF-8",
        ),
        (
            "needle",
            &dir,
            &["--haystack", &text, "--picture", nowhere],
            "there is no folder",
        ),
        (
            "answers",
            &dir,
            &[&input],
            "input.jsonl: line 1: found an empty input",
        ),
        (
            "answers",
            &dir,
            &[&input, "--write", nowhere],
            "there is no folder",
        ),
    ];
    for (what, model, arguments, words) in cases {
        let ran = judge(what, model, arguments);
        assert!(
            ran.error().contains(words),
            "{what} {arguments:?}: {}",
            ran.stderr
        );
        assert_eq!(names(root), before);
    }
}
