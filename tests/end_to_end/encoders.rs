//! Published encoders: `fulgur forward`, `preprocess` and `convert` against the libraries that they come from, and scores with ImageBind.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use fulgur::lightnet::params::{Precision, file};
use fulgur::lightnet::testing::{self, golden, tensors};
use serde_json::{Value, json};

use crate::support::{Ran, fulgur, names};

const CPU: &Device = &Device::Cpu;

type Tensors = BTreeMap<String, Tensor>;

fn forward(folder: &Path, model: &Path, inputs: &Tensors) -> Ran {
    let (input, output) = (folder.join("in.safetensors"), folder.join("out.safetensors"));
    let _ = fs::remove_file(&output);
    file::write(&input, inputs, &BTreeMap::new(), Precision::F32).unwrap();
    let mut command = fulgur();
    command
        .args(["forward", "--json", "-q", "--device", "cpu", "--model"])
        .arg(model);
    command.arg("--inputs").arg(input).arg("--out").arg(output);
    Ran::of(command.output().unwrap())
}

/// What a run wrote.
#[track_caller]
fn outputs(folder: &Path, ran: &Ran) -> Tensors {
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    file::read(&folder.join("out.safetensors"), CPU).unwrap().tensors
}

fn relative(found: &Tensor, wanted: &Tensor) -> f32 {
    assert_eq!(found.dims(), wanted.dims());
    let square = |t: &Tensor| {
        let t = t.to_dtype(DType::F32).unwrap();
        t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()
    };
    (square(&(found - wanted).unwrap()) / square(wanted)).sqrt()
}

#[test]
fn imagebind_gives_the_vectors_of_torch() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path();
    let golden_tensors = tensors("imagebind");
    let cases: Vec<&str> = golden_tensors
        .keys()
        .filter_map(|name| name.strip_suffix(".in"))
        .collect();
    assert_eq!(cases.len(), 9);
    for case in cases {
        let (model, input) = case.split_once('.').unwrap();
        let modality = match &input[..4] {
            "imag" | "clip" => "vision",
            "soun" => "audio",
            _ => "text",
        };
        let inputs = Tensors::from([(modality.to_owned(), golden_tensors[&format!("{case}.in")].clone())]);
        let ran = forward(
            folder,
            &testing::model(&format!("imagebind_{model}"), folder),
            &inputs,
        );
        let found = outputs(folder, &ran);
        let wanted = &golden_tensors[&format!("{case}.out")];
        // What was not given is not there.
        assert_eq!(found.keys().collect::<Vec<_>>(), [modality]);
        let error = relative(&found[modality], wanted);
        assert!(error < 2e-5, "{case}: {error}");
    }
    // All at once, each with a batch of its own; the file of a checkpoint instead of its folder.
    let inputs = Tensors::from([
        ("vision".to_owned(), golden_tensors["tiny.image.in"].clone()),
        ("audio".to_owned(), golden_tensors["tiny.sounds.in"].clone()),
        ("text".to_owned(), golden_tensors["tiny.text.in"].clone()),
    ]);
    let all = outputs(
        folder,
        &forward(folder, &testing::model("imagebind_tiny", folder), &inputs),
    );
    for (name, case) in [("vision", "image"), ("audio", "sounds"), ("text", "text")] {
        assert!(
            relative(&all[name], &golden_tensors[&format!("tiny.{case}.out")]) < 2e-5,
            "{name}"
        );
    }
}

#[test]
fn a_clip_alone_is_told_from_several_pictures() {
    let root = tempfile::tempdir().unwrap();
    let golden_tensors = tensors("imagebind");
    let clips = golden_tensors["tiny.clips.in"].to_dtype(DType::F32).unwrap();
    let run = |x: Tensor| {
        let inputs = Tensors::from([("vision".to_owned(), x)]);
        outputs(
            root.path(),
            &forward(
                root.path(),
                &testing::model("imagebind_tiny", root.path()),
                &inputs,
            ),
        )["vision"]
            .clone()
    };
    let (batch, count) = (clips.dim(0).unwrap(), clips.dim(1).unwrap());
    let alone = run(clips.flatten(0, 1).unwrap());
    let mean = alone.reshape((batch, count, 20)).unwrap().mean(1).unwrap();
    assert!(relative(&mean, &golden_tensors["tiny.clips.out"]) < 2e-5);
}

