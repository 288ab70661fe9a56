// The scans over tokens that the causal additive recurrence needs besides its sweeps, channel by channel:
//
//   z_t = log(exp(z_{t-1}) + exp(g_t))                      forward, the gates
//   y_t = x_t + exp(z_t - z_{t+1}) y_{t+1}                  backward, x = q dq for the adjoint of the logits of the
//                                                           recurrence, x = dz for that of the gates
//
// Sequences are cut into slices, for which one launch finds what they add, and a second one, which starts from what the
// slices before (or after) add, writes every token. A lane takes two channels; warps take stretches of a slice.

#include "decay.cuh"
#include <cuda_bf16.h>

namespace fulgur {

constexpr int THREADS = 256, WARPS = THREADS / 32;
__device__ constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
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

// Tokens of a sequence and of one warp's stretch of a slice of it.
struct Stretch {
    int64_t first; // of the sequence, over all batches
    int sequence, batch, start, count, begin, end;
    __device__ __forceinline__ Stretch(const int *borders, int tokens, int slices, int slice, int warp) {
        sequence = blockIdx.z;
        batch = borders ? 0 : sequence;
        start = borders ? borders[sequence] : 0;
        count = borders ? borders[sequence + 1] - start : tokens;
        first = (int64_t)batch * tokens + start;
        const int length = (count + slices - 1) / slices, share = (length + WARPS - 1) / WARPS;
        const int stop = min(count, (slice + 1) * length);
        begin = min(stop, slice * length + warp * share), end = min(stop, begin + share);
    }
};

__device__ __forceinline__ float2 pair_at(const float *at) { return *reinterpret_cast<const float2 *>(at); }
__device__ __forceinline__ float2 pair_at(const __nv_bfloat16 *at) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(at));
}

template <typename T, bool WRITE>
__device__ __forceinline__ void gates(Rows<T> logits, const float *before, float *z, float4 *partial, const int *borders,
                                      int tokens, int slices, int heads, int d) {
    __shared__ Total found[WARPS][2][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, slice = blockIdx.y;
    const int couple = blockIdx.x * 32 + lane, couples = heads * d / 2, h = couple * 2 / d, c = couple * 2 % d;
    const bool live = couple < couples;
    const Stretch stretch(borders, tokens, slices, slice, warp);
    const T *from = logits.data + stretch.batch * logits.batch + (int64_t)stretch.start * logits.token + h * logits.head + c;
    Total x = {NOTHING, 0.0f}, y = x;
    if (live)
#pragma unroll 8
        for (int token = stretch.begin; token < stretch.end; token++) {
            const float2 g = pair_at(from + token * logits.token);
            x.add(g.x, 1.0f), y.add(g.y, 1.0f);
        }
    found[warp][0][lane] = x, found[warp][1][lane] = y;
    __syncthreads();
    if (!live) return;
    const int64_t row = (int64_t)stretch.sequence * slices;
    if (!WRITE) {
        if (warp > 0) return;
        for (int i = 1; i < WARPS; i++) {
            x.add(found[i][0][lane].max, found[i][0][lane].sum);
            y.add(found[i][1][lane].max, found[i][1][lane].sum);
        }
        partial[(row + slice) * couples + couple] = make_float4(x.max, x.sum, y.max, y.sum);
        return;
    }
    x = y = {NOTHING, 0.0f};
    if (before) {
        const float2 start = pair_at(before + ((int64_t)stretch.sequence * couples + couple) * 2);
        x.add(start.x, 1.0f), y.add(start.y, 1.0f);
    }
    for (int i = 0; i < slice; i++) {
        const float4 part = partial[(row + i) * couples + couple];
        x.add(part.x, part.y), y.add(part.z, part.w);
    }
    for (int i = 0; i < warp; i++) {
        x.add(found[i][0][lane].max, found[i][0][lane].sum);
        y.add(found[i][1][lane].max, found[i][1][lane].sum);
    }
    float2 *to = reinterpret_cast<float2 *>(z) + stretch.first * couples + couple;
#pragma unroll 8
    for (int token = stretch.begin; token < stretch.end; token++) {
        const float2 g = pair_at(from + token * logits.token);
        x.add(g.x, 1.0f), y.add(g.y, 1.0f);
        to[(int64_t)token * couples] = make_float2(x.log(), y.log());
    }
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
    __shared__ float2 found[WARPS][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, slice = blockIdx.y;
    const int couple = blockIdx.x * 32 + lane, couples = heads * d / 2, h = couple * 2 / d, c = couple * 2 % d;
    const bool live = couple < couples;
    const Stretch stretch(borders, tokens, slices, slice, warp);
    const auto term_at = terms.of(stretch, h, c, couple, couples);
    const float2 *gate = reinterpret_cast<const float2 *>(z) + stretch.first * couples + couple;
    auto gate_at = [&](int token) { return gate[(int64_t)token * couples]; };
    // What is known of the tokens after a point: y there, and the gate that it belongs to.
    struct Sum {
        float2 y, at;
        __device__ __forceinline__ void step(float2 term, float2 gate) {
            y = make_float2(term.x + y.x * exponential(gate.x - at.x), term.y + y.y * exponential(gate.y - at.y));
            at = gate;
        }
    };
    auto run = [&](Sum sum, auto write) {
#pragma unroll 8
        for (int token = stretch.end - 1; token >= stretch.begin; token--) {
            sum.step(term_at(token), gate_at(token));
            write(token, sum.y);
        }
        return sum;
    };
    const float2 zero = make_float2(0.0f, 0.0f);
    if (live && stretch.count > 0) {
        const Sum sum = run({zero, gate_at(max(stretch.end - 1, 0))}, [](int, float2) {});
        found[warp][lane] = sum.y;
    }
    __syncthreads();
    if (!live || stretch.count == 0) return;
    const int64_t row = (int64_t)stretch.sequence * slices;
    const int length = (stretch.count + slices - 1) / slices, share = (length + WARPS - 1) / WARPS;
    // Sums of the warps of this slice after `warp`, onto what comes after the slice.
    auto later_warps = [&](Sum sum) {
        for (int i = WARPS - 1; i > warp; i--) {
            const int begin = slice * length + i * share;
            if (begin < min(stretch.count, (slice + 1) * length)) sum.step(found[i][lane], gate_at(begin));
        }
        return sum;
    };
    if (!WRITE) {
        if (warp > 0 || slice * length >= stretch.count) return;
        Sum sum = later_warps({zero, gate_at(stretch.count - 1)});
        sum.step(found[0][lane], gate_at(stretch.begin));
        partial[(row + slice) * couples + couple] = sum.y;
        return;
    }
    Sum sum = {last ? pair_at(last + ((int64_t)stretch.sequence * couples + couple) * 2) : zero, gate_at(stretch.count - 1)};
    for (int i = slices - 1; i > slice; i--)
        if (i * length < stretch.count) sum.step(partial[(row + i) * couples + couple], gate_at(i * length));
    float2 *to = reinterpret_cast<float2 *>(y) + stretch.first * couples + couple;
    run(later_warps(sum), [&](int token, float2 y) { to[(int64_t)token * couples] = y; });
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
