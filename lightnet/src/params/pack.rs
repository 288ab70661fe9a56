//! Small copies of trained model folders: tensors that use does not need are left out, the rest is stored in fewer bits.
//!
//! A packed folder is made in memory, so that its size is known before anything is written.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::{ParamsError, Precision, few_bits, file};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const TOKENIZER: &str = "tokenizer.json";
/// Largest `config.json` or `tokenizer.json` that is copied.
const LARGEST_TEXT: u64 = 64 << 20;

/// What storing weights in fewer bits cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounding {
    /// Values that were kept.
    pub values: usize,
    /// Values that were left out.
    pub dropped: usize,
    /// Root mean square of the rounding errors over that of the values, all tensors together.
    pub error: f64,
    /// The tensor with the largest error of its own, and that error; `None` where nothing was rounded.
    pub worst: Option<(String, f64)>,
}

/// A model folder in memory.
#[derive(Clone, Debug)]
pub struct PackedFolder {
    /// Names and contents of its files.
    pub files: Vec<(&'static str, Vec<u8>)>,
    /// What the weights lost.
    pub rounding: Rounding,
}

impl PackedFolder {
    /// Packs `config.json`, `model.safetensors` and, where there is one, `tokenizer.json` of `dir`: the tensors whose
    /// names `keep` accepts, stored as `precision`.
    ///
    /// # Errors
    /// A file is missing or not well-formed, or a value does not fit `precision`.
    pub fn new(dir: &Path, precision: Precision, keep: impl Fn(&str) -> bool) -> Result<Self, ParamsError> {
        let mut files = vec![(CONFIG, file::read_bounded(&dir.join(CONFIG), LARGEST_TEXT)?)];
        let (weights, rounding) = pack_weights(&dir.join(WEIGHTS), precision, keep)?;
        files.push((WEIGHTS, weights));
        let tokenizer = dir.join(TOKENIZER);
        if tokenizer.exists() {
            files.push((TOKENIZER, file::read_bounded(&tokenizer, LARGEST_TEXT)?));
        }
        Ok(Self { files, rounding })
    }

    /// Size of all files together.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|(_, bytes)| bytes.len() as u64).sum()
    }

    /// Writes the files into the folder `dir`, which exists.
    ///
    /// # Errors
    /// The folder cannot be written, or the disk is full.
    pub fn write(&self, dir: &Path) -> Result<(), ParamsError> {
        for (name, bytes) in &self.files {
            file::write_atomically(&dir.join(name), |out| out.write_all(bytes))?;
        }
        Ok(())
    }
}

/// The bytes of the packed file, and what a reader of it loses.
fn pack_weights(
    path: &Path,
    precision: Precision,
    keep: impl Fn(&str) -> bool,
) -> Result<(Vec<u8>, Rounding), ParamsError> {
    let contents = file::read(path, &Device::Cpu)?;
    let (kept, left_out): (BTreeMap<_, _>, BTreeMap<_, _>) = few_bits::widen(path, contents.tensors)?
        .into_iter()
        .partition(|(name, _)| keep(name));
    let bytes = file::encode(path, &kept, &contents.metadata, precision)?;
    // Measured on what will be read, not on what was meant to be written.
    let stored = few_bits::widen(path, file::decode(path, &bytes, &Device::Cpu)?.tensors)?;
    let mut rounding = Rounding {
        values: kept.values().map(Tensor::elem_count).sum(),
        dropped: left_out.values().map(Tensor::elem_count).sum(),
        error: 0.0,
        worst: None,
    };
    let (mut errors, mut powers) = (0.0, 0.0);
    for (name, tensor) in &kept {
        let (error, power) = squares(tensor, stored.get(name))?;
        if !power.is_finite() {
            return Err(ParamsError::Value {
                path: path.to_path_buf(),
                name: name.clone(),
                reason: "found values that are not finite, expected a trained tensor".into(),
            });
        }
        errors += error;
        powers += power;
        let relative = ratio(error, power);
        if relative > rounding.worst.as_ref().map_or(0.0, |(_, worst)| *worst) {
            rounding.worst = Some((name.clone(), relative));
        }
    }
    rounding.error = ratio(errors, powers);
    Ok((bytes, rounding))
}

