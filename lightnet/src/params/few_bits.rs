//! Weights in few bits: a matrix `NAME` `[.., columns]` is stored as U8 beside scales in BF16, `[rows, groups]`. Rows run
//! over the first dimension; a row is cut into equal groups of at most 64 values with a scale each.
//!
//! | | codes | scales | a code stands for | bits a value | normal values lose |
//! |---|---|---|---|---|---|
//! | 8 bits | `NAME`, same shape | `NAME.scale` | `(code - 128) * scale` | 8.25 | 0.60 % |
//! | 6 bits | `NAME`, four codes of the last dimension in three bytes, the first in the lowest bits | `NAME.scale6` | `(code - 32) * scale` | 6.25 | 2.5 % |
//!
//! (Relative root mean square.) A last dimension that is no multiple of 4 takes 8 bits in either case.
//!
//! One scale a row would save 3 % of the bytes, but an outlier then spoils a whole row: in 8 bits normal values lose 0.71 %
//! instead of 0.60 %, those of a t-distribution with four degrees of freedom 1.35 % instead of 0.89 %. BF16 has the range
//! of f32, so that no scale is lost to underflow.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use half::bf16;

use super::ParamsError;

/// Values that share a scale, at most.
const GROUP: usize = 64;
/// Tensors with fewer values stay as they are: their bytes do not count, their errors would.
const MIN_VALUES: usize = 1024;
/// Codes of 6 bits that share three bytes.
const PACKED: usize = 4;
/// How many bits a code has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bits {
    Eight,
    Six,
}

impl Bits {
    pub(super) const ALL: [Self; 2] = [Self::Eight, Self::Six];

    /// What the name of the scales ends with.
    fn suffix(self) -> &'static str {
        match self {
            Self::Eight => ".scale",
            Self::Six => ".scale6",
        }
    }

    /// Name of the scales of the tensor `name`.
    pub(super) fn scale_name(self, name: &str) -> String {
        format!("{name}{}", self.suffix())
    }

    /// Steps on either side of zero.
    fn steps(self) -> f32 {
        match self {
            Self::Eight => 127.0,
            Self::Six => 31.0,
        }
    }

    /// Code of the value zero.
    fn zero_point(self) -> f32 {
        self.steps() + 1.0
    }

    /// These bits, or more of them where the last dimension does not split.
    fn fitting(self, shape: &[usize]) -> Self {
        match self {
            Self::Six if shape.last().is_some_and(|last| last.is_multiple_of(PACKED)) => Self::Six,
            _ => Self::Eight,
        }
    }

    /// Shape of the codes of a tensor.
    fn stored_shape(self, shape: &[usize]) -> Vec<usize> {
        self.scaled(shape, PACKED, 3)
    }

    /// Shape of the tensor with these codes; `None` if there is none.
    fn full_shape(self, stored: &[usize]) -> Option<Vec<usize>> {
        let whole = self == Self::Eight || stored.last().is_some_and(|last| last.is_multiple_of(3));
        whole.then(|| self.scaled(stored, 3, PACKED))
    }

    fn scaled(self, shape: &[usize], from: usize, to: usize) -> Vec<usize> {
        let mut shape = shape.to_vec();
        if let (Self::Six, Some(last)) = (self, shape.last_mut()) {
            *last = (*last / from).saturating_mul(to);
        }
        shape
    }
}

/// The tensor whose scales bear this name.
pub fn of_scales(name: &str) -> Option<&str> {
    Bits::ALL.iter().find_map(|bits| name.strip_suffix(bits.suffix()))
}

/// Whether a tensor is large enough, and of a kind, to be stored in few bits: matrices are, vectors and integers are not.
pub(super) fn applies(tensor: &Tensor) -> bool {
    let float = matches!(tensor.dtype(), DType::F64 | DType::F32 | DType::F16 | DType::BF16);
    float && tensor.rank() >= 2 && tensor.elem_count() >= MIN_VALUES
}

/// Groups of a row and their length; the last group may be shorter.
fn groups(columns: usize) -> (usize, usize) {
    let groups = columns.div_ceil(GROUP);
    (groups, columns.div_ceil(groups.max(1)).max(1))
}

/// A tensor in few bits.
pub(super) struct Narrow {
    pub(super) codes: Tensor,
    pub(super) scales: Tensor,
    pub(super) scale_name: String,
}

