//! `fulgur classify`, `fulgur eval classify` and the task `classify`, on models with random weights.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::softmax;
use fulgur::datasets::media::{Picture, read_picture, write_png};
#[cfg(feature = "media")]
use fulgur::datasets::store::{Plain, write_tensors};
use fulgur::kernels::philox::Philox;
use fulgur::lightnet::params::{Params, Precision};
use fulgur::lightnet::vision::{Classifier, Config, Mixer, Size};

#[cfg(feature = "media")]
use crate::support::names;
use crate::support::{Ran, run};

const LABELS: [&str; 10] = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
];

fn config(mixer: Mixer) -> Config {
    Config {
        image_size: [28, 28],
        num_channels: 1,
        patch_size: 4,
        image_mean: vec![0.5],
        image_std: vec![0.5],
        hidden_size: 16,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        intermediate_size: 24,
        mixer,
        form: mixer.form(),
        ..Config::of(Size::Tiny, LABELS.map(str::to_owned).to_vec())
    }
}

/// A model folder.
fn model(dir: &Path, config: &Config) -> PathBuf {
    fs::create_dir_all(dir).unwrap();
    let params = Params::random(5, &Device::Cpu);
    Classifier::new(config, DType::F32, &params.builder()).unwrap();
    // The head of a fresh model says the same about everything.
    let head = &params.vars()["head.weight"];
    head.set(&(head.as_tensor() * 40.0).unwrap()).unwrap();
    fs::write(dir.join("config.json"), serde_json::to_string(config).unwrap()).unwrap();
    let weights = dir.join("model.safetensors");
    params.save(&weights, &BTreeMap::new(), Precision::F32).unwrap();
    dir.to_owned()
}

/// A picture with some structure.
fn picture(path: &Path, width: usize, height: usize, seed: u64) {
    let mut noise = Philox::new(seed, 0);
    let pixels = (0..width * height * 3).map(|_| noise.below(256) as u8).collect();
    write_png(path, &Picture::new(pixels, width, height, 3).unwrap()).unwrap();
}

fn classify(model: &Path, arguments: &[&str]) -> Ran {
    let model = model.to_str().unwrap();
    run([
        &["classify", "--device", "cpu", "-q", "--model", model],
        arguments,
    ]
    .concat())
}

/// What the program says about pictures is the softmax of what `fulgur forward` gives for their pixels, for each mixer, and for
/// pictures that are larger than the model's and not square.
#[test]
fn guesses_are_those_of_the_network() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    for mixer in Mixer::ALL {
        let dir = model(&file(mixer.name()), &config(mixer));
        let shown = file("shown.png");
        picture(&shown, 44, 57, 3);
        let ran = classify(&dir, &[&text(&shown), "--native", "--top", "10", "--json"]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let json = ran.json();
        let result = &json["results"][0];
        assert_eq!(
            (result["width"].as_u64(), result["height"].as_u64()),
            (Some(44), Some(57))
        );

        // 57 rows are 14 patches of 4 and one row, which is cut off at the end.
        let seen = read_picture(&shown).unwrap();
        let values: Vec<f32> = seen.pixels[..44 * 56 * 3]
            .chunks(3)
            .map(|p| {
                let luma = 19_595 * u32::from(p[0]) + 38_470 * u32::from(p[1]) + 7_471 * u32::from(p[2]);
                ((luma + 0x8000) >> 16) as f32 / 127.5 - 1.0
            })
            .collect();
        let pixels = Tensor::from_vec(values, (1, 1, 56, 44), &Device::Cpu).unwrap();
        let inputs = HashMap::from([("pixel_values", pixels)]);
        candle_core::safetensors::save(&inputs, file("in.safetensors")).unwrap();
        let (inputs, out) = (text(&file("in.safetensors")), text(&file("out.safetensors")));
        let dir = text(&dir);
        let forward = [
            "forward", "-q", "--model", &dir, "--inputs", &inputs, "--out", &out,
        ];
        assert_eq!(run(forward).code, 0);
        let logits = &candle_core::safetensors::load(&out, &Device::Cpu).unwrap()["logits"];
        let shares = softmax(logits, D::Minus1).unwrap().squeeze(0).unwrap();
        let shares = shares.to_vec1::<f32>().unwrap();
        let guesses = result["guesses"].as_array().unwrap();
        assert_eq!(guesses.len(), 10);
        let mut last = f64::INFINITY;
        for guess in guesses {
            let class = guess["class"].as_u64().unwrap() as usize;
            let probability = guess["probability"].as_f64().unwrap();
            assert!(
                (probability - f64::from(shares[class])).abs() < 1e-5,
                "{mixer:?} {guess}"
            );
            assert!(probability <= last);
            assert_eq!(guess["label"], LABELS[class]);
            last = probability;
        }
    }
}

