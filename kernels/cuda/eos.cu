// The element-wise scan of src/eos: m_t = o_t (*) m_{t-1} + e_t i_t^T, y_t = m_t^T s_t, with a gate for every element of the
// memory K x D, given by its logarithm.
//
// A block takes one segment of tokens of one head and a tile of 8, 16 or 32 columns of the memory. A thread holds R rows of one
// column in registers; nothing but sums over rows (y, di) and columns (de, ds) leaves it, through shared memory once for
// every CHUNK tokens. The rows e, i, s, dy of the next chunk are on their way while one is computed; gates go straight to
// registers, a burst of 32 ahead for each thread (16 where it has one row), in either element type and with any strides.
//
// The reverse sweep starts every chunk from a memory that the forward sweep left at its border, goes through the chunk once
// to find the memories at the borders of its bursts, then through its bursts from the last to the first: forward, with all
// memories in registers, and back.
//
// Traffic in bytes for an element of B N H K D, where gates of G bytes are full:
//   forward   G, and 4 / CHUNK for the memories at borders where a backward pass will want them
//   reverse   2 G (gates and their adjoint) and 4 / CHUNK; all gates but those of a chunk's last burst are read once more, while
//             they are likely to lie in the L2 cache
//   local     G, only where a sequence is cut or exchanged
// The rest, and all there is where gates are alike along K or D, is a row of K or D elements for each operand, token and
// head; e and s, and the f32 parts of de and ds, once for each tile of columns. Limit: memory bandwidth where gates are full,
// else the issue of about 15 (forward) and 40 (reverse) instructions an element.

#include "common.cuh"
#include "decay.cuh"
#include "mma.cuh"

