//! Published networks through `fulgur forward`, against what diffusers and transformers give for the same weights.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use fulgur::lightnet::params::{Outline, Precision, file};
use fulgur::lightnet::testing::{digest, drawn_file, golden, plainly, unit};
use fulgur::tavdiffusion::published::{AutoencoderKl, Half, HifiGan, TavUnet, Unet};
use serde_json::Value;

use crate::support::{Ran, fulgur};

type Tensors = BTreeMap<String, Tensor>;

const CPU: &Device = &Device::Cpu;
/// Largest relative difference, in root mean square.
const CLOSE: f32 = 2e-5;

/// One file of `golden/published`, which `golden/published.py` wrote, and the tensors that both sides draw.
struct Golden {
    name: &'static str,
    weights: Tensors,
    inputs: Tensors,
    outputs: Tensors,
    config: Value,
    pair: Value,
    /// Of the names and shapes of the weights.
    digest: String,
}

impl Golden {
    fn read(name: &'static str) -> Self {
        let contents = file::read(&golden(&format!("published/{name}.safetensors")), CPU).unwrap();
        let mut text: Value = serde_json::from_str(&contents.metadata["golden"]).unwrap();
        let input = |(key, how): (&String, &Value)| {
            let numbers: Vec<i64> = serde_json::from_value(how.clone()).unwrap();
            let tensor = match key.as_str() {
                "timestep" => Tensor::new(numbers, CPU).unwrap(),
                _ => {
                    let shape: Vec<usize> = numbers.into_iter().map(|n| n as usize).collect();
                    unit(&format!("{name}.{key}"), &shape)
                }
            };
            (key.clone(), tensor)
        };
        let inputs = text["inputs"].as_object().unwrap().iter().map(input).collect();
        let mut shapes = shapes_of(&text["config"]);
        if text["tables"].as_bool().unwrap() {
            shapes.extend(tables_of(&text["config"], &shapes));
        }
        let mut found = Self {
            name,
            weights: plainly(&shapes),
            inputs,
            outputs: contents.tensors,
            config: text["config"].take(),
            pair: text["pair"].take(),
            digest: text["digest"].as_str().unwrap().to_owned(),
        };
        if golden(&format!("published/{name}.drawn.json")).exists() {
            found.weights = drawn_file(&golden(&format!("published/{name}.drawn.json")));
        } else if name == "vocoder_parts" {
            found.weights = plainly(&in_parts(&shapes));
        }
        assert_eq!(found.digest, digest(&shapes_in(&found.weights)), "{name}");
        found
    }

    /// Writes the network to a folder below `root`.
    fn folder(&self, root: &Path) -> PathBuf {
        let dir = root.join(self.name);
        write(&dir, &self.config, &self.weights);
        dir
    }

    /// What the network gives for those of its inputs that are named.
    fn run(&self, root: &Path, model: &Path, part: Option<&str>, inputs: &[&str]) -> Tensors {
        let given = self
            .inputs
            .iter()
            .filter(|(name, _)| inputs.contains(&name.as_str()));
        let given: Tensors = given
            .map(|(name, tensor)| (name.clone(), tensor.clone()))
            .collect();
        assert_eq!(given.len(), inputs.len(), "{}", self.name);
        let ran = forward(root, model, part, &given);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{}", self.name);
        file::read(&root.join("out.safetensors"), CPU).unwrap().tensors
    }

    /// Fails unless `found` is the output of this name.
    #[track_caller]
    fn same(&self, found: &Tensor, name: &str) {
        let expected = &self.outputs[name];
        assert_eq!(found.dims(), expected.dims(), "{} {name}", self.name);
        let rms = |x: &Tensor| {
            x.sqr()
                .unwrap()
                .mean_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap()
                .sqrt()
        };
        let far = rms(&(found - expected).unwrap()) / rms(expected);
        assert!(far <= CLOSE, "{} {name}: {far}", self.name);
    }
}

type Shapes = BTreeMap<String, Vec<usize>>;

