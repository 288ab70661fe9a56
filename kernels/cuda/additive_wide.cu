// The non-causal additive recurrence on bf16 projections for heads of any width: what lies around its matrix products, which cuBLAS
// does. Formulas in src/additive/mod.rs; the forms for narrow heads, which keep all in one kernel, in additive.cu and
// additive_plain.cu.
//
// x [B, N, 2 H D + H E] holds queries (before their SiLU), logits and values of all heads side by side. Turned are q and k
// [B, H, N, W]: with phases W = 2 D, cosine parts before sine parts, without them W = D. trig [N, D] holds (cosine, sine), or is null.
//
// | kernel        | a thread owns                       | reads, writes (bytes a token and head)    |
// |---------------|-------------------------------------|-------------------------------------------|
// | wide_parts    | 4 channels of a part of the tokens  | logits 2 D; max and den of parts          |
// | wide_merge    | a channel                           | the parts                                 |
// | wide_split    | 4 channels of a token               | x 4 D + 2 E; q, k 4 W, v 2 E              |
// | wide_heads    | 4 channels of a token               | moves rows of E between two layouts       |
// | wide_through  | a channel                           | S, dS                                     |
// | wide_backward | 4 channels of a token, a run of b h | x 4 D, dq, dk 4 W; dx 4 D, phases         |
//
// Statistics and all arithmetic are float. No atomics: the adjoint of the phases is summed over the (batch, head) of a run in
// registers, over runs by rows.cu. Limit: memory bandwidth.
#include "common.cuh"

using bf16 = __nv_bfloat16;

constexpr float LOWEST = -3.402823466e38f; // a maximum of nothing: no difference of two is infinity minus infinity

struct Wide {
    const bf16 *x;
    const float2 *trig;  // or null
    const uint8_t *keep; // [B, N], or null
    const float *max, *den; // [B, H D]
    int b, n, h, d, e, w;
};

__device__ __forceinline__ bool live(const Wide &job, int64_t token) { return !job.keep || job.keep[token] != 0; }

// Online maximum and sum of exponentials over `length` tokens for each of [parts, B, H D / 4] threads.
extern "C" __global__ void __launch_bounds__(256) wide_parts(Wide job, float *max_out, float *den_out, int parts, int length) {
    const int keys = job.h * job.d, groups = keys / 4, row = 2 * keys + job.h * job.e;
    const int64_t item = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (item >= (int64_t)parts * job.b * groups) return;
    const int c = item % groups * 4, part = item / groups / job.b;
    const int64_t b = item / groups % job.b;
    const int first = part * length, last = min(first + length, job.n);
    float max[4] = {LOWEST, LOWEST, LOWEST, LOWEST}, den[4] = {};
    for (int t = first; t < last; t++) {
        const int64_t token = b * job.n + t;
        if (!live(job, token)) continue;
        float g[4];
        load<4>(job.x + token * row + keys + c, g);
        for (int i = 0; i < 4; i++) {
            const float high = fmaxf(max[i], g[i]);
            den[i] = den[i] * expf(max[i] - high) + expf(g[i] - high);
            max[i] = high;
        }
    }
    store<4>(max_out + item * 4, max);
    store<4>(den_out + item * 4, den);
}

// Parts in order, for each of `channels` = B H D.
extern "C" __global__ void __launch_bounds__(256) wide_merge(const float *max_in, const float *den_in, float *max_out, float *den_out, int64_t channels, int parts) {
    const int64_t channel = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (channel >= channels) return;
    float max = LOWEST, den = 0.0f;
    for (int p = 0; p < parts; p++) max = fmaxf(max, max_in[p * channels + channel]);
    for (int p = 0; p < parts; p++) den += den_in[p * channels + channel] * expf(max_in[p * channels + channel] - max);
    max_out[channel] = max;
    den_out[channel] = den;
}

// Four keys of a token, zero where it does not count; `channel` is that of all heads.
__device__ __forceinline__ void keys_of(const Wide &job, int64_t token, int channel, float (&k)[4]) {
    const int keys = job.h * job.d, row = 2 * keys + job.h * job.e;
    const bool counts = live(job, token);
    load<4>(job.x + token * row + keys + channel, k);
    const int64_t at = token / job.n * keys + channel;
    float max[4], den[4];
    load<4>(job.max + at, max);
    load<4>(job.den + at, den);
    for (int i = 0; i < 4; i++) k[i] = counts && den[i] > 0.0f ? expf(k[i] - max[i]) / den[i] : 0.0f;
}

// Stores four channels of a token to its row of W, turned where there are phases.
__device__ __forceinline__ void store_turned(const Wide &job, bf16 *row, int c, int t, const float (&x)[4]) {
    if (!job.trig) {
        store<4>(row + c, x);
        return;
    }
    float cosine[4], sine[4];
    for (int i = 0; i < 4; i++) {
        const float2 turn = job.trig[(int64_t)t * job.d + c + i];
        cosine[i] = turn.x * x[i], sine[i] = turn.y * x[i];
    }
    store<4>(row + c, cosine);
    store<4>(row + job.d + c, sine);
}

