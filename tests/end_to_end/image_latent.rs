//! Pictures in the latents of a codec: the tasks `picture-codec` and `image`, `fulgur image generate` and `fulgur eval image`.

use std::fs;
use std::path::Path;

use fulgur::datasets::media::{Picture, read_picture, write_png};
use fulgur::kernels::philox::Philox;
use serde_json::json;

use crate::eval_image::judge;
use crate::support::{Ran, run};

const CODEC: &str = "task = 'picture-codec'\nseed = 1\n[train]\nmax_steps = 300\nvalidate_every = 100\nema = 0.0\n[optimiser]\nlr = 5e-3\n\
                     [schedule]\nwarmup = 20\n[picture-codec]\nsize = [8, 8]\nbatch = 16\nlatent_noise = 0.05\n[picture-codec.model]\n\
                     patch = 4\nlatent_channels = 4\nencoder = [24, 1]\ndecoder = [24, 1]\nfine = [12, 1]\n";
const IMAGE: &str = "task = 'image'\nseed = 1\n[train]\nmax_steps = 300\nsample_every = 150\nema = 0.0\n[optimiser]\nlr = 5e-3\n\
                     [schedule]\nwarmup = 20\n[image]\nsize = [8, 8]\nbatch = 16\nflip = true\nsample_steps = 4\n[image.model]\n\
                     size = 'S'\npatch = 1\nlayers = 1\nwidth = 16\nheads = 2\nhidden = 16\n";

/// Bright and dark pictures in folders of these names.
fn prepare(root: &Path) {
    let mut noise = Philox::new(5, 0);
    for (name, level) in [("bright", 190u8), ("dark", 20)] {
        let folder = root.join("set").join(name);
        fs::create_dir_all(&folder).unwrap();
        for i in 0..24 {
            let colour = [0; 3].map(|_| level + noise.below(40) as u8);
            let pixels = colour.repeat(12 * 8);
            write_png(
                &folder.join(format!("{i}.png")),
                &Picture::new(pixels, 12, 8, 3).unwrap(),
            )
            .unwrap();
        }
    }
    for (name, recipe) in [("codec", CODEC), ("image", IMAGE)] {
        fs::write(root.join(format!("{name}.toml")), recipe).unwrap();
    }
}

/// Trains one of the two recipes, with more settings.
fn train(root: &Path, name: &str, more: &[String]) -> Ran {
    let task = if name == "codec" { "picture-codec" } else { "image" };
    let recipe = root.join(format!("{name}.toml")).display().to_string();
    let own = [
        format!("run_dir=\"{}\"", root.join(name).display()),
        format!("{task}.set=\"{}\"", root.join("set").display()),
    ];
    let sets = own.iter().chain(more).flat_map(|value| ["--set", value]);
    let fixed = ["train", &recipe, "--device", "cpu", "-q", "--json"];
    run(fixed.into_iter().chain(sets))
}

fn with_codec(folder: &Path) -> String {
    format!("image.codec=\"{}\"", folder.display())
}

fn generate(model: &Path, out: &Path, more: &[&str]) -> Ran {
    let [model, out] = [model, out].map(|path| path.to_str().unwrap());
    let own = [
        "image", "generate", "--device", "cpu", "-q", "--json", "--steps", "8", "--model", model, "-o", out,
    ];
    run([&own[..], more].concat())
}

fn mean(picture: &Picture) -> f64 {
    let sum: f64 = picture.pixels.iter().map(|&byte| f64::from(byte)).sum();
    sum / picture.pixels.len() as f64
}

