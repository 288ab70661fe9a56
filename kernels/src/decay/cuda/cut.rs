//! How tokens are cut into segments on a GPU, so that few heads keep it busy as well.

use super::sweep::CutArg;
use crate::cuda_module::Slice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, sys::CUdevice_attribute_enum as Attribute};
use candle_core::{CudaDevice, Result};

/// Fewest tokens of a segment, and tokens that its start and end cost.
const FEWEST: usize = 256;
const BORDER: f64 = 192.0;
/// What a sweep over several segments costs against one: the states of all of them come first, from half of the operands.
const SEGMENTED: f64 = 1.5;
/// Segments start at chunks.
const GRAIN: usize = 64;
const MOST_PARTS: usize = 64;

/// Segments of every sequence.
#[derive(Debug)]
pub(crate) struct Cut {
    device: CudaDevice,
    sequences: usize,
    parts: usize,
    length: usize,
    tokens: usize,
    longest: usize,
    /// Of packed sequences, of which each is one segment: segments as the kernels take them, and the borders.
    packed: Option<(Slice<i32>, Slice<i32>)>,
}

impl Cut {
    /// Cuts `batch` sequences of `tokens` tokens, of which each takes `blocks` blocks, or packed ones at `borders`.
    pub(crate) fn new(
        device: &CudaDevice,
        (batch, tokens): (usize, usize),
        borders: Option<&[usize]>,
        blocks: usize,
    ) -> Result<Self> {
        let mut cut = Self {
            device: device.clone(),
            sequences: batch,
            parts: 1,
            length: tokens,
            tokens,
            longest: tokens,
            packed: None,
        };
        if let Some(borders) = borders {
            let borders: Vec<i32> = borders.iter().map(|&border| border as i32).collect();
            let table: Vec<i32> = borders
                .windows(2)
                .flat_map(|pair| [0, pair[0], pair[1] - pair[0]])
                .collect();
            cut.sequences = borders.len() - 1;
            cut.longest = table
                .iter()
                .skip(2)
                .step_by(3)
                .max()
                .map_or(0, |&count| count as usize);
            cut.packed = Some((device.clone_htod(&table)?, device.clone_htod(&borders)?));
        } else {
            let multiprocessors = device
                .cuda_stream()
                .context()
                .attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
                .w()?;
            let parts = parts(batch * blocks, tokens, multiprocessors as usize);
            cut.length = tokens.div_ceil(parts).next_multiple_of(GRAIN);
            cut.parts = tokens.div_ceil(cut.length);
            if cut.parts == 1 {
                cut.length = tokens;
            }
            cut.longest = cut.length;
        }
        Ok(cut)
    }

    /// Segments of each sequence.
    pub(crate) fn parts(&self) -> usize {
        self.parts
    }

    pub(crate) fn sequences(&self) -> usize {
        self.sequences
    }

    /// Most tokens of a segment.
    pub(super) fn longest(&self) -> usize {
        self.longest
    }

    pub(crate) fn segments(&self) -> usize {
        self.sequences * self.parts
    }

    /// Address of the borders of packed sequences, or null.
    pub(super) fn borders(&self) -> u64 {
        self.packed
            .as_ref()
            .map_or(0, |(_, borders)| self.address(borders))
    }

    pub(crate) fn argument(&self) -> Result<CutArg> {
        Ok(CutArg {
            table: self.packed.as_ref().map_or(0, |(table, _)| self.address(table)),
            parts: self.parts as i32,
            length: self.length as i32,
            tokens: self.tokens as i32,
        })
    }

    fn address(&self, slice: &Slice<i32>) -> u64 {
        slice.device_ptr(&self.device.cuda_stream()).0
    }
}

/// Into how many parts a sequence is best cut where `blocks` blocks take one part of all of them.
fn parts(blocks: usize, tokens: usize, multiprocessors: usize) -> usize {
    let most = (tokens / FEWEST).clamp(1, MOST_PARTS);
    // In tokens one after the other, over waves of blocks on the whole GPU.
    let time = |parts: usize| {
        let waves = (blocks * parts).div_ceil(multiprocessors) as f64;
        let length = tokens as f64 / parts as f64 + BORDER;
        waves * length * if parts == 1 { 1.0 } else { SEGMENTED }
    };
    let better = |best: usize, parts: usize| {
        if time(parts) < 0.97 * time(best) {
            parts
        } else {
            best
        }
    };
    (2..=most).fold(1, better)
}

#[cfg(test)]
mod tests {
    use super::parts;

    #[test]
    fn few_heads_are_cut_and_many_are_not() {
        assert_eq!(parts(128, 8192, 132), 1);
        assert_eq!(parts(32, 32_768, 132), 4);
        assert_eq!(parts(16, 262_144, 132), 8);
        assert_eq!(parts(1, 4096, 132), 16);
        assert_eq!(parts(1, 100, 132), 1);
    }
}
