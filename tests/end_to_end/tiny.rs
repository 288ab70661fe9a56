//! Model folders with random weights, small enough to run in a blink: they show that a road is whole, not that it leads
//! anywhere.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use fulgur::benchmark::encoder::{BuiltinConfig, BuiltinEncoder};
use fulgur::benchmark::judge::{JudgeConfig, Judges};
use fulgur::datasets::scenes::Motion;
use fulgur::datasets::store::{Plain, write_tensors};
use fulgur::datasets::things::{self, Things};
use fulgur::lightnet::params::{Params, Precision};
use fulgur::tavdiffusion::codec::{
    MelCodec, MelCodecConfig, VideoCodec, VideoCodecConfig, Vocoder, VocoderConfig,
};
use fulgur::tavdiffusion::pipeline::{ModelIndex, Part};
use fulgur::tavdiffusion::streams::{StreamConfig, TwoStream, TwoStreamConfig};
use fulgur::tavdiffusion::text::{TextConfig, TextEncoder, TextTokenizer};
use serde::Serialize;

/// Writes `config.json` and weights of one network, built by `build` from random parameters.
fn write<M>(folder: &Path, config: &impl Serialize, build: impl FnOnce(&Params) -> candle_core::Result<M>) {
    fs::create_dir_all(folder).unwrap();
    let params = Params::random(5, &Device::Cpu);
    build(&params).unwrap();
    fs::write(folder.join("config.json"), serde_json::to_string(config).unwrap()).unwrap();
    params
        .save(
            &folder.join("model.safetensors"),
            &BTreeMap::new(),
            Precision::F16,
        )
        .unwrap();
}

/// A generator of 32x32 pixels and 1 s, without the encoder of its mel codec.
pub(crate) fn generator(root: &Path) -> PathBuf {
    let dir = root.join("builtin");
    let part = |part: Part| dir.join(part.folder());

    let sentences = [
        "a dog barks as it drops in from the left",
        "a bell rings",
        "an owl hoots",
    ];
    let tokenizer = TextTokenizer::train(&sentences, 300).unwrap();
    let text = TextConfig {
        vocab_size: 300,
        embedding_size: 8,
        hidden_size: 16,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        head_dim: 4,
        intermediate_size: 16,
        sentence_size: 8,
        ..TextConfig::default()
    };
    write(&part(Part::TextEncoder), &text, |p| {
        TextEncoder::new(&text, &p.builder())
    });
    fs::write(
        part(Part::TextEncoder).join("tokenizer.json"),
        tokenizer.to_json().unwrap(),
    )
    .unwrap();

    let video = VideoCodecConfig {
        latent_channels: 4,
        encoder: [24, 1],
        decoder: [24, 1],
        fine: [24, 1],
        ..Default::default()
    };
    write(&part(Part::VideoCodec), &video, |p| {
        VideoCodec::new(&video, true, &p.builder())
    });
    mel_codec(&dir, false);
    let vocoder = VocoderConfig {
        stack: [16, 1],
        ..Default::default()
    };
    write(&part(Part::Vocoder), &vocoder, |p| {
        Vocoder::new(&vocoder, &p.builder())
    });

    let narrow = |stream: StreamConfig| StreamConfig {
        channels: 4,
        dim: 24,
        heads: 2,
        head_dim: 6,
        hidden: 24,
        ..stream
    };
    let default = TwoStreamConfig::default();
    let denoiser = TwoStreamConfig {
        video: narrow(default.video),
        audio: narrow(default.audio),
        depth: 2,
        text_every: 2,
        fusion: vec![1],
        fusion_heads: 2,
        text_dim: 16,
        contrast_dim: 8,
        objective: default.objective,
    };
    write(&part(Part::Denoiser), &denoiser, |p| {
        TwoStream::new(&denoiser, true, DType::F32, &p.builder())
    });

    let index = ModelIndex {
        name: "tiny".to_owned(),
        width: 32,
        height: 32,
        duration_s: 1.0,
        steps: 2,
        ..ModelIndex::default()
    };
    fs::write(
        dir.join("model_index.json"),
        serde_json::to_string(&index).unwrap(),
    )
    .unwrap();
    dir
}

/// Writes the mel codec of the generator in `dir`, with its encoder or without.
pub(crate) fn mel_codec(dir: &Path, with_encoder: bool) {
    let mel = MelCodecConfig {
        latent_channels: 4,
        encoder: [16, 1],
        decoder: [16, 1],
        ..Default::default()
    };
    write(&dir.join(Part::MelCodec.folder()), &mel, |p| {
        MelCodec::new(&mel, with_encoder, &p.builder())
    });
}

/// Judges of `count` synthetic things in clips of 48x48 pixels and 1 s.
pub(crate) fn judges(root: &Path, count: usize) -> PathBuf {
    let dir = root.join(format!("judges-{count}"));
    let config = JudgeConfig {
        things: Things::synthetic(count)
            .iter()
            .map(|thing| thing.id.clone())
            .collect(),
        motions: Motion::ALL
            .iter()
            .map(|motion| motion.name().to_owned())
            .collect(),
        size: 48,
        frames: 12,
        fps: 12.0,
        samples: 16_000,
        dim: 64,
        depth: 1,
    };
    write(&dir, &config, |p| Judges::new(&config, &p.builder()));
    dir
}

/// Prepared sets of `count` synthetic things and of plain pictures.
pub(crate) fn data(root: &Path, count: usize) -> PathBuf {
    let dir = root.join("data");
    things::save(&Things::synthetic(count), &dir.join("stamps")).unwrap();
    let pixels: Vec<u8> = (0..4u8).flat_map(|i| vec![60 * i; 128 * 128 * 3]).collect();
    let images = Plain::u8(&[4, 128, 128, 3], pixels);
    let origin = serde_json::json!({"package": "synthetic", "path": "plain", "licence": "CC0-1.0"});
    let sources = serde_json::json!([origin, origin, origin, origin]).to_string();
    write_tensors(
        &dir.join("backgrounds/backgrounds.safetensors"),
        vec![("images".to_owned(), images)],
        Some(("sources", sources)),
    )
    .unwrap();
    dir
}

/// An encoder for AVHScore.
pub(crate) fn encoder(root: &Path) -> PathBuf {
    let dir = root.join("encoder");
    let config = BuiltinConfig {
        dim: 32,
        depth: 1,
        heads: 1,
        embedding: 8,
        ..BuiltinConfig::default()
    };
    write(&dir, &config, |p| BuiltinEncoder::new(&config, &p.builder()));
    dir
}
