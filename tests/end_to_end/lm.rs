//! `fulgur lm`: text from a model, states in files, tokenizers, and what they answer to bad input.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use candle_core::{DType, Device};
use fulgur::lightnet::lm::{Architecture, Config, LanguageModel};
use fulgur::lightnet::params::{Params, Precision};
use serde_json::json;

use crate::support::{Ran, fulgur, names, run};

/// A folder with a model of random weights, whose logits differ enough to write something.
pub(crate) fn model(dir: &Path, architecture: Architecture, change: impl FnOnce(&mut Config)) -> PathBuf {
    fs::create_dir_all(dir).unwrap();
    let mut config = Config {
        hidden_size: 24,
        intermediate_size: 32,
        num_attention_heads: 2,
        num_hidden_layers: 2,
        vocab_size: 256,
        initializer_range: 0.4,
        ..Config::of(architecture)
    };
    change(&mut config);
    let params = Params::random(3, &Device::Cpu);
    LanguageModel::new(&config, DType::F32, &params.builder()).unwrap();
    fs::write(dir.join("config.json"), serde_json::to_string(&config).unwrap()).unwrap();
    params
        .save(&dir.join("model.safetensors"), &BTreeMap::new(), Precision::F32)
        .unwrap();
    dir.to_owned()
}

fn generate(model: &Path, more: &[&str]) -> Ran {
    let mut command = fulgur();
    command.args(["lm", "generate", "-q", "--device", "cpu", "--model"]);
    Ran::of(command.arg(model).args(more).output().unwrap())
}

#[test]
fn one_text_whether_streamed_counted_saved_or_beside_others() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let dir = model(&root.join("model"), Architecture::Hgrn2, |_| ());
    let at = |name: &str| root.join(name).to_str().unwrap().to_owned();
    let settings = ["--seed", "7", "--top-p", "0.9", "--repetition-penalty", "1.1"];
    let with = |more: &[&str]| generate(&dir, &[&settings, more].concat());
    let prompt = ["--prompt", "a bell rings", "--max-tokens", "30"];

    let ran = with(&[&prompt[..], &["--json"]].concat());
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let one = ran.json();
    assert_eq!((&one["prompt_tokens"], &one["tokens"]), (&json!(12), &json!(42)));
    assert_eq!(one["samples"][0]["stop"], "length");
    assert_eq!(one["samples"][0]["ids"].as_array().unwrap().len(), 30);
    assert!(one["tokens_per_s"].as_f64().unwrap() > 0.0);
    let text = one["samples"][0]["text"].as_str().unwrap();

    assert_eq!(with(&prompt).stdout, format!("{text}\n"));
    let several = with(&[&prompt[..], &["--json", "--samples", "18"]].concat()).json();
    assert_eq!(several["samples"][0], one["samples"][0]);
    assert_ne!(several["samples"][1], one["samples"][0]);
    // From a file and from standard input, read once and gone on from.
    fs::write(at("prompt.txt"), "a bell rings").unwrap();
    let file = at("prompt.txt");
    let read = with(&[
        "--prompt-file",
        &file,
        "--max-tokens",
        "0",
        "--save-state",
        &at("state"),
        "--json",
    ]);
    assert_eq!(read.json()["tokens"], 12);
    let go_on = |count: &str, more: &[&str]| {
        let state = at("state");
        with(&[&["--state", &state, "-n", count, "--json"], more].concat()).json()
    };
    let resumed = go_on("30", &[]);
    assert_eq!(
        (&resumed["tokens_before"], &resumed["prompt_tokens"]),
        (&json!(12), &json!(0))
    );
    assert_eq!(resumed["samples"], one["samples"]);
    let early = go_on("10", &["--save-state", &at("state")]);
    let late = go_on("20", &[]);
    let ids = |value: &serde_json::Value| value["samples"][0]["ids"].as_array().unwrap().clone();
    assert_eq!([ids(&early), ids(&late)].concat(), ids(&one));
    let mut command = fulgur();
    command.args([
        "lm",
        "generate",
        "-q",
        "--prompt-file",
        "-",
        "-n",
        "30",
        "--model",
    ]);
    command.arg(&dir).args(settings);
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut piped = piped.unwrap();
    piped.stdin.take().unwrap().write_all(b"a bell rings").unwrap();
    let piped = Ran::of(piped.wait_with_output().unwrap());
    assert_eq!(piped.stdout, format!("{text}\n"));
    // Ids in the place of text.
    let prompt_ids: Vec<String> = b"a bell rings".iter().map(u8::to_string).collect();
    let by_ids = with(&["--prompt-ids", &prompt_ids.join(","), "-n", "30", "--json"]).json();
    assert_eq!(by_ids["samples"], one["samples"]);
    // A stop string from the midst, which need not be valid in any other way.
    let stop: String = text.chars().skip(4).take(2).collect();
    let stopped = with(&[&prompt[..], &["--stop", &stop, "--json"]].concat()).json();
    let (before, _) = text.split_once(&stop).unwrap();
    assert_eq!(stopped["samples"][0]["stop"], "string");
    assert_eq!(stopped["samples"][0]["text"], before);
}

