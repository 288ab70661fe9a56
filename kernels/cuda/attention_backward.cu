// Softmax attention of bf16 on tensor cores, backward: formulas in src/attention/tiled/mod.rs.
//
// attention_dots       rowsum(dO (*) O) in f32, half a warp a row: 4 bytes a element of o.
// attention_keys       dK and dV: a block takes 16 BLOCKS keys a warp and meets tiles of queries, over all heads of the group
//                      one after the other. 8 N L D operations a head.
// attention_queries    dQ: a block takes 16 BLOCKS queries a warp and meets tiles of keys. 6 N L D operations a head.
//
// Scores are made anew in both: seven products instead of five, but nothing is summed by atomics or in memory, and two runs
// give the same bits. The key side makes scores transposed, so that weights and their adjoints lie in registers as the left
// operands of dV and dK. Half of the work if causal. Limit: tensor cores, and shared memory, of which a warp reads 8 D bytes
// (6 D on the side of queries) for a row that it meets and 16 BLOCKS of its own.
#include "attention_tiled.cuh"

namespace fulgur {

// Two tiles of rows that a block owns, and two each on their way or in use of rows that it meets.
template <int D, int WARPS, int BLOCKS, int MET> struct BackwardShared {
    static constexpr int ROWS = WARPS * BLOCKS * 16, OWN = ROWS * STORED<D> * 2, TILE = MET * STORED<D> * 2;
    // The key side meets two floats a row as well.
    static constexpr int FLOATS = 2 * OWN + 4 * TILE, BYTES = FLOATS + 4 * MET * 4;
};

template <int D, int WARPS, int BLOCKS, int KEYS, bool HOLD>
__device__ __forceinline__ void attention_queries(const Attention<bf16> &job) {
    using Memory = BackwardShared<D, WARPS, BLOCKS, KEYS>;
    constexpr int THREADS = WARPS * 32, ROWS = Memory::ROWS, WIDTH = STORED<D>, COLUMNS = KEYS / 8;
    extern __shared__ __align__(1024) uint8_t shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2;
    // Long rows first.
    const Span span(job, job.causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x, ROWS);
    const int head = blockIdx.y, group = head / (job.heads / job.groups), batch = span.batch;
    const int rows = min(ROWS, span.queries - span.first), own = warp * BLOCKS * 16;
    const int keys = job.causal ? max(0, min(span.keys, span.first + rows + span.shift())) : span.keys;
    const int tiles = (keys + KEYS - 1) / KEYS;
    // The last key that the warp's first query meets.
    const int diagonal = span.first + own + span.shift();
    const uint32_t base = shared_address(shared);
    const Tile<WIDTH> queries{base}, outputs{base + Memory::OWN};
    const Tile<WIDTH> own_queries{queries.base + own * WIDTH * 2}, own_outputs{outputs.base + own * WIDTH * 2};
    auto key_tile = [&](int at) { return Tile<WIDTH>{base + 2 * Memory::OWN + (at & 1) * 2 * Memory::TILE}; };
    auto value_tile = [&](int at) { return Tile<WIDTH>{base + 2 * Memory::OWN + ((at & 1) * 2 + 1) * Memory::TILE}; };
    const bf16 *k = job.k.data + batch * job.k.batch + span.key * job.k.token + group * job.k.head;
    const bf16 *v = job.v.data + batch * job.v.batch + span.key * job.v.token + group * job.v.head;

    auto fetch = [&](int at) {
        if (at < tiles) {
            const int from = at * KEYS, count = keys - from;
            start_rows<KEYS, WIDTH, THREADS>(key_tile(at), k + from * job.k.token, job.k.token, count, job.d);
            start_rows<KEYS, WIDTH, THREADS>(value_tile(at), v + from * job.v.token, job.v.token, count, job.e);
        }
        end_copies();
    };

    const int64_t first_token = span.query + span.first;
    {
        const bf16 *q = job.q.data + batch * job.q.batch + first_token * job.q.token + head * job.q.head;
        const bf16 *d_o = job.d_o.data + batch * job.d_o.batch + first_token * job.d_o.token + head * job.d_o.head;
        start_rows<ROWS, WIDTH, THREADS>(queries, q, job.q.token, rows, job.d);
        start_rows<ROWS, WIDTH, THREADS>(outputs, d_o, job.d_o.token, rows, job.e);
    }
    fetch(0);
    float log_sum[BLOCKS][2], dot[BLOCKS][2];
    {
        const int64_t row = ((int64_t)batch * job.heads + head) * job.tokens + first_token + own;
#pragma unroll
        for (int m = 0; m < BLOCKS; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = m * 16 + half * 8 + g;
                const bool live = own + i < rows;
                log_sum[m][half] = live ? job.log_sum[row + i] * LOG_TWO_E : 0.0f;
                dot[m][half] = live ? job.dots[row + i] : 0.0f;
            }
    }
    wait_copies<0>();
    __syncthreads();
    const Left<HOLD, BLOCKS, D> left(own_queries, lane), left_outputs(own_outputs, lane);
    float dq[BLOCKS][D / 8][4] = {};
    const float scale = job.scale * LOG_TWO_E;

    for (int at = 0; at < tiles; at++) {
        wait_copies<0>();
        __syncthreads(); // this tile is there, and nobody needs the one before
        fetch(at + 1);
        const int from = at * KEYS;
        if (job.causal && from > diagonal + BLOCKS * 16 - 1) continue;
        float s[BLOCKS][COLUMNS][4], ds[BLOCKS][COLUMNS][4];
        dot_rows(s, left, key_tile(at), lane);
        dot_rows(ds, left_outputs, value_tile(at), lane);

        const uint64_t live = live_keys(job, batch, span.key + from) & first_bits(min(KEYS, keys - from));
        if (live != first_bits(KEYS) || (job.causal && from + KEYS - 1 > diagonal))
            hide_keys(s, live, job.causal ? diagonal - from : KEYS, lane);
#pragma unroll
        for (int m = 0; m < BLOCKS; m++)
#pragma unroll
            for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float p = power_of_two(fmaf(s[m][n][i], scale, -log_sum[m][i >> 1]));
                    ds[m][n][i] = p * (ds[m][n][i] - dot[m][i >> 1]);
                }
        add_rows<D>(dq, ds, key_tile(at), lane);
    }

