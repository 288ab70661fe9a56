// The causal recurrence whose decay is the same for all channels of a head, in chunks of 64 tokens on tensor cores.
//
//   S <- a_t S + w_t u_t^T,  out_t = S^T r_t          from the first token to the last
//   S after  <- S before,    out_t = S^T r_t          REVERSE: from the last token to the first, see below
//
// With b_i the sum of log-decays of a chunk up to token i, itself included, and b_end that of the whole chunk:
//
//             pairs (i, j)              read factor         write factor        state factor
//   forward   j <= i: exp(b_i - b_j)    exp(b_i)            exp(b_end - b_j)    exp(b_end)
//   reverse   j >= i: exp(b_j - b_i)    exp(b_end - b_i)    exp(b_j)            exp(b_end)
//
//   out_i = sum_j (r_i . w_j) pair_ij u_j + read_i S^T r_i;      S <- state S + sum_j write_j w_j u_j^T
//
// The state of the reverse form is the adjoint at the border of a chunk. One kernel makes everything:
//
//             r   w   u   state          |          r   w   u   state
//   o         q   k   v   S              |  dk      v   do  q   G^T  reverse
//   dq        do  v   k   S^T            |  dv      k   q   do  G    reverse
//
// A block takes one segment of tokens of one head and 16 columns of u for each warp. A warp holds the state of its columns
// as S^T, 16 x D floats in registers: what mma.m16n8k16 leaves there is, rounded to bf16, an operand of the next product,
// so states never pass through shared memory and warps share only the tiles of r, w and the pairs.

#include "decay.cuh"
#include "mma.cuh"

