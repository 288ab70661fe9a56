// The sweeps of the recurrence with a decay for each key channel that read the keys' side of the state: o, from the first
// token to the last, and dv, from the last to the first. See decay_uniform.cu for the sweeps, decay_channel.cuh for levels.
//
//            reads            writes           pairs
//   o        q exp(b_i)       k exp(b_end-b_j)  A_ij  = sum_c q_ic k_jc exp(b_ic - b_jc), j <= i
//   dv       k exp(b_end-b_j)  q exp(b_i)       A_ji
//
// A block takes one segment of one head and 16 columns of values for each warp, which holds their state as S^T in
// registers. While chunk c advances the state, the pairs of c + 1 are multiplied, and the rows of c + 2 are scaled.

#include "decay_channel.cuh"

namespace fulgur {

constexpr int RAW = 5; // chunks on their way or in use

template <int D, int WARPS> struct KeysShared {
    static constexpr int ROWS = FEW * D * 2, VALUES = FEW * WARPS * 16 * 2;
    static constexpr int STAGE = (2 * ROWS + VALUES + Floats<D>::BYTES + 127) / 128 * 128;
    static constexpr int SCALED = RAW * STAGE;                       // [3][read, written]
    static constexpr int LEVEL_ROWS = SCALED + 3 * 2 * ROWS;         // [2][LEVELS]
    static constexpr int DECAYS = LEVEL_ROWS + 2 * LEVELS * ROWS;    // [3][D]
    static constexpr int PAIRS = DECAYS + 3 * D * 4;                 // [2]
    static constexpr int BYTES = PAIRS + 2 * SmallTile::BYTES;
};

template <int D, int WARPS, bool ADDITIVE, bool REVERSE, bool OUTPUT>
__device__ __forceinline__ void keys(const Sweep<bf16> &job) {
    using Shared = KeysShared<D, WARPS>;
    constexpr int THREADS = WARPS * 32, E = WARPS * 16, DT = D / 8, COUPLES = D / 2;
    // Each thread scales a couple of channels of OWN consecutive tokens.
    constexpr int OWN = FEW / (THREADS / COUPLES);
    extern __shared__ __align__(1024) uint8_t shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, own = warp * 16;
    const Place place((job.e + E - 1) / E, job.heads);
    const Segment segment = job.cut.at(place.segment);
    const int h = place.head, n = segment.count, first_column = place.tile * E;
    const int columns = min(E, job.e - first_column), chunks = (n + FEW - 1) / FEW;
    const uint32_t base = shared_address(shared);
    auto stage = [&](int at) { return base + at % RAW * Shared::STAGE; };
    auto q_tile = [&](int at) { return Tile<D>{stage(at)}; };
    auto k_tile = [&](int at) { return Tile<D>{stage(at) + Shared::ROWS}; };
    auto value_tile = [&](int at) { return Tile<E>{stage(at) + 2 * Shared::ROWS}; };
    auto gates = [&](int at) {
        return reinterpret_cast<const float *>(shared + at % RAW * Shared::STAGE + 2 * Shared::ROWS + Shared::VALUES);
    };
    auto q_scaled = [&](int at) { return Tile<D>{base + Shared::SCALED + at % 3 * 2 * Shared::ROWS}; };
    auto k_scaled = [&](int at) { return Tile<D>{base + Shared::SCALED + (at % 3 * 2 + 1) * Shared::ROWS}; };
    auto level_tile = [&](int at, int level) {
        return Tile<D>{base + Shared::LEVEL_ROWS + ((at & 1) * LEVELS + level) * Shared::ROWS};
    };
    auto decays = [&](int at) { return reinterpret_cast<float *>(shared + Shared::DECAYS) + at % 3 * D; };
    auto pair_tile = [&](int at) { return SmallTile{base + Shared::PAIRS + (at & 1) * SmallTile::BYTES}; };

    auto origin = [&](const Rows<bf16> &rows) {
        return rows.data + segment.batch * rows.batch + segment.start * rows.token + h * rows.head;
    };
    const Rows<bf16> &q_rows = REVERSE ? job.write : job.read, &k_rows = REVERSE ? job.read : job.write;
    const bool need_q = OUTPUT || REVERSE, need_k = OUTPUT || !REVERSE;
    const bf16 *q = need_q ? origin(q_rows) : nullptr, *k = need_k ? origin(k_rows) : nullptr,
               *value = origin(job.value) + first_column;
    bf16 *out = OUTPUT ? origin(job.out) + first_column : nullptr;
    auto begin = [&](int at) { return (REVERSE ? chunks - 1 - at : at) * FEW; };

    // The state of the warp's columns, transposed: s[j] holds rows g and g + 8 of columns 8 j + 2 t, + 1.
    float s[DT][4];
    const int64_t matrix = (int64_t)(place.segment * job.heads + h) * job.state_size;
#pragma unroll
    for (int j = 0; j < DT; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int column = own + g + (i >> 1) * 8, row = j * 8 + t * 2 + (i & 1);
            const bool live = job.enter && row < job.d && column < columns;
            s[j][i] = live ? job.enter[matrix + row * job.state_row + (first_column + column) * job.state_column] : 0.0f;
        }

    auto fetch = [&](int at) {
        if (at < chunks) {
            const int from = begin(at), count = min(FEW, n - from);
            if (need_q) start_rows<FEW, D, THREADS>(q_tile(at), q + from * q_rows.token, q_rows.token, count, job.d);
            if (need_k) start_rows<FEW, D, THREADS>(k_tile(at), k + from * k_rows.token, k_rows.token, count, job.d);
            start_rows<FEW, E, THREADS>(value_tile(at), value + from * job.value.token, job.value.token, count, columns);
            start_gates<D, THREADS, ADDITIVE>(stage(at) + 2 * Shared::ROWS + Shared::VALUES, job, place, segment, from, count, 0,
                                              job.d, job.d);
        }
        end_copies();
    };

    // Scales the rows of a chunk: to its start, to its end and for every level.
    auto scale = [&](int at) {
        if (at >= chunks) return;
        const int couple = threadIdx.x % COUPLES, group = threadIdx.x / COUPLES, count = min(FEW, n - begin(at));
        const float *rows = gates(at) + 2 * couple;
        float2 b[FEW];
        float2 sum = make_float2(0.0f, 0.0f);
        float2 before = sum, lowest = sum;
        if (ADDITIVE) {
            const float2 last = *reinterpret_cast<const float2 *>(rows + count * Floats<D>::ROW);
            before = *reinterpret_cast<const float2 *>(rows);
            lowest = make_float2(last.x - LOWEST, last.y - LOWEST);
            before = make_float2(fmaxf(before.x, lowest.x), fmaxf(before.y, lowest.y));
        }
#pragma unroll
        for (int i = 0; i < FEW; i++) {
            const float2 x = *reinterpret_cast<const float2 *>(rows + (i + 1) * Floats<D>::ROW);
            if (ADDITIVE) {
                if (i < count)
                    sum = make_float2((before.x - fmaxf(x.x, lowest.x)) * LOG2E, (before.y - fmaxf(x.y, lowest.y)) * LOG2E);
            } else {
                sum.x += log2_decay(x.x), sum.y += log2_decay(x.y);
            }
            b[i] = sum;
        }
        if (group == 0)
            *reinterpret_cast<float2 *>(decays(at) + 2 * couple) = make_float2(power_of_two(sum.x), power_of_two(sum.y));
#pragma unroll
        for (int i = 0; i < FEW; i++)
            if (i / OWN == group) {
                uint32_t q_pair = 0, k_pair = 0;
                if (need_q) q_pair = load4(q_tile(at).couple(i, couple));
                if (need_k) k_pair = load4(k_tile(at).couple(i, couple));
                const float2 qs = make_float2(first_of(q_pair), second_of(q_pair));
                float2 ks = make_float2(first_of(k_pair), second_of(k_pair));
                if (ADDITIVE && need_k) {
                    const float2 z = *reinterpret_cast<const float2 *>(rows + (i + 1) * Floats<D>::ROW);
                    ks.x = i < count ? power_of_two((ks.x - z.x) * LOG2E) : 0.0f;
                    ks.y = i < count ? power_of_two((ks.y - z.y) * LOG2E) : 0.0f;
                    store4(k_tile(at).couple(i, couple), pack(ks.x, ks.y));
                }
                auto times = [&](float2 x, float2 power) {
                    return pack(x.x * power_of_two(power.x), x.y * power_of_two(power.y));
                };
                auto difference = [&](float2 x, float2 y) { return make_float2(x.x - y.x, x.y - y.y); };
                if (need_q) store4(q_scaled(at).couple(i, couple), times(qs, b[i]));
                if (need_k) store4(k_scaled(at).couple(i, couple), times(ks, difference(sum, b[i])));
                if (OUTPUT)
#pragma unroll
                    for (int level = 0; level < LEVELS; level++) {
                        const int mid = (i >> (level + 1) << (level + 1)) + (1 << level) - 1;
                        uint32_t scaled;
                        if (i >> level & 1) scaled = times(qs, difference(b[i], b[mid]));
                        else if (i == mid) scaled = pack(ks.x, ks.y);
                        else scaled = times(ks, difference(b[mid], b[i]));
                        store4(level_tile(at, level).couple(i, couple), scaled);
                    }
            }
    };

    // Pairs of a chunk: 8 columns of one level, or of the diagonal (level LEVELS). Each pair belongs to one level.
    auto multiply_level = [&](int at, int level, int column) {
        const Tile<D> left = level < LEVELS ? level_tile(at, level) : q_tile(at);
        const Tile<D> right = level < LEVELS ? left : k_tile(at);
        float p[2][4] = {};
#pragma unroll
        for (int c = 0; c < D; c += 32) {
            uint32_t a[2][4], x[4];
            load_matrices(a[0], left.block(0, c, lane));
            load_matrices(a[1], left.block(0, c + 16, lane));
            load_matrices(x, right.strip(column, c, lane));
            multiply(p[0], a[0], x[0], x[1]);
            multiply(p[1], a[1], x[2], x[3]);
        }
        const SmallTile pairs = pair_tile(at);
#pragma unroll
        for (int x = 0; x < 4; x++) {
            const int i = g + (x >> 1) * 8, j = column + t * 2 + (x & 1);
            const bool belongs = level == LEVELS ? i == j : i > j && 31 - __clz(i ^ j) == level;
            if (belongs) {
                const bf16 value = __float2bfloat16(p[0][x] + p[1][x]);
                const uint32_t to = REVERSE ? pairs.at(j, i) : pairs.at(i, j);
                asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(__bfloat16_as_ushort(value)) : "memory");
            }
        }
    };
    auto make_pairs = [&](int at) {
        if (at >= chunks) return;
        // Nine products: the highest level has pairs in the first columns only.
        for (int product = warp; product < 2 * LEVELS + 1; product += WARPS) {
            if (product == 0) multiply_level(at, LEVELS - 1, 0);
            else if (product < 2 * LEVELS - 1) multiply_level(at, (product - 1) / 2, (product - 1) % 2 * 8);
            else multiply_level(at, LEVELS, (product - 1) % 2 * 8);
        }
    };

