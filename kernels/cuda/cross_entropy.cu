// Cross-entropy of rows of logits with its gradient in place; formulas in src/cross_entropy/mod.rs.
//
// One block owns a row: it reads the row once for its largest element and the sum of exponentials, and once more for
// the gradient, which replaces the logits. Rows are `stride` elements apart, so that each starts at an address that
// 16 divides and is read 16 bytes at a time, whatever its width; what lies behind a row is never touched.
// Bytes an element (T = 2 for bf16, 4 for f32): loss T, loss and gradient 3 T, of which T come from the second-level
// cache where the rows in flight fit into it. Limit: memory bandwidth.
// The sum over rows is one block, 8 bytes a row; scaling a gradient is 2 T an element. No atomics on floats.
#include "common.cuh"
#include <cfloat>

constexpr int ROW_THREADS = 512;
constexpr float LOG2E = 1.4426950408889634f;

// 16 bytes of T.
template <typename T> struct Line;

template <> struct Line<float> {
    static constexpr int N = 4;
    static __device__ __forceinline__ void load(const float *p, float (&v)[4]) { Pack<float, 4>::load(p, v); }
    static __device__ __forceinline__ void store(float *p, const float (&v)[4]) { Pack<float, 4>::store(p, v); }
};

template <> struct Line<__nv_bfloat16> {
    static constexpr int N = 8;
    static __device__ __forceinline__ void load(const __nv_bfloat16 *p, float (&v)[8]) {
        const uint4 a = *reinterpret_cast<const uint4 *>(p);
        const uint32_t words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[2 * i] = __uint_as_float(words[i] << 16);
            v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
    static __device__ __forceinline__ void store(__nv_bfloat16 *p, const float (&v)[8]) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
            words[i] = *reinterpret_cast<const uint32_t *>(&pair);
        }
        *reinterpret_cast<uint4 *>(p) = make_uint4(words[0], words[1], words[2], words[3]);
    }
};

template <typename T> __device__ __forceinline__ uint32_t whole_lines(uint32_t width) {
    return width / Line<T>::N * Line<T>::N;
}

// Largest element, sum of exp(element - largest), sum of elements.
struct Running {
    float top, sum, total;
};

__device__ __forceinline__ float exponential(float x) { return exp2f(x * LOG2E); }

template <int N> __device__ __forceinline__ void add(Running &r, const float (&v)[N]) {
    float top = r.top;
#pragma unroll
    for (int i = 0; i < N; i++) top = fmaxf(top, v[i]);
    r.sum *= exponential(r.top - top);
    r.top = top;
#pragma unroll
    for (int i = 0; i < N; i++) {
        r.sum += exponential(v[i] - top);
        r.total += v[i];
    }
}

__device__ __forceinline__ Running merge(const Running &a, const Running &b) {
    const float top = fmaxf(a.top, b.top);
    return {top, a.sum * exponential(a.top - top) + b.sum * exponential(b.top - top), a.total + b.total};
}

// Over the 32 lanes, valid in lane 0.
__device__ __forceinline__ Running warp_merge(Running r) {
    for (int distance = 16; distance > 0; distance >>= 1) {
        const Running other = {__shfl_down_sync(0xffffffffu, r.top, distance),
                               __shfl_down_sync(0xffffffffu, r.sum, distance),
                               __shfl_down_sync(0xffffffffu, r.total, distance)};
        r = merge(r, other);
    }
    return r;
}

