// Rows of a table by number, and the sums of their adjoints; formulas in src/embedding/mod.rs.
//
// X is the type of the table, Y that of the result and of its adjoint. Blocks: x over vectors of a row, y over rows.
// gather       1 X + 1 Y an element of the result.
// sum_pieces   a row of threads adds the adjoints of a piece of the positions of one id, in order: 1 Y an element. It
//              writes the row of the gradient, or a row of `parts` where an id has several pieces; other rows are zero
//              before.
// sum_parts    adds the parts of such an id, in order.
// Tables of pieces and of ids in parts have as many entries as any ids of that number may need; those left are NONE.
// Limit: memory bandwidth. No atomics: the same bits each time.
#include "rowwise.cuh"

template <typename X, typename Y, int V>
__device__ void gather(const X *table, const uint32_t *ids, Y *y, uint32_t count, uint32_t width) {
    const size_t row = (size_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= count) return;
    const X *from = table + (size_t)ids[row] * width;
    for (uint32_t c = threadIdx.x * V; c < width; c += blockDim.x * V) {
        float a[V];
        load_vector<V>(from + c, a);
        store_vector<V>(y + row * width + c, a);
    }
}

static constexpr uint32_t NONE = 0xffffffff;

// Positions order[first..last] of one id. `target` is a row of the gradient, or one of the parts.
struct Piece {
    uint32_t first, last, target, is_part;
};

template <typename Y, int V>
__device__ void sum_pieces(const Y *dy, const uint32_t *order, const Piece *pieces, float *gradient, float *parts,
                           uint32_t count, uint32_t width) {
    const size_t at = (size_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (at >= count) return;
    const Piece piece = pieces[at];
    if (piece.target == NONE) return;
    float *to = (piece.is_part ? parts : gradient) + (size_t)piece.target * width;
    for (uint32_t c = threadIdx.x * V; c < width; c += blockDim.x * V) {
        float sum[V] = {};
#pragma unroll 4
        for (uint32_t i = piece.first; i < piece.last; i++) {
            float a[V];
            load_vector<V>(dy + (size_t)order[i] * width + c, a);
#pragma unroll
            for (int j = 0; j < V; j++) sum[j] += a[j];
        }
        store_vector<V>(to + c, sum);
    }
}

// Parts first..last of the id `row`.
struct Parted {
    uint32_t row, first, last;
};

// Grid (columns / 32, ids), threads (32, 8): row y of a block adds every eighth part, then row 0 adds the rows.
extern "C" __global__ void __launch_bounds__(256)
    sum_parts(const float *parts, const Parted *parted, float *gradient, uint32_t width) {
    __shared__ float shared[8][32];
    const Parted id = parted[blockIdx.y];
    if (id.row == NONE) return;
    const uint32_t c = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    if (c < width) {
#pragma unroll 4
        for (uint32_t part = id.first + threadIdx.y; part < id.last; part += 8) sum += parts[(size_t)part * width + c];
    }
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || c >= width) return;
    for (int y = 1; y < 8; y++) sum += shared[y][threadIdx.x];
    gradient[(size_t)id.row * width + c] = sum;
}

#define GATHER(SUFFIX, X, Y, V)                                                                                        \
    extern "C" __global__ void __launch_bounds__(256) gather_##SUFFIX##_v##V(                                          \
        const X *table, const uint32_t *ids, Y *y, uint32_t count, uint32_t width) {                                   \
        gather<X, Y, V>(table, ids, y, count, width);                                                                  \
    }
GATHER(f32, float, float, 1)
GATHER(f32, float, float, 4)
GATHER(f32_bf16, float, __nv_bfloat16, 1)
GATHER(f32_bf16, float, __nv_bfloat16, 8)
GATHER(bf16, __nv_bfloat16, __nv_bfloat16, 1)
GATHER(bf16, __nv_bfloat16, __nv_bfloat16, 8)

#define SUM_PIECES(SUFFIX, Y, V)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256, 4)                                                               \
        sum_pieces_##SUFFIX##_v##V(const Y *dy, const uint32_t *order, const Piece *pieces, float *gradient,           \
                                   float *parts, uint32_t count, uint32_t width) {                                     \
        sum_pieces<Y, V>(dy, order, pieces, gradient, parts, count, width);                                            \
    }
SUM_PIECES(f32, float, 1)
SUM_PIECES(f32, float, 4)
SUM_PIECES(bf16, __nv_bfloat16, 1)
SUM_PIECES(bf16, __nv_bfloat16, 8)
