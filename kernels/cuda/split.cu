// The columns of a fused projection as operands of a mixer; formulas in src/split/mod.rs.
//
// x [rows, W]; a part is `width` columns from `first` on. Threads: x over vectors of a row, y over rows.
// part            2 T an element of the part
// part_backward   3 T (plain: 2 T); writes its columns of dx
// all             every part of a few rows in one launch, as decoding has them
// gate            T, T for keys and 4 bytes for log-decays
// gate_backward   3 T + 4; a block owns a run of rows and leaves its share of the adjoint of the lower bound (rows.cu adds them)
// Limit: memory bandwidth.
#include "rowwise.cuh"

constexpr float LOWEST_LOG = -60.0f, LEAST = 8.75651076e-27f; // e^-60

enum Activation { PLAIN, SILU };

template <typename T, int V, Activation A>
__device__ void part(const T *x, T *y, uint32_t rows, uint32_t wide, uint32_t first, uint32_t width) {
    const size_t row = (size_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    for (uint32_t c = threadIdx.x * V; c < width; c += blockDim.x * V) {
        float a[V];
        load_vector<V>(x + row * wide + first + c, a);
        if (A == SILU) {
#pragma unroll
            for (int i = 0; i < V; i++) a[i] *= sigmoid(a[i]);
        }
        store_vector<V>(y + row * width + c, a);
    }
}

// dy may be null: zeros.
template <typename T, int V, Activation A>
__device__ void part_backward(const T *x, const T *dy, T *dx, uint32_t rows, uint32_t wide, uint32_t first, uint32_t width) {
    const size_t row = (size_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    for (uint32_t c = threadIdx.x * V; c < width; c += blockDim.x * V) {
        float d[V] = {};
        if (dy) load_vector<V>(dy + row * width + c, d);
        if (A == SILU) {
            float a[V];
            load_vector<V>(x + row * wide + first + c, a);
#pragma unroll
            for (int i = 0; i < V; i++) {
                const float s = sigmoid(a[i]);
                d[i] *= s * (1.0f + a[i] * (1.0f - s));
            }
        }
        store_vector<V>(dx + row * wide + first + c, d);
    }
}

struct Gate {
    float f, key, down, slope, bound;
    __device__ Gate(float x, float bound) : bound(bound) {
        const float up = sigmoid(x), free = 1.0f - bound;
        down = sigmoid(-x);
        f = bound + free * up;
        key = free * down;
        slope = free * up * down;
    }
    __device__ float log() const { return key < 0.5f ? log1pf(-key) : fmaxf(logf(f), LOWEST_LOG); }
    __device__ float divisor() const { return fmaxf(f, LEAST); }
    __device__ float relative_slope() const { return bound == 0.0f ? down : slope / divisor(); }
};

template <int V> __device__ __forceinline__ void bounds_of(const float *bound, uint32_t c, float (&b)[V]) {
#pragma unroll
    for (int i = 0; i < V; i++) b[i] = bound ? bound[c + i] : 0.0f;
}

template <typename T, int V>
__device__ void gate(const T *x, const float *bound, T *key, float *log, uint32_t rows, uint32_t wide, uint32_t first, uint32_t width) {
    const size_t row = (size_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    for (uint32_t c = threadIdx.x * V; c < width; c += blockDim.x * V) {
        float a[V], b[V], g[V];
        load_vector<V>(x + row * wide + first + c, a);
        bounds_of<V>(bound, c, b);
#pragma unroll
        for (int i = 0; i < V; i++) {
            const Gate gate(a[i], b[i]);
            a[i] = gate.key;
            g[i] = gate.log();
        }
        store_vector<V>(key + row * width + c, a);
        store_vector<V>(log + row * width + c, g);
    }
}

// Grid (columns, runs); d_key and d_log may be null; partials [runs, width] too.
template <typename T, int V>
__device__ void gate_backward(const T *x, const float *bound, const T *d_key, const float *d_log, T *dx, float *partials, uint32_t rows,
                              uint32_t wide, uint32_t first, uint32_t width, uint32_t rows_per_run) {
    const uint32_t c = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (c >= width) return;
    const uint32_t from = blockIdx.y * rows_per_run, to = min(from + rows_per_run, rows);
    float b[V], sums[V] = {};
    bounds_of<V>(bound, c, b);
    for (size_t row = from; row < to; row++) {
        float a[V], dk[V] = {}, dg[V] = {};
        load_vector<V>(x + row * wide + first + c, a);
        if (d_key) load_vector<V>(d_key + row * width + c, dk);
        if (d_log) load_vector<V>(d_log + row * width + c, dg);
#pragma unroll
        for (int i = 0; i < V; i++) {
            const Gate gate(a[i], b[i]);
            a[i] = dg[i] * gate.relative_slope() - dk[i] * gate.slope;
            sums[i] += (dg[i] / gate.divisor() - dk[i]) * gate.down;
        }
        store_vector<V>(dx + row * wide + first + c, a);
    }
    if (partials) store_vector<V>(partials + (size_t)blockIdx.y * width + c, sums);
}

// What becomes of a run of columns: `y` and, of gates, `log`. Of a launch for all of them.
struct Run {
    void *y;
    float *log;
    uint32_t first, width, activation, unused;
};
constexpr int MOST_RUNS = 8;
struct Runs {
    Run run[MOST_RUNS];
};
constexpr uint32_t IS_SILU = 1, IS_GATE = 2;

// Grid (columns, rows, runs); the bits of the launches one by one.
template <typename T> __device__ void all(const T *x, const float *bound, const Runs &runs, uint32_t wide) {
    const Run run = runs.run[blockIdx.z];
    const uint32_t c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= run.width) return;
    const size_t at = (size_t)blockIdx.y * run.width + c;
    float a[1], b[1];
    load_vector<1>(x + (size_t)blockIdx.y * wide + run.first + c, a);
    if (run.activation == IS_GATE) {
        bounds_of<1>(bound, c, b);
        const Gate gate(a[0], b[0]);
        a[0] = gate.key;
        run.log[at] = gate.log();
    } else if (run.activation == IS_SILU) {
        a[0] *= sigmoid(a[0]);
    }
    store_vector<1>((T *)run.y + at, a);
}

#define ALL(SUFFIX, T)                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256)                                                                                      \
        split_all_##SUFFIX(const T *x, const float *bound, const __grid_constant__ Runs runs, uint32_t wide) {                             \
        all<T>(x, bound, runs, wide);                                                                                                      \
    }
ALL(f32, float)
ALL(bf16, __nv_bfloat16)

#define PART(NAME, ACTIVATION, SUFFIX, T, V)                                                                                               \
    extern "C" __global__ void __launch_bounds__(256)                                                                                      \
        split_##NAME##_##SUFFIX##_v##V(const T *x, T *y, uint32_t rows, uint32_t wide, uint32_t first, uint32_t width) {                   \
        part<T, V, ACTIVATION>(x, y, rows, wide, first, width);                                                                            \
    }                                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                                      \
        split_##NAME##_backward_##SUFFIX##_v##V(const T *x, const T *dy, T *dx, uint32_t rows, uint32_t wide, uint32_t first,              \
                                                uint32_t width) {                                                                          \
        part_backward<T, V, ACTIVATION>(x, dy, dx, rows, wide, first, width);                                                              \
    }
#define SPLIT(SUFFIX, T, V)                                                                                                                \
    PART(plain, PLAIN, SUFFIX, T, V)                                                                                                       \
    PART(silu, SILU, SUFFIX, T, V)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                                                      \
        split_gate_##SUFFIX##_v##V(const T *x, const float *bound, T *key, float *log, uint32_t rows, uint32_t wide, uint32_t first,       \
                                   uint32_t width) {                                                                                       \
        gate<T, V>(x, bound, key, log, rows, wide, first, width);                                                                          \
    }                                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                                      \
        split_gate_backward_##SUFFIX##_v##V(const T *x, const float *bound, const T *d_key, const float *d_log, T *dx, float *partials,    \
                                            uint32_t rows, uint32_t wide, uint32_t first, uint32_t width, uint32_t rows_per_run) {         \
        gate_backward<T, V>(x, bound, d_key, d_log, dx, partials, rows, wide, first, width, rows_per_run);                                 \
    }
SPLIT(f32, float, 1)
SPLIT(f32, float, 4)
SPLIT(bf16, __nv_bfloat16, 1)
SPLIT(bf16, __nv_bfloat16, 8)
