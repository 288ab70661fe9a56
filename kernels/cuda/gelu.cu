// GELU of rows to which a bias is added first, alone or as the gate of a unit; formulas in src/gelu.rs. Blocks of 32 x 8
// threads: x over vectors of V columns, y over rows.
// gelu    2 T a element.
// geglu   3 T a element of the result.
// Limit: memory bandwidth.
#include "common.cuh"

constexpr int LANES = 32, DOWN = 8;

__device__ __forceinline__ float exact(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
__device__ __forceinline__ float quick(float x) { return x * sigmoid(1.702f * x); }

// bias may be null.
template <typename T, int V, float (*GELU)(float)>
__device__ __forceinline__ void gelu(const T *x, const float *bias, T *y, uint32_t rows, uint32_t width) {
    const uint32_t c = (blockIdx.x * LANES + threadIdx.x) * V;
    if (c >= width) return;
    float add[V] = {};
    if (bias) load<V>(bias + c, add);
    for (uint32_t r = blockIdx.y * DOWN + threadIdx.y; r < rows; r += gridDim.y * DOWN) {
        float a[V];
        load<V>(x + (size_t)r * width + c, a);
#pragma unroll
        for (int i = 0; i < V; i++) a[i] = GELU(a[i] + add[i]);
        store<V>(y + (size_t)r * width + c, a);
    }
}

template <typename T, int V>
__device__ void gelu_exact(const T *x, const float *bias, T *y, uint32_t rows, uint32_t width) {
    gelu<T, V, exact>(x, bias, y, rows, width);
}

template <typename T, int V>
__device__ void gelu_quick(const T *x, const float *bias, T *y, uint32_t rows, uint32_t width) {
    gelu<T, V, quick>(x, bias, y, rows, width);
}

#define GELU(T) (const T *x, const float *bias, T *y, uint32_t rows, uint32_t width)
INSTANCES(gelu_exact, GELU, (x, bias, y, rows, width))
INSTANCES(gelu_quick, GELU, (x, bias, y, rows, width))

// x and bias have 2 width columns, y has width; bias may be null.
template <typename T, int V>
__device__ void geglu(const T *x, const float *bias, T *y, uint32_t rows, uint32_t width) {
    const uint32_t c = (blockIdx.x * LANES + threadIdx.x) * V;
    if (c >= width) return;
    float add[V] = {}, add_gate[V] = {};
    if (bias) {
        load<V>(bias + c, add);
        load<V>(bias + width + c, add_gate);
    }
    for (uint32_t r = blockIdx.y * DOWN + threadIdx.y; r < rows; r += gridDim.y * DOWN) {
        float a[V], g[V];
        load<V>(x + (size_t)r * 2 * width + c, a);
        load<V>(x + (size_t)r * 2 * width + width + c, g);
#pragma unroll
        for (int i = 0; i < V; i++) a[i] = (a[i] + add[i]) * exact(g[i] + add_gate[i]);
        store<V>(y + (size_t)r * width + c, a);
    }
}

INSTANCES(geglu, GELU, (x, bias, y, rows, width))
