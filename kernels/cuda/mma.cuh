// Tiles of bf16 in shared memory and the tensor-core instructions of compute capability 8.0 on them.
#pragma once
#include <cuda_bf16.h>
#include <cstdint>

namespace fulgur {

using bf16 = __nv_bfloat16;

__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Sixteen bytes to shared memory, on their way until wait_copies; zeros where not live.
__device__ __forceinline__ void copy16(uint32_t to, const void *from, bool live) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(live ? 16 : 0) : "memory");
}
// Four bytes, likewise.
__device__ __forceinline__ void copy4(uint32_t to, const void *from, bool live) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(live ? 4 : 0) : "memory");
}
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N groups of copies are on their way.
template <int N> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void store4(uint32_t to, uint32_t value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}
__device__ __forceinline__ uint4 load16(uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
    return v;
}

// Four 8x8 matrices, whose rows lie at the addresses of lanes 0-7, 8-15, 16-23, 24-31.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
// c += a b for 16x16 by 16x8.
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The lower half holds the first.
__device__ __forceinline__ uint32_t pack(float first, float second) {
    __nv_bfloat162 p = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<uint32_t *>(&p);
}
__device__ __forceinline__ float first_of(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float second_of(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ uint32_t scaled(uint32_t pair, float first, float second) {
    return pack(first_of(pair) * first, second_of(pair) * second);
}

__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Rows of WIDTH bf16 at a multiple of 128 bytes. The 16-byte pieces of eight rows are permuted so that ldmatrix meets no bank
// twice: piece p of row r lies where piece p ^ (r & 7) would. What depends on the lane is computed once, since rows and
// columns are multiples of 8 and known to the compiler: then only bits of the column meet those of the lane.
template <int WIDTH> struct Tile {
    static_assert(WIDTH % 64 == 0, "eight pieces or a multiple");
    static constexpr int ROW = WIDTH * 2;
    uint32_t base;

    __device__ __forceinline__ uint32_t place(int row, int column, uint32_t of_lane) const {
        return base + (of_lane ^ (column * 2 & 127)) + (column * 2 & ~127) + row * ROW;
    }
    __device__ __forceinline__ uint32_t at(int row, int piece) const {
        return base + row * ROW + (((piece & ~7) | ((piece ^ row) & 7)) << 4);
    }
    // `block`, computed where it is used: in decay_uniform.cu, which keeps more in registers, that is faster.
    __device__ __forceinline__ uint32_t block_here(int row, int column, int lane) const {
        return at(row + (lane & 15), (column >> 3) + (lane >> 4));
    }
    // What a lane gives to ldmatrix for the 16x16 block at (row, column), a multiple of 16: the matrices are those of rows
    // 0-7 and 8-15 at columns 0-7, then at 8-15.
    __device__ __forceinline__ uint32_t block(int row, int column, int lane) const {
        return place(row, column, (lane & 15) * ROW + ((lane & 7 ^ lane >> 4) << 4));
    }
    // The same for 8 rows of 32 columns: the matrices are those of columns 0-7, 8-15, 16-23, 24-31.
    __device__ __forceinline__ uint32_t strip(int row, int column, int lane) const {
        return place(row, column, (lane & 7) * ROW + ((lane & 7 ^ lane >> 3) << 4));
    }
    // The two elements of an 8x8 matrix at (row, column) that a lane holds.
    __device__ __forceinline__ uint32_t pair(int row, int column, int lane) const {
        return place(row, column, (lane >> 2) * (ROW + 16) + (lane & 3) * 4);
    }
    // Sixteen bytes of a 16x16 block for each lane.
    __device__ __forceinline__ uint32_t piece(int row, int column, int lane) const {
        return place(row, column, piece_row(lane) * ROW + ((lane & 7 ^ (lane >> 3 & 1)) << 4));
    }
    static __device__ __forceinline__ int piece_row(int lane) { return (lane & 7) + (lane >> 4) * 8; }
    static __device__ __forceinline__ int piece_column(int lane) { return lane & 8; }
    // Elements 2 i and 2 i + 1 of a row that is known to the compiler.
    __device__ __forceinline__ uint32_t couple(int row, int i) const { return base + (i * 4 ^ (row & 7) << 4) + row * ROW; }
};

__device__ __forceinline__ uint32_t load4(uint32_t from) {
    uint32_t value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(from) : "memory");
    return value;
}

// Starts to copy `count` of ROWS rows, of `width` elements each, a multiple of 8, into a tile; the rest becomes zeros.
template <int ROWS, int WIDTH, int THREADS>
__device__ __forceinline__ void start_rows(Tile<WIDTH> tile, const bf16 *from, int64_t stride, int count, int width) {
    constexpr int PIECES = WIDTH / 8, STEP = THREADS / PIECES;
    static_assert(STEP % 8 == 0, "a thread meets rows that are permuted alike");
    const int first = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    const bool inside = piece * 8 < width;
    const uint32_t to = tile.base + first * (WIDTH * 2) + ((piece ^ (first & 7)) << 4);
    from += first * stride + piece * 8;
#pragma unroll
    for (int row = 0; row < ROWS; row += STEP) {
        // Nothing is read through addresses of rows that are not live.
        if (ROWS % STEP == 0 || row + first < ROWS) copy16(to + row * WIDTH * 2, from, inside && row + first < count);
        from += STEP * stride;
    }
}

} // namespace fulgur
