use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use fulgur_datasets::media::{Picture, write_png};
use fulgur_datasets::things;
use fulgur_lightnet::params::Params;

use super::super::{TASKS, build};
use super::*;
use crate::train::{Batch, Cursor};

/// The smallest networks that the tasks allow.
const TINY: [(&str, &str); 7] = [
    (
        "video-codec",
        "batch = 2\n[video-codec.model]\nlatent_channels = 4\nencoder = [24, 1]\ndecoder = [24, 1]\nfine = [24, 1]",
    ),
    (
        "mel-codec",
        "batch = 3\n[mel-codec.model]\nlatent_channels = 4\nencoder = [16, 1]\ndecoder = [16, 1]",
    ),
    ("vocoder", "batch = 2\n[vocoder.model]\nstack = [16, 1]"),
    (
        "encoder",
        "batch = 3\n[encoder.model]\ndim = 32\ndepth = 1\nheads = 1\nembedding = 8",
    ),
    ("judge", "batch = 2\ndim = 64\ndepth = 1"),
    (
        "lra",
        "batch = 2\n[lra.model]\narchitecture = 'hgrn2'\nlayers = 2\nwidth = 16\nhidden = 16\nheads = 2",
    ),
    (
        "lra",
        "batch = 3\ntask = 'pathfinder'\nform = 'whole'\n[lra.model]\narchitecture = 'lightnet'\nlayers = 1\nwidth = 16\n\
         hidden = 16\nheads = 2",
    ),
];

fn recipe(task: &str, own: &str) -> Recipe {
    let text = format!("task = '{task}'\n[train]\nmax_steps = 1\n[{task}]\n{own}\n");
    Recipe::check(text.parse().unwrap(), "test.toml".into(), Path::new("runs/test")).unwrap()
}

fn shapes(params: &Params) -> BTreeMap<String, Vec<usize>> {
    let vars = params.vars().into_iter();
    vars.map(|(name, var)| (name, var.dims().to_vec())).collect()
}

fn bytes(batch: &Batch) -> u64 {
    let bytes = |tensor: &candle_core::Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
    batch.tensors.values().map(bytes).sum::<usize>() as u64
}

/// A folder of prepared things, and the line of a recipe that names it.
fn data() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    things::save(&Things::synthetic(4), &folder.path().join("stamps")).unwrap();
    let line = format!(
        "clips = {{ data = {:?}, film = 0.0, pictures = 0.0 }}\n",
        folder.path()
    );
    (folder, line)
}

#[test]
fn outlines_and_batches_are_those_of_the_tasks() {
    let (_folder, clips) = data();
    for (name, own) in TINY {
        let clips = if name == "lra" { "" } else { clips.as_str() };
        let recipe = recipe(name, &(clips.to_owned() + own));
        let needs = needs(&recipe).unwrap();
        let task = build(TASKS, &recipe, &Device::Cpu, &AtomicBool::new(false)).unwrap();
        assert_eq!(needs.params.shapes(), shapes(task.params()), "{name}");
        assert_eq!(needs.params.count(), task.params().count() as u64, "{name}");
        let batch = task.batch(&Cursor { seed: 1, index: 0 }).unwrap();
        match needs.batch {
            Some(found) => assert_eq!(found, bytes(&batch), "{name}"),
            None => assert_eq!(name, "judge"),
        }
    }
}

/// Of a codec of pictures, and of a denoiser of its latents.
#[test]
fn outlines_of_pictures_and_latents_are_those_of_the_tasks() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    for class in ["a", "b"] {
        std::fs::create_dir_all(root.join("set").join(class)).unwrap();
        for i in 0..9u8 {
            let picture = Picture::new(vec![20 * i; 8 * 8 * 3], 8, 8, 3).unwrap();
            write_png(&root.join("set").join(class).join(format!("{i}.png")), &picture).unwrap();
        }
    }
    let set = format!("set = {:?}\nsize = [8, 8]\n", root.join("set"));
    let image = format!(
        "{set}codec = {:?}\nbatch = 3\n[image.model]\nsize = 'S'\npatch = 1\nlayers = 2\nwidth = 16\nheads = 2\nhidden = 16",
        root.join("codec")
    );
    let image = recipe("image", &image);
    let missing = needs(&image).unwrap_err().to_string();
    assert!(
        missing.contains("codec/config.json: ") && missing.contains("are not known"),
        "{missing}"
    );
    let codec = "batch = 2\n[picture-codec.model]\nlatent_channels = 4\nencoder = [12, 1]\ndecoder = [12, 1]\nfine = [12, 1]";
    for recipe in [recipe("picture-codec", &(set + codec)), image] {
        let needs = needs(&recipe).unwrap();
        let task = build(TASKS, &recipe, &Device::Cpu, &AtomicBool::new(false)).unwrap();
        assert_eq!(needs.params.shapes(), shapes(task.params()), "{}", recipe.task);
        let batch = task.batch(&Cursor { seed: 1, index: 0 }).unwrap();
        // Ids stay on the host, where they are counted as a value a picture.
        let ids: u64 = batch.ids.values().map(|ids| WIDE * ids.list().len() as u64).sum();
        assert_eq!(needs.batch, Some(bytes(&batch) + ids), "{}", recipe.task);
        if recipe.task == "picture-codec" {
            std::fs::create_dir(root.join("codec")).unwrap();
            task.export(&root.join("codec")).unwrap();
        }
    }
}

