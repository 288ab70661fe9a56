//! What a teacher says about a corpus, packed: sentences and their vectors in one safetensors file.
//!
//! Tensors: `text` u8 (all sentences, UTF-8), `ends` u32 `[N]` (one past the last byte of each), `vectors` u8 `[N, s]`
//! (value 128 is zero) and `scales` f32 `[N]`. Eight bits a value keep the cosine with the exact vector above 0.9999 and
//! the file at about 440 bytes a sentence.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use fulgur_lightnet::params::{Precision, file};

use super::{Result, TextError};

/// Value that stands for zero.
const ZERO: f32 = 128.0;
/// Largest step away from it.
const STEPS: f32 = 127.0;

/// Sentences and the unit vectors of a teacher.
#[derive(Clone, Debug, PartialEq)]
pub struct Lessons {
    text: String,
    ends: Vec<u32>,
    vectors: Vec<u8>,
    scales: Vec<f32>,
    width: usize,
    /// How they were made, for the reader of the file: seed, teacher, sources.
    pub notes: BTreeMap<String, String>,
}

impl Lessons {
    /// No sentences yet, for a teacher with vectors of `width`.
    pub fn new(width: usize) -> Self {
        Self {
            text: String::new(),
            ends: Vec::new(),
            vectors: Vec::new(),
            scales: Vec::new(),
            width,
            notes: BTreeMap::new(),
        }
    }

    /// Number of sentences.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// True without sentences.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Width s of the vectors.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Sentence `index`, which must be below [`Lessons::len`].
    pub fn sentence(&self, index: usize) -> &str {
        let start = if index == 0 {
            0
        } else {
            self.ends[index - 1] as usize
        };
        &self.text[start..self.ends[index] as usize]
    }

    /// Writes the vector of sentence `index` to `into`, which has [`Lessons::width`] places.
    pub fn vector(&self, index: usize, into: &mut [f32]) {
        let stored = &self.vectors[index * self.width..(index + 1) * self.width];
        for (value, &step) in into.iter_mut().zip(stored) {
            *value = (f32::from(step) - ZERO) * self.scales[index];
        }
    }

    /// Vectors `[M, s]` `f32` of the sentences `indices`, on the host.
    ///
    /// # Errors
    /// No sentence asked for.
    pub fn vectors(&self, indices: &[usize]) -> candle_core::Result<Tensor> {
        let mut values = vec![0f32; indices.len() * self.width];
        for (row, &index) in values.chunks_exact_mut(self.width).zip(indices) {
            self.vector(index, row);
        }
        Tensor::from_vec(values, (indices.len(), self.width), &Device::Cpu)
    }

    /// Adds a sentence and its vector, which has [`Lessons::width`] values.
    pub fn push(&mut self, sentence: &str, vector: &[f32]) {
        debug_assert_eq!(vector.len(), self.width);
        let largest = vector
            .iter()
            .fold(f32::MIN_POSITIVE, |largest, value| largest.max(value.abs()));
        let scale = largest / STEPS;
        self.text.push_str(sentence);
        self.ends.push(self.text.len() as u32);
        self.vectors.extend(
            vector
                .iter()
                .map(|value| (value / scale + ZERO).round().clamp(1.0, 255.0) as u8),
        );
        self.scales.push(scale);
    }