/// In groups of 16 or all at once: the order is that of the prompts.
#[test]
fn many_prompts_are_gone_on_with_in_their_order() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let lines: Vec<String> = (0..40)
        .map(|at| format!("{at} {}", "bell ".repeat(1 + at * 7 % 5)))
        .collect();
    let file = root.join("prompts.txt");
    fs::write(&file, lines.join("\n")).unwrap();
    let file = file.to_str().unwrap();
    for architecture in [Architecture::Hgrn2, Architecture::Llama] {
        let dir = model(&root.join(architecture.name()), architecture, |_| ());
        let write = |more: &[&str]| {
            let ran = generate(
                &dir,
                &[&["-n", "6", "--temperature", "0", "--json"], more].concat(),
            );
            assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
            ran.json()
        };
        let groups = write(&["--prompts", file]);
        assert_eq!(groups["together"], json!(16));
        let bytes: usize = lines.iter().map(String::len).sum();
        assert_eq!(
            (&groups["prompt_tokens"], &groups["tokens"]),
            (&json!(bytes), &json!(bytes))
        );
        for at in [0, 17, 39] {
            let alone = write(&["--prompt", &lines[at]]);
            assert_eq!(
                groups["samples"][at], alone["samples"][0],
                "{architecture:?} {at}"
            );
        }
        let all = write(&["--prompts", file, "--together", "4096"]);
        assert_eq!(
            (&all["together"], &all["samples"]),
            (&json!(40), &groups["samples"])
        );
    }
    let dir = root.join("hgrn2");
    let ran = generate(&dir, &["--prompts", file, "--together", "0"]);
    assert!(
        ran.error().contains("together is 0, expected 1 to 4096"),
        "{}",
        ran.stderr
    );
}

#[test]
fn a_trained_tokenizer_goes_from_text_to_tokens_and_back() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let at = |name: &str| root.join(name).to_str().unwrap().to_owned();
    let text = "A bell rings as the rain falls \u{2014} na\u{ef}vely.\nBells ring, \u{1f514}.\n".repeat(30);
    fs::write(at("one.txt"), &text).unwrap();
    fs::write(at("two.txt"), "<|endoftext|> is spelt out here.").unwrap();
    let (one, two, out, tokens) = (at("one.txt"), at("two.txt"), at("tokenizer.json"), at("both.u16"));
    let train = || {
        let ran = run([
            "lm",
            "tokenizer",
            "train",
            &one,
            &two,
            "--vocab",
            "290",
            "-o",
            &out,
            "--tokens",
            &tokens,
            "--json",
            "-q",
        ]);
        (ran.json(), fs::read(&out).unwrap(), fs::read(&tokens).unwrap())
    };
    let (report, json, ids) = train();
    assert_eq!(report["vocabulary"], 290);
    assert_eq!(report["tokens"], ids.len() / 2);
    assert_eq!(train(), (report, json, ids.clone()));
    let encoded = at("again.u16");
    let encode = |files: &[&str]| {
        let mut words = vec![
            "lm",
            "tokenizer",
            "encode",
            "-q",
            "--tokenizer",
            &out,
            "--tokens",
            &encoded,
        ];
        words.extend(files);
        let ran = run(words);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        fs::read(&encoded).unwrap()
    };
    assert_eq!(encode(&[&one, &two]), ids);
    // Documents of one file are what files of their own are.
    let lines =
        [&one, &two].map(|file| format!("{}\n", json!({ "text": fs::read_to_string(file).unwrap() })));
    fs::write(at("both.jsonl"), lines.concat()).unwrap();
    assert_eq!(encode(&[&at("both.jsonl")]), ids);
    assert_eq!(ids.chunks(2).filter(|id| id == b"\0\0").count(), 2);
    let ran = run([
        "lm",
        "tokenizer",
        "decode",
        &tokens,
        "--tokenizer",
        &out,
        "--json",
    ]);
    assert_eq!(
        ran.json()["text"],
        format!("{text}<|endoftext|> is spelt out here.")
    );
    // The folder of a model with it.
    let dir = model(&root.join("model"), Architecture::Tnl, |config| {
        config.vocab_size = 320;
    });
    fs::copy(&out, dir.join("tokenizer.json")).unwrap();
    let ran = generate(&dir, &["--prompt", "A bell rings", "-n", "200", "--json"]);
    let sample = &ran.json()["samples"][0];
    let ids = sample["ids"].as_array().unwrap();
    // Rows beyond the tokens are never drawn.
    assert!(ids.iter().all(|id| id.as_u64().unwrap() < 290), "{sample}");
    let ended = ids.last() == Some(&json!(0));
    assert_eq!(sample["stop"] == "end", ended);
}