#[test]
fn pictures_that_cannot_be_read_have_reasons() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let dir = model(&folder.path().join("model"), &config(Mixer::LightNet));
    fs::create_dir(folder.path().join("seen")).unwrap();
    picture(Path::new(&file("seen/b.png")), 1, 1, 1);
    picture(Path::new(&file("seen/a.png")), 300, 20, 2);
    let whole = fs::read(file("seen/a.png")).unwrap();
    fs::write(file("seen/c.png"), &whole[..whole.len() / 2]).unwrap();
    fs::write(file("seen/d.jpg"), b"no picture").unwrap();
    fs::write(file("seen/notes.txt"), b"not looked at").unwrap();
    let ran = classify(&dir, &[&file("seen"), &file("absent.png"), "--json"]);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    let json = ran.json();
    assert_eq!(json["n"], 2);
    let results = json["results"].as_array().unwrap();
    let found: Vec<(bool, usize)> = results
        .iter()
        .map(|result| {
            (
                result["reason"].is_null(),
                result["guesses"].as_array().unwrap().len(),
            )
        })
        .collect();
    assert_eq!(found, [(true, 5), (true, 5), (false, 0), (false, 0), (false, 0)]);
    assert!(results[0]["path"].as_str().unwrap().ends_with("a.png"));
    let text = classify(&dir, &[&file("seen/a.png"), "--top", "2"]);
    assert_eq!(
        (text.code, text.stdout.lines().count()),
        (0, 3),
        "{}",
        text.stdout
    );
    assert_eq!(classify(&dir, &[&file("absent.png"), "--json"]).code, 2);
}

#[test]
fn saliency_is_drawn_over_the_picture() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let dir = model(&folder.path().join("model"), &config(Mixer::Hgrn2));
    picture(Path::new(&file("a.png")), 40, 30, 1);
    picture(Path::new(&file("b.png")), 40, 30, 2);
    let ran = classify(
        &dir,
        &[
            &file("a.png"),
            "--native",
            "--saliency",
            &file("why.png"),
            "--json",
        ],
    );
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.json()["saliency"].as_str().unwrap().ends_with("why.png"));
    let drawn = read_picture(Path::new(&file("why.png"))).unwrap();
    // 40 x 28 pixels, seven times as large.
    assert_eq!((drawn.width, drawn.height), (280, 196));
    let colours = drawn
        .pixels
        .chunks(3)
        .filter(|p| p[0].abs_diff(p[2]) > 40)
        .count();
    assert!(colours > 1000, "{colours}");
    let error = |arguments: &[&str]| classify(&dir, arguments).error().to_owned();
    let two = error(&[&file("a.png"), &file("b.png"), "--saliency", &file("two.png")]);
    assert!(
        two.contains("--saliency: found 2 pictures, expected one"),
        "{two}"
    );
    let lost = error(&[&file("a.png"), "--saliency", &file("none/why.png")]);
    assert!(lost.contains("there is no folder"), "{lost}");
}

