// Root-mean-square norms times a gate; formulas in src/norm/gated/mod.rs.
//
// A row of statistics is one head of a token; x and gate may be columns of a wider matrix (strides of tokens in
// elements), y, dy, dx and dgate are dense. gain is float, or null.
// rms_norm_gated            3 T a element.
// rms_norm_gated_backward   5 T a element. A row of threads walks over a run of tokens with one head and keeps its sums
//                           of dgain, which it writes to partials [runs, heads, width] (null: not wanted) at the end.
// Limit: memory bandwidth. No atomics: the same bits each time.
#include "rowwise.cuh"

enum Activation : uint32_t { IDENTITY, SIGMOID, SILU };

// The activation and its derivative.
__device__ __forceinline__ void activate(uint32_t kind, float g, float &a, float &slope) {
    const float s = __fdividef(1.0f, 1.0f + __expf(-g));
    if (kind == IDENTITY) {
        a = g, slope = 1.0f;
    } else if (kind == SIGMOID) {
        a = s, slope = s * (1.0f - s);
    } else {
        a = g * s, slope = s * (1.0f + g * (1.0f - s));
    }
}

template <typename T, int V>
__device__ void rms_norm_gated(const T *x, const T *gate, const float *gain, T *y, uint32_t rows, uint32_t width,
                               uint32_t heads, size_t x_stride, size_t gate_stride, uint32_t threads,
                               uint32_t activation, float eps) {
    __shared__ RowSums<1> shared;
    uint32_t turn = 0;
    const size_t row = (size_t)blockIdx.x * (blockDim.x / threads) + threadIdx.x / threads;
    const Columns<V> own(threads, row < rows ? width : 0);
    const size_t token = row / heads, column = row % heads * width;
    y += token * heads * width + column;
    if (gain) gain += column;

    x += token * x_stride + column, gate += token * gate_stride + column;
    Row<T, V> x_row(x, 0), gate_row(gate, 0);
    keep(own, x_row, gate_row);
    float sum[1] = {0.0f};
    auto add = [&](int, uint32_t, const Vector<T, V> &x) {
        float a[V];
        x.get(a);
#pragma unroll
        for (int i = 0; i < V; i++) sum[0] += a[i] * a[i];
    };
    each(own, add, x_row);
    row_sums<1>(sum, threads, shared, turn);
    const float r = rsqrtf(sum[0] / width + eps);
    auto finish = [&](int, uint32_t c, const Vector<T, V> &x, const Vector<T, V> &gate) {
        float a[V], g[V], w[V];
        x.get(a);
        gate.get(g);
#pragma unroll
        for (int i = 0; i < V; i++) {
            float value, slope;
            activate(activation, g[i], value, slope);
            a[i] *= r * value;
        }
        if (gain) {
            load_vector<V>(gain + c, w);
#pragma unroll
            for (int i = 0; i < V; i++) a[i] *= w[i];
        }
        store_vector<V>(y + c, a);
    };
    each(own, finish, x_row, gate_row);
}

template <typename T, int V>
__device__ void rms_norm_gated_backward(const T *x, const T *gate, const float *gain, const T *dy, T *dx, T *dgate,
                                        float *partials, uint32_t tokens, uint32_t width, uint32_t heads,
                                        size_t x_stride, size_t gate_stride, uint32_t runs, uint32_t tokens_per_run,
                                        uint32_t threads, uint32_t activation, float eps) {
    __shared__ RowSums<2> shared;
    uint32_t turn = 0;
    const size_t slot = (size_t)blockIdx.x * (blockDim.x / threads) + threadIdx.x / threads;
    const bool used = slot < (size_t)runs * heads;
    const size_t run = slot / heads, column = slot % heads * width, columns = (size_t)heads * width;
    x += column, gate += column, dy += column, dx += column, dgate += column;
    if (gain) gain += column;
    TokenSums<V> dgain(partials, run * columns + column);
    for (uint32_t t = 0; t < tokens_per_run; t++) {
        const size_t token = run * tokens_per_run + t;
        const size_t start = token * columns;
        const Columns<V> own(threads, used && token < tokens ? width : 0);
        Row<T, V> x_row(x, token * x_stride), gate_row(gate, token * gate_stride),
            dy_row(dy, start);
        keep(own, x_row, gate_row, dy_row);
        // Sums of x^2 and of x u, u = dy gain act(gate).
        float sums[2] = {0.0f, 0.0f};
        auto add = [&](int, uint32_t c, const Vector<T, V> &x, const Vector<T, V> &gate, const Vector<T, V> &dy) {
            float a[V], g[V], d[V], w[V];
            x.get(a);
            gate.get(g);
            dy.get(d);
            if (gain) {
                load_vector<V>(gain + c, w);
#pragma unroll
                for (int i = 0; i < V; i++) d[i] *= w[i];
            }
#pragma unroll
            for (int i = 0; i < V; i++) {
                float value, slope;
                activate(activation, g[i], value, slope);
                sums[0] += a[i] * a[i];
                sums[1] += a[i] * d[i] * value;
            }
        };
        each(own, add, x_row, gate_row, dy_row);
        row_sums<2>(sums, threads, shared, turn);
        const float r = rsqrtf(sums[0] / width + eps), pull = sums[1] / width * r * r;
        auto finish = [&](int k, uint32_t c, const Vector<T, V> &x, const Vector<T, V> &gate, const Vector<T, V> &dy) {
            float a[V], g[V], d[V], w[V], terms[V];
            x.get(a);
            gate.get(g);
            dy.get(d);
#pragma unroll
            for (int i = 0; i < V; i++) w[i] = 1.0f;
            if (gain) load_vector<V>(gain + c, w);
#pragma unroll
            for (int i = 0; i < V; i++) {
                float value, slope;
                activate(activation, g[i], value, slope);
                const float normed = a[i] * r;
                terms[i] = d[i] * normed * value;
                g[i] = d[i] * w[i] * normed * slope;
                a[i] = r * (d[i] * w[i] * value - a[i] * pull);
            }
            store_vector<V>(dx + start + c, a);
            store_vector<V>(dgate + start + c, g);
            dgain.add(k, c, terms, t == 0);
        };
        each(own, finish, x_row, gate_row, dy_row);
    }
    if (partials && used) dgain.leave(Columns<V>(threads, width), run * tokens_per_run < tokens);
}

#define GATED(SUFFIX, T, V)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256) rms_norm_gated_##SUFFIX##_v##V(                                  \
        const T *x, const T *gate, const float *gain, T *y, uint32_t rows, uint32_t width, uint32_t heads,            \
        size_t x_stride, size_t gate_stride, uint32_t threads, uint32_t activation, float eps) {                       \
        rms_norm_gated<T, V>(x, gate, gain, y, rows, width, heads, x_stride, gate_stride, threads, activation, eps);   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 2) rms_norm_gated_backward_##SUFFIX##_v##V(                      \
        const T *x, const T *gate, const float *gain, const T *dy, T *dx, T *dgate, float *partials,                  \
        uint32_t tokens, uint32_t width, uint32_t heads, size_t x_stride, size_t gate_stride, uint32_t runs,           \
        uint32_t tokens_per_run, uint32_t threads, uint32_t activation, float eps) {                                   \
        rms_norm_gated_backward<T, V>(x, gate, gain, dy, dx, dgate, partials, tokens, width, heads, x_stride,          \
                                      gate_stride, runs, tokens_per_run, threads, activation, eps);                    \
    }
GATED(f32, float, 1)
GATED(f32, float, 4)
GATED(bf16, __nv_bfloat16, 1)
GATED(bf16, __nv_bfloat16, 8)
