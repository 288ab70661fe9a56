use std::collections::BTreeMap;
use std::fs;

use fulgur_datasets::media::Picture;
use fulgur_tavdiffusion::codec::VideoCodecConfig;

use super::*;
use crate::paint::Model;
use crate::train::{Options as RunOptions, Recipe, run};

/// Two classes of flat pictures, bright and dark, as files in folders.
fn folder(root: &Path) {
    for (name, level) in [("bright", 220u8), ("dark", 30)] {
        fs::create_dir_all(root.join(name)).unwrap();
        for i in 0..24u8 {
            let picture = Picture::new(vec![level + i % 5; 9 * 9 * 3], 9, 9, 3).unwrap();
            write_png(&root.join(name).join(format!("{i}.png")), &picture).unwrap();
        }
    }
}

fn recipe(own: &str, root: &Path) -> Recipe {
    let text = format!(
        "task = 'image'\n[train]\nmax_steps = 260\nema = 0.0\ncheckpoint_seconds = 1e9\n[optimiser]\nlr = 5e-3\n[schedule]\n\
         warmup = 20\n[image]\nset = '{}'\n{own}\n",
        root.join("set").display()
    );
    Recipe::check(text.parse().unwrap(), "test".into(), &root.join("run")).unwrap()
}

const SMALL: &str = "size = [8, 8]\nchannels = 1\nbatch = 16\nsample_steps = 4\n[image.model]\npatch = 4\nlayers = 1\nwidth = 16\n\
                     heads = 2\nhidden = 16";

#[test]
fn classes_are_learnt_and_the_exported_model_draws_them() {
    let root = tempfile::tempdir().unwrap();
    folder(&root.path().join("set"));
    let recipe = recipe(SMALL, root.path());
    let task = ImageTask::open(recipe.own().unwrap(), 1, &Device::Cpu, &AtomicBool::new(false)).unwrap();
    assert_eq!(task.trained.len() + task.held_out.len(), 48);
    let before = task.validate().unwrap();
    run(&task, &recipe, &RunOptions::default(), |_| {}).unwrap();
    let after = task.validate().unwrap();
    assert!(after[0].1 < 0.5 * before[0].1, "{before:?} {after:?}");
    let model = Model::load(&recipe.run_dir.join("model"), &Device::Cpu).unwrap();
    let class = |name: &str| Wish {
        class: Some(model.class(name).unwrap()),
        ..Wish::default()
    };
    let settings = Settings {
        steps: 12,
        guidance: 1.5,
        shift: 1.0,
        seed: 1,
        size: [8, 8],
    };
    let wishes = [class("bright"), class("dark")];
    let drawn = model.painter().paint(&wishes, &settings, None, &mut |_| true);
    let levels: Vec<f64> = drawn
        .unwrap()
        .unwrap()
        .iter()
        .map(|picture| {
            let sum: f64 = picture.pixels.iter().map(|&byte| f64::from(byte)).sum();
            sum / picture.pixels.len() as f64
        })
        .collect();
    assert!(levels[0] > levels[1] + 90.0, "{levels:?}");
    let shown = task.sample(root.path(), 7).unwrap();
    assert!(shown[0].ends_with("pictures-000007.png") && shown[0].exists());
}

#[test]
fn batches_are_functions_of_their_number() {
    let root = tempfile::tempdir().unwrap();
    folder(&root.path().join("set"));
    let recipe = recipe(&format!("flip = true\ndropout = 0.5\n{SMALL}"), root.path());
    let task = ImageTask::open(recipe.own().unwrap(), 1, &Device::Cpu, &AtomicBool::new(false)).unwrap();
    let batch = |index| task.batch(&Cursor { seed: 3, index }).unwrap();
    let values = |batch: &Batch, name: &str| -> Vec<f32> {
        let tensor = batch.get(name).unwrap();
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    };
    for name in ["clean", "noise", "time"] {
        assert_eq!(values(&batch(1), name), values(&batch(1), name));
    }
    assert_ne!(values(&batch(1), "noise"), values(&batch(0), "noise"));
    let ids: Vec<u32> = (0..8)
        .flat_map(|i| batch(i).ids("classes").unwrap().list().to_vec())
        .collect();
    let open = ids.iter().filter(|&&id| id == 2).count();
    assert!((40..90).contains(&open), "{open} of {} left open", ids.len());
}

