//! The task `image` and `fulgur image generate`, from pictures in folders to pictures in a grid.

use std::fs;
use std::path::Path;

use fulgur::datasets::media::{Picture, read_picture, write_png};
use serde_json::json;

use crate::support::{Ran, run};

/// Bright and dark pictures in folders of these names, and a recipe for them.
fn prepare(root: &Path) {
    for (name, level) in [("bright", 210u8), ("dark", 40)] {
        let folder = root.join("set").join(name);
        fs::create_dir_all(&folder).unwrap();
        for i in 0..20u8 {
            let picture = Picture::new(vec![level + i; 12 * 8 * 3], 12, 8, 3).unwrap();
            write_png(&folder.join(format!("{i}.png")), &picture).unwrap();
        }
        // What is no picture is passed over.
        fs::write(folder.join("notes.txt"), "nothing to see").unwrap();
    }
    let recipe = format!(
        "task = 'image'\nrun_dir = '{}'\nseed = 1\n[train]\nmax_steps = 200\nsample_every = 100\nema = 0.0\n[optimiser]\nlr = 5e-3\n\
         [schedule]\nwarmup = 20\n[image]\nset = '{}'\nsize = [8, 8]\nbatch = 16\nsample_steps = 4\n[image.model]\npatch = 4\n\
         layers = 1\nwidth = 16\nheads = 2\nhidden = 16\n",
        root.join("run").display(),
        root.join("set").display()
    );
    fs::write(root.join("recipe.toml"), recipe).unwrap();
}

fn train(root: &Path) -> Ran {
    let recipe = root.join("recipe.toml");
    run([
        "train",
        recipe.to_str().unwrap(),
        "--device",
        "cpu",
        "-q",
        "--json",
    ])
}

fn generate(root: &Path, out: &str, more: &[&str]) -> Ran {
    let (model, out) = (root.join("run/model"), root.join(out));
    let own = [
        "image",
        "generate",
        "--device",
        "cpu",
        "-q",
        "--json",
        "--steps",
        "8",
        "--model",
        model.to_str().unwrap(),
        "-o",
        out.to_str().unwrap(),
    ];
    run([&own[..], more].concat())
}

fn mean(picture: &Picture) -> f64 {
    let sum: f64 = picture.pixels.iter().map(|&byte| f64::from(byte)).sum();
    sum / picture.pixels.len() as f64
}

#[test]
fn pictures_go_from_folders_to_a_grid() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepare(root);
    let trained = train(root);
    assert_eq!(trained.code, 0, "{}", trained.stderr);
    let samples = fs::read_dir(root.join("run/samples")).unwrap().count();
    assert!(samples >= 1);

    let ran = generate(
        root,
        "grid.png",
        &["--class", "bright", "--class", "dark", "--grid", "2x2"],
    );
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let answer = ran.json();
    assert_eq!(
        (&answer["pictures"], &answer["size"], &answer["seed"]),
        (&json!(4), &json!([8, 8]), &json!(0))
    );
    let grid = read_picture(&root.join("grid.png")).unwrap();
    assert_eq!((grid.width, grid.height), (18, 18));

    // Packed, it draws nearly the same; without a text there is no encoder to look for.
    let packed = root.join("packed");
    let pack = |more: &[&str]| {
        let source = root.join("run");
        let fixed = [
            "pack",
            "--json",
            "--network",
            source.to_str().unwrap(),
            "-o",
            packed.to_str().unwrap(),
        ];
        run([&fixed[..], more].concat())
    };
    let report = pack(&["--precision", "6bit"]);
    assert_eq!(report.code, 0, "{}", report.stderr);
    let report = report.json();
    assert_eq!(
        (&report["kind"], &report["precision"], &report["parts"][0]["name"]),
        (&json!("picture-generator"), &json!("6bit"), &json!("denoiser"))
    );
    let exact = fs::metadata(root.join("run/model/model.safetensors"))
        .unwrap()
        .len();
    assert!(report["bytes"].as_u64() < Some(exact));
    assert!(pack(&[]).error().contains("--force"));
    let refused = pack(&["--force", "--text", "../encoder"]);
    assert!(refused.error().contains("reads no texts"), "{}", refused.stderr);

    // A class draws what it learnt, by name or by number, at other sizes too.
    let one = |out: &str, more: &[&str]| {
        let ran = generate(root, out, more);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        read_picture(&root.join(out)).unwrap()
    };
    let bright = one("a.png", &["--class", "bright"]);
    assert_eq!(bright, one("b.png", &["--class", "0"]));
    assert_ne!(bright, one("c.png", &["--class", "0", "--seed", "1"]));
    fs::rename(root.join("run/model"), root.join("exact")).unwrap();
    fs::rename(&packed, root.join("run/model")).unwrap();
    let small = one("packed.png", &["--class", "bright"]);
    assert!(
        (mean(&small) - mean(&bright)).abs() < 8.0,
        "{} {}",
        mean(&small),
        mean(&bright)
    );
    let dark = one("d.png", &["--class", "dark", "--size", "16x8"]);
    assert_eq!((dark.width, dark.height), (16, 8));
    assert!(
        mean(&bright) > mean(&dark) + 60.0,
        "{} {}",
        mean(&bright),
        mean(&dark)
    );

    // A little of a picture changes a little.
    let init = root.join("set/bright/3.png");
    let near = one(
        "e.png",
        &[
            "--class",
            "dark",
            "--init-image",
            init.to_str().unwrap(),
            "--strength",
            "0.2",
        ],
    );
    assert!(mean(&near) > mean(&dark) + 40.0, "{}", mean(&near));

    let out = root.join("refused.png");
    for (more, words) in [
        (
            &["--class", "grey"][..],
            "class: found \"grey\", expected 0 to 1 or one of bright, dark",
        ),
        (&["--class", "2"], "class: found \"2\""),
        (
            &["--prompt", "a bell"],
            "prompt: found a text, but the model reads none",
        ),
        (&["--grid", "0x3"], "--grid \"0x3\": expected two numbers above 0"),
        (
            &["--grid", "100x100"],
            "--grid: found 10000 pictures, expected at most 4096",
        ),
        (&["--size", "9x8"], "size is 9x8, expected multiples of 4"),
        (&["--guidance", "nan"], "guidance is NaN, expected 0 or more"),
        (&["--shift=-1"], "shift is -1, expected 0 or more"),
    ] {
        let ran = generate(root, "refused.png", more);
        assert!(ran.error().contains(words), "{words}: {}", ran.stderr);
        assert!(!out.exists());
    }
    let text = root.join("set/dark/notes.txt");
    let ran = generate(root, "refused.png", &["--init-image", text.to_str().unwrap()]);
    assert!(ran.error().contains("notes.txt: "), "{}", ran.stderr);
    fs::write(root.join("run/model/config.json"), "{\"colour\": 3}").unwrap();
    assert!(
        generate(root, "refused.png", &[])
            .error()
            .contains("config.json: ")
    );
}
