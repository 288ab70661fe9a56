//! How tokens are cut into sequences and chunks, and where the states of chunks lie.

use std::ops::Range;

/// Tokens of one chunk: products inside chunks then cost about as much as those with states of 64 x 64.
const CHUNK: usize = 64;

/// Sizes of a problem.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dims {
    pub(crate) b: usize,
    pub(crate) n: usize,
    pub(crate) h: usize,
    pub(crate) d: usize,
    pub(crate) e: usize,
}

/// Consecutive tokens of one sequence.
#[derive(Clone, Debug)]
pub(super) struct Chunk {
    pub(super) batch: usize,
    pub(super) tokens: Range<usize>,
}

impl Chunk {
    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }
}

/// How tokens are cut into sequences, and these into chunks.
///
/// States of chunks lie in slots, ordered by sequence, head and chunk.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) dims: Dims,
    /// In the order of memory.
    pub(super) chunks: Vec<Chunk>,
    /// Chunks of each sequence.
    sequences: Vec<Range<usize>>,
}

impl Plan {
    /// One sequence a batch, or packed sequences in one batch that end at `ends`.
    pub(super) fn new(dims: Dims, ends: Option<&[usize]>) -> Self {
        let whole = [dims.n];
        let mut plan = Self {
            dims,
            chunks: Vec::new(),
            sequences: Vec::new(),
        };
        for batch in 0..dims.b {
            let mut start = 0;
            for &end in ends.unwrap_or(&whole) {
                let first = plan.chunks.len();
                for begin in (start..end).step_by(CHUNK) {
                    let tokens = begin..(begin + CHUNK).min(end);
                    plan.chunks.push(Chunk { batch, tokens });
                }
                plan.sequences.push(first..plan.chunks.len());
                start = end;
            }
        }
        plan
    }

    /// Number of sequences, and so of states of a head.
    pub(super) fn sequences(&self) -> usize {
        self.sequences.len()
    }

    pub(super) fn slot_count(&self) -> usize {
        self.chunks.len() * self.dims.h
    }

    /// Chunk and head of every slot.
    pub(super) fn slots(&self) -> Vec<(&Chunk, usize)> {
        let heads = |range: &Range<usize>| {
            let range = range.clone();
            (0..self.dims.h).flat_map(move |head| range.clone().map(move |chunk| (chunk, head)))
        };
        self.sequences
            .iter()
            .flat_map(heads)
            .map(|(chunk, head)| (&self.chunks[chunk], head))
            .collect()
    }

    /// Slots of every sequence and head.
    pub(super) fn lines(&self) -> Vec<Range<usize>> {
        let mut lines = Vec::with_capacity(self.sequences() * self.dims.h);
        let mut start = 0;
        for sequence in &self.sequences {
            for _ in 0..self.dims.h {
                lines.push(start..start + sequence.len());
                start += sequence.len();
            }
        }
        lines
    }

    /// For every chunk, the slot of its first head, the distance to the next head, and whether its sequence ends there.
    pub(super) fn places(&self) -> Vec<Place> {
        let mut places = Vec::with_capacity(self.chunks.len());
        for (index, sequence) in self.sequences.iter().enumerate() {
            places.extend(sequence.clone().map(|chunk| Place {
                slot: sequence.start * self.dims.h + chunk - sequence.start,
                stride: sequence.len(),
                sequence: index,
                is_last: chunk + 1 == sequence.end,
            }));
        }
        places
    }

    /// Cuts a `[B, N, row]` buffer at the borders of chunks; an empty one into empty pieces.
    pub(super) fn split<'a, T>(&self, mut data: &'a mut [T], row: usize) -> Vec<&'a mut [T]> {
        let row = if data.is_empty() { 0 } else { row };
        let mut pieces = Vec::with_capacity(self.chunks.len());
        for chunk in &self.chunks {
            let (piece, rest) = data.split_at_mut(chunk.len() * row);
            pieces.push(piece);
            data = rest;
        }
        pieces
    }
}

/// Where the states of a chunk lie.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) slot: usize,
    pub(super) stride: usize,
    pub(super) sequence: usize,
    pub(super) is_last: bool,
}
