// The non-causal additive recurrence with phases on bf16 projections; formulas in src/additive/mod.rs, the form without phases in
// additive_plain.cu.
//
// x [B, N, 2 H D + H E] holds queries (before their SiLU), logits and values of all heads side by side, as one matrix
// product leaves them; nothing is split or copied. Keys and queries are turned into their cosine and sine parts, W = 2 D
// channels, in shared memory only; trig [N, D] holds (cosine, sine).
//
// | kernel            | a block owns                 | reads, writes (bytes a token and head)      |
// |-------------------|------------------------------|---------------------------------------------|
// | additive_state    | one (batch, head), all N     | logits 2 x 2 D (second time from L2), v 2 E |
// | additive_dstate   | the same, of q and dO        | 2 D + 2 E                                   |
// | additive_read     | 64 tokens of a (batch, head) | 2 D, 2 E                                    |
// | additive_backward | 64 tokens, a run of (b, h)   | 4 D + 4 E, 4 D + 2 E                        |
//
// Products run on tensor cores in bf16 with float sums; statistics and states are float. No atomics: the adjoint of the
// phases is summed over the (batch, head) of a run in registers, over runs by rows.cu. Limit: memory bandwidth.
#include "common.cuh"
#include <mma.h>

using namespace nvcuda;
using bf16 = __nv_bfloat16;

constexpr int TOKENS = 64, THREADS = 256, WARPS = THREADS / 32, PAD = 8;

template <int D_, int E_> struct Shape {
    static constexpr int D = D_, E = E_, W = 2 * D_;
    static constexpr int LW = W + PAD, LE = E + PAD, LF = (W > E ? W : E) + 4; // rows in shared memory
    static constexpr int GROUPS = D / 8;                                       // vectors of a token's keys
    static constexpr int ITEMS = TOKENS * GROUPS / THREADS;                    // vectors of a thread in a tile
    static constexpr int REPEATS = THREADS / GROUPS;                           // threads that share channels
    static_assert(ITEMS >= 1 && THREADS % GROUPS == 0, "a tile gives every thread a vector");
};

struct Eight {
    float v[8];
};

__device__ __forceinline__ Eight unpack(uint4 a) {
    const uint32_t words[4] = {a.x, a.y, a.z, a.w};
    Eight r;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        r.v[2 * i] = __uint_as_float(words[i] << 16);
        r.v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
    return r;
}

__device__ __forceinline__ uint4 pack(const Eight &x) {
    uint4 a;
    __nv_bfloat162 pair[4];
#pragma unroll
    for (int i = 0; i < 4; i++) pair[i] = __floats2bfloat162_rn(x.v[2 * i], x.v[2 * i + 1]);
    memcpy(&a, pair, 16);
    return a;
}

__device__ __forceinline__ Eight load8(const bf16 *p) { return unpack(*reinterpret_cast<const uint4 *>(p)); }
__device__ __forceinline__ void store8(bf16 *p, const Eight &x) { *reinterpret_cast<uint4 *>(p) = pack(x); }

// The sequence of one (batch, head): where its parts lie in x and which tokens count.
struct Sequence {
    const bf16 *q, *logits, *v;
    const uint8_t *keep;
    uint32_t row, n;
};

template <class S>
__device__ Sequence sequence(const bf16 *x, const uint8_t *keep, uint32_t index, uint32_t n, uint32_t heads) {
    const uint32_t b = index / heads, h = index % heads, row = heads * (2 * S::D + S::E);
    const bf16 *first = x + (size_t)b * n * row;
    return {first + h * S::D, first + (heads + h) * S::D, first + 2 * heads * S::D + h * S::E,
            keep ? keep + (size_t)b * n : nullptr, row, n};
}

__device__ __forceinline__ bool counts(const Sequence &s, uint32_t token) {
    return token < s.n && (!s.keep || s.keep[token] != 0);
}

__device__ __forceinline__ float finite(float max) { return fmaxf(max, -3.402823466e38f); }

