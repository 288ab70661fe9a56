//! `fulgur forward --model`: models, and parts of them, on named tensors.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use fulgur::benchmark::encoder::BuiltinEncoder;
use fulgur::kernels::philox::Philox;
use fulgur::lightnet::params::{Precision, file};
use fulgur::tavdiffusion::codec::{MelCodec, VideoCodec, Vocoder};
use fulgur::tavdiffusion::denoiser::{Denoiser, Latents, TextCondition};
use fulgur::tavdiffusion::streams::TwoStream;
use fulgur::tavdiffusion::text::TextEncoder;
use serde_json::{Value, json};

use crate::support::{Ran, fulgur, names, run};
use crate::tiny;

type Tensors = BTreeMap<String, Tensor>;

const CPU: &Device = &Device::Cpu;

/// Adds noise to all weights: the last maps of a fresh network are zero, and so is everything that it gives.
fn awake(dir: &Path) {
    let path = dir.join("model.safetensors");
    let mut tensors = file::read(&path, CPU).unwrap().tensors;
    for (name, tensor) in &mut tensors {
        let noise = Philox::named(3, name).normals(tensor.elem_count());
        let noise = (Tensor::from_vec(noise, tensor.shape(), CPU).unwrap() * 0.1).unwrap();
        *tensor = (tensor.to_dtype(DType::F32).unwrap() + noise).unwrap();
    }
    file::write(&path, &tensors, &BTreeMap::new(), Precision::F32).unwrap();
}

/// Normal numbers in this shape, from a stream of their own.
fn random(shape: &[usize], stream: u64) -> Tensor {
    let values = Philox::new(11, stream).normals(shape.iter().product());
    Tensor::from_vec(values, shape, CPU).unwrap()
}

fn ids<const N: usize>(rows: [[i64; 4]; N]) -> Tensor {
    Tensor::new(&rows, CPU).unwrap()
}

fn tensors<const N: usize>(entries: [(&str, &Tensor); N]) -> Tensors {
    let owned = entries.map(|(name, tensor)| (name.to_owned(), tensor.clone()));
    BTreeMap::from(owned)
}

