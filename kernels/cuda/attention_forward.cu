// Softmax attention of bf16 on tensor cores, forward: formulas in src/attention/tiled/mod.rs.
//
// A block takes 16 BLOCKS queries a warp of one head and meets KEYS keys at a time, two tiles of keys and of values on their
// way or in use. Weights stay in registers: what mma.m16n8k16 leaves there is, rounded to bf16, the left operand of the next
// product. Of each row a warp keeps the largest score and the sum of powers of two relative to it, in f32; what it has summed
// is scaled when the largest score grows. Tiles behind the diagonal are not met, and only tiles on it are masked. Of 128
// columns and 64 keys at a time registers spill: hence 32.
//
// Work: 4 N L D floating-point operations a head, half of it if causal. Traffic: q, k, v, o once, as blocks of a head share
// keys and values in the second-level cache. Limit: tensor cores; of shared memory a warp reads 4 D bytes for a key and
// 16 BLOCKS queries, and its queries once for each tile if they are not held in registers.
#include "attention_tiled.cuh"

namespace fulgur {

template <int D, int WARPS, int BLOCKS, int KEYS> struct ForwardShared {
    static constexpr int ROWS = WARPS * BLOCKS * 16, TILE = KEYS * STORED<D> * 2;
    static constexpr int QUERIES = ROWS * STORED<D> * 2, BYTES = QUERIES + 4 * TILE;
};

template <int D, int WARPS, int BLOCKS, int KEYS, bool HOLD>
__device__ __forceinline__ void attention_forward(const Attention<bf16> &job) {
    using Memory = ForwardShared<D, WARPS, BLOCKS, KEYS>;
    constexpr int THREADS = WARPS * 32, ROWS = Memory::ROWS, WIDTH = STORED<D>, COLUMNS = KEYS / 8;
    extern __shared__ __align__(1024) uint8_t shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    // Long rows first.
    const Span span(job, job.causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x, ROWS);
    const int head = blockIdx.y, group = head / (job.heads / job.groups), batch = span.batch;
    const int rows = min(ROWS, span.queries - span.first), own = warp * BLOCKS * 16;
    const int keys = job.causal ? max(0, min(span.keys, span.first + rows + span.shift())) : span.keys;
    const int tiles = (keys + KEYS - 1) / KEYS;
    // The last key that the warp's first query meets.
    const int diagonal = span.first + own + span.shift();
    const uint32_t base = shared_address(shared);
    const Tile<WIDTH> queries{base}, own_queries{base + own * WIDTH * 2};
    auto key_tile = [&](int at) { return Tile<WIDTH>{base + Memory::QUERIES + (at & 1) * 2 * Memory::TILE}; };
    auto value_tile = [&](int at) { return Tile<WIDTH>{base + Memory::QUERIES + ((at & 1) * 2 + 1) * Memory::TILE}; };
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

    {
        const bf16 *q = job.q.data + batch * job.q.batch + (span.query + span.first) * job.q.token + head * job.q.head;
        start_rows<ROWS, WIDTH, THREADS>(queries, q, job.q.token, rows, job.d);
    }
    fetch(0);
    wait_copies<0>();
    __syncthreads();
    const Left<HOLD, BLOCKS, D> left(own_queries, lane);

    float o[BLOCKS][D / 8][4] = {}, most[BLOCKS][2], total[BLOCKS][2] = {};
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) most[m][0] = most[m][1] = -INFINITY;
    const float scale = job.scale * LOG_TWO_E;

    for (int at = 0; at < tiles; at++) {
        wait_copies<0>();
        __syncthreads(); // this tile is there, and nobody needs the one before
        fetch(at + 1);
        const int from = at * KEYS;
        if (job.causal && from > diagonal + BLOCKS * 16 - 1) continue;
        float s[BLOCKS][COLUMNS][4];
        dot_rows(s, left, key_tile(at), lane);

        const uint64_t live = live_keys(job, batch, span.key + from) & first_bits(min(KEYS, keys - from));
        if (live != first_bits(KEYS) || (job.causal && from + KEYS - 1 > diagonal))
            hide_keys(s, live, job.causal ? diagonal - from : KEYS, lane);

#pragma unroll
        for (int m = 0; m < BLOCKS; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float top = most[m][half];
#pragma unroll
                for (int n = 0; n < COLUMNS; n++) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
                const float origin = top == -INFINITY ? 0.0f : top * scale;
                const float keep = power_of_two(most[m][half] * scale - origin);
                most[m][half] = top;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < COLUMNS; n++) {
                    float &x = s[m][n][2 * half], &y = s[m][n][2 * half + 1];
                    x = power_of_two(fmaf(x, scale, -origin)), y = power_of_two(fmaf(y, scale, -origin));
                    sum += x + y;
                }
                total[m][half] = total[m][half] * keep + sum;
#pragma unroll
                for (int j = 0; j < D / 8; j++) o[m][j][2 * half] *= keep, o[m][j][2 * half + 1] *= keep;
            }
        add_rows<D>(o, s, value_tile(at), lane);
    }

    const int64_t first_token = span.query + span.first + own;
    const int own_rows = rows - own;
    float *log_sum = job.log_sum + ((int64_t)batch * job.heads + head) * job.tokens + first_token;
#pragma unroll
    for (int m = 0; m < BLOCKS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float &sum = total[m][half];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            const int row = m * 16 + half * 8 + g;
            if (t == 0 && row < own_rows)
                log_sum[row] = sum > 0.0f ? LOG_TWO * (most[m][half] * scale + log2f(sum)) : INFINITY;
        }
    bf16 *to = job.o.data + batch * job.o.batch + first_token * job.o.token + head * job.o.head;
    leave_rows<D>(o, own_queries, to, job.o.token, own_rows, job.e, lane, [&](int m, int half) {
        const float sum = total[m][half];
        return sum > 0.0f ? 1.0f / sum : 0.0f;
    });
}

} // namespace fulgur

#define FORWARD(D, WARPS, BLOCKS, KEYS, HOLD)                                                                          \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 8 / WARPS)                                                \
        attention_forward_d##D(const __grid_constant__ fulgur::Attention<fulgur::bf16> job) {                          \
        fulgur::attention_forward<D, WARPS, BLOCKS, KEYS, HOLD>(job);                                                  \
    }

FORWARD(32, 4, 2, 64, true)
FORWARD(64, 4, 2, 64, true)
FORWARD(96, 4, 2, 64, false)
FORWARD(128, 4, 2, 32, false)
