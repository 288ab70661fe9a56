// The causal recurrence with decay token by token in floats: right for every width up to 256 and every kind of decay, at
// the speed of ordinary arithmetic. Also what surrounds all forms: totals of log-decays, the scan over segments, the
// gradient of log-decays, and the single step of decoding.

#include "decay.cuh"
#include <cuda_bf16.h>

namespace fulgur {

constexpr int THREADS = 256, WARPS = THREADS / 32, TOKENS = 8, COLUMNS = 32, GROUPS = 8;

// Where the decay lies: alike for the whole state, on its rows (the width that is read) or on its columns.
enum class Decay { Uniform, Rows, Columns };

// The sweep of decay_uniform.cu. A lane holds 4-row pieces `group`, `group + 8`, .. of one column of the state.
template <int ROWS, Decay DECAY, bool REVERSE> __device__ __forceinline__ void plain(const Sweep<float> &job) {
    constexpr int QUADS = ROWS / 4 / GROUPS;
    __shared__ float4 read[TOKENS][ROWS / 4], write[TOKENS][ROWS / 4];
    __shared__ float4 row_decay[TOKENS][DECAY == Decay::Rows ? ROWS / 4 : 1];
    __shared__ float value[TOKENS][COLUMNS], decay[TOKENS][DECAY == Decay::Columns ? COLUMNS : 1];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane % GROUPS;
    const int own = warp * (COLUMNS / WARPS) + lane / GROUPS;
    const Place place((job.e + COLUMNS - 1) / COLUMNS, job.heads);
    const Segment segment = job.cut.at(place.segment);
    const int first = place.tile * COLUMNS, h = place.head, columns = min(COLUMNS, job.e - first);
    auto origin = [&](const Rows<float> &rows) {
        return rows.data + segment.batch * rows.batch + segment.start * rows.token + h * rows.head;
    };
    const float *log_decay = job.log_decay.from(segment, h);

    float4 s[QUADS];
    auto state_at = [&](int i, int r) {
        return (int64_t)(place.segment * job.heads + h) * job.state_size + ((i * GROUPS + group) * 4 + r) * job.state_row +
               (first + own) * job.state_column;
    };
    auto live = [&](int i, int r) { return (i * GROUPS + group) * 4 + r < job.d && own < columns; };
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        float x[4];
#pragma unroll
        for (int r = 0; r < 4; r++) x[r] = job.enter && live(i, r) ? job.enter[state_at(i, r)] : 0.0f;
        s[i] = make_float4(x[0], x[1], x[2], x[3]);
    }

    const int chunks = (segment.count + TOKENS - 1) / TOKENS;
    for (int at = 0; at < chunks; at++) {
        const int begin = (REVERSE ? chunks - 1 - at : at) * TOKENS, count = min(TOKENS, segment.count - begin);
        __syncthreads();
        for (int item = threadIdx.x; item < TOKENS * ROWS; item += THREADS) {
            const int token = item / ROWS, row = item % ROWS;
            const bool inside = token < count && row < job.d;
            const int64_t t = begin + token;
            if (job.out.data)
                reinterpret_cast<float *>(read[token])[row] = inside ? origin(job.read)[t * job.read.token + row] : 0.0f;
            reinterpret_cast<float *>(write[token])[row] = inside ? origin(job.write)[t * job.write.token + row] : 0.0f;
            if (DECAY == Decay::Rows)
                reinterpret_cast<float *>(row_decay[token])[row] =
                    inside ? expf(log_decay[t * job.log_decay.token + row * job.log_decay.channel]) : 1.0f;
        }
        {
            const int token = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS;
            const bool inside = token < count && column < columns;
            const int64_t t = begin + token;
            value[token][column] = inside ? origin(job.value)[t * job.value.token + first + column] : 0.0f;
            if (DECAY == Decay::Columns)
                decay[token][column] =
                    inside ? expf(log_decay[t * job.log_decay.token + (first + column) * job.log_decay.channel]) : 1.0f;
            else if (DECAY == Decay::Uniform && column == 0)
                decay[token][0] = token < count && log_decay ? expf(log_decay[t * job.log_decay.token]) : 1.0f;
        }
        __syncthreads();
#pragma unroll 1
        for (int i = 0; i < count; i++) {
            const int token = REVERSE ? count - 1 - i : i;
            const float v = value[token][own], a = decay[token][DECAY == Decay::Columns ? own : 0];
            auto fade = [&]() {
#pragma unroll
                for (int i = 0; i < QUADS; i++) {
                    const float4 f = DECAY == Decay::Rows ? row_decay[token][i * GROUPS + group] : make_float4(a, a, a, a);
                    s[i].x *= f.x, s[i].y *= f.y, s[i].z *= f.z, s[i].w *= f.w;
                }
            };
            if (!REVERSE) fade();
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < QUADS; i++) {
                const float4 w = write[token][i * GROUPS + group], r = read[token][i * GROUPS + group];
                s[i].x = fmaf(w.x, v, s[i].x), s[i].y = fmaf(w.y, v, s[i].y);
                s[i].z = fmaf(w.z, v, s[i].z), s[i].w = fmaf(w.w, v, s[i].w);
                sum = fmaf(r.x, s[i].x, sum), sum = fmaf(r.y, s[i].y, sum);
                sum = fmaf(r.z, s[i].z, sum), sum = fmaf(r.w, s[i].w, sum);
            }
            if (REVERSE) fade();
            if (job.out.data) {
#pragma unroll
                for (int step = 1; step < GROUPS; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
                if (group == 0 && own < columns) origin(job.out)[(begin + token) * job.out.token + first + own] = sum;
            }
        }
    }
    if (job.leave)
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            const float x[4] = {s[i].x, s[i].y, s[i].z, s[i].w};
#pragma unroll
            for (int r = 0; r < 4; r++)
                if (live(i, r)) job.leave[state_at(i, r)] = x[r];
        }
}

