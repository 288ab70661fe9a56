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
    const size_t row = (size_t)blockIdx.x * (blockDim.x / threads) + threadIdx.x / threads;
    const Columns<V> own(threads, row < rows ? width : 0);
    sum += row * width, normed += row * width;

    Row<X, V> x(residual, row * width);
    Row<Y, V> y(branch, row * width);
    keep(own, x, y);
    float squares[1] = {0.0f}, kept[KEPT][V];
    // Statistics are those of the sum as it is stored.
    auto join = [&](int k, uint32_t c, const Vector<X, V> &x, const Vector<Y, V> &y) {
        float a[V], b[V];
        x.get(a);
        y.get(b);
#pragma unroll
        for (int i = 0; i < V; i++) {
            a[i] = rounded(a[i] + b[i], X());
            squares[0] += a[i] * a[i];
            if (k >= 0) kept[k][i] = a[i];
        }
        store_vector<V>(sum + c, a);
    };
    each(own, join, x, y);
    row_sums<1>(squares, threads, shared, turn);
    const float r = rsqrtf(squares[0] / width + eps);
    each(own, [&](int k, uint32_t c) {
        float a[V], w[V];
        if (k < 0) load_vector<V>(sum + c, a); // what this thread itself has written
#pragma unroll
        for (int i = 0; i < V; i++) a[i] = (k < 0 ? a[i] : kept[k][i]) * r;
        if (gain) {
            load_vector<V>(gain + c, w);
#pragma unroll
            for (int i = 0; i < V; i++) a[i] *= w[i];
        }
        store_vector<V>(normed + c, a);
    });
}

template <typename X, typename Y, int V>
__device__ void add_norm_backward(const X *sum, const float *gain, const X *dsum, const Y *dnormed, X *dresidual,
                                  Y *dbranch, float *partials, uint32_t rows, uint32_t width, uint32_t runs,
                                  uint32_t rows_per_run, uint32_t threads, float eps) {
    __shared__ RowSums<2> shared;
    uint32_t turn = 0;
    const size_t run = (size_t)blockIdx.x * (blockDim.x / threads) + threadIdx.x / threads;
    TokenSums<V> dgain(partials, run * width);
    for (uint32_t t = 0; t < rows_per_run; t++) {
        const size_t row = run * rows_per_run + t, start = row * width;
        const Columns<V> own(threads, run < runs && row < rows ? width : 0);
        Row<X, V> s(sum, start), ds(dsum, start);
        Row<Y, V> dn(dnormed, start);
        keep(own, s, dn, ds);
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
        auto add = [&](int, uint32_t c, const Vector<X, V> &sum, const Vector<Y, V> &dnormed) {
            float a[V], d[V], u[V];
            sum.get(a);
            weighted(c, dnormed, d, u);
#pragma unroll
            for (int i = 0; i < V; i++) sums[0] += a[i] * a[i], sums[1] += a[i] * u[i];
        };
        each(own, add, s, dn);
        row_sums<2>(sums, threads, shared, turn);
        const float r = rsqrtf(sums[0] / width + eps), pull = sums[1] / width * r * r;
        auto finish = [&](int k, uint32_t c, const Vector<X, V> &sum, const Vector<Y, V> &dnormed,
                          const Vector<X, V> &dsum) {
            float a[V], d[V], u[V];
            sum.get(a);
            weighted(c, dnormed, d, u);
#pragma unroll
            for (int i = 0; i < V; i++) {
                u[i] = r * (u[i] - a[i] * pull);
                d[i] *= a[i] * r;
            }
            if (ds.data) {
                dsum.get(a);
#pragma unroll
                for (int i = 0; i < V; i++) u[i] += a[i];
            }
            store_vector<V>(dresidual + start + c, u);
            if (dbranch) store_vector<V>(dbranch + start + c, u);
            dgain.add(k, c, d, t == 0);
        };
        each(own, finish, s, dn, ds);
    }
    if (partials && run < runs) dgain.leave(Columns<V>(threads, width), run * rows_per_run < rows);
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
