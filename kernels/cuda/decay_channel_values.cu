// The sweeps of the recurrence with a decay for each key channel that read the values' side of the state: dq, from the
// first token to the last, and dk, from the last to the first, with the adjoint of the gates. See decay_uniform.cu for the
// sweeps, decay_channel.cuh for levels.
//
//            reads  writes  values   out_i
//   dq       do     v       k        exp(b_i) S do_i + sum_{j <= i} (do_i . v_j) exp(b_i - b_j) k_j
//   dk       v      do      q        exp(b_end - b_i) G v_i + sum_{j >= i} (v_i . do_j) exp(b_j - b_i) q_j
//
// A block takes one segment of one head. A warp makes 16 key channels and holds their state, 16 x E floats, in registers;
// warps share nothing but the rows of tokens.
//
// The adjoint of log-decays is d log a_t = sum_{s >= t} (q dq - k dk)_s. Rounding would add up along the sequence, so the sum
// starts again at every border of 64 tokens with what it is there, rowsum(S (*) G): the sweep of dq leaves the states S
// at borders. For ADDITIVE the sweep of dk makes the adjoint of the logits instead, k_t (dk_t - y_t), from the sums
// y_t = q_t dq_t + a_{t+1} y_{t+1}.

#include "decay_channel.cuh"