// The adjoint of the logarithm of a decay that is the same for all tokens, without the cancellation of sums over the sequence:
//
//   T_t = a (T_{t-1} + S_{t-1}),   d log a = sum_t do_t^T T_t^T q_t + <T_N, G_N>
//
// T is the derivative of the state, from zero at the start of each segment, and G the adjoint of the state at its end. The
// sweep is that of the output, with do in the place of the output, and G in the place of the states that leave. One
// number a block.
template <int ROWS> __device__ __forceinline__ void tangent(const Sweep<float> &job, float *sums) {
    constexpr int QUADS = ROWS / 4 / GROUPS;
    __shared__ float4 read[TOKENS][ROWS / 4], write[TOKENS][ROWS / 4];
    __shared__ float value[TOKENS][COLUMNS], weight[TOKENS][COLUMNS];
    __shared__ double partial[WARPS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane % GROUPS;
    const int own = warp * (COLUMNS / WARPS) + lane / GROUPS;
    const Place place((job.e + COLUMNS - 1) / COLUMNS, job.heads);
    const Segment segment = job.cut.at(place.segment);
    const int first = place.tile * COLUMNS, h = place.head, columns = min(COLUMNS, job.e - first);
    auto origin = [&](const Rows<float> &rows) {
        return rows.data + segment.batch * rows.batch + segment.start * rows.token + h * rows.head;
    };
    const float a = expf(*job.log_decay.from(segment, h));
    auto of_state = [&](const float *states, int i, int r) {
        const int row = (i * GROUPS + group) * 4 + r;
        const bool live = states && row < job.d && own < columns;
        const int64_t at = (int64_t)(place.segment * job.heads + h) * job.state_size + row * job.state_row +
                           (first + own) * job.state_column;
        return live ? states[at] : 0.0f;
    };
    float s[QUADS][4], t[QUADS][4] = {};
#pragma unroll
    for (int i = 0; i < QUADS; i++)
#pragma unroll
        for (int r = 0; r < 4; r++) s[i][r] = of_state(job.enter, i, r);
    double sum = 0.0;
    for (int begin = 0; begin < segment.count; begin += TOKENS) {
        const int count = min(TOKENS, segment.count - begin);
        __syncthreads();
        for (int item = threadIdx.x; item < TOKENS * ROWS; item += THREADS) {
            const int token = item / ROWS, row = item % ROWS;
            const bool inside = token < count && row < job.d;
            const int64_t at = begin + token;
            reinterpret_cast<float *>(read[token])[row] = inside ? origin(job.read)[at * job.read.token + row] : 0.0f;
            reinterpret_cast<float *>(write[token])[row] = inside ? origin(job.write)[at * job.write.token + row] : 0.0f;
        }
        {
            const int token = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS;
            const bool inside = token < count && column < columns;
            const int64_t at = begin + token;
            value[token][column] = inside ? origin(job.value)[at * job.value.token + first + column] : 0.0f;
            weight[token][column] = inside ? origin(job.out)[at * job.out.token + first + column] : 0.0f;
        }
        __syncthreads();
#pragma unroll 1
        for (int token = 0; token < count; token++) {
            const float v = value[token][own];
            float change = 0.0f;
#pragma unroll
            for (int i = 0; i < QUADS; i++) {
                const float4 w = write[token][i * GROUPS + group], q = read[token][i * GROUPS + group];
                const float writes[4] = {w.x, w.y, w.z, w.w}, reads[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    t[i][r] = a * (t[i][r] + s[i][r]);
                    s[i][r] = fmaf(writes[r], v, a * s[i][r]);
                    change = fmaf(reads[r], t[i][r], change);
                }
            }
            sum += change * weight[token][own];
        }
    }
#pragma unroll
    for (int i = 0; i < QUADS; i++)
#pragma unroll
        for (int r = 0; r < 4; r++) sum += t[i][r] * of_state(job.leave, i, r);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) partial[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < WARPS; i++) sum += partial[i];
        sums[blockIdx.x] = (float)sum;
    }
}

} // namespace fulgur

