// Layer norms; formulas in src/norm/layer/mod.rs.
//
// X is the type of x, Y that of y and dy. Rows of x may have gaps between them (x_stride in elements), all others are
// dense. gain and bias are float, or null.
// layer_norm            1 X + 1 Y a element.
// layer_norm_backward   2 X + 1 Y a element. A row of threads walks over a run of rows and keeps its sums of dgain and
//                       dbias, which it writes to partials [runs, 2, width] (null: not wanted) at the end.
// Limit: memory bandwidth. No atomics: the same bits each time.
#include "rowwise.cuh"

// The mean of a row.
template <int V, typename X>
__device__ __forceinline__ float row_mean(const Columns<V> &own, const Row<X, V> &x, uint32_t width, uint32_t threads,
                                          RowSums<1> &shared, uint32_t &turn) {
    float sum[1] = {0.0f};
    auto add = [&](int, uint32_t, const Vector<X, V> &x) {
        float a[V];
        x.get(a);
#pragma unroll
        for (int i = 0; i < V; i++) sum[0] += a[i];
    };
    each(own, add, x);
    row_sums<1>(sum, threads, shared, turn);
    return sum[0] / width;
}

template <typename X, typename Y, int V>
__device__ void layer_norm(const X *x, const float *gain, const float *bias, Y *y, uint32_t rows, uint32_t width,
                           size_t x_stride, uint32_t threads, float eps) {
    __shared__ RowSums<1> shared;
    uint32_t turn = 0;
    const size_t row = (size_t)blockIdx.x * (blockDim.x / threads) + threadIdx.x / threads;
    const Columns<V> own(threads, row < rows ? width : 0);
    y += row * width;

    Row<X, V> x_row(x, row * x_stride);
    keep(own, x_row);
    const float mean = row_mean(own, x_row, width, threads, shared, turn);
    float sum[1] = {0.0f};
    auto add = [&](int, uint32_t, const Vector<X, V> &x) {
        float a[V];
        x.get(a);
#pragma unroll
        for (int i = 0; i < V; i++) sum[0] += (a[i] - mean) * (a[i] - mean);
    };
    each(own, add, x_row);
    row_sums<1>(sum, threads, shared, turn);
    const float r = rsqrtf(sum[0] / width + eps);
    auto finish = [&](int, uint32_t c, const Vector<X, V> &x) {
        float a[V], w[V];
        x.get(a);
#pragma unroll
        for (int i = 0; i < V; i++) a[i] = (a[i] - mean) * r;
        if (gain) {
            load_vector<V>(gain + c, w);
#pragma unroll
            for (int i = 0; i < V; i++) a[i] *= w[i];
        }
        if (bias) {
            load_vector<V>(bias + c, w);
#pragma unroll
            for (int i = 0; i < V; i++) a[i] += w[i];
        }
        store_vector<V>(y + c, a);
    };
    each(own, finish, x_row);
}

template <typename X, typename Y, int V>
__device__ void layer_norm_backward(const X *x, const float *gain, const Y *dy, X *dx, float *partials, uint32_t rows,
                                    uint32_t width, size_t x_stride, uint32_t runs, uint32_t rows_per_run,
                                    uint32_t threads, float eps) {
    __shared__ RowSums<1> shared_mean;
    __shared__ RowSums<3> shared;
    uint32_t turn_mean = 0, turn = 0;
    const size_t run = (size_t)blockIdx.x * (blockDim.x / threads) + threadIdx.x / threads;
    TokenSums<V> dgain(partials, run * 2 * width), dbias(partials, (run * 2 + 1) * width);
    for (uint32_t t = 0; t < rows_per_run; t++) {
        const size_t row = run * rows_per_run + t;
        const Columns<V> own(threads, run < runs && row < rows ? width : 0);
        X *dx_row = dx + row * width;

        Row<X, V> x_row(x, row * x_stride);
        Row<Y, V> dy_row(dy, row * width);
        keep(own, x_row, dy_row);
        const float mean = row_mean(own, x_row, width, threads, shared_mean, turn_mean);
        // Sums of (x - mean)^2, of u = dy gain and of (x - mean) u.
        float sums[3] = {0.0f, 0.0f, 0.0f};
        auto centred = [&](uint32_t c, const Vector<X, V> &x, const Vector<Y, V> &dy, float(&a)[V], float(&d)[V],
                           float(&u)[V]) {
            float w[V];
            x.get(a);
            dy.get(d);
#pragma unroll
            for (int i = 0; i < V; i++) a[i] -= mean, w[i] = 1.0f;
            if (gain) load_vector<V>(gain + c, w);
#pragma unroll
            for (int i = 0; i < V; i++) u[i] = d[i] * w[i];
        };
        auto add = [&](int, uint32_t c, const Vector<X, V> &x, const Vector<Y, V> &dy) {
            float a[V], d[V], u[V];
            centred(c, x, dy, a, d, u);
#pragma unroll
            for (int i = 0; i < V; i++) sums[0] += a[i] * a[i], sums[1] += u[i], sums[2] += a[i] * u[i];
        };
        each(own, add, x_row, dy_row);
        row_sums<3>(sums, threads, shared, turn);
        const float r = rsqrtf(sums[0] / width + eps), mean_u = sums[1] / width, pull = sums[2] / width * r * r;
        auto finish = [&](int k, uint32_t c, const Vector<X, V> &x, const Vector<Y, V> &dy) {
            float normed[V], d[V], u[V];
            centred(c, x, dy, normed, d, u);
#pragma unroll
            for (int i = 0; i < V; i++) {
                u[i] = r * (u[i] - mean_u - normed[i] * pull);
                normed[i] *= r * d[i];
            }
            store_vector<V>(dx_row + c, u);
            dgain.add(k, c, normed, t == 0);
            dbias.add(k, c, d, t == 0);
        };
        each(own, finish, x_row, dy_row);
    }
    if (!partials || run >= runs) return;
    const Columns<V> own(threads, width);
    dgain.leave(own, run * rows_per_run < rows);
    dbias.leave(own, run * rows_per_run < rows);
}

#define LAYER(SUFFIX, X, Y, V)                                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        layer_norm_##SUFFIX##_v##V(const X *x, const float *gain, const float *bias, Y *y, uint32_t rows,              \
                                   uint32_t width, size_t x_stride, uint32_t threads, float eps) {                     \
        layer_norm<X, Y, V>(x, gain, bias, y, rows, width, x_stride, threads, eps);                                    \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 2) layer_norm_backward_##SUFFIX##_v##V(                          \
        const X *x, const float *gain, const Y *dy, X *dx, float *partials, uint32_t rows, uint32_t width,             \
        size_t x_stride, uint32_t runs, uint32_t rows_per_run, uint32_t threads, float eps) {                          \
        layer_norm_backward<X, Y, V>(x, gain, dy, dx, partials, rows, width, x_stride, runs, rows_per_run, threads,    \
                                     eps);                                                                             \
    }
LAYER(f32, float, float, 1)
LAYER(f32, float, float, 4)
LAYER(f32_bf16, float, __nv_bfloat16, 1)
LAYER(f32_bf16, float, __nv_bfloat16, 8)
LAYER(bf16, __nv_bfloat16, __nv_bfloat16, 1)
LAYER(bf16, __nv_bfloat16, __nv_bfloat16, 8)