#[test]
fn folders_that_hold_no_classifier_are_refused_in_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let shown = folder.path().join("a.png");
    picture(&shown, 28, 28, 1);
    let shown = shown.to_str().unwrap();
    let dir = model(&folder.path().join("model"), &config(Mixer::Tnl));
    let written = fs::read_to_string(dir.join("config.json")).unwrap();
    for (from, to, words) in [
        ("\"hidden_size\":16", "\"hidden_size\":18", "model.safetensors"),
        (
            "\"hidden_size\":16",
            "\"hidden_size\":17",
            "hidden_size is 17, expected a multiple",
        ),
        ("\"patch_size\":4", "\"patch_size\":0", "patch_size is 0"),
        (
            "\"lrpe\":true",
            "\"lrpe\":true,\"ropes\":1",
            "unknown field `ropes`",
        ),
        ("vision_classifier", "bert", "unknown variant `bert`"),
    ] {
        fs::write(dir.join("config.json"), written.replace(from, to)).unwrap();
        let ran = classify(&dir, &[shown]);
        let line = ran.error();
        assert!(line.contains(words), "{line}");
    }
    fs::write(dir.join("config.json"), &written).unwrap();
    fs::remove_file(dir.join("model.safetensors")).unwrap();
    assert!(classify(&dir, &[shown]).error().contains("found no weights"));
    assert!(classify(folder.path(), &[shown]).error().contains("config.json"));
}

/// A prepared set of clothes: pictures of one grey level a class.
#[cfg(feature = "media")]
fn clothes(data: &Path) {
    let dir = data.join("fashion-mnist");
    fs::create_dir_all(&dir).unwrap();
    let mut tensors = Vec::new();
    for (name, count) in [("train", 60_000), ("test", 10_000)] {
        let labels: Vec<u8> = (0..count).map(|at| (at % 10) as u8).collect();
        let images = labels.iter().flat_map(|&label| [label * 25; 28 * 28]).collect();
        tensors.push((format!("{name}.images"), Plain::u8(&[count, 28, 28], images)));
        tensors.push((format!("{name}.labels"), Plain::u8(&[count], labels)));
    }
    write_tensors(&dir.join("fashion-mnist.safetensors"), tensors, None).unwrap();
}

#[cfg(feature = "media")]
#[test]
fn a_trained_classifier_is_judged() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    clothes(folder.path());
    let recipe = format!(
        "task = 'classify'\nrun_dir = {:?}\n[train]\nmax_steps = 3\n[classify]\nbatch = 8\nvalidation = 16\nstochastic_depth = 0.1\n\
         data = {:?}\n[classify.model]\nlayers = 1\nwidth = 16\nheads = 2\nhidden = 16\n",
        file("run"),
        folder.path()
    );
    fs::write(file("recipe.toml"), recipe).unwrap();
    let estimate = run(["estimate", &file("recipe.toml"), "--json"]);
    assert_eq!(estimate.code, 0, "{}", estimate.stderr);
    let trained = run(["train", &file("recipe.toml"), "--device", "cpu", "--json"]);
    assert_eq!(trained.code, 0, "{}", trained.stderr);
    let model = file("run/model");
    assert_eq!(names(Path::new(&model)), ["config.json", "model.safetensors"]);

    let data = folder.path().to_str().unwrap();
    let eval = |model: &str, more: &[&str]| {
        let fixed = [
            "eval", "classify", "-q", "--device", "cpu", "--data", data, "--model", model,
        ];
        run([&fixed[..], more].concat())
    };
    let (svg, csv) = (file("confusion.svg"), file("results.csv"));
    let ran = eval(
        &model,
        &["--limit", "50", "--confusion", &svg, "--csv", &csv, "--json"],
    );
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let json = ran.json();
    assert_eq!(
        (json["n"].as_u64(), json["finished"].as_bool()),
        (Some(50), Some(true))
    );
    let confusion: Vec<Vec<u64>> = serde_json::from_value(json["confusion"].clone()).unwrap();
    assert!(confusion.iter().all(|row| row.iter().sum::<u64>() == 5));
    let right: u64 = (0..10).map(|class| confusion[class][class]).sum();
    assert_eq!(json["top1"].as_f64().unwrap(), right as f64 / 50.0);
    assert!(json["top5"].as_f64().unwrap() >= json["top1"].as_f64().unwrap());
    assert_eq!(json["classes"][9]["label"], "ankle boot");
    let table = fs::read_to_string(&csv).unwrap();
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(
        lines[0],
        "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation"
    );
    let cells: Vec<&str> = lines[1].split(',').collect();
    assert_eq!((cells.len(), cells[6]), (9, "28"));
    assert_eq!(cells[1].parse::<f64>().unwrap(), 2.0 * right as f64);
    assert!(fs::read_to_string(&svg).unwrap().contains("ankle boot"));
    let text = eval(&model, &["--limit", "50"]);
    assert!(
        text.stdout.contains("mistaken for") && text.stdout.contains("top-1"),
        "{}",
        text.stdout
    );

    let other = crate::classify::model(
        &folder.path().join("other"),
        &Config {
            labels: LABELS.map(|label| label.replace("bag", "purse")).to_vec(),
            ..config(Mixer::LightNet)
        },
    );
    let line = eval(other.to_str().unwrap(), &[]).error().to_owned();
    assert!(
        line.contains("labels[8] is \"purse\", expected \"bag\""),
        "{line}"
    );
    let line = eval(&model, &["--set", "imagenet"]).error().to_owned();
    assert!(line.contains("--set: imagenet: no such pictures"), "{line}");
    let line = run(["eval", "classify", "--model", &model, "--data", &file("none")])
        .error()
        .to_owned();
    assert!(line.contains("fulgur data fetch fashion-mnist"), "{line}");
}