#[test]
fn a_pool_is_counted_with_what_it_holds() {
    let (_folder, clips) = data();
    let own = clips + "pool = 5\n" + TINY[0].1;
    let recipe = recipe("video-codec", &own);
    let needs = needs(&recipe).unwrap();
    let task = build(TASKS, &recipe, &Device::Cpu, &AtomicBool::new(false)).unwrap();
    assert_eq!(needs.pool, Some(5 * 48 * 96 * 96 * 4));
    let batch = task.batch(&Cursor { seed: 1, index: 0 }).unwrap();
    assert_eq!(needs.batch, Some(bytes(&batch)));
}

/// The tasks that need other runs before they can be built: their networks alone.
#[test]
fn outlines_of_text_and_denoiser_are_those_of_their_networks() {
    let text = "[text.model]\nvocab_size = 300\nembedding_size = 8\nhidden_size = 16\nnum_hidden_layers = 1\n\
                num_attention_heads = 2\nhead_dim = 4\nintermediate_size = 16\nsentence_size = 8";
    let recipe_of_text = recipe("text", text);
    let params = Params::random(1, &Device::Cpu);
    let settings: text::Settings = recipe_of_text.own().unwrap();
    TextEncoder::new(&settings.model, &params.builder()).unwrap();
    assert_eq!(needs(&recipe_of_text).unwrap().params.shapes(), shapes(&params));

    let stream = "channels = 4\ndim = 24\nheads = 2\nhead_dim = 6\nhidden = 24";
    let tav = format!(
        "video_codec = 'none'\n[tav.model]\ndepth = 2\ntext_every = 2\nfusion = [1]\nfusion_heads = 2\ntext_dim = 16\n\
         contrast_dim = 8\n[tav.model.video]\n{stream}\n[tav.model.audio]\n{stream}"
    );
    let recipe_of_tav = recipe("tav", &tav);
    let params = Params::random(1, &Device::Cpu);
    let options: tav::Options = recipe_of_tav.own().unwrap();
    TwoStream::new(&options.model, true, DType::F32, &params.builder()).unwrap();
    let needs = needs(&recipe_of_tav).unwrap();
    assert_eq!(needs.params.shapes(), shapes(&params));
    assert_eq!((needs.pool, needs.batch, needs.unknown.len()), (None, None, 2));
    // Every part of a name that marks rounded matrices is one of this network's.
    for part in needs.rounded {
        assert!(shapes(&params).keys().any(|name| name.contains(part)), "{part}");
    }
}

#[test]
fn the_pool_of_latents_follows_the_codecs() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, config: String| {
        let dir = folder.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("config.json"), config).unwrap();
    };
    put(
        "video",
        serde_json::to_string(&VideoCodecConfig::default()).unwrap(),
    );
    put("mel", serde_json::to_string(&MelCodecConfig::default()).unwrap());
    let own = format!(
        "video_codec = {:?}\nmel_codec = {:?}\npool = 10\nvalidation = 3",
        folder.path().join("video"),
        folder.path().join("mel")
    );
    let needs = needs(&recipe("tav", &own)).unwrap();
    let (video, mel) = (VideoCodecConfig::default(), MelCodecConfig::default());
    let cells = (48 / video.patch[0]) * (96 / video.patch[1]) * (96 / video.patch[2]);
    let sound = (400 / mel.patch[0]) * (mel.bands / mel.patch[1]) * mel.latent_channels;
    let clip = cells * (video.latent_channels + 1) + sound;
    assert_eq!(needs.pool, Some((clip * (2 * 10 + 4 * 3)) as u64));
}

#[test]
fn what_a_task_refuses_is_refused() {
    let message = |task: &str, own: &str| needs(&recipe(task, own)).unwrap_err().to_string();
    for (task, own, words) in [
        ("video-codec", "batches = 3", "unknown field `batches`"),
        (
            "video-codec",
            "[video-codec.model]\npatch = [4, 7, 8]",
            "must be even",
        ),
        (
            "judge",
            "clips = { data = 'nowhere' }",
            "fulgur data fetch stamps",
        ),
        (
            "weaving",
            "",
            "a task `weaving` are not known, only those of text, ",
        ),
    ] {
        let message = message(task, own);
        assert!(
            message.contains(words) && message.contains("test.toml") && !message.contains('\n'),
            "{message}"
        );
    }
}
