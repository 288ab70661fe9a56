// Short convolution along the tokens, each channel by itself; definition in src/short_conv/mod.rs.
//
// A thread owns V channels of a run of tokens and keeps the last W tokens in registers: x is read once, and W - 1 tokens more
// for each run. Kernels of fewer taps than W begin with zeros; those of more than eight are read tap by tap. x and y are dense, weights
// float [C, taps].
// short_conv           y: 2 T an element. With `adjoint` its weights are turned around: dx out of dy.
// short_conv_weights   sums over each run in partials [runs, C, taps]: 2 T an element.
// Limit: memory bandwidth. No atomics: the same bits each time.
#include "rowwise.cuh"

struct Sizes {
    // Tokens of a batch: of what is read, and of what is written (of short_conv_weights: of dy).
    uint32_t batch, tokens, out, channels, taps;
    // Tokens of zeros in front of the first.
    uint32_t before;
    // Tokens of a run, and runs of a batch.
    uint32_t run, runs;
};

// The channels and the run of a thread.
template <int V> struct Place {
    uint32_t channel, b, run, first, last;
    bool live;

    __device__ explicit Place(const Sizes &sizes) {
        const uint32_t vectors = sizes.channels / V;
        const size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
        channel = index % vectors * V;
        run = index / vectors;
        live = run < sizes.batch * sizes.runs;
        b = run / sizes.runs;
        first = run % sizes.runs * sizes.run;
        last = min(first + sizes.run, sizes.out);
    }
};

// The last W tokens of V channels; token t stands in slot t modulo W, counted from the beginning of the run.
template <typename T, int V, int W> struct Window {
    float z[W][V];
    const T *x;
    int64_t at, tokens;
    size_t step;

    __device__ Window(const T *x, const Place<V> &place, const Sizes &sizes)
        : x(x + (size_t)place.b * sizes.tokens * sizes.channels + place.channel), tokens(sizes.tokens),
          step(sizes.channels) {
        at = (int64_t)place.first - sizes.before - (W - sizes.taps);
#pragma unroll
        for (int k = 0; k + 1 < W; k++) next(k);
    }
    __device__ __forceinline__ void next(int slot) {
        if (at >= 0 && at < tokens) {
            load_vector<V>(x + at * step, z[slot]);
        } else {
#pragma unroll
            for (int i = 0; i < V; i++) z[slot][i] = 0.0f;
        }
        at++;
    }
};

template <typename T, int V, int W>
__device__ void short_conv(const T *__restrict__ x, const float *__restrict__ weights, T *__restrict__ y, const Sizes &sizes,
                           bool adjoint) {
    const Place<V> place(sizes);
    if (!place.live) return;
    T *to = y + (size_t)place.b * sizes.out * sizes.channels + place.channel;
    float w[W][V];
    const int missing = W - sizes.taps;
#pragma unroll
    for (int k = 0; k < W; k++) {
        const int tap = adjoint ? W - 1 - k : k - missing;
#pragma unroll
        for (int i = 0; i < V; i++)
            w[k][i] = k < missing ? 0.0f : weights[(size_t)(place.channel + i) * sizes.taps + tap];
    }
    Window<T, V, W> window(x, place, sizes);
    for (uint32_t base = place.first; base < place.last; base += W) {
#pragma unroll
        for (int u = 0; u < W; u++) {
            const uint32_t t = base + u;
            if (t >= place.last) break;
            window.next((u + W - 1) % W);
            float sum[V] = {};
#pragma unroll
            for (int k = 0; k < W; k++) {
#pragma unroll
                for (int i = 0; i < V; i++) sum[i] += w[k][i] * window.z[(u + k) % W][i];
            }
            store_vector<V>(to + (size_t)t * sizes.channels, sum);
        }
    }
}