fn shapes_in(tensors: &Tensors) -> Shapes {
    let shape = |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.dims().to_vec());
    tensors.iter().map(shape).collect()
}

/// The tensors that the network of this configuration asks for.
fn shapes_of(config: &Value) -> Shapes {
    let outline = Outline::new();
    let vb = outline.builder();
    let class = config["_class_name"].as_str().or(config["model_type"].as_str());
    match class {
        Some("UNet2DConditionModel") => drop(Unet::new(&parsed(config), &vb).unwrap()),
        Some("UNetMotionModel") => drop(Unet::over_clips(&parsed(config), &vb).unwrap()),
        Some("TavDiffusionUnet") => drop(TavUnet::new(&parsed(config), &vb).unwrap()),
        Some("AutoencoderKL") => {
            let halves = [Half::Encoder, Half::Decoder];
            drop(AutoencoderKl::new(&parsed(config), &halves, &vb).unwrap());
        }
        Some("speecht5_hifigan") => {
            drop(HifiGan::new(&parsed(config), &vb).unwrap());
            // In all files, whether they are used or not.
            let mut shapes = outline.shapes();
            let bands = config["model_in_dim"].as_u64().unwrap() as usize;
            shapes.extend(["mean", "scale"].map(|name| (name.to_owned(), vec![bands])));
            return shapes;
        }
        // Listed beside the file.
        _ => assert!(config.is_null(), "{class:?}"),
    }
    outline.shapes()
}

/// Tables of places, which files may hold.
fn tables_of(config: &Value, shapes: &Shapes) -> Shapes {
    let length = config["motion_max_seq_length"].as_u64().unwrap() as usize;
    let table = |(name, shape): (&String, &Vec<usize>)| {
        let block = name.strip_suffix("norm1.weight")?;
        let inside = name.contains(".motion_modules.");
        inside.then(|| (format!("{block}pos_embed.pe"), vec![1, length, shape[0]]))
    };
    shapes.iter().filter_map(table).collect()
}

fn parsed<C: serde::de::DeserializeOwned>(config: &Value) -> C {
    serde_json::from_value(config.clone()).unwrap()
}

/// The tensors of a vocoder by the names of the original, its kernels as lengths and directions.
fn in_parts(shapes: &Shapes) -> Shapes {
    let mut parts = Shapes::new();
    for (name, shape) in shapes {
        let name = format!("vocoder.{}", name.replace("upsampler.", "ups."));
        match name.strip_suffix(".weight") {
            None => drop(parts.insert(name, shape.clone())),
            Some(layer) => {
                parts.insert(format!("{layer}.weight_g"), vec![shape[0], 1, 1]);
                parts.insert(format!("{layer}.weight_v"), shape.clone());
            }
        }
    }
    parts
}

fn write(dir: &Path, config: &Value, weights: &Tensors) {
    fs::create_dir_all(dir).unwrap();
    let config = match config {
        Value::Null => "{}".to_owned(),
        config => config.to_string(),
    };
    fs::write(dir.join("config.json"), config).unwrap();
    file::write(
        &dir.join("model.safetensors"),
        weights,
        &BTreeMap::new(),
        Precision::F16,
    )
    .unwrap();
}

fn forward(root: &Path, model: &Path, part: Option<&str>, inputs: &Tensors) -> Ran {
    let (input, output) = (root.join("in.safetensors"), root.join("out.safetensors"));
    let _ = fs::remove_file(&output);
    file::write(&input, inputs, &BTreeMap::new(), Precision::F32).unwrap();
    let mut command = fulgur();
    command.args(["forward", "--json", "-q", "--model"]).arg(model);
    command.arg("--inputs").arg(input).arg("--out").arg(output);
    if let Some(part) = part {
        command.args(["--part", part]);
    }
    Ran::of(command.output().unwrap())
}

const UNET_INPUTS: [&str; 3] = ["sample", "timestep", "encoder_hidden_states"];