    auto advance = [&](int at) {
        const Tile<E> values = value_tile(at);
        uint32_t u[4];
        load_transposed(u, values.block(0, own, lane));
        if (OUTPUT) {
            const Tile<D> r = REVERSE ? k_scaled(at) : q_scaled(at);
            float o[2][4] = {};
#pragma unroll
            for (int c = 0; c < D / 16; c++) {
                uint32_t a[4];
                load_matrices(a, r.block(0, c * 16, lane));
                multiply(o[0], a, pack(s[2 * c][0], s[2 * c][1]), pack(s[2 * c + 1][0], s[2 * c + 1][1]));
                multiply(o[1], a, pack(s[2 * c][2], s[2 * c][3]), pack(s[2 * c + 1][2], s[2 * c + 1][3]));
            }
            uint32_t a[4];
            load_matrices(a, pair_tile(at).block(lane));
            multiply(o[0], a, u[0], u[1]);
            multiply(o[1], a, u[2], u[3]);
            // The warp's columns of the tile of values belong to it alone: the output goes out through them.
            __syncwarp();
#pragma unroll
            for (int c = 0; c < 2; c++) {
                store4(values.pair(0, own + c * 8, lane), pack(o[c][0], o[c][1]));
                store4(values.pair(8, own + c * 8, lane), pack(o[c][2], o[c][3]));
            }
            __syncwarp();
            const int from = begin(at), count = min(FEW, n - from), column = own + Tile<E>::piece_column(lane);
            const int token = Tile<E>::piece_row(lane);
            const uint4 row = load16(values.piece(0, own, lane));
            if (token < count && column < columns)
                *reinterpret_cast<uint4 *>(out + (from + token) * job.out.token + column) = row;
        }
        const float *decay = decays(at) + t * 2;
        const Tile<D> w = REVERSE ? q_scaled(at) : k_scaled(at);
        const uint32_t a[4] = {u[0], u[2], u[1], u[3]};
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            const float2 x = *reinterpret_cast<const float2 *>(decay + j * 16),
                         y = *reinterpret_cast<const float2 *>(decay + j * 16 + 8);
            s[2 * j][0] *= x.x, s[2 * j][1] *= x.y, s[2 * j][2] *= x.x, s[2 * j][3] *= x.y;
            s[2 * j + 1][0] *= y.x, s[2 * j + 1][1] *= y.y, s[2 * j + 1][2] *= y.x, s[2 * j + 1][3] *= y.y;
            uint32_t c[4];
            load_transposed(c, w.block(0, j * 16, lane));
            multiply(s[2 * j], a, c[0], c[1]);
            multiply(s[2 * j + 1], a, c[2], c[3]);
        }
    };

    // Pairs that belong to no level stay zero.
    for (int item = threadIdx.x; item < 2 * SmallTile::BYTES / 4; item += THREADS) store4(base + Shared::PAIRS + item * 4, 0);
    fetch(0);
    fetch(1);
    fetch(2);
    fetch(3);
    wait_copies<2>();
    __syncthreads();
    scale(0);
    scale(1);
    __syncthreads();
    if (OUTPUT) make_pairs(0);
    for (int at = 0; at < chunks; at++) {
        wait_copies<1>();
        __syncthreads(); // chunk at + 2, the scaled rows of at + 1 and the pairs of `at` are there; at - 1 is done
        fetch(at + 4);
        scale(at + 2);
        if (OUTPUT) make_pairs(at + 1);
        advance(at);
    }

    if (job.leave)