template <typename T, int V, int W>
__device__ void short_conv_weights(const T *__restrict__ x, const T *__restrict__ dy, float *__restrict__ partials,
                                   const Sizes &sizes) {
    const Place<V> place(sizes);
    if (!place.live) return;
    const T *from = dy + (size_t)place.b * sizes.out * sizes.channels + place.channel;
    float sum[W][V] = {};
    Window<T, V, W> window(x, place, sizes);
    for (uint32_t base = place.first; base < place.last; base += W) {
#pragma unroll
        for (int u = 0; u < W; u++) {
            const uint32_t t = base + u;
            if (t >= place.last) break;
            window.next((u + W - 1) % W);
            float d[V];
            load_vector<V>(from + (size_t)t * sizes.channels, d);
#pragma unroll
            for (int k = 0; k < W; k++) {
#pragma unroll
                for (int i = 0; i < V; i++) sum[k][i] += d[i] * window.z[(u + k) % W][i];
            }
        }
    }
    const int missing = W - sizes.taps;
    float *row = partials + ((size_t)place.run * sizes.channels + place.channel) * sizes.taps;
#pragma unroll
    for (int k = 0; k < W; k++) {
        if (k < missing) continue;
#pragma unroll
        for (int i = 0; i < V; i++) row[(size_t)i * sizes.taps + k - missing] = sum[k][i];
    }
}

// Any number of taps.
template <typename T>
__device__ void short_conv_any(const T *__restrict__ x, const float *__restrict__ weights, T *__restrict__ y,
                               const Sizes &sizes, bool adjoint) {
    const Place<1> place(sizes);
    if (!place.live) return;
    const T *from = x + (size_t)place.b * sizes.tokens * sizes.channels + place.channel;
    T *to = y + (size_t)place.b * sizes.out * sizes.channels + place.channel;
    const float *own = weights + (size_t)place.channel * sizes.taps;
    for (uint32_t t = place.first; t < place.last; t++) {
        float sum = 0.0f;
        for (uint32_t k = 0; k < sizes.taps; k++) {
            const int64_t at = (int64_t)t + k - sizes.before;
            if (at < 0 || at >= sizes.tokens) continue;
            float z[1];
            load_vector<1>(from + at * sizes.channels, z);
            sum += own[adjoint ? sizes.taps - 1 - k : k] * z[0];
        }
        const float sums[1] = {sum};
        store_vector<1>(to + (size_t)t * sizes.channels, sums);
    }
}

template <typename T>
__device__ void short_conv_weights_any(const T *__restrict__ x, const T *__restrict__ dy, float *__restrict__ partials,
                                       const Sizes &sizes) {
    const Place<1> place(sizes);
    if (!place.live) return;
    const T *from = x + (size_t)place.b * sizes.tokens * sizes.channels + place.channel;
    const T *above = dy + (size_t)place.b * sizes.out * sizes.channels + place.channel;
    float *row = partials + ((size_t)place.run * sizes.channels + place.channel) * sizes.taps;
    for (uint32_t k = 0; k < sizes.taps; k++) {
        float sum = 0.0f;
        for (uint32_t t = place.first; t < place.last; t++) {
            const int64_t at = (int64_t)t + k - sizes.before;
            if (at < 0 || at >= sizes.tokens) continue;
            float z[1], d[1];
            load_vector<1>(from + at * sizes.channels, z);
            load_vector<1>(above + (size_t)t * sizes.channels, d);
            sum += z[0] * d[0];
        }
        row[k] = sum;
    }
}

#define CONV(SUFFIX, T, V, W)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        short_conv_w##W##_##SUFFIX##_v##V(const T *x, const float *weights, T *y, const Sizes sizes, uint32_t adjoint) { \
        short_conv<T, V, W>(x, weights, y, sizes, adjoint);                                                            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        short_conv_weights_w##W##_##SUFFIX##_v##V(const T *x, const T *dy, float *partials, const Sizes sizes) {       \
        short_conv_weights<T, V, W>(x, dy, partials, sizes);                                                           \
    }
#define CONVS(W)                                                                                                       \
    CONV(f32, float, 1, W)                                                                                             \
    CONV(f32, float, 4, W)                                                                                             \
    CONV(bf16, __nv_bfloat16, 1, W)                                                                                    \
    CONV(bf16, __nv_bfloat16, 8, W)
CONVS(4)
CONVS(8)

#define CONV_ANY(SUFFIX, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        short_conv_any_##SUFFIX##_v1(const T *x, const float *weights, T *y, const Sizes sizes, uint32_t adjoint) {    \
        short_conv_any<T>(x, weights, y, sizes, adjoint);                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        short_conv_weights_any_##SUFFIX##_v1(const T *x, const T *dy, float *partials, const Sizes sizes) {            \
        short_conv_weights_any<T>(x, dy, partials, sizes);                                                             \
    }
CONV_ANY(f32, float)
CONV_ANY(bf16, __nv_bfloat16)
