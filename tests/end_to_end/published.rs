//! Published networks through `fulgur forward`, against what diffusers and transformers give for the same weights.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use fulgur::lightnet::params::{Precision, file};
use fulgur::tavdiffusion::published::{AutoencoderKl, Unet};
use serde_json::Value;

use crate::support::{Ran, fulgur};

type Tensors = BTreeMap<String, Tensor>;

const CPU: &Device = &Device::Cpu;
/// Largest relative difference, in root mean square.
const CLOSE: f32 = 2e-5;

/// One file of `golden/published`, which `golden/published.py` wrote.
struct Golden {
    name: &'static str,
    weights: Tensors,
    inputs: Tensors,
    outputs: Tensors,
    config: Value,
    pair: Value,
}

impl Golden {
    fn read(name: &'static str) -> Self {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/published/{name}.safetensors"));
        let contents = file::read(&path, CPU).unwrap();
        let mut text: Value = serde_json::from_str(&contents.metadata["golden"]).unwrap();
        let mut golden = Self {
            name,
            weights: Tensors::new(),
            inputs: Tensors::new(),
            outputs: Tensors::new(),
            config: text["config"].take(),
            pair: text["pair"].take(),
        };
        for (name, tensor) in contents.tensors {
            let (kind, name) = name.split_once('.').unwrap();
            let tensors = match kind {
                "model" => &mut golden.weights,
                "in" => &mut golden.inputs,
                _ => &mut golden.outputs,
            };
            tensors.insert(name.to_owned(), tensor);
        }
        golden
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
        println!("{} {name}: {far:.2e}", self.name);
        assert!(far <= CLOSE, "{} {name}: {far}", self.name);
    }
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
    for name in ["unet_sd", "unet_ldm", "unet_tango", "unet_odd", "unet_plain"] {
        let golden = Golden::read(name);
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
    let old: Tensors = motion
        .iter()
        .filter(|(name, _)| !name.ends_with(".pe"))
        .map(|(name, tensor)| (animate_diff(name), tensor.clone()))
        .collect();
    write(&adapter, &golden.pair["motion_adapter"], &old);
    let network = Unet::load_with_motion(&pipeline.join("unet"), &adapter, DType::F32, CPU).unwrap();
    let predicted = network
        .forward(
            &golden.inputs["sample"],
            &golden.inputs["timestep"].to_dtype(DType::F32).unwrap(),
            Some(&golden.inputs["encoder_hidden_states"]),
        )
        .unwrap();
    // The table was rounded where the reference had it, and is not here.
    let far = (predicted - &golden.outputs["sample"])
        .unwrap()
        .abs()
        .unwrap()
        .max_all()
        .unwrap();
    assert!(far.to_scalar::<f32>().unwrap() < 1e-2);
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
    let (block, rest) = name.split_once(".motion_modules.").unwrap();
    let (module, rest) = rest.split_once('.').unwrap();
    let mut rest = rest.to_owned();
    for (from, to) in [
        ("attn1", "attention_blocks.0"),
        ("attn2", "attention_blocks.1"),
        ("norm1", "norms.0"),
        ("norm2", "norms.1"),
        ("norm3", "ff_norm"),
    ] {
        rest = rest.replace(from, to);
    }
    format!("{block}.motion_modules.{module}.temporal_transformer.{rest}")
}

#[test]
fn streams_that_meet_at_their_narrowest_places() {
    let root = tempfile::tempdir().unwrap();
    let golden = Golden::read("tav_joint");
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
    // A decoder by the names of latent diffusion, and no configuration.
    let golden = Golden::read("vae_ldm");
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