/// Runs `fulgur forward` on a model with these inputs; files lie in `folder`.
fn forward(folder: &Path, model: &Path, part: Option<&str>, inputs: &Tensors) -> Ran {
    let (input, output) = (folder.join("in.safetensors"), folder.join("out.safetensors"));
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

/// What a run wrote, compared with its report.
#[track_caller]
fn outputs(folder: &Path, ran: &Ran) -> Tensors {
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let written = file::read(&folder.join("out.safetensors"), CPU).unwrap().tensors;
    let shapes: BTreeMap<&String, &[usize]> = written.iter().map(|(name, t)| (name, t.dims())).collect();
    assert_eq!(ran.json()["outputs"], json!(shapes));
    assert!(written.values().all(|tensor| tensor.dtype() == DType::F32));
    written
}

/// Fails unless both tensors hold the same numbers, and not zeros alone.
#[track_caller]
fn same(found: &Tensor, expected: &Tensor) {
    assert_eq!(found.dims(), expected.dims());
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (found, expected) = (values(found), values(expected));
    let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
    assert!(largest > 1e-3, "nothing to compare");
    let error = found
        .iter()
        .zip(&expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0f32, f32::max);
    assert!(error <= 1e-5 * largest, "largest difference {error} of {largest}");
}

#[test]
fn each_part_of_a_generator_gives_what_the_library_gives() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path();
    let model = tiny::generator(folder);
    for part in ["text_encoder", "denoiser", "video_codec", "mel_codec", "vocoder"] {
        awake(&model.join(part));
    }
    let at = |part: &str| model.join(part);
    let part = |name: &str, inputs: &Tensors| outputs(folder, &forward(folder, &model, Some(name), inputs));

    let (words, mask) = (
        ids([[1, 7, 250, 9], [1, 2, 3, 0]]),
        ids([[1, 1, 1, 1], [1, 1, 1, 0]]),
    );
    let encoder = TextEncoder::load(&at("text_encoder"), CPU).unwrap();
    let states = encoder
        .forward(&words.to_dtype(DType::U32).unwrap(), &mask, None)
        .unwrap();
    let read = part(
        "text_encoder",
        &tensors([("input_ids", &words), ("attention_mask", &mask)]),
    );
    same(&read["last_hidden_state"], &states.states);
    same(&read["sentence_embedding"], &states.sentence);
    let all = part(
        "text_encoder",
        &tensors([("input_ids", &words.narrow(0, 0, 1).unwrap())]),
    );
    same(&all["last_hidden_state"], &states.states.narrow(0, 0, 1).unwrap());

    let denoiser = TwoStream::load(&at("denoiser"), DType::F32, CPU).unwrap();
    let (video, audio) = (random(&[2, 3, 4, 4, 4], 0), random(&[2, 25, 4, 4], 1));
    let time = Tensor::new(&[0.25f32, 1.0], CPU).unwrap();
    let condition = TextCondition {
        states: states.states.clone(),
        mask: mask.to_dtype(DType::F32).unwrap(),
    };
    let latents = Latents {
        video: video.clone(),
        audio: audio.clone(),
    };
    let expected = denoiser.predict(&latents, &time, &condition).unwrap();
    let made = part(
        "denoiser",
        &tensors([
            ("video", &video),
            ("audio", &audio),
            ("timestep", &time),
            ("encoder_hidden_states", &read["last_hidden_state"]),
            ("encoder_attention_mask", &mask),
        ]),
    );
    same(&made["video"], &expected.video);
    same(&made["audio"], &expected.audio);

    let codec = VideoCodec::load(&at("video_codec"), CPU).unwrap();
    let seen = part("video_codec.decoder", &tensors([("latent", &video)]));
    same(
        &seen["sample"].clamp(-1f32, 1f32).unwrap(),
        &codec.decode(&video).unwrap(),
    );
    let largest = seen["sample"]
        .abs()
        .unwrap()
        .max_all()
        .unwrap()
        .to_scalar::<f32>()
        .unwrap();
    assert!(largest > 1.0, "frames come out without a clamp: {largest}");
    let latent = part("video_codec.encoder", &tensors([("sample", &seen["sample"])]));
    same(&latent["latent"], &codec.encode(&seen["sample"]).unwrap());

    let codec = MelCodec::load(&at("mel_codec"), CPU).unwrap();
    let heard = part("mel_codec.decoder", &tensors([("latent", &audio)]));
    same(&heard["mel"], &codec.decode(&audio).unwrap());
    let vocoder = Vocoder::load(&at("vocoder"), CPU).unwrap();
    let wave = part("vocoder", &tensors([("mel", &heard["mel"])]));
    assert_eq!(wave["waveform"].dims(), [2, 160 * 100]);
    same(&wave["waveform"], &vocoder.forward(&heard["mel"]).unwrap());

    // Half the bits in, f32 out, and a part that lies alone needs no name.
    let half = heard["mel"].to_dtype(DType::BF16).unwrap();
    let ran = forward(folder, &at("vocoder"), None, &tensors([("mel", &half)]));
    let wide = half.to_dtype(DType::F32).unwrap();
    same(
        &outputs(folder, &ran)["waveform"],
        &vocoder.forward(&wide).unwrap(),
    );
}

#[test]
fn an_encoder_embeds_what_it_is_given() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path();
    let model = tiny::encoder(folder);
    let encoder = BuiltinEncoder::load(&model, CPU).unwrap();
    let frames = random(&[3, 96, 96, 3], 0);
    let waves = (random(&[2, 64_000], 1) * 0.1).unwrap();
    let both = forward(
        folder,
        &model,
        None,
        &tensors([("vision", &frames), ("audio", &waves)]),
    );
    let both = outputs(folder, &both);
    same(&both["vision"], &encoder.embed_frames(&frames).unwrap());
    same(&both["audio"], &encoder.embed_sound(&waves).unwrap());
    let seen = outputs(
        folder,
        &forward(folder, &model, Some("encoder"), &tensors([("vision", &frames)])),
    );
    assert_eq!(seen.len(), 1);
    same(&seen["vision"], &both["vision"]);
    let none = forward(folder, &model, None, &tensors([]));
    assert!(none.error().contains("no tensors, known are vision, audio"));
    let short = forward(
        folder,
        &model,
        None,
        &tensors([("audio", &random(&[1, 8000], 1))]),
    );
    assert!(short.error().contains("audio is [1, 8000], expected [C, 64000]"));
}

