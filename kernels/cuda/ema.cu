// Moving average along an axis with a decay a head; formulas in src/ema/mod.rs.
//
// One thread owns a line: all n tokens of one channel. Neighbouring threads own neighbouring channels, so that every
// access of a warp is one row. The two-sided form walks the line there and back; what the first walk found waits in
// the result. A line lies at `outer * n * stride + inner`, tokens `stride` apart, stride = rest * heads * channels.
// forward        one-sided 2 T, two-sided 5 T a element.
// backward       one-sided 5 T, two-sided 7 T; and two floats a line: its shares of drate and dweight.
// Limit: memory bandwidth (lines are many and short).
//
// Long lines fall into segments of SEGMENT tokens, each of which a thread keeps in registers; BACK_SEGMENT in the backward pass:
// ema_sums       sums of each segment alone, forwards up to its last token and backwards up to its first. T a element.
// ema_carries    out of these what enters each segment, from before it and from behind it. One thread a line.
// segments       2 T a element; backward 3 T, and two floats a segment.
#include "common.cuh"

constexpr int SEGMENT = 32, BACK_SEGMENT = 16;

template <typename T, bool TWO>
__device__ void ema(const T *x, const float *rate, const float *weight, T *u, uint32_t n, uint32_t stride,
                    uint32_t heads, uint32_t channels, size_t lines) {
    const size_t line = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (line >= lines) return;
    const uint32_t head = line / channels % heads;
    const size_t first = line / stride * n * stride + line % stride;
    const float lambda = expf(-rate[head]), w = weight[head];
    float sum = 0.0f;
    for (uint32_t t = 0; t < n; t++) {
        const size_t at = first + (size_t)t * stride;
        float a[1];
        load<1>(x + at, a);
        sum = lambda * sum + a[0];
        a[0] = w * sum;
        store<1>(u + at, a);
    }
    if (!TWO) return;
    // The token itself is in the first walk: here only what comes after it.
    sum = 0.0f;
    for (uint32_t t = n; t-- > 0;) {
        const size_t at = first + (size_t)t * stride;
        float a[1], b[1];
        load<1>(u + at, b);
        load<1>(x + at, a);
        sum *= lambda;
        b[0] += w * sum;
        sum += a[0];
        store<1>(u + at, b);
    }
}

// dx; shares [lines] of drate and of dweight.
template <typename T, bool TWO>
__device__ void ema_backward(const T *x, const T *du, const float *rate, const float *weight, T *dx, float *drate,
                             float *dweight, uint32_t n, uint32_t stride, uint32_t heads, uint32_t channels,
                             size_t lines) {
    const size_t line = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (line >= lines) return;
    const uint32_t head = line / channels % heads;
    const size_t first = line / stride * n * stride + line % stride;
    const float lambda = expf(-rate[head]), w = weight[head];
    // u of x, its derivative by lambda, and the same scan of du.
    float sum = 0.0f, slope = 0.0f, adjoint = 0.0f, dlambda = 0.0f, dw = 0.0f;
    for (uint32_t t = 0; t < n; t++) {
        const size_t at = first + (size_t)t * stride;
        float a[1], d[1];
        load<1>(x + at, a);
        load<1>(du + at, d);
        slope = sum + lambda * slope;
        sum = lambda * sum + a[0];
        dlambda += d[0] * slope;
        dw += d[0] * sum;
        if (TWO) {
            adjoint = lambda * adjoint + d[0];
            a[0] = w * adjoint;
            store<1>(dx + at, a);
        }
    }
    sum = 0.0f, slope = 0.0f, adjoint = 0.0f;
    for (uint32_t t = n; t-- > 0;) {
        const size_t at = first + (size_t)t * stride;
        float a[1], d[1], b[1] = {0.0f};
        load<1>(du + at, d);
        if (TWO) {
            load<1>(x + at, a);
            load<1>(dx + at, b);
            slope = sum + lambda * slope;
            sum *= lambda;
            dlambda += d[0] * slope;
            dw += d[0] * sum;
            sum += a[0];
            b[0] += w * lambda * adjoint;
            adjoint = lambda * adjoint + d[0];
        } else {
            adjoint = lambda * adjoint + d[0];
            b[0] = w * adjoint;
        }
        store<1>(dx + at, b);
    }
    drate[line] = -lambda * w * dlambda;
    dweight[line] = dw;
}