/// Codes and scales of a tensor that [`applies`].
///
/// # Errors
/// A value that is not finite.
pub(super) fn narrow(path: &Path, name: &str, tensor: &Tensor, bits: Bits) -> Result<Narrow, ParamsError> {
    let bits = bits.fitting(tensor.dims());
    let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    let values = tensor.flatten_all()?.to_vec1::<f32>()?;
    if let Some(value) = values.iter().find(|value| !value.is_finite()) {
        return Err(ParamsError::Value {
            path: path.to_path_buf(),
            name: name.to_string(),
            reason: format!("{value} cannot be stored in few bits"),
        });
    }
    let rows = tensor.dim(0)?;
    let columns = values.len() / rows;
    let (count, length) = groups(columns);
    let mut codes = Vec::with_capacity(values.len());
    let mut scales = Vec::with_capacity(rows * count);
    for group in values.chunks(columns).flat_map(|row| row.chunks(length)) {
        let scale = scale_of_stored(group, bits).unwrap_or_else(|| scale_to(largest(group), bits));
        codes.extend(
            group
                .iter()
                .map(|&value| (whole_steps(value, scale, bits) + bits.zero_point()) as u8),
        );
        scales.push(scale);
    }
    if bits == Bits::Six {
        codes = codes.chunks_exact(PACKED).flat_map(pack).collect();
    }
    Ok(Narrow {
        codes: Tensor::from_vec(codes, bits.stored_shape(tensor.dims()), &Device::Cpu)?,
        scales: Tensor::from_vec(scales, (rows, count), &Device::Cpu)?,
        scale_name: bits.scale_name(name),
    })
}

/// Four codes in three bytes.
fn pack(codes: &[u8]) -> [u8; 3] {
    let word = codes
        .iter()
        .rev()
        .fold(0u32, |word, &code| word << 6 | u32::from(code));
    let [a, b, c, _] = word.to_le_bytes();
    [a, b, c]
}

/// The four codes of three bytes.
fn unpack(bytes: &[u8]) -> [u8; PACKED] {
    let word = bytes
        .iter()
        .rev()
        .fold(0u32, |word, &byte| word << 8 | u32::from(byte));
    std::array::from_fn(|i| (word >> (6 * i) & 63) as u8)
}

/// The multiple of the scale that is nearest to `value` among those that codes have.
fn whole_steps(value: f32, scale: bf16, bits: Bits) -> f32 {
    // A group of zeros has no step; any other one gives it the code of zero.
    let step = if scale.to_f32() > 0.0 { scale.to_f32() } else { 1.0 };
    (value / step).round().clamp(-bits.steps(), bits.steps())
}

fn largest(group: &[f32]) -> f32 {
    group.iter().fold(0f32, |largest, value| largest.max(value.abs()))
}

/// The smallest scale that reaches `largest`: rounded up, so that no value up to it is cut off.
fn scale_to(largest: f32, bits: Bits) -> bf16 {
    let exact = largest / bits.steps();
    let near = bf16::from_f32(exact);
    if near.to_f32() < exact {
        bf16::from_bits(near.to_bits() + 1)
    } else {
        near
    }
}

/// The scale of a group that was in so many bits before, so that storing it again changes nothing: a bf16 number of which
/// all values are whole multiples.
fn scale_of_stored(group: &[f32], bits: Bits) -> Option<bf16> {
    let largest = largest(group);
    // Rounding a scale up costs the largest code at most one step.
    [bits.steps(), bits.steps() - 1.0].into_iter().find_map(|code| {
        let scale = bf16::from_f32(largest / code);
        let step = scale.to_f32();
        let whole =
            step > 0.0 && step * code == largest && group.iter().all(|value| (value / step).fract() == 0.0);
        whole.then_some(scale)
    })
}

/// Replaces the shapes of codes by those of the tensors they stand for, and leaves out the scales.
pub fn widen_shapes(shapes: &mut BTreeMap<String, Vec<usize>>) {
    for bits in Bits::ALL {
        let names: Vec<String> = shapes.keys().cloned().collect();
        for name in names {
            if shapes.contains_key(&name) && shapes.remove(&bits.scale_name(&name)).is_some() {
                let full = shapes.get(&name).and_then(|stored| bits.full_shape(stored));
                shapes.extend(full.map(|full| (name, full)));
            }
        }
    }
}

/// Replaces every tensor in few bits and its scales by f32 values; other tensors pass.
pub(super) fn widen(
    path: &Path,
    mut tensors: BTreeMap<String, Tensor>,
) -> Result<BTreeMap<String, Tensor>, ParamsError> {
    let coded = |name: &str| {
        Bits::ALL
            .into_iter()
            .find(|bits| tensors.contains_key(&bits.scale_name(name)))
    };
    let names: Vec<(String, Bits)> = tensors
        .iter()
        .filter(|(_, tensor)| tensor.dtype() == DType::U8)
        .filter_map(|(name, _)| Some((name.clone(), coded(name)?)))
        .collect();
    for (name, bits) in names {
        let (Some(codes), Some(scales)) = (tensors.remove(&name), tensors.remove(&bits.scale_name(&name)))
        else {
            continue;
        };
        let wide = widen_one(path, &name, &codes, &scales, bits)?;
        tensors.insert(name, wide);
    }
    Ok(tensors)
}

