// The non-causal additive recurrence without phases on bf16 projections; formulas in src/additive/mod.rs, the form with phases in
// additive.cu.
//
// x [B, N, 2 H D + H E] holds queries (before their SiLU), logits and values of all heads side by side. Tokens are cut into segments of
// `length`, so that the GPU is busy with few heads as well. Warps share nothing but the states of their sequence:
//
// | kernel         | a block owns           | a warp owns              | reads, writes (bytes a token and head)       |
// |----------------|------------------------|--------------------------|----------------------------------------------|
// | plain_state    | a segment              | 16 key channels          | logits 2 D, v 2 E; max, den, num of segments |
// | plain_dstate   | the same, of q and dO  | 16 key channels          | 2 D + 2 E; sums of segments                  |
// | plain_merge    | 8 channels             | one channel of a (b, h)  | the parts                                    |
// | plain_dmerge   | the same, of dS        | one channel of a (b, h)  | the parts                                    |
// | plain_read     | a segment              | 16 tokens at a time      | 2 D, 2 E                                     |
// | plain_backward | a segment              | 16 tokens at a time      | 4 D + 4 E, 4 D + 2 E                         |
//
// Maxima run along with the sums, which are scaled down when one rises. Products run on tensor cores in bf16 with float sums; statistics
// and states are float. Segments are merged in order: the same bits each time. Limit: memory bandwidth.
#include "mma.cuh"

namespace fulgur {

constexpr float LOWEST = -3.402823466e38f; // a maximum of nothing: no difference of two is infinity minus infinity
constexpr int TOKENS = 64, STAGES = 3, TURN = 8; // TURN: warps of read and backward

__device__ __forceinline__ float exponential(float x) { return power_of_two(x * 1.4426950408889634f); }
__device__ __forceinline__ float silu_gate(float x) { return __fdividef(1.0f, 1.0f + exponential(-x)); }

struct Projections {
    const bf16 *x, *d_o; // d_o [B, N, H E], where it is needed
    const uint8_t *keep; // [B, N] or null
    int n, heads, length; // tokens, heads, tokens of a segment: a multiple of 64
};

// Grid (segments, B H), D / 16 warps. SOFTMAX: keys exp(logits - max), rows v, with statistics [segments, B H, D]. Otherwise: keys
// silu(q), rows d_o. Sums [segments, B H, D, E]: mma takes 16 channels by 16 tokens of keys from a transposed load, two tokens a register.
template <int D, int E, bool SOFTMAX>
__device__ __forceinline__ void state(const Projections &job, float *max_out, float *den_out, float *num_out) {
    constexpr int WARPS = D / 16, THREADS = WARPS * 32, KEYS = TOKENS * 64 * 2 * ((D + 63) / 64), ROWS = TOKENS * 64 * 2 * ((E + 63) / 64);
    constexpr int DW = (D + 63) / 64 * 64, EW = (E + 63) / 64 * 64, STAGE = KEYS + ROWS;
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t base = shared_address(shared);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, own = warp * 16;
    const int sequence = blockIdx.y, b = sequence / job.heads, h = sequence % job.heads, row = job.heads * (2 * D + E);
    const int start = blockIdx.x * job.length, n = max(0, min(job.length, job.n - start)), chunks = (n + TOKENS - 1) / TOKENS;
    const bf16 *x = job.x + ((int64_t)b * job.n + start) * row;
    const bf16 *keys = x + (SOFTMAX ? job.heads + h : h) * D;
    const bf16 *rows = SOFTMAX ? x + 2 * job.heads * D + h * E : job.d_o + (((int64_t)b * job.n + start) * job.heads + h) * E;
    const int64_t rows_stride = SOFTMAX ? row : job.heads * E;
    const uint8_t *keep = SOFTMAX && job.keep ? job.keep + (int64_t)b * job.n + start : nullptr;
    auto fetch = [&](int at) {
        if (at < chunks) {
            const int from = at * TOKENS, count = min(TOKENS, n - from);
            const uint32_t to = base + at % STAGES * STAGE;
            start_rows<TOKENS, DW, THREADS>(Tile<DW>{to}, keys + (int64_t)from * row, row, count, D);
            start_rows<TOKENS, EW, THREADS>(Tile<EW>{to + KEYS}, rows + from * rows_stride, rows_stride, count, E);
        }
        end_copies();
    };
    float s[E / 8][4] = {};
    float high[2] = {LOWEST, LOWEST}, den[2] = {};
    fetch(0);
    fetch(1);
    for (int at = 0; at < chunks; at++) {
        wait_copies<1>();
        __syncthreads();
        fetch(at + 2);
        const Tile<DW> k{base + at % STAGES * STAGE};
        const Tile<EW> v{base + at % STAGES * STAGE + KEYS};
        const int from = at * TOKENS, count = min(TOKENS, n - from);
        uint32_t raw[TOKENS / 16][4]; // register r: channel own + g + 8 (r / 2), tokens 2 t and 2 t + 1, + 8 where r is odd
#pragma unroll
        for (int c = 0; c < TOKENS / 16; c++) load_transposed(raw[c], k.block(c * 16, own, lane));
        float y[TOKENS / 16][4][2];
#pragma unroll
        for (int c = 0; c < TOKENS / 16; c++)
#pragma unroll
            for (int r = 0; r < 4; r++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int token = c * 16 + (r & 1) * 8 + 2 * t + i;
                    const bool live = token < count && (!keep || keep[from + token]);
                    const float value = i ? second_of(raw[c][r]) : first_of(raw[c][r]);
                    if (SOFTMAX) y[c][r][i] = live ? value : -INFINITY;
                    else y[c][r][i] = value * silu_gate(value);
                }
        if (SOFTMAX) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float most = high[half];
#pragma unroll
                for (int c = 0; c < TOKENS / 16; c++)
#pragma unroll
                    for (int r = 2 * half; r < 2 * half + 2; r++) most = fmaxf(most, fmaxf(y[c][r][0], y[c][r][1]));
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
                const float fade = exponential(high[half] - most);
                high[half] = most;
                den[half] *= fade;
#pragma unroll
                for (int j = 0; j < E / 8; j++) s[j][2 * half] *= fade, s[j][2 * half + 1] *= fade;
#pragma unroll
                for (int c = 0; c < TOKENS / 16; c++)
#pragma unroll
                    for (int r = 2 * half; r < 2 * half + 2; r++)
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            y[c][r][i] = exponential(y[c][r][i] - most);
                            den[half] += y[c][r][i];
                        }
            }
        }
