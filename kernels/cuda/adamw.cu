// AdamW over all parameters of a group in one launch, and the norm of all gradients in two (formulas in
// src/adamw/mod.rs). Tensors are rows of a table in device memory; a block finds its own by bisection and takes `run`
// elements of it.
// Bytes an element in f32: step 28 and 2 for a bf16 copy, norm 4; bf16 gradients save 2 each, bf16 moments 8 in the
// step. Limit: memory bandwidth.
#include "common.cuh"

// Types of a tensor's operands.
constexpr uint32_t BF16_GRADIENT = 1, BF16_MOMENTS = 2, ALIGNED = 4;

// A parameter with what a step reads and writes of it. Its blocks are those from `first_block` on.
struct Slot {
    float *parameter;
    void *moments; // m, and v behind it
    const void *gradient;
    __nv_bfloat16 *rounded; // may be null
    uint64_t count;
    uint32_t first_block, kind;
};

// A gradient.
struct Addend {
    const void *data;
    uint64_t count;
    uint32_t first_block, kind;
};

// The row of the table whose blocks hold this one.
template <typename Row> __device__ __forceinline__ const Row &own_row(const Row *rows, uint32_t count) {
    uint32_t low = 0, high = count;
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        if (rows[middle].first_block <= blockIdx.x) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return rows[low];
}

// Constants of a step: keep = 1 - lr decay, rate = lr / (1 - b1^t), second = 1 / (1 - b2^t).
struct Step {
    float beta1, beta2, keep, rate, second, eps;
};

// What gives a step its number where the device has counted: `counts` is null where the host has, else begins with t.
struct Correction {
    const uint32_t *counts;
    double lr, beta1, beta2;
};

// Rounds to the type of the moments, so that a step goes on from what the next one reads.
__device__ __forceinline__ float rounded_to(const float *, float x) { return x; }
__device__ __forceinline__ float rounded_to(const __nv_bfloat16 *, float x) {
    return __bfloat162float(__float2bfloat16(x));
}

template <typename G, typename M, int V> __device__ void update(const Slot &slot, Step step, float scale, uint32_t run) {
    const uint64_t first = (uint64_t)(blockIdx.x - slot.first_block) * run, last = min(first + run, slot.count);
    const G *gradient = static_cast<const G *>(slot.gradient);
    M *first_moment = static_cast<M *>(slot.moments), *second_moment = first_moment + slot.count;
    // Addresses out of a table could be of any memory.
    __builtin_assume(__isGlobal(slot.parameter) && __isGlobal(first_moment) && __isGlobal(gradient));
    for (uint64_t i = first + threadIdx.x * V; i < last; i += 256 * V) {
        float p[V], m[V], v[V], g[V];
        load<V>(slot.parameter + i, p);
        load<V>(first_moment + i, m);
        load<V>(second_moment + i, v);
        load<V>(gradient + i, g);
#pragma unroll
        for (int k = 0; k < V; k++) {
            // Contractions are written out, so that the bits depend neither on the alignment nor on the compiler.
            g[k] *= scale;
            m[k] = rounded_to(first_moment, __fmaf_rn(m[k], step.beta1, __fmul_rn(1.0f - step.beta1, g[k])));
            const float share = __fmul_rn(1.0f - step.beta2, g[k]);
            v[k] = rounded_to(second_moment, __fmaf_rn(g[k], share, __fmul_rn(v[k], step.beta2)));
            const float size = __fadd_rn(sqrtf(__fmul_rn(v[k], step.second)), step.eps);
            p[k] = __fmaf_rn(p[k], step.keep, -(__fmul_rn(step.rate, m[k]) / size));
        }
        store<V>(first_moment + i, m);
        store<V>(second_moment + i, v);
        store<V>(slot.parameter + i, p);
        if (slot.rounded) {
            __builtin_assume(__isGlobal(slot.rounded));
            store<V>(slot.rounded + i, p);
        }
    }
}

template <typename G, typename M>
__device__ __forceinline__ void update(const Slot &slot, Step step, float scale, uint32_t run) {
    if (slot.kind & ALIGNED) {
        update<G, M, 4>(slot, step, scale, run);
    } else {
        update<G, M, 1>(slot, step, scale, run);
    }
}

// `scale` on the device wins over `host_scale`; it may be null. Nothing happens where it is not finite.
extern "C" __global__ void __launch_bounds__(256)
    adamw_step(const Slot *slots, uint32_t count, const float *scale, float host_scale, Step step, Correction correction,
               uint32_t run) {
    const float factor = scale ? *scale : host_scale;
    if (!isfinite(factor)) return;
    if (correction.counts) {
        __shared__ float corrected[2];
        if (threadIdx.x < 2) {
            const double beta = threadIdx.x ? correction.beta2 : correction.beta1;
            const double part = 1.0 - pow(beta, (double)correction.counts[0]);
            corrected[threadIdx.x] = (float)((threadIdx.x ? 1.0 : correction.lr) / part);
        }
        __syncthreads();
        step.rate = corrected[0];
        step.second = corrected[1];
    }
    const Slot slot = own_row(slots, count);
    if (slot.kind & BF16_GRADIENT) {
        if (slot.kind & BF16_MOMENTS) {
            update<__nv_bfloat16, __nv_bfloat16>(slot, step, factor, run);
        } else {
            update<__nv_bfloat16, float>(slot, step, factor, run);
        }
    } else if (slot.kind & BF16_MOMENTS) {
        update<float, __nv_bfloat16>(slot, step, factor, run);
    } else {
        update<float, float>(slot, step, factor, run);
    }
}

