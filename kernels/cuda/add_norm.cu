// A branch joins the residual stream, and the norm of the sum feeds the next branch; formulas in src/norm/add/mod.rs.
//
// X is the type of the stream, Y that of branches. All are dense; gain is float, or null.
// add_norm            2 X + 2 Y a element.
// add_norm_backward   reads the sum, its adjoint (which may be null) and that of the norm: 3 X + 2 Y a element, one Y
//                     less where X and Y are the same (dbranch null). A row of threads walks over a run of rows and
//                     keeps its sums of dgain, which it writes to partials [runs, width] (null: not wanted) at the end.
// Limit: memory bandwidth. No atomics: the same bits each time.
#include "rowwise.cuh"

__device__ __forceinline__ float rounded(float a, float) { return a; }
__device__ __forceinline__ float rounded(float a, __nv_bfloat16) { return __bfloat162float(__float2bfloat16(a)); }

template <typename X, typename Y, int V>
__device__ void add_norm(const X *residual, const Y *branch, const float *gain, X *sum, Y *normed, uint32_t rows,
                         uint32_t width, uint32_t threads, float eps) {
    constexpr int KEPT = KEPT_VECTORS<V>;
    __shared__ RowSums<1> shared;
    uint32_t turn = 0;
    const uint32_t lane = threadIdx.x % threads, step = threads * V;
    const size_t row = (size_t)blockIdx.x * (blockDim.x / threads) + threadIdx.x / threads;
    const uint32_t end = row < rows ? width : 0;
    residual += row * width, branch += row * width, sum += row * width, normed += row * width;

    Vector<X, V> kept_x[KEPT];
    Vector<Y, V> kept_y[KEPT];
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        const uint32_t c = lane * V + k * step;
        if (c >= end) continue;
        kept_x[k].load(residual + c);
        kept_y[k].load(branch + c);
    }
    float squares[1] = {0.0f}, kept[KEPT][V];
    // Statistics are those of the sum as it is stored.
    auto join = [&](uint32_t c, const Vector<X, V> &x, const Vector<Y, V> &y, float(&a)[V]) {
        float b[V];
        x.get(a);
        y.get(b);
#pragma unroll
        for (int i = 0; i < V; i++) {
            a[i] = rounded(a[i] + b[i], X());
            squares[0] += a[i] * a[i];
        }
        store_vector<V>(sum + c, a);
    };
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        const uint32_t c = lane * V + k * step;
        if (c < end) join(c, kept_x[k], kept_y[k], kept[k]);
    }
    for (uint32_t c = lane * V + KEPT * step; c < end; c += step) {
        Vector<X, V> x;
        Vector<Y, V> y;
        x.load(residual + c);
        y.load(branch + c);
        float a[V];
        join(c, x, y, a);
    }
    row_sums<1>(squares, threads, shared, turn);
    const float r = rsqrtf(squares[0] / width + eps);
    auto finish = [&](uint32_t c, float(&a)[V]) {
        float w[V];
#pragma unroll
        for (int i = 0; i < V; i++) a[i] *= r;
        if (gain) {
            load_vector<V>(gain + c, w);
#pragma unroll
            for (int i = 0; i < V; i++) a[i] *= w[i];
        }
        store_vector<V>(normed + c, a);
    };
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        const uint32_t c = lane * V + k * step;
        if (c < end) finish(c, kept[k]);
    }
    // What this thread itself has written.
    for (uint32_t c = lane * V + KEPT * step; c < end; c += step) {
        float a[V];
        load_vector<V>(sum + c, a);
        finish(c, a);
    }
}