// Cosine and sine of eight phases.
__device__ __forceinline__ void turn8(const float2 *trig, Eight &cosine, Eight &sine) {
    const float4 *p = reinterpret_cast<const float4 *>(trig);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float4 a = p[i];
        cosine.v[2 * i] = a.x, sine.v[2 * i] = a.y, cosine.v[2 * i + 1] = a.z, sine.v[2 * i + 1] = a.w;
    }
}

// Stores eight channels of a token, turned, to its row of a tile.
template <class S> __device__ __forceinline__ void store_turned(bf16 *row, int c, const Eight &x, const float2 *trig) {
    Eight cosine, sine;
    turn8(trig, cosine, sine);
#pragma unroll
    for (int i = 0; i < 8; i++) cosine.v[i] *= x.v[i], sine.v[i] *= x.v[i];
    store8(row + c, cosine);
    store8(row + S::D + c, sine);
}

// Loads 64 rows of E channels to a tile; rows that do not count are zero.
template <class S>
__device__ void load_rows(bf16 *tile, const bf16 *from, size_t stride, const Sequence &s, uint32_t first, bool masked) {
    constexpr int VECTORS = S::E / 8;
    for (int item = threadIdx.x; item < TOKENS * VECTORS; item += THREADS) {
        const int token = item / VECTORS, c = item % VECTORS * 8;
        const uint32_t at = first + token;
        const bool live = masked ? counts(s, at) : at < s.n;
        uint4 a = make_uint4(0, 0, 0, 0);
        if (live) a = *reinterpret_cast<const uint4 *>(from + at * stride + c);
        *reinterpret_cast<uint4 *>(tile + token * S::LE + c) = a;
    }
}

using FragmentC = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;

// C [16 M, 16 N] += A B over K, one fragment at a time for each warp. AT and BT: the operand is stored transposed.
template <int M, int N, int K, bool AT, bool BT>
__device__ void product(float *c, int ldc, const bf16 *a, int lda, const bf16 *b, int ldb) {
    using LayoutA = std::conditional_t<AT, wmma::col_major, wmma::row_major>;
    using LayoutB = std::conditional_t<BT, wmma::col_major, wmma::row_major>;
    for (int tile = threadIdx.x / 32; tile < M * N; tile += WARPS) {
        const int m = tile / N * 16, n = tile % N * 16;
        FragmentC sum;
        wmma::fill_fragment(sum, 0.0f);
#pragma unroll
        for (int k = 0; k < 16 * K; k += 16) {
            wmma::fragment<wmma::matrix_a, 16, 16, 16, bf16, LayoutA> fa;
            wmma::fragment<wmma::matrix_b, 16, 16, 16, bf16, LayoutB> fb;
            wmma::load_matrix_sync(fa, AT ? a + k * lda + m : a + m * lda + k, lda);
            wmma::load_matrix_sync(fb, BT ? b + n * ldb + k : b + k * ldb + n, ldb);
            wmma::mma_sync(sum, fa, fb, sum);
        }
        wmma::store_matrix_sync(c + m * ldc + n, sum, ldc, wmma::mem_row_major);
    }
}

// Adds over the threads that share channels, in order; every thread gets the totals of its own eight channels.
template <class S, class F> __device__ Eight fold(float *scratch, const Eight &mine, F combine) {
    const int c = threadIdx.x % S::GROUPS * 8, at = threadIdx.x / S::GROUPS;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; i++) scratch[at * S::D + c + i] = mine.v[i];
    __syncthreads();
    if (threadIdx.x < S::D) {
        float total = scratch[threadIdx.x];
        for (int r = 1; r < S::REPEATS; r++) total = combine(total, scratch[r * S::D + threadIdx.x]);
        scratch[threadIdx.x] = total;
    }
    __syncthreads();
    Eight all;
#pragma unroll
    for (int i = 0; i < 8; i++) all.v[i] = scratch[c + i];
    return all;
}