#[test]
fn pictures_are_learnt_and_drawn_in_latents() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepare(root);
    let codec = train(root, "codec", &[]);
    assert_eq!(codec.code, 0, "{}", codec.stderr);
    let trained = train(root, "image", &[with_codec(&root.join("codec/model"))]);
    assert_eq!(trained.code, 0, "{}", trained.stderr);
    assert!(fs::read_dir(root.join("image/samples")).unwrap().count() >= 1);
    // The model is whole without the run of the codec.
    fs::rename(root.join("codec"), root.join("away")).unwrap();
    let model = root.join("image/model");

    let one = |out: &str, more: &[&str]| {
        let ran = generate(&model, &root.join(out), more);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        assert_eq!(ran.json()["pictures"], json!(1));
        read_picture(&root.join(out)).unwrap()
    };
    let bright = one("a.png", &["--class", "bright"]);
    assert_eq!((bright.width, bright.height), (8, 8));
    assert_eq!(bright, one("b.png", &["--class", "bright"]));
    assert_ne!(bright, one("c.png", &["--class", "bright", "--seed", "1"]));
    let dark = one("d.png", &["--class", "dark", "--size", "16x8"]);
    assert_eq!((dark.width, dark.height), (16, 8));
    let levels = [mean(&bright), mean(&dark)];
    assert!(levels[0] > levels[1] + 80.0, "{levels:?}");

    // A little of a picture changes a little, all of it all.
    let init = root.join("set/bright/3.png");
    let from = ["--class", "dark", "--init-image", init.to_str().unwrap()];
    let near = one("e.png", &[&from[..], &["--strength", "0.2"]].concat());
    let far = one("f.png", &[&from[..], &["--strength", "1"]].concat());
    assert!(
        mean(&near) > mean(&dark) + 60.0 && mean(&far) < mean(&near) - 60.0,
        "{} {}",
        mean(&near),
        mean(&far)
    );

    let refused = |more: &[&str], words: &str| {
        let out = root.join("refused.png");
        let ran = generate(&model, &out, more);
        assert!(ran.error().contains(words) && !out.exists(), "{}", ran.stderr);
    };
    refused(
        &["--size", "10x8"],
        "size is 10x8, expected multiples of 4 up to 16384",
    );

    // Judged at the size of the pictures, not of their latents.
    let judge = judge(&root.join("judge"), &["bright", "dark"]);
    let set = root.join("set");
    let [set, path, judge] = [&set, &model, &judge].map(|path| path.to_str().unwrap());
    let ran = run([
        "eval",
        "image",
        "-q",
        "--json",
        "--device",
        "cpu",
        "--steps",
        "3",
        "--samples",
        "3",
        "--distances",
        "0",
        "--set",
        set,
        "--model",
        path,
        "--judge",
        judge,
    ]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let answer = ran.json();
    assert_eq!(answer["image_size"], json!([8, 8]));
    assert_eq!(answer["drawn"]["class"]["judged"], json!(6));
    assert_eq!(
        answer["neighbours"]["pixels"]["drawn"][0]["n"],
        json!(6),
        "{answer}"
    );

    // A codec of another model, or none.
    fs::rename(model.join("codec"), model.join("hidden")).unwrap();
    refused(&[], "codec/config.json: ");
}

#[test]
fn codecs_that_do_not_fit_are_refused_in_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepare(root);
    let short = ["train.max_steps=2", "train.validate_every=0"].map(str::to_owned);
    let codec = train(root, "codec", &short);
    assert_eq!(codec.code, 0, "{}", codec.stderr);
    let good = with_codec(&root.join("codec/model"));
    let pixels = train(
        root,
        "image",
        &["train.max_steps=2", "train.sample_every=0", "image.size=[8,12]"].map(str::to_owned),
    );
    assert_eq!(pixels.code, 0, "{}", pixels.stderr);
    let refused = |name: &str, more: &[&str], words: &str| {
        let more: Vec<String> = more.iter().map(|&value| value.to_owned()).collect();
        let ran = train(root, name, &more);
        assert!(ran.error().contains(words), "{words}: {}", ran.stderr);
    };
    let (absent, other) = (
        with_codec(&root.join("absent")),
        with_codec(&root.join("image/model")),
    );
    let again = "run_dir=\"again\"";
    refused("image", &[again, &absent], "absent/config.json: ");
    refused(
        "image",
        &[again, &other],
        "image/model/config.json: missing field `patch`, expected the shape of a codec of pictures",
    );
    refused(
        "image",
        &[again, &good, "image.size=[8,10]"],
        "size is [8, 10], expected multiples of 4, the patch of the codec",
    );
    refused(
        "image",
        &[again, &good, "image.channels=1"],
        "channels is 1, expected 3, those of the codec",
    );
    refused(
        "image",
        &[again, &good, "image.model.size=\"XXL\""],
        "size is \"XXL\", expected small (S), base (B), large (L) or extra-large (XL)",
    );
    refused(
        "codec",
        &[again, "picture-codec.size=[8,10]"],
        "size is [8, 10], expected multiples of the patch 4",
    );
    refused(
        "codec",
        &[again, "picture-codec.model.patch=6"],
        "expected multiples of the patch 6",
    );
    assert!(!Path::new("again").exists());
}