// The segment of a thread: neighbouring threads have neighbouring lines.
template <typename T, int L> struct Part {
    size_t at, first, stride;
    uint32_t head, start, n;
    bool live;

    __device__ Part(uint32_t n, uint32_t stride, uint32_t heads, uint32_t channels, size_t lines) : stride(stride), n(n) {
        at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
        const size_t line = at % lines;
        start = at / lines * L;
        live = start < n;
        head = line / channels % heads;
        first = line / stride * n * stride + line % stride + (size_t)start * stride;
    }
    // Zeros behind the end of the line.
    __device__ __forceinline__ void read(const T *from, float (&v)[L]) const {
#pragma unroll
        for (int i = 0; i < L; i++) {
            float a[1] = {0.0f};
            if (start + i < n) load<1>(from + first + i * stride, a);
            v[i] = a[0];
        }
    }
    __device__ __forceinline__ void write(T *to, int i, float v) const {
        const float a[1] = {v};
        if (start + i < n) store<1>(to + first + i * stride, a);
    }
};

// forwards, backwards [segments, lines], either null where it is not wanted.
template <typename T, int L>
__device__ void ema_sums(const T *__restrict__ x, const float *__restrict__ rate, float *__restrict__ forwards,
                         float *__restrict__ backwards, uint32_t n, uint32_t stride, uint32_t heads, uint32_t channels,
                         size_t lines) {
    const Part<T, L> part(n, stride, heads, channels, lines);
    if (!part.live) return;
    const float lambda = expf(-rate[part.head]);
    float v[L], sum = 0.0f;
    part.read(x, v);
    if (forwards) {
#pragma unroll
        for (int i = 0; i < L; i++) sum = lambda * sum + v[i];
        forwards[part.at] = sum;
    }
    if (backwards) {
        sum = 0.0f;
#pragma unroll
        for (int i = L - 1; i >= 0; i--) sum = lambda * sum + v[i];
        backwards[part.at] = sum;
    }
}

// Sums of segments become those of all tokens before them, or behind them, in place.
extern "C" __global__ void __launch_bounds__(256)
    ema_carries(float *forwards, float *backwards, const float *rate, uint32_t segments, uint32_t length, uint32_t heads,
                uint32_t channels, size_t lines) {
    const size_t line = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (line >= lines) return;
    const float decay = expf(-rate[line / channels % heads] * length);
    constexpr int AHEAD = 8;
    for (int back = 0; back < 2; back++) {
        float *own = back ? backwards : forwards;
        if (!own) continue;
        float carry = 0.0f;
        for (uint32_t from = 0; from < segments; from += AHEAD) {
            float v[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const uint32_t s = from + i;
                if (s < segments) v[i] = own[(size_t)(back ? segments - 1 - s : s) * lines + line];
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const uint32_t s = from + i;
                if (s >= segments) break;
                own[(size_t)(back ? segments - 1 - s : s) * lines + line] = carry;
                carry = decay * carry + v[i];
            }
        }
    }
}

template <typename T, bool TWO>
__device__ void ema_segments(const T *__restrict__ x, const float *__restrict__ rate, const float *__restrict__ weight,
                             const float *__restrict__ before, const float *__restrict__ behind, T *__restrict__ u,
                             uint32_t n, uint32_t stride, uint32_t heads, uint32_t channels, size_t lines) {
    constexpr int L = SEGMENT;
    const Part<T, L> part(n, stride, heads, channels, lines);
    if (!part.live) return;
    const float lambda = expf(-rate[part.head]), w = weight[part.head];
    float v[L], sums[L], sum = before[part.at];
    part.read(x, v);
#pragma unroll
    for (int i = 0; i < L; i++) sums[i] = sum = lambda * sum + v[i];
    sum = TWO ? behind[part.at] : 0.0f;
#pragma unroll
    for (int i = L - 1; i >= 0; i--) {
        part.write(u, i, w * (TWO ? sums[i] + lambda * sum : sums[i]));
        if (TWO) sum = lambda * sum + v[i];
    }
}

