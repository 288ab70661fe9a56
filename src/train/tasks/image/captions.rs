//! The captions of the pictures, as states of a text encoder.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use fulgur_tavdiffusion::text::TextModel;

use crate::train::TaskResult;

/// Captions that are encoded at once.
const TOGETHER: usize = 64;

/// Different captions, numbered; the first one is empty.
#[derive(Default)]
pub(super) struct Texts {
    numbers: BTreeMap<String, usize>,
    all: Vec<String>,
}

impl Texts {
    pub(super) fn new() -> Self {
        let mut texts = Self::default();
        texts.number("");
        texts
    }

    /// The number of a caption, a new one where it is new.
    pub(super) fn number(&mut self, caption: &str) -> usize {
        if let Some(&number) = self.numbers.get(caption) {
            return number;
        }
        self.all.push(caption.to_owned());
        self.numbers.insert(caption.to_owned(), self.all.len() - 1);
        self.all.len() - 1
    }
}

/// States of all captions.
pub(super) struct Captions {
    pub(super) texts: Vec<String>,
    /// `[length, width]` of each.
    states: Vec<Vec<f32>>,
    pub(super) width: usize,
    longest: usize,
}

impl Captions {
    pub(super) fn encode(model: &TextModel, texts: Texts) -> TaskResult<Self> {
        let texts = texts.all;
        let mut states = Vec::with_capacity(texts.len());
        let (mut width, mut longest) = (0, 0);
        for texts in texts.chunks(TOGETHER) {
            let found = model.encode(texts)?;
            width = found.states.dim(2)?;
            let lengths: Vec<f32> = found.mask.to_dtype(DType::F32)?.sum(1)?.to_vec1()?;
            let rows = found.states.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
            for (i, length) in lengths.into_iter().enumerate() {
                let length = length as usize;
                longest = longest.max(length);
                states.push(rows.get(i)?.narrow(0, 0, length)?.flatten_all()?.to_vec1()?);
            }
        }
        Ok(Self {
            texts,
            states,
            width,
            longest,
        })
    }

    /// States `[B, L, c]` of these captions and their mask `[B, L]`, L the longest of all.
    pub(super) fn padded(&self, numbers: &[usize]) -> candle_core::Result<[Tensor; 2]> {
        let room = self.longest * self.width;
        let mut states = vec![0f32; numbers.len() * room];
        let mut mask = vec![0f32; numbers.len() * self.longest];
        let rows = states
            .chunks_exact_mut(room)
            .zip(mask.chunks_exact_mut(self.longest));
        for ((row, mask), &number) in rows.zip(numbers) {
            let own = &self.states[number];
            row[..own.len()].copy_from_slice(own);
            mask[..own.len() / self.width].fill(1.0);
        }
        let count = numbers.len();
        Ok([
            Tensor::from_vec(states, (count, self.longest, self.width), &Device::Cpu)?,
            Tensor::from_vec(mask, (count, self.longest), &Device::Cpu)?,
        ])
    }
}