#[test]
fn clip_gives_the_vectors_of_transformers() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path();
    let golden_tensors = tensors("clip");
    let at = |name: &str| golden_tensors[name].clone();
    let named = |model: &str, names: &[&str]| -> Tensors {
        let names = names.iter();
        names
            .map(|name| ((*name).to_owned(), at(&format!("{model}.{name}"))))
            .collect()
    };
    let near = |found: &Tensors, name: &str, wanted: &str| {
        let error = relative(&found[name], &at(wanted));
        assert!(error < 2e-5, "{wanted}: {error}");
    };
    for model in ["quick", "gelu"] {
        let dir = testing::model(&format!("clip_{model}"), folder);
        let both = named(model, &["pixel_values", "input_ids", "attention_mask"]);
        let found = outputs(folder, &forward(folder, &dir, &both));
        assert_eq!(found.keys().collect::<Vec<_>>(), ["image_embeds", "text_embeds"]);
        near(&found, "image_embeds", &format!("{model}.image_embeds"));
        near(&found, "text_embeds", &format!("{model}.text_embeds"));
        let short = at(&format!("{model}.input_ids")).narrow(1, 0, 9).unwrap();
        let text = Tensors::from([("input_ids".to_owned(), short)]);
        let found = outputs(folder, &forward(folder, &dir, &text));
        assert_eq!(found.keys().collect::<Vec<_>>(), ["text_embeds"]);
        near(&found, "text_embeds", &format!("{model}.short_text_embeds"));
    }
    let dir = testing::model("clip_text", folder);
    let found = outputs(
        folder,
        &forward(folder, &dir, &named("text", &["input_ids", "attention_mask"])),
    );
    near(&found, "last_hidden_state", "text.last_hidden_state");
    near(&found, "pooler_output", "text.pooler_output");
    let found = outputs(folder, &forward(folder, &dir, &named("text", &["input_ids"])));
    near(&found, "last_hidden_state", "text.unmasked");
    let found = outputs(
        folder,
        &forward(
            folder,
            &testing::model("clip_vision", folder),
            &named("vision", &["pixel_values"]),
        ),
    );
    near(&found, "last_hidden_state", "vision.last_hidden_state");
    near(&found, "image_embeds", "vision.image_embeds");
}

#[test]
fn blip_gives_the_scores_and_texts_of_transformers() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path();
    let golden_tensors = tensors("blip");
    let dir = testing::model("blip_tiny", folder);
    let at = |name: &str| golden_tensors[name].clone();
    let pixels = at("pixel_values");
    let three = pixels.narrow(0, 0, 3).unwrap();
    let texts = Tensors::from([
        ("pixel_values".to_owned(), three.clone()),
        ("input_ids".to_owned(), at("input_ids")),
    ]);
    let found = outputs(folder, &forward(folder, &dir, &texts));
    assert_eq!(found.keys().collect::<Vec<_>>(), ["image_embeds", "logits"]);
    for (name, wanted) in [("image_embeds", "states"), ("logits", "unmasked")] {
        let error = relative(&found[name], &at(wanted));
        assert!(error < 2e-5, "{name}: {error}");
    }
    let masked = Tensors::from([
        ("attention_mask".to_owned(), at("attention_mask")),
        ("input_ids".to_owned(), at("input_ids")),
        ("pixel_values".to_owned(), three),
    ]);
    let found = outputs(folder, &forward(folder, &dir, &masked));
    let real = at("attention_mask")
        .to_dtype(DType::F32)
        .unwrap()
        .unsqueeze(2)
        .unwrap();
    let of_words = |t: &Tensor| t.broadcast_mul(&real).unwrap();
    assert!(relative(&of_words(&found["logits"]), &of_words(&at("logits"))) < 2e-5);
    // Without a text one is written: the beginning, the tokens of the greedy search, and the end where there is room for it.
    let alone = Tensors::from([("pixel_values".to_owned(), pixels)]);
    let found = outputs(folder, &forward(folder, &dir, &alone));
    assert_eq!(found.keys().collect::<Vec<_>>(), ["image_embeds", "sequences"]);
    let written = found["sequences"].to_vec2::<f32>().unwrap();
    let greedy = at("greedy").to_vec2::<i64>().unwrap();
    for (row, wanted) in written.iter().zip(greedy) {
        let mut wanted: Vec<f32> = wanted
            .into_iter()
            .filter(|id| *id >= 0)
            .map(|id| id as f32)
            .collect();
        wanted.insert(0, 52.0);
        if wanted.len() < 20 {
            wanted.push(20.0);
        }
        wanted.resize(20, 0.0);
        assert_eq!(row, &wanted);
    }
    let line = forward(
        folder,
        &dir,
        &Tensors::from([(
            "pixel_values".to_owned(),
            Tensor::zeros((1, 3, 13, 12), DType::F32, CPU).unwrap(),
        )]),
    );
    assert!(line.error().contains("pixel_values"), "{}", line.stderr);
}

