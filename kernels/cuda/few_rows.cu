// Products of a few rows with a bf16 weight, and the largest of each row, as decoding has them; formulas in src/linear.rs
// and src/likeliest.rs.
//
// few_rows   x [R, I], w [O, I] -> y [R, O]. A warp owns a column of y: its lanes read eight neighbouring elements of a row of w
//            at a time, once for all rows of x, which come from the L1 cache, and add in f32. The order of the sums does not
//            depend on R. Bytes: 2 O I. Limit: memory bandwidth; of small weights the latency of a load.
// few_glu    w [2 O, I]: a warp reads its rows o and O + o, and y = silu(a) b of both products, each rounded to bf16 first as
//            if they had been written.
// likeliest  x [R, W] -> the first of the largest among the first `count` of each row, or NONE where one is not finite. A block a
//            row.
#include "rowwise.cuh"

typedef __nv_bfloat16 bf16;

constexpr uint32_t WARP = 32;
constexpr int AT_ONCE = 8;

// Sums of the products of the rows of x with M rows of a weight; IN_FLIGHT vectors of each are on their way at once.
template <int R, int M>
__device__ __forceinline__ void products(const bf16 *__restrict__ x, const bf16 *__restrict__ const (&w)[M], uint32_t rows,
                                         uint32_t input, float (&sums)[M][R]) {
    constexpr int IN_FLIGHT = 4;
    constexpr uint32_t STEP = WARP * AT_ONCE;
    for (uint32_t first = threadIdx.x % WARP * AT_ONCE; first < input; first += IN_FLIGHT * STEP) {
        Vector<bf16, AT_ONCE> parts[M][IN_FLIGHT];
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++)
#pragma unroll
            for (int m = 0; m < M; m++)
                if (first + k * STEP < input) parts[m][k].load(w[m] + first + k * STEP);
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++) {
            if (first + k * STEP >= input) break;
            float a[M][AT_ONCE];
#pragma unroll
            for (int m = 0; m < M; m++) parts[m][k].get(a[m]);
#pragma unroll
            for (int r = 0; r < R; r++) {
                if (r >= rows) break;
                float b[AT_ONCE];
                load_vector<AT_ONCE>(x + (size_t)r * input + first + k * STEP, b);
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int i = 0; i < AT_ONCE; i++) sums[m][r] += a[m][i] * b[i];
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < R; r++) sums[m][r] = warp_sum(sums[m][r]);
}

// The column of the result that belongs to a warp.
__device__ __forceinline__ uint32_t column() { return blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP; }

template <int R> __device__ void few_rows(const bf16 *x, const bf16 *w, bf16 *y, uint32_t rows, uint32_t output, uint32_t input) {
    const uint32_t o = column();
    if (o >= output) return;
    float sums[1][R] = {};
    const bf16 *const own[1] = {w + (size_t)o * input};
    products<R, 1>(x, own, rows, input, sums);
    if (threadIdx.x % WARP != 0) return;
#pragma unroll
    for (int r = 0; r < R; r++)
        if (r < rows) y[(size_t)r * output + o] = __float2bfloat16(sums[0][r]);
}

template <int R> __device__ void few_glu(const bf16 *x, const bf16 *w, bf16 *y, uint32_t rows, uint32_t output, uint32_t input) {
    const uint32_t o = column();
    if (o >= output) return;
    float sums[2][R] = {};
    const bf16 *const own[2] = {w + (size_t)o * input, w + (size_t)(output + o) * input};
    products<R, 2>(x, own, rows, input, sums);
    if (threadIdx.x % WARP != 0) return;
#pragma unroll
    for (int r = 0; r < R; r++) {
        const float a = __bfloat162float(__float2bfloat16(sums[0][r])), b = __bfloat162float(__float2bfloat16(sums[1][r]));
        if (r < rows) y[(size_t)r * output + o] = __float2bfloat16(a * sigmoid(a) * b);
    }
}

#define FEW(R)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(128)                                                                      \
        few_rows_##R(const bf16 *x, const bf16 *w, bf16 *y, uint32_t rows, uint32_t output, uint32_t input) {              \
        few_rows<R>(x, w, y, rows, output, input);                                                                         \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(128)                                                                      \
        few_glu_##R(const bf16 *x, const bf16 *w, bf16 *y, uint32_t rows, uint32_t output, uint32_t input) {               \
        few_glu<R>(x, w, y, rows, output, input);                                                                          \
    }
FEW(1)
FEW(2)
FEW(4)
FEW(8)

constexpr uint32_t NONE = 0xffffffffu;
constexpr int MOST_WARPS = 32;

// Whether (value, at) comes before (other, there): larger, or as large and in front.
__device__ __forceinline__ bool before(float value, uint32_t at, float other, uint32_t there) {
    return value > other || (value == other && at < there);
}

template <typename T> __device__ void likeliest(const T *x, uint32_t *chosen, uint32_t width, uint32_t count) {
    __shared__ float values[MOST_WARPS];
    __shared__ uint32_t places[MOST_WARPS];
    const T *row = x + (size_t)blockIdx.x * width;
    float value = -INFINITY;
    uint32_t at = NONE;
    bool bad = false;
#pragma unroll 4
    for (uint32_t c = threadIdx.x; c < count; c += blockDim.x) {
        float a[1];
        load<1>(row + c, a);
        bad |= !isfinite(a[0]);
        if (before(a[0], c, value, at)) value = a[0], at = c;
    }
    for (int mask = 16; mask > 0; mask >>= 1) {
        const float other = __shfl_xor_sync(0xffffffffu, value, mask);
        const uint32_t there = __shfl_xor_sync(0xffffffffu, at, mask);
        if (before(other, there, value, at)) value = other, at = there;
    }
    const uint32_t warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    if (threadIdx.x % WARP == 0) values[warp] = value, places[warp] = at;
    const bool any_bad = __syncthreads_or(bad);
    if (threadIdx.x != 0) return;
    for (uint32_t w = 1; w < warps; w++)
        if (before(values[w], places[w], value, at)) value = values[w], at = places[w];
    chosen[blockIdx.x] = any_bad ? NONE : at;
}

extern "C" __global__ void __launch_bounds__(1024) likeliest_f32(const float *x, uint32_t *chosen, uint32_t width, uint32_t count) {
    likeliest<float>(x, chosen, width, count);
}
extern "C" __global__ void __launch_bounds__(1024) likeliest_bf16(const bf16 *x, uint32_t *chosen, uint32_t width, uint32_t count) {
    likeliest<bf16>(x, chosen, width, count);
}