fn widen_one(
    path: &Path,
    name: &str,
    codes: &Tensor,
    scales: &Tensor,
    bits: Bits,
) -> Result<Tensor, ParamsError> {
    let malformed = |reason: String| ParamsError::Malformed {
        path: path.to_path_buf(),
        reason,
    };
    let Some(shape) = bits.full_shape(codes.dims()) else {
        let found = codes.dims();
        return Err(malformed(format!(
            "tensor `{name}`: found codes of 6 bits of shape {found:?}, expected a multiple of 3 at the end"
        )));
    };
    let mut values = codes.flatten_all()?.to_vec1::<u8>()?;
    if bits == Bits::Six {
        values = values.chunks_exact(3).flat_map(unpack).collect();
    }
    let rows = shape.first().copied().unwrap_or(0);
    let columns = values.len() / rows.max(1);
    let (count, length) = groups(columns);
    if scales.dims() != [rows, count] || scales.dtype() != DType::BF16 {
        return Err(malformed(format!(
            "tensor `{}`: found {:?} {:?}, expected BF16 [{rows}, {count}]",
            bits.scale_name(name),
            scales.dtype(),
            scales.dims()
        )));
    }
    let scales = scales.flatten_all()?.to_vec1::<bf16>()?;
    let groups = values.chunks(columns.max(1)).flat_map(|row| row.chunks(length));
    let wide = groups.zip(scales).flat_map(|(group, scale)| {
        let scale = scale.to_f32();
        group
            .iter()
            .map(move |&code| (f32::from(code) - bits.zero_point()) * scale)
    });
    Ok(Tensor::from_vec(
        wide.collect::<Vec<f32>>(),
        shape,
        codes.device(),
    )?)
}

#[cfg(test)]
mod tests {
    use super::super::{Frozen, Params, Precision, file};
    use super::*;
    use candle_nn::Init;

    /// Large matrices of even and of uneven rows, one with small and one with no values, and what stays as it is.
    fn model(seed: u64) -> Params {
        let params = Params::random(seed, &Device::Cpu);
        let randn = |stdev| Init::Randn { mean: 0.0, stdev };
        let vb = params.builder();
        vb.get_with_hints((64, 128), "large", randn(0.3)).unwrap();
        vb.get_with_hints((8, 10, 13), "uneven", randn(0.3)).unwrap();
        vb.get_with_hints((40, 65), "tiny", randn(1e-30)).unwrap();
        vb.get_with_hints((3, 2), "small", randn(0.3)).unwrap();
        vb.get_with_hints(2000, "gain", randn(0.3)).unwrap();
        vb.get((40, 32), "zero").unwrap();
        params
    }

    fn read(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn storing_again_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q.safetensors");
        for precision in [Precision::EightBit, Precision::SixBit] {
            let params = model(6);
            params.save(&path, &BTreeMap::new(), precision).unwrap();
            let first = std::fs::read(&path).unwrap();
            params.load(&path).unwrap();
            params.save(&path, &BTreeMap::new(), precision).unwrap();
            assert!(first == std::fs::read(&path).unwrap(), "{precision:?}");
        }
    }

    #[test]
    fn codes_of_six_bits_come_back() {
        let codes: Vec<u8> = (0..64).collect();
        let bytes: Vec<u8> = codes.chunks(4).flat_map(pack).collect();
        assert_eq!(bytes.len(), 48);
        // The first code in the lowest bits: 1 + 2 * 64 + 3 * 4096, low byte first.
        assert_eq!(pack(&[1, 2, 3, 0]), [0x81, 0x30, 0x00]);
        assert_eq!(bytes.chunks(3).flat_map(unpack).collect::<Vec<_>>(), codes);
    }

    #[test]
    fn six_bits_lose_what_they_should() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q.safetensors");
        let params = model(4);
        params.save(&path, &BTreeMap::new(), Precision::SixBit).unwrap();
        let stored = file::read(&path, &Device::Cpu).unwrap().tensors;
        assert_eq!(stored["large"].dims(), [64, 96]);
        assert_eq!(stored["large.scale6"].dims(), [64, 2]);
        // 13 and 65 are no multiples of 4.
        assert_eq!(stored["uneven"].dims(), [8, 10, 13]);
        assert!(stored.contains_key("uneven.scale") && stored.contains_key("tiny.scale"));
        let mut shapes = file::shapes(&path).unwrap();
        widen_shapes(&mut shapes);
        let full: BTreeMap<_, _> = params
            .vars()
            .into_iter()
            .map(|(name, var)| (name, var.dims().to_vec()))
            .collect();
        assert_eq!(shapes, full);