template <class S> constexpr size_t state_bytes() {
    constexpr size_t tiles = sizeof(bf16) * TOKENS * (S::LW + S::LE), sums = sizeof(float) * S::W * (S::E + 4);
    return tiles > sums ? tiles : sums;
}

// SOFTMAX: keys from the logits, rows v of x, normalised state and statistics. Otherwise: keys silu(q), rows `d_o`.
template <class S, bool SOFTMAX>
__device__ void state_of(const bf16 *x, const bf16 *d_o, const float2 *trig, const uint8_t *keep, float *state,
                         float *max_out, float *den_out, uint32_t n, uint32_t heads) {
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ float scratch[8 * THREADS];
    bf16 *keys = reinterpret_cast<bf16 *>(memory), *rows = keys + TOKENS * S::LW;
    const Sequence s = sequence<S>(x, SOFTMAX ? keep : nullptr, blockIdx.x, n, heads);
    const uint32_t b = blockIdx.x / heads, h = blockIdx.x % heads;
    const bf16 *from = SOFTMAX ? s.v : d_o + ((size_t)b * n * heads + h) * S::E;
    const size_t stride = SOFTMAX ? s.row : (size_t)heads * S::E;
    const int c = threadIdx.x % S::GROUPS * 8, token0 = threadIdx.x / S::GROUPS;
    Eight max, den = {};
    if (SOFTMAX) {
#pragma unroll
        for (int i = 0; i < 8; i++) max.v[i] = -INFINITY;
        for (uint32_t at = token0; at < n; at += S::REPEATS) {
            if (!counts(s, at)) continue;
            const Eight g = load8(s.logits + (size_t)at * s.row + c);
#pragma unroll
            for (int i = 0; i < 8; i++) max.v[i] = fmaxf(max.v[i], g.v[i]);
        }
        max = fold<S>(scratch, max, [](float a, float b) { return fmaxf(a, b); });
    }
    constexpr int TILES = (S::W / 16) * (S::E / 16), MINE = (TILES + WARPS - 1) / WARPS;
    FragmentC sums[MINE];
#pragma unroll
    for (int i = 0; i < MINE; i++) wmma::fill_fragment(sums[i], 0.0f);
    for (uint32_t first = 0; first < n; first += TOKENS) {
        __syncthreads();
#pragma unroll
        for (int item = 0; item < S::ITEMS; item++) {
            const int token = token0 + item * S::REPEATS;
            const uint32_t at = first + token;
            Eight k = {};
            if (counts(s, at)) {
                k = load8((SOFTMAX ? s.logits : s.q) + (size_t)at * s.row + c);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    if (SOFTMAX) {
                        k.v[i] = __expf(k.v[i] - finite(max.v[i]));
                        den.v[i] += k.v[i];
                    } else {
                        k.v[i] *= sigmoid(k.v[i]);
                    }
                }
            }
            store_turned<S>(keys + token * S::LW, c, k, trig + (size_t)min(at, n - 1) * S::D + c);
        }
        load_rows<S>(rows, from, stride, s, first, SOFTMAX);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int tile = threadIdx.x / 32 + i * WARPS;
            if (tile >= TILES) break;
            const int m = tile / (S::E / 16) * 16, e = tile % (S::E / 16) * 16;
#pragma unroll
            for (int k = 0; k < TOKENS; k += 16) {
                wmma::fragment<wmma::matrix_a, 16, 16, 16, bf16, wmma::col_major> fa;
                wmma::fragment<wmma::matrix_b, 16, 16, 16, bf16, wmma::row_major> fb;
                wmma::load_matrix_sync(fa, keys + k * S::LW + m, S::LW);
                wmma::load_matrix_sync(fb, rows + k * S::LE + e, S::LE);
                wmma::mma_sync(sums[i], fa, fb, sums[i]);
            }
        }
    }
    if (SOFTMAX) {
        den = fold<S>(scratch, den, [](float a, float b) { return a + b; });
        if (token0 == 0) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                max_out[(size_t)blockIdx.x * S::D + c + i] = max.v[i];
                den_out[(size_t)blockIdx.x * S::D + c + i] = den.v[i];
            }
        }
    }
    __syncthreads();
    float *stage = reinterpret_cast<float *>(memory);
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const int tile = threadIdx.x / 32 + i * WARPS;
        if (tile >= TILES) break;
        const int m = tile / (S::E / 16) * 16, e = tile % (S::E / 16) * 16;
        wmma::store_matrix_sync(stage + m * (S::E + 4) + e, sums[i], S::E + 4, wmma::mem_row_major);
    }
    __syncthreads();
    for (int item = threadIdx.x; item < S::W * S::E; item += THREADS) {
        const int row = item / S::E;
        float value = stage[row * (S::E + 4) + item % S::E];
        // After fold the totals of all channels lie at the start of scratch.
        if (SOFTMAX) value = scratch[row % S::D] > 0.0f ? value / scratch[row % S::D] : 0.0f;
        state[(size_t)blockIdx.x * S::W * S::E + item] = value;
    }
}