    bf16 *to = job.dq.data + batch * job.dq.batch + (first_token + own) * job.dq.token + head * job.dq.head;
    leave_rows<D>(dq, own_queries, to, job.dq.token, rows - own, job.d, lane, [&](int, int) { return job.scale; });
}

template <int D, int WARPS, int BLOCKS, int QUERIES, bool HOLD>
__device__ __forceinline__ void attention_keys(const Attention<bf16> &job) {
    using Memory = BackwardShared<D, WARPS, BLOCKS, QUERIES>;
    constexpr int THREADS = WARPS * 32, ROWS = Memory::ROWS, WIDTH = STORED<D>, COLUMNS = QUERIES / 8;
    static_assert(2 * QUERIES <= THREADS, "a thread copies one float a tile");
    extern __shared__ __align__(1024) uint8_t shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const Span span(job, blockIdx.x, ROWS); // causal: long columns come first
    const int group = blockIdx.y, share = job.heads / job.groups, batch = span.batch;
    const int rows = min(ROWS, span.keys - span.first), own = warp * BLOCKS * 16;
    // The first query that meets any of the keys, on the grid of tiles, and the first that meets the warp's first key.
    const int start = job.causal ? max(0, span.first - span.shift()) / QUERIES * QUERIES : 0;
    const int diagonal = span.first + own - span.shift();
    const int tiles = max(0, span.queries - start + QUERIES - 1) / QUERIES, steps = tiles * share;
    const uint32_t base = shared_address(shared);
    const Tile<WIDTH> keys{base}, values{base + Memory::OWN};
    const Tile<WIDTH> own_keys{keys.base + own * WIDTH * 2}, own_values{values.base + own * WIDTH * 2};
    auto query_tile = [&](int at) { return Tile<WIDTH>{base + 2 * Memory::OWN + (at & 1) * 2 * Memory::TILE}; };
    auto output_tile = [&](int at) { return Tile<WIDTH>{base + 2 * Memory::OWN + ((at & 1) * 2 + 1) * Memory::TILE}; };
    // Of a tile, logarithms of sums and then dots.
    const float *floats = reinterpret_cast<const float *>(shared + Memory::FLOATS);

    // Step and tile of queries that is fetched next, and what of its head is in memory.
    int next = 0, next_tile = 0, next_head = group * share;
    auto fetch = [&]() {
        if (next < steps) {
            const int from = start + next_tile * QUERIES, count = span.queries - from;
            const int64_t token = span.query + from;
            const bf16 *q = job.q.data + batch * job.q.batch + token * job.q.token + next_head * job.q.head;
            const bf16 *d_o = job.d_o.data + batch * job.d_o.batch + token * job.d_o.token + next_head * job.d_o.head;
            start_rows<QUERIES, WIDTH, THREADS>(query_tile(next), q, job.q.token, count, job.d);
            start_rows<QUERIES, WIDTH, THREADS>(output_tile(next), d_o, job.d_o.token, count, job.e);
            if (threadIdx.x < 2 * QUERIES) {
                const int row = threadIdx.x % QUERIES;
                const bool live = row < count;
                const int64_t at = ((int64_t)batch * job.heads + next_head) * job.tokens + token + (live ? row : 0);
                copy4(base + Memory::FLOATS + ((next & 1) * 2 * QUERIES + threadIdx.x) * 4,
                      (threadIdx.x < QUERIES ? job.log_sum : job.dots) + at, live);
            }
            next++;
            if (++next_tile == tiles) next_tile = 0, next_head++;
        }
        end_copies();
    };

    const int64_t first_token = span.key + span.first;
    {
        const bf16 *k = job.k.data + batch * job.k.batch + first_token * job.k.token + group * job.k.head;
        const bf16 *v = job.v.data + batch * job.v.batch + first_token * job.v.token + group * job.v.head;
        start_rows<ROWS, WIDTH, THREADS>(keys, k, job.k.token, rows, job.d);
        start_rows<ROWS, WIDTH, THREADS>(values, v, job.v.token, rows, job.e);
    }
    fetch();
    wait_copies<0>();
    __syncthreads();
    const Left<HOLD, BLOCKS, D> left(own_keys, lane), left_values(own_values, lane);
    float dk[BLOCKS][D / 8][4] = {}, dv[BLOCKS][D / 8][4] = {};
    const float scale = job.scale * LOG_TWO_E;

    int tile = 0;
    for (int at = 0; at < steps; at++) {
        wait_copies<0>();
        __syncthreads(); // this tile is there, and nobody needs the one before
        fetch();
        const int from = start + tile * QUERIES;
        tile = tile + 1 == tiles ? 0 : tile + 1;
        if (job.causal && from + QUERIES - 1 < diagonal) continue;
        // Scores and weights, keys down and queries across.
        float p[BLOCKS][COLUMNS][4];
        dot_rows(p, left, query_tile(at), lane);
        if (job.causal && from < diagonal + BLOCKS * 16 - 1) {
#pragma unroll
            for (int m = 0; m < BLOCKS; m++)
#pragma unroll
                for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int column = n * 8 + t * 2 + (i & 1), row = m * 16 + g + (i >> 1) * 8;
                        if (from + column < diagonal + row) p[m][n][i] = -INFINITY;
                    }
        }
        const float *log_sum = floats + (at & 1) * 2 * QUERIES, *dots = log_sum + QUERIES;
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) {
            const float2 of = *reinterpret_cast<const float2 *>(log_sum + n * 8 + t * 2);
            const float less[2] = {of.x * LOG_TWO_E, of.y * LOG_TWO_E};
#pragma unroll
            for (int m = 0; m < BLOCKS; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) p[m][n][i] = power_of_two(fmaf(p[m][n][i], scale, -less[i & 1]));
        }
        add_rows<D>(dv, p, output_tile(at), lane);
        float ds[BLOCKS][COLUMNS][4];
        dot_rows(ds, left_values, output_tile(at), lane);
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) {
            const float2 of = *reinterpret_cast<const float2 *>(dots + n * 8 + t * 2);
            const float less[2] = {of.x, of.y};
#pragma unroll
            for (int m = 0; m < BLOCKS; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - less[i & 1]);
        }
        add_rows<D>(dk, ds, query_tile(at), lane);
    }

    // Rows of padding hold what their keys would have done.
    auto live = [&](int m, int half) {
        const int row = own + m * 16 + half * 8 + g;
        return row < rows && (live_keys(job, batch, span.key + span.first + row) & 1);
    };
