// The scans over tokens that the causal additive recurrence needs besides its sweeps, channel by channel:
//
//   z_t = log(exp(z_{t-1}) + exp(g_t))                      forward, the gates
//   y_t = x_t + exp(z_t - z_{t+1}) y_{t+1}                  backward, x = q dq for the adjoint of the logits of the
//                                                           recurrence, x = dz for that of the gates
//
// Sequences are cut into slices, one for each warp. One launch finds what they add, and a second one, which starts from what
// the slices before (or after) add, writes every token. A lane takes two channels.

#include "decay.cuh"
#include <cuda_bf16.h>

namespace fulgur {

constexpr int THREADS = 256, WARPS = THREADS / 32;
__device__ constexpr float LN2 = 0.6931471805599453f;
// Stands for negative infinity, which subtractions would turn into NaN.
__device__ constexpr float NOTHING = -1e30f;

__device__ __forceinline__ float exponential(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * LOG2E));
    return y;
}

// exp(max) sum.
struct Total {
    float max, sum;
    __device__ __forceinline__ void add(float other_max, float other_sum) {
        const float both = fmaxf(max, other_max);
        sum = sum * exponential(max - both) + other_sum * exponential(other_max - both);
        max = both;
    }
    __device__ __forceinline__ float log() const { return sum > 0.0f ? max + __log2f(sum) * LN2 : NOTHING; }
};

// Tokens of a sequence, and of the slice that a warp takes.
struct Stretch {
    int64_t first; // of the sequence, over all batches
    int sequence, batch, start, count, length, slice, begin, end;
    __device__ __forceinline__ Stretch(const int *borders, int tokens, int slices) {
        sequence = blockIdx.z;
        batch = borders ? 0 : sequence;
        start = borders ? borders[sequence] : 0;
        count = borders ? borders[sequence + 1] - start : tokens;
        first = (int64_t)batch * tokens + start;
        length = (count + slices - 1) / slices;
        slice = blockIdx.y * WARPS + (threadIdx.x >> 5);
        begin = min(count, slice * length), end = min(count, begin + length);
    }
};

__device__ __forceinline__ float2 pair_at(const float *at) { return *reinterpret_cast<const float2 *>(at); }
__device__ __forceinline__ float2 pair_at(const __nv_bfloat16 *at) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(at));
}

template <typename T, bool WRITE>
__device__ __forceinline__ void gates(Rows<T> logits, const float *before, float *z, float4 *partial, const int *borders,
                                      int tokens, int slices, int heads, int d) {
    const int couple = blockIdx.x * 32 + (threadIdx.x & 31), couples = heads * d / 2, h = couple * 2 / d, c = couple * 2 % d;
    const Stretch stretch(borders, tokens, slices);
    if (couple >= couples || stretch.slice >= slices) return;
    const T *from = logits.data + stretch.batch * logits.batch + (int64_t)stretch.start * logits.token + h * logits.head + c;
    const int64_t row = (int64_t)stretch.sequence * slices;
    Total x = {NOTHING, 0.0f}, y = x;
    if (WRITE) {
        if (before) {
            const float2 start = pair_at(before + ((int64_t)stretch.sequence * couples + couple) * 2);
            x.add(start.x, 1.0f), y.add(start.y, 1.0f);
        }
        for (int i = 0; i < stretch.slice; i++) {
            const float4 part = partial[(row + i) * couples + couple];
            x.add(part.x, part.y), y.add(part.z, part.w);
        }
    }
    float2 *to = reinterpret_cast<float2 *>(z) + stretch.first * couples + couple;
#pragma unroll 8
    for (int token = stretch.begin; token < stretch.end; token++) {
        const float2 g = pair_at(from + token * logits.token);
        x.add(g.x, 1.0f), y.add(g.y, 1.0f);
        if (WRITE) to[(int64_t)token * couples] = make_float2(x.log(), y.log());
    }
    if (!WRITE) partial[(row + stretch.slice) * couples + couple] = make_float4(x.max, x.sum, y.max, y.sum);
}