template <typename X, typename Y, int V>
__device__ void add_norm_backward(const X *sum, const float *gain, const X *dsum, const Y *dnormed, X *dresidual,
                                  Y *dbranch, float *partials, uint32_t rows, uint32_t width, uint32_t runs,
                                  uint32_t rows_per_run, uint32_t threads, float eps) {
    constexpr int KEPT = KEPT_VECTORS<V>;
    __shared__ RowSums<2> shared;
    uint32_t turn = 0;
    const uint32_t lane = threadIdx.x % threads, step = threads * V;
    const size_t run = (size_t)blockIdx.x * (blockDim.x / threads) + threadIdx.x / threads;
    if (partials) partials += run * width;
    float dgain[KEPT][V] = {};
    for (uint32_t t = 0; t < rows_per_run; t++) {
        const size_t row = run * rows_per_run + t, start = row * width;
        const uint32_t end = run < runs && row < rows ? width : 0;

        Vector<X, V> kept_sum[KEPT], kept_dsum[KEPT];
        Vector<Y, V> kept_dnormed[KEPT];
#pragma unroll
        for (int k = 0; k < KEPT; k++) {
            const uint32_t c = lane * V + k * step;
            if (c >= end) continue;
            kept_sum[k].load(sum + start + c);
            kept_dnormed[k].load(dnormed + start + c);
            if (dsum) kept_dsum[k].load(dsum + start + c);
        }
        // Sums of s^2 and of s u, u = dnormed gain.
        float sums[2] = {0.0f, 0.0f};
        auto weighted = [&](uint32_t c, const Vector<Y, V> &dnormed, float(&d)[V], float(&u)[V]) {
            float w[V];
            dnormed.get(d);
#pragma unroll
            for (int i = 0; i < V; i++) w[i] = 1.0f;
            if (gain) load_vector<V>(gain + c, w);
#pragma unroll
            for (int i = 0; i < V; i++) u[i] = d[i] * w[i];
        };
        auto add = [&](uint32_t c, const Vector<X, V> &sum, const Vector<Y, V> &dnormed) {
            float a[V], d[V], u[V];
            sum.get(a);
            weighted(c, dnormed, d, u);
#pragma unroll
            for (int i = 0; i < V; i++) sums[0] += a[i] * a[i], sums[1] += a[i] * u[i];
        };
#pragma unroll
        for (int k = 0; k < KEPT; k++) {
            const uint32_t c = lane * V + k * step;
            if (c < end) add(c, kept_sum[k], kept_dnormed[k]);
        }
        for (uint32_t c = lane * V + KEPT * step; c < end; c += step) {
            Vector<X, V> a;
            Vector<Y, V> d;
            a.load(sum + start + c);
            d.load(dnormed + start + c);
            add(c, a, d);
        }
        row_sums<2>(sums, threads, shared, turn);
        const float r = rsqrtf(sums[0] / width + eps), pull = sums[1] / width * r * r;
        // Leaves the terms of dgain in `d`.
        auto finish = [&](uint32_t c, const Vector<X, V> &sum, const Vector<X, V> &dsum, bool summed,
                          const Vector<Y, V> &dnormed, float(&d)[V]) {
            float a[V], u[V];
            sum.get(a);
            weighted(c, dnormed, d, u);
#pragma unroll
            for (int i = 0; i < V; i++) {
                u[i] = r * (u[i] - a[i] * pull);
                d[i] *= a[i] * r;
            }
            if (summed) {
                dsum.get(a);
#pragma unroll
                for (int i = 0; i < V; i++) u[i] += a[i];
            }
            store_vector<V>(dresidual + start + c, u);
            if (dbranch) store_vector<V>(dbranch + start + c, u);
        };
        float terms[V];
#pragma unroll
        for (int k = 0; k < KEPT; k++) {
            const uint32_t c = lane * V + k * step;
            if (c >= end) continue;
            finish(c, kept_sum[k], kept_dsum[k], dsum != nullptr, kept_dnormed[k], terms);
#pragma unroll
            for (int i = 0; i < V; i++) dgain[k][i] += terms[i];
        }
        for (uint32_t c = lane * V + KEPT * step; c < end; c += step) {
            Vector<X, V> a, s;
            Vector<Y, V> d;
            a.load(sum + start + c);
            d.load(dnormed + start + c);
            if (dsum) s.load(dsum + start + c);
            finish(c, a, s, dsum != nullptr, d, terms);
            if (partials) add_beyond<V>(partials + c, terms, t == 0);
        }
    }
    if (!partials || run >= runs) return;
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        const uint32_t c = lane * V + k * step;
        if (c < width) store_vector<V>(partials + c, dgain[k]);
    }
    // A run without rows.
    if (run * rows_per_run < rows) return;
    const float none[V] = {};
    for (uint32_t c = lane * V + KEPT * step; c < width; c += step) store_vector<V>(partials + c, none);
}

#define ADD_NORM(SUFFIX, X, Y, V)                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        add_norm_##SUFFIX##_v##V(const X *residual, const Y *branch, const float *gain, X *sum, Y *normed,             \
                                 uint32_t rows, uint32_t width, uint32_t threads, float eps) {                         \
        add_norm<X, Y, V>(residual, branch, gain, sum, normed, rows, width, threads, eps);                             \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 2) add_norm_backward_##SUFFIX##_v##V(                            \
        const X *sum, const float *gain, const X *dsum, const Y *dnormed, X *dresidual, Y *dbranch, float *partials,   \
        uint32_t rows, uint32_t width, uint32_t runs, uint32_t rows_per_run, uint32_t threads, float eps) {            \
        add_norm_backward<X, Y, V>(sum, gain, dsum, dnormed, dresidual, dbranch, partials, rows, width, runs,          \
                                   rows_per_run, threads, eps);                                                        \
    }
ADD_NORM(f32, float, float, 1)
ADD_NORM(f32, float, float, 4)
ADD_NORM(f32_bf16, float, __nv_bfloat16, 1)
ADD_NORM(f32_bf16, float, __nv_bfloat16, 8)
ADD_NORM(bf16, __nv_bfloat16, __nv_bfloat16, 1)
ADD_NORM(bf16, __nv_bfloat16, __nv_bfloat16, 8)