/// A copy of a folder of the goldens, whose `config.json` is changed.
fn copy(of: &str, to: &Path, change: impl FnOnce(&mut Value)) -> PathBuf {
    let _ = fs::remove_dir_all(to);
    fs::rename(testing::model(of, to.parent().unwrap()), to).unwrap();
    let path = to.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(&path, config.to_string()).unwrap();
    to.to_owned()
}

#[test]
fn folders_and_inputs_that_do_not_fit_are_one_line() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path();
    let to = folder.join("model");
    let golden_tensors = tensors("imagebind");
    let image = Tensors::from([("vision".to_owned(), golden_tensors["tiny.image.in"].clone())]);
    for (field, value, words) in [
        (
            "vision_num_heads",
            json!(7),
            "vision_num_heads is 7, expected a divisor of the width 36",
        ),
        (
            "vision_embed_dim",
            json!(40),
            "vision_embed_dim is 40, expected 36",
        ),
        ("audio_num_blocks", json!(2), "audio_num_blocks is 2, expected 3"),
        ("out_embed_dim", json!(1024), "out_embed_dim is 1024, expected 20"),
        ("audio_stride", json!(8), "audio_stride 8"),
        ("audio_target_len", json!(0), "audio_target_len 0"),
        ("text_num_heads", json!(-1), "config.json"),
    ] {
        let model = copy("imagebind_tiny", &to, |config| config[field] = value);
        let ran = forward(folder, &model, &image);
        assert!(ran.error().contains(words), "{}", ran.error());
    }
    // Only the tower that is asked for is looked at.
    let model = copy("imagebind_tiny", &to, |_| {});
    let path = model.join("model.safetensors");
    let mut weights = file::read(&path, CPU).unwrap().tensors;
    weights.remove("modality_trunks.audio.blocks.1.attn.bias_k");
    file::write(&path, &weights, &BTreeMap::new(), Precision::F32).unwrap();
    outputs(folder, &forward(folder, &model, &image));
    let sound = Tensors::from([("audio".to_owned(), golden_tensors["tiny.sound.in"].clone())]);
    let ran = forward(folder, &model, &sound);
    assert!(
        ran.error()
            .contains("1 missing: modality_trunks.audio.blocks.1.attn.bias_k [1, 1, 24]")
    );

    for (name, shape, words) in [
        (
            "vision",
            &[2, 3, 36, 35][..],
            "vision is [2, 3, 36, 35], expected [B, 3, 35, 35] or [B, 3, 2, 35, 35] or",
        ),
        (
            "audio",
            &[1, 1, 128, 200],
            "expected [C, 1, 128, 204] or [C, K, 1, 128, 204]",
        ),
        ("sound", &[1], "sound is unknown, known are vision, audio, text"),
    ] {
        let zeros = Tensor::zeros(shape, DType::F32, CPU).unwrap();
        let ran = forward(
            folder,
            &testing::model("imagebind_tiny", folder),
            &Tensors::from([(name.to_owned(), zeros)]),
        );
        assert!(ran.error().contains(words), "{}", ran.error());
    }
    for (field, value, words) in [
        ("num_attention_heads", json!(5), "num_attention_heads is 5"),
        ("hidden_act", json!("relu"), "relu"),
        ("image_size", json!(60), "image_size is 60"),
        (
            "num_hidden_layers",
            json!(9),
            "num_hidden_layers is 9, expected 3",
        ),
    ] {
        let model = copy("clip_vision", &to, |config| config[field] = value);
        let pixels = Tensors::from([(
            "pixel_values".to_owned(),
            Tensor::zeros((1, 3, 30, 30), DType::F32, CPU).unwrap(),
        )]);
        let ran = forward(folder, &model, &pixels);
        assert!(ran.error().contains(words), "{}", ran.error());
    }
    let mask = Tensors::from([(
        "attention_mask".to_owned(),
        Tensor::ones((1, 4), DType::I64, CPU).unwrap(),
    )]);
    let ran = forward(folder, &testing::model("clip_quick", folder), &mask);
    assert!(ran.error().contains("input_ids"), "{}", ran.error());
}