#pragma unroll
    for (int m = 0; m < BLOCKS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            if (!live(m, half)) {
#pragma unroll
                for (int j = 0; j < D / 8; j++)
                    dk[m][j][2 * half] = dk[m][j][2 * half + 1] = dv[m][j][2 * half] = dv[m][j][2 * half + 1] = 0.0f;
            }
    bf16 *to = job.dk.data + batch * job.dk.batch + (first_token + own) * job.dk.token + group * job.dk.head;
    leave_rows<D>(dk, own_keys, to, job.dk.token, rows - own, job.d, lane, [&](int, int) { return job.scale; });
    to = job.dv.data + batch * job.dv.batch + (first_token + own) * job.dv.token + group * job.dv.head;
    leave_rows<D>(dv, own_values, to, job.dv.token, rows - own, job.e, lane, [&](int, int) { return 1.0f; });
}

} // namespace fulgur

// Rows of o and its adjoint in the order [B, H, N]; e is a multiple of 8.
extern "C" __global__ void __launch_bounds__(256)
    attention_dots(const __grid_constant__ fulgur::Attention<fulgur::bf16> job, int64_t rows) {
    using namespace fulgur;
    const int64_t row = (int64_t)blockIdx.x * (blockDim.x / 16) + threadIdx.x / 16;
    const int lane = threadIdx.x % 16, token = row % job.tokens, head = row / job.tokens % job.heads;
    const int64_t batch = row / job.tokens / job.heads;
    float sum = 0.0f;
    if (row < rows && lane * 8 < job.e) {
        const uint4 a = *reinterpret_cast<const uint4 *>(job.o.data + batch * job.o.batch + token * job.o.token +
                                                         head * job.o.head + lane * 8);
        const uint4 b = *reinterpret_cast<const uint4 *>(job.d_o.data + batch * job.d_o.batch + token * job.d_o.token +
                                                         head * job.d_o.head + lane * 8);
        const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; i++) sum += first_of(x[i]) * first_of(y[i]) + second_of(x[i]) * second_of(y[i]);
    }
#pragma unroll
    for (int mask = 8; mask > 0; mask >>= 1) sum += __shfl_xor_sync(~0u, sum, mask);
    if (row < rows && lane == 0) job.dots[row] = sum;
}

#define BACKWARD(SIDE, D, WARPS, BLOCKS, MET, HOLD, MOST)                                                              \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, MOST)                                                     \
        attention_##SIDE##_d##D(const __grid_constant__ fulgur::Attention<fulgur::bf16> job) {                         \
        fulgur::attention_##SIDE<D, WARPS, BLOCKS, MET, HOLD>(job);                                                    \
    }

BACKWARD(queries, 32, 4, 2, 32, true, 2)
BACKWARD(queries, 64, 4, 2, 32, true, 2)
BACKWARD(queries, 96, 8, 1, 64, true, 1)
BACKWARD(queries, 128, 8, 1, 64, true, 1)
BACKWARD(keys, 32, 4, 2, 32, false, 2)
BACKWARD(keys, 64, 4, 2, 32, false, 2)
BACKWARD(keys, 96, 8, 1, 64, false, 1)
BACKWARD(keys, 128, 8, 1, 64, false, 1)
