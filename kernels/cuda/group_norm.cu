// Norms of groups of channels over all places of a set; formulas in src/norm/group.rs. x and y [S, N, C]; gain and bias are float.
//
// A block has the places of a chunk. Its threads are L lanes over vectors of V channels times Y places at a time.
// group_norm_sums    mean and squared deviations of each group of a chunk, to partials [S, chunks, groups, 2]: 1 T a element.
// group_norm_apply   joins the chunks of its set in their order and norms its own: 2 T a element.
// Limit: memory bandwidth; the second read comes from the second-level cache where a set fits. No atomics.
#include "common.cuh"

struct GroupNorm {
    uint32_t places, channels, groups; // of a set, of a place, of the channels
    uint32_t per_chunk;                // places of a chunk
    uint32_t lanes;                    // threads along the channels
    float eps;
    uint32_t silu; // whether y sigmoid(y) is the result
};

// Count, mean and squared deviations of values, and of others beside them.
struct Spread {
    float n = 0.0f, mean = 0.0f, squares = 0.0f;
    __device__ __forceinline__ void join(float count, float other_mean, float other_squares) {
        if (count == 0.0f) return;
        const float all = n + count, delta = other_mean - mean, share = count / all;
        mean += delta * share;
        squares += other_squares + delta * delta * n * share;
        n = all;
    }
};

__device__ __forceinline__ uint32_t places_of_chunk(const GroupNorm &g, uint32_t chunk) {
    return min(g.per_chunk, g.places - chunk * g.per_chunk);
}

// Grid (chunks, sets). Shared: two floats for each of Y places at a time and each channel.
template <typename T, int V> __device__ void group_norm_sums(const T *x, float *partials, GroupNorm g) {
    extern __shared__ float shared[];
    const uint32_t down = blockDim.x / g.lanes, lane = threadIdx.x % g.lanes, own = threadIdx.x / g.lanes;
    const uint32_t count = places_of_chunk(g, blockIdx.x);
    x += ((size_t)blockIdx.y * g.places + (size_t)blockIdx.x * g.per_chunk) * g.channels;
    if (own < down) {
        for (uint32_t c = lane * V; c < g.channels; c += g.lanes * V) {
            // Sums of differences from the first value keep their digits where the mean is large.
            float start[V] = {}, sum[V] = {}, squares[V] = {};
            uint32_t n = 0;
            for (uint32_t place = own; place < count; place += down, n++) {
                float a[V];
                load<V>(x + (size_t)place * g.channels + c, a);
#pragma unroll
                for (int i = 0; i < V; i++) {
                    if (n == 0) start[i] = a[i];
                    const float d = a[i] - start[i];
                    sum[i] += d;
                    squares[i] += d * d;
                }
            }
            const float of = n > 0 ? 1.0f / n : 0.0f;
#pragma unroll
            for (int i = 0; i < V; i++) {
                float *to = shared + ((size_t)own * g.channels + c + i) * 2;
                to[0] = start[i] + sum[i] * of;
                to[1] = fmaxf(squares[i] - sum[i] * sum[i] * of, 0.0f);
            }
        }
    }
    __syncthreads();
    const uint32_t width = g.channels / g.groups;
    for (uint32_t group = threadIdx.x; group < g.groups; group += blockDim.x) {
        Spread all;
        for (uint32_t y = 0; y < down && y < count; y++) {
            const float n = (count - y + down - 1) / down;
            const float *from = shared + ((size_t)y * g.channels + group * width) * 2;
            for (uint32_t c = 0; c < width; c++) all.join(n, from[2 * c], from[2 * c + 1]);
        }
        float *to = partials + (((size_t)blockIdx.y * gridDim.x + blockIdx.x) * g.groups + group) * 2;
        to[0] = all.mean;
        to[1] = all.squares;
    }
}

// Grid (chunks, sets). Shared: two floats for each group.
template <typename T, int V>
__device__ void group_norm_apply(const T *x, const float *partials, const float *gain, const float *bias, T *y, GroupNorm g) {
    extern __shared__ float shared[];
    const uint32_t width = g.channels / g.groups;
    for (uint32_t group = threadIdx.x; group < g.groups; group += blockDim.x) {
        Spread all;
        for (uint32_t chunk = 0; chunk < gridDim.x; chunk++) {
            const float *from = partials + (((size_t)blockIdx.y * gridDim.x + chunk) * g.groups + group) * 2;
            all.join((float)places_of_chunk(g, chunk) * width, from[0], from[1]);
        }
        shared[2 * group] = all.mean;
        shared[2 * group + 1] = rsqrtf(all.squares / all.n + g.eps);
    }
    __syncthreads();
    const uint32_t down = blockDim.x / g.lanes, lane = threadIdx.x % g.lanes, own = threadIdx.x / g.lanes;
    if (own >= down) return;
    const uint32_t count = places_of_chunk(g, blockIdx.x);
    const size_t first = ((size_t)blockIdx.y * g.places + (size_t)blockIdx.x * g.per_chunk) * g.channels;
    for (uint32_t c = lane * V; c < g.channels; c += g.lanes * V) {
        float w[V], b[V], mean[V], r[V];
        load<V>(gain + c, w);
        load<V>(bias + c, b);
#pragma unroll
        for (int i = 0; i < V; i++) {
            const uint32_t group = (c + i) / width;
            mean[i] = shared[2 * group];
            r[i] = shared[2 * group + 1];
        }
        for (uint32_t place = own; place < count; place += down) {
            const size_t at = first + (size_t)place * g.channels + c;
            float a[V];
            load<V>(x + at, a);
#pragma unroll
            for (int i = 0; i < V; i++) {
                a[i] = (a[i] - mean[i]) * r[i] * w[i] + b[i];
                if (g.silu) a[i] *= sigmoid(a[i]);
            }
            store<V>(y + at, a);
        }
    }
}

#define SUMS(T) (const T *x, float *partials, GroupNorm g)
INSTANCES(group_norm_sums, SUMS, (x, partials, g))
#define APPLY(T) (const T *x, const float *partials, const float *gain, const float *bias, T *y, GroupNorm g)
INSTANCES(group_norm_apply, APPLY, (x, partials, gain, bias, y, g))
