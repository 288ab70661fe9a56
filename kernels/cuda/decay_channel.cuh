// What the two kernels of the recurrence with a decay for each key channel share. Both go through chunks of 16 tokens.
//
// With b_i the sum of log-decays of a chunk up to token i, itself included, the weight of a pair is exp(b_i - b_j), j <= i,
// for each channel. It is split at a token between the two, so that no factor exceeds 1: pairs whose numbers i, j differ in
// bit l first, counted from above, meet at the middle of their block of 2^(l+1) tokens,
//
//   exp(b_i - b_j) = exp(b_i - b_mid) exp(b_mid - b_j),     level(i) = exp(b_i - b_mid) if bit l of i is set, else
//                                                                      exp(b_mid - b_i)
//
// so that every token has one factor a level, and the four levels of a chunk are plain products. Exponents are in powers
// of two.
//
// ADDITIVE is the causal additive recurrence of LightNet: the gate is z_t = log sum_{s <= t} exp(g_s) instead of a log-decay,
// keys are given as their logits g, k_t = exp(g_t - z_t), and the decay is exp(z_{t-1} - z_t), so b_i = z_before - z_i.
#pragma once
#include "decay.cuh"
#include "mma.cuh"

namespace fulgur {

constexpr int FEW = 16, LEVELS = 4; // tokens of a chunk, and their levels
// Rows of 16 tokens by 16 bf16 or less, padded so that ldmatrix meets no bank twice.
struct SmallTile {
    uint32_t base;
    static constexpr int ROW = 48, BYTES = FEW * ROW;
    __device__ __forceinline__ uint32_t at(int row, int column) const { return base + row * ROW + column * 2; }
    __device__ __forceinline__ uint32_t block(int lane) const { return at(lane & 15, (lane >> 4) * 8); }
};

// Floats of a chunk, [1 + FEW][WIDTH], in rows that are padded so that eight of them lie in different banks. Row 0 is that
// of the token before.
template <int WIDTH> struct Floats {
    static constexpr int ROW = WIDTH + 8, BYTES = (FEW + 1) * ROW * 4;
};

// Starts to copy the floats of `count` tokens from `from` on and, where it is not null, of the row `before` them.
template <int WIDTH, int THREADS>
__device__ __forceinline__ void start_floats(uint32_t to, const float *from, const float *before, int64_t stride, int count,
                                             int width) {
    constexpr int PIECES = WIDTH / 4;
    for (int item = threadIdx.x + (before ? 0 : PIECES); item < (FEW + 1) * PIECES; item += THREADS) {
        const int row = item / PIECES, piece = item % PIECES;
        const bool live = piece * 4 < width && row <= count;
        const float *source = row == 0 ? before : from + (row - 1) * stride;
        copy16(to + row * Floats<WIDTH>::ROW * 4 + piece * 16, live ? source + piece * 4 : from, live);
    }
}

// Starts to copy the gates of a chunk that begins at token `from` of a segment, and, for ADDITIVE, that of the token before.
// The first token of a sequence has none; where nothing has entered either, any decay will do there.
template <int WIDTH, int THREADS, bool ADDITIVE>
__device__ __forceinline__ void start_gates(uint32_t to, const Sweep<bf16> &job, const Place &place, Segment segment, int from,
                                            int count, int first_column, int width, int all) {
    const LogDecay &log = job.log_decay;
    const float *row = log.from(segment, place.head) + from * log.token + first_column, *before = row - log.token;
    if (from == 0 && (job.cut.table || segment.start == 0)) {
        const int sequence = job.cut.table ? place.segment : segment.batch;
        before = job.before ? job.before + (int64_t)(sequence * job.heads + place.head) * all + first_column : row;
    }
    start_floats<WIDTH, THREADS>(to, row, ADDITIVE ? before : nullptr, log.token, count, width);
}

// Sums of log-decays that lie further below the end of a chunk than this stand for decays of zero: where logits of tokens are
// negative infinity, gates are the lowest floats.
__device__ constexpr float LOWEST = 1400.0f;

} // namespace fulgur