// Over the block, the same in each thread; the tree is fixed.
__device__ __forceinline__ Running block_merge(Running r) {
    __shared__ Running warps[ROW_THREADS / 32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    r = warp_merge(r);
    if (lane == 0) warps[warp] = r;
    __syncthreads();
    if (warp == 0) {
        r = lane < ROW_THREADS / 32 ? warps[lane] : Running{-FLT_MAX, 0.0f, 0.0f};
        r = warp_merge(r);
        __syncwarp();
        if (lane == 0) warps[0] = r;
    }
    __syncthreads();
    return warps[0];
}

template <typename T> __device__ void fill(T *row, uint32_t width, float value) {
    constexpr int N = Line<T>::N;
    float line[N], single[1] = {value};
#pragma unroll
    for (int k = 0; k < N; k++) line[k] = value;
    const uint32_t whole = whole_lines<T>(width);
    for (uint32_t i = threadIdx.x * N; i < whole; i += ROW_THREADS * N) Line<T>::store(row + i, line);
    if (whole + threadIdx.x < width) store<1>(row + whole + threadIdx.x, single);
}

// Block r takes row r of `logits` [rows, stride], of which the first `width` columns count, and target r. `first_row` is
// the number of the first row in the whole batch. A target that is out of range makes loss and gradient NaN and takes
// part in the least (row, id) at `bad`, if that is not null.
template <typename T, bool GRADIENT>
__device__ void cross_entropy(T *logits, const uint32_t *targets, float *losses, unsigned long long *bad,
                              uint32_t first_row, uint32_t width, uint32_t stride, uint32_t ignored, uint32_t ignores,
                              float smoothing, float z_loss) {
    constexpr int N = Line<T>::N;
    T *row = logits + (size_t)blockIdx.x * stride;
    const uint32_t whole = whole_lines<T>(width), last = whole + threadIdx.x;
    const uint32_t target = targets[blockIdx.x];
    const bool counts = !(ignores && target == ignored);
    if (!counts || target >= width) {
        const float value = counts ? __int_as_float(0x7fc00000) : 0.0f;
        if (GRADIENT) fill(row, width, value);
        if (threadIdx.x == 0) {
            losses[blockIdx.x] = value;
            if (counts && bad) atomicMin(bad, (unsigned long long)(first_row + blockIdx.x) << 32 | target);
        }
        return;
    }
    Running r = {-FLT_MAX, 0.0f, 0.0f};
#pragma unroll 2
    for (uint32_t i = threadIdx.x * N; i < whole; i += ROW_THREADS * N) {
        float v[N];
        Line<T>::load(row + i, v);
        add(r, v);
    }
    if (last < width) {
        float v[1];
        load<1>(row + last, v);
        add(r, v);
    }
    float hit[1] = {0.0f};
    // Before the barriers: the gradient overwrites it.
    if (threadIdx.x == 0) load<1>(row + target, hit);
    r = block_merge(r);
    const float hot = 1.0f - smoothing, rest = logf(r.sum), log_sum = r.top + rest;
    if (threadIdx.x == 0) {
        // Differences first: logits may be large.
        const float loss = rest + hot * (r.top - hit[0]) + smoothing * (r.top - r.total / width);
        losses[blockIdx.x] = loss + z_loss * log_sum * log_sum;
    }
    if (!GRADIENT) return;
    const float factor = (1.0f + 2.0f * z_loss * log_sum) / r.sum, base = smoothing / width;
#pragma unroll 2
    for (uint32_t i = threadIdx.x * N; i < whole; i += ROW_THREADS * N) {
        float v[N];
        Line<T>::load(row + i, v);
#pragma unroll
        for (int k = 0; k < N; k++) {
            v[k] = exponential(v[k] - r.top) * factor - base;
            if (i + k == target) v[k] -= hot;
        }
        Line<T>::store(row + i, v);
    }
    if (last < width) {
        float v[1];
        load<1>(row + last, v);
        v[0] = exponential(v[0] - r.top) * factor - base;
        if (last == target) v[0] -= hot;
        store<1>(row + last, v);
    }
}

#define CROSS_ENTROPY(NAME, SUFFIX, T, GRADIENT)                                                                       \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS) NAME##_##SUFFIX(                                         \
        T *logits, const uint32_t *targets, float *losses, unsigned long long *bad, uint32_t first_row,                \
        uint32_t width, uint32_t stride, uint32_t ignored, uint32_t ignores, float smoothing, float z_loss) {          \
        cross_entropy<T, GRADIENT>(logits, targets, losses, bad, first_row, width, stride, ignored, ignores,           \
                                   smoothing, z_loss);                                                                 \
    }
CROSS_ENTROPY(cross_entropy_loss, f32, float, false)
CROSS_ENTROPY(cross_entropy_loss, bf16, __nv_bfloat16, false)
CROSS_ENTROPY(cross_entropy_gradient, f32, float, true)
CROSS_ENTROPY(cross_entropy_gradient, bf16, __nv_bfloat16, true)

// One block: result[0] is the sum or the mean of all losses whose targets count, result[1] what each weighs in it.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    cross_entropy_sum(const float *losses, const uint32_t *targets, float *result, uint32_t rows, uint32_t ignored,
                      uint32_t ignores, uint32_t mean) {
    __shared__ double sums[ROW_THREADS];
    __shared__ uint32_t counts[ROW_THREADS];
    double sum = 0.0;
    uint32_t count = 0;
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < rows; i += ROW_THREADS) {
        sum += losses[i];
        count += !(ignores && targets[i] == ignored);
    }
    sums[threadIdx.x] = sum;
    counts[threadIdx.x] = count;
    __syncthreads();
    for (int half = ROW_THREADS / 2; half > 0; half >>= 1) {
        if (threadIdx.x < half) {
            sums[threadIdx.x] += sums[threadIdx.x + half];
            counts[threadIdx.x] += counts[threadIdx.x + half];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        const double weight = !mean ? 1.0 : counts[0] ? 1.0 / counts[0] : 0.0;
        result[0] = (float)(sums[0] * weight);
        result[1] = (float)weight;
    }
}

// values *= adjoint * weight, each one number.
template <typename T, int V>
__device__ void scale(T *values, const float *adjoint, const float *weight, size_t count) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i >= count) return;
    const float factor = *adjoint * *weight;
    float v[V];
    load<V>(values + i, v);
#pragma unroll
    for (int k = 0; k < V; k++) v[k] *= factor;
    store<V>(values + i, v);
}

#define SCALE_PARAMETERS(T) (T * values, const float *adjoint, const float *weight, size_t count)
INSTANCES(scale, SCALE_PARAMETERS, (values, adjoint, weight, count))