#[test]
fn what_cannot_be_gone_on_with_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let at = |name: &str| root.join(name).to_str().unwrap().to_owned();
    let dir = model(&root.join("model"), Architecture::Tnl, |_| ());
    let other = model(&root.join("other"), Architecture::Llama, |config| {
        config.vocab_size = 300;
    });
    let both = model(&root.join("both"), Architecture::Lightnet, |config| {
        config.bidirectional = true;
    });
    fs::write(at("broken.txt"), b"a bell \xff rings").unwrap();
    fs::write(at("empty.txt"), b"").unwrap();
    fs::write(at("broken.json"), "{").unwrap();
    let far = model(&root.join("far"), Architecture::Tnl, |_| ());
    let mut config: serde_json::Value =
        serde_json::from_slice(&fs::read(far.join("config.json")).unwrap()).unwrap();
    config["eos_token_id"] = json!([3, 256]);
    fs::write(far.join("config.json"), config.to_string()).unwrap();
    generate(&dir, &["--prompt", "x", "-n", "0", "--save-state", &at("state")]);
    let before = names(root);
    let prompt = ["--prompt", "a bell"];
    let refuse = |model: &Path, arguments: &[&str], words: &[&str]| {
        let ran = generate(model, arguments);
        let line = ran.error();
        assert!(words.iter().all(|word| line.contains(word)), "{words:?}: {line}");
        assert_eq!(names(root), before);
    };
    for (setting, words) in [
        (["--temperature", "NaN"], "temperature is NaN, expected 0 or more"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--temperature", "inf"], "temperature is inf"),
        (["--top-p", "0"], "top-p is 0, expected above 0"),
        (["--top-p", "NaN"], "top-p is NaN"),
        (["--min-p", "1.01"], "min-p is 1.01"),
        (["--repetition-penalty", "0"], "repetition-penalty is 0"),
        (["--penalty-window", "1025"], "penalty-window is 1025"),
        (["--max-tokens", "99999999999"], "max-tokens is 99999999999"),
        (["--samples", "0"], "samples is 0, expected 1 to 4096"),
        (["--chunk", "0"], "chunk is 0"),
        (["--stop", ""], "stop is empty"),
        (["--state", &at("none")], "none"),
        (
            ["--state", &at("broken.txt")],
            "broken.txt: not a usable safetensors file",
        ),
        (["--tokenizer", &at("broken.json")], "broken.json: no tokenizer"),
        (["--tokenizer", &at("none.json")], "none.json"),
        (["--save-state", &at("none/state")], "there is no folder"),
        (["--prompt-ids", "3"], "cannot be used with"),
    ] {
        refuse(&dir, &[&prompt[..], &setting].concat(), &[words]);
    }
    refuse(&dir, &[], &["the prompt is empty"]);
    refuse(&dir, &["--prompt", ""], &["the prompt is empty"]);
    refuse(
        &dir,
        &["--prompt-file", &at("empty.txt")],
        &["the prompt is empty"],
    );
    refuse(
        &dir,
        &["--prompt-file", &at("broken.txt")],
        &["broken.txt: byte 7 is no UTF-8"],
    );
    refuse(&dir, &["--prompt-file", &at("none.txt")], &["none.txt"]);
    refuse(
        &dir,
        &["--prompt-ids", "7,256"],
        &["token 1 of the prompt is 256, expected less than 256"],
    );
    refuse(&dir, &["--prompt-ids", "7,-1"], &["--prompt-ids"]);
    refuse(
        &dir,
        &[&prompt[..], &["--samples", "2", "--save-state", &at("new")]].concat(),
        &["2 samples, expected one to save"],
    );
    refuse(&other, &prompt, &["found no tokenizer.json", "300"]);
    refuse(
        &other,
        &["--prompt-ids", "1", "--state", &at("state")],
        &["state: a state of another model"],
    );
    refuse(&both, &prompt, &["a model in both directions"]);
    refuse(&far, &prompt, &["config.json: eos_token_id is [3,256]"]);
    refuse(&root.join("nothing"), &prompt, &["nothing"]);
    // Keys and values that no machine holds.
    let wide = model(&root.join("model"), Architecture::Llama, |config| {
        config.hidden_size = 512;
        config.num_hidden_layers = 64;
        config.intermediate_size = 1;
    });
    refuse(
        &wide,
        &["--prompt", "x", "-n", "16777216", "--samples", "16"],
        &[
            "keys and values of 1 tokens and 16777216 more need",
            "that are free",
        ],
    );
}