namespace fulgur {

// Most threads of a block, tokens of a chunk, most columns of a tile, and floats of a thread for sums over rows: an odd number,
// so that neighbouring threads meet different banks.
constexpr int THREADS = 256, CHUNK = 16, TILE = 32, PARTIAL = CHUNK + 1;

// What the adjoint of gates is summed over inside of the reverse sweep.
enum Adjoint {
    UNWANTED,
    ELEMENTS, // nothing: [B, N, H, K, D]
    COLUMNS,  // columns of a tile: [tiles, B, N, H, K]
    ROWS,     // rows: [B, N, H, D]
    TOKENS,   // tokens of a segment: [segments, H, K, D]
};

// Gates anywhere: bytes between neighbours along each axis, zero where they are alike.
struct Gates {
    const uint8_t *data;
    int64_t batch, head, column;
    int token, row, half; // half: bf16, else f32
};

// A sweep. Memories are [segments, H, K, D] in f32; those that enter are zeros where null, others that are null are unwanted.
template <typename T> struct Scan {
    // Rows that are written into the memory and those that read it; dy of a reverse sweep.
    Rows<const T> expand, input, shrink, d_output;
    Gates gates;
    const float *enter;
    float *leave, *totals; // totals: sums of log-gates over each segment
    float *borders;        // a memory for every CHUNK tokens: written forward, read in reverse
    T *output, *d_input;   // [B, N, H, D]
    float *d_expand, *d_shrink; // [tiles, B, N, H, K]
    void *d_log;
    Cut cut;
    int adjoint, d_log_half;
    int64_t rows; // B N H
    int heads, k, d, columns;
    int vector; // rows may be copied in pieces of 16 bytes
};

// Tokens whose gates a thread has in registers, and floats of a thread for the memories at their borders, an odd number.
template <int R> struct Sizes {
    static constexpr int BURST = R == 1 ? CHUNK : CHUNK / 4, BURSTS = CHUNK / BURST, OWN = BURSTS * R | 1;
    static_assert(R == 1 || R == 8, "sums over columns take eight values of neighbouring rows or tokens");
};

__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void put(float *at, float x) { *at = x; }
__device__ __forceinline__ void put(bf16 *at, float x) { *at = __float2bfloat16(x); }

// Neighbouring elements of shared memory, a multiple of R from an aligned start.
template <int R, typename T> __device__ __forceinline__ void read_rows(const T *from, float (&v)[R]) {
    if constexpr (R == 1) {
        v[0] = as_float(*from);
    } else {
#pragma unroll
        for (int i = 0; i < R; i += 4) {
            float four[4];
            load<4>(from + i, four);
#pragma unroll
            for (int j = 0; j < 4; j++) v[i + j] = four[j];
        }
    }
}

// Raw gates of the R rows of a thread: the bits of a float, or those of a bf16 in the lower half, so that nothing waits for
// a gate before it is used. Zeros for rows, columns and tokens that are not there.
template <int R> struct GateReader {
    const uint8_t *from;
    int token, row, tokens, rows, shift;

    template <typename G> __device__ __forceinline__ void read_as(int index, uint32_t (&raw)[R]) const {
        const uint8_t *at = from + (int64_t)index * token;
        const bool inside = (unsigned)index < (unsigned)tokens;
        if (inside && rows == R) {
#pragma unroll
            for (int r = 0; r < R; r++) raw[r] = *reinterpret_cast<const G *>(at + (int64_t)r * row);
        } else {
#pragma unroll
            for (int r = 0; r < R; r++) raw[r] = inside && r < rows ? *reinterpret_cast<const G *>(at + (int64_t)r * row) : 0;
        }
    }
    __device__ __forceinline__ void read(int index, uint32_t (&raw)[R]) const {
        if (shift) read_as<uint16_t>(index, raw);
        else read_as<uint32_t>(index, raw);
    }
    __device__ __forceinline__ float log(uint32_t raw) const { return __uint_as_float(raw << shift); }
};

// Where a thread works.
template <typename T, int R> struct Spot {
    const Scan<T> &job;
    int tile, head, segment_index, first_column, column, group, padded, rows;
    Segment segment;

    __device__ __forceinline__ Spot(const Scan<T> &job) : job(job) {
        const Place place((job.d + job.columns - 1) / job.columns, job.heads);
        tile = place.tile, head = place.head, segment_index = place.segment;
        segment = job.cut.at(segment_index);
        first_column = tile * job.columns;
        column = threadIdx.x & (job.columns - 1), group = threadIdx.x / job.columns;
        padded = blockDim.x / job.columns * R;
        rows = first_column + column < job.d ? max(0, min(R, job.k - group * R)) : 0;
    }
    __device__ __forceinline__ int chunks() const { return (segment.count + CHUNK - 1) / CHUNK; }

    // Row of a token of the segment in [B, N, H].
    __device__ __forceinline__ int64_t row(int token) const {
        return ((int64_t)segment.batch * job.cut.tokens + segment.start + token) * job.heads + head;
    }
    __device__ __forceinline__ const T *origin(const Rows<const T> &rows) const {
        return rows.data + segment.batch * rows.batch + segment.start * rows.token + head * rows.head;
    }
    // First of the thread's elements in a memory; they are job.d apart.
    __device__ __forceinline__ int64_t element(int64_t memory) const {
        return ((memory * job.heads + head) * job.k + group * R) * job.d + first_column + column;
    }
    __device__ __forceinline__ void load_memory(const float *memories, int64_t memory, float (&m)[R]) const {
        const float *from = memories + element(memory);
#pragma unroll
        for (int r = 0; r < R; r++) m[r] = r < rows ? from[(int64_t)r * job.d] : 0.0f;
    }
    __device__ __forceinline__ void store_memory(float *memories, int64_t memory, const float (&m)[R]) const {
        float *to = memories + element(memory);
#pragma unroll
        for (int r = 0; r < R; r++)
            if (r < rows) to[(int64_t)r * job.d] = m[r];
    }
    __device__ __forceinline__ void enter(float (&m)[R]) const {
#pragma unroll
        for (int r = 0; r < R; r++) m[r] = 0.0f;
        if (job.enter) load_memory(job.enter, segment_index, m);
    }
    // Memory at the border before a chunk. Segments that begin or end inside of a chunk have borders of their own: the sum of
    // quotients that are rounded up is at most the rounded sum and one for each.
    __device__ __forceinline__ int64_t border(int chunk) const {
        return ((int64_t)segment.batch * job.cut.tokens + segment.start) / CHUNK + segment_index + chunk;
    }
    __device__ __forceinline__ GateReader<R> gates() const {
        const Gates &g = job.gates;
        return {g.data + segment.batch * g.batch + (int64_t)segment.start * g.token + head * g.head + (int64_t)group * R * g.row +
                    (first_column + column) * g.column,
                g.token, g.row, segment.count, rows, g.half ? 16 : 0};
    }

    // Starts to copy rows of a chunk, `live` elements each, into rows of `width`; what is not there becomes zeros.
    __device__ __forceinline__ void stage(T *to, const T *from, int64_t stride, int tokens, int live, int width) const {
        if (job.vector) {
            constexpr int EACH = 16 / sizeof(T);
            const int pieces = width / EACH;
            for (int item = threadIdx.x; item < CHUNK * pieces; item += blockDim.x) {
                const int token = item / pieces, at = item % pieces * EACH;
                const bool inside = token < tokens && at < live;
                copy16(shared_address(to + token * width + at), inside ? from + token * stride + at : from, inside);
            }
        } else {
            for (int item = threadIdx.x; item < CHUNK * width; item += blockDim.x) {
                const int token = item / width, at = item % width;
                put(to + item, token < tokens && at < live ? as_float(from[token * stride + at]) : 0.0f);
            }
        }
    }
    __device__ __forceinline__ void stage_keys(T *to, const Rows<const T> &rows, int chunk) const {
        stage(to, origin(rows) + (int64_t)chunk * CHUNK * rows.token, rows.token, segment.count - chunk * CHUNK, job.k, padded);
    }
    __device__ __forceinline__ void stage_values(T *to, const Rows<const T> &rows, int chunk) const {
        stage(to, origin(rows) + (int64_t)chunk * CHUNK * rows.token + first_column, rows.token, segment.count - chunk * CHUNK,
              min(job.columns, job.d - first_column), TILE);
    }

    // What each group of rows adds to the columns of a chunk's tokens, [threads][PARTIAL].
    template <typename O> __device__ __forceinline__ void sum_partials(const float *partial, O *out, int chunk) const {
        const int shift = __ffs(job.columns) - 1, groups = blockDim.x >> shift;
        for (int item = threadIdx.x; item < CHUNK * job.columns; item += blockDim.x) {
            const int token = item >> shift, c = item & (job.columns - 1);
            if (chunk * CHUNK + token >= segment.count || first_column + c >= job.d) continue;
            const float *from = partial + c * PARTIAL + token;
            float sum = 0.0f;
            for (int i = 0; i < groups; i++) sum += from[(i << shift) * PARTIAL];
            put(out + row(chunk * CHUNK + token) * job.d + first_column + c, sum);
        }
    }
    // The sums over this tile's columns of a chunk's tokens, [CHUNK][padded].
    __device__ __forceinline__ void store_sums(const float *sums, float *out, int chunk) const {
        for (int item = threadIdx.x; item < CHUNK * job.k; item += blockDim.x) {
            const int token = item / job.k, k = item % job.k;
            if (chunk * CHUNK + token >= segment.count) continue;
            out[(tile * job.rows + row(chunk * CHUNK + token)) * job.k + k] = sums[token * padded + k];
        }
    }
    // Sums eight values over the columns of a tile and puts them where `store_sums` looks: neighbouring rows, or neighbouring
    // tokens where a thread has one row, the first of them `flat` = token R + row of the chunk.
    __device__ __forceinline__ void put_sums(const float (&v)[8], int flat, float *sums) const {
        float four[4], two[2];
        const bool bit4 = threadIdx.x & 4, bit2 = threadIdx.x & 2, bit1 = threadIdx.x & 1;
#pragma unroll
        for (int i = 0; i < 4; i++)
            four[i] = (bit4 ? v[i + 4] : v[i]) + __shfl_xor_sync(~0u, bit4 ? v[i] : v[i + 4], 4);
#pragma unroll
        for (int i = 0; i < 2; i++)
            two[i] = (bit2 ? four[i + 2] : four[i]) + __shfl_xor_sync(~0u, bit2 ? four[i] : four[i + 2], 2);
        float sum = (bit1 ? two[1] : two[0]) + __shfl_xor_sync(~0u, bit1 ? two[0] : two[1], 1);
        if (job.columns >= 16) sum += __shfl_xor_sync(~0u, sum, 8);
        if (job.columns >= 32) sum += __shfl_xor_sync(~0u, sum, 16);
        if (column < 8) {
            const int at = flat + column;
            sums[at / R * padded + group * R + at % R] = sum;
        }
    }
};

// Outputs, the memories that leave segments, and those at borders.
template <typename T, int R> __device__ __forceinline__ void forward(const Scan<T> &job) {
    constexpr int BURST = Sizes<R>::BURST, BURSTS = Sizes<R>::BURSTS;
    extern __shared__ __align__(16) uint8_t shared[];
    const Spot<T, R> spot(job);
    const int keys = CHUNK * spot.padded, values = CHUNK * TILE, stage = 2 * keys + values;
    T *const stages = reinterpret_cast<T *>(shared);
    float *const partial = reinterpret_cast<float *>(stages + 2 * stage), *const own_partial = partial + threadIdx.x * PARTIAL;
    const int chunks = spot.chunks();

    auto fetch = [&](int at) {
        if (at < chunks) {
            T *to = stages + (at & 1) * stage;
            spot.stage_keys(to, job.expand, at);
            if (job.output) spot.stage_keys(to + keys, job.shrink, at);
            spot.stage_values(to + 2 * keys, job.input, at);
        }
        end_copies();
    };

    float m[R];
    spot.enter(m);
    const GateReader<R> gates = spot.gates();
    uint32_t raw[BURST][R];
#pragma unroll
    for (int t = 0; t < BURST; t++) gates.read(t, raw[t]);
    fetch(0);
    for (int at = 0; at < chunks; at++) {
        fetch(at + 1);
        if (job.borders) spot.store_memory(job.borders, spot.border(at), m);
        wait_copies<1>();
        __syncthreads();
        const T *keys_here = stages + (at & 1) * stage + spot.group * R;
        const T *values_here = stages + (at & 1) * stage + 2 * keys + spot.column;
#pragma unroll 1
        for (int b = 0; b < BURSTS; b++) {
#pragma unroll
            for (int t = 0; t < BURST; t++) {
                const int token = b * BURST + t;
                float e[R];
                read_rows(keys_here + token * spot.padded, e);
                const float i = as_float(values_here[token * TILE]);
#pragma unroll
                for (int r = 0; r < R; r++) m[r] = power_of_two(gates.log(raw[t][r]) * LOG2E) * m[r] + e[r] * i;
                gates.read(at * CHUNK + token + BURST, raw[t]);
                if (job.output) {
                    float s[R], y = 0.0f;
                    read_rows(keys_here + keys + token * spot.padded, s);
#pragma unroll
                    for (int r = 0; r < R; r++) y += s[r] * m[r];
                    own_partial[token] = y;
                }
            }
        }
        __syncthreads();
        if (job.output) spot.sum_partials(partial, job.output, at);
    }
    if (job.leave) spot.store_memory(job.leave, spot.segment_index, m);
}

// What a segment alone adds to the memory behind it, or, REVERSE, with shrink and dy in the places of expand and input, to
// its adjoint before it; and the sums of its log-gates.
template <typename T, int R, bool REVERSE> __device__ __forceinline__ void local(const Scan<T> &job) {
    constexpr int BURST = Sizes<R>::BURST, BURSTS = Sizes<R>::BURSTS;
    extern __shared__ __align__(16) uint8_t shared[];
    const Spot<T, R> spot(job);
    const int keys = CHUNK * spot.padded, stage = keys + CHUNK * TILE;
    T *const stages = reinterpret_cast<T *>(shared);
    const int chunks = spot.chunks();
    // The sweep's chunk number `at`, and the sweep's token number `token`, among those of the segment.
    auto chunk = [&](int at) { return REVERSE ? chunks - 1 - at : at; };
    auto place = [&](int token) { return REVERSE ? chunks * CHUNK - 1 - token : token; };
    auto fetch = [&](int at) {
        if (at < chunks) {
            T *to = stages + (at & 1) * stage;
            spot.stage_keys(to, job.expand, chunk(at));
            spot.stage_values(to + keys, job.input, chunk(at));
        }
        end_copies();
    };

    float m[R] = {}, total[R] = {};
    const GateReader<R> gates = spot.gates();
    uint32_t raw[BURST][R];
#pragma unroll
    for (int t = 0; t < BURST; t++) gates.read(place(t), raw[t]);
    fetch(0);
    for (int at = 0; at < chunks; at++) {
        fetch(at + 1);
        wait_copies<1>();
        __syncthreads();
        const T *keys_here = stages + (at & 1) * stage + spot.group * R;
        const T *values_here = stages + (at & 1) * stage + keys + spot.column;
#pragma unroll 1
        for (int b = 0; b < BURSTS; b++) {
#pragma unroll
            for (int t = 0; t < BURST; t++) {
                const int step = b * BURST + t, token = REVERSE ? CHUNK - 1 - step : step;
                float e[R];
                read_rows(keys_here + token * spot.padded, e);
                const float i = as_float(values_here[token * TILE]);
#pragma unroll
                for (int r = 0; r < R; r++) {
                    const float log = gates.log(raw[t][r]), gate = power_of_two(log * LOG2E);
                    total[r] += log;
                    m[r] = REVERSE ? gate * (m[r] + e[r] * i) : gate * m[r] + e[r] * i;
                }
                gates.read(place(at * CHUNK + step + BURST), raw[t]);
            }
        }
        __syncthreads();
    }
    spot.store_memory(job.leave, spot.segment_index, m);
    spot.store_memory(job.totals, spot.segment_index, total);
}

// All adjoints, from those of the memories behind segments, which enter; those of the memories before them leave.
template <typename T, int R> __device__ __forceinline__ void backward(const Scan<T> &job) {
    constexpr int BURST = Sizes<R>::BURST, BURSTS = Sizes<R>::BURSTS;
    extern __shared__ __align__(16) uint8_t shared[];
    const Spot<T, R> spot(job);
    const int keys = CHUNK * spot.padded, values = CHUNK * TILE, stage = 2 * (keys + values);
    T *const stages = reinterpret_cast<T *>(shared);
    float *const expand_sums = reinterpret_cast<float *>(stages + 2 * stage), *const shrink_sums = expand_sums + keys;
    float *const partial = shrink_sums + keys, *const own_partial = partial + threadIdx.x * PARTIAL;
    // The thread's memories at the borders of bursts.
    float *const own = partial + blockDim.x * PARTIAL + threadIdx.x * Sizes<R>::OWN;
    // Sums for the adjoint of gates over rows, like `partial`, over columns, like `expand_sums`, or over tokens, the thread's own.
    float *const log_sums = partial + blockDim.x * (PARTIAL + Sizes<R>::OWN);
    float *const own_log_sums = log_sums + threadIdx.x * PARTIAL;
    const int chunks = spot.chunks();

    auto fetch = [&](int at) {
        if (at >= 0) {
            T *to = stages + (at & 1) * stage;
            spot.stage_keys(to, job.expand, at);
            spot.stage_keys(to + keys, job.shrink, at);
            spot.stage_values(to + 2 * keys, job.input, at);
            spot.stage_values(to + 2 * keys + values, job.d_output, at);
        }
        end_copies();
    };

    float dm[R];
    spot.enter(dm);
    if (job.adjoint == TOKENS) {
#pragma unroll
        for (int r = 0; r < R; r++) own_log_sums[r] = 0.0f;
    }
    const int d_log_size = job.d_log_half ? 2 : 4;
    const int d_log_token = job.heads * job.k * job.d * d_log_size;
    uint8_t *const d_log = static_cast<uint8_t *>(job.d_log) +
                           ((spot.row(0) * job.k + spot.group * R) * job.d + spot.first_column + spot.column) * d_log_size;
    const GateReader<R> gates = spot.gates();
    uint32_t raw[BURST][R];
#pragma unroll
    for (int t = 0; t < BURST; t++) gates.read((chunks - 1) * CHUNK + t, raw[t]);
    fetch(chunks - 1);
    for (int at = chunks - 1; at >= 0; at--) {
        fetch(at - 1);
        float m[R];
        spot.load_memory(job.borders, spot.border(at), m);
        wait_copies<1>();
        __syncthreads();
        const int first = at * CHUNK;
        const T *const here = stages + (at & 1) * stage;
        const T *const e_here = here + spot.group * R, *const s_here = e_here + keys;
        const T *const i_here = here + 2 * keys + spot.column, *const dy_here = i_here + values;

#pragma unroll 1
        for (int b = 0;; b++) {
#pragma unroll
            for (int r = 0; r < R; r++) own[b * R + r] = m[r];
            if (b == BURSTS - 1) break;
#pragma unroll
            for (int t = 0; t < BURST; t++) {
                const int token = b * BURST + t;
                float e[R];
                read_rows(e_here + token * spot.padded, e);
                const float i = as_float(i_here[token * TILE]);
#pragma unroll
                for (int r = 0; r < R; r++) m[r] = power_of_two(gates.log(raw[t][r]) * LOG2E) * m[r] + e[r] * i;
                gates.read(first + token + BURST, raw[t]);
            }
        }

#pragma unroll 1
        for (int b = BURSTS - 1; b >= 0; b--) {
#pragma unroll
            for (int r = 0; r < R; r++) m[r] = own[b * R + r];
            // Memories before each token but the first, which is at the border; terms of sums over columns.
            float before[BURST][R], eight[8], d_logs[8];
#pragma unroll
            for (int t = 0; t < BURST; t++) {
                const int token = b * BURST + t;
                float e[R];
                read_rows(e_here + token * spot.padded, e);
                const float i = as_float(i_here[token * TILE]), dy = as_float(dy_here[token * TILE]);
#pragma unroll
                for (int r = 0; r < R; r++) {
                    const float gate = power_of_two(gates.log(raw[t][r]) * LOG2E);
                    raw[t][r] = __float_as_uint(gate);
                    before[t][r] = m[r];
                    m[r] = gate * m[r] + e[r] * i;
                    eight[(t * R + r) % 8] = m[r] * dy;
                }
                if ((t + 1) * R % 8 == 0) spot.put_sums(eight, (token + 1) * R - 8, shrink_sums);
            }
            const int next = b > 0 ? first + (b - 1) * BURST : first - CHUNK;
#pragma unroll
            for (int t = BURST - 1; t >= 0; t--) {
                const int token = b * BURST + t;
                float e[R], s[R], di = 0.0f;
                read_rows(s_here + token * spot.padded, s);
                const float i = as_float(i_here[token * TILE]), dy = as_float(dy_here[token * TILE]);
#pragma unroll
                for (int r = 0; r < R; r++) dm[r] += s[r] * dy;
                read_rows(e_here + token * spot.padded, e);
#pragma unroll
                for (int r = 0; r < R; r++) {
                    di += e[r] * dm[r];
                    eight[(t * R + r) % 8] = dm[r] * i;
                    dm[r] *= __uint_as_float(raw[t][r]);
                    d_logs[(t * R + r) % 8] = dm[r] * (t > 0 ? before[t][r] : own[b * R + r]);
                }
                own_partial[token] = di;
                if (t * R % 8 == 0) spot.put_sums(eight, token * R, expand_sums);
                if (job.adjoint == ELEMENTS) {
                    if (first + token < spot.segment.count) {
                        uint8_t *to = d_log + (int64_t)(first + token) * d_log_token;
#pragma unroll
                        for (int r = 0; r < R; r++) {
                            if (r < spot.rows) {
                                const float x = d_logs[(t * R + r) % 8];
                                if (job.d_log_half) put(reinterpret_cast<bf16 *>(to) + r * job.d, x);
                                else put(reinterpret_cast<float *>(to) + r * job.d, x);
                            }
                        }
                    }
                } else if (job.adjoint == COLUMNS) {
                    if (t * R % 8 == 0) spot.put_sums(d_logs, token * R, log_sums);
                } else if (job.adjoint == ROWS) {
                    float sum = 0.0f;
#pragma unroll
                    for (int r = 0; r < R; r++) sum += d_logs[(t * R + r) % 8];
                    own_log_sums[token] = sum;
                } else if (job.adjoint == TOKENS && first + token < spot.segment.count) {
                    // Behind the last token the memory and its adjoint stay as they are, which is not the share of a token.
#pragma unroll
                    for (int r = 0; r < R; r++) own_log_sums[r] += d_logs[(t * R + r) % 8];
                }
                gates.read(next + t, raw[t]);
            }
        }
        __syncthreads();
        spot.sum_partials(partial, job.d_input, at);
        spot.store_sums(expand_sums, job.d_expand, at);
        spot.store_sums(shrink_sums, job.d_shrink, at);
        if (job.adjoint == COLUMNS) spot.store_sums(log_sums, static_cast<float *>(job.d_log), at);
        if (job.adjoint == ROWS) spot.sum_partials(log_sums, static_cast<float *>(job.d_log), at);
    }
    if (job.leave) spot.store_memory(job.leave, spot.segment_index, dm);
    if (job.adjoint == TOKENS) {
        float sums[R];
#pragma unroll
        for (int r = 0; r < R; r++) sums[r] = own_log_sums[r];
        spot.store_memory(static_cast<float *>(job.d_log), spot.segment_index, sums);
    }
}

// Sums over the middle axis of [outer, count, inner], one thread for each.
template <typename T>
__device__ __forceinline__ void sum(const float *x, T *y, int64_t outer, int64_t count, int64_t inner) {
    const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (index >= outer * inner) return;
    const float *from = x + index / inner * count * inner + index % inner;
    float sum = 0.0f;
    for (int64_t i = 0; i < count; i++) sum += from[i * inner];
    put(y + index, sum);
}

} // namespace fulgur

