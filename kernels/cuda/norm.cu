// Root-mean-square norms; formulas in src/norm/mod.rs.
//
// One warp owns a row of statistics: it reads the row once for them and again from the first-level cache.
// A token may hold several such rows side by side (`heads`), each with its own part of scale and shift.
// T is the type of x, scale and shift, U that of y and dy: a residual stream in float feeds products in bf16.
// forward       2 T a element.
// backward      3 T a element; leaves 1 / rms of each row (float) for the gradients of scale and shift:
// columns       a block owns 256 columns of a run of rows and writes their two partial sums (2 T read again),
// columns_sum   adds the partial sums of a group in a fixed order. No atomics: the same bits each time.
// scale and shift may be null; token t uses row t / tokens_per_group of them. Limit: memory bandwidth.
#include "common.cuh"

// Where scale and shift of a row start.
__device__ __forceinline__ size_t affine_row(uint32_t row, uint32_t width, uint32_t heads, uint32_t tokens_per_group) {
    return ((size_t)(row / heads / tokens_per_group) * heads + row % heads) * width;
}

template <typename T, typename U, int V>
__device__ void rms_norm(const T *x, const T *scale, const T *shift, U *y, uint32_t rows, uint32_t width,
                         uint32_t heads, uint32_t tokens_per_group, float offset, float eps) {
    const uint32_t row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += (size_t)row * width;
    y += (size_t)row * width;
    float sum = 0.0f;
    for (uint32_t c = lane * V; c < width; c += 32 * V) {
        float a[V];
        load<V>(x + c, a);
#pragma unroll
        for (int i = 0; i < V; i++) sum += a[i] * a[i];
    }
    const float r = rsqrtf(warp_sum(sum) / width + eps);
    const size_t group = affine_row(row, width, heads, tokens_per_group);
    for (uint32_t c = lane * V; c < width; c += 32 * V) {
        float a[V], s[V];
        load<V>(x + c, a);
#pragma unroll
        for (int i = 0; i < V; i++) a[i] *= r;
        if (scale) {
            load<V>(scale + group + c, s);
#pragma unroll
            for (int i = 0; i < V; i++) a[i] *= offset + s[i];
        }
        if (shift) {
            load<V>(shift + group + c, s);
#pragma unroll
            for (int i = 0; i < V; i++) a[i] += s[i];
        }
        store<V>(y + c, a);
    }
}

template <typename T, typename U, int V>
__device__ void rms_norm_backward(const T *x, const U *dy, const T *scale, T *dx, float *inverse, uint32_t rows,
                                  uint32_t width, uint32_t heads, uint32_t tokens_per_group, float offset,
                                  float eps) {
    const uint32_t row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += (size_t)row * width;
    dy += (size_t)row * width;
    dx += (size_t)row * width;
    if (scale) scale += affine_row(row, width, heads, tokens_per_group);
    float sum = 0.0f, pull = 0.0f;
    for (uint32_t c = lane * V; c < width; c += 32 * V) {
        float a[V], g[V], s[V];
        load<V>(x + c, a);
        load<V>(dy + c, g);
        if (scale) {
            load<V>(scale + c, s);
#pragma unroll
            for (int i = 0; i < V; i++) g[i] *= offset + s[i];
        }
#pragma unroll
        for (int i = 0; i < V; i++) sum += a[i] * a[i], pull += a[i] * g[i];
    }
    const float r = rsqrtf(warp_sum(sum) / width + eps);
    pull = warp_sum(pull) / width * r * r;
    for (uint32_t c = lane * V; c < width; c += 32 * V) {
        float a[V], g[V], s[V];
        load<V>(x + c, a);
        load<V>(dy + c, g);
        if (scale) {
            load<V>(scale + c, s);
#pragma unroll
            for (int i = 0; i < V; i++) g[i] *= offset + s[i];
        }
#pragma unroll
        for (int i = 0; i < V; i++) a[i] = r * (g[i] - a[i] * pull);
        store<V>(dx + c, a);
    }
    if (lane == 0) inverse[row] = r;
}