/// A PNG file that claims a size, without pixels.
fn header(width: u32, height: u32) -> Vec<u8> {
    let chunk = |kind: &[u8; 4], data: &[u8]| {
        let named = [kind.as_slice(), data].concat();
        // CRC-32, bit by bit.
        let sum = !named.iter().fold(u32::MAX, |sum, &byte| {
            (0..8).fold(sum ^ u32::from(byte), |sum, _| {
                (sum >> 1) ^ (0xedb8_8320 & (sum & 1).wrapping_neg())
            })
        });
        [
            &(data.len() as u32).to_be_bytes(),
            named.as_slice(),
            &sum.to_be_bytes(),
        ]
        .concat()
    };
    let size = [width.to_be_bytes(), height.to_be_bytes()].concat();
    let parts = [
        b"\x89PNG\r\n\x1a\n".to_vec(),
        chunk(b"IHDR", &[&size[..], &[8, 2, 0, 0, 0]].concat()),
        chunk(b"IEND", b""),
    ];
    parts.concat()
}

/// Files that are pictures in some way or other, and files that are none: what they are, and whether they can be looked at.
fn odd_files(dir: &Path) -> Vec<(String, bool)> {
    fs::create_dir_all(dir).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/pillow.safetensors");
    let golden = candle_core::safetensors::load(golden, &Device::Cpu).unwrap();
    let stored = |name: &str| golden[&format!("file.{name}")].to_vec1::<u8>().unwrap();
    let (cmyk, webp) = (stored("cmyk"), stored("webp"));
    let mut files = Vec::new();
    for (name, bytes, fits) in [
        ("animated.gif", stored("gif"), true),
        ("animated.png", stored("apng"), true),
        ("claims.png", header(65_535, 65_535), false),
        ("cmyk.jpg", cmyk.clone(), true),
        ("cut.jpg", cmyk[..cmyk.len() / 2].to_vec(), false),
        ("cut.webp", webp[..webp.len() / 2].to_vec(), false),
        ("deep.png", stored("deep"), true),
        ("empty.png", Vec::new(), false),
        ("nothing.png", header(0, 7), false),
        ("palette.png", stored("palette"), true),
        ("plain.bmp", stored("bmp"), true),
        ("turned.jpg", stored("turned"), true),
        ("words.jpg", b"no picture".to_vec(), false),
        ("wrong.jpg", webp, true),
    ] {
        fs::write(dir.join(name), bytes).unwrap();
        files.push((name.to_owned(), fits));
    }
    picture(&dir.join("dot.png"), 1, 1, 3);
    picture(&dir.join("hair.png"), 3000, 1, 4);
    files.extend([("dot.png".to_owned(), true), ("hair.png".to_owned(), true)]);
    files.sort();
    files
}