extern "C" __global__ void __launch_bounds__(256) wide_split(Wide job, bf16 *q, bf16 *k, bf16 *v) {
    const int keys = job.h * job.d, row = 2 * keys + job.h * job.e, groups = row / 4;
    const int64_t item = blockIdx.x * (int64_t)blockDim.x + threadIdx.x, tokens = (int64_t)job.b * job.n;
    if (item >= tokens * groups) return;
    const int column = item % groups * 4;
    const int64_t token = item / groups, b = token / job.n;
    const int t = token % job.n;
    float y[4];
    if (column < 2 * keys) {
        const bool query = column < keys;
        const int channel = query ? column : column - keys, head = channel / job.d, c = channel % job.d;
        if (query) {
            load<4>(job.x + token * row + column, y);
            for (int i = 0; i < 4; i++) y[i] *= sigmoid(y[i]);
        } else {
            keys_of(job, token, channel, y);
        }
        store_turned(job, (query ? q : k) + ((b * job.h + head) * job.n + t) * job.w, c, t, y);
    } else {
        const int channel = column - 2 * keys, head = channel / job.e, c = channel % job.e;
        load<4>(job.x + token * row + column, y);
        if (!live(job, token))
            for (int i = 0; i < 4; i++) y[i] = 0.0f;
        store<4>(v + ((b * job.h + head) * job.n + t) * job.e + c, y);
    }
}

// From [B, N, H, E] with rows of `stride` to [B, H, N, E], or back.
extern "C" __global__ void __launch_bounds__(256) wide_heads(bf16 *rows, bf16 *heads, int b, int n, int h, int e, int64_t stride, int back) {
    const int groups = h * e / 4;
    const int64_t item = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (item >= (int64_t)b * n * groups) return;
    const int channel = item % groups * 4, head = channel / e, c = channel % e;
    const int64_t token = item / groups, at = ((token / n * h + head) * n + token % n) * e + c, from = token * stride + channel;
    float y[4];
    if (back) {
        load<4>(heads + at, y);
        store<4>(rows + from, y);
    } else {
        load<4>(rows + from, y);
        store<4>(heads + at, y);
    }
}

// Row sums of S (*) dS for each of `channels` = B H D; both parts of a turned channel.
extern "C" __global__ void __launch_bounds__(256) wide_through(const bf16 *state, const bf16 *dstate, float *through, int64_t channels, int d, int e, int w) {
    const int64_t channel = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (channel >= channels) return;
    float sum = 0.0f;
    for (int row = channel % d; row < w; row += d) {
        const int64_t at = (channel / d * w + row) * e;
        for (int i = 0; i < e; i += 4) {
            float s[4], g[4];
            load<4>(state + at + i, s);
            load<4>(dstate + at + i, g);
            for (int j = 0; j < 4; j++) sum += s[j] * g[j];
        }
    }
    through[channel] = sum;
}

// Grid over [runs, N, D / 4] threads: adjoints of queries and logits of the (batch, head) of a run, phase partials [runs, N, D].
extern "C" __global__ void __launch_bounds__(256) wide_backward(Wide job, const bf16 *dq, const bf16 *dk, const float *through, bf16 *dx, float *dphase, int runs, int per_run) {
    const int keys = job.h * job.d, row = 2 * keys + job.h * job.e, groups = job.d / 4;
    const int64_t item = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (item >= (int64_t)runs * job.n * groups) return;
    const int c = item % groups * 4, t = item / groups % job.n, run = item / groups / job.n;
    float cosine[4] = {1.0f, 1.0f, 1.0f, 1.0f}, sine[4] = {};
    if (job.trig)
        for (int i = 0; i < 4; i++) {
            const float2 turn = job.trig[(int64_t)t * job.d + c + i];
            cosine[i] = turn.x, sine[i] = turn.y;
        }
    float turned[4] = {};
    const int last = min((run + 1) * per_run, job.b * job.h);
    for (int sequence = run * per_run; sequence < last; sequence++) {
        const int head = sequence % job.h, channel = head * job.d + c;
        const int64_t token = (int64_t)(sequence / job.h) * job.n + t, at = ((int64_t)sequence * job.n + t) * job.w + c;
        float first[4], second[4] = {}, y[4], out[4];
        load<4>(dq + at, first);
        if (job.trig) load<4>(dq + at + job.d, second);
        load<4>(job.x + token * row + channel, y);
        for (int i = 0; i < 4; i++) {
            const float s = sigmoid(y[i]);
            turned[i] += y[i] * s * (second[i] * cosine[i] - first[i] * sine[i]);
            out[i] = (first[i] * cosine[i] + second[i] * sine[i]) * s * (1.0f + y[i] * (1.0f - s));
        }
        store<4>(dx + token * row + channel, out);
        load<4>(dk + at, first);
        if (job.trig) load<4>(dk + at + job.d, second);
        keys_of(job, token, channel, y);
        load<4>(through + (int64_t)sequence * job.d + c, out);
        for (int i = 0; i < 4; i++) {
            turned[i] += y[i] * (second[i] * cosine[i] - first[i] * sine[i]);
            out[i] = y[i] * (first[i] * cosine[i] + second[i] * sine[i] - out[i]);
        }
        store<4>(dx + token * row + keys + channel, out);
    }
    if (job.trig) store<4>(dphase + ((int64_t)run * job.n + t) * job.d + c, turned);
}