#[test]
fn bert_gives_the_states_of_transformers() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("lightnet/goldens/bert.safetensors");
    let mut weights = file::read(&golden, CPU).unwrap().tensors;
    let mut take = |name: &str| weights.remove(name).unwrap();
    let (words, mask, expected) = (
        take("input_ids"),
        take("attention_mask"),
        take("last_hidden_state"),
    );
    let model = folder.join("bert");
    fs::create_dir(&model).unwrap();
    fs::write(
        model.join("config.json"),
        r#"{"model_type": "bert", "num_attention_heads": 3, "architectures": ["BertModel"]}"#,
    )
    .unwrap();
    file::write(
        &model.join("model.safetensors"),
        &weights,
        &BTreeMap::new(),
        Precision::F32,
    )
    .unwrap();
    let inputs = tensors([("input_ids", &words), ("attention_mask", &mask)]);
    let states = outputs(folder, &forward(folder, &model, None, &inputs));
    // States at padding mean nothing.
    let real = mask.to_dtype(DType::F32).unwrap().unsqueeze(2).unwrap();
    let states = states["last_hidden_state"].broadcast_mul(&real).unwrap();
    same(&states, &expected.broadcast_mul(&real).unwrap());

    // A configuration that does not say what it is: then the tensors do.
    fs::write(model.join("config.json"), r#"{"num_attention_heads": 3}"#).unwrap();
    assert_eq!(forward(folder, &model, None, &inputs).code, 0);
    let vocabulary = forward(
        folder,
        &model,
        None,
        &tensors([("input_ids", &ids([[1, 2, 3, 61]]))]),
    );
    assert!(
        vocabulary
            .error()
            .contains("input_ids holds 61, expected ids from 0 to below 61"),
        "{}",
        vocabulary.stderr
    );
}

fn part<'a>(model: &'a Value, name: &str) -> &'a Value {
    let parts = model["parts"].as_array().unwrap();
    parts
        .iter()
        .find(|part| part["name"] == name)
        .unwrap_or(&Value::Null)
}

