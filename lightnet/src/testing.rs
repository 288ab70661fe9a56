//! Golden files for tests: what other implementations computed in `tests/golden`, and the random tensors that both sides draw from
//! names instead of storing them.
//!
//! `tests/golden/drawn.py` defines how tensors are drawn and draws them for the generators. Whatever is wrong with a golden file
//! is a panic that names it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde_json::Value;

use crate::params::{Precision, file};

/// What a folder of `tests/golden` says of tensors that are drawn, and the tensors that are not.
const DRAWN: &str = "drawn.json";
const REST: &str = "rest.safetensors";

/// Where `tests/golden/NAME` is.
#[must_use]
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden")
        .join(name)
}

/// Tensors of `tests/golden/NAME.safetensors`, and those of `NAME.drawn.json` where there is one.
///
/// # Panics
/// A file is missing or malformed.
#[must_use]
pub fn tensors(name: &str) -> BTreeMap<String, Tensor> {
    let stored = golden(&format!("{name}.safetensors"));
    let mut tensors = file::read(&stored, &Device::Cpu).unwrap().tensors;
    let how = golden(&format!("{name}.{DRAWN}"));
    if how.exists() {
        tensors.extend(drawn_file(&how));
    }
    tensors
}

/// The model of `tests/golden/NAME` as a folder of its own, `within/NAME`, that holds all weights; one that is there stays.
///
/// Drawn weights are written to `model.safetensors`, or to the shards that an index names.
///
/// # Panics
/// A file is missing or malformed, or `within` is not writable.
#[must_use]
pub fn model(name: &str, within: &Path) -> PathBuf {
    let (from, to) = (golden(name), within.join(name));
    if to.exists() {
        return to;
    }
    fs::create_dir_all(&to).unwrap();
    for entry in fs::read_dir(&from).unwrap() {
        let name = entry.unwrap().file_name();
        if name != DRAWN && name != REST {
            fs::copy(from.join(&name), to.join(&name)).unwrap();
        }
    }
    if from.join(DRAWN).exists() {
        let mut weights = drawn_file(&from.join(DRAWN));
        if from.join(REST).exists() {
            weights.extend(file::read(&from.join(REST), &Device::Cpu).unwrap().tensors);
        }
        write(&to, weights);
    }
    to
}

/// Tensors of these names and shapes by the rule `plain` of `drawn.py`, for models whose names a test knows.
///
/// # Panics
/// A shape has more places than memory.
#[must_use]
pub fn plainly(shapes: &BTreeMap<String, Vec<usize>>) -> BTreeMap<String, Tensor> {
    let one = |(name, shape): (&String, &Vec<usize>)| {
        let inputs: usize = shape.iter().skip(1).product();
        let (deviation, centre) = match shape.len() {
            0 | 1 if name.ends_with("weight") || name.ends_with("scale") => (0.15, 1),
            0 | 1 => (0.15, 0),
            _ => (1.2 / (inputs as f64).sqrt(), 0),
        };
        let how = serde_json::json!([shape, exponent(deviation), centre]);
        (name.clone(), draw(name, &how))
    };
    shapes.iter().map(one).collect()
}

/// Standard normal in its first two moments, and drawn.
///
/// # Panics
/// A shape has more places than memory.
#[must_use]
pub fn unit(name: &str, shape: &[usize]) -> Tensor {
    draw(name, &serde_json::json!([shape, exponent(1.0)]))
}

/// The exponent of the deviation that is nearest.
fn exponent(deviation: f64) -> i64 {
    (deviation / 147.8).log2().round_ties_even() as i64
}

/// Of names and shapes, as `drawn.py` has it: whether two sides mean the same tensors.
#[must_use]
pub fn digest(shapes: &BTreeMap<String, Vec<usize>>) -> String {
    let lines: Vec<String> = shapes
        .iter()
        .map(|(name, shape)| format!("{name} {shape:?}\n"))
        .collect();
    format!("{:016x}", hashed(&lines.concat()))
}

/// Writes the weights of a model as the libraries do.
fn write(folder: &Path, weights: BTreeMap<String, Tensor>) {
    let index = folder.join("model.safetensors.index.json");
    let places = index.exists().then(|| json(&index)["weight_map"].clone());
    let mut files: BTreeMap<String, BTreeMap<String, Tensor>> = BTreeMap::new();
    for (name, tensor) in weights {
        let place = match &places {
            Some(places) => places[&name].as_str().expect("a shard of each tensor"),
            None => "model.safetensors",
        };
        files.entry(place.to_owned()).or_default().insert(name, tensor);
    }
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    for (name, tensors) in files {
        file::write(&folder.join(name), &tensors, &metadata, Precision::F32).unwrap();
    }
}

/// Every k-th value of a tensor, for golden files that do not hold all of a large one.
///
/// # Panics
/// `every` is 0.
#[must_use]
pub fn thinned(tensor: &Tensor, every: usize) -> Tensor {
    let flat = tensor.flatten_all().unwrap();
    let places: Vec<u32> = (0..flat.elem_count() as u32).step_by(every).collect();
    let places = Tensor::new(places, tensor.device()).unwrap();
    flat.index_select(&places, 0).unwrap()
}