template <class S> constexpr size_t read_bytes() {
    constexpr size_t tiles = sizeof(bf16) * (TOKENS * S::LW + S::W * S::LE), out = sizeof(float) * TOKENS * (S::E + 4);
    return tiles + out;
}

// Grid (tiles of tokens, batch * heads).
template <class S>
__device__ void read(const bf16 *x, const float *state, const float2 *trig, bf16 *o, uint32_t n, uint32_t heads) {
    extern __shared__ __align__(128) uint8_t memory[];
    bf16 *queries = reinterpret_cast<bf16 *>(memory), *states = queries + TOKENS * S::LW;
    float *out = reinterpret_cast<float *>(states + S::W * S::LE);
    const Sequence s = sequence<S>(x, nullptr, blockIdx.y, n, heads);
    const uint32_t first = blockIdx.x * TOKENS, b = blockIdx.y / heads, h = blockIdx.y % heads;
    const int c = threadIdx.x % S::GROUPS * 8, token0 = threadIdx.x / S::GROUPS;
#pragma unroll
    for (int item = 0; item < S::ITEMS; item++) {
        const int token = token0 + item * S::REPEATS;
        const uint32_t at = first + token;
        Eight q = {};
        if (at < n) {
            q = load8(s.q + (size_t)at * s.row + c);
#pragma unroll
            for (int i = 0; i < 8; i++) q.v[i] *= sigmoid(q.v[i]);
        }
        store_turned<S>(queries + token * S::LW, c, q, trig + (size_t)min(at, n - 1) * S::D + c);
    }
    for (int item = threadIdx.x * 4; item < S::W * S::E; item += THREADS * 4) {
        float a[4];
        load<4>(state + (size_t)blockIdx.y * S::W * S::E + item, a);
        store<4>(states + item / S::E * S::LE + item % S::E, a);
    }
    __syncthreads();
    product<TOKENS / 16, S::E / 16, S::W / 16, false, false>(out, S::E + 4, queries, S::LW, states, S::LE);
    __syncthreads();
    for (int item = threadIdx.x; item < TOKENS * S::E / 8; item += THREADS) {
        const int token = item / (S::E / 8), e = item % (S::E / 8) * 8;
        if (first + token >= n) continue;
        Eight y;
#pragma unroll
        for (int i = 0; i < 8; i++) y.v[i] = out[token * (S::E + 4) + e + i];
        store8(o + (((size_t)b * n + first + token) * heads + h) * S::E + e, y);
    }
}

template <class S> constexpr size_t backward_bytes() {
    return sizeof(bf16) * (2 * S::W * S::LE + 2 * TOKENS * S::LE + TOKENS * S::LW) + sizeof(float) * TOKENS * S::LF;
}