#[test]
fn unets_over_pictures_and_spectrograms() {
    let root = tempfile::tempdir().unwrap();
    for name in [
        "unet_sd",
        "unet_ldm",
        "unet_tango",
        "unet_odd",
        "unet_plain",
        "unet_readers",
    ] {
        let mut golden = Golden::read(name);
        if name == "unet_ldm" {
            // Files of whole pipelines hold other networks too.
            golden
                .weights
                .insert("first_stage_model.quant_conv.bias".into(), unit("x", &[3]));
        }
        let model = golden.folder(root.path());
        let found = golden.run(root.path(), &model, None, &UNET_INPUTS);
        golden.same(&found["sample"], "sample");
    }
}

#[test]
fn unets_over_clips() {
    let root = tempfile::tempdir().unwrap();
    for name in ["motion_mid", "motion_plain"] {
        let golden = Golden::read(name);
        let model = golden.folder(root.path());
        let found = golden.run(root.path(), &model, None, &UNET_INPUTS);
        golden.same(&found["sample"], "sample");
    }
}

/// A UNet over pictures and motion modules beside it, in the folder of a pipeline.
#[test]
fn motion_modules_in_a_folder_of_their_own() {
    let root = tempfile::tempdir().unwrap();
    let golden = Golden::read("motion_plain");
    let pipeline = root.path().join("pipeline");
    let (motion, still): (Tensors, Tensors) = golden
        .weights
        .clone()
        .into_iter()
        .partition(|(name, _)| name.contains(".motion_modules."));
    write(&pipeline.join("unet"), &golden.pair["unet"], &still);
    write(
        &pipeline.join("motion_adapter"),
        &golden.pair["motion_adapter"],
        &motion,
    );
    let vae = Golden::read("vae_mel");
    write(&pipeline.join("vae"), &vae.config, &vae.weights);
    fs::write(
        pipeline.join("model_index.json"),
        r#"{"_class_name": "AnimateDiffPipeline"}"#,
    )
    .unwrap();
    let found = golden.run(root.path(), &pipeline, Some("motion_unet"), &UNET_INPUTS);
    golden.same(&found["sample"], "sample");
    let found = vae.run(root.path(), &pipeline, Some("vae.decoder"), &["latent"]);
    vae.same(&found["sample"], "sample");

    let ran = Ran::of(
        fulgur()
            .args(["forward", "--list", "--json", "--model"])
            .arg(&pipeline)
            .output()
            .unwrap(),
    );
    let parts = ran.json()["models"][0]["parts"].clone();
    let names: Vec<&str> = parts
        .as_array()
        .unwrap()
        .iter()
        .map(|part| part["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["unet", "vae.encoder", "vae.decoder", "motion_unet"]);

    // The names of AnimateDiff, and modules of another network.
    let adapter = pipeline.join("motion_adapter");
    let mut old: Tensors = motion
        .iter()
        .map(|(name, tensor)| (animate_diff(name), tensor.clone()))
        .collect();
    // Each attention has the same table there.
    let tables: Tensors = old
        .iter()
        .filter(|(name, _)| name.ends_with(".pe"))
        .map(|(name, tensor)| {
            (
                name.replace("attention_blocks.0", "attention_blocks.1"),
                tensor.clone(),
            )
        })
        .collect();
    assert_eq!(tables.len(), 6);
    old.extend(tables);
    // Behind the prefix of a wrapper, too.
    let old: Tensors = old
        .into_iter()
        .map(|(name, tensor)| (format!("module.{name}"), tensor))
        .collect();
    write(&adapter, &golden.pair["motion_adapter"], &old);
    let found = golden.run(root.path(), &pipeline, Some("motion_unet"), &UNET_INPUTS);
    golden.same(&found["sample"], "sample");
    let mut config = golden.pair["motion_adapter"].clone();
    config["block_out_channels"] = serde_json::json!([8, 32]);
    write(&adapter, &config, &old);
    let ran = forward(root.path(), &pipeline, Some("motion_unet"), &golden.inputs);
    assert!(
        ran.error()
            .contains("block_out_channels of the motion modules is [8, 32], expected [8, 16]"),
        "{}",
        ran.stderr
    );
}

fn animate_diff(name: &str) -> String {
    let Some((block, rest)) = name.split_once(".motion_modules.") else {
        return name.to_owned();
    };
    let (module, rest) = rest.split_once('.').unwrap();
    let mut rest = rest.to_owned();
    for (from, to) in [
        ("attn1", "attention_blocks.0"),
        ("attn2", "attention_blocks.1"),
        ("norm1", "norms.0"),
        ("norm2", "norms.1"),
        ("norm3", "ff_norm"),
        ("pos_embed.pe", "attention_blocks.0.pos_encoder.pe"),
    ] {
        rest = rest.replace(from, to);
    }
    format!("{block}.motion_modules.{module}.temporal_transformer.{rest}")
}

#[test]
fn streams_that_meet_at_their_narrowest_places() {
    let root = tempfile::tempdir().unwrap();
    let mut golden = Golden::read("tav_joint");
    // As the authors' file has them: behind the prefix of a wrapper, with the names of AnimateDiff, and heads that only training calls.
    let weights = std::mem::take(&mut golden.weights);
    golden.weights = weights
        .into_iter()
        .map(|(name, tensor)| (format!("module.{}", animate_diff(&name)), tensor))
        .collect();
    golden
        .weights
        .insert("module.linear_a.weight".into(), unit("linear_a", &[3, 10]));
    let model = golden.folder(root.path());
    let rest = ["timestep", "encoder_hidden_states"];
    let both = golden.run(root.path(), &model, None, &["video", "audio", rest[0], rest[1]]);
    golden.same(&both["video"], "video");
    golden.same(&both["audio"], "audio");
    let alone = golden.run(root.path(), &model, None, &["video", rest[0], rest[1]]);
    assert_eq!(alone.len(), 1);
    golden.same(&alone["video"], "video_alone");
    let heard = golden.run(root.path(), &model, None, &["audio", rest[0], rest[1]]);
    golden.same(&heard["audio"], "audio");
}

#[test]
fn autoencoders() {
    let root = tempfile::tempdir().unwrap();
    for name in ["vae_pictures", "vae_mel", "vae_bare"] {
        let golden = Golden::read(name);
        let model = golden.folder(root.path());
        let found = golden.run(root.path(), &model, Some("encoder"), &["sample"]);
        golden.same(&found["mean"], "mean");
        golden.same(&found["logvar"], "logvar");
        let found = golden.run(root.path(), &model, Some("decoder"), &["latent"]);
        golden.same(&found["sample"], "sample");
    }
    // The names of attention in most published folders.
    let mut golden = Golden::read("vae_pictures");
    let older = |name: &str| {
        let mut name = name.to_owned();
        for (new, old) in [
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ] {
            name = name.replace(&format!("attentions.0.{new}."), &format!("attentions.0.{old}."));
        }
        name
    };
    let weights = std::mem::take(&mut golden.weights);
    golden.weights = weights
        .into_iter()
        .map(|(name, tensor)| (older(&name), tensor))
        .collect();
    let model = root.path().join("older");
    write(&model, &golden.config, &golden.weights);
    let found = golden.run(root.path(), &model, Some("decoder"), &["latent"]);
    golden.same(&found["sample"], "sample");
    // A decoder by the names of latent diffusion, and no configuration.
    let mut golden = Golden::read("vae_ldm");
    for (name, value) in [
        ("scale_factor", 0.9228f32),
        ("first_stage_model.loss.logvar", 0.0),
    ] {
        golden
            .weights
            .insert(name.to_owned(), Tensor::new(value, CPU).unwrap());
    }
    let model = golden.folder(root.path());
    let found = golden.run(root.path(), &model, None, &["latent"]);
    golden.same(&found["sample"], "sample");
    let factor = AutoencoderKl::config_in(&model).unwrap().scaling_factor;
    assert!((factor - 0.9228).abs() < 1e-3, "{factor}");
}

#[test]
fn vocoders() {
    let root = tempfile::tempdir().unwrap();
    for name in ["vocoder_normed", "vocoder_parts", "vocoder_audioldm"] {
        let golden = Golden::read(name);
        let model = golden.folder(root.path());
        let found = golden.run(root.path(), &model, None, &["mel"]);
        golden.same(&found["waveform"], "waveform");
    }
}

#[test]
fn checkpoints_that_do_not_fit_are_refused_in_one_line() {
    let root = tempfile::tempdir().unwrap();
    let golden = Golden::read("unet_plain");
    let refused = |golden: &Golden, part: Option<&str>, words: &[&str]| {
        let model = golden.folder(root.path());
        let ran = forward(root.path(), &model, part, &golden.inputs);
        for word in words {
            assert!(ran.error().contains(word), "{word}: {}", ran.stderr);
        }
        assert!(!root.path().join("out.safetensors").exists());
    };
    // Half a checkpoint, one of another network, and a tensor of another shape.
    let mut half = Golden::read("unet_plain");
    half.weights
        .retain(|name, _| name.starts_with("down_blocks") || name == "conv_in.weight");
    refused(
        &half,
        None,
        &[
            "missing: conv_in.bias [9], conv_norm_out.bias",
            "model.safetensors",
        ],
    );
    let mut other = Golden::read("unet_plain");
    other.weights.insert(
        "class_embedding.weight".into(),
        Tensor::zeros((3, 4), DType::F32, CPU).unwrap(),
    );
    refused(&other, None, &["1 unexpected: class_embedding.weight [3, 4]"]);
    let mut shape = Golden::read("unet_plain");
    shape.config["block_out_channels"] = serde_json::json!([9, 12]);
    refused(&shape, None, &["of another shape: ", "expected [12"]);

    // Settings that this network does not have.
    let mut setting = Golden::read("unet_plain");
    setting.config["class_embed_type"] = "timestep".into();
    refused(
        &setting,
        None,
        &["config.json: class_embed_type is \"timestep\", expected null"],
    );
    let mut groups = Golden::read("unet_plain");
    groups.config["norm_num_groups"] = 4.into();
    refused(
        &groups,
        None,
        &["config.json: block_out_channels is 9, expected a multiple of norm_num_groups 4"],
    );
    let mut huge = Golden::read("vae_bare");
    huge.config["layers_per_block"] = serde_json::json!(4_000_000_000u64);
    refused(
        &huge,
        Some("encoder"),
        &["layers_per_block is 4000000000, expected 1 to 64"],
    );
    let mut kinds = Golden::read("vae_bare");
    kinds.config["up_block_types"] = serde_json::json!(["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]);
    refused(
        &kinds,
        Some("decoder"),
        &["up_block_types has \"AttnUpDecoderBlock2D\", expected UpDecoderBlock2D"],
    );

    // Inputs.
    let model = golden.folder(root.path());
    let mut inputs = golden.inputs.clone();
    inputs.insert(
        "sample".into(),
        Tensor::zeros((2, 3, 4, 4), DType::F32, CPU).unwrap(),
    );
    let ran = forward(root.path(), &model, None, &inputs);
    assert!(
        ran.error()
            .contains("sample is [2, 3, 4, 4], expected [B, 4, H, W]"),
        "{}",
        ran.stderr
    );
    let clips = Golden::read("motion_mid");
    let model = clips.folder(root.path());
    let mut inputs = clips.inputs.clone();
    inputs.insert(
        "sample".into(),
        Tensor::zeros((2, 4, 7, 4, 4), DType::F32, CPU).unwrap(),
    );
    let ran = forward(root.path(), &model, None, &inputs);
    assert!(
        ran.error().contains("sample has 7 frames, expected at most 6"),
        "{}",
        ran.stderr
    );
}