#[test]
fn texts_and_tokens_that_are_none_are_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let at = |name: &str| root.join(name).to_str().unwrap().to_owned();
    let (text, broken, empty, out) = (at("a.txt"), at("b.txt"), at("c.txt"), at("t.json"));
    fs::write(&text, "a bell rings as the rain falls").unwrap();
    fs::write(&broken, [0xff]).unwrap();
    fs::write(&empty, "").unwrap();
    let train = |more: &[&str]| run([&["lm", "tokenizer", "train", "-o", &out], more].concat());
    for (arguments, words) in [
        (
            vec![text.as_str(), "--vocab", "256"],
            "vocab is 256, expected 257 to 65536",
        ),
        (vec![&text, "--vocab", "65537"], "vocab is 65537"),
        (vec![&broken], "b.txt: byte 0 is no UTF-8"),
        (vec![&empty], "c.txt: no text to learn from"),
        (vec!["none.txt"], "none.txt"),
        (vec![], "<FILE>"),
    ] {
        let ran = train(&arguments);
        assert!(ran.error().contains(words), "{}", ran.stderr);
        assert!(!Path::new(&out).exists());
    }
    assert_eq!(train(&[&text, "-q"]).code, 0);
    for (bytes, words) in [
        (&b"abc"[..], "x.u16: 3 bytes, expected two a token"),
        (b"\xff\xff", "x.u16: token 0 is 65535, expected less than"),
    ] {
        fs::write(at("x.u16"), bytes).unwrap();
        let ran = run(["lm", "tokenizer", "decode", &at("x.u16"), "--tokenizer", &out]);
        assert!(ran.error().contains(words), "{}", ran.stderr);
    }
    let ran = run([
        "lm",
        "tokenizer",
        "encode",
        &text,
        "--tokenizer",
        &text,
        "--tokens",
        &at("y.u16"),
    ]);
    assert!(ran.error().contains("a.txt: no tokenizer"), "{}", ran.stderr);
}

const SHAPE: [&str; 10] = [
    "--layers",
    "2",
    "--width",
    "32",
    "--heads",
    "2",
    "--hidden",
    "48",
    "--vocabulary",
    "64",
];

fn bench(more: &[&str]) -> Ran {
    let mut command = fulgur();
    command.args(["lm", "bench", "-q", "--device", "cpu"]);
    Ran::of(command.args(more).output().unwrap())
}