// Grid (tiles of tokens, runs of (batch, head)); dx like x; dphase partials [runs, N, D].
template <class S>
__device__ void backward(const bf16 *x, const bf16 *d_o, const float *state, const float *dstate, const float *max,
                         const float *den, const float2 *trig, const uint8_t *keep, bf16 *dx, float *dphase,
                         uint32_t n, uint32_t heads, uint32_t sequences, uint32_t per_run) {
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ float through[S::W];
    bf16 *states = reinterpret_cast<bf16 *>(memory), *dstates = states + S::W * S::LE;
    bf16 *values = dstates + S::W * S::LE, *d_outs = values + TOKENS * S::LE, *keys = d_outs + TOKENS * S::LE;
    float *sums = reinterpret_cast<float *>(keys + TOKENS * S::LW);
    const uint32_t first = blockIdx.x * TOKENS;
    const int c = threadIdx.x % S::GROUPS * 8, token0 = threadIdx.x / S::GROUPS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Eight turn[S::ITEMS] = {};
    const uint32_t last = min((blockIdx.y + 1) * per_run, sequences);
    for (uint32_t index = blockIdx.y * per_run; index < last; index++) {
        const Sequence s = sequence<S>(x, keep, index, n, heads);
        const uint32_t b = index / heads, h = index % heads;
        __syncthreads();
        for (int row = warp; row < S::W; row += WARPS) {
            float dot = 0.0f;
#pragma unroll
            for (int e = lane; e < S::E; e += 32) {
                const size_t at = ((size_t)index * S::W + row) * S::E + e;
                const float a = state[at], d = dstate[at];
                states[row * S::LE + e] = __float2bfloat16(a);
                dstates[row * S::LE + e] = __float2bfloat16(d);
                dot += a * d;
            }
            dot = warp_sum(dot);
            if (lane == 0) through[row] = dot;
        }
        load_rows<S>(values, s.v, s.row, s, first, true);
        load_rows<S>(d_outs, d_o + ((size_t)b * n * heads + h) * S::E, (size_t)heads * S::E, s, first, false);
        __syncthreads();
        product<TOKENS / 16, S::W / 16, S::E / 16, false, true>(sums, S::LF, d_outs, S::LE, states, S::LE);
        __syncthreads();
        bf16 *dq_row = dx + (size_t)b * n * s.row + h * S::D, *dlogits_row = dq_row + heads * S::D;
#pragma unroll
        for (int item = 0; item < S::ITEMS; item++) {
            const int token = token0 + item * S::REPEATS;
            const uint32_t at = first + token;
            if (at >= n) continue;
            Eight q = load8(s.q + (size_t)at * s.row + c), cosine, sine, dq;
            turn8(trig + (size_t)at * S::D + c, cosine, sine);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float sig = sigmoid(q.v[i]);
                float d = sums[token * S::LF + c + i];
                const float d2 = sums[token * S::LF + S::D + c + i];
                turn[item].v[i] += q.v[i] * sig * (d2 * cosine.v[i] - d * sine.v[i]);
                d = d * cosine.v[i] + d2 * sine.v[i];
                dq.v[i] = d * sig * (1.0f + q.v[i] * (1.0f - sig));
            }
            store8(dq_row + (size_t)at * s.row + c, dq);
        }
        __syncthreads();
        product<TOKENS / 16, S::W / 16, S::E / 16, false, true>(sums, S::LF, values, S::LE, dstates, S::LE);
        __syncthreads();
#pragma unroll
        for (int item = 0; item < S::ITEMS; item++) {
            const int token = token0 + item * S::REPEATS;
            const uint32_t at = first + token;
            Eight k = {}, cosine, sine, dl = {};
            const float2 *angle = trig + (size_t)min(at, n - 1) * S::D + c;
            if (counts(s, at)) {
                k = load8(s.logits + (size_t)at * s.row + c);
                turn8(angle, cosine, sine);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const size_t channel = (size_t)index * S::D + c + i;
                    k.v[i] = __expf(k.v[i] - finite(max[channel])) / den[channel];
                    const float d = sums[token * S::LF + c + i], d2 = sums[token * S::LF + S::D + c + i];
                    turn[item].v[i] += k.v[i] * (d2 * cosine.v[i] - d * sine.v[i]);
                    const float pull = through[c + i] + through[S::D + c + i];
                    dl.v[i] = k.v[i] * (d * cosine.v[i] + d2 * sine.v[i] - pull);
                }
            }
            store_turned<S>(keys + token * S::LW, c, k, angle);
            if (at < n) store8(dlogits_row + (size_t)at * s.row + c, dl);
        }
        __syncthreads();
        product<TOKENS / 16, S::E / 16, S::W / 16, false, false>(sums, S::LF, keys, S::LW, dstates, S::LE);
        __syncthreads();
        bf16 *dv_row = dx + (size_t)b * n * s.row + 2 * heads * S::D + h * S::E;
        for (int item = threadIdx.x; item < TOKENS * S::E / 8; item += THREADS) {
            const int token = item / (S::E / 8), e = item % (S::E / 8) * 8;
            if (first + token >= n) continue;
            // Keys of tokens that do not count are zero, and so are these rows.
            Eight dv;
#pragma unroll
            for (int i = 0; i < 8; i++) dv.v[i] = sums[token * S::LF + e + i];
            store8(dv_row + (size_t)(first + token) * s.row + e, dv);
        }
    }