namespace fulgur {

constexpr int CHUNK = 64, STAGES = 3;

// Tiles of 8 columns of pairs that a warp makes, in a row block of 16: balanced over the lower triangle.
template <int WARPS> struct Share {
    int block, first, end;
    __device__ __forceinline__ Share(int warp, bool reverse) {
        if (WARPS == 8) {
            block = 0x33322110u >> (4 * warp) & 15;
            first = 0x63030200u >> (4 * warp) & 15;
            end = 0x86363422u >> (4 * warp) & 15;
        } else {
            block = warp, first = 0, end = 2 * warp + 2;
        }
        if (reverse) {
            const int start = 8 - end;
            block = 3 - block, end = 8 - first, first = start;
        }
    }
    static constexpr int MOST = WARPS == 8 ? 3 : 8;
};

// start_rows with addresses that are computed for each piece: here the steps between copies leave room for ldmatrix, and the
// kernel is 5 % faster than with addresses that are kept.
template <int WIDTH, int THREADS>
__device__ __forceinline__ void start_chunk(Tile<WIDTH> tile, const bf16 *from, int64_t stride, int count, int width) {
    constexpr int PIECES = WIDTH / 8;
#pragma unroll
    for (int item = threadIdx.x; item < CHUNK * PIECES; item += THREADS) {
        const int row = item / PIECES, piece = item % PIECES;
        const bool live = row < count && piece * 8 < width;
        copy16(tile.at(row, piece), live ? from + (int64_t)row * stride + piece * 8 : from, live);
    }
}

template <int D, int WARPS> struct UniformShared {
    static constexpr int READ = CHUNK * D * 2, VALUE = CHUNK * WARPS * 16 * 2, STAGE = 2 * READ + VALUE;
    static constexpr int PAIRS = STAGES * STAGE, LOGS = PAIRS + 2 * CHUNK * CHUNK * 2;
    static constexpr int SUMS = LOGS + STAGES * CHUNK * 4, BYTES = SUMS + 2 * WARPS * CHUNK * 4;
};

template <int D, int WARPS, bool REVERSE, bool OUTPUT>
__device__ __forceinline__ void uniform(const Sweep<bf16> &job) {
    using Shared = UniformShared<D, WARPS>;
    constexpr int THREADS = WARPS * 32, E = WARPS * 16, DT = D / 8;
    extern __shared__ __align__(1024) uint8_t shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int tiles = (job.e + E - 1) / E;
    const Place place(tiles, job.heads);
    const Segment segment = job.cut.at(place.segment);
    const int h = place.head, n = segment.count, first_column = place.tile * E;
    const int columns = min(E, job.e - first_column);
    const int own = warp * 16; // first of the warp's columns
    const uint32_t base = shared_address(shared);
    float *sums = reinterpret_cast<float *>(shared + Shared::SUMS) + warp * CHUNK;
    const float *logs = reinterpret_cast<float *>(shared + Shared::LOGS);
    auto read_tile = [&](int stage) { return Tile<D>{base + stage * Shared::STAGE}; };
    auto write_tile = [&](int stage) { return Tile<D>{base + stage * Shared::STAGE + Shared::READ}; };
    auto value_tile = [&](int stage) { return Tile<E>{base + stage * Shared::STAGE + 2 * Shared::READ}; };
    auto pair_tile = [&](int chunk) { return Tile<CHUNK>{base + Shared::PAIRS + (chunk & 1) * CHUNK * CHUNK * 2}; };

    auto origin = [&](const Rows<bf16> &rows) {
        return rows.data + segment.batch * rows.batch + segment.start * rows.token + h * rows.head;
    };
    const bf16 *read = OUTPUT ? origin(job.read) : nullptr, *write = origin(job.write),
               *value = origin(job.value) + first_column;
    bf16 *out = OUTPUT ? origin(job.out) + first_column : nullptr;
    const float *log_decay = job.log_decay.from(segment, h);
    const bool by_token = log_decay && job.log_decay.token;
    const float constant = log_decay && !by_token ? log2_decay(*log_decay) : 0.0f;
    const int chunks = (n + CHUNK - 1) / CHUNK;
    // The sweep's chunk number `at` begins at this token.
    auto begin = [&](int at) { return (REVERSE ? chunks - 1 - at : at) * CHUNK; };

    // The state of the warp's columns, transposed: s[j] holds rows g and g + 8 of columns 8 j + 2 t, + 1.
    float s[DT][4];
    {
        const int64_t matrix = (int64_t)(place.segment * job.heads + h) * job.state_size;
#pragma unroll
        for (int j = 0; j < DT; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int column = own + g + (i >> 1) * 8, row = j * 8 + t * 2 + (i & 1);
                const bool live = job.enter && row < job.d && column < columns;
                s[j][i] = live ? job.enter[matrix + row * job.state_row + (first_column + column) * job.state_column] : 0.0f;
            }
    }

    auto fetch = [&](int at) {
        if (at < chunks) {
            const int stage = at % STAGES, from = begin(at), count = min(CHUNK, n - from);
            if (OUTPUT) start_chunk<D, THREADS>(read_tile(stage), read + from * job.read.token, job.read.token, count, job.d);
            start_chunk<D, THREADS>(write_tile(stage), write + from * job.write.token, job.write.token, count, job.d);
            start_chunk<E, THREADS>(value_tile(stage), value + from * job.value.token, job.value.token, count, columns);
            if (by_token && threadIdx.x < CHUNK) {
                const bool live = threadIdx.x < count;
                const int64_t token = live ? from + threadIdx.x : from;
                copy4(base + Shared::LOGS + (stage * CHUNK + threadIdx.x) * 4, log_decay + token * job.log_decay.token, live);
            }
        }
        end_copies();
    };

    // Every warp keeps its own sums of log-decays of two chunks.
    auto sum_logs = [&](int at) {
        const int count = min(CHUNK, n - begin(at)), i = 2 * lane;
        float x = constant, y = constant;
        if (by_token) {
            const float2 log = *reinterpret_cast<const float2 *>(logs + at % STAGES * CHUNK + i);
            x = log2_decay(log.x), y = log2_decay(log.y);
        }
        x = i < count ? x : 0.0f;
        y = i + 1 < count ? y : 0.0f;
        float sum = x + y;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const float before = __shfl_up_sync(~0u, sum, step);
            sum += lane >= step ? before : 0.0f;
        }
        *reinterpret_cast<float2 *>(sums + (at & 1) * WARPS * CHUNK + i) = make_float2(sum - y, sum);
        __syncwarp();
    };