#[test]
fn speed_is_measured_by_length_and_batch() {
    let folder = tempfile::tempdir().unwrap();
    let plot = folder.path().join("speed.svg");
    let plot = plot.to_str().unwrap();
    let lengths = [
        "--lengths",
        "128,64,256",
        "--batch",
        "3,1",
        "-n",
        "4",
        "--chunk",
        "50",
    ];
    let which = [
        "--architecture",
        "tnl,llama",
        "--most-bytes",
        "403000",
        "--dtype",
        "bf16",
    ];
    let all = [&SHAPE[..], &lengths, &which, &["--json", "--plot", plot]].concat();
    let ran = bench(&all);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let json = ran.json();
    assert_eq!((&json["device"], &json["dtype"]), (&json!("CPU"), &json!("bf16")));
    let models = json["models"].as_array().unwrap();
    let [tnl, llama] = [&models[0], &models[1]];
    assert_eq!((&tnl["name"], &llama["name"]), (&json!("tnl"), &json!("llama")));
    let places = |model: &serde_json::Value| -> Vec<(u64, u64)> {
        let measures = model["measures"].as_array().unwrap().iter();
        measures
            .map(|measure| {
                for time in ["step_ms", "token_ms"] {
                    let of = |name: &str| measure[time][name].as_f64().unwrap();
                    assert!(0.0 < of("low") && of("low") <= of("median") && of("median") <= of("high"));
                }
                assert!(measure["prefill_tokens_per_s"].as_f64().unwrap() > 0.0);
                (
                    measure["context"].as_u64().unwrap(),
                    measure["batch"].as_u64().unwrap(),
                )
            })
            .collect()
    };
    assert_eq!(
        places(tnl),
        [(64, 1), (64, 3), (128, 1), (128, 3), (256, 1), (256, 3)]
    );
    // Keys and values of others would not fit: 2 layers of 32 numbers twice, of 4 bytes on a CPU.
    assert_eq!(places(llama), [(64, 1), (64, 3), (128, 1), (256, 1)]);
    let left = llama["left_out"].as_array().unwrap();
    assert!(
        left.len() == 2
            && left[0]
                .as_str()
                .unwrap()
                .starts_with("context 128, batch 3: keys")
    );
    let bytes = |model: &serde_json::Value, at: usize| model["measures"][at]["state_bytes"].as_u64().unwrap();
    let state = 2 * 2 * 16 * 16 * 4;
    for at in 0..6 {
        assert_eq!(bytes(tnl, at), state * (1 + 2 * (at as u64 % 2)));
    }
    assert_eq!(bytes(llama, 3) - bytes(llama, 2), 128 * 512);
    assert_eq!(tnl["flatness"].as_array().unwrap().len(), 2);
    let svg = fs::read_to_string(plot).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("tnl, batch 3") && svg.contains("llama, batch 1"));

    // The same plot from what was printed, and one of two runs.
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (whole, again, both) = (at("whole.json"), at("again.svg"), at("both.svg"));
    fs::write(&whole, &ran.stdout).unwrap();
    assert_eq!(bench(&["--from", &whole, "--plot", &again]).code, 0);
    assert_eq!(fs::read_to_string(&again).unwrap(), svg);
    let one = |architecture: &str, lengths: &str| {
        let which = [
            "--architecture",
            architecture,
            "--lengths",
            lengths,
            "-n",
            "2",
            "--json",
        ];
        let path = at(&format!("{lengths}.json"));
        fs::write(&path, bench(&[&SHAPE[..], &which].concat()).stdout).unwrap();
        path
    };
    let from = [one("tnl", "16"), one("tnl", "32"), one("llama", "8")].join(",");
    let ran = bench(&["--from", &from, "--plot", &both, "--json"]);
    assert_eq!(ran.json()["models"].as_array().unwrap().len(), 3);
    let svg = fs::read_to_string(&both).unwrap();
    for name in [">tnl (16)<", ">tnl (32)<", ">llama<"] {
        assert_eq!(svg.matches(name).count(), 2, "{name}: {svg}");
    }
    for (text, words) in [
        ("7", "found no results of fulgur lm bench --json: invalid type"),
        ("{\"equal\": true}", "missing field `models`"),
        ("{\"models\": []}", "found no measures"),
        (
            "{\"models\": [{\"name\": \"a\", \"measures\": [{\"context\": 0, \"batch\": 1, \"token_ms\": {\"median\": 1}, \"state_bytes\": 1}]}]}",
            "measure 0 of a: found a context, a time or a size that is not above 0",
        ),
    ] {
        fs::write(at("wrong.json"), text).unwrap();
        let ran = bench(&["--from", &at("wrong.json"), "--plot", &at("none.svg")]);
        assert!(ran.error().contains(words), "{}", ran.stderr);
        assert!(!folder.path().join("none.svg").exists());
    }
    assert!(bench(&["--from", &whole]).error().contains("--plot"));

    let dir = model(&folder.path().join("model"), Architecture::Lightnet, |_| ());
    let ran = bench(&["--model", dir.to_str().unwrap(), "--lengths", "16", "-n", "2"]);
    assert_eq!(ran.code, 0);
    assert!(ran.stdout.contains("weights in f32, on CPU") && ran.stdout.contains("tokens/s"));
}