#[test]
fn odd_pictures_are_looked_at_and_others_have_reasons() {
    let folder = tempfile::tempdir().unwrap();
    let dir = model(&folder.path().join("model"), &config(Mixer::LightNet));
    let odd = folder.path().join("odd");
    let files = odd_files(&odd);
    fs::write(odd.join("notes.txt"), b"not looked at").unwrap();
    for more in [&[][..], &["--native"]] {
        let ran = classify(&dir, &[&[odd.to_str().unwrap(), "--json"], more].concat());
        assert_eq!(ran.code, 1, "{}", ran.stderr);
        let json = ran.json();
        let found: Vec<(String, bool)> = json["results"]
            .as_array()
            .unwrap()
            .iter()
            .map(|result| {
                let path = Path::new(result["path"].as_str().unwrap());
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                if let Some(reason) = result["reason"].as_str() {
                    assert!(reason.contains(&name) && !reason.contains('\n'), "{reason}");
                }
                (name, result["guesses"].as_array().unwrap().len() == 5)
            })
            .collect();
        assert_eq!(found, files);
    }
    // EXIF says that it lies on its side.
    let turned = classify(&dir, &[odd.join("turned.jpg").to_str().unwrap(), "--json"]);
    let stored = read_picture(&odd.join("turned.jpg")).unwrap();
    let result = &turned.json()["results"][0];
    assert_eq!(
        (result["width"].as_u64(), result["height"].as_u64()),
        (Some(stored.height as u64), Some(stored.width as u64))
    );
}

/// A recipe of a tiny network for the pictures `set`.
fn tiny(folder: &Path, set: &Path, run_dir: &str) -> PathBuf {
    let recipe = folder.join("recipe.toml");
    let text = format!(
        "task = 'classify'\nrun_dir = {:?}\n[train]\nmax_steps = 2\n[classify]\nset = {set:?}\nsize = [8, 8]\nbatch = 8\n\
         [classify.augment]\ncrop = {{ area = [0.2, 1.0] }}\npad = 1\nflip = 0.5\nrandaugment = {{ count = 1 }}\n\
         erasing = {{ probability = 0.5 }}\nmixup = 0.2\ncutmix = 1.0\n\
         [classify.model]\nlayers = 1\nwidth = 16\nheads = 2\nhidden = 16\n",
        folder.join(run_dir)
    );
    fs::write(&recipe, text).unwrap();
    recipe
}