        let (exact, wide) = (
            read(&params.vars()["large"]),
            read(&Frozen::open(&path, &Device::Cpu).unwrap().tensors()["large"]),
        );
        let power: f32 = exact.iter().map(|x| x * x).sum();
        let error: f32 = exact.iter().zip(&wide).map(|(x, y)| (x - y).powi(2)).sum();
        let relative = (error / power).sqrt();
        assert!(relative > 0.023 && relative < 0.026, "{relative}");

        // Codes that end within three bytes, scales of another number of bits.
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
        for (codes, scales, expected) in [
            ([4, 4], [4, 1], "multiple of 3"),
            ([4, 3], [4, 2], "expected BF16 [4, 1]"),
        ] {
            let tensors = BTreeMap::from([
                ("m".to_string(), zeros(&codes, DType::U8)),
                ("m.scale6".to_string(), zeros(&scales, DType::BF16)),
            ]);
            file::write(&path, &tensors, &BTreeMap::new(), Precision::F32).unwrap();
            let message = Frozen::open(&path, &Device::Cpu).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn values_return_within_half_a_step_of_their_group() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q.safetensors");
        let params = model(4);
        params.save(&path, &BTreeMap::new(), Precision::EightBit).unwrap();
        let stored = file::read(&path, &Device::Cpu).unwrap().tensors;
        let shape = |name: &str| (stored[name].dtype(), stored[name].dims().to_vec());
        assert_eq!(shape("large.scale"), (DType::BF16, vec![64, 2]));
        // 130 values a row: three groups of 44, 44 and 42.
        assert_eq!(shape("uneven.scale"), (DType::BF16, vec![8, 3]));
        assert_eq!(shape("uneven"), (DType::U8, vec![8, 10, 13]));
        assert_eq!(shape("gain"), (DType::F32, vec![2000]));
        assert_eq!(stored.len(), 6 + 4);

        let frozen = Frozen::open(&path, &Device::Cpu).unwrap();
        let reloaded = model(5);
        reloaded.load(&path).unwrap();
        for (name, var) in params.vars() {
            let (x, y) = (read(&var), read(&frozen.tensors()[&name]));
            assert_eq!(y, read(&reloaded.vars()[&name]), "{name}");
            let (columns, length) = match name.as_str() {
                "large" => (128, 64),
                "uneven" => (130, 44),
                "tiny" => (65, 33),
                "zero" => (32, 32),
                _ => {
                    assert_eq!(x, y, "{name} is stored as it is");
                    continue;
                }
            };
            let groups = |v: &[f32]| -> Vec<Vec<f32>> {
                let rows = v.chunks(columns).flat_map(|row| row.chunks(length));
                rows.map(<[f32]>::to_vec).collect()
            };
            for (x, y) in groups(&x).iter().zip(groups(&y)) {
                let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
                let error = x.iter().zip(&y).map(|(x, y)| (x - y).abs()).fold(0f32, f32::max);
                assert!(error <= largest / 252.0, "{name}: {error} of {largest}");
            }
        }
    }

    #[test]
    fn an_outlier_spoils_its_group_alone() {
        let mut values = vec![0.01f32; 1024];
        values[5] = 100.0;
        let tensor = Tensor::from_vec(values, (2, 512), &Device::Cpu).unwrap();
        for (bits, error) in [(Bits::Eight, 1e-4), (Bits::Six, 4e-4)] {
            let narrow = narrow(Path::new("w"), "m", &tensor, bits).unwrap();
            let wide = read(&widen_one(Path::new("w"), "m", &narrow.codes, &narrow.scales, bits).unwrap());
            assert!((wide[5] - 100.0).abs() < 2.0 && wide[6] == 0.0, "{bits:?}");
            assert!(wide[64..].iter().all(|x| (x - 0.01).abs() < error), "{bits:?}");
        }
    }

    #[test]
    fn wrong_scales_and_bad_values_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q.safetensors");
        let cpu = &Device::Cpu;
        for (dtype, shape) in [(DType::BF16, (4, 2)), (DType::F32, (4, 1))] {
            let tensors = BTreeMap::from([
                ("m".to_string(), Tensor::zeros((4, 2), DType::U8, cpu).unwrap()),
                ("m.scale".to_string(), Tensor::zeros(shape, dtype, cpu).unwrap()),
            ]);
            file::write(&path, &tensors, &BTreeMap::new(), Precision::F32).unwrap();
            let message = Frozen::open(&path, cpu).unwrap_err().to_string();
            assert!(
                message.contains("`m.scale`") && message.contains("expected BF16 [4, 1]"),
                "{message}"
            );
        }

        let params = model(4);
        params.vars()["large"]
            .set(&Tensor::full(f32::NAN, (64, 128), cpu).unwrap())
            .unwrap();
        let message = params
            .save(&path, &BTreeMap::new(), Precision::EightBit)
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("`large`") && message.contains("NaN"),
            "{message}"
        );
    }
}