namespace fulgur {

constexpr int RING = 4, BORDER = 64; // chunks on their way or in use, tokens between borders

// What is done for the adjoint of the gates.
struct Gates {
    // States at borders, [segments, `borders`, H, D, E]: dq writes them and dk reads them, or null.
    bf16 *states;
    int borders;
    // What dk needs for the adjoint of the gates: k, or logits if ADDITIVE; dq; and y, which is dense.
    Rows<bf16> key, d_query;
    const float *sums;
    // Adjoint of log-decays [B, N, H, D].
    float *d_log;
};

template <int E, int WARPS> struct ValuesShared {
    static constexpr int D = WARPS * 16, ROWS = FEW * E * 2, VALUES = FEW * D * 2;
    static constexpr int READ = 0, WRITE = ROWS, VALUE = 2 * ROWS, KEY = VALUE + VALUES, QUERY = KEY + VALUES;
    static constexpr int GATE = QUERY + VALUES, SUMS = GATE + Floats<D>::BYTES;
    static constexpr int STAGE = (SUMS + Floats<D>::BYTES + 127) / 128 * 128;
    static constexpr int SCRATCH = RING * STAGE, TILES = LEVELS + 1;
    static constexpr int BYTES = SCRATCH + WARPS * TILES * SmallTile::BYTES;
};

template <int E, int WARPS, bool ADDITIVE, bool REVERSE>
__device__ __forceinline__ void values(const Sweep<bf16> &job, const Gates &gates) {
    using Shared = ValuesShared<E, WARPS>;
    constexpr int THREADS = WARPS * 32, D = WARPS * 16, ET = E / 8, HALVES = 2, CHANNELS = 4;
    extern __shared__ __align__(1024) uint8_t shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, own = warp * 16;
    const Place place((job.e + D - 1) / D, job.heads);
    const Segment segment = job.cut.at(place.segment);
    const int h = place.head, n = segment.count, first_column = place.tile * D;
    const int columns = min(D, job.e - first_column), chunks = (n + FEW - 1) / FEW;
    const uint32_t base = shared_address(shared);
    auto stage = [&](int at) { return base + at % RING * Shared::STAGE; };
    auto floats = [&](int at, int part) { return reinterpret_cast<const float *>(shared + at % RING * Shared::STAGE + part); };
    auto scratch = [&](int tile) { return SmallTile{base + Shared::SCRATCH + (warp * Shared::TILES + tile) * SmallTile::BYTES}; };
    const bool want_gates = REVERSE && (ADDITIVE || gates.states);

    auto origin = [&](const Rows<bf16> &rows) {
        return rows.data + segment.batch * rows.batch + segment.start * rows.token + h * rows.head;
    };
    const bf16 *read = origin(job.read), *write = origin(job.write), *value = origin(job.value) + first_column;
    const bf16 *key = want_gates ? origin(gates.key) + first_column : nullptr,
               *d_query = want_gates && !ADDITIVE ? origin(gates.d_query) + first_column : nullptr;
    bf16 *out = origin(job.out) + first_column;
    // Rows of dense floats [B, N, H, D].
    const int64_t dense_token = (int64_t)job.heads * job.e;
    const int64_t dense = ((int64_t)segment.batch * job.cut.tokens + segment.start) * dense_token + (int64_t)h * job.e + first_column;
    auto begin = [&](int at) { return (REVERSE ? chunks - 1 - at : at) * FEW; };

    // The state of the warp's channels: s[j] holds channels g and g + 8, columns 8 j + 2 t, + 1.
    float s[ET][4];
    const int64_t matrix = (int64_t)(place.segment * job.heads + h) * job.state_size;
#pragma unroll
    for (int j = 0; j < ET; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int channel = own + g + (i >> 1) * 8, column = j * 8 + t * 2 + (i & 1);
            const bool live = job.enter && column < job.d && channel < columns;
            s[j][i] = live ? job.enter[matrix + column * job.state_row + (first_column + channel) * job.state_column] : 0.0f;
        }

    auto fetch = [&](int at) {
        if (at < chunks) {
            const int from = begin(at), count = min(FEW, n - from);
            const uint32_t to = stage(at);
            start_rows<FEW, E, THREADS>(Tile<E>{to + Shared::READ}, read + from * job.read.token, job.read.token, count, job.d);
            start_rows<FEW, E, THREADS>(Tile<E>{to + Shared::WRITE}, write + from * job.write.token, job.write.token, count, job.d);
            start_rows<FEW, D, THREADS>(Tile<D>{to + Shared::VALUE}, value + from * job.value.token, job.value.token, count, columns);
            start_gates<D, THREADS, ADDITIVE>(to + Shared::GATE, job, place, segment, from, count, first_column, columns, job.e);
            if (want_gates) {
                start_rows<FEW, D, THREADS>(Tile<D>{to + Shared::KEY}, key + from * gates.key.token, gates.key.token, count, columns);
                if (ADDITIVE)
                    start_floats<D, THREADS>(to + Shared::SUMS, gates.sums + dense + from * dense_token, nullptr, dense_token, count, columns);
                else
                    start_rows<FEW, D, THREADS>(Tile<D>{to + Shared::QUERY}, d_query + from * gates.d_query.token,
                                                gates.d_query.token, count, columns);
            }
        }
        end_copies();
    };

    // What a lane holds of 16 tokens by 16 channels: tokens g and g + 8, channels 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t.
    struct Piece {
        float x[HALVES][CHANNELS];
    };
    auto piece_of_rows = [&](Tile<D> tile) {
        Piece piece;
#pragma unroll
        for (int half = 0; half < HALVES; half++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const uint32_t pair = load4(tile.pair(8 * half, own + 8 * c, lane));
                piece.x[half][2 * c] = first_of(pair), piece.x[half][2 * c + 1] = second_of(pair);
            }
        return piece;
    };
    auto piece_of_floats = [&](const float *rows, int first, int last) {
        Piece piece;
#pragma unroll
        for (int half = 0; half < HALVES; half++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const float2 x = *reinterpret_cast<const float2 *>(
                    rows + min(first + g + 8 * half, last) * Floats<D>::ROW + own + 8 * c + 2 * t);
                piece.x[half][2 * c] = x.x, piece.x[half][2 * c + 1] = x.y;
            }
        return piece;
    };
    auto store_piece = [&](SmallTile tile, const Piece &piece) {
#pragma unroll
        for (int half = 0; half < HALVES; half++)
#pragma unroll
            for (int c = 0; c < 2; c++)
                store4(tile.at(g + 8 * half, 8 * c + 2 * t), pack(piece.x[half][2 * c], piece.x[half][2 * c + 1]));
    };
    auto store_rows = [&](Tile<D> tile, const Piece &piece) {
#pragma unroll
        for (int half = 0; half < HALVES; half++)
#pragma unroll
            for (int c = 0; c < 2; c++)
                store4(tile.pair(8 * half, own + 8 * c, lane), pack(piece.x[half][2 * c], piece.x[half][2 * c + 1]));
    };
    auto each = [&](auto work) {
        Piece piece;
#pragma unroll
        for (int half = 0; half < HALVES; half++)
#pragma unroll
            for (int c = 0; c < CHANNELS; c++) piece.x[half][c] = work(half, c);
        return piece;
    };
    // Of the 8 tokens of a half: the value of token `from`.
    auto of_token = [&](float x, int from) { return __shfl_sync(~0u, x, from * 4 + t); };

    float carry[CHANNELS] = {};
    // Pairs (g, 2 t) and (g, 2 t + 1) of a level, as a mask of a pair of bf16.
    auto mask_of = [&](int level) {
        auto bit = [&](int i, int j) {
            const bool side = REVERSE ? i < j : i > j;
            return level == LEVELS ? i == j : side && 31 - __clz(i ^ j) == level;
        };
        return (bit(g, 2 * t) ? 0x0000ffffu : 0u) | (bit(g, 2 * t + 1) ? 0xffff0000u : 0u);
    };
    const uint32_t masks[LEVELS] = {mask_of(0), mask_of(1), mask_of(2), mask_of(LEVELS)};

    auto advance = [&](int at) {
        const uint32_t to = stage(at);
        const Tile<E> reads{to + Shared::READ}, writes{to + Shared::WRITE};
        const Tile<D> value_rows{to + Shared::VALUE};
        const int from = begin(at), count = min(FEW, n - from);

        // Sums of log-decays up to each token.
        Piece b = piece_of_floats(floats(at, Shared::GATE), 1, ADDITIVE ? count : FEW);
        const Piece z = b; // if ADDITIVE
        float middle[CHANNELS], whole[CHANNELS];
        if (ADDITIVE) {
            const float *before = floats(at, Shared::GATE) + own + 2 * t;
            const float2 x = *reinterpret_cast<const float2 *>(before), y = *reinterpret_cast<const float2 *>(before + 8);
            const float start[CHANNELS] = {x.x, x.y, y.x, y.y};
            b = each([&](int half, int c) {
                const float lowest = of_token(z.x[1][c], 7) - LOWEST;
                return (fmaxf(start[c], lowest) - fmaxf(z.x[half][c], lowest)) * LOG2E;
            });
        } else {
            b = each([&](int half, int c) {
                float sum = log2_decay(b.x[half][c]);
#pragma unroll
                for (int step = 1; step < 8; step *= 2) {
                    const float before = __shfl_up_sync(~0u, sum, 4 * step);
                    sum += g >= step ? before : 0.0f;
                }
                return sum;
            });
#pragma unroll
            for (int c = 0; c < CHANNELS; c++) b.x[1][c] += of_token(b.x[0][c], 7);
        }
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) middle[c] = of_token(b.x[0][c], 7), whole[c] = of_token(b.x[1][c], 7);

        // Rows of values, scaled for every level and for the state.
        Piece x = piece_of_rows(value_rows);
        auto key_of = [&](const Piece &logit) {
            return each([&](int half, int c) {
                const float k = power_of_two((logit.x[half][c] - z.x[half][c]) * LOG2E);
                return g + 8 * half < count ? k : 0.0f;
            });
        };
        if (ADDITIVE && !REVERSE) {
            x = key_of(x);
            store_rows(value_rows, x);
        }
        Piece level[LEVELS];
#pragma unroll
        for (int l = 0; l < LEVELS; l++) {
            level[l] = each([&](int half, int c) {
                const int mid = l == 2 ? 3 : l == 1 ? (g & 4) + 1 : g & 6;
                const float at_mid = l == 3 ? middle[c] : of_token(b.x[half][c], mid);
                const bool upper = l == 3 ? half == 1 : g >> l & 1;
                return power_of_two(upper ? b.x[half][c] - at_mid : at_mid - b.x[half][c]);
            });
            store_piece(scratch(l), each([&](int half, int c) { return x.x[half][c] * level[l].x[half][c]; }));
        }
        const Piece start = each([&](int half, int c) { return power_of_two(b.x[half][c]); });
        const Piece end = each([&](int half, int c) { return power_of_two(whole[c] - b.x[half][c]); });
        store_piece(scratch(LEVELS), each([&](int half, int c) { return x.x[half][c] * (REVERSE ? start : end).x[half][c]; }));
        __syncwarp();

        // Products of rows read with the state and with rows written.
        float o[2][4] = {}, pairs[2][4] = {};
#pragma unroll
        for (int c = 0; c < E / 16; c++) {
            uint32_t a[4], w[4];
            load_matrices(a, reads.block(0, c * 16, lane));
            load_matrices(w, writes.block(0, c * 16, lane));
            multiply(pairs[0], a, w[0], w[2]);
            multiply(pairs[1], a, w[1], w[3]);
            multiply(o[0], a, pack(s[2 * c][0], s[2 * c][1]), pack(s[2 * c + 1][0], s[2 * c + 1][1]));
            multiply(o[1], a, pack(s[2 * c][2], s[2 * c][3]), pack(s[2 * c + 1][2], s[2 * c + 1][3]));
        }
        auto of_product = [&](const float(&product)[2][4]) {
            return each([&](int half, int c) { return product[c >> 1][half * 2 + (c & 1)]; });
        };
        Piece sum = of_product(o);
        sum = each([&](int half, int c) { return sum.x[half][c] * (REVERSE ? end : start).x[half][c]; });
        const uint32_t p[4] = {pack(pairs[0][0], pairs[0][1]), pack(pairs[0][2], pairs[0][3]), pack(pairs[1][0], pairs[1][1]),
                               pack(pairs[1][2], pairs[1][3])};
#pragma unroll
        for (int l = 0; l <= LEVELS; l++) {
            uint32_t w[4];
            load_transposed(w, l == LEVELS ? value_rows.block(0, own, lane) : scratch(l).block(lane));
            // The highest level is one of the off-diagonal blocks of 8 x 8, the others lie in the diagonal ones.
            const uint32_t mask = masks[l == LEVELS ? 3 : l == 3 ? 0 : l];
            const uint32_t a[4] = {l == 3 ? 0 : p[0] & mask, l == 3 && !REVERSE ? p[1] : 0, l == 3 && REVERSE ? p[2] : 0,
                                   l == 3 ? 0 : p[3] & mask};
            float product[2][4] = {};
            multiply(product[0], a, w[0], w[1]);
            multiply(product[1], a, w[2], w[3]);
            const Piece found = of_product(product);
            sum = each([&](int half, int c) {
                return l == LEVELS ? sum.x[half][c] + found.x[half][c]
                                   : fmaf(found.x[half][c], level[l].x[half][c], sum.x[half][c]);
            });
        }

        if (REVERSE && !ADDITIVE && gates.states) {
            const bool border = at == 0 || (from + FEW) % BORDER == 0;
            if (border) {
                const int64_t row = ((int64_t)(place.segment * gates.borders + from / BORDER) * job.heads + h) * job.state_size;
                float total[2] = {};
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int channel = own + g + 8 * half;
#pragma unroll
                    for (int j = 0; j < ET; j++) {
                        const int column = j * 8 + t * 2;
                        uint32_t pair = 0;
                        if (channel < columns && column < job.d)
                            pair = *reinterpret_cast<const uint32_t *>(gates.states + row + (int64_t)(first_column + channel) * job.d + column);
                        total[half] += first_of(pair) * s[j][2 * half] + second_of(pair) * s[j][2 * half + 1];
                    }
                    total[half] += __shfl_xor_sync(~0u, total[half], 1);
                    total[half] += __shfl_xor_sync(~0u, total[half], 2);
                }
#pragma unroll
                for (int c = 0; c < CHANNELS; c++) carry[c] = __shfl_sync(~0u, total[c >> 1], (2 * t + (c & 1)) * 4);
            }
            const Piece k = piece_of_rows(Tile<D>{to + Shared::KEY}), dq = piece_of_rows(Tile<D>{to + Shared::QUERY});
            Piece terms = each([&](int half, int c) {
                float term = x.x[half][c] * dq.x[half][c] - k.x[half][c] * sum.x[half][c];
#pragma unroll
                for (int step = 1; step < 8; step *= 2) {
                    const float after = __shfl_down_sync(~0u, term, 4 * step);
                    term += g + step < 8 ? after : 0.0f;
                }
                return term;
            });
#pragma unroll
            for (int c = 0; c < CHANNELS; c++) {
                terms.x[1][c] += carry[c];
                terms.x[0][c] += of_token(terms.x[1][c], 0);
                carry[c] = of_token(terms.x[0][c], 0);
            }
#pragma unroll
            for (int half = 0; half < HALVES; half++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int token = g + 8 * half, column = own + 8 * c + 2 * t;
                    if (token < count && column < columns)
                        *reinterpret_cast<float2 *>(gates.d_log + dense + (from + token) * dense_token + column) =
                            make_float2(terms.x[half][2 * c], terms.x[half][2 * c + 1]);
                }
        }
        if (REVERSE && ADDITIVE) {
            const Piece k = key_of(piece_of_rows(Tile<D>{to + Shared::KEY}));
            const Piece y = piece_of_floats(floats(at, Shared::SUMS), 1, FEW);
            sum = each([&](int half, int c) { return k.x[half][c] * (sum.x[half][c] - y.x[half][c]); });
        }

