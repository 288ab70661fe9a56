// A row added to all rows, sums over rows, and branches added to a residual stream; formulas in src/rows and
// src/residual. Blocks of 32 x 8 threads: x over vectors of V columns, y over rows.
//
// add_row         2 T a element.
// sum_rows        a block owns 32 V columns of a run of rows and writes their partial sums: 1 T a element,
// sum_runs        adds the partial sums of a group in a fixed order. No atomics: the same bits each time.
// residual        y = x + gate * (branch + bias), in the type of x: 2 X + 1 Y a element.
// residual_back   dbranch and the partial sums of dgate: 1 X + 2 Y a element.
// Limit: memory bandwidth.
#include "common.cuh"

constexpr int LANES = 32, DOWN = 8;

template <typename T, int V>
__device__ void add_row(const T *x, const float *row, T *y, uint32_t rows, uint32_t width) {
    const uint32_t c = (blockIdx.x * LANES + threadIdx.x) * V;
    if (c >= width) return;
    float add[V];
    load<V>(row + c, add);
    for (uint32_t r = blockIdx.y * DOWN + threadIdx.y; r < rows; r += gridDim.y * DOWN) {
        float a[V];
        load<V>(x + (size_t)r * width + c, a);
#pragma unroll
        for (int i = 0; i < V; i++) a[i] += add[i];
        store<V>(y + (size_t)r * width + c, a);
    }
}

// Adds the sums of the eight rows of threads in order and stores those of a run.
template <int V> __device__ void store_run(float (&sum)[V], float *partials, uint32_t c, uint32_t width) {
    __shared__ float shared[DOWN][LANES][V + 1];
#pragma unroll
    for (int i = 0; i < V; i++) shared[threadIdx.y][threadIdx.x][i] = sum[i];
    __syncthreads();
    if (threadIdx.y > 0 || c >= width) return;
    for (int y = 1; y < DOWN; y++) {
#pragma unroll
        for (int i = 0; i < V; i++) sum[i] += shared[y][threadIdx.x][i];
    }
    store<V>(partials + ((size_t)blockIdx.z * gridDim.y + blockIdx.y) * width + c, sum);
}

// Grid (columns / 32 V, runs, groups); partials [groups, runs, width].
template <typename T, int V>
__device__ void sum_rows(const T *x, float *partials, uint32_t width, uint32_t rows_per_group, uint32_t rows_per_run) {
    const uint32_t c = (blockIdx.x * LANES + threadIdx.x) * V;
    const uint32_t first = blockIdx.y * rows_per_run, last = min(first + rows_per_run, rows_per_group);
    float sum[V] = {};
    if (c < width) {
#pragma unroll 4
        for (uint32_t r = first + threadIdx.y; r < last; r += DOWN) {
            float a[V];
            load<V>(x + ((size_t)blockIdx.z * rows_per_group + r) * width + c, a);
#pragma unroll
            for (int i = 0; i < V; i++) sum[i] += a[i];
        }
    }
    store_run<V>(sum, partials, c, width);
}

// Grid (columns / 32, groups), threads (32, 8): row y of a block adds every eighth run, then row 0 adds the rows.
extern "C" __global__ void __launch_bounds__(256)
    sum_runs(const float *partials, float *sums, uint32_t width, uint32_t runs) {
    __shared__ float shared[DOWN][LANES];
    const uint32_t c = blockIdx.x * LANES + threadIdx.x;
    float sum = 0.0f;
    if (c < width) {
        for (uint32_t run = threadIdx.y; run < runs; run += DOWN)
            sum += partials[((size_t)blockIdx.y * runs + run) * width + c];
    }
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || c >= width) return;
    for (int y = 1; y < DOWN; y++) sum += shared[y][threadIdx.x];
    sums[(size_t)blockIdx.y * width + c] = sum;
}