#[test]
fn the_list_names_parts_inputs_and_outputs() {
    let root = tempfile::tempdir().unwrap();
    let (model, encoder) = (tiny::generator(root.path()), tiny::encoder(root.path()));
    let list = |more: &[&Path]| {
        let mut command = fulgur();
        command.args(["forward", "--list", "--json"]).args(more);
        command.env("FULGUR_MODELS", root.path());
        Ran::of(command.output().unwrap())
    };
    let all = list(&[]).json();
    let models = all["models"].as_array().unwrap();
    assert_eq!(models.len(), 2);
    assert_eq!(models[0]["kind"], "FulgurTwoStream");
    let listed: Vec<&str> = models[0]["parts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|part| part["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        listed,
        [
            "text_encoder",
            "denoiser",
            "video_codec.encoder",
            "video_codec.decoder",
            "mel_codec.decoder",
            "vocoder"
        ]
    );
    assert_eq!(
        part(&models[0], "text_encoder")["inputs"],
        json!([
            {"name": "input_ids", "type": "i64 below 300", "shape": ["B", "L"], "optional": false},
            {"name": "attention_mask", "type": "0 or 1", "shape": ["B", "L"], "optional": true},
        ])
    );
    assert_eq!(
        part(&models[0], "vocoder")["outputs"],
        json!([{"name": "waveform", "type": "f32", "shape": ["B", "160 T"], "optional": false}])
    );
    assert_eq!(models[1]["kind"], "fulgur-avhscore");
    let operators: Vec<&Value> = all["operators"]
        .as_array()
        .unwrap()
        .iter()
        .map(|operator| &operator["name"])
        .collect();
    assert_eq!(
        operators,
        [
            "scalar-decay",
            "vector-decay",
            "lightnet-causal",
            "lightnet-noncausal"
        ]
    );

    for (dir, kind, parts) in [
        (encoder, "fulgur-avhscore", vec!["encoder"]),
        (model.join("text_encoder"), "text_encoder", vec!["text_encoder"]),
        (model.join("denoiser"), "denoiser", vec!["denoiser"]),
        (
            model.join("video_codec"),
            "video_codec",
            vec!["encoder", "decoder"],
        ),
        (model.join("mel_codec"), "mel_codec", vec!["decoder"]),
        (model.join("vocoder"), "vocoder", vec!["vocoder"]),
    ] {
        let one = list(&["--model".as_ref(), &dir]).json();
        assert_eq!(one["models"][0]["kind"], kind);
        let found: Vec<&Value> = one["models"][0]["parts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|part| &part["name"])
            .collect();
        assert_eq!(found, parts, "{kind}");
        assert_eq!(one["operators"], json!([]));
    }
    let text = run(["forward", "--list", "--model", model.to_str().unwrap()]).stdout;
    assert!(
        text.contains("--part mel_codec.decoder") && text.contains("in  timestep [B], f32 from 0 to 1"),
        "{text}"
    );
    let empty = tempfile::tempdir().unwrap();
    let mut command = fulgur();
    command
        .args(["forward", "--list"])
        .env("FULGUR_MODELS", empty.path());
    let none = Ran::of(command.output().unwrap());
    assert!(
        none.code == 0 && none.stderr.contains("no builtin model here"),
        "{}",
        none.stderr
    );
    assert!(none.stdout.contains("--op lightnet-noncausal"), "{}", none.stdout);
}

#[test]
fn what_cannot_be_run_is_one_line_and_nothing_is_written() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path();
    let model = tiny::generator(folder);
    let refused = |model: &Path, part: Option<&str>, inputs: &Tensors, words: &[&str]| {
        let ran = forward(folder, model, part, inputs);
        let line = ran.error();
        assert!(words.iter().all(|word| line.contains(word)), "{words:?}: {line}");
        assert!(!folder.join("out.safetensors").exists());
    };
    let mel = random(&[1, 8, 64], 0);
    let good = tensors([("mel", &mel)]);
    refused(&folder.join("none"), None, &good, &["none", "config.json"]);
    refused(
        &model,
        None,
        &good,
        &[
            "found 6 parts",
            "expected --part with one of: text_encoder, denoiser",
        ],
    );
    refused(&model, Some("voice"), &good, &["found no part voice", "vocoder"]);
    refused(
        &model,
        Some("vocoder"),
        &tensors([("mel", &random(&[1, 8, 63], 0)), ("x", &mel)]),
        &[
            "in.safetensors: ",
            "mel is [1, 8, 63], expected [B, T, 64]",
            "x is unknown, known are mel",
        ],
    );
    refused(
        &model,
        Some("denoiser"),
        &good,
        &[
            "mel is unknown",
            "video is missing",
            "encoder_hidden_states is missing",
        ],
    );
    refused(
        &model,
        Some("video_codec.encoder"),
        &tensors([("sample", &random(&[1, 3, 8, 8, 3], 0))]),
        &["3 frames of 8x8, expected multiples of 4 frames, 8x8"],
    );
    let odd = [
        ("video", &random(&[1, 1, 3, 3, 4], 0)),
        ("audio", &random(&[1, 2, 4, 4], 0)),
        ("timestep", &Tensor::new(&[0.5f32], CPU).unwrap()),
        ("encoder_hidden_states", &random(&[1, 2, 16], 0)),
    ];
    refused(
        &model,
        Some("denoiser"),
        &tensors(odd),
        &["[1, 1, 3, 3, 4]", "[1, 2, 2]"],
    );
    let long = Tensor::zeros((1, 100), DType::I64, CPU).unwrap();
    refused(
        &model,
        Some("text_encoder"),
        &tensors([("input_ids", &long)]),
        &["1 x 100", "1 to 48 tokens"],
    );

    let other = folder.join("other");
    fs::create_dir(&other).unwrap();
    for (config, words) in [
        (
            r#"{"model_type": "mamba"}"#,
            "found model_type or _class_name \"mamba\", expected a model of one of these kinds",
        ),
        (r#"{"hidden": 3}"#, "neither model_type nor _class_name"),
        ("{", "config.json"),
        (r#"{"model_type": "bert"}"#, "embeddings.word_embeddings.weight"),
        (r#"{"model_type": 7}"#, "config.json"),
    ] {
        fs::write(other.join("config.json"), config).unwrap();
        refused(&other, None, &good, &["other", words]);
    }
    fs::write(model.join("vocoder/model.safetensors"), "no weights").unwrap();
    refused(&model, Some("vocoder"), &good, &["vocoder", "model.safetensors"]);
    assert_eq!(names(folder), ["builtin", "in.safetensors", "other"]);

    let clash = run([
        "forward",
        "--op",
        "lightnet-noncausal",
        "--model",
        "x",
        "--inputs",
        "a",
        "--out",
        "b",
    ]);
    assert!(clash.error().contains("cannot be used with"), "{}", clash.stderr);
    let neither = run(["forward", "--inputs", "a", "--out", "b"]);
    assert!(neither.error().contains("--model"), "{}", neither.stderr);
}