// Grid (columns / 256, runs, groups); partials [groups, runs, 2, columns], columns = heads * width.
template <typename T, typename U>
__device__ void columns(const T *x, const U *dy, const float *inverse, float *partials, uint32_t width, uint32_t heads,
                        uint32_t tokens_per_group, uint32_t tokens_per_run) {
    const uint32_t all = heads * width, c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= all) return;
    const uint32_t first = blockIdx.y * tokens_per_run, last = min(first + tokens_per_run, tokens_per_group);
    float dscale = 0.0f, dshift = 0.0f;
#pragma unroll 4
    for (uint32_t token = first; token < last; token++) {
        const size_t at = (size_t)blockIdx.z * tokens_per_group + token;
        float a[1], d[1];
        load<1>(x + at * all + c, a);
        load<1>(dy + at * all + c, d);
        dscale += d[0] * a[0] * inverse[at * heads + c / width];
        dshift += d[0];
    }
    float *sums = partials + ((size_t)blockIdx.z * gridDim.y + blockIdx.y) * 2 * all;
    sums[c] = dscale;
    sums[all + c] = dshift;
}

// Grid (columns / 32, groups), threads (32, 8): row y of a block adds every eighth run, then row 0 adds the rows.
template <typename T>
__device__ void columns_sum(const float *partials, T *dscale, T *dshift, uint32_t width, uint32_t runs) {
    __shared__ float shared[2][8][32];
    const uint32_t c = blockIdx.x * 32 + threadIdx.x;
    float sums[2] = {0.0f, 0.0f};
    if (c < width) {
        for (uint32_t run = threadIdx.y; run < runs; run += 8) {
            const float *part = partials + ((size_t)blockIdx.y * runs + run) * 2 * width;
            sums[0] += part[c];
            sums[1] += part[width + c];
        }
    }
    shared[0][threadIdx.y][threadIdx.x] = sums[0];
    shared[1][threadIdx.y][threadIdx.x] = sums[1];
    __syncthreads();
    if (threadIdx.y > 0 || c >= width) return;
    for (int row = 1; row < 8; row++) {
        sums[0] += shared[0][row][threadIdx.x];
        sums[1] += shared[1][row][threadIdx.x];
    }
    const size_t at = (size_t)blockIdx.y * width + c;
    float value[1] = {sums[0]};
    store<1>(dscale + at, value);
    value[0] = sums[1];
    if (dshift) store<1>(dshift + at, value);
}

#define NORM_INSTANCES(SUFFIX, T, U, V)                                                                                \
    extern "C" __global__ void __launch_bounds__(256) rms_norm_##SUFFIX##_v##V(                                        \
        const T *x, const T *scale, const T *shift, U *y, uint32_t rows, uint32_t width, uint32_t heads,              \
        uint32_t tokens_per_group, float offset, float eps) {                                                          \
        rms_norm<T, U, V>(x, scale, shift, y, rows, width, heads, tokens_per_group, offset, eps);                      \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) rms_norm_backward_##SUFFIX##_v##V(                               \
        const T *x, const U *dy, const T *scale, T *dx, float *inverse, uint32_t rows, uint32_t width,                \
        uint32_t heads, uint32_t tokens_per_group, float offset, float eps) {                                          \
        rms_norm_backward<T, U, V>(x, dy, scale, dx, inverse, rows, width, heads, tokens_per_group, offset, eps);      \
    }
#define COLUMNS(SUFFIX, T, U)                                                                                          \
    NORM_INSTANCES(SUFFIX, T, U, 1)                                                                                    \
    NORM_INSTANCES(SUFFIX, T, U, 4)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        columns_##SUFFIX(const T *x, const U *dy, const float *inverse, float *partials, uint32_t width,               \
                         uint32_t heads, uint32_t tokens_per_group, uint32_t tokens_per_run) {                         \
        columns<T, U>(x, dy, inverse, partials, width, heads, tokens_per_group, tokens_per_run);                       \
    }
COLUMNS(f32, float, float)
COLUMNS(bf16, __nv_bfloat16, __nv_bfloat16)
COLUMNS(f32_bf16, float, __nv_bfloat16)

#define COLUMNS_SUM(SUFFIX, T)                                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        columns_sum_##SUFFIX(const float *partials, T *dscale, T *dshift, uint32_t width, uint32_t runs) {             \
        columns_sum<T>(partials, dscale, dshift, width, runs);                                                         \
    }
COLUMNS_SUM(f32, float)
COLUMNS_SUM(bf16, __nv_bfloat16)
