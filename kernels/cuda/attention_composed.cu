// The parts of softmax attention between its products; formulas in src/attention/composed.rs.
//
// swap_heads     [B, N, H, D] <-> [B, H, N, D] in vectors of 8 bf16: 4 a element.
// softmax        one warp a row of scores, in place; padding gets a penalty instead of a weight: 4 a element.
// softmax_back   one warp a row, dscores in place of the adjoints of the weights: 6 a element.
// Limit: memory bandwidth.
#include "common.cuh"

using bf16 = __nv_bfloat16;
constexpr float PENALTY = -1e9f;

// `outer` slices of [rows, columns] vectors become [columns, rows].
extern "C" __global__ void __launch_bounds__(256)
    swap_heads(const uint4 *x, uint4 *y, uint32_t rows, uint32_t columns, uint32_t vectors, size_t count) {
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    // at counts the result: [outer, columns, rows, vectors].
    const uint32_t v = at % vectors;
    const size_t item = at / vectors;
    const uint32_t row = item % rows, column = item / rows % columns;
    const size_t outer = item / rows / columns;
    y[at] = x[((outer * rows + row) * columns + column) * vectors + v];
}

// mask [B, length] of floats may be null; a batch has `rows_per_batch` rows.
extern "C" __global__ void __launch_bounds__(256) softmax(bf16 *scores, const float *mask, uint32_t rows,
                                                           uint32_t length, uint32_t rows_per_batch, float scale) {
    const uint32_t row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    scores += (size_t)row * length;
    if (mask) mask += (size_t)(row / rows_per_batch) * length;
    auto score = [&](uint32_t c) {
        return __bfloat162float(scores[c]) * scale + (mask && mask[c] == 0.0f ? PENALTY : 0.0f);
    };
    float max = -INFINITY, sum = 0.0f;
    for (uint32_t c = lane; c < length; c += 32) max = fmaxf(max, score(c));
    for (int lanes = 16; lanes > 0; lanes >>= 1) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, lanes));
    for (uint32_t c = lane; c < length; c += 32) sum += __expf(score(c) - max);
    const float inverse = 1.0f / warp_sum(sum);
    for (uint32_t c = lane; c < length; c += 32) scores[c] = __float2bfloat16(__expf(score(c) - max) * inverse);
}

extern "C" __global__ void __launch_bounds__(256)
    softmax_back(const bf16 *weights, bf16 *adjoint, uint32_t rows, uint32_t length, float scale) {
    const uint32_t row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    weights += (size_t)row * length;
    adjoint += (size_t)row * length;
    float dot = 0.0f;
    for (uint32_t c = lane; c < length; c += 32) dot += __bfloat162float(weights[c]) * __bfloat162float(adjoint[c]);
    dot = warp_sum(dot);
    for (uint32_t c = lane; c < length; c += 32) {
        const float w = __bfloat162float(weights[c]), d = __bfloat162float(adjoint[c]);
        adjoint[c] = __float2bfloat16(w * (d - dot) * scale);
    }
}