fn convert(from: &Path, to: &Path, more: &[&str]) -> Ran {
    let mut command = fulgur();
    command
        .args(["convert", "--json"])
        .arg(from)
        .arg("-o")
        .arg(to)
        .args(more);
    Ran::of(command.output().unwrap())
}

#[test]
fn checkpoints_become_safetensors() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path();
    let out = folder.join("out");
    let ran = convert(&golden("imagebind_wrapped"), &out, &[]);
    assert_eq!((ran.code, ran.json()["prefix"].as_str()), (0, Some("model.")));
    assert_eq!(names(&out), ["config.json", "model.safetensors"]);
    let tensors = file::read(&out.join("model.safetensors"), CPU).unwrap().tensors;
    assert_eq!(ran.json()["tensors"], tensors.len());
    assert_eq!(
        tensors["modality_preprocessors.vision.cls_token"].dtype(),
        DType::F16
    );
    let golden_tensors = self::tensors("imagebind");
    let inputs = Tensors::from([("audio".to_owned(), golden_tensors["wrapped.sounds.in"].clone())]);
    let found = outputs(folder, &forward(folder, &out, &inputs));
    assert!(relative(&found["audio"], &golden_tensors["wrapped.sounds.out"]) < 2e-5);

    let again = convert(&golden("imagebind_wrapped"), &out, &[]);
    assert!(again.error().contains("--force replaces it"));
    assert_eq!(convert(&golden("imagebind_wrapped"), &out, &["--force"]).code, 0);
    let file = golden("checkpoint").join("plain.pth");
    let ran = convert(&file, &folder.join("plain"), &["--precision", "bf16"]);
    assert_eq!(ran.json()["values"], 129);
    let line = convert(&file, &folder.join("x"), &["--prefix", "b"]);
    assert!(line.error().contains("expected all names to begin with b"));
    assert!(
        convert(&folder.join("absent"), &folder.join("x"), &[])
            .error()
            .contains("absent")
    );
    assert!(!folder.join("x").exists());
    let older = convert(&golden("checkpoint").join("older.pth"), &folder.join("x"), &[]);
    assert!(
        older
            .error()
            .contains("older.pth: not a usable PyTorch checkpoint: the form of PyTorch before 1.6")
    );
}

#[cfg(feature = "media")]
mod media {
    use super::*;
    use fulgur::datasets::media::{
        Picture, Sound, Video, WavFormat, WriteOptions, write_mp4, write_png, write_wav,
    };

    fn preprocess(kind: &str, file: &Path, out: &Path) -> Ran {
        let mut command = fulgur();
        command
            .args(["preprocess", "--json", kind])
            .arg(file)
            .arg("--out")
            .arg(out);
        Ran::of(command.output().unwrap())
    }

    #[test]
    fn files_are_prepared_as_the_references_do() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path();
        let (out, wav) = (folder.join("f.safetensors"), folder.join("a.wav"));
        let kaldi = tensors("kaldi");
        let wave = kaldi["wave.sweep"].to_vec1::<f32>().unwrap();
        // The second channel is not heard.
        let stereo = wave.iter().flat_map(|&x| [x, 0.5 - x]).collect();
        write_wav(&wav, &Sound::new(stereo, 2, 16_000).unwrap(), WavFormat::Float).unwrap();
        let ran = preprocess("imagebind-audio", &wav, &out);
        assert_eq!(ran.json()["features"], json!([1, 128, 204]));
        let found = file::read(&out, CPU).unwrap().tensors["features"].clone();
        let bank = &kaldi["fbank.sweep"];
        let frames = bank.dim(0).unwrap();
        let wanted = ((bank.t().unwrap() + 4.268).unwrap() / 9.138).unwrap();
        let head = found.squeeze(0).unwrap().narrow(1, 0, frames).unwrap();
        assert!(relative(&head, &wanted) < 1e-3);
        let rest = found
            .narrow(2, frames, 204 - frames)
            .unwrap()
            .flatten_all()
            .unwrap();
        assert!(
            rest.to_vec1::<f32>()
                .unwrap()
                .iter()
                .all(|x| (x - 0.467_061).abs() < 1e-5)
        );