fn json(path: &Path) -> Value {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The tensors that a file describes, each by `[shape, exponent, centre, sweeps]`.
///
/// # Panics
/// The file is missing or malformed.
#[must_use]
pub fn drawn_file(path: &Path) -> BTreeMap<String, Tensor> {
    let Value::Object(all) = json(path) else {
        panic!("{}: expected an object", path.display());
    };
    all.into_iter()
        .map(|(name, how)| {
            let tensor = draw(&name, &how);
            (name, tensor)
        })
        .collect()
}

fn draw(name: &str, how: &Value) -> Tensor {
    let shape = how[0].as_array().expect("a shape").iter();
    let shape: Vec<usize> = shape
        .map(|size| size.as_u64().expect("a size") as usize)
        .collect();
    let raw = bytes(name, shape.iter().product());
    if how[1] == "u8" {
        return Tensor::from_vec(raw, shape, &Device::Cpu).unwrap();
    }
    let step = if how[1].is_null() { 0.0 } else { power(&how[1]) };
    let centre = how[2].as_f64().unwrap_or(0.0);
    let mut values: Vec<f64> = raw
        .into_iter()
        .map(|byte| centre + f64::from(2 * i16::from(byte) - 255) * step)
        .collect();
    for sweep in how[3].as_array().into_iter().flatten() {
        add_sweep(&mut values, sweep);
    }
    let values = values.into_iter().map(|value| value as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn power(exponent: &Value) -> f64 {
    2f64.powi(exponent.as_i64().expect("an exponent") as i32)
}

fn hashed(text: &str) -> u64 {
    let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
    text.bytes().fold(0xCBF2_9CE4_8422_2325, fnv)
}

/// Bytes that depend on the name and their place alone.
fn bytes(name: &str, count: usize) -> Vec<u8> {
    let seed = hashed(name);
    let at = |i: u64| {
        let mut z = seed.wrapping_add((i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 56) as u8
    };
    (0..count as u64).map(at).collect()
}

/// A sine made of parabolas, of a phase whose turn is 2^32; from -2^14 to 2^14.
fn sine(phase: u64) -> i64 {
    let half = (phase >> 16 & 0x7FFF) as i64;
    let value = (half * (0x8000 - half)) >> 14;
    if phase >> 31 & 1 == 1 { -value } else { value }
}

/// Adds `[from, to, step, rise, fade, exponent]`.
fn add_sweep(values: &mut [f64], sweep: &Value) {
    let whole = |i: usize| sweep[i].as_u64().expect("a whole number");
    let (start, end) = (whole(0) as usize, (whole(1) as usize).min(values.len()));
    let (step, rise, fade, size) = (whole(2), whole(3), whole(4), power(&sweep[5]));
    for (k, value) in (0u64..).zip(&mut values[start..end]) {
        let phase = step.wrapping_mul(k).wrapping_add(rise.wrapping_mul(k * k));
        let left = if fade == 0 { 1 } else { fade.saturating_sub(k) };
        *value += (sine(phase) * left as i64) as f64 * size;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// What `tests/golden/drawn.py` prints.
    #[test]
    #[allow(clippy::excessive_precision)] // Sums of powers of two, which f32 holds as they are written.
    fn tensors_are_those_of_python() {
        let tensor = draw("a.weight", &json!([[2, 5], -9, 1]));
        assert_eq!(
            tensor.to_vec2::<f32>().unwrap(),
            [
                [1.169921875, 0.728515625, 1.404296875, 1.478515625, 0.544921875],
                [0.728515625, 1.244140625, 1.330078125, 1.326171875, 1.064453125]
            ]
        );
        let tensor = draw("b", &json!([[7], "u8"]));
        assert_eq!(tensor.to_vec1::<u8>().unwrap(), [86, 91, 160, 47, 216, 238, 6]);
        let sweeps = json!([
            [0, 6, (1u64 << 32) / 7, 1_000_003, 0, -15],
            [4, 20, (1u64 << 31) - 5, 77, 4, -16]
        ]);
        let tensor = draw("wave", &json!([[9], -14, 0, sweeps]));
        assert_eq!(
            tensor.to_vec1::<f32>().unwrap(),
            [
                0.00579833984375,
                0.404693603515625,
                0.48773193359375,
                0.224395751953125,
                -0.259368896484375,
                -0.498992919921875,
                0.01153564453125,
                0.00714111328125,
                0.00445556640625
            ]
        );
    }

    #[test]
    fn shards_are_those_of_the_index() {
        let root = tempfile::tempdir().unwrap();
        let folder = model("llama_scaled", root.path());
        let index = json(&folder.join("model.safetensors.index.json"));
        let map = index["weight_map"].as_object().unwrap();
        let mut found = 0;
        for (name, place) in map {
            let shapes = file::shapes(&folder.join(place.as_str().unwrap())).unwrap();
            assert!(shapes.contains_key(name), "{name}");
            found = found.max(shapes.len());
        }
        assert!(found < map.len());
    }

    #[test]
    fn thinned_keeps_the_first_of_every_few() {
        let tensor = Tensor::arange(0u32, 8, &Device::Cpu)
            .unwrap()
            .reshape((2, 4))
            .unwrap();
        assert_eq!(thinned(&tensor, 3).to_vec1::<u32>().unwrap(), [0, 3, 6]);
    }
}