#pragma unroll
        for (int c = 0; c < TOKENS / 16; c++) {
            const uint32_t a[4] = {pack(y[c][0][0], y[c][0][1]), pack(y[c][2][0], y[c][2][1]), pack(y[c][1][0], y[c][1][1]), pack(y[c][3][0], y[c][3][1])};
#pragma unroll
            for (int j = 0; j < E / 16; j++) {
                uint32_t w[4];
                load_transposed(w, v.block(c * 16, j * 16, lane));
                multiply(s[2 * j], a, w[0], w[1]);
                multiply(s[2 * j + 1], a, w[2], w[3]);
            }
        }
    }
    const int64_t part = (int64_t)blockIdx.x * gridDim.y + sequence;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int channel = own + g + 8 * half;
        if (SOFTMAX) {
            den[half] += __shfl_xor_sync(~0u, den[half], 1);
            den[half] += __shfl_xor_sync(~0u, den[half], 2);
            if (t == 0) max_out[part * D + channel] = high[half], den_out[part * D + channel] = den[half];
        }
#pragma unroll
        for (int j = 0; j < E / 8; j++)
            *reinterpret_cast<float2 *>(num_out + (part * D + channel) * E + j * 8 + t * 2) = make_float2(s[j][2 * half], s[j][2 * half + 1]);
    }
}

// One warp a channel of a sequence, lanes over columns. SOFTMAX: normalised state, max and den. Otherwise: sums.
template <int D, int E, bool SOFTMAX>
__device__ __forceinline__ void merge(const float *max_in, const float *den_in, const float *num_in, float *state, float *max_out, float *den_out, int sequences, int parts) {
    const int64_t channel = (blockIdx.x * (int64_t)blockDim.x + threadIdx.x) / 32, all = (int64_t)sequences * D;
    const int lane = threadIdx.x & 31;
    if (channel >= all) return;
    float high = LOWEST, den = 0.0f;
    if (SOFTMAX) {
        for (int p = 0; p < parts; p++) high = fmaxf(high, max_in[p * all + channel]);
        for (int p = 0; p < parts; p++) den += den_in[p * all + channel] * exponential(max_in[p * all + channel] - high);
        if (lane == 0) max_out[channel] = high, den_out[channel] = den;
    }
    for (int e = lane; e < E; e += 32) {
        float sum = 0.0f;
        for (int p = 0; p < parts; p++) {
            const float weight = SOFTMAX ? exponential(max_in[p * all + channel] - high) : 1.0f;
            sum += weight * num_in[(p * all + channel) * E + e];
        }
        state[channel * E + e] = SOFTMAX ? (den > 0.0f ? sum / den : 0.0f) : sum;
    }
}