/// On a CPU no step is recorded: forks, clones and states are compared all the same.
#[test]
fn both_ways_of_decoding_are_compared() {
    let which = [
        "--architecture",
        "hgrn2,cosformer2",
        "--lengths",
        "16,8",
        "--batch",
        "3,1",
    ];
    let ran = bench(&[&SHAPE[..], &which, &["-n", "6", "--verify", "--json"]].concat());
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let json = ran.json();
    assert_eq!((&json["equal"], &json["recorded"]), (&json!(true), &json!(0)));
    let models = json["models"].as_array().unwrap();
    let checks: Vec<_> = models
        .iter()
        .flat_map(|model| model["checks"].as_array().unwrap())
        .map(|check| {
            (
                check["batch"].as_u64().unwrap(),
                check["context"].as_u64().unwrap(),
            )
        })
        .collect();
    assert_eq!(checks, [(1, 8), (3, 8), (1, 8), (3, 8)]);
}

#[test]
fn what_cannot_be_measured_is_named() {
    let said = |more: &[&str]| {
        let ran = bench(more);
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{more:?}");
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
        ran.stderr
    };
    assert!(said(&[]).contains("expected --model or --architecture"));
    assert!(said(&["--architecture", "rwkv"]).contains("found \"rwkv\", expected some of tnl"));
    let tnl = ["--architecture", "tnl"];
    let with = |more: &[&str]| said(&[&tnl[..], more].concat());
    assert!(with(&["--lengths", "16,0"]).contains("lengths is 0, expected 1 to"));
    assert!(with(&["--batch", "100000"]).contains("batch is 100000"));
    assert!(with(&["-n", "0"]).contains("tokens is 0"));
    assert!(with(&["--heads", "7"]).contains("hidden_size is 256"));
    let huge = ["--layers", "4000", "--width", "65536", "--hidden", "65536"];
    assert!(with(&huge).contains("expected at most the"));
}

/// Weights of 16 bits are other weights: the text is drawn anew, and as often as one likes.
#[test]
fn weights_of_16_bits_write_too() {
    let folder = tempfile::tempdir().unwrap();
    let dir = model(&folder.path().join("model"), Architecture::Tnl, |_| ());
    let write = |more: &[&str]| {
        let ran = generate(
            &dir,
            &[&["--prompt", "a bell", "-n", "24", "--json"], more].concat(),
        );
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
        ran.json()["samples"].clone()
    };
    let narrow = ["--dtype", "bf16"];
    assert_eq!(write(&narrow), write(&narrow));
    assert_eq!(
        write(&[&narrow[..], &["--samples", "3"]].concat())[0],
        write(&narrow)[0]
    );
    let state = folder.path().join("state");
    let state = state.to_str().unwrap();
    write(&["--dtype", "bf16", "--save-state", state]);
    let ran = generate(&dir, &["--state", state, "-n", "1"]);
    assert!(
        ran.code == 2 && ran.stderr.contains("other weights"),
        "{}",
        ran.stderr
    );
}

#[test]
fn several_prompts_have_the_texts_that_each_has_alone() {
    let folder = tempfile::tempdir().unwrap();
    let dir = model(&folder.path().join("model"), Architecture::Tnl, |_| ());
    let settings = ["-n", "20", "--seed", "5", "--json"];
    let write = |more: &[&str]| generate(&dir, &[&settings, more].concat()).json()["samples"].clone();
    let prompts = ["a bell", "rain falls, and", "x"];
    let alone: Vec<_> = prompts
        .iter()
        .map(|prompt| write(&["--prompt", prompt])[0].clone())
        .collect();
    let arguments: Vec<&str> = prompts.iter().flat_map(|prompt| ["--prompt", prompt]).collect();
    assert_eq!(write(&arguments), json!(alone));
    let file = folder.path().join("prompts.txt");
    fs::write(&file, prompts.join("\n")).unwrap();
    assert_eq!(write(&["--prompts", file.to_str().unwrap()]), json!(alone));
    let refused = generate(&dir, &[&arguments[..], &["--samples", "2"]].concat());
    assert_eq!(refused.code, 2);
    assert!(refused.stderr.contains("3 prompts, expected one with --samples"));
    let empty = generate(&dir, &["--prompt", "a", "--prompt", ""]);
    assert!(
        empty.code == 2 && empty.stderr.contains("prompt 2 is empty"),
        "{}",
        empty.stderr
    );
}