/// Sum of the squared errors and of the squared values, in f64.
fn squares(tensor: &Tensor, stored: Option<&Tensor>) -> Result<(f64, f64), ParamsError> {
    let values = |tensor: &Tensor| tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
    let exact = values(tensor)?;
    let rounded = stored.map_or(Ok(vec![0.0; exact.len()]), values)?;
    let error = exact.iter().zip(&rounded).map(|(x, y)| (x - y).powi(2)).sum();
    Ok((error, exact.iter().map(|x| x.powi(2)).sum()))
}

fn ratio(error: f64, power: f64) -> f64 {
    if power > 0.0 { (error / power).sqrt() } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::super::{Frozen, Params};
    use super::*;
    use candle_nn::Init;

    fn source() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let params = Params::random(3, &Device::Cpu);
        let randn = Init::Randn {
            mean: 0.0,
            stdev: 0.1,
        };
        let vb = params.builder();
        vb.get_with_hints((96, 320), "decoder.weight", randn).unwrap();
        vb.get_with_hints(96, "decoder.bias", randn).unwrap();
        vb.get_with_hints((10, 20), "encoder.weight", randn).unwrap();
        params
            .save(&folder.path().join(WEIGHTS), &BTreeMap::new(), Precision::F32)
            .unwrap();
        std::fs::write(folder.path().join(CONFIG), "{\"a\": 1}").unwrap();
        folder
    }

    #[test]
    fn parts_are_left_out_and_the_rest_is_rounded_as_reported() {
        let source = source();
        let keep = |name: &str| !name.starts_with("encoder.");
        let exact = PackedFolder::new(source.path(), Precision::F32, keep).unwrap();
        assert_eq!(
            (exact.rounding.values, exact.rounding.dropped),
            (96 * 320 + 96, 200)
        );
        assert_eq!((exact.rounding.error, &exact.rounding.worst), (0.0, &None));

        let half = PackedFolder::new(source.path(), Precision::F16, keep).unwrap();
        assert!(half.rounding.error > 1e-5 && half.rounding.error < 1.0 / 2048.0);

        let packed = PackedFolder::new(source.path(), Precision::EightBit, keep).unwrap();
        // Normal values in groups of 64 lose 0.60 %.
        assert!(
            (packed.rounding.error - 0.006).abs() < 3e-4,
            "{:?}",
            packed.rounding
        );
        let (worst, error) = packed.rounding.worst.as_ref().unwrap();
        assert!(worst == "decoder.weight" && (error - packed.rounding.error).abs() < 1e-4);
        assert!(packed.bytes() * 10 < exact.bytes() * 3 && half.bytes() * 10 < exact.bytes() * 6);

        let target = tempfile::tempdir().unwrap();
        packed.write(target.path()).unwrap();
        let written = |name: &str| std::fs::read(target.path().join(name)).unwrap();
        assert_eq!(written(CONFIG), b"{\"a\": 1}");
        assert_eq!(
            packed.bytes(),
            (written(CONFIG).len() + written(WEIGHTS).len()) as u64
        );
        let weights = Frozen::open(&target.path().join(WEIGHTS), &Device::Cpu).unwrap();
        assert_eq!(
            weights.tensors().keys().collect::<Vec<_>>(),
            ["decoder.bias", "decoder.weight"]
        );

        // A packed folder can be packed again, also back to wide values.
        let again = PackedFolder::new(target.path(), Precision::F32, |_| true).unwrap();
        assert_eq!(again.rounding.error, 0.0);
        assert!(again.bytes() > packed.bytes());
    }

    #[test]
    fn a_missing_file_is_named() {
        let source = source();
        for name in [CONFIG, WEIGHTS] {
            let path = source.path().join(name);
            let kept = std::fs::read(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
            let message = PackedFolder::new(source.path(), Precision::F16, |_| true)
                .unwrap_err()
                .to_string();
            assert!(message.contains(name), "{message}");
            std::fs::write(&path, kept).unwrap();
        }
    }
}