// [D][E] floats to a tile of bf16.
template <int D, int E, int THREADS> __device__ __forceinline__ void load_state(Tile<(E + 63) / 64 * 64> tile, const float *from) {
    for (int item = threadIdx.x; item < D * E / 2; item += THREADS) {
        const int row = item / (E / 2), i = item % (E / 2);
        const float2 v = reinterpret_cast<const float2 *>(from)[item];
        store4(tile.base + (i * 4 ^ (row & 7) << 4) + row * tile.ROW, pack(v.x, v.y));
    }
}

// Sixteen rows of a warp's own tile; WIDTH a multiple of 64.
template <int WIDTH> __device__ __forceinline__ void start_own(Tile<WIDTH> tile, const bf16 *from, int64_t stride, int count, int width, int lane) {
#pragma unroll
    for (int item = lane; item < 16 * WIDTH / 8; item += 32) {
        const int row = item / (WIDTH / 8), piece = item % (WIDTH / 8);
        copy16(tile.at(row, piece), from + row * stride + piece * 8, row < count && piece * 8 < width);
    }
}
template <int WIDTH> __device__ __forceinline__ void store_own(Tile<WIDTH> tile, bf16 *to, int64_t stride, int count, int width, int lane) {
#pragma unroll
    for (int item = lane; item < 16 * WIDTH / 8; item += 32) {
        const int row = item / (WIDTH / 8), piece = item % (WIDTH / 8);
        const uint4 v = load16(tile.at(row, piece));
        if (row < count && piece * 8 < width) *reinterpret_cast<uint4 *>(to + row * stride + piece * 8) = v;
    }
}

// Grid (segments, B H).
template <int D, int E> __device__ __forceinline__ void read(const Projections &job, const float *states, bf16 *o) {
    constexpr int DW = (D + 63) / 64 * 64, EW = (E + 63) / 64 * 64, OWN = 16 * (DW > EW ? DW : EW) * 2;
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t base = shared_address(shared);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int sequence = blockIdx.y, b = sequence / job.heads, h = sequence % job.heads, row = job.heads * (2 * D + E);
    const int start = blockIdx.x * job.length, n = max(0, min(job.length, job.n - start));
    const bf16 *q = job.x + ((int64_t)b * job.n + start) * row + h * D;
    o += (((int64_t)b * job.n + start) * job.heads + h) * E;
    const Tile<EW> s{base};
    auto tile = [&](int at) { return base + D * EW * 2 + (warp * 2 + (at & 1)) * OWN; };
    auto fetch = [&](int at) {
        const int from = (at * TURN + warp) * 16;
        if (from < n) start_own(Tile<DW>{tile(at)}, q + (int64_t)from * row, row, n - from, D, lane);
        end_copies();
    };
    fetch(0);
    load_state<D, E, TURN * 32>(s, states + (int64_t)sequence * D * E);
    __syncthreads();
    for (int at = 0; (at * TURN + warp) * 16 < n; at++) {
        fetch(at + 1);
        wait_copies<1>();
        __syncwarp();
        const int from = (at * TURN + warp) * 16;
        float sum[E / 8][4] = {};
#pragma unroll
        for (int c = 0; c < D / 16; c++) {
            uint32_t a[4];
            load_matrices(a, Tile<DW>{tile(at)}.block(0, c * 16, lane));
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float x = first_of(a[i]), y = second_of(a[i]);
                a[i] = pack(x * silu_gate(x), y * silu_gate(y));
            }
#pragma unroll
            for (int j = 0; j < E / 16; j++) {
                uint32_t w[4];
                load_transposed(w, s.block(c * 16, j * 16, lane));
                multiply(sum[2 * j], a, w[0], w[1]);
                multiply(sum[2 * j + 1], a, w[2], w[3]);
            }
        }
        __syncwarp();
        const Tile<EW> out{tile(at)};
#pragma unroll
        for (int j = 0; j < E / 8; j++) {
            store4(out.pair(0, j * 8, lane), pack(sum[j][0], sum[j][1]));
            store4(out.pair(8, j * 8, lane), pack(sum[j][2], sum[j][3]));
        }
        __syncwarp();
        store_own(out, o + (int64_t)from * job.heads * E, job.heads * E, n - from, E, lane);
        __syncwarp();
    }
}

