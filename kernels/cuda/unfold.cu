// Neighbours of places side by side, as convolutions read them; formulas in src/unfold.rs. Words are 16, 4 or 2 bytes.
// Threads: x over the words of a place, y over taps of places. Bytes: one read (the others are in the second-level cache)
// and size^2 writes a place. Limit: memory bandwidth.
#include <cstdint>
#include <cuda_runtime.h>

struct Unfold {
    uint32_t high, wide;  // of a picture
    uint32_t words;       // of a place
    uint32_t rows, columns; // of results
    uint32_t size, stride, before;
    uint32_t first, count; // results that are made
};

template <typename W> __device__ void unfold(const W *x, W *y, Unfold u) {
    const uint32_t taps = u.size * u.size;
    const uint64_t all = (uint64_t)u.count * taps;
    for (uint64_t at = (uint64_t)blockIdx.x * blockDim.y + threadIdx.y; at < all; at += (uint64_t)gridDim.x * blockDim.y) {
        const uint32_t tap = at % taps;
        const uint32_t place = u.first + (uint32_t)(at / taps);
        const uint32_t column = place % u.columns, line = place / u.columns, row = line % u.rows, picture = line / u.rows;
        // Above the picture these wrap around to more than there is.
        const uint32_t from_row = row * u.stride + tap / u.size - u.before;
        const uint32_t from_column = column * u.stride + tap % u.size - u.before;
        const bool inside = from_row < u.high && from_column < u.wide;
        const W *from = x + (((size_t)picture * u.high + from_row) * u.wide + from_column) * u.words;
        W *to = y + at * u.words;
        for (uint32_t w = threadIdx.x; w < u.words; w += blockDim.x) to[w] = inside ? from[w] : W{};
    }
}

#define UNFOLD(BYTES, W)                                                                                               \
    extern "C" __global__ void __launch_bounds__(256) unfold_##BYTES(const W *x, W *y, Unfold u) { unfold<W>(x, y, u); }
UNFOLD(16, uint4)
UNFOLD(4, uint32_t)
UNFOLD(2, uint16_t)