#pragma unroll
    for (int item = 0; item < S::ITEMS; item++) {
        const uint32_t at = first + token0 + item * S::REPEATS;
        if (at >= n) continue;
        float *to = dphase + ((size_t)blockIdx.y * n + at) * S::D + c;
#pragma unroll
        for (int i = 0; i < 8; i++) to[i] = turn[item].v[i];
    }
}

// trig from phases.
extern "C" __global__ void __launch_bounds__(256) additive_trig(const float *phase, float2 *trig, size_t count) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float sine, cosine;
    sincosf(phase[i], &sine, &cosine);
    trig[i] = make_float2(cosine, sine);
}

#define ADDITIVE(D, E)                                                                                                \
    extern "C" __global__ void __launch_bounds__(256)                                                                 \
        additive_state_d##D##_e##E(const bf16 *x, const float2 *trig, const uint8_t *keep, float *state, float *max,  \
                              float *den, uint32_t n, uint32_t heads) {                                               \
        state_of<Shape<D, E>, true>(x, nullptr, trig, keep, state, max, den, n, heads);                               \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256)                                                                 \
        additive_dstate_d##D##_e##E(const bf16 *x, const bf16 *d_o, const float2 *trig, float *dstate, uint32_t n,    \
                               uint32_t heads) {                                                                      \
        state_of<Shape<D, E>, false>(x, d_o, trig, nullptr, dstate, nullptr, nullptr, n, heads);                      \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256)                                                                 \
        additive_read_d##D##_e##E(const bf16 *x, const float *state, const float2 *trig, bf16 *o, uint32_t n,         \
                             uint32_t heads) {                                                                        \
        read<Shape<D, E>>(x, state, trig, o, n, heads);                                                               \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) additive_backward_d##D##_e##E(                                  \
        const bf16 *x, const bf16 *d_o, const float *state, const float *dstate, const float *max, const float *den,  \
        const float2 *trig, const uint8_t *keep, bf16 *dx, float *dphase, uint32_t n, uint32_t heads,                 \
        uint32_t sequences, uint32_t per_run) {                                                                       \
        backward<Shape<D, E>>(x, d_o, state, dstate, max, den, trig, keep, dx, dphase, n, heads, sequences,           \
                                     per_run);                                                                        \
    }                                                                                                                 \
    static_assert(state_bytes<Shape<D, E>>() <= 160 * 1024 && backward_bytes<Shape<D, E>>() <= 160 * 1024             \
                      && read_bytes<Shape<D, E>>() <= 160 * 1024,                                                     \
                  "fits the shared memory of compute capability 8.0");
ADDITIVE(32, 32)
ADDITIVE(32, 64)
ADDITIVE(64, 32)
ADDITIVE(64, 64)
