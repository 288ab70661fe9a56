// Rows of channels that neighbouring threads share: vectors kept in registers as they were loaded, sums over a row.
//
// A row belongs to a power of two of threads, up to a block. Each keeps KEPT elements of every operand, so that memory
// is read once; what is left of very wide rows is read again.
#pragma once
#include "common.cuh"

// V neighbouring elements as they lie in memory: one, or a multiple of sixteen bytes on a multiple of sixteen.
template <typename T, int V> struct Vector {
    static constexpr int WORDS = V * sizeof(T) / 16;
    static_assert(WORDS * 16 == V * sizeof(T), "whole words");
    uint4 words[WORDS];

    __device__ void load(const T *p) {
#pragma unroll
        for (int w = 0; w < WORDS; w++) words[w] = reinterpret_cast<const uint4 *>(p)[w];
    }
    __device__ void get(float (&v)[V]) const {
#pragma unroll
        for (int w = 0; w < WORDS; w++) unpack(words[w], v + w * (V / WORDS), T());
    }
    static __device__ void unpack(uint4 a, float *v, float) {
        v[0] = __uint_as_float(a.x), v[1] = __uint_as_float(a.y);
        v[2] = __uint_as_float(a.z), v[3] = __uint_as_float(a.w);
    }
    static __device__ void unpack(uint4 a, float *v, __nv_bfloat16) {
        // bf16 is the upper half of a float.
        v[0] = __uint_as_float(a.x << 16), v[1] = __uint_as_float(a.x & 0xffff0000u);
        v[2] = __uint_as_float(a.y << 16), v[3] = __uint_as_float(a.y & 0xffff0000u);
        v[4] = __uint_as_float(a.z << 16), v[5] = __uint_as_float(a.z & 0xffff0000u);
        v[6] = __uint_as_float(a.w << 16), v[7] = __uint_as_float(a.w & 0xffff0000u);
    }
};

template <typename T> struct Vector<T, 1> {
    T word;
    __device__ void load(const T *p) { word = *p; }
    __device__ void get(float (&v)[1]) const { Pack<T, 1>::load(&word, v); }
};

template <int V, typename T> __device__ __forceinline__ void load_vector(const T *p, float (&v)[V]) {
    Vector<T, V> a;
    a.load(p);
    a.get(v);
}

__device__ __forceinline__ uint32_t pair(float a, float b) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t *>(&both);
}

template <int V> __device__ __forceinline__ void store_vector(float *p, const float (&v)[V]) {
    if constexpr (V == 1) {
        *p = v[0];
    } else {
#pragma unroll
        for (int w = 0; w < V / 4; w++)
            reinterpret_cast<float4 *>(p)[w] = make_float4(v[4 * w], v[4 * w + 1], v[4 * w + 2], v[4 * w + 3]);
    }
}
template <int V> __device__ __forceinline__ void store_vector(__nv_bfloat16 *p, const float (&v)[V]) {
    if constexpr (V == 1) {
        *p = __float2bfloat16(v[0]);
    } else {
#pragma unroll
        for (int w = 0; w < V / 8; w++) {
            const float *a = v + 8 * w;
            reinterpret_cast<uint4 *>(p)[w] =
                make_uint4(pair(a[0], a[1]), pair(a[2], a[3]), pair(a[4], a[5]), pair(a[6], a[7]));
        }
    }
}

// Vectors of an operand that a thread keeps.
template <int V> constexpr int KEPT_VECTORS = V == 1 ? 8 : 16 / V;

// The columns of a row that belong to a thread: V from `first` on, and so on every `step` up to `end`.
template <int V> struct Columns {
    uint32_t first, step, end;
    __device__ Columns(uint32_t threads, uint32_t end) : first(threadIdx.x % threads * V), step(threads * V), end(end) {}
};

