// Moving average along an axis with a decay a head; formulas in src/ema/mod.rs.
//
// One thread owns a line: all n tokens of one channel. Neighbouring threads own neighbouring channels, so that every
// access of a warp is one row. The two-sided form walks the line there and back; what the first walk found waits in
// the result. A line lies at `outer * n * stride + inner`, tokens `stride` apart, stride = rest * heads * channels.
// forward        one-sided 2 T, two-sided 5 T a element.
// backward       one-sided 5 T, two-sided 7 T; and two floats a line: its shares of drate and dweight.
// Limit: memory bandwidth (lines are many and short).
#include "common.cuh"

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
    }
EMA(f32, float, one_sided, false)
EMA(f32, float, two_sided, true)
EMA(bf16, __nv_bfloat16, one_sided, false)
EMA(bf16, __nv_bfloat16, two_sided, true)