    auto make_pairs = [&](int at) {
        const Share<WARPS> share(warp, REVERSE);
        const int stage = at % STAGES, row = share.block * 16;
        const Tile<D> r = read_tile(stage), w = write_tile(stage);
        const Tile<CHUNK> pairs = pair_tile(at);
        const float *b = sums + (at & 1) * WARPS * CHUNK;
        float p[Share<WARPS>::MOST][4] = {};
#pragma unroll
        for (int k = 0; k < D; k += 32) {
            uint32_t a[2][4];
            load_matrices(a[0], r.block_here(row, k, lane));
            load_matrices(a[1], r.block_here(row, k + 16, lane));
#pragma unroll
            for (int i = 0; i < Share<WARPS>::MOST; i++) {
                const int column = share.first + i;
                if (column < share.end) {
                    uint32_t c[4];
                    load_matrices(c, w.at(column * 8 + (lane & 7), (k >> 3) + (lane >> 3)));
                    multiply(p[i], a[0], c[0], c[1]);
                    multiply(p[i], a[1], c[2], c[3]);
                }
            }
        }
        const float above = b[row + g], below = b[row + g + 8];
#pragma unroll
        for (int i = 0; i < Share<WARPS>::MOST; i++) {
            const int column = share.first + i;
            if (column < share.end) {
                const int j = column * 8 + t * 2;
                const float2 of = *reinterpret_cast<const float2 *>(b + j);
                auto pair = [&](float x, int i, int j, float at_i, float at_j) {
                    const bool live = REVERSE ? j >= i : j <= i;
                    return live ? x * power_of_two(REVERSE ? at_j - at_i : at_i - at_j) : 0.0f;
                };
                const int i0 = row + g, i1 = i0 + 8;
                store4(pairs.at(i0, column) + t * 4, pack(pair(p[i][0], i0, j, above, of.x), pair(p[i][1], i0, j + 1, above, of.y)));
                store4(pairs.at(i1, column) + t * 4, pack(pair(p[i][2], i1, j, below, of.x), pair(p[i][3], i1, j + 1, below, of.y)));
            }
        }
    };

