// What all kernels of softmax attention in tiles are told, and how a block finds its part of the work; formulas in
// src/attention/tiled/mod.rs.
#pragma once
#include "token_rows.cuh"

namespace fulgur {

// One call. What a kernel does not use is null.
template <typename T> struct Attention {
    Rows<T> q, k, v, o, d_o, dq, dk, dv;
    // [B, H, N]: logarithms of the sums of exponentials, infinite where there was none, and rowsum(dO (*) O).
    float *log_sum, *dots;
    // Bit i of word w of a batch says whether its key 64 w + i counts; one word of zeros more than the keys fill. Null where
    // all do.
    const uint64_t *live;
    // Of packed sequences the first token, the number of tokens and the first of them in the tile, for each tile; else null.
    const int *tiles;
    int live_words, tokens, keys, heads, groups, d, e, causal;
    float scale;
};

constexpr float LOG_TWO_E = 1.4426950408889634f, LOG_TWO = 0.6931471805599453f;

// The sequence of a tile, its queries' and its keys' part of the batch, and the tile's first row in it.
struct Span {
    int batch, query, queries, key, keys, first;

    template <typename T>
    __device__ __forceinline__ Span(const Attention<T> &job, int tile, int rows)
        : batch(blockIdx.z), query(0), queries(job.tokens), key(0), keys(job.keys), first(tile * rows) {
        if (job.tiles) {
            query = key = job.tiles[3 * tile];
            queries = keys = job.tiles[3 * tile + 1];
            first = job.tiles[3 * tile + 2];
        }
    }
    // A causal query meets the keys up to its own number and this: the last query meets the last key.
    __device__ __forceinline__ int shift() const { return keys - queries; }
};

// Whether the 64 keys of a batch from `first` on count.
template <typename T> __device__ __forceinline__ uint64_t live_keys(const Attention<T> &job, int batch, int first) {
    if (!job.live) return ~0ull;
    const uint64_t *word = job.live + (int64_t)batch * job.live_words + (first >> 6);
    const int shift = first & 63;
    return shift ? word[0] >> shift | word[1] << (64 - shift) : word[0];
}

__device__ __forceinline__ uint64_t first_bits(int count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

} // namespace fulgur