#pragma unroll
        for (int j = 0; j < DT; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int column = own + g + (i >> 1) * 8, row = j * 8 + t * 2 + (i & 1);
                if (row < job.d && column < columns)
                    job.leave[matrix + row * job.state_row + (first_column + column) * job.state_column] = s[j][i];
            }
}

} // namespace fulgur

#define KEYS(D, WARPS)                                                                                                 \
    KEYS_OF(D, WARPS, decay, false)                                                                                    \
    KEYS_OF(D, WARPS, additive, true)
#define KEYS_OF(D, WARPS, GATE, ADDITIVE)                                                                              \
    KEYS_KERNEL(D, WARPS, GATE, ADDITIVE, forward, false, true)                                                        \
    KEYS_KERNEL(D, WARPS, GATE, ADDITIVE, reverse, true, true)                                                         \
    KEYS_KERNEL(D, WARPS, GATE, ADDITIVE, forward_state, false, false)                                                 \
    KEYS_KERNEL(D, WARPS, GATE, ADDITIVE, reverse_state, true, false)
#define KEYS_KERNEL(D, WARPS, GATE, ADDITIVE, NAME, REVERSE, OUTPUT)                                                   \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 8 / WARPS)                                                \
        decay_keys_##GATE##_d##D##_w##WARPS##_##NAME(const __grid_constant__ fulgur::Sweep<fulgur::bf16> job) {        \
        fulgur::keys<D, WARPS, ADDITIVE, REVERSE, OUTPUT>(job);                                                        \
    }

KEYS(64, 4)
KEYS(64, 8)
KEYS(128, 4)
KEYS(128, 8)
