// Softmax attention of f32, forward and backward, for widths up to 256: formulas in src/attention/tiled/mod.rs.
//
// A block owns 32 rows, four a warp, and meets 32 rows at a time, one a lane for scores; sums run over columns, eight a lane.
// On the side of keys a block meets the queries of all heads of its group. Everything is summed in order, in f32. Limit: reads
// of shared memory, one float for four multiplications. This is the form for what tensor cores do not take: right, not quick.
#include "attention_job.cuh"

namespace fulgur {

constexpr int WARPS = 8, OWN = 4, ROWS = WARPS * OWN, MET = 32, WIDEST = 256, PARTS = WIDEST / 32;

// Rows that lanes read at the same column must not share a bank.
__device__ __forceinline__ int padded(int width) { return width | 1; }

__device__ __forceinline__ void copy_rows(float *to, const float *from, int64_t stride, int count, int width) {
    for (int item = threadIdx.x; item < MET * width; item += WARPS * 32) {
        const int row = item / width, column = item % width;
        to[row * padded(width) + column] = row < count ? from[row * stride + column] : 0.0f;
    }
}

// Products of a warp's rows with the row of the lane.
__device__ __forceinline__ void dot_rows(float (&s)[OWN], const float *own, const float *met, int width) {
    const float *row = met + (threadIdx.x % 32) * padded(width);
#pragma unroll
    for (int r = 0; r < OWN; r++) s[r] = 0.0f;
    for (int c = 0; c < width; c++) {
        const float x = row[c];
#pragma unroll
        for (int r = 0; r < OWN; r++) s[r] += own[r * padded(width) + c] * x;
    }
}

// sums += weights rows, where the lane holds the weights of one row and sums columns lane, lane + 32, ..
__device__ __forceinline__ void add_rows(float (&sums)[OWN][PARTS], const float (&weights)[OWN], const float *met, int width) {
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < MET; i++) {
        float weight[OWN];
#pragma unroll
        for (int r = 0; r < OWN; r++) weight[r] = __shfl_sync(~0u, weights[r], i);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            const int column = part * 32 + lane;
            if (column < width) {
                const float x = met[i * padded(width) + column];
#pragma unroll
                for (int r = 0; r < OWN; r++) sums[r][part] += weight[r] * x;
            }
        }
    }
}

__device__ __forceinline__ void leave_row(float *to, const float (&sums)[PARTS], int width, float factor) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const int column = part * 32 + threadIdx.x % 32;
        if (column < width) to[column] = sums[part] * factor;
    }
}

template <typename T>
__device__ __forceinline__ T *row_of(const Rows<T> &rows, int batch, int token, int head) {
    return rows.data + batch * rows.batch + token * rows.token + head * rows.head;
}

// Keys that any of `rows` queries from the first of the tile on meet.
__device__ __forceinline__ int keys_met(const Attention<float> &job, const Span &span, int rows) {
    return job.causal ? max(0, min(span.keys, span.first + rows + span.shift())) : span.keys;
}

// Whether a query meets a key, both counted from the start of the sequence.
__device__ __forceinline__ bool seen(const Attention<float> &job, const Span &span, int query, int key) {
    return query < span.queries && key < span.keys && (!job.causal || key <= query + span.shift()) &&
           (live_keys(job, span.batch, span.key + key) & 1);
}

} // namespace fulgur

extern "C" __global__ void __launch_bounds__(256)
    attention_plain_forward(const __grid_constant__ fulgur::Attention<float> job) {
    using namespace fulgur;
    extern __shared__ float memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Span span(job, blockIdx.x, ROWS);
    const int head = blockIdx.y, group = head / (job.heads / job.groups), batch = span.batch;
    const int rows = min(ROWS, span.queries - span.first), keys = keys_met(job, span, rows);
    float *queries = memory, *met_keys = queries + ROWS * padded(job.d), *values = met_keys + MET * padded(job.d);
    const float *own = queries + warp * OWN * padded(job.d);
    copy_rows(queries, row_of(job.q, batch, span.query + span.first, head), job.q.token, rows, job.d);
    const float scale = job.scale * LOG_TWO_E;
    float o[OWN][PARTS] = {}, most[OWN], total[OWN] = {};
#pragma unroll
    for (int r = 0; r < OWN; r++) most[r] = -INFINITY;
    for (int from = 0; from < keys; from += MET) {
        __syncthreads();
        copy_rows(met_keys, row_of(job.k, batch, span.key + from, group), job.k.token, span.keys - from, job.d);
        copy_rows(values, row_of(job.v, batch, span.key + from, group), job.v.token, span.keys - from, job.e);
        __syncthreads();
        float s[OWN];
        dot_rows(s, own, met_keys, job.d);
#pragma unroll
        for (int r = 0; r < OWN; r++) {
            if (!seen(job, span, span.first + warp * OWN + r, from + lane)) s[r] = -INFINITY;
            float top = fmaxf(most[r], s[r]);
            for (int mask = 16; mask > 0; mask >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, mask));
            const float origin = top == -INFINITY ? 0.0f : top;
            const float keep = exp2f((most[r] - origin) * scale);
            most[r] = top;
            s[r] = exp2f((s[r] - origin) * scale);
            float sum = s[r];
            for (int mask = 16; mask > 0; mask >>= 1) sum += __shfl_xor_sync(~0u, sum, mask);
            total[r] = total[r] * keep + sum;
#pragma unroll
            for (int part = 0; part < PARTS; part++) o[r][part] *= keep;
        }
        add_rows(o, s, values, job.e);
    }