// Terms of the sums of the backward pass.
struct Products {
    Rows<__nv_bfloat16> q, dq;
    __device__ __forceinline__ auto of(const Stretch &stretch, int h, int c, int, int) const {
        const __nv_bfloat16 *x = q.data + stretch.batch * q.batch + (int64_t)stretch.start * q.token + h * q.head + c;
        const __nv_bfloat16 *y = dq.data + stretch.batch * dq.batch + (int64_t)stretch.start * dq.token + h * dq.head + c;
        const int64_t x_token = q.token, y_token = dq.token;
        return [=](int token) {
            const float2 a = pair_at(x + token * x_token), b = pair_at(y + token * y_token);
            return make_float2(a.x * b.x, a.y * b.y);
        };
    }
};
struct Dense {
    const float *terms;
    __device__ __forceinline__ auto of(const Stretch &stretch, int, int, int couple, int couples) const {
        const float2 *from = reinterpret_cast<const float2 *>(terms) + stretch.first * couples + couple;
        return [=](int token) { return from[(int64_t)token * couples]; };
    }
};

// `last` is what comes after each sequence, [sequences, H, D], or null.
template <typename Terms, bool WRITE>
__device__ __forceinline__ void pull(Terms terms, const float *z, const float *last, float *y, float2 *partial,
                                     const int *borders, int tokens, int slices, int heads, int d) {
    const int couple = blockIdx.x * 32 + (threadIdx.x & 31), couples = heads * d / 2, h = couple * 2 / d, c = couple * 2 % d;
    const Stretch stretch(borders, tokens, slices);
    // A slice behind the end of its sequence has no tokens, and nobody asks for its sum.
    if (couple >= couples || stretch.begin >= stretch.end) return;
    const auto term_at = terms.of(stretch, h, c, couple, couples);
    const float2 *gate = reinterpret_cast<const float2 *>(z) + stretch.first * couples + couple;
    auto gate_at = [&](int token) { return gate[(int64_t)token * couples]; };
    const int64_t row = (int64_t)stretch.sequence * slices;
    // What is known of the tokens after a point: y there, and the gate that it belongs to.
    float2 sum = make_float2(0.0f, 0.0f), at = gate_at(stretch.end - 1);
    auto step = [&](float2 term, float2 here) {
        sum = make_float2(term.x + sum.x * exponential(here.x - at.x), term.y + sum.y * exponential(here.y - at.y));
        at = here;
    };
    if (WRITE) {
        if (last) sum = pair_at(last + ((int64_t)stretch.sequence * couples + couple) * 2);
        at = gate_at(stretch.count - 1);
        for (int i = (stretch.count - 1) / stretch.length; i > stretch.slice; i--)
            step(partial[(row + i) * couples + couple], gate_at(i * stretch.length));
    }
    float2 *to = reinterpret_cast<float2 *>(y) + stretch.first * couples + couple;
#pragma unroll 8
    for (int token = stretch.end - 1; token >= stretch.begin; token--) {
        step(term_at(token), gate_at(token));
        if (WRITE) to[(int64_t)token * couples] = sum;
    }
    if (!WRITE) partial[(row + stretch.slice) * couples + couple] = sum;
}

} // namespace fulgur

using namespace fulgur;

#define GATES(T, NAME)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        additive_gates_##NAME##_partial(Rows<T> logits, const float *before, float *z, float4 *partial,                \
                                        const int *borders, int tokens, int slices, int heads, int d) {                \
        gates<T, false>(logits, before, z, partial, borders, tokens, slices, heads, d);                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        additive_gates_##NAME(Rows<T> logits, const float *before, float *z, float4 *partial, const int *borders,      \
                              int tokens, int slices, int heads, int d) {                                              \
        gates<T, true>(logits, before, z, partial, borders, tokens, slices, heads, d);                                 \
    }
GATES(float, f32)
GATES(__nv_bfloat16, bf16)

#define PULL(TERMS, NAME)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        additive_pull_##NAME##_partial(TERMS terms, const float *z, const float *last, float *y, float2 *partial,      \
                                       const int *borders, int tokens, int slices, int heads, int d) {                 \
        pull<TERMS, false>(terms, z, last, y, partial, borders, tokens, slices, heads, d);                             \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        additive_pull_##NAME(TERMS terms, const float *z, const float *last, float *y, float2 *partial,                \
                             const int *borders, int tokens, int slices, int heads, int d) {                           \
        pull<TERMS, true>(terms, z, last, y, partial, borders, tokens, slices, heads, d);                              \
    }
PULL(Products, products)
PULL(Dense, dense)