#[test]
fn folders_with_odd_files_are_trained_and_judged_on() {
    let folder = tempfile::tempdir().unwrap();
    let set = folder.path().join("set");
    let files = odd_files(&set.join("train/odd"));
    odd_files(&set.join("val/odd"));
    for (place, seed) in [("train", 1), ("val", 2)] {
        for class in ["plain", "other"] {
            let dir = set.join(place).join(class);
            fs::create_dir_all(&dir).unwrap();
            picture(&dir.join("a.png"), 20, 9, seed);
            fs::write(dir.join("notes.txt"), "words").unwrap();
        }
        fs::create_dir_all(set.join(place).join("nobody")).unwrap();
    }
    let recipe = tiny(folder.path(), &set, "run");
    let recipe = recipe.to_str().unwrap();
    let trained = run(["train", recipe, "--device", "cpu", "--json"]);
    assert_eq!(trained.code, 0, "{}", trained.stderr);
    trained.json();
    // In both parts: the odd ones, two notes, and an empty folder.
    let unfit = files.iter().filter(|(_, fits)| !fits).count();
    let left_out = 2 * (unfit + 2 + 1);
    let words = format!("{}: {left_out} left out: ", set.display());
    assert!(trained.stderr.contains(&words), "{words}{}", trained.stderr);

    let model = folder.path().join("run/model");
    let (set, model) = (set.to_str().unwrap(), model.to_str().unwrap());
    let arguments = [
        "eval", "classify", "--device", "cpu", "-q", "--model", model, "--set",
    ];
    let judge = |set: &str, more: &[&str]| run([&arguments[..], &[set], more].concat());
    let judged = judge(set, &["--json"]);
    assert_eq!(judged.code, 0, "{}", judged.stderr);
    let json = judged.json();
    assert_eq!(json["n"], files.len() - unfit + 2);
    let skipped = &json["skipped"];
    let count = |reason: &str| skipped[reason].as_u64().unwrap() as usize;
    assert_eq!(
        count("no_picture") + count("broken") + count("empty_classes"),
        left_out
    );
    assert_eq!(count("empty_classes"), 2);
    let text = judge(set, &[]).stdout;
    assert!(text.contains(&format!("{left_out} left out: ")), "{text}");

    // Of other classes, of one, and without any.
    fs::remove_dir_all(Path::new(set).join("train/plain")).unwrap();
    fs::remove_dir_all(Path::new(set).join("val/plain")).unwrap();
    let line = judge(set, &[]).error().to_owned();
    assert!(line.contains("3 classes, expected the 2 of the set"), "{line}");
    fs::remove_dir_all(Path::new(set).join("train/other")).unwrap();
    fs::remove_dir_all(Path::new(set).join("val/other")).unwrap();
    let line = run(["train", recipe, "--device", "cpu"]).error().to_owned();
    assert!(
        line.contains("classes: found only \"odd\", expected at least two"),
        "{line}"
    );
}

#[test]
fn sets_that_cannot_be_learnt_are_refused_in_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    for name in ["a.png", "b.png", "c.png"] {
        picture(&file(name), 9, 9, 1);
    }
    let list = file("list.jsonl");
    let recipe = tiny(folder.path(), &list, "run");
    let line = |image: &str, label: &str, split: &str| {
        format!("{{\"image\": \"{image}.png\"{label}, \"split\": \"{split}\"}}\n")
    };
    let (first, second) = (
        line("a", ", \"label\": 0", "train"),
        line("b", ", \"label\": 1", "train"),
    );
    for (third, words) in [
        (line("c", ", \"label\": -1", "train"), "line 3: label: found -1"),
        (
            line("c", ", \"label\": 100000", "train"),
            "label: found 100000, expected 0 to 99999",
        ),
        (
            line("c", ", \"label\": 7", "held_out"),
            "none of class \"2\" to train on",
        ),
        (line("c", "", "held_out"), "label: found none for"),
        (
            line("c", ", \"label\": 1", "train"),
            "pictures: found none held out",
        ),
        (line("c", ", \"label\": 1", "both"), "line 3"),
    ] {
        fs::write(&list, format!("{first}{second}{third}")).unwrap();
        let ran = run(["train", recipe.to_str().unwrap(), "--device", "cpu"]);
        let found = ran.error();
        assert!(
            found.contains(words) && found.contains("list.jsonl"),
            "{words}: {found}"
        );
    }

    // A model of two classes, and labels that it does not know.
    let held_out = |label: u32| line("c", &format!(", \"label\": {label}"), "held_out");
    fs::write(&list, format!("{first}{second}{}", held_out(1))).unwrap();
    let trained = run(["train", recipe.to_str().unwrap(), "--device", "cpu", "-q"]);
    assert_eq!(trained.code, 0, "{}", trained.stderr);
    let model = file("run/model");
    let judge = || {
        let (model, set) = (model.to_str().unwrap(), list.to_str().unwrap());
        run([
            "eval", "classify", "-q", "--device", "cpu", "--model", model, "--set", set,
        ])
    };
    assert_eq!(judge().code, 0);
    for (third, words) in [
        (held_out(2), "2 classes, expected the 3 of the set"),
        (line("c", "", "held_out"), "has no class"),
        (line("c", ", \"label\": 1", "train"), "no picture was looked at"),
    ] {
        fs::write(&list, format!("{first}{second}{third}")).unwrap();
        let found = judge().error().to_owned();
        assert!(found.contains(words), "{words}: {found}");
    }
}