    /// Writes the file, atomically.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let (n, device) = (self.len(), &Device::Cpu);
        let tensors = BTreeMap::from([
            (
                "text".to_owned(),
                Tensor::from_slice(self.text.as_bytes(), self.text.len(), device)?,
            ),
            ("ends".to_owned(), Tensor::from_slice(&self.ends, n, device)?),
            (
                "vectors".to_owned(),
                Tensor::from_slice(&self.vectors, (n, self.width), device)?,
            ),
            ("scales".to_owned(), Tensor::from_slice(&self.scales, n, device)?),
        ]);
        Ok(file::write(path, &tensors, &self.notes, Precision::F32)?)
    }

    /// Reads the file.
    ///
    /// # Errors
    /// The file is missing or damaged, or its parts do not fit together.
    pub fn load(path: &Path) -> Result<Self> {
        let file::Contents { tensors, metadata } = file::read(path, &Device::Cpu)?;
        let wrong = |field: &str, found: String, expected: &str| TextError::Field {
            path: path.to_path_buf(),
            field: field.to_owned(),
            found,
            expected: expected.to_owned(),
        };
        let get = |name: &str, dtype: DType, rank: usize| match tensors.get(name) {
            Some(tensor) if tensor.dtype() == dtype && tensor.rank() == rank => Ok(tensor),
            Some(tensor) => {
                let found = format!("{:?} {:?}", tensor.dtype(), tensor.dims());
                Err(wrong(name, found, &format!("{dtype:?} of rank {rank}")))
            }
            None => Err(wrong(name, "no such tensor".into(), "a file of lessons")),
        };
        let vectors = get("vectors", DType::U8, 2)?;
        let (n, width) = vectors.dims2()?;
        let ends = get("ends", DType::U32, 1)?.to_vec1::<u32>()?;
        let scales = get("scales", DType::F32, 1)?.to_vec1::<f32>()?;
        if n == 0 || ends.len() != n || scales.len() != n {
            let found = format!("{n} vectors, {} ends, {} scales", ends.len(), scales.len());
            return Err(wrong("vectors", found, "as many of each, at least one"));
        }
        let text = String::from_utf8(get("text", DType::U8, 1)?.to_vec1::<u8>()?)
            .map_err(|error| wrong("text", error.to_string(), "UTF-8"))?;
        let ordered = ends.windows(2).all(|pair| pair[0] <= pair[1]);
        let whole = ends.iter().all(|&end| text.is_char_boundary(end as usize));
        if !ordered || !whole || ends.last().map(|&end| end as usize) != Some(text.len()) {
            return Err(wrong(
                "ends",
                "positions out of order".into(),
                "ends of sentences in the text",
            ));
        }
        if let Some(scale) = scales.iter().find(|scale| !scale.is_finite()) {
            return Err(wrong("scales", scale.to_string(), "finite numbers"));
        }
        let vectors = vectors.flatten_all()?.to_vec1::<u8>()?;
        Ok(Self {
            text,
            ends,
            vectors,
            scales,
            width,
            notes: metadata,
        })
    }
}

#[cfg(test)]
mod tests {
    use fulgur_kernels::philox::Philox;

    use super::*;

    fn lessons() -> (Lessons, Vec<Vec<f32>>) {
        let mut lessons = Lessons::new(384);
        let mut random = Philox::new(4, 0);
        let mut exact = Vec::new();
        for sentence in ["a dog barks", "", "caf\u{e9}"] {
            let vector: Vec<f32> = (0..384).map(|_| random.normal()).collect();
            lessons.push(sentence, &vector);
            exact.push(vector);
        }
        lessons.notes.insert("seed".into(), "4".into());
        (lessons, exact)
    }

    #[test]
    fn eight_bits_keep_the_direction() {
        let (lessons, exact) = lessons();
        let mut found = vec![0f32; 384];
        for (index, exact) in exact.iter().enumerate() {
            lessons.vector(index, &mut found);
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            let cosine = dot(&found, exact) / (dot(&found, &found) * dot(exact, exact)).sqrt();
            assert!(cosine > 0.9999, "{cosine}");
        }
    }

    #[test]
    fn files_come_back_and_damage_is_named() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lessons.safetensors");
        let (lessons, _) = lessons();
        lessons.save(&path)?;
        let loaded = Lessons::load(&path)?;
        assert_eq!(loaded, lessons);
        assert_eq!(loaded.sentence(2), "caf\u{e9}");

        let mut bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        assert!(Lessons::load(&path).is_err());
        let at = bytes
            .windows(4)
            .position(|window| window == [11, 0, 0, 0])
            .unwrap();
        bytes[at] = 200;
        std::fs::write(&path, &bytes).unwrap();
        let message = Lessons::load(&path).unwrap_err().to_string();
        assert!(message.contains("ends"), "{message}");
        Ok(())
    }
}
