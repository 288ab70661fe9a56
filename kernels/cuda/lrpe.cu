// Rows turned by phases: rotary positions, and the doubling of LRPE; formulas in src/lrpe/turn/mod.rs.
//
// A thread owns V phases of a token and turns the rows of a chunk of the heads and batches that share them: sines and
// cosines are made once. Behind the channels that are doubled there may be others, which threads of their own copy. x [B, N, H, ..] may have any strides (in elements) but that of its last axis; y, dy and dx are
// dense. phase is float, [N, groups, P]: one group, or one for each head.
// turn        the rotation: 2 T a element; the doubling: 3 T an element of x. The copy is a doubling without phases.
// turn_back   the same, and where phases are learnt another reading of x: sums over the rows of a chunk in partials
//             [chunks, N, groups, P] (null: not wanted).
// phases      n theta in double precision, within half a turn of zero: a position far away is as exact as the first.
// Limit: memory bandwidth. No atomics: the same bits each time.
#include "rowwise.cuh"

enum Form { DOUBLED, COPIED, HALVES, NEIGHBOURS };

struct Rows {
    // The last: channels behind those that are doubled.
    uint32_t batch, tokens, heads, groups, phases, rest;
    // Of x.
    size_t batch_stride, token_stride, head_stride;
    uint32_t rows_per_chunk;
};

// Which phases of which token a thread owns, and the rows of its chunk.
template <int V> struct Place {
    uint32_t token, phase, first, last;
    bool live;
    size_t at;
    const Rows &rows;

    __device__ explicit Place(const Rows &rows) : rows(rows) {
        const uint32_t vectors = (rows.phases + rows.rest) / V;
        const size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
        live = index < (size_t)rows.tokens * vectors;
        token = index / vectors;
        phase = index % vectors * V;
        at = ((size_t)token * rows.groups + blockIdx.z) * rows.phases + phase;
        const uint32_t all = rows.batch * (rows.heads / rows.groups);
        first = blockIdx.y * rows.rows_per_chunk;
        last = min(first + rows.rows_per_chunk, all);
    }
    // Whether its channels have no phases.
    __device__ bool rests() const { return phase >= rows.phases; }
    // Batch and head of a row of the chunk.
    __device__ void find(uint32_t row, uint32_t &b, uint32_t &h) const {
        const uint32_t heads = rows.heads / rows.groups;
        b = row / heads;
        h = blockIdx.z * heads + row % heads;
    }
    __device__ size_t strided(uint32_t b, uint32_t h) const {
        return b * rows.batch_stride + token * rows.token_stride + h * rows.head_stride;
    }
    __device__ size_t dense(uint32_t b, uint32_t h, uint32_t width) const {
        return (((size_t)b * rows.tokens + token) * rows.heads + h) * width;
    }
    __device__ void turns(const float *phases, float (&sine)[V], float (&cosine)[V]) const {
        float angle[V];
        load_vector<V>(phases + at, angle);
#pragma unroll
        for (int i = 0; i < V; i++) {
            // Half turns in double precision first: sincosf would need local memory for far angles.
            const double halves = angle[i] * 0.318309886183790671538;
            sincospif((float)(halves - 2.0 * rint(halves * 0.5)), &sine[i], &cosine[i]);
        }
    }
};

// The elements of V pairs of a row of 2 P: those of pair i stand at first(i) and second(i).
template <int V, int FORM> struct Pairs {
    float z[2][V];
    static __device__ constexpr int first(int i) { return FORM == NEIGHBOURS ? 2 * i : i; }
    static __device__ constexpr int second(int i) { return FORM == NEIGHBOURS ? 2 * i + 1 : V + i; }
    __device__ float &a(int i) { return z[first(i) / V][first(i) % V]; }
    __device__ float &b(int i) { return z[second(i) / V][second(i) % V]; }
    static __device__ size_t low(uint32_t phase) { return FORM == NEIGHBOURS ? 2 * phase : phase; }
    static __device__ size_t high(uint32_t phase, uint32_t phases) {
        return FORM == NEIGHBOURS ? 2 * phase + V : phases + phase;
    }
    template <typename T> __device__ void load(const T *row, uint32_t phase, uint32_t phases) {
        load_vector<V>(row + low(phase), z[0]);
        load_vector<V>(row + high(phase, phases), z[1]);
    }
    template <typename T> __device__ void store(T *row, uint32_t phase, uint32_t phases) const {
        store_vector<V>(row + low(phase), z[0]);
        store_vector<V>(row + high(phase, phases), z[1]);
    }
};

__device__ constexpr bool has_phases(int form) { return form != COPIED; }
__device__ constexpr bool widens(int form) { return form == DOUBLED || form == COPIED; }

// Copies the channels of the thread in all rows of its chunk: of x to y, or of dy to dx.
template <int V, bool BACK, typename T>
__device__ void copy_rest(const Place<V> &place, const T *__restrict__ from, T *__restrict__ to) {
    const uint32_t narrow = place.rows.phases + place.rows.rest, wide = narrow + place.rows.phases;
#pragma unroll 2
    for (uint32_t row = place.first; row < place.last; row++) {
        uint32_t b, h;
        place.find(row, b, h);
        const size_t behind = place.dense(b, h, wide) + place.rows.phases;
        float z[V];
        load_vector<V>(from + (BACK ? behind : place.strided(b, h)) + place.phase, z);
        store_vector<V>(to + (BACK ? place.dense(b, h, narrow) : behind) + place.phase, z);
    }
}

