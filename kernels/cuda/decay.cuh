// What all kernels of the causal recurrence with decay are told, and how a block finds its part of the work.
#pragma once
#include "token_rows.cuh"

namespace fulgur {

// Consecutive tokens of one sequence.
struct Segment {
    int batch, start, count;
};

// How tokens are cut into segments: by a table of batch, first token and number of tokens each, or, without one, every
// batch into `parts` of `length` tokens.
struct Cut {
    const int *table;
    int parts, length, tokens;
    __device__ __forceinline__ Segment at(int index) const {
        if (table) return {table[3 * index], table[3 * index + 1], table[3 * index + 2]};
        const int start = index % parts * length;
        return {index / parts, start, max(0, min(length, tokens - start))};
    }
};

// Logarithms of decays, or null for none. Strides in floats, zero along axes whose places share one.
struct LogDecay {
    const float *data;
    int64_t batch, token, head, channel;
    __device__ __forceinline__ const float *from(Segment segment, int h) const {
        return data ? data + segment.batch * batch + segment.start * token + h * head : nullptr;
    }
};

// One pass over all tokens: out = S^T read, S <- decay S + write value^T; see decay_uniform.cu.
template <typename T> struct Sweep {
    Rows<T> read, write, value, out;
    LogDecay log_decay;
    // Gates of the additive recurrence before each sequence and head, `[sequences, H, D]`, or null.
    const float *before;
    // States before and after each segment and head, `state_size` floats each, or null for zeros and for unwanted ones.
    // Strides along the rows' and along the values' width.
    const float *enter;
    float *leave;
    int64_t state_size, state_row, state_column;
    Cut cut;
    // Width of the rows read and written, and of the values.
    int heads, d, e;
};

// Below this power of two a decay is zero.
__device__ constexpr float FLOOR = -150.0f, LOG2E = 1.4426950408889634f;

__device__ __forceinline__ float log2_decay(float log) {
    const float x = log * LOG2E;
    return x < FLOOR ? FLOOR : x; // keeps NaN
}

// Segment, head and tile of columns of a block.
struct Place {
    int segment, head, tile;
    __device__ __forceinline__ Place(int tiles, int heads)
        : segment(blockIdx.x / tiles / heads), head(blockIdx.x / tiles % heads), tile(blockIdx.x % tiles) {}
};

} // namespace fulgur
