//! Resampling against torchaudio. `tests/golden/kaldi.py` made the expected sounds.

use std::path::PathBuf;

use fulgur_datasets::media::{Sound, resample_windowed};
use fulgur_datasets::store::Mapped;

#[test]
fn resampled_sounds_are_those_of_torchaudio() {
    let path: PathBuf = [
        env!("CARGO_MANIFEST_DIR"),
        "..",
        "tests",
        "golden",
        "kaldi.safetensors",
    ]
    .iter()
    .collect();
    let golden = Mapped::open(&path).unwrap();
    let wave = |name: &str| -> Vec<f32> {
        let tensor = golden.tensor(name).unwrap_or_else(|| panic!("no {name}"));
        let values = tensor.data().as_chunks().0.iter();
        values.map(|&bytes| f32::from_le_bytes(bytes)).collect()
    };
    let names = golden.names();
    let cases: Vec<&str> = names
        .iter()
        .filter_map(|name| name.strip_prefix("rate.")?.strip_suffix(".in"))
        .collect();
    assert_eq!(cases.len(), 7);
    for case in cases {
        let (from, to) = case.split_once('.').unwrap();
        let sound = Sound::new(wave(&format!("rate.{case}.in")), 1, from.parse().unwrap()).unwrap();
        let found = resample_windowed(&sound, to.parse().unwrap()).unwrap();
        let expected = wave(&format!("rate.{case}.out"));
        assert_eq!(found.len(), expected.len(), "{case}");
        let worst = found
            .samples
            .iter()
            .zip(&expected)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        // The reference computes its window in f32.
        assert!(worst < 3e-5, "{case}: {worst}");
    }
}