#pragma unroll
    for (int r = 0; r < OWN; r++) {
        const int row = warp * OWN + r, token = span.query + span.first + row;
        if (row >= rows) continue;
        leave_row(row_of(job.o, batch, token, head), o[r], job.e, total[r] > 0.0f ? 1.0f / total[r] : 0.0f);
        if (lane == 0)
            job.log_sum[((int64_t)batch * job.heads + head) * job.tokens + token] =
                total[r] > 0.0f ? LOG_TWO * (most[r] * scale + log2f(total[r])) : INFINITY;
    }
}

namespace fulgur {

// The side of KEYS makes dK and dV, that of queries dQ. A row has a main part, q or k, and another, dO or v.
template <bool KEYS> __device__ __forceinline__ void plain_backward(const Attention<float> &job) {
    extern __shared__ float memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Span span(job, blockIdx.x, ROWS);
    const int share = job.heads / job.groups, batch = span.batch;
    const int group = KEYS ? blockIdx.y : blockIdx.y / share;
    const int first_head = KEYS ? group * share : blockIdx.y, heads = KEYS ? share : 1;
    const int rows = min(ROWS, (KEYS ? span.keys : span.queries) - span.first);
    float *mains = memory, *others = mains + ROWS * padded(job.d);
    float *met_mains = others + ROWS * padded(job.e), *met_others = met_mains + MET * padded(job.d);
    const float *own_main = mains + warp * OWN * padded(job.d), *own_other = others + warp * OWN * padded(job.e);
    const int own_token = (KEYS ? span.key : span.query) + span.first, own_head = KEYS ? group : first_head;
    copy_rows(mains, row_of(KEYS ? job.k : job.q, batch, own_token, own_head), KEYS ? job.k.token : job.q.token, rows, job.d);
    copy_rows(others, row_of(KEYS ? job.v : job.d_o, batch, own_token, own_head), KEYS ? job.v.token : job.d_o.token, rows,
              job.e);
    const float scale = job.scale * LOG_TWO_E;
    // Rows that are met, on the grid of tiles.
    const int start = KEYS && job.causal ? max(0, span.first - span.shift()) / MET * MET : 0;
    const int end = KEYS ? span.queries : keys_met(job, span, rows);
    float main_sums[OWN][PARTS] = {}, other_sums[OWN][PARTS] = {};
    for (int head = first_head; head < first_head + heads; head++) {
        const int64_t head_row = ((int64_t)batch * job.heads + head) * job.tokens + span.query;
        const int met_head = KEYS ? head : group;
        for (int from = start; from < end; from += MET) {
            const int token = (KEYS ? span.query : span.key) + from, count = (KEYS ? span.queries : span.keys) - from;
            __syncthreads();
            copy_rows(met_mains, row_of(KEYS ? job.q : job.k, batch, token, met_head), KEYS ? job.q.token : job.k.token,
                      count, job.d);
            copy_rows(met_others, row_of(KEYS ? job.d_o : job.v, batch, token, met_head), KEYS ? job.d_o.token : job.v.token,
                      count, job.e);
            __syncthreads();
            float p[OWN], ds[OWN];
            dot_rows(p, own_main, met_mains, job.d);
            dot_rows(ds, own_other, met_others, job.e);
#pragma unroll
            for (int r = 0; r < OWN; r++) {
                const int row = span.first + warp * OWN + r, met = from + lane;
                const int query = KEYS ? met : row, key = KEYS ? row : met;
                const bool live = seen(job, span, query, key);
                p[r] = live ? exp2f(p[r] * scale - job.log_sum[head_row + query] * LOG_TWO_E) : 0.0f;
                ds[r] = live ? p[r] * (ds[r] - job.dots[head_row + query]) : 0.0f;
            }
            add_rows(main_sums, ds, met_mains, job.d);
            if (KEYS) add_rows(other_sums, p, met_others, job.e);
        }
    }
#pragma unroll
    for (int r = 0; r < OWN; r++) {
        const int row = warp * OWN + r;
        if (row >= rows) continue;
        leave_row(row_of(KEYS ? job.dk : job.dq, batch, own_token + row, own_head), main_sums[r], job.d, job.scale);
        if (KEYS) leave_row(row_of(job.dv, batch, own_token + row, own_head), other_sums[r], job.e, 1.0f);
    }
}

} // namespace fulgur

extern "C" __global__ void __launch_bounds__(256)
    attention_plain_keys(const __grid_constant__ fulgur::Attention<float> job) {
    fulgur::plain_backward<true>(job);
}

extern "C" __global__ void __launch_bounds__(256)
    attention_plain_queries(const __grid_constant__ fulgur::Attention<float> job) {
    fulgur::plain_backward<false>(job);
}

// rowsum(dO (*) O), one warp a row in the order [B, H, N].
extern "C" __global__ void __launch_bounds__(256)
    attention_plain_dots(const __grid_constant__ fulgur::Attention<float> job, int64_t rows) {
    using namespace fulgur;
    const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    const int token = row % job.tokens, head = row / job.tokens % job.heads, batch = row / job.tokens / job.heads;
    const float *o = row_of(job.o, batch, token, head), *d_o = row_of(job.d_o, batch, token, head);
    float sum = 0.0f;
    for (int c = threadIdx.x % 32; c < job.e; c += 32) sum += o[c] * d_o[c];
    for (int mask = 16; mask > 0; mask >>= 1) sum += __shfl_xor_sync(~0u, sum, mask);
    if (threadIdx.x % 32 == 0) job.dots[row] = sum;
}