        // The warp's columns of the tile of values belong to it alone: the output goes out through them.
        __syncwarp();
        store_rows(value_rows, sum);
        __syncwarp();
        {
            const int column = own + Tile<D>::piece_column(lane), token = Tile<D>::piece_row(lane);
            const uint4 row = load16(value_rows.piece(0, own, lane));
            if (token < count && column < columns)
                *reinterpret_cast<uint4 *>(out + (from + token) * job.out.token + column) = row;
        }

        // The state.
        float fade[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float even = __shfl_sync(~0u, whole[2 * half], g >> 1), odd = __shfl_sync(~0u, whole[2 * half + 1], g >> 1);
            fade[half] = power_of_two(g & 1 ? odd : even);
        }
        uint32_t u[4];
        load_transposed(u, scratch(LEVELS).block(lane));
        const uint32_t a[4] = {u[0], u[2], u[1], u[3]};
#pragma unroll
        for (int j = 0; j < E / 16; j++) {
            uint32_t w[4];
            load_transposed(w, writes.block(0, j * 16, lane));
#pragma unroll
            for (int i = 0; i < 4; i++) s[2 * j][i] *= fade[i >> 1], s[2 * j + 1][i] *= fade[i >> 1];
            multiply(s[2 * j], a, w[0], w[1]);
            multiply(s[2 * j + 1], a, w[2], w[3]);
        }
        if (!REVERSE && gates.states && (at == chunks - 1 || (from + FEW) % BORDER == 0)) {
            const int64_t row = ((int64_t)(place.segment * gates.borders + from / BORDER) * job.heads + h) * job.state_size;
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int j = 0; j < ET; j++) {
                    const int channel = own + g + 8 * half, column = j * 8 + t * 2;
                    if (channel < columns && column < job.d)
                        *reinterpret_cast<uint32_t *>(gates.states + row + (int64_t)(first_column + channel) * job.d + column) =
                            pack(s[j][2 * half], s[j][2 * half + 1]);
                }
        }
        __syncwarp(); // the scratch tiles are read
    };

    fetch(0);
    fetch(1);
    fetch(2);
    for (int at = 0; at < chunks; at++) {
        wait_copies<2>();
        __syncthreads(); // chunk `at` is there, and nobody needs the stage of at - 1 any more
        fetch(at + 3);
        advance(at);
    }

    if (job.leave)
