//! The task `tav-published` on tiny networks: from composed clips and from a manifest, fresh and from a folder, up to clips that the trained
//! folder makes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Device, Tensor};
use fulgur::datasets::media::{ReadOptions, Sound, Video, WriteOptions, read_clip, write_mp4};
use fulgur::kernels::philox::Philox;
use fulgur::lightnet::params::file;
use fulgur::train::{self, Options, Recipe, Report, tasks};
use serde_json::Value;

use crate::support::{Ran, run};
use crate::tiny;

const THINGS: usize = 5;
/// 1 s of 32x32 pixels is 3 frames of 4x4 latents, and 32 steps of a sound.
const RECIPE: &str = "task = 'tav-published'\nseed = 2\n[train]\nmax_steps = 60\nvalidate_at = [1]\nlog_every = 1\nema = 0.0\n\
    [optimiser]\nlr = 4e-3\n[schedule]\nwarmup = 2\n[tav-published]\nframes = 12\nwidth = 32\nheight = 32\nbatch = 4\npool = 6\n\
    validation = 4\nsamples = 1\nsample_steps = 2\n[tav-published.unet]\nfuse = 'both'\n[tav-published.unet.video]\n\
    block_out_channels = [8, 16]\nnorm_num_groups = 4\nlayers_per_block = 1\nattention_head_dim = 2\n\
    down_block_types = ['CrossAttnDownBlock2D', 'DownBlock2D']\nup_block_types = ['UpBlock2D', 'CrossAttnUpBlock2D']\n\
    [tav-published.unet.motion]\nblock_out_channels = [8, 16]\nmotion_layers_per_block = 1\nmotion_norm_num_groups = 4\n\
    motion_num_attention_heads = 2\nmotion_max_seq_length = 4\nuse_motion_mid_block = false\n[tav-published.unet.audio]\n\
    block_out_channels = [8, 16]\nnorm_num_groups = 4\nlayers_per_block = 1\nattention_head_dim = 2\n\
    down_block_types = ['CrossAttnDownBlock2D', 'DownBlock2D']\nup_block_types = ['UpBlock2D', 'CrossAttnUpBlock2D']\n";

/// A recipe with the folders that it needs.
struct Setup {
    root: tempfile::TempDir,
    recipe: PathBuf,
    sets: Vec<String>,
}

impl Setup {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let path = root.path();
        let codecs = tiny::generator(path);
        tiny::mel_codec(&codecs, true);
        let data = tiny::data(path, THINGS);
        let recipe = path.join("tiny.toml");
        fs::write(&recipe, RECIPE).unwrap();
        let sets = vec![
            format!("run_dir={:?}", path.join("run")),
            format!("tav-published.codecs={codecs:?}"),
            format!("tav-published.clips={{data={data:?},pictures=0.0,film=0.0}}"),
        ];
        Self { root, recipe, sets }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn train(&self, more: &[String]) -> Ran {
        let fixed = ["train", "--device", "cpu", "-q", "--json"].map(str::to_owned);
        let recipe = self.recipe.display().to_string();
        let sets = self.sets.iter().chain(more);
        let sets = sets.flat_map(|value| ["--set".to_owned(), value.clone()]);
        run(fixed.into_iter().chain([recipe]).chain(sets))
    }

    /// The recipe by the library, with a run folder of its own.
    fn recipe(&self, name: &str, steps: usize) -> Recipe {
        let mut sets = self.sets.clone();
        sets.push(format!("run_dir={:?}", self.path(name)));
        sets.push(format!("train.max_steps={steps}"));
        Recipe::load(&self.recipe, &sets).unwrap()
    }
}

fn generate(model: &Path, out: &Path, more: &[&str]) -> Value {
    let own = [
        "generate",
        "a dog barks",
        "--device",
        "cpu",
        "-q",
        "--json",
        "--model",
    ];
    let [model, out] = [model, out].map(|path| path.to_str().unwrap());
    let ran = run([&own[..], &[model, "-o", out], more].concat());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    ran.json()
}

fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
    file::read(path, &Device::Cpu).unwrap().tensors
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The figure `name` of all lines of a run's log that have it.
fn figures(run: &Path, name: &str) -> Vec<f64> {
    let log = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = log
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter_map(|line| line[name].as_f64()).collect()
}