#[test]
fn what_does_not_fit_is_refused() {
    let root = tempfile::tempdir().unwrap();
    folder(&root.path().join("set"));
    for (own, words) in [
        ("batch = 0", "batch is 0, expected 1 to"),
        ("dropout = 1.0", "dropout is 1, expected 0 or more and below 1"),
        ("channels = 2", "channels is 2, expected 1 or 3"),
        ("size = [8, 9]\n[image.model]\npatch = 4", "image_size is [8, 9]"),
        ("text = 'nowhere'", "nowhere"),
        ("codec = 'nowhere'", "[image]: codec: nowhere/config.json: "),
        (
            "[image.model]\nsize = 'tiny'",
            "[image.model]: size is \"tiny\", expected small (S)",
        ),
    ] {
        let recipe = recipe(own, root.path());
        let line = match ImageTask::open(recipe.own().unwrap(), 1, &Device::Cpu, &AtomicBool::new(false)) {
            Ok(_) => panic!("{own}"),
            Err(error) => error.to_string(),
        };
        assert!(line.contains(words), "{own}: {line}");
    }
}

/// A codec of pictures with random weights, 4 times smaller in height and width.
fn codec(dir: &Path) -> PictureCodec {
    let config = VideoCodecConfig {
        patch: [1, 4, 4],
        latent_channels: 3,
        encoder: [12, 1],
        decoder: [12, 1],
        fine: [12, 1],
    };
    let params = Params::random(6, &Device::Cpu);
    PictureCodec::new(&config, &params.builder()).unwrap();
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), serde_json::to_string(&config).unwrap()).unwrap();
    let weights = dir.join("model.safetensors");
    params.save(&weights, &BTreeMap::new(), Precision::F32).unwrap();
    PictureCodec::load(dir, &Device::Cpu).unwrap()
}

fn in_latents(root: &Path, more: &str) -> String {
    let codec = root.join("codec");
    format!("codec = '{}'\n{more}\n{LATENT}", codec.display())
}

const LATENT: &str = "size = [8, 8]\nbatch = 16\nsample_steps = 4\n[image.model]\npatch = 1\nlayers = 1\nwidth = 16\nheads = 2\nhidden = 16";

/// What is denoised are the codec's latents of the pictures as they are, or of their mirror images.
#[test]
fn latents_are_those_of_the_codec() {
    let root = tempfile::tempdir().unwrap();
    // Dark on the left, bright on the right, each picture by another step.
    fs::create_dir_all(root.path().join("set/a")).unwrap();
    for i in 0..12u8 {
        let pixels = (0..64)
            .flat_map(|place| [(place % 8 * 20) as u8 + i; 3])
            .collect();
        let picture = Picture::new(pixels, 8, 8, 3).unwrap();
        write_png(&root.path().join(format!("set/a/{i}.png")), &picture).unwrap();
    }
    let codec = codec(&root.path().join("codec"));
    let own = in_latents(root.path(), "flip = true\nclasses = false");
    let recipe = recipe(&own, root.path());
    let task = ImageTask::open(recipe.own().unwrap(), 1, &Device::Cpu, &AtomicBool::new(false)).unwrap();
    let pixels = |i: usize, mirrored: bool| -> Vec<f32> {
        let columns = (0..64).map(|place| if mirrored { 7 - place % 8 } else { place % 8 });
        let level = |column: usize| (column * 20 + i) as f32 / 127.5 - 1.0;
        columns.flat_map(|column| [level(column); 3]).collect()
    };
    let encoded = |values: Vec<f32>| -> Vec<f32> {
        let x = Tensor::from_vec(values, (1, 8, 8, 3), &Device::Cpu).unwrap();
        codec
            .encode(&x)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap()
    };
    let all: Vec<[Vec<f32>; 2]> = (0..12)
        .map(|i| [false, true].map(|mirrored| encoded(pixels(i, mirrored))))
        .collect();
    let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
    let mut seen = [0; 2];
    for index in 0..4 {
        let batch = task.batch(&Cursor { seed: 1, index }).unwrap();
        let clean = batch.get("clean").unwrap();
        assert_eq!(clean.dims(), [16, 2, 2, 3]);
        let values: Vec<f32> = clean.flatten_all().unwrap().to_vec1().unwrap();
        for own in values.chunks(12) {
            let of: Vec<bool> = (all.iter())
                .filter_map(|[plain, turned]| match () {
                    () if near(own, plain) => Some(false),
                    () if near(own, turned) => Some(true),
                    () => None,
                })
                .collect();
            assert_eq!(of.len(), 1, "{own:?}");
            seen[usize::from(of[0])] += 1;
        }
    }
    assert!(seen.iter().all(|&count| count > 15), "{seen:?}");
}