template <typename T, int V, int FORM>
__device__ void turn(const T *__restrict__ x, const float *__restrict__ phase, T *__restrict__ y, const Rows &rows) {
    const Place<V> place(rows);
    if (!place.live) return;
    if constexpr (widens(FORM)) {
        if (place.rests()) return copy_rest<V, false>(place, x, y);
    }
    float sine[V], cosine[V];
    if constexpr (has_phases(FORM)) place.turns(phase, sine, cosine);
#pragma unroll 2
    for (uint32_t row = place.first; row < place.last; row++) {
        uint32_t b, h;
        place.find(row, b, h);
        const T *from = x + place.strided(b, h);
        T *to = y + place.dense(b, h, 2 * rows.phases + rows.rest);
        Pairs<V, FORM> p;
        if constexpr (widens(FORM)) {
            load_vector<V>(from + place.phase, p.z[0]);
#pragma unroll
            for (int i = 0; i < V; i++) {
                p.z[1][i] = FORM == COPIED ? p.z[0][i] : p.z[0][i] * sine[i];
                if constexpr (FORM == DOUBLED) p.z[0][i] *= cosine[i];
            }
        } else {
            p.load(from, place.phase, rows.phases);
#pragma unroll
            for (int i = 0; i < V; i++) {
                const float a = p.a(i), b = p.b(i);
                p.a(i) = a * cosine[i] - b * sine[i];
                p.b(i) = a * sine[i] + b * cosine[i];
            }
        }
        p.store(to, place.phase, rows.phases);
    }
}

template <typename T, int V, int FORM>
__device__ void turn_back(const T *__restrict__ x, const float *__restrict__ phase, const T *__restrict__ dy,
                          T *__restrict__ dx, float *__restrict__ partials, const Rows &rows) {
    const Place<V> place(rows);
    if (!place.live) return;
    if constexpr (widens(FORM)) {
        if (place.rests()) return copy_rest<V, true>(place, dy, dx);
    }
    float sine[V], cosine[V], dphase[V] = {};
    if constexpr (has_phases(FORM)) place.turns(phase, sine, cosine);
    const uint32_t width = widens(FORM) ? rows.phases + rows.rest : 2 * rows.phases;
#pragma unroll 2
    for (uint32_t row = place.first; row < place.last; row++) {
        uint32_t b, h;
        place.find(row, b, h);
        const T *from = x + place.strided(b, h);
        T *to = dx + place.dense(b, h, width);
        Pairs<V, FORM> d;
        d.load(dy + place.dense(b, h, 2 * rows.phases + rows.rest), place.phase, rows.phases);
        if constexpr (FORM == COPIED) {
#pragma unroll
            for (int i = 0; i < V; i++) d.z[0][i] += d.z[1][i];
            store_vector<V>(to + place.phase, d.z[0]);
        } else if constexpr (FORM == DOUBLED) {
            if (partials) {
                float a[V];
                load_vector<V>(from + place.phase, a);
#pragma unroll
                for (int i = 0; i < V; i++) dphase[i] += a[i] * (d.z[1][i] * cosine[i] - d.z[0][i] * sine[i]);
            }
#pragma unroll
            for (int i = 0; i < V; i++) d.z[0][i] = d.z[0][i] * cosine[i] + d.z[1][i] * sine[i];
            store_vector<V>(to + place.phase, d.z[0]);
        } else {
#pragma unroll
            for (int i = 0; i < V; i++) {
                const float a = d.a(i), b = d.b(i);
                d.a(i) = a * cosine[i] + b * sine[i];
                d.b(i) = b * cosine[i] - a * sine[i];
            }
            if (partials) {
                // A rotation of both keeps the area between x and its adjoint.
                Pairs<V, FORM> p;
                p.load(from, place.phase, rows.phases);
#pragma unroll
                for (int i = 0; i < V; i++) dphase[i] += p.a(i) * d.b(i) - p.b(i) * d.a(i);
            }
            d.store(to, place.phase, rows.phases);
        }
    }
    if (!partials) return;
    const size_t chunk = (size_t)rows.tokens * rows.groups * rows.phases;
    store_vector<V>(partials + blockIdx.y * chunk + place.at, dphase);
}

// Phases [tokens, count] of tokens from number `start` on.
// The first token is number `start`, or where there is a clock what that says.
extern "C" __global__ void __launch_bounds__(256)
    phases(const float *theta, float *phase, uint32_t tokens, uint32_t count, uint64_t start, const uint32_t *clock) {
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (size_t)tokens * count) return;
    if (clock) start = *clock;
    constexpr double TURN = 6.283185307179586476925;
    const double angle = (double)(start + at / count) * theta[at % count];
    phase[at] = (float)(angle - rint(angle / TURN) * TURN);
}

#define TURN(NAME, FORM, SUFFIX, T, V)                                                                                 \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                               \
        NAME##_##SUFFIX##_v##V(const T *x, const float *phase, T *y, const Rows rows) {                                \
        turn<T, V, FORM>(x, phase, y, rows);                                                                           \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 2) NAME##_back_##SUFFIX##_v##V(                                  \
        const T *x, const float *phase, const T *dy, T *dx, float *partials, const Rows rows) {                        \
        turn_back<T, V, FORM>(x, phase, dy, dx, partials, rows);                                                       \
    }
#define TURNS(NAME, FORM)                                                                                              \
    TURN(NAME, FORM, f32, float, 1)                                                                                    \
    TURN(NAME, FORM, f32, float, 4)                                                                                    \
    TURN(NAME, FORM, bf16, __nv_bfloat16, 1)                                                                           \
    TURN(NAME, FORM, bf16, __nv_bfloat16, 8)
TURNS(doubled, DOUBLED)
TURNS(copied, COPIED)
TURNS(halves, HALVES)
TURNS(neighbours, NEIGHBOURS)