#define PLAIN(ROWS)                                                                                                    \
    PLAIN_OF(ROWS, uniform, Uniform)                                                                                   \
    PLAIN_OF(ROWS, rows, Rows)                                                                                         \
    PLAIN_OF(ROWS, columns, Columns)                                                                                   \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                               \
        decay_tangent_##ROWS(const __grid_constant__ fulgur::Sweep<float> job, float *sums) {                          \
        fulgur::tangent<ROWS>(job, sums);                                                                              \
    }
#define PLAIN_OF(ROWS, NAME, DECAY)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        decay_plain_##ROWS##_##NAME##_forward(const __grid_constant__ fulgur::Sweep<float> job) {                      \
        fulgur::plain<ROWS, fulgur::Decay::DECAY, false>(job);                                                         \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        decay_plain_##ROWS##_##NAME##_reverse(const __grid_constant__ fulgur::Sweep<float> job) {                      \
        fulgur::plain<ROWS, fulgur::Decay::DECAY, true>(job);                                                          \
    }

PLAIN(32)
PLAIN(64)
PLAIN(128)
PLAIN(256)

using namespace fulgur;

// Sums of the log-decays of each segment, head and channel. One block a segment and head; a constant is multiplied.
extern "C" __global__ void decay_totals(LogDecay log_decay, Cut cut, float *totals, int heads, int width) {
    __shared__ float partial[WARPS][32];
    const Place place(1, heads);
    const Segment segment = cut.at(place.segment);
    const float *from = log_decay.from(segment, place.head);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int first = 0; first < width; first += 32) {
        // Lanes take channels where there are many, tokens where there is one.
        const int channel = width == 1 ? 0 : first + lane, step = width == 1 ? THREADS : WARPS;
        float sum = 0.0f;
        if (log_decay.token == 0) sum = segment.count && threadIdx.x == 0 ? *from * segment.count : 0.0f;
        else if (channel < width)
            for (int token = width == 1 ? threadIdx.x : warp; token < segment.count; token += step)
                sum += from[token * log_decay.token + channel * log_decay.channel];
        partial[warp][lane] = sum;
        __syncthreads();
        if (warp == 0) {
            float total = 0.0f;
            for (int i = 0; i < WARPS; i++) total += partial[i][lane];
            if (width == 1) {
                for (int step = 1; step < 32; step *= 2) total += __shfl_xor_sync(~0u, total, step);
                if (lane == 0) totals[blockIdx.x] = total;
            } else if (channel < width) totals[(int64_t)blockIdx.x * width + channel] = total;
        }
        __syncthreads();
    }
}

// From what each segment adds to the state, `states`, to what enters it, in place; `last` is what leaves a sequence. Every
// sequence has `parts` segments. Reverse goes from the last to the first.
extern "C" __global__ void decay_scan(float *states, const float *totals, const float *initial, float *last,
                                      int parts, int heads, int d, int e, int width, int reverse) {
    const int64_t size = (int64_t)d * e, place = blockIdx.x * (int64_t)THREADS + threadIdx.x;
    const int head = blockIdx.y % heads, sequence = blockIdx.y / heads;
    if (place >= size) return;
    const int channel = width == 1 ? 0 : place / e;
    const int begin = sequence * parts, end = begin + parts;
    const int64_t whole = ((int64_t)sequence * heads + head) * size + place;
    float state = initial ? initial[whole] : 0.0f;
    for (int i = 0; i < end - begin; i++) {
        const int64_t row = (int64_t)(reverse ? end - 1 - i : begin + i) * heads + head;
        const float local = states[row * size + place];
        states[row * size + place] = state;
        state = (totals ? expf(totals[row * width + channel]) : 1.0f) * state + local;
    }
    if (last) last[whole] = state;
}

// q dq - k dk for each channel, or their sum over the channels. One warp a row of `d` channels.
extern "C" __global__ void decay_terms(const float *q, const float *dq, const float *k, const float *dk, float *terms,
                                       int64_t rows, int d, int width) {
    const int64_t row = blockIdx.x * (int64_t)WARPS + (threadIdx.x >> 5);
    if (row >= rows) return;
    float sum = 0.0f;
    for (int c = threadIdx.x & 31; c < d; c += 32) {
        const int64_t i = row * d + c;
        const float term = q[i] * dq[i] - k[i] * dk[i];
        if (width == 1) sum += term;
        else terms[i] = term;
    }
    if (width == 1) {
        for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if ((threadIdx.x & 31) == 0) terms[row] = sum;
    }
}

