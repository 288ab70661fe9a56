// Token shift; definition in src/shift/mod.rs. Threads: x over vectors of channels, y over tokens.
// 2 T a element. Limit: memory bandwidth.
#include "common.cuh"

// Axis d has `length` tokens, `stride` apart; unused axes are of length 1 and come last.
template <typename T, int V>
__device__ void token_shift(const T *x, T *y, uint32_t rows, uint32_t channels, uint32_t group, uint32_t axes,
                            uint32_t stride0, uint32_t length0, uint32_t stride1, uint32_t length1, uint32_t stride2,
                            uint32_t length2, uint32_t reverse) {
    const uint32_t row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    const uint32_t strides[3] = {stride0, stride1, stride2}, lengths[3] = {length0, length1, length2};
    uint32_t at[3];
#pragma unroll
    for (int d = 0; d < 3; d++) at[d] = row / strides[d] % lengths[d];
    for (uint32_t c = threadIdx.x * V; c < channels; c += blockDim.x * V) {
        float v[V] = {};
        size_t from = row;
        bool inside = true;
        const uint32_t block = c / group;
#pragma unroll
        for (int d = 0; d < 3; d++) {
            if (d >= axes || block / 2 != d) continue;
            const bool before = (block % 2 == 0) != (reverse != 0);
            inside = before ? at[d] > 0 : at[d] + 1 < lengths[d];
            from = before ? (size_t)row - strides[d] : (size_t)row + strides[d];
        }
        if (inside) load<V>(x + from * channels + c, v);
        store<V>(y + (size_t)row * channels + c, v);
    }
}

#define TOKEN_SHIFT(T)                                                                                                 \
    (const T *x, T *y, uint32_t rows, uint32_t channels, uint32_t group, uint32_t axes, uint32_t stride0,              \
     uint32_t length0, uint32_t stride1, uint32_t length1, uint32_t stride2, uint32_t length2, uint32_t reverse)
INSTANCES(token_shift, TOKEN_SHIFT,
          (x, y, rows, channels, group, axes, stride0, length0, stride1, length1, stride2, length2, reverse))