// With F and H the sums of x forwards and backwards, b and a those of du, each up to and with its token:
// dx_t = w (a_t + lambda b_{t-1}), dw = sum du_t (F_t + lambda H_{t+1}), dlambda = w sum (a_t F_{t-1} + b_t H_{t+1}).
template <typename T, bool TWO>
__device__ void ema_segments_backward(const T *__restrict__ x, const T *__restrict__ du, const float *__restrict__ rate,
                                      const float *__restrict__ weight, const float *__restrict__ before,
                                      const float *__restrict__ behind, const float *__restrict__ du_before,
                                      const float *__restrict__ du_behind, T *__restrict__ dx, float *__restrict__ drate,
                                      float *__restrict__ dweight, uint32_t n, uint32_t stride, uint32_t heads,
                                      uint32_t channels, size_t lines) {
    constexpr int L = BACK_SEGMENT;
    const Part<T, L> part(n, stride, heads, channels, lines);
    if (!part.live) return;
    const float lambda = expf(-rate[part.head]), w = weight[part.head];
    float v[L], d[L], f[L], b[L], sum = before[part.at], adjoint = TWO ? du_before[part.at] : 0.0f;
    part.read(x, v);
    part.read(du, d);
    // What enters each token: F_{t-1} and b_{t-1}.
#pragma unroll
    for (int i = 0; i < L; i++) {
        f[i] = sum, b[i] = adjoint;
        sum = lambda * sum + v[i];
        if (TWO) adjoint = lambda * adjoint + d[i];
    }
    sum = TWO ? behind[part.at] : 0.0f;
    adjoint = du_behind[part.at];
    float dlambda = 0.0f, dw = 0.0f;
#pragma unroll
    for (int i = L - 1; i >= 0; i--) {
        adjoint = lambda * adjoint + d[i];
        part.write(dx, i, w * (TWO ? adjoint + lambda * b[i] : adjoint));
        dw += d[i] * (lambda * (f[i] + sum) + v[i]);
        dlambda += adjoint * f[i];
        if (TWO) {
            dlambda += (lambda * b[i] + d[i]) * sum;
            sum = lambda * sum + v[i];
        }
    }
    drate[part.at] = -lambda * w * dlambda;
    dweight[part.at] = dw;
}

#define EMA(SUFFIX, T, KIND, TWO)                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        ema_##KIND##_##SUFFIX(const T *x, const float *rate, const float *weight, T *u, uint32_t n, uint32_t stride,   \
                              uint32_t heads, uint32_t channels, size_t lines) {                                       \
        ema<T, TWO>(x, rate, weight, u, n, stride, heads, channels, lines);                                            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) ema_##KIND##_backward_##SUFFIX(                                  \
        const T *x, const T *du, const float *rate, const float *weight, T *dx, float *drate, float *dweight,          \
        uint32_t n, uint32_t stride, uint32_t heads, uint32_t channels, size_t lines) {                                \
        ema_backward<T, TWO>(x, du, rate, weight, dx, drate, dweight, n, stride, heads, channels, lines);              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) ema_##KIND##_segments_##SUFFIX(                                  \
        const T *x, const float *rate, const float *weight, const float *before, const float *behind, T *u,           \
        uint32_t n, uint32_t stride, uint32_t heads, uint32_t channels, size_t lines) {                                \
        ema_segments<T, TWO>(x, rate, weight, before, behind, u, n, stride, heads, channels, lines);                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) ema_##KIND##_segments_backward_##SUFFIX(                         \
        const T *x, const T *du, const float *rate, const float *weight, const float *before, const float *behind,     \
        const float *du_before, const float *du_behind, T *dx, float *drate, float *dweight, uint32_t n,               \
        uint32_t stride, uint32_t heads, uint32_t channels, size_t lines) {                                            \
        ema_segments_backward<T, TWO>(x, du, rate, weight, before, behind, du_before, du_behind, dx, drate, dweight,   \
                                      n, stride, heads, channels, lines);                                              \
    }
EMA(f32, float, one_sided, false)
EMA(f32, float, two_sided, true)
EMA(bf16, __nv_bfloat16, one_sided, false)
EMA(bf16, __nv_bfloat16, two_sided, true)

#define SUMS(SUFFIX, T, NAME, L)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        NAME##_##SUFFIX(const T *x, const float *rate, float *forwards, float *backwards, uint32_t n, uint32_t stride, \
                        uint32_t heads, uint32_t channels, size_t lines) {                                             \
        ema_sums<T, L>(x, rate, forwards, backwards, n, stride, heads, channels, lines);                               \
    }
SUMS(f32, float, ema_sums, SEGMENT)
SUMS(bf16, __nv_bfloat16, ema_sums, SEGMENT)
SUMS(f32, float, ema_back_sums, BACK_SEGMENT)
SUMS(bf16, __nv_bfloat16, ema_back_sums, BACK_SEGMENT)