#[test]
fn a_fresh_network_learns_and_its_folder_makes_clips() {
    let setup = Setup::new();
    let ran = setup.train(&[]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    // The same noise, texts and steps of the schedule each time.
    let losses = figures(&setup.path("run"), "validation/loss");
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    assert!(losses.len() >= 2 && last < 0.9 * first, "{losses:?}");
    let samples = fs::read_dir(setup.path("run/samples/step-0000000060")).unwrap();
    let names: Vec<String> = samples
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(
        names.iter().all(|name| name.ends_with(".png")) && names.len() == 2,
        "{names:?}"
    );

    // What was told of its size before there was one.
    let recipe = setup.recipe.display().to_string();
    let fixed = ["estimate", "--json", &recipe].map(str::to_owned);
    let sets = setup
        .sets
        .iter()
        .flat_map(|value| ["--set".to_owned(), value.clone()]);
    let told = run(fixed.into_iter().chain(sets)).json();
    let model = setup.path("run/model");
    let weights = tensors(&model.join("unet/model.safetensors"));
    let count: usize = weights.values().map(Tensor::elem_count).sum();
    assert_eq!(told["parameters"], count);

    let clip = setup.path("clip.mp4");
    let report = generate(&model, &clip, &["--seed", "3"]);
    assert_eq!((&report["frames"], &report["fps"]), (&12.into(), &12.0.into()));
    assert_eq!(
        (&report["width"], &report["sample_rate"]),
        (&32.into(), &16_000.into())
    );
    assert_eq!((&report["steps"], &report["solver"]), (&2.into(), &"ddim".into()));
    let read = read_clip(&clip, &ReadOptions::default()).unwrap();
    let (video, sound) = (read.video.unwrap(), read.sound.unwrap());
    assert_eq!((video.frame_count, video.width, video.height), (12, 32, 32));
    assert!((video.duration_s() - sound.duration_s()).abs() < 1e-3);
    // 14 frames are four of the codec's, of which two frames are not shown; 32 are out of windows.
    let report = generate(&model, &clip, &["--duration", "1.1667"]);
    assert_eq!(report["frames"], 14);
    let report = generate(&model, &clip, &["--duration", "2.6667", "--window", "16"]);
    assert_eq!(report["frames"], 32);
    let own = [
        "generate",
        "a dog barks",
        "--device",
        "cpu",
        "-q",
        "--vae-tile",
        "32",
        "--model",
    ];
    let out = setup.path("tiles.mp4");
    let ran = run([&own[..], &[model.to_str().unwrap(), "-o", out.to_str().unwrap()]].concat());
    assert!(
        ran.error().contains("vae-tile: found 32, expected none"),
        "{}",
        ran.stderr
    );

    // Judges take the folder, and say what they found in each clip.
    let [judges, encoder] = [
        tiny::judges(setup.root.path(), THINGS),
        tiny::encoder(setup.root.path()),
    ];
    let rows = setup.path("clips.jsonl");
    let fixed = [
        "eval",
        "tav",
        "--json",
        "--device",
        "cpu",
        "-q",
        "--prompts",
        "3",
        "--steps",
        "1",
    ];
    let folders = [
        ("--model", &model),
        ("--judges", &judges),
        ("--encoder", &encoder),
        ("--data", &setup.path("data")),
        ("--clips", &rows),
    ];
    let folders = folders.map(|(flag, path)| [flag.to_owned(), path.display().to_string()]);
    let ran = run(fixed
        .map(str::to_owned)
        .into_iter()
        .chain(folders.into_iter().flatten()));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let answer = ran.json();
    let rows = fs::read_to_string(&rows).unwrap();
    let rows: Vec<Value> = rows
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!((rows.len(), &answer["n"]), (3, &3.into()));
    let hits = rows.iter().filter(|row| row["sound"] == true).count() as f64;
    assert_eq!(answer["generated"]["sound"], hits / 3.0);
    // Alone a clip is what it is among others.
    let prompt = rows[1]["prompt"].as_str().unwrap();
    let settings = ["--seed", "1", "--steps", "1", "--size", "48x48"];
    let own = [
        "generate",
        prompt,
        "--device",
        "cpu",
        "-q",
        "--json",
        "--model",
        model.to_str().unwrap(),
        "-o",
    ];
    let ran = run([&own[..], &[clip.to_str().unwrap()], &settings].concat());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
}

/// A run that was stopped and resumed has the bits of one that was not.
#[test]
fn a_resumed_run_is_the_uninterrupted_one() {
    let setup = Setup::new();
    let finish = |name: &str, stop_at: Option<u64>| {
        let recipe = setup.recipe(name, 6);
        let task = tasks::build(tasks::TASKS, &recipe, &Device::Cpu, &AtomicBool::new(false)).unwrap();
        let mut resume = false;
        if let Some(stop_at) = stop_at {
            let interrupt = Arc::new(AtomicBool::new(false));
            let options = Options {
                interrupt: Arc::clone(&interrupt),
                ..Options::default()
            };
            let outcome = train::run(&*task, &recipe, &options, |report| {
                if let Report::Progress { step, .. } = report
                    && step >= stop_at
                {
                    interrupt.store(true, Ordering::SeqCst);
                }
            });
            assert_eq!(outcome.unwrap().step, stop_at);
            resume = true;
        }
        // Another task, as another process would have.
        let task = tasks::build(tasks::TASKS, &recipe, &Device::Cpu, &AtomicBool::new(false)).unwrap();
        let options = Options {
            resume,
            ..Options::default()
        };
        let outcome = train::run(&*task, &recipe, &options, |_| {}).unwrap();
        assert!(outcome.finished && outcome.step == 6);
        tensors(&setup.path(name).join("model/unet/model.safetensors"))
    };
    let (whole, resumed) = (finish("whole", None), finish("resumed", Some(3)));
    assert_eq!(whole.len(), resumed.len());
    for (name, tensor) in &whole {
        assert_eq!(values(tensor), values(&resumed[name]), "{name}");
    }
}

/// Clips with noise for pictures and tones for sounds.
fn filmed(folder: &Path, count: usize) {
    fs::create_dir_all(folder).unwrap();
    let mut lines = String::new();
    for clip in 0..count {
        let mut noise = Philox::new(7, clip as u64);
        let pixels: Vec<u8> = (0..8 * 48 * 64 * 3).map(|_| noise.below(256) as u8).collect();
        let video = Video::new(pixels, 64, 48, 4.0).unwrap();
        let tone = |i: usize| (0.05 * (clip + 1) as f32 * i as f32).sin() * 0.4;
        let sound = Sound::new((0..32_000).map(tone).collect(), 1, 16_000).unwrap();
        let sound = (clip != 1).then_some(&sound);
        write_mp4(
            &folder.join(format!("c{clip}.mp4")),
            &video,
            sound,
            &WriteOptions::default(),
        )
        .unwrap();
        lines += &format!("{{\"id\": \"c{clip}\", \"caption\": \"thing {clip} sounds\"}}\n");
    }
    fs::write(folder.join("clips.jsonl"), lines).unwrap();
}

/// Parts of a published generator learn from a manifest, and the others stay as they are.
#[test]
fn a_folder_goes_on_from_a_manifest() {
    let setup = Setup::new();
    let start = setup.path("start");
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tavdiffusion-tiny.json");
    let arguments = [
        "init",
        "--random",
        "1",
        "-o",
        start.to_str().unwrap(),
        config.to_str().unwrap(),
    ];
    let ran = run(arguments);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    filmed(&setup.path("film"), 6);
    let recipe = "task = 'tav-published'\n[train]\nmax_steps = 2\nema = 0.0\n[schedule]\nwarmup = 0\n[tav-published]\nframes = 6\n\
                  fps = 4.0\nwidth = 32\nheight = 24\nbatch = 2\npool = 4\nvalidation = 1\nsamples = 0\nrecompute = true\n\
                  contrast = 'wti'\ntrained = ['fusion', 'motion', 'alignment']\n";
    let path = setup.path("manifest.toml");
    fs::write(&path, recipe).unwrap();
    let train = |more: &[String]| {
        let own = [
            format!("run_dir={:?}", setup.path("go")),
            format!("tav-published.start={start:?}"),
            format!("tav-published.manifest={:?}", setup.path("film/clips.jsonl")),
        ];
        let fixed = ["train", "--device", "cpu", "--json", path.to_str().unwrap()];
        let sets = own.iter().chain(more).flat_map(|value| ["--set", value]);
        run(fixed.into_iter().chain(sets))
    };
    let ran = train(&[]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stderr.contains("1 no sound"), "{}", ran.stderr);
    assert!(
        figures(&setup.path("go"), "aligned")
            .iter()
            .all(|loss| *loss > 0.0)
    );
    let (before, after) = (
        tensors(&start.join("unet/model.safetensors")),
        tensors(&setup.path("go/model/unet/model.safetensors")),
    );
    let mut moved = 0;
    for (name, tensor) in &before {
        let is_trained = name.contains(".motion_modules.") || name.starts_with("cross_attn.");
        let same = values(tensor) == values(&after[name]);
        assert!(same || is_trained, "{name}");
        moved += usize::from(!same);
    }
    assert!(moved > 10, "{moved}");
    assert!(
        after.keys().any(|name| name.starts_with("linear_a.")) && !before.contains_key("linear_a.weight")
    );
    let report = generate(
        &setup.path("go/model"),
        &setup.path("clip.mp4"),
        &["--steps", "2"],
    );
    assert_eq!((&report["frames"], &report["height"]), (&6.into(), &24.into()));
    // Also where the folder names places instead of holding copies.
    let ran = train(&[
        format!("run_dir={:?}", setup.path("named")),
        "tav-published.copy_codecs=false".to_owned(),
    ]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(!setup.path("named/model/vae").exists());
    let again = generate(
        &setup.path("named/model"),
        &setup.path("named.mp4"),
        &["--steps", "2"],
    );
    assert_eq!(again["frames"], 6);

    fs::remove_file(setup.path("film/c2.mp4")).unwrap();
    let ran = train(&[format!("run_dir={:?}", setup.path("gone"))]);
    let line = ran.error();
    assert!(
        line.contains("clips.jsonl: clip \"c2\": there is no ") && line.contains("c2.mp4"),
        "{line}"
    );
}

#[test]
fn what_cannot_be_trained_is_one_line() {
    let setup = Setup::new();
    let builtin = setup.path("builtin");
    for (set, words) in [
        (
            "tav-published.trained=['eyes']".to_owned(),
            "unknown variant `eyes`, expected one of `video`, `motion`, `audio`, `fusion`, `alignment`",
        ),
        (
            "tav-published.trained=['fusion']".to_owned(),
            "trained is without video, expected all parts, or start with a folder",
        ),
        (
            format!("tav-published.start={builtin:?}"),
            "_class_name: found \"FulgurTwoStream\", expected a name that ends with Pipeline",
        ),
        (
            format!("tav-published.codecs={:?}", setup.path("data")),
            "model_index.json: No such file",
        ),
        (
            "tav-published.frames=13".to_owned(),
            "frames: found 13, expected a multiple of 4",
        ),
        (
            "tav-published.frames=48".to_owned(),
            "frames is 48, expected at most 16: unet.motion.motion_max_seq_length is 4, of 4 frames each",
        ),
        (
            "tav-published.unet.video.in_channels=9".to_owned(),
            "unet.video.in_channels is 9, expected 4 as the codec has",
        ),
        (
            "tav-published.unet.audio.attention_head_dim=0".to_owned(),
            "unet: attention_head_dim (the number of heads) is 0",
        ),
        (
            "tav-published.unet.fuse='sideways'".to_owned(),
            "unet: unknown variant `sideways`",
        ),
        (
            "tav-published.contrast_weight=nan".to_owned(),
            "contrast_weight is NaN, expected 0 to 1000000",
        ),
        ("tav-published.batch=0".to_owned(), "batch is 0, expected 1 to"),
        (
            format!("tav-published.manifest={:?}", setup.path("none.jsonl")),
            "none.jsonl",
        ),
    ] {
        let ran = setup.train(std::slice::from_ref(&set));
        let line = ran.error();
        assert!(line.contains(words), "{set}: {line}");
    }
    // A codec without its encoder makes no latents.
    tiny::mel_codec(&builtin, false);
    let ran = setup.train(&[]);
    let line = ran.error();
    assert!(
        line.contains("mel_codec: found no encoder, expected one for training"),
        "{line}"
    );
}