#pragma unroll
        for (int j = 0; j < ET; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int channel = own + g + (i >> 1) * 8, column = j * 8 + t * 2 + (i & 1);
                if (column < job.d && channel < columns)
                    job.leave[matrix + column * job.state_row + (first_column + channel) * job.state_column] = s[j][i];
            }
}

} // namespace fulgur

#define VALUES(E, WARPS)                                                                                               \
    VALUES_OF(E, WARPS, decay, false, forward, false)                                                                  \
    VALUES_OF(E, WARPS, decay, false, reverse, true)                                                                   \
    VALUES_OF(E, WARPS, additive, true, forward, false)                                                                \
    VALUES_OF(E, WARPS, additive, true, reverse, true)
#define VALUES_OF(E, WARPS, GATE, ADDITIVE, NAME, REVERSE)                                                             \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 8 / WARPS) decay_values_##GATE##_d##E##_w##WARPS##_##NAME( \
        const __grid_constant__ fulgur::Sweep<fulgur::bf16> job, const __grid_constant__ fulgur::Gates gates) {        \
        fulgur::values<E, WARPS, ADDITIVE, REVERSE>(job, gates);                                                       \
    }

VALUES(64, 4)
VALUES(64, 8)
VALUES(128, 4)
VALUES(128, 8)