    auto advance = [&](int at) {
        const int stage = at % STAGES;
        const float *b = sums + (at & 1) * WARPS * CHUNK;
        const float whole = b[CHUNK - 1];
        const Tile<E> values = value_tile(stage);
        uint32_t u[CHUNK / 16][4]; // as a right operand the pairs (0, 1) and (2, 3); as a left one 0, 2, 1, 3
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++) load_transposed(u[k], values.block_here(k * 16, own, lane));
        if (OUTPUT) {
            const Tile<D> r = read_tile(stage);
            const Tile<CHUNK> pairs = pair_tile(at);
            float o[CHUNK / 16][2][4] = {};
#pragma unroll
            for (int k = 0; k < D / 16; k++) {
                const uint32_t left[2] = {pack(s[2 * k][0], s[2 * k][1]), pack(s[2 * k + 1][0], s[2 * k + 1][1])};
                const uint32_t right[2] = {pack(s[2 * k][2], s[2 * k][3]), pack(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
                for (int m = 0; m < CHUNK / 16; m++) {
                    uint32_t a[4];
                    load_matrices(a, r.block_here(m * 16, k * 16, lane));
                    multiply(o[m][0], a, left[0], left[1]);
                    multiply(o[m][1], a, right[0], right[1]);
                }
            }
#pragma unroll
            for (int m = 0; m < CHUNK / 16; m++) {
                const float x = b[m * 16 + g], y = b[m * 16 + g + 8];
                const float above = power_of_two(REVERSE ? whole - x : x), below = power_of_two(REVERSE ? whole - y : y);
#pragma unroll
                for (int c = 0; c < 2; c++) o[m][c][0] *= above, o[m][c][1] *= above, o[m][c][2] *= below, o[m][c][3] *= below;
            }
#pragma unroll
            for (int m = 0; m < CHUNK / 16; m++)
#pragma unroll
                for (int k = REVERSE ? m : 0; k < (REVERSE ? CHUNK / 16 : m + 1); k++) {
                    uint32_t a[4];
                    load_matrices(a, pairs.block_here(m * 16, k * 16, lane));
                    multiply(o[m][0], a, u[k][0], u[k][1]);
                    multiply(o[m][1], a, u[k][2], u[k][3]);
                }
            // The warp's columns of the tile of values belong to it alone: the output goes out through them.
            __syncwarp();
#pragma unroll
            for (int m = 0; m < CHUNK / 16; m++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    store4(values.at(m * 16 + g, (own >> 3) + c) + t * 4, pack(o[m][c][0], o[m][c][1]));
                    store4(values.at(m * 16 + g + 8, (own >> 3) + c) + t * 4, pack(o[m][c][2], o[m][c][3]));
                }
            __syncwarp();
            const int from = begin(at), count = min(CHUNK, n - from), piece = (own >> 3) + (lane >> 3 & 1);
#pragma unroll
            for (int m = 0; m < CHUNK / 16; m++) {
                const int token = m * 16 + (lane & 7) + (lane >> 4) * 8;
                const uint4 row = load16(values.at(token, piece));
                if (token < count && piece * 8 < columns)
                    *reinterpret_cast<uint4 *>(out + (from + token) * job.out.token + piece * 8) = row;
            }
        }
        const float keep = power_of_two(whole);
#pragma unroll
        for (int j = 0; j < DT; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[j][i] *= keep;
        const Tile<D> w = write_tile(stage);
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++) {
            const float2 x = *reinterpret_cast<const float2 *>(b + k * 16 + t * 2),
                         y = *reinterpret_cast<const float2 *>(b + k * 16 + t * 2 + 8);
            const float f0 = power_of_two(REVERSE ? x.x : whole - x.x), f1 = power_of_two(REVERSE ? x.y : whole - x.y),
                        f8 = power_of_two(REVERSE ? y.x : whole - y.x), f9 = power_of_two(REVERSE ? y.y : whole - y.y);
            const uint32_t a[4] = {scaled(u[k][0], f0, f1), scaled(u[k][2], f0, f1), scaled(u[k][1], f8, f9), scaled(u[k][3], f8, f9)};
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                uint32_t c[4];
                load_transposed(c, w.block_here(k * 16, j * 16, lane));
                multiply(s[2 * j], a, c[0], c[1]);
                multiply(s[2 * j + 1], a, c[2], c[3]);
            }
        }
    };

    fetch(0);
    fetch(1);
    wait_copies<1>();
    __syncthreads();
    if (chunks > 0) {
        sum_logs(0);
        if (OUTPUT) make_pairs(0);
    }
    for (int at = 0; at < chunks; at++) {
        wait_copies<0>();
        __syncthreads(); // chunk at + 1 and the pairs of `at` are there; nobody needs the stage of at - 1 any more
        fetch(at + 2);
        if (at + 1 < chunks) {
            sum_logs(at + 1);
            if (OUTPUT) make_pairs(at + 1);
        }
        advance(at);
    }

    if (job.leave) {
        const int64_t matrix = (int64_t)(place.segment * job.heads + h) * job.state_size;
#pragma unroll
        for (int j = 0; j < DT; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int column = own + g + (i >> 1) * 8, row = j * 8 + t * 2 + (i & 1);
                if (row < job.d && column < columns)
                    job.leave[matrix + row * job.state_row + (first_column + column) * job.state_column] = s[j][i];
            }
    }
}

} // namespace fulgur

#define UNIFORM(D, WARPS)                                                                                              \
    UNIFORM_OF(D, WARPS, forward, false, true)                                                                         \
    UNIFORM_OF(D, WARPS, reverse, true, true)                                                                          \
    UNIFORM_OF(D, WARPS, forward_state, false, false)                                                                  \
    UNIFORM_OF(D, WARPS, reverse_state, true, false)
#define UNIFORM_OF(D, WARPS, NAME, REVERSE, OUTPUT)                                                                    \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 8 / WARPS)                                                \
        decay_uniform_d##D##_w##WARPS##_##NAME(const __grid_constant__ fulgur::Sweep<fulgur::bf16> job) {                       \
        fulgur::uniform<D, WARPS, REVERSE, OUTPUT>(job);                                                               \
    }

UNIFORM(64, 4)
UNIFORM(64, 8)
UNIFORM(128, 4)
UNIFORM(128, 8)