using namespace fulgur;

// R is 1 where a memory has no more than four rows, and a block then at most 128 threads, else 8.
#define SWEEP(KIND, T, NAME, R, ...)                                                                                   \
    extern "C" __global__ void __launch_bounds__(R == 1 ? 128 : THREADS, R == 1 ? 3 : 2)                               \
        eos_##KIND##_##NAME##_##R(Scan<T> job) {                                                                       \
        __VA_ARGS__(job);                                                                                              \
    }
#define SWEEPS(T, NAME, R)                                                                                             \
    SWEEP(forward, T, NAME, R, forward<T, R>)                                                                          \
    SWEEP(local_forward, T, NAME, R, local<T, R, false>)                                                               \
    SWEEP(local_reverse, T, NAME, R, local<T, R, true>)                                                                \
    SWEEP(backward, T, NAME, R, backward<T, R>)
SWEEPS(float, f32, 1)
SWEEPS(float, f32, 8)
SWEEPS(bf16, bf16, 1)
SWEEPS(bf16, bf16, 8)

extern "C" __global__ void __launch_bounds__(THREADS)
    eos_sum_f32(const float *x, float *y, int64_t outer, int64_t count, int64_t inner) {
    sum(x, y, outer, count, inner);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    eos_sum_bf16(const float *x, bf16 *y, int64_t outer, int64_t count, int64_t inner) {
    sum(x, y, outer, count, inner);
}

// From what each segment adds to the memory, `locals`, to what enters it, in place; `last` is what leaves a sequence. Every
// sequence has `parts` segments, and a memory `size` elements, one for each thread. Reverse goes from the last to the first.
extern "C" __global__ void __launch_bounds__(THREADS)
    eos_join(float *locals, const float *totals, const float *own, float *last, int64_t sequences, int parts, int64_t size,
             int reverse) {
    const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x, sequence = index / size, element = index % size;
    if (sequence >= sequences) return;
    float m = own ? own[index] : 0.0f;
    for (int i = 0; i < parts; i++) {
        const int64_t at = (sequence * parts + (reverse ? parts - 1 - i : i)) * size + element;
        const float local = locals[at];
        locals[at] = m;
        m = expf(totals[at]) * m + local;
    }
    last[index] = m;
}