// Grid (segments, B H); dx like x.
template <int D, int E>
__device__ __forceinline__ void backward(const Projections &job, const float *states, const float *d_states, const float *max_in, const float *den_in, bf16 *dx) {
    constexpr int DW = (D + 63) / 64 * 64, EW = (E + 63) / 64 * 64, KEYS = 16 * DW * 2, ROWS = 16 * EW * 2, OWN = 2 * KEYS + 2 * ROWS;
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ float through[D], high[D], scale[D];
    const uint32_t base = shared_address(shared);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int sequence = blockIdx.y, b = sequence / job.heads, h = sequence % job.heads, row = job.heads * (2 * D + E);
    const int start = blockIdx.x * job.length, n = max(0, min(job.length, job.n - start));
    const int64_t first = ((int64_t)b * job.n + start) * row;
    const int q_at = h * D, k_at = (job.heads + h) * D, v_at = 2 * job.heads * D + h * E;
    const bf16 *d_o = job.d_o + (((int64_t)b * job.n + start) * job.heads + h) * E;
    const uint8_t *keep = job.keep ? job.keep + (int64_t)b * job.n + start : nullptr;
    const Tile<EW> s{base}, ds{base + D * EW * 2};
    auto part = [&](int at, int offset) { return base + 2 * D * EW * 2 + (warp * 2 + (at & 1)) * OWN + offset; };
    auto fetch = [&](int at) {
        const int from = (at * TURN + warp) * 16;
        if (from < n) {
            const bf16 *x = job.x + first + (int64_t)from * row;
            start_own(Tile<DW>{part(at, 0)}, x + q_at, row, n - from, D, lane);
            start_own(Tile<DW>{part(at, KEYS)}, x + k_at, row, n - from, D, lane);
            start_own(Tile<EW>{part(at, 2 * KEYS)}, x + v_at, row, n - from, E, lane);
            start_own(Tile<EW>{part(at, 2 * KEYS + ROWS)}, d_o + (int64_t)from * job.heads * E, job.heads * E, n - from, E, lane);
        }
        end_copies();
    };
    fetch(0);
    load_state<D, E, TURN * 32>(s, states + (int64_t)sequence * D * E);
    load_state<D, E, TURN * 32>(ds, d_states + (int64_t)sequence * D * E);
    for (int c = warp; c < D; c += TURN) {
        float dot = 0.0f;
        for (int e = lane; e < E; e += 32) dot += states[((int64_t)sequence * D + c) * E + e] * d_states[((int64_t)sequence * D + c) * E + e];
#pragma unroll
        for (int step = 1; step < 32; step *= 2) dot += __shfl_xor_sync(~0u, dot, step);
        const float den = den_in[(int64_t)sequence * D + c];
        if (lane == 0) through[c] = dot, high[c] = max_in[(int64_t)sequence * D + c], scale[c] = den > 0.0f ? 1.0f / den : 0.0f;
    }
    __syncthreads();
    for (int at = 0; (at * TURN + warp) * 16 < n; at++) {
        fetch(at + 1);
        wait_copies<1>();
        __syncwarp();
        const int from = (at * TURN + warp) * 16;
        const Tile<DW> q{part(at, 0)}, k{part(at, KEYS)};
        const Tile<EW> v{part(at, 2 * KEYS)}, d{part(at, 2 * KEYS + ROWS)};
        bf16 *to = dx + first + (int64_t)from * row;
        bool live[2];
#pragma unroll
        for (int half = 0; half < 2; half++) live[half] = from + g + 8 * half < n && (!keep || keep[from + g + 8 * half]);
        uint32_t a[E / 16][4];
        // dq: silu'(q) (do S^T); B is (k = E, n = D), stored [D][E].
#pragma unroll
        for (int c = 0; c < E / 16; c++) load_matrices(a[c], d.block(0, c * 16, lane));
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            float sum[2][4] = {};
#pragma unroll
            for (int c = 0; c < E / 16; c++) {
                uint32_t w[4];
                load_matrices(w, s.block(j * 16, c * 16, lane));
                multiply(sum[0], a[c], w[0], w[2]);
                multiply(sum[1], a[c], w[1], w[3]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const uint32_t where = q.pair(8 * half, j * 16 + 8 * i, lane), pair = load4(where);
                    float y[2] = {first_of(pair), second_of(pair)};
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        const float gate = silu_gate(y[r]);
                        y[r] = sum[i][2 * half + r] * gate * (1.0f + y[r] * (1.0f - gate));
                    }
                    store4(where, pack(y[0], y[1]));
                }
        }
        // dlogits: k (v dS^T - through), and k itself as left operand of dv = k dS.
#pragma unroll
        for (int c = 0; c < E / 16; c++) load_matrices(a[c], v.block(0, c * 16, lane));
        float dv[E / 8][4] = {};
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            float sum[2][4] = {};
#pragma unroll
            for (int c = 0; c < E / 16; c++) {
                uint32_t w[4];
                load_matrices(w, ds.block(j * 16, c * 16, lane));
                multiply(sum[0], a[c], w[0], w[2]);
                multiply(sum[1], a[c], w[1], w[3]);
            }
            uint32_t left[4]; // (tokens g, channels 2t), (g + 8, ..), (g, 2t + 8), (g + 8, 2t + 8)
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int c = j * 16 + 8 * i + 2 * t;
                    const uint32_t where = k.pair(8 * half, j * 16 + 8 * i, lane), pair = load4(where);
                    float y[2] = {first_of(pair), second_of(pair)}, z[2];
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        y[r] = live[half] ? exponential(y[r] - high[c + r]) * scale[c + r] : 0.0f;
                        z[r] = y[r] * (sum[i][2 * half + r] - through[c + r]);
                    }
                    left[2 * i + half] = pack(y[0], y[1]);
                    store4(where, pack(z[0], z[1]));
                }
