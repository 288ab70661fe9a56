// Products of tiles that the tensor-core kernels of softmax attention share. A warp owns BLOCKS times 16 rows.
#pragma once
#include "attention_job.cuh"
#include "mma.cuh"

namespace fulgur {

// Width of rows in shared memory: tiles permute eight pieces of 16 bytes.
template <int D> constexpr int STORED = D <= 64 ? 64 : 128;

// Left operands of a warp, BLOCKS times 16 rows of a tile: HOLD in registers, else read where they are used.
template <bool HOLD, int BLOCKS, int D> struct Left {
    uint32_t a[BLOCKS][D / 16][4];
    __device__ __forceinline__ Left(Tile<STORED<D>> tile, int lane) {
#pragma unroll
        for (int m = 0; m < BLOCKS; m++)
#pragma unroll
            for (int k = 0; k < D / 16; k++) load_matrices(a[m][k], tile.block(m * 16, k * 16, lane));
    }
    __device__ __forceinline__ void get(uint32_t (&to)[4], int m, int k) const {
#pragma unroll
        for (int i = 0; i < 4; i++) to[i] = a[m][k][i];
    }
};

template <int BLOCKS, int D> struct Left<false, BLOCKS, D> {
    Tile<STORED<D>> tile;
    int lane;
    __device__ __forceinline__ Left(Tile<STORED<D>> tile, int lane) : tile(tile), lane(lane) {}
    __device__ __forceinline__ void get(uint32_t (&to)[4], int m, int k) const {
        load_matrices(to, tile.block(m * 16, k * 16, lane));
    }
};

// s = left right^T over D columns; `right` has COLUMNS * 8 rows.
template <bool HOLD, int D, int BLOCKS, int COLUMNS>
__device__ __forceinline__ void dot_rows(float (&s)[BLOCKS][COLUMNS][4], const Left<HOLD, BLOCKS, D> &left,
                                         Tile<STORED<D>> right, int lane) {
#pragma unroll
    for (int m = 0; m < BLOCKS; m++)
#pragma unroll
        for (int n = 0; n < COLUMNS; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[m][n][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t a[BLOCKS][4];
#pragma unroll
        for (int m = 0; m < BLOCKS; m++) left.get(a[m], m, k);
#pragma unroll
        for (int n = 0; n < COLUMNS / 2; n++) {
            uint32_t b[4];
            load_matrices(b, right.block(n * 16, k * 16, lane));
#pragma unroll
            for (int m = 0; m < BLOCKS; m++) {
                multiply(s[m][2 * n], a[m], b[0], b[2]);
                multiply(s[m][2 * n + 1], a[m], b[1], b[3]);
            }
        }
    }
}

// sums += pairs right, where `right` has COLUMNS * 8 rows of D columns. What a product left is a left operand, in bf16.
template <int D, int BLOCKS, int COLUMNS>
__device__ __forceinline__ void add_rows(float (&sums)[BLOCKS][D / 8][4], const float (&pairs)[BLOCKS][COLUMNS][4],
                                         Tile<STORED<D>> right, int lane) {
#pragma unroll
    for (int k = 0; k < COLUMNS / 2; k++) {
        uint32_t a[BLOCKS][4];
#pragma unroll
        for (int m = 0; m < BLOCKS; m++) {
            const float(&x)[4] = pairs[m][2 * k], (&y)[4] = pairs[m][2 * k + 1];
            a[m][0] = pack(x[0], x[1]), a[m][1] = pack(x[2], x[3]), a[m][2] = pack(y[0], y[1]), a[m][3] = pack(y[2], y[3]);
        }
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            uint32_t b[4];
            load_transposed(b, right.block(k * 16, j * 16, lane));
#pragma unroll
            for (int m = 0; m < BLOCKS; m++) {
                multiply(sums[m][2 * j], a[m], b[0], b[1]);
                multiply(sums[m][2 * j + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Takes the scores of keys that are not `live`, a bit each, or lie more than `diagonal` plus the number of the query's row
// behind the first key.
template <int BLOCKS, int COLUMNS>
__device__ __forceinline__ void hide_keys(float (&s)[BLOCKS][COLUMNS][4], uint64_t live, int diagonal, int lane) {
    const int g = lane >> 2, t = lane & 3;
    live >>= t * 2;
#pragma unroll
    for (int m = 0; m < BLOCKS; m++)
#pragma unroll
        for (int n = 0; n < COLUMNS; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int column = n * 8 + (i & 1), row = m * 16 + g + (i >> 1) * 8;
                if (column + t * 2 > diagonal + row || !(live >> column & 1)) s[m][n][i] = -INFINITY;
            }
}

// Writes the first `rows` rows of a warp, of `width` columns, through its part of a tile that nobody else reads any more. Row
// g + 8 half of block m is multiplied by factor(m, half).
template <int D, int BLOCKS, typename Factor>
__device__ __forceinline__ void leave_rows(const float (&sums)[BLOCKS][D / 8][4], Tile<STORED<D>> own, bf16 *to,
                                           int64_t stride, int rows, int width, int lane, const Factor &factor) {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) {
        const float above = factor(m, 0), below = factor(m, 1);
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            const float(&x)[4] = sums[m][j];
            store4(own.pair(m * 16, j * 8, lane), pack(x[0] * above, x[1] * above));
            store4(own.pair(m * 16 + 8, j * 8, lane), pack(x[2] * below, x[3] * below));
        }
    }
    __syncwarp();
    constexpr int PIECES = D / 8;
#pragma unroll 4
    for (int item = lane; item < BLOCKS * 16 * PIECES; item += 32) {
        const int row = item / PIECES, piece = item % PIECES;
        const uint4 data = load16(own.at(row, piece));
        if (row < rows && piece * 8 < width) *reinterpret_cast<uint4 *>(to + row * stride + piece * 8) = data;
    }
}

} // namespace fulgur