// The row of an operand, null or not, that begins at element `start`, and what the thread keeps of it.
template <typename T, int V> struct Row {
    const T *data; // as it came to the kernel: no register holds it
    size_t start;
    Vector<T, V> kept[KEPT_VECTORS<V>];
    __device__ Row(const T *data, size_t start) : data(data), start(start) {}
    __device__ __forceinline__ void keep(int k, uint32_t c) {
        if (data) kept[k].load(data + start + c);
    }
    __device__ __forceinline__ Vector<T, V> beyond(uint32_t c) const {
        Vector<T, V> a;
        if (data) a.load(data + start + c);
        return a;
    }
};

// Loads what is kept of all rows before any of it is needed.
template <int V, typename... T> __device__ __forceinline__ void keep(const Columns<V> &own, Row<T, V> &...rows) {
#pragma unroll
    for (int k = 0; k < KEPT_VECTORS<V>; k++) {
        const uint32_t c = own.first + k * own.step;
        if (c < own.end) (rows.keep(k, c), ...);
    }
}

// work(k, column, vector of each row), with k negative beyond the vectors that are kept.
template <int V, typename Work, typename... T>
__device__ __forceinline__ void each(const Columns<V> &own, const Work &work, const Row<T, V> &...rows) {
#pragma unroll
    for (int k = 0; k < KEPT_VECTORS<V>; k++) {
        const uint32_t c = own.first + k * own.step;
        if (c < own.end) work(k, c, rows.kept[k]...);
    }
    for (uint32_t c = own.first + KEPT_VECTORS<V> * own.step; c < own.end; c += own.step) work(-1, c, rows.beyond(c)...);
}

// Room of row_sums for rows of more than a warp. Two buffers: one barrier a call is enough.
template <int N> struct RowSums {
    float warps[2][8][N];
};

// The sums over the `threads` threads of a row, the same in each of them. All threads of the block call it together,
// with `turn` 0 the first time.
template <int N>
__device__ __forceinline__ void row_sums(float (&v)[N], uint32_t threads, RowSums<N> &shared, uint32_t &turn) {
    for (uint32_t mask = min(threads, 32u) / 2; mask > 0; mask >>= 1) {
#pragma unroll
        for (int i = 0; i < N; i++) v[i] += __shfl_xor_sync(0xffffffffu, v[i], mask);
    }
    if (threads <= 32) return;
    const uint32_t warp = threadIdx.x / 32, warps = threads / 32, first = warp / warps * warps;
    if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int i = 0; i < N; i++) shared.warps[turn][warp][i] = v[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) {
        v[i] = 0.0f;
        for (uint32_t w = 0; w < warps; w++) v[i] += shared.warps[turn][first + w][i];
    }
    turn ^= 1;
}

// Sums over tokens of the columns of a thread: kept in registers, and beyond them in its own place in memory.
template <int V> struct TokenSums {
    float *data; // null: not wanted
    size_t start;
    float kept[KEPT_VECTORS<V>][V] = {};
    __device__ TokenSums(float *data, size_t start) : data(data), start(start) {}

    // For vector k of `each`; `first` of all tokens.
    __device__ __forceinline__ void add(int k, uint32_t c, const float (&v)[V], bool first) {
        if (k >= 0) {
#pragma unroll
            for (int i = 0; i < V; i++) kept[k][i] += v[i];
        } else if (data) {
            float before[V] = {};
            if (!first) load_vector<V>(data + start + c, before);
#pragma unroll
            for (int i = 0; i < V; i++) before[i] += v[i];
            store_vector<V>(data + start + c, before);
        }
    }
    // Writes what is kept; beyond it `add` has been, if there was `any` token.
    __device__ __forceinline__ void leave(const Columns<V> &own, bool any) const {
#pragma unroll
        for (int k = 0; k < KEPT_VECTORS<V>; k++) {
            const uint32_t c = own.first + k * own.step;
            if (c < own.end) store_vector<V>(data + start + c, kept[k]);
        }
        if (any) return;
        const float none[V] = {};
        for (uint32_t c = own.first + KEPT_VECTORS<V> * own.step; c < own.end; c += own.step)
            store_vector<V>(data + start + c, none);
    }
};