#pragma unroll
            for (int e = 0; e < E / 16; e++) {
                uint32_t w[4];
                load_transposed(w, ds.block(j * 16, e * 16, lane));
                multiply(dv[2 * e], left, w[0], w[1]);
                multiply(dv[2 * e + 1], left, w[2], w[3]);
            }
        }
        __syncwarp();
#pragma unroll
        for (int e = 0; e < E / 8; e++) {
            store4(v.pair(0, e * 8, lane), pack(dv[e][0], dv[e][1]));
            store4(v.pair(8, e * 8, lane), pack(dv[e][2], dv[e][3]));
        }
        __syncwarp();
        store_own(q, to + q_at, row, n - from, D, lane);
        store_own(k, to + k_at, row, n - from, D, lane);
        store_own(v, to + v_at, row, n - from, E, lane);
        __syncwarp();
    }
}
} // namespace fulgur

using namespace fulgur;

#define PLAIN(D, E)                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(D * 2)                                                                                   \
        plain_state_d##D##_e##E(const Projections job, float *max, float *den, float *num) {                                              \
        state<D, E, true>(job, max, den, num);                                                                                            \
    }                                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(D * 2) plain_dstate_d##D##_e##E(const Projections job, float *num) {                     \
        state<D, E, false>(job, nullptr, nullptr, num);                                                                                   \
    }                                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256)                                                                                     \
        plain_merge_d##D##_e##E(const float *max, const float *den, const float *num, float *state, float *max_out, float *den_out,       \
                                int sequences, int parts) {                                                                               \
        merge<D, E, true>(max, den, num, state, max_out, den_out, sequences, parts);                                                      \
    }                                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256)                                                                                     \
        plain_dmerge_d##D##_e##E(const float *num, float *dstate, int sequences, int parts) {                                             \
        merge<D, E, false>(nullptr, nullptr, num, dstate, nullptr, nullptr, sequences, parts);                                            \
    }                                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(TURN * 32, 2)                                                                            \
        plain_read_d##D##_e##E(const Projections job, const float *state, bf16 *o) {                                                      \
        read<D, E>(job, state, o);                                                                                                        \
    }                                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(TURN * 32, 2)                                                                            \
        plain_backward_d##D##_e##E(const Projections job, const float *state, const float *dstate, const float *max, const float *den,    \
                                   bf16 *dx) {                                                                                            \
        backward<D, E>(job, state, dstate, max, den, dx);                                                                                 \
    }
PLAIN(32, 32)
PLAIN(32, 64)
PLAIN(64, 32)
PLAIN(64, 64)