// Sum over the 256 threads of a block, valid in thread 0; the tree is fixed.
static __device__ double block_sum(double x) {
    __shared__ double shared[256];
    shared[threadIdx.x] = x;
    __syncthreads();
    for (int half = 128; half > 0; half >>= 1) {
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    return shared[0];
}

// A thread adds every 256th square of its block's run: neighbours lie in neighbouring threads, whatever the alignment.
template <typename T> __device__ float squares_of(const Addend &addend, uint32_t run) {
    const T *x = static_cast<const T *>(addend.data);
    __builtin_assume(__isGlobal(x));
    const uint64_t first = (uint64_t)(blockIdx.x - addend.first_block) * run, last = min(first + run, addend.count);
    float sum = 0.0f;
#pragma unroll 8
    for (uint64_t i = first + threadIdx.x; i < last; i += 256) {
        float v[1];
        load<1>(x + i, v);
        sum += v[0] * v[0];
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(256)
    squares(const Addend *addends, uint32_t count, double *partials, uint32_t run) {
    const Addend addend = own_row(addends, count);
    const float sum = addend.kind & BF16_GRADIENT ? squares_of<__nv_bfloat16>(addend, run) : squares_of<float>(addend, run);
    const double total = block_sum(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

static __device__ double sum_of_partials(const double *partials, size_t count) {
    double sum = 0.0;
    for (size_t i = threadIdx.x; i < count; i += blockDim.x) sum += partials[i];
    return block_sum(sum);
}

// One block.
extern "C" __global__ void __launch_bounds__(256) squares_sum(const double *partials, float *result, size_t count) {
    const double total = sum_of_partials(partials, count);
    if (threadIdx.x == 0) *result = (float)total;
}

// One block: result[0] is the norm, result[1] the scale that limits it to `limit`, 0 for no limit. Where the norm is not
// finite, the scale is not a number. Counts: steps made, skipped, skipped in a row at the end, the longest such row.
extern "C" __global__ void __launch_bounds__(256)
    clip(const double *partials, float *result, const uint32_t *before, uint32_t *after, float limit, size_t count) {
    const double total = sum_of_partials(partials, count);
    if (threadIdx.x != 0) return;
    const float norm = sqrtf((float)total);
    const bool finite = isfinite(norm);
    const float scale = limit > 0.0f ? 1.0f / fmaxf(norm, limit) * limit : 1.0f;
    result[0] = norm;
    result[1] = finite ? scale : __int_as_float(0x7fc00000);
    const uint32_t in_a_row = finite ? 0 : before[2] + 1;
    after[0] = before[0] + finite;
    after[1] = before[1] + !finite;
    after[2] = in_a_row;
    after[3] = max(before[3], in_a_row);
}

// A tensor that follows another one.
struct Follower {
    float *average;
    const float *value;
    uint64_t count;
    uint32_t first_block, kind;
};

template <int V> __device__ __forceinline__ void follow_run(const Follower &row, float share, uint32_t run) {
    const uint64_t first = (uint64_t)(blockIdx.x - row.first_block) * run, last = min(first + run, row.count);
    __builtin_assume(__isGlobal(row.average) && __isGlobal(row.value));
    for (uint64_t i = first + threadIdx.x * V; i < last; i += 256 * V) {
        float average[V], value[V];
        load<V>(row.average + i, average);
        load<V>(row.value + i, value);
#pragma unroll
        for (int k = 0; k < V; k++) average[k] = __fmaf_rn(share, value[k] - average[k], average[k]);
        store<V>(row.average + i, average);
    }
}

// Moving averages after a step; formula in src/average.rs. Nothing happens where `scale` is not finite. 12 bytes an
// element.
extern "C" __global__ void __launch_bounds__(256)
    follow(const Follower *rows, uint32_t count, const float *scale, const uint32_t *counts, double decay, double memory,
           uint32_t run) {
    if (!isfinite(*scale)) return;
    const double before = (double)counts[0] - 1.0;
    const float share = (float)(1.0 - fmin(decay, (1.0 + before) / (memory + before)));
    const Follower row = own_row(rows, count);
    if (row.kind & ALIGNED) {
        follow_run<4>(row, share, run);
    } else {
        follow_run<1>(row, share, run);
    }
}

// The moving average of weights; formula in src/average.rs. 12 bytes an element.
extern "C" __global__ void __launch_bounds__(256)
    move_average(float *average, const float *value, float share, size_t count) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) average[i] += share * (value[i] - average[i]);
}
