// Gated linear units; formulas in src/glu/mod.rs.
// Threads: x over vectors of a row, y over rows. Bytes per result element: 3 T forward, 5 T (gated 5 T) backward, 6 T for
// swiglu where y is written once more (null: it is not), with the bits of the forward pass.
// Limit: memory bandwidth.
#include "common.cuh"

template <typename T, int V>
__device__ void swiglu(const T *x, T *y, uint32_t rows, uint32_t half) {
    const size_t row = (size_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    for (uint32_t c = threadIdx.x * V; c < half; c += blockDim.x * V) {
        float a[V], b[V];
        load<V>(x + row * 2 * half + c, a);
        load<V>(x + row * 2 * half + half + c, b);
#pragma unroll
        for (int i = 0; i < V; i++) a[i] = a[i] * sigmoid(a[i]) * b[i];
        store<V>(y + row * half + c, a);
    }
}

template <typename T, int V>
__device__ void swiglu_backward(const T *x, const T *dy, T *dx, T *y, uint32_t rows, uint32_t half) {
    const size_t row = (size_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    for (uint32_t c = threadIdx.x * V; c < half; c += blockDim.x * V) {
        float a[V], b[V], d[V], made[V];
        const size_t at = row * 2 * half + c;
        load<V>(x + at, a);
        load<V>(x + at + half, b);
        load<V>(dy + row * half + c, d);
#pragma unroll
        for (int i = 0; i < V; i++) {
            const float s = sigmoid(a[i]);
            const float db = d[i] * a[i] * s;
            made[i] = a[i] * s * b[i];
            a[i] = d[i] * b[i] * s * (1.0f + a[i] * (1.0f - s));
            b[i] = db;
        }
        store<V>(dx + at, a);
        store<V>(dx + at + half, b);
        if (y) store<V>(y + row * half + c, made);
    }
}

template <typename T, int V>
__device__ void gated(const T *x, const T *gate, T *y, size_t count) {
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (at >= count) return;
    float a[V], g[V];
    load<V>(x + at, a);
    load<V>(gate + at, g);
#pragma unroll
    for (int i = 0; i < V; i++) a[i] *= sigmoid(g[i]);
    store<V>(y + at, a);
}

template <typename T, int V>
__device__ void gated_backward(const T *x, const T *gate, const T *dy, T *dx, T *dgate, size_t count) {
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (at >= count) return;
    float a[V], g[V], d[V];
    load<V>(x + at, a);
    load<V>(gate + at, g);
    load<V>(dy + at, d);
#pragma unroll
    for (int i = 0; i < V; i++) {
        const float s = sigmoid(g[i]);
        g[i] = d[i] * a[i] * s * (1.0f - s);
        a[i] = d[i] * s;
    }
    store<V>(dx + at, a);
    store<V>(dgate + at, g);
}

#define SWIGLU(T) (const T *x, T *y, uint32_t rows, uint32_t half)
INSTANCES(swiglu, SWIGLU, (x, y, rows, half))
#define SWIGLU_BACKWARD(T) (const T *x, const T *dy, T *dx, T *y, uint32_t rows, uint32_t half)
INSTANCES(swiglu_backward, SWIGLU_BACKWARD, (x, dy, dx, y, rows, half))
#define GATED(T) (const T *x, const T *gate, T *y, size_t count)
INSTANCES(gated, GATED, (x, gate, y, count))
#define GATED_BACKWARD(T) (const T *x, const T *gate, const T *dy, T *dx, T *dgate, size_t count)
INSTANCES(gated_backward, GATED_BACKWARD, (x, gate, dy, dx, dgate, count))