        let png = folder.join("a.png");
        let pillow = tensors("pillow");
        let pixels = pillow["rgb"].flatten_all().unwrap().to_vec1::<u8>().unwrap();
        let small = Picture::new(pixels, 23, 19, 3).unwrap();
        write_png(&png, &small).unwrap();
        let ran = preprocess("clip-image", &png, &out);
        assert_eq!(ran.json()["features"], json!([3, 224, 224]));
        let plain = file::read(&out, CPU).unwrap().tensors["features"]
            .flatten_all()
            .unwrap();
        // Opacity is dropped, not mixed in.
        let clear = small
            .pixels
            .as_chunks::<3>()
            .0
            .iter()
            .flat_map(|&[r, g, b]| [r, g, b, 9]);
        write_png(&png, &Picture::new(clear.collect(), 23, 19, 4).unwrap()).unwrap();
        preprocess("clip-image", &png, &out);
        let clear = file::read(&out, CPU).unwrap().tensors["features"]
            .flatten_all()
            .unwrap();
        assert_eq!(clear.to_vec1::<f32>().unwrap(), plain.to_vec1::<f32>().unwrap());

        assert!(
            preprocess("imagebind-video", &png, &out)
                .error()
                .contains("invalid value 'imagebind-video'")
        );
        assert!(
            preprocess("imagebind-audio", &png, &out)
                .error()
                .contains("a.png")
        );
        assert!(preprocess("clip-image", &wav, &out).error().contains("a.wav"));
        let nowhere = folder.join("none").join("f.safetensors");
        assert!(
            preprocess("clip-image", &png, &nowhere)
                .error()
                .contains("there is no folder")
        );
    }

    fn score(cache: &Path, clips: &[&Path], more: &[&str]) -> Ran {
        let mut command = fulgur();
        command.env("XDG_CACHE_HOME", cache);
        command.args(["score", "--json", "-q", "--device", "cpu", "--encoder"]);
        let model = testing::model("imagebind_tiny", cache.parent().unwrap());
        command.arg(model).args(more).args(clips);
        Ran::of(command.output().unwrap())
    }

    fn files(folder: &Path) -> usize {
        let Ok(entries) = fs::read_dir(folder) else {
            return 0;
        };
        let entries = entries.map(|entry| entry.unwrap().path());
        entries
            .map(|path| if path.is_dir() { files(&path) } else { 1 })
            .sum()
    }

    /// A clip without compression: AVI with pictures from below in BGR, and 16-bit sound.
    fn avi(frames: &[u8], [width, height]: [usize; 2], fps: u32, samples: &[i16], channels: u16) -> Vec<u8> {
        const RATE: u32 = 16_000;
        let long = |n: usize| u32::try_from(n).unwrap().to_le_bytes();
        let chunk = |name: &[u8; 4], body: &[u8]| [&name[..], &long(body.len()), body].concat();
        let list = |name: &[u8; 4], parts: &[Vec<u8>]| chunk(b"LIST", &[&name[..], &parts.concat()].concat());
        let words = |values: &[u32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let size = width * height * 3;
        let count = frames.len() / size;
        let (w, h, n) = (width as u32, height as u32, count as u32);
        let head = words(&[1_000_000 / fps, 0, 0, 0x10, n, 0, 2, 0, w, h, 0, 0, 0, 0]);
        let stream = |kind: &[u8; 4], handler: &[u8; 4], scale: u32, rate: u32, length: u32, sample: u32| {
            let rest = words(&[0, 0, 0, scale, rate, 0, length, 0, 0, sample, 0, 0]);
            chunk(b"strh", &[&kind[..], handler, &rest].concat())
        };
        let picture = [
            words(&[40, w, h]),
            vec![1, 0, 24, 0],
            words(&[0, size as u32, 0, 0, 0, 0]),
        ]
        .concat();
        let block = channels * 2;
        let mut wave = vec![1, 0];
        wave.extend(channels.to_le_bytes());
        wave.extend(words(&[RATE, RATE * u32::from(block)]));
        wave.extend([block.to_le_bytes(), 16u16.to_le_bytes()].concat());
        let header = list(
            b"hdrl",
            &[
                chunk(b"avih", &head),
                list(
                    b"strl",
                    &[stream(b"vids", b"DIB ", 1, fps, n, 0), chunk(b"strf", &picture)],
                ),
                list(
                    b"strl",
                    &[
                        stream(
                            b"auds",
                            b"\0\0\0\0",
                            1,
                            RATE,
                            samples.len() as u32 / u32::from(channels),
                            block.into(),
                        ),
                        chunk(b"strf", &wave),
                    ],
                ),
            ],
        );
        let mut parts = Vec::new();
        let share = samples
            .len()
            .div_ceil(count)
            .next_multiple_of(usize::from(channels));
        for (i, frame) in frames.chunks_exact(size).enumerate() {
            let rows = frame.chunks_exact(width * 3).rev();
            let bgr: Vec<u8> = rows
                .flat_map(|row| row.chunks_exact(3).flat_map(|p| [p[2], p[1], p[0]]))
                .collect();
            parts.push(chunk(b"00db", &bgr));
            let from = (i * share).min(samples.len());
            let sound = &samples[from..(from + share).min(samples.len())];
            let sound: Vec<u8> = sound.iter().flat_map(|s| s.to_le_bytes()).collect();
            parts.push(chunk(b"01wb", &sound));
        }
        chunk(b"RIFF", &[&b"AVI "[..], &header, &list(b"movi", &parts)].concat())
    }

    #[test]
    fn a_whole_clip_scores_as_in_torch() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path();
        let golden = tensors("imagebind_clip");
        let frames = golden["frames"].flatten_all().unwrap().to_vec1::<u8>().unwrap();
        let wave = golden["wave"].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let samples: Vec<i16> = wave.iter().map(|x| (x * 32_768.0) as i16).collect();
        let exact = wave
            .iter()
            .zip(&samples)
            .all(|(x, s)| *x * 32_768.0 == f32::from(*s));
        assert!(exact, "samples that are no steps of 2^-15");
        let made = folder.join("made");
        fs::create_dir(&made).unwrap();
        let clip = made.join("a.avi");
        fs::write(&clip, avi(&frames, [28, 20], 6, &samples, 2)).unwrap();
        let one = |name: &str| f64::from(golden[name].to_scalar::<f32>().unwrap());
        let ran = score(&folder.join("cache"), &[&clip], &[]);
        let result = ran.json()["results"][0].clone();
        assert_eq!(
            (&result["frames"], &result["flags"]),
            (&json!(33), &json!([])),
            "{}",
            ran.stderr
        );
        let found = result["avhscore"].as_f64().unwrap();
        assert!((found - one("avhscore")).abs() < 1e-4, "{found}");
        let model = testing::model("imagebind_tiny", folder);
        let mut command = fulgur();
        command.args([
            "metrics",
            "--json",
            "-q",
            "--device",
            "cpu",
            "--metric",
            "avhscore,ib_av",
            "--generated",
        ]);
        command.arg(&made);
        for name in ["imagebind", "encoder"] {
            command
                .arg("--weights")
                .arg(format!("{name}={}", model.display()));
        }
        let ran = Ran::of(command.output().unwrap());
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        for (metric, name) in [("avhscore", "avhscore"), ("ib_av", "av")] {
            let found = ran.json()["metrics"][metric]["value"].as_f64().unwrap();
            assert!((found - one(name)).abs() < 1e-4, "{metric}: {found}");
        }
    }

    #[test]
    fn clips_are_scored_with_imagebind_and_remembered() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path();
        let (cache, clip, mute) = (folder.join("cache"), folder.join("a.mp4"), folder.join("b.mp4"));
        let bytes = (0..6 * 48 * 64 * 3).map(|i| (i / 7 % 256) as u8).collect();
        let video = Video::new(bytes, 64, 48, 2.0).unwrap();
        let wave = (0..48_000).map(|i| 0.3 * (i as f32 * 0.05).sin()).collect();
        let sound = Sound::new(wave, 1, 16_000).unwrap();
        write_mp4(&clip, &video, Some(&sound), &WriteOptions::default()).unwrap();
        write_mp4(&mute, &video, None, &WriteOptions::default()).unwrap();

        let first = score(&cache, &[&clip], &[]);
        assert_eq!(first.code, 0);
        let result = first.json()["results"][0].clone();
        assert_eq!(
            (first.json()["encoder"].as_str(), result["frames"].as_u64()),
            (Some("imagebind"), Some(6))
        );
        let value = result["avhscore"].as_f64().unwrap();
        assert!((-1.0..=1.0).contains(&value));
        assert_eq!(files(&cache), 1);
        assert_eq!(score(&cache, &[&clip], &[]).stdout, first.stdout);
        assert_eq!(score(&cache, &[&clip], &["--no-cache"]).stdout, first.stdout);
        assert_eq!(files(&cache), 1);

        // An entry is what is answered, by the content of the clip and whatever its name.
        let moved = folder.join("c.mp4");
        fs::copy(&clip, &moved).unwrap();
        let few = score(&cache, &[&moved, &mute], &["--max-frames", "2"]).json();
        assert_eq!(files(&cache), 3);
        assert_eq!(
            (few["results"][0]["frames"].as_u64(), few["n"].as_u64()),
            (Some(2), Some(1))
        );
        assert_eq!(few["results"][0]["flags"], json!(["frames_subsampled"]));
        assert_eq!(few["results"][1]["reason"], "no audio stream");
        let spoiled = |path: &Path| fs::write(path, "spoiled").unwrap();
        for entry in walk(&cache) {
            spoiled(&entry);
        }
        assert_eq!(score(&cache, &[&clip], &[]).stdout, first.stdout);

        let odd = score(&cache, &[&clip], &["--precision", "bf16"]);
        assert!(odd.error().contains("on the CPU only f32"), "{}", odd.error());
        let ran = Ran::of(
            fulgur()
                .args(["score", "--encoder"])
                .arg(folder.join("none"))
                .arg(&clip)
                .output()
                .unwrap(),
        );
        assert!(ran.error().contains("none"), "{}", ran.error());
    }

    fn walk(folder: &Path) -> Vec<PathBuf> {
        let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        paths
            .flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] })
            .collect()
    }
}

