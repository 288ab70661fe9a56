//! How a block takes a tile of a memory, and how much shared memory that needs.

use crate::cuda_module::THREADS;

/// Tokens of a chunk, columns of a tile in shared memory, and floats of a thread for sums over rows: as in `eos.cu`.
pub(super) const CHUNK: usize = 16;
const TILE: usize = 32;
const PARTIAL: usize = CHUNK + 1;
/// Rows of a memory that one thread each takes; of more, a thread takes eight.
const FEW_ROWS: usize = 4;
/// Most rows of a memory.
pub(super) const WIDEST: usize = 256;

/// How a block takes a tile of a memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lanes {
    /// Rows of a thread.
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Threads of a column.
    groups: usize,
}

/// Buffers of a sweep in shared memory.
#[derive(Clone, Copy)]
pub(super) enum Buffers {
    Forward,
    Local,
    Backward(Adjoint),
}

impl Lanes {
    /// For memories of `k` rows, at most [`WIDEST`], and `d` columns.
    pub(super) fn new(k: usize, d: usize) -> Self {
        let rows = if k <= FEW_ROWS { 1 } else { 8 };
        let groups = k.div_ceil(rows);
        let most = (THREADS as usize / groups.next_power_of_two()).min(TILE);
        let columns = d.next_power_of_two().clamp(8, most);
        Self {
            rows,
            columns,
            // Whole warps.
            groups: groups.next_multiple_of(32 / columns),
        }
    }

    pub(super) fn threads(self) -> usize {
        self.groups * self.columns
    }

    /// Bytes of shared memory where operands are `size` bytes an element.
    pub(super) fn shared(self, buffers: Buffers, size: usize) -> usize {
        let (keys, values) = (CHUNK * self.groups * self.rows, CHUNK * TILE);
        let stages = |keys_of: usize, values_of: usize| 2 * size * (keys_of * keys + values_of * values);
        let partial = self.threads() * PARTIAL;
        match buffers {
            Buffers::Forward => stages(2, 1) + 4 * partial,
            Buffers::Local => stages(1, 1),
            Buffers::Backward(adjoint) => {
                let own = if self.rows == 1 { 1 } else { 4 * self.rows + 1 };
                let gates = match adjoint {
                    Adjoint::Unwanted | Adjoint::Elements => 0,
                    Adjoint::Columns => keys,
                    Adjoint::Rows | Adjoint::Tokens => partial,
                };
                stages(2, 2) + 4 * (2 * keys + partial + self.threads() * own + gates)
            }
        }
    }
}

/// What the adjoint of gates is summed over inside of the reverse sweep; numbers as in `eos.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Adjoint {
    Unwanted = 0,
    /// Nothing: `[B, N, H, K, D]`.
    Elements = 1,
    /// Columns of a tile: `[tiles, B, N, H, K]`.
    Columns = 2,
    /// Rows: `[B, N, H, D]`.
    Rows = 3,
    /// Tokens of a segment: `[segments, H, K, D]`.
    Tokens = 4,
}

#[cfg(test)]
mod tests {
    use super::{Adjoint, Buffers, Lanes, WIDEST};

    /// Blocks are whole warps within the kernels' bounds that hold all rows, in the shared memory of an H100.
    #[test]
    fn blocks_fit() {
        for k in 1..=WIDEST {
            for d in [1, 7, 16, 64, 1000] {
                let lanes = Lanes::new(k, d);
                let most = if lanes.rows == 1 { 128 } else { 256 };
                assert!(
                    lanes.threads().is_multiple_of(32) && lanes.threads() <= most,
                    "{k} {d} {lanes:?}"
                );
                assert!(lanes.groups * lanes.rows >= k && [8, 16, 32].contains(&lanes.columns));
                for adjoint in [
                    Adjoint::Elements,
                    Adjoint::Columns,
                    Adjoint::Rows,
                    Adjoint::Tokens,
                ] {
                    assert!(
                        lanes.shared(Buffers::Backward(adjoint), 4) <= 227 * 1024,
                        "{k} {d}"
                    );
                    // `Scan::new` asks for the room of sums over rows.
                    assert!(
                        lanes.shared(Buffers::Backward(adjoint), 4)
                            <= lanes.shared(Buffers::Backward(Adjoint::Rows), 4)
                    );
                }
            }
        }
    }
}