// gate and bias may be null; group g of rows uses row g of the gate. Grid (columns / 32 V, runs, groups).
template <typename X, typename Y, int V>
__device__ void residual(const X *x, const Y *branch, const X *gate, const float *bias, X *y, uint32_t width,
                         uint32_t rows_per_group, uint32_t rows_per_run) {
    const uint32_t c = (blockIdx.x * LANES + threadIdx.x) * V;
    if (c >= width) return;
    float g[V], add[V] = {};
#pragma unroll
    for (int i = 0; i < V; i++) g[i] = 1.0f;
    if (gate) load<V>(gate + (size_t)blockIdx.z * width + c, g);
    if (bias) load<V>(bias + c, add);
    const uint32_t first = blockIdx.y * rows_per_run, last = min(first + rows_per_run, rows_per_group);
    for (uint32_t r = first + threadIdx.y; r < last; r += DOWN) {
        const size_t at = ((size_t)blockIdx.z * rows_per_group + r) * width + c;
        float a[V], b[V];
        load<V>(x + at, a);
        load<V>(branch + at, b);
#pragma unroll
        for (int i = 0; i < V; i++) a[i] += g[i] * (b[i] + add[i]);
        store<V>(y + at, a);
    }
}

// With a gate: dbranch = gate * dy and the partial sums of dy * branch; without one only dbranch, branch may be null.
template <typename X, typename Y, int V>
__device__ void residual_back(const X *dy, const Y *branch, const X *gate, Y *dbranch, float *partials, uint32_t width,
                              uint32_t rows_per_group, uint32_t rows_per_run) {
    const uint32_t c = (blockIdx.x * LANES + threadIdx.x) * V;
    const uint32_t first = blockIdx.y * rows_per_run, last = min(first + rows_per_run, rows_per_group);
    float sum[V] = {}, g[V];
#pragma unroll
    for (int i = 0; i < V; i++) g[i] = 1.0f;
    if (c < width) {
        if (gate) load<V>(gate + (size_t)blockIdx.z * width + c, g);
        for (uint32_t r = first + threadIdx.y; r < last; r += DOWN) {
            const size_t at = ((size_t)blockIdx.z * rows_per_group + r) * width + c;
            float d[V], b[V];
            load<V>(dy + at, d);
            if (gate) {
                load<V>(branch + at, b);
#pragma unroll
                for (int i = 0; i < V; i++) sum[i] += d[i] * b[i];
            }
#pragma unroll
            for (int i = 0; i < V; i++) d[i] *= g[i];
            store<V>(dbranch + at, d);
        }
    }
    if (gate) store_run<V>(sum, partials, c, width);
}

#define ADD_ROW(T) (const T *x, const float *row, T *y, uint32_t rows, uint32_t width)
INSTANCES(add_row, ADD_ROW, (x, row, y, rows, width))
#define SUM_ROWS(T) (const T *x, float *partials, uint32_t width, uint32_t rows_per_group, uint32_t rows_per_run)
INSTANCES(sum_rows, SUM_ROWS, (x, partials, width, rows_per_group, rows_per_run))

#define RESIDUAL(SUFFIX, X, Y, V)                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        residual_##SUFFIX##_v##V(const X *x, const Y *branch, const X *gate, const float *bias, X *y, uint32_t width,  \
                                 uint32_t rows_per_group, uint32_t rows_per_run) {                                     \
        residual<X, Y, V>(x, branch, gate, bias, y, width, rows_per_group, rows_per_run);                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        residual_back_##SUFFIX##_v##V(const X *dy, const Y *branch, const X *gate, Y *dbranch, float *partials,        \
                                      uint32_t width, uint32_t rows_per_group, uint32_t rows_per_run) {                \
        residual_back<X, Y, V>(dy, branch, gate, dbranch, partials, width, rows_per_group, rows_per_run);              \
    }
#define RESIDUALS(SUFFIX, X, Y)                                                                                        \
    RESIDUAL(SUFFIX, X, Y, 1)                                                                                          \
    RESIDUAL(SUFFIX, X, Y, 4)
RESIDUALS(f32_f32, float, float)
RESIDUALS(f32_bf16, float, __nv_bfloat16)
RESIDUALS(bf16_bf16, __nv_bfloat16, __nv_bfloat16)