#[test]
fn random_models_of_any_size_run() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path();
    let (config, out) = (folder.join("c.json"), folder.join("m"));
    let sizes = json!({"audio_embed_dim": 24, "audio_num_blocks": 1, "audio_num_heads": 4, "out_embed_dim": 6, "note": "a test"});
    fs::write(&config, sizes.to_string()).unwrap();
    let init = |out: &Path| {
        let mut command = fulgur();
        command
            .args(["init", "--json", "--random", "3"])
            .arg(&config)
            .arg("-o")
            .arg(out);
        Ran::of(command.output().unwrap())
    };
    let ran = init(&out);
    assert_eq!(
        (ran.code, names(&out)),
        (0, vec!["config.json".to_owned(), "model.safetensors".to_owned()])
    );
    let sound = Tensor::ones((2, 1, 128, 204), DType::F32, CPU).unwrap();
    let found = outputs(
        folder,
        &forward(folder, &out, &Tensors::from([("audio".to_owned(), sound)])),
    );
    let length = found["audio"]
        .sqr()
        .unwrap()
        .sum(1)
        .unwrap()
        .to_vec1::<f32>()
        .unwrap();
    assert!(length.iter().all(|square| (square.sqrt() - 20.0).abs() < 1e-3));
    assert!(init(&out).error().contains("holds a model already"));
    let same = folder.join("n");
    init(&same);
    assert_eq!(
        fs::read(out.join("model.safetensors")).unwrap(),
        fs::read(same.join("model.safetensors")).unwrap()
    );
    for (sizes, words) in [
        (json!({}), "found no vision_embed_dim"),
        (
            json!({"text_embed_dim": 8, "out_embed_dim": 8}),
            "text_num_blocks is missing",
        ),
        (
            json!({"text_embed_dim": 8, "text_num_blocks": 1, "out_embed_dim": 8}),
            "text_num_heads is 16",
        ),
        (
            json!({"vision_embed_dim": 1u64 << 40, "vision_num_blocks": 1, "out_embed_dim": 8}),
            "vision_embed_dim is",
        ),
        (
            json!({"audio_embed_dim": 12, "audio_num_blocks": 1, "out_embed_dim": 8, "audio_stride": 0}),
            "every 0",
        ),
    ] {
        fs::write(&config, sizes.to_string()).unwrap();
        let ran = init(&folder.join("o"));
        assert!(ran.error().contains(words), "{}", ran.error());
    }
}