// Sums of terms from each token to the end of its sequence, plus `final`, in place: `[N, columns]` a batch. A block takes
// 32 columns of one sequence, a warp an eighth of its tokens.
extern "C" __global__ void decay_sums(float *terms, const float *final, const int *borders, int tokens, int columns) {
    __shared__ double totals[WARPS][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, column = blockIdx.x * 32 + lane, sequence = blockIdx.y;
    const int64_t start = borders ? borders[sequence] : (int64_t)sequence * tokens;
    const int count = borders ? borders[sequence + 1] - borders[sequence] : tokens;
    const int share = (count + WARPS - 1) / WARPS, begin = min(count, warp * share), end = min(count, begin + share);
    double sum = 0.0;
    if (column < columns)
        for (int t = begin; t < end; t++) sum += terms[(start + t) * columns + column];
    totals[warp][lane] = sum;
    __syncthreads();
    if (column >= columns) return;
    sum = final ? final[(int64_t)sequence * columns + column] : 0.0;
    for (int later = warp + 1; later < WARPS; later++) sum += totals[later][lane];
    for (int t = end - 1; t >= begin; t--) {
        float *term = terms + (start + t) * columns + column;
        sum += *term;
        *term = (float)sum;
    }
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void set(float *to, float x) { *to = x; }
__device__ __forceinline__ void set(__nv_bfloat16 *to, float x) { *to = __float2bfloat16(x); }

// Where the rows of a token lie: elements from one batch to the next, and which of q, k and v are still to go through SiLU, by
// bits.
struct Token {
    int64_t keys, values;
    int silu, unused;
};

// x, or SiLU of it as the type of the rows holds it.
template <typename T> __device__ __forceinline__ float activated(T x, bool silu) {
    if (!silu) return to_float(x);
    const float a = to_float(x);
    T rounded;
    set(&rounded, a * (1.0f / (1.0f + expf(-a))));
    return to_float(rounded);
}

// One token: the state after it, and S^T q. One block a batch and head; lanes take V columns each, warps take rows.
template <typename T, int V>
__device__ __forceinline__ void step(const T *q, const T *k, const T *v, Token token, LogDecay log_decay, const float *before,
                                     float *after, T *out, int heads, int d, int e) {
    struct alignas(V * 4) Columns {
        float x[V];
    };
    __shared__ Columns partial[WARPS][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, batch = blockIdx.x / heads, head = blockIdx.x % heads;
    const int64_t line = blockIdx.x;
    const float *log = log_decay.data ? log_decay.data + batch * log_decay.batch + head * log_decay.head : nullptr;
    q += batch * token.keys + head * d, k += batch * token.keys + head * d, v += batch * token.values + head * e;
    out += line * e, before += line * d * e, after += line * d * e;
    const bool silu_q = token.silu & 1, silu_k = token.silu & 2, silu_v = token.silu & 4;
    for (int first = 0; first < e; first += 32 * V) {
        const int column = first + lane * V;
        const bool live = column < e;
        float value[V];
        Columns sum = {};
#pragma unroll
        for (int c = 0; c < V; c++) value[c] = live ? activated(v[column + c], silu_v) : 0.0f;
        if (live)
#pragma unroll 8
            for (int row = warp; row < d; row += WARPS) {
                const float a = log ? expf(log[row * log_decay.channel]) : 1.0f;
                const float x = activated(k[row], silu_k), y = activated(q[row], silu_q);
                Columns state = *reinterpret_cast<const Columns *>(before + (int64_t)row * e + column);
#pragma unroll
                for (int c = 0; c < V; c++) {
                    state.x[c] = fmaf(x, value[c], a * state.x[c]);
                    sum.x[c] = fmaf(y, state.x[c], sum.x[c]);
                }
                *reinterpret_cast<Columns *>(after + (int64_t)row * e + column) = state;
            }
        __syncthreads();
        partial[warp][lane] = sum;
        __syncthreads();
        if (warp == 0 && live)
#pragma unroll
            for (int c = 0; c < V; c++) {
                float total = 0.0f;
                for (int i = 0; i < WARPS; i++) total += partial[i][lane].x[c];
                set(out + column + c, total);
            }
    }
}

#define STEP(T, NAME, V)                                                                                               \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        decay_step_##NAME##_##V(const T *q, const T *k, const T *v, Token token, LogDecay log_decay,                   \
                                const float *before, float *after, T *out, int heads, int d, int e) {                  \
        step<T, V>(q, k, v, token, log_decay, before, after, out, heads, d, e);                                        \
    }
STEP(float, f32, 1)
STEP(float, f32, 4)
STEP(__nv_bfloat16, bf16, 1)
STEP(__nv_bfloat16, bf16, 4)