/// The written model draws pictures of the size that was asked for, and starts from pictures, through the codec that it brings along.
#[test]
fn a_model_of_latents_brings_its_codec() {
    let root = tempfile::tempdir().unwrap();
    folder(&root.path().join("set"));
    codec(&root.path().join("codec"));
    let recipe = recipe(
        &in_latents(root.path(), "").replace("layers = 1", "size = 'S'\nlayers = 1"),
        root.path(),
    );
    let open = |stop: bool| ImageTask::open(recipe.own().unwrap(), 1, &Device::Cpu, &AtomicBool::new(stop));
    let stopped = open(true).err().unwrap().to_string();
    assert_eq!(stopped, "stopped while encoding pictures; nothing was written");
    let task = open(false).unwrap();
    let dir = root.path().join("model");
    fs::create_dir(&dir).unwrap();
    task.export(&dir).unwrap();
    let model = Model::load(&dir, &Device::Cpu).unwrap();
    let painter = model.painter();
    assert_eq!(
        (painter.size(), painter.step(), painter.channels()),
        ([8, 8], 4, 3)
    );
    let settings = Settings {
        steps: 2,
        guidance: 1.0,
        shift: 1.0,
        seed: 1,
        size: [8, 12],
    };
    let picture = Picture::new(vec![200; 8 * 12 * 3], 12, 8, 3).unwrap();
    let start = crate::paint::Start {
        picture,
        strength: 0.5,
    };
    for start in [None, Some(&start)] {
        let wish = [Wish::default()];
        let drawn = painter
            .paint(&wish, &settings, start, &mut |_| true)
            .unwrap()
            .unwrap();
        assert_eq!((drawn[0].width, drawn[0].height), (12, 8));
    }
    let shown = task.sample(root.path(), 7).unwrap();
    assert!(shown[0].exists());

    let refused = |words: &str| {
        let line = Model::load(&dir, &Device::Cpu).unwrap_err().to_string();
        assert!(line.contains(words) && !line.contains('\n'), "{line}");
    };
    let path = dir.join("codec/config.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(dir.join("config.json"), {
        let own = fs::read_to_string(dir.join("config.json")).unwrap();
        assert!(own.contains("\"codec_factor\": 4"));
        own.replace("\"codec_factor\": 4", "\"codec_factor\": 8")
    })
    .unwrap();
    refused("codec/config.json: patch is 4, expected 8, the codec_factor of the model");
    fs::write(
        &path,
        text.replace("\"latent_channels\":3", "\"latent_channels\":5"),
    )
    .unwrap();
    refused("5");
    fs::write(&path, "{\"model_type\": \"vision_classifier\"}").unwrap();
    refused("codec/config.json: missing field `patch`");
    fs::remove_dir_all(dir.join("codec")).unwrap();
    refused("codec/config.json: ");
}
